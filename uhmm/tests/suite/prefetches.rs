//! Prefetches that go on in the background, and their fences. Where a page is, the kernel is asked.

use crate::harness::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use uhmm::{Ctx, Error, Place, To, args, inout};

crate::tests![
    a_prefetch_goes_on_in_the_background,
    a_prefetch_takes_what_it_says_and_no_more,
    errors_of_a_prefetch_come_from_its_fence,
    what_was_unmapped_is_not_prefetched,
    a_prefetch_takes_nothing_from_another_devices_kernel,
    nothing_goes_to_a_device_that_was_removed,
    a_launch_does_not_wait_for_all_of_a_prefetch,
    prefetches_that_nobody_waits_for,
    forks_among_prefetches,
];

const PAGE: usize = 4096;

/// Runs `f` while a kernel runs on a device, over memory of its own.
fn during_a_launch<R>(dev: &uhmm::Device, f: impl FnOnce() -> R) -> R {
    let (running, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut data = vec![0u8; 100_000];
    let kernel = |_: &Ctx<'_>| {
        running.store(true, Ordering::Release);
        while !stop.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let launch = scope.spawn(|| dev.run(&kernel, 1, args![inout(&mut data)]).unwrap());
        while !running.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        stop.store(true, Ordering::Release);
        launch.join().unwrap();
        result.unwrap()
    })
}

fn a_prefetch_goes_on_in_the_background() {
    let (hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..6_000_000).collect();
    let all = pages_present(&data);
    for round in 0..3 {
        // While a launch runs it cannot be done; that it returned shows that nobody waited.
        let fence = during_a_launch(&dev, || {
            let fence = hmm.prefetch(&data, To::Device(&dev)).unwrap();
            assert!(!fence.is_done());
            assert_eq!(pages_present(&data), all, "round {round}");
            fence
        });
        while !fence.is_done() {
            std::thread::yield_now();
        }
        assert_eq!(pages_present(&data), 0, "round {round}");
        fence.wait().unwrap();
        let before = dev.stats();
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        let moved = dev.stats() - before;
        assert!(moved.bytes_to_device <= 4 * PAGE as u64, "all but the edges was there already: {moved:?}");
        hmm.prefetch(&data, To::Home).unwrap().wait().unwrap();
        assert_eq!(pages_present(&data), all);
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + round + 1));
    }
}

fn a_prefetch_takes_what_it_says_and_no_more() {
    let (hmm, dev) = device(64);
    let mut pages = Pages::new(8 << 20);
    let data = pages.slice::<u8>();
    data.fill(1);
    let there = |data: &[u8]| -> Vec<bool> { data.chunks(PAGE).map(|page| present(page.as_ptr())).collect() };
    for (from, to) in [(1, 8 << 20), (5 * PAGE - 1, 9 * PAGE + 1), (0, PAGE), (7, 4000), (PAGE - 1, PAGE + 1), (3 << 20, 5 << 20)] {
        hmm.prefetch(&data[from..to], To::Device(&dev)).unwrap().wait().unwrap();
        let gone = from.next_multiple_of(PAGE)..to / PAGE * PAGE;
        let right = there(data).iter().enumerate().all(|(i, &is)| is != gone.contains(&(i * PAGE)));
        assert!(right, "{from} to {to} to the device");
        hmm.prefetch(&data[..0], To::Home).unwrap().wait().unwrap();
        hmm.prefetch(&*data, To::Device(&dev)).unwrap().wait().unwrap();
        assert_eq!(pages_present(data), 0);
        hmm.prefetch(&data[from..to], To::Home).unwrap().wait().unwrap();
        let back = from / PAGE * PAGE..to.next_multiple_of(PAGE);
        let right = there(data).iter().enumerate().all(|(i, &is)| is == back.contains(&(i * PAGE)));
        assert!(right, "{from} to {to} home");
        dev.evict(data).unwrap();
    }
    assert!(data.iter().all(|&x| x == 1));
}

fn errors_of_a_prefetch_come_from_its_fence() {
    let (hmm, dev) = device(16);
    let large = vec![1u8; 17 << 20];
    let mut small = vec![1u8; 1 << 20];
    let fence = hmm.prefetch(&large, To::Device(&dev)).unwrap();
    hmm.prefetch(&small, To::Device(&dev)).unwrap().wait().unwrap();
    assert!(fence.is_done(), "they come in order");
    assert!(matches!(fence.wait(), Err(Error::TooLarge { .. })));
    assert!(pages_present(&large) >= (17 << 8) - 1, "nothing has moved");
    let buffer = dev.alloc::<u8>(15 << 20).unwrap();
    let medium = vec![1u8; 4 << 20];
    let error = hmm.prefetch(&medium, To::Device(&dev)).unwrap().wait().unwrap_err();
    assert!(matches!(error, Error::NoRoom { .. }), "{error}");
    assert!(medium.iter().all(|&x| x == 1));
    drop(buffer);
    let refused = AtomicUsize::new(0);
    let fence = Mutex::new(Some(hmm.prefetch(&medium, To::Home).unwrap()));
    let kernel = |_: &Ctx<'_>| {
        let asked = hmm.prefetch(&medium, To::Home);
        let waited = fence.lock().unwrap().take().unwrap().wait();
        let both = matches!(asked, Err(Error::Reentrant)) && matches!(waited, Err(Error::Reentrant));
        refused.store(usize::from(both), Ordering::Release);
    };
    dev.run(&kernel, 1, args![inout(&mut small)]).unwrap();
    assert_eq!(refused.load(Ordering::Acquire), 1);
    // A device that is closed while something is still to go there.
    let mut data = vec![3u8; 40 << 20];
    let mut closed = 0;
    for round in 0..200 {
        let second = hmm.soft("second").memory(48 << 20).threads(1).open().unwrap();
        data[round] = 4;
        let fence = hmm.prefetch(&data, To::Device(&second)).unwrap();
        drop(second);
        match fence.wait() {
            Ok(()) => {}
            Err(Error::Closed { device: "second" }) => closed += 1,
            Err(e) => panic!("{e}"),
        }
        assert!(data.iter().enumerate().all(|(i, &x)| x == if i <= round { 4 } else { 3 }), "round {round}");
        if closed == 3 {
            return;
        }
    }
    panic!("no prefetch was overtaken");
}

/// It waits for the end of the launch: the kernel would fetch its memory again, and so on.
fn a_prefetch_takes_nothing_from_another_devices_kernel() {
    let (hmm, one) = device(16);
    let two = hmm.soft("two").memory(16 << 20).threads(1).open().unwrap();
    let mut data = vec![1u32; 1 << 20];
    let (running, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let kernel = |_: &Ctx<'_>| {
        running.store(true, Ordering::Release);
        std::thread::sleep(std::time::Duration::from_millis(100));
        ended.store(true, Ordering::Release);
    };
    let (start, end) = (data.as_ptr() as usize, data.as_ptr_range().end as usize);
    std::thread::scope(|scope| {
        let (two, kernel, data) = (&two, &kernel, &mut data);
        scope.spawn(move || two.run(kernel, 1, args![inout(data)]).unwrap());
        while !running.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        one.prefetch_range(start, end - start).unwrap();
        assert!(ended.load(Ordering::Acquire), "the kernel was running");
    });
    assert_eq!(hmm.residency(start..end).unwrap().on("two"), 0);
}

/// It is removed while something goes there: what has gone is home when that returns, and the rest stays.
fn nothing_goes_to_a_device_that_was_removed() {
    let hmm = uhmm::Uhmm::new().unwrap();
    let data = vec![3u8; 80 << 20];
    let all = pages_present(&data);
    let mut random = fastrand::Rng::with_seed(1);
    let mut overtaken = 0;
    for round in 0..30 {
        let dev = hmm.soft("dev").memory(96 << 20).threads(1).open().unwrap();
        let fence = hmm.prefetch(&data, To::Device(&dev)).unwrap();
        std::thread::sleep(std::time::Duration::from_micros(random.u64(0..20_000)));
        dev.remove().unwrap();
        assert_eq!(pages_present(&data), all, "round {round}");
        match fence.wait() {
            Ok(()) => {}
            Err(Error::DeviceRemoved { device: "dev" }) => overtaken += 1,
            Err(e) => panic!("{e}"),
        }
        let error = hmm.prefetch(&data, To::Device(&dev)).unwrap().wait().unwrap_err();
        assert!(matches!(error, Error::DeviceRemoved { .. }), "{error}");
        assert_eq!(pages_present(&data), all, "round {round}");
    }
    assert!(overtaken > 0, "no prefetch was overtaken");
    assert!(data.iter().all(|&x| x == 3));
}

fn what_was_unmapped_is_not_prefetched() {
    let (hmm, dev) = device(16);
    let mut pages = Pages::new(8 << 20);
    pages.slice::<u8>().fill(1);
    let start = pages.start() as usize;
    let fence = during_a_launch(&dev, || {
        let fence = hmm.prefetch(start..start + (8 << 20), To::Device(&dev)).unwrap();
        // SAFETY: pages that are used no more before others are there.
        unsafe {
            pages.unmap(0, 8 << 20);
            map_at(start + (2 << 20), 2 << 20, libc::MAP_FIXED_NOREPLACE);
            // SAFETY: just mapped.
            std::ptr::write_bytes((start + (2 << 20)) as *mut u8, 9, 2 << 20);
        }
        fence
    });
    fence.wait().unwrap();
    let residency = hmm.residency(start..start + (8 << 20)).unwrap();
    assert_eq!((residency.private(), residency.bytes_where(|place| place == Place::Unmapped)), (2 << 20, 6 << 20));
    // SAFETY: mapped above.
    let new = unsafe { std::slice::from_raw_parts((start + (2 << 20)) as *const u8, 2 << 20) };
    assert!(new.iter().all(|&x| x == 9), "what is there now, and nothing of what was");
    // SAFETY: as above.
    unsafe {
        map_at(start, 2 << 20, libc::MAP_FIXED_NOREPLACE);
        map_at(start + (4 << 20), 4 << 20, libc::MAP_FIXED_NOREPLACE);
    }
    assert!(pages.slice::<u8>()[4 << 20..].iter().all(|&x| x == 0));
}

fn a_launch_does_not_wait_for_all_of_a_prefetch() {
    let (hmm, dev) = device(260);
    let mut pages = Pages::huge(256 << 20);
    let large = pages.slice::<u8>();
    let mut small = vec![1u32; 1000];
    let overtaken = (0..30).any(|_| {
        large.iter_mut().step_by(PAGE).for_each(|x| *x = 1);
        let fence = hmm.prefetch(&*large, To::Device(&dev)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        dev.run(&increment, 1, args![inout(&mut small)]).unwrap();
        let overtaken = !fence.is_done();
        fence.wait().unwrap();
        assert!(pages_present(large) <= 512);
        overtaken
    });
    assert!(overtaken);
    assert!(small.iter().all(|&x| x == small[0]));
}

fn prefetches_that_nobody_waits_for() {
    let data: Vec<u32> = (0..4 << 20).collect();
    let all = pages_present(&data);
    {
        let (hmm, dev) = device(32);
        // More than can wait at once.
        for (i, part) in data.chunks(4001).enumerate() {
            hmm.prefetch(part, if i % 3 == 0 { To::Home } else { To::Device(&dev) }).unwrap();
        }
        hmm.prefetch(&data, To::Device(&dev)).unwrap();
        hmm.prefetch(&data[..1], To::Home).unwrap().wait().unwrap();
        assert!(pages_present(&data) <= 1, "dropping a fence stops nothing");
        for part in data.chunks(200_001) {
            hmm.prefetch(part, To::Home).unwrap();
            hmm.prefetch(part, To::Device(&dev)).unwrap();
        }
    }
    assert_eq!(pages_present(&data), all, "the core has ended, whatever was still to go");
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32));
}

fn forks_among_prefetches() {
    let (hmm, dev) = device(64);
    let data: Vec<u32> = (0..4 << 20).collect();
    for round in 0..10 {
        let fences = [To::Device(&dev), To::Home, To::Device(&dev)].map(|to| hmm.prefetch(&data, to).unwrap());
        let raw = round % 2 == 1;
        let child = fork(raw, || data.iter().enumerate().all(|(i, &x)| x == i as u32));
        assert_eq!(wait(child), 0, "round {round}");
        fences.into_iter().for_each(|fence| fence.wait().unwrap());
        assert!(pages_present(&data) < 8192);
    }
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32));
}
