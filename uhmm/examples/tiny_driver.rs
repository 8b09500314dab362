//! A complete driver, and a program that uses it. What each part has to do is told in docs/write-a-driver.md; it passes the conformance suite (`uhmm/tests/suite/tiny.rs`).
//!
//! The device's memory is a file in memory. The CPU, in the part of the copy engine, sees all of it in the *arena*. A page at process address `v` is seen by kernels at `v ^ mask`, in
//! the *window*, where entering it into the page table maps its part of the file. One thread, uhmm's queue, runs the kernels.
#![allow(unsafe_code)] // a device works with raw memory

use rustix_futex_sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use uhmm_core::driver::cpu::{self, FirstFault, ScratchPages};
use uhmm_core::driver::{self, window::WindowSpace, *};
use uhmm_core::kernel::{Ctx, Entry, LOCAL_BYTES};
use uhmm_core::own::{self, OwnBox};
use uhmm_core::{CoreRef, DeviceConfig, Error, mode::Mode, page::Span};
use uhmm_os::mem::{self, Mapping, Prot};
use uhmm_os::{BLOCK, Errno, PAGE, memfile::MemFile, thread};

#[derive(Debug)]
struct Tiny {
    info: DeviceInfo,
    file: MemFile,
    arena: Mapping,
    window: WindowSpace,
    local: Mapping,
    /// The thread that runs a kernel; 0 if none does.
    running: AtomicU32,
    fault: FirstFault,
    /// By the process's addresses.
    scratch: Mutex<ScratchPages<64>>,
}

/// What `CoreRef::device` is given to open one.
pub fn open(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    let no_room = |e: Errno| config.refuse(format!("cannot reserve memory: {e}"));
    let memory = if config.memory == 0 { 64 << 20 } else { config.memory / BLOCK * BLOCK };
    let window = WindowSpace::new(c"tiny window", others).map_err(no_room)?;
    let window = window.ok_or_else(|| config.refuse("no part of the address space is free for its window: close another device"))?;
    let capabilities = Capabilities { replayable_faults: config.replayable_faults && mode != Mode::None, ..Capabilities::default() };
    // Whole units and those that are handed out by the page have numbers of their own: twice the capacity, of which so much is ever populated.
    let file = MemFile::new(c"tiny device", 2 * memory).map_err(no_room)?;
    let arena = own::map(c"tiny arena", 2 * memory).map_err(no_room)?;
    // SAFETY: the arena has just been mapped, and only copies use it.
    unsafe { file.map_over(arena.start(), 2 * memory, 0, Prot::ReadWrite) }.map_err(no_room)?;
    let tiny = Tiny {
        info: DeviceInfo { name: config.name, memory, threads: 1, mask: window.mask(), capabilities },
        file,
        arena,
        window,
        local: own::map(c"tiny local memory", LOCAL_BYTES).map_err(no_room)?,
        running: AtomicU32::new(0),
        fault: FirstFault::default(),
        scratch: Mutex::default(),
    };
    driver::boxed(c"tiny device", tiny).map_err(no_room)
}

// SAFETY: `unmap` returns when the kernel has replaced the mapping, and so flushed it.
unsafe impl Driver for Tiny {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn populate(&self, unit: usize) -> Result<(), Errno> {
        self.file.populate(unit * BLOCK, BLOCK)
    }

    fn release(&self, unit: usize) {
        // SAFETY: uhmm uses the unit no more. If it fails, the memory stays taken.
        let _ = unsafe { self.file.release(unit * BLOCK, BLOCK) };
    }

    fn peek(&self, frame: Frame) -> Option<usize> {
        Some(self.address(frame))
    }

    fn address(&self, frame: Frame) -> usize {
        self.arena.start() + frame as usize * PAGE
    }

    fn copy(&self, _batch: &[Dma]) -> Fence {
        Fence(0) // it is copied when it is waited for
    }

    fn wait(&self, _: Fence, batch: &[Dma], _: Duration) -> Result<(), DmaError> {
        // SAFETY: uhmm waits for the batch; the arena has all frames, one after the other.
        unsafe { cpu::copy_batch(batch, |frame| self.address(frame)) }
    }

    fn open_window(&self, span: Span) -> Result<(), Errno> {
        self.window.open(span, |_| Ok(()))
    }

    fn close_window(&self, span: Span) {
        self.window.close(span);
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        for (done, run) in batch.iter().enumerate() {
            let (span, prot) = (run.span(), if run.write { Prot::ReadWrite } else { Prot::Read });
            let enter = |()| {
                // SAFETY: the window is the device's own, and has nothing there, or scratch pages.
                let entered = unsafe { self.file.map_over(self.window.at(run.va), span.len(), run.frame as usize * PAGE, prot) };
                entered.inspect_err(|_| self.window.vacate(span))
            };
            if let Err(e) = self.open_window(span).and_then(enter) {
                self.unmap(&batch[..done]);
                return Err(e);
            }
            self.scratch.lock().forget(span);
        }
        Ok(())
    }

    fn allow_writes(&self, batch: &[MapRun]) {
        for run in batch {
            // SAFETY: the window is the device's own. If it fails, a write is a fault again.
            let _ = unsafe { mem::mprotect(self.window.at(run.va), run.pages * PAGE, Prot::ReadWrite) };
        }
    }

    fn unmap(&self, batch: &[MapRun]) {
        batch.iter().for_each(|run| self.window.vacate(run.span()));
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelFault> {
        self.fault.begin();
        self.running.store(thread::gettid(), Ordering::Release);
        // SAFETY: each group has its turn once, and the local memory alone.
        let failed = (0..launch.groups).find_map(|group| unsafe { cpu::run_group(launch, group, self.local.as_ptr()) }.err());
        failed.into_iter().for_each(|fault| self.fail(fault));
        self.running.store(0, Ordering::Release);
        self.scratch.lock().clear(|page, _| self.window.vacate(Span { start: page, end: page + PAGE }));
        self.fault.end()
    }

    fn fail(&self, fault: KernelFault) {
        self.fault.set(fault);
    }

    fn owns_thread(&self, tid: u32) -> bool {
        self.running.load(Ordering::Acquire) == tid
    }

    fn in_window(&self, address: usize) -> bool {
        self.window.contains(address)
    }

    fn scratch(&self, address: usize, fault: KernelFault) -> bool {
        self.fail(fault);
        let (page, mut scratch) = (self.window.at(address) & !(PAGE - 1), self.scratch.lock());
        if !self.in_window(address) || scratch.is_full() || self.open_window(Span::block(page)).is_err() {
            return false;
        }
        scratch.push(page, 0);
        // SAFETY: the window is the device's own, and has nothing here.
        unsafe { mem::replace(self.window.at(page), PAGE, c"tiny scratch") }.is_ok()
    }
}

#[allow(dead_code)] // the tests have this file as a module
fn main() -> Result<(), Error> {
    let dev = CoreRef::get()?.device(DeviceConfig::new("tiny"), open)?;
    let mut data: Vec<u32> = (0..1_000_000).collect();
    let double = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1000).iter_mut().for_each(|x| *x *= 2);
    dev.run(Entry::new(&double), 1000.into(), &uhmm::args![uhmm::inout(&mut data)])?;
    println!("element 999,999 is {}; {} pages had gone to the device", data[999_999], dev.stats().pages_to_device);
    Ok(())
}
