//! What a launch declares is there, and what it writes is read afterwards, wherever it lies and however long it is.

use super::memory::{Pages, pages_present, pattern, same};
use super::{Named, Node, Subject};
use crate::args;
use crate::args::{inp, out};
use uhmm_os::{BLOCK, PAGE};

pub(super) fn what_is_only_read_stays_as_it_was(subject: &mut Subject<'_>) {
    for len in [1, 5000, 64 << 10, 3_000_000] {
        let data: Vec<u8> = (0..len).map(pattern).collect();
        let there = pages_present(&data);
        for _ in 0..2 {
            subject.sum(&data);
            assert_eq!(pages_present(&data), there, "the CPU keeps what is only read");
            same("what was only read", &data, pattern);
        }
    }
}

pub(super) fn every_alignment_and_size(subject: &mut Subject<'_>) {
    let edge = 64 << 10;
    let sizes = [0, 1, 2, 7, 63, 64, 333, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, edge - 1, edge, edge + 1, edge + PAGE, 3 * edge + 7];
    for offset in [0, 1, 3, 8, 64, 100, PAGE - 1, PAGE, PAGE + 16] {
        for len in sizes {
            one(subject, offset, len);
        }
    }
    for (offset, len) in [(0, BLOCK), (0, BLOCK + 1), (1, BLOCK - 1), (PAGE, BLOCK), (17, BLOCK + PAGE + 100)] {
        one(subject, offset, len);
    }
}

/// All three ways to declare a range, at one place and of one length, twice each.
fn one(subject: &mut Subject<'_>, offset: usize, len: usize) {
    let what = |how: &str| format!("{how} at offset {offset}, {len} bytes");
    let mut from: Vec<u8> = (0..offset + len).map(pattern).collect();
    let mut to = vec![7u8; offset + len];
    for round in 0..2u8 {
        let expected = |i: usize| pattern(i).wrapping_add(round);
        subject.copy(&mut to[offset..], &from[offset..]);
        same(&what("out"), &to[offset..], |i| expected(i + offset));
        same(&what("before out"), &to[..offset], |_| 7);
        let sum: u64 = from[offset..].iter().map(|&x| u64::from(x)).sum();
        assert_eq!(subject.sum(&from[offset..]), sum, "{}", what("inp"));
        subject.add_one(&mut from[offset..]);
        same(&what("inout"), &from[offset..], |i| expected(i + offset).wrapping_add(1));
        same(&what("before inout"), &from[..offset], pattern);
    }
}

pub(super) fn what_out_leaves_unwritten_reads_as_before_or_zero(subject: &mut Subject<'_>) {
    // What lay in device memory before must not be seen.
    let mut secret = vec![0xaau8; 6 << 20];
    for part in secret.chunks_mut(2 << 20) {
        subject.add_one(part);
    }
    same("secret", &secret, |_| 0xab);
    drop(secret);
    for (offset, len) in [(0, 100), (5, 3 * PAGE), (0, 64 << 10), (100, 1 << 20), (0, BLOCK), (3, 2 * BLOCK)] {
        let mut data = vec![0x11u8; offset + len];
        let part = 10_000;
        subject.fill_part(&mut data[offset..], part, 1000, 500, 0x22);
        for (i, &x) in data.iter().enumerate() {
            let written = i >= offset && (1000..1500).contains(&((i - offset) % part));
            assert!(
                if written { x == 0x22 } else { x == 0x11 || (x == 0 && i >= offset) },
                "offset {offset}, {len} bytes: byte {i} is {x:#x}"
            );
        }
        assert!(len <= 1000 || data[offset + 1000] == 0x22);
    }
    let mut data = vec![0x11u8; 2000];
    subject.fill_part(&mut data, 2000, 0, 2000, 0x33);
    same("all of it", &data, |_| 0x33);
}

pub(super) fn an_unchanged_relaunch_moves_nothing(subject: &mut Subject<'_>) {
    let mut to = Pages::new(2 * BLOCK);
    let mut from = Pages::patterned(2 * BLOCK);
    relaunch(subject, to.bytes(), from.bytes(), 0);
    // Ranges that end inside pages: a device without replayable faults gets the pages at their edges anew for each launch.
    let edges = if subject.info().capabilities.replayable_faults { 0 } else { 2 * PAGE as u64 };
    let end = 2 * BLOCK - 100;
    relaunch(subject, &mut to.bytes()[16..end], &from.bytes()[16..end], edges);
}

fn relaunch(subject: &mut Subject<'_>, to: &mut [u8], from: &[u8], edges: u64) {
    subject.copy(to, from);
    for round in 0..3 {
        let before = subject.dev.stats();
        subject.copy(to, from);
        let moved = subject.dev.stats() - before;
        assert!(
            moved.bytes_to_device <= 2 * edges && moved.bytes_to_cpu <= edges && moved.bytes_zeroed <= edges,
            "round {round}: {moved:?}"
        );
    }
    let first = from[0];
    same("the copy", &to[..1], |_| first);
    assert!(to == from, "the copy is not the original");
}

pub(super) fn a_cpu_write_in_between_is_seen(subject: &mut Subject<'_>) {
    let len = BLOCK + 12_345;
    let mut from: Vec<u8> = (0..len).map(pattern).collect();
    let mut to = vec![0u8; len];
    subject.copy(&mut to, &from);
    for round in 0..8usize {
        for i in [0, 1, 4095, 4096, 70_000, BLOCK - 1, BLOCK, len - 1] {
            from[(i + round) % len] = round as u8 ^ 0x5a;
        }
        // And a result that the CPU has overwritten is overwritten again.
        to[round * 1000] ^= 0xff;
        subject.copy(&mut to, &from);
        let expected = &from;
        same("the copy", &to, |i| expected[i]);
    }
    // On what is both read and written.
    let mut expected = from.clone();
    for round in 0..4 {
        from[round * 5000] = 9;
        expected[round * 5000] = 9;
        subject.add_one(&mut from);
        expected.iter_mut().for_each(|x| *x = x.wrapping_add(1));
        assert_eq!(from[round * 5000], 10);
    }
    same("inout", &from, |i| expected[i]);
}

pub(super) fn untouched_memory_is_zero(subject: &mut Subject<'_>) {
    let mut fresh = Pages::new(BLOCK + 5 * PAGE);
    subject.add_one(fresh.bytes());
    same("never touched, then added to", fresh.bytes(), |_| 1);
    let mut fresh = Pages::new(BLOCK + 5 * PAGE);
    let mut to = vec![9u8; fresh.len];
    subject.copy(&mut to, fresh.bytes());
    same("a copy of what was never touched", &to, |_| 0);
    // Only read by the CPU: the zero page.
    let mut fresh = Pages::new(BLOCK + 5 * PAGE);
    assert_eq!(fresh.bytes().iter().map(|&x| u64::from(x)).sum::<u64>(), 0);
    subject.add_one(&mut fresh.bytes()[PAGE + 1..]);
    same("only read, then added to", fresh.bytes(), |i| u8::from(i > PAGE));
}

pub(super) fn stored_pointers_are_followed(subject: &mut Subject<'_>) {
    // A list in no order, in memory that the launch declares, so that any device can follow it.
    let count = 30_000usize;
    let mut nodes = vec![Node { next: 0, value: 0 }; count];
    let at = |i: usize, nodes: &[Node]| &raw const nodes[i] as u64;
    let order: Vec<usize> = (0..count).map(|i| i * 7919 % count).collect();
    for pair in order.windows(2) {
        nodes[pair[0]].next = at(pair[1], &nodes);
    }
    nodes.iter_mut().enumerate().for_each(|(i, node)| node.value = i as u64);
    let head = at(order[0], &nodes);
    let mut sum = [0u64];
    for round in 0..3 {
        nodes[5].value = round;
        subject.run(Named::FollowList, 1, &args![out(&mut sum), head, inp(&nodes)]).unwrap_or_else(|e| panic!("FollowList: {e}"));
        assert_eq!(sum[0], (0..count as u64).sum::<u64>() - 5 + round);
    }
}
