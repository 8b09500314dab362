//! Where a device without a page table has what it is told to have ([`Capabilities::linear`](crate::driver::Capabilities)).
//!
//! Its kernels reach an argument through one address, so blocks that follow each other in a declared range must lie in units that follow each other. A
//! *place* is such a run: blocks of the process and units of the device, side by side. A launch has a place for each of its arguments before anything
//! moves ([`ensure`]); what lies in another one that the new one would overlap comes home first. A place without anything in it stays, so that the next launch finds its
//! argument where it was, until another one needs the units.
//!
//! # Rules
//! * Places are made and dropped with `prepare` held. The list is a leaf lock, but for that of the device's units, which may be taken under it.
//! * A unit of a place is used by the block beside it and by no other one; a place is dropped only when none of its units is used.

use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::devmem::Full;
use crate::directory::Frame;
use crate::error::Error;
use crate::flight::Flight;
use crate::home;
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Span, Va};
use crate::sync::*;
use uhmm_os::{BLOCK, Errno};

/// Blocks from `start` on, in units from `unit` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    start: Va,
    blocks: usize,
    unit: usize,
    /// The launch that asked for it last.
    pin: u64,
}
#[allow(unsafe_code)]
// SAFETY: entries beyond the count are never read.
unsafe impl Zeroed for Place {}

impl Place {
    fn span(&self) -> Span {
        Span { start: self.start, end: self.start + self.blocks * BLOCK }
    }
}

/// The places of one device, in no order.
#[derive(Debug)]
pub(crate) struct Places {
    list: Mutex<List>,
    /// Units of the device.
    capacity: usize,
}

#[derive(Debug)]
struct List {
    places: OwnSlice<Place>,
    count: usize,
}

impl List {
    fn all(&self) -> &[Place] {
        &self.places[..self.count]
    }

    fn remove(&mut self, index: usize) {
        self.count -= 1;
        self.places[index] = self.places[self.count];
    }

    /// The first of `blocks` units that are in no place, if there are so many in a row that are `free`.
    fn gap(&self, capacity: usize, blocks: usize, free: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut first = 0;
        let mut at = 0;
        while at < first + blocks {
            if at >= capacity {
                return None;
            }
            let taken = self.all().iter().find(|place| (place.unit..place.unit + place.blocks).contains(&at));
            match taken {
                Some(place) => (first, at) = (place.unit + place.blocks, place.unit + place.blocks),
                None if !free(at) => (first, at) = (at + 1, at + 1),
                None => at += 1,
            }
        }
        Some(first)
    }
}

impl Places {
    /// For a device of so many units.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new(capacity: usize) -> Result<Self, Errno> {
        Ok(Places { list: Mutex::new(List { places: OwnSlice::new(c"uhmm places", capacity)?, count: 0 }), capacity })
    }

    /// The unit beside the block at `va`, if it is in a place.
    pub(crate) fn unit(&self, va: Va) -> Option<usize> {
        let list = self.list.lock();
        let place = list.all().iter().find(|place| place.span().start <= va && va < place.span().end)?;
        Some(place.unit + (va - place.start) / BLOCK)
    }

    /// Calls `f`, which may lock the device's units, with the question whether a unit is part of a place.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&dyn Fn(usize) -> bool) -> R) -> R {
        let list = self.list.lock();
        f(&|unit| list.all().iter().any(|place| (place.unit..place.unit + place.blocks).contains(&unit)))
    }

    /// Whether one place has all of `span`, which is whole blocks. It is launch number `pin`'s then.
    fn covers(&self, span: Span, pin: u64) -> bool {
        let mut list = self.list.lock();
        let count = list.count;
        let found = list.places[..count].iter_mut().find(|place| place.span().and(span) == span);
        found.map(|place| place.pin = pin).is_some()
    }

    /// The first place that meets `span`.
    fn meeting(&self, span: Span) -> Option<Place> {
        self.list.lock().all().iter().find(|place| !place.span().and(span).is_empty()).copied()
    }

    /// Takes `span` out of a place: true if nothing of it was used, and it is gone. What lies before and behind it stays where it is.
    fn cut(&self, place: &Place, span: Span, used: &dyn Fn(usize) -> bool) -> bool {
        let mut list = self.list.lock();
        let Some(index) = list.all().iter().position(|other| other.unit == place.unit) else { return true };
        let gone = place.span().and(span);
        let unit = |va: Va| place.unit + (va - place.start) / BLOCK;
        if (unit(gone.start)..unit(gone.end)).any(used) {
            return false;
        }
        list.remove(index);
        for part in [Span { start: place.start, end: gone.start }, Span { start: gone.end, end: place.span().end }] {
            let count = list.count;
            // A place has a unit at least, so that there is an entry for each.
            if !part.is_empty() && count < list.places.len() {
                list.places[count] = Place { start: part.start, blocks: part.len() / BLOCK, unit: unit(part.start), pin: place.pin };
                list.count += 1;
            }
        }
        true
    }

    /// Makes a place for `span`, which meets no other one, where units are `free`.
    fn make(&self, span: Span, pin: u64, free: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut list = self.list.lock();
        let blocks = span.len() / BLOCK;
        let unit = list.gap(self.capacity, blocks, free)?;
        let count = list.count;
        *list.places.get_mut(count)? = Place { start: span.start, blocks, unit, pin };
        list.count += 1;
        Some(unit)
    }

    /// Places that were not asked for by launch number `pin`, the one that was asked for longest ago first, after the one with pin and unit `last`.
    fn next(&self, pin: u64, last: Option<(u64, usize)>) -> Option<Place> {
        let list = self.list.lock();
        let others = list.all().iter().filter(|place| place.pin != pin && last.is_none_or(|last| (place.pin, place.unit) > last));
        others.min_by_key(|place| (place.pin, place.unit)).copied()
    }
}

/// Sees to it that `span` is in one place of the device, for the launch that has set the device's pin, whose flight this is if it has one; `prepare` is held.
///
/// # Errors
/// [`Error::TooLarge`], and [`Error::NoRoom`] if what could make room is in use.
pub(crate) fn ensure(core: &Core, dev: &Device, flight: Option<&Flight>, span: Span) -> Result<(), Error> {
    let Some(places) = dev.mem.places() else { return Ok(()) };
    let info = dev.driver.info();
    let span = Span { start: span.start & !(BLOCK - 1), end: span.end.next_multiple_of(BLOCK) };
    if span.is_empty() || places.covers(span, dev.pin()) {
        return Ok(());
    }
    if span.len() > info.memory {
        return Err(Error::TooLarge { device: info.name, needed: span.len(), capacity: info.memory });
    }
    let no_room = || Error::NoRoom { device: info.name, needed: span.len(), capacity: info.memory };
    // What this launch has declared beside it must stay in one piece too. And one place for all that was declared before is better, for two arguments in turn would drive each
    // other away.
    let (mut must, mut whole) = (span, span);
    while let Some(place) = places.meeting(whole) {
        let both = Span { start: whole.start.min(place.start), end: whole.end.max(place.span().end) };
        let mut gone = place.span();
        if place.pin == dev.pin() {
            must = Span { start: must.start.min(place.start), end: must.end.max(place.span().end) };
            whole = both;
        } else if both.len() <= info.memory / 2 {
            whole = both;
        } else {
            gone = gone.and(whole); // neighbours that are large share no more than a block
        }
        leave(core, dev, flight, &place, gone).then_some(()).ok_or_else(no_room)?;
    }
    let free = |unit| !dev.mem.is_used(unit);
    let mut last = None;
    loop {
        if places.make(whole, dev.pin(), &free).is_some() {
            return Ok(());
        }
        if whole != must {
            whole = must;
            continue;
        }
        let place = places.next(dev.pin(), last).ok_or_else(no_room)?;
        last = Some((place.pin, place.unit));
        leave(core, dev, flight, &place, place.span());
    }
}

/// Takes something away from the device, so that there is more room for what the program allocates there.
///
/// # Errors
/// [`Error::NoRoom`] if all of it is in use.
pub(crate) fn make_room(core: &Core, dev: &Device) -> Result<(), Error> {
    let Some(places) = dev.mem.places() else { return home::evict_one(core, dev, true) };
    let _prepare = core.prepare.lock();
    let mut last = None;
    while let Some(place) = places.next(u64::MAX, last) {
        last = Some((place.pin, place.unit));
        if leave(core, dev, None, &place, place.span()) {
            return Ok(());
        }
    }
    let info = dev.driver.info();
    Err(Error::NoRoom { device: info.name, needed: BLOCK, capacity: info.memory })
}

/// Brings home what lies in a part of a place, and takes that out of it: false if something of it is in use.
fn leave(core: &Core, dev: &Device, flight: Option<&Flight>, place: &Place, part: Span) -> bool {
    let Some(places) = dev.mem.places() else { return true };
    // What a flight of its own holds, which has only begun, nobody uses yet.
    let kept = |va| flight.map_or_else(|| dev.flights.held(va), |flight| dev.flights.others(flight, va));
    for block in part.blocks() {
        if home::send_but(core, dev, block.start, Bits::ALL, &kept).is_err() {
            return false;
        }
    }
    places.cut(place, part, &|unit| dev.mem.is_used(unit))
}

/// A unit for the block at `va`: that of its place, or any for itself alone.
///
/// # Errors
/// [`Full`].
pub(crate) fn take(dev: &Device, places: &Places, va: Va) -> Result<Frame, Full> {
    let unit = match places.unit(va) {
        Some(unit) => unit,
        None => places.make(Span::block(va), 0, &|unit| !dev.mem.is_used(unit)).ok_or(Full)?,
    };
    dev.mem.take_at(&*dev.driver, unit, va)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(from: usize, to: usize) -> Span {
        Span { start: from * BLOCK, end: to * BLOCK }
    }

    #[test]
    fn blocks_that_follow_each_other_lie_side_by_side() {
        let places = Places::new(8).unwrap();
        let free = |_: usize| true;
        assert_eq!(places.make(span(100, 103), 1, &free), Some(0));
        assert_eq!(places.make(span(50, 52), 1, &|unit| unit != 4), Some(5), "unit 4 is somebody's");
        assert_eq!((places.unit(102 * BLOCK), places.unit(103 * BLOCK), places.unit(51 * BLOCK)), (Some(2), None, Some(6)));
        assert!(places.covers(span(101, 103), 2) && !places.covers(span(101, 104), 2));
        assert_eq!(places.make(span(0, 3), 2, &free), None, "no three in a row are left");
        let place = places.meeting(span(51, 60)).unwrap();
        assert!(!places.cut(&place, place.span(), &|unit| unit == 6) && places.cut(&place, place.span(), &|_| false));
        assert_eq!(places.make(span(0, 3), 2, &free), Some(3));
        assert_eq!(places.next(2, None), None, "both are of launch 2");
        assert_eq!(places.next(3, None).map(|place| place.unit), Some(0));
        assert_eq!(places.next(3, Some((2, 0))).map(|place| place.unit), Some(3));
        let place = places.meeting(span(1, 2)).unwrap();
        assert!(places.cut(&place, span(1, 2), &|unit| unit != 4), "only what is taken out must be free");
        assert_eq!([0, 1, 2].map(|block| places.unit(block * BLOCK)), [Some(3), None, Some(5)]);
    }
}
