//! Bytes beside a written range are somebody else's, who goes on using them.

use super::Subject;
use super::memory::{pattern, same};
use crate::args::{Access, inout, inp, out};
use crate::{args, conformance::Named};
use uhmm_os::PAGE;

/// Offsets and lengths: inside a page, across pages, small, large, aligned and not.
const RANGES: [(usize, usize); 9] =
    [(1, 1), (100, 50), (PAGE - 1, 2), (PAGE, PAGE), (10, 3 * PAGE), (5000, 64 << 10), (0, 70_000), (1, 1 << 20), (777, 300_000)];

pub(super) fn neighbouring_bytes_are_left_alone(subject: &mut Subject<'_>) {
    for (offset, len) in RANGES {
        for access in [Access::Out, Access::InOut] {
            let mut memory: Vec<u8> = (0..offset + len + 5000).map(pattern).collect();
            let range = &mut memory[offset..offset + len];
            match access {
                Access::Out => subject.fill_part(range, len, 0, len, 0x77),
                _ => subject.add_one(range),
            }
            let what = format!("{access:?} at {offset}, {len} bytes");
            same(&what, &memory, |i| match (i < offset || i >= offset + len, access) {
                (true, _) => pattern(i),
                (false, Access::Out) => 0x77,
                (false, _) => pattern(i).wrapping_add(1),
            });
        }
    }
}

pub(super) fn neighbouring_bytes_change_meanwhile(subject: &mut Subject<'_>) {
    for (offset, len) in RANGES {
        let mut memory = vec![5u8; offset + len + 5000];
        let (before, rest) = memory.split_at_mut(offset);
        let (range, after) = rest.split_at_mut(len);
        let subject = &*subject;
        for round in 1..=3u8 {
            std::thread::scope(|scope| {
                // Several launches in a row, so that the CPU meets them at every step.
                let run = scope.spawn(|| (0..5).for_each(|_| subject.add_one(range)));
                while !run.is_finished() {
                    for x in before.iter_mut().chain(after.iter_mut()) {
                        *x = x.wrapping_add(1);
                    }
                }
                if let Err(panic) = run.join() {
                    std::panic::resume_unwind(panic);
                }
            });
            let what = format!("offset {offset}, {len} bytes, round {round}");
            let count = after[0];
            same(&format!("after {what}"), after, |_| count);
            same(&format!("before {what}"), before, |_| count);
        }
        same(&format!("offset {offset}, {len} bytes"), range, |_| 5 + 15);
    }
}

pub(super) fn two_ranges_share_a_page(subject: &mut Subject<'_>) {
    for len in [100, 3000, 40_000, 100_001, 300_000] {
        let mut memory: Vec<u8> = (0..2 * len).map(pattern).collect();
        for round in 1..=3u8 {
            let (left, right) = memory.split_at_mut(len);
            // The one is read, the other written, and they meet inside a page.
            let groups = len.div_ceil(super::PART);
            let list = args![out(&mut right[1..]), inp(&left[..len - 1]), super::PART as u64];
            subject.run(Named::Copy, groups, &list).unwrap_or_else(|e| panic!("Copy: {e}"));
            let list = args![inout(left), super::PART as u64];
            subject.run(Named::AddOne, groups, &list).unwrap_or_else(|e| panic!("AddOne: {e}"));
            same(&format!("written, {len} bytes"), &right[1..], |i| pattern(i).wrapping_add(round - 1));
            same("the byte between", &right[..1], |_| pattern(len));
            same(&format!("added to, {len} bytes"), left, |i| pattern(i).wrapping_add(round));
        }
    }
}
