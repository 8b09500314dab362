//! Whatever memory a program has can be an argument: declared, at any alignment, and right on both sides over several launches.

use crate::harness::*;
use std::fs::File;
use std::io::{Read, Write};
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

/// A file's first bytes, mapped for good.
///
/// # Safety
/// What `access` forbids is not done; and while the slice is used, nobody writes to the file in another way, or makes it shorter.
unsafe fn mapped(file: &File, access: i32, sharing: i32) -> &'static mut [u8] {
    // SAFETY: a new mapping, which stays; that its bytes are nobody else's the caller says.
    unsafe { std::slice::from_raw_parts_mut(map(FILE, access, sharing, Some(file)), FILE) }
}

/// Bytes of each file.
const FILE: usize = 300_000;

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
        // SAFETY: the other thread waits, and uses it again only after that.
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
    // SAFETY: this test alone uses them, once.
    let (zeroed, filled) = unsafe { (&mut *std::ptr::addr_of_mut!(ZEROED), &mut *std::ptr::addr_of_mut!(FILLED)) };
    written(&dev, zeroed, ".bss");
    written(&dev, filled, ".data");
    read(&dev, &CONSTANT, ".rodata");
}

fn read_only_and_unreadable_mappings() {
    let (_hmm, dev) = device(32);
    let mut pages = Pages::new(49 * PAGE);
    let memory = pages.slice::<u8>();
    memory.fill(5);
    // SAFETY: from here on it is only read; launches that would write it are refused.
    unsafe { protect(memory, libc::PROT_READ) };
    let memory = &mut memory[..200_000];
    read(&dev, memory, "a read-only mapping");
    let refused = |memory: &mut [u8]| dev.run(&add_one, 1, args![inout(memory)]).unwrap_err().to_string();
    let message = refused(memory);
    assert!(message.contains(&format!("{:x}", memory.as_ptr() as usize)) && message.contains("writ"), "{message}");
    // One page of it, in the middle of what may be written.
    let mut pages = Pages::new(10 * PAGE);
    let mixed = pages.slice::<u8>();
    mixed.fill(6);
    // SAFETY: from here on that page is only read.
    unsafe { protect(&mixed[5 * PAGE..6 * PAGE], libc::PROT_READ) };
    let message = refused(mixed);
    assert!(message.contains(&format!("{:x}", mixed[5 * PAGE..].as_ptr() as usize)), "{message}");
    assert!(mixed.iter().all(|&x| x == 6), "a refused launch changes nothing");
    read(&dev, mixed, "a mapping with a read-only page");
    // SAFETY: from here on the program uses only what lies before that page.
    unsafe { protect(&mixed[5 * PAGE..6 * PAGE], libc::PROT_NONE) };
    let message = refused(mixed);
    assert!(message.contains(&format!("{:x}", mixed[5 * PAGE..].as_ptr() as usize)), "{message}");
    let message = dev.run(&triple, 1, args![out(&mut [0u8; 10]), inp(mixed)]).unwrap_err().to_string();
    assert!(message.contains(&format!("{:x}", mixed[5 * PAGE..].as_ptr() as usize)) && message.contains("read"), "{message}");
    written(&dev, &mut mixed[..5 * PAGE], "what lies before it");
}

fn shared_anonymous_memory_and_memfd() {
    let (_hmm, dev) = device(32);
    written(&dev, shared(300_000), "shared anonymous memory");
    let file = memfd();
    file.set_len(FILE as u64).unwrap();
    // SAFETY: the file is this test's own. The two show the same bytes, but the test uses one of them at a time.
    let [one, two] = [0, 1].map(|_| unsafe { mapped(&file, RW, libc::MAP_SHARED) });
    written(&dev, one, "a memfd");
    assert!(one == two, "the other mapping shows the same");
    two.fill(1);
    dev.run(&add_one, 1, args![inout(&mut one[5..100_000])]).unwrap();
    assert!(two[..5].iter().all(|&x| x == 1) && two[5..100_000].iter().all(|&x| x == 2));
    // SAFETY: the file is this test's own, and nobody writes to it from here on.
    let private = unsafe { mapped(&file, RW, libc::MAP_PRIVATE) };
    written(&dev, private, "a memfd, mapped privately");
    assert!(two[5..100_000].iter().all(|&x| x == 2), "which changes nothing in it");
}

fn files_mapped_privately() {
    let (_hmm, dev) = device(32);
    let file = temporary_file(300_000);
    // SAFETY: the file is this test's own, and the mapping is only read.
    let memory = unsafe { mapped(&file, libc::PROT_READ, libc::MAP_PRIVATE) };
    read(&dev, memory, "a file, mapped to be read");
    // SAFETY: the file is this test's own, and not written.
    let memory = unsafe { mapped(&file, RW, libc::MAP_PRIVATE) };
    read(&dev, memory, "a file, mapped privately");
    written(&dev, memory, "a file, mapped privately");
    let mut bytes = vec![0; 300_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().enumerate().all(|(i, &x)| x == (i % 253) as u8), "the file is as it was");
}

fn files_mapped_shared() {
    let (_hmm, dev) = device(32);
    let file = temporary_file(300_000);
    // SAFETY: the file is this test's own, and the mapping is only read.
    read(&dev, unsafe { mapped(&file, libc::PROT_READ, libc::MAP_SHARED) }, "a file, mapped shared to be read");
    // SAFETY: the file is this test's own; it is written in another way only between two uses of the slice.
    let memory = unsafe { mapped(&file, RW, libc::MAP_SHARED) };
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
        // SAFETY: a new mapping.
        let mut pages = unsafe { Pages::from_raw(map(4 << 20, RW, flags, None), 4 << 20) };
        written(&dev, pages.slice(), "hugetlb pages");
    }
}

fn huge_and_small_pages() {
    let (_hmm, dev) = device(32);
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let mut pages = Pages::huge(6 << 20);
        advise(pages.slice::<u8>(), advice);
        written(&dev, pages.slice(), if advice == libc::MADV_HUGEPAGE { "huge pages" } else { "small pages" });
    }
    // Half of a block huge once, then small.
    let mut pages = Pages::huge(4 << 20);
    pages.slice::<u8>().fill(1);
    advise(&mut pages.slice::<u8>()[PAGE..301 * PAGE], libc::MADV_DONTNEED);
    written(&dev, pages.slice(), "split pages");
}

fn locked_memory() {
    let (_hmm, dev) = device(32);
    let mut pages = Pages::new(300_000);
    let memory = pages.slice::<u8>();
    if !lock(memory) {
        println!("skipped: {}", std::io::Error::last_os_error());
        return;
    }
    written(&dev, memory, "locked memory");
    assert_eq!(pages_present(memory), memory.len() / PAGE, "it has stayed");
    // Locked in the middle, and locked while it is on the device.
    unlock(memory);
    dev.prefetch(memory).unwrap();
    assert_eq!(pages_present(memory), 0);
    assert!(lock(&memory[10 * PAGE..30 * PAGE]));
    written(&dev, memory, "partly locked memory");
}

fn memory_shared_with_a_living_child() {
    let (_hmm, dev) = device(32);
    let mut data = vec![3u8; 300_001];
    let (mut ours, mut childs) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    let child = fork(false, || {
        // It sees what it has inherited, whenever it looks.
        let mut byte = [0];
        while matches!(ours.0.read(&mut byte), Ok(1)) && byte == [1] {
            let right = u8::from(data.iter().all(|&x| x == 3));
            let _ = childs.1.write(&[right]);
        }
        true
    });
    let mut child_is_right = || {
        let mut byte = [1];
        ours.1.write_all(&byte).unwrap();
        childs.0.read_exact(&mut byte).unwrap();
        byte == [1]
    };
    dev.run(&add_one, 1, args![inout(&mut data[9..])]).unwrap();
    assert!(child_is_right());
    assert!(data[9..].iter().all(|&x| x == 4));
    written(&dev, &mut data, "memory shared with a child");
    assert!(child_is_right());
    ours.1.write_all(&[0]).unwrap();
    assert_eq!(wait(child), 0);
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
    let mut pages = Pages::new(300_000);
    let memory = pages.slice::<u8>();
    memory.fill(1);
    let pinned = &memory[10 * PAGE..40 * PAGE];
    let buffer = libc::iovec { iov_base: pinned.as_ptr().cast_mut().cast(), iov_len: pinned.len() };
    // SAFETY: inside `pages`; the ring pins them, and only the entry below writes there.
    unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
    let file = temporary_file(100 * PAGE);
    written(&dev, memory, "partly pinned memory");
    dev.prefetch(&*memory).unwrap();
    assert!(present(&raw const memory[20 * PAGE]), "a pinned page has stayed");
    assert!(!present(&raw const memory[5 * PAGE]), "another has gone");
    // The kernel reads the file straight into the pinned pages.
    let at = &raw mut memory[15 * PAGE];
    let entry = io_uring::opcode::ReadFixed::new(io_uring::types::Fd(file.as_raw_fd()), at, 5 * PAGE as u32, 0).build();
    // SAFETY: the entry reads into what is registered, and has ended when the bytes are looked at.
    unsafe { ring.submission().push(&entry) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), 5 * PAGE as i32);
    assert!(memory[15 * PAGE..20 * PAGE].iter().enumerate().all(|(i, &x)| x == (i % 253) as u8), "what the kernel has read");
    written(&dev, memory, "partly pinned memory, later");
}
