//! The first launch over ordinary memory and the reading of its result, beyond what explicit copies of the same cost.
//!
//! Both uhmm and its floor are measured against explicit copies of their own, so what is compared is the price of the one pointer.
//! The kernel's time is left out everywhere. A difference of two times varies more than a time does, so a pair is made of several
//! rounds, in which all programs run once each on fresh memory, and has the medians of their differences.

use super::{Measure, Row};
use crate::report::Figure;
use anyhow::{Result, ensure};
use memmap2::{Advice, MmapMut};
use std::hint::black_box;
use std::time::{Duration, Instant};
use uhmm::{Buffer, Ctx, Device, args, inp, out};
use uhmm_floor::{BLOCK, FirstLaunch, PAGE, Reading};

/// Bytes of each of the three arrays: those of a product of 1024 x 1024.
const SIZE: usize = 4 << 20;
/// Elements of each.
const LEN: usize = SIZE / size_of::<u32>();
/// Rounds of a pair.
const ROUNDS: u32 = 7;

/// Measures the row of this group.
pub(super) fn run(device: &Device, pairs: u32) -> Result<Row> {
    let mut ours = Ours::new(device)?;
    let mut floor = FirstLaunch::prepare(SIZE)?;
    let mut rounds = vec![];
    one_round(0, &mut ours, &mut floor)?; // does not count
    for number in 0..pairs * ROUNDS {
        rounds.push(one_round(number, &mut ours, &mut floor)?);
    }
    let goal = 1.6; // no requirement
    Ok(Measure { name: "first_launch_4k", unit: "us", work: 1.0, goal }.row_of(&pairs_of(&rounds)))
}

/// What launches took beyond explicit copies, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Round {
    ours: f64,
    /// By both ways of reading.
    floors: [f64; 2],
}

/// Runs each program once, changing who is first.
fn one_round(number: u32, ours: &mut Ours<'_>, floor: &mut FirstLaunch) -> Result<Round> {
    let ours_first = number.is_multiple_of(2);
    let mut beyond = if ours_first { ours.beyond_explicit(number)? } else { 0.0 };
    let explicit = floor.explicit()?.total();
    let [by_block, at_first] = [floor.launch(Reading::ByBlock)?, floor.launch(Reading::AllAtFirst)?].map(|time| time.total());
    let floors = [by_block, at_first].map(|time| (time.as_secs_f64() - explicit.as_secs_f64()) * 1e6);
    if !ours_first {
        beyond = ours.beyond_explicit(number)?;
    }
    Ok(Round { ours: beyond, floors })
}

/// Medians of the rounds of each pair: of uhmm, and of the way of reading that is the faster one over all rounds.
fn pairs_of(rounds: &[Round]) -> Vec<(f64, f64)> {
    let median = |rounds: &[Round], figure: &dyn Fn(&Round) -> f64| Figure::of(rounds.iter().map(figure)).median;
    let all = [0, 1].map(|way| median(rounds, &|round| round.floors[way]));
    let faster = usize::from(all[1] < all[0]);
    let pair = |rounds| (median(rounds, &|round| round.ours), median(rounds, &|round| round.floors[faster]));
    rounds.chunks(ROUNDS as usize).map(pair).collect()
}

/// uhmm's side: buffers for the explicit program.
struct Ours<'d> {
    device: &'d Device,
    result: Buffer<'d, u32>,
    inputs: [Buffer<'d, u32>; 2],
    groups: usize,
}

/// The kernel: a sum.
fn add(ctx: &Ctx<'_>) {
    let part: u32 = ctx.value(3);
    let result = ctx.out::<u32>(0).chunk(part as usize);
    let from = ctx.group() * part as usize;
    let [a, b] = [1, 2].map(|input| &ctx.inp::<u32>(input)[from..from + result.len()]);
    for ((result, a), b) in result.iter_mut().zip(a).zip(b) {
        *result = a.wrapping_add(*b);
    }
}

impl<'d> Ours<'d> {
    fn new(device: &'d Device) -> Result<Self> {
        let inputs = [device.alloc(LEN)?, device.alloc(LEN)?];
        Ok(Ours { device, result: device.alloc(LEN)?, inputs, groups: device.threads().max(1) })
    }

    /// The elements that each group of the kernel has.
    fn part(&self) -> u32 {
        LEN.div_ceil(self.groups) as u32
    }

    /// What the launch takes beyond explicit copies, in microseconds.
    fn beyond_explicit(&mut self, salt: u32) -> Result<f64> {
        let (launch, explicit) = if salt % 4 < 2 {
            let launch = self.launch(salt)?;
            (launch, self.explicit(salt)?)
        } else {
            let explicit = self.explicit(salt)?;
            (self.launch(salt)?, explicit)
        };
        Ok((launch - explicit) * 1e6)
    }

    /// Seconds of the first launch over fresh arrays and of reading its result.
    fn launch(&mut self, salt: u32) -> Result<f64> {
        let mut arrays = Arrays::fill(salt)?;
        let (result, a, b) = arrays.slices();
        let (kernel, start) = (self.device.stats().kernel_time(), Instant::now());
        self.device.run(&add, self.groups, args![out(result), inp(a), inp(b), self.part()])?;
        read_all(result);
        let taken = start.elapsed();
        check(result, salt)?;
        Ok(self.without_kernel(taken, kernel))
    }

    /// Seconds of the same by explicit copies.
    fn explicit(&mut self, salt: u32) -> Result<f64> {
        let mut arrays = Arrays::fill(salt)?;
        let (result, a, b) = arrays.slices();
        let (part, groups) = (self.part(), self.groups);
        let (kernel, start) = (self.device.stats().kernel_time(), Instant::now());
        let [on_device_a, on_device_b] = &mut self.inputs;
        on_device_a.upload(a)?;
        on_device_b.upload(b)?;
        self.device.run(&add, groups, args![self.result.out(), on_device_a.inp(), on_device_b.inp(), part])?;
        self.result.download(result)?;
        read_all(result);
        let taken = start.elapsed();
        check(result, salt)?;
        Ok(self.without_kernel(taken, kernel))
    }

    /// `taken`, in seconds, less what kernels have run since they had run for `before`.
    fn without_kernel(&self, taken: Duration, before: Duration) -> f64 {
        taken.as_secs_f64() - (self.device.stats().kernel_time() - before).as_secs_f64()
    }
}

/// Three fresh arrays, neighbours as on a heap: each starts 16 bytes into a page, none on a 2 MiB boundary.
struct Arrays {
    mapping: MmapMut,
    start: usize,
}

impl Arrays {
    fn fill(salt: u32) -> Result<Arrays> {
        let mapping = MmapMut::map_anon(3 * (SIZE + PAGE) + 2 * BLOCK)?;
        mapping.advise(Advice::NoHugePage)?;
        let start = mapping.as_ptr().align_offset(BLOCK) + 16 * PAGE;
        let mut arrays = Arrays { mapping, start };
        let (result, a, b) = arrays.slices();
        for (number, ((result, a), b)) in result.iter_mut().zip(a).zip(b).enumerate() {
            (*result, *a, *b) = (u32::MAX, number as u32, salt);
        }
        Ok(arrays)
    }

    /// The result and the inputs.
    fn slices(&mut self) -> (&mut [u32], &mut [u32], &mut [u32]) {
        let (result, rest) = self.mapping[self.start..].split_at_mut(SIZE + PAGE);
        let (a, b) = rest.split_at_mut(SIZE + PAGE);
        (words(result), words(a), words(b))
    }
}

fn words(bytes: &mut [u8]) -> &mut [u32] {
    bytemuck::cast_slice_mut(&mut bytes[16..16 + SIZE])
}

/// Whether every element is the sum.
fn check(result: &[u32], salt: u32) -> Result<()> {
    let wrong = result.iter().enumerate().position(|(number, word)| *word != (number as u32).wrapping_add(salt));
    ensure!(wrong.is_none(), "wrong sum in element {} after a launch", wrong.unwrap_or_default());
    Ok(())
}

/// Reads every element.
fn read_all(data: &[u32]) {
    black_box(data.iter().fold(0u32, |sum, word| sum.wrapping_add(*word)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_has_the_medians_of_its_rounds_and_of_the_faster_reading() {
        let round = |ours: f64, floors| Round { ours, floors };
        let mut rounds = vec![round(10.0, [7.0, 5.0]); ROUNDS as usize];
        rounds.extend(vec![round(20.0, [9.0, 6.0]); ROUNDS as usize]);
        rounds[0] = round(900.0, [1.0, 900.0]);
        assert_eq!(pairs_of(&rounds), [(10.0, 5.0), (20.0, 6.0)]);
        rounds.extend(vec![round(30.0, [2.0, 9.0]); 2 * ROUNDS as usize]);
        assert_eq!(pairs_of(&rounds)[2], (30.0, 2.0));
    }

    #[test]
    fn arrays_are_ordinary_ones() {
        let mut arrays = Arrays::fill(3).unwrap();
        let (result, a, b) = arrays.slices();
        for array in [&*result, a, b] {
            assert_eq!((array.as_ptr() as usize % PAGE, array.len()), (16, LEN));
        }
        assert_eq!((a[7], b[7]), (7, 3));
        assert!(check(result, 3).is_err());
    }
}
