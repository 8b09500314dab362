//! The program changes its mappings, by itself and inside its C library, while pages are on the device, and while kernels run on others and on the very same ones.
//!
//! Each change must leave the contents right (a shadow copy), give the device's memory back without an eviction, and cost no storm of faults when the addresses are
//! used again.

use crate::harness::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, Device, KernelFault, args, inout, inp};

crate::tests![
    every_form_of_mremap,
    protection_comes_and_goes,
    dropped_and_unmapped_ranges_free_the_device,
    the_break_goes_up_and_down,
    what_free_does_with_mappings,
    reused_addresses_cost_few_faults,
    changes_during_kernels_on_other_ranges,
    changes_of_the_very_range_of_a_running_kernel,
    mappings_that_come_and_go_are_never_taken_unwatched,
    pages_that_are_moved_on_at_once_keep_their_contents,
];

const PAGE: usize = 4096;
const BLOCK: usize = 2 << 20;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A mapping with a shadow copy of what it must hold.
struct Shadowed {
    start: *mut u8,
    shadow: Vec<u8>,
}

impl Shadowed {
    fn new(len: usize, random: &mut fastrand::Rng) -> Self {
        let mut shadow = vec![0; len];
        random.fill(&mut shadow);
        let pages = std::mem::ManuallyDrop::new(Pages::new(len));
        let mut made = Shadowed { start: pages.start(), shadow };
        made.slice().to_vec(); // first as it is: zeros
        let shadow = made.shadow.clone();
        made.slice().copy_from_slice(&shadow);
        made
    }

    fn slice(&mut self) -> &mut [u8] {
        self.both().0
    }

    fn both(&mut self) -> (&mut [u8], &mut [u8]) {
        // SAFETY: the mapping is ours, of that length, and borrowed with `self`.
        (unsafe { std::slice::from_raw_parts_mut(self.start, self.shadow.len()) }, &mut self.shadow)
    }

    /// Both sides add 1 to every byte.
    fn add_one(&mut self, dev: &Device) {
        dev.run(&add_one, 1, args![inout(self.slice())]).unwrap();
        self.shadow.iter_mut().for_each(|x| *x = x.wrapping_add(1));
    }

    fn check(&mut self, what: &str) {
        let (memory, shadow) = self.both();
        let at = memory.iter().zip(shadow).position(|(x, shadow)| x != shadow);
        assert_eq!(at, None, "{what}: byte {:x?} of {} differs", at, self.shadow.len());
    }

    /// Remaps it where the kernel likes, if it can.
    fn remap(&mut self, new_len: usize, flags: i32) -> bool {
        assert_eq!(flags & libc::MREMAP_FIXED, 0);
        // SAFETY: it takes nobody's place.
        unsafe { self.remap_to(new_len, flags, std::ptr::null_mut()) }
    }

    /// Remaps it.
    ///
    /// # Safety
    /// What is there, if the flags tell a fixed place, is the caller's, who does not use it as long as this lives.
    unsafe fn remap_to(&mut self, new_len: usize, flags: i32, target: *mut u8) -> bool {
        // SAFETY: the mapping is ours, of that length, and no slice of it is borrowed; of the target the caller says the same.
        let moved = unsafe { libc::mremap(self.start.cast(), self.shadow.len(), new_len, flags, target) };
        if moved == libc::MAP_FAILED {
            return false;
        }
        self.start = moved.cast();
        self.shadow.resize(new_len, 0);
        true
    }
}

impl Drop for Shadowed {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.start.cast(), self.shadow.len()) };
    }
}

fn add_one(ctx: &Ctx<'_>) {
    ctx.out::<u8>(0).chunk(usize::MAX).iter_mut().for_each(|x| *x = x.wrapping_add(1));
}

/// All of the device's memory can be had, and nothing had to go for it.
fn all_is_free(dev: &Device, evictions: u64, what: &str) {
    // A change returns when its event is read; a launch begins when it has been followed.
    dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
    let all = dev.alloc::<u8>(dev.memory());
    assert!(all.is_ok(), "{what}: {:?}", all.err());
    drop(all);
    assert_eq!(dev.stats().evictions, evictions, "{what}: the device was not free");
}

fn every_form_of_mremap() {
    let (_hmm, dev) = device(16);
    let mut random = fastrand::Rng::with_seed(1);
    for round in 0..60 {
        let pages = if round % 3 == 0 { 512 * random.usize(1..3) } else { random.usize(2..900) };
        let mut memory = Shadowed::new(pages * PAGE, &mut random);
        // All of it, or a part, is on the device.
        memory.add_one(&dev);
        if round % 2 == 0 {
            let at = random.usize(0..memory.shadow.len());
            memory.shadow[at] ^= 1;
            memory.slice()[at] ^= 1;
        }
        let len = memory.shadow.len();
        let room = Pages::new(len + 2 * BLOCK);
        let target = room.at(random.usize(0..BLOCK / PAGE) * PAGE);
        let what = match round % 5 {
            0 => {
                assert!(memory.remap(len + random.usize(1..600) * PAGE, libc::MREMAP_MAYMOVE));
                "grown"
            }
            1 => {
                // At once, if there is room behind it; else the kernel refuses.
                memory.remap(len + PAGE, 0);
                "grown in place"
            }
            2 => {
                assert!(memory.remap((len / 2).next_multiple_of(PAGE), 0));
                "shrunk"
            }
            3 => {
                // SAFETY: inside `room`, which is dropped after `memory`.
                assert!(unsafe { memory.remap_to(len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, target) });
                "moved to a fixed address"
            }
            _ => {
                let old = memory.start;
                assert!(memory.remap(len, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP));
                // SAFETY: what is left behind, which nobody else knows.
                let mut left = unsafe { Pages::from_raw(old, len) };
                let left = left.slice::<u8>();
                assert!(left.iter().all(|&x| x == 0), "what is left behind is empty");
                left.fill(3);
                dev.run(&add_one, 1, args![inout(&mut *left)]).unwrap();
                assert!(left.iter().all(|&x| x == 4));
                "moved, the old mapping left"
            }
        };
        memory.check(what);
        memory.add_one(&dev);
        memory.check(what);
        memory.add_one(&dev);
        drop((memory, room));
        all_is_free(&dev, 0, what);
    }
}

/// Reads argument 0 into nothing.
fn look(ctx: &Ctx<'_>) {
    std::hint::black_box(ctx.inp::<u8>(0).iter().fold(0u8, |sum, x| sum.wrapping_add(*x)));
}

fn protection_comes_and_goes() {
    let (_hmm, dev) = device(16);
    let mut random = fastrand::Rng::with_seed(2);
    for round in 0..20 {
        let pages = if round % 2 == 0 { 512 } else { random.usize(20..700) };
        let mut memory = Shadowed::new(pages * PAGE, &mut random);
        memory.add_one(&dev);
        let (from, to) = match round % 4 {
            0 | 1 => (0, pages),
            _ => (pages / 4, pages / 2),
        };
        // SAFETY: until it may be written again, the program writes nothing there, and reads nothing if it may not.
        let protect = |memory: &mut Shadowed, access| unsafe { protect(&memory.slice()[from * PAGE..to * PAGE], access) };
        for access in [libc::PROT_NONE, libc::PROT_READ] {
            protect(&mut memory, access);
            let refused = dev.run(&add_one, 1, args![inout(memory.slice())]).unwrap_err().to_string();
            assert!(refused.contains("protected") || refused.contains("permi") || refused.contains("read-only"), "{refused}");
            let read = dev.run(&look, 1, args![inp(memory.slice())]);
            assert_eq!(read.is_ok(), access == libc::PROT_READ, "{read:?}");
            if access == libc::PROT_READ {
                memory.check("readable only");
                dev.run(&look, 1, args![inp(memory.slice())]).unwrap();
            }
            protect(&mut memory, RW);
            memory.check("readable and writable again");
            memory.add_one(&dev);
        }
        // Away while it cannot be touched at all, and back afterwards.
        protect(&mut memory, libc::PROT_NONE);
        dev.evict(memory.slice()).unwrap();
        protect(&mut memory, RW);
        memory.check("brought home under protection");
        memory.add_one(&dev);
        drop(memory);
        all_is_free(&dev, 0, "after mprotect");
    }
}

fn dropped_and_unmapped_ranges_free_the_device() {
    let (_hmm, dev) = device(8);
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..60 {
        let blocks = random.usize(1..3);
        let mut whole = Pages::huge(blocks * BLOCK);
        let data = whole.slice::<u8>();
        data.fill(round);
        dev.run(&add_one, 1, args![inout(data)]).unwrap();
        let pages = data.len() / PAGE;
        let (from, to) = if round % 3 == 0 { (0, pages) } else { (random.usize(0..pages / 2), random.usize(pages / 2..pages)) };
        let advice = [libc::MADV_DONTNEED, libc::MADV_FREE][usize::from(round % 2)];
        let dropped = from * PAGE..to * PAGE;
        let right =
            |data: &[u8], inside: u8| data.iter().enumerate().all(|(i, &x)| x == if dropped.contains(&i) { inside } else { round + 1 });
        let part = &mut data[dropped.clone()];
        if round % 4 < 2 {
            advise(part, advice);
        } else {
            // SAFETY: something new is mapped there before it is used.
            unsafe { whole.unmap(from * PAGE, (to - from) * PAGE) };
            map_anew(&mut whole.slice::<u8>()[dropped.clone()]);
        }
        if (from, to) == (0, pages) {
            all_is_free(&dev, 0, "all was dropped");
        }
        let data = whole.slice::<u8>();
        assert!(right(data, 0), "round {round}");
        data[dropped.clone()].fill(round + 1);
        dev.run(&add_one, 1, args![inout(data)]).unwrap();
        assert!(data.iter().all(|&x| x == round + 2), "round {round}");
        dev.run(&add_one, 1, args![inout(data)]).unwrap();
        drop(whole);
        all_is_free(&dev, 0, "all was unmapped");
    }
}

/// The C library's allocator maps whatever is larger than this.
fn mapped_from(len: i32) {
    // SAFETY: it changes how memory is allocated, and no memory.
    assert_eq!(unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, len) }, 1);
}

/// The C library's allocator gives memory back that nobody has.
fn trim() {
    // SAFETY: memory that is allocated stays.
    unsafe { libc::malloc_trim(0) };
}

/// Moves the end of the heap: where it was.
///
/// # Safety
/// Nobody uses what is beyond the new end.
unsafe fn move_break(by: isize) -> *mut libc::c_void {
    // SAFETY: the caller says so.
    let was = unsafe { libc::sbrk(by) };
    assert_ne!(was as isize, -1);
    was
}

/// Nothing in this test may allocate between the calls of sbrk: the heap is there.
fn the_break_goes_up_and_down() {
    let (_hmm, dev) = device(16);
    // The C library's allocator takes from elsewhere from now on, and leaves the break alone.
    mapped_from(0);
    trim();
    for round in 0..30u32 {
        let len = 3 * BLOCK + round as usize * PAGE;
        // SAFETY: the heap grows by that, and nothing else is allocated on it.
        let data = unsafe { std::slice::from_raw_parts_mut(move_break(len as isize).cast::<u32>(), len / 4) };
        assert!(data.iter().all(|&x| x == 0), "new memory is zero, round {round}");
        data.iter_mut().enumerate().for_each(|(i, x)| *x = i as u32 ^ round);
        dev.run(&increment, groups(data.len()), args![inout(&mut *data)]).unwrap();
        assert!(pages_present(data) < 8);
        // Half of it goes, the rest is as it was.
        let half = (len / 2) & !(PAGE - 1);
        // SAFETY: the rest of `data` is used no more.
        unsafe { move_break(half as isize - len as isize) };
        let data = &mut data[..half / 4];
        assert!(data.iter().enumerate().all(|(i, &x)| x == (i as u32 ^ round) + 1), "round {round}");
        dev.run(&increment, groups(data.len()), args![inout(&mut *data)]).unwrap();
        // SAFETY: `data` is used no more.
        unsafe { move_break(-(half as isize)) };
        let stats = dev.stats();
        dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
        assert_eq!(stats.evictions, 0);
    }
    let all = dev.alloc::<u8>(14 << 20);
    assert!(all.is_ok() && dev.stats().evictions == 0, "the device is free again");
}

fn what_free_does_with_mappings() {
    let (_hmm, dev) = device(32);
    let mut random = fastrand::Rng::with_seed(5);
    let end = Instant::now() + seconds(3);
    let mut round = 0u8;
    while Instant::now() < end {
        round = round.wrapping_add(1);
        // From the heap and from mappings of its own; neighbours go and stay.
        let mut kept: Vec<Vec<u8>> = (0..20).map(|_| vec![round; random.usize(1..300_000)]).collect();
        for data in &mut kept {
            dev.run(&add_one, 1, args![inout(data)]).unwrap();
        }
        for _ in 0..10 {
            drop(kept.swap_remove(random.usize(0..kept.len())));
        }
        trim();
        for data in &mut kept {
            let len = data.len();
            data.reserve_exact(random.usize(1..500_000)); // realloc, mremap for large ones
            assert!(data.iter().all(|&x| x == round.wrapping_add(1)), "after realloc");
            data.resize(2 * len, 7);
            dev.run(&add_one, 1, args![inout(data)]).unwrap();
            assert!(data[..len].iter().all(|&x| x == round.wrapping_add(2)) && data[len..].iter().all(|&x| x == 8));
            data.truncate(len / 2);
            data.shrink_to_fit();
            assert!(data.iter().all(|&x| x == round.wrapping_add(2)), "after shrinking");
        }
    }
    assert_eq!(dev.stats().evictions, 0, "32 MiB were never in use");
}

/// Times that this thread had to wait for somebody: each fault that the process's userfaultfd serves is one.
fn waits() -> i64 {
    // SAFETY: zeroes are such a structure.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a structure of our own.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) }, 0);
    usage.ru_nvcsw
}

fn reused_addresses_cost_few_faults() {
    let (_hmm, dev) = device(64);
    // The addresses are used again after: nothing; a drop; an unmapping and a mapping at the same place; and by the allocator, after free.
    const LEN: usize = 16 << 20;
    let most = |what: &str, touch: &mut dyn FnMut()| {
        let before = (waits(), dev.stats().cpu_faults);
        touch();
        let (waited, faults) = (waits() - before.0, dev.stats().cpu_faults - before.1);
        let blocks = (LEN / BLOCK + 1) as i64;
        assert!(waited <= 4 * blocks && faults as i64 <= 4 * blocks, "{what}: {waited} waits and {faults} faults for {blocks} blocks");
    };
    let mut pages = Pages::new(LEN);
    for what in ["touched", "dropped", "mapped again"] {
        let data = pages.slice::<u8>();
        data.fill(1);
        dev.run(&add_one, 1, args![inout(&mut *data)]).unwrap();
        match what {
            "dropped" => advise(data, libc::MADV_DONTNEED),
            "mapped again" => map_anew(data),
            _ => {}
        }
        most(what, &mut || data.iter_mut().for_each(|x| *x = 5));
        most("touched again", &mut || assert!(data.iter().all(|&x| x == 5)));
    }
    // malloc hands out the same heap addresses again, whole or in small pieces.
    mapped_from(32 << 20);
    for size in [LEN, 100_000, 1000] {
        for round in 0..3 {
            let mut parts: Vec<Vec<u8>> = (0..LEN / size).map(|_| vec![round; size]).collect();
            if round == 0 {
                let (start, end) = (parts[0].as_ptr() as usize, parts[parts.len() - 1].as_ptr() as usize + size);
                dev.prefetch_range(start.min(end), start.abs_diff(end)).unwrap();
                drop(parts);
            } else {
                most("written by the next owner", &mut || parts.iter_mut().for_each(|part| part.fill(9)));
                assert!(parts.iter().all(|part| part.iter().all(|&x| x == 9)));
            }
        }
    }
}

fn changes_during_kernels_on_other_ranges() {
    let (_hmm, dev) = device(16);
    let stop = AtomicBool::new(false);
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (dev, stop) = (&dev, &stop);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                while !stop.load(Ordering::Relaxed) {
                    let mut memory = Shadowed::new(random.usize(2..700) * PAGE, &mut random);
                    for _ in 0..4 {
                        let len = memory.shadow.len();
                        if random.bool() {
                            dev.prefetch(memory.slice()).unwrap();
                        }
                        let page = random.usize(0..len / PAGE) * PAGE;
                        match random.u8(0..5) {
                            0 => {
                                advise(&mut memory.slice()[page..], libc::MADV_DONTNEED);
                                memory.shadow[page..].fill(0);
                            }
                            // SAFETY: allowed again before it is used.
                            1 => unsafe {
                                protect(&memory.slice()[page..], libc::PROT_NONE);
                                protect(&memory.slice()[page..], RW);
                            },
                            2 => assert!(memory.remap(len + PAGE, libc::MREMAP_MAYMOVE)),
                            3 if page > 0 => assert!(memory.remap(page, 0)),
                            _ => {
                                let (data, shadow) = memory.both();
                                data.iter_mut().chain(shadow).for_each(|x| *x ^= 0x55);
                            }
                        }
                        memory.check("changed while kernels run");
                    }
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(9);
        while Instant::now() < end {
            let mut memory = Shadowed::new(random.usize(1..1500) * PAGE, &mut random);
            for _ in 0..3 {
                memory.add_one(&dev);
            }
            memory.check("under a kernel");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// The kernel's own argument is dropped, protected, moved or unmapped while it runs. What it then reads and writes is nobody's; but it ends, with its range or
/// with an error that names an address in it, and what the program has at the address afterwards is what the program put there.
fn changes_of_the_very_range_of_a_running_kernel() {
    let (_hmm, dev) = device(16);
    let mut random = fastrand::Rng::with_seed(11);
    let end = Instant::now() + seconds(5);
    let mut round = 0u8;
    let mut failed = 0;
    while Instant::now() < end {
        round = round.wrapping_add(1);
        let len = random.usize(3..1200) * PAGE;
        let mut memory = Pages::new(len);
        memory.slice::<u8>().fill(1);
        // SAFETY: all of `memory`, which outlives it. That its bytes change under the kernel is the test: a device is to bear it.
        let data = unsafe { std::slice::from_raw_parts_mut(memory.start(), len) };
        let (start, from) = (memory.start() as usize, random.usize(0..len / PAGE) * PAGE);
        let part = len - from;
        let at = (start + from) as *mut libc::c_void;
        let kernel = |ctx: &Ctx<'_>| {
            let out = ctx.out::<u8>(0).chunk(usize::MAX);
            let until = Instant::now() + Duration::from_millis(3);
            while Instant::now() < until {
                out.iter_mut().step_by(256).for_each(|x| *x = x.wrapping_add(1));
            }
        };
        let change = random.u8(0..5);
        let result = std::thread::scope(|scope| {
            let run = scope.spawn(|| dev.run(&kernel, 1, args![inout(&mut *data)]));
            std::thread::sleep(Duration::from_micros(random.u64(0..2500)));
            // SAFETY: inside `memory`, of which only the kernel uses anything before it is mapped anew.
            let done = unsafe {
                match change {
                    0 => libc::madvise(at, part, libc::MADV_DONTNEED),
                    1 => libc::mprotect(at, part, libc::PROT_NONE),
                    2 => libc::munmap(at, part),
                    3 => i32::from(
                        libc::mmap(at, part, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0) == libc::MAP_FAILED,
                    ),
                    _ => i32::from(libc::mremap(at, part, part + PAGE, libc::MREMAP_MAYMOVE) == libc::MAP_FAILED),
                }
            };
            assert_eq!(done, 0, "change {change}: {}", std::io::Error::last_os_error());
            run.join().unwrap()
        });
        if let Err(error) = result {
            failed += 1;
            let address = match error {
                uhmm::Error::Kernel(KernelFault::Wild { address, .. } | KernelFault::Unreachable { address }) => address,
                uhmm::Error::Gone { address } | uhmm::Error::Unmapped { address, .. } | uhmm::Error::Protected { address, .. } => address,
                other => panic!("change {change}: {other}"),
            };
            assert!((start..start + len).contains(&address), "change {change}: {address:x} in {start:x} and {len:x} bytes");
        }
        // Whatever it was, the address is the program's.
        // SAFETY: inside `memory`, whose slice is used no more.
        unsafe { map_at(at as usize, part, libc::MAP_FIXED) };
        let (before, again) = memory.slice::<u8>().split_at_mut(from);
        assert!(again.iter().all(|&x| x == 0), "change {change}");
        again.fill(round);
        dev.run(&add_one, 1, args![inout(&mut *again)]).unwrap();
        assert!(again.iter().all(|&x| x == round.wrapping_add(1)), "change {change}");
        let touched = before.first().copied().unwrap_or(1);
        assert!(before.iter().step_by(256).all(|&x| x == touched), "change {change}: what was not changed has one value");
        assert!(before.iter().enumerate().all(|(i, &x)| i % 256 == 0 || x == 1), "change {change}: what no kernel writes");
    }
    println!("{failed} launches failed");
}

/// A mapping that nobody watches comes and goes without an event. Registering a range skips what is not mapped, and yet the directory called all of it watched: a
/// mapping that came there later was taken all the same. The program then read zeros, or waited for ever.
fn mappings_that_come_and_go_are_never_taken_unwatched() {
    const LEN: usize = 8 * PAGE;
    let (_hmm, dev) = device(16);
    // Where the kernel places nothing by itself; each thread has every fourth piece of two blocks.
    let start = 0x200_0000_0000;
    let stop = AtomicBool::new(false);
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for number in 0..4usize {
            let stop = &stop;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(number as u64);
                let mut round = 0u8;
                while !stop.load(Ordering::Relaxed) {
                    round = round.wrapping_add(1).max(1);
                    let start = start + (random.usize(0..30) * 4 + number) * LEN;
                    // SAFETY: a new mapping, at a place that nobody has.
                    let mut pages = unsafe { Pages::from_raw(map_at(start, LEN, libc::MAP_FIXED_NOREPLACE), LEN) };
                    let data = pages.slice::<u8>();
                    assert!(data.iter().all(|&x| x == 0), "new memory");
                    data.fill(round);
                    for _ in 0..random.usize(0..3) {
                        std::thread::yield_now();
                        assert!(data.iter().all(|&x| x == round), "what was written");
                    }
                }
            });
        }
        let mut random = fastrand::Rng::with_seed(77);
        while Instant::now() < end {
            let from = random.usize(0..2 * BLOCK / PAGE) * PAGE;
            let len = random.usize(1..=(2 * BLOCK - from) / PAGE) * PAGE;
            dev.prefetch_range(start + from, len).unwrap();
            if random.u8(0..8) == 0 {
                // SAFETY: nobody reads it: it only names a range, some of which is mapped.
                dev.evict(unsafe { std::slice::from_raw_parts((start + from) as *const u8, len) }).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// The story: a page that was on a device was moved to another address by mremap, and from there on before the first of these moves was followed. It was brought
/// to where it was no more, which failed, and was lost: the program read zeroes.
fn pages_that_are_moved_on_at_once_keep_their_contents() {
    const LEN: usize = 24;
    let (_hmm, dev) = device(16);
    let mut memory = Pages::new(LEN * PAGE);
    let aside = Pages::new((LEN + 2) * PAGE); // its ends stay, or others could map more than a page where one was taken from
    memory.slice::<u8>().fill(7);
    let end = Instant::now() + seconds(5);
    let mut rounds = 0;
    while Instant::now() < end {
        dev.prefetch(memory.slice::<u8>()).unwrap();
        // SAFETY: nobody uses either place meanwhile.
        unsafe {
            for page in 0..LEN {
                memory.move_to(page * PAGE, PAGE, aside.at((page + 1) * PAGE));
                if rounds % 2 == 0 {
                    aside.move_to((page + 1) * PAGE, PAGE, memory.at(page * PAGE));
                }
            }
            for page in (0..LEN).filter(|_| rounds % 2 == 1) {
                aside.move_to((page + 1) * PAGE, PAGE, memory.at(page * PAGE));
            }
        }
        let wrong = memory.slice::<u8>().iter().position(|&x| x != 7);
        assert_eq!(wrong, None, "round {rounds}");
        rounds += 1;
    }
}
