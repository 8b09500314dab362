//! Raw system calls.
//!
//! The kernel returns the negative error number in the result register (syscall(2)), so no `errno` is touched: that is the rule
//! this module exists for. Fault path throughout.
//!
//! Outside this crate it is for a library that stands in for libc's functions, and so cannot call them; everyone else finds what is
//! needed in the other modules.
//!
//! ```
//! // SAFETY: getpid has no arguments and no effects.
//! let pid = unsafe { uhmm_os::syscall::call(39, []) };
//! assert_eq!(pid, Ok(std::process::id() as usize));
//! ```

use crate::Errno;
use core::arch::asm;
use rustix::fd::{AsRawFd, BorrowedFd};

pub(crate) use linux_raw_sys::general as abi;

/// Makes system call `number` (an `__NR_` constant) with up to six arguments.
///
/// # Errors
/// What the kernel says.
///
/// # Safety
/// The arguments must be right for this call: what it reads and writes must be valid for that, and what it does to the process
/// (unmap, protect, move memory) must not break what other code relies on.
#[inline(always)]
pub unsafe fn call<const N: usize>(number: u32, args: [usize; N]) -> Result<usize, Errno> {
    let arg = |i: usize| if i < N { args[i] } else { 0 };
    let result: isize;
    // SAFETY: the calling convention of syscall(2) on x86-64: rcx and r11 are clobbered, the stack is not used. The caller vouches
    // for the call itself.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") arg(0),
            in("rsi") arg(1),
            in("rdx") arg(2),
            in("r10") arg(3),
            in("r8") arg(4),
            in("r9") arg(5),
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if (-4095..0).contains(&result) { Err(Errno::from_raw_os_error(-result as i32)) } else { Ok(result as usize) }
}

/// ioctl(2) with a structure that the kernel reads and writes.
///
/// # Safety
/// `request` must take a `T`, and what `T` names (addresses in it) must be valid for what the request does.
#[inline(always)]
pub(crate) unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u32, arg: &mut T) -> Result<usize, Errno> {
    // SAFETY: `arg` is valid for reads and writes of `T`; the caller vouches for the rest.
    unsafe { call(abi::__NR_ioctl, [fd.as_raw_fd() as usize, request as usize, arg as *mut T as usize]) }
}

/// pread(2) into `buffer`.
#[inline]
pub(crate) fn pread(fd: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let args = [fd.as_raw_fd() as usize, buffer.as_mut_ptr() as usize, buffer.len(), offset as usize];
    // SAFETY: the buffer is valid for writes of its length.
    unsafe { call(abi::__NR_pread64, args) }
}

/// The request number of an ioctl that reads and writes a `T` (`_IOWR` of the kernel's ioctl.h).
pub(crate) const fn iowr<T>(group: u8, number: u8) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | (group as u32) << 8 | number as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_and_error() {
        // SAFETY: getpid has no arguments, close of a descriptor that cannot exist does nothing.
        unsafe {
            assert_eq!(call(abi::__NR_getpid, []), Ok(std::process::id() as usize));
            assert_eq!(call(abi::__NR_close, [usize::MAX]), Err(Errno::BADF));
        }
    }

    #[test]
    fn six_arguments() {
        // SAFETY: a fresh mapping at an address of the kernel's choice, unmapped again.
        unsafe {
            let prot_read_write = 3;
            let private_anonymous = 0x22;
            let at = call(abi::__NR_mmap, [0, 8192, prot_read_write, private_anonymous, usize::MAX, 0]).unwrap();
            *(at as *mut u8).add(8191) = 1;
            call(abi::__NR_munmap, [at, 8192]).unwrap();
        }
    }

    #[test]
    fn request_numbers() {
        assert_eq!(iowr::<abi::uffdio_copy>(0xAA, 3), linux_raw_sys::ioctl::UFFDIO_COPY);
        assert_eq!(iowr::<abi::uffdio_api>(0xAA, 0x3F), linux_raw_sys::ioctl::UFFDIO_API);
    }
}
