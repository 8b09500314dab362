//! The main job: ordinary memory goes to the device, and comes back when it is touched.

use crate::harness::*;
use uhmm::{Ctx, Uhmm, args, inout, inp, out};

crate::tests![
    the_program_of_the_readme,
    pages_leave_and_come_back,
    huge_pages_leave_and_come_back_huge,
    what_is_read_stays_readable_and_a_write_is_seen,
    edges_are_exact_to_the_byte,
    an_unchanged_relaunch_moves_nothing,
    a_changed_row_moves_a_block,
    out_reads_as_before_or_zero,
    untouched_memory_is_zero_on_both_sides,
    explicit_buffers,
    prefetch_and_evict,
    two_devices_take_turns,
    ranges_of_every_size_and_offset,
];

fn mul_mat(ctx: &Ctx<'_>) {
    let m: usize = ctx.value(3);
    let (a, b) = (ctx.inp::<f32>(1), ctx.inp::<f32>(2));
    let row = &a[ctx.group() * m..][..m];
    let r = ctx.out::<f32>(0).chunk(m);
    r.fill(0.0);
    for (a, b) in row.iter().zip(b.chunks_exact(m)) {
        for (r, b) in r.iter_mut().zip(b) {
            *r += a * b;
        }
    }
}

fn the_program_of_the_readme() {
    let m = 300;
    let a: Vec<f32> = (0..m * m).map(|i| (i % 7) as f32).collect();
    let b: Vec<f32> = (0..m * m).map(|i| (i % 5) as f32).collect();
    let mut r = vec![0.0f32; m * m];
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.device("soft").unwrap();
    dev.run(&mul_mat, m, args![out(&mut r), inp(&a), inp(&b), m]).unwrap();
    for i in 0..m {
        for j in 0..m {
            let expected: f32 = (0..m).map(|k| a[i * m + k] * b[k * m + j]).sum();
            assert_eq!(r[i * m + j], expected, "{i} {j}");
        }
    }
}

fn pages_leave_and_come_back() {
    let (_hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..1 << 20).collect();
    let all = pages_present(&data);
    assert!(all >= 1023);
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert_eq!(pages_present(&data), 0, "the pages are on the device");
    assert_eq!(data[500_000], 500_001);
    let back = pages_present(&data);
    assert!((1..=64).contains(&back), "a lone touch brings its surroundings: {back}");
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
    assert_eq!(pages_present(&data), all);
}

fn huge_pages_leave_and_come_back_huge() {
    let (_hmm, dev) = device(64);
    let mut pages = Pages::huge(8 << 20);
    let data = pages.slice::<u32>();
    for (i, x) in data.iter_mut().enumerate() {
        *x = i as u32;
    }
    let huge = || {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let kib = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse::<usize>().ok()).unwrap_or(0);
        smaps.lines().filter(|line| line.starts_with("AnonHugePages")).map(kib).sum::<usize>()
    };
    if huge() < 8 << 10 {
        return; // a kernel without huge pages
    }
    for round in 1..=3 {
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        assert_eq!(pages_present(data), 0);
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + round));
        let at = data.as_ptr() as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        // The mapping that holds our memory still has it in huge pages.
        let mut inside = false;
        let mut kib = 0;
        for line in smaps.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((start, end)) = range.split_once('-')
                && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            {
                inside = start < at + (8 << 20) && at < end;
            } else if inside && line.starts_with("AnonHugePages") {
                kib += line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap();
            }
        }
        assert_eq!(kib, 8 << 10, "round {round}");
    }
}

/// r[i] = a[i] + 1
fn add_one(ctx: &Ctx<'_>) {
    let a = ctx.inp::<u32>(1);
    let base = ctx.group() * 1000;
    for (i, r) in ctx.out::<u32>(0).chunk(1000).iter_mut().enumerate() {
        *r = a[base + i] + 1;
    }
}

fn what_is_read_stays_readable_and_a_write_is_seen() {
    let (_hmm, dev) = device(64);
    let mut a: Vec<u32> = (0..600_000).collect();
    let mut r = vec![0u32; a.len()];
    let there = pages_present(&a);
    dev.run(&add_one, groups(a.len()), args![out(&mut r), inp(&a)]).unwrap();
    assert_eq!(pages_present(&a), there, "what is only read stays");
    let faults = dev.stats().cpu_faults;
    assert!(a.iter().enumerate().all(|(i, &x)| x == i as u32));
    assert_eq!(dev.stats().cpu_faults, faults, "reading it costs no fault");
    a[12_345] = 7;
    a[599_999] = 8;
    dev.run(&add_one, groups(a.len()), args![out(&mut r), inp(&a)]).unwrap();
    assert_eq!((r[12_345], r[599_999], r[12_346]), (8, 9, 12_347));
    assert!(r.iter().zip(&a).all(|(r, a)| *r == a + 1));
}

fn edges_are_exact_to_the_byte() {
    // Bytes beside a written range belong to others, who go on using them while the kernel runs.
    let (_hmm, dev) = device(64);
    fn slow(ctx: &Ctx<'_>) {
        for x in ctx.out::<u8>(0).chunk(usize::MAX) {
            *x = x.wrapping_add(1);
        }
        let until = std::time::Instant::now() + std::time::Duration::from_millis(20);
        while std::time::Instant::now() < until {
            std::hint::spin_loop();
        }
    }
    for (offset, len) in
        [(1, 1), (100, 50), (4000, 200), (4095, 2), (10, 3 * 4096), (4096, 4096), (5000, 300_000), (0, 70_000), (1, 1 << 20)]
    {
        let mut memory = vec![5u8; offset + len + 5000];
        let (before, rest) = memory.split_at_mut(offset);
        let (range, after) = rest.split_at_mut(len);
        for round in 1..=3u8 {
            std::thread::scope(|scope| {
                let run = scope.spawn(|| dev.run(&slow, 1, args![inout(range)]).unwrap());
                while !run.is_finished() {
                    for x in before.iter_mut().chain(after.iter_mut()) {
                        *x = x.wrapping_add(1);
                    }
                }
            });
            let same = |part: &[u8]| part.iter().all(|&x| x == part[0]);
            assert!(same(after), "after offset {offset}, {len} bytes, round {round}");
            assert!(before.is_empty() || (same(before) && before[0] == after[0]), "before offset {offset}, {len} bytes, round {round}");
        }
        assert!(range.iter().all(|&x| x == 8), "offset {offset}, {len} bytes");
    }
}

fn an_unchanged_relaunch_moves_nothing() {
    let (_hmm, dev) = device(64);
    let a: Vec<u32> = (0..1_000_003).collect();
    let mut r = vec![0u32; a.len()];
    for round in 0..5 {
        let before = dev.stats();
        dev.run(&add_one, groups(a.len()), args![out(&mut r), inp(&a)]).unwrap();
        let moved = dev.stats() - before;
        assert!(round == 0 || (moved.bytes_to_device, moved.bytes_to_cpu, moved.bytes_zeroed) == (0, 0, 0), "round {round}: {moved:?}");
    }
    assert!(r.iter().zip(&a).all(|(r, a)| *r == a + 1));
}

fn a_changed_row_moves_a_block() {
    let (_hmm, dev) = device(64);
    let mut a: Vec<u32> = (0..4_000_000).collect();
    let mut r = vec![0u32; a.len()];
    dev.run(&add_one, groups(a.len()), args![out(&mut r), inp(&a)]).unwrap();
    for round in 0..4 {
        let row = 1_000_000 * round + 7..1_000_000 * round + 1031;
        a[row.clone()].fill(round as u32);
        let before = dev.stats();
        dev.run(&add_one, groups(a.len()), args![out(&mut r), inp(&a)]).unwrap();
        assert!(r[row].iter().all(|&x| x == round as u32 + 1));
        let moved = dev.stats() - before;
        assert!(moved.bytes_to_device <= 3 << 21 && moved.bytes_to_cpu <= 3 << 21, "{moved:?}");
        assert!(moved.bytes_to_device > 0 && moved.bytes_to_cpu > 0);
    }
    assert!(r.iter().zip(&a).all(|(r, a)| *r == a + 1));
}

fn out_reads_as_before_or_zero() {
    // The device's page for `out` must not show what was in that device memory earlier.
    let (_hmm, dev) = device(8);
    let mut secret = vec![0xaau8; 6 << 20];
    dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(1 << 20).iter_mut().for_each(|x| *x ^= 1), 6, args![inout(&mut secret)]).unwrap();
    assert!(secret.iter().all(|&x| x == 0xab));
    let mut r = vec![0x11u8; 6 << 20];
    dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(1 << 20)[..1000].fill(0x22), 6, args![out(&mut r)]).unwrap();
    for (i, part) in r.chunks(1 << 20).enumerate() {
        assert!(part[..1000].iter().all(|&x| x == 0x22), "part {i}");
        assert!(part[1000..].iter().all(|&x| x == 0x11 || x == 0), "part {i}");
    }
}

fn untouched_memory_is_zero_on_both_sides() {
    let (_hmm, dev) = device(64);
    let mut pages = Pages::new(5 << 20);
    let data = pages.slice::<u32>();
    assert_eq!(pages_present(data), 0);
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    assert!(data.iter().all(|&x| x == 1));
    // Read, never written: the zero page.
    let mut pages = Pages::new(5 << 20);
    let data = pages.slice::<u32>();
    assert_eq!(data.iter().sum::<u32>(), 0);
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    assert!(data.iter().all(|&x| x == 1));
    let mut pages = Pages::new(5 << 20);
    let zeros: &[u32] = pages.slice();
    let mut r = vec![9u32; zeros.len()];
    dev.run(&add_one, groups(r.len()), args![out(&mut r), inp(zeros)]).unwrap();
    assert!(r.iter().all(|&x| x == 1));
    assert!(zeros.iter().all(|&x| x == 0));
    pages.slice::<u32>()[77] = 5;
    dev.run(&add_one, groups(r.len()), args![out(&mut r), inp(pages.slice::<u32>())]).unwrap();
    assert_eq!((r[76], r[77]), (1, 6));
}

fn explicit_buffers() {
    let (_hmm, dev) = device(16);
    let a: Vec<u32> = (0..700_000).collect();
    let mut r = vec![0u32; a.len()];
    {
        let mut da = dev.alloc::<u32>(a.len()).unwrap();
        let mut dr = dev.alloc::<u32>(a.len()).unwrap();
        da.upload(&a).unwrap();
        for _ in 0..2 {
            dev.run(&add_one, groups(a.len()), args![dr.out(), da.inp()]).unwrap();
        }
        dr.download(&mut r).unwrap();
        assert!(da.upload(&a[1..]).unwrap_err().to_string().contains("700000"));
        assert!(dev.alloc::<u8>(17 << 20).unwrap_err().to_string().contains("no room"));
    }
    assert!(r.iter().zip(&a).all(|(r, a)| *r == a + 1));
    // Freed: the whole device is to be had again, and starts zeroed.
    let whole = dev.alloc::<u32>(4 << 20).unwrap();
    let mut back = vec![1u32; 4 << 20];
    whole.download(&mut back).unwrap();
    assert!(back.iter().all(|&x| x == 0));
}

fn prefetch_and_evict() {
    let (_hmm, dev) = device(64);
    let data: Vec<u32> = (0..3_000_000).collect();
    let all = pages_present(&data);
    dev.prefetch(&data).unwrap();
    assert_eq!(pages_present(&data), 0);
    dev.evict(&data).unwrap();
    assert_eq!(pages_present(&data), all);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32));
    dev.prefetch(&data).unwrap();
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32));
    let large = vec![1u8; 65 << 20];
    assert!(dev.prefetch(&large).unwrap_err().to_string().contains("divide the work"));
}

fn two_devices_take_turns() {
    let (hmm, one) = device(32);
    let two = hmm.soft("two").memory(32 << 20).threads(1).open().unwrap();
    let mut data: Vec<u32> = (0..2_000_000).collect();
    for _ in 0..3 {
        one.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        two.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    }
    assert_eq!(pages_present(&data), 0);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 6));
    assert_eq!(hmm.open_devices().len(), 2);
}

fn ranges_of_every_size_and_offset() {
    let (_hmm, dev) = device(16);
    let mut random = fastrand::Rng::with_seed(1);
    let mut memory: Vec<u32> = (0..3 << 18).collect();
    let mut shadow = memory.clone();
    for _ in 0..400 {
        let len = 1 << random.usize(0..19);
        let len = random.usize(1..=len);
        let at = random.usize(0..memory.len() - len);
        dev.run(&increment, groups(len), args![inout(&mut memory[at..at + len])]).unwrap();
        shadow[at..at + len].iter_mut().for_each(|x| *x = x.wrapping_add(1));
        for _ in 0..random.usize(0..4) {
            let i = random.usize(0..memory.len());
            assert_eq!(memory[i], shadow[i]);
            memory[i] ^= 5;
            shadow[i] ^= 5;
        }
    }
    assert!(memory == shadow);
}
