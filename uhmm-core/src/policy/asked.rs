//! The questions: what the mechanism asks of the policy in force, and what of the answers it can use.

use super::in_force::ask;
use super::marks::Said;
use super::*;
use crate::core::{Core, Device};
use crate::directory::Block;
use crate::mode::Mode;
use crate::sync::*;

/// What a launch wants of pages that it declares, as far as that can be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wishes {
    /// To be moved, or overwritten.
    pub(crate) moves: Bits,
    /// To be on both sides.
    pub(crate) duplicates: Bits,
    /// To be left alone until the kernel touches them.
    pub(crate) on_touch: Bits,
    /// The block leaves a full device last.
    pub(crate) pin: bool,
}

impl Wishes {
    /// What the policy says of a part of a block that an argument of so many bytes declares; `fetches`: what is not there can be fetched when it is touched. What is in no set gets a snapshot, or is used in place.
    pub(crate) fn of(core: &Core, dev: &Device, fetches: bool, access: Access, bytes: usize, part: Span) -> Self {
        let mut wishes = Wishes::default();
        let mut at = part.start;
        core.policies.marks.for_each(part, |marked, said| {
            wishes.add(core, dev, fetches, access, bytes, Span { start: at, end: marked.start }, Said::default());
            wishes.add(core, dev, fetches, access, bytes, marked, said);
            at = marked.end;
        });
        wishes.add(core, dev, fetches, access, bytes, Span { start: at, end: part.end }, Said::default());
        wishes
    }

    #[allow(clippy::too_many_arguments)] // all of them what the policy is asked about
    fn add(&mut self, core: &Core, dev: &Device, fetches: bool, access: Access, bytes: usize, part: Span, said: Said) {
        if part.is_empty() {
            return;
        }
        let info = dev.driver.info();
        let (pages, advice) = (part.bits(), said.advice);
        let mut answer = Prepare { place: if access == Access::In { Placement::Duplicate } else { Placement::Move }, pin: false };
        // In the lesser modes nothing stays but what was left there: there is nothing to decide.
        if core.space.mode == Mode::Full {
            let history = core.dir.get(part.start).map(|block| block.past.now()).unwrap_or_default();
            let declared = Declaration { device: dev.id(), part, access, coherent: info.capabilities.coherent, bytes, advice, history };
            let policy = core.policies.of(said, dev.id());
            answer = ask(|| policy.launch(&declared));
        }
        self.pin |= answer.pin;
        let mut place = answer.place;
        if place == Placement::OnTouch && (!fetches || info.capabilities.coherent) {
            place = if access == Access::In { Placement::Duplicate } else { Placement::Move };
        }
        // What is written can be on both sides only where the first write of each page is noticed.
        let shared = access == Access::In || (access == Access::InOut && fetches);
        if place == Placement::Duplicate && (!shared || info.capabilities.coherent) {
            place = Placement::Move;
        }
        if advice.no_migrate() && place != Placement::Map {
            place = if access == Access::In && !info.capabilities.coherent { Placement::Duplicate } else { Placement::Map };
        }
        match place {
            Placement::Move => self.moves |= pages,
            Placement::Duplicate => self.duplicates |= pages,
            Placement::OnTouch => self.on_touch |= pages,
            Placement::Map => {}
        }
    }

    /// Pages of which the kernel gets no snapshot if they are not as it needs them: its touch sees to that.
    pub(crate) fn left_to_touch(&self, access: Access) -> Bits {
        if access == Access::InOut { self.on_touch | self.duplicates } else { self.on_touch }
    }
}

/// What to bring to a device that has touched a page.
pub(crate) fn device_fault(core: &Core, dev: &Device, block: &Block, address: Va, write: bool, candidates: Bits) -> Fetch {
    let said = core.policies.marks.at(address);
    let (advice, history) = (said.advice, block.past.now());
    let page = address % uhmm_os::BLOCK / uhmm_os::PAGE;
    let fault = DeviceFault { device: dev.id(), address, page, write, candidates, advice, history };
    let policy = core.policies.of(said, dev.id());
    let mut answer = ask(|| policy.device_fault(&fault));
    answer.duplicate &= !write;
    answer.ahead = answer.ahead.min(MOST_AHEAD);
    answer
}

/// What to bring home to the CPU that has touched a page. What the policy wants is asked with what `fault` says besides advice and history.
pub(crate) fn cpu_fault(core: &Core, fault: CpuFault) -> Return {
    let said = core.policies.marks.at(fault.address);
    let policy = core.policies.of(said, fault.device);
    let fault = CpuFault { advice: said.advice, ..fault };
    let mut answer = ask(|| policy.cpu_fault(&fault));
    answer.duplicate &= !fault.write;
    answer.ahead = answer.ahead.min(MOST_AHEAD);
    answer
}

/// The blocks that are to leave a full device first, of those that `fit`, in order: what will not be needed, the least recently used ones, what is to go last.
struct Leaving {
    list: [Candidate; CANDIDATES],
    /// How many of each kind.
    count: [usize; 3],
}

impl Leaving {
    fn all(&self) -> usize {
        self.count.iter().sum()
    }

    /// Adds a block behind those of its kind; the last one of all falls off if there is no room.
    fn add(&mut self, kind: usize, candidate: Candidate) {
        let at: usize = self.count[..=kind].iter().sum();
        if at == CANDIDATES {
            return;
        }
        if self.all() == CANDIDATES {
            let last = (kind + 1..3).rev().find(|&kind| self.count[kind] > 0);
            last.into_iter().for_each(|last| self.count[last] -= 1);
        }
        let end = self.all();
        self.list.copy_within(at..end, at + 1);
        self.list[at] = candidate;
        self.count[kind] += 1;
    }
}

/// The block that leaves a full device: of those that `fit` the one that the policy chooses.
pub(crate) fn leaving(core: &Core, dev: &Device, fits: impl Fn(Va, &Block) -> bool) -> Option<Va> {
    let mut leaving = Leaving { list: [Candidate::default(); CANDIDATES], count: [0; 3] };
    let marks = &core.policies.marks;
    let marked = marks.any();
    dev.mem.oldest_first(&core.dir, |block, entry| {
        if fits(block, entry) {
            let advice = marks.of(Span::block(block));
            let pinned = entry.last.load(Ordering::Relaxed);
            let kind = match advice {
                _ if pinned || advice.preferred() == Some(Location::Device(dev.id())) => 2,
                advice if advice.will_not_need() => 0,
                _ => 1,
            };
            leaving.add(kind, Candidate { block, advice, history: entry.past.now(), pinned });
        }
        // Without advice only pinned ones could lie before those that are still to come.
        let sure = leaving.count[0] + if marked { 0 } else { leaving.count[1] };
        sure < CANDIDATES
    });
    let count = leaving.all();
    if count == 0 {
        return None;
    }
    let pressure = Pressure { device: dev.id(), candidates: &leaving.list[..count] };
    let policy = core.policies.of_device(dev.id());
    let chosen = ask(|| policy.evict(&pressure));
    Some(pressure.candidates.get(chosen).unwrap_or(&pressure.candidates[0]).block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_leave_in_the_order_of_their_kinds() {
        let mut leaving = Leaving { list: [Candidate::default(); CANDIDATES], count: [0; 3] };
        let kinds = [2, 1, 0, 1, 2, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1];
        for (block, &kind) in kinds.iter().enumerate() {
            leaving.add(kind, Candidate { block, ..Candidate::default() });
        }
        let found: Vec<usize> = leaving.list[..leaving.all()].iter().map(|candidate| candidate.block).collect();
        assert_eq!(found, [2, 5, 17, 1, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        let mut full = Leaving { list: [Candidate::default(); CANDIDATES], count: [0; 3] };
        (0..40).for_each(|block| full.add(0, Candidate { block, ..Candidate::default() }));
        assert!(full.list.iter().map(|candidate| candidate.block).eq(0..CANDIDATES));
    }
}
