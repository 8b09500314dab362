//! A policy that writes down what another one decides.

use super::*;
use crate::error::Error;
use crate::own::OwnSlice;
use crate::sync::*;

/// Asks another policy and keeps what it has answered, in memory that never migrates: the first decisions one by one, and the totals of all.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm_core::Error> {
/// # let core = uhmm_core::CoreRef::get()?;
/// use uhmm_core::policy::{Declared, Recording};
/// let recording = core.set_policy(Recording::new(Declared, 1000)?)?;
/// // launches, touches
/// for record in recording.records() {
///     println!("{record:?}");
/// }
/// println!("{:?}", recording.totals());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Recording<P> {
    inner: P,
    /// Three words each: see `Record::pack`. The first is written last, and not 0.
    words: OwnSlice<AtomicU64>,
    next: AtomicUsize,
    totals: [AtomicU64; 5],
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Where a part of a block that a launch declares is to be ([`Policy::launch`]).
    Launch(Placement),
    /// What a device's touch brings ([`Policy::device_fault`]).
    Fetch {
        /// On both sides.
        duplicate: bool,
        /// Blocks behind it that come too.
        ahead: usize,
    },
    /// What a CPU's touch brings home ([`Policy::cpu_fault`]).
    Return {
        /// The device keeps its copies.
        duplicate: bool,
        /// Blocks that follow.
        ahead: usize,
    },
    /// Which block leaves a full device ([`Policy::evict`]).
    Evict,
}

/// One decision, as the policy answered: what came of it may be less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// What.
    pub decision: Decision,
    /// The device's number.
    pub device: u32,
    /// The touched address, the first of what a launch declares, or the block that leaves.
    pub address: Va,
    /// Pages that the answer names, or that were asked about.
    pub pages: usize,
    /// Whether it was a write, or will be.
    pub write: bool,
    /// Whether the policy has pinned the block.
    pub pin: bool,
}

/// How often a policy was asked what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Parts of blocks that launches declare.
    pub launches: u64,
    /// Touches by devices.
    pub device_faults: u64,
    /// Touches by the CPU.
    pub cpu_faults: u64,
    /// Full devices.
    pub evictions: u64,
    /// Of all these, those that found no room among the records.
    pub not_kept: u64,
}

const WORDS: usize = 3;
const PLACES: [Placement; 4] = [Placement::Move, Placement::Duplicate, Placement::Map, Placement::OnTouch];

impl Record {
    fn pack(self) -> [u64; WORDS] {
        let (kind, detail, duplicate) = match self.decision {
            Decision::Launch(place) => (1, PLACES.iter().position(|&known| known == place).unwrap_or(0), false),
            Decision::Fetch { duplicate, ahead } => (2, ahead, duplicate),
            Decision::Return { duplicate, ahead } => (3, ahead, duplicate),
            Decision::Evict => (4, 0, false),
        };
        let flags = u64::from(self.write) | u64::from(self.pin) << 1 | u64::from(duplicate) << 2;
        [kind | flags << 8 | (detail as u64 & 0xffff) << 16 | u64::from(self.device) << 32, self.address as u64, self.pages as u64]
    }

    fn unpack([head, address, pages]: [u64; WORDS]) -> Option<Self> {
        let (detail, duplicate) = ((head >> 16 & 0xffff) as usize, head >> 10 & 1 != 0);
        let decision = match head & 0xff {
            1 => Decision::Launch(*PLACES.get(detail)?),
            2 => Decision::Fetch { duplicate, ahead: detail },
            3 => Decision::Return { duplicate, ahead: detail },
            4 => Decision::Evict,
            _ => return None,
        };
        let (write, pin) = (head >> 8 & 1 != 0, head >> 9 & 1 != 0);
        Some(Record { decision, device: (head >> 32) as u32, address: address as usize, pages: pages as usize, write, pin })
    }
}

impl<P: Policy> Recording<P> {
    /// Records what `inner` decides, the first `room` decisions one by one.
    ///
    /// # Errors
    /// [`Error::System`] if there is no address space for them.
    pub fn new(inner: P, room: usize) -> Result<Self, Error> {
        let words = OwnSlice::new(c"uhmm record", room.saturating_mul(WORDS));
        let words = words.map_err(|e| Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e))?;
        Ok(Recording { inner, words, next: AtomicUsize::new(0), totals: Default::default() })
    }

    /// The policy that decides.
    pub fn inner(&self) -> &P {
        &self.inner
    }

    /// What was decided so far, the first first. A decision that is just being written down ends it.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        self.words.chunks_exact(WORDS).map_while(|words| {
            let head = words[0].load(Ordering::Acquire);
            Record::unpack([head, words[1].load(Ordering::Relaxed), words[2].load(Ordering::Relaxed)])
        })
    }

    /// How often it was asked.
    pub fn totals(&self) -> Totals {
        let [launches, device_faults, cpu_faults, evictions, not_kept] =
            [0, 1, 2, 3, 4].map(|kind| self.totals[kind].load(Ordering::Relaxed));
        Totals { launches, device_faults, cpu_faults, evictions, not_kept }
    }

    fn write(&self, kind: usize, record: Record) {
        self.totals[kind].fetch_add(1, Ordering::Relaxed);
        let slot = self.next.load(Ordering::Relaxed);
        let room = self.words.len() / WORDS;
        // Not counted beyond the end, so that it never begins again.
        let slot = if slot < room { self.next.fetch_add(1, Ordering::Relaxed) } else { slot };
        if slot >= room {
            self.totals[4].fetch_add(1, Ordering::Relaxed);
            return;
        }
        let [head, address, pages] = record.pack();
        let words = &self.words[slot * WORDS..];
        words[1].store(address, Ordering::Relaxed);
        words[2].store(pages, Ordering::Relaxed);
        words[0].store(head, Ordering::Release);
    }
}

impl<P: Policy> Policy for Recording<P> {
    fn launch(&self, declared: &Declaration) -> Prepare {
        let answer = self.inner.launch(declared);
        let record = Record {
            decision: Decision::Launch(answer.place),
            device: declared.device,
            address: declared.part.start,
            pages: declared.part.bits().count(),
            write: declared.access.writes(),
            pin: answer.pin,
        };
        self.write(0, record);
        answer
    }

    fn device_fault(&self, fault: &DeviceFault) -> Fetch {
        let answer = self.inner.device_fault(fault);
        let decision = Decision::Fetch { duplicate: answer.duplicate, ahead: answer.ahead };
        let DeviceFault { device, address, write, .. } = *fault;
        self.write(1, Record { decision, device, address, pages: answer.pages.count(), write, pin: answer.pin });
        answer
    }

    fn cpu_fault(&self, fault: &CpuFault) -> Return {
        let answer = self.inner.cpu_fault(fault);
        let decision = Decision::Return { duplicate: answer.duplicate, ahead: answer.ahead };
        let CpuFault { device, address, write, .. } = *fault;
        self.write(2, Record { decision, device, address, pages: answer.pages.count(), write, pin: false });
        answer
    }

    fn evict(&self, pressure: &Pressure<'_>) -> usize {
        let answer = self.inner.evict(pressure);
        let address = pressure.candidates.get(answer).map_or(0, |candidate| candidate.block);
        self.write(3, Record { decision: Decision::Evict, device: pressure.device, address, pages: 0, write: false, pin: false });
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_were_written() {
        let recording = Recording::new(Declared, 5).unwrap();
        let decisions = [
            Decision::Launch(Placement::OnTouch),
            Decision::Fetch { duplicate: true, ahead: 3 },
            Decision::Return { duplicate: false, ahead: 8 },
            Decision::Evict,
        ];
        let records =
            decisions.map(|decision| Record { decision, device: 16, address: 0x7fff_dead_b000, pages: 512, write: true, pin: false });
        for (kind, &record) in records.iter().enumerate() {
            recording.write(kind, record);
        }
        assert!(recording.records().eq(records));
        (0..3).for_each(|_| recording.write(3, records[3]));
        assert_eq!(recording.records().count(), 5);
        assert_eq!(recording.totals(), Totals { launches: 1, device_faults: 1, cpu_faults: 1, evictions: 4, not_kept: 2 });
    }
}
