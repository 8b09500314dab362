//! Leases: what is acquired stays on the device for who works there by himself, and comes back when it is released.

use crate::harness::*;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, Device, Error, args, fence, inout, inp, out, ptr};

crate::tests![
    what_is_leased_stays_until_it_is_released,
    a_touch_waits_for_the_fence,
    a_fence_that_came_before,
    neighbours_on_one_page,
    pointers_to_what_lies_beside_a_lease,
    what_a_lease_has_is_no_others,
    a_released_lease_is_waited_for,
    a_kernel_under_a_lease,
    what_a_kernel_under_a_lease_writes_where_nothing_moves,
    a_large_launch_beside_a_lease,
    a_write_to_what_is_leased_for_reading_waits,
    nothing_but_its_end_makes_a_lease_leave,
    a_lease_of_a_part_of_a_huge_page,
    a_fork_under_a_lease,
    a_forgotten_lease_ends_with_its_device,
    as_many_leases_as_there_can_be,
    leases_beside_launches_and_touches,
];

/// Adds to each of `count` words at a device's address, as a queue of the program's own would.
fn add_there(at: usize, count: usize, add: u32) {
    for i in 0..count {
        // SAFETY: the words are leased and resident at the device's address, and nobody else uses them.
        unsafe {
            let word = (at as *mut u32).add(i);
            word.write(word.read().wrapping_add(add));
        }
    }
}

fn what_is_leased_stays_until_it_is_released() {
    let (_hmm, dev) = device(64);
    let a: Vec<u32> = (0..1 << 20).collect();
    let mut r = vec![7u32; 1 << 20];
    let inside = r[2000..r.len() - 2000].as_ptr_range();
    let (probe, last) = (inside.start as usize, inside.end as usize);
    let full = uhmm::Uhmm::new().unwrap().mode() == uhmm::Mode::Full;
    for round in 0..3u32 {
        let lease = dev.acquire(args![out(&mut r), inp(&a), 5u32]).unwrap();
        let gone = || (probe..last).step_by(4096).all(|at| !present(at as *const u8));
        assert_eq!(gone(), full, "written memory is the device's");
        let (to, from) = (lease.addr(0) as *mut u32, lease.addr(1) as *const u32);
        for i in 0..1 << 20 {
            // SAFETY: both are leased.
            unsafe { to.add(i).write(from.add(i).read() * 2 + round) };
        }
        assert_eq!(a[77], 77, "what is read stays readable");
        assert_eq!(gone(), full);
        drop(lease);
        assert!(r.iter().enumerate().all(|(i, &x)| x == 2 * i as u32 + round));
    }
    let lease = dev.acquire(args![inp(&a), 1u32]).unwrap();
    assert!(std::panic::catch_unwind(AssertUnwindSafe(|| lease.addr(1))).is_err(), "a value has no address");
    assert!(std::panic::catch_unwind(AssertUnwindSafe(|| lease.addr(2))).is_err());
}

fn a_touch_waits_for_the_fence() {
    let (hmm, dev) = device(64);
    let mut data = vec![1u32; 1 << 20];
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    let at = lease.addr(0);
    let (done, signal) = fence();
    // SAFETY: the memory stays, and whoever touches it waits, or does not care.
    unsafe { lease.release(done.clone()) };
    let touched = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            let seen = data[500_000];
            touched.store(true, Ordering::SeqCst);
            seen
        });
        std::thread::sleep(Duration::from_millis(200));
        // Without userfaultfd for the kernel's own accesses the program's pages stay, and show what was there.
        if hmm.mode() == uhmm::Mode::Full {
            assert!(!touched.load(Ordering::SeqCst) && !done.is_done(), "the device is not done");
        }
        add_there(at, 1 << 20, 41);
        signal.done();
        let seen = toucher.join().unwrap();
        assert!(seen == 42 || hmm.mode() != uhmm::Mode::Full, "{seen}");
    });
    assert!(done.is_done());
    assert!(data.iter().all(|&x| x == 42));
}

fn a_fence_that_came_before() {
    let (_hmm, dev) = device(64);
    let mut data = vec![1u32; 1 << 16];
    let (done, signal) = fence();
    drop(signal);
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    add_there(lease.addr(0), 1 << 16, 1);
    // SAFETY: the signal has come.
    unsafe { lease.release(done) };
    assert!(data.iter().all(|&x| x == 2));
}

/// Three small arrays on one page: two are leased, one after the other, a launch uses the third, and the CPU writes in between. Each sees its own
/// bytes as they were when it began, and leaves the others' alone.
fn neighbours_on_one_page() {
    let (_hmm, dev) = device(16);
    let mut page = Pages::new(3 * 4096);
    let words = page.slice::<u32>();
    let (a, rest) = words.split_at_mut(100);
    let (b, rest) = rest.split_at_mut(2000);
    let (c, d) = rest.split_at_mut(100);
    for round in 0..20u32 {
        a.fill(round);
        b.fill(round + 1);
        c.fill(round + 2);
        let first = dev.acquire(args![inout(a)]).unwrap();
        b.fill(round + 10); // after the snapshot of its neighbour
        c.fill(round + 20);
        let second = dev.acquire(args![inout(b)]).unwrap();
        dev.run(&increment, groups(c.len()), args![inout(c)]).unwrap();
        assert!(c.iter().all(|&x| x == round + 21), "{round}: {:?}", &c[..4]);
        c.fill(round + 30);
        d[0] = round;
        add_there(second.addr(0), 2000, 100);
        add_there(first.addr(0), 100, 200);
        if round % 2 == 0 {
            drop(first);
            assert!(a.iter().all(|&x| x == round + 200), "{round}: {:?}", &a[..4]);
            a.fill(round + 300);
            drop(second);
            assert!(a.iter().all(|&x| x == round + 300), "{round}: an earlier lease's bytes were written again");
        } else {
            drop(second);
            drop(first);
            assert!(a.iter().all(|&x| x == round + 200), "{round}: {:?}", &a[..4]);
        }
        assert!(b.iter().all(|&x| x == round + 110), "{round}: {:?}", &b[..4]);
        assert!(c.iter().all(|&x| x == round + 30) && d[0] == round, "{round}: a neighbour was written");
    }
}

/// A lease has a snapshot of a page of which it covers a part. Kernels that follow a pointer to the rest of it found what was there when the lease was made, and
/// what they wrote there was lost.
fn pointers_to_what_lies_beside_a_lease() {
    let (_hmm, dev) = device(16);
    if !dev.info().capabilities.replayable_faults {
        return; // no pointer can be followed
    }
    let mut page = Pages::new(4096);
    let (leased, beside) = page.slice::<u32>().split_at_mut(500);
    let (low, beside) = (&mut leased[100..], beside);
    beside.fill(1);
    let at = beside.as_mut_ptr();
    let (first, last) = (at as usize, at.wrapping_add(523) as usize);
    let lease = dev.acquire(args![inout(low)]).unwrap();
    for round in 0..10u32 {
        // SAFETY: nobody else uses these words now.
        unsafe { at.write_volatile(round * 10) };
        let follow = move |ctx: &Ctx<'_>| {
            // SAFETY: the page outlives the launch, and only this kernel uses these words meanwhile.
            unsafe {
                assert_eq!(ctx.ptr(first as *const u32).read_volatile(), round * 10, "what the CPU wrote");
                ctx.ptr_mut(last as *mut u32).write_volatile(round + 5);
            }
        };
        if round % 2 == 0 {
            dev.run(&follow, 1, args![1u32]).unwrap();
        } else {
            lease.run(&follow, 1).unwrap();
        }
        // SAFETY: as above.
        assert_eq!(unsafe { (last as *const u32).read_volatile() }, round + 5, "what the kernel wrote");
        add_there(lease.addr(0), 400, 1);
        // SAFETY: as above. It must not be written again when the lease ends.
        unsafe { (last as *mut u32).write_volatile(77) };
    }
    drop(lease);
    assert!(low.iter().all(|&x| x == 10));
    assert_eq!((beside[0], beside[1], beside[523]), (90, 1, 77));
}

/// The same memory twice, as only a program with raw pointers can ask for it.
fn twice<T>(data: &mut [T]) -> (&'static mut [T], &'static mut [T]) {
    // SAFETY: the caller uses one at a time; the memory outlives the test's use.
    unsafe { (&mut *std::ptr::from_mut(data), &mut *std::ptr::from_mut(data)) }
}

fn what_a_lease_has_is_no_others() {
    let (hmm, dev) = device(64);
    let other = hmm.soft("other").memory(64 << 20).threads(1).open().unwrap();
    let mut data = Pages::new(8 << 20);
    let (mine, theirs) = twice(data.slice::<u32>());
    let (size, quarter) = (mine.len(), mine.len() / 4);
    let (written, read) = mine.split_at_mut(quarter);
    let lease = dev.acquire(args![inout(written)]).unwrap();
    let read = dev.acquire(args![inp(&read[size / 2 - quarter..])]).unwrap();
    let busy = |result: Result<(), Error>, index: usize| match result {
        Err(Error::Busy { index: at, device, .. }) => assert_eq!((at, device), (index, dev.name())),
        other => panic!("{other:?}"),
    };
    let noop = |_: &Ctx<'_>| {};
    busy(dev.run(&noop, 1, args![1u32, inp(&theirs[quarter - 1..quarter])]), 1);
    busy(dev.acquire(args![out(&mut theirs[..1])]).map(drop), 0);
    busy(dev.run(&noop, 1, args![inout(&mut theirs[size - 1..])]), 0);
    dev.run(&noop, 1, args![inp(&theirs[size / 2..])]).unwrap(); // two may read
    // On another device nothing of the same block.
    busy(other.run(&noop, 1, args![inp(&theirs[..1])]), 0);
    busy(other.acquire(args![inp(&theirs[size - 1..])]).map(drop), 0);
    // SAFETY: the kernel touches nothing.
    assert!(matches!(dev.acquire(args![unsafe { ptr(theirs.as_ptr()) }]), Err(Error::LeasedPointer { index: 0 })));
    drop((lease, read));
    other.run(&noop, 1, args![inout(theirs)]).unwrap();
}

fn a_released_lease_is_waited_for() {
    let (hmm, dev) = device(64);
    let other = hmm.soft("other").memory(64 << 20).threads(1).open().unwrap();
    let mut data = vec![0u32; 1 << 20];
    let (mine, theirs) = twice(&mut data);
    for dev_of_the_launch in [&dev, &other] {
        let lease = dev.acquire(args![inout(&mut *mine)]).unwrap();
        let at = lease.addr(0);
        let (done, signal) = fence();
        // SAFETY: the memory stays, and is not touched before the signal.
        unsafe { lease.release(done) };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                add_there(at, 1 << 20, 10);
                signal.done();
            });
            dev_of_the_launch.run(&increment, groups(theirs.len()), args![inout(&mut *theirs)]).unwrap();
        });
        assert!(theirs.iter().all(|&x| x == 11), "{:?}", &theirs[..4]);
        theirs.fill(0);
    }
}

fn a_kernel_under_a_lease() {
    let (_hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..300_000).collect();
    let fetched = vec![3u32; 100_000];
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    let before = dev.stats();
    for _ in 0..5 {
        lease.run(&increment, groups(300_000)).unwrap();
    }
    let moved = dev.stats() - before;
    // But for what lies beside on the pages at the ends, which kernels could follow a pointer to.
    assert!(moved.bytes_to_device <= 5 * 2 * 4096 && moved.bytes_to_cpu == 0, "everything is there: {moved:?}");
    if dev.info().capabilities.replayable_faults {
        let at = fetched.as_ptr() as usize;
        // SAFETY: the vector outlives the launch, which reads it.
        let follow = move |ctx: &Ctx<'_>| assert_eq!(unsafe { *ctx.ptr(at as *const u32).add(70_000) }, 3);
        lease.run(&follow, 1).unwrap();
    }
    let fails = |_: &Ctx<'_>| panic!("on purpose");
    assert!(matches!(lease.run(&fails, 1), Err(Error::Kernel(_))));
    assert!(matches!(lease.run(&increment, 0), Err(Error::Grid(_))));
    lease.run(&increment, groups(300_000)).unwrap();
    drop(lease);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 6));
    assert!(fetched.iter().all(|&x| x == 3));
}

/// A kernel has snapshots of what must stay in the program: what it wrote there is the program's when its run has ended, not when a later launch has.
fn what_a_kernel_under_a_lease_writes_where_nothing_moves() {
    let (_hmm, dev) = device(16);
    if !dev.info().capabilities.replayable_faults {
        return; // no pointer can be followed
    }
    let mut fixed = Pages::new(4096);
    if !lock(fixed.slice::<u32>()) {
        return; // no memory may be locked here: everything moves
    }
    let mut data = vec![0u32; 1000];
    let place = fixed.start() as usize;
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    for round in 1..4 {
        // SAFETY: the page outlives the launch, and only this kernel uses it.
        let writes = |ctx: &Ctx<'_>| unsafe { ctx.ptr_mut(place as *mut u32).write_volatile(round) };
        lease.run(&writes, 1).unwrap();
        assert_eq!(read(&fixed.slice::<u32>()[0]), round);
    }
}

/// A large argument and a lease share a page. When the launch had ended it would have kept that page for itself; a touch of what lies beside would have brought
/// it home, away from who uses the lease.
fn a_large_launch_beside_a_lease() {
    let (_hmm, dev) = device(16);
    let mut memory = Pages::new(64 * 4096);
    let len = 40 * 1024 + 100;
    let (large, rest) = memory.slice::<u32>().split_at_mut(len);
    let (leased, beside) = rest.split_at_mut(200);
    let lease = dev.acquire(args![inout(leased)]).unwrap();
    for round in 1..4 {
        dev.run(&increment, groups(len), args![inout(large)]).unwrap();
        add_there(lease.addr(0), 200, 1);
        write(&mut beside[0], round);
        add_there(lease.addr(0), 200, 1);
        assert_eq!((read(&large[len - 1]), read(&beside[0])), (round, round));
        add_there(lease.addr(0), 200, 1);
    }
    drop(lease);
    assert!(leased.iter().all(|&x| x == 9) && large.iter().all(|&x| x == 3) && beside[0] == 3);
}

fn a_write_to_what_is_leased_for_reading_waits() {
    let (hmm, dev) = device(16);
    let mut data = Pages::new(1 << 20);
    data.slice::<u32>().fill(5);
    let (mine, theirs) = twice(data.slice::<u32>());
    let lease = dev.acquire(args![inp(mine)]).unwrap();
    let at = lease.addr(0) as *const u32;
    let (done, signal) = fence();
    // SAFETY: whoever writes the memory waits.
    unsafe { lease.release(done) };
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write(&mut theirs[1000], 6));
        std::thread::sleep(Duration::from_millis(100));
        // SAFETY: the device's address is good until the signal.
        assert_eq!(unsafe { at.add(1000).read_volatile() }, 5);
        // Elsewhere the program's page is written beside the device's copy.
        assert!(!writer.is_finished() || hmm.mode() != uhmm::Mode::Full);
        signal.done();
    });
    assert_eq!(data.slice::<u32>()[1000], 6);
}

/// Eviction, by hand, for all, for want of room, and by a signal's handler.
fn nothing_but_its_end_makes_a_lease_leave() {
    let (hmm, dev) = device(16);
    hmm.evict_on_signal(libc::SIGUSR1).unwrap();
    let mut data = Pages::new(6 << 20);
    data.slice::<u32>().fill(1);
    let (mine, theirs) = twice(data.slice::<u32>());
    let mut large: Vec<u32> = vec![0; 2 << 20];
    let lease = dev.acquire(args![inout(mine)]).unwrap();
    let at = lease.addr(0);
    for round in 0..10 {
        dev.run(&increment, groups(large.len()), args![inout(&mut large)]).unwrap();
        match round % 4 {
            0 => dev.evict(theirs).unwrap(),
            1 => hmm.evict_all().unwrap(),
            2 => assert_eq!(raise(libc::SIGUSR1), 0),
            _ => dev.prefetch(&large[..1 << 20]).unwrap(),
        }
        assert_eq!(pages_present(theirs), 0, "round {round}");
        add_there(at, theirs.len(), 1);
        assert!(large.iter().all(|&x| x == round + 1));
    }
    let mut more = vec![0u32; 3 << 20];
    assert!(matches!(dev.run(&increment, groups(more.len()), args![inout(&mut more)]), Err(Error::NoRoom { .. })));
    drop(lease);
    assert!(theirs.iter().all(|&x| x == 11));
    dev.run(&increment, groups(more.len()), args![inout(&mut more)]).unwrap();
}

fn a_fork_under_a_lease() {
    let (_hmm, dev) = device(64);
    let mut data = vec![5u32; 1 << 20];
    let mut other = vec![6u32; 1 << 20];
    dev.run(&increment, groups(other.len()), args![inout(&mut other)]).unwrap();
    let (mine, theirs) = twice(&mut data);
    let lease = dev.acquire(args![inout(mine)]).unwrap();
    add_there(lease.addr(0), 1 << 20, 1);
    for raw in [false, true] {
        let child = fork(raw, || {
            let right = theirs.iter().all(|&x| x == 6 || x == 5) && other.iter().all(|&x| x == 7);
            // SAFETY: the child's copy of the value is dropped once. What the child has inherited is of no use, and harmless.
            drop(unsafe { std::ptr::read(&lease) });
            right
        });
        assert_eq!(wait(child), 0);
    }
    add_there(lease.addr(0), 1 << 20, 1);
    drop(lease);
    assert!(theirs.iter().all(|&x| x == 7));
}

fn a_forgotten_lease_ends_with_its_device() {
    let (hmm, _dev) = device(64);
    let second = hmm.soft("second").memory(32 << 20).threads(1).open().unwrap();
    let mut data = vec![5u32; 1 << 20];
    let mut small = vec![5u32; 30];
    {
        let lease = second.acquire(args![inout(&mut data), inout(&mut small)]).unwrap();
        add_there(lease.addr(0), 1 << 20, 1);
        add_there(lease.addr(1), 30, 1);
        std::mem::forget(lease);
    }
    let small_again = small.iter().all(|&x| x == 5);
    drop(second);
    assert!(small_again && small.iter().all(|&x| x == 5), "nothing is written where somebody else's data may be by now");
    assert!(data[1..].iter().all(|&x| x == 6 || x == 5));
    let again = hmm.soft("second").memory(16 << 20).threads(1).open().unwrap();
    again.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
}

fn as_many_leases_as_there_can_be() {
    let (_hmm, dev) = device(64);
    let mut all = vec![[0u32; 5000]; 65];
    let (last, rest) = all.split_last_mut().unwrap();
    let mut leases: Vec<_> = rest.iter_mut().map(|data| dev.acquire(args![inout(&mut data[..])]).unwrap()).collect();
    assert!(matches!(dev.acquire(args![inout(&mut last[..])]), Err(Error::TooMany { most: 64, .. })));
    assert!(matches!(dev.run(&increment, 1, args![inout(&mut last[..])]), Err(Error::TooMany { .. })));
    leases.pop();
    dev.run(&increment, groups(last.len()), args![inout(&mut last[..])]).unwrap();
    for lease in &leases {
        add_there(lease.addr(0), 5000, 3);
    }
    drop(leases);
    assert!(all[..63].iter().flatten().all(|&x| x == 3) && all[63][0] == 0 && all[64].iter().all(|&x| x == 1));
}

/// Threads with arrays of their own, side by side on one heap, lease them, launch over them, touch them, and evict what they can: nothing is lost.
fn leases_beside_launches_and_touches() {
    let (hmm, dev) = device(32);
    let end = Instant::now() + seconds(5);
    let turns = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (hmm, dev, turns) = (&hmm, &dev, &turns);
            scope.spawn(move || one_of_them(hmm, dev, thread, end, turns));
        }
    });
    let turns = turns.into_inner();
    assert!(turns > 50, "only {turns} turns");
}

fn one_of_them(hmm: &uhmm::Uhmm, dev: &Device, thread: u64, end: Instant, turns: &AtomicU32) {
    let mut random = fastrand::Rng::with_seed(thread);
    let mut arrays: Vec<(Vec<u32>, u32)> = (0..6).map(|_| (vec![0; random.usize(1..200_000)], 0)).collect();
    while Instant::now() < end {
        let (data, value) = random.choice(&mut arrays).map_or_else(|| unreachable!(), |pair| (&mut pair.0, &mut pair.1));
        let len = data.len();
        match random.u32(..6) {
            0 => {
                let lease = dev.acquire(args![inout(data)]).unwrap();
                add_there(lease.addr(0), len, 1);
                if random.bool() {
                    lease.run(&increment, groups(len)).unwrap();
                    *value += 1;
                }
                *value += 1;
            }
            1 => {
                let lease = dev.acquire(args![inout(data)]).unwrap();
                let at = lease.addr(0);
                let (done, signal) = fence();
                // SAFETY: the array is not touched before the signal.
                unsafe { lease.release(done) };
                add_there(at, len, 1);
                signal.done();
                *value += 1;
            }
            2 | 3 => {
                dev.run(&increment, groups(len), args![inout(data)]).unwrap();
                *value += 1;
            }
            4 => {
                data.iter_mut().for_each(|x| *x += 1);
                *value += 1;
            }
            _ if random.u32(..4) == 0 => hmm.evict_all().unwrap(),
            _ => dev.evict(data).unwrap(),
        }
        let at = random.usize(..len);
        assert_eq!(data[at], *value, "element {at} of {len}");
        turns.fetch_add(1, Ordering::Relaxed);
    }
    for (data, value) in &arrays {
        assert!(data.iter().all(|x| x == value));
    }
}

/// A device's huge page that a lease has a part of was taken out of the page table as a whole, and who worked there by himself got a signal.
fn a_lease_of_a_part_of_a_huge_page() {
    let (_hmm, dev) = device(16);
    let mut memory = Pages::huge(2 << 20);
    for round in 1..=3u32 {
        dev.prefetch(memory.slice::<u32>()).unwrap(); // as one unit
        let (mine, other) = memory.slice::<u32>().split_at_mut(1 << 18);
        let lease = dev.acquire(args![inout(mine)]).unwrap();
        add_there(lease.addr(0), 1 << 18, 1);
        other.iter_mut().for_each(|x| *x += 1); // which comes home for it
        add_there(lease.addr(0), 1 << 18, 1);
        drop(lease);
        assert!(mine.iter().all(|&x| x == 2 * round) && other.iter().all(|&x| x == round));
    }
}
