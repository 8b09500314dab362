//! The program goes on with its life between launches: it unmaps, moves, drops, forks, and runs threads; and what has happened is counted.
#![allow(unsafe_code)] // fork

use super::memory::{Pages, pattern, same};
use super::{Named, PART, Subject};
use crate::args;
use crate::args::inout;
use std::time::{Duration, Instant};
use uhmm_os::{BLOCK, PAGE};

pub(super) fn launches_are_counted(subject: &mut Subject<'_>) {
    let before = subject.dev.stats();
    let mut data = vec![1u8; 1000];
    for _ in 0..5 {
        subject.add_one(&mut data);
    }
    // What is refused has not been launched.
    assert!(subject.run(Named::AddOne, 0, &args![inout(&mut data), PART as u64]).is_err());
    let counted = subject.dev.stats() - before;
    assert_eq!((counted.launches, counted.launches_failed), (5, 0));
}

pub(super) fn bytes_and_pages_add_up(subject: &mut Subject<'_>) {
    let pages = 2 * BLOCK / PAGE;
    let bytes = (pages * PAGE) as u64;
    let mut data = Pages::patterned(pages * PAGE);
    let before = subject.dev.stats();
    subject.add_one(data.bytes());
    let there = subject.dev.stats() - before;
    if !subject.info().capabilities.coherent {
        assert_eq!((there.pages_to_device, there.bytes_to_device, there.bytes_zeroed), (pages as u64, bytes, 0), "{there:?}");
        assert_eq!((there.pages_to_cpu, there.bytes_to_cpu), (0, 0), "nothing is copied back unasked: {there:?}");
    }
    same("added to", data.bytes(), |i| pattern(i).wrapping_add(1));
    let before_back = subject.dev.stats();
    if !subject.info().capabilities.coherent {
        // Pages are counted after who waits for them was woken.
        let until = Instant::now() + Duration::from_secs(5);
        let back = loop {
            let back = subject.dev.stats() - before;
            if back.pages_to_cpu >= pages as u64 || Instant::now() > until {
                break back;
            }
            std::thread::yield_now();
        };
        assert_eq!((back.pages_to_cpu, back.bytes_to_cpu), (pages as u64, bytes), "{back:?}");
        assert!(back.cpu_faults >= 1 && back.cpu_faults <= pages as u64, "{back:?}");
    }
    // What is only written is not sent.
    subject.fill_part(data.bytes(), PART, 0, PART, 9);
    let sent = subject.dev.stats() - before_back;
    assert!(sent.bytes_to_device == 0 || subject.info().capabilities.coherent, "{sent:?}");
    same("written", data.bytes(), |_| 9);
    if subject.has(Named::Fail) {
        let before = subject.dev.stats();
        assert!(subject.fail(inout(data.bytes()), 1, PART, 0).is_err());
        let failed = subject.dev.stats() - before;
        assert_eq!((failed.launches, failed.launches_failed), (1, 1));
    }
}

pub(super) fn memory_is_unmapped_moved_and_dropped(subject: &mut Subject<'_>) {
    for len in [5 * PAGE, 100 * PAGE, BLOCK, 2 * BLOCK + 7 * PAGE] {
        let mut data = Pages::patterned(len);
        subject.add_one(data.bytes());
        // Dropped while it is on the device: zeroes, not what was there.
        let (at, dropped) = (len / 3 / PAGE * PAGE, 2 * PAGE);
        data.drop_pages(at, dropped);
        let hole = |i: usize| (at..at + dropped).contains(&i);
        subject.add_one(data.bytes());
        same("after a drop", data.bytes(), |i| if hole(i) { 1 } else { pattern(i).wrapping_add(2) });
        // Moved while it is on the device.
        subject.add_one(data.bytes());
        assert!(data.resize(len + 3 * PAGE), "all of it was on the device");
        let expected = |i: usize| {
            if i >= len {
                0
            } else if hole(i) {
                2
            } else {
                pattern(i).wrapping_add(3)
            }
        };
        same("after a move", data.bytes(), expected);
        subject.add_one(data.bytes());
        assert!(data.resize(len), "all of it was on the device");
        subject.add_one(data.bytes());
        same("after a move back", data.bytes(), |i| expected(i).wrapping_add(2));
        // Unmapped while it is on the device, and its place taken by something else.
        subject.add_one(data.bytes());
        drop(data);
        let mut next = Pages::new(len);
        same("new memory", next.bytes(), |_| 0);
        subject.add_one(next.bytes());
        same("new memory, added to", next.bytes(), |_| 1);
    }
}

pub(super) fn a_forked_child_sees_the_contents(subject: &mut Subject<'_>) {
    let mut data: Vec<u8> = (0..3_000_001).map(pattern).collect();
    for round in 1..=3u8 {
        subject.add_one(&mut data);
        // SAFETY: the child only reads memory, and ends at once.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "fork");
        if child == 0 {
            let right = data.iter().enumerate().all(|(i, &x)| x == pattern(i).wrapping_add(round));
            // SAFETY: it ends the child.
            unsafe { libc::_exit(i32::from(!right)) };
        }
        let mut status = 0;
        // SAFETY: our own child.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "the child read something else");
    }
    same("the parent's", &data, |i| pattern(i).wrapping_add(3));
}

pub(super) fn launches_from_many_threads(subject: &mut Subject<'_>) {
    let mut parts: Vec<Vec<u8>> = (0..6).map(|part| vec![part; 200_000]).collect();
    let subject = &*subject;
    std::thread::scope(|scope| {
        for part in &mut parts {
            scope.spawn(|| {
                for _ in 0..30 {
                    subject.add_one(part);
                }
            });
        }
    });
    for (part, data) in parts.iter().enumerate() {
        same("one thread's", data, |_| part as u8 + 30);
    }
}
