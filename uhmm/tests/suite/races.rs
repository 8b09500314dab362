//! Races that run long enough to lose if they can: 5 s each, longer by UHMM_TEST_SECONDS.

use crate::harness::*;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;
use uhmm::{Ctx, args, inout, ptr};

crate::tests![
    cpu_threads_and_workers_touch_the_same_pages,
    mappings_change_under_launches,
    migrations_against_touches,
    a_relaunch_never_sees_old_data,
    neighbours_in_a_block_are_unmapped_one_after_the_other,
];

/// Eight CPU threads (atomics, and a pipe that is written from and read into the same pages) and the device's workers touch the same pages at
/// random. Each word has one owner per kind of access whose count is known, so that every lost or repeated update shows.
fn cpu_threads_and_workers_touch_the_same_pages() {
    const WORDS: usize = 4 << 20; // 16 MiB, the device has 8
    const CPUS: usize = 8;
    let (_hmm, dev) = device(8);
    let memory: Vec<AtomicU32> = (0..WORDS).map(|_| AtomicU32::new(0)).collect();
    let added = AtomicU64::new(0);
    let touches = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let end = Instant::now() + seconds(10);
    std::thread::scope(|scope| {
        for cpu in 0..CPUS {
            let (memory, added, touches, stop) = (&memory, &added, &touches, &stop);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(cpu as u64);
                let mut pipe = std::io::pipe().unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let page = random.usize(0..WORDS / 1024) * 1024;
                    // Words 0 to 511 of a page are for atomics; from 512 on each thread has 32 of its own.
                    for _ in 0..random.usize(1..100) {
                        memory[page + random.usize(0..512)].fetch_add(1, Ordering::Relaxed);
                        added.fetch_add(1, Ordering::Relaxed);
                        touches.fetch_add(1, Ordering::Relaxed);
                    }
                    if random.u8(0..4) == 0 {
                        let from = page + 512 + cpu * 32;
                        let to = random.usize(0..WORDS / 1024) * 1024 + 512 + cpu * 32;
                        let value = random.u32(..);
                        memory[from].store(value, Ordering::Relaxed);
                        // SAFETY: this thread's own words, which nobody else uses.
                        let bytes = |at: usize| unsafe { std::slice::from_raw_parts_mut(memory[at].as_ptr().cast::<u8>(), 4) };
                        assert_eq!(pipe.1.write(bytes(from)).unwrap(), 4);
                        assert_eq!(pipe.0.read(bytes(to)).unwrap(), 4);
                        assert_eq!(memory[to].load(Ordering::Relaxed), value, "what the pipe brought");
                        touches.fetch_add(4, Ordering::Relaxed);
                    }
                }
            });
        }
        let mut seed = 0;
        while Instant::now() < end || touches.load(Ordering::Relaxed) < 1_000_000 {
            seed += 1;
            let by_kernel = [AtomicU64::new(0), AtomicU64::new(0)];
            let kernel = |ctx: &Ctx<'_>| {
                let mut random = fastrand::Rng::with_seed(seed << 8 | ctx.group() as u64);
                let words = ctx.pointer::<AtomicU32>(0).cast_const();
                let mut n = 0;
                for _ in 0..8 {
                    let page = random.usize(0..WORDS / 1024) * 1024;
                    for _ in 0..200 {
                        // SAFETY: inside `memory`, which outlives the launch, and where all use atomics.
                        unsafe { &*words.add(page + random.usize(0..512)) }.fetch_add(1, Ordering::Relaxed);
                        n += 1;
                    }
                }
                by_kernel[ctx.group() % 2].fetch_add(n, Ordering::Relaxed);
            };
            // SAFETY: as for the kernel.
            let list = args![unsafe { ptr(memory.as_ptr()) }];
            match dev.run(&kernel, 4, list) {
                Ok(()) => {}
                Err(error) => panic!("{error}"),
            }
            let n = by_kernel.iter().map(|n| n.load(Ordering::Relaxed)).sum();
            added.fetch_add(n, Ordering::Relaxed);
            touches.fetch_add(n, Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let words = memory.iter().enumerate().filter(|(i, _)| i % 1024 < 512);
    let sum: u64 = words.map(|(_, word)| u64::from(word.load(Ordering::Relaxed))).sum();
    assert_eq!(sum, added.load(Ordering::Relaxed), "no update is lost, none happens twice");
    assert!(touches.load(Ordering::Relaxed) >= 1_000_000);
    let stats = dev.stats();
    assert!(stats.device_faults > 100 && stats.cpu_faults > 100, "{stats:?}");
}

/// One thread maps, fills, remaps, drops and unmaps memory; another launches on memory of its own that the kernel places between it.
fn mappings_change_under_launches() {
    let (_hmm, dev) = device(16);
    let stop = AtomicBool::new(false);
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (dev, stop) = (&dev, &stop);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                while !stop.load(Ordering::Relaxed) {
                    let len = random.usize(1..600) * 4096;
                    let mut pages = Pages::new(len);
                    let data = pages.slice::<u32>();
                    for (i, x) in data.iter_mut().enumerate() {
                        *x = i as u32;
                    }
                    let mut expected = 0;
                    for _ in 0..random.usize(0..3) {
                        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
                        expected += 1;
                    }
                    match random.u8(0..4) {
                        0 => {
                            let at = random.usize(0..len / 4096) * 4096;
                            let page = &mut data[at / 4..at / 4 + 1024];
                            advise(page, libc::MADV_DONTNEED);
                            assert!(page.iter().all(|&x| x == 0));
                        }
                        1 => {
                            assert!(pages.resize(len + 4096));
                            let data = pages.slice::<u32>();
                            assert!(data[..len / 4].iter().enumerate().all(|(i, &x)| x == i as u32 + expected));
                            assert!(data[len / 4..].iter().all(|&x| x == 0));
                        }
                        _ => assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + expected)),
                    }
                }
            });
        }
        while Instant::now() < end {
            let mut vec: Vec<u32> = (0..fastrand::u32(1000..300_000)).collect();
            dev.run(&increment, groups(vec.len()), args![inout(&mut vec)]).unwrap();
            assert!(vec.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Prefetches of random runs against threads that touch the same pages.
fn migrations_against_touches() {
    const WORDS: usize = 2 << 20;
    let (_hmm, dev) = device(16);
    let memory: Vec<AtomicU32> = (0..WORDS).map(|_| AtomicU32::new(0)).collect();
    // The same memory as plain numbers, to name ranges of it.
    // SAFETY: of that length; it only names ranges, nobody reads it.
    let plain = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u32>(), WORDS) };
    let added = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for cpu in 0..4 {
            let (memory, added, stop) = (&memory, &added, &stop);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(cpu);
                while !stop.load(Ordering::Relaxed) {
                    memory[random.usize(0..WORDS)].fetch_add(1, Ordering::Relaxed);
                    added.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(99);
        while Instant::now() < end {
            let len = 1024 << random.usize(0..11);
            let at = random.usize(0..WORDS - len.min(WORDS - 1));
            let part = &plain[at..(at + len).min(WORDS)];
            if random.bool() { dev.prefetch(part).unwrap() } else { dev.evict(part).unwrap() }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let sum: u64 = memory.iter().map(|word| u64::from(word.load(Ordering::Relaxed))).sum();
    assert_eq!(sum, added.load(Ordering::Relaxed));
}

/// Stale residency: memory is unmapped by one thread, the address is taken by another, and a launch must see the new contents.
fn a_relaunch_never_sees_old_data() {
    let (_hmm, dev) = device(32);
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for seed in 0..3u32 {
            let dev = &dev;
            scope.spawn(move || {
                let mut round = seed << 24;
                while Instant::now() < end {
                    round += 1;
                    let mut pages = Pages::new(512 << 10);
                    pages.slice::<u32>().fill(round);
                    let data = pages.slice::<u32>();
                    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
                    assert!(data.iter().all(|&x| x == round + 1));
                }
            });
        }
    });
}

/// The window of a block was closed when nothing was mapped there any more, while pages of a second mapping in the same block, unmapped a moment
/// later, were still in it: taking them out of the device's page table then failed. Two mappings that share a block, unmapped in a row, show it.
fn neighbours_in_a_block_are_unmapped_one_after_the_other() {
    const PARTS: usize = 8;
    let (_hmm, dev) = device(16);
    let end = Instant::now() + seconds(5);
    while Instant::now() < end {
        let mut whole = Pages::huge(2 << 20);
        let data = whole.slice::<u32>();
        data.fill(1);
        for part in data.chunks_mut(data.len() / PARTS) {
            dev.run(&increment, groups(part.len()), args![inout(part)]).unwrap();
        }
        let start = std::mem::ManuallyDrop::new(whole).start() as usize;
        std::thread::scope(|scope| {
            for parts in [0..PARTS / 2, PARTS / 2..PARTS] {
                scope.spawn(move || {
                    for part in parts {
                        let len = (2 << 20) / PARTS;
                        // SAFETY: pages that are used no more; each part is unmapped once.
                        assert_eq!(unsafe { libc::munmap((start + part * len) as *mut _, len) }, 0);
                    }
                });
            }
        });
    }
}
