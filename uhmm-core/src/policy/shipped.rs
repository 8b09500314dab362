//! The policies that come with uhmm.

use super::*;

/// The first policy: a launch moves what it declares; a device fault brings the block; a lone CPU touch brings a leaf of 64 KiB, a
/// second one in the same block or a stream brings the rest of the block, and a stream brings what follows it. When a device is full, the least recently used
/// block goes. What the program has advised is followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Declared;

impl Policy for Declared {}

/// A launch moves nothing: what its kernel touches comes, by device faults. The rest is as with [`Declared`], also all of it on a device without replayable faults.
///
/// For kernels that touch little of what they declare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnDemand;

impl Policy for OnDemand {
    fn launch(&self, _: &Declaration) -> Prepare {
        Prepare { place: Placement::OnTouch, pin: false }
    }
}

/// What a launch declares stays with the program: what is read is on both sides, of what is written the kernel has a copy for this one launch.
///
/// What a kernel touches without having declared it moves, page by page, for a copy would not stay the same as the CPU's. For memory that shall never leave, whoever touches it,
/// there is [`Advice::NoMigrate`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NeverMigrate;

impl Policy for NeverMigrate {
    fn launch(&self, declared: &Declaration) -> Prepare {
        let place = if declared.access == Access::In && !declared.coherent { Placement::Duplicate } else { Placement::Map };
        Prepare { place, pin: false }
    }

    fn device_fault(&self, fault: &DeviceFault) -> Fetch {
        Fetch { pages: Bits::one(fault.page), ..Fetch::default() }
    }
}

pub(super) fn launch(declared: &Declaration) -> Prepare {
    let shared = match declared.access {
        Access::In => true,
        Access::InOut => declared.advice.read_mostly(),
        Access::Out => false,
    };
    Prepare { place: if shared { Placement::Duplicate } else { Placement::Move }, pin: false }
}

pub(super) fn device_fault(fault: &DeviceFault) -> Fetch {
    Fetch { pages: Bits::ALL, duplicate: fault.advice.read_mostly() && !fault.write, ..Fetch::default() }
}

pub(super) fn cpu_fault(fault: &CpuFault) -> Return {
    let duplicate = fault.advice.read_mostly() && !fault.write;
    let preferred = fault.advice.preferred();
    if preferred == Some(Location::Device(fault.device)) {
        return Return { pages: Bits::one(fault.page), duplicate, ahead: 0 };
    }
    // Twice as many after each block that proved right.
    let ahead = if fault.stream == 0 { 0 } else { (1 << fault.stream.min(8)).min(MOST_AHEAD) };
    if fault.huge || fault.stream > 0 || fault.faults_in_block > 0 || preferred == Some(Location::Home) {
        return Return { pages: Bits::ALL, duplicate, ahead };
    }
    let start = fault.page / LEAF * LEAF;
    Return { pages: Bits::range(start..(start + LEAF).min(PAGES)), duplicate, ahead }
}
