//! The device fault service: a worker touched a page that is not in the device's page table.
//!
//! It runs on the worker, inside its signal handler, on an alternate stack of uhmm's: look up what the process may do at that address, ask
//! the policy how much to bring, migrate, and return to the kernel, which repeats the access. A wild pointer never unwinds: the driver puts a
//! scratch page there and fails the launch.

use crate::bits::Bits;
use crate::core::{self, Core, Device};
use crate::counters::count;
use crate::driver::KernelFault;
use crate::error::Error;
use crate::fixed;
use crate::migrate::{Ask, Intent};
use crate::notifier;
use crate::page::{Span, Va};
use crate::policy;
use crate::space;
use uhmm_os::signal::FaultInfo;
use uhmm_os::{BLOCK, PAGE, tasks, thread};

/// Looks before the page is given up: each but the first is owed to a change of the mappings or to another thread.
const LOOKS: usize = 10_000;

/// What the signal handler calls, for any thread of the process: true if the access can be repeated.
pub(crate) fn on_signal(info: &FaultInfo) -> bool {
    let Some(core) = core::current() else { return false };
    let tid = thread::gettid();
    let mut served = None;
    core.for_each_device(|dev| {
        if served.is_none() && dev.driver.owns_thread(tid) {
            served = Some(on_worker(core, dev, info));
        }
    });
    if let Some(served) = served {
        return served;
    }
    core.for_each_device(|dev| {
        if dev.driver.in_window(info.address) {
            // A program may have its own ideas about standard error, but it is about to die of this.
            tasks::write_stderr(b"uhmm: a thread of the program touched a device's address; device addresses are valid in kernels only\n");
        }
    });
    false
}

fn on_worker(core: &Core, dev: &Device, info: &FaultInfo) -> bool {
    if !dev.driver.in_window(info.address) {
        // Not the device's address at all, and the process has nothing there either.
        return dev.driver.scratch(info.address, KernelFault::Wild { address: info.address, write: info.write });
    }
    let va = info.address ^ dev.driver.info().mask;
    match serve(core, dev, va, info.write) {
        Ok(()) => true,
        Err(fault) => dev.driver.scratch(info.address, fault),
    }
}

/// Makes the page at `va` accessible to the device.
///
/// # Errors
/// What is wrong with the kernel's access.
pub(crate) fn serve(core: &Core, dev: &Device, va: Va, write: bool) -> Result<(), KernelFault> {
    count(&dev.counters.device_faults, 1);
    dev.driver.note_fault(va, write);
    let wild = KernelFault::Wild { address: va, write };
    let unreachable = KernelFault::Unreachable { address: va };
    let page = va % BLOCK / PAGE;
    for _ in 0..LOOKS {
        let block = core.dir.get_or_make(va).map_err(|_| wild)?;
        let seq = notifier::read_begin(block);
        let vma = core.space.mapping(va).map_err(|_| unreachable)?.ok_or(wild)?;
        if !vma.read || (write && !vma.write) {
            return Err(wild);
        }
        let part = Span::block(va).and(Span { start: vma.start, end: vma.end });
        let (want, intent) = {
            let state = block.lock();
            let ours = state.device == dev.id();
            if ours && state.win.has(page) && !(write && state.duplicated().has(page)) {
                return Ok(()); // another worker was first
            }
            if ours && state.resident().has(page) {
                // Here, but not mapped, or not for writing. What both have becomes the device's alone: entering a page read-only takes two steps while kernels
                // run, and a write between them would be lost.
                (Bits::one(page), Intent::Move)
            } else {
                drop(state);
                if !space::movable(&vma) {
                    return Err(unreachable);
                }
                let needed = fixed::pages(core, part);
                if needed.has(page) {
                    return Err(unreachable);
                }
                // The kernel's own captures lie on a stack too: only what it touches there through the window is fetched.
                let candidates = part.bits() - needed - (fixed::stacks(&vma, part) - Bits::one(page));
                let ask = policy::DeviceFault { page, write, candidates };
                ((core.policy.device_fault(&ask) & self::present_or(core, part, page)) & candidates | Bits::one(page), Intent::Move)
            }
        };
        let ask = Ask { part, want, intent, beside: want, pinned: false, seq: Some(seq) };
        match core.make_block_resident(dev, &ask) {
            Ok(_) => {}
            Err(Error::NoRoom { .. }) => return Err(KernelFault::NoRoom { address: va }),
            Err(_) => return Err(unreachable),
        }
        let state = block.lock();
        if state.device == dev.id() && state.win.has(page) && !(write && state.duplicated().has(page)) {
            return Ok(());
        }
        drop(state);
        core.space.settle();
    }
    Err(unreachable)
}

/// Pages that exist, and the touched one: holes are not filled just because they are near.
fn present_or(core: &Core, part: Span, page: usize) -> Bits {
    core.space.present(part).map(|present| present.pages).unwrap_or_default() | Bits::one(page)
}
