//! The coherent device: the CPU uses its memory in place. Whether a page is there is asked of the kernel, and so is which page it is.

use crate::actors::Robust;
use crate::harness::*;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use uhmm::{Ctx, Device, Error, KernelFault, Stats, Uhmm, args, inout, out, ptr};

crate::tests![
    the_cpu_uses_the_page_in_place,
    pages_have_been_the_devices_own,
    a_launch_uses_what_has_no_room_in_place,
    the_least_recently_used_block_goes,
    unmapped_dropped_and_moved_pages_free_the_devices_memory,
    forks_share_what_the_device_has,
    pinned_and_locked_pages_are_used_in_place,
    what_a_dying_thread_needs_is_not_taken_out,
    closing_brings_everything_home,
    two_devices_take_turns,
    nothing_need_be_declared,
    what_a_kernel_must_not_touch,
];

pub fn coherent(mib: usize) -> (Uhmm, Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.soft("soft").memory(mib << 20).threads(2).coherent(true).open().unwrap();
    (hmm, dev)
}

/// The numbers of the page frames behind the pages of a slice; root may know them, others see zeroes.
fn frames<T>(data: &[T]) -> Vec<u64> {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let (start, end) = ((data.as_ptr() as usize).next_multiple_of(4096), data.as_ptr_range().end as usize & !4095);
    let mut entries = vec![0u8; (end - start) / 4096 * 8];
    pagemap.read_exact_at(&mut entries, start as u64 / 4096 * 8).unwrap();
    entries.chunks(8).map(|entry| u64::from_ne_bytes(entry.try_into().unwrap()) & ((1 << 55) - 1)).collect()
}

pub fn since(dev: &Device, before: Stats) -> Stats {
    dev.stats() - before
}

/// Pages that are on the device, found by asking for all of its memory: they have to go home for that.
pub fn evicted_by_taking_all(dev: &Device) -> u64 {
    let before = dev.stats();
    drop(dev.alloc::<u8>(dev.memory()).unwrap());
    since(dev, before).pages_to_cpu
}

fn the_cpu_uses_the_page_in_place() {
    let (_hmm, dev) = coherent(32);
    for mut memory in [Pages::huge(8 << 20), Pages::new(8 << 20)] {
        let data = memory.slice::<u32>();
        data.iter_mut().enumerate().for_each(|(i, x)| *x = i as u32);
        let all = pages_present(data);
        let before = dev.stats();
        for round in 1..=5u32 {
            dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
            assert_eq!(pages_present(data), all, "every page is there while it is on the device");
            assert!(data.iter().enumerate().all(|(i, &x)| x == (i as u32).wrapping_add(round)));
            // The CPU writes, and a system call does, between launches.
            for at in (0..data.len()).step_by(5000) {
                data[at] = data[at].wrapping_add(7);
            }
            let mut pipe = std::io::pipe().unwrap();
            pipe.1.write_all(bytemuck::cast_slice(&data[3_000..4_000])).unwrap();
            pipe.0.read_exact(bytemuck::cast_slice_mut(&mut data[3_000..4_000])).unwrap();
            for at in (0..data.len()).step_by(5000) {
                data[at] = data[at].wrapping_sub(7);
            }
            let so_far = since(&dev, before);
            assert_eq!(
                (so_far.cpu_faults, so_far.pages_to_cpu, so_far.bytes_to_cpu),
                (0, 0, 0),
                "no touch faults, nothing comes back: {so_far:?}"
            );
            assert_eq!(so_far.pages_to_device, all as u64, "moved once: {so_far:?}");
            assert_eq!(so_far.pages_duplicated + so_far.pages_bounced, 0);
        }
        dev.evict(data).unwrap();
        assert_eq!(since(&dev, before).pages_to_cpu, all as u64, "they were on the device all the time");
        assert_eq!(pages_present(data), all);
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 5));
    }
}

/// The frames behind the program's pages are others on the device than before and after, and the device's own come back to it.
fn pages_have_been_the_devices_own() {
    let (_hmm, dev) = coherent(4);
    let mut memory = Pages::huge(4 << 20);
    let data = memory.slice::<u32>();
    data.fill(5);
    let at_home = frames(data);
    if at_home[0] == 0 {
        return; // an ordinary user is not told
    }
    let mut seen: Vec<Vec<u64>> = vec![];
    for round in 0..3 {
        dev.prefetch(data).unwrap();
        let there = frames(data);
        assert!(there.iter().all(|frame| !at_home.contains(frame)), "round {round}: a page of the program's own stayed");
        seen.push(there);
        dev.evict(data).unwrap();
        let back = frames(data);
        assert!(back.iter().all(|frame| !seen[round].contains(frame)), "round {round}: a page of the device's stayed behind");
        assert!(data.iter().all(|&x| x == 5));
    }
    // The memory of the device is what it was: nothing of it has been lost on the way, and nothing made anew.
    seen.iter_mut().for_each(|frames| frames.sort_unstable());
    assert!(seen[0] == seen[1] && seen[1] == seen[2]);
}

fn a_launch_uses_what_has_no_room_in_place() {
    let (_hmm, dev) = coherent(8);
    let mut memory = Pages::huge(32 << 20);
    let data = memory.slice::<u32>();
    let before = dev.stats();
    for round in 1..=6 {
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        assert!(data.iter().all(|&x| x == round));
        let so_far = since(&dev, before);
        assert_eq!(so_far.pages_to_device, 8 << 20 >> 12, "the device is full, and stays as it is: {so_far:?}");
        assert_eq!((so_far.evictions, so_far.pages_to_cpu), (0, 0), "{so_far:?}");
        // Something new on the device's side makes the next launch prepare again: what is there must not be driven out by the rest of the same range.
        let mut other = vec![0u32; 4];
        dev.run(&increment, 1, args![inout(&mut other)]).unwrap();
    }
    dev.prefetch(data).unwrap();
    assert_eq!(since(&dev, before).pages_to_cpu, 0);
}

fn the_least_recently_used_block_goes() {
    let (_hmm, dev) = coherent(8);
    let mut memories: Vec<Pages> = (0..6).map(|_| Pages::huge(2 << 20)).collect();
    let before = dev.stats();
    for (index, memory) in memories.iter_mut().enumerate() {
        let data = memory.slice::<u32>();
        data.fill(index as u32);
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        assert_eq!(since(&dev, before).evictions, (index as u64 + 1).saturating_sub(4));
    }
    // The last four are there.
    assert_eq!(evicted_by_taking_all(&dev), 4 * 512);
    for (index, memory) in memories.iter_mut().enumerate() {
        assert_eq!(pages_present(memory.slice::<u32>()), 512);
        assert!(memory.slice::<u32>().iter().all(|&x| x == index as u32 + 1));
    }
}

fn unmapped_dropped_and_moved_pages_free_the_devices_memory() {
    let (_hmm, dev) = coherent(16);
    for huge in [true, false] {
        let mut memory = if huge { Pages::huge(8 << 20) } else { Pages::new(8 << 20) };
        let data = memory.slice::<u8>();
        data.fill(3);
        dev.prefetch(data).unwrap();
        // Dropped: zeroes, at once.
        let dropped = &mut data[700 * 4096..800 * 4096];
        advise(dropped, libc::MADV_DONTNEED);
        assert!(dropped.iter().all(|&x| x == 0));
        // Moved: the contents go along.
        let mut place = Pages::new(16 * 4096);
        // SAFETY: the place is ours, and the pages that go there are not used here again.
        unsafe { memory.move_to(1000 * 4096, place.len(), place.start()) };
        let moved = place.slice::<u8>();
        assert!(moved.iter().all(|&x| x == 3));
        let before = dev.stats();
        dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(1 << 20).fill(4), 1, args![inout(moved)]).unwrap();
        assert!(moved.iter().all(|&x| x == 4) && since(&dev, before).pages_to_device == 16, "{:?}", since(&dev, before));
        drop(place);
        // SAFETY: these pages are not used again.
        unsafe { memory.unmap(100 * 4096, 50 * 4096) };
        let rest = 2048 - 100 - 16 - 50;
        assert_eq!(evicted_by_taking_all(&dev), rest, "what the program gave up is not on the device any more");
        // Devices' places that have lost their pages are used again.
        for round in 1..=3u8 {
            let mut other = Pages::huge(12 << 20);
            dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(1 << 20).fill(round), 12, args![out(other.slice::<u8>())]).unwrap();
            assert!(other.slice::<u8>().iter().all(|&x| x == round));
            drop(other);
            assert_eq!(evicted_by_taking_all(&dev), 0);
        }
        let kept = [0..100usize, 150..700, 800..1000, 1016..2048];
        for page in kept.into_iter().flatten() {
            // SAFETY: inside `memory`, where it is still mapped.
            assert_eq!(unsafe { memory.at(page * 4096 + page % 4096).read_volatile() }, 3, "page {page}");
        }
    }
}

fn forks_share_what_the_device_has() {
    let (_hmm, dev) = coherent(16);
    let mut data: Vec<u32> = (0..1_000_000).collect();
    for (round, raw) in [false, true, true, false].into_iter().enumerate() {
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        let gate = [std::io::pipe().unwrap(), std::io::pipe().unwrap()];
        let right = |extra: usize| data.iter().enumerate().all(|(i, &x)| x as usize == i + round + 1 + extra);
        let pid = fork(raw, || {
            // The contents as of the fork, also after the parent has changed them.
            let before = right(0);
            let mut byte = [0];
            let told = (&gate[0].1).write(&byte).is_ok() && (&gate[1].0).read(&mut byte).is_ok();
            before && told && right(0)
        });
        let mut byte = [0];
        (&gate[0].0).read_exact(&mut byte).unwrap();
        // While the child has the pages too, they are made the parent's own. None was the device's any more, if the fork was told of.
        let before = dev.stats();
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        let again = since(&dev, before).pages_to_device;
        assert!(again >= 970 || (raw && !is_root()), "{again} pages have moved after a fork");
        dev.evict(&data).unwrap();
        (&gate[1].1).write_all(&byte).unwrap();
        assert_eq!(wait(pid), 0, "the child of round {round} read something else");
        assert!(data.iter().enumerate().all(|(i, &x)| x as usize == i + round + 2));
        data.iter_mut().for_each(|x| *x -= 1);
    }
    drop(data);
    assert_eq!(evicted_by_taking_all(&dev), 0);
}

fn pinned_and_locked_pages_are_used_in_place() {
    let (_hmm, dev) = coherent(16);
    let mut memory = Pages::new(4 << 20);
    let data = memory.slice::<u32>();
    data.fill(1);
    let locked = &data[300_000..310_000];
    assert!(lock(locked));
    let was = frames(locked);
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    assert!(data.iter().all(|&x| x == 2));
    let locked = &data[300_000..310_000];
    assert_eq!(frames(locked), was, "locked pages have not moved");
    // Locked while they are on the device, which they then cannot leave: eviction gives them up, and nothing is lost.
    let later = &data[500_000..600_000];
    assert!(lock(later));
    let was = frames(later);
    dev.evict(data).unwrap();
    let later = &data[500_000..600_000];
    assert_eq!(frames(later), was);
    assert_eq!(evicted_by_taking_all(&dev), 0, "the device has nothing left");
    dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    assert!(data.iter().all(|&x| x == 3));
}

/// The kernel marks the robust mutexes of a thread that dies, and takes no userfault then. The mutex was free when its page went to the device; who locks it there
/// keeps the page from being taken out.
fn what_a_dying_thread_needs_is_not_taken_out() {
    let (_hmm, dev) = coherent(8);
    let mut memory = Pages::new(64 * 4096);
    memory.slice::<u8>().fill(1);
    // SAFETY: inside `memory`, which outlives it; its page is not used otherwise.
    let mutex = unsafe { Robust::new_at(memory.start() as usize + 10 * 4096 + 256) };
    for round in 0..20 {
        dev.prefetch(memory.slice::<u8>()).unwrap();
        let there = frames(memory.slice::<u8>());
        let gate = [std::sync::Barrier::new(2), std::sync::Barrier::new(2)];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(mutex.lock(), 0);
                gate[0].wait();
                gate[1].wait();
            });
            gate[0].wait();
            dev.evict(memory.slice::<u8>()).unwrap();
            let home = frames(memory.slice::<u8>());
            let stayed: Vec<usize> = (0..64).filter(|&page| home[page] == there[page]).collect();
            assert!(there[0] == 0 || stayed == [10], "round {round}: {stayed:?} have stayed where they were");
            gate[1].wait();
        });
        assert_eq!(mutex.lock(), libc::EOWNERDEAD, "round {round}");
        mutex.made_consistent();
    }
}

fn closing_brings_everything_home() {
    let mut memory = Pages::huge(4 << 20);
    let data = memory.slice::<u32>();
    for round in 1..=3 {
        let (hmm, dev) = coherent(8);
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
        let there = frames(data);
        drop(dev);
        let home = frames(data);
        assert!(there[0] == 0 || home.iter().all(|frame| !there.contains(frame)));
        drop(hmm);
        assert!(data.iter().all(|&x| x == round));
    }
}

fn two_devices_take_turns() {
    let (hmm, near) = coherent(8);
    let far = hmm.soft("far").memory(8 << 20).threads(1).open().unwrap();
    let also = hmm.soft("also").memory(8 << 20).threads(1).coherent(true).open().unwrap();
    let mut data = vec![0u32; 1_000_000];
    for round in 0..10 {
        for (index, dev) in [&near, &far, &also, &near, &also, &far].into_iter().enumerate() {
            dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
            let expected = (round * 6 + index + 1) as u32;
            assert_eq!((data[0], data[500_000], data[999_999]), (expected, expected, expected));
        }
    }
    assert!(data.iter().all(|&x| x == 60));
}

/// Undeclared memory of any kind works by ordinary pointers, which `ctx.ptr` leaves as they are.
fn nothing_need_be_declared() {
    let (_hmm, dev) = coherent(8);
    let list: Vec<Box<(u64, *const u8)>> = (0..1000).map(|i| Box::new((i, std::ptr::null()))).collect();
    let list = &list;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[9u8; 8192]).unwrap();
    let shared = map(8192, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(&file));
    // SAFETY: a new mapping, which stays; the file is this test's own, and not written otherwise.
    let shared = unsafe { std::slice::from_raw_parts_mut(shared, 8192) };
    let before = dev.stats();
    let at = shared.as_mut_ptr() as usize;
    let head = list.as_ptr() as usize;
    let kernel = |ctx: &Ctx<'_>| {
        let list = ctx.ptr(ctx.value::<usize>(1) as *const Box<(u64, *const u8)>);
        assert_eq!(list as usize, ctx.value::<usize>(1));
        // SAFETY: the list has so many, and lives on.
        let sum = (0..1000).map(|i| unsafe { (*list.add(i)).0 }).sum();
        ctx.out::<u64>(0).chunk(1)[0] = sum;
        // SAFETY: a byte of `shared`, to which no reference is used meanwhile.
        unsafe { ctx.ptr_mut((ctx.value::<usize>(2) + 5000) as *mut u8).write(7) };
    };
    let mut sum = [0u64];
    dev.run(&kernel, 1, args![inout(&mut sum), head, at]).unwrap();
    assert_eq!(sum[0], 499_500);
    assert_eq!((shared[4999], shared[5000]), (9, 7));
    file.seek(SeekFrom::Start(5000)).unwrap();
    let mut byte = [0];
    file.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [7], "the file has it at once");
    // Declared, shared memory is used in place as well.
    dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(8192).fill(1), 1, args![out(shared)]).unwrap();
    assert!(shared.iter().all(|&x| x == 1));
    let moved = since(&dev, before);
    assert_eq!((moved.pages_to_device, moved.device_faults), (0, 0), "{moved:?}");
}

/// A kernel that follows a wild pointer fails its launch, with the address, and runs on; the process is as it was. Two workers that touched the same hole at once ended the
/// process: the second found the first one's page in the way.
fn what_a_kernel_must_not_touch() {
    let (_hmm, dev) = coherent(8);
    let hole = Pages::new(1 << 20).start() as usize;
    let mut protected = Pages::new(16384);
    let protected = protected.slice::<u8>();
    // SAFETY: the program only reads it from now on.
    unsafe { protect(protected, libc::PROT_READ) };
    let protected = protected.as_ptr() as usize;
    let mut data = vec![1u32; 10_000];
    // Both workers touch the same pages at once.
    let kernel = |ctx: &Ctx<'_>| {
        for page in 0..200 {
            let p = ctx.pointer::<u32>(1).wrapping_add(page * 1024 + ctx.group());
            // SAFETY: that it must not is the test: nothing is mapped there, and the device is to put pages there that only this kernel uses.
            unsafe {
                p.read_volatile();
                p.write_volatile(7);
            }
        }
        ctx.out::<u32>(0).chunk(5_000).fill(2);
    };
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut wild = |at: usize| {
        data.fill(1);
        // SAFETY: as for the kernel.
        let error = dev.run(&kernel, 2, args![inout(&mut data), unsafe { ptr(at as *const u32) }]).unwrap_err();
        let Error::Kernel(KernelFault::Wild { address: told, .. }) = error else { panic!("{error}") };
        assert!(told & !7 == at, "{error}");
        assert!(data.iter().all(|&x| x == 2), "the kernel ran on");
    };
    for round in 0..50 {
        wild(hole + 2048);
        assert!(!maps().contains(&format!("{hole:x}-")), "round {round}: nothing is left there");
    }
    // Root may map the page at 0, and so may kernels of root's follow a null pointer.
    if is_root() {
        wild(2048);
        assert!(!maps().starts_with("00000000-"), "the page at 0 has gone");
    }
    // Found before the kernel starts, as on any device.
    let refused = |start: usize, len: usize| {
        // SAFETY: nobody reads or writes it: such a launch is refused.
        let data = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, len) };
        dev.run(&|_: &Ctx<'_>| panic!("it ran"), 1, args![out(data)]).unwrap_err()
    };
    assert!(matches!(refused(protected + 5, 100), Error::Protected { write: true, .. }));
    assert!(matches!(refused(hole + 5, 100), Error::Unmapped { .. }));
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
}
