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

use crate::args::MAX_ARGS;
use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::devmem::Full;
use crate::directory::Frame;
use crate::error::Error;
use crate::flight::{Flight, Purpose};
use crate::home;
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Span, Va};
use crate::sync::*;
use core::ops::Range;
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

    /// How many units behind its block's number each unit is: two places with the same shift may be one.
    fn shift(&self) -> isize {
        self.unit as isize - (self.start / BLOCK) as isize
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

    /// A place has a unit at least, so that there is an entry for each.
    fn add(&mut self, place: Place) -> bool {
        let entry = self.places.get_mut(self.count);
        self.count += usize::from(entry.is_some());
        entry.map(|entry| *entry = place).is_some()
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

    /// The first place that meets `span`, but for those with the shift that is `fixed`.
    fn meeting(&self, span: Span, fixed: Option<isize>) -> Option<Place> {
        let list = self.list.lock();
        list.all().iter().find(|place| !place.span().and(span).is_empty() && fixed != Some(place.shift())).copied()
    }

    /// The units of `span` with this shift, if the device has them.
    fn units(&self, span: Span, shift: isize) -> Option<Range<usize>> {
        let first = usize::try_from((span.start / BLOCK) as isize + shift).ok()?;
        let units = first..first + span.len() / BLOCK;
        (units.end <= self.capacity).then_some(units)
    }

    /// A place that has some of these units, with another shift.
    fn in_the_way(&self, units: &Range<usize>, shift: isize) -> Option<Place> {
        let list = self.list.lock();
        let meets = |place: &&Place| place.shift() != shift && place.unit < units.end && units.start < place.unit + place.blocks;
        list.all().iter().find(meets).copied()
    }

    /// One place for `span` and for all that it meets, all of which has this shift: false if a unit that was in no place is not `free`.
    fn grow(&self, span: Span, shift: isize, pin: u64, free: &dyn Fn(usize) -> bool) -> bool {
        let mut list = self.list.lock();
        let whole =
            list.all().iter().filter(|place| !place.span().and(span).is_empty()).fold(span, |whole, place| whole.with(place.span()));
        let Some(units) = self.units(whole, shift) else { return false };
        let placed = |unit| list.all().iter().any(|place| (place.unit..place.unit + place.blocks).contains(&unit));
        if !units.clone().all(|unit| placed(unit) || free(unit)) {
            return false;
        }
        while let Some(index) = list.all().iter().position(|place| !place.span().and(whole).is_empty()) {
            list.remove(index);
        }
        list.add(Place { start: whole.start, blocks: units.len(), unit: units.start, pin })
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
            if !part.is_empty() {
                list.add(Place { start: part.start, blocks: part.len() / BLOCK, unit: unit(part.start), pin: place.pin });
            }
        }
        true
    }

    /// Makes a place for `span`, which meets no other one, where units are `free`.
    fn make(&self, span: Span, pin: u64, free: &dyn Fn(usize) -> bool) -> Option<usize> {
        let mut list = self.list.lock();
        let blocks = span.len() / BLOCK;
        let unit = list.gap(self.capacity, blocks, free)?;
        list.add(Place { start: span.start, blocks, unit, pin }).then_some(unit)
    }

    /// The same for what is going to stay there, with room at both ends for what shares a block with it: more before it, for the kernel maps what comes later at lower addresses. False if
    /// there are not so many free units in a row.
    fn make_apart(&self, span: Span, pin: u64, free: &dyn Fn(usize) -> bool) -> bool {
        let mut list = self.list.lock();
        let blocks = span.len() / BLOCK;
        let placed = |unit| list.all().iter().any(|place| (place.unit..place.unit + place.blocks).contains(&unit));
        let (mut run, mut largest) = (0..0, 0..0);
        for unit in 0..self.capacity {
            run = if placed(unit) || !free(unit) { unit + 1..unit + 1 } else { run.start..unit + 1 };
            if run.len() > largest.len() {
                largest = run.clone();
            }
        }
        let Some(spare) = largest.len().checked_sub(blocks) else { return false };
        list.add(Place { start: span.start, blocks, unit: largest.start + spare * 7 / 8, pin })
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
    // other away. What another flight holds does not move: it is `fixed`, and the new place has to be the one that contains it.
    let (mut must, mut whole, mut fixed) = (span, span, None);
    while let Some(place) = places.meeting(whole, fixed) {
        let both = whole.with(place.span());
        let is_mine = place.pin == dev.pin();
        let mut gone = place.span();
        if is_mine || both.len() <= info.memory / 2 {
            whole = both;
        } else {
            gone = gone.and(whole); // neighbours that are large share no more than a block
        }
        let moved = leave(core, dev, flight, &place, gone);
        let shared = place.span().and(must);
        if is_mine || !(moved || shared.is_empty() || leave(core, dev, flight, &place, shared)) {
            must = must.with(place.span());
            whole = whole.with(must);
            if !moved {
                // Two that lie otherwise to each other than in the process cannot be in one place.
                fixed = fixed.is_none().then_some(place.shift());
                fixed.ok_or_else(no_room)?;
            }
        } else if !moved {
            whole = must; // it stays beside
        }
    }
    if let Some(shift) = fixed {
        let grown = grow(core, dev, flight, whole, shift)? || grow(core, dev, flight, must, shift)?;
        return grown.then_some(()).ok_or_else(no_room);
    }
    let free = |unit| !dev.mem.is_used(unit);
    let stays = flight.is_some_and(|flight| flight.purpose != Purpose::Launch);
    let mut last = None;
    loop {
        if (stays && places.make_apart(whole, dev.pin(), &free)) || places.make(whole, dev.pin(), &free).is_some() {
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

/// Makes one place for `span`, in which everything that is in a place already lies with this shift, and stays where it is. False if what it needs is in use.
///
/// # Errors
/// [`Error::NoRoom`] for another argument of the same launch, which was in the way.
fn grow(core: &Core, dev: &Device, flight: Option<&Flight>, span: Span, shift: isize) -> Result<bool, Error> {
    let Some(places) = dev.mem.places() else { return Ok(true) };
    let Some(units) = places.units(span, shift) else { return Ok(false) };
    let mut displaced = [Span { start: 0, end: 0 }; MAX_ARGS];
    let mut count = 0;
    let mut may = true;
    while may && let Some(place) = places.in_the_way(&units, shift) {
        may = leave(core, dev, flight, &place, place.span());
        if may && place.pin == dev.pin() {
            displaced[count] = place.span(); // each argument has one place
            count += 1;
        }
    }
    let grown = may && places.grow(span, shift, dev.pin(), &|unit| !dev.mem.is_used(unit));
    // They meet nothing that is fixed, or they would have stayed.
    displaced[..count].iter().try_for_each(|&span| ensure(core, dev, flight, span))?;
    Ok(grown)
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
        let place = places.meeting(span(51, 60), None).unwrap();
        assert!(!places.cut(&place, place.span(), &|unit| unit == 6) && places.cut(&place, place.span(), &|_| false));
        assert_eq!(places.make(span(0, 3), 2, &free), Some(3));
        assert_eq!(places.next(2, None), None, "both are of launch 2");
        assert_eq!(places.next(3, None).map(|place| place.unit), Some(0));
        assert_eq!(places.next(3, Some((2, 0))).map(|place| place.unit), Some(3));
        let place = places.meeting(span(1, 2), None).unwrap();
        assert!(places.cut(&place, span(1, 2), &|unit| unit != 4), "only what is taken out must be free");
        assert_eq!([0, 1, 2].map(|block| places.unit(block * BLOCK)), [Some(3), None, Some(5)]);
    }

    #[test]
    fn a_place_grows_around_what_stays() {
        let places = Places::new(8).unwrap();
        places.make(span(100, 102), 1, &|unit| unit >= 3).unwrap();
        let shift = places.meeting(span(101, 102), None).unwrap().shift();
        assert_eq!(places.meeting(span(101, 104), Some(shift)), None, "it is passed over");
        assert_eq!(places.units(span(101, 104), shift), Some(4..7));
        assert_eq!((places.units(span(96, 101), shift), places.units(span(101, 106), shift)), (None, None), "the device ends there");
        assert_eq!(places.in_the_way(&(4..7), shift), None, "what stays is in nobody's way");
        assert!(!places.grow(span(101, 104), shift, 2, &|unit| unit != 5), "unit 5 is the program's");
        places.make(span(7, 8), 2, &|unit| unit == 6).unwrap();
        let other = places.in_the_way(&(4..7), shift).unwrap();
        assert_eq!(other.unit, 6);
        assert!(places.cut(&other, other.span(), &|_| false));
        assert!(places.grow(span(101, 104), shift, 2, &|unit| unit > 4));
        assert_eq!([100, 101, 102, 103].map(|block| places.unit(block * BLOCK)), [Some(3), Some(4), Some(5), Some(6)]);
        assert!(places.covers(span(100, 104), 2), "all of it is one place");
    }

    #[test]
    fn what_stays_has_room_at_both_ends() {
        let places = Places::new(20).unwrap();
        places.make(span(7, 9), 1, &|_| true).unwrap();
        assert!(places.make_apart(span(100, 102), 1, &|unit| unit != 19));
        assert_eq!(places.unit(100 * BLOCK), Some(2 + 15 * 7 / 8));
        assert!(!places.make_apart(span(200, 214), 1, &|_| true), "the largest gap is smaller");
        assert!(places.make_apart(span(200, 213), 1, &|_| true), "or just as large");
        assert_eq!(places.unit(200 * BLOCK), Some(2));
    }
}
