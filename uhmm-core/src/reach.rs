//! What a launch reaches besides its arguments: the ranges that pointers lead to which are stored in memory, as many as there are nodes.
//!
//! A device with replayable faults follows such pointers by itself. For any other the ranges are gathered (`gather`): copied by bytes into a piece of the device's own memory when
//! the launch starts, so that a page which holds other bytes too neither moves nor is blocked; and a table says where each of them is. Their order in that piece is the one here: those that
//! are only read, then those that are written, each at its address modulo 16, and larger ones modulo 32, 64 or 128: no vector loses its alignment.
//!
//! Who uses it: programs make such ranges by [`Args::reaching`](crate::args::Args::reaching); a driver whose kernels look pointers up by themselves finds them as [`Reached`] in
//! [`Bound`](crate::kernel::Bound). What reads the list is the launch that it came with, and what asks whether two flights meet.
//!
//! ```
//! use uhmm_core::args;
//! use uhmm_core::args::{inp, out};
//!
//! let nodes: Vec<Box<u64>> = (0..1000).map(Box::new).collect();
//! let (mut sum, head) = ([0u64], &raw const *nodes[0] as u64);
//! let args = args![out(&mut sum), head].reaching(nodes.iter().map(|node| inp(core::slice::from_ref(&**node))));
//! assert_eq!(args.reaches().len(), 1000);
//! ```
#![allow(unsafe_code)] // a list that somebody else keeps

use crate::args::{Access, MAX_ARGS, RawArg};
use crate::core::{Core, Device};
use crate::error::Error;
use crate::own::{OwnSlice, Zeroed};
use crate::page::Va;
use crate::sync::Mutex;
use uhmm_os::{Errno, PAGE};

/// A range lies in the device's memory at its address modulo this many bytes at least. Allocators give as much.
pub const ALIGN: usize = 16;
/// The largest alignment that OpenCL C knows.
const MOST_ALIGN: usize = 128;

/// A range that a launch reaches, as its arguments carry it: there may be millions, so it is small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    start: usize,
    /// Bytes, twice, and whether the kernel writes there.
    rest: usize,
}

/// A range that a launch reaches, and where the device has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// First byte, an address of the process.
    pub start: usize,
    /// One past the last.
    pub end: usize,
    /// The device's address of the first byte.
    pub at: usize,
}

impl Reach {
    /// What a range argument covers.
    ///
    /// # Panics
    /// If it is none of the process's memory.
    #[inline]
    pub(crate) fn of(arg: &RawArg) -> Self {
        let &RawArg::Slice { start, count, size, access, device: None, .. } = arg else {
            panic!("a launch reaches ranges of the process's memory: give inp, out or inout, not {arg:?}")
        };
        Reach::new(start, count.saturating_mul(size), access.writes())
    }

    #[inline]
    fn new(start: usize, bytes: usize, write: bool) -> Self {
        Reach { start, rest: bytes.min(usize::MAX >> 1) << 1 | usize::from(write) }
    }

    /// First byte.
    #[inline]
    pub fn start(&self) -> usize {
        self.start
    }

    /// One past the last; `usize::MAX` if that is beyond all addresses.
    pub fn end(&self) -> usize {
        self.start.saturating_add(self.rest >> 1)
    }

    /// Whether the kernel writes there.
    pub fn writes(&self) -> bool {
        self.rest & 1 != 0
    }
}

/// A merged range: its bytes, and where in the gathered piece it begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    pub(crate) start: Va,
    pub(crate) end: Va,
    pub(crate) offset: usize,
    pub(crate) write: bool,
}
// SAFETY: an empty range.
unsafe impl Zeroed for Spot {}

/// All that one launch reaches, in memory that never migrates: in order, merged, and not shared with its arguments.
#[derive(Debug, Default)]
pub(crate) struct Reaches {
    spots: Option<OwnSlice<Spot>>,
    count: usize,
    /// Bytes of those that are only read, and of all.
    pub(crate) read: usize,
    pub(crate) bytes: usize,
}

const PARTLY: &str = "of which an argument has a part, or has it for another access: declare all of it by the argument, or none";
const SHARED: &str = "which it reaches twice, once for writing";

impl Reaches {
    /// Whether it reaches nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Merges ranges, which are in order, of a launch with these arguments.
    ///
    /// # Errors
    /// [`Error::Reached`] for what cannot be; [`Error::System`] if there is no memory for the list.
    pub(crate) fn new(ranges: &[Reach], args: &[RawArg], spare: &Spare) -> Result<Self, Error> {
        if ranges.is_empty() {
            return Ok(Reaches::default());
        }
        let mut spots = spare.take(ranges.len())?;
        let mut declared = [(0, 0, false); MAX_ARGS];
        for (slot, arg) in declared.iter_mut().zip(args) {
            // What is too long is refused where arguments are checked.
            *slot = arg.checked_range().map_or((0, 0, false), |(start, end, access)| (start, end, access.writes()));
        }
        let mut count = 0usize;
        let declared = &declared[..args.len()];
        for range in ranges {
            let (start, end, write) = (range.start, range.end(), range.writes());
            if start == end {
                continue;
            }
            if start == 0 || end > 1 << 47 {
                return Err(Error::Reached { address: start, why: "which is no address of a process" });
            }
            if has_already((start, end, write), declared)? {
                continue;
            }
            match count.checked_sub(1).map(|last| &mut spots[last]) {
                Some(last) if start <= last.end && write == last.write => last.end = last.end.max(end),
                Some(last) if start < last.end => return Err(Error::Reached { address: start, why: SHARED }),
                _ => {
                    spots[count] = Spot { start, end, offset: 0, write };
                    count += 1;
                }
            }
        }
        let mut reaches = Reaches { spots: Some(spots), count, read: 0, bytes: 0 };
        reaches.lay_out();
        Ok(reaches)
    }

    fn lay_out(&mut self) {
        let Some(spots) = &mut self.spots else { return };
        let mut end = 0;
        for write in [false, true] {
            for spot in spots[..self.count].iter_mut().filter(|spot| spot.write == write) {
                // What is aligned to more bytes than a range has does not lie in it.
                let bytes = spot.end - spot.start;
                let align = (1 << bytes.ilog2()).clamp(ALIGN, MOST_ALIGN);
                spot.offset = end + (spot.start.wrapping_sub(end) & (align - 1));
                end = spot.offset + bytes;
            }
            if !write {
                self.read = end;
                end = end.next_multiple_of(PAGE);
            }
        }
        self.bytes = if end > self.read.next_multiple_of(PAGE) { end } else { self.read };
    }

    pub(crate) fn spots(&self) -> &[Spot] {
        self.spots.as_ref().map_or(&[], |spots| &spots[..self.count])
    }

    /// The list for who only looks, of a launch on `dev`.
    ///
    /// # Safety
    /// It must not be used any more when this value has gone.
    pub(crate) unsafe fn share(&self, dev: &Device) -> Shared {
        Shared { start: self.spots().as_ptr(), count: self.count, gathers: gathers(dev) }
    }

    /// Whether all of it is mapped as it is used.
    ///
    /// # Errors
    /// [`Error::Reached`] with the first address that is not.
    pub(crate) fn check(&self, core: &Core) -> Result<(), Error> {
        // Many ranges lie in one mapping: what is known to be as it should, for reading, and whether for writing as well.
        let (mut from, mut to, mut writable) = (0, 0, false);
        for spot in self.spots() {
            if from <= spot.start && spot.end <= to && (writable || !spot.write) {
                continue;
            }
            let mut at = spot.start;
            while at < spot.end {
                let Some(found) = core.space.mapping(at).map_err(no_maps)? else {
                    return Err(Error::Reached { address: at, why: "which is not mapped" });
                };
                if !found.read {
                    return Err(Error::Reached { address: at, why: "which is not readable" });
                }
                if spot.write && !found.write {
                    return Err(Error::Reached { address: at, why: "which is read-only, for writing" });
                }
                at = found.end;
                (from, to, writable) = (found.start, found.end, found.write);
            }
        }
        Ok(())
    }
}

fn no_maps(e: Errno) -> Error {
    Error::System("look up mappings", e)
}

/// Whether an argument has all of the range already.
///
/// # Errors
/// [`Error::Reached`] if one has it in another way.
fn has_already((from, to, writes): (Va, Va, bool), declared: &[(Va, Va, bool)]) -> Result<bool, Error> {
    for &(start, end, write) in declared {
        if from.max(start) < to.min(end) {
            let whole = start <= from && to <= end && (write || !writes);
            return if whole { Ok(true) } else { Err(Error::Reached { address: from.max(start), why: PARTLY }) };
        }
    }
    Ok(false)
}

/// A list that the next launch can have: for so many ranges, new memory would cost as much as all that is done with it.
#[derive(Debug, Default)]
pub(crate) struct Spare(Mutex<Option<OwnSlice<Spot>>>);

/// Ranges of the largest list that is kept.
const KEPT: usize = 1 << 20;

impl Spare {
    /// Room for so many ranges.
    fn take(&self, ranges: usize) -> Result<OwnSlice<Spot>, Error> {
        let spare = self.0.lock().take_if(|spare| spare.len() >= ranges);
        spare
            .map_or_else(|| OwnSlice::new(c"uhmm reaches", ranges.next_power_of_two()), Ok)
            .map_err(|e| Error::System("reserve address space", e))
    }

    /// A list that is not used any more.
    pub(crate) fn give(&self, reaches: Reaches) {
        if let Some(list) = reaches.spots.filter(|list| list.len() <= KEPT) {
            let old = self.0.lock().replace(list);
            drop(old); // when the lock is free
        }
    }
}

/// Whether a device's launches get copies of what they reach: its kernels could not fetch it.
pub(crate) fn gathers(dev: &Device) -> bool {
    let info = dev.driver.info();
    info.memory > 0 && !info.capabilities.replayable_faults
}

/// A list that a launch keeps for as long as its flight lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared {
    start: *const Spot,
    count: usize,
    gathers: bool,
}
// SAFETY: whoever made it keeps the list, which nobody changes, for as long as it is used (`Reaches::share`).
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) const NONE: Self = Shared { start: core::ptr::null(), count: 0, gathers: false };

    pub(crate) fn spots(&self) -> &[Spot] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: whoever made it keeps the list.
        unsafe { core::slice::from_raw_parts(self.start, self.count) }
    }

    /// The range that holds `va`.
    pub(crate) fn find(&self, va: Va) -> Option<&Spot> {
        let spots = self.spots();
        let next = spots.partition_point(|spot| spot.start <= va);
        spots[..next].last().filter(|spot| va < spot.end)
    }

    /// Where the list meets what another flight declares so that both cannot be under way: with a write; and what is gathered must be in nobody's hands, for whoever gathers would wait for it.
    pub(crate) fn meets(&self, (start, end, access): (Va, Va, Access)) -> Option<Va> {
        let spots = self.spots();
        let first = spots.partition_point(|spot| spot.end <= start);
        let shared = spots[first..].iter().take_while(|spot| spot.start < end);
        let mut clash = shared.filter(|spot| access.writes() || spot.write || self.gathers);
        clash.next().map(|spot| spot.start.max(start))
    }

    /// Likewise, of two lists.
    pub(crate) fn meets_list(&self, other: &Shared) -> Option<Va> {
        let (a, b) = (self.spots(), other.spots());
        let (mut i, mut j) = (0, 0);
        while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
            if (x.write || y.write) && x.start.max(y.start) < x.end.min(y.end) {
                return Some(x.start.max(y.start));
            }
            if x.end <= y.end { i += 1 } else { j += 1 }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{inout, inp};

    fn reads(start: usize, end: usize) -> Reach {
        Reach::new(start, end - start, false)
    }

    fn writes(start: usize, end: usize) -> Reach {
        Reach::new(start, end - start, true)
    }

    fn merged(ranges: &[Reach], args: &[RawArg]) -> Result<Vec<(usize, usize, bool)>, Error> {
        Reaches::new(ranges, args, &Spare::default())
            .map(|list| list.spots().iter().map(|spot| (spot.start, spot.end, spot.write)).collect())
    }

    #[test]
    fn overlapping_and_adjacent_ranges_of_one_kind_are_one() {
        let list = [reads(1000, 1016), reads(1008, 1010), reads(1016, 1024), writes(1024, 1032), reads(1040, 1048), reads(1050, 1050)];
        assert_eq!(merged(&list, &[]).unwrap(), [(1000, 1024, false), (1024, 1032, true), (1040, 1048, false)]);
        let error = merged(&[reads(1000, 1016), writes(1015, 1020)], &[]).unwrap_err();
        assert!(matches!(error, Error::Reached { address: 1015, .. }), "{error}");
        for wrong in [reads(0, 8), Reach::new(4096, usize::MAX, false), writes((1 << 47) - 1, (1 << 47) + 1)] {
            assert!(matches!(merged(&[wrong], &[]), Err(Error::Reached { .. })), "{wrong:?}");
        }
    }

    #[test]
    fn what_an_argument_has_is_not_reached_besides() {
        let mut array = [0u8; 64];
        let at = array.as_ptr() as usize;
        let nodes = [writes(at, at + 16), writes(at + 16, at + 32)];
        assert_eq!(merged(&nodes, &[inout(&mut array).raw()]).unwrap(), []);
        assert!(merged(&nodes, &[inp(&array).raw()]).is_err(), "it is only read there");
        assert!(merged(&nodes, &[inout(&mut array[8..]).raw()]).is_err(), "a part of it");
        // Neighbours of an argument are merged with each other, not with what it has.
        let nodes = [reads(at, at + 16), reads(at + 16, at + 32), reads(at + 32, at + 48)];
        assert_eq!(merged(&nodes, &[inp(&array[..16]).raw()]).unwrap(), [(at + 16, at + 48, false)]);
    }

    #[test]
    fn they_lie_apart_at_their_own_alignment() {
        let list: Vec<Reach> = (0..500).map(|i| Reach::new(5000 + i * 177 + i % 7, 1 + i % 150, i % 3 == 0)).collect();
        let laid = Reaches::new(&list, &[], &Spare::default()).unwrap();
        let mut places: Vec<_> = laid.spots().iter().map(|spot| (spot.offset, spot.offset + spot.end - spot.start, spot.write)).collect();
        for spot in laid.spots() {
            let align = [128, 64, 32, 16].into_iter().find(|&align| spot.end - spot.start >= align).unwrap_or(16);
            assert_eq!(spot.offset % align, spot.start % align, "{spot:?}");
        }
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "they do not overlap");
        assert!(places.windows(2).all(|pair| pair[0].2 <= pair[1].2), "those that are written come last");
        assert_eq!(laid.bytes, places[499].1);
        assert_eq!(laid.read, places.iter().filter(|place| !place.2).map(|place| place.1).max().unwrap());
    }

    #[test]
    fn flights_meet_where_one_writes_or_gathers() {
        let list = |ranges: &[Reach]| Reaches::new(ranges, &[], &Spare::default()).unwrap();
        let (a, b) = (list(&[reads(1000, 1010), writes(1100, 1110), reads(1200, 1210)]), list(&[reads(1005, 1008), reads(1109, 1120)]));
        let of = |list: &Reaches, gathers| Shared { start: list.spots().as_ptr(), count: list.count, gathers };
        let shared = of(&a, false);
        assert_eq!(shared.meets((900, 1100, Access::In)), None, "both read");
        assert_eq!(shared.meets((900, 1100, Access::Out)), Some(1000));
        assert_eq!(shared.meets((1009, 1101, Access::In)), Some(1100));
        assert_eq!(shared.meets((1010, 1100, Access::Out)), None, "between them");
        assert_eq!(of(&a, true).meets((900, 1100, Access::In)), Some(1000), "who gathers would wait");
        assert_eq!((shared.meets_list(&of(&b, false)), of(&b, false).meets_list(&shared)), (Some(1109), Some(1109)));
        assert_eq!(of(&b, true).meets_list(&of(&b, true)), None);
        assert_eq!((shared.find(1109).map(|spot| spot.start), shared.find(1110).map(|spot| spot.start)), (Some(1100), None));
        assert!(shared.find(999).is_none());
    }
}
