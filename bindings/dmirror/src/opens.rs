//! What this process has opened.
//!
//! # Rules
//! * Nothing exists before the first open: programs fork before they open.
//! * A [`Home`] belongs to the process that made it, and lives as long. After a fork the child sees its parent's as foreign, by the process's number, and never looks into it (it lies in memory
//!   that a fork does not inherit); its own first open makes its own.
//! * An open mirrors this process until the last copy of its descriptor, here or elsewhere, was closed. The service's threads hold the other end, and so they see it.
//! * Locks: [`OPENING`], then (one of) a slot, `desk`, `ending` or `ends`. A fork waits for `OPENING`, so that no child inherits the end that is the service's.
//! * What is here lies far from the program's mappings, and nothing is mapped later: a program may rely on a hole that it made.
#![allow(unsafe_code)] // places values in raw mappings; handlers that libc calls around a fork

use crate::abi::{self, Done};
use crate::device::Kind;
use crate::family;
use crate::lock::Lock;
use crate::name::Name;
use crate::service::{self, Desk, Request};
use crate::sys;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
use libc::c_int;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use uhmm_core::mode::Mode;
use uhmm_core::own;
use uhmm_core::port::{Port, Station};
use uhmm_core::{CoreRef, DeviceConfig};
use uhmm_os::mem::{self, Advice, Mapping};
use uhmm_os::signal::Deferred;
use uhmm_os::{Errno, system, tasks};

/// The process whose home [`HOME`] is. Set after it.
static OWNER: AtomicU32 = AtomicU32::new(0);
static HOME: AtomicPtr<Home> = AtomicPtr::new(core::ptr::null_mut());
/// Held while a descriptor is made.
static OPENING: Lock = Lock::new();
/// Whether anything was opened in this process or one that it was forked from: else no descriptor need be looked at.
static ACTIVE: AtomicBool = AtomicBool::new(false);

/// Opens that can be at once.
const SLOTS: usize = 4096;
/// Bytes of the buffer that keep their pages for the next command.
const WARM: usize = 4 << 20;
/// The longest buffer whose addresses are kept.
const KEPT: usize = 16 << 30;

/// What a process has opened.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) cookie: u64,
    pub(crate) station: Station,
    pub(crate) slots: &'static [Slot],
    pub(crate) desk: Desk,
    /// Held by who moves the service's descriptors in or out.
    pub(crate) ends: Mutex<()>,
    /// The service's epoll descriptor.
    pub(crate) epoll: AtomicI32,
    /// Held by who drops a port, so that others can wait for that.
    ending: Mutex<()>,
    /// The longest that was needed, while no command uses it: addresses are used up by mapping.
    buffer: Mutex<Option<Mapping>>,
    /// The service's threads that run.
    pub(crate) ready: AtomicU32,
}

/// A place for an open.
#[derive(Debug)]
pub(crate) struct Slot {
    live: RwLock<Option<Live>>,
    /// The last open's number.
    pub(crate) seq: AtomicU64,
    /// The other end of its descriptor, in the service's table; -1 if there is none.
    pub(crate) end: AtomicI32,
    /// The number of an open that is to end, for all copies of its descriptor were closed; else 0.
    over: AtomicU64,
}

/// An open.
#[derive(Debug)]
pub(crate) struct Live {
    seq: u64,
    pub(crate) device: u8,
    pub(crate) port: Port,
}

/// Locks; nobody panics with one of these held, and if so what it protects is as good as before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this process may have descriptors of this library's without an exec in between.
#[inline(always)]
pub(crate) fn active() -> bool {
    ACTIVE.load(Ordering::Relaxed)
}

/// This process's home, if it has opened anything.
#[inline(always)]
pub(crate) fn home() -> Option<&'static Home> {
    // A process that has opened nothing pays for a load; the rest is for who has, or whose parent has.
    if !active() || OWNER.load(Ordering::Acquire) != sys::pid() {
        return None;
    }
    let home = HOME.load(Ordering::Acquire);
    // SAFETY: set before `OWNER`, by this process, and never freed.
    unsafe { home.as_ref() }
}

/// The home that a descriptor belongs to, if that is this process's.
pub(crate) fn home_of(name: &Name) -> Option<&'static Home> {
    home().filter(|home| home.cookie == name.cookie)
}

/// Makes a descriptor for a file, as open(2) with these flags does.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`; `ENODEV` if this process may not handle its page faults.
pub(crate) fn open(kind: Kind, flags: c_int) -> Result<usize, Errno> {
    if flags & libc::O_DIRECTORY != 0 {
        return Err(Errno::NOTDIR);
    }
    if flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL {
        return Err(Errno::EXIST);
    }
    let _signals = Deferred::new(); // a handler that opens or closes would wait for this thread
    let _opening = OPENING.lock();
    let device = match kind {
        Kind::Device(device) => device,
        // There is nothing to be found at the other end.
        Kind::Null(_) | Kind::Gup | Kind::NullGup => {
            let name = Name { kind, cookie: sys::random(), slot: 0, seq: 0 };
            return named_pair(&name, flags).map(|[fd, other]| {
                sys::close(other);
                ACTIVE.store(true, Ordering::Relaxed);
                fd as usize
            });
        }
    };
    let home = match home() {
        Some(home) => home,
        None => settle()?,
    };
    home.open(device, flags).map(|fd| fd as usize)
}

/// A pair of sockets, the first with this name and open as the flags say. Nothing can be read from the first.
fn named_pair(name: &Name, flags: c_int) -> Result<[c_int; 2], Errno> {
    let pair = sys::socketpair()?;
    let prepare = || -> Result<(), Errno> {
        name.give(pair[0])?;
        // SAFETY: a descriptor of our own.
        unsafe {
            sys::call(libc::SYS_shutdown, [pair[0] as usize, libc::SHUT_RD as usize])?;
            if flags & libc::O_NONBLOCK != 0 {
                let now = sys::call(libc::SYS_fcntl, [pair[0] as usize, libc::F_GETFL as usize])?;
                sys::call(libc::SYS_fcntl, [pair[0] as usize, libc::F_SETFL as usize, now | libc::O_NONBLOCK as usize])?;
            }
            if flags & libc::O_CLOEXEC == 0 {
                sys::call(libc::SYS_fcntl, [pair[0] as usize, libc::F_SETFD as usize, 0])?;
            }
        }
        Ok(())
    };
    match prepare() {
        Ok(()) => Ok(pair),
        Err(error) => {
            pair.into_iter().for_each(sys::close);
            Err(error)
        }
    }
}

/// Makes this process's home.
fn settle() -> Result<&'static Home, Errno> {
    let station = station().inspect_err(complain).map_err(|_| Errno::NODEV)?;
    // The library stays, as its threads and handlers do. And a fork waits for whoever opens: these handlers run before the core's, which were registered earlier.
    static HANDLERS: AtomicBool = AtomicBool::new(false);
    if !HANDLERS.swap(true, Ordering::AcqRel) {
        system::pin_library(settle as *const () as usize);
        // SAFETY: two functions of this library that take and give a lock.
        unsafe { system::atfork(before_fork, after_fork, in_child) }?;
    }
    let slot = || Slot { live: RwLock::new(None), seq: AtomicU64::new(0), end: AtomicI32::new(-1), over: AtomicU64::new(0) };
    let slots = for_good(SLOTS, slot)?;
    let home = Home {
        cookie: sys::random(),
        station,
        slots,
        desk: Desk::new(),
        ends: Mutex::new(()),
        epoll: AtomicI32::new(-1),
        ending: Mutex::new(()),
        buffer: Mutex::new(own::map(c"uhmm dmirror", WARM).ok()),
        ready: AtomicU32::new(0),
    };
    let mut home = Some(home);
    let [home] = for_good(1, || home.take())? else { return Err(Errno::NOMEM) };
    let Some(shared) = home else { return Err(Errno::NOMEM) };
    service::start(shared)?;
    sys::trust_handlers();
    HOME.store(core::ptr::from_ref(shared).cast_mut(), Ordering::Release);
    OWNER.store(sys::pid(), Ordering::Release);
    ACTIVE.store(true, Ordering::Release);
    Ok(shared)
}

/// So many values in memory of their own, which is never unmapped.
fn for_good<T>(count: usize, mut value: impl FnMut() -> T) -> Result<&'static [T], Errno> {
    let (start, _) = own::map(c"uhmm dmirror", count * size_of::<T>())?.into_raw();
    let first = start as *mut T;
    for index in 0..count {
        // SAFETY: within the mapping, which is ours, writable and aligned to more than any type.
        unsafe { first.add(index).write(value()) };
    }
    // SAFETY: written above, and never unmapped.
    Ok(unsafe { core::slice::from_raw_parts(first, count) })
}

/// The memory of all devices.
fn station() -> Result<Station, uhmm_core::Error> {
    // Its workers have nothing to do.
    let config = DeviceConfig { coherent: true, threads: 1, ..DeviceConfig::new("dmirror") };
    let station = Station::open(config, uhmm_soft::open)?;
    let mode = CoreRef::get()?.mode();
    if mode != Mode::Full {
        let why = format!("this process may handle page faults in mode {} only, and needs full", mode.name());
        return Err(uhmm_core::Error::Device { name: "dmirror".into(), why });
    }
    Ok(station)
}

/// Says, once a process, why there is no device.
fn complain(why: &uhmm_core::Error) {
    static SAID: AtomicU32 = AtomicU32::new(0);
    if SAID.swap(sys::pid(), Ordering::Relaxed) != sys::pid() {
        let line = format!("uhmm: /dev/hmm_dmirror* cannot be opened: {why} (`uhmm doctor` says what is missing and how to get it)\n");
        tasks::write_stderr(line.as_bytes());
    }
}

extern "C" fn before_fork() {
    OPENING.take();
}

extern "C" fn after_fork() {
    OPENING.give();
}

extern "C" fn in_child() {
    // The number says so too, but for a child that is in a namespace of its own and has its parent's number there.
    OWNER.store(0, Ordering::Release);
    OPENING.give();
}

impl Home {
    fn open(&'static self, device: u8, flags: c_int) -> Result<c_int, Errno> {
        let free = |index: &usize| self.peek(*index, |live| live.is_none()) == Some(true);
        let index = (0..SLOTS).find(free).ok_or(Errno::NFILE)?;
        let slot = &self.slots[index];
        let seq = slot.seq.load(Ordering::Acquire) + 1;
        let name = Name { kind: Kind::Device(device), cookie: self.cookie, slot: index as u16, seq };
        let port = self.station.port(abi::owner(device)).map_err(|error| {
            complain(&error);
            Errno::NODEV
        })?;
        let [fd, other] = named_pair(&name, flags)?;
        {
            let _ending = lock(&self.ending); // who ends the slot's last open for a second time looks at its number
            slot.seq.store(seq, Ordering::Release);
            *slot.live.write().unwrap_or_else(PoisonError::into_inner) = Some(Live { seq, device, port });
        }
        let adopted = self.desk.ask(Request::Adopt { slot: index, thread: sys::tid(), fd: other });
        sys::close(other);
        if let Err(error) = adopted {
            sys::close(fd);
            self.end(index, seq);
            return Err(error);
        }
        Ok(fd)
    }

    /// A copy of a descriptor of this process's was closed, by this process: if it was the last, all that the device has to do about that is done on return.
    pub(crate) fn closed(&self, name: &Name) {
        let _signals = Deferred::new();
        let slot = usize::from(name.slot);
        if slot < SLOTS && self.desk.ask(Request::IsOver { slot, seq: name.seq }) == Ok(true) {
            self.end(slot, name.seq);
        }
    }

    /// Likewise, and nobody knows which.
    pub(crate) fn some_closed(&self) {
        for index in 0..SLOTS {
            let seq = self.peek(index, |live| live.as_ref().map(|live| live.seq));
            if let Some(seq) = seq.flatten() {
                self.closed(&Name { kind: Kind::Device(0), cookie: self.cookie, slot: index as u16, seq });
            }
        }
    }

    /// Ends an open whose last descriptor was closed; a command that is under way does that when it has ended.
    pub(crate) fn end(&self, index: usize, seq: u64) {
        let slot = &self.slots[index];
        let _ending = lock(&self.ending);
        if slot.seq.load(Ordering::Acquire) != seq {
            return; // long ago
        }
        slot.over.store(seq, Ordering::SeqCst);
        fence(Ordering::SeqCst); // either this sees that the slot is in use no more, or its last user sees that it is over
        let mut live = match slot.live.try_write() {
            Ok(live) => live,
            Err(TryLockError::Poisoned(live)) => live.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let ended = live.take_if(|live| live.seq == seq).map(|live| live.device); // and its port is dropped
        drop(live);
        if let Some(device) = ended {
            self.release(device);
        }
        slot.over.store(0, Ordering::SeqCst);
    }

    /// Brings home what a device has, of this process and of every other of its family.
    pub(crate) fn release(&self, device: u8) {
        let number = abi::owner(device).number;
        self.station.release(number);
        family::tell(self, number);
    }

    /// Uses an open's port.
    ///
    /// # Errors
    /// `EBADF` if it is over.
    pub(crate) fn with(&self, name: &Name, f: impl FnOnce(&Live) -> Result<Done, Errno>) -> Result<Done, Errno> {
        let slot = self.slots.get(usize::from(name.slot)).ok_or(Errno::BADF)?;
        let result = {
            let live = slot.live.read().unwrap_or_else(PoisonError::into_inner);
            live.as_ref().filter(|live| live.seq == name.seq).map_or(Err(Errno::BADF), f)
        };
        self.left(usize::from(name.slot));
        result
    }

    /// Whether `f` holds for any open; one that is just being opened or closed is not asked.
    pub(crate) fn any(&self, mut f: impl FnMut(&Live) -> bool) -> bool {
        (0..SLOTS).any(|index| self.peek(index, |live| live.as_ref().is_some_and(&mut f)) == Some(true))
    }

    /// Looks at a slot, unless somebody changes it.
    fn peek<R>(&self, index: usize, f: impl FnOnce(&Option<Live>) -> R) -> Option<R> {
        let result = self.slots[index].live.try_read().ok().map(|live| f(&live));
        self.left(index);
        result
    }

    /// To be called by who has used a slot: who closed the last descriptor meanwhile did not wait.
    fn left(&self, index: usize) {
        let slot = &self.slots[index];
        fence(Ordering::SeqCst);
        let over = slot.over.load(Ordering::SeqCst);
        if over != 0 {
            self.end(index, over);
        }
    }

    /// A buffer of so many bytes.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn buffer(&self, len: usize) -> Result<Buffer<'_>, Errno> {
        // Without waiting, for a signal handler may have interrupted who holds it.
        let kept = self.buffer.try_lock().ok().and_then(|mut kept| kept.take());
        let memory = match kept {
            Some(memory) if memory.len() >= len => memory,
            shorter => {
                drop(shorter);
                let room = if len <= KEPT { len.next_power_of_two().max(WARM) } else { len };
                own::map(c"uhmm dmirror", room)?
            }
        };
        Ok(Buffer { memory: Some(memory), len, home: self })
    }
}

/// A buffer, far from the program's mappings.
#[derive(Debug)]
pub(crate) struct Buffer<'a> {
    memory: Option<Mapping>,
    len: usize,
    home: &'a Home,
}

impl Buffer<'_> {
    /// Its bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        match &self.memory {
            // SAFETY: the mapping is ours alone, readable and writable, and at least this long.
            Some(memory) => unsafe { core::slice::from_raw_parts_mut(memory.as_ptr(), self.len) },
            None => &mut [],
        }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take().filter(|memory| memory.len() <= KEPT) else { return };
        if self.len > WARM {
            // SAFETY: our own memory, whose contents nobody needs any more.
            let _ = unsafe { mem::madvise(memory.start() + WARM, memory.len() - WARM, Advice::DontNeed) };
        }
        if let Ok(mut kept) = self.home.buffer.try_lock()
            && kept.as_ref().is_none_or(|kept| kept.len() < memory.len())
        {
            *kept = Some(memory);
        }
    }
}
