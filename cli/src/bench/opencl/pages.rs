//! What a page costs on its way to the device: the driver alone, asked for pages as the memory manager asks for them, against the bare calls that do the same.

use super::{Bench, Measure, Row};
use crate::bench::in_pairs;
use anyhow::{Result, anyhow, ensure};
use std::time::{Duration, Instant};
use uhmm_core::DeviceConfig;
use uhmm_core::driver::{Dma, DmaKind, Driver, Frame};
use uhmm_core::own::OwnBox;
use uhmm_explicit::pages::{How, Pages};
use uhmm_floor::PAGE;

/// Pages of one batch.
const PAGES: usize = 256;
/// Pages from one to the next of a strided set.
const APART: usize = 8;
/// Pages of the array.
const ALL: usize = PAGES * APART;

pub(super) fn run(bench: &Bench<'_>, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let config = DeviceConfig { memory: ALL * PAGE, ..DeviceConfig::new(bench.device.name()) };
    let driver = uhmm_opencl::open_with_copies(&config, bench.hmm.mode(), &[])?;
    let mut scattered: Vec<usize> = (0..ALL).collect();
    fastrand::Rng::with_seed(3).shuffle(&mut scattered);
    scattered.truncate(PAGES);
    scattered.sort_unstable();
    let strided: Vec<usize> = (0..ALL).step_by(APART).collect();
    let run: Vec<usize> = (7..7 + PAGES).collect();
    let (ours, guarded) = (DmaKind::ToDevice, DmaKind::GuardedToDevice);
    print(row(bench, &driver, "opencl_page_awaited", ours, &strided, How::Awaited)?)?;
    print(row(bench, &driver, "opencl_page_scattered", ours, &scattered, How::Together)?)?;
    print(row(bench, &driver, "opencl_page_strided", ours, &strided, How::Rectangle(APART))?)?;
    print(row(bench, &driver, "opencl_page_guarded", guarded, &strided, How::Rectangle(APART))?)?;
    print(row(bench, &driver, "opencl_page_run", ours, &run, How::Piece)?)
}

fn row(bench: &Bench<'_>, driver: &OwnBox<dyn Driver>, name: &'static str, kind: DmaKind, pages: &[usize], how: How) -> Result<Row> {
    let data: Vec<u8> = (0..ALL * PAGE).map(|i| (i / PAGE + i) as u8 | 1).collect();
    let piece = |kind, data: *const u8, page: usize, pages: usize| Dma {
        kind,
        host: data as usize + page * PAGE,
        frame: page as Frame,
        offset: 0,
        len: pages * PAGE,
    };
    let ask =
        |batch: &[Dma]| driver.wait(driver.copy(batch), batch, DeviceConfig::FENCE_LIMIT).map_err(|e| anyhow!("a copy has failed: {e:?}"));
    let zeroed = [Dma { kind: DmaKind::Zero, host: 0, frame: 0, offset: 0, len: ALL * PAGE }];
    ask(&zeroed)?;
    let batch: Vec<Dma> = pages.iter().map(|&page| piece(kind, data.as_ptr(), page, 1)).collect();
    let at_once = if how == How::Awaited { 1 } else { batch.len() };
    let mut bare = Pages::new(bench.cl, ALL * PAGE)?;
    // What is timed takes milliseconds.
    let times = if how == How::Awaited { 1 } else { 50 };
    let each = |time: Duration| time / (times * PAGES as u32);
    let ours = || {
        let start = Instant::now();
        for _ in 0..times {
            batch.chunks(at_once).try_for_each(&ask)?;
        }
        Ok(each(start.elapsed()))
    };
    let theirs = || {
        let start = Instant::now();
        for _ in 0..times {
            bare.send(&data, pages, how)?;
        }
        Ok(each(start.elapsed()))
    };
    let pairs = in_pairs(bench.pairs, ours, theirs)?;
    let mut there = vec![0u8; ALL * PAGE];
    ask(&[piece(DmaKind::ToHost, there.as_mut_ptr(), 0, ALL)])?;
    let right = |page: usize| {
        let bytes = page * PAGE..(page + 1) * PAGE;
        if pages.contains(&page) { there[bytes.clone()] == data[bytes] } else { there[bytes].iter().all(|&byte| byte == 0) }
    };
    ensure!((0..ALL).all(right), "{name}: not these pages are on the device");
    // What may be gone is copied twice.
    let goal = if kind == DmaKind::GuardedToDevice { 2.0 } else { 1.1 };
    Ok(Measure { name, unit: "us/page", work: 1e-6, goal }.row(&pairs))
}
