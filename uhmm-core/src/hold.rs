//! What a launch declares stays on a device without replayable faults until the launch has ended.
//!
//! A device with replayable faults fetches a page again that the CPU took home while the kernel ran. One without cannot: its kernel would fail. So on such
//! a device a touch of a declared page waits for the end of the launch, as it does for pages that a launch overwrites; and what the monitor
//! brings home around a touch leaves declared pages out.
//!
//! Only whole pages inside a declared range are held, so that nobody waits who touches something else. The pages at the edges, which hold other data
//! too, are never shared with such a device, or kept on it: each launch gets a snapshot of them ([`crate::prepare`]).

use crate::args::{MAX_ARGS, RawArg};
use crate::bits::Bits;
use crate::core::{Core, Device};
use crate::page::{Span, Va};
use crate::sync::*;
use uhmm_os::BLOCK;

/// What the running launch of a device declares, as pages. Its lock is a leaf.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    /// Whether there is anything, for who only passes.
    any: AtomicBool,
    spans: Mutex<[Span; MAX_ARGS]>,
}

impl Holds {
    /// Those in the block at `va`, which the caller has locked.
    pub(crate) fn pages(&self, va: Va) -> Bits {
        if !self.any.load(Ordering::Acquire) {
            return Bits::EMPTY;
        }
        self.spans.lock().iter().fold(Bits::EMPTY, |pages, span| pages | span.and(Span::block(va)).bits())
    }
}

/// Holds what a launch declares, on a device that needs it. From here on no page of it comes home but to the device's own workers.
pub(crate) fn begin(core: &Core, dev: &Device, args: &[RawArg]) {
    if dev.driver.info().replayable_faults {
        return;
    }
    {
        let mut spans = dev.holds.spans.lock();
        for (span, arg) in spans.iter_mut().zip(args) {
            *span = arg.process_range().map_or(Span::default(), |(start, end, _)| Span::inside(start, end));
        }
        dev.holds.any.store(true, Ordering::Release);
    }
    // Who looked before has finished when his block's lock is free.
    each_block(core, dev, |_, _| {});
}

/// The launch has ended: who waited goes on.
pub(crate) fn end(core: &Core, dev: &Device) {
    if !dev.holds.any.swap(false, Ordering::AcqRel) {
        return;
    }
    each_block(core, dev, |va, waiters| {
        if core::mem::take(waiters) {
            let _ = core.space.uffd.wake(va, BLOCK);
        }
    });
    *dev.holds.spans.lock() = [Span::default(); MAX_ARGS];
}

/// Locks every block that is held, one after the other.
fn each_block(core: &Core, dev: &Device, mut f: impl FnMut(Va, &mut bool)) {
    let spans = *dev.holds.spans.lock();
    for span in spans {
        core.dir.for_each(span, |block, part| {
            let mut state = block.lock();
            // A mover wakes by itself.
            if state.mover == 0 {
                f(Span::block(part.start).start, &mut state.waiters);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_os::PAGE;

    #[test]
    fn whole_pages_of_every_argument_are_held() {
        let holds = Holds::default();
        let at = 5 * BLOCK;
        holds.spans.lock()[0] = Span::inside(at + 1, at + 3 * PAGE);
        holds.spans.lock()[3] = Span { start: at + 7 * PAGE, end: at + 2 * BLOCK };
        assert!(holds.pages(at).is_empty(), "no launch runs");
        holds.any.store(true, Ordering::Release);
        assert!(holds.pages(at) == (Bits::range(1..3) | Bits::range(7..512)));
        assert!(holds.pages(at + BLOCK + 123) == Bits::ALL);
        assert!(holds.pages(at + 2 * BLOCK).is_empty());
    }
}
