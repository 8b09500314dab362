//! Mappings: mmap, munmap, mremap, mprotect, madvise.
//!
//! They are called by allocators too, on any stack: without an open device they are the system call and a look at a word; of a file that is mapped
//! privately also a look which it is.
#![allow(unsafe_code)] // takes the place of libc's functions

use crate::mapping;
use crate::sys::{c, int};
use libc::{c_int, c_void, off_t, size_t};

/// A result as an address; -1 is `MAP_FAILED`.
fn address(result: isize) -> *mut c_void {
    result as *mut c_void
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(addr: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
    address(c(mapping::map(addr, len, prot, flags, fd, offset)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(addr: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
    address(c(mapping::map(addr, len, prot, flags, fd, offset)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(addr: *mut c_void, len: size_t) -> c_int {
    int(mapping::unmap(addr, len))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mremap(old: *mut c_void, old_len: size_t, new_len: size_t, flags: c_int, new: *mut c_void) -> *mut c_void {
    address(c(mapping::remap(old, old_len, new_len, flags, new)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mprotect(addr: *mut c_void, len: size_t, prot: c_int) -> c_int {
    int(mapping::protect(addr, len, prot))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pkey_mprotect(addr: *mut c_void, len: size_t, prot: c_int, key: c_int) -> c_int {
    // As in libc: no key is no call of its own.
    int(if key == -1 { mapping::protect(addr, len, prot) } else { mapping::protect_by_key(addr, len, prot, key) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(addr: *mut c_void, len: size_t, advice: c_int) -> c_int {
    int(mapping::advise(addr, len, advice))
}
