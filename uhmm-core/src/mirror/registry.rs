//! Which mirrors there are, and how they are told of changes.
//!
//! # Rules
//! * The lock is a leaf: it is taken after the event lock and a block's. Only uhmm's own threads take it, whose stacks stay.
//! * A mirror's number is raised first, then its notifier is called; only when that has returned the page may change.
//! * Slots take up memory as far as they were ever used: who has few mirrors pays for few, and they are looked through up to the last that is in use.
//! * `epoch` is odd from before the monitor reads events until they are followed. Who raised an event goes on when it is read, before anybody can be told of it: so
//!   what was read from memory counts only if no event was read meanwhile, or once it was followed and left the entry alone.

use super::{Notifier, Reason};
use crate::own::{OwnSlice, Zeroed};
use crate::page::Span;
use crate::sync::*;
use core::mem::MaybeUninit;
use uhmm_os::{Errno, thread};

/// The most mirrors of a process: as many as it can have descriptors, by the kernel's default.
pub(crate) const MOST: usize = 1 << 20;
/// The most changes that are made through [`super::change`] at a time.
const CHANGES: usize = 64;

/// The part of a mirror that does not depend on its notifier's type.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) span: Span,
    /// Raised by every invalidation.
    pub(crate) seq: AtomicU64,
}

#[derive(Clone, Copy)]
struct Slot {
    watch: *const Watch,
    notifier: *const dyn Notifier,
}

/// A place for a mirror; from `used` on nothing was written there.
type Place = MaybeUninit<Option<Slot>>;

// SAFETY: any bytes are a value that need not be initialised.
unsafe impl Zeroed for Place {}

struct Table {
    /// Made for the first mirror.
    slots: Option<OwnSlice<Place>>,
    /// Those that are written: the last of them has a mirror.
    used: usize,
    /// Changes under way.
    changes: [Span; CHANGES],
}

// SAFETY: what a slot points to is Sync, and stays until the slot is cleared, which waits for who uses it.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

/// The mirrors of a process.
pub(crate) struct Mirrors {
    count: AtomicUsize,
    epoch: AtomicU64,
    table: RwLock<Table>,
}

impl core::fmt::Debug for Mirrors {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Mirrors").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Default for Mirrors {
    fn default() -> Self {
        let table = Table { slots: None, used: 0, changes: [Span { start: 0, end: 0 }; CHANGES] };
        Mirrors { count: AtomicUsize::new(0), epoch: AtomicU64::new(0), table: RwLock::new(table) }
    }
}

impl Table {
    fn slots(&self) -> impl Iterator<Item = &Option<Slot>> {
        let places = self.slots.iter().flat_map(|slots| slots.iter()).take(self.used);
        // SAFETY: the first `used` are written.
        places.map(|place| unsafe { place.assume_init_ref() })
    }

    fn slots_mut(&mut self) -> impl Iterator<Item = &mut Option<Slot>> {
        let places = self.slots.iter_mut().flat_map(|slots| slots.iter_mut()).take(self.used);
        // SAFETY: the first `used` are written.
        places.map(|place| unsafe { place.assume_init_mut() })
    }

    fn add(&mut self, slot: Slot) -> Result<(), Errno> {
        if let Some(free) = self.slots_mut().find(|slot| slot.is_none()) {
            *free = Some(slot);
            return Ok(());
        }
        if self.slots.is_none() {
            self.slots = Some(OwnSlice::new(c"uhmm mirrors", MOST)?);
        }
        let next = self.slots.as_mut().and_then(|slots| slots.get_mut(self.used)).ok_or(Errno::MFILE)?;
        next.write(Some(slot));
        self.used += 1;
        Ok(())
    }

    /// What is not needed at the end is not looked through any more.
    fn trim(&mut self) {
        self.used = self.slots().enumerate().filter(|(_, slot)| slot.is_some()).last().map_or(0, |(index, _)| index + 1);
    }
}

impl Mirrors {
    /// Whether there is one.
    pub(crate) fn any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }

    /// Whether one watches something of `span`.
    pub(crate) fn meet(&self, span: Span) -> bool {
        self.any() && self.each(&self.table.read(), span).next().is_some()
    }

    fn each<'a>(&self, table: &'a Table, span: Span) -> impl Iterator<Item = (&'a Watch, &'a dyn Notifier, Span)> {
        table.slots().flatten().filter_map(move |slot| {
            // SAFETY: both stay until the slot is cleared, for which the table's lock is taken alone; whoever calls this shares it.
            let (watch, notifier) = unsafe { (&*slot.watch, &*slot.notifier) };
            let part = watch.span.and(span);
            (!part.is_empty()).then_some((watch, notifier, part))
        })
    }

    /// Tells everybody who watches something of `span`. When it returns, all have acknowledged.
    pub(crate) fn invalidate(&self, span: Span, reason: Reason) {
        if self.any() {
            let table = self.table.read();
            // Told when that began, and nobody has looked there since.
            let told = table.changes.iter().any(|change| !span.is_empty() && change.and(span) == span);
            for (watch, notifier, part) in self.each(&table, span) {
                watch.seq.fetch_add(1, Ordering::SeqCst);
                if !told {
                    notifier.invalidate(part, reason.of_part(span, part));
                }
            }
        }
    }

    /// Adds a mirror.
    ///
    /// # Errors
    /// `EMFILE` if there are too many; `ENOMEM` if there is no room for any.
    ///
    /// # Safety
    /// Both stay where they are, in memory that never migrates, until [`remove`](Self::remove) has returned.
    pub(crate) unsafe fn add(&self, watch: *const Watch, notifier: *const dyn Notifier) -> Result<(), Errno> {
        self.table.write().add(Slot { watch, notifier })?;
        self.count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Tells a mirror that it ends, and forgets it.
    pub(crate) fn remove(&self, watch: *const Watch) {
        let mut table = self.table.write();
        for slot in table.slots_mut().filter(|slot| slot.is_some_and(|slot| core::ptr::eq(slot.watch, watch))) {
            if let Some(Slot { watch, notifier }) = slot.take() {
                self.count.fetch_sub(1, Ordering::SeqCst);
                // SAFETY: as `add` was promised.
                unsafe {
                    (*watch).seq.fetch_add(1, Ordering::SeqCst);
                    (*notifier).invalidate((*watch).span, Reason::Release);
                }
            }
        }
        table.trim();
    }

    /// A change of `span` begins: nobody looks there until [`end`](Self::end). Waits for room.
    pub(crate) fn begin(&self, span: Span, reason: Reason) {
        let mut times = 0;
        while !self.note(Span::default(), span) {
            thread::pause(times);
            times += 1;
        }
        for (watch, notifier, part) in self.each(&self.table.read(), span) {
            watch.seq.fetch_add(1, Ordering::SeqCst);
            notifier.invalidate(part, reason.of_part(span, part));
        }
    }

    /// The change has been made.
    pub(crate) fn end(&self, span: Span) {
        // Who has begun to read since then may have seen what was before it.
        for (watch, ..) in self.each(&self.table.read(), span) {
            watch.seq.fetch_add(1, Ordering::SeqCst);
        }
        self.note(span, Span::default());
    }

    fn note(&self, from: Span, to: Span) -> bool {
        let mut table = self.table.write();
        match table.changes.iter_mut().find(|change| **change == from) {
            Some(change) => *change = to,
            None => return false,
        }
        true
    }

    /// Whether a change of `span` is under way.
    pub(crate) fn changing(&self, span: Span) -> bool {
        self.table.read().changes.iter().any(|change| !change.and(span).is_empty())
    }

    /// The monitor begins to read events, or has followed them.
    pub(crate) fn turn(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// The number while nothing is read and not followed, for which it waits.
    pub(crate) fn epoch(&self) -> u64 {
        let mut times = 0;
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch.is_multiple_of(2) {
                return epoch;
            }
            thread::pause(times);
            times += 1;
        }
    }
}
