//! The locks and atomics of this crate, all from one place, so that a model checker's can take theirs.
//!
//! They are futexes over raw system calls: a lock touches nothing but its own word, no errno, no thread-local, no heap, and so may be
//! taken by a thread that serves page faults. Words of all zeros are unlocked, so that they can lie in fresh pages.

pub(crate) use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
pub(crate) use rustix_futex_sync::lock_api::RawMutex as RawMutexApi;
pub(crate) use rustix_futex_sync::{Condvar, Mutex, MutexGuard, RawMutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
