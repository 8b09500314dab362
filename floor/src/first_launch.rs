//! A first launch over ordinary memory, and the same by explicit copies: what one pointer for both sides must cost at least.
//!
//! Three arrays in fresh pages of 4 KiB, neighbours as on a heap, none of them on a 2 MiB boundary: a result and two inputs of which it
//! is the sum. *Explicit* copies the inputs to the device's memory, runs the kernel there, copies the result back, and the CPU reads
//! all of it. *One-pointer memory* does what must be done if both sides use the same addresses:
//!
//! 1. the range is watched and the inputs are write-protected, so that a later write of the CPU would be noticed;
//! 2. they are copied;
//! 3. the result's pages are moved out to staging, and its frames are zeroed;
//! 4. the device's blocks are moved into the window, and the inputs protected there, for the same reason;
//! 5. the kernel runs; its time is not part of either figure;
//! 6. the CPU reads the result: each touched block faults, is moved out of the window, copied to staging and moved home.
//!
//! Two threads share each step, and spin in between. The second one serves the faults.

use crate::copy::{stream, stream_zeroes};
use crate::memory::{BLOCK, PAGE, Pages, Region};
use crate::pair::in_step;
use crate::uffd::Uffd;
use crate::{Error, Result};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};
use std::hint::black_box;
use std::time::Duration;

/// How much a fault brings home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The block that is touched.
    ByBlock,
    /// The first fault that block, and the others right after it.
    AllAtFirst,
}

/// How long the steps of a first launch took, without its kernel.
#[derive(Clone, Copy, Debug)]
pub struct FirstLaunchTime {
    /// Watching the range and write-protecting the inputs.
    pub protecting: Duration,
    /// Copying the inputs.
    pub copying: Duration,
    /// Moving the result's pages out.
    pub moving_out: Duration,
    /// Zeroing its frames.
    pub zeroing: Duration,
    /// Moving the device's blocks into the window, and protecting the inputs there.
    pub mapping: Duration,
    /// Reading the result, which brings it home.
    pub returning: Duration,
}

impl FirstLaunchTime {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.protecting + self.copying + self.moving_out + self.zeroing + self.mapping + self.returning
    }
}

/// How long the explicit program took, without its kernel.
#[derive(Clone, Copy, Debug)]
pub struct ExplicitTime {
    /// Copying the inputs to the device.
    pub upload: Duration,
    /// Copying the result back.
    pub download: Duration,
    /// Reading it.
    pub reading: Duration,
}

impl ExplicitTime {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.upload + self.download + self.reading
    }
}

/// Where the arrays lie: bytes from a 2 MiB boundary.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Bytes of each array.
    size: usize,
    result: usize,
    inputs: [usize; 2],
    /// All blocks that hold a part of them.
    span: usize,
}

impl Layout {
    /// `size` is a multiple of 2 MiB.
    fn new(size: usize) -> Self {
        let result = 16 * PAGE;
        let first = result + size + PAGE;
        let second = first + size + PAGE;
        Layout { size, result, inputs: [first, second], span: (second + size).next_multiple_of(BLOCK) }
    }

    fn result(&self) -> Range<usize> {
        self.result..self.result + self.size
    }

    /// The part of the result that a thread has.
    fn half(&self, thread: usize) -> (usize, usize) {
        (self.result + thread * (self.size / 2), self.size / 2)
    }

    /// The blocks that a thread has.
    fn blocks(&self, thread: usize) -> impl Iterator<Item = usize> {
        let middle = (self.span / 2).next_multiple_of(BLOCK);
        (if thread == 0 { 0..middle } else { middle..self.span }).step_by(BLOCK)
    }

    /// The block that holds the result's end and the first input's beginning.
    fn mixed(&self) -> usize {
        self.inputs[0] / BLOCK * BLOCK
    }

    /// The part of a block that holds nothing but inputs.
    fn read_only(&self, block: usize) -> Option<(usize, usize)> {
        let start = if block == self.mixed() { self.inputs[0] } else { block };
        (start >= self.inputs[0]).then(|| (start, block + BLOCK - start))
    }
}

/// The floor of `first_launch_4k`.
#[derive(Debug)]
pub struct FirstLaunch {
    // Descriptors first: they are closed before the regions they watch are unmapped.
    host_uffd: Uffd,
    window_uffd: Uffd,
    host: Region,
    staging: Region,
    device: Region,
    window: Region,
    layout: Layout,
    salt: u32,
}

impl FirstLaunch {
    /// Maps and touches everything, for arrays of `size` bytes each.
    ///
    /// # Errors
    /// If `size` is not a positive multiple of 2 MiB, memory is short, or there is no right to use userfaultfd.
    pub fn prepare(size: usize) -> Result<Self> {
        if size == 0 || !size.is_multiple_of(BLOCK) {
            return Err(Error::Size(size));
        }
        let layout = Layout::new(size);
        let floor = FirstLaunch {
            host_uffd: Uffd::open(false)?,
            window_uffd: Uffd::open(false)?,
            host: Region::empty(layout.span, Pages::Small)?,
            staging: Region::empty(layout.span, Pages::Small)?,
            // Protecting a part of a huge page would split it, which costs more than having small ones from the start.
            device: Region::full_but(layout.span, layout.mixed())?,
            window: Region::empty(layout.span, Pages::Huge)?,
            layout,
            salt: 0,
        };
        floor.host_uffd.never_wait()?;
        floor.host_uffd.watch(&floor.staging)?;
        floor.window_uffd.watch_writes_too(&floor.window)?;
        floor.window_uffd.watch_writes_too(&floor.device)?;
        Ok(floor)
    }

    /// The explicit program, on fresh arrays.
    ///
    /// # Errors
    /// If memory is short, or the result is wrong.
    pub fn explicit(&mut self) -> Result<ExplicitTime> {
        self.fill()?;
        let this = &*self;
        let [upload, _kernel, download, reading] = in_step::<4>([
            &|thread| this.copy_input(thread),
            &|thread| this.add(&this.device, thread),
            &|thread| this.download(thread),
            &|thread| this.read_all(thread),
        ])?;
        this.check()?;
        Ok(ExplicitTime { upload, download, reading })
    }

    /// The first launch over fresh arrays.
    ///
    /// # Errors
    /// If the kernel refuses a request, or the result is wrong. The floor is of no more use then.
    pub fn launch(&mut self, reading: Reading) -> Result<FirstLaunchTime> {
        self.fill()?;
        let this = &*self;
        let has_read = AtomicBool::new(false);
        let [watching, protecting, copying, moving_out, zeroing, mapping, _kernel, returning] = in_step::<8>([
            &|thread| if thread == 0 { this.host_uffd.watch_writes_too(&this.host) } else { Ok(()) },
            &|thread| this.host_uffd.protect(this.host.at(this.layout.inputs[thread]), this.layout.size, true),
            &|thread| this.copy_input(thread),
            &|thread| this.move_out(thread),
            &|thread| this.zero_frames(thread),
            &|thread| this.map(thread),
            &|thread| this.add(&this.window, thread),
            &|thread| if thread == 0 { this.read_until_end(&has_read) } else { this.serve(reading, &has_read) },
        ])?;
        this.check()?;
        this.put_back()?;
        Ok(FirstLaunchTime { protecting: watching + protecting, copying, moving_out, zeroing, mapping, returning })
    }
}

/// The steps. Each is called by both threads, with their numbers, or by one of them.
impl FirstLaunch {
    fn copy_input(&self, thread: usize) -> Result<()> {
        let at = self.layout.inputs[thread];
        // SAFETY: the same part of two regions of this floor, all there, in which the other thread has no part.
        unsafe { stream(self.device.at(at), self.host.at(at), self.layout.size) };
        Ok(())
    }

    fn download(&self, thread: usize) -> Result<()> {
        let (at, len) = self.layout.half(thread);
        // SAFETY: as above.
        unsafe { stream(self.host.at(at), self.device.at(at), len) };
        Ok(())
    }

    fn move_out(&self, thread: usize) -> Result<()> {
        let (at, len) = self.layout.half(thread);
        // SAFETY: as above; the kernel is going to write every byte of the result, so nobody needs what is in these pages.
        unsafe { self.host_uffd.move_pages(self.staging.at(at), self.host.at(at), len) }.map_err(refused)
    }

    fn zero_frames(&self, thread: usize) -> Result<()> {
        let (at, len) = self.layout.half(thread);
        // SAFETY: a part of a region of this floor, all there, that the other thread does not touch.
        unsafe { stream_zeroes(self.device.at(at), len) };
        Ok(())
    }

    fn map(&self, thread: usize) -> Result<()> {
        for block in self.layout.blocks(thread) {
            // SAFETY: the same block of two regions of this floor; this thread alone has it.
            unsafe { self.window_uffd.move_pages(self.window.at(block), self.device.at(block), BLOCK) }.map_err(refused)?;
            if let Some((start, len)) = self.layout.read_only(block) {
                self.window_uffd.protect(self.window.at(start), len, true)?;
            }
        }
        Ok(())
    }

    /// The kernel: adds the inputs, where the device sees them.
    fn add(&self, memory: &Region, thread: usize) -> Result<()> {
        let (start, len) = self.layout.half(thread);
        let skip = start - self.layout.result;
        // SAFETY: pages that are there, in a region of this floor; both threads only read the inputs.
        let [a, b] = self.layout.inputs.map(|input| unsafe { words(memory, input + skip, len) });
        // SAFETY: as above; each thread has its own half of the result.
        let result = unsafe { words_mut(memory, start, len) };
        for ((result, a), b) in result.iter_mut().zip(a).zip(b) {
            *result = a.wrapping_add(*b);
        }
        Ok(())
    }

    /// The CPU's reading of the result, by the first thread.
    fn read_all(&self, thread: usize) -> Result<()> {
        if thread == 0 {
            // SAFETY: memory of this floor that nobody writes meanwhile. What is missing is brought by the other thread; no byte is
            // ever seen otherwise than it then is.
            let result = unsafe { words(&self.host, self.layout.result, self.layout.size) };
            black_box(result.iter().fold(0u32, |sum, word| sum.wrapping_add(*word)));
        }
        Ok(())
    }

    fn read_until_end(&self, has_read: &AtomicBool) -> Result<()> {
        let result = self.read_all(0);
        has_read.store(true, Ordering::Release);
        result
    }

    /// Serves faults until the result has been read. After an error the range is watched no more: the reader goes on, with zeroes.
    fn serve(&self, reading: Reading, has_read: &AtomicBool) -> Result<()> {
        let mut next = 0; // blocks before it are at home
        while !has_read.load(Ordering::Acquire) {
            let served = match self.host_uffd.poll_fault() {
                Ok(Some(address)) => self.serve_fault(address, reading, &mut next),
                Ok(None) => {
                    core::hint::spin_loop();
                    Ok(())
                }
                Err(error) => Err(error),
            };
            if served.is_err() {
                self.host_uffd.unregister(self.host.at(0), self.host.size());
                return served;
            }
        }
        Ok(())
    }

    /// The reader goes from block to block, so that its next fault is in block `next`; or it is one that was answered already.
    fn serve_fault(&self, address: usize, reading: Reading, next: &mut usize) -> Result<()> {
        let at = address - self.host.at(0) as usize;
        if at < *next {
            self.host_uffd.wake(self.host.at(at / PAGE * PAGE));
            return Ok(());
        }
        let end = match reading {
            Reading::ByBlock => at + 1,
            Reading::AllAtFirst => self.layout.result().end,
        };
        while *next < end {
            self.bring_home(*next)?;
            *next += BLOCK;
        }
        Ok(())
    }

    /// Brings home what a block has of the result.
    fn bring_home(&self, block: usize) -> Result<()> {
        let result = self.layout.result();
        let (start, end) = (result.start.max(block), result.end.min(block + BLOCK));
        // SAFETY: the same parts of four regions of this floor, which only this thread touches, but for the reader, who waits for what
        // is put down here. The block is in the window, and staging has the result's own pages.
        unsafe {
            self.window_uffd.move_pages(self.device.at(block), self.window.at(block), BLOCK).map_err(refused)?;
            stream(self.staging.at(start), self.device.at(start), end - start);
            self.host_uffd.move_pages(self.host.at(start), self.staging.at(start), end - start).map_err(refused)
        }
    }
}

/// What is outside the clock.
impl FirstLaunch {
    /// Fresh pages with other numbers than before.
    fn fill(&mut self) -> Result<()> {
        self.host_uffd.unregister(self.host.at(0), self.host.size());
        self.host.discard()?;
        self.salt = self.salt.wrapping_add(1);
        let Layout { size, result, inputs, .. } = self.layout;
        // SAFETY: three ranges of a region of this floor that do not overlap; nobody watches it, so the kernel fills it.
        let [result, a, b] = [result, inputs[0], inputs[1]].map(|start| unsafe { words_mut(&self.host, start, size) });
        for (number, ((result, a), b)) in result.iter_mut().zip(a).zip(b).enumerate() {
            (*result, *a, *b) = (u32::MAX, (number as u32).wrapping_mul(self.salt), self.salt);
        }
        Ok(())
    }

    /// Whether the result is the sum.
    fn check(&self) -> Result<()> {
        // SAFETY: memory of this floor, all of it at home, that nobody writes.
        let result = unsafe { words(&self.host, self.layout.result, self.layout.size) };
        let wrong =
            result.iter().enumerate().position(|(number, word)| *word != (number as u32).wrapping_mul(self.salt).wrapping_add(self.salt));
        wrong.map_or(Ok(()), |number| Err(Error::WrongData(self.layout.result + 4 * number)))
    }

    /// The blocks that nobody has touched go back from the window.
    fn put_back(&self) -> Result<()> {
        let left = self.layout.result().end.next_multiple_of(BLOCK);
        for block in (left..self.layout.span).step_by(BLOCK) {
            let (window, device) = (self.window.at(block), self.device.at(block));
            self.window_uffd.protect(window, BLOCK, false)?;
            // SAFETY: the same block of two regions of this floor.
            unsafe { self.window_uffd.move_pages(device, window, BLOCK) }.map_err(refused)?;
        }
        Ok(())
    }
}

/// A part of a region as numbers.
///
/// # Safety
/// `start` and `len` are multiples of the page size, within the region. Nobody writes there while the slice lives.
unsafe fn words(region: &Region, start: usize, len: usize) -> &[u32] {
    // SAFETY: by the contract; any bytes are numbers, and the region is borrowed.
    unsafe { core::slice::from_raw_parts(region.at(start).cast(), len / size_of::<u32>()) }
}

/// The same, to be written.
///
/// # Safety
/// `start` and `len` are multiples of the page size, within the region. Nobody else touches it while the slice lives.
#[expect(clippy::mut_from_ref, reason = "a region is a raw pointer; that nobody else has this part is the contract")]
unsafe fn words_mut(region: &Region, start: usize, len: usize) -> &mut [u32] {
    // SAFETY: by the contract; any bytes are numbers, and the region is borrowed.
    unsafe { core::slice::from_raw_parts_mut(region.at(start).cast(), len / size_of::<u32>()) }
}

fn refused(errno: i32) -> Error {
    Error::of("UFFDIO_MOVE", errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_array_lies_on_a_block_and_one_block_is_mixed() {
        let layout = Layout::new(4 << 20);
        assert!([layout.result, layout.inputs[0], layout.inputs[1]].iter().all(|start| !start.is_multiple_of(BLOCK)));
        assert_eq!((layout.span, layout.mixed()), (7 * BLOCK, 2 * BLOCK));
        assert_eq!(layout.read_only(BLOCK), None);
        assert_eq!(layout.read_only(layout.mixed()), Some((layout.inputs[0], 3 * BLOCK - layout.inputs[0])));
        assert_eq!(layout.read_only(3 * BLOCK), Some((3 * BLOCK, BLOCK)));
        let blocks: Vec<usize> = layout.blocks(0).chain(layout.blocks(1)).collect();
        assert_eq!(blocks, (0..layout.span).step_by(BLOCK).collect::<Vec<_>>());
    }
}
