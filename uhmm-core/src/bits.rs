//! One bit for each of the 512 pages of a block.

use core::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign, Not, Range, Sub, SubAssign};

/// Pages in a block.
pub const PAGES: usize = 512;

/// A set of pages of one block. All zeros is the empty set.
///
/// ```
/// use uhmm_core::policy::{Bits, PAGES};
///
/// let leaf = Bits::range(16..32);
/// let all = leaf | Bits::one(40);
/// assert!(all.count() == 17 && all.covers(leaf) && !leaf.has(40));
/// assert_eq!(all.runs().collect::<Vec<_>>(), [16..32, 40..41]);
/// assert_eq!((!all).count(), PAGES - 17);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Bits([u64; 8]);

impl Bits {
    /// No page.
    pub const EMPTY: Bits = Bits([0; 8]);
    /// All pages.
    pub const ALL: Bits = Bits([!0; 8]);

    /// The pages of `range`, which lies in `0..512`.
    pub fn range(range: Range<usize>) -> Bits {
        debug_assert!(range.end <= PAGES);
        let mut bits = Bits::EMPTY;
        for (word, value) in bits.0.iter_mut().enumerate() {
            let from = range.start.clamp(word * 64, word * 64 + 64) - word * 64;
            let to = range.end.clamp(word * 64, word * 64 + 64) - word * 64;
            if from < to {
                *value = (!0 >> (64 - (to - from))) << from;
            }
        }
        bits
    }

    /// One page.
    pub fn one(page: usize) -> Bits {
        let mut bits = Bits::EMPTY;
        bits.set(page);
        bits
    }

    /// Whether `page` is in the set.
    pub fn has(&self, page: usize) -> bool {
        self.0[page / 64] >> (page % 64) & 1 != 0
    }

    /// Adds `page`.
    pub fn set(&mut self, page: usize) {
        self.0[page / 64] |= 1 << (page % 64);
    }

    /// Pages in the set.
    pub fn count(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 8]
    }

    /// Whether all pages of `other` are in this set.
    pub fn covers(&self, other: Bits) -> bool {
        (other - *self).is_empty()
    }

    /// Whether the two sets share a page.
    pub fn meets(&self, other: Bits) -> bool {
        !(*self & other).is_empty()
    }

    /// The first page of the set at or after `from`.
    pub fn next(&self, from: usize) -> Option<usize> {
        if from >= PAGES {
            return None;
        }
        let mut word = from / 64;
        let mut value = self.0[word] & (!0 << (from % 64));
        loop {
            if value != 0 {
                return Some(word * 64 + value.trailing_zeros() as usize);
            }
            word += 1;
            value = *self.0.get(word)?;
        }
    }

    /// The first page, at or after `from`, that is not in the set; 512 if there is none.
    pub fn next_gap(&self, from: usize) -> usize {
        (!*self).next(from).unwrap_or(PAGES)
    }

    /// The maximal runs of neighbouring pages, in order.
    pub fn runs(self) -> impl Iterator<Item = Range<usize>> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = self.next(at)?;
            at = self.next_gap(start);
            Some(start..at)
        })
    }

    /// The pages, in order.
    pub fn pages(self) -> impl Iterator<Item = usize> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let page = self.next(at)?;
            at = page + 1;
            Some(page)
        })
    }

    /// The run that holds `page`; empty if the page is not in the set.
    pub fn run_at(&self, page: usize) -> Range<usize> {
        if !self.has(page) {
            return page..page;
        }
        let mut start = page;
        while start > 0 && self.has(start - 1) {
            start -= 1;
        }
        start..self.next_gap(page)
    }
}

macro_rules! op {
    ($trait:ident $method:ident $assign_trait:ident $assign:ident, $f:expr) => {
        impl $trait for Bits {
            type Output = Bits;
            fn $method(mut self, other: Bits) -> Bits {
                $assign_trait::$assign(&mut self, other);
                self
            }
        }
        impl $assign_trait for Bits {
            fn $assign(&mut self, other: Bits) {
                let f: fn(u64, u64) -> u64 = $f;
                for (a, b) in self.0.iter_mut().zip(other.0) {
                    *a = f(*a, b);
                }
            }
        }
    };
}
op!(BitAnd bitand BitAndAssign bitand_assign, |a, b| a & b);
op!(BitOr bitor BitOrAssign bitor_assign, |a, b| a | b);
op!(Sub sub SubAssign sub_assign, |a, b| a & !b);

impl Not for Bits {
    type Output = Bits;
    fn not(self) -> Bits {
        Bits(self.0.map(|w| !w))
    }
}

impl core::fmt::Debug for Bits {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_list().entries(self.runs()).finish()
    }
}

impl FromIterator<usize> for Bits {
    fn from_iter<I: IntoIterator<Item = usize>>(pages: I) -> Self {
        let mut all = Bits::EMPTY;
        pages.into_iter().for_each(|page| all.set(page));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_is_one_run_of_its_pages() {
        for start in (0..PAGES).step_by(7).chain([63, 64, 65, 511]) {
            for end in [start, start + 1, start + 63, start + 64, start + 65, PAGES] {
                let end = end.min(PAGES);
                let bits = Bits::range(start..end);
                assert_eq!(bits.count(), end - start);
                assert!(bits.runs().eq((start < end).then_some(start..end)), "{start}..{end}: {bits:?}");
                assert!(bits.pages().eq(start..end));
            }
        }
    }

    #[test]
    fn runs_and_gaps() {
        let bits = Bits::range(0..3) | Bits::one(64) | Bits::range(500..512);
        assert_eq!(bits.runs().collect::<Vec<_>>(), [0..3, 64..65, 500..512]);
        assert_eq!((bits.next(3), bits.next_gap(500), bits.next(65)), (Some(64), 512, Some(500)));
        assert_eq!((bits.run_at(501), bits.run_at(2), bits.run_at(70)), (500..512, 0..3, 70..70));
        assert!(Bits::ALL.covers(bits) && !bits.covers(Bits::ALL) && (bits - Bits::ALL).is_empty());
        assert!(!bits.meets(Bits::one(63)) && bits.meets(Bits::range(60..70)));
    }
}
