//! Memory that never migrates: what the fault path touches is mapped by uhmm itself.
//!
//! A thread that serves page faults must not touch a page that could be on a device, or it would wait for itself. The heap and the
//! program's statics could be; the mappings made here cannot, for nothing here is ever registered for migration. They lie far from where the kernel
//! places the program's own mappings, are named, and are neither inherited by a forked child nor written to a core dump.
//!
//! Who uses it: drivers, for all that their calls on the fault path touch: the driver itself ([`OwnBox`]), tables ([`OwnSlice`]), stacks ([`spawn`]).
//!
//! ```
//! use core::sync::atomic::{AtomicU32, Ordering};
//! use uhmm_core::own::{self, OwnBox, OwnSlice};
//!
//! let calls = OwnBox::new(c"example calls", AtomicU32::new(0))?;
//! calls.fetch_add(1, Ordering::Relaxed);
//! assert_eq!(calls.into_inner().into_inner(), 1);
//!
//! let table: OwnSlice<u64> = OwnSlice::new(c"example table", 1 << 20)?; // 8 MiB of address space; memory where it is touched
//! assert_eq!(table[1 << 19], 0);
//!
//! let arena = own::map(c"example arena", 2 << 20)?;
//! assert_eq!(arena.start() % (2 << 20), 0);
//! # Ok::<(), uhmm_os::Errno>(())
//! ```
#![allow(unsafe_code)] // places values in raw mappings

use crate::sync::{AtomicUsize, Ordering};
use core::ffi::CStr;
use core::ops::Deref;
use core::ptr::NonNull;
use uhmm_os::mem::{self, Mapping, Prot, Reserve};
use uhmm_os::thread::{self, Thread};
use uhmm_os::{BLOCK, Errno};

/// The addresses that such memory has, unless they are all taken.
pub(crate) const PLACE: crate::page::Span = crate::page::Span { start: 0x2000_0000_0000, end: 0x3000_0000_0000 };

/// Where the next mapping is tried. Addresses with bits 46 to 44 equal to 010 are neither a usual place of a program's mappings nor one
/// that a device's window can fall on. Not zero, so that it lies in `.data`.
static NEXT: AtomicUsize = AtomicUsize::new(PLACE.start);

/// Maps `len` bytes of zeroed memory, aligned to a block, without reserving swap for it.
///
/// # Errors
/// `ENOMEM` where limits (RLIMIT_AS, vm.overcommit_memory=2) refuse it.
pub fn map(name: &CStr, len: usize) -> Result<Mapping, Errno> {
    if len > 1 << 46 {
        return Err(Errno::NOMEM); // more than there are addresses
    }
    let len = len.next_multiple_of(uhmm_os::PAGE);
    // A gap of a block keeps neighbours from being merged into one mapping.
    let hint = NEXT.fetch_add(len.next_multiple_of(BLOCK) + BLOCK, Ordering::Relaxed);
    mem::map(&Reserve { hint, len, align: BLOCK, name, prot: Prot::ReadWrite, exact: false })
}

/// Starts a thread whose stacks are such memory.
///
/// # Errors
/// As [`map`] and [`thread::spawn_in`].
///
/// # Safety
/// As [`thread::spawn_in`].
pub unsafe fn spawn(name: &CStr, stack: usize, f: unsafe extern "C" fn(*mut ()), arg: *mut ()) -> Result<Thread, Errno> {
    let memory = map(name, Thread::memory_len(stack).ok_or(Errno::INVAL)?)?;
    // SAFETY: the same promise; the memory is fresh.
    unsafe { thread::spawn_in(memory, name, f, arg) }
}

/// Types for which memory of all zeros is a valid value.
///
/// # Safety
/// As said.
pub unsafe trait Zeroed {}

/// A value in a mapping of its own.
#[derive(Debug)]
pub struct OwnBox<T: ?Sized> {
    value: NonNull<T>,
    _mapping: Mapping,
}

// SAFETY: it owns its value like a Box.
unsafe impl<T: ?Sized + Send> Send for OwnBox<T> {}
// SAFETY: as above.
unsafe impl<T: ?Sized + Sync> Sync for OwnBox<T> {}

impl<T> OwnBox<T> {
    /// Moves `value` into a mapping of its own.
    ///
    /// # Errors
    /// As [`map`].
    pub fn new(name: &CStr, value: T) -> Result<Self, Errno> {
        let mapping = map(name, size_of::<T>().max(1))?;
        let place = mapping.as_ptr().cast::<T>();
        // SAFETY: the mapping is large enough, aligned to a block, writable, and ours.
        unsafe { place.write(value) };
        Ok(OwnBox { value: NonNull::new(place).ok_or(Errno::NOMEM)?, _mapping: mapping })
    }

    /// The value; its mapping goes.
    pub fn into_inner(self) -> T {
        let this = core::mem::ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped: the value is moved out once, and the mapping dropped once.
        unsafe {
            let value = this.value.read();
            drop(core::ptr::read(&this._mapping));
            value
        }
    }

    /// The same box with another pointer to the same value, such as one to a trait object.
    ///
    /// ```
    /// use core::fmt::Debug;
    /// use uhmm_core::own::OwnBox;
    ///
    /// let number = OwnBox::new(c"example", 42u32)?;
    /// let shown: OwnBox<dyn Debug> = number.unsize(|p| p as *mut dyn Debug); // as a driver becomes a dyn Driver
    /// assert_eq!(format!("{:?}", &*shown), "42");
    /// # Ok::<(), uhmm_os::Errno>(())
    /// ```
    pub fn unsize<U: ?Sized>(self, cast: impl FnOnce(*mut T) -> *mut U) -> OwnBox<U> {
        let this = core::mem::ManuallyDrop::new(self);
        let value = cast(this.value.as_ptr());
        debug_assert_eq!(value.cast::<u8>(), this.value.as_ptr().cast::<u8>());
        // SAFETY: `this` is never dropped, so the mapping has one owner; the pointer is the old one, which is not null.
        unsafe { OwnBox { value: NonNull::new_unchecked(value), _mapping: core::ptr::read(&this._mapping) } }
    }
}

impl<T> OwnBox<T> {
    /// Gives the box up; [`reclaim`](Self::reclaim) makes it again from the value's address.
    pub fn leak(self) -> *mut T {
        core::mem::ManuallyDrop::new(self).value.as_ptr()
    }

    /// The box that was given up.
    ///
    /// # Safety
    /// `value` comes from [`leak`](Self::leak), once.
    pub unsafe fn reclaim(value: *mut T) -> Self {
        let len = size_of::<T>().max(1).next_multiple_of(uhmm_os::PAGE);
        // SAFETY: the value stands at the start of a mapping of this length (`new`), whose old owner was given up.
        unsafe { OwnBox { value: NonNull::new_unchecked(value), _mapping: Mapping::from_raw(value as usize, len) } }
    }
}

impl<T: ?Sized> Deref for OwnBox<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: it was written in `new` and lives until `drop`.
        unsafe { self.value.as_ref() }
    }
}

impl<T: ?Sized> Drop for OwnBox<T> {
    fn drop(&mut self) {
        // SAFETY: dropped once; the mapping goes afterwards.
        unsafe { self.value.drop_in_place() };
    }
}

/// A fixed number of zeroed elements, of which only the touched pages cost memory.
#[derive(Debug)]
pub struct OwnSlice<T> {
    start: NonNull<T>,
    len: usize,
    _mapping: Mapping,
}

// SAFETY: it owns its elements like a boxed slice.
unsafe impl<T: Send> Send for OwnSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for OwnSlice<T> {}

impl<T: Zeroed> OwnSlice<T> {
    /// `len` zeroed elements.
    ///
    /// # Errors
    /// As [`map`].
    pub fn new(name: &CStr, len: usize) -> Result<Self, Errno> {
        const { assert!(!core::mem::needs_drop::<T>()) };
        let mapping = map(name, (len * size_of::<T>()).max(1))?;
        Ok(OwnSlice { start: NonNull::new(mapping.as_ptr().cast()).ok_or(Errno::NOMEM)?, len, _mapping: mapping })
    }

    /// A pointer to element `index`, for owners that keep their own rules about who may use it.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len);
        // SAFETY: in bounds.
        unsafe { self.start.as_ptr().add(index) }
    }
}

impl<T> Deref for OwnSlice<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements, valid because zeroed memory is (`Zeroed`) and whoever writes keeps them so.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> core::ops::DerefMut for OwnSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the borrow is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

// SAFETY: plain numbers.
unsafe impl Zeroed for u8 {}
// SAFETY: as above.
unsafe impl Zeroed for u32 {}
// SAFETY: as above.
unsafe impl Zeroed for u64 {}
// SAFETY: as above.
unsafe impl Zeroed for usize {}
// SAFETY: the empty set.
unsafe impl Zeroed for crate::bits::Bits {}
// SAFETY: a plain number.
unsafe impl Zeroed for crate::sync::AtomicU64 {}
// SAFETY: as above.
unsafe impl Zeroed for crate::sync::AtomicU32 {}
