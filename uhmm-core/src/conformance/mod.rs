//! What every device must do, as a list of checks that run over any opened device. Feature `conformance`.
//!
//! A driver's author opens the device, makes a [`Subject`] of it, and runs [`CHECKS`]: each panics with what is wrong. What a device cannot do
//! ([`Capabilities`](crate::driver::Capabilities): no replayable faults; no memory) is not asked of it, or its refusal is. The kernels are few ([`Named`]) and
//! come as Rust functions; a driver whose kernels are something else gives forms of its own.
//!
//! # Rules
//! * A check leaves the device as it found it, open and usable, and frees all memory that it made.
//! * Where data is, the kernel is asked (/proc/self/pagemap), never uhmm.
//! * A check that is marked as one of data fails on a device that runs nothing. So the checks themselves are tested.
//! * Checks bring pages home before they compare: what is compared is what the program would read.
//!
//! ```
//! use uhmm_core::DeviceRef;
//! use uhmm_core::conformance::{CHECKS, Subject};
//!
//! fn conforms(dev: &DeviceRef) {
//!     let mut subject = Subject::new(dev); // with_forms, if its kernels are no Rust functions
//!     for check in CHECKS {
//!         println!("{}", check.name); // a check that hangs is known by its name
//!         (check.run)(&mut subject); // panics with what is wrong
//!     }
//! }
//! ```
//!
//! `uhmm/tests/suite/conformance.rs` runs the devices of this repository.

mod capacity;
mod declared;
mod edges;
mod input;
mod memory;
mod named;
mod places;
mod random;
mod system;

pub use named::{Named, Node, rust_form};

use crate::args;
use crate::args::{Args, inout, inp, out, val};
use crate::driver::DeviceInfo;
use crate::error::Error;
use crate::kernel::Entry;
use crate::{DeviceRef, args::Arg};

/// Where the forms of the kernels come from: `None` if the device's kernels cannot do that, which only [`Named::Fail`] may be, and [`Named::Reach`] without replayable faults.
pub type Forms<'a> = &'a (dyn Fn(Named) -> Option<Entry> + Sync);

/// The device that is checked, and how.
pub struct Subject<'a> {
    dev: &'a DeviceRef,
    forms: Forms<'a>,
    /// Where random numbers start.
    pub seed: u64,
    /// Steps of the random operations.
    pub steps: usize,
}

impl core::fmt::Debug for Subject<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Subject").field("dev", self.info()).field("seed", &self.seed).field("steps", &self.steps).finish_non_exhaustive()
    }
}

/// One check.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// What it says of a device.
    pub name: &'static str,
    /// It looks at what kernels have computed, or where data is: a device that runs nothing must fail it.
    pub data: bool,
    /// Panics with what is wrong.
    pub run: fn(&mut Subject<'_>),
}

macro_rules! checks {
    ($($kind:ident $module:ident::$name:ident),* $(,)?) => {
        /// All checks, the quick and plain ones first.
        pub const CHECKS: &[Check] = &[$(Check { name: stringify!($name), data: checks!(@$kind), run: $module::$name }),*];
    };
    (@data) => { true };
    (@plain) => { false };
}

checks! {
    plain input::nothing_at_all_can_be_launched,
    plain input::bad_ranges_are_refused_and_change_nothing,
    plain input::overlaps_are_refused,
    plain input::grids_without_groups_are_refused,
    plain input::memory_of_another_device_is_refused,
    plain places::copies_of_memory_that_is_gone_are_errors,
    plain places::a_window_is_not_made_over_the_programs_memory,
    plain system::launches_are_counted,
    plain declared::what_is_only_read_stays_as_it_was,
    data declared::every_alignment_and_size,
    data declared::what_out_leaves_unwritten_reads_as_before_or_zero,
    data declared::an_unchanged_relaunch_moves_nothing,
    data declared::a_cpu_write_in_between_is_seen,
    data declared::untouched_memory_is_zero,
    data declared::stored_pointers_are_followed,
    data edges::neighbouring_bytes_are_left_alone,
    data edges::neighbouring_bytes_change_meanwhile,
    data edges::two_ranges_share_a_page,
    data input::undeclared_memory_is_reached_or_refused,
    data input::a_failing_kernel_leaves_bytes_as_before_or_as_written,
    data capacity::more_data_than_the_device_holds,
    data capacity::too_much_at_once_is_refused,
    data capacity::prefetch_and_evict,
    data capacity::memory_of_the_devices_own,
    data capacity::a_full_device_makes_room,
    data system::bytes_and_pages_add_up,
    data system::memory_is_unmapped_moved_and_dropped,
    data system::a_forked_child_sees_the_contents,
    data system::launches_from_many_threads,
    data random::random_operations_against_a_shadow,
}

/// Parts of this many bytes are one group's: no power of two, so that groups end inside pages.
const PART: usize = 100_003;

impl<'a> Subject<'a> {
    /// A device with the Rust forms of the kernels. It should have 8 MiB of memory or more, and not more than a few hundred: some checks fill it.
    pub fn new(dev: &'a DeviceRef) -> Self {
        Subject { dev, forms: &|named| Some(rust_form(named)), seed: 1, steps: 3000 }
    }

    /// The same with other forms of the kernels.
    pub fn with_forms(self, forms: Forms<'a>) -> Self {
        Subject { forms, ..self }
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        self.dev.info()
    }

    /// Bytes that the checks take for the device's memory.
    fn capacity(&self) -> usize {
        // A device that holds nothing is asked as if it did.
        if self.info().memory == 0 { 16 << 20 } else { self.info().memory }
    }

    fn has(&self, kernel: Named) -> bool {
        (self.forms)(kernel).is_some()
    }

    fn run(&self, kernel: Named, groups: usize, args: &Args<'_>) -> Result<(), Error> {
        let Some(entry) = (self.forms)(kernel) else {
            panic!("the driver has no form of the kernel {kernel:?}: only Fail may be left out")
        };
        self.dev.run(entry, groups.into(), args)
    }

    fn add_one(&self, data: &mut [u8]) {
        let groups = data.len().div_ceil(PART).max(1);
        self.run(Named::AddOne, groups, &args![inout(data), PART as u64]).unwrap_or_else(|e| panic!("AddOne: {e}"));
    }

    fn copy(&self, to: &mut [u8], from: &[u8]) {
        let groups = to.len().div_ceil(PART).max(1);
        self.run(Named::Copy, groups, &args![out(to), inp(from), PART as u64]).unwrap_or_else(|e| panic!("Copy: {e}"));
    }

    fn sum(&self, data: &[u8]) -> u64 {
        let mut sums = vec![0u64; data.len().div_ceil(PART).max(1)];
        self.run(Named::Sum, sums.len(), &args![out(&mut sums), inp(data), PART as u64]).unwrap_or_else(|e| panic!("Sum: {e}"));
        sums.iter().sum()
    }

    /// Of every `part` bytes, fills those from `from` on, `len` of them, declared as only written.
    fn fill_part(&self, data: &mut [u8], part: usize, from: usize, len: usize, value: u8) {
        let groups = data.len().div_ceil(part).max(1);
        let list = args![out(data), part as u64, from as u64, len as u64, val(u64::from(value))];
        self.run(Named::FillPart, groups, &list).unwrap_or_else(|e| panic!("FillPart: {e}"));
    }

    /// Writes one byte of each part, then fails in group `group`.
    fn fail(&self, data: Arg<'_>, groups: usize, part: usize, group: usize) -> Result<(), Error> {
        self.run(Named::Fail, groups, &args![data, part as u64, group as u64])
    }
}
