//! Devices that cannot copy from each other, and copies that fail: a soft device whose driver says and does otherwise in just that.

use crate::harness::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use uhmm::Error;
use uhmm_core::args::Args;
use uhmm_core::driver::{self, DeviceInfo, Dma, DmaError, DmaKind, Driver, Fence, Forward};
use uhmm_core::kernel::{Entry, Grid};
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::residency::Place;
use uhmm_core::{CoreRef, DeviceConfig, DeviceRef};
use uhmm_os::Errno;

crate::tests![peers_that_cannot_read_each_other_pass_host_pages, a_copy_that_fails_leaves_the_block_where_it_is];

/// Copies from a peer fail, while this is set.
static FAILS: AtomicBool = AtomicBool::new(false);

/// A soft device that reads no peer, or whose copies from a peer can be made to fail.
#[derive(Debug)]
struct Other {
    soft: OwnBox<dyn Driver>,
    info: DeviceInfo,
}

fn reads_none(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    wrap(config, mode, others, false)
}

fn reads_and_fails(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    wrap(config, mode, others, true)
}

fn wrap(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo], reads: bool) -> Result<OwnBox<dyn Driver>, Error> {
    let soft = uhmm_soft::open(config, mode, others)?;
    let mut info = soft.info().clone();
    info.capabilities.reads_peers = reads;
    driver::boxed(c"uhmm test device", Other { soft, info }).map_err(|e| Error::System("map memory", e))
}

// SAFETY: all is done by a soft device, but for what this one does not do.
unsafe impl Forward for Other {
    fn inner(&self) -> &dyn Driver {
        &*self.soft
    }

    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError> {
        let done = self.soft.wait(fence, batch, limit);
        let to_device = batch.iter().any(|dma| dma.kind == DmaKind::ToDevice);
        if to_device && FAILS.load(Ordering::Relaxed) { Err(DmaError::Failed(Errno::IO)) } else { done }
    }
}

fn add_one(dev: &DeviceRef, data: &mut [u32]) -> Result<(), Error> {
    dev.run(Entry::new(&increment), Grid::from(groups(data.len())), &Args::new([uhmm::inout(data)]))
}

fn config(name: &'static str) -> DeviceConfig {
    DeviceConfig { memory: 16 << 20, threads: 1, ..DeviceConfig::new(name) }
}

fn peers_that_cannot_read_each_other_pass_host_pages() {
    let core = CoreRef::get().unwrap();
    let soft = core.device(config("soft"), uhmm_soft::open).unwrap();
    let other = core.device(config("other"), reads_none).unwrap();
    for huge in [true, false] {
        let mut pages = Pages::huge(6 << 20);
        let data = pages.slice::<u32>();
        if !huge {
            advise(data, libc::MADV_NOHUGEPAGE);
        }
        for (i, x) in data.iter_mut().enumerate() {
            *x = i as u32;
        }
        add_one(&soft, data).unwrap();
        let before = (soft.stats(), other.stats());
        for _ in 0..3 {
            add_one(&other, data).unwrap();
            assert_eq!(pages_present(data), 0);
            add_one(&soft, data).unwrap();
            assert_eq!(pages_present(data), 0);
        }
        let (from, to) = (soft.stats() - before.0, other.stats() - before.1);
        // One bounce each time: out of the one and into the other, and never into the program.
        assert_eq!((from.bytes_to_cpu, to.bytes_to_device, to.bytes_between_devices), (18 << 20, 18 << 20, 0), "{from:?} {to:?}");
        assert_eq!((from.pages_to_cpu, from.cpu_faults, to.pages_between_devices), (0, 0, 3 * 1536));
        // The soft one reads what the other lets be seen.
        assert_eq!((to.bytes_to_cpu, from.bytes_between_devices), (0, 18 << 20));
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 7), "huge {huge}");
    }
}

fn a_copy_that_fails_leaves_the_block_where_it_is() {
    let core = CoreRef::get().unwrap();
    let soft = core.device(config("soft"), uhmm_soft::open).unwrap();
    let other = core.device(config("other"), reads_and_fails).unwrap();
    let mut pages = Pages::huge(6 << 20);
    let data = pages.slice::<u32>();
    data.fill(1);
    add_one(&soft, data).unwrap();
    let range = data.as_ptr_range();
    let (start, end) = (range.start as usize, range.end as usize);
    for _ in 0..20 {
        FAILS.store(true, Ordering::Relaxed);
        let error = add_one(&other, data).unwrap_err();
        assert!(matches!(error, Error::Driver { .. }), "{error}");
        FAILS.store(false, Ordering::Relaxed);
        let place = core.residency(start, end).unwrap()[0];
        assert_eq!((place.end, place.place), (end, Place::Private { device: "soft" }));
        let before = soft.stats();
        add_one(&soft, data).unwrap();
        assert_eq!((soft.stats() - before).bytes_to_device, 0, "it was there");
    }
    // No frame was lost: all of the memory is to be had.
    let (frame, _) = other.allocate(16 << 20).unwrap();
    other.free(frame, 16 << 20);
    add_one(&other, data).unwrap();
    assert!(data.iter().all(|&x| x == 23));
}
