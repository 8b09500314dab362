//! From one device to another: straight, beside home and out again.

use super::memory::Memory;
use super::{Measure, Row, in_pairs};
use anyhow::Result;
use std::time::{Duration, Instant};
use uhmm::{Device, Uhmm};
use uhmm_floor::{PAGE, Pages};

/// The row: a range of huge pages goes from `device` to a second one.
pub(super) fn run(hmm: &Uhmm, device: &Device, size: usize, pairs: u32) -> Result<Row> {
    let peer = hmm.soft("peer").memory(size).open()?;
    let mut memory = Memory::new(size, Pages::Huge)?;
    let measure = Measure { name: "peer_migrate_2m", unit: "GB/s", work: size as f64 / 1e9, goal: 1.5 };
    let mut run = |by_home: bool| -> Result<Duration> {
        memory.mark();
        device.prefetch(memory.bytes())?;
        let start = Instant::now();
        if by_home {
            device.evict(memory.bytes())?;
        }
        peer.prefetch(memory.bytes())?;
        let taken = start.elapsed();
        peer.evict(memory.bytes())?;
        memory.check(PAGE, PAGE)?;
        Ok(taken)
    };
    let run = std::cell::RefCell::new(&mut run);
    Ok(measure.row(&in_pairs(pairs, || (*run.borrow_mut())(false), || (*run.borrow_mut())(true))?))
}
