//! The kinds of device: without replayable faults, and the one that does nothing.

use crate::harness::*;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, Device, Error, KernelFault, Uhmm, args, inout, inp, out, ptr};
use uhmm_core::kernel::Entry;
use uhmm_core::{CoreRef, DeviceConfig};

crate::tests![
    every_kind_opens,
    a_bare_pointer_means_its_allocation_without_replayable_faults,
    an_undeclared_touch_fails_the_launch,
    a_write_to_what_is_declared_as_read_fails_the_launch,
    a_write_to_what_is_read_on_the_tiny_device_fails_the_launch,
    declared_pages_stay_while_the_kernel_runs,
    a_write_beside_what_is_read_does_not_take_it_away,
    null_leaves_everything_as_it_was,
];

fn nofault(mib: usize) -> (Uhmm, Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.soft("soft").memory(mib << 20).threads(2).replayable_faults(false).open().unwrap();
    (hmm, dev)
}

fn every_kind_opens() {
    let hmm = Uhmm::new().unwrap();
    // Of OpenCL there may be no device; `opencl` looks at those that there are.
    for &kind in uhmm::KINDS.iter().filter(|kind| **kind != "opencl") {
        let dev = hmm.device(kind).unwrap();
        assert_eq!(dev.name(), kind);
        assert_eq!(dev.info().capabilities.replayable_faults, kind != "soft:nofault");
        assert_eq!(dev.memory() == 0, kind == "null");
        dev.run(&|_: &Ctx<'_>| (), 1, args![]).unwrap();
    }
}

fn a_bare_pointer_means_its_allocation_without_replayable_faults() {
    let (_hmm, dev) = nofault(16);
    let mut data = vec![1u32; 100_000];
    let other = vec![1u32; 100_000];
    // SAFETY: nobody else uses the vector.
    let bare = unsafe { ptr(data.as_ptr().wrapping_add(5)) };
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: the whole vector, of which this is element 5, is there for the kernel alone.
        unsafe { *ctx.pointer::<u32>(0).add(90_000) += 1 };
    };
    dev.run(&kernel, 1, args![bare]).unwrap();
    assert!(data[90_005] == 2 && data.iter().sum::<u32>() == 100_001);
    // Nothing else is.
    // SAFETY: as above.
    let bare = unsafe { ptr(data.as_mut_ptr()) };
    let beyond = &raw const other[50_000] as usize;
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: it is not declared: the device refuses it.
        unsafe { *ctx.pointer::<u32>(0) += *ctx.ptr(beyond as *const u32) };
    };
    let error = dev.run(&kernel, 1, args![bare]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::NotDeclared { .. })), "{error}");
}

fn an_undeclared_touch_fails_the_launch() {
    let (_hmm, dev) = nofault(16);
    let mut data = vec![1u32; 100_000];
    let mut other = vec![3u32; 400_000];
    let there = pages_present(&other);
    for write in [false, true] {
        let address = &raw mut other[200_000];
        let kernel = |ctx: &Ctx<'_>| {
            let p = ctx.ptr_mut(ctx.value::<usize>(1) as *mut u32);
            // SAFETY: an element of `other`, which nobody else uses; that it is not declared is the test: the device refuses it.
            unsafe {
                if write {
                    p.write_volatile(9)
                } else {
                    std::hint::black_box(p.read_volatile());
                }
            }
            ctx.out::<u32>(0).chunk(1000)[0] = 7;
        };
        let error = dev.run(&kernel, 100, args![inout(&mut data), address as usize]).unwrap_err();
        let Error::Kernel(KernelFault::NotDeclared { address: told, write: how }) = error else { panic!("{error}") };
        assert_eq!((told & !4095, how), (address as usize & !4095, write));
        let text = error.to_string();
        assert!(text.contains(&format!("{told:#x}")) && text.contains("declare it with"), "{text}");
        assert_eq!(pages_present(&other), there, "nothing of it has moved");
        assert!(other.iter().all(|&x| x == 3));
        assert!(data.iter().enumerate().all(|(i, &x)| x == 1 || (i % 1000 == 0 && x == 7)));
    }
    // Declared, the same works, also by stored pointers.
    let address = other.as_ptr() as usize;
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: an element of `other`, which is declared.
        let value = unsafe { *ctx.ptr((ctx.value::<usize>(2) as *const u32).add(200_000)) };
        ctx.out::<u32>(0).chunk(1000).fill(value);
    };
    dev.run(&kernel, 100, args![inout(&mut data), inp(&other), address]).unwrap();
    assert!(data.iter().all(|&x| x == 3));
    assert_eq!(dev.stats().launches_failed, 2);
}

fn a_write_to_what_is_declared_as_read_fails_the_launch() {
    let (_hmm, dev) = nofault(16);
    let read = vec![3u32; 400_000];
    let address = &raw const read[200_000] as usize;
    // SAFETY: an element of `read`, through no reference; that it is not declared as written is the test: the device tells.
    let kernel = |ctx: &Ctx<'_>| unsafe { ctx.ptr_mut(ctx.value::<usize>(1) as *mut u32).write_volatile(9) };
    let error = dev.run(&kernel, 1, args![inp(&read), address]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::NotDeclared { write: true, .. })), "{error}");
    assert!(error.to_string().contains("not declared as written"), "{error}");
    // Every byte reads as before or as the kernel wrote it.
    assert!(read.iter().enumerate().all(|(i, &x)| x == 3 || (i == 200_000 && x == 9)));
}

/// The same on the tiny device, whose page table is the kernel's.
fn a_write_to_what_is_read_on_the_tiny_device_fails_the_launch() {
    let config = DeviceConfig { memory: 16 << 20, replayable_faults: false, ..DeviceConfig::new("tiny") };
    let dev = CoreRef::get().unwrap().device(config, crate::tiny::driver::open).unwrap();
    let read = vec![3u32; 400_000];
    let address = &raw const read[200_000] as usize;
    // SAFETY: as above.
    let kernel = |ctx: &Ctx<'_>| unsafe { ctx.ptr_mut(ctx.value::<usize>(1) as *mut u32).write_volatile(9) };
    let error = dev.run(Entry::new(&kernel), 1.into(), &args![inp(&read), address]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::NotDeclared { write: true, .. })), "{error}");
    assert!(read.iter().enumerate().all(|(i, &x)| x == 3 || (i == 200_000 && x == 9)));
}

/// The CPU may read what a launch only reads, and touch what lies beside a range in the same block. A device with faults fetches again what that
/// takes home; without, the page must not go.
fn declared_pages_stay_while_the_kernel_runs() {
    let (_hmm, dev) = nofault(32);
    let mut memory = Pages::huge(8 << 20);
    let bytes = memory.slice::<u8>();
    bytes.fill(1);
    let add = |ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(1 << 20).iter_mut().for_each(|x| *x += 1);
    let end = Instant::now() + seconds(3);
    let mut expected = 1u8;
    while Instant::now() < end && expected < 200 {
        // Everything goes to the device, blocks whole.
        dev.run(&add, 8, args![inout(bytes)]).unwrap();
        expected += 1;
        // Then a part of it is written, another only read, and the CPU uses the rest, and reads what is read.
        let (first, rest) = bytes.split_at_mut((3 << 20) + 777);
        let (written, last) = rest.split_at_mut(3_000_001);
        let (middle, read) = last.split_at_mut(1 << 20);
        let read = &*read;
        let started = AtomicBool::new(false);
        let kernel = |ctx: &Ctx<'_>| {
            started.store(true, Ordering::Release);
            let until = Instant::now() + Duration::from_millis(3);
            let out = ctx.out::<u8>(0).chunk(3_000_001);
            let mut sum = 0u64;
            // At least once, also when the time is over before this thread runs again.
            loop {
                for x in out.iter_mut().step_by(4096) {
                    *x = x.wrapping_add(2);
                    *x = x.wrapping_sub(2);
                }
                sum += ctx.inp::<u8>(1).iter().step_by(4096).map(|&x| u64::from(x)).sum::<u64>();
                if Instant::now() >= until {
                    break;
                }
            }
            assert!(sum > 0);
            out.iter_mut().for_each(|x| *x += 1);
        };
        std::thread::scope(|scope| {
            let run = scope.spawn(|| dev.run(&kernel, 1, args![inout(written), inp(read)]));
            while !started.load(Ordering::Acquire) && !run.is_finished() {
                std::hint::spin_loop();
            }
            let at = first.len() - 1;
            first[at] = expected;
            // The other half of the page where begins what is read.
            middle[middle.len() - 1] = expected;
            assert!(first.iter().step_by(4096).all(|&x| x == expected));
            assert!(read.iter().step_by(40_960).all(|&x| x == expected));
            run.join().unwrap().unwrap();
        });
        first.iter_mut().for_each(|x| *x += 1);
        last.iter_mut().for_each(|x| *x += 1);
        expected += 1;
        assert!(bytes.iter().all(|&x| x == expected));
    }
}

/// Two ranges that are only read share a block; a write to the one released the whole block, and with it what the running kernel reads of the other.
fn a_write_beside_what_is_read_does_not_take_it_away() {
    let (_hmm, dev) = nofault(16);
    let mut memory = Pages::huge(2 << 20);
    memory.slice::<u8>().fill(5);
    let bytes: &[AtomicU8] = memory.atomics();
    let start = memory.start() as usize;
    // SAFETY: inside `memory`; of the part that a kernel reads nothing changes meanwhile.
    let plain = |range: std::ops::Range<usize>| unsafe { std::slice::from_raw_parts((start + range.start) as *const u8, range.len()) };
    let sum = |ctx: &Ctx<'_>| {
        let until = Instant::now() + Duration::from_millis(2);
        while Instant::now() < until {
            let sum: usize = ctx.inp::<u8>(1).iter().step_by(512).map(|&x| usize::from(x)).sum();
            assert_eq!(sum, 5 * ctx.inp::<u8>(1).len().div_ceil(512));
        }
        ctx.out::<u64>(0).chunk(1)[0] += 1;
    };
    let mut done = [0u64];
    for round in 1..=50 {
        let mut none = [0u64];
        dev.run(&sum, 1, args![inout(&mut none), inp(plain(0..1 << 20))]).unwrap();
        std::thread::scope(|scope| {
            let run = scope.spawn(|| dev.run(&sum, 1, args![inout(&mut done), inp(plain(1 << 20..2 << 20))]));
            while !run.is_finished() {
                for page in bytes[..1 << 20].chunks(4096) {
                    page[0].store(5, Ordering::Relaxed);
                }
            }
            run.join().unwrap().unwrap();
        });
        assert_eq!(done[0], round);
    }
}

fn null_leaves_everything_as_it_was() {
    let (hmm, soft) = device(16);
    let null = hmm.device("null").unwrap();
    let mut data: Vec<u32> = (0..1_000_000).collect();
    soft.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert_eq!(pages_present(&data), 0);
    null.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    null.run(&increment, groups(data.len()), args![out(&mut data)]).unwrap();
    null.run(&|_: &Ctx<'_>| panic!("it runs nothing"), 5, args![bare(&mut data)]).unwrap();
    null.prefetch(&data).unwrap();
    assert_eq!(pages_present(&data), 0, "what another device has stays there");
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
    let there = pages_present(&data);
    null.prefetch(&data).unwrap();
    null.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    null.evict(&data).unwrap();
    assert_eq!(pages_present(&data), there, "nothing goes there");
    assert!(null.alloc::<u32>(1).unwrap_err().to_string().contains("no room"));
    let stats = null.stats();
    assert_eq!((stats.launches, stats.launches_failed, stats.bytes_to_device, stats.pages_to_device), (4, 0, 0, 0));
    // What is wrong with a launch is found all the same.
    assert!(matches!(null.run(&increment, 0, args![inout(&mut data)]), Err(Error::Grid(_))));
}
