//! Whole ranges to the device and home again without allocating a page, and the return of pages whose copy was kept.
//!
//! Out: the program's pages are moved to staging, copied to device pages, and those moved into the window where the device sees
//! them. Home: out of the window, copied into the staging pages, and those moved into the program. After a run everything lies where
//! it lay before, so the next run needs no preparation.

use crate::copy::stream;
use crate::memory::{BLOCK, Pages, Region};
use crate::pair::together;
use crate::uffd::Uffd;
use crate::{Error, Result};
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
    threads: usize,
    salt: u8,
}

impl RoundTrip {
    /// Maps, touches and registers everything; `pages` are the program's. `threads` is 1, or 2: each then does all of the work for its half.
    ///
    /// # Errors
    /// If `size`, in bytes, is not a positive multiple of 2 MiB, memory is short, or there is no right to use userfaultfd.
    ///
    /// # Panics
    /// If `threads` is neither 1 nor 2.
    pub fn prepare(size: usize, pages: Pages, threads: usize) -> Result<Self> {
        assert!(threads == 1 || threads == 2, "a round trip is made by one thread or by two, not by {threads}");
        let floor = RoundTrip {
            host_uffd: Uffd::open(false)?,
            window_uffd: Uffd::open(false)?,
            host: Region::full(size, pages)?,
            staging: Region::empty(size, pages)?,
            // The device's own memory has huge pages whatever the program's has: nobody could do it faster with small ones.
            device: Region::full(size, Pages::Huge)?,
            window: Region::empty(size, Pages::Huge)?,
            threads,
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
        let to_device = self.by_threads(Self::to_device)?;
        self.window.check(0, size, self.salt)?;
        self.salt = self.salt.wrapping_add(1);
        self.window.mark(self.salt);
        let home = self.by_threads(Self::home)?;
        self.host.check(0, size, self.salt)?;
        Ok(RoundTripTime { to_device, home })
    }

    /// Does one way for all of the range.
    fn by_threads(&self, way: fn(&Self, usize, usize) -> Result<()>) -> Result<Duration> {
        let size = self.host.size();
        if self.threads == 2 {
            let half = (size / 2).next_multiple_of(BLOCK);
            return together(|| way(self, 0, half), || way(self, half, size - half));
        }
        let start = Instant::now();
        way(self, 0, size)?;
        Ok(start.elapsed())
    }

    /// `len` bytes from byte `at` to where the device sees them.
    fn to_device(&self, at: usize, len: usize) -> Result<()> {
        let (host, staging) = (self.host.at(at), self.staging.at(at));
        let (device, window) = (self.device.at(at), self.window.at(at));
        // SAFETY: the same part of four regions of this floor, which no other thread works on. Staging has the host's pages when it
        // is read, and the device's memory is whole.
        unsafe {
            self.host_uffd.move_pages(staging, host, len).map_err(refused)?;
            stream(device, staging, len);
            self.window_uffd.move_pages(window, device, len).map_err(refused)
        }
    }

    /// `len` bytes from byte `at` back to where the program sees them.
    fn home(&self, at: usize, len: usize) -> Result<()> {
        let (host, staging) = (self.host.at(at), self.staging.at(at));
        let (device, window) = (self.device.at(at), self.window.at(at));
        // SAFETY: as above; the device's pages have come back from the window when they are read, staging still has its own.
        unsafe {
            self.window_uffd.move_pages(device, window, len).map_err(refused)?;
            stream(staging, device, len);
            self.host_uffd.move_pages(host, staging, len).map_err(refused)
        }
    }
}

fn refused(errno: i32) -> Error {
    Error::of("UFFDIO_MOVE", errno)
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
        let floor =
            CleanReturn { uffd: Uffd::open(false)?, host: Region::empty(size, pages)?, staging: Region::full(size, pages)?, salt: 0 };
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
            unsafe { self.uffd.move_pages(self.host.at(at), self.staging.at(at), BLOCK) }.map_err(refused)?;
        }
        let taken = start.elapsed();
        self.host.check(0, size, self.salt)?;
        self.uffd.move_region(&self.staging, &self.host)?;
        Ok(taken)
    }
}
