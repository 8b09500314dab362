//! Races on the coherent device: what threads do with their memory while it goes there and comes home.

use crate::coherent::{coherent, evicted_by_taking_all, since};
use crate::harness::*;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;
use uhmm::{Ctx, Device, args, inout};

crate::tests![threads_beside_migration_both_ways, mappings_change_beside_migration];

/// Threads count in the same memory with atomics, and read and write it by system calls, while it goes to the device and comes home.
fn threads_beside_migration_both_ways() {
    let (_hmm, dev) = coherent(8);
    const WORDS: usize = 12 << 20 >> 3;
    let mut memory = Pages::huge(12 << 20);
    let words: &[AtomicU64] = memory.atomics();
    let end = Instant::now() + seconds(5);
    let before = dev.stats();
    let stop = AtomicBool::new(false);
    // Thread t counts in words t, t + 8, ...; its shadow says how far.
    let work = |thread: usize| {
        let mut shadow = vec![0u64; WORDS / 8];
        let mut random = fastrand::Rng::with_seed(thread as u64 + 1);
        let mut pipe = std::io::pipe().unwrap();
        while !stop.load(Ordering::Relaxed) {
            let at = random.usize(0..shadow.len() - 64);
            for i in at..at + 64 {
                assert_eq!(words[i * 8 + thread].fetch_add(1, Ordering::Relaxed), shadow[i], "word {i} of thread {thread}");
                shadow[i] += 1;
            }
            // A system call reads a word, and another writes it back, changed by one.
            let word = &words[at * 8 + thread];
            // SAFETY: this thread's own word, which nobody else uses.
            let bytes = unsafe { std::slice::from_raw_parts_mut(word.as_ptr().cast::<u8>(), 8) };
            pipe.1.write_all(bytes).unwrap();
            let mut copy = [0u8; 8];
            pipe.0.read_exact(&mut copy).unwrap();
            assert_eq!(u64::from_ne_bytes(copy), shadow[at]);
            pipe.1.write_all(&(shadow[at] + 1).to_ne_bytes()).unwrap();
            pipe.0.read_exact(bytes).unwrap();
            shadow[at] += 1;
        }
        (0..shadow.len()).for_each(|i| assert_eq!(words[i * 8 + thread].load(Ordering::Relaxed), shadow[i], "word {i} of thread {thread}"));
    };
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..8).map(|thread| scope.spawn(move || work(thread))).collect();
        let mut random = fastrand::Rng::with_seed(99);
        let base = memory.start() as usize;
        while Instant::now() < end && threads.iter().all(|thread| !thread.is_finished()) {
            let at = random.usize(0..5) << 21;
            // SAFETY: inside `memory`; it only names a range, nobody reads it.
            let part = unsafe { std::slice::from_raw_parts((base + at) as *const u8, random.usize(1..1024) << 12) };
            match random.u8(0..4) {
                0 | 1 => dev.prefetch(part).unwrap(),
                2 => dev.evict(part).unwrap(),
                _ => {
                    // A kernel counts beside them, in words that are its own: added and taken away.
                    let kernel = |ctx: &Ctx<'_>| {
                        let word = ctx.ptr((ctx.value::<usize>(0) + 8 * ctx.group()) as *const AtomicU64);
                        // SAFETY: inside `memory`, where all use atomics, or words of their own.
                        unsafe { (*word).fetch_add(0, Ordering::Relaxed) };
                    };
                    dev.run(&kernel, 64, args![base + at]).unwrap();
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    let moved = since(&dev, before);
    assert!(moved.pages_to_device > 5000 && moved.pages_to_cpu > 5000, "{moved:?}");
    println!("{moved:?}");
    memory.slice::<u8>()[0] = 1;
}

/// Threads map, drop and unmap memory of their own, while somebody else sends it to the device and back.
fn mappings_change_beside_migration() {
    let (_hmm, dev) = coherent(8);
    let end = Instant::now() + seconds(5);
    let dev = &dev;
    let places = [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; 3];
    std::thread::scope(|scope| {
        for (thread, place) in places.iter().enumerate() {
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(thread as u64);
                while Instant::now() < end {
                    change_mappings(dev, &mut random, place);
                }
            });
        }
        scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(99);
            while Instant::now() < end {
                let (start, len) = &places[random.usize(0..3)];
                let (start, pages) = (start.load(Ordering::Relaxed), len.load(Ordering::Relaxed) / 4096);
                if start == 0 {
                    continue; // not mapped yet
                }
                // It may be gone by then, which is no error.
                let from = random.usize(0..pages.max(1));
                let part = (start + from * 4096, random.usize(0..=pages.saturating_sub(from)) * 4096);
                if random.u8(0..3) > 0 {
                    dev.prefetch_range(part.0, part.1).unwrap();
                } else {
                    // SAFETY: nobody reads it: it only names a range, which may be gone.
                    dev.evict(unsafe { std::slice::from_raw_parts(part.0 as *const u8, part.1) }).unwrap();
                }
            }
        });
    });
    assert_eq!(evicted_by_taking_all(dev), 0, "all of it was unmapped");
}

fn change_mappings(dev: &Device, random: &mut fastrand::Rng, place: &(AtomicUsize, AtomicUsize)) {
    let len = random.usize(1..900) * 4096;
    let mut pages = Pages::new(len);
    place.1.store(0, Ordering::Relaxed);
    place.0.store(pages.start() as usize, Ordering::Relaxed);
    place.1.store(len, Ordering::Relaxed);
    let mark = random.u8(1..255);
    pages.slice::<u8>().fill(mark);
    if random.bool() {
        dev.prefetch(pages.slice::<u8>()).unwrap();
    }
    let mut dropped = vec![false; len / 4096];
    for _ in 0..random.usize(0..20) {
        let at = random.usize(0..len / 4096);
        let count = random.usize(1..=(len / 4096 - at).min(50));
        let range = &mut pages.slice::<u8>()[at * 4096..(at + count) * 4096];
        advise(range, libc::MADV_DONTNEED);
        dropped[at..at + count].fill(true);
        let wrong = range.iter().step_by(4096).position(|x| read(x) != 0).map(|page| at + page);
        assert_eq!(wrong, None, "a dropped page has its contents again");
    }
    if random.bool() {
        let kernel = |ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(1 << 22).iter_mut().for_each(|x| *x = x.wrapping_add(1));
        dev.run(&kernel, 1, args![inout(pages.slice::<u8>())]).unwrap();
    } else {
        pages.slice::<u8>().iter_mut().for_each(|x| *x = x.wrapping_add(1));
    }
    let right = |i: usize| if dropped[i / 4096] { 1 } else { mark.wrapping_add(1) };
    let wrong = pages.slice::<u8>().iter().enumerate().find(|&(i, &x)| x != right(i));
    assert_eq!(wrong, None, "of {len} bytes");
}
