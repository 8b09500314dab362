//! Moving pages to the device and home again, by prefetch and eviction, by a launch and by CPU touches.
//!
//! Each run starts from memory that is wholly on the CPU, or wholly on the device; what brings it there is outside the clock. Every
//! run writes other bytes before and checks them afterwards.

use super::{Measure, Row, first_launch, in_pairs, peer};
use crate::options;
use anyhow::{Result, ensure};
use memmap2::{Advice, MmapMut};
use std::ops::Range;
use std::time::{Duration, Instant};
use uhmm::{Ctx, Device, Uhmm, args, inout};
use uhmm_floor::{BLOCK, Fault, Method, PAGE, Pages, RoundTrip, Server};

/// Threads that the floor of whole ranges uses: as many as work on a large batch of uhmm's, its copy engine and who waits for it.
const FLOOR_THREADS: usize = 2;

/// Measures the rows of this group.
pub(super) fn run(args: &options::Bench, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let hmm = Uhmm::new()?;
    let device = hmm.device(&args.device)?;
    let size = args.size as usize * (1 << 20) / BLOCK * BLOCK;
    for pages in [Pages::Huge, Pages::Small] {
        whole_ranges(&device, size, pages, args.pairs, print)?;
    }
    for pages in [Pages::Huge, Pages::Small] {
        faults(&device, size, pages, args.pairs, print)?;
    }
    for row in [("fault_4k", PAGE), ("fault_64k", 16 * PAGE)] {
        lone_faults(&device, size, row, args.pairs, print)?;
    }
    // A device without memory holds no data, and may run no kernel.
    if device.memory() == 0 {
        return Ok(());
    }
    print(peer::run(&hmm, &device, size, args.pairs)?)?;
    print(first_launch::run(&device, args.pairs)?)
}

fn named(pages: Pages, huge: &'static str, small: &'static str) -> &'static str {
    if pages == Pages::Huge { huge } else { small }
}

/// All of a range to the device and home: `prefetch` and `evict`, then a launch of a kernel that does nothing.
fn whole_ranges(device: &Device, size: usize, pages: Pages, pairs: u32, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let mut floor = RoundTrip::prepare(size, pages, FLOOR_THREADS)?;
    let mut memory = Memory::new(size, pages)?;
    let rate = |name| Measure { name, unit: "GB/s", work: size as f64 / 1e9, goal: 0.8 };
    let times = in_pairs(pairs, || round_trip(device, &mut memory), || Ok(floor.run().map(|time| (time.to_device, time.home))?))?;
    let to_device: Vec<_> = times.iter().map(|(ours, floor)| (ours.0, floor.0)).collect();
    let home: Vec<_> = times.iter().map(|(ours, floor)| (ours.1, floor.1)).collect();
    print(rate(named(pages, "migrate_to_device_2m", "migrate_to_device_4k")).row(&to_device))?;
    print(rate(named(pages, "migrate_home_2m", "migrate_home_4k")).row(&home))?;
    let launched = in_pairs(pairs, || launch(device, &mut memory), || Ok(floor.run()?.to_device))?;
    print(rate(named(pages, "launch_2m", "launch_4k")).row(&launched))
}

fn round_trip(device: &Device, memory: &mut Memory) -> Result<(Duration, Duration)> {
    memory.mark();
    let start = Instant::now();
    device.prefetch(memory.bytes())?;
    let to_device = start.elapsed();
    let start = Instant::now();
    device.evict(memory.bytes())?;
    let home = start.elapsed();
    memory.check(PAGE, PAGE)?;
    Ok((to_device, home))
}

fn launch(device: &Device, memory: &mut Memory) -> Result<Duration> {
    memory.mark();
    let nothing = |_: &Ctx<'_>| ();
    let start = Instant::now();
    device.run(&nothing, 1, args![inout(memory.bytes_mut())])?;
    let taken = start.elapsed();
    device.evict(memory.bytes())?;
    memory.check(PAGE, PAGE)?;
    Ok(taken)
}

/// A range that is on the device, read by the CPU from its start to its end: one fault for each 2 MiB would do.
fn faults(device: &Device, size: usize, pages: Pages, pairs: u32, print: &mut impl FnMut(Row) -> Result<()>) -> Result<()> {
    let name = named(pages, "read_home_2m", "read_home_4k");
    let measure = Measure { name, unit: "GB/s", work: size as f64 / 1e9, goal: 0.8 };
    let mut floor = Fault::prepare(size, Server::Handler, Method::Move, BLOCK, pages)?;
    let mut memory = Memory::new(size, pages)?;
    let ours = || touch(device, &mut memory, PAGE, PAGE);
    print(measure.row(&in_pairs(pairs, ours, || Ok(floor.run()?))?))
}

/// Touches that are far from each other: one page of 4 KiB, or all of 64 KiB, in each 2 MiB that are on the device.
fn lone_faults(
    device: &Device,
    size: usize,
    (name, chunk): (&'static str, usize),
    pairs: u32,
    print: &mut impl FnMut(Row) -> Result<()>,
) -> Result<()> {
    let mut floor = Fault::prepare(size, Server::Handler, Method::Copy, chunk, Pages::Small)?;
    let faults = floor.faults() as f64;
    let mut memory = Memory::new(size, Pages::Small)?;
    let touches = (size / BLOCK) as f64;
    let measure = Measure { name, unit: "us", work: touches / 1e6, goal: 1.5 };
    // The floor serves more faults than we make: its time is scaled to our number.
    let floor = || Ok(floor.run()?.mul_f64(touches / faults));
    print(measure.row(&in_pairs(pairs, || touch(device, &mut memory, BLOCK, chunk), floor)?))
}

/// Sends everything to the device, and then reads every page in the first `len` bytes of every `step` bytes.
fn touch(device: &Device, memory: &mut Memory, step: usize, len: usize) -> Result<Duration> {
    memory.mark();
    device.prefetch(memory.bytes())?;
    let start = Instant::now();
    memory.check(step, len)?;
    let taken = start.elapsed();
    device.evict(memory.bytes())?;
    Ok(taken)
}

/// Anonymous memory that starts on a 2 MiB boundary.
pub(super) struct Memory {
    mapping: MmapMut,
    range: Range<usize>,
    salt: u8,
}

impl Memory {
    pub(super) fn new(size: usize, pages: Pages) -> Result<Memory> {
        let mapping = MmapMut::map_anon(size + BLOCK)?;
        let start = mapping.as_ptr().align_offset(BLOCK);
        mapping.advise_range(if pages == Pages::Huge { Advice::HugePage } else { Advice::NoHugePage }, start, size)?;
        Ok(Memory { mapping, range: start..start + size, salt: 0 })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.mapping[self.range.clone()]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.mapping[self.range.clone()]
    }

    /// Writes the first byte of every page: the low byte of its number plus a salt that is new each time.
    pub(super) fn mark(&mut self) {
        self.salt = self.salt.wrapping_add(1);
        let salt = self.salt;
        for (number, page) in self.bytes_mut().chunks_mut(PAGE).enumerate() {
            page[0] = (number as u8).wrapping_add(salt);
        }
    }

    /// Reads the first byte of every page in the first `len` bytes of every `step` bytes.
    pub(super) fn check(&self, step: usize, len: usize) -> Result<()> {
        let first_pages = (0..self.range.len()).step_by(step);
        for at in first_pages.flat_map(|start| (start..start + len).step_by(PAGE)) {
            let page = at / PAGE;
            ensure!(self.bytes()[at] == (page as u8).wrapping_add(self.salt), "wrong data in page {page} after a migration");
        }
        Ok(())
    }
}
