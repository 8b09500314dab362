//! The coherent device: its memory is used in place by the CPU, as behind CAPI, CCIX or CXL.
//!
//! Its workers use the process's addresses as they are, so that it has no page table and no window. A page of its memory lies in the arena while nobody uses it, or in
//! the program, which uhmm has moved it into; taking it back moves it into the arena again. A worker that touches a page which is on its way waits as any thread of the program does.
//!
//! No example: a part of the device, for who reads how one is made; outside, only [`crate::open`] is used.

use crate::dma::Engine;
use crate::memory::{Memory, Watch};
use crate::sizes;
use crate::window::Window;
use crate::worker::Workers;
use core::time::Duration;
use uhmm_core::driver::window::WindowSpace;
use uhmm_core::driver::{self, Capabilities, Committed, DeviceInfo, Dma, DmaError, Driver, Fence, Frame, KernelFault, Launch, MapRun};
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::{DeviceConfig, Error};
use uhmm_os::Errno;
use uhmm_os::uffd::{Features, Userfaultfd};

/// The device.
#[derive(Debug)]
pub struct Coherent {
    info: DeviceInfo,
    // Fields are dropped in this order: who uses memory goes before it.
    workers: Workers,
    engine: Engine,
    /// Never opened.
    window: Window,
    memory: Memory,
    uffd: Userfaultfd,
}

/// Opens a coherent software device, as [`crate::open`] does.
pub(crate) fn open(config: &DeviceConfig, mode: Mode) -> Result<OwnBox<dyn Driver>, Error> {
    let (memory, threads) = sizes(config)?;
    let uffd = mode.open(Features::MOVE | Features::PAGEFAULT_FLAG_WP)?;
    let reserve = |e: Errno| config.refuse(format!("cannot reserve address space for {memory} bytes of device memory: {e}"));
    let watch = if mode == Mode::None { Watch::Not } else { Watch::Writes };
    // All of its memory is this process's, and so is what peers let be seen of theirs.
    let capabilities = Capabilities { replayable_faults: true, coherent: true, reads_peers: true, ..Capabilities::default() };
    let device = Coherent {
        info: DeviceInfo { name: config.name, memory, threads, mask: 0, capabilities },
        workers: Workers::new(threads).map_err(reserve)?,
        engine: Engine::new().map_err(reserve)?,
        window: Window::new(WindowSpace::with_mask(c"uhmm window", 0).map_err(reserve)?, false),
        memory: Memory::new(memory, watch).map_err(reserve)?,
        uffd,
    };
    let started = device.workers.start().and_then(|()| device.engine.start());
    started.map_err(|e| config.refuse(format!("cannot start its threads: {e}")))?;
    driver::boxed(c"uhmm soft device", device).map_err(reserve)
}

#[allow(unsafe_code)]
// SAFETY: it has no page table that could keep an old entry: its workers reach the process's pages as every thread does, and so lose them as every thread does.
unsafe impl Driver for Coherent {
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

    fn take_back(&self, frame: Frame, host: usize, pages: usize) -> usize {
        self.memory.take_back(&self.uffd, frame, host, pages)
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

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        if batch.is_empty() { Ok(()) } else { Err(Errno::OPNOTSUPP) }
    }

    fn allow_writes(&self, _batch: &[MapRun]) {}

    fn unmap(&self, _batch: &[MapRun]) {}

    fn launch(&self, launch: &Launch) -> Result<(), KernelFault> {
        self.workers.run(&self.window, launch)
    }

    fn note_fault(&self, va: usize, write: bool) {
        self.workers.faults.push(va, write);
    }

    fn fail(&self, fault: KernelFault) {
        self.workers.fail(fault);
    }

    fn host_touch(&self, _tid: u32, _address: usize) {}

    fn owns_thread(&self, tid: u32) -> bool {
        self.workers.owns(tid)
    }

    fn reaches(&self, va: usize) -> bool {
        va < 1 << 47
    }

    fn scratch(&self, address: usize, fault: KernelFault) -> bool {
        self.workers.fail(fault);
        self.workers.put_scratch(&self.uffd, &self.window, address, false)
    }
}
