//! The file that pins pages of the calling process and lets them go again.
//!
//! A pin brings private pages of a device home, as any access by the kernel does, and one for long takes coherent pages off their device. Populating the range has the kernel access it,
//! for reading or for writing.
//!
//! Commands that pin until they are told otherwise (numbers 7 to 9) are not there: `EINVAL`.
#![allow(unsafe_code)] // system calls; a struct as bytes

use crate::device::Kind;
use crate::{abi, mapping, opens, sys};
use uhmm_os::{Errno, PAGE};

/// The struct: three pairs of u64 and three u32, which is what is used here, and eight u32.
const LEN: usize = 80;
/// The first command's number; the last is 5 more.
const FIRST: u32 = 0xC050_6701;
const PIN_LONGTERM_BENCHMARK: u32 = FIRST + 2;
const DUMP: u32 = FIRST + 5;

const FOLL_WRITE: u32 = 0x1;
const FOLL_LONGTERM: u32 = 0x100;

/// ioctl(2) on it.
pub(crate) fn ioctl(kind: Kind, request: u32, arg: u64) -> Result<usize, Errno> {
    if !(FIRST..=DUMP).contains(&request) {
        return Err(Errno::INVAL);
    }
    let mut bytes = [0; LEN];
    sys::copy_in(&mut bytes, arg)?;
    let word = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
    let half = |at: usize| bytes[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
    let (addr, size, per_call, flags) = (word(16), word(24), half(32), half(36));
    let (mut get, mut put) = (0, 0);
    let mut done = size;
    if kind == Kind::Gup {
        let started = now();
        done = touch(addr, size, per_call, flags & FOLL_WRITE != 0);
        if request == PIN_LONGTERM_BENCHMARK || flags & FOLL_LONGTERM != 0 {
            off_the_devices(addr, done);
        }
        get = now() - started;
        put = 1.min(get);
    }
    bytes[0..8].copy_from_slice(&get.to_ne_bytes());
    bytes[8..16].copy_from_slice(&put.to_ne_bytes());
    bytes[24..32].copy_from_slice(&done.to_ne_bytes());
    sys::copy_out(arg, &bytes)?;
    Ok(0)
}

fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a timespec that may be written.
    let _ = unsafe { sys::call(libc::SYS_clock_gettime, [libc::CLOCK_MONOTONIC as usize, &raw mut time as usize]) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

/// Has the kernel access a range, so many pages a call, up to the first that it cannot: how many bytes that was.
fn touch(addr: u64, size: u64, per_call: u32, write: bool) -> u64 {
    let page = PAGE as u64;
    let step = if per_call == 0 { size.max(1) } else { u64::from(per_call) * page };
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    let populate = |start: u64, len: u64| {
        let first = start & !(page - 1);
        let Some(end) = start.checked_add(len).and_then(|end| end.checked_next_multiple_of(page)) else { return false };
        // SAFETY: contents stay as they are.
        unsafe { sys::call(libc::SYS_madvise, [first as usize, (end - first) as usize, advice as usize]) }.is_ok()
    };
    let mut done = 0;
    while done < size {
        let part = step.min(size - done);
        if !populate(addr.wrapping_add(done), part) {
            // Some pages of a call may be had.
            while done < size && populate(addr.wrapping_add(done), page.min(size - done)) {
                done += page.min(size - done);
            }
            break;
        }
        done += part;
    }
    done
}

/// Takes coherent pages home, whichever device's they are.
fn off_the_devices(addr: u64, len: u64) {
    let (Some(home), Some(range)) = (opens::home(), mapping::pages(addr as usize, len as usize)) else { return };
    for device in 0..crate::device::DEVICES {
        let mut asked = false;
        home.any(|live| {
            if live.device == device && abi::coherent(device) && !asked {
                asked = true;
                let _ = live.port.migrate_to_system(range.clone()); // what cannot stays, and the pin is none of ours
            }
            asked
        });
    }
}
