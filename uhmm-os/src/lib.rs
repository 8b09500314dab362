//! The boundary between uhmm and Linux: the only place where system calls are made and signal handlers are written.
//!
//! Everything above this crate speaks in terms of the types here and contains no request number, no kernel structure and no
//! assembly. Linux on x86-64 only. What a kernel offers is found at run time ([`uffd::probe`], [`pagemap::Pagemap::open`],
//! [`maps::Maps::open`], [`system`]), never by a cargo feature.
//!
//! | module | what it wraps |
//! |---|---|
//! | [`uffd`] | userfaultfd: registering, copying, moving and protecting pages, fault and mapping events; waiting for descriptors |
//! | [`pagemap`] | `/proc/self/pagemap`: one page's state, and `PAGEMAP_SCAN` over a range |
//! | [`maps`] | `/proc/self/maps`: which mapping holds an address (`PROCMAP_QUERY`, or the text) |
//! | [`allocation`] | which allocation holds an address |
//! | [`mem`] | mmap, mremap, madvise and names, with memory that a fork does not inherit |
//! | [`memfile`] | files in memory: the same pages at several addresses |
//! | [`copy`] | copies that bypass the cache, and copies that survive a bad address |
//! | [`signal`] | SIGBUS and SIGSEGV: one handler that chains to those before it; hooks before any signal's action |
//! | [`thread`] | threads on stacks of our own, with alternate signal stacks and descriptor tables of their own |
//! | [`syscall`] | raw system calls, for a library that stands in for libc's functions |
//! | [`system`] | what this kernel is, and what this process may do; fork handlers |
//!
//! # The fault path
//!
//! Some threads serve page faults of the process they run in. Whatever such a thread touches must not itself be waiting for it.
//! Functions marked *Fault path* may be called there. They
//! * make raw system calls, so they touch neither `errno` nor any other thread-local variable (a dynamically loaded library's lie
//!   on the heap);
//! * allocate nothing, log nothing, take no lock;
//! * touch no static in `.bss` (anonymous memory, which can be moved away): the few statics there are lie in `.data`, which is
//!   private file memory and stays where it is.
//!
//! All addresses are `usize`, all lengths are bytes.
//!
//! # Examples
//!
//! Each module opens with an example of its main types and functions; what has none of its own is shown there, or is told by its documentation.
//!
//! ```
//! use uhmm_os::{BLOCK, PAGE};
//!
//! assert_eq!(BLOCK / PAGE, 512);
//! ```
#![allow(unsafe_code)] // system calls, signal handlers and assembly live here so that they need not live elsewhere

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("uhmm-os supports Linux on x86-64 only: its system calls, signal frames and copy loops are written for that");

pub mod allocation;
pub mod copy;
mod flush;
pub mod maps;
pub mod mem;
pub mod memfile;
pub mod pagemap;
pub mod signal;
pub mod syscall;
pub mod system;
pub mod tasks;
pub mod thread;
pub mod uffd;
mod wait;

pub use rustix::io::Errno;
pub use wait::{EventFd, futex_wait, futex_wake, poll};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a block: what one page-table page maps, and the size of a huge page.
pub const BLOCK: usize = 2 << 20;
