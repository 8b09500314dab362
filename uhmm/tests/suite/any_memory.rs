//! Whatever memory a program has can be an argument: declared, at any alignment, and right on both sides over several launches.

use crate::harness::*;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use uhmm::{Ctx, Device, args, inout, inp, out};

crate::tests![
    vectors_and_boxes,
    stacks_of_every_thread,
    statics,
    read_only_and_unreadable_mappings,
    shared_anonymous_memory_and_memfd,
    files_mapped_privately,
    files_mapped_shared,
    hugetlb_pages,
    huge_and_small_pages,
    locked_memory,
    memory_shared_with_a_living_child,
    memory_pinned_by_io_uring,
];

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn add_one(ctx: &Ctx<'_>) {
    ctx.out::<u8>(0).chunk(usize::MAX).iter_mut().for_each(|x| *x = x.wrapping_add(1));
}

/// r[i] = 3 * a[i] + 1
fn triple(ctx: &Ctx<'_>) {
    let a = ctx.inp::<u8>(1);
    ctx.out::<u8>(0).chunk(usize::MAX).iter_mut().zip(a).for_each(|(r, a)| *r = a.wrapping_mul(3).wrapping_add(1));
}

/// Some ranges of `memory` with odd ends, and the whole.
fn parts(len: usize) -> Vec<std::ops::Range<usize>> {
    let middle = len / 3..len / 3 + 1;
    let all = [0..len, 1..len, 0..len - 1, 13..len / 2 + 7, middle, 4095..4097, PAGE - 3..3 * PAGE + 5, len.saturating_sub(5)..len];
    all.into_iter().filter(|part| part.start < part.end && part.end <= len).collect()
}

/// Uses writable memory in all three ways, over several launches, and checks each byte of it, also those beside the argument.
fn written(dev: &Device, memory: &mut [u8], kind: &str) {
    memory.iter_mut().enumerate().for_each(|(i, x)| *x = (i % 251) as u8);
    let mut shadow = memory.to_vec();
    for (number, part) in parts(memory.len()).into_iter().enumerate() {
        for round in 0..3 {
            dev.run(&add_one, 1, args![inout(&mut memory[part.clone()])]).unwrap_or_else(|e| panic!("{kind}, {part:?}: {e}"));
            shadow[part.clone()].iter_mut().for_each(|x| *x = x.wrapping_add(1));
            if round == 1 {
                // The CPU has its turn.
                let at = part.start + (part.len() / 2);
                memory[at] ^= 0x80;
                shadow[at] ^= 0x80;
            }
        }
        same(memory, &shadow, &format!("{kind}, inout {part:?}"));
        let mut result = vec![0u8; part.len()];
        for _ in 0..2 {
            dev.run(&triple, 1, args![out(&mut result), inp(&memory[part.clone()])]).unwrap();
            assert!(result.iter().zip(&shadow[part.clone()]).all(|(r, x)| *r == x.wrapping_mul(3).wrapping_add(1)), "{kind}, inp {part:?}");
            let changed = part.start;
            memory[changed] = memory[changed].wrapping_add(number as u8);
            shadow[changed] = shadow[changed].wrapping_add(number as u8);
        }
        same(memory, &shadow, &format!("{kind}, inp {part:?}"));
        dev.run(&triple, 1, args![out(&mut memory[part.clone()]), inp(&result)]).unwrap();
        shadow[part.clone()].iter_mut().zip(&result).for_each(|(x, r)| *x = r.wrapping_mul(3).wrapping_add(1));
        same(memory, &shadow, &format!("{kind}, out {part:?}"));
    }
}

fn same(memory: &[u8], shadow: &[u8], what: &str) {
    let at = memory.iter().zip(shadow).position(|(x, shadow)| x != shadow);
    assert_eq!(at, None, "{what}");
}

/// Uses memory that is only read.
fn read(dev: &Device, memory: &[u8], kind: &str) {
    let shadow = memory.to_vec();
    for part in parts(memory.len()) {
        let mut result = vec![0u8; part.len()];
        for _ in 0..3 {
            dev.run(&triple, 1, args![out(&mut result), inp(&memory[part.clone()])]).unwrap_or_else(|e| panic!("{kind}, {part:?}: {e}"));
            assert!(result.iter().zip(&shadow[part.clone()]).all(|(r, x)| *r == x.wrapping_mul(3).wrapping_add(1)), "{kind}, {part:?}");
        }
    }
    same(memory, &shadow, kind);
}

/// Memory of its own mapping.
fn map(len: usize, access: i32, flags: i32, file: i32) -> &'static mut [u8] {
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, file, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    unsafe { std::slice::from_raw_parts_mut(at.cast(), len) }
}

fn temporary_file(len: usize) -> File {
    let path = std::env::temp_dir().join(format!("uhmm-any-memory-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let bytes: Vec<u8> = (0..len).map(|i| (i % 253) as u8).collect();
    file.write_all_at(&bytes, 0).unwrap();
    file
}

fn vectors_and_boxes() {
    let (_hmm, dev) = device(32);
    for len in [1, 7, 100, 4096, 5000, 70_000, 300_001, 5_000_003] {
        written(&dev, &mut vec![0; len], &format!("a Vec of {len}"));
    }
    written(&dev, &mut *Box::new([0u8; 33]), "a Box");
    written(&dev, &mut *Box::new([0u8; 200_000]), "a large Box");
    let mut pair = (vec![0u8; 10], vec![0u8; 10]);
    written(&dev, &mut pair.0, "a small Vec");
    written(&dev, &mut pair.1, "its neighbour");
}

fn stacks_of_every_thread() {
    let (_hmm, dev) = device(32);
    let mut main = [0u8; 300_001];
    written(&dev, &mut main, "the main thread's stack");
    std::thread::scope(|scope| {
        let (send, receive) = std::sync::mpsc::channel::<(usize, usize)>();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let mut data = [7u8; 300_001];
            send.send((data.as_mut_ptr() as usize, data.len())).unwrap();
            wait.recv().unwrap();
            std::hint::black_box(&mut data);
        });
        let (start, len) = receive.recv().unwrap();
        written(&dev, unsafe { std::slice::from_raw_parts_mut(start as *mut u8, len) }, "another thread's stack");
        done.send(()).unwrap();
        scope.spawn(|| {
            let mut data = [7u8; 100_001];
            written(&dev, &mut data, "the caller's own stack");
        });
    });
}

fn statics() {
    static mut ZEROED: [u8; 200_003] = [0; 200_003];
    static mut FILLED: [u8; 200_003] = [1; 200_003];
    static CONSTANT: [u8; 100_001] = [9; 100_001];
    let (_hmm, dev) = device(32);
    written(&dev, unsafe { &mut *std::ptr::addr_of_mut!(ZEROED) }, ".bss");
    written(&dev, unsafe { &mut *std::ptr::addr_of_mut!(FILLED) }, ".data");
    read(&dev, &CONSTANT, ".rodata");
}

fn read_only_and_unreadable_mappings() {
    let (_hmm, dev) = device(32);
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = map(200_000, RW, private, -1);
    memory.fill(5);
    assert_eq!(unsafe { libc::mprotect(memory.as_mut_ptr().cast(), memory.len(), libc::PROT_READ) }, 0);
    read(&dev, memory, "a read-only mapping");
    let refused = |memory: &mut [u8]| dev.run(&add_one, 1, args![inout(memory)]).unwrap_err().to_string();
    let message = refused(memory);
    assert!(message.contains(&format!("{:x}", memory.as_ptr() as usize)) && message.contains("writ"), "{message}");
    // One page of it, in the middle of what may be written.
    let mixed = map(10 * PAGE, RW, private, -1);
    mixed.fill(6);
    assert_eq!(unsafe { libc::mprotect(mixed[5 * PAGE..].as_mut_ptr().cast(), PAGE, libc::PROT_READ) }, 0);
    let message = refused(mixed);
    assert!(message.contains(&format!("{:x}", mixed[5 * PAGE..].as_ptr() as usize)), "{message}");
    assert!(mixed.iter().all(|&x| x == 6), "a refused launch changes nothing");
    read(&dev, mixed, "a mapping with a read-only page");
    assert_eq!(unsafe { libc::mprotect(mixed[5 * PAGE..].as_mut_ptr().cast(), PAGE, libc::PROT_NONE) }, 0);
    let message = refused(mixed);
    assert!(message.contains(&format!("{:x}", mixed[5 * PAGE..].as_ptr() as usize)), "{message}");
    let message = dev.run(&triple, 1, args![out(&mut [0u8; 10]), inp(mixed)]).unwrap_err().to_string();
    assert!(message.contains(&format!("{:x}", mixed[5 * PAGE..].as_ptr() as usize)) && message.contains("read"), "{message}");
    written(&dev, &mut mixed[..5 * PAGE], "what lies before it");
}

fn shared_anonymous_memory_and_memfd() {
    let (_hmm, dev) = device(32);
    written(&dev, map(300_000, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1), "shared anonymous memory");
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(libc::memfd_create(c"any memory".as_ptr(), 0)) };
    file.set_len(300_000).unwrap();
    let [one, two] = [0, 1].map(|_| map(300_000, RW, libc::MAP_SHARED, file.as_raw_fd()));
    written(&dev, one, "a memfd");
    assert!(one == two, "the other mapping shows the same");
    two.fill(1);
    dev.run(&add_one, 1, args![inout(&mut one[5..100_000])]).unwrap();
    assert!(two[..5].iter().all(|&x| x == 1) && two[5..100_000].iter().all(|&x| x == 2));
    let private = map(300_000, RW, libc::MAP_PRIVATE, file.as_raw_fd());
    written(&dev, private, "a memfd, mapped privately");
    assert!(two[5..100_000].iter().all(|&x| x == 2), "which changes nothing in it");
}

fn files_mapped_privately() {
    let (_hmm, dev) = device(32);
    let file = temporary_file(300_000);
    let memory = map(300_000, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd());
    read(&dev, memory, "a file, mapped to be read");
    let memory = map(300_000, RW, libc::MAP_PRIVATE, file.as_raw_fd());
    read(&dev, memory, "a file, mapped privately");
    written(&dev, memory, "a file, mapped privately");
    let mut bytes = vec![0; 300_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().enumerate().all(|(i, &x)| x == (i % 253) as u8), "the file is as it was");
}

fn files_mapped_shared() {
    let (_hmm, dev) = device(32);
    let file = temporary_file(300_000);
    read(&dev, map(300_000, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd()), "a file, mapped shared to be read");
    let memory = map(300_000, RW, libc::MAP_SHARED, file.as_raw_fd());
    written(&dev, memory, "a file, mapped shared");
    let mut bytes = vec![0; 300_000];
    memory.fill(40);
    for round in 41..45 {
        dev.run(&add_one, 1, args![inout(&mut memory[77..299_999])]).unwrap();
        // What the device wrote has reached the file; what others write to it reaches the device.
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..77].iter().all(|&x| x == 40) && bytes[77..299_999].iter().all(|&x| x == round), "round {round}");
        assert_eq!(bytes[299_999], 40);
    }
    file.write_all_at(&[90; 300_000], 0).unwrap();
    dev.run(&add_one, 1, args![inout(&mut *memory)]).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&x| x == 91));
}

/// How many huge pages the machine sets aside: put back when it goes.
struct HugePages(String);

impl HugePages {
    const SETTING: &str = "/proc/sys/vm/nr_hugepages";

    fn set_aside(count: usize) -> Option<Self> {
        let before = std::fs::read_to_string(Self::SETTING).ok()?;
        let wanted = before.trim().parse::<usize>().ok()? + count;
        let kept = HugePages(before);
        std::fs::write(Self::SETTING, wanted.to_string()).ok()?;
        let got = std::fs::read_to_string(Self::SETTING).ok()?.trim().parse::<usize>().ok()?;
        (got >= wanted).then_some(kept)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::SETTING, &self.0);
    }
}

fn hugetlb_pages() {
    let Some(_kept) = HugePages::set_aside(4) else {
        println!("skipped: vm.nr_hugepages cannot be raised");
        return;
    };
    let (_hmm, dev) = device(32);
    for sharing in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        let memory = map(4 << 20, RW, flags, -1);
        written(&dev, memory, "hugetlb pages");
        let (start, len) = (memory.as_mut_ptr(), memory.len());
        assert_eq!(unsafe { libc::munmap(start.cast(), len) }, 0);
    }
}

fn huge_and_small_pages() {
    let (_hmm, dev) = device(32);
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let mut pages = Pages::huge(6 << 20);
        unsafe { libc::madvise(pages.start.cast(), pages.len, advice) };
        written(&dev, pages.slice(), if advice == libc::MADV_HUGEPAGE { "huge pages" } else { "small pages" });
    }
    // Half of a block huge once, then small.
    let mut pages = Pages::huge(4 << 20);
    pages.slice::<u8>().fill(1);
    unsafe { libc::madvise(pages.start.add(PAGE).cast(), 300 * PAGE, libc::MADV_DONTNEED) };
    written(&dev, pages.slice(), "split pages");
}

fn locked_memory() {
    let (_hmm, dev) = device(32);
    let memory = map(300_000, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    if unsafe { libc::mlock(memory.as_ptr().cast(), memory.len()) } != 0 {
        println!("skipped: {}", std::io::Error::last_os_error());
        return;
    }
    written(&dev, memory, "locked memory");
    assert_eq!(pages_present(memory), memory.len() / PAGE, "it has stayed");
    // Locked in the middle, and locked while it is on the device.
    assert_eq!(unsafe { libc::munlock(memory.as_ptr().cast(), memory.len()) }, 0);
    dev.prefetch(memory).unwrap();
    assert_eq!(pages_present(memory), 0);
    assert_eq!(unsafe { libc::mlock(memory[10 * PAGE..].as_ptr().cast(), 20 * PAGE) }, 0);
    written(&dev, memory, "partly locked memory");
}

fn memory_shared_with_a_living_child() {
    let (_hmm, dev) = device(32);
    let mut data = vec![3u8; 300_001];
    let (mut to_child, mut to_parent) = ([0; 2], [0; 2]);
    assert_eq!(unsafe { libc::pipe(to_child.as_mut_ptr()) | libc::pipe(to_parent.as_mut_ptr()) }, 0);
    let child = unsafe { libc::fork() };
    if child == 0 {
        // It sees what it has inherited, whenever it looks.
        let mut byte = 0u8;
        while unsafe { libc::read(to_child[0], (&raw mut byte).cast(), 1) } == 1 && byte == 1 {
            let right = u8::from(data.iter().all(|&x| x == 3));
            unsafe { libc::write(to_parent[1], (&raw const right).cast(), 1) };
        }
        unsafe { libc::_exit(0) };
    }
    let child_is_right = || {
        let mut byte = 1u8;
        assert_eq!(unsafe { libc::write(to_child[1], (&raw const byte).cast(), 1) }, 1);
        assert_eq!(unsafe { libc::read(to_parent[0], (&raw mut byte).cast(), 1) }, 1);
        byte == 1
    };
    dev.run(&add_one, 1, args![inout(&mut data[9..])]).unwrap();
    assert!(child_is_right());
    assert!(data[9..].iter().all(|&x| x == 4));
    written(&dev, &mut data, "memory shared with a child");
    assert!(child_is_right());
    assert_eq!(unsafe { libc::write(to_child[1], [0u8].as_ptr().cast(), 1) }, 1);
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
}

/// A buffer that is registered with io_uring stays where it is, for the kernel writes there at any time.
fn memory_pinned_by_io_uring() {
    let mut ring = match io_uring::IoUring::new(4) {
        Ok(ring) => ring,
        Err(error) => {
            println!("skipped: io_uring: {error}");
            return;
        }
    };
    let (_hmm, dev) = device(32);
    let memory = map(300_000, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    memory.fill(1);
    let pinned = &memory[10 * PAGE..40 * PAGE];
    let buffer = libc::iovec { iov_base: pinned.as_ptr().cast_mut().cast(), iov_len: pinned.len() };
    unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
    let file = temporary_file(100 * PAGE);
    written(&dev, memory, "partly pinned memory");
    dev.prefetch(&*memory).unwrap();
    assert!(present(&raw const memory[20 * PAGE]), "a pinned page has stayed");
    assert!(!present(&raw const memory[5 * PAGE]), "another has gone");
    // The kernel reads the file straight into the pinned pages.
    let at = &raw mut memory[15 * PAGE];
    let entry = io_uring::opcode::ReadFixed::new(io_uring::types::Fd(file.as_raw_fd()), at, 5 * PAGE as u32, 0).build();
    unsafe { ring.submission().push(&entry) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), 5 * PAGE as i32);
    assert!(memory[15 * PAGE..20 * PAGE].iter().enumerate().all(|(i, &x)| x == (i % 253) as u8), "what the kernel has read");
    written(&dev, memory, "partly pinned memory, later");
}
