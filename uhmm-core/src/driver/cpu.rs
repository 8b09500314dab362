//! What drivers have in common whose copy engine, or whose kernels, are the CPU's: copying the pieces of a batch, running a group, the slot of a launch's first fault,
//! and the list of scratch pages. All but [`run_group`] is for the fault path: nothing is allocated, and locks touch nothing else.
//!
//! Examples: `uhmm/examples/tiny_driver.rs` uses all of it.
#![allow(unsafe_code)] // copies between raw addresses; makes kernels' contexts

use super::{Dma, DmaError, DmaKind, Frame, KernelFault, Launch};
use crate::kernel::{Ctx, LOCAL_BYTES};
use crate::page::Span;
use crate::sync::Mutex;
use uhmm_os::{PAGE, copy};

/// Copies a whole batch: what [`Driver::wait`](super::Driver::wait) does in a driver that has no copy engine of its own. `address` says where a frame lies.
///
/// # Errors
/// [`DmaError::Gone`] with the first guarded address that could not be reached; all other pieces are done.
///
/// # Safety
/// The batch is one that uhmm has given to the driver and still waits for. What `address` says of a frame is valid for reads and writes of that page; frames that follow each
/// other are next to each other there.
pub unsafe fn copy_batch(batch: &[Dma], address: impl Fn(Frame) -> usize) -> Result<(), DmaError> {
    let mut result = Ok(());
    for dma in batch {
        // SAFETY: handed on.
        let copied = unsafe { copy_part(dma, 0, dma.len, &address) };
        result = result.and(copied.map_err(|address| DmaError::Gone { address }));
    }
    result
}

/// Copies `len` bytes of a piece from `offset` on, for engines that divide a batch among threads. Copies bypass the cache, as a device's would; guarded ones do not.
///
/// # Errors
/// The first host address of a guarded piece that could not be reached.
///
/// # Safety
/// As [`copy_batch`]; `offset + len` is at most the piece's `len`.
pub unsafe fn copy_part(dma: &Dma, offset: usize, len: usize, address: impl Fn(Frame) -> usize) -> Result<(), usize> {
    let at = dma.offset + offset;
    let device = address(dma.frame + (at / PAGE) as Frame) + at % PAGE;
    let host = dma.host + offset;
    // SAFETY: the frames are where the caller says; host addresses of a batch are uhmm's own memory, or, if guarded, may be anything (the contract of `Driver::copy`).
    unsafe {
        match dma.kind {
            DmaKind::ToDevice => copy::stream(device as *mut u8, host as *const u8, len),
            DmaKind::ToHost => copy::stream(host as *mut u8, device as *const u8, len),
            DmaKind::Zero => copy::stream_zero(device as *mut u8, len),
            DmaKind::GuardedToDevice | DmaKind::SnapshotToDevice | DmaKind::LentToDevice => {
                return copy::guarded(device as *mut u8, host as *const u8, len);
            }
            DmaKind::GuardedToHost => return copy::guarded(host as *mut u8, device as *const u8, len),
        }
    }
    Ok(())
}

/// Runs one group of a launch on the calling thread, with `local` as its scratch memory.
///
/// # Errors
/// [`KernelFault::Panic`] if the kernel panics.
///
/// # Safety
/// The launch is the one that [`Driver::launch`](super::Driver::launch) runs, and that has not returned. No other thread has run the group or will. [`LOCAL_BYTES`] at `local`
/// are valid for reads and writes, and nobody else's meanwhile.
pub unsafe fn run_group(launch: &Launch, group: usize, local: *mut u8) -> Result<(), KernelFault> {
    // SAFETY: the launch was prepared: its ranges are valid at the device's addresses, or fault and become so. The rest the caller vouches for.
    let ctx = unsafe { Ctx::new(&launch.bound, group, local, LOCAL_BYTES) };
    // SAFETY: who launches waits for `Driver::launch`, and so keeps the kernel alive.
    unsafe { launch.entry.call(&ctx) }.map_err(KernelFault::Panic)
}

/// The first fault of the running launch, which is what [`Driver::launch`](super::Driver::launch) returns.
///
/// ```
/// use uhmm_core::driver::{KernelFault, cpu::FirstFault};
///
/// let slot = FirstFault::default();
/// slot.begin();
/// slot.set(KernelFault::NoRoom { address: 4096 });
/// slot.set(KernelFault::Lost); // too late
/// assert!(matches!(slot.end(), Err(KernelFault::NoRoom { address: 4096 })));
/// assert!(slot.end().is_ok());
/// ```
#[derive(Debug, Default)]
pub struct FirstFault(Mutex<Option<KernelFault>>);

impl FirstFault {
    /// A launch begins: what was noted while none ran is forgotten.
    pub fn begin(&self) {
        *self.0.lock() = None;
    }

    /// Notes a fault, unless there is one.
    pub fn set(&self, fault: KernelFault) {
        self.0.lock().get_or_insert(fault);
    }

    /// The launch has ended.
    ///
    /// # Errors
    /// The fault that was noted first.
    pub fn end(&self) -> Result<(), KernelFault> {
        self.0.lock().take().map_or(Ok(()), Err)
    }
}

/// The pages that let a failed kernel run on ([`Driver::scratch`](super::Driver::scratch)), at most `N`, each with a mark of the driver's that says how it was put there. It is only
/// the list: the driver puts the pages down, and takes them up when the launch has ended. To be kept behind a lock.
#[derive(Debug)]
pub struct ScratchPages<const N: usize> {
    /// Page addresses, with the mark below.
    pages: [usize; N],
    count: usize,
}

impl<const N: usize> Default for ScratchPages<N> {
    fn default() -> Self {
        ScratchPages { pages: [0; N], count: 0 }
    }
}

impl<const N: usize> ScratchPages<N> {
    /// Whether no more are to be had.
    pub fn is_full(&self) -> bool {
        self.count == N
    }

    /// Whether the list has this page with this mark.
    pub fn has(&self, page: usize, mark: usize) -> bool {
        self.pages[..self.count].contains(&(page | mark))
    }

    /// Adds the page at address `page`.
    ///
    /// # Panics
    /// If the list is full.
    pub fn push(&mut self, page: usize, mark: usize) {
        debug_assert!(page.is_multiple_of(PAGE) && mark < PAGE);
        self.pages[self.count] = page | mark;
        self.count += 1;
    }

    /// Real pages take the place of those in `span`.
    pub fn forget(&mut self, span: Span) {
        let mut index = 0;
        while index < self.count {
            if (span.start..span.end).contains(&self.pages[index]) {
                self.count -= 1;
                self.pages[index] = self.pages[self.count];
            } else {
                index += 1;
            }
        }
    }

    /// Empties the list; `take_up` is called with each page and its mark.
    pub fn clear(&mut self, mut take_up: impl FnMut(usize, usize)) {
        self.pages[..self.count].iter().for_each(|page| take_up(page & !(PAGE - 1), page % PAGE));
        self.count = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_that_is_gone_leaves_the_others_done() {
        uhmm_os::signal::install(|_| false).unwrap(); // for guarded copies
        let mut device = [0u8; 3 * PAGE];
        let mut host = [7u8; 2 * PAGE];
        let (base, at) = (device.as_mut_ptr() as usize, host.as_mut_ptr() as usize);
        let piece = |kind, host, frame, offset, len| Dma { kind, host, frame, offset, len };
        let batch = [
            piece(DmaKind::ToDevice, at, 0, 100, PAGE),
            piece(DmaKind::GuardedToDevice, PAGE, 2, 0, 8),
            piece(DmaKind::Zero, 0, 0, 200, 50),
            piece(DmaKind::GuardedToHost, at + PAGE, 0, 150, 100),
        ];
        // SAFETY: three frames lie in `device`; the host's memory is this test's, or guarded.
        let result = unsafe { copy_batch(&batch, |frame| base + frame as usize * PAGE) };
        assert_eq!(result, Err(DmaError::Gone { address: PAGE }));
        let byte = |i| u8::from((100..100 + PAGE).contains(&i) && !(200..250).contains(&i)) * 7;
        assert!(device.iter().enumerate().all(|(i, &x)| x == byte(i)));
        assert!(host.iter().enumerate().all(|(i, &x)| x == if (PAGE + 50..PAGE + 100).contains(&i) { 0 } else { 7 }));
    }

    #[test]
    fn scratch_pages_are_forgotten_where_real_ones_come() {
        let mut pages = ScratchPages::<4>::default();
        (1..5).for_each(|i| pages.push(i * PAGE, i % 2));
        assert!(pages.is_full() && pages.has(3 * PAGE, 1) && !pages.has(3 * PAGE, 0));
        pages.forget(Span { start: 2 * PAGE, end: 4 * PAGE });
        let mut left = Vec::new();
        pages.clear(|page, mark| left.push((page / PAGE, mark)));
        left.sort_unstable();
        assert_eq!(left, [(1, 1), (4, 0)]);
        pages.clear(|_, _| panic!("it is empty"));
    }
}
