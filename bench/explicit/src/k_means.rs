//! k-means: the points go there once, centroids for each round; the sums of each round come back, and the labels after the last.
#![allow(unsafe_code)] // kernels stay within their buffers by what they are given

use crate::Buffers;
use crate::cl::{Buffer, Cl, Kernel, Result};

/// The kernel.
pub const SOURCE: &str = include_str!("../../../cli/src/k_means/k_means.cl");

/// The sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Points, and numbers of one.
    pub points: [usize; 2],
    /// Clusters: as many as the kernel has by itself.
    pub clusters: usize,
    /// Points of a group.
    pub part: usize,
    /// Work items of a group.
    pub local: usize,
}

impl Sizes {
    fn groups(self) -> usize {
        self.points[0].div_ceil(self.part)
    }
}

struct All<'c> {
    sums: Buffer<'c, f32>,
    counts: Buffer<'c, u32>,
    labels: Buffer<'c, u8>,
    points: Buffer<'c, f32>,
    centroids: Buffer<'c, f32>,
    halves: Buffer<'c, f32>,
}

/// The program.
pub struct KMeans<'c> {
    cl: &'c Cl,
    kernel: Kernel<'c>,
    buffers: Option<All<'c>>,
    how: Buffers,
    sizes: Sizes,
}

impl<'c> KMeans<'c> {
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, how: Buffers, sizes: Sizes) -> Result<Self> {
        Ok(KMeans { cl, kernel: cl.kernel(SOURCE, "k_means")?, buffers: None, how, sizes })
    }

    fn make(&self) -> Result<All<'c>> {
        let (cl, Sizes { points: [points, dim], clusters, .. }, groups) = (self.cl, self.sizes, self.sizes.groups());
        Ok(All {
            sums: cl.buffer(groups * clusters * dim)?,
            counts: cl.buffer(groups * (clusters + 1))?,
            labels: cl.buffer(points)?,
            points: cl.buffer(points * dim)?,
            centroids: cl.buffer(clusters * dim)?,
            halves: cl.buffer(clusters)?,
        })
    }

    /// Sends the points and their first labels.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn begin(&mut self, points: &[f32], labels: &[u8]) -> Result<()> {
        let all = match self.buffers.take().filter(|_| self.how == Buffers::Reused) {
            Some(all) => all,
            None => self.make()?,
        };
        // SAFETY: both are borrowed until they have been copied.
        let sent = unsafe { all.points.write(0, points).and_then(|()| all.labels.write(0, labels)) };
        self.buffers = Some(all);
        sent.and(self.cl.finish())
    }

    /// One round: sums and counts of each group.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// Before [`begin`](Self::begin).
    pub fn round(&mut self, sums: &mut [f32], counts: &mut [u32], centroids: &[f32], halves: &[f32]) -> Result<()> {
        let (Some(all), Sizes { points, part, local, .. }) = (&self.buffers, self.sizes) else { panic!("the points are not there yet") };
        let args = [
            all.sums.arg(),
            all.counts.arg(),
            all.labels.arg(),
            all.points.arg(),
            all.centroids.arg(),
            all.halves.arg(),
            (part as u32).into(),
            (points[0] as u64).into(),
        ];
        // SAFETY: what is sent is borrowed until the sums have been read, which waits for all of it; these are the kernel's parameters, and it stays within the sizes.
        let sent = unsafe {
            all.centroids
                .write(0, centroids)
                .and_then(|()| all.halves.write(0, halves))
                .and_then(|()| self.kernel.enqueue(&args, [self.sizes.groups(), 1], [local, 1]))
        };
        sent.and_then(|()| all.sums.read(0, sums)).and_then(|()| all.counts.read(0, counts)).or_else(|e| self.cl.finish().and(Err(e)))
    }

    /// Fetches the labels.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn labels(&mut self, labels: &mut [u8]) -> Result<()> {
        self.buffers.as_ref().map_or(Ok(()), |all| all.labels.read(0, labels))
    }
}
