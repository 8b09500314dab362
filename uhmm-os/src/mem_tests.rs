//! Mappings as the kernel shows them.

use super::*;
use std::fs::read_to_string;

fn reserve(name: &CStr, len: usize) -> Reserve<'_> {
    Reserve { hint: 0, len, align: PAGE, name, prot: Prot::ReadWrite, exact: false }
}

/// Address ranges that no other test uses, far from the program's own.
fn far(n: usize) -> usize {
    0x1000_0000_0000 + n * 0x100_0000_0000
}

/// The entry of /proc/self/smaps for the mapping that starts at `start`.
fn smaps(start: usize) -> Option<String> {
    let all = read_to_string("/proc/self/smaps").unwrap();
    let from = all.find(&format!("{start:x}-"))?;
    let end = all[from..].find("VmFlags").map(|at| from + at + all[from + at..].find('\n').unwrap())?;
    Some(all[from..end].to_owned())
}

#[test]
fn is_what_it_says() {
    let mapping = map(&Reserve { hint: far(2), ..reserve(c"uhmm-test-plain", 3 * PAGE + 1) }).unwrap();
    assert_eq!(mapping.len(), 4 * PAGE);
    // SAFETY: our own memory.
    unsafe { mapping.as_ptr().add(4 * PAGE - 1).write(7) };
    let text = smaps(mapping.start()).unwrap();
    assert!(text.starts_with(&format!("{:x}-{:x} rw-p", mapping.start(), mapping.end())), "{text}");
    let flags: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
    for flag in ["dc", "dd", "nr"] {
        // do not copy on fork, do not dump, no reserve
        assert!(flags.contains(&flag), "{flag} is not in {flags:?}");
    }
    assert_eq!(text.contains("[anon:uhmm-test-plain]"), kernel_has_names(&mapping), "{text}");
}

/// Whether this kernel has `CONFIG_ANON_VMA_NAME`.
fn kernel_has_names(mapping: &Mapping) -> bool {
    // SAFETY: a name changes no memory.
    unsafe { libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, mapping.start(), PAGE, c"uhmm-test-plain".as_ptr()) == 0 }
}

#[test]
fn goes_when_dropped_unless_given_up() {
    let mapping = map(&Reserve { hint: far(3), ..reserve(c"uhmm-test-drop", PAGE) }).unwrap();
    let (start, len) = mapping.into_raw();
    assert_eq!((start, len), (far(3), PAGE));
    assert!(smaps(start).is_some());
    // SAFETY: given up just now.
    drop(unsafe { Mapping::from_raw(start, len) });
    assert!(smaps(start).is_none());
}

/// Bytes of address space in use.
fn in_use() -> usize {
    let pages: usize = read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
    pages * PAGE
}

#[test]
fn aligned_anywhere() {
    let before = in_use();
    for align in [PAGE, 64 << 10, 2 << 20, 1 << 30] {
        let mapping = map(&Reserve { align, prot: Prot::None, ..reserve(c"uhmm-test-align", 3 * PAGE) }).unwrap();
        assert_eq!(mapping.start() % align, 0);
        let vma = crate::maps::Maps::open().unwrap().covering(mapping.start()).unwrap().unwrap();
        assert!(!vma.read && !vma.write && vma.end >= mapping.end(), "{vma:?}");
        // Nothing is left of the room it was cut from (the tests beside this one map a few MiB).
        assert!(in_use() < before + (512 << 20));
    }
}

#[test]
fn exact_or_not_at_all() {
    let want = Reserve { hint: far(0), exact: true, ..reserve(c"uhmm-test-exact", 2 * PAGE) };
    let mapping = map(&want).unwrap();
    assert_eq!(mapping.start(), far(0));
    assert_eq!(map(&want).unwrap_err(), Errno::EXIST);
    assert_eq!(map(&Reserve { hint: far(0) + PAGE, ..want }).unwrap_err(), Errno::EXIST);
    assert_eq!(map(&Reserve { hint: far(0) + 1, ..want }).unwrap_err(), Errno::INVAL);
}

#[test]
fn hint_then_upwards() {
    let want = Reserve { hint: far(1), align: 2 << 20, ..reserve(c"uhmm-test-hint", 2 << 20) };
    let first = map(&want).unwrap();
    let second = map(&want).unwrap();
    let third = map(&Reserve { hint: far(1) - PAGE, ..want }).unwrap();
    assert_eq!((first.start(), second.start(), third.start()), (far(1), far(1) + (1 << 30), far(1) + (2 << 30)));
}

#[test]
fn beyond_the_address_space_is_anywhere() {
    let mapping = map(&Reserve { hint: 1 << 60, ..reserve(c"uhmm-test-beyond", PAGE) }).unwrap();
    assert!(mapping.start() < 1 << 56);
}

#[test]
fn refuses_nonsense() {
    assert_eq!(map(&reserve(c"", 0)).unwrap_err(), Errno::INVAL);
    assert_eq!(map(&reserve(c"", usize::MAX)).unwrap_err(), Errno::INVAL);
    assert_eq!(map(&Reserve { align: 3 * PAGE, ..reserve(c"", PAGE) }).unwrap_err(), Errno::INVAL);
    assert_eq!(map(&reserve(c"", 1 << 62)).unwrap_err(), Errno::NOMEM);
}

#[test]
fn a_child_does_not_get_it() {
    let mapping = map(&reserve(c"uhmm-test-fork", PAGE)).unwrap();
    // SAFETY: our own memory.
    unsafe { mapping.as_ptr().write(1) };
    // SAFETY: the child makes one system call and ends.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let gone = madvise(mapping.start(), PAGE, Advice::PopulateRead) == Err(Errno::NOMEM);
            libc::_exit(if gone { 7 } else { 1 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert_eq!(libc::WEXITSTATUS(status), 7);
    }
}

#[test]
fn advice_and_protection() {
    let mapping = map(&reserve(c"uhmm-test-advice", 2 * PAGE)).unwrap();
    let (start, p) = (mapping.start(), mapping.as_ptr());
    // SAFETY: our own memory, accessed only while it is accessible.
    unsafe {
        p.write(9);
        madvise(start, 2 * PAGE, Advice::DontNeed).unwrap();
        assert_eq!(p.read(), 0);
        mprotect(start, PAGE, Prot::Read).unwrap();
        assert_eq!(p.read(), 0);
        assert!(smaps(start).unwrap().contains(" r--p "));
        mprotect(start, PAGE, Prot::ReadWrite).unwrap();
        p.write(1);
        assert_eq!(madvise(start + 1, PAGE, Advice::DontNeed), Err(Errno::INVAL));
    }
}

#[test]
fn remap_moves_pages() {
    let a = map(&reserve(c"uhmm-test-remap", 2 * PAGE)).unwrap();
    let b = map(&reserve(c"uhmm-test-remap", 2 * PAGE)).unwrap();
    // SAFETY: our own memory; the old place is not used again, but for what `DONTUNMAP` leaves.
    unsafe {
        a.as_ptr().write(42);
        let flags = RemapFlags::MAYMOVE | RemapFlags::FIXED | RemapFlags::DONTUNMAP;
        assert_eq!(mremap(a.start(), 2 * PAGE, 2 * PAGE, flags, b.start()), Ok(b.start()));
        assert_eq!((a.as_ptr().read(), b.as_ptr().read()), (0, 42));
        assert_eq!(mremap(b.start() + 1, PAGE, PAGE, RemapFlags::empty(), 0), Err(Errno::INVAL));
    }
}
