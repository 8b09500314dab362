//! Commands of a process that has a descriptor of another's: a child that inherited it, or whoever got it otherwise.
//!
//! The request goes through the descriptor itself to the service of the process that opened it, with a socket for the reply and, if there is data, a file in memory that carries it: the asking process
//! writes and reads its own memory, the owner its own. Who asks waits for the reply's socket to say something or to hang up, which it does if the owner ends.
//!
//! What arrives on a descriptor is the program's to write: nothing in it is trusted, and garbage is dropped.
#![allow(unsafe_code)] // system calls

use crate::abi::{Command, Done, Flow, What};
use crate::device::Kind;
use crate::name::Name;
use crate::opens::{Home, lock};
use crate::{command, sys};
use core::mem::offset_of;
use core::sync::atomic::Ordering;
use libc::{c_int, c_void};
use uhmm_os::{Errno, system};

const MAGIC: u64 = 0x7568_6d6d_2d64_6d31;

#[repr(C)]
#[derive(Clone, Copy)]
struct Ask {
    magic: u64,
    what: u64,
    addr: u64,
    npages: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Reply {
    magic: u64,
    errno: i64,
    cpages: u64,
    faults: u64,
}

/// Descriptors of a message: the reply's socket, and a file if there is data.
const FDS: usize = 2;

#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fds: [c_int; FDS],
}

/// Descriptors of this thread's, closed in the end.
struct Fd(c_int);

impl Drop for Fd {
    fn drop(&mut self) {
        if self.0 >= 0 {
            sys::close(self.0);
        }
    }
}

/// Sends or receives (`number`) a message of one part.
///
/// # Safety
/// `data` is valid for `len` bytes, `control` for `control_len`.
unsafe fn message(
    number: libc::c_long,
    fd: c_int,
    data: (usize, usize),
    control: (usize, usize),
    flags: c_int,
) -> Result<(usize, usize), Errno> {
    let mut part = libc::iovec { iov_base: data.0 as *mut c_void, iov_len: data.1 };
    // SAFETY: a struct of numbers and pointers.
    let mut header: libc::msghdr = unsafe { core::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if control.1 > 0 {
        header.msg_control = control.0 as *mut c_void;
        header.msg_controllen = control.1;
    }
    // SAFETY: all that the header names is valid, by the contract.
    let count = unsafe { sys::call(number, [fd as usize, &raw mut header as usize, flags as usize]) }?;
    Ok((count, if control.1 > 0 { header.msg_controllen } else { 0 }))
}

/// Has the owner of a descriptor do a command, whose struct was checked.
pub(crate) fn ask(fd: c_int, what: What, command: &Command) -> Result<Done, Errno> {
    let (flow, len) = what.buffer(command.npages);
    // A command needs no descriptors where the program may have no more.
    let make = || Ok((sys::socketpair()?.map(Fd), Fd(if len > 0 { sys::memfd()? } else { -1 })));
    let ([mine, theirs], data) = match make() {
        Err(Errno::MFILE) => system::with_more_files(make)?,
        made => made?,
    };
    if flow == Flow::In {
        // SAFETY: nothing is written to memory.
        unsafe { sys::transfer(libc::SYS_pwrite64, data.0, command.ptr, len) }?;
    }
    let ask = Ask { magic: MAGIC, what: u64::from(what as u32), addr: command.addr, npages: command.npages };
    let fds = if len > 0 { FDS } else { 1 };
    let control_len = offset_of!(Control, fds) + fds * size_of::<c_int>();
    let header = libc::cmsghdr { cmsg_len: control_len, cmsg_level: libc::SOL_SOCKET, cmsg_type: libc::SCM_RIGHTS };
    let control = Control { header, fds: [theirs.0, data.0] };
    loop {
        let data = (&raw const ask as usize, size_of::<Ask>());
        // SAFETY: both live until the call returns.
        match unsafe { message(libc::SYS_sendmsg, fd, data, (&raw const control as usize, control_len), libc::MSG_NOSIGNAL) } {
            Ok(_) => break,
            Err(Errno::AGAIN) => drop(sys::poll(fd, libc::POLLOUT, -1)),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return what.of_the_dead(),
            Err(error) => return Err(error),
        }
    }
    drop(theirs);
    let mut over = false;
    let mut reply = Reply { magic: 0, errno: 0, cpages: 0, faults: 0 };
    let count = loop {
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: the reply may be written.
        match unsafe { message(libc::SYS_recvmsg, mine.0, (&raw mut reply as usize, size_of::<Reply>()), (0, 0), flags) } {
            Ok((count, _)) => break count,
            Err(Errno::AGAIN | Errno::INTR) if !over => over = wait(fd, mine.0),
            Err(_) => break 0,
        }
    };
    if count != size_of::<Reply>() || reply.magic != MAGIC {
        return what.of_the_dead();
    }
    if reply.errno != 0 {
        return Err(Errno::from_raw_os_error(reply.errno as i32));
    }
    if flow == Flow::Out {
        // SAFETY: the program gave the address for that.
        unsafe { sys::transfer(libc::SYS_pread64, data.0, command.ptr, len) }?;
    }
    Ok(Done { cpages: reply.cpages, faults: reply.faults })
}

/// Waits, for a while, until there is a reply or its socket hangs up; or the descriptor does, for some child may have a copy of the reply's other end: then true.
fn wait(fd: c_int, reply: c_int) -> bool {
    let polled = |fd, events| libc::pollfd { fd, events, revents: 0 };
    let mut both = [polled(reply, libc::POLLIN), polled(fd, 0)];
    sys::poll_all(&mut both, -1);
    both[1].revents & libc::POLLHUP != 0
}

/// Takes a request from a descriptor's other end, does it, and replies. To be called on the service's thread.
pub(crate) fn serve(home: &Home, index: usize, seq: u64) {
    let Some((ask, reply, data)) = receive(home, index) else { return };
    let what = What::of(ask.what as u32);
    let command = Command { addr: ask.addr, ptr: 0, npages: ask.npages, done: Done::default() };
    let name = Name { kind: Kind::Device(0), cookie: home.cookie, slot: index as u16, seq };
    let done = match what {
        Some(what) if command.check().is_ok() => perform(home, &name, what, &command, data.0),
        _ => Err(Errno::INVAL),
    };
    let message = match done {
        Ok(done) => Reply { magic: MAGIC, errno: 0, cpages: done.cpages, faults: done.faults },
        Err(error) => Reply { magic: MAGIC, errno: error.raw_os_error().into(), cpages: 0, faults: 0 },
    };
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the reply lives until the call returns. Who asked may be gone.
    let _ = unsafe { self::message(libc::SYS_sendmsg, reply.0, (&raw const message as usize, size_of::<Reply>()), (0, 0), flags) };
}

fn perform(home: &Home, name: &Name, what: What, command: &Command, data: c_int) -> Result<Done, Errno> {
    let (flow, len) = what.buffer(command.npages);
    let mut buffer = home.buffer(len)?;
    let at = buffer.bytes().as_ptr() as u64;
    if flow == Flow::In {
        // SAFETY: the buffer is that long.
        unsafe { sys::transfer(libc::SYS_pread64, data, at, len) }?;
    }
    let done = home.with(name, |live| command::execute(home, live, what, command, buffer.bytes()))?;
    if flow == Flow::Out {
        // SAFETY: nothing is written to memory.
        unsafe { sys::transfer(libc::SYS_pwrite64, data, at, len) }?;
    }
    Ok(done)
}

/// Whether this thread may have as many descriptors more as a message brings.
fn has_room(fd: c_int) -> bool {
    // SAFETY: copies of a descriptor of this thread's table, closed at once.
    let copies = [(); FDS].map(|()| unsafe { sys::call(libc::SYS_fcntl, [fd as usize, libc::F_DUPFD_CLOEXEC as usize, 0]) });
    copies.iter().flatten().for_each(|&copy| sys::close(copy as c_int));
    copies.iter().all(Result::is_ok) // the error is another where the limit is 0
}

fn receive(home: &Home, index: usize) -> Option<(Ask, Fd, Fd)> {
    let mut ask = Ask { magic: 0, what: 0, addr: 0, npages: 0 };
    let mut control = Control { header: libc::cmsghdr { cmsg_len: 0, cmsg_level: 0, cmsg_type: 0 }, fds: [-1; FDS] };
    let received = {
        let _ends = lock(&home.ends); // nobody closes this end meanwhile
        let end = home.slots[index].end.load(Ordering::Acquire);
        let (data, room) = ((&raw mut ask as usize, size_of::<Ask>()), (&raw mut control as usize, size_of::<Control>()));
        // SAFETY: both may be written. What does not fit is cut off, descriptors are not received then.
        let receive = || unsafe { message(libc::SYS_recvmsg, end, data, room, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
        // Descriptors for which there is no number are lost, and the limit is the whole process's.
        if has_room(end) { receive() } else { system::with_more_files(receive) }
    };
    let (count, control_len) = received.ok()?;
    let rights = control_len > 0 && (control.header.cmsg_level, control.header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS);
    let fds = if rights { control.header.cmsg_len.saturating_sub(offset_of!(Control, fds)) / size_of::<c_int>() } else { 0 };
    let fd = |place: usize| Fd(if place < fds { control.fds[place] } else { -1 });
    let (reply, data) = (fd(0), fd(1));
    (count == size_of::<Ask>() && ask.magic == MAGIC && reply.0 >= 0).then_some((ask, reply, data))
}
