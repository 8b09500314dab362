//! A device is closed with its last handle, while the process's core and its other devices go on.

use crate::harness::*;
use crate::lifecycle::{descriptors, mappings_of_uhmm, threads};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use uhmm::{Ctx, Uhmm, args, inout, ptr};

crate::tests![
    a_device_is_closed_with_its_last_handle,
    a_new_configuration_counts_after_closing,
    what_a_closed_device_had_is_another_devices_next,
    a_handle_that_a_kernel_drops_is_closed_later,
    devices_open_and_close_while_others_work,
    devices_close_before_forks,
    kernels_open_handles_while_threads_fork,
    kernels_open_and_drop_handles_while_devices_close,
];

/// A device stayed open until the core ended: only four software devices could ever be opened, and opening one of a known name with another
/// configuration gave the old one.
fn a_device_is_closed_with_its_last_handle() {
    let (hmm, other) = device(16);
    let mut others: Vec<u32> = (0..500_000).collect();
    other.run(&increment, groups(others.len()), args![inout(&mut others)]).unwrap();
    let before = (threads(), descriptors(), mappings_of_uhmm().len());
    let mut data: Vec<u32> = (0..1_000_000).collect();
    for round in 0..50usize {
        let (mib, workers) = (8 + round % 7 * 4, 1 + round % 3);
        let dev = hmm.soft("second").memory(mib << 20).threads(workers).open().unwrap();
        assert_eq!((dev.memory(), dev.threads()), (mib << 20, workers), "the new configuration counts");
        assert_eq!(hmm.open_devices().len(), 2);
        assert_eq!(threads().len(), before.0.len() + workers + 3, "workers, queues, a copy engine");
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        assert_eq!(pages_present(&data), 0, "the data is on the device");
        drop(dev);
        assert_eq!(hmm.open_devices().len(), 1);
        assert!(pages_present(&data) > 970, "everything has come home: {}", pages_present(&data));
        assert_eq!(data[12_345], 12_346 + round as u32);
        assert_eq!((threads(), descriptors()), (before.0.clone(), before.1.clone()), "round {round}");
        assert_eq!(mappings_of_uhmm().len(), before.2, "round {round}");
        other.run(&increment, groups(others.len()), args![inout(&mut others)]).unwrap();
    }
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 50));
    assert!(others.iter().enumerate().all(|(i, &x)| x == i as u32 + 51));
}

fn a_new_configuration_counts_after_closing() {
    let hmm = Uhmm::new().unwrap();
    let first = hmm.soft("soft").memory(8 << 20).threads(1).open().unwrap();
    let second = hmm.soft("soft").memory(64 << 20).threads(2).open().unwrap();
    assert_eq!((second.memory(), second.threads()), (8 << 20, 1), "it is open, and stays as it is");
    drop(first);
    assert_eq!(hmm.device("soft").unwrap().memory(), 8 << 20, "one handle is left");
    drop(second);
    let third = hmm.soft("soft").memory(64 << 20).threads(2).open().unwrap();
    assert_eq!((third.memory(), third.threads()), (64 << 20, 2));
    assert_eq!(third.stats(), uhmm::Stats::default(), "nothing has happened on it yet");
    // All masks are to be had again.
    let rest: Vec<_> = ["b", "c", "d"].map(|name| hmm.soft(name).memory(8 << 20).open().unwrap()).into();
    assert!(hmm.soft("e").memory(8 << 20).open().is_err(), "four fit a process");
    drop(rest);
    hmm.soft("e").memory(8 << 20).open().unwrap();
}

/// Blocks that the first had are taken by the second, which has its number.
fn what_a_closed_device_had_is_another_devices_next() {
    let hmm = Uhmm::new().unwrap();
    let mut pages = Pages::huge(6 << 20);
    let data = pages.slice::<u32>();
    let read: Vec<u32> = vec![5; 700_000];
    for round in 0..20 {
        let dev = hmm.soft("soft").memory((8 + 8 * (round as usize % 2)) << 20).threads(2).open().unwrap();
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        dev.run(&|ctx: &Ctx<'_>| assert_eq!(ctx.inp::<u32>(0)[9], 5), 1, args![uhmm::inp(&read)]).unwrap();
        // Its own memory, too.
        assert_eq!(dev.alloc::<u8>(1 << 20).unwrap().len(), 1 << 20);
        if round % 3 == 0 {
            assert!(data.iter().all(|&x| x == round + 1));
        }
    }
    assert!(data.iter().all(|&x| x == 20));
    assert!(read.iter().all(|&x| x == 5));
}

/// Closing waits for the running launch, which would wait for its own end here.
fn a_handle_that_a_kernel_drops_is_closed_later() {
    let (hmm, dev) = device(16);
    let other = std::sync::Mutex::new(Some(hmm.soft("other").memory(8 << 20).open().unwrap()));
    let kernel = |_: &Ctx<'_>| drop(other.lock().unwrap().take());
    dev.run(&kernel, 1, args![]).unwrap();
    assert!(other.lock().unwrap().is_none());
    let again = hmm.soft("other").memory(4 << 20).open().unwrap();
    assert_eq!(again.memory(), 4 << 20, "the next one who asks finds it closed");
}

/// One thread opens and closes devices over data that stays the same; others launch on a device that stays, with kernels that fault, and CPU threads
/// touch what both devices take.
fn devices_open_and_close_while_others_work() {
    const WORDS: usize = 512 << 10;
    const TOUCHES: usize = 20;
    let (hmm, stays) = device(8);
    let memory: Vec<AtomicU32> = (0..WORDS).map(|_| AtomicU32::new(0)).collect();
    // SAFETY: of that length; it only names ranges, nobody reads it.
    let plain = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u32>(), WORDS) };
    let (added, closed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let stop = AtomicBool::new(false);
    let end = std::time::Instant::now() + seconds(5);
    // Adds 1 to words of random pages, by bare pointer.
    let kernel = |ctx: &Ctx<'_>| {
        let mut random = fastrand::Rng::with_seed(ctx.value::<u64>(1) << 8 | ctx.group() as u64);
        let words = ctx.pointer::<AtomicU32>(0).cast_const();
        for _ in 0..TOUCHES {
            // SAFETY: inside `memory`, which outlives the launch, and where all use atomics.
            unsafe { &*words.add(random.usize(0..WORDS)) }.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let (memory, added, closed, stop, hmm, stays, kernel) = (&memory, &added, &closed, &stop, &hmm, &stays, &kernel);
        for cpu in 0..3 {
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(cpu);
                while !stop.load(Ordering::Relaxed) {
                    memory[random.usize(0..WORDS)].fetch_add(1, Ordering::Relaxed);
                    added.fetch_add(1, Ordering::Relaxed);
                    if random.u8(..) == 0 {
                        assert!(hmm.open_devices().iter().any(|info| info.name == "soft"));
                        let _ = hmm.stats();
                    }
                }
            });
        }
        scope.spawn(move || {
            let mut seed = 0u64;
            while !stop.load(Ordering::Relaxed) {
                seed += 1;
                // SAFETY: as for the kernel.
                stays.run(kernel, 3, args![unsafe { ptr(memory.as_ptr()) }, seed]).unwrap();
                added.fetch_add(3 * TOUCHES, Ordering::Relaxed);
            }
        });
        for user in 0..2u64 {
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(user + 50);
                let mut own = vec![0u32; 100_000];
                let mut expected = 0;
                while std::time::Instant::now() < end {
                    let mib = 4 + random.usize(0..4) * 4;
                    // Two threads may use one name: one closes what the other is about to open.
                    let name = ["first", "second"][random.usize(0..2)];
                    let dev = hmm.soft(name).memory(mib << 20).threads(random.usize(1..3)).open().unwrap();
                    let at = random.usize(0..WORDS - 100_000);
                    dev.prefetch(&plain[at..at + 100_000]).unwrap();
                    dev.run(&increment, groups(own.len()), args![inout(&mut own)]).unwrap();
                    expected += 1;
                    // SAFETY: as for the kernel.
                    dev.run(kernel, 2, args![unsafe { ptr(memory.as_ptr()) }, random.u64(..) << 9]).unwrap();
                    added.fetch_add(2 * TOUCHES, Ordering::Relaxed);
                    drop(dev);
                    closed.fetch_add(1, Ordering::Relaxed);
                    assert_eq!(own[random.usize(0..own.len())], expected);
                }
                assert!(own.iter().all(|&x| x == expected));
            });
        }
        while std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let sum: usize = memory.iter().map(|word| word.load(Ordering::Relaxed) as usize).sum();
    assert_eq!(sum, added.load(Ordering::Relaxed), "no update is lost, none happens twice");
    assert!(closed.load(Ordering::Relaxed) > 5, "{closed:?}");
    assert_eq!(hmm.open_devices().len(), 1);
}

/// Threads fork while another opens and closes devices, with its data on them.
fn devices_close_before_forks() {
    let hmm = Uhmm::new().unwrap();
    let stop = AtomicBool::new(false);
    let end = std::time::Instant::now() + seconds(3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                in_a_child(|| true);
            }
        });
        let mut data = vec![0u32; 400_000];
        let mut rounds = 0;
        while std::time::Instant::now() < end {
            let dev = hmm.soft("soft").memory(8 << 20).threads(1).open().unwrap();
            dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
            rounds += 1;
        }
        assert!(data.iter().all(|&x| x == rounds));
        stop.store(true, Ordering::Relaxed);
    });
}

/// Whoever forked waited for the running launch with the lock held that its kernel wanted to open a handle.
fn kernels_open_handles_while_threads_fork() {
    let (_hmm, dev) = device(16);
    let end = std::time::Instant::now() + seconds(3);
    let opened = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let opened = &opened;
        scope.spawn(move || {
            let kernel = |_: &Ctx<'_>| {
                opened.fetch_add(Uhmm::new().unwrap().open_devices().len(), Ordering::Relaxed);
            };
            while std::time::Instant::now() < end {
                dev.run(&kernel, 2, args![]).unwrap();
            }
        });
        while std::time::Instant::now() < end {
            in_a_child(|| true);
        }
    });
    assert!(opened.load(Ordering::Relaxed) > 10);
}

/// Whoever closed a device waited for the running launch with the lock held that its kernel wanted to open or drop a handle.
fn kernels_open_and_drop_handles_while_devices_close() {
    let (hmm, dev) = device(16);
    let end = std::time::Instant::now() + seconds(5);
    let opened = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (hmm, opened) = (&hmm, &opened);
        let mut data = vec![0u32; 50_000];
        scope.spawn(move || {
            let kernel = |_: &Ctx<'_>| {
                let again = Uhmm::new().unwrap();
                // The other's device, or one of our own that stays until somebody else opens or closes one.
                let device = again.soft("passes").memory(4 << 20).threads(1).open().unwrap();
                opened.fetch_add(device.threads(), Ordering::Relaxed);
            };
            while std::time::Instant::now() < end {
                dev.run(&kernel, 2, args![]).unwrap();
            }
        });
        let mut rounds = 0;
        while std::time::Instant::now() < end {
            let passes = hmm.soft("passes").memory(4 << 20).threads(1).open().unwrap();
            passes.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
            rounds += 1;
            drop(passes);
            assert_eq!(data[7], rounds);
        }
    });
    assert!(opened.load(Ordering::Relaxed) > 10);
    drop(hmm.soft("last").memory(4 << 20).open().unwrap());
    assert_eq!(hmm.open_devices().len(), 0, "all are closed");
}
