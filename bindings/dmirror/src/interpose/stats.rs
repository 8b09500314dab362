//! stat(2) and its kin, under all names that libc has had for them. On x86-64 their struct is one, whatever the name.
#![allow(unsafe_code)] // takes the place of libc's functions

use super::files::not_found;
use super::quietly;
use crate::name::Name;
use crate::stat;
use crate::sys::{self, int};
use core::ffi::c_char;
use libc::{c_int, c_uint};
use uhmm_os::Errno;

fn by_path(dir: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int) -> c_int {
    // SAFETY: the program's call.
    let result = unsafe { sys::call(libc::SYS_newfstatat, [dir as usize, path as usize, to as usize, flags as usize]) };
    int(match result {
        Err(error) => match not_found(error, path) {
            Some(kind) => quietly(|| stat::give(&stat::stat(kind)?, to)),
            None => result,
        },
        // An empty path is the descriptor itself.
        Ok(_) if flags & libc::AT_EMPTY_PATH != 0 => by_status(dir, path, to, result),
        result => result,
    })
}

fn by_descriptor(fd: c_int, to: *mut libc::stat) -> c_int {
    // SAFETY: the program's call.
    let result = unsafe { sys::call(libc::SYS_fstat, [fd as usize, to as usize]) };
    int(by_status(fd, core::ptr::null(), to, result))
}

/// What was found is as it is unless it is a socket that is a device's.
fn by_status(fd: c_int, path: *const c_char, to: *mut libc::stat, result: Result<usize, Errno>) -> Result<usize, Errno> {
    let is_empty = || path.is_null() || first(path) == 0;
    // SAFETY: the kernel has just written there.
    let socket = || unsafe { (*to).st_mode } & libc::S_IFMT == libc::S_IFSOCK;
    match result {
        Ok(_) if socket() && is_empty() => match Name::of(fd) {
            Some(name) => quietly(|| stat::give(&stat::stat(name.kind)?, to)),
            None => result,
        },
        result => result,
    }
}

fn first(path: *const c_char) -> u8 {
    let mut byte = [0];
    let _ = sys::copy_in(&mut byte, path as u64);
    byte[0]
}

macro_rules! stats {
    ($($stat:ident $lstat:ident $fstat:ident $fstatat:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $stat(path: *const c_char, to: *mut libc::stat) -> c_int {
            by_path(libc::AT_FDCWD, path, to, 0)
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn $lstat(path: *const c_char, to: *mut libc::stat) -> c_int {
            by_path(libc::AT_FDCWD, path, to, libc::AT_SYMLINK_NOFOLLOW)
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn $fstat(fd: c_int, to: *mut libc::stat) -> c_int {
            by_descriptor(fd, to)
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn $fstatat(dir: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int) -> c_int {
            by_path(dir, path, to, flags)
        }
    )*};
}

stats! {
    stat lstat fstat fstatat
    stat64 lstat64 fstat64 fstatat64
}

/// Before glibc 2.33 programs called these, with a version of the struct: there is one on x86-64, and 0 stands for it too.
macro_rules! versioned_stats {
    ($($stat:ident $lstat:ident $fstat:ident $fstatat:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $stat(_version: c_int, path: *const c_char, to: *mut libc::stat) -> c_int {
            by_path(libc::AT_FDCWD, path, to, 0)
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn $lstat(_version: c_int, path: *const c_char, to: *mut libc::stat) -> c_int {
            by_path(libc::AT_FDCWD, path, to, libc::AT_SYMLINK_NOFOLLOW)
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn $fstat(_version: c_int, fd: c_int, to: *mut libc::stat) -> c_int {
            by_descriptor(fd, to)
        }

        #[unsafe(no_mangle)]
        unsafe extern "C" fn $fstatat(_version: c_int, dir: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int) -> c_int {
            by_path(dir, path, to, flags)
        }
    )*};
}

versioned_stats! {
    __xstat __lxstat __fxstat __fxstatat
    __xstat64 __lxstat64 __fxstat64 __fxstatat64
}

#[unsafe(no_mangle)]
unsafe extern "C" fn statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, to: *mut libc::statx) -> c_int {
    // SAFETY: the program's call.
    let result = unsafe { sys::call(libc::SYS_statx, [dir as usize, path as usize, flags as usize, mask as usize, to as usize]) };
    let kind = match result {
        Err(error) => not_found(error, path),
        // SAFETY: the kernel has just written there.
        Ok(_) if flags & libc::AT_EMPTY_PATH != 0 && u32::from(unsafe { (*to).stx_mode }) & libc::S_IFMT == libc::S_IFSOCK => {
            (path.is_null() || first(path) == 0).then(|| Name::of(dir)).flatten().map(|name| name.kind)
        }
        _ => None,
    };
    int(match kind {
        Some(kind) => quietly(|| stat::give(&stat::statx(kind, mask)?, to)),
        None => result,
    })
}
