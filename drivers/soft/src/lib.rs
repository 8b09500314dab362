//! The reference device: it needs no hardware, and is as honest as hardware would be.
//!
//! | module | what a device has |
//! |---|---|
//! | [`memory`] | private memory of a fixed capacity |
//! | [`window`] | its own page table: the page at process address `v` is seen by its workers at `v ^ mask` |
//! | [`dma`] | a copy engine with a queue and fences |
//! | [`worker`] | worker threads that run kernels, a fault buffer, scratch pages for wild pointers |
//!
//! A page of device memory lies in the *arena*, where the copy engine reaches it, or in the window, where workers do, never in both: entering it
//! into the page table moves it (UFFDIO_MOVE) from one to the other, and taking it out moves it back, with every core's translation flushed when the
//! call returns. That is the acknowledgement. A worker's touch of a page that is not in the window raises SIGBUS in that worker, which
//! has uhmm serve the fault and repeats the access. Threads of the program are refused there.
//!
//! Without replayable faults ([`DeviceConfig::replayable_faults`]) it is a device as most are: what a launch declares is there before its kernel starts,
//! and a touch of anything else fails the launch.
//!
//! With [`DeviceConfig::coherent`] it is another device ([`mod@coherent`]), whose memory the CPU uses in place.
//!
//! ```no_run
//! use uhmm_core::{CoreRef, DeviceConfig};
//!
//! # fn main() -> Result<(), uhmm_core::Error> {
//! let config = DeviceConfig { memory: 64 << 20, threads: 2, replayable_faults: false, ..DeviceConfig::new("small") };
//! let dev = CoreRef::get()?.device(config, uhmm_soft::open)?;
//! # drop(dev);
//! # Ok(())
//! # }
//! ```

pub mod coherent;
pub mod dma;
pub mod memory;
mod remap;
pub mod window;
pub mod worker;

use core::time::Duration;
use dma::Engine;
use memory::{Memory, Watch};
use uhmm_core::driver::window::WindowSpace;
use uhmm_core::driver::{self, Capabilities, Committed, DeviceInfo, Dma, DmaError, Driver, Fence, Frame, KernelFault, Launch, MapRun};
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::page::Span;
use uhmm_core::{DeviceConfig, Error};
use uhmm_os::uffd::{Features, Userfaultfd};
use uhmm_os::{BLOCK, Errno, system, thread};
use window::Window;
use worker::Workers;

/// The software device.
#[derive(Debug)]
pub struct Soft {
    info: DeviceInfo,
    // Fields are dropped in this order: who uses memory goes before it.
    workers: Workers,
    engine: Engine,
    window: Window,
    memory: Memory,
    uffd: Userfaultfd,
}

/// Opens a software device. To be called on uhmm's keeper, as [`uhmm_core::CoreRef::device`] does.
///
/// `memory` 0 means a quarter of the machine's memory, `threads` 0 one a core.
///
/// # Errors
/// [`Error::Device`] if it cannot be had as asked; [`Error::NoUserfaultfd`].
pub fn open(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    if config.coherent {
        return coherent::open(config, mode);
    }
    let (memory, threads) = sizes(config)?;
    let wanted = Features::SIGBUS | Features::MOVE | Features::PAGEFAULT_FLAG_WP | Features::EXACT_ADDRESS;
    let uffd = mode.open(wanted)?;
    let reserve = |e: Errno| config.refuse(format!("cannot reserve address space for {memory} bytes of device memory: {e}"));
    let watch = if mode == Mode::None { Watch::Not } else { Watch::Missing };
    let device_memory = Memory::new(memory, watch).map_err(reserve)?;
    let Some(space) = WindowSpace::new(c"uhmm window", others).map_err(reserve)? else {
        return Err(config.refuse(format!(
            "no part of the address space is free for its window: at most {} software devices fit a process",
            WindowSpace::MOST
        )));
    };
    // All of its memory is this process's, and so is what peers let be seen of theirs.
    let replayable_faults = config.replayable_faults && mode != Mode::None;
    let capabilities = Capabilities { replayable_faults, coherent: false, reads_peers: true, ..Capabilities::default() };
    let soft = Soft {
        info: DeviceInfo { name: config.name, memory, threads, mask: space.mask(), capabilities },
        workers: Workers::new(threads).map_err(reserve)?,
        engine: Engine::new().map_err(reserve)?,
        window: Window::new(space, mode != Mode::None),
        memory: device_memory,
        uffd,
    };
    let started = soft.workers.start().and_then(|()| soft.engine.start());
    started.map_err(|e| config.refuse(format!("cannot start its threads: {e}")))?;
    driver::boxed(c"uhmm soft device", soft).map_err(reserve)
}

/// Bytes of memory and number of threads that a device is asked for.
fn sizes(config: &DeviceConfig) -> Result<(usize, usize), Error> {
    let memory = if config.memory == 0 { system::total_memory() as usize / 4 } else { config.memory };
    let memory = memory / BLOCK * BLOCK;
    if memory == 0 {
        return Err(config.refuse("its memory must be at least 2 MiB"));
    }
    let threads = if config.threads == 0 { thread::num_cores() } else { config.threads };
    if threads > worker::MOST {
        return Err(config.refuse(format!("{threads} threads are more than {}", worker::MOST)));
    }
    Ok((memory, threads))
}

#[allow(unsafe_code)]
// SAFETY: `unmap` returns when UFFDIO_MOVE has, which flushes the old translation on every core that runs the process.
unsafe impl Driver for Soft {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn populate(&self, unit: usize) -> Result<(), Errno> {
        self.memory.populate(&self.uffd, unit)
    }

    fn release(&self, unit: usize) {
        self.memory.release(&self.uffd, unit);
    }

    fn peek(&self, frame: Frame) -> Option<usize> {
        Some(self.memory.address(frame))
    }

    fn mapped(&self, va: usize) -> Option<usize> {
        Some(va ^ self.info.mask)
    }

    fn address(&self, frame: Frame) -> usize {
        self.memory.address(frame)
    }

    fn stand_by(&self) {
        self.engine.stand_by();
    }

    fn copy(&self, batch: &[Dma]) -> Fence {
        self.engine.submit(&self.memory, batch)
    }

    fn wait(&self, fence: Fence, batch: &[Dma], _: Duration) -> Result<(), DmaError> {
        // Threads of this process do not hang, unless the memory of the program does that they read.
        self.engine.wait(&self.memory, fence, batch)
    }

    fn open_window(&self, span: Span) -> Result<(), Errno> {
        self.window.open(&self.uffd, span)
    }

    fn close_window(&self, span: Span) {
        self.window.close(span);
    }

    fn share(&self, span: Span) -> Result<(), Errno> {
        self.window.share(&self.uffd, span)
    }

    fn unshare(&self, span: Span) {
        self.window.unshare(&self.uffd, span);
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        self.window.map(&self.uffd, &self.memory, &batch, |page| self.workers.forget_scratch(page))
    }

    fn allow_writes(&self, batch: &[MapRun]) {
        self.window.allow_writes(&self.uffd, batch);
    }

    fn protect(&self, run: MapRun) -> Option<usize> {
        self.window.protect(&self.uffd, run)
    }

    fn unmap(&self, batch: &[MapRun]) {
        self.window.unmap(&self.uffd, &self.memory, batch);
    }

    fn launch(&self, launch: &Launch) -> Result<(), KernelFault> {
        self.workers.run(&self.window, launch)
    }

    fn note_fault(&self, va: usize, write: bool) {
        self.workers.faults.push(va, write);
    }

    fn fail(&self, fault: KernelFault) {
        self.workers.fail(fault);
    }

    fn owns_thread(&self, tid: u32) -> bool {
        self.workers.owns(tid)
    }

    fn in_window(&self, address: usize) -> bool {
        self.window.contains(address)
    }

    fn scratch(&self, address: usize, fault: KernelFault) -> bool {
        self.workers.fail(fault);
        let in_window = self.in_window(address);
        if in_window && self.window.open(&self.uffd, Span::block(address ^ self.info.mask)).is_err() {
            return false;
        }
        self.workers.put_scratch(&self.uffd, &self.window, address, in_window)
    }
}
