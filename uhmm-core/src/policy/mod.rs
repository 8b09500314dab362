//! Policy: what to migrate, and when. The mechanism asks; a policy answers, and can make a program slow but never wrong.
//!
//! A [`Policy`] is asked what a launch does with what it declares, what comes to a device and what comes home at a touch, and which block goes when a device
//! is full. It sees plain values (who touches, where, how; what the program has [advised](Advised); the block's [`History`]) and gives plain answers, and every answer
//! is a wish: pages that cannot go are left out, the touched page comes in any case, and what cannot be had is replaced by the nearest that can. Each
//! method has a default, which does what [`Declared`] does, so that a policy is as long as its idea.
//!
//! One is set for the process, a device or a range; the most specific one is asked, and each can be replaced at any moment. A replaced one is kept until the process's
//! core ends, for somebody may be asking it just now; so many at most: [`MOST_POLICIES`].
//!
//! # Rules for who writes one
//! * It is asked on the fault path, by any thread, by several at once, with locks held. It must not allocate, log, wait, or touch memory that could migrate (the heap, statics, a
//!   caller's stack); what it needs it keeps in itself, for uhmm moves the value into memory of its own. Atomics are the way to change it.
//! * It must not panic. There is nobody to unwind to, so the process is aborted, once the panic hook has said where. (The hook of `std` itself uses the program's memory: if
//!   that is on a device just then, the process may hang instead.)
//! * It may be asked more than once for the same thing, and for things that then do not happen.
//!
//! ```
//! use uhmm_core::policy::{Bits, CpuFault, Policy, Return};
//!
//! /// Each touch by the CPU brings the touched page, and no other.
//! #[derive(Debug)]
//! struct PageByPage;
//!
//! impl Policy for PageByPage {
//!     fn cpu_fault(&self, fault: &CpuFault) -> Return {
//!         Return { pages: Bits::one(fault.page), ..Return::default() }
//!     }
//! }
//! ```

mod advice;
mod asked;
mod history;
mod in_force;
mod marks;
mod record;
mod shipped;

pub use advice::{Advice, Advised, Location};
pub use history::History;
pub(crate) use history::{Past, one_more};
pub use in_force::{InForce, MOST_POLICIES};
pub(crate) use in_force::{Policies, pin};
pub use marks::MOST_RANGES;
pub(crate) use marks::Said;
pub use record::{Decision, Record, Recording, Totals};
pub use shipped::{Declared, NeverMigrate, OnDemand};

pub use crate::args::Access;
pub use crate::bits::{Bits, PAGES};
pub use crate::page::{Span, Va};
pub(crate) use asked::{Wishes, cpu_fault, device_fault, leaving};

/// Pages in a leaf: 64 KiB, the size at which moving a page begins to beat copying it.
pub const LEAF: usize = 16;
/// The most blocks that come ahead of a stream, or of a device's touches: 16 MiB.
pub const MOST_AHEAD: usize = 8;
/// The most blocks that a policy chooses from when a device is full.
pub const CANDIDATES: usize = 16;

/// A part of a block (2 MiB) that a launch declares.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Declaration {
    /// The device's number.
    pub device: u32,
    /// The pages.
    pub part: Span,
    /// What the kernel does with them.
    pub access: Access,
    /// The CPU uses the device's memory in place: nothing is on both sides, and what is to be there moves.
    pub coherent: bool,
    /// Bytes of the whole argument.
    pub bytes: usize,
    /// What the program has advised for them: the same for all.
    pub advice: Advised,
    /// The block's history.
    pub history: History,
}

/// Where something is to be while a kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Placement {
    /// On the device alone, until the CPU touches it.
    #[default]
    Move,
    /// On both sides, until either writes. What a launch only writes moves instead; what it reads and writes too on a device without replayable faults.
    Duplicate,
    /// With the program, where it stays: a device that reaches it uses it in place, any other gets a copy for this one launch, and the bytes that the launch
    /// declares as written go back when it ends.
    Map,
    /// Where it is: the kernel's touches bring it ([`Policy::device_fault`]). On a device without replayable faults it is as [`Declared`] would have it.
    OnTouch,
}

/// What a launch does with what it declares.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prepare {
    /// Where it is to be.
    pub place: Placement,
    /// The block goes last when the device is full, until a launch or a touch of the device that does not ask for this, or until it is home.
    pub pin: bool,
}

/// A touch by a device of a page that is not there.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DeviceFault {
    /// The device's number.
    pub device: u32,
    /// The address, to the byte.
    pub address: Va,
    /// The page's number in its block of 2 MiB, 0 to 511.
    pub page: usize,
    /// Whether it was a write.
    pub write: bool,
    /// Pages of the block that could come: of the same mapping, not advised to stay.
    pub candidates: Bits,
    /// What the program has advised for the page.
    pub advice: Advised,
    /// The block's history, this fault not counted.
    pub history: History,
}

/// What a device's touch brings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fetch {
    /// Pages of the block. The touched one comes in any case; those that are no candidates, or that the program has never touched, do not.
    pub pages: Bits,
    /// They are on both sides then, until either writes. Not after a write, and not where a device cannot be kept from writing.
    pub duplicate: bool,
    /// The block goes last when the device is full; see [`Prepare::pin`].
    pub pin: bool,
    /// Blocks behind this one that are brought as well, as far as memory goes on that can move, before the kernel goes on: at most [`MOST_AHEAD`], as far as there is room.
    pub ahead: usize,
}

/// A touch by the CPU of a page that is on a device.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CpuFault {
    /// The device's number.
    pub device: u32,
    /// The address, to the byte.
    pub address: Va,
    /// The page's number in its block, 0 to 511.
    pub page: usize,
    /// Whether it was a write.
    pub write: bool,
    /// The thread (gettid(2)) that waits for the page.
    pub thread: u32,
    /// Whether that is a worker of a device, which has used a process address.
    pub worker: bool,
    /// Pages of the block that are on the device only, and may come.
    pub away: Bits,
    /// CPU faults in this block since it was last migrated, this one not counted.
    pub faults_in_block: u32,
    /// Blocks that were brought back whole one after the other, each next to the one before, up to the one next to this one; without a launch
    /// in between.
    pub stream: u32,
    /// Whether the pages left as one huge page.
    pub huge: bool,
    /// What the program has advised for the page.
    pub advice: Advised,
    /// The block's history, this fault not counted.
    pub history: History,
}

/// What a CPU's touch brings home.
#[derive(Clone, Copy, Debug, Default)]
pub struct Return {
    /// Pages of the block. The touched one comes in any case, those that are not away do not.
    pub pages: Bits,
    /// The device keeps its copies, until either side writes. Not after a write.
    pub duplicate: bool,
    /// How many of the blocks that follow in a stream come before they are touched, in the background: at most [`MOST_AHEAD`], and only if this one comes whole.
    pub ahead: usize,
}

/// A block that could leave a full device.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Candidate {
    /// Where the block is.
    pub block: Va,
    /// What the program has advised for any of it.
    pub advice: Advised,
    /// Its history.
    pub history: History,
    /// A policy has pinned it.
    pub pinned: bool,
}

/// A device is full.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Pressure<'a> {
    /// The device's number.
    pub device: u32,
    /// What could go, at least one, at most [`CANDIDATES`]: first what the program will not need, then what was used least recently, then what the program prefers on
    /// this device or a policy has pinned. What the running launch cannot do without is not among them.
    pub candidates: &'a [Candidate],
}

/// Blocks one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    /// The first.
    pub(crate) next: Va,
    /// Whether the others lie below it.
    pub(crate) down: bool,
    /// How many there are.
    pub(crate) left: usize,
    /// The device keeps its copies of them.
    pub(crate) duplicate: bool,
}

/// Decides what moves, and when. Every answer is a wish; the module says more.
pub trait Policy: Send + Sync + core::fmt::Debug {
    /// Where a part of a block is to be that a launch declares. Asked when the launch is prepared, not if nothing has changed since the last one, and in full mode only.
    fn launch(&self, declared: &Declaration) -> Prepare {
        shipped::launch(declared)
    }

    /// What to bring to the device that has touched a page.
    fn device_fault(&self, fault: &DeviceFault) -> Fetch {
        shipped::device_fault(fault)
    }

    /// What to bring home to the CPU that has touched a page.
    fn cpu_fault(&self, fault: &CpuFault) -> Return {
        shipped::cpu_fault(fault)
    }

    /// Which candidate, by its place in the list, leaves a full device. A policy of the process or of the device is asked, none of a range. If there is no such
    /// candidate, the first goes.
    fn evict(&self, pressure: &Pressure<'_>) -> usize {
        let _ = pressure;
        0
    }
}
