//! Everything comes home: when a program asks, and before the action of a signal, so that a debugger and a core dump find the pages.
//!
//! A signal handler may run in any thread of the program, with any lock in that thread's hands, and cannot use uhmm's descriptors. So it takes no lock: it
//! rings a bell in memory that never migrates (a static of `.data`) and waits for a thread of uhmm's, the *evictor*, which serves it. Rules:
//! * launches wait while everything comes home, and on until the process is gone or goes on, if the signal's default action ends or stops it;
//! * nobody waits for ever: the evictor waits [`PATIENCE`] for a running launch, then leaves what that has to itself; and handlers go on when nothing has
//!   come home for three times as long;
//! * a handler that runs when there is no evictor (uhmm has ended; a child of any fork) goes on at once.
#![allow(unsafe_code)] // statics and a core that are reached by their address

use crate::core::{Core, EVERYTHING, Seat};
use crate::error::Error;
use crate::fork;
use crate::home;
use crate::line::{Turn, Who};
use crate::own;
use crate::process::{self, CoreRef};
use crate::sync::*;
use core::time::Duration;
use std::time::Instant;
use uhmm_os::signal::hook::{self, Moment};
use uhmm_os::thread::{self, Thread};
use uhmm_os::{Errno, futex_wait, futex_wake, system};

/// How long the evictor waits for a launch that is running.
const PATIENCE: Duration = Duration::from_secs(5);
/// Milliseconds after which a handler looks whether there is still an evictor that makes progress.
const LOOK_MS: u32 = 100;
/// Looks without progress before a handler gives up.
const LOOKS: u32 = 3 * PATIENCE.as_millis() as u32 / LOOK_MS;
/// No process has this number, and no thread.
const NOBODY: u32 = u32::MAX;
const STACK: usize = 128 << 10;

/// Where signal handlers and the evictor meet.
#[derive(Debug)]
pub(crate) struct Post {
    /// The process whose evictor serves here, or [`NOBODY`].
    process: AtomicU32,
    /// The evictor's thread.
    evictor: AtomicU32,
    /// Rung (raised, and woken) whenever the evictor has something to look at.
    bell: AtomicU32,
    /// Evictions that were asked for, counted.
    asked: AtomicU32,
    /// The last of them that is done.
    done: AtomicU32,
    /// Raised with every block that comes home.
    progress: AtomicU32,
    /// Threads whose default action is going on: launches wait.
    fatal: AtomicU32,
    /// A thread that has asked since the last eviction.
    asker: AtomicU32,
    closed: AtomicBool,
    core: AtomicUsize,
}

/// This copy's post. Copies of this crate share the evictor of the one that has started it.
#[unsafe(link_section = ".data")]
static POST: Post = Post {
    process: AtomicU32::new(NOBODY),
    evictor: AtomicU32::new(NOBODY),
    bell: AtomicU32::new(0),
    asked: AtomicU32::new(0),
    done: AtomicU32::new(0),
    progress: AtomicU32::new(0),
    fatal: AtomicU32::new(0),
    asker: AtomicU32::new(NOBODY),
    closed: AtomicBool::new(false),
    core: AtomicUsize::new(1),
};

/// The post that this copy's handler goes to, or [`NOWHERE`]. The code and statics of a copy that has started a thread stay in the process.
static AT: AtomicUsize = AtomicUsize::new(NOWHERE);
const NOWHERE: usize = 1;

/// In a thread that has a signal.
fn on_signal(moment: Moment) {
    let at = AT.load(Ordering::Acquire);
    if at == NOWHERE {
        return;
    }
    // SAFETY: a `Post` of some copy, which stays.
    let post = unsafe { &*(at as *const Post) };
    match moment {
        Moment::Before { fatal } => post.call(fatal),
        Moment::Continued => {
            post.fatal.fetch_sub(1, Ordering::AcqRel);
            post.ring();
        }
    }
}

impl Post {
    fn ring(&self) {
        self.bell.fetch_add(1, Ordering::AcqRel);
        futex_wake(&self.bell);
    }

    /// Has everything brought home. Async-signal-safe.
    fn call(&self, fatal: bool) {
        if fatal {
            self.fatal.fetch_add(1, Ordering::AcqRel);
        }
        let (process, tid) = (thread::getpid(), thread::gettid());
        if tid == self.evictor.load(Ordering::Acquire) {
            return;
        }
        self.asker.store(tid, Ordering::Release);
        let mine = self.asked.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        self.ring();
        let (mut still, mut seen) = (0, self.progress.load(Ordering::Relaxed));
        while still < LOOKS && self.process.load(Ordering::Acquire) == process {
            let done = self.done.load(Ordering::Acquire);
            if mine.wrapping_sub(done) as i32 <= 0 {
                return;
            }
            if !futex_wait(&self.done, done, Some(LOOK_MS)) {
                let now = self.progress.load(Ordering::Relaxed);
                still = if now == seen { still + 1 } else { 0 };
                seen = now;
            }
        }
    }

    /// The evictor's work.
    fn serve(&self, core: &Core) {
        let mut launches = None;
        loop {
            let bell = self.bell.load(Ordering::Acquire);
            let asked = self.asked.load(Ordering::Acquire);
            if asked != self.done.load(Ordering::Relaxed) {
                if launches.is_none() {
                    launches = self.stop_launches(core);
                }
                self.evict(core, launches.is_some());
                if self.fatal.load(Ordering::Acquire) == 0 {
                    launches = None;
                }
                self.done.store(asked, Ordering::Release);
                futex_wake(&self.done);
                continue;
            }
            if self.fatal.load(Ordering::Acquire) == 0 {
                launches = None;
            }
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            futex_wait(&self.bell, bell, None);
        }
    }

    /// Waits for the running launch, and lets no other begin. `None`: it does not end.
    fn stop_launches<'a>(&self, core: &'a Core) -> Option<Turn<'a>> {
        let limit = Instant::now() + PATIENCE;
        let _wanting = core.turns.wanting();
        loop {
            if let Some(guard) = core.turns.try_enter(Who::Alone) {
                return Some(guard);
            }
            // A worker's own launch cannot end while its handler waits. While a thread forks, everything is home.
            let asker = self.asker.load(Ordering::Acquire);
            if Instant::now() > limit || core.has_worker(asker) || fork::under_way() {
                return None;
            }
            // Not asleep: launches that follow each other leave short gaps only.
            thread::yield_now();
        }
    }

    /// Brings everything home; beside a running launch, which may take pages back, each block once, and not what the launch has parked.
    fn evict(&self, core: &Core, alone: bool) {
        core.for_each_device(|dev| {
            let send_home = |va| {
                let sent = home::send_home(core, dev, va);
                self.progress.fetch_add(1, Ordering::Relaxed);
                sent.is_ok()
            };
            if alone {
                core.evict_device_with(dev, send_home);
            } else {
                core.dir.for_each(EVERYTHING, |_, part| {
                    send_home(part.start);
                });
            }
        });
    }
}

/// The thread that serves a post.
#[derive(Debug)]
pub(crate) struct Evictor {
    thread: Thread,
    post: &'static Post,
    /// Ends the handlers: the code of the copy that has started it.
    unhook: fn(),
}

impl Evictor {
    /// Starts it, on the keeper. The core must outlive it.
    pub(crate) fn start(core: &'static Core) -> Result<Self, Errno> {
        system::pin_library(start_of as *const () as usize);
        let post = &POST;
        // Whatever a parent of this process has left there.
        post.done.store(post.asked.load(Ordering::Relaxed), Ordering::Relaxed);
        post.fatal.store(0, Ordering::Relaxed);
        post.asker.store(NOBODY, Ordering::Relaxed);
        post.closed.store(false, Ordering::Relaxed);
        post.core.store(core::ptr::from_ref(core) as usize, Ordering::Release);
        // SAFETY: the post is a static; its core outlives the thread.
        let thread = unsafe { own::spawn(c"uhmm-evictor", STACK, start_of, (&raw const POST).cast_mut().cast()) }?;
        post.evictor.store(thread.tid(), Ordering::Release);
        post.process.store(thread::getpid(), Ordering::Release);
        Ok(Evictor { thread, post, unhook: hook::remove_all })
    }

    pub(crate) fn post(&self) -> &'static Post {
        self.post
    }

    /// Ends it: whoever waits is served first, whoever comes later goes on at once.
    pub(crate) fn end(self) {
        (self.unhook)();
        self.post.closed.store(true, Ordering::Release);
        self.post.ring();
        self.thread.join();
        self.post.process.store(NOBODY, Ordering::Release);
        futex_wake(&self.post.done);
    }
}

/// # Safety
/// The argument is a `&'static Post` whose core outlives the thread.
unsafe extern "C" fn start_of(post: *mut ()) {
    // SAFETY: by the contract.
    let post = unsafe { &*post.cast::<Post>() };
    // SAFETY: by the contract.
    let core = unsafe { &*(post.core.load(Ordering::Acquire) as *const Core) };
    post.serve(core);
}

impl CoreRef {
    /// Brings everything home that any device has, once the running launch has ended.
    ///
    /// # Errors
    /// [`Error::Reentrant`] from a kernel.
    pub fn evict_all(&self) -> Result<(), Error> {
        if self.core().has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        // Any device's queue can do it, and the device stays open meanwhile; without one there is nothing to do. Unlike the keeper's, its work needs no lock that
        // others want.
        let Some(device) = self.any_device()? else { return Ok(()) };
        // SAFETY: queues serve with a Seat.
        let asked = unsafe {
            device.dev().desk().ask(|seat: &Seat| {
                let _no_launch = seat.core.turns.enter(Who::Alone);
                seat.core.evict_all();
            })
        };
        asked.ok_or(Error::System("reach the device's queue", Errno::SRCH))
    }

    /// Has everything brought home before each action of `signal`, until the core ends.
    ///
    /// # Errors
    /// [`Error::Signal`]; [`Error::System`] if a thread is refused; [`Error::Reentrant`] from a kernel.
    pub fn evict_on_signal(&self, signal: i32) -> Result<(), Error> {
        if self.core().has_worker(thread::gettid()) {
            return Err(Error::Reentrant);
        }
        let held = process::lock()?;
        AT.store(core::ptr::from_ref(held.evictor()?) as usize, Ordering::Release);
        hook::before(signal, on_signal).map_err(|_| Error::Signal { signal })
    }
}
