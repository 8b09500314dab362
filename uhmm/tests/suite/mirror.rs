//! Mirrors: a device without memory uses the process's where it is, and is told of every change.

use crate::harness::*;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use uhmm::mirror::{Fault, HasTable, PageTable, Reason, Request};
use uhmm::{Mirror, Notifier, Uhmm};
use uhmm_core::page::Span;

crate::tests![unmapping_is_told_and_the_entry_is_gone, every_change_is_told_with_its_reason,];

pub const PAGE: usize = 4096;
pub const SECOND: Duration = Duration::from_secs(1);
const NOTES: usize = 64;

/// A device that notes what it is told, in itself.
pub struct Noting {
    table: PageTable,
    start: usize,
    told: [[AtomicUsize; 3]; NOTES],
    count: AtomicUsize,
    /// An address that is to be read at each note of a page that is still there.
    probe: AtomicUsize,
}

/// First page of the mirrored range, pages, why.
pub type Note = (usize, usize, Reason);

impl Noting {
    pub fn new(range: std::ops::Range<usize>) -> Self {
        let told = [const { [const { AtomicUsize::new(0) }; 3] }; NOTES];
        let table = PageTable::new(range.clone()).unwrap();
        Noting { table, start: range.start, told, count: AtomicUsize::new(0), probe: AtomicUsize::new(0) }
    }
}

const SIMPLE: [Reason; 6] = [Reason::Unmap, Reason::Discard, Reason::Protect, Reason::Migrate, Reason::Fork, Reason::Release];

impl Notifier for Noting {
    fn invalidate(&self, span: Span, reason: Reason) {
        let probe = self.probe.load(SeqCst);
        if probe != 0 {
            // SAFETY: a page of a test that says that it is there; else this is a crash, which is the test's failure.
            unsafe { (probe as *const u8).read_volatile() };
        }
        self.table.erase(span);
        if let Some(note) = self.told.get(self.count.load(SeqCst)) {
            let code = match reason {
                Reason::Remap { to } => to,
                simple => SIMPLE.iter().position(|one| *one == simple).unwrap_or(NOTES),
            };
            let values = [(span.start - self.start) / PAGE, span.len() / PAGE, code];
            note.iter().zip(values).for_each(|(place, value)| place.store(value, SeqCst));
            self.count.fetch_add(1, SeqCst);
        }
    }
}

impl HasTable for Noting {
    fn table(&self) -> &PageTable {
        &self.table
    }
}

/// What a mirror was told since the last time.
fn told(mirror: &Mirror<Noting>) -> Vec<Note> {
    mirror.read_begin(); // a change returns when its event is read; this waits until it is followed
    let notifier = mirror.notifier();
    let count = notifier.count.swap(0, SeqCst);
    let note = |note: &[AtomicUsize; 3]| {
        let [first, pages, code] = [0, 1, 2].map(|part| note[part].load(SeqCst));
        (first, pages, SIMPLE.get(code).copied().unwrap_or(Reason::Remap { to: code }))
    };
    notifier.told[..count].iter().map(note).collect()
}

/// Pages, all mirrored, faulted in for writing and entered.
fn mirrored(hmm: &Uhmm, pages: usize) -> (Pages, Mirror<Noting>) {
    let memory = Pages::new(pages * PAGE);
    let mirror = mirror_of(hmm, &memory);
    fault_in(&mirror, &Request::write());
    (memory, mirror)
}

pub fn range(memory: &Pages) -> std::ops::Range<usize> {
    let start = memory.start() as usize;
    start..start + memory.len()
}

fn mirror_of(hmm: &Uhmm, memory: &Pages) -> Mirror<Noting> {
    hmm.mirror(range(memory), Noting::new(range(memory))).unwrap()
}

/// Asks for all of a mirror's range, and enters it.
fn fault_in(mirror: &Mirror<Noting>, request: &Request<'_>) -> uhmm::mirror::Pages {
    let all = mirror.span().start..mirror.span().end;
    loop {
        let pages = mirror.range_fault(all.clone(), request, SECOND).unwrap();
        if mirror.enter(&pages) {
            return pages;
        }
    }
}

fn allowed(mirror: &Mirror<Noting>, page: usize) -> (bool, bool) {
    mirror.notifier().table.allows(mirror.span().start + page * PAGE)
}

fn read_byte(mirror: &Mirror<Noting>, at: usize) -> Option<u8> {
    let mut byte = [0xEE];
    mirror.read(at, &mut byte).ok().map(|()| byte[0])
}

fn unmapping_is_told_and_the_entry_is_gone() {
    let hmm = Uhmm::new().unwrap();
    let (mut memory, mirror) = mirrored(&hmm, 8);
    let at = |page: usize| mirror.span().start + page * PAGE;
    memory.slice::<u8>().fill(7);
    let mut bytes = vec![0; 3 * PAGE];
    mirror.read(at(1) + 5, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&x| x == 7));
    // SAFETY: nobody has a reference to the memory now.
    unsafe { mirror.write(at(2) - 2, &[1, 2, 3, 4]) }.unwrap();
    assert_eq!(memory.slice::<u8>()[2 * PAGE - 3..2 * PAGE + 3], [7, 1, 2, 3, 4, 7]);
    assert_eq!(told(&mirror), []);
    // SAFETY: it is not used before it is mapped again.
    unsafe { memory.unmap(2 * PAGE, PAGE) };
    assert_eq!(told(&mirror), [(2, 1, Reason::Unmap)]);
    assert_eq!((allowed(&mirror, 1), allowed(&mirror, 2), allowed(&mirror, 3)), ((true, true), (false, false), (true, true)));
    assert_eq!(mirror.read(at(1), &mut bytes).unwrap_err().address, at(2));
    // SAFETY: as above.
    assert_eq!(unsafe { mirror.write(at(2) - 1, &[9, 9]) }.unwrap_err().address, at(2));
    let all = mirror.span().start..mirror.span().end;
    assert_eq!(mirror.range_fault(all.clone(), &Request::read(), SECOND).unwrap_err(), Fault::Unmapped { address: at(2) });
    let snapshot = mirror.snapshot(all, SECOND).unwrap();
    let mapped: Vec<bool> = snapshot.entries.iter().map(|entry| entry.is_mapped()).collect();
    assert_eq!(mapped, [true, true, false, true, true, true, true, true]);
    // SAFETY: the hole that was just made.
    unsafe { map_at(at(2), PAGE, libc::MAP_FIXED_NOREPLACE) };
    fault_in(&mirror, &Request::read());
    assert_eq!((read_byte(&mirror, at(2)), read_byte(&mirror, at(3))), (Some(0), Some(7)));
}

fn every_change_is_told_with_its_reason() {
    let hmm = Uhmm::new().unwrap();
    let (mut memory, mirror) = mirrored(&hmm, 8);
    let gone = |page: usize, note: Note| {
        assert_eq!(told(&mirror), [note]);
        assert_eq!(allowed(&mirror, page), (false, false), "{note:?}");
    };
    advise(&mut memory.slice::<u8>()[3 * PAGE..5 * PAGE], libc::MADV_DONTNEED);
    gone(3, (3, 2, Reason::Discard));
    fault_in(&mirror, &Request::write());
    advise(&mut memory.slice::<u8>()[5 * PAGE..6 * PAGE], libc::MADV_FREE);
    gone(5, (5, 1, Reason::Discard));
    fault_in(&mirror, &Request::write());
    map_anew(&mut memory.slice::<u8>()[PAGE..2 * PAGE]);
    gone(1, (1, 1, Reason::Unmap));
    fault_in(&mirror, &Request::write());
    let room = Pages::new(2 * PAGE);
    // SAFETY: nobody uses it, nor the room, before it is back.
    unsafe { memory.move_to(6 * PAGE, 2 * PAGE, room.start()) };
    // The kernel tells of the old place's end besides.
    assert_eq!(told(&mirror), [(6, 2, Reason::Remap { to: room.start() as usize }), (6, 2, Reason::Unmap)]);
    assert_eq!(allowed(&mirror, 6), (false, false));
    // SAFETY: as above.
    unsafe { room.move_to(0, 2 * PAGE, memory.at(6 * PAGE)) };
    std::mem::forget(room); // it went with that
    fault_in(&mirror, &Request::write());
    assert_eq!(told(&mirror), [(6, 2, Reason::Unmap)], "something else has taken the place");
    // A child.
    in_a_child(|| true);
    let notes = told(&mirror);
    assert!(!notes.is_empty() && notes.iter().all(|note| *note == (0, 8, Reason::Fork)), "{notes:?}");
    assert_eq!(allowed(&mirror, 0), (false, false));
    // A part of what changes is told as that part.
    let (memory, mirror) = mirrored(&hmm, 8);
    let start = mirror.span().start;
    let small = hmm.mirror(start + PAGE..start + 2 * PAGE, Noting::new(start + PAGE..start + 2 * PAGE)).unwrap();
    fault_in(&small, &Request::read());
    let room = Pages::new(8 * PAGE);
    // SAFETY: as above; the memory is at the room's place from now on.
    unsafe { memory.move_to(0, 8 * PAGE, room.start()) };
    assert_eq!(told(&small)[0], (0, 1, Reason::Remap { to: room.start() as usize + PAGE }));
    assert_eq!(told(&mirror)[0], (0, 8, Reason::Remap { to: room.start() as usize }));
    std::mem::forget(memory);
}
