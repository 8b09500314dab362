//! Hints about ranges: where they are, where they will be needed, that their contents are not needed. Where a page is, the kernel is asked.

use crate::harness::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;
use uhmm::{Ctx, Error, Place, To, Uhmm, args, inout, inp, out};

crate::tests![
    residency_agrees_with_the_page_table,
    residency_of_coherent_memory,
    residency_looks_while_a_launch_runs,
    residency_of_everything_and_nothing,
    discarded_pages_are_not_copied_and_read_zero,
    discarding_frees_the_devices_memory,
    discarding_coherent_and_locked_memory,
    what_cannot_be_discarded_is_left_as_it_is,
    discarding_waits_for_the_launch_that_uses_it,
    hints_leave_alone_what_a_lease_has,
    hints_race_with_launches_and_touches,
];

const PAGE: usize = 4096;

/// What residency says of each page of a range must be what the kernel says; and looking must change nothing.
fn check_residency(hmm: &Uhmm, start: usize, len: usize) {
    let there = || -> Vec<bool> { (start & !(PAGE - 1)..start + len).step_by(PAGE).map(|at| present(at as *const u8)).collect() };
    let (before, stats) = (there(), hmm.stats());
    let residency = hmm.residency(start..start + len).unwrap();
    assert_eq!(hmm.stats(), stats, "looking moves nothing");
    assert_eq!(there(), before, "looking faults nothing in");
    let mut at = start;
    for (i, run) in residency.runs().iter().enumerate() {
        assert!(run.start == at && run.end > run.start, "run {i} begins where the last one ended: {run:x?}");
        assert!(i == 0 || residency.runs()[i - 1].place != run.place, "runs {} and {i} are one", i.wrapping_sub(1));
        at = run.end;
        let expected = matches!(run.place, Place::System | Place::Duplicated { .. } | Place::Coherent { .. });
        for page in (run.start & !(PAGE - 1)..run.end).step_by(PAGE) {
            assert_eq!(before[(page - (start & !(PAGE - 1))) / PAGE], expected, "{:?} at {page:#x}", run.place);
        }
    }
    assert_eq!(at, start + len);
    let all = residency.bytes_where(|_| true);
    let empty = residency.bytes_where(|place| matches!(place, Place::Empty | Place::Unmapped | Place::Moving { .. }));
    assert_eq!(all, len);
    assert_eq!(residency.system() + residency.private() + residency.duplicated() + residency.coherent() + empty, len);
}

fn residency_agrees_with_the_page_table() {
    let (hmm, dev) = device(32);
    let mut pages = Pages::huge(12 << 20);
    let start = pages.start() as usize;
    let data = pages.slice::<u8>();
    advise(data, libc::MADV_NOHUGEPAGE);
    // Never touched.
    check_residency(&hmm, start, 12 << 20);
    assert_eq!(hmm.residency(&*data).unwrap().runs().len(), 1);
    data[PAGE..8 << 20].fill(1);
    check_residency(&hmm, start + 5, (12 << 20) - 50);
    // One part goes, another is shared; both begin and end inside pages.
    let (first, rest) = data.split_at_mut(3 << 20);
    let away = &mut first[100..(2 << 20) + 77_777];
    let touch = |ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(usize::MAX)[1_000_000] = 2;
    dev.run(&touch, 1, args![inout(away), inp(&rest[5000..3_000_000])]).unwrap();
    check_residency(&hmm, start, 12 << 20);
    let residency = hmm.residency(&*first).unwrap();
    assert!(residency.private() >= (2 << 20) + 77_777 - 2 * PAGE, "{residency:?}");
    assert_eq!(residency.private(), residency.on("soft"));
    let residency = hmm.residency(&rest[5000..3_000_000]).unwrap();
    assert_eq!((residency.duplicated(), residency.runs().len()), (3_000_000 - 5000, 1), "clipped to the byte");
    // A touch, a write to what is shared, a drop, a hole, and pages of a file.
    assert_eq!(first[1_000_100], 2);
    rest[100_000] = 3;
    advise(&mut data[4 << 20..5 << 20], libc::MADV_DONTNEED);
    check_residency(&hmm, start, 12 << 20);
    // SAFETY: pages that are used no more.
    unsafe { pages.unmap(7 << 20, 64 << 10) };
    check_residency(&hmm, start + 1, (12 << 20) - 1);
    let gap = start + (7 << 20);
    let runs = hmm.residency(gap - 10..gap + (64 << 10) + 10).unwrap();
    let places: Vec<_> = runs.runs().iter().map(|run| (run.bytes(), run.place)).collect();
    assert_eq!(places, [(10, Place::System), (64 << 10, Place::Unmapped), (10, Place::System)]);
    // SAFETY: the hole is ours.
    unsafe { map_at(gap, 64 << 10, libc::MAP_FIXED_NOREPLACE) };
    // Random traffic, looked at after each step.
    let mut random = fastrand::Rng::with_seed(5);
    let data = pages.slice::<u8>();
    for _ in 0..40 {
        let at = random.usize(0..data.len() - 1);
        let len = random.usize(1..data.len() - at).min(4 << 20);
        let part = &mut data[at..at + len];
        match random.u8(0..4) {
            0 => dev.prefetch(part).unwrap(),
            1 => dev.evict(part).unwrap(),
            2 => part[len / 2] = 1,
            _ => dev.run(&|_: &Ctx<'_>| (), 1, args![inp(part)]).unwrap(),
        }
        check_residency(&hmm, start, 12 << 20);
    }
}

/// A coherent device that has 4 MiB of twos.
fn near() -> (Uhmm, uhmm::Device, Pages) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.soft("near").memory(16 << 20).coherent(true).open().unwrap();
    let mut pages = Pages::new(4 << 20);
    let data = pages.slice::<u32>();
    data.fill(1);
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    (hmm, dev, pages)
}

fn residency_of_coherent_memory() {
    let (hmm, dev, mut pages) = near();
    let data = pages.slice::<u32>();
    let residency = hmm.residency(&*data).unwrap();
    assert_eq!((residency.coherent(), residency.on("near")), (4 << 20, 4 << 20));
    check_residency(&hmm, data.as_ptr() as usize, 4 << 20);
    dev.evict(data).unwrap();
    assert_eq!(hmm.residency(&*data).unwrap().system(), 4 << 20);
}

/// Nobody who looks waits for a kernel; and a kernel must not look, for a fork may have what is needed for it and wait for that kernel.
fn residency_looks_while_a_launch_runs() {
    let (hmm, dev) = device(16);
    let mut data = vec![1u8; 4 << 20];
    let other = vec![1u8; 1 << 20];
    let (running, stop, refused) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    let range = data.as_ptr_range();
    let range = range.start as usize..range.end as usize;
    std::thread::scope(|scope| {
        let wait = |_: &Ctx<'_>| {
            refused.store(matches!(hmm.residency(&other), Err(Error::Reentrant)), Ordering::Release);
            running.store(true, Ordering::Release);
            while !stop.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
        };
        let (dev, data) = (&dev, &mut data);
        let launch = scope.spawn(move || dev.run(&wait, 1, args![out(data)]));
        while !running.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let residency = hmm.residency(range);
        assert!(!launch.is_finished());
        stop.store(true, Ordering::Release);
        launch.join().unwrap().unwrap();
        let residency = residency.unwrap();
        assert!(residency.private() >= (4 << 20) - 2 * PAGE, "{residency:?}");
        assert!(refused.load(Ordering::Acquire));
    });
}

fn residency_of_everything_and_nothing() {
    let (hmm, dev) = device(16);
    let mut data = vec![1u8; 4 << 20];
    dev.run(&|_: &Ctx<'_>| (), 1, args![inout(&mut data)]).unwrap();
    assert!(hmm.residency(5..5).unwrap().runs().is_empty());
    assert!(hmm.residency([0u8; 0]).unwrap().runs().is_empty());
    let (top, all) = (1usize << 47, usize::MAX);
    assert_eq!(hmm.residency(top..all).unwrap().runs().len(), 1);
    let residency = hmm.residency(0x5500_0000_0000..all).unwrap();
    assert!(residency.private() >= (4 << 20) - 2 * PAGE);
    let mut at = 0x5500_0000_0000;
    for run in residency.runs() {
        assert_eq!(run.start, at);
        at = run.end;
    }
    assert_eq!(at, all);
}

/// Pages in every place, discarded by a range that begins and ends inside pages.
fn discarded_pages_are_not_copied_and_read_zero() {
    let (hmm, dev) = device(64);
    for huge in [false, true] {
        let mut pages = Pages::huge(16 << 20);
        let data = pages.slice::<u8>();
        if !huge {
            advise(data, libc::MADV_NOHUGEPAGE);
        }
        data.fill(7);
        // 4 MiB private, 4 duplicated, 4 that have come home, 4 that never left.
        let (away, rest) = data.split_at_mut(4 << 20);
        let (shared, back) = rest.split_at_mut(4 << 20);
        dev.run(&|_: &Ctx<'_>| (), 1, args![inout(away), inp(shared), inout(&mut back[..4 << 20])]).unwrap();
        back[..4 << 20].iter().step_by(PAGE).for_each(|x| assert_eq!(*x, 7));
        let range = 3 * PAGE + 5..(16 << 20) - 3 * PAGE - 5;
        let before = hmm.stats();
        hmm.discard(&mut data[range.clone()]).unwrap();
        let inside = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
        assert_eq!(hmm.residency(&data[inside.clone()]).unwrap().bytes_where(|place| place == Place::Empty), inside.len());
        assert_eq!(pages_present(&data[inside.clone()]), 0);
        for (i, &x) in data.iter().enumerate() {
            assert_eq!(x, if inside.contains(&i) { 0 } else { 7 }, "huge {huge}, byte {i}, whole pages {inside:?}");
        }
        let moved = hmm.stats() - before;
        assert_eq!(moved.bytes_to_device, 0, "{moved:?}");
        assert!(moved.bytes_to_cpu <= (PAGE * 16) as u64, "only what was beside it has come home: {moved:?}");
        // What is written there now is what counts from now on.
        data[1 << 20] = 9;
        dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(usize::MAX).iter_mut().for_each(|x| *x += 1), 1, args![inout(data)]).unwrap();
        let wrong = data.iter().enumerate().find(|&(i, &x)| {
            x != if i == 1 << 20 {
                10
            } else if inside.contains(&i) {
                1
            } else {
                8
            }
        });
        assert_eq!(wrong, None, "huge {huge}");
        hmm.discard(data).unwrap();
        hmm.discard(data).unwrap();
        assert!(data.iter().all(|&x| x == 0));
    }
}

fn discarding_frees_the_devices_memory() {
    let (hmm, dev) = device(8);
    let mut data = Pages::huge(6 << 20);
    data.slice::<u8>().fill(1);
    dev.prefetch(data.slice::<u8>()).unwrap();
    let before = dev.stats();
    hmm.discard(data.slice::<u8>()).unwrap();
    let all = dev.alloc::<u8>(8 << 20).unwrap();
    let moved = dev.stats() - before;
    assert_eq!((moved.evictions, moved.bytes_to_cpu, moved.pages_to_cpu), (0, 0, 0), "the whole device was free: {moved:?}");
    drop(all);
    assert!(data.slice::<u8>().iter().all(|&x| x == 0));
}

fn discarding_coherent_and_locked_memory() {
    let (hmm, dev, mut pages) = near();
    let data = pages.slice::<u32>();
    let before = dev.stats();
    hmm.discard(&mut data[1..]).unwrap();
    let residency = hmm.residency(&*data).unwrap();
    assert_eq!((residency.coherent(), residency.bytes_where(|place| place == Place::Empty)), (PAGE, (4 << 20) - PAGE));
    let moved = dev.stats() - before;
    assert_eq!((moved.bytes_to_cpu, moved.bytes_to_device, moved.pages_to_cpu), (0, 0, 0));
    assert!(data.iter().enumerate().all(|(i, &x)| x == if i < 1024 { 2 } else { 0 }));
    let mut pages = Pages::new(1 << 20);
    let data = pages.slice::<u32>();
    data.fill(1);
    if lock(data) {
        hmm.discard(data).unwrap();
        assert!(data.iter().all(|&x| x == 0));
        unlock(data);
    }
}

fn what_cannot_be_discarded_is_left_as_it_is() {
    let (hmm, dev) = device(16);
    let refused = |range: std::ops::Range<usize>, why: &str| {
        // SAFETY: it is refused.
        let text = unsafe { hmm.discard_range(range) }.unwrap_err().to_string();
        assert!(text.contains("cannot be discarded") && text.contains(why), "{text}");
    };
    // Refused before anything was changed: what lies before it is as it was.
    let mut pages = Pages::new(8 << 20);
    let start = pages.start() as usize;
    pages.slice::<u8>().fill(3);
    dev.prefetch(pages.slice::<u8>()).unwrap();
    // SAFETY: pages that are used no more.
    unsafe { pages.unmap(4 << 20, PAGE) };
    refused(start..start + (8 << 20), "nothing is mapped");
    assert!(pages.slice::<u8>()[..4 << 20].iter().all(|&x| x == 3));
    let both = shared(64 << 10);
    both.fill(4);
    let range = both.as_ptr_range();
    refused(range.start as usize..range.end as usize, "shared");
    let file = memfd();
    file.set_len(64 << 10).unwrap();
    let private = map(64 << 10, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, Some(&file));
    refused(private as usize..private as usize + (64 << 10), "file");
    assert!(both.iter().all(|&x| x == 4));
    refused(start..usize::MAX, "beyond");
    // No whole page: nothing to do, whatever it is.
    hmm.discard(&mut both[1..4097]).unwrap();
    hmm.discard::<u8>(&mut []).unwrap();
    let mut data = vec![5u8; 100_000];
    let mut other = vec![5u8; 100_000];
    let kernel = |_: &Ctx<'_>| {
        // SAFETY: it is refused.
        let asked = unsafe { hmm.discard_range(start..start + PAGE) };
        assert!(matches!(asked, Err(Error::Reentrant)), "{asked:?}");
    };
    dev.run(&kernel, 1, args![inout(&mut data)]).unwrap();
    hmm.discard(&mut other).unwrap();
    assert!(data.iter().all(|&x| x == 5));
}

fn discarding_waits_for_the_launch_that_uses_it() {
    let (hmm, dev) = device(16);
    let mut pages = Pages::new(4 << 20);
    let range = pages.start() as usize..pages.start() as usize + (4 << 20);
    let (running, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let kernel = |ctx: &Ctx<'_>| {
            running.store(true, Ordering::Release);
            while !stop.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            ctx.out::<u8>(0).chunk(usize::MAX).fill(6);
        };
        let (dev, data) = (&dev, pages.slice::<u8>());
        let launch = scope.spawn(move || dev.run(&kernel, 1, args![out(data)]));
        while !running.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        // SAFETY: nobody needs it.
        let discard = scope.spawn(|| unsafe { hmm.discard_range(range) });
        std::thread::sleep(std::time::Duration::from_millis(50));
        let early = discard.is_finished();
        stop.store(true, Ordering::Release);
        launch.join().unwrap().unwrap();
        discard.join().unwrap().unwrap();
        assert!(!early, "the kernel was going to write to these pages");
    });
    assert!(pages.slice::<u8>().iter().all(|&x| x == 0), "what the kernel wrote was discarded");
}

/// Who has a lease uses the pages on the device and could not fetch them again.
fn hints_leave_alone_what_a_lease_has() {
    let (hmm, dev) = device(32);
    let other = hmm.soft("other").memory(32 << 20).threads(1).open().unwrap();
    let mut pages = Pages::huge(8 << 20);
    let range = pages.start() as usize..pages.start() as usize + (8 << 20);
    let data = pages.slice::<u32>();
    data.fill(1);
    let (leased, rest) = data.split_at_mut(1 << 20);
    let lease = dev.acquire(args![inout(leased)]).unwrap();
    // SAFETY: it is refused.
    let error = unsafe { hmm.discard_range(range.clone()) }.unwrap_err().to_string();
    assert!(error.contains("a lease has it"), "{error}");
    assert!(rest.iter().all(|&x| x == 1), "nothing of the range has changed");
    for to in [To::Home, To::Device(&other), To::Home] {
        hmm.prefetch(range.clone(), to).unwrap().wait().unwrap();
        let place = hmm.residency(range.start..range.start + (4 << 20)).unwrap().runs()[0];
        assert_eq!((place.bytes(), place.place), (4 << 20, Place::Private { device: "soft" }));
    }
    hmm.discard(rest).unwrap();
    let (fence, signal) = uhmm::fence();
    // SAFETY: the memory stays until the signal.
    unsafe { lease.release(fence) };
    std::thread::scope(|scope| {
        // SAFETY: nobody needs it.
        let discard = scope.spawn(|| unsafe { hmm.discard_range(range.clone()) });
        std::thread::sleep(std::time::Duration::from_millis(50));
        let early = discard.is_finished();
        signal.done();
        discard.join().unwrap().unwrap();
        assert!(!early, "who works under the lease was not done");
    });
    assert!(data.iter().all(|&x| x == 0));
}

/// Threads take parts of one range, which share pages and blocks, and launch on them, touch them, send them here and there, and discard them. Each part has a
/// shadow copy.
fn hints_race_with_launches_and_touches() {
    const PARTS: usize = 9;
    const LEN: usize = 300_007; // numbers: more than half a block, and at no page's start
    let hmm = Uhmm::new().unwrap();
    let one = hmm.soft("one").memory(12 << 20).threads(1).open().unwrap();
    let two = hmm.soft("two").memory(8 << 20).threads(1).open().unwrap();
    let mut pages = Pages::new((PARTS * LEN * 4).next_multiple_of(PAGE));
    let parts: Vec<_> = pages.slice::<u32>().chunks_exact_mut(LEN).map(|part| Mutex::new((part, vec![0u32; LEN]))).collect();
    let end = Instant::now() + seconds(5);
    let counts = [const { AtomicUsize::new(0) }; 8];
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (hmm, one, two, parts, counts) = (&hmm, &one, &two, &parts, &counts);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut fences = vec![];
                while Instant::now() < end {
                    let mut part = parts[random.usize(0..PARTS)].lock().unwrap();
                    let (data, shadow) = &mut *part;
                    let from = random.usize(0..LEN);
                    let to = random.usize(from..LEN) + 1;
                    let what = random.usize(0..8);
                    counts[what].fetch_add(1, Ordering::Relaxed);
                    let dev = if random.bool() { one } else { two };
                    match what {
                        0 | 1 => {
                            dev.run(&increment, groups(to - from), args![inout(&mut data[from..to])]).unwrap();
                            shadow[from..to].iter_mut().for_each(|x| *x = x.wrapping_add(1));
                        }
                        2 => {
                            hmm.discard(&mut data[from..to]).unwrap();
                            let base = data.as_ptr() as usize;
                            let first = (base + from * 4).next_multiple_of(PAGE);
                            let last = (base + to * 4) / PAGE * PAGE;
                            if first < last {
                                shadow[(first - base) / 4..(last - base) / 4].fill(0);
                            }
                        }
                        3 => dev.run(&|_: &Ctx<'_>| (), 1, args![inp(&data[from..to])]).unwrap(),
                        4 => assert!(data[from..to] == shadow[from..to], "numbers {from} to {to}"),
                        5 => {
                            for at in (from..to).step_by(1 + random.usize(0..5000)) {
                                assert_eq!(data[at], shadow[at]);
                                (data[at], shadow[at]) = (at as u32, at as u32);
                            }
                        }
                        6 => {
                            let to_device = if random.bool() { To::Device(dev) } else { To::Home };
                            let fence = hmm.prefetch(&data[from..to], to_device).unwrap();
                            match random.u8(0..3) {
                                0 => fence.wait().unwrap(),
                                1 => {}
                                _ => fences.push(fence),
                            }
                        }
                        _ => {
                            fences.drain(..).for_each(|fence| fence.wait().unwrap());
                            let residency = hmm.residency(&data[from..to]).unwrap();
                            assert_eq!(residency.bytes_where(|_| true), (to - from) * 4);
                        }
                    }
                }
            });
        }
    });
    for part in &parts {
        let part = part.lock().unwrap();
        let wrong = part.0.iter().zip(&part.1).position(|(x, shadow)| x != shadow);
        assert_eq!(wrong, None);
    }
    assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) > 20), "{counts:?}");
}
