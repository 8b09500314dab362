//! The files that there are, by path.
//!
//! # Rules
//! * A path is compared after the kernel has read it: then it is a string, and comparing it costs next to nothing. Where it has not been read, or may not have been, the kernel copies it.
//! * It is compared as it stands: a path relative to a directory, or with a detour, is not recognised.
#![allow(unsafe_code)] // reads the program's strings

use crate::sys;
use core::ffi::{CStr, c_char};

/// What a descriptor of this library's is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A device, by number.
    Device(u8),
    /// One that does nothing (`UHMM_DMIRROR=null`).
    Null(u8),
    /// The file that pins pages.
    Gup,
    /// The same, doing nothing.
    NullGup,
}

/// How many devices there are; the later half is coherent.
pub(crate) const DEVICES: u8 = 4;

const PREFIX: &[u8] = b"/dev/hmm_dmirror";
const GUP: &[u8] = b"/sys/kernel/debug/gup_test";

/// Whether a path that the kernel has read begins with these bytes, of which none is the end of a string.
fn begins(path: *const c_char, text: &[u8]) -> bool {
    // SAFETY: the path is a string, of which nothing is read behind the first byte that differs; the end does.
    text.iter().enumerate().all(|(index, &byte)| unsafe { *path.add(index) }.cast_unsigned() == byte)
}

impl Kind {
    /// The file of a path that the kernel has read just now.
    #[inline]
    pub(crate) fn of_known_path(path: *const c_char) -> Option<Kind> {
        if begins(path, PREFIX) || begins(path, GUP) { Kind::of_path(path) } else { None }
    }

    /// The file of a path, which may be any address.
    pub(crate) fn of_path(path: *const c_char) -> Option<Kind> {
        // One byte more than the longest, for the end.
        let mut bytes = [0; GUP.len() + 1];
        let at = path as u64;
        let here = (uhmm_os::PAGE - path as usize % uhmm_os::PAGE).min(bytes.len());
        let (first, rest) = bytes.split_at_mut(here);
        sys::copy_in(first, at).ok()?;
        if !first.contains(&0) {
            sys::copy_in(rest, at + here as u64).ok()?;
        }
        Kind::of_name(CStr::from_bytes_until_nul(&bytes).ok()?.to_bytes(), null())
    }

    fn of_name(name: &[u8], null: bool) -> Option<Kind> {
        if name == GUP {
            return Some(if null { Kind::NullGup } else { Kind::Gup });
        }
        match name.strip_prefix(PREFIX)? {
            &[digit @ b'0'..=b'9'] if digit - b'0' < DEVICES => {
                let number = digit - b'0';
                Some(if null { Kind::Null(number) } else { Kind::Device(number) })
            }
            _ => None,
        }
    }

    /// The number of its device.
    pub(crate) fn number(self) -> Option<u8> {
        match self {
            Kind::Device(number) | Kind::Null(number) => Some(number),
            Kind::Gup | Kind::NullGup => None,
        }
    }

    /// As it stands in a descriptor's name.
    pub(crate) fn letter(self) -> u8 {
        match self {
            Kind::Device(number) => b'0' + number,
            Kind::Null(number) => b'a' + number,
            Kind::Gup => b'y',
            Kind::NullGup => b'z',
        }
    }

    pub(crate) fn of_letter(letter: u8) -> Option<Kind> {
        match letter {
            b'y' => Some(Kind::Gup),
            b'z' => Some(Kind::NullGup),
            b'0'.. if letter - b'0' < DEVICES => Some(Kind::Device(letter - b'0')),
            b'a'.. if letter - b'a' < DEVICES => Some(Kind::Null(letter - b'a')),
            _ => None,
        }
    }
}

/// Whether the devices that are opened now do nothing.
fn null() -> bool {
    // SAFETY: (std's own function would copy the value to the heap) a string; the result is one too, and nobody changes the environment while threads read it.
    unsafe {
        let value = libc::getenv(c"UHMM_DMIRROR".as_ptr());
        !value.is_null() && CStr::from_ptr(value) == c"null"
    }
}
