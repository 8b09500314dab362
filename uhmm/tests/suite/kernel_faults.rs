//! Kernels that do wrong: their launch fails with words, the program goes on, and no byte reads as anything but before or as written.

use crate::harness::*;
use uhmm::{Ctx, Error, KernelFault, args, inout, inp, out, ptr};

crate::tests![
    a_panic_fails_the_launch_only,
    out_is_as_before_when_the_kernel_fails,
    a_kernel_that_forgets_to_translate_is_told_the_address,
    a_wild_pointer_runs_on_over_a_scratch_page,
    a_write_to_read_only_memory_is_refused,
    a_thread_of_the_program_is_refused_in_the_window,
];

fn a_panic_fails_the_launch_only() {
    let (_hmm, dev) = device(16);
    let mut data: Vec<u32> = (0..100_000).collect();
    let kernel = |ctx: &Ctx<'_>| {
        let part = ctx.out::<u32>(0).chunk(1000);
        part[0] = 77;
        assert!(ctx.group() != 50, "group {} says no", ctx.group());
    };
    let error = dev.run(&kernel, 100, args![inout(&mut data)]).unwrap_err();
    assert!(matches!(&error, Error::Kernel(KernelFault::Panic(_))));
    assert_eq!(error.to_string(), "kernel failed: it panicked: group 50 says no");
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 || (i % 1000 == 0 && x == 77)));
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert_eq!(data[1], 2);
}

fn out_is_as_before_when_the_kernel_fails() {
    let (_hmm, dev) = device(16);
    for offset in [0, 3, 1024] {
        let mut data: Vec<u32> = (1..=1_000_000).collect();
        let range = &mut data[offset..];
        let kernel = |ctx: &Ctx<'_>| {
            ctx.out::<u32>(0).chunk(100_000)[..10].fill(u32::MAX);
            assert!(ctx.group() < 9);
        };
        dev.run(&kernel, 10, args![out(range)]).unwrap_err();
        for (i, &x) in data.iter().enumerate() {
            assert!(x == i as u32 + 1 || x == u32::MAX, "element {i} is {x}");
            assert!(x != u32::MAX || (i - offset) % 100_000 < 10);
        }
    }
    // Again when the range is on the device already.
    let mut data = vec![5u32; 1_000_000];
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    dev.run(&|_: &Ctx<'_>| panic!("at once"), 1, args![out(&mut data)]).unwrap_err();
    assert!(data.iter().all(|&x| x == 6));
}

fn a_kernel_that_forgets_to_translate_is_told_the_address() {
    let (_hmm, dev) = device(16);
    let mut data: Vec<u32> = (0..1_000_000).collect();
    let address = &raw const data[600_000] as usize;
    let kernel = |ctx: &Ctx<'_>| {
        // The right way would be ctx.ptr(p).
        let p = ctx.value::<usize>(1) as *const u32;
        // SAFETY: an element of the data, at the address that a kernel must not use: the device answers for that.
        ctx.out::<u32>(0).chunk(1_000_000)[0] = unsafe { p.read_volatile() };
    };
    let error = dev.run(&kernel, 1, args![inout(&mut data), address]).unwrap_err();
    let Error::Kernel(KernelFault::HostAddress { address: told }) = error else { panic!("{error}") };
    assert_eq!(told, address);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 || (i == 0 && x == 600_000)));
    let right = |ctx: &Ctx<'_>| {
        let p = ctx.ptr(ctx.value::<usize>(1) as *const u32);
        // SAFETY: an element of the data, of which the kernel writes another, later.
        let value = unsafe { p.read_volatile() };
        ctx.out::<u32>(0).chunk(1_000_000)[0] = value;
    };
    dev.run(&right, 1, args![inout(&mut data), address]).unwrap();
    assert_eq!(data[0], 600_000);
}

fn a_wild_pointer_runs_on_over_a_scratch_page() {
    let (_hmm, dev) = device(16);
    let mut data = vec![1u32; 10_000];
    let hole = Pages::new(1 << 20);
    let wild = hole.start() as usize + 5000;
    drop(hole);
    let kernel = |ctx: &Ctx<'_>| {
        let p = ctx.pointer::<u32>(1);
        // SAFETY: nothing is there, on purpose: the device is to give a scratch page.
        unsafe {
            assert_eq!(p.read_volatile(), 0);
            p.write_volatile(7);
            assert_eq!(p.read_volatile(), 7);
        }
        ctx.out::<u32>(0).chunk(10_000).fill(2);
    };
    for (address, name) in [(wild as *const u32, format!("{wild:#x}")), (std::ptr::null(), "0x0".into())] {
        // SAFETY: as for the kernel.
        let error = dev.run(&kernel, 1, args![inout(&mut data), unsafe { ptr(address) }]).unwrap_err();
        assert!(error.to_string().contains(&name), "{error}");
        assert!(data.iter().all(|&x| x == 2 || x == 1));
    }
    // The scratch page is gone: the same place can be used, and starts with what it holds.
    // SAFETY: a new mapping, at a place where nothing is.
    let mut pages = unsafe { Pages::from_raw(map_at(wild & !4095, 8192, libc::MAP_FIXED_NOREPLACE), 8192) };
    let word = &mut pages.slice::<u32>()[wild % 4096 / 4..];
    word[0] = 0;
    // SAFETY: the launch borrows the word.
    let dev_sees = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(10_000)[0] = unsafe { *ctx.pointer::<u32>(1) } + 40;
    dev.run(&dev_sees, 1, args![inout(&mut data), bare(word)]).unwrap();
    assert_eq!(data[0], 40);
    // An untranslated wild pointer, likewise.
    let far = 0x7000_dead_b000usize;
    // SAFETY: nothing is there, on purpose: the device is to give a scratch page.
    let kernel = |ctx: &Ctx<'_>| unsafe { (ctx.value::<usize>(0) as *mut u32).write_volatile(1) };
    let error = dev.run(&kernel, 1, args![far]).unwrap_err();
    assert!(error.to_string().contains("0x7000deadb000"), "{error}");
}

fn a_write_to_read_only_memory_is_refused() {
    let (_hmm, dev) = device(16);
    let mut pages = Pages::new(1 << 20);
    let data = pages.slice::<u32>();
    data.fill(3);
    // SAFETY: from here on the program only reads it.
    unsafe { protect(data, libc::PROT_READ) };
    // SAFETY: the launch borrows it; that it may not be written is the test: the device refuses it.
    let kernel = |ctx: &Ctx<'_>| unsafe { ctx.pointer::<u32>(0).write_volatile(4) };
    let error = dev.run(&kernel, 1, args![bare(data)]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Wild { write: true, .. })), "{error}");
    assert!(data[..1000].iter().all(|&x| x == 3));
    // As a declared input it can be read.
    let mut sum = [0u32];
    let kernel = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1)[0] = ctx.inp::<u32>(1).iter().sum();
    dev.run(&kernel, 1, args![inout(&mut sum), inp(data)]).unwrap();
    assert_eq!(sum[0], 3 << 18);
}

fn a_thread_of_the_program_is_refused_in_the_window() {
    const TOUCH: &str = "UHMM_TEST_TOUCH_WINDOW";
    let (_hmm, dev) = device(16);
    if std::env::var_os(TOUCH).is_some() {
        let data = vec![1u32; 1_000_000];
        let window = (data.as_ptr() as usize ^ dev.info().mask) as *const u32;
        // SAFETY: it must not be read, and ends the process: that is the test.
        unsafe { window.add(500_000).read_volatile() };
        return;
    }
    let child = again("suite::kernel_faults::a_thread_of_the_program_is_refused_in_the_window").env(TOUCH, "1").output().unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert!(matches!(child.status.signal(), Some(libc::SIGBUS | libc::SIGSEGV)), "{:?}", child.status);
    assert!(String::from_utf8_lossy(&child.stderr).contains("touched a device's address"));
}
