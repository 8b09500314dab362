//! The kernel's own accesses to memory that is on the device: a system call, a ring, another process reads or writes it, and it just works.
//!
//! Each access is made on 4 KiB and on huge pages, on ranges that begin and end inside pages, and on pages that only the device has as well as on pages
//! that both have. Then the device and the CPU must read the same.

use crate::harness::*;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use uhmm::{Ctx, Device, Uhmm, args, inp, out};

crate::tests![
    read_and_write,
    vectors_that_are_on_the_device_themselves,
    sockets,
    pages_in_a_pipe,
    direct_io,
    small_structures,
    a_ring_reads_and_writes,
    a_rings_registered_buffers,
    another_process_reads_and_writes,
    memory_as_a_file,
];

/// Bytes of the memory that is accessed: whole blocks.
const LEN: usize = 6 << 20;

/// Starts and lengths: everything, unaligned, two pages, one byte.
const RANGES: [(usize, usize); 6] = [(0, LEN), (3, LEN - 10), (4095, 2), (2 << 20, 4096), ((2 << 20) - 5, 300_000), (12_345, 1)];

/// Where the pages are before the access.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// On the device alone.
    Private,
    /// On both sides: a write must end the device's copy.
    Duplicated,
}

/// Memory, what it must hold, and the device that it goes to.
pub struct Bench {
    pages: Pages,
    shadow: Vec<u8>,
    random: fastrand::Rng,
    dev: Device,
    _hmm: Uhmm,
}

/// Whether two inputs are equal, and the first's sum.
fn compare(ctx: &Ctx<'_>) {
    let (one, other) = (ctx.inp::<u8>(1), ctx.inp::<u8>(2));
    let sum = one.iter().map(|&x| u64::from(x)).sum();
    ctx.out::<u64>(0).chunk(2).copy_from_slice(&[u64::from(one == other), sum]);
}

impl Bench {
    pub fn new(huge: bool) -> Self {
        let (hmm, dev) = device(64);
        let mut pages = if huge { Pages::huge(LEN) } else { Pages::new(LEN) };
        if !huge {
            advise(pages.slice::<u8>(), libc::MADV_NOHUGEPAGE);
        }
        let mut bench = Bench { pages, shadow: vec![0; LEN], random: fastrand::Rng::with_seed(3), dev, _hmm: hmm };
        bench.random.fill(&mut bench.shadow);
        bench.pages.slice().copy_from_slice(&bench.shadow);
        bench
    }

    /// Other bytes, as many as the range has.
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.random.fill(&mut bytes);
        bytes
    }

    fn go(&mut self, place: Place) {
        let data = self.pages.slice::<u8>();
        match place {
            Place::Private => {
                self.dev.prefetch(data).unwrap();
                assert_eq!(pages_present(data), 0, "the pages are on the device");
            }
            Place::Duplicated => {
                self.dev.evict(data).unwrap();
                let before = self.dev.stats();
                self.dev.run(&|ctx: &Ctx<'_>| assert_eq!(ctx.inp::<u8>(0).len(), LEN), 1, args![inp(data)]).unwrap();
                assert_eq!((self.dev.stats() - before).pages_duplicated as usize, LEN / 4096);
            }
        }
    }

    fn check(&mut self, what: &str) {
        let mut result = [0u64; 2];
        let data = self.pages.slice::<u8>();
        self.dev.run(&compare, 1, args![out(&mut result), inp(data), inp(&self.shadow)]).unwrap();
        assert!(data == self.shadow, "the CPU reads something else: {what}");
        let sum = self.shadow.iter().map(|&x| u64::from(x)).sum::<u64>();
        assert_eq!(result, [1, sum], "the device reads something else: {what}");
    }

    /// For every range, from every place: the kernel reads it, by `read`; and overwrites it with given bytes, by `write`.
    pub fn each(&mut self, mut read: impl FnMut(&[u8]) -> Vec<u8>, mut write: impl FnMut(&mut [u8], &[u8])) {
        for (from, len) in RANGES {
            for place in [Place::Private, Place::Duplicated] {
                let what = format!("{len} bytes from {from}, {place:?}");
                self.go(place);
                let seen = read(&self.pages.slice::<u8>()[from..][..len]);
                assert!(seen == self.shadow[from..][..len], "the kernel reads something else: {what}");
                self.go(place);
                let bytes = self.bytes(len);
                self.shadow[from..][..len].copy_from_slice(&bytes);
                write(&mut self.pages.slice::<u8>()[from..][..len], &bytes);
                self.check(&what);
            }
        }
    }
}

/// On both sizes of page.
fn both(mut test: impl FnMut(&mut Bench)) {
    for huge in [false, true] {
        test(&mut Bench::new(huge));
    }
}

/// A file in memory that holds `bytes`.
fn file(bytes: &[u8]) -> File {
    let file = memfd();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// read(2), write(2), pread(2), pwrite(2): each in one call, which must not fail half-way.
fn read_and_write() {
    both(|bench| {
        bench.each(
            |data| {
                let file = file(&[]);
                assert_eq!((&file).write(data).unwrap(), data.len());
                let seen = contents(&file);
                assert_eq!(file.write_at(data, 5).unwrap(), data.len());
                assert!(contents(&file)[5..] == seen);
                seen
            },
            |data, bytes| {
                // The first half by one call, the second by the other.
                let file = file(bytes);
                let (one, other) = data.split_at_mut(bytes.len() / 2);
                assert_eq!(file.read_at(one, 0).unwrap(), one.len());
                std::io::Seek::seek(&mut &file, std::io::SeekFrom::Start(one.len() as u64)).unwrap();
                assert_eq!((&file).read(other).unwrap(), other.len());
            },
        );
    });
}

/// readv(2) and writev(2), whose vectors of pieces lie on the device too.
fn vectors_that_are_on_the_device_themselves() {
    both(|bench| {
        let (_hmm, dev) = device(64);
        let vectors = |data: *const u8, len: usize| -> Vec<usize> {
            // 1024 pieces are the most that a call takes. The vector, of starts and lengths, has pages of its own, as it is large.
            let piece = len.div_ceil(1024).max(1);
            let mut all = vec![0; 32 << 10];
            for (slot, at) in all.as_chunks_mut::<2>().0.iter_mut().zip((0..len).step_by(piece)) {
                *slot = [data as usize + at, piece.min(len - at)];
            }
            dev.prefetch(&all).unwrap();
            assert_eq!(pages_present(&all), 0);
            all
        };
        bench.each(
            |data| {
                let (file, all) = (file(&[]), vectors(data.as_ptr(), data.len()));
                // SAFETY: an iovec is a start and a length, and the vector's pieces are those of `data`.
                let written = unsafe { libc::writev(file.as_raw_fd(), all.as_ptr().cast(), data.len().min(1024) as i32) };
                assert_eq!(written, data.len() as isize);
                contents(&file)
            },
            |data, bytes| {
                let (file, all) = (file(bytes), vectors(data.as_ptr(), data.len()));
                // SAFETY: as above; here `data` is borrowed exclusively.
                let read = unsafe { libc::readv(file.as_raw_fd(), all.as_ptr().cast(), bytes.len().min(1024) as i32) };
                assert_eq!(read, bytes.len() as isize);
            },
        );
    });
}

/// send(2) and recv(2), where the other side is slow and buffers are small: calls that sleep inside.
fn sockets() {
    use std::os::unix::net::UnixStream;
    both(|bench| {
        bench.each(
            |data| {
                let (mut one, mut other) = UnixStream::pair().unwrap();
                std::thread::scope(|scope| {
                    let seen = scope.spawn(move || {
                        let mut seen = vec![];
                        other.read_to_end(&mut seen).unwrap();
                        seen
                    });
                    one.write_all(data).unwrap();
                    drop(one);
                    seen.join().unwrap()
                })
            },
            |data, bytes| {
                let (mut one, other) = UnixStream::pair().unwrap();
                std::thread::scope(|scope| {
                    scope.spawn(move || one.write_all(bytes).unwrap());
                    let (at, len) = (data.as_mut_ptr(), data.len());
                    // SAFETY: the whole slice, borrowed exclusively.
                    let received = unsafe { libc::recv(other.as_raw_fd(), at.cast(), len, libc::MSG_WAITALL) };
                    assert_eq!(received, len as isize);
                });
            },
        );
    });
}

/// vmsplice(2): the pipe holds the pages themselves, which must not go to a device until they have been read; and splice(2) on to a file.
fn pages_in_a_pipe() {
    both(|bench| {
        bench.each(
            |data| {
                let (reader, writer) = std::io::pipe().unwrap();
                let file = file(&[]);
                let mut at = 0;
                while at < data.len() {
                    let piece = libc::iovec { iov_base: data[at..].as_ptr().cast_mut().cast(), iov_len: data.len() - at };
                    // SAFETY: the rest of the slice; the pipe only reads it, before this call of `each` ends.
                    let n = unsafe { libc::vmsplice(writer.as_raw_fd(), &piece, 1, 0) };
                    assert!(n > 0, "{}", std::io::Error::last_os_error());
                    let mut left = n;
                    while left > 0 {
                        let fds = (reader.as_raw_fd(), file.as_raw_fd());
                        // SAFETY: descriptors, and no offsets.
                        let moved = unsafe { libc::splice(fds.0, std::ptr::null_mut(), fds.1, std::ptr::null_mut(), left as usize, 0) };
                        assert!(moved > 0, "{}", std::io::Error::last_os_error());
                        left -= moved;
                    }
                    at += n as usize;
                }
                contents(&file)
            },
            |data, bytes| {
                let (reader, mut writer) = std::io::pipe().unwrap();
                std::thread::scope(|scope| {
                    scope.spawn(move || writer.write_all(bytes).unwrap());
                    let mut at = 0;
                    while at < data.len() {
                        let piece = libc::iovec { iov_base: data[at..].as_mut_ptr().cast(), iov_len: data.len() - at };
                        // SAFETY: the rest of the slice, borrowed exclusively, into which the pipe is copied.
                        let n = unsafe { libc::vmsplice(reader.as_raw_fd(), &piece, 1, 0) };
                        assert!(n > 0, "{}", std::io::Error::last_os_error());
                        at += n as usize;
                    }
                });
            },
        );
    });
}

/// O_DIRECT: the disk's own engine reads and writes the pages, which are pinned meanwhile.
fn direct_io() {
    use std::os::unix::fs::OpenOptionsExt;
    let path = std::env::temp_dir().join(format!("uhmm-direct-{}", std::process::id()));
    let opened = File::options().read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(&path);
    let Ok(file) = opened else {
        eprintln!("no O_DIRECT in {}: not tested", std::env::temp_dir().display());
        return;
    };
    std::fs::remove_file(&path).unwrap();
    both(|bench| {
        for (from, len) in [(0, LEN), (4096, 4096), ((2 << 20) - 4096, 8192)] {
            for place in [Place::Private, Place::Duplicated] {
                bench.go(place);
                let data = &mut bench.pages.slice::<u8>()[from..][..len];
                assert_eq!(file.write_at(data, 0).unwrap(), len);
                let bytes = bench.bytes(len);
                bench.go(place);
                let mut seen = Pages::new(len);
                file.read_exact_at(seen.slice(), 0).unwrap();
                assert!(seen.slice::<u8>() == &bench.shadow[from..][..len], "the disk has something else");
                seen.slice().copy_from_slice(&bytes);
                file.write_all_at(seen.slice(), 0).unwrap();
                let data = &mut bench.pages.slice::<u8>()[from..][..len];
                assert_eq!(file.read_at(data, 0).unwrap(), len);
                bench.shadow[from..][..len].copy_from_slice(&bytes);
                bench.check("direct");
            }
        }
    });
}

/// Paths, times and results that lie on the device.
fn small_structures() {
    both(|bench| {
        let path = b"/proc/self/comm\0";
        bench.shadow[..path.len()].copy_from_slice(path);
        bench.pages.slice::<u8>()[..path.len()].copy_from_slice(path);
        bench.go(Place::Private);
        let at = bench.pages.start();
        // SAFETY: inside the pages, where a path is that ends with a zero.
        let fd = unsafe { libc::open(at.cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: a new descriptor, which nobody else has.
        let file = unsafe { File::from_raw_fd(fd) };
        bench.go(Place::Private);
        // A stat that begins in one block and ends in the next.
        let stat = bench.pages.at((2 << 20) - 64);
        // SAFETY: inside the pages, of which no slice is borrowed, and to their end there is room enough.
        assert_eq!(unsafe { libc::syscall(libc::SYS_fstat, file.as_raw_fd(), stat) }, 0);
        // SAFETY: where the kernel has just written one.
        let found = unsafe { stat.cast::<libc::stat>().read_unaligned() };
        assert_eq!(found.st_ino, std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap()));
        let bytes = bench.pages.slice::<u8>()[(2 << 20) - 64..][..size_of::<libc::stat>()].to_vec();
        bench.shadow[(2 << 20) - 64..][..bytes.len()].copy_from_slice(&bytes);
        let nap = [0u64, 1_000_000].map(u64::to_ne_bytes).concat();
        bench.pages.slice::<u8>()[4096..4112].copy_from_slice(&nap);
        bench.shadow[4096..4112].copy_from_slice(&nap);
        bench.go(Place::Private);
        let before = std::time::Instant::now();
        // SAFETY: inside the pages, where two numbers are, as a time has.
        assert_eq!(unsafe { libc::nanosleep(at.add(4096).cast(), std::ptr::null_mut()) }, 0);
        assert!(before.elapsed().as_micros() >= 1000);
        bench.check("small structures");
    });
}

/// A ring, or what to say where there is none.
fn ring() -> Option<io_uring::IoUring> {
    match io_uring::IoUring::new(8) {
        Ok(ring) => Some(ring),
        Err(e) => {
            eprintln!("io_uring cannot be had on this machine ({e}): its part is not tested");
            None
        }
    }
}

/// Does one piece of work: its result.
///
/// # Safety
/// What it reads and writes is the caller's.
unsafe fn submit(ring: &mut io_uring::IoUring, entry: &io_uring::squeue::Entry) -> i32 {
    // SAFETY: the caller says so, and waits here until it is done.
    unsafe { ring.submission().push(entry).unwrap() };
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().expect("a completion").result()
}

/// READ and WRITE, as the ring likes and on its kernel threads.
fn a_ring_reads_and_writes() {
    use io_uring::{opcode, squeue::Flags, types::Fd};
    let Some(first) = ring() else { return };
    let ring = std::cell::RefCell::new(first);
    for flags in [Flags::empty(), Flags::ASYNC] {
        both(|bench| {
            bench.each(
                |data| {
                    let file = file(&[]);
                    let entry = opcode::Write::new(Fd(file.as_raw_fd()), data.as_ptr(), data.len() as u32).build().flags(flags);
                    // SAFETY: it reads the slice.
                    assert_eq!(unsafe { submit(&mut ring.borrow_mut(), &entry) }, data.len() as i32);
                    contents(&file)
                },
                |data, bytes| {
                    let file = file(bytes);
                    let entry = opcode::Read::new(Fd(file.as_raw_fd()), data.as_mut_ptr(), data.len() as u32).build().flags(flags);
                    // SAFETY: it writes to the slice, which is borrowed exclusively.
                    assert_eq!(unsafe { submit(&mut ring.borrow_mut(), &entry) }, bytes.len() as i32);
                },
            );
        });
    }
}

/// A ring's registered buffers were duplicated for a launch that read them. What the ring then wrote, straight to the pages it has pinned, raised no fault: the
/// next launch read what had been there before. Pinned pages cannot move, must not be duplicated, and are declared to launches all the same.
fn a_rings_registered_buffers() {
    use io_uring::{opcode, types::Fd};
    let Some(mut ring) = ring() else { return };
    both(|bench| {
        for place in [Place::Private, Place::Duplicated] {
            bench.go(place);
            let whole = libc::iovec { iov_base: bench.pages.start().cast(), iov_len: LEN };
            // SAFETY: all of the pages, which stay; what is done with them is said for each entry.
            unsafe { ring.submitter().register_buffers(&[whole]).unwrap() };
            let data = bench.pages.slice::<u8>();
            bench.dev.prefetch(data).unwrap();
            assert_eq!(pages_present(data), LEN / 4096, "pinned pages stay");
            for (from, len) in RANGES {
                let file = file(&[]);
                // SAFETY: entries for parts of the pages, of which no slice is borrowed meanwhile.
                let mut submit = |entry| unsafe { submit(&mut ring, &entry) };
                let write = opcode::WriteFixed::new(Fd(file.as_raw_fd()), bench.pages.at(from), len as u32, 0).build();
                assert_eq!(submit(write), len as i32);
                assert!(contents(&file) == bench.shadow[from..][..len], "the ring reads something else");
                let bytes = bench.bytes(len);
                file.write_all_at(&bytes, 0).unwrap();
                let read = opcode::ReadFixed::new(Fd(file.as_raw_fd()), bench.pages.at(from), len as u32, 0).build();
                assert_eq!(submit(read), len as i32);
                bench.shadow[from..][..len].copy_from_slice(&bytes);
                bench.check("registered");
                // What a kernel writes is what the ring's pages hold.
                let data = &mut bench.pages.slice::<u32>()[..LEN / 8];
                bench.dev.run(&increment, groups(data.len()), args![uhmm::inout(data)]).unwrap();
                for word in bench.shadow[..LEN / 2].as_chunks_mut::<4>().0 {
                    *word = u32::from_ne_bytes(*word).wrapping_add(1).to_ne_bytes();
                }
                let write = opcode::WriteFixed::new(Fd(file.as_raw_fd()), bench.pages.at(0), LEN as u32, 0).build();
                assert_eq!(submit(write), LEN as i32);
                assert!(contents(&file) == bench.shadow, "the ring reads something else after a launch");
            }
            ring.submitter().unregister_buffers().unwrap();
        }
        bench.go(Place::Private); // they can go again
        bench.check("unregistered");
    });
}

const PEER: &str = "UHMM_TEST_PEER";

/// What another process does with our memory; it is this test again.
fn peer(task: &str) {
    let words: Vec<usize> = task.split(' ').map(|word| word.parse().unwrap()).collect();
    let [pid, address, len, write] = words[..] else { panic!("{task}") };
    let mut bytes = vec![0u8; len];
    let here = |bytes: &mut [u8]| libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    let there = libc::iovec { iov_base: address as *mut _, iov_len: len };
    if write == 1 {
        std::io::stdin().read_exact(&mut bytes).unwrap();
        // SAFETY: bytes of our own; the others are the parent's, which has asked for it.
        let n = unsafe { libc::process_vm_writev(pid as i32, &here(&mut bytes), 1, &there, 1, 0) };
        assert_eq!(n, len as isize, "{}", std::io::Error::last_os_error());
    } else {
        // SAFETY: as above.
        let n = unsafe { libc::process_vm_readv(pid as i32, &here(&mut bytes), 1, &there, 1, 0) };
        assert_eq!(n, len as isize, "{}", std::io::Error::last_os_error());
        std::io::stdout().write_all(&bytes).unwrap();
    }
}

/// process_vm_readv(2) and process_vm_writev(2).
fn another_process_reads_and_writes() {
    if let Ok(task) = std::env::var(PEER) {
        return peer(&task);
    }
    use std::process::{Output, Stdio};
    let run = |data: *const u8, len: usize, bytes: &[u8], write: bool| -> Output {
        let mut command = again("suite::kernel_access::another_process_reads_and_writes");
        command.env(PEER, format!("{} {} {len} {}", std::process::id(), data as usize, u8::from(write)));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = std::thread::scope(|scope| {
            scope.spawn(move || input.write_all(bytes).unwrap());
            child.wait_with_output().unwrap()
        });
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output
    };
    both(|bench| {
        bench.each(
            |data| run(data.as_ptr(), data.len(), &[], false).stdout,
            |data, bytes| {
                run(data.as_ptr(), data.len(), bytes, true);
            },
        );
    });
}

/// /proc/PID/mem, as a debugger uses it. The kernel does not wait there for a page that is away: the call fails (EIO), and nothing else may happen. What
/// is at home, or on both sides, is read; and everything once it is home.
fn memory_as_a_file() {
    let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    both(|bench| {
        for place in [Place::Private, Place::Duplicated] {
            bench.go(place);
            let at = bench.pages.start() as u64;
            let mut seen = vec![0; LEN];
            match memory.read_exact_at(&mut seen, at) {
                Ok(()) => assert!(seen == bench.shadow, "{place:?}"),
                Err(e) => assert!(e.raw_os_error() == Some(libc::EIO) && matches!(place, Place::Private), "{place:?}: {e}"),
            }
            let bytes = bench.bytes(LEN);
            match memory.write_all_at(&bytes, at) {
                Ok(()) => bench.shadow.copy_from_slice(&bytes),
                Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EIO), "{place:?}"),
            }
            bench.check("memory as a file");
            bench.dev.evict(bench.pages.slice::<u8>()).unwrap();
            memory.write_all_at(&bytes, at).unwrap();
            bench.shadow.copy_from_slice(&bytes);
            memory.read_exact_at(&mut seen, at).unwrap();
            assert!(seen == bytes, "what is home reads as it was written");
            bench.check("memory as a file, home");
        }
    });
}
