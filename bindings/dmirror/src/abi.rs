//! The interface's numbers and its struct.

use crate::device::DEVICES;
use uhmm_core::port::{Owner, Place, PortError, Sight};
use uhmm_os::{Errno, PAGE};

/// What can be asked of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum What {
    Read = 0xC028_4800,
    Write,
    MigrateToDevice,
    MigrateToSystem,
    Snapshot,
    Exclusive,
    CheckExclusive,
    Release,
    Flags,
    ReadUnlocked,
}

/// Which way a command's buffer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    /// From the program.
    In,
    /// To the program, if all went well.
    Out,
    /// There is none.
    None,
}

impl What {
    pub(crate) fn of(request: u32) -> Option<What> {
        use What::*;
        [Read, Write, MigrateToDevice, MigrateToSystem, Snapshot, Exclusive, CheckExclusive, Release, Flags, ReadUnlocked]
            .into_iter()
            .find(|&what| what as u32 == request)
    }

    /// Which way its buffer goes, and how long it is for so many pages.
    pub(crate) fn buffer(self, npages: u64) -> (Flow, usize) {
        let data = npages as usize * PAGE;
        match self {
            What::Write => (Flow::In, data),
            What::Read | What::ReadUnlocked | What::MigrateToDevice | What::Exclusive => (Flow::Out, data),
            What::Snapshot => (Flow::Out, npages as usize),
            What::MigrateToSystem | What::CheckExclusive | What::Release | What::Flags => (Flow::None, 0),
        }
    }

    /// What comes of it if the process whose memory it is about has ended.
    pub(crate) fn of_the_dead(self) -> Result<Done, Errno> {
        match self {
            What::Read | What::ReadUnlocked | What::Write => Err(Errno::FAULT),
            What::MigrateToDevice | What::MigrateToSystem | What::Snapshot | What::Exclusive => Err(Errno::INVAL),
            What::CheckExclusive | What::Release | What::Flags => Ok(Done::default()),
        }
    }
}

/// The outputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Done {
    pub(crate) cpages: u64,
    pub(crate) faults: u64,
}

/// The struct.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Command {
    pub(crate) addr: u64,
    pub(crate) ptr: u64,
    pub(crate) npages: u64,
    pub(crate) done: Done,
}

impl Command {
    /// Its bytes.
    pub(crate) const LEN: usize = 40;

    pub(crate) fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let mut words = [0; 5];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let [addr, ptr, npages, cpages, faults] = words;
        Command { addr, ptr, npages, done: Done { cpages, faults } }
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let words = [self.addr, self.ptr, self.npages, self.done.cpages, self.done.faults];
        for (bytes, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_ne_bytes();
        }
        bytes
    }

    /// Whether its range is one.
    pub(crate) fn check(&self) -> Result<(), Errno> {
        let aligned = self.addr.is_multiple_of(PAGE as u64);
        let end = self.npages.checked_mul(PAGE as u64).and_then(|len| self.addr.checked_add(len));
        if aligned && end.is_some_and(|end| end > self.addr) { Ok(()) } else { Err(Errno::INVAL) }
    }
}

/// The owner of a device's memory.
pub(crate) fn owner(device: u8) -> Owner {
    Owner { number: device + 1, coherent: coherent(device) }
}

/// Whether a device is coherent.
pub(crate) fn coherent(device: u8) -> bool {
    device >= DEVICES / 2
}

/// The error number of a port's error.
pub(crate) fn errno(error: &PortError) -> Errno {
    match error {
        PortError::Fault { .. } => Errno::FAULT,
        PortError::Denied { .. } => Errno::PERM,
        PortError::Busy => Errno::BUSY,
        PortError::Unfit { .. } => Errno::INVAL,
        PortError::Missing { .. } => Errno::NOENT,
        PortError::NotAnonymous { .. } => Errno::OPNOTSUPP,
        PortError::System(errno) => *errno,
    }
}

/// A permission byte.
pub(crate) fn permission(sight: &Sight) -> u8 {
    if sight.error {
        return 0xff;
    }
    let access = match (sight.read, sight.write) {
        (_, true) => 0x02,
        (true, false) => 0x01,
        (false, false) => return 0,
    };
    let place = match sight.place {
        Place::System if sight.zero && !sight.huge => 0x10,
        Place::System => 0,
        Place::Private => 0x20,
        Place::Coherent => 0x40,
        Place::OtherCoherent => 0x50,
    };
    access | place | if sight.huge { 0x04 } else { 0 } | if sight.giant { 0x08 } else { 0 }
}
