//! The page map: entries, scans, and the fallback over entries.

use crate::support::*;
use crate::{Needs, Test};
use uhmm_os::mem::Advice;
use uhmm_os::pagemap::*;
use uhmm_os::uffd::{Features, RegisterMode};
use uhmm_os::{BLOCK, Errno, PAGE};

pub(crate) const TESTS: &[Test] = &[
    Test("pagemap_entry", Needs::Nothing, entry),
    Test("pagemap_categories", Needs::Nothing, categories_of_pages),
    Test("pagemap_huge", Needs::Nothing, huge),
    Test("pagemap_goes_on_where_regions_ran_out", Needs::Nothing, goes_on),
    Test("pagemap_max_pages", Needs::Nothing, max_pages),
    Test("pagemap_knows_what_is_no_memory", Needs::Nothing, no_memory),
    Test("pagemap_fallback_agrees", Needs::Nothing, fallback_agrees),
    Test("pagemap_fallback_refuses_what_it_cannot_tell", Needs::Nothing, fallback_refuses),
    Test("pagemap_write_tracking", Needs::Uffd(Features::WP_ASYNC), write_tracking),
];

const LOOK: ScanArgs =
    ScanArgs { any_of: Category::PRESENT.union(Category::SWAPPED), return_mask: Category::all(), ..ScanArgs::all_of(Category::empty()) };

/// Range and categories of all that is in a range.
pub(crate) fn categories(start: usize, len: usize) -> Vec<(std::ops::Range<usize>, Category)> {
    let pagemap = Pagemap::open().unwrap();
    all_of(&pagemap, start, start + len, &LOOK, 64).0
}

/// A whole scan, with `room` regions a call, and the number of calls.
fn all_of(pagemap: &Pagemap, start: usize, end: usize, args: &ScanArgs, room: usize) -> (Vec<(std::ops::Range<usize>, Category)>, usize) {
    let (mut found, mut at, mut calls) = (vec![], start, 0);
    while at < end {
        let mut regions = vec![Region::EMPTY; room];
        let scan = pagemap.scan(at, end, args, &mut regions).unwrap();
        assert!(scan.walk_end > at && scan.walk_end <= end && scan.filled <= room, "{scan:?}");
        found.extend(regions[..scan.filled].iter().map(|r| (r.start..r.end, r.categories)));
        (at, calls) = (scan.walk_end, calls + 1);
    }
    (found, calls)
}

fn entry() {
    let memory = pages(2);
    poke(memory.start(), 1);
    let pagemap = Pagemap::open().unwrap();
    let here = pagemap.entry(memory.start() + 17).unwrap();
    assert!(here.present && here.exclusive && !here.swapped && !here.file_or_shared && !here.uffd_wp, "{here:?}");
    assert!(!pagemap.entry(memory.start() + PAGE).unwrap().present);
    let code = pagemap.entry(entry as *const () as usize).unwrap();
    assert!(code.present && code.file_or_shared, "{code:?}");
    assert_eq!(pagemap.entry(usize::MAX), Err(Errno::INVAL));
}

/// The kernel's clock pages are no memory, touched or not; all else is, there or not.
fn no_memory() {
    let pagemap = Pagemap::open().unwrap();
    let memory = pages(3);
    poke(memory.start() + PAGE, 1);
    assert!((0..3).all(|page| !pagemap.is_no_memory(memory.start() + page * PAGE + 5)));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let start = |name: &str| {
        let line = maps.lines().find(|line| line.ends_with(name))?;
        usize::from_str_radix(line.split('-').next()?, 16).ok()
    };
    let expected = pagemap.has_scan();
    assert!(start("[vvar]").is_none_or(|at| pagemap.is_no_memory(at) == expected));
    assert!(start("[vdso]").is_none_or(|at| !pagemap.is_no_memory(at)) && start("[stack]").is_none_or(|at| !pagemap.is_no_memory(at)));
    assert!(!Pagemap::open_entries_only().unwrap().is_no_memory(memory.start()));
}

/// Nothing, the zero page, a written page, a page of a file.
fn categories_of_pages() {
    let memory = pages(6);
    let at = memory.start();
    peek(at + PAGE);
    poke(at + 3 * PAGE, 1);
    poke(at + 4 * PAGE, 1);
    if Pagemap::open().unwrap().has_scan() {
        let found = categories(at, 6 * PAGE);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0].0, at + PAGE..at + 2 * PAGE);
        assert!(found[0].1.contains(Category::PRESENT | Category::PFNZERO), "{found:?}");
        assert_eq!(found[1].0, at + 3 * PAGE..at + 5 * PAGE);
        assert!(found[1].1.contains(Category::PRESENT | Category::WRITTEN), "{found:?}");
        let not = Category::PFNZERO | Category::HUGE | Category::FILE | Category::SWAPPED | Category::WPALLOWED;
        assert!(!found[1].1.intersects(not), "{found:?}");
    }
    let code = categories_of_pages as *const () as usize / PAGE * PAGE;
    assert!(categories(code, PAGE)[0].1.contains(Category::FILE | Category::PRESENT));
}

fn huge() {
    let memory = area(BLOCK);
    advise(&memory, Advice::Hugepage);
    poke(memory.start(), 1);
    let found = categories(memory.start(), BLOCK);
    assert_eq!(found.len(), 1, "{found:?}");
    // One page is all that a kernel without huge pages, or short of them, has brought.
    let whole = found[0].0 == (memory.start()..memory.end());
    assert_eq!(found[0].1.contains(Category::HUGE), whole && Pagemap::open().unwrap().has_scan(), "{found:?}");
    let small = pages(1);
    poke(small.start(), 1);
    assert!(!categories(small.start(), PAGE)[0].1.contains(Category::HUGE));
}

/// Every second page of 64.
fn striped() -> uhmm_os::mem::Mapping {
    let memory = pages(64);
    (0..64).step_by(2).for_each(|page| poke(memory.start() + page * PAGE, 1));
    memory
}

const PRESENT: ScanArgs = ScanArgs::all_of(Category::PRESENT);

fn goes_on() {
    let memory = striped();
    let expected: Vec<_> = (0..64).step_by(2).map(|p| memory.start() + p * PAGE).map(|at| at..at + PAGE).collect();
    for pagemap in [Pagemap::open().unwrap(), Pagemap::open_entries_only().unwrap()] {
        for room in [1, 5, 32, 64] {
            let (found, calls) = all_of(&pagemap, memory.start(), memory.end(), &PRESENT, room);
            assert_eq!(found.iter().map(|f| f.0.clone()).collect::<Vec<_>>(), expected);
            assert!(found.iter().all(|f| f.1 == Category::PRESENT));
            assert!(calls >= 32 / room && calls <= 32 / room + 1, "{calls} calls with room for {room}");
        }
    }
}

fn max_pages() {
    let memory = pages(64);
    fill(&memory);
    for pagemap in [Pagemap::open().unwrap(), Pagemap::open_entries_only().unwrap()] {
        let mut regions = [Region::EMPTY; 4];
        let args = ScanArgs { max_pages: 10, ..PRESENT };
        let scan = pagemap.scan(memory.start(), memory.end(), &args, &mut regions).unwrap();
        assert_eq!(scan, Scan { filled: 1, walk_end: memory.start() + 10 * PAGE });
        assert_eq!((regions[0].start, regions[0].end), (memory.start(), scan.walk_end));
    }
}

/// What entries tell is the same, however it is asked for.
fn fallback_agrees() {
    let pagemap = Pagemap::open().unwrap();
    if !pagemap.has_scan() {
        return; // there is nothing to compare with
    }
    let entries = Pagemap::open_entries_only().unwrap();
    assert!(!entries.has_scan());
    let memory = pages(1024);
    for page in 0..1024 {
        match page * 7 % 5 {
            0 => poke(memory.start() + page * PAGE, 1),
            1 => drop(peek(memory.start() + page * PAGE)),
            _ => {}
        }
    }
    let told = Category::PRESENT | Category::FILE | Category::SWAPPED | Category::WRITTEN;
    let any = ScanArgs { any_of: Category::PRESENT | Category::SWAPPED, return_mask: told, ..LOOK };
    let anonymous = Category::PRESENT | Category::FILE;
    let not_file = ScanArgs { inverted: Category::FILE, return_mask: told, ..ScanArgs::all_of(anonymous) };
    let code = fallback_agrees as *const () as usize / PAGE * PAGE;
    for (start, end) in [(memory.start(), memory.end()), (code, code + PAGE)] {
        for args in [any, PRESENT, not_file] {
            for room in [3, 4096] {
                let a = all_of(&pagemap, start, end, &args, room);
                let b = all_of(&entries, start, end, &args, room);
                assert!(a.0 == b.0, "{args:?}: {} and {} regions", a.0.len(), b.0.len());
            }
        }
    }
}

fn fallback_refuses() {
    let entries = Pagemap::open_entries_only().unwrap();
    let mut regions = [Region::EMPTY; 1];
    let flags = ScanArgs { flags: ScanFlags::WP_MATCHING, ..PRESENT };
    for args in [flags, ScanArgs::all_of(Category::HUGE), ScanArgs { any_of: Category::PFNZERO, ..PRESENT }] {
        assert_eq!(entries.scan(0, PAGE, &args, &mut regions), Err(Errno::OPNOTSUPP));
    }
    assert_eq!(entries.scan(1, PAGE, &PRESENT, &mut regions), Err(Errno::INVAL));
    assert_eq!(Pagemap::open().unwrap().scan(1, PAGE, &PRESENT, &mut regions), Err(Errno::INVAL));
}

/// Protect all that was written, write one page, find it.
fn write_tracking() {
    let (uffd, memory) = (open(Features::WP_ASYNC | Features::WP_UNPOPULATED), pages(16));
    fill(&memory);
    let pagemap = Pagemap::open().unwrap();
    let flags = ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC;
    let written = ScanArgs { flags, ..ScanArgs::all_of(Category::WRITTEN) };
    let mut regions = [Region::EMPTY; 8];
    let refused = pagemap.scan(memory.start(), memory.end(), &written, &mut regions);
    assert_eq!(refused, Err(Errno::PERM), "not registered yet");
    uffd.register(memory.start(), memory.len(), RegisterMode::WP).unwrap();
    let mut scan = || {
        let done = pagemap.scan(memory.start(), memory.end(), &written, &mut regions).unwrap();
        assert_eq!(done.walk_end, memory.end());
        regions[..done.filled].iter().map(|r| (r.start, r.end)).collect::<Vec<_>>()
    };
    assert_eq!(scan(), [(memory.start(), memory.end())]);
    assert_eq!(scan(), []);
    poke(memory.start() + 5 * PAGE, 1);
    let page = memory.start() + 5 * PAGE;
    assert_eq!(scan(), [(page, page + PAGE)]);
    assert!(categories(memory.start(), PAGE)[0].1.contains(Category::WPALLOWED));
    assert!(pagemap.entry(page).unwrap().uffd_wp);
}
