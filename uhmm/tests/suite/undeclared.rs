//! Bare pointers to memory of every kind: what can move is fetched, what is shared is used in place, of the rest the kernel has a snapshot whose changes come back.

use crate::harness::*;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
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
    two_workers_touch_what_a_fork_has_shared,
];

const LEN: usize = 300_000;

/// Adds 1 to each of `len` bytes at the pointer, and their sum to the result.
fn bump(ctx: &Ctx<'_>) {
    let (p, len) = (ctx.pointer::<u8>(1), ctx.value::<usize>(2));
    // SAFETY: who launches this borrows so many bytes, or says why not.
    let bytes = unsafe { std::slice::from_raw_parts_mut(p, len) };
    let mut sum = 0;
    for x in bytes {
        sum += u64::from(*x);
        *x = x.wrapping_add(1);
    }
    ctx.out::<u64>(0).chunk(1)[0] = sum;
}

/// Three launches over `bytes`, with writes of the CPU in between.
fn three_rounds(dev: &uhmm::Device, bytes: &mut [u8], what: &str) {
    bytes.iter_mut().enumerate().for_each(|(i, x)| *x = i as u8);
    for round in 0..3usize {
        let want: u64 = bytes.iter().map(|&x| u64::from(x)).sum();
        let mut sum = [0u64];
        let len = bytes.len();
        dev.run(&bump, 1, args![out(&mut sum), bare(bytes), len]).unwrap();
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
    // SAFETY: this test alone uses them, once.
    let (data, zero) = unsafe { (&mut *std::ptr::addr_of_mut!(DATA), &mut *std::ptr::addr_of_mut!(ZERO)) };
    three_rounds(&dev, data, ".data");
    three_rounds(&dev, zero, ".bss");
    three_rounds(&dev, &mut *Box::new([0u8; 1000]), "a Box");
}

fn constants_are_read_and_not_written() {
    static CONSTANT: [u8; LEN] = [3; LEN];
    let (_hmm, dev) = device(64);
    let sum = |ctx: &Ctx<'_>| {
        // SAFETY: it is given the constant, which is as long.
        let bytes = unsafe { std::slice::from_raw_parts(ctx.pointer::<u8>(1), LEN) };
        ctx.out::<u64>(0).chunk(1)[0] = bytes.iter().map(|&x| u64::from(x)).sum();
    };
    // SAFETY: it is there for good. Kernels that write to it are refused.
    let constant = || unsafe { ptr(&raw const CONSTANT) };
    let mut total = [0u64];
    dev.run(&sum, 1, args![out(&mut total), constant()]).unwrap();
    assert_eq!(total[0], 3 * LEN as u64);
    let error = dev.run(&bump, 1, args![out(&mut total), constant(), 10usize]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Wild { write: true, .. })), "{error}");
    // Also where the device has a copy because it was declared.
    let mut pages = filled(64);
    let start = pages.start();
    let data: &[u8] = pages.slice();
    // SAFETY: from here on the program only reads it.
    unsafe { protect(data, libc::PROT_READ) };
    let both = |ctx: &Ctx<'_>| {
        std::hint::black_box(ctx.inp::<u8>(3).iter().map(|&x| u64::from(x)).sum::<u64>());
        bump(ctx);
    };
    for _ in 0..2 {
        // SAFETY: inside `data`. The kernel writes to it, which is refused.
        let bare = unsafe { ptr(start) };
        let error = dev.run(&both, 1, args![out(&mut total), bare, 5000usize, uhmm::inp(data)]).unwrap_err();
        assert!(matches!(error, Error::Kernel(KernelFault::Wild { write: true, .. })), "{error}");
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u8), "nothing was written");
    }
    dev.run(&sum, 1, args![out(&mut total), constant()]).unwrap();
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

/// A file's first bytes, which can be written.
///
/// # Safety
/// While the slice is used, nobody writes to the file in another way, or makes it shorter.
unsafe fn mapped(file: &File, len: usize, flags: i32) -> &'static mut [u8] {
    // SAFETY: a new mapping, which stays; that its bytes are nobody else's the caller says.
    unsafe { std::slice::from_raw_parts_mut(map(len, RW, flags, Some(file)), len) }
}

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn private_files() {
    let (_hmm, dev) = device(64);
    let file = file(LEN);
    // SAFETY: the file is this test's own, and as long.
    three_rounds(&dev, unsafe { mapped(&file, LEN, libc::MAP_PRIVATE) }, "a private file");
    let mut text = vec![];
    (&file).read_to_end(&mut text).unwrap();
    let mut whole = vec![0; LEN];
    file.read_exact_at(&mut whole, 0).unwrap();
    assert!(whole.iter().all(|&x| x == 5), "the file itself is as it was");
}

fn shared_files_and_memory_are_used_in_place() {
    let (_hmm, dev) = device(64);
    let file = file(LEN);
    // SAFETY: the file is this test's own, and as long.
    let memory = unsafe { mapped(&file, LEN, libc::MAP_SHARED) };
    three_rounds(&dev, memory, "a shared file");
    let mut whole = vec![0; LEN];
    file.read_exact_at(&mut whole, 0).unwrap();
    assert!(whole == memory, "the file has what was written");
    let memfd = memfd();
    memfd.set_len(LEN as u64).unwrap();
    // SAFETY: as above.
    three_rounds(&dev, unsafe { mapped(&memfd, LEN, libc::MAP_SHARED) }, "a memfd");
    three_rounds(&dev, shared(LEN), "shared anonymous memory");
    let before = dev.stats();
    three_rounds(&dev, memory, "the same again");
    let moved = dev.stats() - before;
    assert!(moved.bytes_to_device < 10 * 4096, "shared memory is not copied: {moved:?}");
}

/// A device sees the pages of a shared mapping in place. When the program maps another file there, it must not go on seeing the first one's.
fn another_file_at_the_same_address() {
    let (_hmm, dev) = device(64);
    let (one, two) = (file(LEN), file(LEN));
    two.write_all_at(&[9; LEN], 0).unwrap();
    let bumped = |at: *mut u8, len: usize| {
        let mut sum = [0u64];
        // SAFETY: nobody else uses what is there, and where the kernel cannot use it, it is refused.
        dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at) }, len]).map(|()| sum[0])
    };
    let len = LEN.next_multiple_of(4096);
    let at = map(len, RW, libc::MAP_SHARED, Some(&one));
    assert_eq!(bumped(at, LEN).unwrap(), 5 * LEN as u64);
    // SAFETY: in place of the mapping just made.
    let again = unsafe { libc::mmap(at.cast(), len, RW, libc::MAP_SHARED | libc::MAP_FIXED, two.as_raw_fd(), 0) };
    assert_eq!(again, at.cast());
    assert_eq!(bumped(at, LEN).unwrap(), 9 * LEN as u64);
    // Nothing there, then private memory.
    // SAFETY: the mapping just made, which only kernels use.
    unsafe { libc::munmap(at.cast(), len) };
    let error = bumped(at, 1).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Wild { .. })), "{error}");
    // SAFETY: where nothing is; the slice is all that is used of the new mapping, which stays.
    let again = unsafe { std::slice::from_raw_parts_mut(map_at(at as usize, len, libc::MAP_FIXED), LEN) };
    three_rounds(&dev, again, "private memory there");
    // Read-only from now on.
    let at = map(len, RW, libc::MAP_SHARED, Some(&two));
    bumped(at, LEN).unwrap();
    // SAFETY: the mapping just made, which only kernels use.
    let access = |access| assert_eq!(unsafe { libc::mprotect(at.cast(), len, access) }, 0);
    access(libc::PROT_READ);
    let error = bumped(at, 10).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Wild { write: true, .. })), "{error}");
    access(RW);
    assert_eq!(bumped(at, 10).unwrap(), 10 * 11, "the refused launch wrote nothing");
}

/// The last page of a mapping may reach beyond its file, and whole pages may: they are read as zeros, with an error that names the address.
fn beyond_the_end_of_a_file() {
    let (_hmm, dev) = device(64);
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        let file = file(4 * 4096 + 100);
        let at = map(40 * 4096, RW, flags, Some(&file));
        let bumped = |page: usize, len: usize| {
            let mut sum = [0u64];
            // SAFETY: inside the mapping, which nobody else uses; where the file has ended, the kernel is refused.
            let result = dev.run(&bump, 1, args![out(&mut sum), unsafe { ptr(at.add(page * 4096)) }, len]);
            result.map(|()| sum[0])
        };
        assert_eq!(bumped(0, 4 * 4096 + 200).unwrap(), 5 * (4 * 4096 + 100));
        let error = bumped(0, 20 * 4096).unwrap_err();
        let address = match error {
            Error::Kernel(KernelFault::Wild { address, .. } | KernelFault::Unreachable { address }) => address,
            error => panic!("{error}"),
        };
        assert_eq!(address & !4095, at as usize + 5 * 4096);
        bumped(0, 100).unwrap();
        // The file grows.
        file.set_len(40 * 4096).unwrap();
        let sum = bumped(30, 4096).unwrap();
        // SAFETY: inside the mapping, and inside the file by now.
        assert_eq!((sum, unsafe { *at.add(30 * 4096) }), (0, 1));
    }
}

/// CPU and kernel wait for each other in shared memory while the kernel runs.
fn a_flag_in_shared_memory() {
    let (_hmm, dev) = device(64);
    let turns = 10_000u32;
    // SAFETY: memory that stays, and that all use as an atomic.
    let flag = unsafe { &*shared(4096).as_ptr().cast::<AtomicU32>() };
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
            // SAFETY: the flag, which outlives the launch; all use it as an atomic.
            let flag = unsafe { &*ctx.pointer::<AtomicU32>(0) };
            for turn in 0..turns {
                while flag.load(Ordering::Acquire) != 2 * turn + 1 {
                    std::hint::spin_loop();
                }
                flag.store(2 * turn + 2, Ordering::Release);
            }
        };
        // SAFETY: as for the kernel.
        dev.run(&kernel, 1, args![unsafe { ptr(flag) }]).unwrap();
    });
    assert_eq!(flag.load(Ordering::Relaxed), 2 * turns);
}

fn memory_that_the_kernel_will_not_move() {
    let (_hmm, dev) = device(64);
    let mut pages = filled(100);
    if lock(pages.slice::<u8>()) {
        three_rounds(&dev, pages.slice(), "locked memory");
    } else {
        eprintln!("memory cannot be locked here (RLIMIT_MEMLOCK): not tested");
    }
    // The page of a thread's control block, which must not leave. Its first word points to itself.
    // SAFETY: it has no arguments.
    let block = unsafe { libc::pthread_self() } as *const usize;
    let mut word = [0usize];
    // SAFETY: it is given the control block of a thread that waits for it.
    let read = |ctx: &Ctx<'_>| ctx.out::<usize>(1).chunk(1)[0] = unsafe { *ctx.pointer::<usize>(0) };
    // SAFETY: as for the kernel: it only reads.
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
        let declared = &mut memory[1000..][..len];
        let kernel = |ctx: &Ctx<'_>| {
            ctx.out::<u8>(0).chunk(usize::MAX).fill(round);
            let start = ctx.pointer::<u8>(1);
            for at in [0, 7, 999, 1000 + len, 1999 + len] {
                // SAFETY: inside `memory`, and beside what is declared.
                unsafe { *start.add(at) += 1 };
            }
        };
        // SAFETY: as for the kernel: nobody else uses the memory meanwhile.
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
        // SAFETY: all of DATA, which the launch borrows.
        unsafe { std::slice::from_raw_parts_mut(p, 10_000) }.fill(2);
        panic!("now");
    };
    // SAFETY: this test alone uses it, once.
    let data = unsafe { &mut *std::ptr::addr_of_mut!(DATA) };
    dev.run(&kernel, 1, args![bare(data)]).unwrap_err();
    assert!(data.iter().all(|&x| x == 1 || x == 2), "each byte reads as before or as the kernel wrote it");
}

/// Two workers faulted in one block whose pages were shared since a fork. While one of them made them the program's own, which touches them, the other moved
/// them; and the first one's touch was taken for that of a kernel which forgot to translate an address: the launch failed.
fn two_workers_touch_what_a_fork_has_shared() {
    const BLOCK: usize = 2 << 20;
    const BLOCKS: usize = 16;
    let (hmm, dev) = device(64);
    let mut pages = Pages::new(BLOCKS * BLOCK);
    let data = pages.slice::<u8>();
    for round in 0..20u8 {
        data.iter_mut().step_by(4096).for_each(|x| *x = round);
        in_a_child(|| true);
        let met = [const { AtomicU32::new(0) }; BLOCKS];
        let kernel = |ctx: &Ctx<'_>| {
            let start = ctx.pointer::<u8>(0);
            for (number, met) in met.iter().enumerate() {
                met.fetch_add(1, Ordering::AcqRel);
                while met.load(Ordering::Acquire) < 2 {
                    std::hint::spin_loop();
                }
                // SAFETY: each group writes bytes of its own, which nobody else uses meanwhile.
                unsafe { *start.add(number * BLOCK + ctx.group() * BLOCK / 2) += 1 };
            }
        };
        dev.run(&kernel, 2, args![bare(data)]).unwrap();
        assert!(data.iter().step_by(BLOCK / 2).all(|&x| x == round + 1));
        hmm.evict_all().unwrap();
    }
}
