//! Mirrors: a device without memory uses the process's where it is, and is told of every change.

use crate::harness::*;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use uhmm::mirror::Span;
use uhmm::mirror::{Fault, HasTable, PageTable, Reason, Request, change};
use uhmm::{Mirror, Notifier, Uhmm};

crate::tests![
    unmapping_is_told_and_the_entry_is_gone,
    every_change_is_told_with_its_reason,
    the_mirrors_end_is_told,
    changes_by_its_functions_are_acknowledged_before_they_happen,
    a_protection_behind_its_back_is_an_error,
    a_seq_is_old_after_a_change_of_its_range,
    what_was_looked_up_before_a_change_is_not_entered,
    no_registration_remains,
    a_forked_child_has_no_mirror,
];

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
    seen: AtomicUsize,
}

/// First page of the mirrored range, pages, why.
pub type Note = (usize, usize, Reason);

impl Noting {
    pub fn new(range: std::ops::Range<usize>) -> Self {
        let told = [const { [const { AtomicUsize::new(0) }; 3] }; NOTES];
        let table = PageTable::new(range.clone()).unwrap();
        Noting { table, start: range.start, told, count: AtomicUsize::new(0), probe: AtomicUsize::new(0), seen: AtomicUsize::new(0) }
    }
}

const SIMPLE: [Reason; 6] = [Reason::Unmap, Reason::Discard, Reason::Protect, Reason::Migrate { to: None }, Reason::Fork, Reason::Release];

impl Notifier for Noting {
    fn invalidate(&self, span: Span, reason: Reason) {
        let probe = self.probe.load(SeqCst);
        if probe != 0 {
            // SAFETY: a page of a test that says that it is there; else this is a crash, which is the test's failure.
            let byte = unsafe { (probe as *const u8).read_volatile() };
            self.seen.store(usize::from(byte), SeqCst);
        }
        self.table.erase(span);
        if let Some(note) = self.told.get(self.count.load(SeqCst)) {
            let code = match reason {
                Reason::Remap { to } => to,
                Reason::Migrate { .. } => 3,
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
pub fn told(mirror: &Mirror<Noting>) -> Vec<Note> {
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
pub fn mirrored(hmm: &Uhmm, pages: usize) -> (Pages, Mirror<Noting>) {
    let memory = Pages::new(pages * PAGE);
    let mirror = mirror_of(hmm, &memory);
    fault_in(&mirror, &Request::write());
    (memory, mirror)
}

pub fn range(memory: &Pages) -> std::ops::Range<usize> {
    let start = memory.start() as usize;
    start..start + memory.len()
}

pub fn mirror_of(hmm: &Uhmm, memory: &Pages) -> Mirror<Noting> {
    hmm.mirror(range(memory), Noting::new(range(memory))).unwrap()
}

/// Asks for all of a mirror's range, and enters it.
pub fn fault_in(mirror: &Mirror<Noting>, request: &Request<'_>) -> uhmm::mirror::Pages {
    let all = mirror.span().start..mirror.span().end;
    loop {
        let pages = mirror.range_fault(all.clone(), request, SECOND).unwrap();
        if mirror.enter(&pages) {
            return pages;
        }
    }
}

pub fn allowed(mirror: &Mirror<Noting>, page: usize) -> (bool, bool) {
    mirror.notifier().table.allows(mirror.span().start + page * PAGE)
}

pub fn read_byte(mirror: &Mirror<Noting>, at: usize) -> Option<u8> {
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

/// Writes what it is told to shared memory, which never migrates.
struct LastWord(usize);

impl Notifier for LastWord {
    fn invalidate(&self, span: Span, reason: Reason) {
        // SAFETY: shared memory of the test's, which stays.
        let word = unsafe { &*(self.0 as *const AtomicUsize) };
        word.fetch_add(if reason == Reason::Release { span.len() / PAGE } else { 1000 }, SeqCst);
    }
}

fn the_mirrors_end_is_told() {
    let hmm = Uhmm::new().unwrap();
    let word = shared(PAGE).as_ptr() as usize;
    let memory = Pages::new(3 * PAGE);
    let mirror = hmm.mirror(range(&memory), LastWord(word)).unwrap();
    mirror.snapshot(range(&memory), SECOND).unwrap();
    drop(mirror);
    // SAFETY: as above.
    let pages = || unsafe { &*(word as *const AtomicUsize) }.load(SeqCst);
    assert_eq!(pages(), 3);
    drop(memory);
    assert_eq!(pages(), 3, "nothing is told after the end");
}

fn changes_by_its_functions_are_acknowledged_before_they_happen() {
    let hmm = Uhmm::new().unwrap();
    let (mut memory, mirror) = mirrored(&hmm, 8);
    memory.slice::<u8>().fill(7);
    let room = Pages::new(PAGE);
    let at = |page: usize| mirror.span().start + page * PAGE;
    // The notifier reads the first byte of the page: it is still there, readable, and as it was. It is told once.
    let told_before = |page: usize, reason: Reason, change: &dyn Fn()| {
        mirror.notifier().seen.store(0, SeqCst);
        mirror.notifier().probe.store(at(page), SeqCst);
        change();
        mirror.notifier().probe.store(0, SeqCst);
        assert_eq!(mirror.notifier().seen.load(SeqCst), 7, "{reason:?}");
        assert_eq!(told(&mirror), [(page, 1, reason)]);
        assert_eq!((allowed(&mirror, page), allowed(&mirror, 0)), ((false, false), (true, true)));
    };
    // SAFETY: pages that only this test uses, as they are by then.
    unsafe {
        told_before(1, Reason::Protect, &|| change::protect(at(1), PAGE, change::Prot::None).unwrap());
        told_before(2, Reason::Discard, &|| change::discard(at(2), PAGE).unwrap());
        told_before(3, Reason::Unmap, &|| change::unmap(at(3), PAGE).unwrap());
        told_before(4, Reason::Remap { to: room.start() as usize }, &|| change::remap(at(4), PAGE, room.start() as usize).unwrap());
        assert_eq!((memory.at(2 * PAGE).read_volatile(), room.start().read_volatile()), (0, 7));
        assert!(change::unmap(at(0) + 1, PAGE).is_err());
        change::protect(at(1), PAGE, change::Prot::ReadWrite).unwrap();
    }
    let mapped = |page: usize| mirror.snapshot(at(page)..at(page + 1), SECOND).unwrap().entries[0].is_mapped();
    assert_eq!([1, 2, 3, 4, 5].map(mapped), [true, true, false, false, true]);
    // Without a mirror they are the plain calls.
    let start = at(0);
    drop(mirror);
    // SAFETY: as above.
    unsafe { change::discard(start, PAGE) }.unwrap();
    // SAFETY: a page of the test's own.
    assert_eq!(unsafe { memory.start().read_volatile() }, 0);
}

fn a_protection_behind_its_back_is_an_error() {
    let hmm = Uhmm::new().unwrap();
    let (memory, mirror) = mirrored(&hmm, 4);
    let at = |page: usize| mirror.span().start + page * PAGE;
    let words = memory.atomics::<std::sync::atomic::AtomicU8>();
    // SAFETY: pages that nobody uses meanwhile, but the device, whose accesses bear this.
    unsafe {
        protect(&words[..PAGE], libc::PROT_NONE);
        protect(&words[PAGE..2 * PAGE], libc::PROT_READ);
        assert_eq!(told(&mirror), [], "the kernel tells nobody");
        assert_eq!((read_byte(&mirror, at(0)), read_byte(&mirror, at(1))), (None, Some(0)));
        let refused = mirror.write(at(1), &[1]).unwrap_err().to_string();
        assert_eq!(refused, format!("the device has no entry for {:#x} that allows writing", at(1)));
        assert_eq!([0, 1, 2].map(|page| allowed(&mirror, page)), [(false, false), (false, false), (true, true)]);
        let fault = |page: usize, request: &Request<'_>| mirror.range_fault(at(page)..at(page + 1), request, SECOND).unwrap_err();
        assert_eq!(fault(0, &Request::read()), Fault::Protected { address: at(0), write: false });
        assert_eq!(fault(1, &Request::write()), Fault::Protected { address: at(1), write: true });
        protect(&words[..2 * PAGE], libc::PROT_READ | libc::PROT_WRITE);
    }
    fault_in(&mirror, &Request::write());
    assert_eq!(read_byte(&mirror, at(0)), Some(0));
}

fn a_seq_is_old_after_a_change_of_its_range() {
    let hmm = Uhmm::new().unwrap();
    let (memory, mirror) = mirrored(&hmm, 4);
    let (mut other, _unchanged) = mirrored(&hmm, 4);
    let seq = mirror.read_begin();
    assert!(!mirror.read_retry(seq) && !mirror.read_retry_begun(seq));
    advise(&mut other.slice::<u8>()[..PAGE], libc::MADV_DONTNEED);
    assert!(!mirror.read_retry(seq) && !mirror.read_retry_begun(seq), "another range");
    drop(memory);
    assert!(mirror.read_retry(seq) && mirror.read_retry_begun(seq));
    assert!(!mirror.read_retry(mirror.read_begin()));
}

fn what_was_looked_up_before_a_change_is_not_entered() {
    let hmm = Uhmm::new().unwrap();
    let mut memory = Pages::new(4 * PAGE);
    let mirror = mirror_of(&hmm, &memory);
    let pages = mirror.range_fault(range(&memory), &Request::write(), SECOND).unwrap();
    assert!(!mirror.read_retry(pages.seq));
    advise(&mut memory.slice::<u8>()[PAGE..2 * PAGE], libc::MADV_DONTNEED);
    assert!(mirror.read_retry(pages.seq) && !mirror.enter(&pages));
    assert_eq!([0, 1, 2, 3].map(|page| allowed(&mirror, page)), [(false, false); 4]);
}

/// Whether the mapping is registered with a userfaultfd.
fn registered(memory: &Pages) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let at = memory.start() as usize;
    let holds = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(usize::from_str_radix(start, 16).ok()? <= at && at < usize::from_str_radix(end, 16).ok()?)
    };
    let mut lines = smaps.lines().skip_while(|line| holds(line) != Some(true));
    let flags = lines.find(|line| line.starts_with("VmFlags:")).expect("the mapping");
    flags.contains(" uw") || flags.contains(" um")
}

fn no_registration_remains() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(4 * PAGE);
    let mirror = mirror_of(&hmm, &memory);
    assert!(!registered(&memory), "nothing is watched before it is looked at");
    let second = mirror_of(&hmm, &memory);
    mirror.snapshot(range(&memory), SECOND).unwrap();
    assert!(registered(&memory));
    drop(mirror);
    assert!(registered(&memory), "another mirror has it too");
    drop(second);
    assert!(!registered(&memory));
}

fn a_forked_child_has_no_mirror() {
    let hmm = Uhmm::new().unwrap();
    let (memory, mirror) = mirrored(&hmm, 4);
    in_a_child(|| {
        let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| mirror.snapshot(range(&memory), SECOND)));
        // SAFETY: the child's copy, which is dropped nowhere else, for the child ends here.
        drop(unsafe { std::ptr::read(&mirror) });
        looked.is_err()
    });
    fault_in(&mirror, &Request::write());
    assert_eq!(read_byte(&mirror, mirror.span().start), Some(0));
}
