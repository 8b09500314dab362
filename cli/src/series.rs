//! A series of launches over the same memory: how long each took, and what moved from before the first until the CPU had its results.

use crate::report::{Figure, bytes, time};
use anyhow::Result;
use serde::Serialize;
use std::time::{Duration, Instant};
use uhmm::{Device, Stats};

/// A series that goes on.
pub(crate) struct Series<'d> {
    device: &'d Device,
    before: Stats,
    times: Vec<Duration>,
    kernels: Vec<Duration>,
    /// What explicit copies of every launch's arguments, there and back, would have moved.
    copied: u64,
}

impl<'d> Series<'d> {
    /// Begins one of at most so many launches.
    pub(crate) fn new(device: &'d Device, most: usize) -> Self {
        // Room for all, so that noting a time allocates nothing between two launches.
        let [times, kernels] = [(); 2].map(|()| Vec::with_capacity(most));
        Series { device, before: device.stats(), times, kernels, copied: 0 }
    }

    /// Runs a launch whose arguments have so many bytes, each range counted once for each direction in which its contents matter.
    pub(crate) fn launch(&mut self, bytes: usize, launch: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.device.stats();
        let start = Instant::now();
        launch()?;
        self.times.push(start.elapsed());
        self.kernels.push((self.device.stats() - before).kernel_time());
        self.copied += bytes as u64;
        Ok(())
    }

    /// Ends it, when the CPU has read what it wants.
    pub(crate) fn end(self) -> Measured {
        let moved = self.device.stats() - self.before;
        let ([first, later @ ..], [first_kernel, later_kernels @ ..]) = (&self.times[..], &self.kernels[..]) else {
            return Measured::default();
        };
        Measured {
            launches: self.times.len(),
            first_s: first.as_secs_f64(),
            first_kernel_s: first_kernel.as_secs_f64(),
            later_s: (!later.is_empty()).then(|| Figure::of_times(later)),
            later_kernel_s: (!later.is_empty()).then(|| Figure::of_times(later_kernels)),
            bytes_to_device: moved.bytes_to_device,
            bytes_to_cpu: moved.bytes_to_cpu,
            cpu_faults: moved.cpu_faults,
            device_faults: moved.device_faults,
            copied_bytes: self.copied,
        }
    }
}

/// What came of it: times in seconds.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Measured {
    /// Launches.
    pub(crate) launches: usize,
    /// The first, which brings the data, and for which the kernel may be compiled.
    first_s: f64,
    /// The kernel's own time in it.
    first_kernel_s: f64,
    /// The others.
    later_s: Option<Figure>,
    later_kernel_s: Option<Figure>,
    bytes_to_device: u64,
    bytes_to_cpu: u64,
    cpu_faults: u64,
    device_faults: u64,
    /// What copies of all arguments around every launch would have moved.
    copied_bytes: u64,
}

impl Measured {
    pub(crate) fn text(&self) -> String {
        let figure = |figure: Figure| format!("{} ({} to {})", time(figure.median), time(figure.low), time(figure.high));
        let later = self
            .later_s
            .zip(self.later_kernel_s)
            .map_or(String::new(), |(whole, kernel)| format!("; the others in {}, the kernel in {}", figure(whole), figure(kernel)));
        let launches = if self.launches == 1 { "launch" } else { "launches" };
        format!(
            "  {} {launches}: the first in {}, the kernel in {}{later}\n  \
             uhmm moved {} to the device and {} to the CPU, with {} CPU faults and {} device faults; copies around every launch: {}\n",
            self.launches,
            time(self.first_s),
            time(self.first_kernel_s),
            bytes(self.bytes_to_device),
            bytes(self.bytes_to_cpu),
            self.cpu_faults,
            self.device_faults,
            bytes(self.copied_bytes)
        )
    }
}
