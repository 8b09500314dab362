//! What a program may say about ranges of its memory.

/// A place for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// The process's own memory.
    Home,
    /// The device of this number.
    Device(u32),
}

/// What a program says about a range. Each but [`Normal`](Advice::Normal) adds to what was said before.
///
/// It is about what [policies](super::Policy) decide; [`NoMigrate`](Advice::NoMigrate), [`AccessedBy`](Advice::AccessedBy) and the order in which blocks leave a full device hold whatever
/// a policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Advice {
    /// Nothing: takes all other advice about the range back.
    Normal,
    /// Where it is at home. On a device: a CPU's touch brings only the touched page, and other blocks leave the device before it. [`Location::Home`]: a CPU's touch brings the
    /// rest of the block too.
    PreferredLocation(Location),
    /// Mostly read: a CPU's read of what a device has leaves the device its copy, a device's read leaves the CPU its page, and what a launch declares as read and
    /// written is on both sides until its kernel writes it.
    ReadMostly,
    /// Kernels of this device follow pointers into it: each launch there has it on the device before it begins (the CPU keeps its pages, until either side writes), as far as
    /// there is room, so that the kernel need not wait for it.
    AccessedBy(u32),
    /// It never leaves the program's memory, and is brought there now. A launch that only reads it has a copy on the device, of what it writes it has a copy for its time. What a kernel
    /// touches without having declared it is a copy as of that touch: what the kernel changes there is written back when the launch ends, and until then
    /// neither side sees the other's writes. A device that reaches it uses it in place.
    NoMigrate,
    /// It will not be needed for a while: it leaves a full device first.
    WillNotNeed,
}

/// What a program has said about some memory.
///
/// ```
/// use uhmm_core::policy::{Advice, Advised, Location};
///
/// let said = Advised::default().and(Advice::ReadMostly).and(Advice::AccessedBy(1));
/// assert!(said.read_mostly() && said.accessed_by(1) && !said.accessed_by(2));
/// assert_eq!(said.preferred(), None::<Location>);
/// assert_eq!(said.and(Advice::Normal), Advised::default()); // takes all back
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Advised {
    flags: u8,
    /// 0 for none, 1 for home, else a device's number plus 1.
    preferred: u8,
    /// A bit for each device.
    accessed_by: u32,
}

const NO_MIGRATE: u8 = 1;
const READ_MOSTLY: u8 = 2;
const WILL_NOT_NEED: u8 = 4;

impl Advised {
    /// [`Advice::NoMigrate`].
    pub fn no_migrate(self) -> bool {
        self.flags & NO_MIGRATE != 0
    }

    /// [`Advice::ReadMostly`].
    pub fn read_mostly(self) -> bool {
        self.flags & READ_MOSTLY != 0
    }

    /// [`Advice::WillNotNeed`].
    pub fn will_not_need(self) -> bool {
        self.flags & WILL_NOT_NEED != 0
    }

    /// [`Advice::PreferredLocation`].
    pub fn preferred(self) -> Option<Location> {
        match self.preferred {
            0 => None,
            1 => Some(Location::Home),
            number => Some(Location::Device(u32::from(number) - 1)),
        }
    }

    /// [`Advice::AccessedBy`] this device.
    pub fn accessed_by(self, device: u32) -> bool {
        device < 32 && self.accessed_by >> device & 1 != 0
    }

    /// The same and what is said now.
    #[must_use]
    pub fn and(mut self, advice: Advice) -> Self {
        match advice {
            Advice::Normal => self = Advised::default(),
            Advice::PreferredLocation(Location::Home) => self.preferred = 1,
            Advice::PreferredLocation(Location::Device(number)) => self.preferred = u8::try_from(number + 1).unwrap_or(0),
            Advice::ReadMostly => self.flags |= READ_MOSTLY,
            Advice::AccessedBy(device) => self.accessed_by |= 1u32.checked_shl(device).unwrap_or(0),
            Advice::NoMigrate => self.flags |= NO_MIGRATE,
            Advice::WillNotNeed => self.flags |= WILL_NOT_NEED,
        }
        self
    }

    /// What was said of either.
    pub(crate) fn or(self, other: Self) -> Self {
        Advised {
            flags: self.flags | other.flags,
            preferred: if self.preferred == 0 { other.preferred } else { self.preferred },
            accessed_by: self.accessed_by | other.accessed_by,
        }
    }

    /// The same without a device that is closed, whose number may be another's soon.
    pub(crate) fn without(mut self, device: u32) -> Self {
        self.accessed_by &= !1u32.checked_shl(device).unwrap_or(0);
        if self.preferred() == Some(Location::Device(device)) {
            self.preferred = 0;
        }
        self
    }
}

impl core::fmt::Debug for Advised {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut list = f.debug_list();
        let said =
            [(self.read_mostly(), Advice::ReadMostly), (self.no_migrate(), Advice::NoMigrate), (self.will_not_need(), Advice::WillNotNeed)];
        list.entries(said.into_iter().filter(|entry| entry.0).map(|entry| entry.1));
        list.entries(self.preferred().map(Advice::PreferredLocation));
        list.entries((0..32).filter(|&device| self.accessed_by(device)).map(Advice::AccessedBy)).finish()
    }
}
