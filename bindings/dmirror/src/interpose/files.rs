//! Descriptors: open, close, dup2, ioctl, access.
#![allow(unsafe_code)] // takes the place of libc's functions
#![allow(clippy::missing_safety_doc)] // they are as safe as libc's

use super::quietly;
use crate::device::Kind;
use crate::name::Name;
use crate::sys::{self, int};
use crate::{abi, command, mapping, opens, stat};
use core::ffi::c_char;
use libc::{c_int, c_uint, c_ulong, mode_t};
use uhmm_os::Errno;

/// The file of a path that the kernel could not open or see, if it is one of this library's. Debugfs is closed to ordinary users.
pub(super) fn not_found(error: Errno, path: *const c_char) -> Option<Kind> {
    match error {
        Errno::NOENT => Kind::of_known_path(path),
        Errno::ACCESS | Errno::PERM => Kind::of_path(path), // a filter of system calls says that too, without a look at the path
        _ => None,
    }
}

fn open_at(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // A file of that name must not be made.
    let creates = flags & libc::O_CREAT != 0 || flags & libc::O_TMPFILE == libc::O_TMPFILE;
    if creates && let Some(kind) = Kind::of_path(path) {
        return int(quietly(|| opens::open(kind, flags)));
    }
    // SAFETY: the program's call.
    let opened = unsafe { sys::call(libc::SYS_openat, [dir as usize, path as usize, flags as usize, mode as usize]) };
    let ours = match opened {
        Ok(_) => Kind::of_known_path(path), // the kernel's own device, or what else is there
        Err(error) => not_found(error, path),
    };
    let Some(kind) = ours else { return int(opened) };
    if let Ok(fd) = opened {
        sys::close(fd as c_int);
    }
    int(quietly(|| opens::open(kind, flags)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(dir, path, flags, mode)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(dir, path, flags, mode)
}

// What compilers call with fortification where no mode is passed; a call that would need one ends the program in libc, and gets 0 here.

#[unsafe(no_mangle)]
unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    open_at(dir, path, flags, 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    open_at(dir, path, flags, 0)
}

/// A call that closes a descriptor. Only a process that has opened devices looks at what it closes.
fn closing(fd: c_int, call: impl FnOnce() -> Result<usize, Errno>) -> c_int {
    if opens::home().is_none() {
        return int(call());
    }
    let ours = Name::of(fd).and_then(|name| Some((name, opens::home_of(&name)?)));
    let result = call();
    if let (Some((name, home)), Ok(_)) = (ours, result) {
        let _ = quietly(|| {
            home.closed(&name);
            Ok(0)
        });
    }
    int(result)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    // SAFETY: the program's call.
    closing(fd, || unsafe { sys::call(libc::SYS_close, [fd as usize]) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    // SAFETY: the program's call. If both are the same nothing is closed, which the look afterwards finds.
    closing(new, || unsafe { sys::call(libc::SYS_dup2, [old as usize, new as usize]) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    // SAFETY: the program's call.
    closing(new, || unsafe { sys::call(libc::SYS_dup3, [old as usize, new as usize, flags as usize]) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    // SAFETY: the program's call.
    let result = unsafe { sys::call(libc::SYS_close_range, [first as usize, last as usize, flags as usize]) };
    if result.is_ok() {
        some_closed();
    }
    int(result)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: the program's call.
    let _ = unsafe { sys::call(libc::SYS_close_range, [first.max(0) as usize, u32::MAX as usize, 0]) };
    some_closed();
}

fn some_closed() {
    if let Some(home) = opens::home() {
        let _ = quietly(|| {
            home.some_closed();
            Ok(0)
        });
    }
}

/// `_IOWR(0xAA, 0, struct uffdio_register)`.
const UFFDIO_REGISTER: u32 = 0xC020_AA00;

/// `FIOASYNC`.
const ASYNC: u32 = 0x5452;

/// Whether the kernel itself answers for a device, whatever that is: `FIOCLEX`, `FIONCLEX`, `FIONBIO`, `FIOASYNC`, `FIOQSIZE`, `FIGETBSZ`, `FIFREEZE`, `FITHAW`, `FS_IOC_FIEMAP`, `FICLONE`,
/// `FICLONERANGE`, `FIDEDUPERANGE`. It is the same for a socket.
fn is_of_any_file(number: u32) -> bool {
    matches!(
        number,
        0x5451 | 0x5450 | 0x5421 | ASYNC | 0x5460 | 2 | 0xc004_5877 | 0xc004_5878 | 0xc020_660b | 0x4004_9409 | 0x4020_940d | 0xc018_9436
    )
}

/// Whether a socket answers and a device refuses: `TIOCOUTQ`, `FIONREAD`, and what has the letters of sockets or of wireless devices.
fn is_of_sockets(number: u32) -> bool {
    matches!(number, 0x5411 | 0x541b) || matches!(number >> 8 & 0xff, 0x89 | 0x8b)
}

/// What a device says of such a request: it never has anybody signalled, and knows nothing of sockets.
fn as_a_device(fd: c_int, name: &Name, number: u32, arg: usize) -> Result<usize, Errno> {
    if number != ASYNC {
        return command::ioctl(fd, name, number, arg as u64);
    }
    let mut on = [0; size_of::<c_int>()];
    sys::copy_in(&mut on, arg as u64)?;
    if c_int::from_ne_bytes(on) == 0 { Ok(0) } else { Err(Errno::NOTTY) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: usize) -> c_int {
    let number = request as u32; // as the kernel sees it
    if abi::What::of(number).is_some()
        && let Some(name) = Name::of(fd)
    {
        return int(quietly(|| command::ioctl(fd, &name, number, arg as u64)));
    }
    if number == UFFDIO_REGISTER {
        let _ = quietly(|| {
            mapping::step_aside(arg as u64);
            Ok(0)
        });
    }
    if (is_of_sockets(number) || number == ASYNC)
        && let Some(name) = Name::of(fd).filter(|name| name.kind.number().is_some())
    {
        return int(quietly(|| as_a_device(fd, &name, number, arg)));
    }
    // SAFETY: the program's call.
    let result = unsafe { sys::call(libc::SYS_ioctl, [fd as usize, request as usize, arg]) };
    // What a socket does not know may still be for a device: to be refused as a device does, or to pin pages.
    int(match result {
        Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP) if !is_of_any_file(number) => match Name::of(fd) {
            Some(name) => quietly(|| command::ioctl(fd, &name, number, arg as u64)),
            None => result,
        },
        result => result,
    })
}

fn access_at(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int {
    // SAFETY: the program's call.
    let result = unsafe {
        match flags {
            0 => sys::call(libc::SYS_faccessat, [dir as usize, path as usize, mode as usize]),
            _ => sys::call(libc::SYS_faccessat2, [dir as usize, path as usize, mode as usize, flags as usize]),
        }
    };
    match result.map_err(|error| not_found(error, path)) {
        Err(Some(kind)) => int(quietly(|| stat::access(kind, mode))),
        _ => int(result),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    access_at(libc::AT_FDCWD, path, mode, 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int {
    access_at(dir, path, mode, flags)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn euidaccess(path: *const c_char, mode: c_int) -> c_int {
    access_at(libc::AT_FDCWD, path, mode, libc::AT_EACCESS)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn eaccess(path: *const c_char, mode: c_int) -> c_int {
    access_at(libc::AT_FDCWD, path, mode, libc::AT_EACCESS)
}
