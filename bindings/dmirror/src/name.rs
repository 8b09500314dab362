//! The name by which a descriptor is recognised, in any process that has it, without any state.
//!
//! A descriptor of this library's is one end of a pair of unix sockets, bound to an abstract name that says what it is and whose. The name goes with the socket: through dup, fork, exec
//! and SCM_RIGHTS.
#![allow(unsafe_code)] // system calls

use crate::device::Kind;
use crate::sys::call;
use libc::c_int;
use uhmm_os::Errno;

/// What a name says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Name {
    pub(crate) kind: Kind,
    /// Tells the process that opened it from every other.
    pub(crate) cookie: u64,
    /// Where that process has it, and the number of the open.
    pub(crate) slot: u16,
    pub(crate) seq: u64,
}

const PREFIX: &[u8; 14] = b"\0uhmm-dmirror/";
const LEN: usize = PREFIX.len() + 16 + 1 + 4 + 1 + 16 + 1 + 1;

#[repr(C)]
struct Address {
    family: u16,
    path: [u8; LEN],
}

fn put(to: &mut [u8], mut value: u64) {
    for digit in to.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(value & 15) as usize];
        value >>= 4;
    }
}

fn get(from: &[u8]) -> Option<u64> {
    from.iter().try_fold(0, |value, &digit| Some(value << 4 | u64::from((digit as char).to_digit(16)?)))
}

impl Name {
    fn address(&self) -> Address {
        let mut path = [b'/'; LEN];
        path[..14].copy_from_slice(PREFIX);
        put(&mut path[14..30], self.cookie);
        put(&mut path[31..35], self.slot.into());
        put(&mut path[36..52], self.seq);
        path[53] = self.kind.letter();
        Address { family: libc::AF_UNIX as u16, path }
    }

    /// What a descriptor is; `None` for every descriptor that is not this library's. One system call.
    pub(crate) fn of(fd: c_int) -> Option<Name> {
        if fd < 0 {
            return None;
        }
        let mut address = Address { family: 0, path: [0; LEN] };
        let mut len = size_of::<Address>() as u32;
        // SAFETY: the address is valid for writes of its length.
        unsafe { call(libc::SYS_getsockname, [fd as usize, &raw mut address as usize, &raw mut len as usize]) }.ok()?;
        let path = &address.path;
        if len as usize != size_of::<Address>() || address.family != libc::AF_UNIX as u16 || !path.starts_with(PREFIX) {
            return None;
        }
        let (cookie, slot, seq) = (get(&path[14..30])?, get(&path[31..35])?, get(&path[36..52])?);
        Some(Name { kind: Kind::of_letter(path[53])?, cookie, slot: slot as u16, seq })
    }

    /// Gives a socket this name.
    pub(crate) fn give(&self, fd: c_int) -> Result<(), Errno> {
        let address = self.address();
        // SAFETY: the address is valid for reads of its length.
        unsafe { call(libc::SYS_bind, [fd as usize, &raw const address as usize, size_of::<Address>()]) }.map(|_| ())
    }
}
