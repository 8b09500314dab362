//! Random operations of all kinds against a shadow copy.
#![allow(unsafe_code)] // fork

use super::Subject;
use super::memory::{Pages, same};
use super::named::{FAILED, Named};
use crate::args::{inout, out};
use core::ops::Range;
use fastrand::Rng;
use uhmm_os::PAGE;

const MOST: usize = 600 * PAGE;

/// Memory of the program and what must be in it.
struct Region {
    pages: Pages,
    shadow: Vec<u8>,
}

impl Region {
    fn new(random: &mut Rng) -> Self {
        let len = random.usize(1..MOST / PAGE) * PAGE;
        Region { pages: Pages::new(len), shadow: vec![0; len] }
    }

    fn check(&mut self, range: Range<usize>) {
        let expected = &self.shadow[range.clone()];
        same("against the shadow", &self.pages.bytes()[range], |i| expected[i]);
    }

    /// A range: often short, sometimes all of it.
    fn range(&self, random: &mut Rng) -> Range<usize> {
        let most = 1usize << random.u32(0..22);
        let len = random.usize(0..=most.min(self.shadow.len()).min(1 << 20));
        let at = random.usize(0..=self.shadow.len() - len);
        at..at + len
    }
}

pub(super) fn random_operations_against_a_shadow(subject: &mut Subject<'_>) {
    let mut random = Rng::with_seed(subject.seed);
    let mut regions: Vec<Region> = (0..4).map(|_| Region::new(&mut random)).collect();
    for step in 0..subject.steps {
        let index = random.usize(0..regions.len());
        let what = random.u8(0..100);
        if std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| operate(subject, &mut random, &mut regions, index, what))).is_err() {
            panic!("seed {}, step {step}: operation {what} on region {index} went wrong, as said above", subject.seed);
        }
        if step % 50 == 49 {
            let region = &mut regions[index];
            region.check(0..region.shadow.len());
        }
    }
    for region in &mut regions {
        region.check(0..region.shadow.len());
    }
}

fn operate(subject: &Subject<'_>, random: &mut Rng, regions: &mut [Region], index: usize, what: u8) {
    match what {
        0..25 => add(subject, random, &mut regions[index]),
        25..40 => copy(subject, random, regions, index),
        40..50 => fill(subject, random, &mut regions[index]),
        50..65 => write(random, &mut regions[index]),
        65..80 => {
            let range = regions[index].range(random);
            regions[index].check(range);
        }
        80..86 => send(subject, random, &mut regions[index]),
        86..90 => drop_pages(random, &mut regions[index]),
        90..92 => regions[index] = Region::new(random),
        92..94 => {
            let region = &mut regions[index];
            let len = random.usize(1..MOST / PAGE) * PAGE;
            if region.pages.resize(len) {
                region.shadow.resize(len, 0);
            }
        }
        94..97 => fail(subject, random, &mut regions[index]),
        97..99 => {
            let range = regions[index].range(random);
            let sum: u64 = regions[index].shadow[range.clone()].iter().map(|&x| u64::from(x)).sum();
            assert_eq!(subject.sum(&regions[index].pages.bytes()[range.clone()]), sum, "the sum of {range:?}");
        }
        _ => fork(&mut regions[index]),
    }
}

fn add(subject: &Subject<'_>, random: &mut Rng, region: &mut Region) {
    let range = region.range(random);
    subject.add_one(&mut region.pages.bytes()[range.clone()]);
    region.shadow[range].iter_mut().for_each(|x| *x = x.wrapping_add(1));
}

/// From one region to another, or within one.
fn copy(subject: &Subject<'_>, random: &mut Rng, regions: &mut [Region], index: usize) {
    let other = random.usize(0..regions.len());
    if other == index {
        let region = &mut regions[index];
        let middle = random.usize(0..=region.shadow.len());
        let len = random.usize(0..=middle.min(region.shadow.len() - middle).min(1 << 20));
        let (left, right) = region.pages.bytes().split_at_mut(middle);
        subject.copy(&mut right[..len], &left[middle - len..]);
        region.shadow.copy_within(middle - len..middle, middle);
        return;
    }
    let from = regions[other].range(random);
    let len = from.len().min(regions[index].shadow.len());
    let from = from.start..from.start + len;
    let at = random.usize(0..=regions[index].shadow.len() - len);
    let Ok([to, source]) = regions.get_disjoint_mut([index, other]) else { unreachable!("two regions") };
    subject.copy(&mut to.pages.bytes()[at..at + len], &source.pages.bytes()[from.clone()]);
    to.shadow[at..at + len].copy_from_slice(&source.shadow[from]);
}

fn fill(subject: &Subject<'_>, random: &mut Rng, region: &mut Region) {
    let range = region.range(random);
    let part = random.usize(1..=range.len().max(1));
    let part = part.max(range.len() / 64 + 1);
    let (from, len, value) = (random.usize(0..part), random.usize(0..=part), random.u8(..));
    subject.fill_part(&mut region.pages.bytes()[range.clone()], part, from, len, value);
    for i in range.clone() {
        let place = (i - range.start) % part;
        let found = region.pages.bytes()[i];
        if (from..from + len).contains(&place) {
            assert_eq!(found, value, "byte {i}, which was written");
        } else {
            assert!(found == region.shadow[i] || found == 0, "byte {i}, which was left: {found}, before {}", region.shadow[i]);
        }
        region.shadow[i] = found;
    }
}

fn write(random: &mut Rng, region: &mut Region) {
    for _ in 0..random.usize(1..5) {
        let i = random.usize(0..region.shadow.len());
        let value = random.u8(..);
        region.pages.bytes()[i] = value;
        region.shadow[i] = value;
    }
    if random.u8(0..4) == 0 {
        let range = region.range(random);
        let value = random.u8(..);
        region.pages.bytes()[range.clone()].fill(value);
        region.shadow[range].fill(value);
    }
}

fn send(subject: &Subject<'_>, random: &mut Rng, region: &mut Region) {
    let range = region.range(random);
    let bytes = region.pages.bytes()[range].as_ptr_range();
    let (start, end) = (bytes.start as usize, bytes.end as usize);
    let sent = if random.bool() { subject.dev.prefetch(start, end) } else { subject.dev.evict(start, end) };
    sent.unwrap_or_else(|e| panic!("prefetch or evict: {e}"));
}

fn drop_pages(random: &mut Rng, region: &mut Region) {
    let range = region.range(random);
    let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
    if start < end {
        region.pages.drop_pages(start, end - start);
        region.shadow[start..end].fill(0);
    }
}

fn fail(subject: &Subject<'_>, random: &mut Rng, region: &mut Region) {
    let range = region.range(random);
    if range.is_empty() || !subject.has(Named::Fail) {
        return;
    }
    let part = random.usize(1..=range.len()).max(range.len() / 16 + 1);
    let groups = range.len().div_ceil(part);
    let bytes = &mut region.pages.bytes()[range.clone()];
    let arg = if random.bool() { out(bytes) } else { inout(bytes) };
    assert!(subject.fail(arg, groups, part, random.usize(0..groups)).is_err(), "a failing kernel must fail its launch");
    for i in range.clone() {
        let found = region.pages.bytes()[i];
        let first = (i - range.start).is_multiple_of(part);
        assert!(found == region.shadow[i] || (first && found == FAILED), "byte {i} is {found}, before {}", region.shadow[i]);
        region.shadow[i] = found;
    }
}

fn fork(region: &mut Region) {
    let shadow = &region.shadow;
    // SAFETY: the child only reads memory, and ends at once.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork");
    if child == 0 {
        let right = region.pages.bytes() == shadow;
        // SAFETY: it ends the child.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child read something else");
}
