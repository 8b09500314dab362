//! Forks that go past libc's: the child is filled with what is on devices.
//!
//! libc's fork brings everything home first ([`crate::fork`]); clone(2) and `_Fork` call no handlers. For these the kernel reports the fork (UFFD_EVENT_FORK, where the process may have that) and
//! gives a userfaultfd of the child, whose missing pages wait. The monitor copies into the child what devices have, at once, and closes that descriptor, which ends
//! the child's registrations and its write protection. The contents are those of the fork: the forking call returns when the event is read, and from then until the child is filled the
//! monitor, which holds the event lock alone, lets nothing leave or come home; what a kernel could still write is taken out of its device's page table first, and fetched again by
//! the fault that this causes.
//!
//! The child is woken by that end alone: threads that fork and wait for their children then raise no next fork while this one is still followed, and for a moment
//! the kernel lets pages move (it refuses from the beginning of a fork until the forking call goes on).
//!
//! A parent that dies before its child is filled takes the contents with it.
#![allow(unsafe_code)] // fills another process's memory, which is this one's copy

use crate::bits::Bits;
use crate::coherent;
use crate::core::{Core, EVERYTHING};
use crate::directory::State;
use crate::home;
use crate::page::Va;
use crate::ranges;
use uhmm_os::uffd::{CopyMode, Userfaultfd};
use uhmm_os::{Errno, PAGE, thread};

/// Fills the child whose userfaultfd this is. True if that took pages from kernels, which have to fault to go on.
pub(crate) fn fill(core: &Core, child: &Userfaultfd) -> bool {
    let mut taken = false;
    core.dir.for_each(EVERYTHING, |block, part| {
        let mut state = block.lock();
        let va = part.start;
        // The child has these too: whoever writes first gets a copy, and nothing tells who.
        // A port's stays the device's until copy-on-write makes another of it: then its frame tells.
        let shared = if state.device == core.tags.store() { Bits::EMPTY } else { state.coherent() };
        coherent::untag(core, &mut state, va, shared);
        if state.gone().is_empty() {
            return;
        }
        let away = state.private();
        if !away.is_empty() {
            let dev = core.device(state.device as usize - 1);
            // Who uses a lease's pages could not fetch them again. What he writes just now is in his own hands.
            let held = away & dev.flights.held(va);
            let away = away - held;
            for run in held.runs() {
                ranges::read_frames(core, dev, &state, va, run, |at, source| match source {
                    Some(source) => copy(child, va + at * PAGE, source, 1),
                    None => poison(child, va + at * PAGE, 1),
                });
            }
            taken |= away.meets(state.win);
            ranges::unmap(core, dev, &mut state, va, away);
            ranges::frame_runs(core, &state, away, |run, frame| {
                let copied =
                    home::with_contents(core, dev, run.len(), frame, |source| copy(child, va + run.start * PAGE, source, run.len()));
                if copied.is_err() {
                    poison(child, va + run.start * PAGE, run.len());
                }
            });
        }
        fill_moving(child, &state, va);
    });
    taken
}

/// What a migration has taken out of the program and not entered on the device yet is in its tray.
fn fill_moving(child: &Userfaultfd, state: &State, va: Va) {
    let moving = state.busy() & state.gone() & state.taken;
    let moving = if state.tray == 0 { Bits::EMPTY } else { moving };
    for run in moving.runs() {
        copy(child, va + run.start * PAGE, state.tray + run.start * PAGE, run.len());
    }
}

/// The device does not give these pages: the child has them no more than its parent, and not as zeroes.
fn poison(child: &Userfaultfd, target: Va, pages: usize) {
    for at in 0..pages {
        while child.poison(target + at * PAGE, PAGE).is_err_and(|partial| partial.errno == Errno::AGAIN) {
            thread::yield_now();
        }
    }
}

/// Copies a run of pages into the child, page by page where its mappings end within. What it does not have is left out.
fn copy(child: &Userfaultfd, target: Va, source: usize, pages: usize) {
    let (mut at, mut most) = (0, pages);
    while at < pages {
        let n = most.min(pages - at);
        // SAFETY: the child expects at `target` what the parent had there when it forked, which stands at `source` and is written by nobody.
        match unsafe { child.copy(target + at * PAGE, source + at * PAGE, n * PAGE, CopyMode::DONTWAKE) } {
            Ok(()) => at += n,
            Err(partial) if partial.errno == Errno::SRCH => return, // it has died
            Err(partial) => {
                at += partial.done / PAGE;
                match partial.errno {
                    Errno::AGAIN => thread::yield_now(),
                    _ if n > 1 && partial.done == 0 => most = n.div_ceil(2),
                    _ if partial.done == 0 => at += 1, // not the child's (MADV_DONTFORK), or there already
                    _ => {}
                }
                continue;
            }
        }
        most = pages;
    }
}
