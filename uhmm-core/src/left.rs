//! Ranges whose pages may stay on a device in user-mode-only mode, because the program asked for that ([`crate::mode`]).
//!
//! Such a range is watched for missing pages, and is not inherited by a child of a fork that bypasses libc's: the child faults rather than read zeros. libc's fork brings
//! everything home first, and lets the child have it (`crate::fork`). System calls on pages that are away fail with `EFAULT`.

use crate::bits::Bits;
use crate::core::Core;
use crate::error::Error;
use crate::line::Who;
use crate::mode::Mode;
use crate::page::{Span, Va};
use crate::ranges;
use crate::sync::*;
use uhmm_os::mem::{self, Advice};

/// The most ranges.
const MOST: usize = 1024;

/// The ranges of one process, disjoint, in no order.
#[derive(Debug)]
pub(crate) struct Left {
    spans: RwLock<([Span; MOST], usize)>,
}

impl Default for Left {
    fn default() -> Self {
        Left { spans: RwLock::new(([Span { start: 0, end: 0 }; MOST], 0)) }
    }
}

impl Left {
    /// Calls `f` with every range.
    pub(crate) fn for_each(&self, mut f: impl FnMut(Span)) {
        let spans = self.spans.read();
        spans.0[..spans.1].iter().for_each(|&span| f(span));
    }

    /// Whether `va` lies in one, and up to where that holds.
    pub(crate) fn at(&self, va: Va) -> (bool, Va) {
        let mut end = usize::MAX;
        let mut inside = false;
        self.for_each(|span| {
            if span.start <= va && va < span.end {
                (inside, end) = (true, span.end);
            } else if !inside && va < span.start {
                end = end.min(span.start);
            }
        });
        (inside, end)
    }

    /// The pages of `part`, which lies in one block, that lie in one.
    pub(crate) fn bits(&self, part: Span) -> Bits {
        let mut bits = Bits::EMPTY;
        self.for_each(|span| {
            let both = span.and(part);
            if !both.is_empty() {
                bits |= both.bits();
            }
        });
        bits
    }

    /// Notes a range. False if there are too many.
    fn add(&self, span: Span) -> bool {
        self.remove(span);
        let mut spans = self.spans.write();
        let (list, count) = &mut *spans;
        if *count == MOST {
            return false;
        }
        list[*count] = span;
        *count += 1;
        true
    }

    /// The range, or parts of others that lie in it, are as all memory again.
    pub(crate) fn remove(&self, gone: Span) {
        let mut spans = self.spans.write();
        let (list, count) = &mut *spans;
        let mut at = 0;
        while at < *count {
            let span = list[at];
            if span.and(gone).is_empty() {
                at += 1;
                continue;
            }
            let rest = [Span { start: span.start, end: gone.start }, Span { start: gone.end, end: span.end }];
            *count -= 1;
            list[at] = list[*count];
            for part in rest.into_iter().filter(|part| !part.is_empty() && part.end <= span.end && part.start >= span.start) {
                // Of two rests the second may find no place: then its pages come home at each launch, as elsewhere.
                if *count < MOST {
                    list[*count] = part;
                    *count += 1;
                }
            }
        }
    }
}

/// Lets what a launch writes in a byte range stay on the device. In full mode everything may.
///
/// # Errors
/// [`Error::Stay`] in the mode without userfaultfd, for memory that cannot move, and for too many ranges.
pub(crate) fn leave(core: &Core, start: Va, end: Va) -> Result<(), Error> {
    let refuse = |why| Err(Error::Stay { address: start, why });
    match core.space.mode {
        Mode::Full => return Ok(()),
        Mode::None => return refuse("there is no userfaultfd"),
        Mode::UserModeOnly => {}
    }
    let span = Span::inside(start, end);
    let mut at = span.start;
    while at < span.end {
        match core.space.mapping(at) {
            Ok(Some(vma)) if crate::space::movable(&vma) => at = vma.end,
            _ => return refuse("not all of it is anonymous private memory that can be read and written"),
        }
    }
    if span.is_empty() {
        return Ok(());
    }
    let _alone = core.turns.enter(Who::Alone);
    if !core.space.left.add(span) {
        return refuse("too many ranges were asked for");
    }
    if let Err(e) = ranges::watch_span(core, span) {
        core.space.left.remove(span);
        return Err(Error::System("watch the range", e));
    }
    inherit(span, false);
    Ok(())
}

/// Whether a fork's child gets the range.
pub(crate) fn inherit(span: Span, yes: bool) {
    #[allow(unsafe_code)]
    // SAFETY: it changes no contents.
    let _ = unsafe { mem::madvise(span.start, span.len(), if yes { Advice::DoFork } else { Advice::DontFork }) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_added_cut_and_found() {
        let left = Left::default();
        let page = |n: usize| n * 4096;
        let span = |from, to| Span { start: page(from), end: page(to) };
        assert!(left.add(span(10, 20)));
        assert_eq!(left.at(page(5)), (false, page(10)));
        assert_eq!(left.at(page(15)), (true, page(20)));
        left.remove(span(12, 14));
        assert_eq!((left.at(page(11)), left.at(page(12)).0, left.at(page(14))), ((true, page(12)), false, (true, page(20))));
        assert!(left.add(span(0, 16)));
        assert_eq!((left.at(page(0)), left.at(page(16)), left.at(page(30))), ((true, page(16)), (true, page(20)), (false, usize::MAX)));
        assert_eq!(left.bits(span(15, 18)), Bits::range(15..18));
        left.remove(span(0, 100));
        assert_eq!(left.at(page(10)), (false, usize::MAX));
    }
}
