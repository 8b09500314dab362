//! Where a page is, and how it may go from one place to another: the states and their transitions, as one table.
//!
//! Every change of the directory names the state it leaves, its cause and the state it enters; `allowed` is asked in debug builds.
//! The table is the whole of it: what does not stand there cannot happen.
//!
//! Who uses it: drivers, policies and notifiers are handed a [`Span`]. The states are this crate's own.
//!
//! ```
//! use uhmm_core::page::Span;
//!
//! assert_eq!(Span::touching(4097, 8193), Span { start: 4096, end: 12288 });
//! assert_eq!(Span::inside(4097, 12289), Span { start: 8192, end: 12288 }); // whole pages only
//! let mut blocks = Span { start: (2 << 20) - 4096, end: (2 << 20) + 4096 }.blocks();
//! assert_eq!(blocks.next().map(Span::len), Some(4096));
//! assert_eq!(blocks.next().map(|part| part.bits().has(0)), Some(true));
//! ```

use uhmm_os::{BLOCK, PAGE};

/// The address of a page or a byte in the process.
pub type Va = usize;

/// A half-open range of process addresses, aligned to pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span {
    /// First byte.
    pub start: Va,
    /// One past the last byte.
    pub end: Va,
}

impl Span {
    /// The pages that a byte range touches.
    pub fn touching(start: Va, end: Va) -> Span {
        Span { start: start & !(PAGE - 1), end: end.next_multiple_of(PAGE) }
    }

    /// The pages that lie wholly inside a byte range; empty if there is none.
    pub fn inside(start: Va, end: Va) -> Span {
        let start = start.next_multiple_of(PAGE);
        Span { start, end: (end & !(PAGE - 1)).max(start) }
    }

    /// The block of 2 MiB that holds `va`.
    pub fn block(va: Va) -> Span {
        let start = va & !(BLOCK - 1);
        Span { start, end: start + BLOCK }
    }

    /// Bytes.
    pub fn len(self) -> usize {
        self.end - self.start
    }

    /// Whether it holds nothing.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// What both hold.
    pub fn and(self, other: Span) -> Span {
        let start = self.start.max(other.start);
        Span { start, end: self.end.min(other.end).max(start) }
    }

    /// The smallest span that has all of both, which are not empty.
    pub fn with(self, other: Span) -> Span {
        Span { start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// The blocks that it touches, each with the part of the span that lies in it.
    pub fn blocks(self) -> impl Iterator<Item = Span> {
        let mut at = self.start;
        core::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let part = Span { start: at, end: (at / BLOCK * BLOCK + BLOCK).min(self.end) };
            at = part.end;
            Some(part)
        })
    }

    /// The pages of a span that lies in one block.
    pub fn bits(self) -> crate::bits::Bits {
        let from = self.start % BLOCK / PAGE;
        crate::bits::Bits::range(from..from + self.len() / PAGE)
    }
}

/// Where a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PageState {
    /// On the CPU's side only.
    System,
    /// On both sides and equal; the CPU's page is write-protected, the device's is read-only.
    Duplicated,
    /// On the device only; the CPU's page is empty and watched.
    Private,
    /// In the memory of a coherent device, and mapped in the program, which uses it in place.
    Coherent,
    /// On the CPU's side, with a snapshot on the device for one launch (pages that hold other data too, or cannot move).
    Bounced,
    /// Taken from the CPU and on its way to the device; empty and watched.
    Moving,
    /// Being duplicated or snapshot: the CPU still has it.
    Copying,
    /// Nowhere: a device had the only copy, and was lost or failed to give it back. The CPU's page is poisoned: a touch raises SIGBUS.
    Lost,
}

/// Why a page changes its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cause {
    /// A migration begins.
    Collect,
    /// A migration ends.
    Commit,
    /// A migration is given up: the page goes back.
    Undo,
    /// The CPU touches a page that is on the device, or the device needs the room.
    Return,
    /// The CPU writes a page that both have.
    CpuWrite,
    /// The CPU reads what a device has, which keeps its copy; or a device has read what it may share with the CPU.
    Share,
    /// The device writes, or is about to write, a page that both have.
    DeviceWrite,
    /// A launch needs a snapshot of a page that stays.
    Bounce,
    /// The launch has ended.
    LaunchEnd,
    /// The program unmapped, remapped or dropped the page.
    Unmap,
    /// The program has moved the mapping, and the page is here now: [`crate::port::carry`].
    Remap,
    /// A coherent device's page takes its place in the program.
    Enter,
    /// A coherent device takes its page back out of the program, so that it can come home.
    Leave,
    /// A coherent device gives its page up, which stays where it is: the kernel will not move it, or a child has it too.
    Release,
    /// A device is lost, or does not give the page back.
    Loss,
}

use Cause::*;
use PageState::*;

/// All transitions there are: from, why, to.
pub(crate) const TRANSITIONS: &[(PageState, Cause, PageState)] = &[
    (System, Collect, Moving),
    (System, Collect, Copying),
    (Moving, Commit, Private),
    (Moving, Undo, System),
    (Moving, Unmap, System),
    (Copying, Commit, Duplicated),
    (Copying, Commit, Bounced),
    (Copying, Undo, System),
    (Copying, CpuWrite, System),
    (Copying, Unmap, System),
    (Private, Return, System),
    (Private, Share, Duplicated),
    (Private, Unmap, System),
    (Duplicated, Return, System),
    (Duplicated, CpuWrite, System),
    (Duplicated, DeviceWrite, Private),
    (Duplicated, Unmap, System),
    (Duplicated, Bounce, Bounced),
    (Bounced, LaunchEnd, System),
    (Bounced, LaunchEnd, Private),
    (Bounced, LaunchEnd, Moving),
    (Bounced, Unmap, System),
    (Private, Enter, Coherent),
    (Coherent, Leave, Private),
    (Coherent, Release, System),
    (Coherent, Unmap, System),
    (System, Remap, Private),
    (System, Remap, Coherent),
    (Private, Loss, Lost),
    (System, Loss, Lost),
    (Lost, Unmap, System),
];

/// Whether the table holds this transition.
pub(crate) fn allowed(from: PageState, cause: Cause, to: PageState) -> bool {
    TRANSITIONS.contains(&(from, cause, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bits::Bits;

    #[test]
    fn every_state_can_be_left_for_system_and_survives_unmap() {
        for state in [Duplicated, Private, Coherent, Bounced, Moving, Copying, Lost] {
            assert!(allowed(state, Unmap, System), "{state:?}");
        }
        assert!(!allowed(Private, Commit, Duplicated), "a page that is away has no CPU copy to share");
    }

    /// Nothing brings a lost page back but that the program gives it up; and only the one copy can be lost (or a lost page be remapped: its new place is System until then).
    #[test]
    fn a_lost_page_stays_lost() {
        let left: Vec<_> = TRANSITIONS.iter().filter(|change| change.0 == Lost).collect();
        assert_eq!(left, [&(Lost, Unmap, System)]);
        let entered: Vec<_> = TRANSITIONS.iter().filter(|change| change.2 == Lost).map(|change| (change.0, change.1)).collect();
        assert_eq!(entered, [(Private, Loss), (System, Loss)]);
    }

    /// A coherent page holds the only copy: it is entered and left as a whole, never copied, and nothing but its unmapping takes the device's frame and contents at once.
    #[test]
    fn a_coherent_page_comes_from_and_goes_by_private() {
        let entered: Vec<_> = TRANSITIONS.iter().filter(|change| change.2 == Coherent).collect();
        assert_eq!(entered, [&(Private, Enter, Coherent), &(System, Remap, Coherent)]);
        let left: Vec<_> = TRANSITIONS.iter().filter(|change| change.0 == Coherent).map(|change| (change.1, change.2)).collect();
        assert_eq!(left, [(Leave, Private), (Release, System), (Unmap, System)]);
        for cause in [Collect, Return, CpuWrite, DeviceWrite, Bounce] {
            assert!(
                TRANSITIONS.iter().all(|change| (change.0, change.1) != (Coherent, cause)),
                "{cause:?} must not touch the CPU's own page"
            );
        }
    }

    #[test]
    fn spans() {
        let s = Span::inside(4097, 4 * 4096 + 1);
        assert_eq!((s.start, s.end), (8192, 4 * 4096));
        assert!(Span::inside(4097, 8000).is_empty());
        assert_eq!(Span::touching(4097, 8193), Span { start: 4096, end: 3 * 4096 });
        let parts: Vec<_> = Span { start: BLOCK - PAGE, end: 2 * BLOCK + PAGE }.blocks().collect();
        assert_eq!(parts.len(), 3);
        assert_eq!((parts[0].bits(), parts[1].bits(), parts[2].bits()), (Bits::one(511), Bits::ALL, Bits::one(0)));
    }
}
