//! The program changes its mappings while its pages are on the device.

use crate::harness::*;
use uhmm::{Ctx, args, inout, inp, out};

crate::tests![
    unmapped_memory_frees_the_devices,
    partly_unmapped,
    dropped_pages_read_zero,
    remapped_pages_keep_their_contents,
    a_mapping_over_it_starts_anew,
    memory_that_cannot_move_is_used_all_the_same,
    pages_shared_by_a_fork_move_after_it,
    a_mapping_that_is_watched_in_part_is_not_resized,
];

fn filled(len: usize) -> Pages {
    let mut pages = Pages::new(len);
    for (i, x) in pages.slice::<u32>().iter_mut().enumerate() {
        *x = i as u32;
    }
    pages
}

fn unmapped_memory_frees_the_devices() {
    let (_hmm, dev) = device(8);
    let mut between = vec![];
    for _ in 0..20 {
        between.push(Pages::new(6 << 20)); // so that each round has another address
        let mut pages = Pages::huge(6 << 20); // whole blocks, which share none with a mapping that stays
        pages.slice::<u32>().fill(1);
        let data = pages.slice::<u32>();
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        assert_eq!(pages_present(data), 0);
    }
    // munmap returns when its event is read; a launch begins when it has been followed.
    dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
    // All of it is free again, without an eviction.
    let _all = dev.alloc::<u8>(8 << 20).unwrap();
    assert_eq!(dev.stats().evictions, 0);
    let mask = dev.info().mask;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let number = |text: Option<&str>| usize::from_str_radix(text.unwrap_or(""), 16).unwrap_or(0);
    let ranges = maps.lines().map(|line| line.split([' ', '-'])).map(|mut line| (number(line.next()), number(line.next())));
    let windows: usize = ranges.filter(|range| range.0 >> 44 == 0b111 ^ mask >> 44).map(|range| range.1 - range.0).sum();
    assert!(windows <= 4 << 20, "windows go with their mappings: {windows} bytes of them are left");
}

fn partly_unmapped() {
    let (_hmm, dev) = device(16);
    let mut pages = filled(6 << 20);
    let data = pages.slice::<u32>();
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    let (hole, len) = (3 << 19, 1 << 20); // bytes from the start
    // SAFETY: it is not used before something is mapped there again.
    unsafe { pages.unmap(hole, len) };
    let same = |range: std::ops::Range<usize>| {
        // SAFETY: a part of `pages` beside the hole; no other slice of them is borrowed.
        let data = unsafe { std::slice::from_raw_parts(pages.start().cast::<u32>().add(range.start), range.len()) };
        range.zip(data).all(|(i, &x)| x == i as u32 + 1)
    };
    assert!(same(0..hole / 4));
    assert!(same((hole + len) / 4..pages.len() / 4));
    // The hole is used by somebody else.
    // SAFETY: nobody has it but `pages`, of which no slice is borrowed.
    unsafe { map_at(pages.start() as usize + hole, len, libc::MAP_FIXED) };
    assert!(pages.slice::<u32>()[hole / 4..(hole + len) / 4].iter().all(|&x| x == 0));
}

fn dropped_pages_read_zero() {
    let (_hmm, dev) = device(16);
    for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
        let mut pages = filled(4 << 20);
        let data = pages.slice::<u32>();
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        let range = 1 << 18..2 << 18;
        advise(&mut data[range.clone()], advice);
        assert!(data[range.clone()].iter().all(|&x| x == 0), "advice {advice}");
        assert!(data.iter().enumerate().all(|(i, &x)| range.contains(&i) || x == i as u32 + 1));
        data[range.clone()].fill(9);
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        assert!(data[range].iter().all(|&x| x == 10));
    }
}

fn remapped_pages_keep_their_contents() {
    let (_hmm, dev) = device(64);
    for shift in [0, 4096, 3 << 20] {
        let mut pages = filled(4 << 20);
        let data = pages.slice::<u32>();
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        let room = Pages::huge(16 << 20);
        let pages = std::mem::ManuallyDrop::new(pages);
        // SAFETY: the place is inside `room`, of which nothing else is used; `pages` are not used again.
        unsafe { pages.move_to(0, pages.len(), room.at(shift)) };
        // SAFETY: the pages that have come there.
        let data = unsafe { std::slice::from_raw_parts_mut(room.at(shift).cast::<u32>(), 1 << 20) };
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1), "shift {shift}");
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        assert_eq!(pages_present(data), 0);
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 2), "shift {shift}");
    }
    // Grown where it stands, or moved to grow: a Vec's push.
    let mut data: Vec<u32> = (0..1_000_000).collect();
    for _ in 0..4 {
        let len = data.len();
        dev.run(&increment, groups(len), args![inout(&mut data)]).unwrap();
        data.extend(0..len as u32);
    }
    assert_eq!((data[0], data[1_000_000], data[999_999]), (4, 3, 1_000_003));
}

fn a_mapping_over_it_starts_anew() {
    let (_hmm, dev) = device(16);
    let mut pages = filled(4 << 20);
    let data = pages.slice::<u32>();
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    map_anew(data);
    assert!(data.iter().all(|&x| x == 0));
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    assert!(data.iter().all(|&x| x == 1));
}

fn memory_that_cannot_move_is_used_all_the_same() {
    static CONSTANT: [u32; 50_000] = [3; 50_000];
    let (_hmm, dev) = device(64);
    let mut r = vec![0u32; CONSTANT.len()];
    let kernel = |ctx: &Ctx<'_>| {
        let a = ctx.inp::<u32>(1);
        let base = ctx.group() * 1000;
        ctx.out::<u32>(0).chunk(1000).iter_mut().enumerate().for_each(|(i, r)| *r = a[base + i] + 1);
    };
    dev.run(&kernel, 50, args![out(&mut r), inp(&CONSTANT)]).unwrap();
    assert!(r.iter().all(|&x| x == 4));
    // Shared memory, which no userfaultfd can move.
    let data: &mut [u32] = bytemuck::cast_slice_mut(shared(1 << 20));
    data.fill(1);
    for round in 2..5 {
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        assert!(data.iter().all(|&x| x == round));
        data[5] = round;
    }
    // Locked memory.
    let mut pages = filled(1 << 20);
    let data = pages.slice::<u32>();
    if lock(data) {
        for _ in 0..3 {
            dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        }
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 3));
    }
}

/// After any fork the kernel refuses to move every anonymous page (EBUSY), also when the child is long gone; it must be made the program's own again.
fn pages_shared_by_a_fork_move_after_it() {
    let (_hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..1_000_000).collect();
    in_a_child(|| true);
    for round in 1..3 {
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        assert_eq!(pages_present(&data), 0, "round {round}");
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + round));
    }
}

/// The kernel resizes one mapping at a time, and a part that is watched is one. Whoever asks is told, and nothing has changed.
fn a_mapping_that_is_watched_in_part_is_not_resized() {
    let (_hmm, dev) = device(16);
    let mut pages = filled(1 << 20);
    let data = pages.slice::<u32>();
    let part = data.len() / 2;
    dev.run(&increment, groups(part), args![inout(&mut data[..part])]).unwrap();
    let len = pages.len();
    assert!(!pages.resize(2 * len));
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
    let data = pages.slice::<u32>();
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + u32::from(i < part)));
    // Watched as a whole, it is.
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    assert!(pages.resize(2 * len));
    let data = pages.slice::<u32>();
    assert!(data[..2 * part].iter().enumerate().all(|(i, &x)| x == i as u32 + u32::from(i < part) + 1));
}
