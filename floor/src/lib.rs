//! The physical floor of user-space page migration on this machine: the fewest system calls that could do each job, with no
//! bookkeeping at all. A figure of uhmm is quoted as a ratio to one of these, measured in the same run.
//!
//! Every floor is prepared once and then run as often as wanted; each run puts things back outside the clock, so that a bench can
//! alternate runs of a floor and of the thing it is compared with. Rules:
//! * no crate of uhmm is used here, so that no cost of uhmm can hide in the floor;
//! * nothing else maps or unmaps the memory of a floor, so `EAGAIN` is retried at once, which a runtime may not do;
//! * all memory and descriptors go when the floor is dropped.
//!
//! Linux 6.8 or newer for `UFFDIO_MOVE`, and some right to use userfaultfd: see [`Error::is_missing_right`].
#![allow(unsafe_code)] // this crate is the bare system calls; every block argues for itself

mod copy;
mod fault;
mod first_launch;
mod memory;
mod pair;
mod round_trip;
mod sigbus;
mod uffd;

pub use copy::{Copy, CopyKind};
pub use fault::{Fault, Method, Server};
pub use first_launch::{ExplicitTime, FirstLaunch, FirstLaunchTime, Reading};
pub use memory::{BLOCK, PAGE, Pages};
pub use round_trip::{CleanReturn, RoundTrip, RoundTripTime};

/// Why a floor could not be prepared or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{call} failed: {source}")]
    System {
        /// The call.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// The size is zero, or not a multiple of 2 MiB.
    #[error("a floor needs a size that is a positive multiple of 2 MiB, not {0} bytes")]
    Size(usize),
    /// Bytes arrived that were not sent.
    #[error("wrong data at byte {0} of the range: expected the bytes that were sent")]
    WrongData(usize),
}

impl Error {
    fn last(call: &'static str) -> Self {
        Error::System { call, source: std::io::Error::last_os_error() }
    }

    fn of(call: &'static str, errno: i32) -> Self {
        Error::System { call, source: std::io::Error::from_raw_os_error(errno) }
    }

    /// Whether this user or kernel has no userfaultfd, or none that can move pages: nothing is wrong with the floor, it cannot be
    /// measured here.
    pub fn is_missing_right(&self) -> bool {
        match self {
            Error::System { call, source } => {
                matches!(*call, "userfaultfd" | "UFFDIO_API")
                    && matches!(source.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EINVAL))
            }
            _ => false,
        }
    }
}

/// The result of preparing or running a floor.
pub type Result<T> = core::result::Result<T, Error>;
