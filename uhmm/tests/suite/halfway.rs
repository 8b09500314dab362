//! Calls of a driver that do a part of what they are asked for and then cannot go on: a `map` whose second run has no place, a batch of copies of which a part is out of reach,
//! and launches of which some groups end later, or also fail.

use crate::harness::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use uhmm_core::driver::{self, *};
use uhmm_core::kernel::{Ctx, Entry};
use uhmm_core::mode::Mode;
use uhmm_core::own::{self, OwnBox};
use uhmm_core::page::Span;
use uhmm_core::{CoreRef, DeviceConfig, Error, OpenDriver};
use uhmm_os::mem::{self, Mapping, Prot};
use uhmm_os::{BLOCK, Errno, PAGE};

crate::tests![
    a_map_of_the_reference_device_enters_all_or_nothing,
    a_map_of_the_tiny_device_enters_all_or_nothing,
    what_can_be_reached_is_copied_by_the_reference_device,
    what_can_be_reached_is_copied_by_the_coherent_device,
    what_can_be_reached_is_copied_by_the_tiny_device,
    a_launch_returns_when_all_groups_have_ended,
    the_first_fault_is_the_launchs,
];

/// How many of the next batches that have a second run fail there; how many have; of those the ones that were refused; and what was entered all the same. Not in `.bss`.
#[unsafe(link_section = ".data")]
static ORDERS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
/// Mappings that the process may still have when a batch is to fail; 100: it is the place that is missing.
#[unsafe(link_section = ".data")]
static SPARE: AtomicU64 = AtomicU64::new(100);

fn get(of: &AtomicU64) -> u64 {
    of.load(Ordering::SeqCst)
}

/// A driver around another one, whose page table has no room for a second run.
#[derive(Debug)]
struct Half {
    inner: OwnBox<dyn Driver>,
    /// What takes all the mappings that the process may have.
    many: Mapping,
}

impl Half {
    /// Takes mappings until there are no more, and gives some back.
    fn take_mappings(&self, spare: u64) {
        let protect = |i: usize, prot| {
            // SAFETY: the mapping is ours, and nobody uses it.
            unsafe { mem::mprotect(self.many.start() + i * PAGE, PAGE, prot) }
        };
        let taken = (1..).step_by(2).find(|&i| protect(i, Prot::Read).is_err()).unwrap();
        // Two of them each, and one where the first part is joined to the second.
        (1..=spare as usize / 2).for_each(|i| protect(taken - 2 * i, Prot::None).unwrap());
        protect(0, if spare.is_multiple_of(2) { Prot::None } else { Prot::Read }).unwrap();
    }

    fn give_mappings(&self) {
        // SAFETY: as above.
        unsafe { mem::mprotect(self.many.start(), self.many.len(), Prot::None) }.unwrap();
    }

    fn is_there(&self, run: &MapRun) -> bool {
        let mut byte = 0u8;
        let mut at = (run.va..run.va + run.pages * PAGE).step_by(PAGE).map(|va| va ^ self.inner.info().mask);
        // SAFETY: the byte is ours; a read of what is not there is an error.
        at.any(|at| unsafe { uhmm_os::copy::guarded(&raw mut byte, at as *const u8, 1) }.is_ok())
    }
}

// SAFETY: what the other driver promises; its page table is made to lack a place only while nothing is entered.
unsafe impl Forward for Half {
    fn inner(&self) -> &dyn Driver {
        &*self.inner
    }

    fn map(&self, batch: Committed<'_>) -> Result<(), Errno> {
        if batch.len() < 2 || get(&ORDERS[0]) == 0 {
            return self.inner.map(batch);
        }
        ORDERS[0].fetch_sub(1, Ordering::SeqCst);
        ORDERS[1].fetch_add(1, Ordering::SeqCst);
        let (spare, last) = (get(&SPARE), batch.last().unwrap().span());
        // New, and so one mapping.
        self.inner.close_window(Span::block(last.start));
        self.inner.open_window(last).unwrap();
        match spare {
            // SAFETY: the place of the last run in the window, where nothing is.
            100 => unsafe { mem::munmap(last.start ^ self.inner.info().mask, last.len()) }.unwrap(),
            _ => self.take_mappings(spare),
        }
        let result = self.inner.map(batch);
        if spare != 100 {
            self.give_mappings();
        }
        if result.is_err() {
            ORDERS[2].fetch_add(1, Ordering::SeqCst);
            ORDERS[3].fetch_add(batch.iter().filter(|run| self.is_there(run)).count() as u64, Ordering::SeqCst);
            // Whole again.
            self.inner.close_window(Span::block(last.start));
        }
        result
    }
}

fn half(inner: OwnBox<dyn Driver>) -> Result<OwnBox<dyn Driver>, Error> {
    let many = own::map(c"many", 200_000 * PAGE).unwrap();
    let half = Half { inner, many };
    half.give_mappings();
    Ok(driver::boxed(c"half", half).unwrap())
}

fn half_soft(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    half(uhmm_soft::open(config, mode, others)?)
}

fn half_tiny(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    half(crate::tiny::driver::open(config, mode, others)?)
}

/// Launches whose argument has frames in two places, and whose `map` fails at the second: with so many mappings left each time.
fn all_or_nothing(open: OpenDriver, spares: &[u64]) {
    let dev = CoreRef::get().unwrap().device(DeviceConfig { memory: BLOCK, threads: 2, ..DeviceConfig::new("half") }, open).unwrap();
    let mut pages = Pages::huge(3 * BLOCK);
    let (data, other) = pages.slice::<u32>().split_at_mut(BLOCK / 4);
    let data = &mut data[10 * PAGE / 4..260 * PAGE / 4];
    let other = other.as_ptr() as usize;
    let mut count = 0;
    for &spare in spares {
        // Between free frames there are some that are in use, and nowhere else are so many.
        dev.prefetch(other, other + 200 * PAGE).unwrap();
        dev.prefetch(other + BLOCK, other + BLOCK + 100 * PAGE).unwrap();
        dev.evict(other, other + BLOCK).unwrap();
        SPARE.store(spare, Ordering::SeqCst);
        ORDERS[0].store(1, Ordering::SeqCst);
        let mut add = || dev.run(Entry::new(&increment), groups(data.len()).into(), &uhmm::args![uhmm::inout(data)]);
        let failed = add();
        assert_eq!(get(&ORDERS[0]), 0, "{spare}: no batch had two runs");
        assert_eq!(get(&ORDERS[3]), 0, "{spare}: a part of the batch was entered, {failed:?}");
        add().unwrap();
        count += 1 + u32::from(failed.is_ok());
        assert!(data.iter().all(|&x| x == count), "{spare}: {} is not {count}", data[0]);
        dev.evict(0, 1 << 47).unwrap();
    }
    assert!(get(&ORDERS[2]) > 0 && (count as usize) < 2 * spares.len(), "none failed: {ORDERS:?}");
}

fn a_map_of_the_reference_device_enters_all_or_nothing() {
    all_or_nothing(half_soft, &[100; 3]);
}

fn a_map_of_the_tiny_device_enters_all_or_nothing() {
    all_or_nothing(half_tiny, &[0, 1, 2, 3, 4, 5]);
}

/// The first line of this file where a driver did not do what it should.
#[unsafe(link_section = ".data")]
static WRONG: AtomicU64 = AtomicU64::new(0);

macro_rules! agree {
    ($what:expr) => {
        if !$what {
            let _ = WRONG.compare_exchange(0, u64::from(line!()), Ordering::SeqCst, Ordering::SeqCst);
        }
    };
}

/// Asks a driver that nobody uses yet for batches of every kind of piece, small ones and large ones: all is copied to the byte and nothing beside it; and where some pieces
/// name memory that is not there, all others are.
pub(crate) fn batches(driver: &dyn Driver) {
    const LEN: usize = 2 * BLOCK;
    const NOWHERE: usize = PAGE;
    let ask = |batch: &[Dma]| driver.wait(driver.copy(batch), batch, DeviceConfig::FENCE_LIMIT);
    let piece = |kind, host, at: usize, len| Dma { kind, host, frame: (at / PAGE) as Frame, offset: at % PAGE, len };
    let pattern = |i: usize, seed: usize| ((i * 31 + seed * 7) ^ (i >> 8)) as u8 | 1;
    agree!((0..2).all(|unit| driver.populate(unit).is_ok()));
    let [ours, sent, back] = [(); 3].map(|()| own::map(c"batches", LEN).unwrap());
    let mut program = [Pages::new(LEN), Pages::new(LEN)];
    let [from, to] = program.each_mut().map(|pages| pages.slice::<u8>());
    // SAFETY: the mappings are this function's, and the driver touches them only in `ask`.
    let [host, sent, read] = [&ours, &sent, &back].map(|of| unsafe { std::slice::from_raw_parts_mut(of.as_ptr(), LEN) });
    for (round, unit) in [100, PAGE + 1, 300_000].into_iter().enumerate() {
        for gone in [false, true] {
            let seed = 2 * round + usize::from(gone);
            (0..LEN).for_each(|i| (host[i], sent[i], from[i]) = (pattern(i, seed), pattern(i, seed + 50), pattern(i, seed + 100)));
            let all = [piece(DmaKind::ToDevice, host.as_ptr() as usize, 0, LEN)];
            agree!(ask(&all) == Ok(()));
            read.fill(0);
            to.fill(0);
            let at = |n: usize| n * (unit + 77) + 5;
            let mut batch = [
                piece(DmaKind::GuardedToDevice, NOWHERE, at(0), unit),
                piece(DmaKind::GuardedToDevice, from.as_ptr() as usize + at(1), at(1), unit),
                piece(DmaKind::GuardedToHost, NOWHERE, at(2), unit),
                piece(DmaKind::ToHost, read.as_ptr() as usize + at(3), at(3), unit),
                piece(DmaKind::Zero, 0, at(4), unit),
                piece(DmaKind::GuardedToHost, to.as_ptr() as usize + at(5), at(5), unit),
                piece(DmaKind::ToDevice, sent.as_ptr() as usize + at(6), at(6), unit),
                piece(DmaKind::SnapshotToDevice, NOWHERE, at(7), unit),
            ];
            if !gone {
                (batch[0].host, batch[2].host) = (from.as_ptr() as usize + at(0), to.as_ptr() as usize + at(2));
                batch[7].host = from.as_ptr() as usize + at(7);
            }
            match ask(&batch) {
                Err(DmaError::Gone { address }) => agree!(gone && (NOWHERE..NOWHERE + unit).contains(&address)),
                result => agree!(!gone && result.is_ok()),
            }
            let inside = |n: usize, i: usize| (at(n)..at(n) + unit).contains(&i);
            agree!((0..LEN).all(|i| read[i] == if inside(3, i) { host[i] } else { 0 }));
            // Whether a guarded piece is done that could be reached is not said of a batch of which another could not.
            agree!((0..LEN).all(|i| match inside(5, i) || (inside(2, i) && !gone) {
                true => to[i] == host[i] || (gone && to[i] == 0),
                false => to[i] == 0,
            }));
            let all = [piece(DmaKind::ToHost, read.as_ptr() as usize, 0, LEN)];
            agree!(ask(&all) == Ok(()));
            agree!((0..LEN).all(|i| match (0..8).find(|&n| inside(n, i)) {
                Some(0 | 1 | 7) if gone => true,
                Some(0 | 1 | 7) => read[i] == from[i],
                Some(6) => read[i] == sent[i],
                Some(4) => read[i] == 0,
                _ => read[i] == host[i],
            }));
        }
    }
    sets(&ask, [host, sent, read, from, to]);
    (0..2).for_each(|unit| driver.release(unit));
}

/// Batches that are sets of pieces with a stride on each side, one piece of which may name memory that is not there.
fn sets(ask: &dyn Fn(&[Dma]) -> Result<(), DmaError>, [host, sent, read, from, to]: [&mut [u8]; 5]) {
    const NOWHERE: usize = PAGE;
    for (round, (len, on_device, on_host)) in [(PAGE, 4 * PAGE, 3 * PAGE), (100, 1001, 100), (5000, 5000, 7777)].into_iter().enumerate() {
        for gone in [None, Some(7)] {
            let byte = |i: usize, seed: usize| ((i * 13 + seed * 5 + round * 3) ^ (i >> 8)) as u8 | 1;
            (0..host.len()).for_each(|i| (host[i], sent[i], from[i]) = (byte(i, 0), byte(i, 1), byte(i, 2)));
            let whole = |kind, at: usize| [Dma { kind, host: at, frame: 0, offset: 0, len: 2 * BLOCK }];
            agree!(ask(&whole(DmaKind::ToDevice, host.as_ptr() as usize)) == Ok(()));
            let places = |i: usize| (11 + i * on_device, 3 + i * on_host);
            let set = |kind, base: usize| -> Vec<Dma> {
                let piece = |i| {
                    let (at, here) = places(i);
                    let guarded = matches!(kind, DmaKind::GuardedToDevice | DmaKind::GuardedToHost);
                    let host = if guarded && gone == Some(i) { NOWHERE } else { base + here };
                    Dma { kind, host, frame: (at / PAGE) as Frame, offset: at % PAGE, len }
                };
                (0..100).map(piece).collect()
            };
            // There: from the program, and from uhmm over that.
            let mut want = host.to_vec();
            for (kind, source) in [(DmaKind::GuardedToDevice, &*from), (DmaKind::ToDevice, &*sent)] {
                let result = ask(&set(kind, source.as_ptr() as usize));
                let lacks = gone.is_some() && kind == DmaKind::GuardedToDevice;
                agree!(if lacks { matches!(result, Err(DmaError::Gone { .. })) } else { result == Ok(()) });
                for (at, here) in (0..100).map(places) {
                    want[at..at + len].copy_from_slice(&source[here..here + len]);
                }
                agree!(ask(&whole(DmaKind::ToHost, read.as_ptr() as usize)) == Ok(()));
                let inside = |i: usize| i >= 11 && (i - 11) % on_device < len && (i - 11) / on_device < 100;
                agree!((0..want.len()).all(|i| (lacks && inside(i)) || read[i] == want[i]));
            }
            // And back.
            for (kind, target) in [(DmaKind::ToHost, &mut *read), (DmaKind::GuardedToHost, &mut *to)] {
                target.fill(0);
                let result = ask(&set(kind, target.as_mut_ptr() as usize));
                let lacks = gone.is_some() && kind == DmaKind::GuardedToHost;
                agree!(if lacks { matches!(result, Err(DmaError::Gone { .. })) } else { result == Ok(()) });
                let mut came = vec![0; target.len()];
                for (at, here) in (0..100).map(places) {
                    came[here..here + len].copy_from_slice(&want[at..at + len]);
                }
                agree!((0..came.len()).all(|i| target[i] == came[i] || (lacks && target[i] == 0)));
            }
        }
    }
}

fn asked_soft(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    uhmm_soft::open(config, mode, others).inspect(|driver| batches(&**driver))
}

fn asked_tiny(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    crate::tiny::driver::open(config, mode, others).inspect(|driver| batches(&**driver))
}

pub(crate) fn asked(config: DeviceConfig, open: OpenDriver) {
    let dev = CoreRef::get().unwrap().device(DeviceConfig { memory: 16 << 20, threads: 1, ..config }, open).unwrap();
    drop(dev);
    assert_eq!(get(&WRONG), 0, "the line of this file that did not agree");
}

fn what_can_be_reached_is_copied_by_the_reference_device() {
    asked(DeviceConfig::new("soft"), asked_soft);
}

fn what_can_be_reached_is_copied_by_the_coherent_device() {
    asked(DeviceConfig { coherent: true, ..DeviceConfig::new("soft") }, asked_soft);
}

fn what_can_be_reached_is_copied_by_the_tiny_device() {
    asked(DeviceConfig::new("tiny"), asked_tiny);
}

fn two_workers() -> uhmm_core::DeviceRef {
    CoreRef::get().unwrap().device(DeviceConfig { memory: 16 << 20, threads: 2, ..DeviceConfig::new("soft") }, uhmm_soft::open).unwrap()
}

fn a_launch_returns_when_all_groups_have_ended() {
    let (dev, ended) = (two_workers(), AtomicU64::new(0));
    let kernel = |ctx: &Ctx<'_>| {
        std::thread::sleep(Duration::from_millis(200 * ctx.group() as u64));
        ended.fetch_add(1, Ordering::SeqCst);
    };
    for round in 1..=3 {
        dev.run(Entry::new(&kernel), 2.into(), &uhmm::args![]).unwrap();
        assert_eq!(get(&ended), 2 * round);
    }
}

/// Both groups have begun when the one fails; the other fails after it.
fn the_first_fault_is_the_launchs() {
    let (dev, begun) = (two_workers(), AtomicU64::new(0));
    let kernel = |ctx: &Ctx<'_>| {
        begun.fetch_add(1, Ordering::SeqCst);
        while get(&begun) < 2 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(300 * ctx.group() as u64));
        panic!("group {} fails", ctx.group());
    };
    let error = dev.run(Entry::new(&kernel), 2.into(), &uhmm::args![]).unwrap_err();
    assert!(error.to_string().contains("group 0 fails"), "{error}");
}
