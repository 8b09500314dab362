//! What the program says about its memory has the effect that it says: each test asks the kernel where pages are, in the program and in the device's window, and
//! shows what happens without the advice first.

use crate::harness::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use uhmm::{Advice, Ctx, Device, Location, args, inout, inp, out};

crate::tests![
    what_must_not_migrate_stays,
    what_must_not_migrate_comes_home_at_once,
    what_must_not_migrate_is_not_fetched_again,
    what_is_mostly_read_is_read_by_both,
    a_kernel_reads_what_is_mostly_read,
    a_kernel_writes_a_page_of_what_is_mostly_read,
    what_is_preferred_on_a_device_leaves_page_by_page,
    what_is_preferred_at_home_comes_as_a_block,
    what_is_preferred_on_a_device_leaves_it_last,
    what_will_not_be_needed_leaves_first,
    what_a_device_accesses_is_there_before,
    advice_follows_the_mapping,
    advice_can_be_taken_back,
    a_closed_devices_advice_goes_with_it,
];

const BLOCK: usize = 2 << 20;
const PAGE: usize = 4096;

/// Whole blocks in small pages, each byte the number of its page.
pub fn blocks(count: usize) -> Pages {
    let mut pages = Pages::huge(count * BLOCK);
    let data = pages.slice::<u8>();
    advise(data, libc::MADV_NOHUGEPAGE);
    for (number, page) in data.chunks_mut(PAGE).enumerate() {
        page.fill(number as u8);
    }
    pages
}

/// Whether the bytes are those of [`blocks`], each `more` higher.
pub fn right(data: &[u8], more: u8) -> bool {
    data.chunks(PAGE).enumerate().all(|(number, page)| page.iter().all(|&x| x == (number as u8).wrapping_add(more)))
}

/// Whether the device has a page in its page table, which for the software device is the process's at another address.
pub fn on_device(dev: &Device, at: *const u8) -> bool {
    present((at as usize ^ dev.info().mask) as *const u8)
}

pub fn pages_on_device(dev: &Device, data: &[u8]) -> usize {
    data.chunks(PAGE).filter(|page| on_device(dev, page.as_ptr())).count()
}

/// Adds 1 to every byte of argument 0.
pub fn add(ctx: &Ctx<'_>) {
    ctx.out::<u8>(0).chunk(BLOCK).iter_mut().for_each(|x| *x = x.wrapping_add(1));
}

fn what_must_not_migrate_stays() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(3);
    let all = 3 * 512;
    let data = pages.slice::<u8>();
    dev.run(&add, 3, args![inout(data)]).unwrap();
    assert_eq!(pages_present(data), 0, "without advice it moves");
    hmm.evict_all().unwrap();
    // The second half of the first block and all of the second; not the third.
    let stays = BLOCK / 2..2 * BLOCK;
    hmm.advise(&data[stays.clone()], Advice::NoMigrate).unwrap();
    let inside = AtomicUsize::new(0);
    let (at, len) = (data[stays.clone()].as_ptr() as usize, stays.len());
    let look = |ctx: &Ctx<'_>| {
        if ctx.group() == 1 {
            // SAFETY: it is only asked where pages are.
            inside.store(pages_present(unsafe { std::slice::from_raw_parts(at as *const u8, len) }), Ordering::Relaxed);
        }
        add(ctx);
    };
    for more in 2..5 {
        dev.run(&look, 3, args![inout(data)]).unwrap();
        assert_eq!(inside.swap(0, Ordering::Relaxed), len / PAGE, "also while the kernel runs");
        assert_eq!((pages_present(&data[stays.clone()]), pages_present(data)), (768, 768), "the rest moves");
        assert!(right(&data[stays.clone()], more));
    }
    assert!(right(data, 4));
    dev.prefetch(data).unwrap();
    assert_eq!(pages_present(data), 768);
    // What a kernel is only given a pointer to, and writes.
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: nobody else uses it meanwhile.
        let all = unsafe { std::slice::from_raw_parts_mut(ctx.pointer::<u8>(0), 3 * BLOCK) };
        all.iter_mut().for_each(|x| *x = x.wrapping_add(1));
    };
    dev.run(&kernel, 1, args![bare(data)]).unwrap();
    assert_eq!(pages_present(&data[stays.clone()]), 768);
    assert!(right(data, 5));
    // Written only; and read, which leaves the device a copy.
    dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(BLOCK).fill(9), 3, args![out(data)]).unwrap();
    assert_eq!(pages_present(&data[stays.clone()]), 768);
    assert!(data.iter().all(|&x| x == 9));
    let read = |ctx: &Ctx<'_>| assert!(ctx.inp::<u8>(0).iter().all(|&x| x == 9));
    dev.run(&read, 1, args![inp(data)]).unwrap();
    assert_eq!((pages_present(data), pages_on_device(&dev, data)), (all, all));
    // A write to what both have: the CPU's page stays the program's.
    dev.run(&kernel, 1, args![bare(data)]).unwrap();
    assert_eq!(pages_present(&data[stays.clone()]), 768);
    assert!(data.iter().all(|&x| x == 10));
}

fn what_must_not_migrate_comes_home_at_once() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    dev.prefetch(data).unwrap();
    // Not whole pages: what is advised is what lies wholly inside.
    hmm.advise(&data[PAGE - 1..BLOCK + 1], Advice::NoMigrate).unwrap();
    assert_eq!((pages_present(data), pages_present(&data[PAGE..BLOCK])), (511, 511));
    assert!(right(data, 0));
}

/// The advice waits for the launch that runs, which could fetch pages again: when it has been given nothing is on the device, and what the kernel wrote is there.
fn what_must_not_migrate_is_not_fetched_again() {
    let (hmm, _first) = device(16); // on a thread of which the advice is carried out
    let dev = hmm.soft("second").memory(16 << 20).threads(1).open().unwrap();
    let mut pages = blocks(1);
    let (start, len) = (pages.start() as usize, pages.len());
    let running = AtomicUsize::new(0);
    let kernel = |ctx: &Ctx<'_>| {
        running.store(1, Ordering::SeqCst);
        std::thread::sleep(std::time::Duration::from_millis(100));
        add(ctx);
    };
    std::thread::scope(|scope| {
        let (dev, kernel, data) = (&dev, &kernel, pages.slice::<u8>());
        scope.spawn(move || dev.run(kernel, 1, args![inout(data)]).unwrap());
        while running.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        // SAFETY: the memory is there; what is in it is looked at when no kernel uses it.
        let data = unsafe { std::slice::from_raw_parts(start as *const u8, len) };
        hmm.advise(data, Advice::NoMigrate).unwrap();
        assert_eq!((pages_present(data), pages_on_device(dev, data)), (512, 0));
        assert!(right(data, 1), "what the kernel wrote");
    });
}

fn what_is_mostly_read_is_read_by_both() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    dev.prefetch(data).unwrap();
    assert_eq!((read(&data[5 * PAGE]), pages_present(data)), (5, 16));
    assert!(!on_device(&dev, &data[5 * PAGE]), "without advice what comes home is the CPU's alone");
    hmm.advise(data, Advice::ReadMostly).unwrap();
    dev.prefetch(data).unwrap();
    assert_eq!(pages_present(data), 0);
    let before = dev.stats();
    assert_eq!((read(&data[5 * PAGE]), pages_present(data)), (5, 512), "a block that is one page of the device comes whole");
    assert_eq!(pages_on_device(&dev, data), 1024, "the device has kept all of it");
    assert!(right(data, 0));
    assert_eq!((pages_present(data), pages_on_device(&dev, data)), (1024, 1024));
    dev.run(&|ctx: &Ctx<'_>| assert!(right(ctx.inp::<u8>(0), 0)), 1, args![inp(data)]).unwrap();
    assert_eq!((dev.stats() - before).bytes_to_device, 0);
    // A write ends it.
    write(&mut data[7 * PAGE], 70);
    assert!(!on_device(&dev, &data[7 * PAGE]));
    let kernel = |ctx: &Ctx<'_>| assert_eq!(ctx.inp::<u8>(0)[7 * PAGE], 70);
    dev.run(&kernel, 1, args![inp(data)]).unwrap();
    assert_eq!(data[7 * PAGE], 70);
    // A write as the first touch brings it home alone.
    data[7 * PAGE] = 7;
    dev.prefetch(data).unwrap();
    write(&mut data[900 * PAGE], 1);
    assert!(present(&data[900 * PAGE]) && !on_device(&dev, &data[900 * PAGE]));
    // Of what is no whole block on the device, what the policy wants.
    let mut pages = blocks(1);
    let data = &mut pages.slice::<u8>()[100 * PAGE..400 * PAGE];
    hmm.advise(data, Advice::ReadMostly).unwrap();
    dev.prefetch(data).unwrap();
    assert_eq!((read(&data[5 * PAGE]), pages_present(data), pages_on_device(&dev, data)), (105, 12, 300));
    assert!(right(pages.slice(), 0));
    // In huge pages, whole.
    let mut huge = Pages::huge(BLOCK);
    let data = huge.slice::<u8>();
    data.fill(3);
    hmm.advise(data, Advice::ReadMostly).unwrap();
    dev.prefetch(data).unwrap();
    assert_eq!((read(&data[100]), pages_present(data), pages_on_device(&dev, data)), (3, 512, 512));
    dev.run(&add, 1, args![inout(data)]).unwrap();
    assert!(data.iter().all(|&x| x == 4));
}

/// The kernel sums what it is given a pointer to.
fn sum(ctx: &Ctx<'_>) {
    // SAFETY: nobody writes to it meanwhile.
    let all = unsafe { std::slice::from_raw_parts(ctx.pointer::<u8>(1).cast_const(), 2 * BLOCK) };
    ctx.out::<u64>(0).chunk(1)[0] = all.iter().map(|&x| u64::from(x)).sum();
}

fn a_kernel_reads_what_is_mostly_read() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    let expected: u64 = data.iter().map(|&x| u64::from(x)).sum();
    let mut total = [0u64];
    dev.run(&sum, 1, args![out(&mut total), bare(data)]).unwrap();
    assert_eq!((total[0], pages_present(data)), (expected, 0), "without advice what a kernel touches moves");
    hmm.evict_all().unwrap();
    hmm.advise(data, Advice::ReadMostly).unwrap();
    for _ in 0..2 {
        dev.run(&sum, 1, args![out(&mut total), bare(data)]).unwrap();
        assert_eq!((total[0], pages_present(data), pages_on_device(&dev, data)), (expected, 1024, 1024));
    }
    let faults = dev.stats().cpu_faults;
    assert!(right(data, 0));
    assert_eq!(dev.stats().cpu_faults, faults);
    // A kernel that writes has the page alone.
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: nobody else uses it meanwhile.
        unsafe { *ctx.pointer::<u8>(0).add(9 * PAGE) = 90 }
    };
    dev.run(&kernel, 1, args![bare(data)]).unwrap();
    assert_eq!((present(&data[9 * PAGE]), pages_present(data)), (false, 1023));
    assert_eq!(read(&data[9 * PAGE]), 90);
}

fn a_kernel_writes_a_page_of_what_is_mostly_read() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    let kernel = |ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(PAGE).iter_mut().for_each(|x| *x = 77);
    dev.run(&kernel, 1, args![inout(data)]).unwrap();
    assert_eq!(pages_present(data), 0, "without advice all of it moves");
    assert_eq!(data[PAGE], 1);
    hmm.evict_all().unwrap();
    hmm.advise(data, Advice::ReadMostly).unwrap();
    dev.run(&kernel, 1, args![inout(data)]).unwrap();
    assert_eq!((present(data.as_ptr()), pages_present(data), pages_on_device(&dev, data)), (false, 1023, 1024));
    assert!(data[..PAGE].iter().all(|&x| x == 77));
    assert!(data.chunks(PAGE).enumerate().skip(1).all(|(number, page)| page.iter().all(|&x| x == number as u8)));
    // On a device that cannot notice the first write of a page it moves.
    let other = hmm.soft("other").memory(64 << 20).threads(2).replayable_faults(false).open().unwrap();
    other.run(&add, 2, args![inout(data)]).unwrap();
    assert_eq!(pages_present(data), 0);
    assert_eq!((data[0], data[PAGE]), (78, 2));
}

fn what_is_preferred_on_a_device_leaves_page_by_page() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(1);
    let data = pages.slice::<u8>();
    dev.prefetch(data).unwrap();
    assert_eq!((read(&data[5 * PAGE]), pages_present(data)), (5, 16), "without advice its neighbours come too");
    hmm.advise(data, Advice::PreferredLocation(Location::Device(dev.id()))).unwrap();
    dev.prefetch(data).unwrap();
    for (count, page) in [5, 6, 300].into_iter().enumerate() {
        assert_eq!((read(&data[page * PAGE]), pages_present(data)), (page as u8, count + 1));
    }
    assert!(right(data, 0));
}

fn what_is_preferred_at_home_comes_as_a_block() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(1);
    let data = pages.slice::<u8>();
    hmm.advise(data, Advice::PreferredLocation(Location::Home)).unwrap();
    dev.prefetch(data).unwrap();
    assert_eq!((read(&data[5 * PAGE]), pages_present(data)), (5, 512));
}

/// Which of four blocks has left a device of 8 MiB when another one was brought.
fn evicted(hmm: &uhmm::Uhmm, dev: &Device, say: impl Fn(&[u8], usize)) -> Vec<usize> {
    let mut pages = blocks(5);
    let data = pages.slice::<u8>();
    for (number, block) in data.chunks(BLOCK).enumerate().take(4) {
        say(block, number);
        dev.prefetch(block).unwrap();
        assert_eq!(pages_present(block), 0);
    }
    dev.prefetch(&data[4 * BLOCK..]).unwrap();
    let gone = data.chunks(BLOCK).enumerate().filter(|(_, block)| pages_present(block) == 512).map(|(number, _)| number).collect();
    assert!(right(data, 0));
    hmm.evict_all().unwrap();
    gone
}

fn what_is_preferred_on_a_device_leaves_it_last() {
    let (hmm, dev) = device(8);
    assert_eq!(evicted(&hmm, &dev, |_, _| {}), [0], "the least recently used one");
    let prefer = |last: usize| {
        let (hmm, dev) = (&hmm, &dev);
        move |block: &[u8], number: usize| {
            if number <= last {
                hmm.advise(block, Advice::PreferredLocation(Location::Device(dev.id()))).unwrap();
            }
        }
    };
    assert_eq!(evicted(&hmm, &dev, prefer(0)), [1]);
    assert_eq!(evicted(&hmm, &dev, prefer(2)), [3]);
    assert_eq!(evicted(&hmm, &dev, prefer(3)), [0], "if all are, one of them goes all the same");
}

fn what_will_not_be_needed_leaves_first() {
    let (hmm, dev) = device(8);
    assert_eq!(evicted(&hmm, &dev, |_, _| {}), [0]);
    let forget = |which: usize| {
        let hmm = &hmm;
        move |block: &[u8], number: usize| {
            if number == which {
                hmm.advise(&block[100 * PAGE..101 * PAGE], Advice::WillNotNeed).unwrap();
            }
        }
    };
    assert_eq!(evicted(&hmm, &dev, forget(3)), [3]);
    assert_eq!(evicted(&hmm, &dev, forget(2)), [2]);
}

fn what_a_device_accesses_is_there_before() {
    let (hmm, dev) = device(16);
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    let nothing = |_: &Ctx<'_>| {};
    dev.run(&nothing, 1, args![bare(data)]).unwrap();
    assert_eq!(pages_on_device(&dev, data), 0, "without advice nothing comes that is not touched");
    hmm.advise(data, Advice::AccessedBy(dev.id())).unwrap();
    dev.run(&nothing, 1, args![]).unwrap();
    assert_eq!((pages_on_device(&dev, data), pages_present(data)), (1024, 1024));
    let before = dev.stats();
    let mut total = [0u64];
    dev.run(&sum, 1, args![out(&mut total), bare(data)]).unwrap();
    assert_eq!(total[0], data.iter().map(|&x| u64::from(x)).sum::<u64>());
    assert_eq!((dev.stats() - before).device_faults, 0, "the kernel waits for nothing");
    // What the CPU has written meanwhile is brought again; what has no room stays.
    write(&mut data[3 * PAGE], 30);
    dev.run(&nothing, 1, args![]).unwrap();
    assert_eq!(pages_on_device(&dev, data), 1024);
    let mut much = blocks(12);
    let much = much.slice::<u8>();
    hmm.advise(much, Advice::AccessedBy(dev.id())).unwrap();
    let mut used = blocks(5);
    dev.run(&add, 5, args![inout(used.slice::<u8>())]).unwrap();
    assert!(right(used.slice(), 1) && right(much, 0));
    assert_eq!(data[3 * PAGE], 30);
}

fn advice_follows_the_mapping() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    hmm.advise(&data[..BLOCK], Advice::NoMigrate).unwrap();
    dev.prefetch(data).unwrap();
    assert_eq!(pages_present(data), 512);
    // Moved: what was said goes along.
    let mut place = Pages::huge(2 * BLOCK);
    place.slice::<u8>(); // the other place is ours, and nobody uses it
    // SAFETY: the pages are used at their new place from now on, which is ours.
    unsafe { pages.move_to(0, 2 * BLOCK, place.start()) };
    let (old, data) = (pages.start(), place.slice::<u8>());
    assert!(right(data, 0));
    dev.prefetch(data).unwrap();
    assert_eq!((pages_present(data), pages_present(&data[..BLOCK])), (512, 512));
    // What is mapped at the old place, or at the new one after an unmapping, is other memory.
    for at in [old, data.as_mut_ptr()] {
        if at != old {
            // SAFETY: it is mapped anew below.
            unsafe { place.unmap(0, 2 * BLOCK) };
        }
        // SAFETY: nothing is there.
        let fresh = unsafe { std::slice::from_raw_parts_mut(map_at(at as usize, 2 * BLOCK, libc::MAP_FIXED_NOREPLACE), 2 * BLOCK) };
        fresh.fill(1);
        dev.prefetch(fresh).unwrap();
        assert_eq!(pages_present(fresh), 0, "nothing was said about it");
    }
}

fn advice_can_be_taken_back() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(1);
    let data = pages.slice::<u8>();
    hmm.advise(data, Advice::NoMigrate).unwrap();
    hmm.advise(data, Advice::ReadMostly).unwrap();
    dev.prefetch(data).unwrap();
    assert_eq!(pages_present(data), 512, "what is said later adds to it");
    hmm.advise(&data[..BLOCK / 2], Advice::Normal).unwrap();
    dev.prefetch(data).unwrap();
    assert_eq!(pages_present(data), 256);
    // Of what cannot move nothing is kept, and nothing is wrong.
    hmm.advise(shared(BLOCK), Advice::NoMigrate).unwrap();
    hmm.advise_range(0x1000, 1 << 40, Advice::WillNotNeed).unwrap();
    let inside = |_: &Ctx<'_>| assert!(matches!(hmm.advise_range(0, 0, Advice::Normal), Err(uhmm::Error::Reentrant)));
    dev.run(&inside, 1, args![]).unwrap();
}

/// Its number is another device's next.
fn a_closed_devices_advice_goes_with_it() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(1);
    let data = pages.slice::<u8>();
    let id = dev.id();
    hmm.advise(data, Advice::AccessedBy(id)).unwrap();
    drop(dev);
    let other = hmm.soft("other").memory(64 << 20).threads(1).open().unwrap();
    assert_eq!(other.id(), id);
    other.run(&|_: &Ctx<'_>| {}, 1, args![]).unwrap();
    assert_eq!(pages_on_device(&other, data), 0);
    // Said before there is a device.
    drop(other);
    hmm.advise(data, Advice::AccessedBy(id)).unwrap();
    let third = hmm.soft("third").memory(64 << 20).threads(1).open().unwrap();
    third.run(&|_: &Ctx<'_>| {}, 1, args![]).unwrap();
    assert_eq!(pages_on_device(&third, data), 512);
}
