//! What lies beside leased bytes, on pages that a lease covers in part, while kernels run that may follow pointers there.
//!
//! A lease has a snapshot of such a page for as long as it lasts ([`crate::snapshot`]), and the CPU goes on with its own. A kernel on the same device that follows a pointer
//! to other bytes of the page finds the snapshot. So before each launch those bytes are brought up to date in it, and after each launch what the kernel has
//! changed there is written to the program, as for snapshots of its own.

use crate::core::{Core, Device};
use crate::driver::DmaError;
use crate::error::Error;
use crate::flight::{Bytes, Flight};
use crate::snapshot;
use uhmm_os::PAGE;

fn may_follow(dev: &Device) -> bool {
    let info = dev.driver.info();
    info.capabilities.replayable_faults && !info.capabilities.coherent && dev.flights.has_lease()
}

/// A launch is going to run. The caller holds `prepare`, and nothing runs.
///
/// # Errors
/// If the device does not take the bytes.
pub(crate) fn refresh(core: &Core, dev: &Device) -> Result<(), Error> {
    if !may_follow(dev) {
        return Ok(());
    }
    let mut result = Ok(());
    dev.flights.leased_edges(|page, leased| {
        gaps(leased, |start, end| {
            let refreshed = snapshot::refresh_range(core, dev, &Flight::none(), page + start, page + end);
            result = core::mem::replace(&mut result, Ok(())).and(refreshed);
        });
    });
    result.map_err(|e| dev.copy_failed(e))
}

/// A launch has run. The caller holds `prepare`.
///
/// # Errors
/// Why some of what the kernel has written could not be written to the program: the first reason.
pub(crate) fn finish(core: &Core, dev: &Device, success: bool) -> Result<(), DmaError> {
    if !may_follow(dev) {
        return Ok(());
    }
    let mut result = Ok(());
    dev.flights.leased_edges(|page, leased| {
        result = result.and(snapshot::write_beside(core, dev, page, &|byte| has(leased, byte), success));
    });
    result
}

fn has(set: &Bytes, byte: usize) -> bool {
    set[byte / 64] >> (byte % 64) & 1 != 0
}

/// Calls `f` with the runs of bytes of a page that are not in the set.
fn gaps(set: &Bytes, mut f: impl FnMut(usize, usize)) {
    let mut at = 0;
    while at < PAGE {
        let end = (at..PAGE).find(|&byte| has(set, byte) != has(set, at)).unwrap_or(PAGE);
        if !has(set, at) {
            f(at, end);
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_nobody_has_leased() {
        let mut set = [0u64; PAGE / 64];
        let found = |set: &Bytes| {
            let mut found = vec![];
            gaps(set, |start, end| found.push((start, end)));
            found
        };
        assert_eq!(found(&set), [(0, PAGE)]);
        (100..200).chain(4000..PAGE).for_each(|byte| set[byte / 64] |= 1 << (byte % 64));
        assert_eq!(found(&set), [(0, 100), (200, 4000)]);
        assert_eq!(found(&[u64::MAX; PAGE / 64]), []);
    }
}
