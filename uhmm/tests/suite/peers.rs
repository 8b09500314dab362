//! From one device to another. That no page was in the program meanwhile, the kernel says: a thread looks at the page table all the time.

use crate::harness::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;
use uhmm::{Ctx, Device, Error, Place, Stats, To, Uhmm, args, inout, inp, out};

crate::tests![
    pages_go_from_device_to_device,
    what_is_duplicated_stays_duplicated,
    a_coherent_device_takes_and_gives,
    without_replayable_faults_what_lies_beside_goes_home,
    a_block_stays_where_it_is_if_there_is_no_room,
    a_launch_waits_for_the_one_that_has_its_pages,
    two_devices_and_the_cpu_race_for_the_same_blocks,
];

const PAGE: usize = 4096;

fn two(hmm: &Uhmm, mib: usize) -> (Device, Device) {
    let open = |name| hmm.soft(name).memory(mib << 20).threads(1).open().unwrap();
    (open("one"), open("two"))
}

/// What `f` counts on the devices together; while it runs, no page of `data` is seen in the program.
fn unseen<R>(hmm: &Uhmm, data: std::ops::Range<usize>, f: impl FnOnce() -> R) -> (R, Stats) {
    let (stop, seen, looks) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let before = hmm.stats();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: only the page table is looked at.
                let bytes = unsafe { std::slice::from_raw_parts(data.start as *const u8, data.len()) };
                seen.fetch_add(pages_present(bytes), Ordering::Relaxed);
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        let result = f();
        stop.store(true, Ordering::Relaxed);
        result
    });
    assert_eq!(seen.load(Ordering::Relaxed), 0, "pages were in the program, at {} looks", looks.load(Ordering::Relaxed));
    (result, hmm.stats() - before)
}

fn span<T>(data: &[T]) -> std::ops::Range<usize> {
    let range = data.as_ptr_range();
    range.start as usize..range.end as usize
}

fn pages_go_from_device_to_device() {
    let hmm = Uhmm::new().unwrap();
    let (one, two) = two(&hmm, 32);
    for huge in [true, false] {
        let mut pages = Pages::huge(8 << 20);
        let data = pages.slice::<u32>();
        if !huge {
            advise(data, libc::MADV_NOHUGEPAGE);
        }
        for (i, x) in data.iter_mut().enumerate() {
            *x = i as u32;
        }
        one.prefetch(data).unwrap();
        let range = span(data);
        // By launches, and by prefetches; whole blocks, and parts of them that the rest comes along with.
        let (_, moved) = unseen(&hmm, range.clone(), || {
            for dev in [&two, &one, &two, &one] {
                dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
            }
            for _ in 0..3 {
                two.prefetch(data).unwrap();
                hmm.prefetch(&*data, To::Device(&one)).unwrap().wait().unwrap();
            }
            two.run(&increment, 1000, args![inout(&mut data[512 * 1024 + 7..512 * 1024 + 500_000])]).unwrap();
        });
        let back_and_forth = 10 * (8 << 20) + (2 << 20);
        assert!((back_and_forth..back_and_forth + (1 << 20)).contains(&moved.bytes_between_devices), "huge {huge}: {moved:?}");
        assert_eq!((moved.bytes_to_cpu, moved.bytes_to_device, moved.pages_to_cpu), (0, 0, 0), "huge {huge}: {moved:?}");
        assert_eq!(moved.pages_between_devices * PAGE as u64, moved.bytes_between_devices);
        let residency = hmm.residency(&*data).unwrap();
        assert_eq!((residency.on("one"), residency.on("two")), (6 << 20, 2 << 20));
        let part = 512 * 1024 + 7..512 * 1024 + 500_000;
        let wrong = data.iter().enumerate().find(|&(i, &x)| x != i as u32 + 4 + u32::from(part.contains(&i)));
        assert_eq!(wrong, None, "huge {huge}");
        assert_eq!(pages_present(data), 2048);
    }
    // `out` leaves what the kernel does not write as it was; a part that has come home meanwhile does not hinder.
    let mut data = vec![7u8; 6 << 20];
    one.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(usize::MAX).fill(8), 1, args![out(&mut data)]).unwrap();
    assert_eq!(data[3 << 20], 8);
    let before = hmm.stats();
    two.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(usize::MAX)[5000..5010].fill(9), 1, args![out(&mut data)]).unwrap();
    assert!((hmm.stats() - before).bytes_between_devices > 5 << 20);
    let right = |i: usize, x: u8| if (5000..5010).contains(&i) { x == 9 } else { x == 8 || x == 0 };
    assert!(data.iter().enumerate().all(|(i, &x)| right(i, x)));
}

fn what_is_duplicated_stays_duplicated() {
    let hmm = Uhmm::new().unwrap();
    let (one, two) = two(&hmm, 32);
    let mut pages = Pages::new(8 << 20);
    let data = pages.slice::<u32>();
    data.fill(3);
    let sum = |ctx: &Ctx<'_>| ctx.out::<u64>(1).chunk(1)[0] = ctx.inp::<u32>(0).iter().map(|&x| u64::from(x)).sum();
    let all = pages_present(data);
    let mut total = [0u64];
    one.run(&sum, 1, args![inp(data), out(&mut total)]).unwrap();
    let before = hmm.stats();
    two.run(&sum, 1, args![inp(data), out(&mut total)]).unwrap();
    let moved = hmm.stats() - before;
    assert_eq!((moved.bytes_between_devices, total[0]), (8 << 20, 3 * (2 << 20)), "{moved:?}");
    assert!(moved.bytes_to_device <= 4 * PAGE as u64, "only the total: {moved:?}");
    let residency = hmm.residency(&*data).unwrap();
    assert!(residency.runs().iter().all(|run| run.place == Place::Duplicated { device: "two" }), "{residency:?}");
    assert_eq!(pages_present(data), all);
    // A write is seen wherever the copy is.
    data[1_000_000] = 5;
    for dev in [&one, &two, &one] {
        dev.run(&sum, 1, args![inp(data), out(&mut total)]).unwrap();
        assert_eq!(total[0], 3 * (2 << 20) + 2);
    }
    // To be written: the copy moves, and the program's page goes without being copied.
    let before = hmm.stats();
    two.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    let moved = hmm.stats() - before;
    assert_eq!((moved.bytes_between_devices, moved.bytes_to_device, moved.bytes_to_cpu), (8 << 20, 0, 0));
    assert_eq!(pages_present(data), 0);
    assert!(data.iter().enumerate().all(|(i, &x)| x == if i == 1_000_000 { 6 } else { 4 }));
}

fn a_coherent_device_takes_and_gives() {
    let hmm = Uhmm::new().unwrap();
    let near = hmm.soft("near").memory(32 << 20).coherent(true).open().unwrap();
    let far = hmm.soft("far").memory(32 << 20).open().unwrap();
    let mut pages = Pages::huge(8 << 20);
    let data = pages.slice::<u32>();
    data.fill(1);
    far.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    for round in 0..3 {
        let before = hmm.stats();
        near.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        let moved = hmm.stats() - before;
        assert_eq!((moved.bytes_between_devices, moved.bytes_to_cpu, moved.bytes_to_device), (8 << 20, 0, 0), "to near: {moved:?}");
        assert_eq!(hmm.residency(&*data).unwrap().coherent(), 8 << 20);
        assert_eq!(data[5], 3 + 2 * round);
        let before = hmm.stats();
        far.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        let moved = hmm.stats() - before;
        assert_eq!((moved.bytes_between_devices, moved.bytes_to_cpu, moved.bytes_to_device), (8 << 20, 0, 0), "to far: {moved:?}");
        assert_eq!(hmm.residency(&*data).unwrap().private(), 8 << 20);
    }
    assert!(data.iter().all(|&x| x == 8));
    // What both have is the program's alone before a coherent device takes it.
    far.run(&|_: &Ctx<'_>| (), 1, args![inp(data)]).unwrap();
    assert_eq!(hmm.residency(&*data).unwrap().on("far"), 8 << 20);
    near.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    assert!(data.iter().all(|&x| x == 9));
}

/// The CPU may use the rest of a page while a kernel runs on such a device, and that could not fetch it again.
fn without_replayable_faults_what_lies_beside_goes_home() {
    let hmm = Uhmm::new().unwrap();
    let one = hmm.soft("one").memory(32 << 20).open().unwrap();
    let plain = hmm.soft("plain").memory(32 << 20).replayable_faults(false).open().unwrap();
    let mut pages = Pages::huge(4 << 20);
    let data = pages.slice::<u8>();
    data.fill(1);
    one.prefetch(data).unwrap();
    let middle = (1 << 20) + 100..(3 << 20) - 100;
    let inside = (1 << 20) + PAGE..(3 << 20) - PAGE;
    let before = hmm.stats();
    plain
        .run(
            &|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(usize::MAX).iter_mut().for_each(|x| *x += 1),
            1,
            args![inout(&mut data[middle.clone()])],
        )
        .unwrap();
    let moved = hmm.stats() - before;
    assert_eq!(moved.bytes_between_devices, inside.len() as u64, "{moved:?}");
    let residency = hmm.residency(&*data).unwrap();
    assert_eq!((residency.on("plain"), residency.on("one")), (inside.len(), 0), "{residency:?}");
    assert!(data.iter().enumerate().all(|(i, &x)| x == 1 + u8::from(middle.contains(&i))));
}

fn a_block_stays_where_it_is_if_there_is_no_room() {
    let hmm = Uhmm::new().unwrap();
    let one = hmm.soft("one").memory(32 << 20).threads(1).open().unwrap();
    let small = hmm.soft("small").memory(6 << 20).threads(1).open().unwrap();
    let mut pages = Pages::huge(8 << 20);
    let data = pages.slice::<u32>();
    data.fill(1);
    one.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    // All of its memory is the program's own: no room, and nothing has changed.
    let buffer = small.alloc::<u8>(6 << 20).unwrap();
    let range = span(data);
    let (error, moved) = unseen(&hmm, range, || small.prefetch(&data[..1 << 19]).unwrap_err());
    assert!(matches!(error, Error::NoRoom { .. }), "{error}");
    assert_eq!((moved.bytes_between_devices, moved.bytes_to_cpu), (0, 0));
    assert_eq!(hmm.residency(&*data).unwrap().on("one"), 8 << 20);
    drop(buffer);
    // Room for what is asked for, not for the block that it lies in: the rest goes home.
    let buffer = small.alloc::<u8>(4 << 20).unwrap();
    let mut taken = Pages::new(1 << 20);
    let lease = small.acquire(args![inout(taken.slice::<u8>())]).unwrap();
    small.run(&increment, 1, args![inout(&mut data[600_000..602_000])]).unwrap();
    assert_eq!(hmm.residency(&*data).unwrap().on("one"), 6 << 20);
    drop((buffer, lease));
    // In turns, the one driving out what the other does not need.
    for part in [0..1 << 20, 1 << 20..2 << 20] {
        small.run(&increment, groups(1 << 20), args![inout(&mut data[part])]).unwrap();
    }
    one.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    let wrong = data.iter().enumerate().find(|&(i, &x)| x != 4 + u32::from((600_000..601_000).contains(&i)));
    assert_eq!(wrong, None);
}

fn a_launch_waits_for_the_one_that_has_its_pages() {
    let hmm = Uhmm::new().unwrap();
    let (one, two) = two(&hmm, 32);
    let mut pages = Pages::new(4 << 20);
    pages.slice::<u32>().fill(1);
    let running = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The kernel writes late, and the other launch, which is asked for meanwhile, must see it.
        let late = |ctx: &Ctx<'_>| {
            running.store(true, Ordering::Release);
            std::thread::sleep(std::time::Duration::from_millis(100));
            ctx.out::<u32>(0).chunk(usize::MAX).iter_mut().for_each(|x| *x *= 10);
        };
        let pages = Mutex::new(&mut pages);
        let (first, second) = {
            let mut pages = pages.lock().unwrap();
            let data = pages.slice::<u32>();
            // SAFETY: the launches use it one after the other, as this test is about to see.
            let again = unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr(), data.len()) };
            // SAFETY: as above.
            (unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr(), data.len()) }, again)
        };
        let one = &one;
        scope.spawn(move || one.run(&late, 1, args![inout(first)]).unwrap());
        while !running.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        two.run(&increment, groups(second.len()), args![inout(second)]).unwrap();
    });
    assert!(pages.slice::<u32>().iter().all(|&x| x == 11));
}

/// Parts that share pages and blocks, each with a shadow copy, are used by two devices and by the CPU.
fn two_devices_and_the_cpu_race_for_the_same_blocks() {
    const PARTS: usize = 7;
    const LEN: usize = 400_003;
    let hmm = Uhmm::new().unwrap();
    let (one, two) = two(&hmm, 8); // fewer than there is
    let near = hmm.soft("near").memory(4 << 20).coherent(true).open().unwrap();
    let mut pages = Pages::new((PARTS * LEN * 4).next_multiple_of(PAGE));
    let parts: Vec<_> = pages.slice::<u32>().chunks_exact_mut(LEN).map(|part| Mutex::new((part, vec![0u32; LEN]))).collect();
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (hmm, parts, devices) = (&hmm, &parts, [&one, &two, &near]);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                while Instant::now() < end {
                    let mut part = parts[random.usize(0..PARTS)].lock().unwrap();
                    let (data, shadow) = &mut *part;
                    let from = random.usize(0..LEN);
                    let to = random.usize(from..LEN) + 1;
                    let dev = devices[[0, 0, 0, 1, 1, 1, 2][random.usize(0..7)]];
                    match random.u8(0..8) {
                        0..4 => {
                            dev.run(&increment, groups(to - from), args![inout(&mut data[from..to])]).unwrap();
                            shadow[from..to].iter_mut().for_each(|x| *x = x.wrapping_add(1));
                        }
                        4 => dev.run(&|_: &Ctx<'_>| (), 1, args![inp(&data[from..to])]).unwrap(),
                        5 => drop(hmm.prefetch(&data[from..to], To::Device(dev)).unwrap().is_done()),
                        6 => assert!(data[from..to] == shadow[from..to]),
                        _ => {
                            for at in (from..to).step_by(1 + random.usize(0..5000)) {
                                assert_eq!(data[at], shadow[at]);
                                (data[at], shadow[at]) = (at as u32, at as u32);
                            }
                        }
                    }
                }
            });
        }
    });
    for part in &parts {
        let part = part.lock().unwrap();
        assert_eq!(part.0.iter().zip(&part.1).position(|(x, shadow)| x != shadow), None);
    }
    let stats = hmm.stats();
    assert!(stats.pages_between_devices > 10_000 && stats.cpu_faults > 10, "{stats:?}");
}
