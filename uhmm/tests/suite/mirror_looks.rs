//! What a mirror says of pages, what it faults in, and what it calls an error.

use crate::harness::*;
use crate::mirror::*;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;
use uhmm::mirror::{Entry, Fault, PageTable, Reason, Request, Want, change};
use uhmm::{Uhmm, args, inp};

crate::tests![
    what_a_look_says,
    a_snapshot_changes_nothing,
    pages_are_asked_for_one_by_one,
    shared_and_file_memory,
    what_cannot_be_had_is_an_error,
    invalidated_again_and_again,
    pages_on_a_device,
    pages_on_a_device_after_mremap,
    pages_of_a_coherent_device,
    memory_that_was_not_there_yet,
    a_kernel_cannot_ask,
];

fn flags(entry: Entry) -> (bool, bool, bool, usize) {
    (entry.may_read(), entry.may_write(), entry.is_zero_page(), entry.mapping_size())
}

fn what_a_look_says() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(8 * PAGE);
    let mirror = mirror_of(&hmm, &memory);
    let first = mirror.span().start..mirror.span().start + PAGE;
    let fault = |request: &Request<'_>| mirror.range_fault(first.clone(), request, SECOND).unwrap().entries[0];
    let look = || mirror.snapshot(first.clone(), SECOND).unwrap().entries[0];
    assert_eq!(flags(look()), (false, false, false, 0));
    assert!(look().is_mapped() && look().is_watched());
    assert_eq!(flags(fault(&Request::read())), (true, false, true, PAGE), "the zero page");
    assert_eq!(flags(fault(&Request::write())), (true, true, false, PAGE), "a page of its own");
    assert_eq!(flags(look()), (true, true, false, PAGE));
    assert_eq!((look().on_device(), look().on_coherent_device()), (None, None));
    // Shared with a child: whoever writes first gets a copy.
    let (hold, let_go) = std::io::pipe().unwrap();
    let writer = std::os::fd::AsRawFd::as_raw_fd(&let_go);
    let child = fork(false, || {
        // SAFETY: the child's copy, which it does not use: so it ends with its parent, whatever happens there.
        unsafe { libc::close(writer) };
        std::io::Read::read(&mut &hold, &mut [0]).is_ok()
    });
    assert_eq!(flags(look()), (true, false, false, PAGE), "shared copy-on-write");
    assert_eq!(flags(fault(&Request::write())), (true, true, false, PAGE));
    std::io::Write::write_all(&mut &let_go, &[0]).unwrap();
    assert_eq!(wait(child), 0);
    // SAFETY: written by nobody.
    unsafe { protect(&memory.atomics::<AtomicU8>()[..PAGE], libc::PROT_READ) };
    assert_eq!(flags(look()), (true, false, false, PAGE), "read-only");
    let mut block = Pages::huge(2 << 20);
    block.slice::<u8>().fill(1);
    let mirror = mirror_of(&hmm, &block);
    let pages = mirror.range_fault(range(&block), &Request::read(), SECOND).unwrap();
    assert_eq!((pages.rounds, pages.entries.len(), pages.at(block.start() as usize - 1)), (1, 512, None));
    let huge = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok_and(|enabled| !enabled.contains("[never]"));
    let last = pages.at(block.start() as usize + (2 << 20) - 1).unwrap();
    assert_eq!(flags(last), (true, true, false, if huge { 2 << 20 } else { PAGE }));
}

fn a_snapshot_changes_nothing() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(8 * PAGE);
    let mirror = mirror_of(&hmm, &memory);
    memory.atomics::<AtomicU8>()[3 * PAGE].store(1, SeqCst);
    let seq = mirror.read_begin();
    let pages = mirror.snapshot(range(&memory), SECOND).unwrap();
    let there: Vec<bool> = pages.entries.iter().map(|entry| entry.may_read()).collect();
    assert_eq!(there, [false, false, false, true, false, false, false, false]);
    assert_eq!(pages_present(memory.atomics::<AtomicU8>()), 1);
    assert!(!mirror.read_retry(seq) && pages.seq == seq);
}

fn pages_are_asked_for_one_by_one() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(8 * PAGE);
    let mirror = mirror_of(&hmm, &memory);
    // SAFETY: it is not used before something is mapped there again.
    unsafe { memory.unmap(2 * PAGE, PAGE) };
    let wants = [Want::Nothing, Want::Write, Want::Nothing, Want::Read];
    let pages = mirror.range_fault(range(&memory), &Request::each(&wants), SECOND).unwrap();
    let told: Vec<_> = pages.entries.iter().map(|entry| (entry.is_mapped(), entry.may_read(), entry.may_write())).collect();
    let (hole, nothing) = ((false, false, false), (true, false, false));
    assert_eq!(told, [nothing, (true, true, true), hole, (true, true, false), nothing, nothing, nothing, nothing]);
    let there: Vec<bool> = (0..8).map(|page| present(memory.at(page * PAGE))).collect();
    assert_eq!(there, [false, true, false, true, false, false, false, false]);
    // SAFETY: a new page where nothing is.
    unsafe { map_at(memory.at(2 * PAGE) as usize, PAGE, libc::MAP_FIXED_NOREPLACE) };
}

fn shared_and_file_memory() {
    let hmm = Uhmm::new().unwrap();
    let file = memfd();
    file.set_len(PAGE as u64).unwrap();
    for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
        std::os::unix::fs::FileExt::write_all_at(&file, &[5], 0).unwrap();
        let start = map(2 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, Some(&file)) as usize;
        let mirror = hmm.mirror(start..start + 2 * PAGE, Noting::new(start..start + 2 * PAGE)).unwrap();
        let fault = |at: usize, request: &Request<'_>| mirror.range_fault(at..at + PAGE, request, SECOND);
        let read = fault(start, &Request::read()).unwrap();
        // A page of the file in a private mapping becomes the program's own with the first write.
        assert!(read.entries[0].may_read() && (flags == libc::MAP_SHARED || !read.entries[0].may_write()));
        let written = fault(start, &Request::write()).unwrap();
        assert!(written.entries[0].may_write() && !written.entries[0].is_watched());
        assert!(mirror.enter(&written));
        assert_eq!(read_byte(&mirror, start), Some(5));
        // SAFETY: the test's own.
        unsafe { mirror.write(start, &[6]) }.unwrap();
        let mut now = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut now, 0).unwrap();
        assert_eq!(now, [if flags == libc::MAP_SHARED { 6 } else { 5 }]);
        assert_eq!(read_byte(&mirror, start), Some(6));
        let beyond = Fault::Unreachable { address: start + PAGE };
        assert_eq!(fault(start + PAGE, &Request::read()).unwrap_err(), beyond, "beyond the end of the file");
        // What is not watched is told of through these functions only.
        // SAFETY: it is used no more.
        unsafe { change::unmap(start, 2 * PAGE) }.unwrap();
        assert_eq!(told(&mirror), [(0, 2, Reason::Unmap)]);
    }
}

fn what_cannot_be_had_is_an_error() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(8 * PAGE);
    let mirror = mirror_of(&hmm, &memory);
    let at = |page: usize| mirror.span().start + page * PAGE;
    let fault = |from: usize, to: usize, request: &Request<'_>| mirror.range_fault(at(from)..at(to), request, SECOND).unwrap_err();
    let words = memory.atomics::<AtomicU8>();
    // SAFETY: pages that nobody uses meanwhile.
    unsafe {
        protect(&words[2 * PAGE..3 * PAGE], libc::PROT_READ);
        protect(&words[5 * PAGE..6 * PAGE], libc::PROT_NONE);
    }
    assert_eq!(fault(0, 8, &Request::write()), Fault::Protected { address: at(2), write: true });
    assert_eq!(fault(0, 8, &Request::read()), Fault::Protected { address: at(5), write: false });
    assert_eq!(fault(5, 6, &Request::write()), Fault::Protected { address: at(5), write: false });
    assert!(mirror.range_fault(at(0)..at(5), &Request::read(), SECOND).is_ok());
    // SAFETY: it is not used before something is mapped there again.
    unsafe { memory.unmap(PAGE, PAGE) };
    assert_eq!(fault(0, 8, &Request::write()), Fault::Unmapped { address: at(1) });
    assert_eq!(fault(0, 8, &Request::read()).to_string(), format!("nothing is mapped at {:#x}", at(1)));
    for (start, end) in [(at(0), at(0)), (at(0) + 1, at(1)), (at(0), at(1) - 1), (at(0) - PAGE, at(1)), (at(0), at(9)), (at(2), at(1))] {
        assert_eq!(mirror.range_fault(start..end, &Request::read(), SECOND).unwrap_err(), Fault::Range { start, end });
    }
    // SAFETY: a new page where nothing is.
    unsafe { map_at(at(1), PAGE, libc::MAP_FIXED_NOREPLACE) };
    let refused = |start: usize, end: usize| hmm.mirror(start..end, PageTable::new(start..end).unwrap()).unwrap_err().to_string();
    assert!(refused(at(1), at(1)).contains("cannot mirror the range: the range is empty"));
    assert!(refused(0x2000_0000_0000, 0x2000_0000_1000).contains("uhmm's own memory"));
}

fn invalidated_again_and_again() {
    let hmm = Uhmm::new().unwrap();
    let (memory, mirror) = mirrored(&hmm, 2);
    let end = std::time::Instant::now() + Duration::from_secs(30);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let start = memory.start() as usize;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                // SAFETY: nothing changes: it was readable and writable.
                unsafe { change::protect(start, 2 * PAGE, change::Prot::ReadWrite) }.unwrap();
            }
        });
        let busy = loop {
            let looked = mirror.range_fault(range(&memory), &Request::read(), Duration::ZERO);
            if let Err(Fault::Busy { rounds }) = looked {
                break rounds;
            }
            if looked.is_err() || std::time::Instant::now() > end {
                stop.store(true, SeqCst);
            }
            assert!(looked.is_ok(), "{looked:?}");
            assert!(!stop.load(SeqCst), "no change ever came between");
        };
        stop.store(true, SeqCst);
        assert_eq!(busy, 1, "no time is one round");
    });
    assert!(mirror.range_fault(range(&memory), &Request::read(), Duration::ZERO).is_ok());
}

fn pages_on_a_device() {
    let (hmm, dev) = device(16);
    let mut memory = Pages::new(64 * PAGE);
    memory.slice::<u8>().fill(3);
    let mirror = mirror_of(&hmm, &memory);
    fault_in(&mirror, &Request::write());
    told(&mirror);
    dev.prefetch(&memory.slice::<u8>()[16 * PAGE..32 * PAGE]).unwrap();
    let notes = told(&mirror);
    let about = |note: &Note| matches!(note.2, Reason::Migrate { .. }) && note.0 < 32 && note.0 + note.1 > 16;
    assert!(!notes.is_empty() && notes.iter().all(about), "{notes:?}");
    assert_eq!((allowed(&mirror, 20), read_byte(&mirror, mirror.span().start + 20 * PAGE)), ((false, false), None));
    let away = 16 * PAGE..32 * PAGE;
    assert_eq!(pages_present(&memory.slice::<u8>()[away.clone()]), 0);
    let snapshot = mirror.snapshot(range(&memory), SECOND).unwrap();
    let left = mirror.range_fault(range(&memory), &Request::write().leave_on_devices(), SECOND).unwrap();
    for pages in [&snapshot, &left] {
        let on: Vec<usize> = (0..64).filter(|&page| pages.entries[page].on_device() == Some(1)).collect();
        assert_eq!(on, (16..32).collect::<Vec<_>>());
        assert!(pages.entries.iter().all(|entry| entry.may_write() != entry.on_device().is_some()));
    }
    assert_eq!(pages_present(&memory.slice::<u8>()[away.clone()]), 0, "they were left there");
    assert!(mirror.enter(&left));
    assert_eq!(allowed(&mirror, 20), (false, false), "what is away is not entered");
    // Asked for, they come home, which is told too.
    told(&mirror);
    let home = fault_in(&mirror, &Request::read());
    assert!(home.entries.iter().all(|entry| entry.may_read() && entry.on_device().is_none()));
    assert!(told(&mirror).iter().any(|note| matches!(note.2, Reason::Migrate { .. })));
    assert_eq!(read_byte(&mirror, mirror.span().start + 20 * PAGE), Some(3));
    // They are watched for missing pages by now, and leave again.
    dev.prefetch(&memory.slice::<u8>()[away.clone()]).unwrap();
    assert_eq!((allowed(&mirror, 20), allowed(&mirror, 40)), ((false, false), (true, true)));
    dev.evict(memory.slice::<u8>()).unwrap();
    // Both have them: the CPU's may be read, and a write ends that.
    dev.run(&|_: &uhmm::Ctx<'_>| (), 1, args![inp(memory.slice::<u8>())]).unwrap();
    let both = fault_in(&mirror, &Request::read());
    assert!(both.entries.iter().all(|entry| entry.may_read() && !entry.may_write()));
    let mine = fault_in(&mirror, &Request::write());
    assert!(mine.entries.iter().all(|entry| entry.may_write()));
    // SAFETY: the test's own.
    unsafe { mirror.write(mirror.span().start + 20 * PAGE, &[4]) }.unwrap();
    assert_eq!(memory.slice::<u8>()[20 * PAGE], 4);
}

/// What a mirror has registered for events only moves to another address, leaves for a device there, and comes back when it is touched.
fn pages_on_a_device_after_mremap() {
    let (hmm, dev) = device(16);
    let mut memory = Pages::new(64 * PAGE);
    memory.slice::<u8>().fill(3);
    let mirror = mirror_of(&hmm, &memory);
    fault_in(&mirror, &Request::write());
    let mut room = Pages::new(64 * PAGE);
    // SAFETY: nobody uses the old place, and the room is the test's own.
    unsafe { memory.move_to(0, 64 * PAGE, room.start()) };
    std::mem::forget(memory);
    dev.prefetch(room.slice::<u8>()).unwrap();
    assert_eq!(pages_present(room.slice::<u8>()), 0);
    assert!(room.slice::<u8>().iter().all(|&x| x == 3));
}

fn pages_of_a_coherent_device() {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.soft("soft:coherent").coherent(true).memory(16 << 20).threads(2).open().unwrap();
    let mut memory = Pages::new(64 * PAGE);
    memory.slice::<u8>().fill(3);
    let mirror = mirror_of(&hmm, &memory);
    dev.prefetch(memory.slice::<u8>()).unwrap();
    let pages = mirror.snapshot(range(&memory), SECOND).unwrap();
    assert!(pages.entries.iter().any(|entry| entry.on_coherent_device() == Some(1) && entry.may_read() && entry.on_device().is_none()));
    fault_in(&mirror, &Request::write());
    // SAFETY: the test's own.
    unsafe { mirror.write(mirror.span().start, &[4]) }.unwrap();
    assert_eq!((memory.slice::<u8>()[0], read_byte(&mirror, mirror.span().start + PAGE)), (4, Some(3)));
    drop(dev);
    assert_eq!((memory.slice::<u8>()[0], memory.slice::<u8>()[PAGE]), (4, 3));
}

fn memory_that_was_not_there_yet() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(4 * PAGE);
    let at = memory.start() as usize;
    // SAFETY: nothing is used there before something is mapped again.
    unsafe { memory.unmap(0, 4 * PAGE) };
    let mirror = mirror_of(&hmm, &memory);
    assert!(mirror.snapshot(range(&memory), SECOND).unwrap().entries.iter().all(|entry| !entry.is_mapped()));
    // SAFETY: as above.
    unsafe { map_at(at, 4 * PAGE, libc::MAP_FIXED_NOREPLACE) };
    let pages = fault_in(&mirror, &Request::write());
    assert!(pages.entries.iter().all(|entry| entry.is_watched() && entry.may_write()));
    // SAFETY: as above.
    unsafe { memory.unmap(PAGE, PAGE) };
    assert_eq!(told(&mirror), [(1, 1, Reason::Unmap)]);
    // SAFETY: as above.
    unsafe { map_at(at + PAGE, PAGE, libc::MAP_FIXED_NOREPLACE) };
}

fn a_kernel_cannot_ask() {
    let (hmm, dev) = device(16);
    let memory = Pages::new(PAGE);
    let mirror = mirror_of(&hmm, &memory);
    let range = range(&memory);
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let kernel = |_: &uhmm::Ctx<'_>| {
        let refused = mirror.snapshot(range.clone(), SECOND).is_err_and(|fault| fault == Fault::Reentrant);
        asked.fetch_add(usize::from(refused), SeqCst);
    };
    dev.run(&kernel, 1, args![]).unwrap();
    assert_eq!(asked.load(SeqCst), 1);
}
