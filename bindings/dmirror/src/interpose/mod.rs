//! The functions of libc that this library takes the place of, in every program that it is preloaded into.
//!
//! # Rules
//! * The real call is made first, as a raw system call, with the program's arguments untouched. What it says shows nearly always that it is not about a file or
//!   descriptor of this library's. So others' descriptors cost nothing, and nothing has to be initialised.
//! * Nothing unwinds into the program: what is more than a few lines runs under [`quietly`], and a panic there is `EIO`.
//! * `errno` changes on errors only.
//!
//! Some of libc's functions are variadic (open, openat, ioctl, mremap). Here they are defined with all arguments that they ever take: on x86-64 a caller of a variadic function passes the first six
//! integer arguments in the same registers as to any function, besides a count of vector registers in `al`, which nobody has to look at. An argument that was not passed has any value, and is only
//! handed on to the kernel, which then does not look at it either.

mod files;
mod maps;
mod stats;

use crate::sys;
use uhmm_os::Errno;

/// Runs what could panic, and leaves `errno` alone.
fn quietly(f: impl FnOnce() -> Result<usize, Errno>) -> Result<usize, Errno> {
    let before = sys::errno();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(Err(Errno::IO));
    sys::set_errno(before);
    result
}
