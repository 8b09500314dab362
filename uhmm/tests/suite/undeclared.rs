//! Bare pointers to memory of every kind: what can move is fetched, what is shared is used in place, of the rest the kernel has a snapshot whose changes come back.

use crate::harness::*;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use uhmm::{Ctx, Error, KernelFault, args, out, ptr};

crate::tests![
    statics,
    constants_are_read_and_not_written,
    private_files,
    shared_files_and_memory_are_used_in_place,
    another_file_at_the_same_address,
    beyond_the_end_of_a_file,
    a_flag_in_shared_memory,
    memory_that_the_kernel_will_not_move,
    what_lies_beside_a_small_argument,
    what_lies_beside_a_large_argument,
    a_failing_kernel_leaves_no_half_written_pages,
];

const LEN: usize = 300_000;

/// Adds 1 to each of `len` bytes at the pointer, and their sum to the result.
fn bump(ctx: &Ctx<'_>) {
    let (p, len) = (ctx.pointer::<u8>(1), ctx.value::<usize>(2));
    let bytes = unsafe { std::slice::from_raw_parts_mut(p, len) };
    let mut sum = 0;
    for x in bytes {
        sum += u64::from(*x);
        *x = x.wrapping_add(1);
    }
    ctx.out::<u64>(0).chunk(1)[0] = sum;
}

/// Three launches over `data`, with writes of the CPU in between.
fn three_rounds(dev: &uhmm::Device, data: *mut u8, len: usize, what: &str) {
    let bytes = unsafe { std::slice::from_raw_parts_mut(data, len) };
    bytes.iter_mut().enumerate().for_each(|(i, x)| *x = i as u8);
    for round in 0..3usize {
        let want: u64 = bytes.iter().map(|&x| u64::from(x)).sum();
        let mut sum = [0u64];
        dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(data) }, len]).unwrap();
        assert_eq!(sum[0], want, "{what}, round {round}: the kernel sees what the CPU has written");
        for (i, x) in bytes.iter_mut().enumerate() {
            assert_eq!(*x, (i + 2 * round + 1) as u8, "{what}, round {round}, byte {i}: the CPU sees what the kernel has written");
            *x = x.wrapping_add(1);
        }
    }
}

fn statics() {
    static mut DATA: [u8; LEN] = [1; LEN];
    static mut ZERO: [u8; LEN] = [0; LEN];
    let (_hmm, dev) = device(64);
    three_rounds(&dev, (&raw mut DATA).cast(), LEN, ".data");
    three_rounds(&dev, (&raw mut ZERO).cast(), LEN, ".bss");
    let mut boxed = Box::new([0u8; 1000]);
    three_rounds(&dev, boxed.as_mut_ptr(), 1000, "a Box");
}

fn constants_are_read_and_not_written() {
    static CONSTANT: [u8; LEN] = [3; LEN];
    let (_hmm, dev) = device(64);
    let sum = |ctx: &Ctx<'_>| {
        let bytes = unsafe { std::slice::from_raw_parts(ctx.pointer::<u8>(1), LEN) };
        ctx.out::<u64>(0).chunk(1)[0] = bytes.iter().map(|&x| u64::from(x)).sum();
    };
    let mut total = [0u64];
    dev.run(&sum, 1, args![out(&mut total), unsafe { ptr(&raw const CONSTANT) }]).unwrap();
    assert_eq!(total[0], 3 * LEN as u64);
    let error = dev.run(&bump, 1, args![out(&mut total), unsafe { ptr(&raw const CONSTANT) }, 10usize]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Wild { write: true, .. })), "{error}");
    // Also where the device has a copy because it was declared.
    let pages = filled(64);
    unsafe { libc::mprotect(pages.start.cast(), pages.len, libc::PROT_READ) };
    let data = unsafe { std::slice::from_raw_parts(pages.start, pages.len) };
    let both = |ctx: &Ctx<'_>| {
        std::hint::black_box(ctx.inp::<u8>(3).iter().map(|&x| u64::from(x)).sum::<u64>());
        bump(ctx);
    };
    for _ in 0..2 {
        let error = dev.run(&both, 1, args![out(&mut total), unsafe { ptr(pages.start) }, 5000usize, uhmm::inp(data)]).unwrap_err();
        assert!(matches!(error, Error::Kernel(KernelFault::Wild { write: true, .. })), "{error}");
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u8), "nothing was written");
    }
    dev.run(&sum, 1, args![out(&mut total), unsafe { ptr(&raw const CONSTANT) }]).unwrap();
}

fn filled(pages: usize) -> Pages {
    let mut memory = Pages::new(pages * 4096);
    memory.slice::<u8>().iter_mut().enumerate().for_each(|(i, x)| *x = i as u8);
    memory
}

/// A file of `len` bytes.
fn file(len: usize) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![5u8; len], 0).unwrap();
    file
}

fn map(file: &File, len: usize, prot: i32, flags: i32) -> *mut u8 {
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn private_files() {
    let (_hmm, dev) = device(64);
    let file = file(LEN);
    three_rounds(&dev, map(&file, LEN, RW, libc::MAP_PRIVATE), LEN, "a private file");
    let mut text = vec![];
    (&file).read_to_end(&mut text).unwrap();
    let mut whole = vec![0; LEN];
    file.read_exact_at(&mut whole, 0).unwrap();
    assert!(whole.iter().all(|&x| x == 5), "the file itself is as it was");
}

fn shared_files_and_memory_are_used_in_place() {
    let (_hmm, dev) = device(64);
    let file = file(LEN);
    let at = map(&file, LEN, RW, libc::MAP_SHARED);
    three_rounds(&dev, at, LEN, "a shared file");
    let mut whole = vec![0; LEN];
    file.read_exact_at(&mut whole, 0).unwrap();
    assert!(whole == unsafe { std::slice::from_raw_parts(at, LEN) }, "the file has what was written");
    let memfd = unsafe { File::from_raw_fd(libc::memfd_create(c"uhmm-test".as_ptr(), 0)) };
    memfd.set_len(LEN as u64).unwrap();
    three_rounds(&dev, map(&memfd, LEN, RW, libc::MAP_SHARED), LEN, "a memfd");
    let anonymous = unsafe { libc::mmap(std::ptr::null_mut(), LEN, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0) };
    three_rounds(&dev, anonymous.cast(), LEN, "shared anonymous memory");
    let before = dev.stats();
    three_rounds(&dev, at, LEN, "the same again");
    let moved = dev.stats() - before;
    assert!(moved.bytes_to_device < 10 * 4096, "shared memory is not copied: {moved:?}");
}

/// A device sees the pages of a shared mapping in place. When the program maps another file there, it must not go on seeing the first one's.
fn another_file_at_the_same_address() {
    let (_hmm, dev) = device(64);
    let (one, two) = (file(LEN), file(LEN));
    two.write_all_at(&[9; LEN], 0).unwrap();
    let at = map(&one, LEN, RW, libc::MAP_SHARED);
    let mut sum = [0u64];
    dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, LEN]).unwrap();
    assert_eq!(sum[0], 5 * LEN as u64);
    let again = unsafe { libc::mmap(at.cast(), LEN, RW, libc::MAP_SHARED | libc::MAP_FIXED, two.as_raw_fd(), 0) };
    assert_eq!(again, at.cast());
    dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, LEN]).unwrap();
    assert_eq!(sum[0], 9 * LEN as u64);
    // Nothing there, then private memory.
    unsafe { libc::munmap(at.cast(), LEN) };
    let error = dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, 1usize]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Wild { .. })), "{error}");
    let again = unsafe { libc::mmap(at.cast(), LEN, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0) };
    assert_eq!(again, at.cast());
    three_rounds(&dev, at, LEN, "private memory there");
    // Read-only from now on.
    let at = map(&two, LEN, RW, libc::MAP_SHARED);
    dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, LEN]).unwrap();
    unsafe { libc::mprotect(at.cast(), LEN, libc::PROT_READ) };
    let error = dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, 10usize]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Wild { write: true, .. })), "{error}");
    unsafe { libc::mprotect(at.cast(), LEN, RW) };
    dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, 10usize]).unwrap();
    assert_eq!(sum[0], 10 * 11, "the refused launch wrote nothing");
}

/// The last page of a mapping may reach beyond its file, and whole pages may: they are read as zeros, with an error that names the address.
fn beyond_the_end_of_a_file() {
    let (_hmm, dev) = device(64);
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        let file = file(4 * 4096 + 100);
        let at = map(&file, 40 * 4096, RW, flags);
        let mut sum = [0u64];
        dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, 4 * 4096 + 200usize]).unwrap();
        assert_eq!(sum[0], 5 * (4 * 4096 + 100));
        let error = dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, 20 * 4096usize]).unwrap_err();
        let address = match error {
            Error::Kernel(KernelFault::Wild { address, .. } | KernelFault::Unreachable { address }) => address,
            error => panic!("{error}"),
        };
        assert_eq!(address & !4095, at as usize + 5 * 4096);
        dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, 100usize]).unwrap();
        // The file grows.
        file.set_len(40 * 4096).unwrap();
        dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at.add(30 * 4096)) }, 4096usize]).unwrap();
        assert_eq!((sum[0], unsafe { *at.add(30 * 4096) }), (0, 1));
    }
}

/// CPU and kernel wait for each other in shared memory while the kernel runs.
fn a_flag_in_shared_memory() {
    let (_hmm, dev) = device(64);
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0) }.cast::<AtomicU32>();
    let turns = 10_000u32;
    let flag = unsafe { &*at };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0..turns {
                while flag.load(Ordering::Acquire) != 2 * turn {
                    std::hint::spin_loop();
                }
                flag.store(2 * turn + 1, Ordering::Release);
            }
        });
        let kernel = |ctx: &Ctx<'_>| {
            let flag = unsafe { &*ctx.pointer::<AtomicU32>(0) };
            for turn in 0..turns {
                while flag.load(Ordering::Acquire) != 2 * turn + 1 {
                    std::hint::spin_loop();
                }
                flag.store(2 * turn + 2, Ordering::Release);
            }
        };
        dev.run(&kernel, 1, args![unsafe { ptr(at) }]).unwrap();
    });
    assert_eq!(unsafe { &*at }.load(Ordering::Relaxed), 2 * turns);
}

fn memory_that_the_kernel_will_not_move() {
    let (_hmm, dev) = device(64);
    let pages = filled(100);
    if unsafe { libc::mlock(pages.start.cast(), pages.len) } == 0 {
        three_rounds(&dev, pages.start, pages.len, "locked memory");
    } else {
        eprintln!("memory cannot be locked here (RLIMIT_MEMLOCK): not tested");
    }
    // The page of a thread's control block, which must not leave. Its first word points to itself.
    let block = unsafe { libc::pthread_self() } as *const usize;
    let mut word = [0usize];
    let read = |ctx: &Ctx<'_>| ctx.out::<usize>(1).chunk(1)[0] = unsafe { *ctx.pointer::<usize>(0) };
    dev.run(&read, 1, args![unsafe { ptr(block) }, out(&mut word)]).unwrap();
    assert_eq!(word[0], block as usize);
    assert!(present(block));
}

/// A kernel that followed a pointer to a byte beside a declared array, on a page of which it had a snapshot, wrote into the snapshot, and the byte was lost.
fn what_lies_beside_a_small_argument() {
    let (_hmm, dev) = device(64);
    beside(&dev, 1000);
}

/// The same beside an array whose edge pages stay on the device.
fn what_lies_beside_a_large_argument() {
    let (_hmm, dev) = device(64);
    beside(&dev, 200_000);
}

fn beside(dev: &uhmm::Device, len: usize) {
    let mut memory = vec![1u8; len + 2000];
    for round in 1..6u8 {
        let start = memory.as_mut_ptr();
        let declared = unsafe { std::slice::from_raw_parts_mut(start.add(1000), len) };
        let kernel = |ctx: &Ctx<'_>| {
            ctx.out::<u8>(0).chunk(usize::MAX).fill(round);
            let start = ctx.pointer::<u8>(1);
            for at in [0, 7, 999, 1000 + len, 1999 + len] {
                unsafe { *start.add(at) += 1 };
            }
        };
        dev.run(&kernel, 1, args![out(declared), unsafe { ptr(start) }]).unwrap();
        assert!(memory[1000..1000 + len].iter().all(|&x| x == round));
        for at in [0, 7, 999, 1000 + len, 1999 + len] {
            assert_eq!(memory[at], 1 + round, "byte {at}");
        }
        assert!(memory[8..999].iter().all(|&x| x == 1));
    }
}

fn a_failing_kernel_leaves_no_half_written_pages() {
    static mut DATA: [u8; 10_000] = [1; 10_000];
    let (_hmm, dev) = device(64);
    let kernel = |ctx: &Ctx<'_>| {
        let p = ctx.pointer::<u8>(0);
        unsafe { std::slice::from_raw_parts_mut(p, 10_000) }.fill(2);
        panic!("now");
    };
    dev.run(&kernel, 1, args![unsafe { ptr(&raw const DATA) }]).unwrap_err();
    let data: &[u8] = unsafe { std::slice::from_raw_parts((&raw const DATA).cast(), 10_000) };
    assert!(data.iter().all(|&x| x == 1 || x == 2), "each byte reads as before or as the kernel wrote it");
}
