//! What a program may ask and say about ranges of its memory: where they are, where they will be needed, that their contents are not needed any more.
//!
//! A hint is never needed for a program to be right. Ranges may start and end anywhere. A hint about memory that cannot move does nothing, and so do all in
//! the modes and on the devices where nothing moves.

#![allow(unsafe_code)] // what is discarded by address alone

use crate::{Device, Uhmm};
use bytemuck::Pod;
use core::ops::Range;
use uhmm_core::Error;
pub use uhmm_core::prefetch::Prefetch;
pub use uhmm_core::residency::{Place, Run};

/// What names a range of addresses: a slice, an array, a `Vec`, a reference to one of these, or a range of addresses. Nothing is read through it.
///
/// ```
/// use uhmm::AsRange;
///
/// let data = vec![0u32; 100];
/// assert_eq!(data.as_range().len(), 400);
/// assert_eq!(data[..10].as_range().len(), 40);
/// assert_eq!([5u64].as_range().len(), 8);
/// assert_eq!((4096..8192).as_range().len(), 4096);
/// ```
pub trait AsRange {
    /// From the address of the first byte to one past the last.
    fn as_range(&self) -> Range<usize>;
}

impl<T> AsRange for [T] {
    fn as_range(&self) -> Range<usize> {
        let range = self.as_ptr_range();
        range.start as usize..range.end as usize
    }
}

impl<T, const N: usize> AsRange for [T; N] {
    fn as_range(&self) -> Range<usize> {
        self.as_slice().as_range()
    }
}

impl<T> AsRange for Vec<T> {
    fn as_range(&self) -> Range<usize> {
        self.as_slice().as_range()
    }
}

impl AsRange for Range<usize> {
    fn as_range(&self) -> Range<usize> {
        self.clone()
    }
}

impl<R: AsRange + ?Sized> AsRange for &R {
    fn as_range(&self) -> Range<usize> {
        (**self).as_range()
    }
}

impl<R: AsRange + ?Sized> AsRange for &mut R {
    fn as_range(&self) -> Range<usize> {
        (**self).as_range()
    }
}

/// Where a prefetch goes.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// # let dev = hmm.device("soft")?;
/// use uhmm::To;
///
/// let data = vec![0u8; 64 << 20];
/// let there = hmm.prefetch(&data, To::Device(&dev))?;
/// // ... something else ...
/// there.wait()?;
/// hmm.prefetch(&data, To::Home)?; // nobody waits for this one
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub enum To<'a> {
    /// To this device.
    Device(&'a Device),
    /// To the program's memory, from whatever device.
    Home,
}

/// Where the pages of a range were when [`Uhmm::residency`] looked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    runs: Vec<Run>,
}

impl Residency {
    /// The range's runs: in order, without gaps, neighbours in different places. They are clipped to the range, to the byte.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Bytes of the range in places of which `f` says yes.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let data = vec![0u8; 1 << 20];
    /// use uhmm::Place;
    /// let away = hmm.residency(&data)?.bytes_where(|place| matches!(place, Place::Private { .. }));
    /// println!("a touch brings {away} bytes home at most");
    /// # Ok(())
    /// # }
    /// ```
    pub fn bytes_where(&self, f: impl Fn(Place) -> bool) -> usize {
        self.runs.iter().filter(|run| f(run.place)).map(Run::bytes).sum()
    }

    /// Bytes that are in the program's memory and nowhere else.
    pub fn system(&self) -> usize {
        self.bytes_where(|place| place == Place::System)
    }

    /// Bytes that are on a device only.
    pub fn private(&self) -> usize {
        self.bytes_where(|place| matches!(place, Place::Private { .. }))
    }

    /// Bytes that are in the program's memory and on a device.
    pub fn duplicated(&self) -> usize {
        self.bytes_where(|place| matches!(place, Place::Duplicated { .. }))
    }

    /// Bytes that are in the memory of a coherent device, which the program uses in place.
    pub fn coherent(&self) -> usize {
        self.bytes_where(|place| matches!(place, Place::Coherent { .. }))
    }

    /// Bytes that the device of that name has a valid copy of: private, duplicated or coherent.
    pub fn on(&self, name: &str) -> usize {
        self.bytes_where(|place| match place {
            Place::Private { device } | Place::Duplicated { device } | Place::Coherent { device } => device == name,
            Place::System | Place::Moving { .. } | Place::Empty | Place::Unmapped => false,
        })
    }
}

impl Uhmm {
    /// Where the pages of a range are. It only looks: nothing is faulted in or moved, and no launch is waited for. While others move pages, each block of 2 MiB
    /// is as it was at some moment during the call.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let data = vec![0u8; 1 << 20];
    /// for run in hmm.residency(&data)?.runs() {
    ///     println!("{:#x} to {:#x}: {:?}", run.start, run.end, run.place);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Reentrant`] from a kernel.
    pub fn residency(&self, range: impl AsRange) -> Result<Residency, Error> {
        let range = range.as_range();
        Ok(Residency { runs: self.core.residency(range.start, range.end)? })
    }
    /// Has the pages of a range moved where they will be needed, in the background: returns at once, with a fence that can be waited for, looked at, or dropped.
    ///
    /// To a device go the whole pages of the range, as by [`Device::prefetch`]; home comes what it touches. Pages that cannot move stay. Moving is harmless to whoever
    /// uses the memory meanwhile: a touch waits, or takes the page back. So the range may be anything's, and what was unmapped before its turn came is skipped.
    ///
    /// Prefetches are made in the order in which they were asked for, while no launch runs; a launch that comes meanwhile waits for 32 MiB of them at most. With
    /// 4096 that wait, the next one waits for room.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let dev = hmm.device("soft")?;
    /// # let (data, input) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    /// use uhmm::To;
    /// let fence = hmm.prefetch(&data, To::Device(&dev))?;
    /// hmm.prefetch(&input, To::Home)?; // dropping the fence stops nothing
    /// // ... something else ...
    /// fence.wait()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Reentrant`] from a kernel; [`Error::System`] if a thread is refused. What happens later, [`Prefetch::wait`] tells.
    pub fn prefetch(&self, range: impl AsRange, to: To<'_>) -> Result<Prefetch<'_>, Error> {
        let range = range.as_range();
        let device = match to {
            To::Device(device) => Some(&device.dev),
            To::Home => None,
        };
        self.core.prefetch(range.start, range.end, device)
    }

    /// Tells that what `data` holds is not needed any more: nothing of it is copied, wherever it is. Its whole pages read as zeros from now on, their memory and
    /// the devices' is free; the bytes at its ends that share a page with others stay as they are. Waits for running launches, and for
    /// leases of it that were released.
    ///
    /// The frames of a block of 2 MiB that went to a device as a whole are free when its last page has gone.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), uhmm::Error> {
    /// # let hmm = uhmm::Uhmm::new()?;
    /// # let dev = hmm.device("soft")?;
    /// # let kernel = |_: &uhmm::Ctx<'_>| ();
    /// let mut scratch = vec![0u8; 64 << 20];
    /// dev.run(&kernel, 1, uhmm::args![uhmm::out(&mut scratch)])?;
    /// hmm.discard(&mut scratch)?; // it never comes home
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Discard`] for shared memory and that of files, and for what a lease has, with nothing changed; [`Error::Reentrant`] from a kernel.
    pub fn discard<T: Pod>(&self, data: &mut [T]) -> Result<(), Error> {
        let range = data.as_range();
        // SAFETY: borrowed exclusively, and zeros are a `T`.
        unsafe { self.core.discard(range.start, range.end) }
    }

    /// As [`discard`](Self::discard), for a range of addresses. If pages of it were locked, they are no more before they are touched again.
    ///
    /// ```no_run
    /// use uhmm::AsRange;
    ///
    /// # fn main() -> Result<(), uhmm::Error> {
    /// let hmm = uhmm::Uhmm::new()?;
    /// let scratch = vec![1u8; 64 << 20];
    /// // SAFETY: nobody uses the buffer meanwhile, and any bytes are valid.
    /// unsafe { hmm.discard_range(scratch.as_range())? };
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As there; and if something of it is not mapped.
    ///
    /// # Safety
    /// Nobody minds that the bytes in its whole pages turn to zeros, at any time during the call.
    pub unsafe fn discard_range(&self, range: Range<usize>) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.core.discard(range.start, range.end) }
    }
}
