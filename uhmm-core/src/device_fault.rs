//! The device fault service: a worker touched a page that is not in the device's page table.
//!
//! It runs on the worker, inside its signal handler, on an alternate stack of uhmm's: look up what the process may do at that address, ask
//! the policy how much to bring, migrate, and return to the kernel, which repeats the access. A wild pointer never unwinds: the driver puts a
//! scratch page there and fails the launch.

use crate::bits::Bits;
use crate::core::{self, Core, Device};
use crate::counters::count;
use crate::directory::State;
use crate::driver::KernelFault;
use crate::error::Error;
use crate::fixed;
use crate::migrate::{Ask, Intent};
use crate::mode::Mode;
use crate::monitor::kept;
use crate::notifier;
use crate::page::{Cause, PageState, Span, Va};
use crate::policy::{self, Fetch};
use crate::ranges;
use crate::share;
use uhmm_os::maps::Vma;
use uhmm_os::signal::FaultInfo;
use uhmm_os::{BLOCK, PAGE, copy, tasks, thread};

/// Looks before the page is given up: each but the first is owed to a change of the mappings or to another thread.
const LOOKS: usize = 10_000;

/// Refusals before a page is taken for one that never moves.
const REFUSALS: usize = 50;

/// What the signal handler calls, for any thread of the process: true if the access can be repeated.
pub(crate) fn on_signal(info: &FaultInfo) -> bool {
    let Some(core) = core::current() else { return false };
    let tid = thread::gettid();
    let mut served = None;
    core.for_each_device(|dev| {
        if served.is_none() && dev.driver.owns_thread(tid) {
            served = Some(on_worker(core, dev, info));
        }
    });
    if let Some(served) = served {
        return served;
    }
    core.for_each_device(|dev| {
        if dev.driver.in_window(info.address) {
            // A program may have its own ideas about standard error, but it is about to die of this.
            tasks::write_stderr(b"uhmm: a thread of the program touched a device's address; device addresses are valid in kernels only\n");
        }
    });
    false
}

/// siginfo's codes of SIGSEGV: nothing is mapped there; not for that, as a scratch page that another worker is just putting there.
const MAPERR: i32 = 1;
const ACCERR: i32 = 2;
/// The longest instruction: a fault so near is one of fetching it.
const LONGEST: usize = 15;

fn on_worker(core: &Core, dev: &Device, info: &FaultInfo) -> bool {
    if !dev.driver.in_window(info.address) {
        if dev.driver.info().capabilities.coherent {
            count(&dev.counters.device_faults, 1);
            dev.driver.note_fault(info.address, info.write);
        }
        // A process address. If something is mapped there, only not for that, it is a fault as in the program itself: nothing can stand in for it
        // without changing what the program has there.
        if !matches!(info.code, MAPERR | ACCERR) || info.address.wrapping_sub(info.rip) <= LONGEST {
            return false;
        }
        return dev.driver.scratch(info.address, KernelFault::Wild { address: info.address, write: info.write });
    }
    let va = info.address ^ dev.driver.info().mask;
    match serve(core, dev, va, info.write) {
        Ok(()) => true,
        Err(fault) => {
            if info.write && matches!(fault, KernelFault::Wild { .. } | KernelFault::NoRoom { .. }) {
                let_write(core, dev, va);
            }
            dev.shares.damaged(va);
            dev.driver.scratch(info.address, fault)
        }
    }
}

/// A touch that is being served.
struct Touch<'a> {
    core: &'a Core,
    dev: &'a Device,
    va: Va,
    write: bool,
    /// The page stays where it is: the kernel gets a snapshot.
    stays: bool,
    /// Something near would not move, or could not be copied (it lies beyond the end of a file): only the page itself is asked for.
    alone: bool,
    /// How often the kernel has refused to move it.
    refusals: usize,
    /// What the policy wants to come.
    fetch: Fetch,
}

/// Makes the page at `va` accessible to the device.
///
/// # Errors
/// What is wrong with the kernel's access.
pub(crate) fn serve(core: &Core, dev: &Device, va: Va, write: bool) -> Result<(), KernelFault> {
    count(&dev.counters.device_faults, 1);
    dev.driver.note_fault(va, write);
    if !dev.driver.info().capabilities.replayable_faults && !refetched(core, dev, va, write) {
        return Err(KernelFault::NotDeclared { address: va, write });
    }
    let mut touch = Touch { core, dev, va, write, stays: false, alone: false, refusals: 0, fetch: Fetch::default() };
    for _ in 0..LOOKS {
        if touch.look()? {
            return Ok(());
        }
        core.space.settle();
    }
    Err(KernelFault::Unreachable { address: va })
}

impl Touch<'_> {
    fn page(&self) -> usize {
        self.va % BLOCK / PAGE
    }

    /// Whether the device can go on.
    fn is_served(&self, state: &State) -> bool {
        let page = self.page();
        let readonly = state.duplicated() | state.rdonly;
        state.device == self.dev.id() && state.win.has(page) && !(self.write && readonly.has(page))
    }

    /// One look at the page, and one attempt to bring it: true if it is there.
    fn look(&mut self) -> Result<bool, KernelFault> {
        let (core, dev, page) = (self.core, self.dev, self.page());
        let wild = KernelFault::Wild { address: self.va, write: self.write };
        let unreachable = KernelFault::Unreachable { address: self.va };
        let no_room = KernelFault::NoRoom { address: self.va };
        let block = core.dir.get_or_make(self.va).map_err(|_| wild)?;
        let seq = notifier::read_begin(block);
        let vma = core.space.mapping(self.va).map_err(|_| unreachable)?.ok_or(wild)?;
        if !vma.read || (self.write && !vma.write) {
            return Err(wild);
        }
        if vma.shared && self.share(&vma)? {
            return Ok(true);
        }
        let (ask, fetched) = {
            let state = block.lock();
            if self.is_served(&state) {
                return Ok(true); // another worker was first
            }
            if state.lost().has(page) {
                return Err(KernelFault::PageLost { address: self.va });
            }
            if state.rdonly.has(page) && state.win.has(page) {
                return Err(no_room); // no twin could be made
            }
            let here = state.device == dev.id() && state.resident().has(page);
            let fetched = state.bounced();
            drop(state);
            (Ask { pinned: false, seq: Some(seq), ..self.ask(&vma, here, fetched) }, fetched)
        };
        if ask.intent == Intent::Snapshot && !dev.fetched.lock().push(Span::block(self.va).start) {
            return Err(no_room);
        }
        let refused = match core.make_block_resident(dev, &ask) {
            Ok(outcome) => outcome.refused,
            Err(Error::NoRoom { .. }) => return Err(no_room),
            Err(Error::Driver { source, .. }) => return Err(KernelFault::Device { source }),
            Err(Error::DeviceLost { .. }) => return Err(KernelFault::Lost),
            Err(_) => return Err(unreachable),
        };
        let state = block.lock();
        if self.is_served(&state) {
            drop(state);
            if ask.intent == Intent::Move {
                self.follow(ask.want);
            }
            return Ok(true);
        }
        if refused && !state.resident().has(page) && !notifier::read_retry(block, seq) {
            match (ask.want == Bits::one(page), self.stays) {
                (false, _) => self.alone = true,
                (true, true) => return Err(unreachable), // not even its bytes can be read
                // A system call may pin it for a moment; a locked page is refused for ever, and its neighbours were.
                (true, false) => {
                    self.refusals += 1;
                    if self.refusals > REFUSALS || !fetched.is_empty() {
                        (self.stays, self.alone) = (true, false);
                    }
                }
            }
        }
        Ok(false)
    }

    /// Lets the device use a shared mapping in place. False if it cannot.
    fn share(&self, vma: &Vma) -> Result<bool, KernelFault> {
        let mut byte = 0u8;
        #[allow(unsafe_code)]
        // SAFETY: what cannot be read (it lies beyond the end of a file) is an error, not a crash; nobody else has the byte that is written.
        let there = unsafe { copy::guarded(&raw mut byte, self.va as *const u8, 1) }.is_ok();
        if !there {
            return Err(KernelFault::Wild { address: self.va, write: self.write });
        }
        Ok(self.dev.shares.ensure(self.dev, vma, true).is_ok())
    }

    /// What to bring.
    fn ask(&mut self, vma: &Vma, here: bool, fetched: Bits) -> Ask<'static> {
        let (core, page) = (self.core, self.page());
        let (moves, _) = core.space.moves(vma, self.va);
        let part = Span::block(self.va).and(Span { start: vma.start, end: vma.end });
        let one = Bits::one(page);
        if here {
            // Here, but not mapped, or not for writing. What both have becomes the device's alone: entering a page read-only takes two steps while kernels
            // run, and a write between them would be lost.
            let moves = core.space.mode == Mode::Full && !core.policies.marks.stay(part).has(page);
            let intent = if moves { Intent::Move } else { Intent::Snapshot };
            return Ask { twins: one, ..Ask::new(part, one, intent) };
        }
        // What was advised to stay is a copy as what cannot move, and no neighbour with it that moves.
        let stay = core.policies.marks.stay(part);
        if stay.has(page) {
            let want = leaf(part, page, fetched) & stay;
            let want = if self.alone { one } else { want };
            self.stays = true;
            return Ask { twins: want, ..Ask::new(part, want, Intent::Snapshot) };
        }
        self.stays |= !moves;
        let needed = if self.stays { Bits::EMPTY } else { fixed::pages(core, part) };
        self.stays |= needed.has(page);
        if self.stays {
            let want = if self.alone { one } else { leaf(part, page, fetched) };
            let (twins, rdonly) = if vma.write { (want, Bits::EMPTY) } else { (Bits::EMPTY, want) };
            return Ask { twins, rdonly, ..Ask::new(part, want, Intent::Snapshot) };
        }
        // The kernel's own captures lie on a stack too: only what it touches there through the window is fetched.
        let left = if core.space.mode == Mode::Full { Bits::ALL } else { core.space.left.bits(part) };
        let candidates = (part.bits() & left) - needed - stay - (fixed::stacks(vma, part) - one);
        if let Some(block) = core.dir.get(self.va) {
            self.fetch = policy::device_fault(core, self.dev, block, self.va, self.write, candidates);
        }
        let want = (self.fetch.pages & present_or(core, part, page)) & candidates | one;
        let want = if self.alone { one } else { want };
        Ask { beside: want, last: self.fetch.pin, ..Ask::new(part, want, Intent::Move) }
    }

    /// The page has come: the rest of what the policy wants. Nothing depends on it, so it is tried once.
    fn follow(&mut self, came: Bits) {
        let Fetch { duplicate, ahead, .. } = std::mem::take(&mut self.fetch);
        if duplicate {
            self.give_back(Span::block(self.va).start, came);
        }
        // Up to where memory of one kind goes on without a gap: the kernel would call it one mapping if no part of it were watched.
        let mut end = self.va;
        for number in 1..=ahead {
            let va = Span::block(self.va).start + number * BLOCK;
            while let Ok(Some(vma)) = self.core.space.mapping(end)
                && end <= va
                && self.core.space.moves(&vma, end).0
            {
                end = vma.end;
            }
            if end <= va || !self.bring_next(va, duplicate) {
                return;
            }
        }
    }

    /// Gives the CPU copies of pages that the device has.
    fn give_back(&self, va: Va, pages: Bits) {
        let _hold = self.core.space.hold();
        let Some(block) = self.core.dir.get(va) else { return };
        let mut state = block.lock();
        if state.device == self.dev.id() && state.mover == 0 {
            let pages = pages - kept(self.core, &state, va);
            let _ = share::share(self.core, self.dev, &mut state, va, pages); // else both sides fault for it
        }
    }

    /// Brings a block that is likely to be touched next, if there is room. False if that leads nowhere.
    fn bring_next(&self, va: Va, duplicate: bool) -> bool {
        let (core, dev) = (self.core, self.dev);
        let Ok(block) = core.dir.get_or_make(va) else { return false };
        let seq = notifier::read_begin(block);
        if dev.mem.used() + 2 * BLOCK > dev.driver.info().memory {
            return false;
        }
        let Ok(Some(vma)) = core.space.mapping(va) else { return false };
        if !core.space.moves(&vma, va).0 {
            return false;
        }
        let part = Span::block(va).and(Span { start: vma.start, end: vma.end });
        let stays = fixed::pages(core, part) | fixed::stacks(&vma, part) | core.policies.marks.stay(part);
        let present = core.space.present(part).map(|present| present.pages).unwrap_or_default();
        let want = (present & part.bits()) - stays;
        if want.is_empty() {
            return true;
        }
        let ask = Ask { beside: want, pinned: false, seq: Some(seq), ..Ask::new(part, want, Intent::Move) };
        let came = core.make_block_resident(dev, &ask).is_ok_and(|outcome| !outcome.again);
        if came && duplicate {
            self.give_back(va, want);
        }
        came
    }
}

/// A kernel wrote what the process may only read, or what no twin could be made of. Its launch fails; that it can run on, the page becomes a snapshot that nobody writes back.
fn let_write(core: &Core, dev: &Device, va: Va) {
    let Some(block) = core.dir.get(va) else { return };
    let (start, one) = (Span::block(va).start, Bits::one(va % BLOCK / PAGE));
    let _hold = core.space.hold();
    let mut state = block.lock();
    if state.device != dev.id() || state.mover != 0 || !dev.fetched.lock().push(start) {
        return; // the access is repeated
    }
    if one.meets(state.duplicated()) && ranges::unprotect(core, start, one).is_ok() {
        state.shift(one, PageState::Duplicated, Cause::Bounce, PageState::Bounced);
    }
    if one.meets(state.bounced() & state.win) {
        state.rdonly -= one;
        ranges::with_runs(core, &state, start, one, true, |runs| dev.driver.allow_writes(runs));
    }
}

/// Pages to take a snapshot of: 64 KiB around the touched one, or the rest of the block if it is not the first there.
fn leaf(part: Span, page: usize, fetched: Bits) -> Bits {
    let start = page / policy::LEAF * policy::LEAF;
    let near = if fetched.is_empty() { Bits::range(start..start + policy::LEAF) } else { Bits::ALL };
    near & part.bits()
}

/// Whether a device without replayable faults may go on with the page at `va`: what it has, and was only taken out of its page table for a moment. A write to
/// what it may only read fails the launch, which then goes on with the page for its own.
fn refetched(core: &Core, dev: &Device, va: Va, write: bool) -> bool {
    let Some(block) = core.dir.get(va) else { return false };
    let page = va % BLOCK / PAGE;
    let state = block.lock();
    if state.device != dev.id() || !state.resident().has(page) {
        return false;
    }
    if write && state.duplicated().has(page) {
        dev.driver.fail(KernelFault::NotDeclared { address: va, write });
    }
    true
}

/// Pages that exist, and the touched one: holes are not filled just because they are near.
fn present_or(core: &Core, part: Span, page: usize) -> Bits {
    core.space.present(part).map(|present| present.pages).unwrap_or_default() | Bits::one(page)
}
