//! The mechanism of uhmm, and the contract that drivers keep.
//!
//! | module | |
//! |---|---|
//! | [`kernel`], [`mod@args`] | what runs on a device, and what it is given |
//! | [`driver`] | what a device must do |
//! | [`policy`], `advice` | what decides how much moves; what the program says about ranges |
//! | [`page`], `directory` | where every page is: states, transitions, the radix tree |
//! | `space`, `notifier` | the process's address space, its events, and how to look at it safely |
//! | `devmem`, `pool` | device memory; the host pages that migrations pass through |
//! | [`mirror`] | devices that use memory where it is: looks, notifiers, a page table for models |
//! | `migrate`, `home`, `share` | moving pages to a device and back; the CPU gets copies of what a device keeps |
//! | `monitor`, `ahead`, `events`, `device_fault` | the CPU's touches and what comes before them, the program's mapping changes, the device's touches |
//! | `check`, `launch`, `prepare`, `snapshot`, `twins`, `shares`, `flight`, `beside`, [`reach`], `gather`, [`lease`], `line`, [`scope`] | the life of a launch |
//! | [`residency`], `discard`, [`prefetch`] | hints: where pages are, for who asks; what is not needed any more; what goes ahead, in the background |
//! | `coherent` | devices whose memory the CPU uses in place |
//! | `fixed` | pages that never leave |
//! | `loss` | devices that fail |
//! | `core`, `process`, `table` | the core and its devices; one core per process, its threads, its beginning and end; how a device is closed |
//! | `fork`, `raw_fork`, `evictor` | everything comes home: before a fork, when asked, before the action of a signal |
//! | `conformance` | what every device must do, as checks for drivers' tests (feature `conformance`) |
//! | [`own`], `sync`, `desk`, `assist` | memory that never migrates; locks that touch nothing else; how work reaches uhmm's threads |
//!
//! # Examples
//!
//! Programs use the crate `uhmm`. This one is for who writes drivers (docs/write-a-driver.md), runtimes, policies ([`policy`]) and tests. Each public module opens with an
//! example, or says why it has none; what has none of its own is shown there, or is told by its documentation.
//!
//! ```
//! use uhmm_core::args::{inp, out};
//! use uhmm_core::kernel::{Ctx, Entry, Grid};
//! use uhmm_core::{CoreRef, DeviceConfig, Error, OpenDriver, args};
//!
//! fn double(ctx: &Ctx<'_>) {
//!     ctx.out::<u32>(0).chunk(1)[0] = 2 * ctx.inp::<u32>(1)[ctx.group()];
//! }
//!
//! fn run(open: OpenDriver, a: &[u32], r: &mut [u32]) -> Result<(), Error> {
//!     let dev = CoreRef::get()?.device(DeviceConfig::new("mine"), open)?;
//!     let groups = Grid::from(a.len());
//!     dev.run(Entry::new(&double), groups, &args![out(r), inp(a)])
//! }
//! ```

mod advice;
mod ahead;
pub mod args;
mod assist;
mod beside;
mod bits;
mod chain;
pub mod check;
mod coherent;
#[cfg(feature = "conformance")]
pub mod conformance;
mod core;
pub mod counters;
mod desk;
mod device_fault;
mod devmem;
mod directory;
mod discard;
pub mod driver;
mod error;
mod events;
mod evictor;
mod fixed;
mod flight;
mod fork;
mod gather;
mod home;
pub mod kernel;
mod launch;
pub mod lease;
mod left;
mod line;
mod loss;
mod migrate;
pub mod mirror;
pub mod mode;
mod monitor;
mod notifier;
pub mod own;
pub mod page;
mod place;
pub mod policy;
mod pool;
pub mod port;
pub mod prefetch;
mod prepare;
mod process;
mod ranges;
mod raw_fork;
pub mod reach;
pub mod residency;
mod returns;
pub mod scope;
mod share;
mod shares;
mod snapshot;
mod space;
mod sync;
mod table;
mod twins;

pub use crate::core::DeviceRef;
pub use crate::process::{CoreRef, DeviceConfig, MAX_DEVICES, OpenDriver};
pub use error::Error;
