//! Bugs that were there, each with its story, and the shortest program that shows it.

use crate::harness::*;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use uhmm::{Ctx, Device, Error, KernelFault, Uhmm, args, inout, inp, out, ptr};

crate::tests![
    two_parked_ranges_of_one_block_are_both_put_back,
    a_remap_to_another_alignment_unprotects_the_right_pages,
    a_remap_loses_nothing_to_its_own_event,
    trays_with_few_pages_do_not_use_up_the_pool,
    two_devices_with_snapshots_in_each_others_blocks,
    evicting_from_the_wrong_device_changes_nothing,
    more_faults_than_the_monitor_reads_at_once,
    a_worker_that_touches_a_parked_page_fails_its_launch,
    a_prefetch_is_not_held_up_by_the_last_launchs_pins,
    captures_next_to_fetched_data_are_no_bug_of_the_kernel,
    pages_dropped_while_a_device_fetches_their_block,
    a_kernel_cannot_launch,
    the_host_refuses_overlap_too,
    a_start_that_fails_for_want_of_address_space_ends,
    a_large_zeroing_ends,
    a_touch_beside_an_array_fails_no_launch,
    bytes_that_came_home_are_counted_when_the_toucher_goes_on,
    a_touch_beside_a_border_of_mappings,
    what_is_mapped_after_a_drop_is_not_dropped,
    neighbouring_mappings_come_home_together,
    holes_of_neighbouring_mappings_are_filled,
    all_pages_of_a_block_that_a_fork_has_shared_move,
    a_window_that_is_being_made_takes_no_writes,
];

const BLOCK: usize = 2 << 20;
const PAGE: usize = 4096;

/// `count` whole blocks.
fn blocks(count: usize) -> Pages {
    let mut pages = Pages::huge(count * BLOCK);
    advise(pages.slice::<u8>(), libc::MADV_NOHUGEPAGE);
    pages.slice::<u8>().fill(1);
    pages
}

fn part(pages: &mut Pages, from: usize, len: usize) -> &mut [u8] {
    &mut pages.slice()[from..][..len]
}

/// Two parts of the same length.
fn two_parts(pages: &mut Pages, from: [usize; 2], len: usize) -> [&mut [u8]; 2] {
    pages.slice().get_disjoint_mut(from.map(|from| from..from + len)).unwrap()
}

fn small(name: &'static str) -> (Uhmm, Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.soft(name).memory(64 << 20).threads(1).open().unwrap();
    (hmm, dev)
}

fn fill(value: u8) -> impl Fn(&Ctx<'_>) + Sync {
    move |ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(usize::MAX).fill(value)
}

/// The end of a failed launch gave the old pages of the first range back and forgot that the block had more of them parked: the second range read zeroes.
fn two_parked_ranges_of_one_block_are_both_put_back() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(1);
    let [a, b] = two_parts(&mut pages, [0, 1 << 20], 512 << 10);
    b.fill(2);
    dev.run(&|_: &Ctx<'_>| panic!("no"), 1, args![out(a), out(b)]).unwrap_err();
    assert!(a.iter().all(|&x| x == 1) && b.iter().all(|&x| x == 2));
}

/// mremap to another offset in a block lifted the write protection by block and page number, not by address: another array's pages lost theirs, and
/// the device went on reading its old copy of them.
fn a_remap_to_another_alignment_unprotects_the_right_pages() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(4);
    fn other(pages: &mut Pages) -> &mut [u8] {
        part(pages, BLOCK, 128 << 10)
    }
    other(&mut pages).fill(2);
    let mut sum = vec![0u64];
    let add = |ctx: &Ctx<'_>| ctx.out::<u64>(0).chunk(1)[0] = ctx.inp::<u8>(1).iter().map(|&x| u64::from(x)).sum();
    dev.run(&add, 1, args![out(&mut sum), inp(part(&mut pages, 0, 1 << 20))]).unwrap();
    dev.run(&add, 1, args![out(&mut sum), inp(other(&mut pages))]).unwrap();
    assert_eq!(sum[0], 2 * (128 << 10));
    // SAFETY: both places are in `pages`. Of these, only what lies between the two is used from now on.
    unsafe { pages.move_to(0, 1 << 20, pages.at(BLOCK + (1 << 20))) };
    std::thread::sleep(std::time::Duration::from_millis(50));
    other(&mut pages).fill(3);
    dev.run(&add, 1, args![out(&mut sum), inp(other(&mut pages))]).unwrap();
    assert_eq!(sum[0], 3 * (128 << 10));
}

/// While mremap's event was followed, the kernel refused to put pages into the new place until the caller of mremap had woken; uhmm took that for an unmapped
/// place and dropped the pages. Two of 38,000 remaps lost a block's contents.
fn a_remap_loses_nothing_to_its_own_event() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(2);
    let len = 64 * PAGE;
    let (mut at, mut to) = (0, BLOCK);
    // SAFETY: `len` bytes at `to` are used by the remap alone, and nothing else of this process maps there.
    unsafe { pages.unmap(to, len) };
    let end = Instant::now() + seconds(5);
    let mut round = 0u8;
    while Instant::now() < end {
        round = round.wrapping_add(1);
        let range = part(&mut pages, at, len);
        range.fill(0);
        dev.run(&fill(round), 1, args![inout(range)]).unwrap();
        // SAFETY: both places are in `pages`, and used in turns.
        unsafe { pages.move_to(at, len, pages.at(to)) };
        std::mem::swap(&mut at, &mut to);
        assert!(part(&mut pages, at, len).iter().all(|&x| x == round));
    }
}

/// Each small migration left a tray with a page or two that fitted no later one; after as many as there are trays (memory / 2 MiB) nothing could move any more.
fn trays_with_few_pages_do_not_use_up_the_pool() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(1);
    advise(pages.slice::<u8>(), libc::MADV_DONTNEED);
    let words = pages.slice::<u64>();
    // SAFETY: the launch borrows the words.
    let add = |ctx: &Ctx<'_>| unsafe { *ctx.pointer::<u64>(0) += 1 };
    let trays = physical_pages() as u64 / 512;
    for i in 0..trays + 100 {
        write(&mut words[0], i);
        dev.run(&add, 1, args![bare(words)]).unwrap();
        assert_eq!(read(&words[0]), i + 1);
    }
}

/// Each of two launches held a snapshot in a block, and each kernel followed a pointer into the other's: both waited for the other to end.
fn two_devices_with_snapshots_in_each_others_blocks() {
    let (hmm, one) = small("soft");
    let two = hmm.soft("two").memory(64 << 20).threads(1).open().unwrap();
    let mut pages = blocks(2);
    let (at, mut parts) = (pages.start() as usize, two_parts(&mut pages, [0, BLOCK], BLOCK));
    let [mine, other] = parts.each_mut().map(|part| &mut part[..64]);
    std::thread::scope(|scope| {
        let run = |dev: Device, range: &'_ mut [u8], far: usize| {
            let kernel = move |ctx: &Ctx<'_>| {
                std::thread::sleep(std::time::Duration::from_millis(200));
                // SAFETY: a byte of `pages`, beside both declared parts: nobody writes it.
                let x = unsafe { ctx.pointer::<u8>(1).read_volatile() };
                ctx.out::<u8>(0).chunk(64).fill(x + 1);
            };
            // SAFETY: as for the kernel.
            dev.run(&kernel, 1, args![out(range), unsafe { ptr(far as *const u8) }]).unwrap();
            assert!(range.iter().all(|&x| x == 2));
        };
        scope.spawn(move || run(one, mine, at + BLOCK + 3 * PAGE));
        scope.spawn(move || run(two, other, at + 3 * PAGE));
    });
}

/// Asking a device to bring home what another device has took the block off the wrong list; the end of the process then went round that list for ever.
fn evicting_from_the_wrong_device_changes_nothing() {
    let (hmm, one) = small("soft");
    let two = hmm.soft("two").memory(64 << 20).threads(1).open().unwrap();
    let mut pages = blocks(4);
    two.run(&fill(9), 1, args![inout(part(&mut pages, 0, BLOCK))]).unwrap();
    one.run(&fill(9), 1, args![inout(part(&mut pages, 2 * BLOCK, BLOCK))]).unwrap();
    one.evict(part(&mut pages, 0, BLOCK)).unwrap();
    assert_eq!(pages_present(part(&mut pages, 0, BLOCK)), 0);
    drop((hmm, one, two));
    assert!(two_parts(&mut pages, [0, 2 * BLOCK], BLOCK).into_iter().flatten().all(|&mut x| x == 9));
}

/// The kernel delivers faults before older events. With more threads waiting than there was room for, all of them for an event that was still unread, the monitor
/// had no room to read it.
fn more_faults_than_the_monitor_reads_at_once() {
    const THREADS: usize = 300;
    let (_hmm, dev) = device(128);
    let (mut pages, mut side) = (blocks(20), blocks(1));
    let (pages, side) = (pages.slice::<u8>(), side.slice::<u8>());
    for _round in 0..3 {
        side.fill(1);
        dev.run(&fill(3), 1, args![inout(side)]).unwrap();
        dev.run(&fill(3), 1, args![inout(pages)]).unwrap();
        let start = Barrier::new(THREADS + 4);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (pages, start) = (&*pages, &start);
                scope.spawn(move || {
                    start.wait();
                    (0..4).for_each(|i| assert_eq!(pages[(thread * 7 + i * 131) * 16 % (20 * 512) * PAGE], 3));
                });
            }
            for side in side.chunks_mut(50 * PAGE).take(4) {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    side.chunks_mut(PAGE).for_each(|page| advise(page, libc::MADV_DONTNEED));
                });
            }
        });
    }
}

/// A touch by the CPU of what a launch overwrites waits for the launch's end. A worker of that launch, at the process address, waited for itself.
fn a_worker_that_touches_a_parked_page_fails_its_launch() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(1);
    let range = pages.slice::<u8>();
    let at = &raw mut range[8 * PAGE] as usize;
    let kernel = move |ctx: &Ctx<'_>| {
        ctx.out::<u8>(0).chunk(usize::MAX)[9 * PAGE] = 5;
        // SAFETY: a byte of the argument, to which no reference is used meanwhile, at the address that a kernel must not use: the device answers for that.
        unsafe { (at as *mut u8).write_volatile(7) };
    };
    let error = dev.run(&kernel, 1, args![out(range)]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::HostAddress { address }) if address == at), "{error}");
    for (i, &x) in range.iter().enumerate() {
        assert!(x == 1 || (i == 9 * PAGE && x == 5) || (i == 8 * PAGE && x == 7), "byte {i} is {x}");
    }
}

/// A prefetch counted as part of the last launch, whose blocks may not leave: on an idle device there was no room for a second one.
fn a_prefetch_is_not_held_up_by_the_last_launchs_pins() {
    let (_hmm, dev) = device(16);
    let mut pages = blocks(12);
    dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
    dev.prefetch(part(&mut pages, 0, 6 * BLOCK)).unwrap();
    dev.prefetch(part(&mut pages, 6 * BLOCK, 6 * BLOCK)).unwrap();
    assert!(pages.slice::<u8>().iter().all(|&x| x == 1));
}

/// A kernel's captures lie on the stack of who launches it. A device fault on a variable beside them brought the whole stack to the device, and
/// the kernel was told that it had forgotten to translate an address.
fn captures_next_to_fetched_data_are_no_bug_of_the_kernel() {
    let (_hmm, dev) = small("soft");
    let mut data = [5u64; 1024];
    let seven = std::hint::black_box(7u64);
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: the launch borrows what it points to.
        let x = unsafe { ctx.pointer::<u64>(0).read_volatile() };
        ctx.out::<u64>(1).chunk(1)[0] = x + std::hint::black_box(&seven);
    };
    let mut r = vec![0u64; 4];
    // On the main thread's stack, and on another's.
    dev.run(&kernel, 4, args![bare(&mut data[500..]), out(&mut r)]).unwrap();
    assert_eq!(r, [12; 4]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut data = [6u64; 4096];
            let mut r = vec![0u64; 4];
            dev.run(&kernel, 4, args![bare(&mut data[1000..]), out(&mut r)]).unwrap();
            assert_eq!(r, [13; 4]);
        });
    });
}

/// The kernel announces MADV_DONTNEED before it drops the pages. A device that fetched the block in between carried the old contents away, and they came back.
fn pages_dropped_while_a_device_fetches_their_block() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(1);
    let end = Instant::now() + seconds(5);
    let stop = AtomicBool::new(false);
    let (near, far) = pages.slice::<u8>().split_at_mut(200 * PAGE);
    std::thread::scope(|scope| {
        let (at, stop) = (&mut near[5 * PAGE..][..150 * PAGE], &stop);
        scope.spawn(move || {
            while Instant::now() < end {
                at.fill(9);
                advise(at, libc::MADV_DONTNEED);
                assert!(at.iter().step_by(PAGE).all(|&x| x == 0));
            }
            stop.store(true, Ordering::Relaxed);
        });
        // SAFETY: the launch borrows what it points to.
        let kernel = |ctx: &Ctx<'_>| unsafe { ctx.pointer::<u8>(0).write_volatile(2) };
        while !stop.load(Ordering::Relaxed) && Instant::now() < end {
            write(&mut far[0], 1);
            dev.run(&kernel, 1, args![bare(far)]).unwrap();
        }
    });
}

/// A kernel that launched on its own device waited for its own launch to end.
fn a_kernel_cannot_launch() {
    let (_hmm, dev) = small("soft");
    let mut told = vec![0u32];
    let kernel = |ctx: &Ctx<'_>| {
        let refused = matches!(dev.run(&|_: &Ctx<'_>| (), 1, args![]), Err(Error::Reentrant));
        ctx.out::<u32>(0).chunk(1)[0] = u32::from(refused);
    };
    dev.run(&kernel, 1, args![out(&mut told)]).unwrap();
    assert_eq!(told[0], 1);
}

/// The executor on host memory did not look for overlap, so that a kernel could be given two exclusive parts of one range.
fn the_host_refuses_overlap_too() {
    use uhmm_core::args::{Access, Arg, Args, RawArg};
    let mut data = [0u32; 4];
    let start = data.as_mut_ptr() as usize;
    let twice = || {
        let raw =
            RawArg::Slice { start, count: 4, size: 4, ty: std::any::TypeId::of::<u32>(), name: "u32", access: Access::Out, device: None };
        // SAFETY: `data` lives on. Both are exclusive, but refused, and no kernel starts.
        unsafe { Arg::from_raw(raw) }
    };
    let error = uhmm::Host::new(1).run(&|_: &Ctx<'_>| unreachable!(), 1, Args::new([twice(), twice()])).unwrap_err();
    assert!(matches!(error, Error::Overlap { first: 0, second: 1, .. }), "{error}");
}

/// If starting failed after a pool was watched, giving the pool up waited for a monitor that there was not.
fn a_start_that_fails_for_want_of_address_space_ends() {
    let mut failed = 0;
    let set_limit = |limit| {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: a structure of our own; at the limit, calls fail.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
    };
    // Each start fails at another step.
    for limit in (1..1200).map(|n| n << 26) {
        set_limit(limit);
        if let Err(error) = Uhmm::new() {
            failed += 1;
            assert!(error.to_string().contains("RLIMIT_AS"), "{error}");
        }
    }
    assert!(failed > 0);
    set_limit(libc::RLIM_INFINITY);
    let (_hmm, dev) = small("soft");
    dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
}

/// One piece of a copy beyond 4 GiB counted its offset into the number of the piece, and never ended.
fn a_large_zeroing_ends() {
    if physical_pages() * PAGE < 16 << 30 {
        return; // not enough memory to try
    }
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.soft("large").memory(5 << 30).threads(1).open().unwrap();
    let buffer = dev.alloc::<u8>((4 << 30) + PAGE).unwrap();
    assert_eq!(buffer.len(), (4 << 30) + PAGE);
}

/// A thread that read what lies beside an array brought the array's edge pages home between the launch's two looks at them, and the launch gave up with an
/// error: 30 of 1300.
fn a_touch_beside_an_array_fails_no_launch() {
    let (_hmm, dev) = small("soft");
    let mut memory = vec![7u8; 100 + 70_000 + 100];
    let (before, rest) = memory.split_at_mut(100);
    let (array, after) = rest.split_at_mut(70_000);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for beside in [&*before, &*after] {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(read(&beside[0]), 7);
                }
            });
        }
        let end = Instant::now() + seconds(5);
        let mut result = Ok(());
        while Instant::now() < end && result.is_ok() {
            result = dev.run(&increment_bytes, 1, args![inout(array)]);
        }
        stop.store(true, Ordering::Relaxed);
        result.unwrap();
    });
    assert!(array.iter().all(|&x| x == array[0]));
}

fn increment_bytes(ctx: &Ctx<'_>) {
    ctx.out::<u8>(0).chunk(usize::MAX).iter_mut().for_each(|x| *x = x.wrapping_add(1));
}

/// A small return was counted after the kernel had woken who waited for it: a program that looked at once saw that nothing had come home.
fn bytes_that_came_home_are_counted_when_the_toucher_goes_on() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(1);
    let range = part(&mut pages, 0, 16 * PAGE);
    let end = Instant::now() + seconds(2);
    while Instant::now() < end {
        dev.run(&fill(3), 1, args![inout(range)]).unwrap();
        let before = dev.stats();
        assert_eq!(read(&range[0]), 3);
        assert_ne!(dev.stats().bytes_to_cpu, before.bytes_to_cpu);
    }
}

/// One call of the kernel copies, or fills with zeroes, within one mapping only, and says of more that there is nothing. What was brought home around
/// a touch ended in the next mapping: the monitor took that for an unmap whose event would come, and tried for ever.
fn a_touch_beside_a_border_of_mappings() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(2);
    let border = BLOCK + 5 * PAGE;
    let all = pages.slice::<u8>();
    // Two mappings from here on, as neighbours with unequal flags are.
    advise(&mut all[border..], libc::MADV_DONTDUMP);
    dev.run(&fill(2), 1, args![inout(all)]).unwrap();
    let before = dev.stats();
    assert_eq!(all[border - 1], 2, "brings 64 KiB home, of both mappings");
    assert_eq!(dev.stats().bytes_to_cpu - before.bytes_to_cpu, 64 << 10);
    assert!(all.iter().all(|&x| x == 2));
    // Holes on both sides.
    for round in 0..3 {
        dev.run(&fill(3), 1, args![inout(all)]).unwrap();
        let (at, last) = (border - 3 * PAGE, border + 3 * PAGE);
        advise(&mut all[at..last], libc::MADV_DONTNEED);
        assert_eq!(all[if round == 1 { last - 1 } else { at }], 0);
        assert!(all.iter().enumerate().all(|(i, &x)| x == if (at..last).contains(&i) { 0 } else { 3 }));
    }
}

/// A few pages come home by one call for each run of device memory, but a call that copies ends at a mapping's end: where two mappings that the kernel does
/// not merge met, the touch waited for ever.
fn neighbouring_mappings_come_home_together() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(1);
    let range = part(&mut pages, 0, 8 * PAGE);
    range.iter_mut().enumerate().for_each(|(i, x)| *x = (i / PAGE) as u8);
    // The second half is not written to a core dump: a mapping of its own.
    advise(&mut range[4 * PAGE..], libc::MADV_DONTDUMP);
    dev.prefetch(&*range).unwrap();
    assert_eq!(pages_present(range), 0);
    assert!(range.iter().enumerate().all(|(i, &x)| x == (i / PAGE) as u8));
}

/// The same with holes: a touch of memory that the program had dropped was answered for all holes around it by one call, which fails where two mappings meet; so it
/// was on the heap after the break had gone down and up again.
fn holes_of_neighbouring_mappings_are_filled() {
    let (_hmm, dev) = small("soft");
    let mut pages = blocks(1);
    let range = part(&mut pages, 0, 40 * PAGE);
    advise(&mut range[20 * PAGE..], libc::MADV_DONTDUMP);
    dev.prefetch(&*range).unwrap();
    advise(range, libc::MADV_DONTNEED);
    range[30 * PAGE] = 1;
    range[3 * PAGE] = 1;
    assert_eq!(range.iter().map(|&x| u32::from(x)).sum::<u32>(), 2);
}

/// After a fork the kernel moves a page only once it is the program's own again. Of a block whose pages do not follow each other only the first run was made
/// so; the others stayed.
fn all_pages_of_a_block_that_a_fork_has_shared_move() {
    let (_hmm, dev) = small("soft");
    let mut pages = Pages::huge(BLOCK);
    let range = pages.slice::<u8>();
    advise(range, libc::MADV_NOHUGEPAGE);
    range.iter_mut().step_by(3 * PAGE).for_each(|x| *x = 1);
    in_a_child(|| true);
    dev.prefetch(&*range).unwrap();
    assert_eq!(pages_present(range), 0);
    assert!(range.iter().enumerate().all(|(i, &x)| x == u8::from(i % (3 * PAGE) == 0)));
}

/// The pages that the program drops are taken away when the kernel announces it, before the kernel does it itself. If the monitor got to run only after the program
/// had dropped a range, mapped something new there and filled it, it took the new contents: they read as zeros.
fn what_is_mapped_after_a_drop_is_not_dropped() {
    let (_hmm, dev) = small("soft");
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for number in 1..=8u8 {
            let dev = &dev;
            scope.spawn(move || {
                let mut pages = blocks(1);
                let range = part(&mut pages, 0, 64 * PAGE);
                while Instant::now() < end {
                    range.fill(1);
                    dev.prefetch(&*range).unwrap();
                    advise(range, libc::MADV_DONTNEED);
                    map_anew(range);
                    range.fill(number);
                    std::thread::yield_now();
                    assert!(range.iter().all(|&x| x == number), "what was written is there");
                }
            });
        }
    });
}

/// A part of the device's page table was mapped first, and watched then: a worker that touched it in between got a page of zeroes, for the whole block, and what it and the others
/// wrote there was lost without an error.
fn a_window_that_is_being_made_takes_no_writes() {
    const BLOCKS: usize = 64;
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.soft("soft").memory(256 << 20).threads(4).open().unwrap();
    let end = Instant::now() + seconds(5);
    while Instant::now() < end {
        // New memory each time, and with it a new window. All workers come to each block at once.
        let mut memory = blocks(BLOCKS);
        let words = memory.slice::<u64>();
        let barrier = Barrier::new(4);
        let kernel = |ctx: &Ctx<'_>| {
            for block in 0..BLOCKS {
                barrier.wait();
                // SAFETY: the launch borrows the blocks, and each group has words of its own.
                unsafe { *ctx.pointer::<u64>(0).add(block * BLOCK / 8 + ctx.group()) = 7 };
            }
        };
        dev.run(&kernel, 4, args![bare(words)]).unwrap();
        for block in 0..BLOCKS {
            assert_eq!(words[block * BLOCK / 8..][..4], [7; 4], "block {block}");
        }
    }
}
