//! What a driver promises and its answers do not show: that it leaves alone what it was given when it has said so, allocates nothing on the fault path, and that a kernel which runs
//! sees a page or a fault. The drivers of this repository are held to it, each inside a driver that makes a breach an error.

use crate::harness::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, args, inout, ptr};
use uhmm_core::conformance::{CHECKS, Subject};
use uhmm_core::driver::{self, *};
use uhmm_core::kernel::Entry;
use uhmm_core::mode::Mode;
use uhmm_core::own::{self, OwnBox, OwnSlice};
use uhmm_core::page::Span;
use uhmm_core::{CoreRef, DeviceConfig, Error, OpenDriver};
use uhmm_os::mem::{self, Mapping, Prot};
use uhmm_os::{Errno, thread};

crate::tests![
    the_reference_device_leaves_alone_what_it_was_given,
    the_tiny_device_leaves_alone_what_it_was_given,
    the_coherent_device_leaves_alone_what_it_was_given,
    a_kernel_that_runs_sees_the_page_or_a_fault,
    a_kernel_of_the_tiny_device_sees_the_page_or_a_fault,
];

/// The heap, which counts what threads that are in a call of a driver's ask of it.
struct Heap;

#[global_allocator]
static HEAP: Heap = Heap;

/// The threads that are in a call which may be made on the fault path, and how many. Not in `.bss`.
#[unsafe(link_section = ".data")]
static IN_CALL: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];
#[unsafe(link_section = ".data")]
static CALLS: AtomicU32 = AtomicU32::new(0);
#[unsafe(link_section = ".data")]
static ASKED: AtomicU64 = AtomicU64::new(0);

fn note() {
    if CALLS.load(Ordering::SeqCst) > 0 {
        let tid = thread::gettid();
        ASKED.fetch_add(u64::from(IN_CALL.iter().any(|of| of.load(Ordering::SeqCst) == tid)), Ordering::SeqCst);
    }
}

// SAFETY: the system's, which is asked for the same.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: handed on.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note();
        // SAFETY: handed on.
        unsafe { System.dealloc(at, layout) }
    }
}

/// The calling thread is in such a call.
struct InCall(usize);

impl InCall {
    fn begin() -> Self {
        let free = |of: &AtomicU32| of.compare_exchange(0, thread::gettid(), Ordering::SeqCst, Ordering::SeqCst).is_ok();
        let index = IN_CALL.iter().position(free).unwrap_or_else(|| panic!("more than 64 calls at once"));
        CALLS.fetch_add(1, Ordering::SeqCst);
        InCall(index)
    }
}

impl Drop for InCall {
    fn drop(&mut self) {
        IN_CALL[self.0].store(0, Ordering::SeqCst);
        CALLS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What one batch has of the stage: its list, and the memory that is uhmm's in it.
const SLOT: usize = 8 << 20;
const LIST: usize = 1 << 20;
const SLOTS: usize = 128;

/// A driver around another one, which gets batches and memory of uhmm's that are there only until it says that it is done with them.
#[derive(Debug)]
struct Strict {
    inner: OwnBox<dyn Driver>,
    /// Inaccessible but where a batch is under way. Slots are used in turn, so that one stays inaccessible for long.
    stage: Mapping,
    next: AtomicU64,
    /// The other driver's fence, plus 1; 0 if there is no batch.
    fences: OwnSlice<u64>,
}

impl Strict {
    fn fence(&self, slot: usize) -> &AtomicU64 {
        // SAFETY: an element of the slice, which is used through this alone.
        unsafe { AtomicU64::from_ptr(self.fences.at(slot)) }
    }

    fn slot(&self, slot: usize) -> usize {
        self.stage.start() + slot * SLOT
    }

    fn allow(&self, slot: usize, prot: Prot) {
        // SAFETY: the stage's own, and nobody else uses it now, or breaks the contract.
        unsafe { mem::mprotect(self.slot(slot), SLOT, prot) }.unwrap();
    }

    /// The batch as the other driver gets it, and for each piece whether its memory is the stage's.
    fn staged(&self, slot: usize, count: usize) -> &[Dma] {
        // SAFETY: `copy` has written so many there.
        unsafe { std::slice::from_raw_parts(self.slot(slot) as *const Dma, count) }
    }
}

// SAFETY: what the other driver promises, by way of memory of its own.
unsafe impl Forward for Strict {
    fn inner(&self) -> &dyn Driver {
        &*self.inner
    }

    fn copy(&self, batch: &[Dma]) -> Fence {
        let slot = loop {
            let slot = self.next.fetch_add(1, Ordering::SeqCst) as usize % SLOTS;
            if self.fence(slot).compare_exchange(0, u64::MAX, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                break slot;
            }
        };
        self.allow(slot, Prot::ReadWrite);
        assert!(size_of_val(batch) <= LIST);
        let mut room = LIST;
        for (i, dma) in batch.iter().enumerate() {
            let mut mine = *dma;
            if matches!(dma.kind, DmaKind::ToDevice | DmaKind::ToHost) && room + dma.len <= SLOT {
                mine.host = self.slot(slot) + room;
                room += dma.len.next_multiple_of(64);
                if dma.kind == DmaKind::ToDevice {
                    // SAFETY: the memory is uhmm's, or a peer's, and stays until the batch has been waited for; the stage's is this batch's.
                    unsafe { std::ptr::copy_nonoverlapping(dma.host as *const u8, mine.host as *mut u8, dma.len) };
                }
            }
            // SAFETY: inside the slot's list.
            unsafe { (self.slot(slot) as *mut Dma).add(i).write(mine) };
        }
        let _call = InCall::begin();
        let fence = self.inner.copy(self.staged(slot, batch.len()));
        self.fence(slot).store(fence.0.wrapping_add(1), Ordering::SeqCst);
        Fence(slot as u64)
    }

    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError> {
        let slot = fence.0 as usize;
        let staged = self.staged(slot, batch.len());
        let inner = Fence(self.fence(slot).load(Ordering::SeqCst).wrapping_sub(1));
        let result = {
            let _call = InCall::begin();
            self.inner.wait(inner, staged, limit)
        };
        if !matches!(result, Err(DmaError::Failed(_) | DmaError::Lost)) {
            for (dma, mine) in batch.iter().zip(staged).filter(|(dma, mine)| dma.kind == DmaKind::ToHost && dma.host != mine.host) {
                // SAFETY: uhmm's memory, which the batch is to fill.
                unsafe { std::ptr::copy_nonoverlapping(mine.host as *const u8, dma.host as *mut u8, dma.len) };
            }
        }
        self.allow(slot, Prot::None); // a touch ends this process from now on
        self.fence(slot).store(0, Ordering::SeqCst);
        result
    }

    fn populate(&self, unit: usize) -> Result<(), Errno> {
        let _call = InCall::begin();
        self.inner.populate(unit)
    }

    fn release(&self, unit: usize) {
        let _call = InCall::begin();
        self.inner.release(unit);
    }

    fn open_window(&self, span: Span) -> Result<(), Errno> {
        let _call = InCall::begin();
        self.inner.open_window(span)
    }

    fn close_window(&self, span: Span) {
        let _call = InCall::begin();
        self.inner.close_window(span);
    }

    fn take_back(&self, frame: Frame, host: usize, pages: usize) -> usize {
        let _call = InCall::begin();
        self.inner.take_back(frame, host, pages)
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        let _call = InCall::begin();
        self.inner.map(batch)
    }

    fn allow_writes(&self, batch: &[MapRun]) {
        let _call = InCall::begin();
        self.inner.allow_writes(batch);
    }

    fn protect(&self, run: MapRun) -> Option<usize> {
        let _call = InCall::begin();
        self.inner.protect(run)
    }

    fn unmap(&self, batch: &[MapRun]) {
        let _call = InCall::begin();
        self.inner.unmap(batch);
    }

    fn note_fault(&self, va: usize, write: bool) {
        let _call = InCall::begin();
        self.inner.note_fault(va, write);
    }

    fn scratch(&self, address: usize, fault: KernelFault) -> bool {
        let _call = InCall::begin();
        self.inner.scratch(address, fault)
    }
}

fn strict(inner: OwnBox<dyn Driver>) -> Result<OwnBox<dyn Driver>, Error> {
    let stage = own::map(c"stage", SLOTS * SLOT).unwrap();
    let fences = OwnSlice::new(c"fences", SLOTS).unwrap();
    let strict = Strict { inner, stage, next: AtomicU64::new(0), fences };
    (0..SLOTS).for_each(|slot| strict.allow(slot, Prot::None));
    Ok(driver::boxed(c"strict", strict).unwrap())
}

fn open_soft(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    strict(uhmm_soft::open(config, mode, others)?)
}

fn open_tiny(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    strict(crate::tiny::driver::open(config, mode, others)?)
}

/// The checks, and transfers that are large enough for an engine's own thread.
fn leaves_alone(config: DeviceConfig, open: OpenDriver) {
    let dev = CoreRef::get().unwrap().device(DeviceConfig { memory: 16 << 20, threads: 2, ..config }, open).unwrap();
    for check in CHECKS {
        println!("{}", check.name);
        (check.run)(&mut Subject::new(&dev));
    }
    let mut data: Vec<u32> = (0..2 << 20).collect();
    for round in 1..=50 {
        dev.run(Entry::new(&increment), groups(data.len()).into(), &args![inout(&mut data)]).unwrap();
        let all = data.as_ptr_range();
        dev.evict(all.start as usize, all.end as usize).unwrap();
        assert!(data.iter().enumerate().step_by(500).all(|(i, &x)| x == i as u32 + round));
    }
    drop(dev);
    assert_eq!(ASKED.load(Ordering::SeqCst), 0, "the heap was asked for something by calls that may be made on the fault path");
}

fn the_reference_device_leaves_alone_what_it_was_given() {
    leaves_alone(DeviceConfig::new("strict"), open_soft);
}

fn the_tiny_device_leaves_alone_what_it_was_given() {
    leaves_alone(DeviceConfig::new("strict"), open_tiny);
}

fn the_coherent_device_leaves_alone_what_it_was_given() {
    leaves_alone(DeviceConfig { coherent: true, ..DeviceConfig::new("strict") }, open_soft);
}

/// A kernel counts in a page that the CPU takes home all the while: a place where it saw anything but what it had written there shows.
fn sees_the_page(config: DeviceConfig, open: OpenDriver) {
    let dev = CoreRef::get().unwrap().device(DeviceConfig { memory: 16 << 20, ..config }, open).unwrap();
    let mut pages = Pages::new(4 << 20);
    let words = pages.slice::<u64>();
    // SAFETY: the same words, borrowed for as long, and used by atomics only.
    let words = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<AtomicU64>(), words.len()) };
    let (stop, rounds, wrong) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let kernel = |ctx: &Ctx<'_>| {
        let words = ctx.pointer::<AtomicU64>(0).cast_const();
        let mut last = [0; 8];
        while !stop.load(Ordering::Relaxed) {
            for (i, last) in last.iter_mut().enumerate() {
                // SAFETY: inside `words`, which outlive the launch, and where all use atomics.
                let word = unsafe { &*words.add(i * 512) };
                let seen = word.fetch_add(1, Ordering::Relaxed);
                wrong.fetch_add(u64::from(seen != *last), Ordering::Relaxed);
                *last = seen + 1;
            }
            rounds.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        // SAFETY: as for the kernel.
        let run = scope.spawn(|| dev.run(Entry::new(&kernel), 1.into(), &args![unsafe { ptr(words.as_ptr()) }]).unwrap());
        let end = Instant::now() + seconds(3);
        let mut last = [0; 8];
        while Instant::now() < end && !run.is_finished() {
            for (i, last) in last.iter_mut().enumerate() {
                let seen = words[i * 512].load(Ordering::Relaxed);
                wrong.fetch_add(u64::from(seen < *last), Ordering::Relaxed);
                *last = seen;
            }
        }
        stop.store(true, Ordering::Relaxed);
        run.join().unwrap();
    });
    let (rounds, wrong) = (rounds.into_inner(), wrong.into_inner());
    assert_eq!(wrong, 0, "of {rounds} rounds");
    assert!((0..8).all(|i| words[i * 512].load(Ordering::Relaxed) == rounds) && rounds > 100, "{rounds}");
    assert!(dev.stats().cpu_faults > 20, "{:?}", dev.stats());
}

fn a_kernel_that_runs_sees_the_page_or_a_fault() {
    sees_the_page(DeviceConfig { threads: 1, ..DeviceConfig::new("soft") }, uhmm_soft::open);
}

fn a_kernel_of_the_tiny_device_sees_the_page_or_a_fault() {
    sees_the_page(DeviceConfig::new("tiny"), crate::tiny::driver::open);
}
