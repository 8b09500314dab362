//! Opening a userfaultfd: which rights, which features, and what to tell a user who lacks them.

use super::{GROUP, Moves, Userfaultfd};
use crate::Errno;
use crate::flush::Flush;
use crate::pagemap::Pagemap;
use crate::syscall::{abi, call, ioctl};
use bitflags::bitflags;
use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use rustix::fs::{Mode, OFlags};

const API: u32 = linux_raw_sys::ioctl::UFFDIO_API;
/// USERFAULTFD_IOC_NEW of /dev/userfaultfd, `_IO(0xAA, 0)`.
const IOC_NEW: usize = (GROUP as usize) << 8;
const DEVICE: &str = "/dev/userfaultfd";

bitflags! {
    /// What a userfaultfd can do (ioctl_userfaultfd(2), `UFFDIO_API`). A feature belongs to a whole descriptor.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Write protection.
        const PAGEFAULT_FLAG_WP = abi::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
        /// [`Event::Fork`](super::Event::Fork); needs `CAP_SYS_PTRACE`.
        const EVENT_FORK = abi::UFFD_FEATURE_EVENT_FORK as u64;
        /// [`Event::Remap`](super::Event::Remap).
        const EVENT_REMAP = abi::UFFD_FEATURE_EVENT_REMAP as u64;
        /// [`Event::Remove`](super::Event::Remove).
        const EVENT_REMOVE = abi::UFFD_FEATURE_EVENT_REMOVE as u64;
        /// [`Event::Unmap`](super::Event::Unmap).
        const EVENT_UNMAP = abi::UFFD_FEATURE_EVENT_UNMAP as u64;
        /// Missing pages of hugetlbfs.
        const MISSING_HUGETLBFS = abi::UFFD_FEATURE_MISSING_HUGETLBFS as u64;
        /// Missing pages of shared memory.
        const MISSING_SHMEM = abi::UFFD_FEATURE_MISSING_SHMEM as u64;
        /// No messages: a fault raises SIGBUS in the thread that touches.
        const SIGBUS = abi::UFFD_FEATURE_SIGBUS as u64;
        /// Fault messages name the thread.
        const THREAD_ID = abi::UFFD_FEATURE_THREAD_ID as u64;
        /// Minor faults of hugetlbfs.
        const MINOR_HUGETLBFS = abi::UFFD_FEATURE_MINOR_HUGETLBFS as u64;
        /// Minor faults of shared memory.
        const MINOR_SHMEM = abi::UFFD_FEATURE_MINOR_SHMEM as u64;
        /// Fault messages give the exact address, not the page's.
        const EXACT_ADDRESS = abi::UFFD_FEATURE_EXACT_ADDRESS as u64;
        /// Write protection of hugetlbfs and shared memory.
        const WP_HUGETLBFS_SHMEM = abi::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
        /// Write protection of anonymous pages that are not there yet.
        const WP_UNPOPULATED = abi::UFFD_FEATURE_WP_UNPOPULATED as u64;
        /// [`Userfaultfd::poison`]. Linux 6.6.
        const POISON = abi::UFFD_FEATURE_POISON as u64;
        /// Write protection that the kernel lifts by itself; what was written is found by a pagemap scan. Linux 6.7.
        const WP_ASYNC = abi::UFFD_FEATURE_WP_ASYNC as u64;
        /// [`Userfaultfd::move_pages`]. Linux 6.8.
        const MOVE = abi::UFFD_FEATURE_MOVE as u64;
    }
}

impl Features {
    /// The names of the features that are set, in the order of their bits.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.iter_names().map(|(name, _)| name)
    }
}

fn joined(features: &Features) -> String {
    features.names().collect::<Vec<_>>().join(", ")
}

/// Whose faults a userfaultfd handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Also those of the kernel: system calls on missing pages wait, as a touch does. Needs a privilege.
    Full,
    /// Only those of user code: system calls on missing or write-protected pages fail with `EFAULT`. Any user may have it.
    UserModeOnly,
}

/// Why there is no userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No such system call, and no device.
    #[error(
        "this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD=y \
         (inside a container, a seccomp profile may also hide the call: allow userfaultfd, or pass the device {DEVICE} in)"
    )]
    NoKernelSupport,
    /// It exists, but not for this process, not even for faults of user code.
    #[error(
        "userfaultfd is refused, even for faults of user code only: most likely a seccomp profile (docker, podman, systemd) or a \
         security module forbids it; allow the userfaultfd system call, or pass the device {DEVICE} in with read and write \
         permission (its state here: {device})"
    )]
    Forbidden {
        /// Why the device could not be opened.
        device: Errno,
    },
    /// It exists, but not with kernel faults.
    #[error(
        "userfaultfd with kernel faults is refused: have one of CAP_SYS_PTRACE (or root), \
         sysctl vm.unprivileged_userfaultfd=1, or read and write permission on {DEVICE} (its state here: {device}); \
         in a container, seccomp may also refuse it. Without any of these, only faults of user code can be handled"
    )]
    NeedsPrivilege {
        /// Why the device could not be opened.
        device: Errno,
    },
    /// The kernel is too old for some features.
    #[error("this kernel's userfaultfd lacks {}: a newer kernel is needed (MOVE: Linux 6.8, WP_ASYNC: 6.7, POISON: 6.6)", joined(missing))]
    MissingFeatures {
        /// What it lacks.
        missing: Features,
    },
    /// Features that this process may not use.
    #[error("userfaultfd feature {} needs CAP_SYS_PTRACE (or root)", joined(refused))]
    RefusedFeatures {
        /// Which.
        refused: Features,
    },
    /// Anything else: out of descriptors, out of memory, a kernel with another interface.
    #[error("{what} failed: {errno}")]
    Os {
        /// The call.
        what: &'static str,
        /// Its error.
        errno: Errno,
    },
}

/// What [`Userfaultfd::open`] would grant: the features that this kernel has and this process may use.
///
/// ```
/// use uhmm_os::uffd::{Features, Rights, probe};
///
/// match probe(Rights::Full) {
///     Ok(features) => println!("pages can be moved: {}", features.contains(Features::MOVE)),
///     Err(e) => println!("{e}"), // says what gives the right
/// }
/// ```
///
/// # Errors
/// As [`Userfaultfd::open`].
pub fn probe(rights: Rights) -> Result<Features, OpenError> {
    // A descriptor takes one handshake only: each try needs a fresh one.
    let offered = handshake(&open_descriptor(rights)?, Features::empty())?;
    match handshake(&open_descriptor(rights)?, Features::EVENT_FORK) {
        Ok(_) => Ok(offered),
        Err(_) => Ok(offered - Features::EVENT_FORK),
    }
}

impl Userfaultfd {
    /// Opens a userfaultfd with at least these features: by userfaultfd(2), else by `/dev/userfaultfd`.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    pub fn open(rights: Rights, features: Features) -> Result<Self, OpenError> {
        let fd = open_descriptor(rights)?;
        let errno = match handshake(&fd, features) {
            Ok(_) => {
                let moves = if features.contains(Features::MOVE) { Some(Moves::new()?) } else { None };
                return Ok(Userfaultfd { fd, moves });
            }
            Err(OpenError::Os { errno, .. }) if errno == Errno::INVAL || errno == Errno::PERM => errno,
            Err(e) => return Err(e),
        };
        let offered = handshake(&open_descriptor(rights)?, Features::empty())?;
        let missing = features - offered;
        if !missing.is_empty() {
            return Err(OpenError::MissingFeatures { missing });
        }
        match errno {
            Errno::PERM => Err(OpenError::RefusedFeatures { refused: features & Features::EVENT_FORK }),
            errno => Err(OpenError::Os { what: "the userfaultfd handshake (UFFDIO_API)", errno }),
        }
    }
}

impl Moves {
    fn new() -> Result<Self, OpenError> {
        let failed = |what| move |errno| OpenError::Os { what, errno };
        let pagemap = Pagemap::open().map_err(failed("opening /proc/self/pagemap"))?;
        Ok(Moves { pagemap, flush: Flush::new().map_err(failed("mapping memory to flush translations with"))? })
    }
}

/// Asks for features, and returns all that the kernel has.
fn handshake(fd: &OwnedFd, features: Features) -> Result<Features, OpenError> {
    let mut arg = abi::uffdio_api { api: abi::UFFD_API.into(), features: features.bits(), ioctls: 0 };
    // SAFETY: the structure is the one that the request takes, and names no memory.
    match unsafe { ioctl(fd.as_fd(), API, &mut arg) } {
        Ok(_) => Ok(Features::from_bits_truncate(arg.features)),
        Err(errno) => Err(OpenError::Os { what: "the userfaultfd handshake (UFFDIO_API)", errno }),
    }
}

fn open_descriptor(rights: Rights) -> Result<OwnedFd, OpenError> {
    let only = if rights == Rights::UserModeOnly { abi::UFFD_USER_MODE_ONLY } else { 0 };
    let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK).bits() | only;
    // SAFETY: opens a descriptor, which becomes ours.
    let first = match unsafe { call(abi::__NR_userfaultfd, [flags as usize]) } {
        Ok(fd) => return Ok(owned(fd)),
        Err(errno @ (Errno::PERM | Errno::NOSYS | Errno::ACCESS)) => errno,
        Err(errno) => {
            return Err(OpenError::Os { what: "userfaultfd(2)", errno });
        }
    };
    match open_by_device(flags) {
        Ok(fd) => Ok(fd),
        Err(Errno::NOENT) if first == Errno::NOSYS => Err(OpenError::NoKernelSupport),
        Err(device) if rights == Rights::Full && first != Errno::NOSYS => Err(OpenError::NeedsPrivilege { device }),
        Err(device) => Err(OpenError::Forbidden { device }),
    }
}

fn open_by_device(flags: u32) -> Result<OwnedFd, Errno> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: the request takes the flags by value and opens a descriptor, which becomes ours.
    unsafe { call(abi::__NR_ioctl, [device.as_raw_fd() as usize, IOC_NEW, flags as usize]) }.map(owned)
}

fn owned(fd: usize) -> OwnedFd {
    // SAFETY: the kernel has just opened this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_the_kernels_bits_and_names() {
        assert_eq!(Features::MOVE.bits(), 1 << 16);
        assert_eq!(Features::all().bits(), (1 << 17) - 1);
        assert_eq!((Features::MOVE | Features::SIGBUS).names().collect::<Vec<_>>(), ["SIGBUS", "MOVE"]);
    }

    #[test]
    fn messages_say_how_to_get_it() {
        let text = OpenError::NeedsPrivilege { device: Errno::ACCESS }.to_string();
        for word in ["CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1", DEVICE, "Permission denied"] {
            assert!(text.contains(word), "{word} is not in: {text}");
        }
        let text = OpenError::MissingFeatures { missing: Features::MOVE | Features::POISON }.to_string();
        assert!(text.contains("lacks POISON, MOVE:"), "{text}");
        assert!(OpenError::NoKernelSupport.to_string().contains("CONFIG_USERFAULTFD"));
    }
}
