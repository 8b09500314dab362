//! The kernel of k-means in its two forms, and what a launch of it needs.
//!
//! Points are whole numbers from 0 to 16, centroids multiples of 1/16, and half the square of one a multiple of 1/512: so every number in it is exact in f32, in whatever order a device adds.

use crate::digits::SIDE;
use anyhow::Result;
use uhmm::{Ctx, Device, Forms, Kernel, args, inout, inp, out};

/// The form in OpenCL C; the number of clusters is its macro CLUSTERS, 10 if the compiler gets no option.
pub(crate) const SOURCE: &str = include_str!("k_means.cl");
/// The kernel's name in it.
pub(crate) const NAME: &str = "k_means";
/// Work items of a group, as its macro ITEMS.
pub(crate) const LOCAL: usize = 64;
/// Numbers of a point.
pub(crate) const DIM: usize = SIDE * SIDE;
/// The most clusters: their sums fill the 32 KiB of local memory that every device has.
pub(crate) const MOST_CLUSTERS: usize = 30;
/// The most points of a group: more whole numbers of 16 could add up to what f32 does not hold exactly.
const MOST_PART: usize = 1 << 20;
/// Points that a group looks at together, as the macro TILE.
const TILE: usize = 128;

/// What a launch needs besides its arrays. Its arguments are, in this order, the arrays of [`Round`], the points (inp), the centroids (inp), their halves (inp), and the number `part` as a
/// u32. In OpenCL C the number of points follows, as a ulong (uhmm gives it).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Points.
    pub(crate) points: usize,
    /// Clusters.
    pub(crate) clusters: usize,
    /// Points of a group.
    pub(crate) part: usize,
}

impl Shape {
    /// For a device with so many threads: some groups for each, so that none waits long for another; of whole tiles.
    pub(crate) fn new(points: usize, clusters: usize, threads: usize) -> Shape {
        let part = points.div_ceil(8 * threads.max(1)).next_multiple_of(TILE).min(MOST_PART);
        Shape { points, clusters, part }
    }

    /// Groups of a launch.
    pub(crate) fn groups(self) -> usize {
        self.points.div_ceil(self.part)
    }
}

/// What a round of k-means writes.
pub(crate) struct Round {
    /// For each group (out): the sum of its points, for each cluster.
    pub(crate) sums: Vec<f32>,
    /// For each group (out): the number of its points in each cluster, and how many of its labels have changed.
    pub(crate) counts: Vec<u32>,
    /// For each point (inout): the number of its cluster.
    pub(crate) labels: Vec<u8>,
}

impl Round {
    /// Before the first round: no point has a label.
    pub(crate) fn new(shape: Shape) -> Round {
        let groups = shape.groups();
        Round {
            sums: vec![0.0; groups * shape.clusters * DIM],
            counts: vec![0; groups * (shape.clusters + 1)],
            labels: vec![u8::MAX; shape.points],
        }
    }

    /// How many labels the last round has changed.
    pub(crate) fn changed(&self, shape: Shape) -> u64 {
        self.counts.iter().skip(shape.clusters).step_by(shape.clusters + 1).map(|&changed| u64::from(changed)).sum()
    }
}

/// Centroids, and for each half the square of its length.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Centroids {
    pub(crate) all: Vec<f32>,
    pub(crate) halves: Vec<f32>,
}

impl Centroids {
    /// At some points.
    pub(crate) fn of_points<'a>(points: impl Iterator<Item = &'a [f32]>) -> Centroids {
        Centroids::from_sixteenths(&points.flatten().map(|x| (x * 16.0) as u32).collect::<Vec<_>>())
    }

    /// The bytes of what a launch reads of them.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&self.all[..]) + size_of_val(&self.halves[..])
    }

    /// From sixteenths.
    fn from_sixteenths(sixteenths: &[u32]) -> Centroids {
        let all = sixteenths.iter().map(|&x| x as f32 / 16.0).collect();
        let halves = sixteenths.chunks(DIM).map(|c| c.iter().map(|x| x * x).sum::<u32>() as f32 / 512.0).collect();
        Centroids { all, halves }
    }

    /// The means of what a round has added up, to the nearest sixteenth. A cluster without points stays where it was.
    pub(crate) fn update(&mut self, shape: Shape, round: &Round) {
        let mut sums = vec![0u64; shape.clusters * DIM];
        let mut counts = vec![0u64; shape.clusters];
        for group in round.sums.chunks(shape.clusters * DIM) {
            sums.iter_mut().zip(group).for_each(|(sum, &part)| *sum += part as u64);
        }
        for group in round.counts.chunks(shape.clusters + 1) {
            counts.iter_mut().zip(group).for_each(|(count, &part)| *count += u64::from(part));
        }
        let old = self.all.chunks(DIM).map(|c| c.iter().map(|x| (x * 16.0) as u32).collect::<Vec<_>>());
        let means = old.zip(sums.chunks(DIM)).zip(&counts).flat_map(|((old, sums), &count)| match count {
            0 => old,
            count => sums.iter().map(|sum| ((32 * sum + count) / (2 * count)) as u32).collect(),
        });
        *self = Centroids::from_sixteenths(&means.collect::<Vec<_>>());
    }
}

/// The kernel, in both forms.
pub(crate) fn kernel(clusters: usize) -> Forms<impl Kernel> {
    Forms::new(k_means).opencl(SOURCE, NAME, LOCAL).opencl_options(format!("-DCLUSTERS={clusters}"))
}

/// One round on the device, by ordinary slices.
pub(crate) fn launch(device: &Device, shape: Shape, round: &mut Round, points: &[f32], centroids: &Centroids) -> Result<()> {
    let Round { sums, counts, labels } = round;
    let args = args![out(sums), out(counts), inout(labels), inp(points), inp(&centroids.all), inp(&centroids.halves), shape.part as u32];
    Ok(device.run(&kernel(shape.clusters), shape.groups(), args)?)
}

/// The form in Rust.
fn k_means(ctx: &Ctx<'_>) {
    let (points, centroids, halves) = (ctx.inp::<f32>(3), ctx.inp::<f32>(4), ctx.inp::<f32>(5));
    let (part, clusters) = (ctx.value::<u32>(6) as usize, halves.len());
    let sums = ctx.out::<f32>(0).chunk(clusters * DIM);
    let counts = ctx.out::<u32>(1).chunk(clusters + 1);
    sums.fill(0.0);
    counts.fill(0);
    let labels = ctx.out::<u8>(2).chunk(part);
    let (points, _) = points[ctx.group() * part * DIM..].as_chunks::<DIM>();
    for (label, point) in labels.iter_mut().zip(points) {
        let nearest = nearest(point, centroids, halves);
        counts[clusters] += u32::from(*label != nearest as u8);
        counts[nearest] += 1;
        *label = nearest as u8;
        sums[nearest * DIM..][..DIM].iter_mut().zip(point).for_each(|(sum, x)| *sum += x);
    }
}

/// The first of the nearest centroids.
fn nearest(point: &[f32; DIM], centroids: &[f32], halves: &[f32]) -> usize {
    const LANES: usize = 16;
    let mut best = (f32::NEG_INFINITY, 0);
    for (j, (c, half)) in centroids.as_chunks::<DIM>().0.iter().zip(halves).enumerate() {
        let mut lanes = [0.0; LANES];
        for (x, c) in point.as_chunks::<LANES>().0.iter().zip(c.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                lanes[i] += x[i] * c[i];
            }
        }
        let score = lanes.iter().sum::<f32>() - half;
        if score > best.0 {
            best = (score, j);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_rounded_to_sixteenths_and_empty_clusters_stay() {
        let shape = Shape { points: 5, clusters: 2, part: 3 };
        let mut centroids = Centroids::from_sixteenths(&[[5; DIM], [7; DIM]].concat());
        assert_eq!((centroids.all[0], centroids.halves[1]), (5.0 / 16.0, 64.0 * 49.0 / 512.0));
        // Two groups: five points of cluster 1, whose first pixels add up to 3 and 4.
        let mut round = Round::new(shape);
        (round.sums[DIM], round.sums[3 * DIM]) = (3.0, 4.0);
        round.counts = vec![0, 3, 3, 0, 2, 1];
        centroids.update(shape, &round);
        assert_eq!((centroids.all[0], centroids.all[DIM], centroids.all[DIM + 1]), (5.0 / 16.0, 22.0 / 16.0, 0.0)); // 22.4 sixteenths
        assert_eq!(round.changed(shape), 4);
    }

    /// The local memory that every OpenCL device has is 32 KiB: sums of all clusters four times over, the labels of a tile and the changes of all items.
    #[test]
    fn the_most_clusters_fit_local_memory() {
        const { assert!(4 * 4 * MOST_CLUSTERS * DIM + 4 * TILE + 4 * LOCAL <= 32 << 10) };
        for define in [format!("DIM {DIM}"), format!("ITEMS {LOCAL}"), format!("TILE {TILE}")] {
            assert!(SOURCE.contains(&format!("#define {define}\n")), "{define}");
        }
    }
}
