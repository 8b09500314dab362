//! The mechanism of uhmm, and the contract that drivers keep.
//!
//! | module | |
//! |---|---|
//! | [`kernel`], [`mod@args`] | what runs on a device, and what it is given |
//! | [`driver`] | what a device must do |
//! | [`policy`], `advice` | what decides how much moves; what the program says about ranges |
//! | [`page`], [`directory`] | where every page is: states, transitions, the radix tree |
//! | [`space`], [`notifier`] | the process's address space, its events, and how to look at it safely |
//! | [`devmem`], [`pool`] | device memory; the host pages that migrations pass through |
//! | [`mirror`] | devices that use memory where it is: looks, notifiers, a page table for models |
//! | [`migrate`], `home`, `share` | moving pages to a device and back; the CPU gets copies of what a device keeps |
//! | `monitor`, `ahead`, `events`, `device_fault` | the CPU's touches and what comes before them, the program's mapping changes, the device's touches |
//! | `check`, `launch`, `prepare`, `snapshot`, `twins`, `shares`, `flight`, `beside`, [`lease`], `line`, [`scope`] | the life of a launch |
//! | [`residency`], `discard`, [`prefetch`] | hints: where pages are, for who asks; what is not needed any more; what goes ahead, in the background |
//! | `coherent` | devices whose memory the CPU uses in place |
//! | `fixed` | pages that never leave |
//! | `loss` | devices that fail |
//! | [`core`], [`process`], `table` | the core and its devices; one core per process, its threads, its beginning and end; how a device is closed |
//! | `fork`, `raw_fork`, `evictor` | everything comes home: before a fork, when asked, before the action of a signal |
//! | `conformance` | what every device must do, as checks for drivers' tests (feature `conformance`) |
//! | [`own`], `sync`, `desk`, `assist` | memory that never migrates; locks that touch nothing else; how work reaches uhmm's threads |

mod advice;
mod ahead;
pub mod args;
mod assist;
mod beside;
pub mod bits;
pub mod check;
mod coherent;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod core;
pub mod counters;
mod desk;
mod device_fault;
pub mod devmem;
pub mod directory;
mod discard;
pub mod driver;
mod error;
mod events;
mod evictor;
mod fixed;
mod flight;
mod fork;
mod home;
pub mod kernel;
mod launch;
pub mod lease;
pub mod left;
mod line;
mod loss;
pub mod migrate;
pub mod mirror;
pub mod mode;
mod monitor;
pub mod notifier;
pub mod own;
pub mod page;
pub mod policy;
pub mod pool;
pub mod port;
pub mod prefetch;
mod prepare;
pub mod process;
mod ranges;
mod raw_fork;
pub mod residency;
pub mod scope;
mod share;
mod shares;
mod snapshot;
pub mod space;
mod sync;
mod table;
mod twins;

pub use crate::core::DeviceRef;
pub use crate::process::{CoreRef, DeviceConfig, MAX_DEVICES, OpenDriver};
pub use error::Error;
