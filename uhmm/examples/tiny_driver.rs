//! A complete driver, and a program that uses it. What each part has to do is told in docs/write-a-driver.md; it passes the conformance suite (`uhmm/tests/suite/tiny.rs`).
//!
//! The device's memory is a file in memory. The CPU, in the part of the copy engine, sees all of it in the *arena*. A page at process address `v` is seen by kernels at `v ^ mask`, in
//! the *window*, where entering it into the page table maps its part of the file. One thread, uhmm's queue, runs the kernels.
#![allow(unsafe_code)] // a device works with raw memory

use rustix_futex_sync::Mutex;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use uhmm_core::driver::*;
use uhmm_core::kernel::{Ctx, LOCAL_BYTES};
use uhmm_core::own::{self, OwnBox, OwnSlice};
use uhmm_core::{DeviceConfig, Error, mode::Mode, page::Span};
use uhmm_os::mem::{self, Advice, Mapping, Prot, Reserve};
use uhmm_os::{BLOCK, Errno, PAGE, copy, thread};

/// Bits of the address space that the kernel's placement never sets so: a page and its image in a window do not collide.
const MASKS: [usize; 4] = [0b100 << 44, 0b110 << 44, 0b011 << 44, 0b001 << 44];

#[derive(Debug)]
struct Tiny {
    info: DeviceInfo,
    file: File,
    arena: Mapping,
    /// One bit for each block of the address space that has a window: in memory that never migrates, and behind a lock that touches nothing else.
    open: Mutex<OwnSlice<u64>>,
    local: Mapping,
    /// The thread that runs a kernel; 0 if none does.
    running: AtomicU32,
    fault: Mutex<Option<KernelFault>>,
    /// Window pages of zeroes that let a failed kernel run on, and how many.
    scratch: Mutex<([usize; 64], usize)>,
}

/// What `CoreRef::device` is given to open one.
pub fn open(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    let refuse = |why: &str| Error::Device { name: config.name.into(), why: why.into() };
    let memory = if config.memory == 0 { 64 << 20 } else { config.memory / BLOCK * BLOCK };
    let mask = MASKS.into_iter().find(|mask| others.iter().all(|other| other.mask != *mask));
    let mask = mask.ok_or(refuse("no part of the address space is free for its window"))?;
    let replayable_faults = config.replayable_faults && mode != Mode::None;
    let info = DeviceInfo { name: config.name, memory, threads: 1, mask, replayable_faults, coherent: false };
    let no_room = |e: Errno| refuse(&format!("cannot reserve memory: {e}"));
    // SAFETY: the name ends with a zero; a new descriptor is nobody else's.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"tiny device".as_ptr(), libc::MFD_CLOEXEC)) };
    // Whole units and those that are handed out by the page have numbers of their own: twice the capacity, of which so much is ever populated.
    file.set_len(2 * memory as u64).map_err(|e| refuse(&format!("cannot size its memory: {e}")))?;
    let arena = own::map(c"tiny arena", 2 * memory).map_err(no_room)?;
    map_file(&file, arena.start(), 0, 2 * memory, true).map_err(no_room)?;
    let tiny = Tiny {
        info,
        file,
        arena,
        open: Mutex::new(OwnSlice::new(c"tiny windows", (1 << 47) / BLOCK / 64).map_err(no_room)?),
        local: own::map(c"tiny local memory", LOCAL_BYTES).map_err(no_room)?,
        running: AtomicU32::new(0),
        fault: Mutex::new(None),
        scratch: Mutex::new(([0; 64], 0)),
    };
    Ok(OwnBox::new(c"tiny device", tiny).map_err(no_room)?.unsize(|p| p as *mut dyn Driver))
}

/// Maps a part of the file over a part of the device's own address space; a child of a fork does not get it.
fn map_file(file: &File, at: usize, offset: usize, len: usize, write: bool) -> Result<(), Errno> {
    let prot = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: `at` lies in a mapping of the device's own, the arena or the window, whose contents there nobody needs.
    let mapped = unsafe { libc::mmap(at as *mut _, len, prot, libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd(), offset as i64) };
    if mapped == libc::MAP_FAILED {
        return Err(Errno::NOMEM);
    }
    // SAFETY: as above, and contents do not change.
    unsafe { mem::madvise(at, len, Advice::DontFork) }
}

impl Tiny {
    fn offset(&self, frame: Frame) -> usize {
        frame as usize * PAGE
    }

    /// Makes a part of the window what it is where nothing is mapped: no access, so that a touch is a fault. It is one call, so that no kernel sees anything else in
    /// between; the old pages' translations are flushed on all cores when it returns.
    fn vacate(&self, at: usize, len: usize) {
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the window is the device's own.
        if unsafe { libc::mmap(at as *mut _, len, libc::PROT_NONE, how, -1, 0) } == libc::MAP_FAILED {
            std::process::abort(); // going on would leave an entry that uhmm takes for gone
        }
        // SAFETY: as above. If it fails, a child has the empty window too.
        let _ = unsafe { mem::madvise(at, len, Advice::DontFork) };
    }
}

// SAFETY: `unmap` returns when the kernel has replaced the mapping, and so flushed it.
unsafe impl Driver for Tiny {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn populate(&self, unit: usize) -> Result<(), Errno> {
        // SAFETY: it allocates a part of the device's own file.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), 0, (unit * BLOCK) as i64, BLOCK as i64) };
        if result == 0 { Ok(()) } else { Err(Errno::NOMEM) }
    }

    fn release(&self, unit: usize) {
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: it frees a part of the device's own file, which nobody uses.
        unsafe { libc::fallocate(self.file.as_raw_fd(), how, (unit * BLOCK) as i64, BLOCK as i64) };
    }

    fn peek(&self, frame: Frame) -> Option<usize> {
        Some(self.address(frame))
    }

    fn address(&self, frame: Frame) -> usize {
        self.arena.start() + self.offset(frame)
    }

    fn copy(&self, _batch: &[Dma]) -> Fence {
        Fence(0) // it is copied when it is waited for
    }

    fn wait(&self, _: Fence, batch: &[Dma], _: Duration) -> Result<(), DmaError> {
        let mut result = Ok(());
        for &Dma { kind, host, frame, offset, len } in batch {
            let at = self.address(frame) + offset;
            // SAFETY: frames are in the arena, and host addresses uhmm's memory, or, if guarded, may be anything.
            let copied = unsafe {
                match kind {
                    DmaKind::ToDevice | DmaKind::GuardedToDevice => copy::guarded(at as *mut u8, host as *const u8, len),
                    DmaKind::ToHost | DmaKind::GuardedToHost => copy::guarded(host as *mut u8, at as *const u8, len),
                    DmaKind::Zero => {
                        (at as *mut u8).write_bytes(0, len);
                        Ok(())
                    }
                }
            };
            result = result.and(copied.map_err(|address| DmaError::Gone { address }));
        }
        result
    }

    fn open_window(&self, span: Span) -> Result<(), Errno> {
        let mut open = self.open.lock();
        for block in span.start / BLOCK..span.end.div_ceil(BLOCK) {
            let bit = 1 << (block % 64);
            if open[block / 64] & bit == 0 {
                let hint = (block * BLOCK) ^ self.info.mask;
                mem::map(&Reserve { hint, len: BLOCK, align: PAGE, name: c"tiny window", prot: Prot::None, exact: true })?.into_raw();
                open[block / 64] |= bit;
            }
        }
        Ok(())
    }

    fn close_window(&self, span: Span) {
        let mut open = self.open.lock();
        for word in span.start / BLOCK / 64..(span.end / BLOCK).div_ceil(64).min(open.len()) {
            for block in (word * 64..word * 64 + 64).filter(|block| block * BLOCK >= span.start && (block + 1) * BLOCK <= span.end) {
                if open[word] >> (block % 64) & 1 != 0 {
                    open[word] &= !(1 << (block % 64));
                    // SAFETY: the block's window is the device's own, and nothing is entered there any more.
                    let _ = unsafe { mem::munmap((block * BLOCK) ^ self.info.mask, BLOCK) };
                }
            }
        }
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        for (done, run) in batch.iter().enumerate() {
            let (at, len) = (run.va ^ self.info.mask, run.pages * PAGE);
            let opened = self.open_window(Span { start: run.va, end: run.va + len });
            if let Err(e) = opened.and_then(|()| map_file(&self.file, at, self.offset(run.frame), len, run.write)) {
                self.unmap(&batch[..done]);
                return Err(e);
            }
            let mut scratch = self.scratch.lock();
            let (pages, count) = &mut *scratch;
            pages[..*count].iter_mut().filter(|page| (at..at + len).contains(page)).for_each(|page| *page = 0);
        }
        Ok(())
    }

    fn allow_writes(&self, batch: &[MapRun]) {
        for run in batch {
            // SAFETY: the window is the device's own.
            let _ = unsafe { mem::mprotect(run.va ^ self.info.mask, run.pages * PAGE, Prot::ReadWrite) };
        }
    }

    fn unmap(&self, batch: &[MapRun]) {
        batch.iter().for_each(|run| self.vacate(run.va ^ self.info.mask, run.pages * PAGE));
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelFault> {
        *self.fault.lock() = None;
        self.running.store(thread::gettid(), Ordering::Release);
        for group in 0..launch.groups {
            // SAFETY: the ranges are there, or fault and become so; each group has its turn once, and the scratch memory alone.
            let ctx = unsafe { Ctx::new(&launch.bound, group, self.local.as_ptr(), LOCAL_BYTES) };
            // SAFETY: who runs the launch keeps the kernel alive.
            if let Err(message) = unsafe { launch.entry.call(&ctx) } {
                self.fail(KernelFault::Panic(message));
                break;
            }
        }
        self.running.store(0, Ordering::Release);
        let mut scratch = self.scratch.lock();
        let (pages, count) = &mut *scratch;
        pages[..*count].iter().filter(|page| **page != 0).for_each(|&page| self.vacate(page, PAGE));
        *count = 0;
        self.fault.lock().take().map_or(Ok(()), Err)
    }

    fn fail(&self, fault: KernelFault) {
        self.fault.lock().get_or_insert(fault);
    }

    fn owns_thread(&self, tid: u32) -> bool {
        self.running.load(Ordering::Acquire) == tid
    }

    fn in_window(&self, address: usize) -> bool {
        let va = address ^ self.info.mask;
        va < 1 << 47 && matches!(va >> 44, 0b000 | 0b101 | 0b111)
    }

    fn scratch(&self, address: usize, fault: KernelFault) -> bool {
        self.fail(fault);
        let page = address & !(PAGE - 1);
        let mut scratch = self.scratch.lock();
        let (pages, count) = &mut *scratch;
        if !self.in_window(address) || *count == pages.len() || self.open_window(Span::block(address ^ self.info.mask)).is_err() {
            return false;
        }
        (pages[*count], *count) = (page, *count + 1);
        // SAFETY: the window is the device's own, and has nothing here.
        unsafe { mem::replace(page, PAGE, c"tiny scratch") }.is_ok()
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        self.close_window(Span { start: 0, end: 1 << 47 });
    }
}

#[allow(dead_code)] // the tests have this file as a module
fn main() -> Result<(), Error> {
    let dev = uhmm_core::CoreRef::get()?.device(DeviceConfig::new("tiny"), open)?;
    let mut data: Vec<u32> = (0..1_000_000).collect();
    let double = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1000).iter_mut().for_each(|x| *x *= 2);
    dev.run(uhmm_core::kernel::Entry::new(&double), 1000.into(), &uhmm::args![uhmm::inout(&mut data)])?;
    println!("element 999,999 is {}; {} pages had gone to the device", data[999_999], dev.stats().pages_to_device);
    Ok(())
}
