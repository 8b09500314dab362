//! A port: what a device does with a process through a page table of its own, in the kernel's words (`hmm_range_fault`, `migrate_vma`, device-exclusive access).
//!
//! A [`Station`] gives a process the memory that ports share; a [`Port`] is one opened device. Its *entries* say which pages the device may access now. Whatever changes
//! the mapping of a page erases its entry; a migration to the port's own device does not.
//!
//! The contents of pages that have migrated lie in one memory for all devices of a process, and a tag for each page says whose it is: pages of one block (2 MiB) can be on several devices.
//!
//! | module | what |
//! |---|---|
//! | `table` | the entries |
//! | `access` | reads and writes through them |
//! | `migrate` | migration both ways, and exclusive access |
//! | `carry` | pages whose mapping is moved |
//! | `huge` | blocks that come home as one huge page |
//! | `tags` | whose pages are |
//!
//! Examples: `bindings/dmirror`, which serves a whole interface by it, and `uhmm/tests/suite/ports.rs`.

mod access;
pub(crate) mod carry;
pub(crate) mod huge;
mod migrate;
mod table;
pub(crate) mod tags;

use crate::core::{Core, Device, DeviceRef};
use crate::error::Error;
use crate::home;
use crate::line::Who;
use crate::mirror::{Fault, Mirror, Reason, Request};
use crate::mode::Mode;
use crate::own;
use crate::page::{Span, Va};
use crate::process::{self, CoreRef, DeviceConfig, OpenDriver};
use crate::space;
use crate::sync::*;
use core::ops::Range;
use std::time::{Duration, Instant};
use table::Table;
use uhmm_os::{Errno, PAGE};

/// Which device a port belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Its number, from 1 to [`Owner::MOST`]. Ports of one number see each other's pages as their own.
    pub number: u8,
    /// The CPU uses its memory in place.
    pub coherent: bool,
}

impl Owner {
    /// The largest number.
    pub const MOST: u8 = 14;
}

/// What a command of a port meets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PortError {
    /// There is no mapping that may be read, or nothing behind it (beyond the end of a file): `EFAULT`.
    #[error("{address:#x} is not mapped, may not be read, or has nothing behind it")]
    Fault {
        /// The first such page.
        address: Va,
    },
    /// The page may be read and not written: `EPERM`.
    #[error("{address:#x} may be read and not written")]
    Denied {
        /// The first such page.
        address: Va,
    },
    /// Invalidated again and again: `EBUSY`.
    #[error("the range was changed again and again while it was looked at")]
    Busy,
    /// Pages there cannot migrate at all: no mapping, no right to read, huge pages of a pool, a device's mapping: `EINVAL`.
    #[error("pages at {address:#x} cannot migrate: no mapping, no right to read it, huge pages of a pool, or a device's")]
    Unfit {
        /// The first such address.
        address: Va,
    },
    /// A page has no entry when all should have one: `ENOENT`.
    #[error("the device has no entry for {address:#x}")]
    Missing {
        /// The first such page.
        address: Va,
    },
    /// Exclusive access is for anonymous memory: `EOPNOTSUPP`.
    #[error("{address:#x} is not anonymous memory")]
    NotAnonymous {
        /// The first such page.
        address: Va,
    },
    /// The system refuses something.
    #[error("system error: {0}")]
    System(Errno),
}

/// What a device finds at one page, without faulting anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sight {
    /// No mapping, no right to read it, or a device's mapping that cannot be looked into.
    pub error: bool,
    /// It may be read.
    pub read: bool,
    /// It may be written without a fault.
    pub write: bool,
    /// It is mapped by an entry of 2 MiB.
    pub huge: bool,
    /// It is mapped by an entry of 1 GiB.
    pub giant: bool,
    /// It is the zero page.
    pub zero: bool,
    /// Its place, if that is a device's memory.
    pub place: Place,
}

/// Whose memory a page that can be accessed lies in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Place {
    /// The system's.
    #[default]
    System,
    /// The port's own device's, private.
    Private,
    /// The port's own device's, coherent.
    Coherent,
    /// Another coherent device's.
    OtherCoherent,
}

/// How long a range that is invalidated again and again is looked at.
pub const BUDGET: Duration = Duration::from_secs(1);

/// The memory that all ports of a process share.
#[derive(Debug)]
pub struct Station {
    store: DeviceRef,
    core: CoreRef,
}

/// One opened device.
#[derive(Debug)]
pub struct Port {
    mirror: Mirror<Table>,
    store: DeviceRef,
    owner: Owner,
    fail: AtomicBool,
}

impl Station {
    /// Opens the memory, as the device that `config` and `open` describe: a coherent one.
    ///
    /// # Errors
    /// Those of [`CoreRef::get`] and [`CoreRef::device`]; [`Error::Mirror`] where the process may not use userfaultfd for its own system calls.
    pub fn open(config: DeviceConfig, open: OpenDriver) -> Result<Self, Error> {
        space::want_markers();
        let core = CoreRef::get()?;
        if core.mode() != Mode::Full {
            return Err(Error::Mirror { why: "it takes userfaultfd in full mode (see `uhmm doctor`)" });
        }
        let store = core.device(DeviceConfig { coherent: true, ..config }, open)?;
        core.core().tags.begin(store.id()).map_err(no_room)?;
        Ok(Station { store, core })
    }

    /// A port of a device.
    ///
    /// # Errors
    /// Those of [`CoreRef::mirror`].
    pub fn port(&self, owner: Owner) -> Result<Port, Error> {
        let table = Table::new([self.store.id(), migrate::IDS + u32::from(owner.number)]).map_err(no_room)?;
        let mirror = self.core.mirror_span(EVERYTHING, table)?;
        Ok(Port { mirror, store: self.store.again()?, owner, fail: AtomicBool::new(false) })
    }

    /// Brings home all that lies in the memory of the device with this number, and revokes what is exclusive to it.
    pub fn release(&self, number: u8) {
        let store = &self.store;
        let _ = store.ask(|core, dev| {
            core.space.settle();
            let _turn = core.turns.enter(Who::Alone);
            let _prepare = core.prepare.lock();
            home::send_all_home(core, dev, EVERYTHING, |state, va| (state.private() | state.coherent()) & core.tags.all_of(va, number))
        });
    }

    /// Pages of files with this inode on this device (major, minor) are a device's: they can be read, and do not migrate.
    pub fn add_device_file(&self, dev: (u32, u32), inode: u64) {
        self.core.core().tags.add_file(dev, inode);
    }

    /// The mappings of a range that must be moved one by one: where any of them is watched mremap(2) does not move several together, but fails (`EFAULT`) when it has moved the first. Empty
    /// if it may be called once for all.
    pub fn pieces(&self, range: Range<Va>) -> Vec<Range<Va>> {
        let span = Span::touching(range.start, range.end.min(EVERYTHING.end));
        let core = self.core.core();
        let found = self.store.ask(|_, _| {
            let (mut pieces, mut any, mut at) = (vec![], false, span.start);
            while at < span.end {
                let Ok(Some(vma)) = core.space.maps.find(at) else { break };
                let part = Span { start: vma.start.max(at), end: vma.end.min(span.end) };
                at = vma.end;
                if !part.is_empty() {
                    any |= core.space.uffd.watches(part.start) != Ok(false);
                    pieces.push(part.start..part.end);
                }
            }
            Ok(if any && pieces.len() > 1 { pieces } else { vec![] })
        });
        found.unwrap_or_default()
    }

    /// Whether a device has any page of a range, that the CPU uses in place or not at all.
    pub fn holds(&self, range: Range<Va>) -> bool {
        let span = Span::touching(range.start, range.end.min(EVERYTHING.end));
        let core = self.core.core();
        let found = self.store.ask(|_, _| {
            let _hold = core.space.hold();
            let mut any = false;
            core.dir.for_each(span, |block, part| any |= block.lock().resident().meets(part.bits()));
            Ok(any)
        });
        found.unwrap_or(false)
    }

    /// Another userfaultfd, the program's own, is about to watch a range: what is there comes home, and uhmm's watch ends.
    pub fn step_aside(&self, range: Range<Va>) {
        let span = Span::touching(range.start, range.end);
        let _ = self.store.ask(|core, dev| {
            let _turn = core.turns.enter(Who::Alone);
            let _prepare = core.prepare.lock();
            home::send_all_home(core, dev, span, |state, _| state.resident())?;
            let _hold = core.space.hold();
            let mut at = span.start;
            while at < span.end {
                let Ok(Some(vma)) = core.space.maps.find(at) else { break };
                let part = Span { start: vma.start, end: vma.end }.and(Span { start: at, end: span.end });
                at = vma.end;
                // Without the watch a touch of what is still away, on whatever device, would read zeros.
                let mut away = false;
                core.dir.for_each(part, |block, part| {
                    let state = block.lock();
                    away |= (state.resident() | state.gone() | state.busy()).meets(part.bits());
                });
                let may = vma.is_private_anonymous() && !part.is_empty() && !away;
                if may && core.space.uffd.unregister(part.start, part.len()).is_ok() {
                    core.dir.for_each(part, |block, part| block.lock().reg -= part.bits());
                }
            }
            Ok(())
        });
    }
}

fn no_room(e: Errno) -> Error {
    Error::System("reserve address space (limited by RLIMIT_AS or vm.overcommit_memory=2)", e)
}

/// Whether uhmm's own memory may lie there, or no process's: no device reaches it.
fn is_ours(span: Span) -> bool {
    span.end > EVERYTHING.end || !span.and(own::PLACE).is_empty()
}

/// All addresses of a process.
const EVERYTHING: Span = Span { start: 0, end: 1 << 47 };

impl Port {
    /// Which device it belongs to.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Does something on the port's thread.
    fn on<R: Send>(&self, job: impl FnOnce(&Core, &Device, &Table) -> Result<R, PortError> + Send) -> Result<R, PortError> {
        let (dev, table) = (self.store.dev(), self.mirror.notifier());
        self.mirror.ask(move |core| job(core, dev, table)).unwrap_or(Err(PortError::System(Errno::SRCH)))
    }

    /// Faults pages in for the device, and enters them.
    fn fault(&self, span: Span, write: bool, wait: bool, limit: Instant) -> Result<(), PortError> {
        if is_ours(span) {
            return Err(PortError::Fault { address: span.start });
        }
        let request = if write { Request::write() } else { Request::read() }.for_port(self.owner.number, wait);
        loop {
            let left = limit.saturating_duration_since(Instant::now());
            let pages = self.mirror.range_fault(span.start..span.end, &request, left).map_err(|fault| told(fault, write))?;
            let entered = self.on(|core, _, table| Ok(access::enter(core, table, &pages, || !self.mirror.read_retry(pages.seq))))?;
            if entered {
                return Ok(());
            }
            if Instant::now() >= limit {
                return Err(PortError::Busy);
            }
        }
    }

    /// Accesses whole pages by `access`, which says how many were reached before one without an entry; those are faulted in.
    fn rounds(
        &self,
        start: Va,
        bytes: usize,
        write: bool,
        wait: bool,
        mut access: impl FnMut(usize) -> Result<usize, PortError>,
    ) -> Result<u64, PortError> {
        let limit = Instant::now() + BUDGET;
        let (mut done, mut rounds) = (0, 0);
        loop {
            done += access(done)?;
            if done * PAGE >= bytes {
                return Ok(rounds);
            }
            if Instant::now() >= limit {
                return Err(PortError::Busy);
            }
            self.fault(Span { start: start + done * PAGE, end: start + bytes }, write, wait, limit)?;
            rounds += 1;
        }
    }

    /// The device reads `out.len()` bytes, whole pages, from `start` on, through its page table: how many rounds of faults that took.
    ///
    /// # Errors
    /// [`PortError::Fault`], [`PortError::Busy`]. `out` has undefined contents then.
    pub fn read(&self, start: Va, out: &mut [u8]) -> Result<u64, PortError> {
        self.read_and(start, out, false)
    }

    /// As [`read`](Self::read), but that pages which another userfaultfd has to provide are waited for; there they are [`PortError::Fault`].
    ///
    /// # Errors
    /// As `read`.
    pub fn read_unlocked(&self, start: Va, out: &mut [u8]) -> Result<u64, PortError> {
        self.read_and(start, out, true)
    }

    fn read_and(&self, start: Va, out: &mut [u8], wait: bool) -> Result<u64, PortError> {
        let (bytes, number) = (out.len(), self.owner.number);
        self.rounds(start, bytes, false, wait, |done| {
            let out = &mut out[done * PAGE..];
            self.on(|core, _, table| access::read(core, table, number, start + done * PAGE, out))
        })
    }

    /// The device writes whole pages from `start` on: how many rounds of faults that took.
    ///
    /// # Errors
    /// [`PortError::Fault`], [`PortError::Denied`], [`PortError::Busy`]. Pages before the one that fails may be written.
    ///
    /// # Safety
    /// As writing by a pointer: the program expects it.
    #[allow(unsafe_code)]
    pub unsafe fn write(&self, start: Va, data: &[u8]) -> Result<u64, PortError> {
        let number = self.owner.number;
        self.rounds(start, data.len(), true, false, |done| {
            let data = &data[done * PAGE..];
            // SAFETY: the caller's promise.
            self.on(|core, _, table| unsafe { access::write(core, table, number, start + done * PAGE, data) })
        })
    }

    /// Reads what the device has entries for: all of it.
    fn read_back(&self, start: Va, out: &mut [u8]) -> Result<(), PortError> {
        let (pages, number) = (out.len() / PAGE, self.owner.number);
        let read = self.on(|core, _, table| access::read(core, table, number, start, out))?;
        if read == pages { Ok(()) } else { Err(PortError::Missing { address: start + read * PAGE }) }
    }

    fn job<'a>(&'a self, core: &'a Core, dev: &'a Device, table: &'a Table, exclusive: bool) -> migrate::Job<'a> {
        migrate::Job { core, dev, table, owner: self.owner, exclusive, fail: &self.fail }
    }

    /// Moves pages to the device, then reads all of them through its page table.
    ///
    /// # Errors
    /// [`PortError::Unfit`], with what came before it moved; [`PortError::Missing`] if a page has not moved and has no entry.
    pub fn migrate_to_device(&self, start: Va, out: &mut [u8]) -> Result<(), PortError> {
        let span = access::span(start, out.len());
        self.on(|core, dev, table| self.job(core, dev, table, false).to_device(span))?;
        self.read_back(start, out)
    }

    /// Moves this device's pages of a range back to the system: how many entries moved (a block of 2 MiB that moves as one is one).
    ///
    /// # Errors
    /// [`PortError::Unfit`], as above.
    pub fn migrate_to_system(&self, range: Range<Va>) -> Result<u64, PortError> {
        let span = Span { start: range.start, end: range.end };
        self.on(|core, dev, table| self.job(core, dev, table, false).to_system(span))
    }

    /// What the device finds at each page, without faulting anything.
    ///
    /// # Errors
    /// [`PortError::Busy`].
    pub fn snapshot(&self, start: Va, out: &mut [Sight]) -> Result<(), PortError> {
        let end = start.saturating_add(out.len() * PAGE);
        if is_ours(Span { start, end }) {
            out.fill(Sight { error: true, ..Sight::default() });
            return Ok(());
        }
        let pages = self.mirror.snapshot_for_port(start..end, self.owner.number, BUDGET).map_err(|fault| told(fault, false))?;
        let (tags, table) = (&self.store.core().tags, self.mirror.notifier());
        for (page, (entry, sight)) in pages.entries.iter().zip(out).enumerate() {
            let va = start + page * PAGE;
            let (read, write) = entry.mapping_allows();
            let own = tags.is(va, self.owner.number);
            *sight = Sight { error: !entry.is_mapped() || !read || entry.is_no_memory(), ..Sight::default() };
            if sight.error {
                continue;
            }
            if entry.on_device().is_some() {
                let own = entry.is_own();
                let place = if own { Place::Private } else { Place::System };
                *sight = Sight { read: own, write: own && write, huge: own && entry.is_huge(), place, ..Sight::default() };
            } else if entry.may_read() {
                let named = table.word(va).is_some_and(|word| word.has(table::NAMED));
                let place = match entry.on_coherent_device() {
                    None if named && self.owner.coherent => Place::Coherent,
                    None if named => Place::Private,
                    Some(_) if own => Place::Coherent,
                    Some(_) => Place::OtherCoherent,
                    None => Place::System,
                };
                let write = entry.may_write() && !entry.is_of_device_file();
                let (huge, giant) = (entry.is_huge() && !entry.is_giant(), entry.is_giant());
                *sight = Sight { error: false, read: true, write, huge, giant, zero: entry.is_zero_page(), place };
            }
        }
        Ok(())
    }

    /// Makes pages exclusive to the device, then reads them: any touch by the CPU, a fork or a change of protection revokes that.
    ///
    /// # Errors
    /// [`PortError::Fault`], also for what may not be written; [`PortError::NotAnonymous`]; [`PortError::Missing`] if it was revoked before all was read.
    pub fn exclusive(&self, start: Va, out: &mut [u8]) -> Result<(), PortError> {
        let span = access::span(start, out.len());
        self.on(|core, dev, table| {
            let mut at = span.start;
            while at < span.end {
                let vma = migrate::mapping(core, at)?.filter(|vma| vma.read && vma.write).ok_or(PortError::Fault { address: at })?;
                if core.space.is_no_memory(&vma, at) {
                    return Err(PortError::Fault { address: at });
                }
                if !vma.is_private_anonymous() {
                    return Err(PortError::NotAnonymous { address: at });
                }
                let part = Span { start: at, end: vma.end.min(span.end) };
                // As a write by the CPU: what a device has of it comes home, and it is the program's own.
                migrate::own_pages(part).map_err(|_| PortError::Fault { address: at })?;
                at = part.end;
            }
            let job = self.job(core, dev, table, true);
            job.take_all_home(span)?;
            job.to_device(span)
        })?;
        self.read_back(start, out)
    }

    /// Whether any page of the range is still exclusive to this port.
    pub fn is_exclusive(&self, range: Range<Va>) -> bool {
        let table = self.mirror.notifier();
        range.step_by(PAGE).any(|va| table.word(va).is_some_and(|word| word.has(table::EXCLUSIVE)))
    }

    /// Whether the port's next allocation of memory, for a block or a page, fails.
    pub fn fail_allocation(&self, fail: bool) {
        self.fail.store(fail, Ordering::Relaxed);
    }
}

/// What a fault means for a command.
fn told(fault: Fault, write: bool) -> PortError {
    match fault {
        Fault::Protected { address, write: true } if write => PortError::Denied { address },
        Fault::Unmapped { address } | Fault::Protected { address, .. } | Fault::Unreachable { address } => PortError::Fault { address },
        Fault::Range { start, .. } => PortError::Fault { address: start },
        Fault::Busy { .. } => PortError::Busy,
        Fault::System(e) => PortError::System(e),
        _ => PortError::System(Errno::IO),
    }
}

/// Tells ports that mappings of a range change in a way that nothing else announces: a change of protection, above all. To be called before it is made; the change counts as made when
/// the value is dropped.
#[derive(Debug)]
pub struct Change(Option<Span>);

/// Begins a change of a range.
pub fn change(range: Range<Va>) -> Change {
    let span = Span::touching(range.start, range.end.min(EVERYTHING.end));
    let begun = !span.is_empty()
        && with_core(|core| {
            core.space.mirrors.begin(span, Reason::Protect);
            drop(core.rights.lock()); // a port that has changed the protection for a moment gives it back first
        });
    Change(begun.then_some(span))
}

impl Drop for Change {
    fn drop(&mut self) {
        if let Some(span) = self.0 {
            with_core(|core| core.space.mirrors.end(span));
        }
    }
}

/// Does something on the keeper, if there are mirrors; false if there are none.
fn with_core(f: impl FnOnce(&Core) + Send) -> bool {
    if !crate::core::current().is_some_and(|core| core.space.mirrors.any()) {
        return false;
    }
    let Ok(held) = process::lock() else { return false };
    held.ask_keeper(f).is_some()
}
