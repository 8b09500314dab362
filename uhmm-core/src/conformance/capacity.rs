//! The device's memory: more data than it holds, too much at once, pages that are sent there and back, and memory that the program allocates there.

use super::memory::{DeviceBytes, Pages, pages_present, pattern, same};
use super::{Named, PART, Subject};
use crate::args;
use crate::args::{Access, inout, out};
use crate::error::Error;
use uhmm_os::BLOCK;

pub(super) fn more_data_than_the_device_holds(subject: &mut Subject<'_>) {
    let capacity = subject.capacity();
    let mut data = Pages::patterned(capacity / 2 * 5);
    for round in 1..=2u8 {
        // Half of the device at a time, so that two launches fit and the third sends something home.
        for part in data.bytes().chunks_mut(capacity / 2) {
            subject.add_one(part);
        }
        same("all parts", data.bytes(), |i| pattern(i).wrapping_add(round));
    }
    // And without the CPU's touching anything in between.
    for _ in 0..2 {
        for part in data.bytes().chunks_mut(capacity / 2 + 12_345) {
            subject.add_one(&mut part[..capacity.min(2 << 20)]);
        }
    }
    let step = capacity / 2 + 12_345;
    same("all parts again", data.bytes(), |i| pattern(i).wrapping_add(if i % step < capacity.min(2 << 20) { 4 } else { 2 }));
}

pub(super) fn too_much_at_once_is_refused(subject: &mut Subject<'_>) {
    let capacity = subject.capacity();
    let mut data = Pages::patterned(capacity + BLOCK);
    let there = pages_present(data.bytes());
    if subject.info().capabilities.coherent {
        return too_much_for_a_coherent_device(subject, &mut data);
    }
    for access in [Access::Out, Access::InOut] {
        let bytes = data.bytes();
        let arg = if access == Access::Out { out(bytes) } else { inout(bytes) };
        let result = subject.run(Named::AddOne, 1, &args![arg, PART as u64]);
        let Err(error @ Error::TooLarge { .. }) = result else {
            panic!("{} bytes on a device of {capacity}: {result:?}", capacity + BLOCK)
        };
        assert!(error.to_string().contains(&capacity.to_string()), "{error}");
        assert_eq!(pages_present(data.bytes()), there, "nothing has moved");
    }
    let range = data.bytes().as_ptr_range();
    assert!(matches!(subject.dev.prefetch(range.start as usize, range.end as usize), Err(Error::TooLarge { .. })));
    same("what was refused", data.bytes(), pattern);
    subject.add_one(&mut data.bytes()[..capacity / 2]);
    same("half of it", &data.bytes()[..capacity / 2], |i| pattern(i).wrapping_add(1));
}

/// What has no room there is used where it is.
fn too_much_for_a_coherent_device(subject: &mut Subject<'_>, data: &mut Pages) {
    let (capacity, range) = (subject.capacity(), data.bytes().as_ptr_range());
    let before = subject.dev.stats();
    // The end is there first, and is not driven out by the beginning of the same range.
    subject.add_one(&mut data.bytes()[capacity / 2..]);
    let half = |i: usize| u8::from(i >= capacity / 2);
    for round in 1..=3u8 {
        subject.add_one(data.bytes());
        subject.dev.prefetch(range.start as usize, range.end as usize).unwrap_or_else(|e| panic!("prefetch: {e}"));
        same("more than the device holds", data.bytes(), |i| pattern(i).wrapping_add(round + half(i)));
        let moved = (subject.dev.stats() - before).bytes_to_device;
        assert!(moved <= capacity as u64, "{moved} bytes have moved to a device of {capacity}");
    }
    subject.fill_part(data.bytes(), PART, 0, PART, 9);
    same("more than the device holds, written", data.bytes(), |_| 9);
}

pub(super) fn prefetch_and_evict(subject: &mut Subject<'_>) {
    let mut data = Pages::patterned(2 * BLOCK);
    let range = data.bytes().as_ptr_range();
    let (start, end) = (range.start as usize, range.end as usize);
    for _ in 0..3 {
        subject.dev.prefetch(start, end).unwrap_or_else(|e| panic!("prefetch: {e}"));
        let there = pages_present(data.bytes());
        assert!(subject.info().capabilities.coherent || there == 0, "{there} pages stay with the CPU");
        subject.dev.evict(start, end).unwrap_or_else(|e| panic!("evict: {e}"));
        assert_eq!(pages_present(data.bytes()), 2 * BLOCK / uhmm_os::PAGE, "all pages are home");
        same("after a way there and back", data.bytes(), pattern);
    }
    // What was sent ahead is used, and a part of a page is not sent.
    subject.dev.prefetch(start + 100, end - 100).unwrap_or_else(|e| panic!("prefetch: {e}"));
    subject.add_one(data.bytes());
    same("after a launch", data.bytes(), |i| pattern(i).wrapping_add(1));
    // What is not mapped, and nothing, are no errors.
    drop(data);
    assert!(subject.dev.prefetch(start, end).is_ok() && subject.dev.evict(start, end).is_ok());
    assert!(subject.dev.prefetch(start, start).is_ok() && subject.dev.evict(start, start).is_ok());
}

pub(super) fn memory_of_the_devices_own(subject: &mut Subject<'_>) {
    let len = 1_234_567;
    let data: Vec<u8> = (0..len).map(pattern).collect();
    let mut back = vec![0u8; len];
    for _ in 0..3 {
        let mut own = DeviceBytes::new(subject.dev, len).unwrap_or_else(|e| panic!("allocate: {e}"));
        own.zero();
        own.download(&mut back);
        same("zeroed", &back, |_| 0);
        own.upload(&data);
        let groups = len.div_ceil(PART);
        subject.run(Named::AddOne, groups, &args![own.arg(Access::InOut), PART as u64]).unwrap_or_else(|e| panic!("AddOne: {e}"));
        own.download(&mut back);
        same("its own memory, added to", &back, |i| pattern(i).wrapping_add(1));
        // Beside the program's memory in one launch.
        let mut to = vec![0u8; len];
        let list = args![out(&mut to), own.arg(Access::In), PART as u64];
        subject.run(Named::Copy, groups, &list).unwrap_or_else(|e| panic!("Copy: {e}"));
        same("copied from it", &to, |i| pattern(i).wrapping_add(1));
    }
    let error = DeviceBytes::new(subject.dev, subject.capacity() + 1).err();
    assert!(matches!(error, Some(Error::NoRoom { .. })), "{error:?}");
}

pub(super) fn a_full_device_makes_room(subject: &mut Subject<'_>) {
    let capacity = subject.capacity();
    // Full of data that nobody uses any more.
    let mut data = Pages::patterned(capacity);
    data.bytes().chunks_mut(capacity / 2).for_each(|part| subject.add_one(part));
    {
        // Memory of the device's own drives it out, and then takes part of what launches can have.
        let _own = DeviceBytes::new(subject.dev, capacity / 2).unwrap_or_else(|e| panic!("allocate: {e}"));
        if !subject.info().capabilities.coherent {
            let result = subject.run(Named::AddOne, 1, &args![inout(&mut data.bytes()[..capacity / 2 + 1]), PART as u64]);
            assert!(matches!(result, Err(Error::NoRoom { .. })), "{result:?}");
        }
        subject.add_one(&mut data.bytes()[..capacity / 2 - BLOCK]);
    }
    subject.add_one(&mut data.bytes()[..capacity / 2 - BLOCK]);
    let twice = capacity / 2 - BLOCK;
    same("the data", data.bytes(), |i| pattern(i).wrapping_add(if i < twice { 3 } else { 1 }));
}
