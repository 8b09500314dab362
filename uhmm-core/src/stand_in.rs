//! What lets a kernel run on that has touched what it must not, on a device that uses the process's addresses as they are: the launch fails with the address, the process
//! lives, and when the launch has ended everything is as it was.
//!
//! | the kernel touched | meanwhile there is |
//! |---|---|
//! | nothing that is mapped | a page of zeroes |
//! | private memory, not for that | the page itself, writable; its old contents come back |
//! | shared memory, not for that, or beyond the end of its file | a copy of the page; a second mapping keeps the first one's place |
//!
//! Meanwhile the process's other threads see the same, for there is one address space. What cannot be stood in for (an address that is none, code that is no code, the page at
//! 0 where the process may not map it, a private file's page beyond the end of the file) is a fault as in the program itself.
//!
//! It runs in the worker's signal handler, as [`crate::device_fault`]. Its lock is held over a guarded read of the program's memory; nobody who serves faults takes it.
#![allow(unsafe_code)] // changes the protection of the program's pages, and takes their place

use crate::core::{Core, Device};
use crate::own::{self, OwnSlice};
use crate::page::Va;
use crate::sync::*;
use uhmm_os::maps::Vma;
use uhmm_os::mem::{self, Prot, RemapFlags, Reserve};
use uhmm_os::signal::FaultInfo;
use uhmm_os::{Errno, PAGE, copy};

/// Pages at a time. With more, those before make room, and fault again.
const MOST: usize = 256;
/// siginfo's codes of SIGSEGV: nothing is mapped; not for that. And of SIGBUS: nothing is behind it.
const MAPERR: i32 = 1;
const ACCERR: i32 = 2;
const ADRERR: i32 = 2;
const SIGBUS: i32 = 7;
const SIGSEGV: i32 = 11;
const NAME: &core::ffi::CStr = c"uhmm stand-in";

#[derive(Clone, Copy, Debug)]
enum How {
    /// There was nothing.
    Hole,
    /// The page is writable, and was this before; its contents are saved.
    Opened(Prot),
    /// Another page; the mapping that was there is at this address, too.
    Replaced(usize),
}

#[derive(Clone, Copy, Debug)]
struct StandIn {
    page: Va,
    how: How,
    /// The kernel shows our name of it.
    named: bool,
}

#[derive(Debug)]
struct List {
    all: [StandIn; MOST],
    count: usize,
    saved: OwnSlice<[u8; PAGE]>,
}

#[allow(unsafe_code)]
// SAFETY: plain bytes.
unsafe impl own::Zeroed for [u8; PAGE] {}

/// Those of one device's running launch.
#[derive(Debug)]
pub(crate) struct StandIns(Mutex<List>);

impl StandIns {
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let none = StandIn { page: 0, how: How::Hole, named: false };
        Ok(StandIns(Mutex::new(List { all: [none; MOST], count: 0, saved: OwnSlice::new(c"uhmm saved pages", MOST)? })))
    }
}

/// Makes the access possible that faulted. False if it cannot be.
pub(crate) fn put(core: &Core, dev: &Device, info: &FaultInfo) -> bool {
    let page = info.address & !(PAGE - 1);
    let known_cause = matches!((info.signal, info.code), (SIGSEGV, MAPERR | ACCERR) | (SIGBUS, ADRERR));
    if !known_cause || info.rip == info.address {
        return false;
    }
    let mut list = dev.stand_ins.0.lock();
    let there = list.all[..list.count].iter().any(|one| one.page == page);
    let Ok(vma) = core.space.mapping(page) else { return false };
    let allowed = vma.is_some_and(|vma| vma.read && (vma.write || !info.write));
    if allowed && (there || info.signal != SIGBUS) {
        return true; // another worker was first
    }
    if list.count == MOST {
        list.take_away(core);
    }
    let at = list.count;
    let how = match vma {
        None => hole(page),
        Some(vma) if vma.shared => replace(page),
        // One that stands in already, and was protected since: its first contents are the right ones.
        Some(_) if there && info.signal != SIGBUS => return open(page),
        Some(vma) if info.signal != SIGBUS => save(&vma, page, &mut list.saved[at]),
        Some(_) => None,
    };
    let Some(how) = how else { return false };
    list.all[at] = StandIn { page, how, named: is_named(core, page) };
    list.count += 1;
    true
}

/// The launch has ended.
pub(crate) fn clear(core: &Core, dev: &Device) {
    dev.stand_ins.0.lock().take_away(core);
}

impl List {
    /// The last first: a place may have been stood in for twice.
    fn take_away(&mut self, core: &Core) {
        while let Some(index) = self.count.checked_sub(1) {
            self.count = index;
            let StandIn { page, how, named } = self.all[index];
            // What the program has mapped there meanwhile is its own.
            match how {
                How::Hole if is_ours(core, page, named) => {
                    // SAFETY: it is the stand-in.
                    let _ = unsafe { mem::munmap(page, PAGE) };
                }
                How::Hole => {}
                How::Replaced(stash) if is_ours(core, page, named) => {
                    // SAFETY: the stand-in is replaced by the mapping whose place it took, which nobody else knows at its address.
                    let _ = unsafe { mem::mremap(stash, PAGE, PAGE, RemapFlags::MAYMOVE | RemapFlags::FIXED, page) };
                }
                How::Replaced(stash) => {
                    // SAFETY: only we know this second mapping.
                    let _ = unsafe { mem::munmap(stash, PAGE) };
                }
                How::Opened(prot) => {
                    let vma = core.space.mapping(page);
                    if matches!(vma, Ok(Some(vma)) if !vma.shared && vma.read && vma.write) {
                        // SAFETY: the bytes are those that the program, which may not write them, left there; what has gone meanwhile is an error, not a crash.
                        let _ = unsafe { copy::guarded(page as *mut u8, self.saved[index].as_ptr(), PAGE) };
                        // SAFETY: it was so before.
                        let _ = unsafe { mem::mprotect(page, PAGE, prot) };
                    }
                }
            }
        }
    }
}

/// Whether what is mapped there is still the stand-in. Where the kernel shows no names, whatever looks like it is taken for it.
fn is_ours(core: &Core, page: Va, named: bool) -> bool {
    let alike = |vma: Vma| vma.is_private_anonymous() && vma.read && vma.write;
    is_named(core, page) == named && core.space.mapping(page).ok().flatten().is_some_and(alike)
}

fn is_named(core: &Core, page: Va) -> bool {
    let mut buffer = [0u8; 64];
    let name = core.space.maps.name(page, &mut buffer);
    matches!(name, Ok(Some(name)) if name.windows(NAME.count_bytes()).any(|part| part == NAME.to_bytes()))
}

fn hole(page: Va) -> Option<How> {
    let at = Reserve { hint: page, len: PAGE, align: PAGE, name: NAME, prot: Prot::ReadWrite, exact: true };
    mem::map(&at).ok()?.into_raw();
    Some(How::Hole)
}

fn open(page: Va) -> bool {
    // SAFETY: the kernel that writes here has failed its launch, and what it writes is undone when that ends.
    unsafe { mem::mprotect(page, PAGE, Prot::ReadWrite) }.is_ok()
}

/// Saves a private page, and makes it writable.
fn save(vma: &Vma, page: Va, to: &mut [u8; PAGE]) -> Option<How> {
    let (before, after) = match (vma.read, vma.exec) {
        (true, false) => (Prot::Read, Prot::ReadWrite),
        (true, true) => (Prot::ReadExec, Prot::ReadWriteExec),
        (false, false) => (Prot::None, Prot::ReadWrite),
        (false, true) => return None, // code that nobody reads
    };
    // SAFETY: as in `open`. First for reading only, so that no other worker writes before the contents are saved.
    unsafe {
        if before == Prot::None {
            mem::mprotect(page, PAGE, Prot::Read).ok()?;
        }
        let saved = copy::guarded(to.as_mut_ptr(), page as *const u8, PAGE);
        if saved.is_err() || mem::mprotect(page, PAGE, after).is_err() {
            let _ = mem::mprotect(page, PAGE, before);
            return None;
        }
    }
    Some(How::Opened(before))
}

/// Puts a copy of a shared page in its place, at once for all who look.
fn replace(page: Va) -> Option<How> {
    let stash = own::map(NAME, PAGE).ok()?;
    let copied = own::map(NAME, PAGE).ok()?;
    let fixed = RemapFlags::MAYMOVE | RemapFlags::FIXED;
    // SAFETY: an old length of 0 makes a second mapping and leaves the first alone; what it replaces is ours.
    unsafe { mem::mremap(page, 0, PAGE, fixed, stash.start()) }.ok()?;
    // SAFETY: the copy is ours; what cannot be read is left zero.
    let _ = unsafe { copy::guarded(copied.as_ptr(), stash.start() as *const u8, PAGE) };
    // SAFETY: the mapping that this replaces has its second one, which takes its place again when the launch has ended.
    unsafe { mem::mremap(copied.start(), PAGE, PAGE, fixed, page) }.ok()?;
    copied.into_raw();
    Some(How::Replaced(stash.into_raw().0))
}
