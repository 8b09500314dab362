//! A family: processes that were forked from one that had this library. A device is one for all of them: what releases it, or closes it, in one brings its pages home in every other.
//!
//! Each process that has opened a device listens at an abstract address, which names the family and the process. Who tells the others finds them in /proc/net/unix. A program that was
//! executed begins a family of its own.

#![allow(unsafe_code)] // a function that the loader calls

use crate::opens::Home;
use crate::sys;
use core::sync::atomic::{AtomicU64, Ordering};
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;
use uhmm_os::Errno;

/// The family of this process, which its children inherit.
static FAMILY: AtomicU64 = AtomicU64::new(0);
/// How long another process may take to bring its pages home.
const LIMIT: Duration = Duration::from_secs(10);

fn prefix() -> String {
    format!("uhmm-dmirror-family/{:016x}/", FAMILY.load(Ordering::Relaxed))
}

/// Begins a family.
extern "C" fn begin() {
    FAMILY.store(sys::random(), Ordering::Relaxed);
}

/// When the library is loaded, before the program can fork.
#[used]
// SAFETY: the loader calls what the section lists, and passes what `begin` does not look at.
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

/// Where this process is told, by others of its family.
///
/// # Errors
/// Those of socket(2) and bind(2).
pub(crate) fn listen(home: &Home) -> Result<UnixListener, Errno> {
    let address = SocketAddr::from_abstract_name(format!("{}{:016x}", prefix(), home.cookie)).map_err(|_| Errno::INVAL)?;
    UnixListener::bind_addr(&address).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Does what others of the family ask for, for good. On a thread of the service's.
pub(crate) fn serve(home: &Home, listener: &UnixListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut number = [0];
        if stream.set_read_timeout(Some(LIMIT)).is_ok() && stream.read_exact(&mut number).is_ok() {
            home.station.release(number[0]);
            let _ = stream.write_all(&number);
        }
    }
}

/// Has every other process of the family bring home what it has on the device with this number.
pub(crate) fn tell(home: &Home, number: u8) {
    let Ok(sockets) = std::fs::read_to_string("/proc/net/unix") else { return };
    let prefix = prefix();
    for name in sockets.lines().filter_map(|line| line.rsplit(' ').next()?.strip_prefix('@')) {
        let Some(cookie) = name.strip_prefix(prefix.as_str()) else { continue };
        if u64::from_str_radix(cookie, 16) == Ok(home.cookie) {
            continue;
        }
        let Ok(address) = SocketAddr::from_abstract_name(name) else { continue };
        let Ok(mut stream) = UnixStream::connect_addr(&address) else { continue }; // it has just ended
        let _ = stream.set_read_timeout(Some(LIMIT));
        if stream.write_all(&[number]).is_ok() {
            let _ = stream.read_exact(&mut [0]);
        }
    }
}
