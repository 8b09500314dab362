//! Where the pages of a range are now, for people, tools and tests. It only looks: nothing is faulted in, moved, or waited for.
//!
//! The answer is put together from the directory (what devices have), the CPU's page table (PAGEMAP_SCAN: what is there) and the mappings (what could be), block by
//! block, each with its lock and the event lock held, so that within a block the three agree. Between two blocks anything may move: it is a picture
//! taken by scanning, not at one moment.
//!
//! uhmm's keeper takes it, for the descriptors are uhmm's; it hands the runs over in pieces of a fixed size, by value, so that no lock is held while the
//! asker's memory, which may be away itself, is written.
//!
//! Who uses it: `uhmm::Uhmm::residency`, and tools that show where memory is.
//!
//! ```
//! use uhmm_core::residency::Place;
//! use uhmm_core::{CoreRef, Error};
//!
//! fn bytes_away(core: &CoreRef, data: &[u8]) -> Result<usize, Error> {
//!     let range = data.as_ptr_range();
//!     let runs = core.residency(range.start as usize, range.end as usize)?;
//!     Ok(runs.iter().filter(|run| matches!(run.place, Place::Private { .. })).map(|run| run.bytes()).sum())
//! }
//! ```

use crate::bits::Bits;
use crate::core::Core;
use crate::error::Error;
use crate::page::{Span, Va};
use crate::process::{self, CoreRef};
use core::ops::Range;
use uhmm_os::{Errno, PAGE, thread};

/// Where a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// In the program's memory (or in swap) and nowhere else. A running launch may have a snapshot of it.
    System,
    /// On this device only: the CPU's touch would bring it home.
    Private {
        /// The device's name.
        device: &'static str,
    },
    /// In the program's memory, write-protected, and with the same contents on this device.
    Duplicated {
        /// The device's name.
        device: &'static str,
    },
    /// In the memory of this coherent device, which the program uses in place.
    Coherent {
        /// The device's name.
        device: &'static str,
    },
    /// On its way to this device.
    Moving {
        /// The device's name.
        device: &'static str,
    },
    /// Mapped, and nowhere: nobody has touched it, or its contents were dropped. It reads as zeros, or as the file that is mapped there.
    Empty,
    /// Nothing is mapped there.
    Unmapped,
}

/// Neighbouring bytes whose pages are in one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The address of the first byte.
    pub start: usize,
    /// One past the last.
    pub end: usize,
    /// Where they are.
    pub place: Place,
}

impl Run {
    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.end - self.start
    }
}

/// Runs that are handed over at once.
const RUNS: usize = 128;
/// Blocks that are looked at in one piece at most: others have work for the keeper, too.
const BLOCKS: usize = 4096;
/// Above this nothing of the program's can be.
const TOP: Va = 1 << 47;

/// Runs of a range, from its start on as far as there is room.
struct Piece {
    runs: [Run; RUNS],
    count: usize,
}

impl Piece {
    /// Adds what follows the last run. False if there is no room.
    fn push(&mut self, run: Run) -> bool {
        if let Some(last) = self.count.checked_sub(1).map(|last| &mut self.runs[last])
            && last.place == run.place
        {
            last.end = run.end;
            return true;
        }
        if self.count == RUNS {
            return false;
        }
        self.runs[self.count] = run;
        self.count += 1;
        true
    }
}

impl CoreRef {
    /// Where the bytes from `start` to `end` are: runs in order, without gaps, neighbours in different places.
    ///
    /// # Errors
    /// [`Error::Reentrant`] from a kernel; [`Error::System`] if the kernel's page table cannot be read.
    pub fn residency(&self, start: usize, end: usize) -> Result<Vec<Run>, Error> {
        if self.core().has_worker(thread::gettid()) {
            return Err(Error::Reentrant); // a fork has the lock that is taken here, and waits for the kernel's launch
        }
        let mut all: Vec<Run> = vec![];
        let mut at = start;
        while at < end {
            let piece = {
                let held = process::lock()?;
                held.ask_keeper(move |core: &Core| look(core, at, end)).ok_or(Error::System("reach the keeper", Errno::SRCH))??
            };
            for run in &piece.runs[..piece.count] {
                at = run.end;
                match all.last_mut() {
                    Some(last) if last.place == run.place => last.end = run.end,
                    _ => all.push(*run),
                }
            }
        }
        Ok(all)
    }
}

/// On the keeper: the first runs.
fn look(core: &Core, start: Va, end: Va) -> Result<Piece, Error> {
    let mut piece = Piece { runs: [Run { start, end: start, place: Place::Unmapped }; RUNS], count: 0 };
    core.space.settle();
    let system = |e| Error::System("look up where pages are", e);
    let span = Span { start: start & !(PAGE - 1), end: end.min(TOP).next_multiple_of(PAGE) };
    let clip = |from: Va, to: Va, place| Run { start: from.max(start), end: to.min(end), place };
    let mut at = span.start;
    for _ in 0..BLOCKS {
        if at >= span.end {
            break;
        }
        let mapped = core.space.maps.find(at).map_err(system)?;
        let next = mapped.map_or(TOP, |vma| vma.start);
        if next >= Span::block(at).end || next >= span.end {
            // Of what is not mapped no device has anything; it may be large.
            let to = next.min(span.end);
            if !piece.push(clip(at, to, Place::Unmapped)) {
                return Ok(piece);
            }
            at = to;
            continue;
        }
        let part = Span::block(at).and(span).and(Span { start: at, end: span.end });
        let places = Places::of(core, part).map_err(system)?;
        for (run, place) in places.runs(part) {
            let block = Span::block(at).start;
            if !piece.push(clip(block + run.start * PAGE, block + run.end * PAGE, place)) {
                return Ok(piece);
            }
        }
        at = part.end;
    }
    if at >= span.end && end > TOP {
        let from = start.max(TOP);
        let _full = !piece.push(Run { start: from, end, place: Place::Unmapped }); // then it is asked for again
    }
    Ok(piece)
}

/// The places of pages of one block.
struct Places {
    moving: Bits,
    private: Bits,
    duplicated: Bits,
    coherent: Bits,
    /// The device that has them.
    device: &'static str,
    present: Bits,
    mapped: Bits,
}

impl Places {
    fn of(core: &Core, part: Span) -> Result<Self, Errno> {
        let mut places = Places {
            moving: Bits::EMPTY,
            private: Bits::EMPTY,
            duplicated: Bits::EMPTY,
            coherent: Bits::EMPTY,
            device: "",
            present: Bits::EMPTY,
            mapped: Bits::EMPTY,
        };
        let _hold = core.space.hold();
        let block = core.dir.get(part.start);
        let state = block.map(|block| block.lock());
        if let Some(state) = state.as_ref().filter(|state| state.device != 0) {
            places.device = core.device(state.device as usize - 1).driver.info().name;
            places.moving = state.busy();
            places.private = state.private();
            places.duplicated = state.duplicated() - state.busy();
            places.coherent = state.coherent();
        }
        places.present = core.space.present(part)?.pages;
        let mut at = part.start;
        while let Some(vma) = core.space.maps.find(at)?.filter(|vma| vma.start < part.end) {
            let here = Span { start: vma.start, end: vma.end }.and(part);
            places.mapped |= here.bits();
            at = vma.end;
            if at >= part.end {
                break;
            }
        }
        Ok(places)
    }

    fn place(&self, page: usize) -> Place {
        let device = self.device;
        if self.moving.has(page) {
            Place::Moving { device }
        } else if self.private.has(page) {
            Place::Private { device }
        } else if self.duplicated.has(page) {
            Place::Duplicated { device }
        } else if self.coherent.has(page) {
            Place::Coherent { device }
        } else if self.present.has(page) {
            Place::System
        } else if self.mapped.has(page) {
            Place::Empty
        } else {
            Place::Unmapped
        }
    }

    /// Runs of one place each, in order, over the pages of `part`.
    fn runs(&self, part: Span) -> impl Iterator<Item = (Range<usize>, Place)> + '_ {
        let first = part.start % uhmm_os::BLOCK / PAGE;
        let (mut at, end) = (first, first + part.len() / PAGE);
        core::iter::from_fn(move || {
            let start = at;
            let place = (start < end).then(|| self.place(start))?;
            while at < end && self.place(at) == place {
                at += 1;
            }
            Some((start..at, place))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_follow_each_other_and_say_the_place_that_counts() {
        let places = Places {
            moving: Bits::range(3..4),
            private: Bits::range(4..6),
            duplicated: Bits::range(6..7),
            coherent: Bits::EMPTY,
            device: "d",
            present: Bits::range(6..9),
            mapped: Bits::range(0..20),
        };
        let part = Span { start: 7 * uhmm_os::BLOCK + 2 * PAGE, end: 7 * uhmm_os::BLOCK + 22 * PAGE };
        let runs: Vec<_> = places.runs(part).collect();
        let device = "d";
        assert_eq!(
            runs,
            [
                (2..3, Place::Empty),
                (3..4, Place::Moving { device }),
                (4..6, Place::Private { device }),
                (6..7, Place::Duplicated { device }),
                (7..9, Place::System),
                (9..20, Place::Empty),
                (20..22, Place::Unmapped),
            ]
        );
    }

    #[test]
    fn a_piece_joins_neighbours_and_says_when_it_is_full() {
        let mut piece = Piece { runs: [Run { start: 0, end: 0, place: Place::Unmapped }; RUNS], count: 0 };
        let run = |start, place| Run { start, end: start + 1, place };
        assert!(piece.push(run(0, Place::Empty)) && piece.push(run(1, Place::Empty)));
        assert_eq!((piece.count, piece.runs[0].end), (1, 2));
        for at in 2..RUNS + 1 {
            assert!(piece.push(run(at, if at % 2 == 0 { Place::System } else { Place::Empty })));
        }
        assert!(!piece.push(run(RUNS + 1, Place::Unmapped)));
    }
}
