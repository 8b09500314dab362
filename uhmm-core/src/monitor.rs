//! The CPU fault service: the thread that reads the program's userfaultfd.
//!
//! It waits for messages, takes the event lock alone, reads, lets the directory follow every mapping event ([`crate::events`]), drops the lock,
//! and then serves the faults, each under its block's lock. It makes no call that raises an event, allocates nothing, and touches no
//! memory that could migrate. A fault that cannot be served now (its page is in transit, or an unread event stands in the way) is put off: the
//! mover wakes the toucher, whose fault comes again, or the monitor tries again after the next read.

use crate::ahead;
use crate::bits::Bits;
use crate::core::Core;
use crate::counters::count;
use crate::directory::BlockGuard;
use crate::events;
use crate::home;
use crate::own::{OwnSlice, Zeroed};
use crate::page::{Cause, PageState, Span, Va};
use crate::policy::{self, CpuFault, Run};
use crate::port::huge;
use crate::ranges;
use crate::share;
use std::os::fd::RawFd;
use uhmm_os::EventFd;
use uhmm_os::uffd::{Event, MsgBuf, Userfaultfd};
use uhmm_os::{BLOCK, Errno, PAGE, system, tasks, thread};

/// Faults that can wait. A thread waits for one at most, and faults are delivered before older events: with less room than there are threads, faults
/// that wait for an event could keep it from being read. Linux has 32,768 threads by default; what does not fit is woken, to fault again.
const FAULTS: usize = 65_536;
/// Events that can wait: one a thread, and while one is followed only those that it needs are read.
const EVENTS: usize = 65_536;

/// A touch by the CPU.
#[derive(Clone, Copy, Debug)]
struct Fault {
    address: Va,
    tid: u32,
    write: bool,
    protected: bool,
    /// The toucher is a worker of a device.
    worker: bool,
    /// Migrations of the block to a device, when the touch was read.
    migrations: u32,
}

/// The event lock, alone. Whoever holds it to write for a port may wait for a page that only this thread can bring: such a write is ended.
fn alone(core: &Core) -> impl Drop + '_ {
    let mut times = 0;
    loop {
        if core.tags.store() == 0 {
            return core.space.hold_alone();
        }
        if let Some(alone) = core.space.try_hold_alone() {
            return alone;
        }
        times += 1;
        if times % 64 == 0 {
            core.tags.interrupt_writers();
        }
        thread::pause(times);
    }
}

/// A change of the program's mappings.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// Pages will be dropped.
    Remove(Span),
    /// The mapping is gone.
    Unmap(Span),
    /// The process was forked, past libc's fork or by it; the child's userfaultfd.
    Fork(RawFd),
    /// The mapping is at `to` now.
    Remap { from: Span, to: Va },
}

#[allow(unsafe_code)]
// SAFETY: zeroed entries are never read: the counts say how many were written.
unsafe impl Zeroed for Option<Fault> {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Zeroed for Option<Change> {}

/// The monitor's own memory.
#[derive(Debug)]
pub(crate) struct Monitor {
    messages: MsgBuf,
    faults: OwnSlice<Option<Fault>>,
    waiting: usize,
    changes: OwnSlice<Option<Change>>,
    /// Read, and followed so far.
    read: usize,
    followed: usize,
    stream: Stream,
    forks: Forks,
    /// While faults were put off, others' blocks were brought.
    helped: bool,
    place: Place,
}

/// Forks that were followed: their children wait. What does not fit goes on at once.
#[derive(Debug, Default)]
struct Forks {
    children: [Option<Userfaultfd>; 16],
    /// Kernels lost pages to them.
    taken: bool,
}

impl Forks {
    /// Between forks that come without a pause, others get theirs: to be called without any lock.
    fn end(&mut self, core: &Core) {
        if self.children[0].is_none() {
            return;
        }
        if core.space.is_impatient() {
            thread::sleep_micros(1000);
        }
        self.children.fill_with(|| None);
        // A kernel would find the lock taken and its pages gone again before it has run at all.
        if core::mem::take(&mut self.taken) && core.space.uffd.event_pending() {
            thread::sleep_micros(1000);
        }
    }
}

/// Where the monitor runs: on the core of who faults. To wake it there costs a switch; to wake it on another core that sleeps costs an interrupt and that
/// core's waking up, five times as much.
#[derive(Debug)]
struct Place {
    core: usize,
    faults: u32,
}

impl Place {
    /// Every how many faults it asks where the toucher runs.
    const EVERY: u32 = 8;

    /// A fault of this thread was served.
    fn follow(&mut self, tid: u32) {
        let ask = self.faults.is_multiple_of(Self::EVERY);
        self.faults = self.faults.wrapping_add(1);
        if ask
            && let Some(core) = tasks::last_core(tid).filter(|&core| core != self.core)
            && thread::set_affinity(&[core]).is_ok()
        {
            self.core = core;
        }
    }
}

/// Blocks that came home whole one after the other.
#[derive(Debug, Default)]
struct Stream {
    /// The last that was touched, and the last that was asked for.
    from: Va,
    to: Va,
    blocks: u32,
    /// The launch before it.
    launch: u64,
}

impl Stream {
    /// Blocks before the one at `va`, if that goes on where they end.
    fn before(&self, va: Va, launch: u64) -> u32 {
        let goes_on =
            self.from.min(self.to).saturating_sub(BLOCK) <= va && va <= self.from.max(self.to).saturating_add(BLOCK) && va != self.from;
        if goes_on && launch == self.launch { self.blocks } else { 0 }
    }

    /// The block at `va` came home whole; says which `ahead` of it shall follow.
    fn add(&mut self, va: Va, launch: u64, ahead: usize, duplicate: bool) -> Run {
        let (blocks, down) = (self.before(va, launch), va < self.from);
        // What was asked for and has not come is asked for again.
        let next = if down { va.wrapping_sub(BLOCK) } else { va + BLOCK };
        let to = if down { va.saturating_sub(ahead * BLOCK) } else { va.saturating_add(ahead * BLOCK) };
        *self = Stream { from: va, to, blocks: blocks.saturating_add(1), launch };
        Run { next, down, left: ahead, duplicate }
    }
}

/// What is not followed yet.
struct Rest<'a> {
    monitor: &'a mut Monitor,
    core: &'a Core,
}

impl events::Later for Rest<'_> {
    fn read(&mut self) {
        self.monitor.read(self.core);
    }

    fn unmapped(&self, part: Span) -> Bits {
        let later = self.monitor.changes[self.monitor.followed..self.monitor.read].iter().flatten();
        later.fold(Bits::EMPTY, |pages, change| match *change {
            Change::Unmap(gone) | Change::Remap { from: gone, .. } => pages | gone.and(part).bits(),
            Change::Remove(_) | Change::Fork(_) => pages,
        })
    }

    fn now_at(&self, va: Va) -> Option<Va> {
        let mut later = self.monitor.changes[self.monitor.followed..self.monitor.read].iter().flatten();
        let holds = |span: Span, at: Va| span.start <= at && at < span.end;
        later.try_fold(va, |at, change| match *change {
            Change::Unmap(gone) if holds(gone, at) => None,
            Change::Remap { from, to } if holds(from, at) => Some(to + (at - from.start)),
            _ => Some(at),
        })
    }

    fn filled(&mut self, child: Userfaultfd, taken: bool) {
        self.monitor.forks.taken |= taken;
        if let Some(free) = self.monitor.forks.children.iter_mut().find(|place| place.is_none()) {
            *free = Some(child);
        }
    }
}

enum Served {
    Done,
    Later,
}

impl Monitor {
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let faults = OwnSlice::new(c"uhmm faults", FAULTS)?;
        let changes = OwnSlice::new(c"uhmm changes", EVENTS)?;
        Ok(Monitor {
            messages: MsgBuf::new(),
            faults,
            waiting: 0,
            changes,
            read: 0,
            followed: 0,
            stream: Stream::default(),
            forks: Forks::default(),
            helped: false,
            place: Place { core: usize::MAX, faults: 0 },
        })
    }

    /// Serves until `stop` is signalled.
    pub(crate) fn run(&mut self, core: &Core, stop: &EventFd) {
        let mut vain = 0u32;
        loop {
            if vain > 10 || core.space.is_impatient() {
                thread::sleep_micros(1000); // see `space::Refusals`
            } else if vain > 0 {
                thread::yield_now();
            }
            let timeout = (self.waiting > 0).then_some(0);
            let ready = uhmm_os::poll(&[core.space.uffd.as_fd(), stop.as_fd()], timeout).unwrap_or_else(|_| {
                // It is refused where the program's limit on descriptors is lower than their number (poll(2)): look now and then.
                thread::sleep_micros(200);
                if stop.drain().is_ok_and(|signals| signals > 0) { 2 } else { 0 }
            });
            if ready & 2 != 0 {
                return;
            }
            {
                let _alone = alone(core);
                core.space.mirrors.turn();
                self.read(core);
                self.follow(core);
                core.space.turned();
                core.space.mirrors.turn();
            }
            let asked = self.waiting;
            self.serve_all(core);
            self.forks.end(core);
            let helped = core::mem::take(&mut self.helped);
            vain = if asked > 0 && self.waiting == asked && !helped { vain.saturating_add(1) } else { 0 };
        }
    }

    /// Reads all there is.
    fn read(&mut self, core: &Core) {
        while self.read + MsgBuf::CAPACITY <= EVENTS {
            match core.space.uffd.read(&mut self.messages) {
                Ok(n) if n > 0 => {}
                // The news of a fork brings a descriptor. A program that has lowered its limit (setrlimit(2)) would wait for ever.
                Err(Errno::MFILE) => match system::with_more_files(|| core.space.uffd.read(&mut self.messages)) {
                    Ok(n) if n > 0 => {}
                    _ => return,
                },
                _ => return,
            }
            for event in self.messages.events() {
                let change = match event {
                    Event::Fault { address, write, wp, tid, .. } => {
                        if self.waiting < FAULTS {
                            let migrations = core.dir.get(address).map_or(0, |block| block.past.now().migrations);
                            self.faults[self.waiting] = Some(Fault { address, tid, write, protected: wp, worker: false, migrations });
                            self.waiting += 1;
                        } else {
                            let _ = core.space.uffd.wake(address & !(PAGE - 1), PAGE);
                        }
                        continue;
                    }
                    Event::Remove { start, end } => Change::Remove(Span { start, end }),
                    Event::Unmap { start, end } => Change::Unmap(Span { start, end }),
                    Event::Remap { from, to, len } => Change::Remap { from: Span { start: from, end: from + len }, to },
                    Event::Fork { fd } => Change::Fork(fd),
                };
                self.changes[self.read] = Some(change);
                self.read += 1;
            }
        }
    }

    /// Lets the directory follow the mapping changes, in order. Following one may need that more are read, which join the queue.
    fn follow(&mut self, core: &Core) {
        while self.followed < self.read {
            let change = self.changes[self.followed];
            self.followed += 1;
            if let Some(change) = change {
                events::follow(core, &change, &mut Rest { monitor: self, core });
            }
        }
        (self.read, self.followed) = (0, 0);
    }

    fn serve_all(&mut self, core: &Core) {
        let mut later = 0;
        for at in 0..core::mem::take(&mut self.waiting) {
            let Some(fault) = self.faults[at] else { continue };
            if let Served::Later = self.serve(core, fault) {
                self.faults[later] = Some(fault);
                later += 1;
            }
        }
        self.waiting = later;
    }

    fn serve(&mut self, core: &Core, mut fault: Fault) -> Served {
        let va = Span::block(fault.address).start;
        let page = fault.address % BLOCK / PAGE;
        let Some(block) = core.dir.get(va) else {
            return if core.tags.is_unlocked(fault.address) { Served::Later } else { fill(core, fault.address & !(PAGE - 1), 1) };
        };
        let mut state = match block.try_lock() {
            Some(state) => state,
            None if ahead::step(core) => {
                self.helped = true; // most likely the assistant has it
                return Served::Later;
            }
            None => block.lock(),
        };
        if core.tags.is_unlocked(fault.address) {
            return Served::Later;
        }
        let _changing = (state.device != 0).then(|| core.device(state.device as usize - 1).flights.will_change());
        if state.gone().has(page) {
            core.for_each_device(|dev| {
                // A runtime in this process does other things, too: its touch is the kernel's only where the kernel has something.
                let runs_kernel = || dev.flights.launched(va).has(page) && dev.driver.owns_runtime_thread(fault.tid);
                if dev.driver.owns_thread(fault.tid) || runs_kernel() {
                    fault.worker = true;
                    // Another worker may have taken the page while this one was making it the program's own.
                    if !core.populates(fault.tid) {
                        dev.driver.host_touch(fault.tid, fault.address);
                    }
                }
            });
        }
        if fault.protected { self.serve_write(core, &mut state, va, page) } else { self.serve_missing(core, &mut state, va, page, &fault) }
    }

    /// A write to a page that is protected, or was when it was tried.
    fn serve_write(&mut self, core: &Core, state: &mut BlockGuard<'_>, va: Va, page: usize) -> Served {
        let result = match state.page(page) {
            PageState::Duplicated => {
                let dev = core.device(state.device as usize - 1);
                count(&dev.counters.cpu_faults, 1);
                policy::one_more(&state.block().past.cpu_faults);
                dev.flights.will_wait(va);
                if dev.flights.leased(va).has(page) && !dev.is_lost() {
                    state.waiters = true; // who uses it there could not fetch it again
                    return Served::Done;
                }
                // One write releases the block: the next ones would only follow. What a launch must keep stays, but for the page itself.
                let all = state.duplicated() - (dev.flights.held(va) - Bits::one(page));
                home::drop_duplicates(core, dev, state, va, all)
            }
            PageState::Copying => {
                let copying = state.busy() - state.gone();
                state.shift(copying, PageState::Copying, Cause::CpuWrite, PageState::System);
                ranges::unprotect(core, va, copying)
            }
            PageState::System | PageState::Bounced | PageState::Coherent => ranges::unprotect(core, va, Bits::one(page)),
            PageState::Private | PageState::Moving | PageState::Lost => {
                // It has left since: the touch comes again, as one of a missing page.
                core.space.uffd.wake(va + page * PAGE, PAGE)
            }
        };
        if result == Err(Errno::AGAIN) { Served::Later } else { Served::Done }
    }

    /// A touch of a page that is not there.
    fn serve_missing(&mut self, core: &Core, state: &mut BlockGuard<'_>, va: Va, page: usize, fault: &Fault) -> Served {
        match state.page(page) {
            PageState::Moving => {
                state.waiters = true;
                Served::Done
            }
            PageState::Private if state.mover != 0 || (!fault.worker && waits(core, state, va, page)) => {
                state.waiters = true;
                Served::Done
            }
            // It came home since the touch was read, which woke the toucher, and left again: nobody waits for it. Who does all the same touches it again.
            PageState::Private if state.block().past.now().migrations != fault.migrations => {
                let _ = core.space.uffd.wake(va + page * PAGE, PAGE);
                Served::Done
            }
            PageState::Private if huge::leave_to_assistant(core, state, va) => Served::Done,
            PageState::Private => self.return_pages(core, state, va, page, fault),
            // Poisoned already: whoever came before that touches it again, and gets SIGBUS.
            PageState::Lost => match core.space.uffd.poison(va + page * PAGE, PAGE) {
                Err(partial) if partial.errno == Errno::AGAIN => Served::Later,
                _ => {
                    let _ = core.space.uffd.wake(va + page * PAGE, PAGE);
                    Served::Done
                }
            },
            _ => {
                // A hole in a watched range. Its neighbours are filled with it, or each would cost a fault; but where ports tell what each page is.
                let mut run = page..page + 1;
                if let Ok(present) = core.space.present(Span::block(va)) {
                    let holes = state.reg - present.pages - state.gone() - state.busy();
                    if holes.has(page) && core.tags.store() == 0 {
                        run = holes.run_at(page);
                    }
                }
                fill(core, va + run.start * PAGE, run.len())
            }
        }
    }

    fn return_pages(&mut self, core: &Core, state: &mut BlockGuard<'_>, va: Va, page: usize, fault: &Fault) -> Served {
        let dev = core.device(state.device as usize - 1);
        // A worker that waited for the end of its own launch would wait for ever.
        let own = if fault.worker { state.parked & Bits::one(page) } else { Bits::EMPTY };
        let away = state.private() - (kept(core, state, va) - Bits::one(page));
        let past = &state.block().past;
        let ask = CpuFault {
            device: dev.id(),
            address: fault.address,
            page,
            write: fault.write,
            thread: fault.tid,
            worker: fault.worker,
            away,
            faults_in_block: u32::from(state.touches),
            stream: self.stream.before(va, core.last_launch()),
            huge: state.huge,
            advice: Default::default(),
            history: past.now(),
        };
        let answer = if core.tags.store() == dev.id() {
            // As the kernel does: the page, or the huge page that it is a part of.
            let pages = if state.huge && away == Bits::ALL { Bits::ALL } else { Bits::one(page) };
            policy::Return { pages, duplicate: false, ahead: 0 }
        } else {
            policy::cpu_fault(core, ask)
        };
        let pages = (answer.pages | Bits::one(page)) & away;
        policy::one_more(&past.cpu_faults);
        state.touches = state.touches.saturating_add(1);
        count(&dev.counters.cpu_faults, 1);
        if pages == away {
            let launch = core.last_launch();
            let run = self.stream.add(va, launch, answer.ahead, answer.duplicate);
            if run.left > 0 {
                core.ahead.ask(run, launch);
                core.assist.nudge();
            }
        }
        let came = if answer.duplicate && !fault.worker {
            match share::share(core, dev, state, va, pages) {
                Ok(arrived) if !arrived.has(page) => home::bring_home(core, dev, state, va, Bits::one(page)),
                shared => shared,
            }
        } else {
            home::bring_home(core, dev, state, va, pages)
        };
        match came {
            Ok(arrived) if arrived.has(page) => {
                self.place.follow(fault.tid);
                state.spoiled |= own;
                Served::Done
            }
            _ => Served::Later,
        }
    }
}

/// Pages whose touch waits for the end of the running launch, but for its workers' own.
pub(crate) fn kept(core: &Core, state: &BlockGuard<'_>, va: Va) -> Bits {
    let dev = core.device(state.device as usize - 1);
    // A lost device keeps nothing for anybody.
    if dev.is_lost() { state.parked } else { state.parked | dev.flights.held(va) }
}

/// Whether a toucher has to wait for the end of a launch or lease, which will wake him.
fn waits(core: &Core, state: &BlockGuard<'_>, va: Va, page: usize) -> bool {
    let dev = core.device(state.device as usize - 1);
    // A lost device keeps nothing for anybody.
    let held = !dev.is_lost() && dev.flights.will_wait(va).has(page);
    if held {
        dev.flights.waits_at(va + page * PAGE);
    }
    held || state.parked.has(page)
}

/// Fills holes with the zero page. What is there already is left, and its toucher woken.
fn fill(core: &Core, start: Va, pages: usize) -> Served {
    let (mut at, mut most) = (0, pages);
    if core.space.has_markers() {
        // MADV_FREE drops what was away, and leaves the mark of it.
        let _ = ranges::unprotect_span(core, Span { start, end: start + pages * PAGE });
    }
    while at < pages {
        let n = most.min(pages - at);
        match core.space.uffd.zeropage(start + at * PAGE, n * PAGE) {
            Ok(()) => (at, most) = (at + n, pages),
            Err(partial) if partial.errno == Errno::AGAIN && partial.done == 0 => return Served::Later,
            // One call fills within one mapping only, and says of more that there is none.
            Err(partial) if partial.errno == Errno::NOENT && partial.done == 0 && n > 1 => {
                most = ranges::within_mapping(&core.space, start + at * PAGE, n);
            }
            Err(_) => {
                let _ = core.space.uffd.wake(start + at * PAGE, (pages - at) * PAGE);
                return Served::Done;
            }
        }
    }
    Served::Done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_goes_on_where_it_ends_in_either_direction() {
        let at = |number: usize| 100 * BLOCK + number * BLOCK;
        let mut stream = Stream::default();
        assert_eq!(stream.before(at(0), 1), 0);
        stream.add(at(0), 1, 0, false);
        assert_eq!((stream.before(at(1), 1), stream.before(at(0), 1), stream.before(at(2), 1)), (1, 0, 0));
        assert_eq!(stream.before(at(1), 2), 0, "a launch was in between");
        let run = stream.add(at(1), 1, 4, false);
        assert_eq!((run.next, run.left, run.down), (at(2), 4, false));
        // Up to the last that was asked for, and the one after it.
        assert!((2..=6).all(|next| stream.before(at(next), 1) == 2));
        assert_eq!(stream.before(at(7), 1), 0);
        stream.add(at(9), 1, 0, false);
        assert_eq!(stream.before(at(8), 1), 1, "another stream began");
        let run = stream.add(at(8), 1, 2, false);
        assert_eq!((run.next, run.left, run.down), (at(7), 2, true));
        assert_eq!((stream.before(at(6), 1), stream.before(at(5), 1), stream.before(at(4), 1)), (2, 2, 0));
    }
}
