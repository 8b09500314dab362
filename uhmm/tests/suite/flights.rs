//! Stories of launches and leases beside each other.

use crate::harness::*;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, Error, args, fence, inout, inp, out, scope};

crate::tests![
    a_failed_launch_writes_nothing_later,
    a_lease_beside_a_launch_whose_edge_is_the_devices,
    a_small_lease_does_not_fill_the_device,
    acquires_that_wait_keep_no_launch_waiting,
    a_shared_mapping_is_replaced_before_a_launch_that_was_prepared_early,
    another_devices_lease_in_the_same_block,
    a_launch_finds_no_room_beside_one_that_has_fetched,
    a_launch_that_fails_on_the_way_leaves_no_snapshot,
    a_write_beside_what_a_running_launch_reads,
    a_kernel_writes_what_a_lease_reads,
];

/// Waits for another thread, 10 seconds at most.
fn until(flag: &AtomicBool) {
    let limit = Instant::now() + Duration::from_secs(10);
    while !flag.load(Ordering::SeqCst) && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two launches with an array each on one page. The first wrote and failed; the second's end took that for a change of its own kernel, and wrote it over what
/// the program had put there since.
fn a_failed_launch_writes_nothing_later() {
    let (_hmm, dev) = device(16);
    let mut page = Pages::new(8192);
    let (a, rest) = page.slice::<u32>().split_at_mut(100);
    let b = &mut rest[..100];
    let (first, second) = (AtomicBool::new(false), AtomicBool::new(false));
    let fails = |ctx: &Ctx<'_>| {
        ctx.out::<u32>(0).chunk(100)[0] = 666;
        until(&first);
        panic!("on purpose");
    };
    let waits = |ctx: &Ctx<'_>| {
        ctx.out::<u32>(0).chunk(100)[0] = 7;
        until(&second);
    };
    std::thread::scope(|threads| {
        let (dev, first, waits) = (&dev, &first, &waits);
        threads.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            dev.run(waits, 1, args![inout(b)]).unwrap();
        });
        threads.spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            first.store(true, Ordering::SeqCst);
        });
        assert!(dev.run(&fails, 1, args![inout(a)]).is_err());
        assert!(matches!(read(&a[0]), 0 | 666));
        write(&mut a[0], 1000);
        std::thread::sleep(Duration::from_millis(100));
        second.store(true, Ordering::SeqCst);
    });
    assert_eq!((page.slice::<u32>()[0], page.slice::<u32>()[100]), (1000, 7));
}

/// The last page of a large argument stays on the device between launches. A lease of what lies beside made a snapshot of it, which the running launch then wrote
/// to, and did not write back: it did not know of it.
fn a_lease_beside_a_launch_whose_edge_is_the_devices() {
    let (_hmm, dev) = device(16);
    let mut memory = Pages::new(64 * 4096);
    let len = 40 * 1024 + 100;
    let (a, rest) = memory.slice::<u32>().split_at_mut(len);
    let b = &mut rest[..200];
    let (go, started) = (AtomicBool::new(true), AtomicBool::new(false));
    let kernel = |ctx: &Ctx<'_>| {
        started.store(true, Ordering::SeqCst);
        until(&go);
        ctx.out::<u32>(0).chunk(len).iter_mut().for_each(|x| *x += 1);
    };
    dev.run(&kernel, 1, args![inout(a)]).unwrap();
    started.store(false, Ordering::SeqCst);
    go.store(false, Ordering::SeqCst);
    std::thread::scope(|threads| {
        let (dev, kernel, a) = (&dev, &kernel, &mut *a);
        threads.spawn(move || dev.run(kernel, 1, args![inout(a)]).unwrap());
        until(&started);
        drop(dev.acquire(args![inout(b)]).unwrap());
        go.store(true, Ordering::SeqCst);
    });
    assert_eq!((a[0], a[20_000], a[len - 1]), (2, 2, 2));
}

/// Blocks that were used since the lease began counted as needed for as long as it lasted.
fn a_small_lease_does_not_fill_the_device() {
    let (_hmm, dev) = device(16);
    let mut small = [0u32; 500];
    let _lease = dev.acquire(args![inout(&mut small)]).unwrap();
    let mut arrays = vec![vec![1u32; 3 << 19]; 6];
    for data in &mut arrays {
        dev.run(&increment, groups(data.len()), args![inout(data)]).unwrap();
    }
    assert!(arrays.iter().flatten().all(|&x| x == 2));
}

/// Two that waited for the ends of leases took both of the device's threads: launches waited too, and whoever was to end the leases after one waited for ever.
fn acquires_that_wait_keep_no_launch_waiting() {
    let (_hmm, dev) = device(16);
    let mut arrays = [(); 3].map(|()| Pages::new(8192));
    let [a, b, c] = &mut arrays;
    let mut signals = vec![];
    let twice = |pages: &mut Pages| {
        let words = std::ptr::from_mut(pages.slice::<u32>());
        // SAFETY: the leases of both are one after the other, and the memory outlives them.
        unsafe { (&mut *words, &mut *words) }
    };
    let ((a, a_again), (b, b_again)) = (twice(a), twice(b));
    for data in [a, b] {
        let lease = dev.acquire(args![inout(data)]).unwrap();
        let (done, signal) = fence();
        // SAFETY: nobody touches it before the signal.
        unsafe { lease.release(done) };
        signals.push(signal);
    }
    std::thread::scope(|threads| {
        let dev = &dev;
        for again in [a_again, b_again] {
            threads.spawn(move || drop(dev.acquire(args![inout(again)]).unwrap()));
        }
        std::thread::sleep(Duration::from_millis(100));
        dev.run(&increment, groups(2048), args![inout(c.slice::<u32>())]).unwrap();
        drop(signals);
    });
}

/// What a kernel uses in place is looked at before its launch; one that was prepared early was not looked at again.
fn a_shared_mapping_is_replaced_before_a_launch_that_was_prepared_early() {
    let (_hmm, dev) = device(16);
    if !dev.info().capabilities.replayable_faults {
        return; // no pointer can be followed
    }
    let file = |value: u32| {
        let file = memfd();
        file.set_len(1 << 20).unwrap();
        let at = map(1 << 20, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(&file));
        // SAFETY: a new mapping of that length.
        unsafe { std::slice::from_raw_parts_mut(at.cast::<u32>(), 1 << 18) }.fill(value);
        (file, at)
    };
    let ((_one, at), (two, _)) = (file(1), file(2));
    let mut other = vec![0u32; 1000];
    let (seen, go) = (AtomicU32::new(0), AtomicBool::new(false));
    let place = at as usize;
    // SAFETY: mapped while the test runs.
    let look = |ctx: &Ctx<'_>| seen.store(unsafe { *ctx.ptr((place as *const u32).add(5000)) }, Ordering::SeqCst);
    let waits = |_: &Ctx<'_>| until(&go);
    dev.run(&look, 1, args![]).unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    scope(|scope| {
        scope.launch(&dev, &waits, 1, args![inout(&mut other)]);
        std::thread::sleep(Duration::from_millis(50));
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: it replaces a mapping of the test's own that nobody uses now.
        let again =
            unsafe { libc::mmap(at.cast(), 1 << 20, access, libc::MAP_SHARED | libc::MAP_FIXED, std::os::fd::AsRawFd::as_raw_fd(&two), 0) };
        assert_eq!(again, at.cast());
        scope.launch(&dev, &look, 1, args![]);
        std::thread::sleep(Duration::from_millis(50));
        go.store(true, Ordering::SeqCst);
    })
    .unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 2);
}

/// A kernel that follows a pointer into a block of which another device has a small lease waited for its end, which could not come: an error is what is left.
fn another_devices_lease_in_the_same_block() {
    let (hmm, one) = device(16);
    if !one.info().capabilities.replayable_faults {
        return; // no pointer can be followed
    }
    let two = hmm.soft("two").memory(16 << 20).threads(1).open().unwrap();
    let mut memory = Pages::huge(2 << 20);
    let words = memory.slice::<u32>();
    words.fill(3);
    let (small, rest) = words.split_at_mut(500);
    let far = &raw const rest[100_000] as usize;
    let lease = one.acquire(args![inout(small)]).unwrap();
    // SAFETY: the memory outlives the launch, and nobody writes it.
    let follow = move |ctx: &Ctx<'_>| assert!(matches!(unsafe { *ctx.ptr(far as *const u32) }, 0 | 3));
    match two.run(&follow, 1, args![]) {
        Ok(()) | Err(Error::Kernel(_)) => {}
        other => panic!("{other:?}"),
    }
    two.prefetch(rest).unwrap();
    drop(lease);
    two.run(&follow, 1, args![]).unwrap();
    assert_eq!(rest[100_000], 3);
}

/// A launch that was prepared early, and found no room, ended snapshots that the running kernel had asked for, and their changes were lost.
fn a_launch_finds_no_room_beside_one_that_has_fetched() {
    let (_hmm, dev) = device(16);
    if !dev.info().capabilities.replayable_faults {
        return; // no pointer can be followed
    }
    let mut fixed = Pages::new(4096);
    fixed.slice::<u32>().fill(1);
    if !lock(fixed.slice::<u32>()) {
        return; // no memory may be locked here: everything moves
    }
    let (mut x, mut y) = (vec![1u32; 3 << 20], vec![2u32; 3 << 20]);
    let place = fixed.start() as usize;
    let go = AtomicBool::new(false);
    let writes = |ctx: &Ctx<'_>| {
        // SAFETY: the page outlives the launch, and only this kernel uses it.
        unsafe { ctx.ptr_mut(place as *mut u32).write_volatile(42) };
        until(&go);
        // SAFETY: as above.
        assert_eq!(unsafe { ctx.ptr(place as *const u32).read_volatile() }, 42);
    };
    scope(|scope| {
        scope.launch(&dev, &writes, 1, args![inout(&mut x)]);
        std::thread::sleep(Duration::from_millis(50));
        scope.launch(&dev, &increment, groups(3 << 20), args![inout(&mut y)]);
        std::thread::sleep(Duration::from_millis(300));
        go.store(true, Ordering::SeqCst);
    })
    .unwrap();
    assert_eq!(fixed.slice::<u32>()[0], 42);
    assert!(y.iter().all(|&y| y == 3));
}

/// A launch had its snapshots of what cannot move, and failed at the rest. Nobody would have ended those that it had not noted yet, and another device would have waited for them for ever.
fn a_launch_that_fails_on_the_way_leaves_no_snapshot() {
    let (hmm, one) = device(16);
    let two = hmm.soft("two").memory(16 << 20).threads(1).open().unwrap();
    let file = memfd();
    file.set_len(8 << 20).unwrap();
    let at = std::mem::ManuallyDrop::new(Pages::huge(8 << 20)).start(); // whole blocks: what lies beside it may be on another device
    // SAFETY: the place of a mapping that nobody uses, and where this one stays; where the file ends nobody looks.
    let stays = unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mmap(at.cast(), 8 << 20, access, libc::MAP_PRIVATE | libc::MAP_FIXED, file.as_raw_fd(), 0), at.cast());
        std::slice::from_raw_parts_mut(at.cast::<u32>(), 2 << 20)
    };
    stays.fill(1);

    // What a lease has does not leave, and is not counted before. What is only written gets its room last: there is none for `large`, of which the launch hears before it has noted any
    // snapshot of the other.
    let (mut held, mut large) = (vec![1u32; 1 << 20], vec![1u32; 1 << 20]);
    let lease = one.acquire(args![inout(&mut held)]).unwrap();
    let error = one.run(&increment, 1, args![out(&mut large), inout(stays)]).unwrap_err();
    assert!(matches!(error, Error::NoRoom { .. }), "{error}");
    two.run(&increment, groups(stays.len()), args![inout(stays)]).unwrap();
    assert!(stays.iter().all(|&x| x == 2));
    drop(lease);

    // Blocks before the one where the file ends have their snapshots, and are noted.
    file.set_len(5 << 20).unwrap();
    let error = one.run(&increment, 1, args![inout(stays)]).unwrap_err();
    assert!(matches!(error, Error::Gone { .. }), "{error}");
    file.set_len(8 << 20).unwrap();
    two.run(&increment, groups(1 << 20), args![inout(&mut stays[..1 << 20])]).unwrap();
    assert!(stays[..1 << 20].iter().all(|&x| x == 3));
}

/// On a device that cannot fetch pages again a write ends the copies of its block, but for those that the running launch reads.
fn a_write_beside_what_a_running_launch_reads() {
    let (hmm, _dev) = device(16);
    let dev = hmm.soft("plain").memory(16 << 20).threads(1).replayable_faults(false).open().unwrap();
    let mut memory = Pages::huge(2 << 20);
    memory.slice::<u32>().fill(3);
    let (reads, writes) = memory.slice::<u32>().split_at_mut(1 << 18);
    let (running, go) = (AtomicBool::new(false), AtomicBool::new(false));
    dev.run(&|_: &Ctx<'_>| {}, 1, args![inp(reads), inp(writes)]).unwrap();
    let kernel = |ctx: &Ctx<'_>| {
        running.store(true, Ordering::SeqCst);
        until(&go);
        assert!(ctx.inp::<u32>(0).iter().all(|&x| x == 3));
    };
    std::thread::scope(|threads| {
        let (dev, kernel, reads) = (&dev, &kernel, &*reads);
        let launch = threads.spawn(move || dev.run(kernel, 1, args![inp(reads)]));
        until(&running);
        write(&mut writes[1000], 4);
        go.store(true, Ordering::SeqCst);
        launch.join().unwrap().unwrap();
    });
    assert_eq!((reads[1000], writes[1000]), (3, 4));
}

/// A kernel wrote what the program may only read, and what a lease reads: the copy that it wrote to became a snapshot, the end of the lease left it there, and another device waited for
/// its end for ever.
fn a_kernel_writes_what_a_lease_reads() {
    let (hmm, one) = device(16);
    if !one.info().capabilities.replayable_faults {
        return; // no pointer can be followed
    }
    let two = hmm.soft("two").memory(16 << 20).threads(1).open().unwrap();
    for at in [100, 800_000] {
        let mut memory = Pages::huge(6 << 20);
        memory.slice::<u32>().fill(3);
        // SAFETY: nobody writes it from now on, but for the kernel that fails.
        unsafe { protect(memory.slice::<u32>(), libc::PROT_READ) };
        let words = &*memory.slice::<u32>();
        let place = &raw const words[at] as usize;
        let lease = one.acquire(args![inp(words)]).unwrap();
        // SAFETY: it is refused.
        let writes = move |ctx: &Ctx<'_>| unsafe { ctx.ptr_mut(place as *mut u32).write_volatile(4) };
        assert!(matches!(one.run(&writes, 1, args![]), Err(Error::Kernel(_))));
        drop(lease);
        let looks = |ctx: &Ctx<'_>| assert!(ctx.inp::<u32>(0).iter().all(|&x| x == 3));
        two.run(&looks, 1, args![inp(words)]).unwrap();
        one.run(&looks, 1, args![inp(words)]).unwrap();
    }
}
