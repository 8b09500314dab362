//! The threads that hold the other ends of this process's descriptors.
//!
//! They have a descriptor table of their own: the program cannot close what is in it, and its numbers do not show in the program's. So a thread of the program asks them at a [`Desk`].
//!
//! | thread | does |
//! |---|---|
//! | desk | takes over the other end of a descriptor that is made; says whether the last copy of one was closed |
//! | relatives | does what other processes of the family ask for |
//! | ends, three | wait for all ends: for requests of other processes, and for the close of a last copy that this process did not make itself. One may wait long for what a command needs, so there are more |
#![allow(unsafe_code)] // system calls; threads

use crate::family;
use crate::opens::{Home, lock};
use crate::{sys, wire};
use core::sync::atomic::Ordering;
use libc::c_int;
use std::sync::{Condvar, Mutex, PoisonError};
use uhmm_core::own;
use uhmm_os::{Errno, thread};

/// Bytes of a thread's stack.
const STACK: usize = 256 << 10;
/// Threads that wait for ends. If several see the same, one has it, and the others find nothing.
const ENDS: u32 = 3;

/// What the desk is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    /// Make the threads what they are.
    Begin,
    /// Take over this descriptor of a thread's.
    Adopt { slot: usize, thread: u32, fd: c_int },
    /// Whether the last copy of an open's descriptor was closed.
    IsOver { slot: usize, seq: u64 },
}

/// Where threads of the program ask.
#[derive(Debug)]
pub(crate) struct Desk {
    /// Held by who asks.
    turn: Mutex<()>,
    talk: Mutex<Talk>,
    asked: Condvar,
    answered: Condvar,
}

#[derive(Debug)]
struct Talk {
    request: Option<Request>,
    answer: Option<Result<bool, Errno>>,
}

impl Desk {
    pub(crate) fn new() -> Self {
        let talk = Mutex::new(Talk { request: None, answer: None });
        Desk { turn: Mutex::new(()), talk, asked: Condvar::new(), answered: Condvar::new() }
    }

    /// Asks and waits for the answer.
    pub(crate) fn ask(&self, request: Request) -> Result<bool, Errno> {
        let _turn = lock(&self.turn);
        let mut talk = lock(&self.talk);
        talk.request = Some(request);
        self.asked.notify_one();
        loop {
            if let Some(answer) = talk.answer.take() {
                return answer;
            }
            talk = self.answered.wait(talk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn next(&self) -> Request {
        let mut talk = lock(&self.talk);
        loop {
            if let Some(request) = talk.request.take() {
                return request;
            }
            talk = self.asked.wait(talk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn answer(&self, answer: Result<bool, Errno>) {
        lock(&self.talk).answer = Some(answer);
        self.answered.notify_one();
    }
}

/// Starts the threads of a home.
pub(crate) fn start(home: &'static Home) -> Result<(), Errno> {
    // SAFETY: the function takes a home, which lives as long as the process, and never ends.
    drop(unsafe { own::spawn(c"uhmm dmirror", STACK, desk, core::ptr::from_ref(home).cast_mut().cast()) }?);
    home.desk.ask(Request::Begin).map(|_| ())
}

unsafe extern "C" fn desk(home: *mut ()) {
    // SAFETY: `start` gives a home that lives as long as the process.
    let home = unsafe { &*home.cast::<Home>() };
    ready(home);
    loop {
        let answer = match home.desk.next() {
            Request::Begin => begin(home),
            Request::Adopt { slot, thread, fd } => adopt(home, slot, thread, fd),
            Request::IsOver { slot, seq } => is_over(home, slot, seq),
        };
        home.desk.answer(answer);
    }
}

/// On the desk's thread: a descriptor table, and the thread that shares it.
fn begin(home: &'static Home) -> Result<bool, Errno> {
    thread::unshare_files()?;
    // SAFETY: the call takes flags.
    let epoll = unsafe { sys::call(libc::SYS_epoll_create1, [libc::EPOLL_CLOEXEC as usize]) }?;
    home.epoll.store(epoll as c_int, Ordering::Release);
    for _ in 0..ENDS {
        // SAFETY: as for the desk. A thread shares the table of the one that starts it.
        drop(unsafe { own::spawn(c"uhmm dmirror", STACK, ends, core::ptr::from_ref(home).cast_mut().cast()) }?);
    }
    // SAFETY: as for the desk.
    drop(unsafe { own::spawn(c"uhmm dmirror", STACK, relatives, core::ptr::from_ref(home).cast_mut().cast()) }?);
    while home.ready.load(Ordering::Acquire) != ENDS + 2 {
        thread::yield_now();
    }
    Ok(true)
}

/// Does what other processes of the family ask for.
unsafe extern "C" fn relatives(home: *mut ()) {
    // SAFETY: as for the desk.
    let home = unsafe { &*home.cast::<Home>() };
    let listener = family::listen(home);
    ready(home);
    if let Ok(listener) = listener {
        family::serve(home, &listener);
    }
}

/// To be called by each thread first: a thread's first allocation maps an arena for it, which must not happen later.
fn ready(home: &Home) {
    drop(std::hint::black_box(Box::new(0u8)));
    home.ready.fetch_add(1, Ordering::AcqRel);
}

/// pidfd_open(2): for a thread, not a process.
const PIDFD_THREAD: usize = libc::O_EXCL as usize;

fn adopt(home: &Home, index: usize, thread: u32, fd: c_int) -> Result<bool, Errno> {
    let slot = &home.slots[index];
    let _ends = lock(&home.ends);
    // SAFETY: descriptors of this thread's table.
    unsafe {
        // The table is the asking thread's; before Linux 6.9 only a process's first thread can be named, which nearly always has the same.
        let process = sys::call(libc::SYS_pidfd_open, [thread as usize, PIDFD_THREAD])
            .or_else(|_| sys::call(libc::SYS_pidfd_open, [sys::pid() as usize, 0]))?;
        let end = sys::call(libc::SYS_pidfd_getfd, [process, fd as usize, 0]);
        sys::close(process as c_int);
        let end = end?;
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: index as u64 };
        let epoll = home.epoll.load(Ordering::Acquire) as usize;
        if let Err(error) = sys::call(libc::SYS_epoll_ctl, [epoll, libc::EPOLL_CTL_ADD as usize, end, &raw mut event as usize]) {
            sys::close(end as c_int);
            return Err(error);
        }
        slot.end.store(end as c_int, Ordering::Release);
    }
    Ok(true)
}

/// Whether the last copy of an open's descriptor was closed.
fn is_over(home: &Home, index: usize, seq: u64) -> Result<bool, Errno> {
    let slot = &home.slots[index];
    Ok(retire(home, index) || slot.seq.load(Ordering::Acquire) != seq || slot.end.load(Ordering::Acquire) < 0)
}

/// Closes the other end of a descriptor whose last copy was closed; whether it did. To be called on the service's threads.
fn retire(home: &Home, index: usize) -> bool {
    let slot = &home.slots[index];
    let _ends = lock(&home.ends);
    let end = slot.end.load(Ordering::Acquire);
    if end < 0 {
        return false;
    }
    if sys::poll(end, 0, 0) & libc::POLLHUP == 0 {
        return false;
    }
    let epoll = home.epoll.load(Ordering::Acquire) as usize;
    // SAFETY: descriptors of this thread's table.
    let _ = unsafe { sys::call(libc::SYS_epoll_ctl, [epoll, libc::EPOLL_CTL_DEL as usize, end as usize, 0]) };
    slot.end.store(-1, Ordering::Release);
    sys::close(end);
    true
}

unsafe extern "C" fn ends(home: *mut ()) {
    const BATCH: usize = 16;
    // SAFETY: as for the desk.
    let home = unsafe { &*home.cast::<Home>() };
    ready(home);
    let epoll = home.epoll.load(Ordering::Acquire) as usize;
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
    loop {
        // SAFETY: the array is valid for so many events.
        let count = unsafe { sys::call(libc::SYS_epoll_wait, [epoll, events.as_mut_ptr() as usize, BATCH, usize::MAX]) };
        for event in events.iter().take(count.unwrap_or(0)) {
            let index = event.u64 as usize;
            let Some(slot) = home.slots.get(index) else { continue };
            let seq = slot.seq.load(Ordering::Acquire);
            if event.events & libc::EPOLLHUP as u32 == 0 {
                wire::serve(home, index, seq);
            } else if retire(home, index) {
                home.end(index, seq);
            }
        }
    }
}
