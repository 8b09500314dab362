//! Everything that a busy process owns moves to the device, over and over, while it runs: heap, statics, and the stacks of all threads.
//!
//! What may stay is listed here a second time, from the kernel's point of view, and a round on the parked process fails if anything else did.

use crate::actors;
use crate::harness::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

crate::tests![everything_moves_while_the_process_runs, a_robust_mutex_stays_where_its_owner_can_die];

const PAGE: usize = 4096;

/// What the threads and the mover share: in shared memory, which does not move, so that waiting in it and counting in it touches nothing that does.
pub struct Shared {
    /// Not 0: threads park.
    pub park: AtomicU32,
    pub parked: AtomicU32,
    /// Not 0: threads end.
    pub stop: AtomicU32,
    /// Not 0: this thread rests.
    resting: [AtomicU32; 32],
    /// Rounds of each thread.
    pub beats: [AtomicU32; 32],
    /// The word that the kernel clears at the end of a raw clone's thread: nothing tells where it is, so it must lie where nothing moves.
    pub raw: AtomicU32,
    ranges: [(usize, usize); 8192],
    entries: [u64; 512],
}

impl Shared {
    fn new() -> &'static mut Shared {
        let memory = shared(size_of::<Shared>());
        // SAFETY: it stays, and is nobody else's; zeroes are such a structure.
        unsafe { &mut *memory.as_mut_ptr().cast() }
    }

    /// Where threads wait between rounds while the mover wants quiet: in the kernel, touching nothing.
    pub fn rest(&self, actor: usize) -> bool {
        self.beats[actor].fetch_add(1, Ordering::Relaxed);
        if self.park.load(Ordering::Acquire) != 0 {
            self.parked.fetch_add(1, Ordering::AcqRel);
            self.resting[actor].store(1, Ordering::Release);
            while self.park.load(Ordering::Acquire) != 0 {
                // SAFETY: the word is there; no time is given.
                unsafe { libc::syscall(libc::SYS_futex, &raw const self.park, libc::FUTEX_WAIT, 1, 0) };
            }
            self.resting[actor].store(0, Ordering::Release);
            self.parked.fetch_sub(1, Ordering::AcqRel);
        }
        self.stop.load(Ordering::Acquire) == 0
    }

    fn quiet(&self, threads: usize) {
        self.park.store(1, Ordering::Release);
        let end = Instant::now() + Duration::from_secs(60);
        while self.parked.load(Ordering::Acquire) as usize != threads || !all_wait() {
            if Instant::now() > end {
                let busy = |&actor: &usize| self.resting[actor].load(Ordering::Acquire) == 0;
                let busy: Vec<_> = (0..threads).filter(busy).map(|actor| actors::NAMES[actor]).collect();
                panic!("threads do not come to rest: {busy:?}\n{}", states());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn go_on(&self) {
        self.park.store(0, Ordering::Release);
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_futex, &raw const self.park, libc::FUTEX_WAKE, i32::MAX) };
    }

    fn counts(&self, threads: usize) -> Vec<u32> {
        self.beats[..threads].iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

fn tasks() -> Vec<i32> {
    std::fs::read_dir("/proc/self/task").unwrap().filter_map(|task| task.unwrap().file_name().to_str()?.parse().ok()).collect()
}

/// What each thread waits for in the kernel.
fn states() -> String {
    let read = |tid: i32, file: &str| std::fs::read_to_string(format!("/proc/self/task/{tid}/{file}")).unwrap_or_default();
    let line = |tid| format!("{tid} {} {} {}", read(tid, "comm").trim(), read(tid, "wchan"), read(tid, "syscall"));
    tasks().into_iter().map(line).collect()
}

/// Whether every other thread of the program waits in the kernel.
fn all_wait() -> bool {
    let own = gettid();
    tasks().into_iter().filter(|&tid| tid != own).all(|tid| {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")) else { return false };
        let rest = &stat[stat.rfind(')').unwrap()..];
        stat.contains("(uhmm-") || rest.starts_with(") S")
    })
}

/// A line of /proc/self/maps that the rule does not exclude as a whole: private anonymous writable memory that is not uhmm's.
fn movable(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_whitespace();
    let (range, access, _, device, inode) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let anonymous = device == "00:00" && inode == "0" && !matches!(fields.next(), Some("[vvar]" | "[vdso]" | "[vsyscall]"));
    // Bits 46 to 44: a program's are 000, 101 and 111; uhmm's own memory and windows lie elsewhere.
    (anonymous && access.starts_with("rw") && access.ends_with('p') && matches!(start >> 44 & 7, 0b000 | 0b101 | 0b111))
        .then_some((start, end))
}

/// Lists what is to move, in shared memory.
fn list(shared: &mut Shared) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut count = 0;
    for range in maps.lines().filter_map(movable) {
        shared.ranges[count] = range;
        count += 1;
    }
    count
}

/// Pages that may stay, each with its reason. To be asked while the threads rest.
fn excluded() -> BTreeMap<usize, &'static str> {
    let mut pages = BTreeMap::new();
    let mut add = |start: usize, end: usize, why| pages.extend((start & !(PAGE - 1)..end).step_by(PAGE).map(|page| (page, why)));
    for tid in tasks() {
        let (mut head, mut len) = (0usize, 0usize);
        // SAFETY: two numbers of our own.
        if unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) } != 0 || head == 0 {
            continue;
        }
        // struct pthread of glibc: the head lies 736 bytes from its start, the rseq area near its end.
        add(head - 736, head + 1632, "a thread's control block");
        if head >> 44 & 7 == 0b010 {
            continue; // a thread of uhmm's
        }
        // SAFETY: words of the list of a thread that rests, and so changes nothing there.
        let word = |at: usize| unsafe { (at as *const usize).read_volatile() };
        let mut entry = word(head);
        while entry != head {
            add(entry, entry + 8, "a robust mutex");
            add(entry.wrapping_add(word(head + 8)), entry.wrapping_add(word(head + 8)) + 4, "a robust mutex");
            entry = word(entry) & !1;
        }
    }
    // glibc's zero statics follow its file's last mapping.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !(line.contains(" rw-p ") && line.ends_with("/libc.so.6")));
    let (start, end) = lines.nth(1).and_then(movable).expect("the C library's statics");
    add(start, end, "the C library");
    add(actors::locked_page(), actors::locked_page() + PAGE, "locked memory");
    pages
}

/// Moves everything listed, and notes into `ranges` what is still there, as pages. Uses no memory but its stack and what is shared.
#[inline(never)]
fn move_all(dev: &uhmm::Device, shared: &mut Shared, count: usize, pagemap: i32) -> (usize, usize) {
    for &(start, end) in &shared.ranges[..count] {
        match dev.prefetch_range(start, end - start) {
            Ok(()) | Err(uhmm::Error::NoRoom { .. }) => {}
            Err(error) => panic!("{start:x}-{end:x}: {error}"),
        }
    }
    let (mut moved, mut left) = (0, 0);
    for index in 0..count {
        let (start, end) = shared.ranges[index];
        let mut at = start;
        while at < end {
            let pages = ((end - at) / PAGE).min(shared.entries.len());
            let buffer = shared.entries.as_mut_ptr();
            // SAFETY: so many entries at most has the buffer.
            let read = unsafe { libc::pread(pagemap, buffer.cast(), pages * 8, (at / PAGE * 8) as i64) };
            assert_eq!(read, pages as isize * 8);
            for page in 0..pages {
                let present = shared.entries[page] >> 62 != 0;
                moved += usize::from(!present);
                if present {
                    // Behind the list, which is not needed any more up to here: there may be more pages than ranges.
                    let last = shared.ranges.len() - 1;
                    shared.ranges[(count + left).min(last)] = (at + page * PAGE, index);
                    left += 1;
                }
            }
            at += pages * PAGE;
        }
    }
    (moved, left)
}

/// A round on the process while all its threads rest: everything moves but what has a reason.
fn exact_round(dev: &uhmm::Device, shared: &mut Shared, pagemap: i32) {
    let reasons = excluded();
    let count = list(shared);
    let stack = &raw const count as usize;
    let (moved, left) = move_all(dev, shared, count, pagemap);
    let left = &shared.ranges[count..(count + left).min(shared.ranges.len())];
    // The mover itself runs: its stack comes home, with what comes along by a touch (64 KiB).
    let own = |page: usize| page.abs_diff(stack) < 128 << 10;
    let unexplained: Vec<_> = left.iter().filter(|(page, _)| !reasons.contains_key(page) && !own(*page)).collect();
    if !unexplained.is_empty() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let pages: Vec<String> = unexplained.iter().take(20).map(|(page, _)| format!("{page:x}")).collect();
        panic!("{} pages stayed for no reason, {moved} moved: {pages:?}\n{maps}", unexplained.len());
    }
    let stayed = |why| left.iter().filter(|(page, _)| reasons.get(page) == Some(&why)).count();
    assert!(moved > 2000, "{moved} pages moved");
    assert!(stayed("a thread's control block") >= actors::COUNT, "control blocks stay");
    assert!(stayed("a robust mutex") >= 1, "a mutex that a resting thread holds stays");
    assert_eq!(stayed("locked memory"), 1);
}

fn everything_moves_while_the_process_runs() {
    let (_hmm, dev) = device(512);
    let shared = Shared::new();
    let at = &raw mut *shared as usize;
    // SAFETY: it stays. The threads use its atomics only, the mover alone the rest.
    let threads = actors::start(unsafe { &*(at as *const Shared) });
    let file = std::fs::File::open("/proc/self/pagemap").unwrap();
    let pagemap = std::os::fd::AsRawFd::as_raw_fd(&file);
    let end = Instant::now() + seconds(30);
    let mut last = (Instant::now(), shared.counts(threads.len()));
    let mut rounds = 0;
    while Instant::now() < end {
        rounds += 1;
        if rounds % 8 == 1 {
            shared.quiet(threads.len());
            exact_round(&dev, shared, pagemap);
            shared.go_on();
        } else {
            let count = list(shared);
            move_all(&dev, shared, count, pagemap);
        }
        let dead = threads.iter().position(|thread| thread.is_finished());
        assert_eq!(dead, None, "a thread has failed");
        if last.0.elapsed() > Duration::from_secs(25) {
            let now = shared.counts(threads.len());
            let stuck: Vec<_> = (0..now.len()).filter(|&actor| now[actor] == last.1[actor]).map(|actor| actors::NAMES[actor]).collect();
            assert!(stuck.is_empty(), "threads hang: {stuck:?}");
            last = (Instant::now(), now);
        }
    }
    shared.quiet(threads.len());
    exact_round(&dev, shared, pagemap);
    shared.stop.store(1, Ordering::Release);
    shared.go_on();
    let counts = shared.counts(threads.len());
    for (thread, name) in threads.into_iter().zip(actors::NAMES) {
        assert!(thread.join().is_ok(), "{name}");
    }
    println!("{rounds} rounds, of {:?}: {counts:?}, {:?}", actors::NAMES, dev.stats());
    assert!(counts.iter().all(|&count| count > 3), "{counts:?}");
    let moved = dev.stats().pages_to_device;
    assert!(rounds > 2 && moved > 20_000, "{rounds} rounds, {moved} pages");
}

/// The word of a robust mutex lay on a device when the thread that held it died: the kernel could not mark it (an exiting task takes no userfault), and the
/// next to lock it waited for ever.
fn a_robust_mutex_stays_where_its_owner_can_die() {
    let (_hmm, dev) = device(64);
    let mut pages = Pages::new(64 * PAGE);
    let data = pages.slice::<u8>();
    data.fill(7);
    // On page 20, among others.
    let at = data.as_ptr() as usize + 20 * PAGE + 1000;
    // SAFETY: inside `pages`, which outlive it; nothing but the mutex uses these bytes.
    let mutex = unsafe { actors::Robust::new_at(at) };
    let step = |number: usize, data: &[u8]| match number {
        0 => dev.prefetch_range(data.as_ptr() as usize, data.len()).unwrap(),
        // A launch's large argument whose edge page holds the mutex too: read, and written.
        1 => dev.run(&|_: &uhmm::Ctx<'_>| (), 1, uhmm::args![uhmm::inp(&data[20 * PAGE + 2000..])]).unwrap(),
        _ => {
            // SAFETY: behind the mutex, inside `pages`; of `data` nothing is used meanwhile.
            let rest = unsafe { std::slice::from_raw_parts_mut((at + 1000) as *mut u8, 43 * PAGE) };
            dev.run(&|_: &uhmm::Ctx<'_>| (), 1, uhmm::args![uhmm::inout(rest)]).unwrap()
        }
    };
    for number in 0..3 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(mutex.lock(), 0, "step {number}");
                if number == 1 {
                    std::hint::black_box(data[21 * PAGE]); // a touch brings its surroundings home, but an event can cut that short
                }
                step(number, data);
                assert!(present(at as *const u8));
                assert_eq!(number == 1, present(&raw const data[21 * PAGE]), "step {number}: its neighbour has moved");
            });
        });
        assert_eq!(mutex.lock(), libc::EOWNERDEAD, "step {number}");
        mutex.made_consistent();
        // Not held, it moves like everything else, once the kernel has forgotten the thread that died.
        let end = Instant::now() + Duration::from_secs(10);
        while present(at as *const u8) {
            assert!(Instant::now() < end, "step {number}");
            dev.prefetch_range(data.as_ptr() as usize, data.len()).unwrap();
        }
    }
    assert_eq!(data[5], 7);
}
