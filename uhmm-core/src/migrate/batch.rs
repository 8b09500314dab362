//! What is on its way: one batch that is collected and one that is copied, and how a batch ends.

use super::{BATCH, Intent, LENT, Park};
use crate::bits::{Bits, PAGES};
use crate::core::{Core, Device};
use crate::counters::count;
use crate::directory::Frame;
use crate::driver::{Dma, DmaError, DmaKind, Done, Fence};
use crate::error::Error;
use crate::home;
use crate::own::OwnSlice;
use crate::page::{Cause, PageState, Va};
use crate::pool::Tray;
use crate::ranges;
use crate::sync::*;
use uhmm_os::{Errno, PAGE, thread};

/// One block on its way.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) va: Va,
    /// Where they go.
    pub(super) device: u32,
    pub(super) intent: Intent,
    /// Pages that were taken out of the program, in `tray`.
    pub(super) moved: Bits,
    /// Pages that start as zeroes on the device.
    pub(super) zeroed: Bits,
    /// Pages that are copied from where they are.
    pub(super) copied: Bits,
    pub(super) tray: Option<Tray>,
    /// Of the copied pages, those of which a twin is made.
    pub(super) twins: Bits,
    /// Of the copied pages, those that the device may only read.
    pub(super) rdonly: Bits,
}

/// The room for one migration, in memory that never migrates: a batch that is collected, and one that is copied.
#[derive(Debug)]
pub(crate) struct Room {
    pub(super) batches: [Batch; 2],
    /// The one that is collected.
    pub(super) at: usize,
    /// What the other one waits for.
    pub(super) flying: Option<Flying>,
    /// A page will not move, or cannot even be read, as it is: asking again leads nowhere.
    pub(super) refused: bool,
}

/// One batch.
#[derive(Debug)]
pub(super) struct Batch {
    items: [Option<Item>; BATCH],
    count: usize,
    /// Blocks of which only lent pages are copied: many of them, which the device may take for one copy.
    lent: OwnSlice<Lent>,
    lent_count: usize,
    dma: OwnSlice<Dma>,
    dma_count: usize,
}

/// A block whose taken pages are all copied from where they are, lent by the launch.
#[derive(Clone, Copy, Debug)]
struct Lent {
    va: Va,
    copied: Bits,
}

#[allow(unsafe_code)]
// SAFETY: the first kind, and zeroes.
unsafe impl crate::own::Zeroed for Dma {}
#[allow(unsafe_code)]
// SAFETY: no address, no pages.
unsafe impl crate::own::Zeroed for Lent {}

impl Lent {
    fn item(self, dev: &Device) -> Item {
        Item { copied: self.copied, ..Item::new(self.va, dev.id(), Intent::Duplicate) }
    }
}

impl Item {
    /// Of which nothing has been taken yet.
    pub(super) fn new(va: Va, device: u32, intent: Intent) -> Self {
        let none = Bits::EMPTY;
        Item { va, device, intent, moved: none, zeroed: none, copied: none, tray: None, twins: none, rdonly: none }
    }
}

impl Room {
    /// Room without a migration.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Room { batches: [Batch::new()?, Batch::new()?], at: 0, flying: None, refused: false })
    }
}

impl Room {
    /// Its list of copies, for who uses the room for nothing else.
    pub(crate) fn list(&mut self) -> &mut [Dma] {
        &mut self.batches[0].dma
    }
}

impl Batch {
    fn new() -> Result<Self, Errno> {
        Ok(Batch {
            items: [const { None }; BATCH],
            count: 0,
            lent: OwnSlice::new(c"uhmm lent blocks", LENT)?,
            lent_count: 0,
            dma: OwnSlice::new(c"uhmm batch", BATCH * PAGES)?,
            dma_count: 0,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count + self.lent_count == 0
    }

    /// Whether it is to be copied before another block joins it: one that is mixed, or might not have room for the pieces of another.
    pub(super) fn is_full(&self) -> bool {
        let is_mixed = self.count > 0 && self.count + self.lent_count >= BATCH;
        is_mixed || self.lent_count == LENT || self.dma.len() - self.dma_count < PAGES
    }

    /// Adds a block whose copies are on the list; `lent`: of lent pages only, and more such blocks may follow.
    pub(super) fn push(&mut self, item: Item, lent: bool) {
        if lent {
            self.lent[self.lent_count] = Lent { va: item.va, copied: item.copied };
            self.lent_count += 1;
        } else {
            self.items[self.count] = Some(item);
            self.count += 1;
        }
    }

    /// Calls `f` with all blocks, and is empty.
    fn end(&mut self, dev: &Device, mut f: impl FnMut(Item)) {
        self.items.iter_mut().take(self.count).filter_map(Option::take).for_each(&mut f);
        self.lent.iter().take(self.lent_count).for_each(|lent| f(lent.item(dev)));
        (self.count, self.lent_count, self.dma_count) = (0, 0, 0);
    }

    pub(super) fn push_dma(&mut self, kind: DmaKind, host: usize, frame: Frame, pages: usize) {
        self.dma[self.dma_count] = Dma { kind, host, frame, offset: 0, len: pages * PAGE };
        self.dma_count += 1;
    }
}

/// Blocks whose pages were taken and are not copied yet.
pub(super) struct Collected<'a>(pub(super) &'a mut Batch);
/// Blocks that are being copied; by nobody, if the device is known to be lost.
#[derive(Debug)]
pub(super) struct Flying(Option<Fence>);
/// Blocks whose contents are on the device and not mapped yet.
pub(super) struct Copied<'a> {
    batch: &'a mut Batch,
    done: Done,
}
/// Blocks whose contents the device has not taken.
pub(super) struct Failed<'a>(&'a mut Batch, DmaError);

/// Old pages of a block that a launch overwrites.
#[derive(Debug)]
pub struct Parked {
    /// The block.
    pub va: Va,
    /// Which pages.
    pub pages: Bits,
    /// Where they are.
    pub tray: Tray,
}

impl Collected<'_> {
    pub(super) fn copy(self, dev: &Device) -> Flying {
        Flying((!dev.is_lost()).then(|| dev.driver.copy(&self.0.dma[..self.0.dma_count])))
    }
}

impl Flying {
    pub(super) fn land<'a>(self, batch: &'a mut Batch, dev: &Device) -> Result<Copied<'a>, Failed<'a>> {
        let list = &batch.dma[..batch.dma_count];
        let done = match self.0.map_or(Err(DmaError::Lost), |fence| dev.wait(fence, list)) {
            Ok(done) => done,
            Err(e) => return Err(Failed(batch, e)),
        };
        for dma in list {
            let counter = if dma.kind == DmaKind::Zero { &dev.counters.bytes_zeroed } else { &dev.counters.bytes_to_device };
            count(counter, dma.len);
        }
        Ok(Copied { batch, done })
    }
}

impl Copied<'_> {
    /// Whether all program memory could be read.
    pub(super) fn reached(&self) -> bool {
        self.done.is_all()
    }

    pub(super) fn commit(self, core: &Core, dev: &Device, park: Park<'_>) -> Result<bool, Error> {
        let mut result = Ok(false);
        self.batch.end(dev, |item| match commit_block(core, dev, item, &self.done, park) {
            Ok(lost) => {
                if let Ok(any) = &mut result {
                    *any |= lost;
                }
            }
            Err(e) => result = Err(dev.failed(e)),
        });
        result
    }
}

impl Failed<'_> {
    /// Puts everything back to where it was: what the device's failure means for who asked.
    pub(super) fn undo(self, core: &Core, dev: &Device) -> Error {
        let Failed(batch, e) = self;
        batch.end(dev, |item| undo_block(core, dev, item));
        dev.copy_failed(e)
    }
}

/// Gives pages of one block back to the program that have been taken out into a tray, and are `Moving`: nobody else has a part in that block's migration.
pub(crate) fn give_back(core: &Core, dev: &Device, va: Va, pages: Bits, tray: Tray) {
    undo_block(core, dev, Item { moved: pages, tray: Some(tray), ..Item::new(va, dev.id(), Intent::Move) });
}

/// Gives the migration of one block up. It waits for events to be read, but for nobody else's migration.
fn undo_block(core: &Core, dev: &Device, mut item: Item) {
    let Some(block) = core.dir.get(item.va) else { return };
    loop {
        let hold = core.space.hold();
        let mut state = block.lock();
        let copied = item.copied & state.busy();
        if item.intent == Intent::Duplicate {
            let _ = ranges::unprotect(core, item.va, copied); // else the first write does it
        }
        state.shift(copied, PageState::Copying, Cause::Undo, PageState::System);
        let moved = item.moved & state.busy();
        if let Some(tray) = &mut item.tray {
            let (arrived, result) = home::deliver(core, tray, moved, item.va);
            state.shift(arrived, PageState::Moving, Cause::Undo, PageState::System);
            if result.is_err() {
                drop((state, hold));
                core.space.settle();
                thread::yield_now();
                continue;
            }
        }
        let holes = item.zeroed & state.busy();
        state.shift(holes, PageState::Moving, Cause::Undo, PageState::System);
        state.mover = 0;
        state.tray = 0;
        state.taken = Bits::EMPTY;
        ranges::give_frames(core, dev, &mut state, item.va, item.moved | item.zeroed | item.copied);
        if core::mem::take(&mut state.waiters) {
            let _ = core.space.uffd.wake(item.va, PAGES * PAGE);
        }
        drop((state, hold));
        if let Some(tray) = item.tray {
            core.pool.put(tray);
        }
        return;
    }
}

/// Ends the migration of one block: true if pages were lost on the way.
fn commit_block(core: &Core, dev: &Device, mut item: Item, done: &Done, park: Park<'_>) -> Result<bool, Errno> {
    let _hold = core.space.hold();
    let Some(block) = core.dir.get(item.va) else { return Ok(false) };
    let mut state = block.lock();
    let all = item.moved | item.zeroed | item.copied;
    let mut copied = item.copied & state.busy();
    let moved = (item.moved | item.zeroed) & state.busy();
    if !done.is_all() {
        // Some program memory could not be read: nothing that was copied in place is trusted.
        if item.intent == Intent::Duplicate {
            let _ = ranges::unprotect(core, item.va, copied);
        }
        state.shift(copied, PageState::Copying, Cause::Undo, PageState::System);
        copied = Bits::EMPTY;
    }
    state.commit(moved, PageState::Moving, PageState::Private, done);
    if item.intent.bounces() {
        state.rdonly |= item.rdonly & copied;
        core.twins.make(core, dev, &mut state, item.twins & copied);
    }
    let shared = if item.intent.bounces() { PageState::Bounced } else { PageState::Duplicated };
    state.commit(copied, PageState::Copying, shared, done);
    state.mover = 0;
    state.tray = 0;
    state.taken = Bits::EMPTY;
    let mapped = ranges::map(core, dev, &mut state, item.va, moved | copied);
    if item.intent == Intent::Discard {
        state.parked |= item.moved & moved;
    }
    if !state.parked.is_empty() || !state.bounced().is_empty() {
        block.keep.store(true, Ordering::Relaxed);
    }
    let lost = all - (moved | copied);
    ranges::give_frames(core, dev, &mut state, item.va, lost);
    if core::mem::take(&mut state.waiters) {
        let _ = core.space.uffd.wake(item.va, PAGES * PAGE);
    }
    count(&dev.counters.pages_to_device, moved.count());
    count(if item.intent.bounces() { &dev.counters.pages_bounced } else { &dev.counters.pages_duplicated }, copied.count());
    drop(state);
    if let Some(tray) = item.tray.take() {
        if item.intent == Intent::Discard && !(item.moved & moved).is_empty() {
            park(Parked { va: item.va, pages: item.moved & moved, tray });
        } else {
            core.pool.put(tray);
        }
    }
    match mapped {
        // A coherent device's pages could not enter the program for now: another look makes them.
        Err(Errno::AGAIN) if dev.driver.info().capabilities.coherent => Ok(true),
        mapped => mapped.map(|()| !lost.is_empty()),
    }
}
