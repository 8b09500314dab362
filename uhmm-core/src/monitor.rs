//! The CPU fault service: the thread that reads the program's userfaultfd.
//!
//! It waits for messages, takes the event lock alone, reads, lets the directory follow every mapping event ([`crate::events`]), drops the lock,
//! and then serves the faults, each under its block's lock. It makes no call that raises an event, allocates nothing, and touches no
//! memory that could migrate. A fault that cannot be served now (its page is in transit, or an unread event stands in the way) is put off: the
//! mover wakes the toucher, whose fault comes again, or the monitor tries again after the next read.

use crate::bits::Bits;
use crate::core::Core;
use crate::counters::count;
use crate::directory::BlockGuard;
use crate::events;
use crate::home;
use crate::page::{Cause, PageState, Span, Va};
use crate::policy::CpuFault;
use crate::ranges;
use uhmm_os::uffd::{Event, MsgBuf};
use uhmm_os::EventFd;
use uhmm_os::{BLOCK, Errno, PAGE};

/// Messages that wait: more are not read before these are served.
const QUEUE: usize = 256;

/// A touch by the CPU.
#[derive(Clone, Copy, Debug)]
struct Fault {
    address: Va,
    write: bool,
    protected: bool,
    tid: u32,
}

/// The monitor's own memory.
#[derive(Debug)]
pub(crate) struct Monitor {
    messages: MsgBuf,
    queue: [Event; QUEUE],
    queued: usize,
    /// The block that was last brought home whole.
    last: Va,
}

enum Served {
    Done,
    Later,
}

impl Monitor {
    pub(crate) fn new() -> Self {
        let none = Event::Unmap { start: 0, end: 0 };
        Monitor { messages: MsgBuf::new(), queue: [none; QUEUE], queued: 0, last: 0 }
    }

    /// Serves until `stop` is signalled.
    pub(crate) fn run(&mut self, core: &Core, stop: &EventFd) {
        loop {
            let timeout = (self.queued > 0).then_some(0);
            let ready = uhmm_os::poll(&[core.space.uffd.as_fd(), stop.as_fd()], timeout).unwrap_or(0);
            if ready & 2 != 0 {
                return;
            }
            {
                let _alone = core.space.hold_alone();
                self.read(core);
                self.follow(core);
            }
            self.serve_all(core);
        }
    }

    /// Reads what there is room for.
    pub(crate) fn read(&mut self, core: &Core) {
        while self.queued + MsgBuf::CAPACITY <= QUEUE {
            match core.space.uffd.read(&mut self.messages) {
                Ok(n) if n > 0 => {
                    for event in self.messages.events() {
                        self.queue[self.queued] = event;
                        self.queued += 1;
                    }
                }
                _ => return,
            }
        }
    }

    /// Lets the directory follow the mapping events, in order. Following one may need that more are read, which join the queue.
    fn follow(&mut self, core: &Core) {
        let mut at = 0;
        while at < self.queued {
            let event = self.queue[at];
            if matches!(event, Event::Fault { .. }) {
                at += 1;
                continue;
            }
            self.queue.copy_within(at + 1..self.queued, at);
            self.queued -= 1;
            events::follow(core, &event, &mut || self.read(core));
        }
    }

    fn serve_all(&mut self, core: &Core) {
        let faults = core::mem::take(&mut self.queued);
        let mut later = 0;
        for at in 0..faults {
            let Event::Fault { address, write, wp, tid, .. } = self.queue[at] else { continue };
            let fault = Fault { address, write, protected: wp, tid };
            if let Served::Later = self.serve(core, &fault) {
                self.queue[later] = self.queue[at];
                later += 1;
            }
        }
        self.queued = later;
    }

    fn serve(&mut self, core: &Core, fault: &Fault) -> Served {
        let va = Span::block(fault.address).start;
        let page = fault.address % BLOCK / PAGE;
        let Some(block) = core.dir.get(va) else { return fill(core, fault.address & !(PAGE - 1), 1) };
        let mut state = block.lock();
        if state.gone().has(page) {
            core.for_each_device(|dev| {
                if dev.driver.owns_thread(fault.tid) {
                    dev.driver.host_touch(fault.tid, fault.address);
                }
            });
        }
        if fault.protected { self.serve_write(core, &mut state, va, page) } else { self.serve_missing(core, &mut state, va, page, fault) }
    }

    /// A write to a page that is protected, or was when it was tried.
    fn serve_write(&mut self, core: &Core, state: &mut BlockGuard<'_>, va: Va, page: usize) -> Served {
        let result = match state.page(page) {
            PageState::Duplicated => {
                let dev = core.device(state.device as usize - 1);
                count(&dev.counters.cpu_faults, 1);
                // One write releases the block: the next ones would only follow.
                let all = state.duplicated();
                home::drop_duplicates(core, dev, state, va, all)
            }
            PageState::Copying => {
                let copying = state.busy() - state.gone();
                state.shift(copying, PageState::Copying, Cause::CpuWrite, PageState::System);
                ranges::unprotect(core, va, copying)
            }
            PageState::System | PageState::Bounced => ranges::unprotect(core, va, Bits::one(page)),
            PageState::Private | PageState::Moving => {
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
            PageState::Private if state.mover != 0 || state.parked.has(page) => {
                state.waiters = true;
                Served::Done
            }
            PageState::Private => self.return_pages(core, state, va, page, fault),
            _ => {
                // A hole in a watched range. Its neighbours are filled with it, or each would cost a fault.
                let mut run = page..page + 1;
                if let Ok(present) = core.space.present(Span::block(va)) {
                    let holes = state.reg - present.pages - state.gone() - state.busy();
                    if holes.has(page) {
                        run = holes.run_at(page);
                    }
                }
                fill(core, va + run.start * PAGE, run.len())
            }
        }
    }

    fn return_pages(&mut self, core: &Core, state: &mut BlockGuard<'_>, va: Va, page: usize, fault: &Fault) -> Served {
        let dev = core.device(state.device as usize - 1);
        let away = state.private() - state.parked;
        let ask = CpuFault {
            page,
            write: fault.write,
            away,
            faults_in_block: u32::from(state.touches),
            stream: self.last.abs_diff(va) == BLOCK,
            huge: state.huge,
        };
        let pages = (core.policy.cpu_fault(&ask) | Bits::one(page)) & away;
        state.touches = state.touches.saturating_add(1);
        count(&dev.counters.cpu_faults, 1);
        if pages == away {
            self.last = va;
        }
        match home::bring_home(core, dev, state, va, pages) {
            Ok(arrived) if arrived.has(page) => Served::Done,
            _ => Served::Later,
        }
    }
}

/// Fills holes with the zero page. What is there already is left, and its toucher woken.
fn fill(core: &Core, start: Va, pages: usize) -> Served {
    match core.space.uffd.zeropage(start, pages * PAGE) {
        Ok(()) => Served::Done,
        Err(partial) if partial.errno == Errno::AGAIN && partial.done == 0 => Served::Later,
        Err(_) => {
            let _ = core.space.uffd.wake(start, pages * PAGE);
            Served::Done
        }
    }
}
