//! What the program says about its memory ([`Advice`]): noted, and carried out as far as that is to be done at once.
//!
//! A range of which something is said is watched, so that its unmapping is told and what was said is forgotten with it. What is noted is looked up where it counts: by the policies
//! ([`crate::policy`]), by migrations, which leave alone what must not leave, by launches, which bring what their device accesses, and where a full device makes room.

use crate::bits::Bits;
use crate::check;
use crate::core::{Core, Device};
use crate::error::Error;
use crate::home;
use crate::line::Who;
use crate::migrate::{Ask, Intent};
use crate::mode::Mode;
use crate::page::{Span, Va};
use crate::policy::{Advice, Said};
use crate::ranges;
use core::ops::ControlFlow;
use uhmm_os::BLOCK;

/// Notes something about what can move of a byte range.
///
/// # Errors
/// [`Error::TooManyRanges`].
pub(crate) fn say(core: &Core, start: Va, end: Va, mut what: impl FnMut(Said) -> Said) -> Result<(), Error> {
    if core.space.mode != Mode::Full {
        return Ok(()); // nothing stays on a device
    }
    core.space.settle();
    let inside = Span::inside(start, end);
    let mut result = Ok(());
    check::pieces(core, inside.start, inside.end, |piece| {
        let part = Span { start: piece.start, end: piece.end };
        if piece.movable {
            // What cannot be watched is not marked, for nobody would tell when it is unmapped.
            let _ = ranges::watch_and(core, part, |watched| {
                if core.policies.marks.change(watched, &mut what).is_err() {
                    result = Err(Error::TooManyRanges { address: start });
                }
            });
        }
        Ok(())
    })?;
    core.for_each_device(Device::changed);
    result
}

/// Notes advice. What must not leave comes home, too.
///
/// # Errors
/// [`Error::TooManyRanges`]; those of devices.
pub(crate) fn advise(core: &Core, start: Va, end: Va, advice: Advice) -> Result<(), Error> {
    let _alone = core.turns.enter(Who::Alone);
    say(core, start, end, |said| Said { advice: said.advice.and(advice), ..said })?;
    if advice != Advice::NoMigrate {
        return Ok(());
    }
    let inside = Span::inside(start, end);
    let mut result = Ok(());
    core.for_each_device(|dev| {
        for part in inside.blocks() {
            if let Err(e) = home::send_pages_home(core, dev, part.start, part.bits()) {
                result = Err(e);
            }
        }
    });
    result
}

/// Brings what kernels of the device access to it, as far as there is room: before a launch.
pub(crate) fn bring_accessed(core: &Core, dev: &Device, pins: bool) {
    let info = dev.driver.info();
    if !core.policies.marks.any() || !info.capabilities.replayable_faults || info.capabilities.coherent || core.space.mode != Mode::Full {
        return;
    }
    let intent = if pins { Intent::Move } else { Intent::Duplicate };
    core.policies.marks.walk(
        0,
        |advice| advice.accessed_by(dev.id()),
        |span| {
            for part in span.blocks() {
                let here = core.dir.get(part.start).map_or(Bits::EMPTY, |block| {
                    let state = block.lock();
                    if state.device == dev.id() { state.resident() & state.win } else { Bits::EMPTY }
                });
                let want = part.bits() - here;
                if want.is_empty() {
                    continue;
                }
                // Nothing is driven out for it: what does not come now comes when it is touched.
                if dev.mem.used() + 2 * BLOCK > info.memory {
                    return ControlFlow::Break(());
                }
                if dev.driver.open_window(part).is_err() {
                    return ControlFlow::Break(());
                }
                let ask = Ask { beside: want, pinned: false, ..Ask::new(part, want, intent) };
                for _look in 0..2 {
                    match core.make_block_resident(dev, &ask) {
                        Ok(outcome) if outcome.again => core.space.settle(),
                        Ok(_) => break,
                        Err(_) => return ControlFlow::Break(()),
                    }
                }
            }
            ControlFlow::Continue(())
        },
    );
}
