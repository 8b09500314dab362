//! The mechanism of uhmm, and the contract that drivers keep.
//!
//! | module | |
//! |---|---|
//! | [`kernel`], [`mod@args`] | what runs on a device, and what it is given |
//! | [`driver`] | what a device must do |
//! | [`policy`] | what decides how much moves |
//! | [`page`], [`directory`] | where every page is: states, transitions, the radix tree |
//! | [`space`], [`notifier`] | the process's address space, its events, and how to look at it safely |
//! | [`devmem`], [`pool`] | device memory; the host pages that migrations pass through |
//! | [`migrate`], `home` | moving pages to a device and back |
//! | `monitor`, `ahead`, `events`, `device_fault` | the CPU's touches and what comes before them, the program's mapping changes, the device's touches |
//! | `check`, `launch`, `prepare`, `snapshot`, `twins`, `shares`, `hold` | the life of a launch |
//! | `coherent` | devices whose memory the CPU uses in place |
//! | `fixed` | pages that never leave |
//! | `loss` | devices that fail |
//! | [`core`], [`process`], `table` | the core and its devices; one core per process, its threads, its beginning and end; how a device is closed |
//! | `fork`, `raw_fork`, `evictor` | everything comes home: before a fork, when asked, before the action of a signal |
//! | `conformance` | what every device must do, as checks for drivers' tests (feature `conformance`) |
//! | [`own`], `sync`, `desk`, `assist` | memory that never migrates; locks that touch nothing else; how work reaches uhmm's threads |

mod ahead;
pub mod args;
mod assist;
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
pub mod driver;
mod error;
mod events;
mod evictor;
mod fixed;
mod fork;
mod hold;
mod home;
pub mod kernel;
mod launch;
pub mod left;
mod loss;
pub mod migrate;
pub mod mode;
mod monitor;
pub mod notifier;
pub mod own;
pub mod page;
pub mod policy;
pub mod pool;
mod prepare;
pub mod process;
mod ranges;
mod raw_fork;
mod shares;
mod snapshot;
pub mod space;
mod sync;
mod table;
mod twins;

pub use crate::core::DeviceRef;
pub use crate::process::{CoreRef, DeviceConfig, MAX_DEVICES, OpenDriver};
pub use error::Error;
