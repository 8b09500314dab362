//! Whole ranges to the device and home again without allocating a page, and the return of pages whose copy was kept.
//!
//! Out: the program's pages are moved to staging, copied to device pages, and those moved into the window where the device sees
//! them. Home: out of the window, copied into the staging pages, and those moved into the program. After a run everything lies where
//! it lay before, so the next run needs no preparation.

use crate::Result;
use crate::copy::stream;
use crate::memory::{BLOCK, Pages, Region};
use crate::uffd::Uffd;
use std::time::{Duration, Instant};

/// How long each way of a round trip took.
#[derive(Clone, Copy, Debug)]
pub struct RoundTripTime {
    /// From the program to where the device sees it.
    pub to_device: Duration,
    /// From there to where the program sees it.
    pub home: Duration,
}

/// The floor of `migrate_to_device` and `migrate_home`.
#[derive(Debug)]
pub struct RoundTrip {
    // Descriptors first: they are closed before the regions they watch are unmapped.
    host_uffd: Uffd,
    window_uffd: Uffd,
    host: Region,
    staging: Region,
    device: Region,
    window: Region,
    salt: u8,
}

impl RoundTrip {
    /// Maps, touches and registers everything.
    ///
    /// # Errors
    /// If `size`, in bytes, is not a positive multiple of 2 MiB, memory is short, or there is no right to use userfaultfd.
    pub fn prepare(size: usize, pages: Pages) -> Result<Self> {
        let floor = RoundTrip {
            host_uffd: Uffd::open(false)?,
            window_uffd: Uffd::open(false)?,
            host: Region::full(size, pages)?,
            staging: Region::empty(size, pages)?,
            device: Region::full(size, pages)?,
            window: Region::empty(size, pages)?,
            salt: 0,
        };
        floor.host_uffd.watch(&floor.host)?;
        floor.host_uffd.watch(&floor.staging)?;
        floor.window_uffd.watch(&floor.window)?;
        floor.window_uffd.watch(&floor.device)?;
        Ok(floor)
    }

    /// Goes there and back once.
    ///
    /// # Errors
    /// If the kernel refuses to move a page, or wrong bytes come home.
    pub fn run(&mut self) -> Result<RoundTripTime> {
        let size = self.host.size();
        self.salt = self.salt.wrapping_add(1);
        self.host.mark(self.salt);
        let start = Instant::now();
        self.host_uffd.move_region(&self.staging, &self.host)?;
        // SAFETY: staging has just received the host's pages, and the device's memory is whole; nobody else has either address.
        unsafe { stream(self.device.at(0), self.staging.at(0), size) };
        self.window_uffd.move_region(&self.window, &self.device)?;
        let to_device = start.elapsed();
        self.window.check(0, size, self.salt)?;
        self.salt = self.salt.wrapping_add(1);
        self.window.mark(self.salt);
        let start = Instant::now();
        self.window_uffd.move_region(&self.device, &self.window)?;
        // SAFETY: the device's pages have just come back from the window, staging still has its own.
        unsafe { stream(self.staging.at(0), self.device.at(0), size) };
        self.host_uffd.move_region(&self.host, &self.staging)?;
        let home = start.elapsed();
        self.host.check(0, size, self.salt)?;
        Ok(RoundTripTime { to_device, home })
    }
}

/// The floor of bringing back pages whose old copy was kept: a move, nothing is copied.
#[derive(Debug)]
pub struct CleanReturn {
    uffd: Uffd,
    host: Region,
    staging: Region,
    salt: u8,
}

impl CleanReturn {
    /// Maps, touches and registers everything.
    ///
    /// # Errors
    /// As for [`RoundTrip::prepare`].
    pub fn prepare(size: usize, pages: Pages) -> Result<Self> {
        let floor = CleanReturn {
            uffd: Uffd::open(false)?,
            host: Region::empty(size, pages)?,
            staging: Region::full(size, pages)?,
            salt: 0,
        };
        floor.uffd.watch(&floor.host)?;
        floor.uffd.watch(&floor.staging)?;
        Ok(floor)
    }

    /// Brings all of it back, 2 MiB at a time.
    ///
    /// # Errors
    /// If the kernel refuses to move a page, or wrong bytes come home.
    pub fn run(&mut self) -> Result<Duration> {
        let size = self.host.size();
        self.salt = self.salt.wrapping_add(1);
        self.staging.mark(self.salt);
        let start = Instant::now();
        for at in (0..size).step_by(BLOCK) {
            // SAFETY: both lie in regions of this floor, and the staging pages are spare copies.
            unsafe {
                self.uffd
                    .move_pages(self.host.at(at), self.staging.at(at), BLOCK)
            }
            .map_err(|errno| crate::Error::of("UFFDIO_MOVE", errno))?;
        }
        let taken = start.elapsed();
        self.host.check(0, size, self.salt)?;
        self.uffd.move_region(&self.staging, &self.host)?;
        Ok(taken)
    }
}
