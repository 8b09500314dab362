//! Memory that a program allocates on the device itself: what explicit code does, beside which uhmm measures itself.
#![allow(unsafe_code)] // names device memory as an argument

use bytemuck::Pod;
use core::any::{TypeId, type_name};
use core::marker::PhantomData;
use uhmm_core::args::{Access, Arg, RawArg};
use uhmm_core::driver::{Dma, DmaKind, Frame};
use uhmm_core::{DeviceRef, Error};

/// `len` elements in device memory. Freed when dropped.
///
/// ```no_run
/// # fn main() -> Result<(), uhmm::Error> {
/// # let hmm = uhmm::Uhmm::new()?;
/// # let dev = hmm.device("soft")?;
/// use uhmm::{Ctx, args};
///
/// let mut buffer = dev.alloc::<f32>(1000)?;
/// buffer.upload(&[2.0; 1000])?;
/// dev.run(&|ctx: &Ctx<'_>| ctx.out::<f32>(0).chunk(1000).iter_mut().for_each(|x| *x *= *x), 1, args![buffer.inout()])?;
/// let mut data = [0.0; 1000];
/// buffer.download(&mut data)?;
/// assert_eq!(data[7], 4.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Buffer<'d, T> {
    dev: &'d DeviceRef,
    frame: Frame,
    address: usize,
    len: usize,
    data: PhantomData<T>,
}

impl<'d, T: Pod> Buffer<'d, T> {
    pub(crate) fn new(dev: &'d DeviceRef, len: usize) -> Result<Self, Error> {
        let info = dev.info();
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= info.memory);
        let Some(bytes) = bytes else {
            let needed = len.saturating_mul(size_of::<T>());
            return Err(Error::NoRoom { device: info.name, needed, capacity: info.memory });
        };
        let (frame, address) = dev.allocate(bytes)?;
        let buffer = Buffer { dev, frame, address, len, data: PhantomData };
        buffer.dma(DmaKind::Zero, 0)?;
        Ok(buffer)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    fn dma(&self, kind: DmaKind, host: usize) -> Result<(), Error> {
        if self.bytes() == 0 {
            return Ok(());
        }
        self.dev.copy(Dma { kind, host, frame: self.frame, offset: 0, len: self.bytes() })
    }

    fn same_length(&self, slice: usize) -> Result<(), Error> {
        if slice == self.len { Ok(()) } else { Err(Error::Length { buffer: self.len, slice }) }
    }

    /// Copies `data` to the device.
    ///
    /// # Errors
    /// [`Error::Length`] if the lengths differ.
    pub fn upload(&mut self, data: &[T]) -> Result<(), Error> {
        self.same_length(data.len())?;
        self.dma(DmaKind::GuardedToDevice, data.as_ptr() as usize)
    }

    /// Copies the contents to `data`.
    ///
    /// # Errors
    /// [`Error::Length`] if the lengths differ.
    pub fn download(&self, data: &mut [T]) -> Result<(), Error> {
        self.same_length(data.len())?;
        self.dma(DmaKind::GuardedToHost, data.as_ptr() as usize)
    }

    fn arg(&self, access: Access) -> RawArg {
        RawArg::Slice {
            start: self.address,
            count: self.len,
            size: size_of::<T>(),
            ty: TypeId::of::<T>(),
            name: type_name::<T>(),
            access,
            device: Some(self.dev.id()),
        }
    }

    /// This buffer as an argument that a kernel reads.
    pub fn inp(&self) -> Arg<'_> {
        // SAFETY: the memory is zeroed or holds values of T; the argument borrows the buffer.
        unsafe { Arg::from_raw(self.arg(Access::In)) }
    }

    /// This buffer as an argument that a kernel writes.
    pub fn out(&mut self) -> Arg<'_> {
        // SAFETY: as in `inp`, exclusively.
        unsafe { Arg::from_raw(self.arg(Access::Out)) }
    }

    /// This buffer as an argument that a kernel reads and writes.
    pub fn inout(&mut self) -> Arg<'_> {
        // SAFETY: as in `inp`, exclusively.
        unsafe { Arg::from_raw(self.arg(Access::InOut)) }
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        self.dev.free(self.frame, self.len * size_of::<T>());
    }
}
