//! What uhmm owes to drivers: a driver around another one that keeps its own books, and notes what does not agree with docs/driver-contract.md.

use crate::harness::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use uhmm_core::conformance::{CHECKS, Subject};
use uhmm_core::driver::{self, *};
use uhmm_core::kernel::Entry;
use uhmm_core::mode::Mode;
use uhmm_core::own::{OwnBox, OwnSlice, Zeroed};
use uhmm_core::page::Span;
use uhmm_core::{CoreRef, DeviceConfig, DeviceRef, Error};
use uhmm_os::{BLOCK, Errno, PAGE};

crate::tests![
    uhmm_keeps_its_side,
    uhmm_keeps_its_side_with_a_device_that_shows_no_mapped_page,
    uhmm_keeps_its_side_with_a_device_that_fails,
    calls_are_per_batch,
];

/// A number that lies in memory of uhmm's: these books are kept on the fault path.
#[derive(Debug)]
struct Number(AtomicU64);
// SAFETY: 0.
unsafe impl Zeroed for Number {}

impl Number {
    fn get(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn set(&self, value: u64) -> u64 {
        self.0.swap(value, Ordering::SeqCst)
    }
}

#[derive(Debug)]
struct Books {
    inner: OwnBox<dyn Driver>,
    /// What it was when it was opened.
    info: DeviceInfo,
    /// Of each unit, whether it is populated.
    populated: OwnSlice<Number>,
    /// Of each frame, whether it holds data.
    valid: OwnSlice<Number>,
    /// Of each frame, the address at which it is mapped; 0 if it is not.
    mapped: OwnSlice<Number>,
    units: AtomicU64,
    /// Of each batch under way: what it was when it was handed over (0: none is).
    batches: OwnSlice<Number>,
    /// Its fence, as the other driver has it.
    fences: OwnSlice<Number>,
    /// Uhmm has been told that the device is lost.
    told: Number,
}

/// The first line of this file where something did not agree, and how many lines did, in all. Not in `.bss`.
#[unsafe(link_section = ".data")]
static WRONG: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// Calls that were looked at: copies, maps, unmaps; pieces of copies whose frame was mapped.
#[unsafe(link_section = ".data")]
static SEEN: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

macro_rules! agree {
    ($what:expr) => {
        if !$what {
            let _ = WRONG[0].compare_exchange(0, u64::from(line!()), Ordering::SeqCst, Ordering::SeqCst);
            WRONG[1].fetch_add(1, Ordering::SeqCst);
        }
    };
}

fn open(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    with_books(uhmm_faulty::around(uhmm_soft::open)(config, mode, others)?)
}

fn open_tiny(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    with_books(crate::tiny::driver::open(config, mode, others)?)
}

fn with_books(inner: OwnBox<dyn Driver>) -> Result<OwnBox<dyn Driver>, Error> {
    let units = 2 * inner.info().memory / BLOCK;
    let numbers = |n| OwnSlice::new(c"books", n).unwrap();
    let (batches, fences) = (numbers(64), numbers(64));
    let (populated, valid, mapped) = (numbers(units), numbers(units * 512), numbers(units * 512));
    let books = Books {
        info: inner.info().clone(),
        inner,
        populated,
        valid,
        mapped,
        units: AtomicU64::new(0),
        batches,
        fences,
        told: Number(AtomicU64::new(0)),
    };
    Ok(driver::boxed(c"books", books).unwrap())
}

/// A number, not 0, that tells one batch from another: what is in it, and where it lies.
fn digest(batch: &[Dma]) -> u64 {
    let mix = |sum: u64, word: usize| (sum ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let words = batch.iter().flat_map(|dma| [dma.kind as usize, dma.host, dma.frame as usize, dma.offset, dma.len]);
    words.fold(mix(batch.len() as u64, batch.as_ptr() as usize), mix) | 1
}

/// The frames that a piece of a batch touches.
fn frames(dma: &Dma) -> std::ops::Range<usize> {
    let at = dma.frame as usize * PAGE + dma.offset;
    at / PAGE..(at + dma.len).div_ceil(PAGE)
}

impl Books {
    /// Whether kernels can reach the page at `va`, for a device whose window lies in this process.
    fn is_there(&self, va: u64) -> bool {
        let (mask, mut byte) = (self.info.mask, 0u8);
        // SAFETY: the byte is ours; a read of what is not there is an error.
        mask != 0 && unsafe { uhmm_os::copy::guarded(&raw mut byte, (va as usize ^ mask) as *const u8, 1) }.is_ok()
    }

    fn each(&self, batch: &[MapRun], mut f: impl FnMut(usize, u64)) {
        for run in batch {
            agree!(run.pages > 0 && run.va.is_multiple_of(PAGE) && run.va / BLOCK == (run.va + run.pages * PAGE - 1) / BLOCK);
            (0..run.pages).for_each(|i| f(run.frame as usize + i, (run.va + i * PAGE) as u64));
        }
    }
}

// SAFETY: what the other driver promises.
unsafe impl Forward for Books {
    fn inner(&self) -> &dyn Driver {
        &*self.inner
    }

    fn populate(&self, unit: usize) -> Result<(), Errno> {
        agree!(self.populated[unit].get() == 0);
        self.inner.populate(unit)?;
        self.populated[unit].set(1);
        let address = |frame: usize| self.inner.address(frame as Frame);
        agree!((unit * 512..unit * 512 + 511).all(|frame| address(frame + 1) == address(frame) + PAGE));
        self.valid[unit * 512..][..512].iter().for_each(|frame| _ = frame.set(0));
        agree!((self.units.fetch_add(1, Ordering::SeqCst) as usize) < self.inner.info().memory / BLOCK);
        Ok(())
    }

    fn release(&self, unit: usize) {
        agree!(self.populated[unit].set(0) == 1);
        agree!(self.mapped[unit * 512..][..512].iter().all(|frame| frame.get() == 0));
        self.units.fetch_sub(1, Ordering::SeqCst);
        self.inner.release(unit);
    }

    fn copy(&self, batch: &[Dma]) -> Fence {
        SEEN[0].fetch_add(1, Ordering::SeqCst);
        agree!(self.told.get() == 0);
        for dma in batch {
            let out = matches!(dma.kind, DmaKind::ToHost | DmaKind::GuardedToHost);
            for frame in frames(dma) {
                agree!(self.populated[frame / 512].get() == 1);
                let at = self.mapped[frame].get();
                agree!(at == 0 || self.inner.mapped(at as usize).is_none());
                SEEN[3].fetch_add(u64::from(at != 0), Ordering::SeqCst);
                agree!(!out || self.valid[frame].get() == 1);
            }
        }
        let is = digest(batch);
        let free = |of: &Number| of.0.compare_exchange(0, is, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        let Some(fence) = self.batches.iter().position(free) else { panic!("64 batches are under way: some were never waited for") };
        self.fences[fence].set(self.inner.copy(batch).0);
        Fence(fence as u64)
    }

    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError> {
        let (is, inner) = (&self.batches[fence.0 as usize], &self.fences[fence.0 as usize]);
        agree!(is.get() == digest(batch)); // not waited for yet, and with this batch
        agree!(limit == DeviceConfig::FENCE_LIMIT);
        let result = self.inner.wait(Fence(inner.get()), batch, limit);
        agree!(is.get() == digest(batch)); // it did not change meanwhile
        is.set(0);
        if result == Err(DmaError::Lost) {
            self.told.set(1);
        }
        agree!(self.told.get() == 0 || (self.inner.is_lost() && result == Err(DmaError::Lost)));
        let done = |dma: &&Dma| match dma.kind {
            DmaKind::ToDevice | DmaKind::Zero => !matches!(result, Err(DmaError::Failed(_) | DmaError::Lost)),
            DmaKind::GuardedToDevice | DmaKind::SnapshotToDevice | DmaKind::LentToDevice => result.is_ok(),
            DmaKind::ToHost | DmaKind::GuardedToHost => false,
        };
        for dma in batch.iter().filter(done).filter(|dma| dma.kind == DmaKind::ToDevice && dma.offset == 0) {
            let unmapped = frames(dma).all(|frame| self.mapped[frame].get() == 0);
            if let Some(at) = self.inner.peek(dma.frame).filter(|_| unmapped) {
                // SAFETY: the driver says that a frame can be read there that is not mapped; the host's memory is uhmm's.
                let [there, sent] = [at, dma.host].map(|at| unsafe { std::slice::from_raw_parts(at as *const u8, dma.len.min(PAGE)) });
                agree!(there == sent);
            }
        }
        batch.iter().filter(done).flat_map(frames).for_each(|frame| _ = self.valid[frame].set(1));
        result
    }

    fn close_window(&self, span: Span) {
        let inside = |frame: &Number| (span.start as u64..span.end as u64).contains(&frame.get()) && frame.get() != 0;
        agree!(span.start.is_multiple_of(BLOCK) && span.end.is_multiple_of(BLOCK) && !self.mapped.iter().any(inside));
        self.inner.close_window(span);
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        SEEN[1].fetch_add(1, Ordering::SeqCst);
        self.each(&batch, |frame, _| agree!(self.valid[frame].get() == 1 && self.mapped[frame].get() == 0));
        for run in batch.iter() {
            agree!(!self.mapped.iter().any(|frame| (run.span().start as u64..run.span().end as u64).contains(&frame.get())));
        }
        let mapped = self.inner.map(batch);
        // All runs or none. Where the window cannot be, what is there is the program's.
        if mapped.is_err_and(|e| e != Errno::EXIST) {
            self.each(&batch, |_, va| agree!(!self.is_there(va)));
        }
        mapped?;
        self.each(&batch, |frame, va| _ = self.mapped[frame].set(va));
        Ok(())
    }

    fn allow_writes(&self, batch: &[MapRun]) {
        self.each(batch, |frame, va| agree!(self.mapped[frame].get() == va));
        self.inner.allow_writes(batch);
    }

    fn unmap(&self, batch: &[MapRun]) {
        SEEN[2].fetch_add(1, Ordering::SeqCst);
        self.each(batch, |frame, va| agree!(self.mapped[frame].set(0) == va));
        self.inner.unmap(batch);
        // Acknowledged: whoever uses an old entry now gets a fault. The block is locked, so that no new one is made.
        self.each(batch, |_, va| agree!(!self.is_there(va)));
    }
}

impl Drop for Books {
    fn drop(&mut self) {
        let of = |info: &DeviceInfo| (info.name, info.memory, info.threads, info.mask, info.capabilities);
        agree!(of(self.inner.info()) == of(&self.info) && self.info.memory.is_multiple_of(BLOCK));
        agree!(self.batches.iter().all(|of| of.get() == 0));
        agree!(self.mapped.iter().all(|frame| frame.get() == 0));
    }
}

/// Leases and a launch that share a page: who comes later brings his bytes up to date where the page is mapped already.
fn overlap(dev: &DeviceRef) {
    let mut page = Pages::new(3 * PAGE);
    let (a, rest) = page.slice::<u32>().split_at_mut(100);
    let (b, rest) = rest.split_at_mut(2000);
    let (c, d) = rest.split_at_mut(100);
    for round in 0..20u32 {
        a.fill(round);
        b.fill(round + 1);
        let raw = [uhmm::inout(a), uhmm::inout(b)].map(|arg| arg.raw());
        // SAFETY: nobody uses them while they are leased, but for what is said below.
        let [of_a, of_b] = raw.map(|raw| uhmm::args![unsafe { uhmm::Arg::from_raw(raw) }]);
        let first = dev.acquire(&of_a).unwrap();
        b.fill(round + 10); // after the snapshot that the lease of its neighbour has
        c.fill(round + 20);
        let second = dev.acquire(&of_b).unwrap();
        dev.run(Entry::new(&increment), groups(c.len()).into(), &uhmm::args![uhmm::inout(c)]).unwrap();
        assert!(c.iter().all(|&x| x == round + 21), "{round}: {:?}", &c[..4]);
        c.fill(round + 30);
        d[0] = round;
        for (leased, by) in [(&*a, 200), (&*b, 100)] {
            for word in leased {
                let word = (core::ptr::from_ref(word) as usize ^ dev.info().mask) as *mut u32;
                // SAFETY: it is leased, and there until the lease ends; nobody else uses it.
                unsafe { word.write(word.read() + by) };
            }
        }
        let order = if round % 2 == 0 { [first, second] } else { [second, first] };
        order.into_iter().for_each(|lease| dev.release(lease));
        assert!(a.iter().all(|&x| x == round + 200), "{round}: {:?}", &a[..4]);
        assert!(b.iter().all(|&x| x == round + 110), "{round}: {:?}", &b[..4]);
        assert!(c.iter().all(|&x| x == round + 30) && d[0] == round, "{round}: a neighbour was written");
    }
}

fn right() {
    let [line, times] = [&WRONG[0], &WRONG[1]].map(|n| n.load(Ordering::SeqCst));
    assert_eq!(line, 0, "line {line} of this file did not agree, {times} times in all");
    assert!(SEEN[..3].iter().all(|n| n.load(Ordering::SeqCst) > 10), "{SEEN:?}");
}

fn uhmm_keeps_its_side() {
    let dev = CoreRef::get().unwrap().device(DeviceConfig { memory: 16 << 20, threads: 2, ..DeviceConfig::new("books") }, open).unwrap();
    for check in CHECKS {
        println!("{}", check.name);
        (check.run)(&mut Subject::new(&dev));
    }
    overlap(&dev);
    drop(dev);
    right();
}

/// The same of a device that shows nobody its mapped pages: copies go to frames that are mapped then, as leases and launches that overlap have them.
fn uhmm_keeps_its_side_with_a_device_that_shows_no_mapped_page() {
    let core = CoreRef::get().unwrap();
    let dev = core.device(DeviceConfig { memory: 16 << 20, ..DeviceConfig::new("books") }, open_tiny).unwrap();
    for check in CHECKS {
        println!("{}", check.name);
        (check.run)(&mut Subject::new(&dev));
    }
    overlap(&dev);
    assert!(SEEN[3].load(Ordering::SeqCst) > 20, "no copy met a mapped frame");
    drop(dev);
    right();
}

/// What is moved as a whole takes calls by the batch, not by the page.
fn calls_are_per_batch() {
    let dev = CoreRef::get().unwrap().device(DeviceConfig { memory: 16 << 20, threads: 2, ..DeviceConfig::new("books") }, open).unwrap();
    let mut pages = Pages::huge(8 << 20);
    let data = pages.slice::<u32>();
    data.fill(1);
    let range = data.as_ptr_range();
    let calls = || [&SEEN[0], &SEEN[1], &SEEN[2]].map(|n| n.load(Ordering::SeqCst));
    for round in 0..4 {
        let before = calls();
        dev.run(Entry::new(&increment), groups(data.len()).into(), &uhmm::args![uhmm::inout(data)]).unwrap();
        dev.evict(range.start as usize, range.end as usize).unwrap();
        let [copies, maps, unmaps] = core::array::from_fn(|i| calls()[i] - before[i]);
        // 4 blocks go there and come back: two copies of each and one map and one unmap, if not even fewer.
        assert!((1..=8).contains(&copies) && (1..=4).contains(&maps) && (1..=4).contains(&unmaps), "{round}: {copies} {maps} {unmaps}");
    }
    drop(dev);
    assert_eq!(WRONG[0].load(Ordering::SeqCst), 0);
}

/// The same while calls of every kind fail, and when the device is lost.
fn uhmm_keeps_its_side_with_a_device_that_fails() {
    use uhmm_faulty::{Call, Fault, all_well, order};
    let mut data: Vec<u32> = (0..2_000_000).collect();
    for fault in [Fault::Failed, Fault::Lost] {
        for call in [Call::ToDevice, Call::Map, Call::Populate, Call::Launch] {
            for nth in 1..12 {
                let config = DeviceConfig { memory: 8 << 20, threads: 2, ..DeviceConfig::new("books") };
                let dev = CoreRef::get().unwrap().device(config, open).unwrap();
                order(call, fault, nth, 2);
                for part in data.chunks_mut(700_000) {
                    let first = part[0];
                    let read = |ctx: &uhmm::Ctx<'_>| _ = std::hint::black_box(ctx.inp::<u32>(0)[ctx.group() * 1000]);
                    let kernel = if fault == Fault::Lost { Entry::new(&read) } else { Entry::new(&increment) };
                    let moved = match fault {
                        // Private pages that are lost are lost to this test's own books as well.
                        Fault::Lost => dev.run(kernel, groups(part.len()).into(), &uhmm::args![uhmm::inp(part)]),
                        _ => dev.run(kernel, groups(part.len()).into(), &uhmm::args![uhmm::inout(part)]),
                    };
                    assert!(moved.is_ok() || part[0] == first || part[0] == first + 1, "{moved:?}");
                }
                all_well();
                drop(dev);
            }
        }
    }
    right();
}
