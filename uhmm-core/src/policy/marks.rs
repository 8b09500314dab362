//! What is said about ranges: advice, and policies of their own. The ranges follow the program's mappings ([`crate::events`]).
//!
//! Its lock is the innermost one: it is taken under any other, and under it nothing is done but looking.

use super::Advised;
use crate::bits::Bits;
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Span, Va};
use crate::sync::*;
use core::ops::ControlFlow;
use uhmm_os::Errno;

/// The most ranges of which something is said. Neighbours of which the same is said are one.
pub const MOST_RANGES: usize = 4096;

/// What is said about a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) advice: Advised,
    /// The number of its policy plus 1; 0 for none.
    pub(crate) policy: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    span: Span,
    said: Said,
}

#[allow(unsafe_code)]
// SAFETY: an empty span, of which nothing is said.
unsafe impl Zeroed for Mark {}

/// Too many ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

/// Sorted, disjoint, none empty, and of each something is said.
#[derive(Debug)]
struct List {
    marks: OwnSlice<Mark>,
    count: usize,
    /// Where the next list is made.
    spare: OwnSlice<Mark>,
}

/// The ranges of one process.
#[derive(Debug)]
pub(crate) struct Marks {
    /// Whether there is any, for who only passes.
    any: AtomicBool,
    list: RwLock<List>,
}

impl List {
    /// Adds to the list that is being made.
    fn push(&mut self, len: &mut usize, mark: Mark) -> Result<(), TooMany> {
        if mark.span.is_empty() || mark.said == Said::default() {
            return Ok(());
        }
        if *len > 0 {
            let last = &mut self.spare[*len - 1];
            if last.span.end == mark.span.start && last.said == mark.said {
                last.span.end = mark.span.end;
                return Ok(());
            }
        }
        if *len == MOST_RANGES {
            return Err(TooMany);
        }
        self.spare[*len] = mark;
        *len += 1;
        Ok(())
    }

    /// Says something else about all of `span`.
    fn change(&mut self, span: Span, f: &mut dyn FnMut(Said) -> Said) -> Result<(), TooMany> {
        let mut len = 0;
        // Up to where of the span it is done.
        let mut at = span.start;
        for index in 0..self.count {
            let Mark { span: old, said } = self.marks[index];
            let both = old.and(span);
            if both.is_empty() {
                if old.start >= span.end {
                    self.push(&mut len, Mark { span: Span { start: at, end: span.end }, said: f(Said::default()) })?;
                    at = span.end;
                }
                self.push(&mut len, Mark { span: old, said })?;
                continue;
            }
            self.push(&mut len, Mark { span: Span { start: old.start, end: both.start }, said })?;
            self.push(&mut len, Mark { span: Span { start: at, end: both.start }, said: f(Said::default()) })?;
            self.push(&mut len, Mark { span: both, said: f(said) })?;
            self.push(&mut len, Mark { span: Span { start: both.end, end: old.end }, said })?;
            at = both.end;
        }
        self.push(&mut len, Mark { span: Span { start: at, end: span.end }, said: f(Said::default()) })?;
        core::mem::swap(&mut self.marks, &mut self.spare);
        self.count = len;
        Ok(())
    }

    /// The first that ends behind `va`.
    fn first(&self, va: Va) -> usize {
        self.marks[..self.count].partition_point(|mark| mark.span.end <= va)
    }
}

impl Marks {
    /// None.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let (marks, spare) = (OwnSlice::new(c"uhmm marks", MOST_RANGES)?, OwnSlice::new(c"uhmm marks", MOST_RANGES)?);
        Ok(Marks { any: AtomicBool::new(false), list: RwLock::new(List { marks, count: 0, spare }) })
    }

    /// Says something else about all of `span`. If that made too many ranges, everything is as before.
    pub(crate) fn change(&self, span: Span, mut f: impl FnMut(Said) -> Said) -> Result<(), TooMany> {
        if span.is_empty() {
            return Ok(());
        }
        let mut list = self.list.write();
        let changed = list.change(span, &mut f);
        self.any.store(list.count > 0, Ordering::Release);
        changed
    }

    /// Says something else about everything of which something is said.
    pub(crate) fn change_all(&self, mut f: impl FnMut(Said) -> Said) {
        let mut list = self.list.write();
        for index in 0..list.count {
            let said = f(list.marks[index].said);
            list.marks[index].said = said;
        }
    }

    /// Nothing is said any more about `span`, which is not mapped now.
    pub(crate) fn remove(&self, span: Span) {
        if self.any() {
            // If the rests of a range that is cut in two find no place, all of it goes: advice is no duty.
            if self.change(span, |_| Said::default()).is_err() {
                let _ = self.change(self.hull(span), |_| Said::default());
            }
        }
    }

    /// `span` and all ranges that meet it.
    fn hull(&self, span: Span) -> Span {
        let list = self.list.read();
        list.marks[..list.count]
            .iter()
            .filter(|mark| !mark.span.and(span).is_empty())
            .fold(span, |sum, mark| Span { start: sum.start.min(mark.span.start), end: sum.end.max(mark.span.end) })
    }

    /// What was said about `from` is said about what is at `to` now.
    pub(crate) fn moved(&self, from: Span, to: Va) {
        if !self.any() {
            return;
        }
        // One after the other, for what is said goes from one list to the other.
        let mut at = from.start;
        self.remove(Span { start: to, end: to.saturating_add(from.len()) });
        while let Some((part, said)) = self.next(Span { start: at, end: from.end }) {
            at = part.end;
            self.remove(part);
            let start = to + (part.start - from.start);
            let _ = self.change(Span { start, end: start + part.len() }, |_| said);
        }
    }

    /// The first part of `span` of which something is said, and what.
    fn next(&self, span: Span) -> Option<(Span, Said)> {
        let list = self.list.read();
        let mark = list.marks[..list.count].get(list.first(span.start))?;
        let part = mark.span.and(span);
        (!part.is_empty()).then_some((part, mark.said))
    }

    /// Whether there is any.
    pub(crate) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Calls `f` for each part of `span` of which something is said, in order.
    pub(crate) fn for_each(&self, span: Span, mut f: impl FnMut(Span, Said)) {
        let _ = self.find(span, |part, said| {
            f(part, said);
            ControlFlow::Continue(())
        });
    }

    fn find(&self, span: Span, mut f: impl FnMut(Span, Said) -> ControlFlow<()>) -> ControlFlow<()> {
        if !self.any() || span.is_empty() {
            return ControlFlow::Continue(());
        }
        let list = self.list.read();
        for mark in &list.marks[list.first(span.start)..list.count] {
            let part = mark.span.and(span);
            if part.is_empty() {
                break;
            }
            f(part, mark.said)?;
        }
        ControlFlow::Continue(())
    }

    /// What is said about one address.
    pub(crate) fn at(&self, va: Va) -> Said {
        let mut found = Said::default();
        self.for_each(Span { start: va, end: va + 1 }, |_, said| found = said);
        found
    }

    /// What is said about any of `span`.
    pub(crate) fn of(&self, span: Span) -> Advised {
        let mut sum = Advised::default();
        self.for_each(span, |_, said| sum = sum.or(said.advice));
        sum
    }

    /// Pages of `part`, which lies in one block, that must not migrate.
    pub(crate) fn stay(&self, part: Span) -> Bits {
        let mut stay = Bits::EMPTY;
        self.for_each(part, |part, said| {
            if said.advice.no_migrate() {
                stay |= part.bits();
            }
        });
        stay
    }

    /// Calls `f` for each range from `from` on whose advice `is` so, until it says stop. No lock is held meanwhile.
    pub(crate) fn walk(&self, from: Va, is: impl Fn(Advised) -> bool, mut f: impl FnMut(Span) -> ControlFlow<()>) {
        let mut at = from;
        while let Some((part, said)) = self.next(Span { start: at, end: usize::MAX }) {
            at = part.end;
            if is(said.advice) && f(part).is_break() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Advice;
    use super::*;

    fn span(from: usize, to: usize) -> Span {
        Span { start: from * 4096, end: to * 4096 }
    }

    fn all(marks: &Marks) -> Vec<(usize, usize, Advised, u32)> {
        let mut list = vec![];
        marks.for_each(span(0, 1 << 30), |part, said| list.push((part.start / 4096, part.end / 4096, said.advice, said.policy)));
        list
    }

    /// Every change against a plain list with one entry a page.
    #[test]
    fn what_is_said_against_a_plain_list() {
        let marks = Marks::new().unwrap();
        let mut plain = [Said::default(); 200];
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..3000 {
            let from = random.usize(0..200);
            let to = random.usize(from..=200);
            let part = span(from, to);
            match random.u8(0..6) {
                0 => {
                    marks.remove(part);
                    plain[from..to].fill(Said::default());
                }
                1 => {
                    let policy = random.u32(0..3);
                    marks.change(part, |said| Said { policy, ..said }).unwrap();
                    plain[from..to].iter_mut().for_each(|said| said.policy = policy);
                }
                2 => {
                    let at = random.usize(0..=200 - (to - from));
                    if at >= to || at + (to - from) <= from {
                        marks.moved(part, at * 4096);
                        plain.copy_within(from..to, at);
                        plain[from..to].fill(Said::default());
                    }
                }
                _ => {
                    let advice = [Advice::NoMigrate, Advice::ReadMostly, Advice::Normal, Advice::AccessedBy(3)][random.usize(0..4)];
                    marks.change(part, |said| Said { advice: said.advice.and(advice), ..said }).unwrap();
                    plain[from..to].iter_mut().for_each(|said| said.advice = said.advice.and(advice));
                }
            }
            for (page, expected) in plain.iter().enumerate() {
                assert_eq!(marks.at(page * 4096 + 5), *expected, "page {page}");
            }
            let list = all(&marks);
            assert!(list.iter().zip(list.iter().skip(1)).all(|(a, b)| a.1 < b.0 || (a.1 == b.0 && (a.2, a.3) != (b.2, b.3))), "{list:?}");
            let stay = marks.stay(span(3, 190));
            assert!((3..190).all(|page| stay.has(page) == plain[page].advice.no_migrate()));
        }
    }

    #[test]
    fn too_many_ranges_change_nothing() {
        let marks = Marks::new().unwrap();
        let say = |said: Said| Said { advice: said.advice.and(Advice::ReadMostly), ..said };
        for n in 0..MOST_RANGES {
            marks.change(span(4 * n, 4 * n + 3), say).unwrap();
        }
        let before = all(&marks);
        assert_eq!(marks.change(span(4 * MOST_RANGES + 9, 4 * MOST_RANGES + 10), say), Err(TooMany));
        assert_eq!(all(&marks), before);
        marks.remove(span(1, 2)); // makes one more of one
        assert!(!marks.at(4096).advice.read_mostly());
        assert_eq!(all(&marks).len(), MOST_RANGES - 1);
        marks.remove(span(0, 1 << 30));
        assert!(!marks.any());
    }
}
