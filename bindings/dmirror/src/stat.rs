//! What stat(2) and its kin say of the files: what they say of /dev/null (or of a file of the kernel's), as another device.
#![allow(unsafe_code)] // system calls

use crate::device::Kind;
use crate::sys;
use libc::{c_int, c_uint};
use uhmm_os::Errno;

/// A major number that the kernel gives to devices without one of their own.
const MAJOR: u32 = 234;
/// Not an inode of anybody else's.
const INODES: u64 = 0x7568_6d6d_0000;

fn model(kind: Kind) -> *const core::ffi::c_char {
    match kind.number() {
        Some(_) => c"/dev/null".as_ptr(),
        None => c"/proc/self/stat".as_ptr(),
    }
}

/// Type and permissions, and the inode.
fn looks(kind: Kind) -> (u32, u64) {
    match kind.number() {
        Some(number) => (libc::S_IFCHR | 0o666, INODES + u64::from(number)),
        None => (libc::S_IFREG | 0o600, INODES + 0xff),
    }
}

/// stat(2).
pub(crate) fn stat(kind: Kind) -> Result<libc::stat, Errno> {
    // SAFETY: a struct of numbers, which may be written; a string.
    let mut status: libc::stat = unsafe {
        let mut status = core::mem::zeroed();
        sys::call(libc::SYS_stat, [model(kind) as usize, &raw mut status as usize])?;
        status
    };
    (status.st_mode, status.st_ino) = looks(kind);
    (status.st_uid, status.st_gid) = (0, 0);
    if let Some(number) = kind.number() {
        status.st_rdev = libc::makedev(MAJOR, number.into());
    }
    Ok(status)
}

/// statx(2).
pub(crate) fn statx(kind: Kind, mask: c_uint) -> Result<libc::statx, Errno> {
    // SAFETY: a struct of numbers, which may be written; a string.
    let mut status: libc::statx = unsafe {
        let mut status = core::mem::zeroed();
        sys::call(libc::SYS_statx, [libc::AT_FDCWD as usize, model(kind) as usize, 0, mask as usize, &raw mut status as usize])?;
        status
    };
    let (mode, inode) = looks(kind);
    (status.stx_mode, status.stx_ino) = (mode as u16, inode);
    (status.stx_uid, status.stx_gid) = (0, 0);
    if let Some(number) = kind.number() {
        (status.stx_rdev_major, status.stx_rdev_minor) = (MAJOR, number.into());
    }
    Ok(status)
}

/// Gives the program such a struct, at an address that may be bad.
pub(crate) fn give<T: Copy>(status: &T, to: *mut T) -> Result<usize, Errno> {
    // SAFETY: both structs are numbers and padding that was zeroed with the rest.
    let bytes = unsafe { core::slice::from_raw_parts(core::ptr::from_ref(status).cast::<u8>(), size_of::<T>()) };
    sys::copy_out(to as u64, bytes).map(|()| 0)
}

/// access(2).
pub(crate) fn access(kind: Kind, mode: c_int) -> Result<usize, Errno> {
    if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 {
        return Err(Errno::INVAL);
    }
    if mode & libc::X_OK != 0 || (kind.number().is_none() && !root()) { Err(Errno::ACCESS) } else { Ok(0) }
}

fn root() -> bool {
    // SAFETY: no arguments, no effects.
    let user = unsafe { sys::call(libc::SYS_geteuid, []) };
    user == Ok(0)
}
