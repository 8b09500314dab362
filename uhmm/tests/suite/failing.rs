//! Devices that fail, on order: an error, or a page that is poisoned; never wrong data, and never a hang.

use crate::harness::*;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, Error, KernelFault, args, inout, inp, out};
use uhmm_core::args::Args;
use uhmm_core::conformance::{CHECKS, Subject};
use uhmm_core::kernel::{Entry, Kernel};
use uhmm_core::{CoreRef, DeviceConfig, DeviceRef};
use uhmm_faulty::{ALWAYS, Call, Fault, all_well, order, outstanding};

crate::tests![
    a_copy_to_the_device_fails,
    a_copy_to_the_host_fails_once,
    a_page_that_is_not_given_back_is_lost,
    a_touch_of_what_is_not_given_back_raises_a_signal,
    lost_pages_are_remapped_and_unmapped_as_others,
    a_lost_device_keeps_nothing_back_that_the_program_has,
    a_device_is_lost_at_any_time,
    a_device_that_is_lost_while_a_kernel_runs,
    a_fence_that_never_comes,
    no_memory_where_some_was_promised,
    the_page_table_refuses,
    a_device_cannot_run_a_kernel,
    an_orderly_removal,
    without_an_order_it_is_the_other_device,
    a_coherent_device_that_fails_leaves_what_the_program_has,
    a_result_that_is_not_given_back,
    a_twin_that_is_not_given,
    an_edge_that_is_not_taken_back,
    one_of_two_devices_fails,
];

/// A device of `mib` MiB that fails on order.
fn faulty(mib: usize) -> DeviceRef {
    faulty_as(DeviceConfig { memory: mib << 20, threads: 2, ..DeviceConfig::new("faulty") })
}

fn faulty_as(config: DeviceConfig) -> DeviceRef {
    CoreRef::get().unwrap().device(config, uhmm_faulty::around(uhmm_soft::open)).unwrap()
}

fn run<K: Kernel>(dev: &DeviceRef, kernel: &K, groups: usize, args: Args<'_>) -> Result<(), Error> {
    dev.run(Entry::new(kernel), groups.into(), &args)
}

fn add_one(dev: &DeviceRef, data: &mut [u32]) -> Result<(), Error> {
    run(dev, &increment, groups(data.len()), args![inout(data)])
}

fn is(data: &[u32], first: u32) -> bool {
    data.iter().enumerate().all(|(i, &x)| x == first + i as u32)
}

/// How a child ends that touches this.
pub fn touch(at: *const u32) -> Option<i32> {
    // SAFETY: a page of ours; what it raises is the question.
    let child = fork(false, || unsafe { at.read_volatile() } != 12_345);
    let status = wait(child);
    libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
}

/// Every batch to the device in turn fails, for every kind of argument: the launch fails with the device's name, everything reads as before, and the next launch is right.
fn a_copy_to_the_device_fails() {
    let dev = faulty(32);
    let mut a: Vec<u32> = (0..2_000_000).collect();
    let b: Vec<u32> = (7..1_000_007).collect();
    let mut r = vec![0u32; 1_000_000];
    let kernel = |ctx: &Ctx<'_>| {
        let b = ctx.inp::<u32>(1);
        let from = ctx.group() * 1000;
        ctx.out::<u32>(2).chunk(1000).iter_mut().zip(&b[from..]).for_each(|(r, b)| *r = b + 1);
        ctx.out::<u32>(0).chunk(2000).iter_mut().for_each(|a| *a += 1);
    };
    let mut failures = 0;
    for nth in 1.. {
        dev.evict(0, 1 << 47).unwrap();
        let first = a[0];
        order(Call::ToDevice, Fault::Failed, nth, 2);
        let result = run(&dev, &kernel, 1000, args![inout(&mut a), inp(&b), out(&mut r)]);
        let struck = outstanding(Call::ToDevice) < 2;
        all_well();
        if !struck {
            result.unwrap();
            break;
        }
        failures += 1;
        let error = match result {
            // A page at an edge that the device does not take when the launch has ended is home, and all is well.
            Ok(()) => {
                assert!(is(&a, first + 1) && is(&b, 7) && is(&r, 8), "batch {nth}");
                continue;
            }
            Err(error) => error.to_string(),
        };
        assert!(error.contains("device faulty failed") && error.contains("Input/output error"), "{error}");
        assert!(is(&a, first) && is(&b, 7), "batch {nth}: what was read or moved is as before");
        r.fill(0);
        run(&dev, &kernel, 1000, args![inout(&mut a), inp(&b), out(&mut r)]).unwrap();
        assert!(is(&a, first + 1) && is(&b, 7) && is(&r, 8), "batch {nth}: the next launch is right");
    }
    assert!(failures > 4, "{failures}: a launch is several batches");
}

/// A batch from the device that fails once is asked for again: nothing is lost, however the pages come home.
fn a_copy_to_the_host_fails_once() {
    let dev = faulty(32);
    let mut data: Vec<u32> = (0..2_000_000).collect();
    for round in 0..10 {
        add_one(&dev, &mut data).unwrap();
        assert!(pages_present(&data) < 20);
        order(Call::ToHost, Fault::Failed, round % 5 + 1, 1);
        if round % 2 == 0 {
            dev.evict(0, 1 << 47).unwrap();
        }
        assert!(is(&data, round + 1), "round {round}");
        assert_eq!(outstanding(Call::ToHost), 0, "round {round}: it has failed");
    }
    assert_eq!(dev.stats().pages_lost, 0);
}

/// Pages that the device does not give back, asked twice and one by one, are lost: who touches one gets SIGBUS, the others are there. A launch that declares one is
/// refused; dropped, it is memory as any.
fn a_page_that_is_not_given_back_is_lost() {
    let dev = faulty(32);
    let mut memory = Pages::new(4 << 20);
    let data = memory.slice::<u32>();
    data.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
    add_one(&dev, data).unwrap();
    // The batch, again; a run of it, again; and of its pages one by one the first one, again.
    order(Call::ToHost, Fault::Failed, 1, 6);
    let error = dev.evict(data.as_ptr() as usize, data.as_ptr() as usize + 4096).unwrap_err();
    assert!(matches!(error, Error::PagesLost { device: "faulty", pages: 1 }), "{error}");
    assert_eq!((dev.stats().pages_lost, outstanding(Call::ToHost)), (1, 0));
    assert_eq!(touch(&data[5]), Some(libc::SIGBUS), "never zero, and never what it was before");
    assert!(is(&data[1024..], 1025));
    let error = add_one(&dev, data).unwrap_err();
    assert!(matches!(error, Error::PageLost { index: 0, address } if address == data.as_ptr() as usize), "{error}");
    add_one(&dev, &mut data[1024..]).unwrap();
    // A kernel that follows a pointer to it fails.
    let follow = |ctx: &Ctx<'_>| {
        // SAFETY: an element of the data, which nobody else uses.
        std::hint::black_box(unsafe { ctx.pointer::<u32>(0).read_volatile() });
    };
    let error = run(&dev, &follow, 1, args![bare(&mut data[..1])]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::PageLost { .. })), "{error}");
    advise(&mut data[..1024], libc::MADV_DONTNEED);
    assert!(data[..1024].iter().all(|&x| x == 0), "given up, it is new");
    add_one(&dev, data).unwrap();
    assert!(data[..1024].iter().all(|&x| x == 1) && is(&data[1024..], 1027));
}

/// The same found out by a touch: the toucher gets SIGBUS, and so does whoever comes later, also when uhmm has ended.
fn a_touch_of_what_is_not_given_back_raises_a_signal() {
    let dev = faulty(32);
    let mut memory = Pages::huge(4 << 20);
    let data = memory.slice::<u32>();
    data.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
    add_one(&dev, data).unwrap();
    order(Call::ToHost, Fault::Failed, 1, ALWAYS);
    static CAUGHT: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn caught(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel gives a whole structure.
        CAUGHT.store(unsafe { (*info).si_addr() } as usize, Ordering::SeqCst);
        loop {
            // Its thread has no way on.
            // SAFETY: it only waits.
            unsafe { libc::pause() };
        }
    }
    // SAFETY: it stores a number and waits.
    unsafe { handle(libc::SIGBUS, Handler::Info(caught), libc::SA_SIGINFO) };
    let at = &raw const data[700_000] as usize;
    // SAFETY: an element of the data.
    std::thread::spawn(move || unsafe { (at as *const u32).read_volatile() });
    let start = Instant::now();
    while CAUGHT.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the toucher hangs");
    }
    assert_eq!(CAUGHT.load(Ordering::SeqCst) & !4095, at & !4095);
    all_well();
    assert_eq!(data[0], 1, "what was not asked for in vain is there");
    // SAFETY: the default again.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    drop(dev);
    assert_eq!(touch(at as *const u32), Some(libc::SIGBUS), "uhmm has ended");
}

/// Lost pages stay lost at the place that mremap gives them, also for the next launch; unmapped and mapped anew they are memory as any.
fn lost_pages_are_remapped_and_unmapped_as_others() {
    let dev = faulty(32);
    let mut memory = Pages::new(1 << 20);
    let data = memory.slice::<u32>();
    data.fill(3);
    add_one(&dev, data).unwrap();
    order(Call::ToHost, Fault::Failed, 1, ALWAYS);
    let n = data.len() as u64 / 1024;
    let error = dev.evict(0, 1 << 47).unwrap_err();
    assert!(matches!(error, Error::PagesLost { pages, .. } if pages == n), "{error}");
    all_well();
    assert!(memory.resize(9 << 20), "{}", std::io::Error::last_os_error());
    let data = memory.slice::<u32>();
    assert_eq!((touch(&data[0]), touch(&data[200_000]), data[300_000]), (Some(libc::SIGBUS), Some(libc::SIGBUS), 0));
    let error = add_one(&dev, data).unwrap_err();
    assert!(matches!(error, Error::PageLost { .. }), "{error}");
    map_anew(data);
    add_one(&dev, data).unwrap();
    assert!(data.iter().all(|&x| x == 1));
    assert_eq!(dev.stats().pages_lost, n);
}

/// A device is lost between two launches. What the program had a copy of is there, what only the device had raises SIGBUS; every call says that the device is lost, and a
/// new one of that name can be opened.
fn a_lost_device_keeps_nothing_back_that_the_program_has() {
    let dev = faulty(64);
    let mut memory = [Pages::new(8 << 20), Pages::new(8 << 20), Pages::new(8 << 20)];
    let [away, read, other] = &mut memory;
    let (away, read, other) = (away.slice::<u32>(), read.slice::<u32>(), other.slice::<u32>());
    for data in [&mut *away, read, other] {
        data.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
    }
    let kernel = |ctx: &Ctx<'_>| {
        let read = ctx.inp::<u32>(1);
        let from = ctx.group() * 1000;
        ctx.out::<u32>(0).chunk(1000).iter_mut().zip(&read[from..]).for_each(|(r, x)| *r = x + 1);
    };
    run(&dev, &kernel, groups(away.len()), args![out(away), inp(read)]).unwrap();
    assert_eq!(away[0], 1); // it brings some home
    let home = pages_present(away);
    order(Call::ToDevice, Fault::Lost, 1, ALWAYS);
    let error = add_one(&dev, other).unwrap_err();
    let lost = (away.len() / 1024 - home) as u64;
    assert!(matches!(error, Error::DeviceLost { device: "faulty", pages, .. } if pages == lost), "{error}, {lost} pages");
    assert!(is(read, 0) && is(other, 0) && away[0] == 1);
    assert_eq!(touch(&away[away.len() - 1]), Some(libc::SIGBUS));
    let more = [add_one(&dev, other).unwrap_err(), dev.prefetch(0, 1 << 20).unwrap_err(), dev.allocate(5).unwrap_err()];
    for error in more.into_iter().chain(dev.evict(0, 5).err()) {
        assert!(matches!(error, Error::DeviceLost { device: "faulty", pages, .. } if pages == lost), "{error}");
    }
    drop(dev);
    all_well();
    let dev = faulty(64);
    add_one(&dev, other).unwrap();
    assert!(is(other, 1));
    map_anew(away);
    run(&dev, &kernel, groups(away.len()), args![out(away), inp(read)]).unwrap();
    assert!(is(away, 1));
}

/// Lost at each of its calls in turn, of a launch and of the way home: an element is as before the launch or as after it, or its page is poisoned; nothing hangs.
fn a_device_is_lost_at_any_time() {
    let mut strikes = 0;
    for call in [Call::ToDevice, Call::ToHost, Call::Map, Call::Populate] {
        for nth in 1.. {
            let dev = faulty(32);
            let mut memory = Pages::new(5 << 20);
            let data = memory.slice::<u32>();
            data.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
            let data = &mut data[5..1_200_000];
            order(call, Fault::Lost, nth, 1);
            let launched = add_one(&dev, data);
            let home = dev.evict(0, 1 << 47);
            let struck = outstanding(call) == 0;
            all_well();
            if !struck {
                launched.unwrap();
                home.unwrap();
                assert!(is(data, 6));
                break;
            }
            strikes += 1;
            // Also a failed launch may have written what it should.
            for (i, x) in data.iter().enumerate().step_by(1024) {
                if let Some(x) = guarded(x) {
                    assert!(x == i as u32 + 5 || x == i as u32 + 6, "{call:?} {nth}: element {i} is {x}");
                }
            }
            for result in [launched, home] {
                assert!(result.is_ok() || matches!(result, Err(Error::DeviceLost { .. })), "{result:?}");
            }
            assert!(matches!(dev.prefetch(0, 1), Err(Error::DeviceLost { .. })));
        }
    }
    assert!(strikes > 10, "{strikes}");
}

/// An element, unless its page cannot be read.
fn guarded(at: &u32) -> Option<u32> {
    let mut pipe = std::io::pipe().unwrap();
    // SAFETY: what cannot be read is an error.
    let n = unsafe { libc::write(pipe.1.as_raw_fd(), std::ptr::from_ref(at).cast(), 4) };
    if n != 4 {
        return None;
    }
    let mut bytes = [0; 4];
    pipe.0.read_exact(&mut bytes).unwrap();
    Some(u32::from_ne_bytes(bytes))
}

/// The kernel has run, and the device is lost with what it wrote: old pages that were parked come back.
fn a_device_that_is_lost_while_a_kernel_runs() {
    let dev = faulty(32);
    let mut memory = [Pages::new(4 << 20), Pages::new(4 << 20)];
    let [over, moved] = &mut memory;
    let (over, moved) = (over.slice::<u32>(), moved.slice::<u32>());
    over.fill(7);
    moved.fill(8);
    let kernel = |ctx: &Ctx<'_>| {
        ctx.out::<u32>(0).chunk(1000).fill(1);
        ctx.out::<u32>(1).chunk(1000).fill(2);
    };
    order(Call::Launch, Fault::Lost, 1, 1);
    let error = run(&dev, &kernel, groups(over.len()), args![out(over), inout(moved)]).unwrap_err();
    assert!(matches!(error, Error::DeviceLost { pages: 1024, .. }), "{error}");
    assert!(over.iter().all(|&x| x == 7), "what was to be overwritten is as before");
    assert_eq!(touch(&moved[0]), Some(libc::SIGBUS));
}

/// Whoever waits for a copy that the device never finishes waits for the limit, and then the device counts as lost.
fn a_fence_that_never_comes() {
    for call in [Call::ToDevice, Call::ToHost] {
        let limit = Duration::from_millis(300);
        let dev = faulty_as(DeviceConfig { memory: 32 << 20, fence_limit: limit, ..DeviceConfig::new("faulty") });
        let mut memory = Pages::new(4 << 20);
        let data = memory.slice::<u32>();
        data.fill(1);
        order(call, Fault::Never, 1, 1);
        let start = Instant::now();
        let launched = add_one(&dev, data);
        if call == Call::ToHost {
            launched.unwrap();
            assert_eq!(touch(&data[0]), Some(libc::SIGBUS));
        } else {
            assert!(matches!(launched, Err(Error::DeviceLost { pages: 0, .. })), "{launched:?}");
            assert!(data.iter().all(|&x| x == 1));
        }
        assert!(start.elapsed() >= limit && start.elapsed() < 20 * limit, "{:?}", start.elapsed());
        assert!(matches!(dev.prefetch(0, 1), Err(Error::DeviceLost { .. })));
        all_well();
    }
}

/// A device that says no to memory that it should have has less of it: launches that fit go on, others say that there is no room. Nothing is lost.
fn no_memory_where_some_was_promised() {
    let dev = faulty(32);
    let mut data: Vec<u32> = (0..4_000_000).collect();
    for nth in 1..10 {
        order(Call::Populate, Fault::Failed, nth, ALWAYS);
        let first = data[0];
        match add_one(&dev, &mut data) {
            Ok(()) => assert!(is(&data, first + 1), "{nth}"),
            Err(Error::NoRoom { device: "faulty", .. }) => assert!(is(&data, first), "{nth}"),
            Err(error) => panic!("{error}"),
        }
    }
    all_well();
    let first = data[0];
    add_one(&dev, &mut data).unwrap();
    assert!(is(&data, first + 1));
    assert_eq!(dev.stats().pages_lost, 0);
}

/// The device's page table takes no entry: the launch fails, what has gone to the device comes home.
fn the_page_table_refuses() {
    let dev = faulty(32);
    let mut data: Vec<u32> = (0..2_000_000).collect();
    for nth in 1.. {
        let first = data[0];
        order(Call::Map, Fault::Failed, nth, 1);
        let result = add_one(&dev, &mut data);
        let struck = outstanding(Call::Map) == 0;
        all_well();
        if !struck {
            assert!(nth > 2);
            break;
        }
        match result {
            // An edge that is not mapped when the launch has ended is mapped by the next one.
            Ok(()) => assert!(is(&data, first + 1), "{nth}"),
            Err(error) => {
                assert!(error.to_string().contains("device faulty failed"), "{error}");
                assert!(is(&data, first), "{nth}");
            }
        }
        dev.evict(0, 1 << 47).unwrap();
    }
    assert_eq!(dev.stats().pages_lost, 0);
}

/// The device cannot run a kernel: the launch fails with the device's name, and a byte is as before or as written.
fn a_device_cannot_run_a_kernel() {
    let dev = faulty(32);
    let mut data = vec![5u32; 1_000_000];
    order(Call::Launch, Fault::Failed, 1, 1);
    let error = add_one(&dev, &mut data).unwrap_err();
    assert!(matches!(error, Error::Driver { device: "faulty", .. }), "{error}");
    assert!(data.iter().all(|&x| x == 5 || x == 6));
    data.fill(5);
    add_one(&dev, &mut data).unwrap();
    assert!(data.iter().all(|&x| x == 6));
    assert_eq!((dev.stats().launches, dev.stats().launches_failed), (2, 1));
}

/// Removed in order, a device leaves nothing behind; its handles say that it was removed, until they are gone and it can be opened again.
fn an_orderly_removal() {
    let dev = faulty(32);
    let mut data: Vec<u32> = (0..2_000_000).collect();
    add_one(&dev, &mut data).unwrap();
    assert!(pages_present(&data) < 20);
    dev.remove().unwrap();
    assert!(pages_present(&data) >= data.len() / 1024 - 1);
    assert!(is(&data, 1));
    for error in [add_one(&dev, &mut data).unwrap_err(), dev.remove().unwrap_err(), dev.prefetch(0, 1).unwrap_err()] {
        assert!(matches!(error, Error::DeviceRemoved { device: "faulty" }), "{error}");
    }
    drop(dev);
    let dev = faulty(32);
    add_one(&dev, &mut data).unwrap();
    // One that does not give everything back at that.
    order(Call::ToHost, Fault::Failed, 1, ALWAYS);
    let error = dev.remove().unwrap_err();
    assert!(matches!(error, Error::PagesLost { pages, .. } if pages > 1900), "{error}");
    std::mem::forget(data); // its allocator would touch what was lost
}

/// Every check that a driver must pass: the device that fails on order is a device, whose memory nobody looks into.
fn without_an_order_it_is_the_other_device() {
    let dev = faulty(16);
    for check in CHECKS {
        println!("{}", check.name);
        (check.run)(&mut Subject::new(&dev));
    }
    assert_eq!(dev.stats().pages_lost, 0);
}

/// What a coherent device has is in the program: it stays there when the device is lost, and comes home without the copy engine's help.
fn a_coherent_device_that_fails_leaves_what_the_program_has() {
    for fault in [Fault::Failed, Fault::Lost] {
        let dev = faulty_as(DeviceConfig { memory: 16 << 20, threads: 2, coherent: true, ..DeviceConfig::new("faulty") });
        let mut data: Vec<u32> = (0..2_000_000).collect();
        add_one(&dev, &mut data).unwrap();
        assert!(dev.stats().pages_to_device > 1900);
        order(Call::ToHost, fault, 1, ALWAYS);
        order(Call::ToDevice, fault, 1, ALWAYS);
        let result = if fault == Fault::Lost { add_one(&dev, &mut vec![5; 1_000_000]) } else { dev.evict(0, 1 << 47) };
        assert!(is(&data, 1));
        assert_eq!(dev.stats().pages_lost, 0);
        match fault {
            Fault::Failed => result.unwrap(),
            _ => assert!(matches!(result, Err(Error::DeviceLost { pages: 0, .. })), "{result:?}"),
        }
        all_well();
        drop(dev);
        assert!(is(&data, 1));
    }
}

/// What a kernel has written to a snapshot, and the device does not give back, or not all of it, is an error of the launch; a byte is as before or as written.
fn a_result_that_is_not_given_back() {
    let dev = faulty(16);
    let mut memory = Pages::new(64 << 10);
    let data = memory.slice::<u32>();
    data.iter_mut().enumerate().for_each(|(i, x)| *x = i as u32);
    if !lock(data) {
        return; // as below
    }
    add_one(&dev, data).unwrap();
    order(Call::ToHost, Fault::Failed, 1, ALWAYS);
    let error = add_one(&dev, data).unwrap_err();
    assert!(matches!(error, Error::Driver { device: "faulty", .. }), "{error}");
    let written = |data: &[u32]| data.iter().enumerate().filter(|&(i, &x)| x == i as u32 + 2).count();
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1 || x == i as u32 + 2));
    assert!((1..data.len()).contains(&written(data)), "a copy that fails has done a part: {} elements", written(data));
    all_well();
    data.iter_mut().zip(1..).for_each(|(x, i)| *x = i);
    add_one(&dev, data).unwrap();
    assert!(is(data, 2));
}

/// Without the twin that tells what a kernel has changed, the kernel may not write: its launch fails, and the page is as before.
fn a_twin_that_is_not_given() {
    let dev = faulty(16);
    let mut memory = Pages::new(1 << 20);
    let data = memory.slice::<u32>();
    data.fill(4);
    if !lock(data) {
        return; // no memory may be locked here: there is nothing that must stay
    }
    let write = |ctx: &Ctx<'_>| {
        // SAFETY: an element of the data, which nobody else uses.
        unsafe { ctx.pointer::<u32>(0).write_volatile(5) };
    };
    order(Call::ToHost, Fault::Failed, 1, ALWAYS);
    let error = run(&dev, &write, 1, args![bare(&mut data[7..])]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::NoRoom { .. })), "{error}");
    assert!(data.iter().all(|&x| x == 4));
    all_well();
    run(&dev, &write, 1, args![bare(&mut data[7..])]).unwrap();
    assert!(data.iter().enumerate().all(|(i, &x)| x == 4 + u32::from(i == 7)));
}

/// The program writes beside a large argument, on its first and last page, while the kernel runs. The device does not take these pages when the launch has ended:
/// they are home, with what the one wrote and what the other wrote.
fn an_edge_that_is_not_taken_back() {
    let dev = faulty(16);
    let mut memory = Pages::new(256 << 10);
    let data = memory.slice::<u32>();
    let len = data.len() - 200;
    let (before, rest) = data.split_at_mut(100);
    let (data, after) = rest.split_at_mut(len);
    let running = AtomicUsize::new(0);
    for round in 1..5 {
        let kernel = |ctx: &Ctx<'_>| {
            ctx.out::<u32>(0).chunk(len).iter_mut().for_each(|x| *x += 1);
            running.store(1, Ordering::SeqCst);
            while running.load(Ordering::SeqCst) != 2 {
                std::thread::yield_now();
            }
        };
        running.store(0, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let (dev, data) = (&dev, &mut *data);
            let launch = scope.spawn(move || run(dev, &kernel, 1, args![inout(data)]));
            while running.load(Ordering::SeqCst) != 1 {
                std::thread::yield_now();
            }
            before.fill(round);
            after.fill(round);
            order(Call::ToDevice, Fault::Failed, 1, ALWAYS);
            running.store(2, Ordering::SeqCst);
            launch.join().unwrap().unwrap();
        });
        assert!(outstanding(Call::ToDevice) == ALWAYS);
        all_well();
        assert!(before.iter().chain(&*after).all(|&x| x == round), "round {round}: what the program wrote");
        assert!(data.iter().all(|&x| x == round), "round {round}: what the kernel wrote");
    }
}

/// A block goes from one device to another, and one of them fails: the launch says which, the block stays where it was, and goes when both are well.
fn one_of_two_devices_fails() {
    let dev = faulty(16);
    let config = DeviceConfig { memory: 16 << 20, threads: 2, ..DeviceConfig::new("other") };
    let other = CoreRef::get().unwrap().device(config, uhmm_soft::open).unwrap();
    let mut memory = Pages::new(6 << 20);
    let data = memory.slice::<u32>();
    data.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
    for (round, (from, to, call)) in [(&dev, &other, Call::ToHost), (&other, &dev, Call::ToDevice)].into_iter().enumerate() {
        let first = 2 * round as u32;
        add_one(from, data).unwrap();
        order(call, Fault::Failed, 1, ALWAYS);
        let error = add_one(to, data).unwrap_err();
        all_well();
        assert!(matches!(error, Error::Driver { device: "faulty", .. }), "{error}");
        add_one(to, data).unwrap();
        assert!(is(data, first + 2), "round {round}");
    }
    assert_eq!(dev.stats().pages_lost + other.stats().pages_lost, 0);
}
