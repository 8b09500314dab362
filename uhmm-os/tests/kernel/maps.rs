//! Mappings: the ioctl, the text, and what is known of them must agree.

use crate::alone::{Alone, End};
use crate::support::*;
use crate::{Needs, Test};
use std::fs::read_to_string;
use std::os::fd::AsRawFd;
use uhmm_os::maps::{Maps, Vma, VmaKind};
use uhmm_os::mem::{Prot, mprotect};
use uhmm_os::{Errno, PAGE};

pub(crate) const TESTS: &[Test] = &[
    Test("maps_covering_or_next", Needs::Nothing, covering_or_next),
    Test("maps_kinds", Needs::Nothing, kinds),
    Test("maps_names", Needs::Nothing, names),
];

pub(crate) const ALONE: &[Alone] = &[Alone("maps_all_agree", Needs::Nothing, End::Well, all_agree)];

fn both() -> [Maps; 2] {
    [Maps::open().unwrap(), Maps::open_text_only().unwrap()]
}

fn covering_or_next() {
    let memory = pages(3);
    let hole = memory.start() + PAGE;
    // SAFETY: a page of the test's own.
    unsafe { mprotect(hole, PAGE, Prot::None) }.unwrap();
    for maps in both() {
        let vma = maps.covering(hole + 5).unwrap().unwrap();
        assert_eq!((vma.start, vma.end, vma.read, vma.write, vma.exec), (hole, hole + PAGE, false, false, false));
        assert!(vma.is_private_anonymous());
        let first = maps.find(0).unwrap().unwrap();
        assert!(first.start > 0 && maps.covering(0).unwrap().is_none());
        assert_eq!(maps.find(first.start - 1).unwrap(), Some(first));
        assert_eq!(maps.find((1 << 47) - 1).unwrap(), None);
        assert_eq!(maps.find(usize::MAX).unwrap(), None);
    }
}

static WRITABLE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);

fn kinds() {
    let memory = pages(1);
    let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let map = |flags: i32, fd: i32| {
        // SAFETY: a fresh mapping, left to the process.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        at as usize
    };
    let of_file = map(libc::MAP_PRIVATE, file.as_raw_fd());
    let shared = map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    // SAFETY: asks for the auxiliary vector's entry.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    for maps in both() {
        let kind = |at: usize| maps.covering(at).unwrap().map(|v| (v.kind, v.shared, v.is_private_anonymous()));
        assert_eq!(kind(memory.start()), Some((VmaKind::Anonymous, false, true)));
        assert_eq!(kind(of_file), Some((VmaKind::File, false, false)));
        assert_eq!(kind(shared), Some((VmaKind::File, true, false)));
        assert_eq!(kind(vdso), Some((VmaKind::Special, false, false)));
        assert_eq!(kind((&raw const WRITABLE) as usize), Some((VmaKind::File, false, false)));
    }
}

fn names() {
    let memory = pages(1);
    let code = names as *const () as usize;
    let exe = std::env::current_exe().unwrap();
    for maps in both() {
        let mut buffer = [0; 4096];
        assert_eq!(maps.name(code, &mut buffer).unwrap(), Some(exe.as_os_str().as_encoded_bytes()));
        assert_eq!(maps.name(code, &mut [0; 4]), Err(Errno::NAMETOOLONG));
        assert_eq!(maps.name(0, &mut buffer).unwrap(), None);
        let name = maps.name(memory.start(), &mut buffer).unwrap();
        assert!(name.is_none_or(|name| name.starts_with(b"[anon:uhmm")), "{name:?}");
    }
}

/// One line of the text, parsed by other means.
fn from_line(line: &str) -> (Vma, String) {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let hex = |s: &str| u64::from_str_radix(s, 16).unwrap();
    let (start, end) = words[0].split_once('-').unwrap();
    let (major, minor) = words[3].split_once(':').unwrap();
    let name = words[5..].join(" ");
    let has = |c| words[1].contains(c);
    let inode = words[4].parse().unwrap();
    let kind = match name.as_str() {
        "[heap]" => VmaKind::Heap,
        "[stack]" => VmaKind::Stack,
        n if n.is_empty() || n.starts_with("[anon:") => VmaKind::Anonymous,
        n if n.starts_with('[') => VmaKind::Special,
        _ => VmaKind::File,
    };
    let vma = Vma {
        start: hex(start) as usize,
        end: hex(end) as usize,
        read: has('r'),
        write: has('w'),
        exec: has('x'),
        shared: has('s'),
        offset: hex(words[2]),
        inode,
        dev: (hex(major) as u32, hex(minor) as u32),
        kind,
        page_size: uhmm_os::PAGE,
    };
    (vma, name)
}

/// Every line of /proc/self/maps, in a process with one thread, which maps nothing while it looks.
fn all_agree() {
    let many: Vec<_> = (0..200).map(|_| pages(3)).collect();
    for (i, memory) in many.iter().enumerate() {
        // SAFETY: memory of the test's own.
        unsafe { mprotect(memory.start() + PAGE, PAGE, if i % 2 == 0 { Prot::None } else { Prot::Read }) }.unwrap();
    }
    let maps = both();
    let (mut name, mut text, mut seen) = (vec![0; 4096], String::with_capacity(1 << 20), 0);
    text.push_str(&read_to_string("/proc/self/maps").unwrap());
    let mut kinds = Vec::with_capacity(1000);
    for line in text.lines() {
        let (expected, expected_name) = from_line(line);
        if expected.start > isize::MAX as usize {
            continue; // vsyscall
        }
        for (which, maps) in maps.iter().enumerate() {
            for at in [expected.start, (expected.start + expected.end) / 2, expected.end - 1] {
                let found = maps.covering(at).unwrap();
                // The heap, and what surrounds it, may grow from what this loop allocates.
                if !same(found, expected) {
                    panic!("{which}: {found:?}\nis not {line}");
                }
            }
            let found = maps.name(expected.start, &mut name).unwrap().unwrap_or(b"");
            assert_eq!(found, expected_name.as_bytes());
        }
        kinds.push(expected.kind);
        seen += 1;
    }
    assert!(seen > 400, "{seen} mappings");
    for kind in [VmaKind::Anonymous, VmaKind::File, VmaKind::Stack, VmaKind::Heap, VmaKind::Special] {
        assert!(kinds.contains(&kind), "{kind:?}");
    }
}

fn same(found: Option<Vma>, expected: Vma) -> bool {
    let growing = matches!(expected.kind, VmaKind::Heap | VmaKind::Stack);
    found == Some(expected) || growing && found.is_some_and(|f| f.kind == expected.kind && f.inode == 0 && f.write)
}
