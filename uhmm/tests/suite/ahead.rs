//! Blocks that come home before the CPU touches them, when it takes one after the other.

use crate::harness::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Device, args, inout};

crate::tests![
    blocks_of_a_stream_come_before_they_are_touched,
    a_stream_can_go_down,
    touches_here_and_there_bring_no_others,
    a_launch_ends_a_stream,
    a_prefetch_is_not_undone_by_what_was_to_come_before_it,
    a_prefetch_is_not_undone_by_a_touch_before_it,
    a_stream_beside_launches_and_unmapping,
];

const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 24;

/// Whole blocks on the device, each byte the number of its block.
struct Away {
    pages: Pages,
}

impl Away {
    fn new(dev: &Device) -> Self {
        let mut pages = Pages::huge(BLOCKS * BLOCK);
        for (number, block) in pages.slice::<u8>().chunks_mut(BLOCK).enumerate() {
            block.fill(number as u8 + 1);
        }
        let mut away = Away { pages };
        away.launch(dev);
        away
    }

    fn launch(&mut self, dev: &Device) {
        dev.run(&|_: &uhmm::Ctx<'_>| {}, 1, args![inout(self.pages.slice::<u8>())]).unwrap();
        assert!((0..BLOCKS).all(|number| !self.is_home(number)));
    }

    fn at(&self, number: usize) -> *const u8 {
        self.pages.at(number * BLOCK)
    }

    fn is_home(&self, number: usize) -> bool {
        present(self.at(number))
    }

    fn touch(&self, number: usize) {
        // SAFETY: mapped while `self` lives; nobody writes.
        assert_eq!(read(unsafe { &*self.at(number) }), number as u8 + 1);
    }

    fn comes(&self, number: usize) -> bool {
        let limit = Instant::now() + Duration::from_secs(10);
        while !self.is_home(number) && Instant::now() < limit {
            std::thread::yield_now();
        }
        self.is_home(number)
    }
}

fn blocks_of_a_stream_come_before_they_are_touched() {
    let (hmm, dev) = device(256);
    let away = Away::new(&dev);
    let before = hmm.stats().cpu_faults;
    for number in 0..2 {
        away.touch(number);
    }
    assert!(away.comes(2) && away.comes(3), "what follows comes by itself");
    for number in 2..BLOCKS {
        away.touch(number);
    }
    let faults = hmm.stats().cpu_faults - before;
    assert!(faults < BLOCKS as u64 * 3 / 4, "{faults} faults for {BLOCKS} blocks");
}

fn a_stream_can_go_down() {
    let (_hmm, dev) = device(256);
    let away = Away::new(&dev);
    for number in [20, 19] {
        away.touch(number);
    }
    assert!(away.comes(18) && away.comes(17));
    assert!(!away.is_home(21), "behind the stream nothing moves");
    (0..BLOCKS).for_each(|number| away.touch(number));
}

fn touches_here_and_there_bring_no_others() {
    let (_hmm, dev) = device(256);
    let away = Away::new(&dev);
    let touched = [3, 9, 1, 15, 21, 12, 18, 6];
    for number in touched {
        away.touch(number);
    }
    std::thread::sleep(Duration::from_millis(200)); // for what nobody should have asked for
    for number in 0..BLOCKS {
        assert_eq!(away.is_home(number), touched.contains(&number), "block {number}");
    }
}

fn a_launch_ends_a_stream() {
    let (_hmm, dev) = device(256);
    let mut away = Away::new(&dev);
    for number in 0..12 {
        away.touch(number);
        away.launch(&dev);
    }
    away.touch(12);
    std::thread::sleep(Duration::from_millis(200));
    assert!((13..BLOCKS).all(|number| !away.is_home(number)), "one touch a launch is no stream");
}

/// Blocks were read in order, then all was prefetched to the device. What the stream had asked for before went on: it brought blocks home again that the
/// prefetch had just sent.
fn a_prefetch_is_not_undone_by_what_was_to_come_before_it() {
    let (_hmm, dev) = device(256);
    let mut away = Away::new(&dev);
    for turn in 0..200 {
        (0..4).for_each(|number| away.touch(number));
        let data = away.pages.slice::<u8>();
        dev.prefetch(data).unwrap();
        let end = Instant::now() + Duration::from_micros(500);
        while Instant::now() < end {
            assert!((0..BLOCKS).all(|number| !away.is_home(number)), "a block came back in turn {turn}");
        }
    }
}

/// Two threads touched one block, and others others: the monitor read all of that at once. The first brought the block home, which woke the second too; a prefetch sent it away again;
/// and then the monitor came to the second touch, and brought the block home once more, for nobody.
fn a_prefetch_is_not_undone_by_a_touch_before_it() {
    const OTHERS: usize = 8;
    let (_hmm, dev) = device(256);
    let away = Away::new(&dev);
    let end = Instant::now() + seconds(5);
    let (start, done) = (std::sync::Barrier::new(OTHERS + 3), AtomicU32::new(0));
    let (stop, turns) = (AtomicBool::new(false), AtomicU32::new(0));
    let words = away.pages.atomics::<AtomicU32>();
    std::thread::scope(|scope| {
        for thread in 0..OTHERS + 2 {
            let (start, done, stop) = (&start, &done, &stop);
            scope.spawn(move || {
                loop {
                    start.wait();
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    // The two touch one block, each another page; the others every second one of those that follow.
                    let at = if thread < 2 { thread * 300 * 4096 } else { 2 * (thread - 1) * BLOCK };
                    words[at / 4].load(Ordering::SeqCst);
                    done.fetch_add(if thread < 2 { 1 } else { 100 }, Ordering::SeqCst);
                }
            });
        }
        let mut came_back = false;
        while !came_back && Instant::now() < end {
            done.store(0, Ordering::SeqCst);
            start.wait();
            while done.load(Ordering::SeqCst) % 100 < 2 {
                std::hint::spin_loop();
            }
            dev.prefetch_range(away.at(0) as usize, BLOCK).unwrap();
            while done.load(Ordering::SeqCst) / 100 < OTHERS as u32 {
                std::hint::spin_loop();
            }
            std::thread::sleep(Duration::from_millis(1));
            came_back = away.is_home(0);
            dev.prefetch_range(away.at(0) as usize, BLOCKS * BLOCK).unwrap();
            turns.fetch_add(1, Ordering::SeqCst);
        }
        stop.store(true, Ordering::SeqCst);
        start.wait();
        assert!(!came_back, "the block came back in turn {turns:?}");
    });
    assert!(turns.into_inner() > 5);
}

/// What comes ahead may be launched over, or unmapped, at any moment: nothing is lost, and nobody hangs.
fn a_stream_beside_launches_and_unmapping() {
    let (_hmm, dev) = device(256);
    let end = Instant::now() + seconds(5);
    let mut turns = 0u32;
    while Instant::now() < end {
        let mut away = Away::new(&dev);
        (0..3 + turns as usize % 5).for_each(|number| away.touch(number));
        match turns % 3 {
            0 => {} // unmapped while blocks come
            1 => {
                dev.run(&|_: &uhmm::Ctx<'_>| {}, 1, args![inout(away.pages.slice::<u8>())]).unwrap();
                (0..BLOCKS).for_each(|number| away.touch(number));
            }
            _ => {
                let words = away.pages.atomics::<AtomicU32>();
                let touch = |number: usize| {
                    let word = words[number * BLOCK / 4].load(Ordering::Relaxed);
                    assert_eq!(word, u32::from_ne_bytes([number as u8 + 1; 4]));
                };
                std::thread::scope(|scope| {
                    for thread in 0..2 {
                        scope.spawn(move || (thread * BLOCKS / 2..BLOCKS).for_each(touch));
                    }
                });
            }
        }
        turns += 1;
    }
    assert!(turns > 5, "only {turns} turns");
}
