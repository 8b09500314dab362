//! The three modes: what this process may do with userfaultfd decides how much of uhmm it gets. The same program is right in all of them.
//!
//! | mode | memory on a device | what a launch does |
//! |---|---|---|
//! | full | stays there until somebody touches it | moves what is declared; nothing comes back until it is touched |
//! | user-mode-only | stays only where that was asked for, for system calls on missing pages fail with `EFAULT` and a raw fork's child would read zeros | copies; written ranges are home when it returns; what was only read stays as a copy, and writes are found by asynchronous write protection |
//! | none | never stays | copies everything that is declared in and out |
//!
//! Who uses it: programs that ask what they have got (`uhmm::Uhmm::mode`); drivers, which are told when they are opened and make their userfaultfds so
//! ([`Mode::open`]).
//!
//! ```
//! use uhmm_core::mode::Mode;
//!
//! let name = |mode: Mode| mode.name(); // what UHMM_MODE takes
//! assert_eq!([Mode::Full, Mode::UserModeOnly, Mode::None].map(name), ["full", "user-mode-only", "none"]);
//! assert_eq!(Mode::VARIABLE, "UHMM_MODE");
//! ```

use crate::error::Error;
use crate::space::NEEDED;
use uhmm_os::uffd::{Features, OpenError, Rights, Userfaultfd};

/// What this process may do. Chosen when uhmm starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// userfaultfd with the kernel's own faults and with events.
    Full,
    /// userfaultfd with faults of user code only: what an ordinary user has by default.
    UserModeOnly,
    /// No userfaultfd.
    None,
}

/// What the userfaultfd must be able to do in user-mode-only mode.
const NEEDED_BY_USERS: Features = NEEDED.union(Features::WP_ASYNC).union(Features::WP_UNPOPULATED);

impl Mode {
    /// The variable of the environment that asks for a mode.
    pub const VARIABLE: &str = "UHMM_MODE";

    /// Its name, as [`VARIABLE`](Self::VARIABLE) takes it.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Full => "full",
            Mode::UserModeOnly => "user-mode-only",
            Mode::None => "none",
        }
    }

    /// The rights of the mode's userfaultfds, if it has any.
    pub fn rights(self) -> Option<Rights> {
        match self {
            Mode::Full => Some(Rights::Full),
            Mode::UserModeOnly => Some(Rights::UserModeOnly),
            Mode::None => None,
        }
    }

    /// A userfaultfd of this mode with other features, or one that watches nothing.
    ///
    /// # Errors
    /// [`Error::NoUserfaultfd`], [`Error::System`].
    pub fn open(self, features: Features) -> Result<Userfaultfd, Error> {
        match self.rights() {
            Some(rights) => Ok(Userfaultfd::open(rights, features)?),
            None => Userfaultfd::none().map_err(|e| Error::System("open a descriptor", e)),
        }
    }

    /// The mode that the environment asks for, else the best that can be had, with its userfaultfd for the program's memory.
    pub(crate) fn choose(markers: bool) -> Result<(Mode, Userfaultfd), Error> {
        let asked = match std::env::var(Self::VARIABLE) {
            Err(_) => None,
            Ok(name) => match [Mode::Full, Mode::UserModeOnly, Mode::None].into_iter().find(|mode| mode.name() == name) {
                Some(mode) => Some(mode),
                None if name.is_empty() => None,
                None => return Err(Error::NoMode { name }),
            },
        };
        if let Some(mode) = asked {
            return Ok((mode, mode.program(markers)?));
        }
        for mode in [Mode::Full, Mode::UserModeOnly] {
            match mode.program(markers) {
                Ok(uffd) => return Ok((mode, uffd)),
                Err(Error::NoUserfaultfd(OpenError::Os { what, errno })) => return Err(OpenError::Os { what, errno }.into()),
                Err(_) => {}
            }
        }
        Ok((Mode::None, Mode::None.program(false)?))
    }

    fn program(self, markers: bool) -> Result<Userfaultfd, Error> {
        let markers = if markers { Features::WP_UNPOPULATED } else { Features::empty() };
        // Forks that go past libc's are told where the process may know of them (CAP_SYS_PTRACE).
        if self == Mode::Full
            && let Ok(uffd) = self.open(NEEDED.union(Features::EVENT_FORK).union(markers))
        {
            return Ok(uffd);
        }
        self.open(if self == Mode::UserModeOnly { NEEDED_BY_USERS } else { NEEDED.union(markers) })
    }
}
