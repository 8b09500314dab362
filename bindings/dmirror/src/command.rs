//! The commands of a device.
//!
//! Checks come in this order: the struct can be read, its range is one, the command is one. On an error the struct is left alone. The struct and the buffer are the program's memory, which
//! may lie on the device itself, or be bad: the kernel copies them.
#![allow(unsafe_code)] // the device writes where the program asked

use crate::abi::{Command, Done, Flow, What, errno, permission};
use crate::device::Kind;
use crate::name::Name;
use crate::opens::{self, Home, Live};
use crate::{gup, sys, wire};
use libc::c_int;
use uhmm_core::port::Sight;
use uhmm_os::{Errno, PAGE};

/// A snapshot of more pages is not begun before there is a buffer for all of them: it could take for ever.
const LARGE: u64 = 1 << 20;

/// ioctl(2) on a descriptor of this library's.
pub(crate) fn ioctl(fd: c_int, name: &Name, request: u32, arg: u64) -> Result<usize, Errno> {
    match name.kind {
        Kind::Gup | Kind::NullGup => return gup::ioctl(name.kind, request, arg),
        Kind::Device(_) | Kind::Null(_) => {}
    }
    let mut bytes = [0; Command::LEN];
    sys::copy_in(&mut bytes, arg)?;
    let mut command = Command::from_bytes(&bytes);
    command.done = match name.kind {
        Kind::Null(_) => Done { cpages: command.npages, faults: 0 },
        _ => {
            command.check()?;
            let what = What::of(request).ok_or(Errno::INVAL)?;
            if what == What::Snapshot && command.npages > LARGE {
                sys::copy_in(&mut [0], command.ptr.saturating_add(command.npages - 1))?;
            }
            run(fd, name, what, &command)?
        }
    };
    sys::copy_out(arg, &command.to_bytes())?;
    Ok(0)
}

/// A command whose struct was checked.
fn run(fd: c_int, name: &Name, what: What, command: &Command) -> Result<Done, Errno> {
    let Some(home) = opens::home_of(name) else {
        return wire::ask(fd, what, command);
    };
    let (flow, len) = what.buffer(command.npages);
    let mut buffer = home.buffer(len)?;
    if flow == Flow::In {
        sys::copy_in(buffer.bytes(), command.ptr)?;
    }
    let done = home.with(name, |live| execute(home, live, what, command, buffer.bytes()))?;
    if flow == Flow::Out {
        sys::copy_out(command.ptr, buffer.bytes())?;
    }
    Ok(done)
}

/// Does a command. The buffer holds what the device writes, or gets what it reads.
pub(crate) fn execute(home: &Home, live: &Live, what: What, command: &Command, buffer: &mut [u8]) -> Result<Done, Errno> {
    let (port, start, npages) = (&live.port, command.addr as usize, command.npages);
    let range = start..start + npages as usize * PAGE; // `Command::check` has seen that it fits
    let all = Done { cpages: npages, faults: 0 };
    let done = match what {
        What::Read => port.read(start, buffer).map(|faults| Done { faults, ..all }),
        What::ReadUnlocked => port.read_unlocked(start, buffer).map(|faults| Done { faults, ..all }),
        // SAFETY: the program asks for it, by address, as it would by a pointer.
        What::Write => unsafe { port.write(start, buffer) }.map(|faults| Done { faults, ..all }),
        What::MigrateToDevice => port.migrate_to_device(start, buffer).map(|()| all),
        What::MigrateToSystem => port.migrate_to_system(range).map(|cpages| Done { cpages, faults: 0 }),
        What::Exclusive => port.exclusive(start, buffer).map(|()| all),
        What::Snapshot => {
            const PART: usize = 512;
            let mut sights = [Sight::default(); PART];
            let mut result = Ok(all);
            for (index, part) in buffer.chunks_mut(PART).enumerate() {
                let sights = &mut sights[..part.len()];
                sights.fill(Sight::default());
                if let Err(error) = port.snapshot(start + index * PART * PAGE, sights) {
                    result = Err(error);
                    break;
                }
                for (byte, sight) in part.iter_mut().zip(sights) {
                    *byte = permission(sight);
                }
            }
            result
        }
        What::CheckExclusive if port.is_exclusive(range) => return Err(Errno::PERM),
        What::CheckExclusive => Ok(Done::default()),
        What::Release => {
            home.release(live.device);
            Ok(Done::default())
        }
        What::Flags => {
            port.fail_allocation(npages & 1 != 0);
            Ok(Done::default())
        }
    };
    done.map_err(|error| errno(&error))
}
