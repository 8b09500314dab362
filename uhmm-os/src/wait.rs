//! Waiting for descriptors and for words of memory, and waking a thread that waits.
//!
//! Fault path, but for [`EventFd::new`].

use crate::Errno;
use crate::syscall::{abi, call};
use core::sync::atomic::AtomicU32;
use core::time::Duration;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The most descriptors that one [`poll`] takes.
pub const MAX_POLL: usize = 32;

/// Waits until one of `fds` can be read (or has failed, which reading it then shows), at most `timeout_ms` milliseconds (`None`: for
/// ever). *Fault path.*
///
/// Bit i of the result stands for `fds[i]`. The result is 0 when the time ran out, or when a signal handler ran.
///
/// # Errors
/// `EINVAL` for more than [`MAX_POLL`] descriptors, `EBADF` if one is not open in the calling thread's descriptor table, and those
/// of poll(2).
pub fn poll(fds: &[BorrowedFd<'_>], timeout_ms: Option<u32>) -> Result<u32, Errno> {
    if fds.len() > MAX_POLL {
        return Err(Errno::INVAL);
    }
    let mut polled = [abi::pollfd { fd: -1, events: 0, revents: 0 }; MAX_POLL];
    for (slot, fd) in polled.iter_mut().zip(fds) {
        *slot = abi::pollfd { fd: fd.as_raw_fd(), events: abi::POLLIN as i16, revents: 0 };
    }
    let mut time = timeout_ms.map(|ms| {
        let d = Duration::from_millis(ms.into());
        abi::__kernel_timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos().into() }
    });
    let time_at = time.as_mut().map_or(0, |t| t as *mut _ as usize);
    // SAFETY: the array is valid for the `fds.len()` entries named, the time is a timespec or null.
    let result = unsafe { call(abi::__NR_ppoll, [polled.as_mut_ptr() as usize, fds.len(), time_at, 0, 0]) };
    match result {
        Ok(0) | Err(Errno::INTR) => return Ok(0),
        Ok(_) => {}
        Err(e) => return Err(e),
    }
    let mut ready = 0;
    for (i, slot) in polled.iter().take(fds.len()).enumerate() {
        if slot.revents & abi::POLLNVAL as i16 != 0 {
            return Err(Errno::BADF);
        }
        ready |= u32::from(slot.revents != 0) << i;
    }
    Ok(ready)
}

/// Waits while `word` is `value`, at most `timeout_ms` milliseconds (`None`: for ever), for who wakes it (futex(2)). False if the time ran out; true for any
/// other reason, also none. *Fault path.*
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use uhmm_os::{futex_wait, futex_wake};
///
/// let open = AtomicU32::new(0);
/// std::thread::scope(|scope| {
///     scope.spawn(|| {
///         while open.load(Ordering::Acquire) == 0 {
///             futex_wait(&open, 0, None); // returns at once if it is not 0 any more
///         }
///     });
///     open.store(1, Ordering::Release);
///     futex_wake(&open);
/// });
/// assert!(!futex_wait(&open, 1, Some(1))); // the time ran out
/// ```
pub fn futex_wait(word: &AtomicU32, value: u32, timeout_ms: Option<u32>) -> bool {
    let time = timeout_ms.map(|ms| abi::__kernel_timespec { tv_sec: i64::from(ms / 1000), tv_nsec: i64::from(ms % 1000) * 1_000_000 });
    let time_at = time.as_ref().map_or(0, |time| core::ptr::from_ref(time) as usize);
    let operation = (abi::FUTEX_WAIT | abi::FUTEX_PRIVATE_FLAG) as usize;
    // SAFETY: the word is valid, the time is a timespec or null.
    let result = unsafe { call(abi::__NR_futex, [word.as_ptr() as usize, operation, value as usize, time_at]) };
    result != Err(Errno::TIMEDOUT)
}

/// Wakes all who wait for `word`. *Fault path.*
pub fn futex_wake(word: &AtomicU32) {
    let operation = (abi::FUTEX_WAKE | abi::FUTEX_PRIVATE_FLAG) as usize;
    // SAFETY: the word is valid; it is only looked up.
    let _ = unsafe { call(abi::__NR_futex, [word.as_ptr() as usize, operation, i32::MAX as usize]) };
}

/// A counter (eventfd(2)) that wakes a thread in [`poll`].
///
/// ```
/// use uhmm_os::{EventFd, poll};
///
/// let bell = EventFd::new()?;
/// assert_eq!(poll(&[bell.as_fd()], Some(0))?, 0); // nobody has rung
/// bell.signal()?;
/// assert_eq!(poll(&[bell.as_fd()], None)?, 1); // bit 0: the first descriptor
/// assert_eq!(bell.drain()?, 1);
/// # Ok::<(), uhmm_os::Errno>(())
/// ```
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A counter at 0, closed on exec.
    ///
    /// # Errors
    /// Those of eventfd(2): descriptors or memory have run out.
    pub fn new() -> Result<Self, Errno> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(EventFd)
    }

    /// Adds one: whoever polls wakes. *Fault path.*
    ///
    /// # Errors
    /// `EBADF` on a thread that does not have this descriptor. A full counter is no error: it wakes too.
    pub fn signal(&self) -> Result<(), Errno> {
        let one = 1u64;
        // SAFETY: eight bytes are read from `one`.
        match unsafe { call(abi::__NR_write, [self.0.as_raw_fd() as usize, &raw const one as usize, 8]) } {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Sets it back to 0 and returns how often it was signalled since. *Fault path.*
    ///
    /// # Errors
    /// `EBADF` on a thread that does not have this descriptor.
    pub fn drain(&self) -> Result<u64, Errno> {
        let mut count = 0u64;
        // SAFETY: eight bytes are written to `count`.
        match unsafe { call(abi::__NR_read, [self.0.as_raw_fd() as usize, &raw mut count as usize, 8]) } {
            Ok(_) => Ok(count),
            Err(Errno::AGAIN) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// The descriptor, to poll.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::Ordering;

    #[test]
    fn signal_poll_drain() {
        let (a, b) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let fds = [a.as_fd(), b.as_fd()];
        assert_eq!(poll(&fds, Some(0)), Ok(0));
        b.signal().unwrap();
        b.signal().unwrap();
        assert_eq!(poll(&fds, None), Ok(0b10));
        assert_eq!(b.drain(), Ok(2));
        assert_eq!(b.drain(), Ok(0));
        a.signal().unwrap();
        assert_eq!(poll(&fds, Some(10_000)), Ok(0b01));
    }

    #[test]
    fn timeout_takes_its_time() {
        let a = EventFd::new().unwrap();
        let start = std::time::Instant::now();
        assert_eq!(poll(&[a.as_fd()], Some(1030)), Ok(0));
        let took = start.elapsed().as_millis();
        assert!((1030..5000).contains(&took), "{took} ms");
    }

    #[test]
    fn a_word_is_waited_for_while_it_has_its_value() {
        let word = AtomicU32::new(1);
        assert!(futex_wait(&word, 2, Some(20_000)), "another value already");
        let start = std::time::Instant::now();
        assert!(!futex_wait(&word, 1, Some(1030)));
        let took = start.elapsed().as_millis();
        assert!((1030..5000).contains(&took), "{took} ms");
        std::thread::scope(|s| {
            let waiter = s.spawn(|| {
                while word.load(Ordering::Acquire) == 1 {
                    assert!(futex_wait(&word, 1, Some(20_000)));
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            word.store(2, Ordering::Release);
            futex_wake(&word);
            waiter.join().unwrap();
        });
    }

    #[test]
    fn wakes_another_thread() {
        let a = EventFd::new().unwrap();
        std::thread::scope(|s| {
            let waiter = s.spawn(|| poll(&[a.as_fd()], Some(20_000)));
            std::thread::sleep(Duration::from_millis(20));
            a.signal().unwrap();
            assert_eq!(waiter.join().unwrap(), Ok(1));
        });
    }

    #[test]
    fn errors() {
        let a = EventFd::new().unwrap();
        assert_eq!(poll(&[a.as_fd(); MAX_POLL + 1], Some(0)), Err(Errno::INVAL));
        // SAFETY: never used as an open descriptor: that it is not one is what is tested.
        let bad = unsafe { BorrowedFd::borrow_raw(1 << 20) };
        assert_eq!(poll(&[bad], Some(0)), Err(Errno::BADF));
    }
}
