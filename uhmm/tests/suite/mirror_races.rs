//! A device sums a list in place, over its own page table, while others change the mappings that the list lies in.

use crate::harness::*;
use crate::mirror::{PAGE, SECOND, range};
use std::collections::HashSet;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Instant;
use uhmm::mirror::Span;
use uhmm::mirror::{Fault, HasTable, PageTable, Reason, Request, change};
use uhmm::{Mirror, Notifier, Uhmm, args, inp};

crate::tests![
    sums_while_pages_are_unmapped_protected_dropped_and_refilled,
    no_entry_outlives_the_call_that_changes_its_page,
    sums_while_the_list_migrates,
    writes_while_mappings_change,
    what_is_being_dropped_is_not_looked_at,
];

/// A device that counts why it was told.
struct Summer {
    table: PageTable,
    reasons: [AtomicUsize; 7],
}

impl Summer {
    fn new(range: std::ops::Range<usize>) -> Self {
        Summer { table: PageTable::new(range).unwrap(), reasons: [const { AtomicUsize::new(0) }; 7] }
    }

    fn told(&self, reason: Reason) -> usize {
        self.reasons[index(reason)].load(SeqCst)
    }
}

fn index(reason: Reason) -> usize {
    match reason {
        Reason::Unmap => 0,
        Reason::Remap { .. } => 1,
        Reason::Discard => 2,
        Reason::Protect => 3,
        Reason::Migrate { .. } => 4,
        Reason::Fork => 5,
        _ => 6,
    }
}

impl Notifier for Summer {
    fn invalidate(&self, span: Span, reason: Reason) {
        self.table.erase(span);
        self.reasons[index(reason)].fetch_add(1, SeqCst);
    }
}

impl HasTable for Summer {
    fn table(&self) -> &PageTable {
        &self.table
    }
}

/// Nodes of 16 bytes: the next one's address, and a value. Each page has one, in a random order; the first is in the first page.
struct List {
    memory: Pages,
    order: Vec<usize>,
    /// What the values add up to if a node of zeroes is at that position.
    sums: Vec<u64>,
}

impl List {
    fn new(pages: usize, random: &mut fastrand::Rng) -> Self {
        let memory = Pages::new(pages * PAGE);
        let mut order: Vec<usize> = (0..pages).collect();
        random.shuffle(&mut order[1..]);
        let mut sums = vec![0];
        for &page in &order {
            sums.push(sums[sums.len() - 1] + value_of(page));
        }
        let list = List { memory, order, sums };
        for position in 0..pages {
            list.write(position, list.memory.at(list.order[position] * PAGE));
        }
        list
    }

    fn at(&self, position: usize) -> *mut u8 {
        self.memory.at(self.order[position] * PAGE)
    }

    /// Writes a node to a page that nobody else uses yet.
    fn write(&self, position: usize, to: *mut u8) {
        let next = self.order.get(position + 1).map_or(0, |&next| self.memory.at(next * PAGE) as u64);
        // SAFETY: a page of the caller's.
        unsafe { to.cast::<[u64; 2]>().write_volatile([next, value_of(self.order[position])]) };
    }

    /// Puts a new page with the node in the place of what is there: contents change with the mapping only.
    fn restore(&self, position: usize) {
        let page = Pages::new(PAGE);
        self.write(position, page.start());
        // SAFETY: a place in the list's memory, whose pages only copies use, which bear this.
        unsafe { page.move_to(0, PAGE, self.at(position)) };
        std::mem::forget(page); // it went with that
    }
}

fn value_of(page: usize) -> u64 {
    1 << 40 | page as u64
}

/// How a walk along the list has ended.
#[derive(Debug)]
enum Walk {
    /// The values, each once.
    Sum {
        sum: u64,
        nodes: usize,
    },
    Error(Fault),
}

/// Walks along the list, each miss a device fault, until a walk lies wholly between two changes.
fn walk<N: HasTable>(mirror: &Mirror<N>, head: usize, request: &Request<'_>, end: Instant) -> Option<Walk> {
    'again: while Instant::now() < end + SECOND {
        let seq = mirror.read_begin();
        let (mut at, mut sum, mut nodes) = (head, 0u64, 0);
        while at != 0 {
            let mut node = [0u64; 2];
            let bytes = bytemuck::cast_slice_mut(&mut node);
            if mirror.read(at, bytes).is_err() {
                let page = at & !(PAGE - 1);
                match mirror.range_fault(page..page + PAGE, request, SECOND) {
                    Ok(pages) => {
                        mirror.enter(&pages);
                    }
                    Err(fault) if mirror.read_retry_begun(seq) => {
                        std::hint::black_box(fault);
                        continue 'again;
                    }
                    Err(fault) => return Some(Walk::Error(fault)),
                }
                continue;
            }
            (at, sum, nodes) = (node[0] as usize, sum.wrapping_add(node[1]), nodes + 1);
        }
        if !mirror.read_retry_begun(seq) {
            return Some(Walk::Sum { sum, nodes });
        }
    }
    None
}

/// The other thread makes a page a hole, unreadable, or zeroes, and then what it was again. So at any moment the list is whole, ends in an error, or ends at a node of zeroes.
/// One page at a time: a walk between two changes sees one of these.
fn sums_while_pages_are_unmapped_protected_dropped_and_refilled() {
    const LEN: usize = 64;
    let hmm = Uhmm::new().unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    let list = List::new(LEN, &mut random);
    let aside = Pages::new(3 * PAGE); // the page between the others: where it is taken from nobody else can map more than a page
    let mirror = hmm.mirror(range(&list.memory), Summer::new(range(&list.memory))).unwrap();
    let end = Instant::now() + seconds(5);
    let head = list.at(0) as usize;
    let done = AtomicBool::new(false);
    let (mut whole, mut cut, mut errors) = (0, 0, HashSet::new());
    std::thread::scope(|scope| {
        let (mirror, sums, done) = (&mirror, &list.sums, &done);
        let device = scope.spawn(move || {
            let (mut whole, mut cut, mut errors) = (0usize, 0usize, HashSet::new());
            while !done.load(Relaxed) {
                match walk(mirror, head, &Request::read(), end) {
                    Some(Walk::Sum { sum, nodes }) if nodes == LEN && sum == sums[LEN] => whole += 1,
                    // The last node is the one of zeroes.
                    Some(Walk::Sum { sum, nodes }) if nodes > 0 && nodes <= LEN && sum == sums[nodes - 1] => cut += 1,
                    Some(Walk::Error(Fault::Unmapped { .. })) => _ = errors.insert("unmapped"),
                    Some(Walk::Error(Fault::Protected { .. })) => _ = errors.insert("protected"),
                    Some(Walk::Error(Fault::Busy { .. })) => _ = errors.insert("busy"),
                    None if Instant::now() > end => break,
                    wrong => panic!("{wrong:?}"),
                }
            }
            (whole, cut, errors)
        });
        while Instant::now() < end {
            let position = random.usize(1..LEN);
            let (page, at) = (list.order[position], list.at(position));
            let pause = || std::thread::sleep(std::time::Duration::from_micros(fastrand::u64(0..400)));
            // SAFETY: pages of the test's own, which only the device uses besides, by copies that bear all of this.
            unsafe {
                match random.u32(0..7) {
                    0 => {
                        list.memory.unmap(page * PAGE, PAGE);
                        pause();
                        map_at(at as usize, PAGE, libc::MAP_FIXED_NOREPLACE);
                    }
                    1 => {
                        change::unmap(at as usize, PAGE).unwrap();
                        pause();
                        map_at(at as usize, PAGE, libc::MAP_FIXED_NOREPLACE);
                    }
                    2 => _ = map_at(at as usize, PAGE, libc::MAP_FIXED),
                    3 => assert_eq!(libc::madvise(at.cast(), PAGE, libc::MADV_DONTNEED), 0),
                    4 => {
                        list.memory.move_to(page * PAGE, PAGE, aside.at(PAGE));
                        pause();
                        aside.move_to(PAGE, PAGE, at);
                    }
                    5 => {
                        change::protect(at as usize, PAGE, change::Prot::None).unwrap();
                        pause();
                        change::protect(at as usize, PAGE, change::Prot::ReadWrite).unwrap();
                    }
                    _ => {
                        assert_eq!(libc::mprotect(at.cast(), PAGE, libc::PROT_NONE), 0);
                        pause();
                        assert_eq!(libc::mprotect(at.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE), 0);
                    }
                }
            }
            pause();
            list.restore(position);
            pause();
        }
        done.store(true, Relaxed);
        (whole, cut, errors) = device.join().unwrap();
    });
    assert!(whole > 10 && cut > 0, "{whole} whole, {cut} cut, {errors:?}");
    assert!(errors.contains("unmapped") && errors.contains("protected"), "{errors:?}");
    let told = [Reason::Unmap, Reason::Remap { to: 0 }, Reason::Discard, Reason::Protect].map(|reason| mirror.notifier().told(reason));
    assert!(told.iter().all(|&times| times > 0), "{told:?}");
    assert_eq!(mirror.notifier().told(Reason::Migrate { to: None }), 0, "no page migrates");
    assert_eq!(pages_present(list.memory.atomics::<std::sync::atomic::AtomicU64>()), LEN);
}

/// When a call that changes a mapping has returned, the device cannot use the page through what it knew before, also if something else is mapped there by now.
fn no_entry_outlives_the_call_that_changes_its_page() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(4 * PAGE);
    let aside = Pages::new(3 * PAGE); // the page between the others: where it is taken from nobody else can map more than a page
    let mirror = hmm.mirror(range(&memory), Summer::new(range(&memory))).unwrap();
    let at = memory.start() as usize + PAGE;
    let end = Instant::now() + seconds(5);
    let mut random = fastrand::Rng::with_seed(5);
    while Instant::now() < end {
        let pages = mirror.range_fault(at..at + PAGE, &Request::write(), SECOND).unwrap();
        if !mirror.enter(&pages) {
            continue;
        }
        let what = random.u32(0..4);
        // SAFETY: a page of the test's own.
        unsafe {
            match what {
                0 => {
                    memory.unmap(PAGE, PAGE);
                    map_at(at, PAGE, libc::MAP_FIXED_NOREPLACE);
                }
                1 => assert_eq!(libc::madvise(at as *mut _, PAGE, libc::MADV_DONTNEED), 0),
                2 => _ = map_at(at, PAGE, libc::MAP_FIXED),
                _ => {
                    memory.move_to(PAGE, PAGE, aside.at(PAGE));
                    map_at(at, PAGE, libc::MAP_FIXED_NOREPLACE);
                }
            }
            if random.bool() {
                assert!(mirror.read(at, &mut [0; 8]).is_err(), "read after change {what}");
            } else {
                assert!(mirror.write(at, &[1; 8]).is_err(), "written after change {what}");
            }
        }
    }
}

/// Migration is just another change: what left is asked for and comes home, and the sum is always that of the whole list.
fn sums_while_the_list_migrates() {
    const LEN: usize = 300;
    let (hmm, dev) = device(16);
    let mut random = fastrand::Rng::with_seed(2);
    let mut list = List::new(LEN, &mut random);
    let sums = list.sums[LEN];
    let mirror = hmm.mirror(range(&list.memory), Summer::new(range(&list.memory))).unwrap();
    let head = list.at(0) as usize;
    let end = Instant::now() + seconds(5);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (mirror, done) = (&mirror, &done);
        let walks = scope.spawn(move || {
            let mut walks = 0;
            while !done.load(Relaxed) {
                let request = if walks % 2 == 0 { Request::read() } else { Request::write() };
                match walk(mirror, head, &request, end) {
                    Some(Walk::Sum { sum, nodes }) => assert_eq!((sum, nodes), (sums, LEN)),
                    None if Instant::now() > end => break,
                    wrong => panic!("{wrong:?}"),
                }
                walks += 1;
            }
            walks
        });
        let bytes = list.memory.slice::<u8>();
        while Instant::now() < end {
            let from = random.usize(0..LEN) * PAGE;
            let part = &bytes[from..random.usize(from + 1..bytes.len() + 1)];
            match random.u32(0..3) {
                0 => dev.prefetch(part).unwrap(),
                1 => dev.evict(part).unwrap(),
                _ => dev.run(&|_: &uhmm::Ctx<'_>| (), 1, args![inp(part)]).unwrap(),
            }
            std::thread::sleep(std::time::Duration::from_micros(random.u64(0..2000)));
        }
        done.store(true, Relaxed);
        assert!(walks.join().unwrap() > 5);
    });
    assert!(mirror.notifier().told(Reason::Migrate { to: None }) > 0);
    assert!(dev.stats().pages_to_cpu > 0 && dev.stats().bytes_to_device > 0);
}

/// The device counts in each page, by writes in place; pages migrate, move away and come back, and are protected meanwhile. No count is lost.
fn writes_while_mappings_change() {
    const LEN: usize = 24;
    let (hmm, dev) = device(16);
    let mut random = fastrand::Rng::with_seed(3);
    let memory = Pages::new(LEN * PAGE);
    let aside = Pages::new((LEN + 2) * PAGE); // as above
    let mirror = hmm.mirror(range(&memory), Summer::new(range(&memory))).unwrap();
    let start = memory.start() as usize;
    let end = Instant::now() + seconds(5);
    let done = AtomicBool::new(false);
    let mut counts = vec![];
    std::thread::scope(|scope| {
        let (mirror, done) = (&mirror, &done);
        let device = scope.spawn(move || {
            let mut counts = [0u64; LEN];
            let mut random = fastrand::Rng::with_seed(4);
            while !done.load(Relaxed) {
                let page = random.usize(0..LEN);
                let at = start + page * PAGE + 2040;
                // SAFETY: the device alone uses these bytes; others move and protect the page, which the call bears.
                while unsafe { mirror.write(at, &(counts[page] + 1).to_ne_bytes()) }.is_err() {
                    if let Ok(pages) = mirror.range_fault(start + page * PAGE..start + (page + 1) * PAGE, &Request::write(), SECOND) {
                        mirror.enter(&pages);
                    }
                }
                counts[page] += 1;
            }
            counts
        });
        while Instant::now() < end {
            let (from, pages) = (random.usize(0..LEN), random.usize(1..LEN));
            let (at, len) = (start + from * PAGE, pages.min(LEN - from) * PAGE);
            // SAFETY: pages of the test's own, which only the device uses besides, by copies that bear all of this.
            unsafe {
                match random.u32(0..5) {
                    0 => dev.prefetch_range(at, len).unwrap(),
                    1 => {
                        let part = std::slice::from_raw_parts(at as *const u8, len);
                        dev.run(&|_: &uhmm::Ctx<'_>| (), 1, args![inp(part)]).unwrap();
                    }
                    2 => {
                        // Page by page: one call moves one mapping only.
                        for page in from..from + len / PAGE {
                            memory.move_to(page * PAGE, PAGE, aside.at((page + 1) * PAGE));
                        }
                        for page in from..from + len / PAGE {
                            aside.move_to((page + 1) * PAGE, PAGE, memory.at(page * PAGE));
                        }
                    }
                    3 => {
                        change::protect(at, len, change::Prot::Read).unwrap();
                        change::protect(at, len, change::Prot::ReadWrite).unwrap();
                    }
                    _ => {
                        assert_eq!(libc::mprotect(at as *mut _, len, libc::PROT_NONE), 0);
                        assert_eq!(libc::mprotect(at as *mut _, len, libc::PROT_READ | libc::PROT_WRITE), 0);
                    }
                }
            }
            std::thread::sleep(std::time::Duration::from_micros(random.u64(0..1000)));
        }
        done.store(true, Relaxed);
        counts = device.join().unwrap().to_vec();
    });
    assert!(counts.iter().sum::<u64>() > 1000, "{counts:?}");
    let words = memory.atomics::<std::sync::atomic::AtomicU64>();
    for (page, count) in counts.iter().enumerate() {
        assert_eq!(words[(page * PAGE + 2040) / 8].load(SeqCst), *count, "page {page}");
    }
    assert!(mirror.notifier().told(Reason::Migrate { to: None }) > 0);
}

/// The kernel announces that it will drop pages, and drops them a while later. A look in between that found them, and nothing told of after it, would be taken for true
/// when they have gone.
fn what_is_being_dropped_is_not_looked_at() {
    const LEN: usize = 8 << 20;
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(LEN);
    let mirror = hmm.mirror(range(&memory), Summer::new(range(&memory))).unwrap();
    let bytes = memory.atomics::<std::sync::atomic::AtomicU8>();
    let all = range(&memory);
    let last = all.end - PAGE;
    let end = Instant::now() + seconds(5);
    let (turn, dropped) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut random = fastrand::Rng::with_seed(6);
    std::thread::scope(|scope| {
        let (mirror, turn, dropped) = (&mirror, &turn, &dropped);
        scope.spawn(move || {
            for number in 1.. {
                bytes.iter().step_by(PAGE).for_each(|byte| byte.store(1, Relaxed));
                mirror.snapshot(all.clone(), SECOND).unwrap(); // all of it is watched
                turn.store(number, SeqCst);
                // SAFETY: pages of the test's own.
                assert_eq!(unsafe { libc::madvise(all.start as *mut _, LEN, libc::MADV_DONTNEED) }, 0);
                dropped.store(number, SeqCst);
                while turn.load(SeqCst) == number {
                    std::thread::yield_now();
                }
                if turn.load(SeqCst) == usize::MAX {
                    return;
                }
            }
        });
        for number in 1.. {
            while turn.load(SeqCst) != number {
                std::hint::spin_loop();
            }
            let wait = random.u64(0..600);
            let from = Instant::now();
            while from.elapsed().as_micros() < u128::from(wait) {
                std::hint::spin_loop();
            }
            let looked = mirror.snapshot(last..last + PAGE, SECOND).unwrap();
            while dropped.load(SeqCst) != number {
                std::hint::spin_loop();
            }
            let wrong = looked.entries[0].may_read() && !mirror.read_retry(looked.seq);
            let over = wrong || Instant::now() > end;
            turn.store(if over { usize::MAX } else { 0 }, SeqCst);
            assert!(!wrong, "drop {number}: the page was looked at, it has gone, and nothing was told of that");
            if over {
                return;
            }
        }
    });
}
