//! What is wrong with a launch is found before its kernel starts, with nothing changed; what goes wrong in a kernel fails its launch only.
#![allow(unsafe_code)] // arguments that name what they must not

use super::memory::{Pages, pages_present, pattern, same};
use super::named::{FAILED, Named, Node};
use super::{PART, Subject};
use crate::args;
use crate::args::{Access, Arg, Args, RawArg, inout, inp, out, ptr};
use crate::driver::KernelFault;
use crate::error::Error;
use core::any::TypeId;
use uhmm_os::PAGE;

fn raw(start: usize, count: usize, access: Access, device: Option<u32>) -> Arg<'static> {
    let raw = RawArg::Slice { start, count, size: 1, ty: TypeId::of::<u8>(), name: "u8", access, device };
    // SAFETY: launches with this are refused before anything uses it, or it names memory that the check owns.
    unsafe { Arg::from_raw(raw) }
}

/// A launch that must be refused. If it ran all the same, it would show in `good`.
fn refused(subject: &Subject<'_>, good: &mut [u8], arg: Arg<'_>, right: fn(&Error) -> bool) {
    let there = pages_present(good);
    let list = Args::new([inout(good), args::IntoArg::into_arg(PART as u64), arg]);
    match subject.run(Named::AddOne, 10, &list) {
        Ok(()) => panic!("a launch with a bad argument was accepted"),
        Err(e) => {
            assert!(right(&e), "another error was expected than: {e}");
            let text = e.to_string();
            assert!(text.chars().next().is_some_and(char::is_lowercase), "{text}");
        }
    }
    assert_eq!(pages_present(good), there, "something has moved");
    same("an argument of the refused launch", good, pattern);
}

pub(super) fn nothing_at_all_can_be_launched(subject: &mut Subject<'_>) {
    subject.add_one(&mut []);
    subject.copy(&mut [], &[]);
    assert!(subject.run(Named::AddOne, 7, &args![inout::<u8>(&mut []), PART as u64]).is_ok());
}

pub(super) fn bad_ranges_are_refused_and_change_nothing(subject: &mut Subject<'_>) {
    let mut good: Vec<u8> = (0..1_000_000).map(pattern).collect();
    let mut refused = |arg, right| refused(subject, &mut good, arg, right);
    refused(raw(0, 5, Access::In, None), |e| matches!(e, Error::Null { index: 2, bytes: 5 }));
    refused(raw(4096, usize::MAX / 2, Access::In, None), |e| matches!(e, Error::Overflow { index: 2, .. }));
    refused(raw(usize::MAX - 3, 4, Access::Out, None), |e| matches!(e, Error::Overflow { .. }));
    refused(raw(0xffff_8000_0000_0000, 1, Access::In, None), |e| matches!(e, Error::Overflow { .. }));
    let mut pages = Pages::patterned(32 * PAGE);
    let start = pages.start as usize;
    pages.protect(4 * PAGE, PAGE, libc::PROT_READ);
    pages.protect(8 * PAGE, PAGE, libc::PROT_NONE);
    refused(raw(start + 7, 5 * PAGE, Access::Out, None), |e| matches!(e, Error::Protected { index: 2, write: true, .. }));
    refused(raw(start + 7, 5 * PAGE, Access::InOut, None), |e| matches!(e, Error::Protected { write: true, .. }));
    refused(raw(start + 8 * PAGE, 1, Access::In, None), |e| matches!(e, Error::Protected { write: false, .. }));
    refused(raw(start + 5 * PAGE, 20 * PAGE, Access::In, None), |e| matches!(e, Error::Protected { .. }));
    pages.protect(0, 32 * PAGE, libc::PROT_READ | libc::PROT_WRITE);
    same("protected pages", pages.bytes(), pattern);
    drop(pages);
    refused(raw(start + PAGE, 5, Access::In, None), |e| matches!(e, Error::Unmapped { index: 2, .. }));
    refused(raw(start + PAGE, 3 * PAGE, Access::InOut, None), |e| matches!(e, Error::Unmapped { .. }));
    if !subject.info().capabilities.replayable_faults {
        // SAFETY: it is refused.
        let bare = unsafe { ptr(start as *const u8) };
        refused(bare, |e| matches!(e, Error::Allocation { index: 2, .. }));
    }
}

pub(super) fn overlaps_are_refused(subject: &mut Subject<'_>) {
    let mut good: Vec<u8> = (0..1_000_000).map(pattern).collect();
    let start = good.as_ptr() as usize;
    for (at, access) in [(start, Access::In), (start + 999_999, Access::In), (start + 5000, Access::InOut), (start - 10, Access::Out)] {
        refused(subject, &mut good, raw(at, 20, access, None), |e| {
            matches!(e, Error::Overlap { first: 0, second: 2, .. } | Error::Unmapped { .. })
        });
    }
    // Readers may share, and neighbours do not overlap.
    let (left, right) = good.split_at_mut(500_001);
    let mut sums = [0u64; 5];
    let list = args![out(&mut sums), inp(left), PART as u64, inp(&left[5..]), inp(right)];
    subject.run(Named::Sum, 5, &list).unwrap_or_else(|e| panic!("readers that share: {e}"));
    subject.copy(&mut right[..400_000], &left[100_001..]);
}

pub(super) fn grids_without_groups_are_refused(subject: &mut Subject<'_>) {
    let mut good: Vec<u8> = (0..100_000).map(pattern).collect();
    assert!(matches!(subject.run(Named::AddOne, 0, &args![inout(&mut good), PART as u64]), Err(Error::Grid(_))));
    let entry = (subject.forms)(Named::AddOne).expect("it may not be left out");
    let grid = crate::kernel::Grid { size: [usize::MAX, 2, 1] };
    assert!(matches!(subject.dev.run(entry, grid, &args![inout(&mut good), PART as u64]), Err(Error::Grid(_))));
    same("an argument of the refused launch", &good, pattern);
}

pub(super) fn memory_of_another_device_is_refused(subject: &mut Subject<'_>) {
    let mut good: Vec<u8> = (0..100_000).map(pattern).collect();
    let other = subject.dev.id() + 1;
    refused(subject, &mut good, raw(4096, 10, Access::In, Some(other)), |e| matches!(e, Error::OtherDevice { index: 2 }));
}

pub(super) fn undeclared_memory_is_reached_or_refused(subject: &mut Subject<'_>) {
    let mut nodes: Vec<Box<Node>> = (0..2000).map(|i| Box::new(Node { next: 0, value: i })).collect();
    for i in 0..nodes.len() - 1 {
        nodes[i].next = &raw const *nodes[i + 1] as u64;
    }
    let head = &raw const *nodes[0] as u64;
    let mut sum = [7u64];
    let result = subject.run(Named::FollowList, 1, &args![out(&mut sum), head]);
    if subject.info().capabilities.replayable_faults {
        result.unwrap_or_else(|e| panic!("FollowList: {e}"));
        assert_eq!(sum[0], (0..2000).sum::<u64>());
        let mut pages = Pages::patterned(100 * PAGE);
        for round in 0..3 {
            for page in [3, 50, 99] {
                let at = page * PAGE + 77;
                // SAFETY: the byte is ours, and nobody touches it while the launch runs.
                let bare = unsafe { ptr(pages.start.add(at)) };
                subject.run(Named::Reach, 1, &args![out(&mut sum), bare]).unwrap_or_else(|e| panic!("Reach: {e}"));
                assert_eq!(sum[0], u64::from(pattern(at).wrapping_add(round)), "what the device read");
                assert_eq!(pages.bytes()[at], pattern(at).wrapping_add(round + 1), "what the device wrote");
            }
        }
    } else {
        let Err(Error::Kernel(fault @ KernelFault::NotDeclared { address, write: false })) = result else {
            panic!("not refused: {result:?}")
        };
        assert_eq!(address & !(PAGE - 1), head as usize & !(PAGE - 1), "the address is named");
        assert!(Error::Kernel(fault).to_string().contains(&format!("{address:#x}")));
        assert!(sum[0] == 7 || sum[0] == 0, "as before, or as the kernel wrote it");
        // Declared, the same node is reached.
        let one = [Node { next: 0, value: 41 }];
        let head = one.as_ptr() as u64;
        subject.run(Named::FollowList, 1, &args![out(&mut sum), head, inp(&one)]).unwrap_or_else(|e| panic!("FollowList: {e}"));
        assert_eq!(sum[0], 41);
    }
    assert!(nodes.iter().enumerate().all(|(i, node)| node.value == i as u64));
}

pub(super) fn a_failing_kernel_leaves_bytes_as_before_or_as_written(subject: &mut Subject<'_>) {
    if !subject.has(Named::Fail) {
        return;
    }
    let part = 50_000;
    for (offset, len) in [(0, 100), (3, 5000), (0, 16 * PAGE), (100, 500_000), (0, 3 << 20)] {
        let mut data: Vec<u8> = (0..offset + len).map(|i| pattern(i) & 0x7f).collect();
        // Where it is for the first launch, then on the device already.
        for round in 0..2 {
            for written_only in [true, false] {
                let range = &mut data[offset..];
                let arg = if written_only { out(range) } else { inout(range) };
                let failed = subject.fail(arg, len.div_ceil(part), part, len.div_ceil(part) / 2);
                assert!(matches!(failed, Err(Error::Kernel(_))), "a failing kernel must fail its launch: {failed:?}");
                for (i, &x) in data.iter().enumerate() {
                    let first = i >= offset && (i - offset) % part == 0;
                    assert!(
                        x == pattern(i) & 0x7f || (first && x == FAILED),
                        "offset {offset}, {len} bytes, round {round}: byte {i} is {x}"
                    );
                }
                data.iter_mut().enumerate().for_each(|(i, x)| *x = pattern(i) & 0x7f);
            }
            // The next launch works.
            subject.add_one(&mut data[offset..]);
            same("after the failure", &data[offset..], |i| (pattern(i + offset) & 0x7f) + 1);
            data.iter_mut().enumerate().for_each(|(i, x)| *x = pattern(i) & 0x7f);
        }
    }
}
