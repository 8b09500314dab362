//! A driver around another one: it does what the other does, but for the calls that it is there to change.
//!
//! Examples: `drivers/faulty`, which forwards what it does not fail.

use super::{Committed, DeviceInfo, Dma, DmaError, Driver, Fence, Frame, KernelFault, Launch, Located, MapRun, Native};
use crate::args::RawArg;
use crate::kernel::Entry;
use crate::page::Span;
use core::time::Duration;
use uhmm_os::Errno;

/// The list of calls, once: each becomes a method of [`Forward`] that asks the inner driver, and one of `Driver` that asks `Forward`.
macro_rules! forward {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)*) $(-> $result:ty)?;)*) => {
        /// A driver that is another one ([`inner`](Self::inner)) but for what it does otherwise: whoever implements this is a [`Driver`].
        ///
        /// # Safety
        /// What holds for a [`Driver`]: the methods that are not the inner driver's do what each method of `Driver` says.
        ///
        /// ```
        /// use uhmm_core::driver::{Driver, Forward, Frame};
        /// use uhmm_core::own::OwnBox;
        ///
        /// /// A device whose memory the CPU cannot see.
        /// #[derive(Debug)]
        /// struct Dark(OwnBox<dyn Driver>);
        ///
        /// // SAFETY: the inner driver's promises; to see nothing promises less.
        /// unsafe impl Forward for Dark {
        ///     fn inner(&self) -> &dyn Driver {
        ///         &*self.0
        ///     }
        ///     fn peek(&self, _: Frame) -> Option<usize> {
        ///         None
        ///     }
        /// }
        ///
        /// fn opened(device: Dark) -> impl Driver {
        ///     device
        /// }
        /// ```
        #[allow(unsafe_code)] // only the marker, as of `Driver`
        pub unsafe trait Forward: Send + Sync + core::fmt::Debug {
            /// The driver that does what this one does not do itself.
            fn inner(&self) -> &dyn Driver;
            $(
                #[doc = concat!("As [`Driver::", stringify!($name), "`].")]
                #[allow(clippy::missing_errors_doc)] // they are told there
                fn $name(&self $(, $arg: $type)*) $(-> $result)? {
                    self.inner().$name($($arg),*)
                }
            )*
        }

        #[allow(unsafe_code)] // only the marker
        #[deny(clippy::missing_trait_methods)] // a call that the list lacks would not reach the inner driver
        // SAFETY: the promise of `Forward`.
        unsafe impl<T: Forward> Driver for T {
            $(
                fn $name(&self $(, $arg: $type)*) $(-> $result)? {
                    Forward::$name(self $(, $arg)*)
                }
            )*
        }
    };
}

forward! {
    fn info(&self) -> &DeviceInfo;
    fn populate(&self, unit: usize) -> Result<(), Errno>;
    fn release(&self, unit: usize);
    fn peek(&self, frame: Frame) -> Option<usize>;
    fn take_back(&self, frame: Frame, host: usize, pages: usize) -> usize;
    fn address(&self, frame: Frame) -> usize;
    fn native(&self) -> Option<Native>;
    fn locate(&self, arg: &RawArg) -> Option<Located>;
    fn stand_by(&self);
    fn mapped(&self, va: usize) -> Option<usize>;
    fn copy(&self, batch: &[Dma]) -> Fence;
    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError>;
    fn is_lost(&self) -> bool;
    fn said(&self) -> Option<&'static str>;
    fn open_window(&self, span: Span) -> Result<(), Errno>;
    fn close_window(&self, span: Span);
    fn share(&self, span: Span) -> Result<(), Errno>;
    fn unshare(&self, span: Span);
    fn map(&self, batch: Committed<'_>) -> Result<(), Errno>;
    fn allow_writes(&self, batch: &[MapRun]);
    fn protect(&self, run: MapRun) -> Option<usize>;
    fn unmap(&self, batch: &[MapRun]);
    fn load(&self, entry: &Entry, args: &[RawArg]) -> Result<(), String>;
    fn follows(&self, entry: &Entry, args: &[RawArg]) -> bool;
    fn launch(&self, launch: &Launch) -> Result<(), KernelFault>;
    fn note_fault(&self, va: usize, write: bool);
    fn fail(&self, fault: KernelFault);
    fn host_touch(&self, tid: u32, address: usize);
    fn owns_thread(&self, tid: u32) -> bool;
    fn owns_runtime_thread(&self, tid: u32) -> bool;
    fn in_window(&self, address: usize) -> bool;
    fn reaches(&self, va: usize) -> bool;
    fn scratch(&self, address: usize, fault: KernelFault) -> bool;
}
