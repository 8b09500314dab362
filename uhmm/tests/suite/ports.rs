//! Ports: what a device does with the process through a page table of its own, in the kernel's words.

use crate::harness::*;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use uhmm_core::port::{Owner, Place, Port, PortError, Sight, Station};
use uhmm_core::{DeviceConfig, port};

crate::tests![
    reads_go_through_entries,
    writes_break_what_they_must,
    pages_leave_and_look_swapped,
    pages_of_one_block_lie_on_several_devices,
    a_block_moves_as_one,
    a_touch_brings_a_block_home_as_one,
    coherent_pages_are_used_in_place,
    remapped_pages_stay_on_the_device,
    written_pages_of_a_private_file_mapping_migrate_in_name,
    holes_migrate_and_their_neighbours_stay_holes,
    two_forks_and_an_exclusive_page,
    copy_on_write_takes_the_tag_off,
    pages_that_the_kernel_moves_stay_the_devices,
    freed_pages_can_be_touched,
    exclusive_pages_are_revoked_by_any_touch,
    read_only_pages_migrate_and_stay_read_only,
    nobody_writes_read_only_pages_while_they_move,
];

const PAGE: usize = 4096;

fn station() -> Station {
    Station::open(DeviceConfig { memory: 64 << 20, threads: 1, ..DeviceConfig::new("ports") }, uhmm_soft::open).unwrap()
}

fn private(number: u8) -> Owner {
    Owner { number, coherent: false }
}

/// Pages with a number in each byte.
fn filled(pages: usize) -> Pages {
    let mut memory = Pages::new(pages * PAGE);
    memory.slice::<u8>().chunks_mut(PAGE).enumerate().for_each(|(page, bytes)| bytes.fill((page as u8).wrapping_add(1)));
    memory
}

fn is_filled(bytes: &[u8]) -> bool {
    bytes.chunks(PAGE).enumerate().all(|(page, bytes)| bytes.iter().all(|&byte| byte == (page as u8).wrapping_add(1)))
}

fn sights(port: &Port, start: usize, pages: usize) -> Vec<Sight> {
    let mut found = vec![Sight::default(); pages];
    port.snapshot(start, &mut found).unwrap();
    found
}

/// Whether the page is present, and swapped, as /proc/self/pagemap says.
fn look(at: usize) -> (bool, bool) {
    let file = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut word = [0; 8];
    file.read_exact_at(&mut word, (at / PAGE * 8) as u64).unwrap();
    let word = u64::from_ne_bytes(word);
    (word >> 63 & 1 != 0, word >> 62 & 1 != 0)
}

fn reads_go_through_entries() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let memory = filled(8);
    let mut out = vec![0; 8 * PAGE];
    assert_eq!(port.read(memory.start() as usize, &mut out), Ok(1));
    assert!(is_filled(&out));
    out.fill(0);
    assert_eq!(port.read(memory.start() as usize, &mut out), Ok(0));
    assert!(is_filled(&out));
    let start = memory.start() as usize;
    assert!(look(start).0, "reading migrates nothing");
    drop(memory);
    assert_eq!(port.read(start, &mut out), Err(PortError::Fault { address: start }));
    // Nothing tells that another page takes the zero page's place; the entry is of that one.
    let mut fresh = Pages::new(PAGE);
    let start = fresh.start() as usize;
    assert_eq!(port.read(start, &mut out[..PAGE]), Ok(1));
    fresh.slice::<u8>().fill(6);
    if frame(fresh.start()) != 0 {
        assert_eq!(port.read(start, &mut out[..PAGE]), Ok(1));
    }
    assert_eq!(port.read(start, &mut out[..PAGE]), Ok(0));
    assert!(out[..PAGE].iter().all(|&byte| byte == 6));
}

fn writes_break_what_they_must() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let mut memory = Pages::new(4 * PAGE);
    let start = memory.start() as usize;
    let mut out = vec![1; 4 * PAGE];
    assert_eq!(port.read(start, &mut out), Ok(1));
    assert!(out.iter().all(|&byte| byte == 0));
    assert!(sights(&port, start, 4).iter().all(|sight| sight.zero && sight.read && !sight.write));
    // SAFETY: memory of the test's own.
    assert_eq!(unsafe { port.write(start, &[7; 4 * PAGE]) }, Ok(1));
    // SAFETY: as above.
    assert_eq!(unsafe { port.write(start, &[8; 4 * PAGE]) }, Ok(0));
    assert!(memory.slice::<u8>().iter().all(|&byte| byte == 8));
    assert!(sights(&port, start, 4).iter().all(|sight| !sight.zero && sight.write && sight.place == Place::System));
}

fn pages_leave_and_look_swapped() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let mut memory = filled(16);
    let start = memory.start() as usize;
    let mut out = vec![0; 16 * PAGE];
    port.migrate_to_device(start, &mut out).unwrap();
    assert!(is_filled(&out));
    assert!((0..16).all(|page| look(start + page * PAGE) == (false, true)));
    assert!(sights(&port, start, 16).iter().all(|sight| sight.place == Place::Private && sight.write));
    out.fill(0);
    assert_eq!(port.read(start, &mut out), Ok(0));
    assert!(is_filled(&out) && look(start) == (false, true));
    // SAFETY: memory of the test's own.
    assert_eq!(unsafe { port.write(start, &out) }, Ok(0));
    assert_eq!(port.migrate_to_system(start..start + 8 * PAGE), Ok(8));
    assert_eq!(port.migrate_to_system(start..start + 8 * PAGE), Ok(0));
    assert!((0..16).all(|page| look(start + page * PAGE) == (page < 8, page >= 8)));
    assert!(is_filled(memory.slice::<u8>()));
    assert!((0..16).all(|page| look(start + page * PAGE) == (true, false)));
    assert_eq!(port.read(start, &mut out), Ok(1));
    port.migrate_to_device(start, &mut out).unwrap();
    assert!(is_filled(&out));
    station.release(2);
    assert_eq!(look(start), (false, true));
    station.release(1);
    assert_eq!(look(start), (true, false));
}

fn pages_of_one_block_lie_on_several_devices() {
    let station = station();
    let ports = [1, 2].map(|number| station.port(private(number)).unwrap());
    let mut memory = filled(8);
    let start = memory.start() as usize;
    let mut out = vec![0; 4 * PAGE];
    ports[0].migrate_to_device(start, &mut out).unwrap();
    ports[1].migrate_to_device(start + 4 * PAGE, &mut out).unwrap();
    for (number, port) in ports.iter().enumerate() {
        for (page, sight) in sights(port, start, 8).iter().enumerate() {
            let own = (page < 4) == (number == 0);
            assert_eq!((sight.place == Place::Private, sight.read), (own, own), "page {page} for device {number}");
        }
    }
    // What another device has does not move, and has no entry.
    assert_eq!(ports[1].migrate_to_device(start, &mut out), Err(PortError::Missing { address: start }));
    assert_eq!(look(start), (false, true));
    // Reading it brings it home.
    assert_eq!(ports[1].read(start, &mut out), Ok(1));
    assert!(is_filled(&out));
    assert_eq!(look(start), (true, false));
    assert_eq!(look(start + 4 * PAGE), (false, true));
    assert!(is_filled(memory.slice::<u8>()));
}

fn a_block_moves_as_one() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let mut memory = Pages::huge(2 << 20);
    memory.slice::<u8>().chunks_mut(PAGE).enumerate().for_each(|(page, bytes)| bytes.fill((page as u8).wrapping_add(1)));
    let start = memory.start() as usize;
    assert!(sights(&port, start, 512).iter().all(|sight| sight.huge && sight.write));
    let mut out = vec![0; 2 << 20];
    port.migrate_to_device(start, &mut out).unwrap();
    assert!(is_filled(&out));
    assert!(sights(&port, start, 512).iter().all(|sight| sight.huge && sight.place == Place::Private));
    assert_eq!(port.migrate_to_system(start..start + (2 << 20)), Ok(1));
    assert!(sights(&port, start, 512).iter().all(|sight| sight.huge && sight.place == Place::System), "it came home as one");
    // The large allocation fails: the pages move one by one.
    port.fail_allocation(true);
    out.fill(0);
    port.migrate_to_device(start, &mut out).unwrap();
    assert!(is_filled(&out));
    assert!(sights(&port, start, 512).iter().all(|sight| !sight.huge && sight.place == Place::Private));
    assert_eq!(port.migrate_to_system(start..start + (2 << 20)), Ok(512));
    port.fail_allocation(true);
    assert_eq!(port.migrate_to_device(start, &mut out[..2 * PAGE]), Err(PortError::Missing { address: start }));
    assert_eq!([0, 1].map(|page| look(start + page * PAGE).0), [true, false]);
    assert!(is_filled(memory.slice::<u8>()));
}

/// The page table that holds the marks of pages that are away would split the huge page that comes back. A touch that is on its way just when the table goes can make another one, and the page comes in
/// parts: one turn in a thousand, on a machine that is busy.
fn a_touch_brings_a_block_home_as_one() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let fill = |bytes: &mut [u8]| bytes.chunks_mut(PAGE).enumerate().for_each(|(page, bytes)| bytes.fill((page as u8).wrapping_add(1)));
    let filled = || {
        let mut memory = Pages::huge(2 << 20);
        fill(memory.slice());
        memory
    };
    let mut memory = filled();
    let mut start = memory.start() as usize;
    let mut out = vec![0; 2 << 20];
    let mut split = 0;
    for _turn in 0..20 {
        port.migrate_to_device(start, &mut out).unwrap();
        assert!(is_filled(&out) && look(start) == (false, true) && look(start + 511 * PAGE) == (false, true));
        std::thread::scope(|scope| {
            for page in [3usize, 200] {
                // SAFETY: inside the memory, which nobody writes.
                scope.spawn(move || unsafe { assert_eq!(((start + page * PAGE) as *const u8).read_volatile(), page as u8 + 1) });
            }
        });
        let seen = sights(&port, start, 512);
        assert!(seen.iter().all(|sight| sight.place == Place::System) || seen.iter().any(|sight| !sight.huge));
        assert!(is_filled(memory.slice::<u8>()));
        if seen.iter().any(|sight| !sight.huge) {
            split += 1;
            memory = filled();
            start = memory.start() as usize;
        }
    }
    assert!(split <= 2, "{split} of 20 turns");
    port.migrate_to_device(start, &mut out).unwrap();
    advise(memory.slice::<u8>(), libc::MADV_DONTNEED);
    assert!(memory.slice::<u8>().iter().all(|&byte| byte == 0), "the program's own drop is no one else's");
}

fn coherent_pages_are_used_in_place() {
    let station = station();
    let ports = [3, 4].map(|number| station.port(Owner { number, coherent: true }).unwrap());
    let mut memory = filled(4);
    let start = memory.start() as usize;
    let mut out = vec![0; 4 * PAGE];
    ports[0].migrate_to_device(start, &mut out).unwrap();
    assert!(is_filled(&out));
    assert_eq!(look(start), (true, false));
    assert!(sights(&ports[0], start, 4).iter().all(|sight| sight.place == Place::Coherent && sight.write));
    assert!(sights(&ports[1], start, 4).iter().all(|sight| sight.place == Place::OtherCoherent));
    memory.slice::<u8>()[0] = 99;
    assert_eq!(ports[0].read(start, &mut out), Ok(0));
    assert_eq!(out[0], 99);
    assert!(sights(&ports[0], start, 4).iter().all(|sight| sight.place == Place::Coherent));
    assert_eq!(ports[0].migrate_to_system(start..start + 4 * PAGE), Ok(4));
    assert!(sights(&ports[0], start, 4).iter().all(|sight| sight.place == Place::System));
    assert_eq!(memory.slice::<u8>()[0], 99);
}

/// mremap takes device pages along: whole blocks, and to places that break their alignment.
fn remapped_pages_stay_on_the_device() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let other = station.port(Owner { number: 3, coherent: true }).unwrap();
    const LEN: usize = 4 << 20;
    for shift in [0, 3 * PAGE, LEN / 2 - PAGE] {
        let mut memory = Pages::huge(LEN);
        memory.slice::<u8>().chunks_mut(PAGE).enumerate().for_each(|(page, bytes)| bytes.fill((page as u8).wrapping_add(1)));
        let start = memory.start() as usize;
        let mut out = vec![0; LEN];
        port.migrate_to_device(start, &mut out[..LEN / 2]).unwrap();
        port.migrate_to_device(start + LEN / 2, &mut out[..4 * PAGE]).unwrap();
        other.migrate_to_device(start + LEN - 4 * PAGE, &mut out[..4 * PAGE]).unwrap();
        let mut place = Pages::huge(2 * LEN);
        let to = place.start() as usize + shift;
        // SAFETY: memory of the test's own, which is not used at its old place any more.
        let moved = unsafe { libc::mremap(start as *mut _, LEN, LEN, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) };
        assert_eq!(moved as usize, to);
        let away = LEN / 2 / PAGE + 4;
        assert!((0..LEN / PAGE).all(|page| look(to + page * PAGE) == (page >= away, page < away)), "shift {shift}");
        let found = sights(&port, to, LEN / PAGE);
        assert!(found[..away].iter().all(|sight| sight.place == Place::Private && sight.write));
        assert!(found[LEN / PAGE - 4..].iter().all(|sight| sight.place == Place::OtherCoherent));
        out.fill(0);
        assert_eq!(port.read(to, &mut out), Ok(1));
        assert!(is_filled(&out) && look(to) == (false, true));
        assert!(is_filled(&place.slice::<u8>()[shift..][..LEN]));
        port.migrate_to_device(to, &mut out).unwrap();
        station.release(3);
        assert!(is_filled(&place.slice::<u8>()[shift..][..LEN]));
    }
}

fn written_pages_of_a_private_file_mapping_migrate_in_name() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let file = memfd();
    file.write_all_at(&[3; 4 * PAGE], 0).unwrap();
    let at = map(4 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, Some(&file));
    let start = at as usize;
    // SAFETY: memory of the test's own.
    let bytes = unsafe { core::slice::from_raw_parts_mut(at, 4 * PAGE) };
    bytes[..2 * PAGE].fill(4);
    assert_eq!(read(&bytes[2 * PAGE]), 3); // the page is there, and the file's
    let mut out = vec![0; 4 * PAGE];
    assert_eq!(
        port.migrate_to_device(start, &mut out),
        Err(PortError::Missing { address: start + 2 * PAGE }),
        "a page of the file does not move"
    );
    port.migrate_to_device(start, &mut out[..2 * PAGE]).unwrap();
    assert!(out[..2 * PAGE].iter().all(|&byte| byte == 4));
    let places = || sights(&port, start, 4).iter().map(|sight| sight.place).collect::<Vec<_>>();
    assert_eq!(places(), [Place::Private, Place::Private, Place::System, Place::System]);
    assert_eq!(port.migrate_to_system(start..start + 4 * PAGE), Ok(2));
    assert_eq!(places(), [Place::System; 4]);
}

fn holes_migrate_and_their_neighbours_stay_holes() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let memory = Pages::new(8 * PAGE);
    let start = memory.start() as usize;
    let mut out = vec![1; 2 * PAGE];
    // SAFETY: memory of the test's own, which nobody writes.
    let bytes = || unsafe { core::slice::from_raw_parts(start as *const u8, 8 * PAGE) };
    // SAFETY: as above.
    let protect = |access| unsafe { libc::mprotect(start as *mut _, 8 * PAGE, access) };
    assert_eq!(protect(libc::PROT_READ), 0);
    port.migrate_to_device(start, &mut out).unwrap();
    assert!(out.iter().all(|&byte| byte == 0));
    assert!((0..8).all(|page| look(start + page * PAGE) == (false, page < 2)));
    assert!(sights(&port, start, 8)[2..].iter().all(|sight| *sight == Sight::default()));
    assert_eq!(read(&bytes()[4 * PAGE]), 0);
    let found = sights(&port, start, 8);
    assert!(found[4].zero && found[3] == Sight::default() && found[5] == Sight::default());
    assert_eq!(read(&bytes()[0]), 0);
    assert_eq!(protect(libc::PROT_READ | libc::PROT_WRITE), 0);
}

/// Both processes see the contents as of the fork, and what was exclusive is nobody's.
fn two_forks_and_an_exclusive_page() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let mut memory = filled(4);
    let start = memory.start() as usize;
    let mut out = vec![0; 4 * PAGE];
    port.migrate_to_device(start, &mut out[..2 * PAGE]).unwrap();
    port.exclusive(start + 2 * PAGE, &mut out[..2 * PAGE]).unwrap();
    let bytes = memory.slice::<u8>();
    in_a_child(|| is_filled(bytes));
    assert!(!port.is_exclusive(start..start + 4 * PAGE));
    assert_eq!(port.read(start, &mut out), Ok(1), "they came home");
    assert!(is_filled(&out));
    assert_eq!(port.read(start, &mut out), Ok(0));
    in_a_child(|| is_filled(bytes));
    assert_eq!(port.read(start, &mut out), Ok(1), "a fork erases entries, of pages that stay where they are too");
    bytes[0] = 77;
    assert!(port.read(start, &mut out).unwrap() <= 1); // the child is gone: mostly it is still the same page
    assert_eq!(out[0], 77);
    port.migrate_to_device(start, &mut out).unwrap();
    assert_eq!((out[0], look(start)), (77, (false, true)));
}

/// A fork leaves coherent pages where they are. The first write by the parent makes a copy, which lies in the system's memory.
fn copy_on_write_takes_the_tag_off() {
    let station = station();
    let port = station.port(Owner { number: 3, coherent: true }).unwrap();
    let mut memory = filled(4);
    let start = memory.start() as usize;
    let mut out = vec![0; 4 * PAGE];
    port.migrate_to_device(start, &mut out).unwrap();
    assert!(sights(&port, start, 4).iter().all(|sight| sight.place == Place::Coherent));
    let [mut ours, mut theirs] = std::os::unix::net::UnixStream::pair().map(|(a, b)| [a, b]).unwrap();
    let bytes = memory.slice::<u8>();
    let child = fork(false, || std::io::Read::read_exact(&mut theirs, &mut [0]).is_ok() && is_filled(bytes));
    let places = || sights(&port, start, 4).iter().map(|sight| sight.place).collect::<Vec<_>>();
    assert_eq!(places(), [Place::Coherent; 4]);
    bytes[PAGE] = 99;
    assert_eq!(places(), [Place::Coherent, Place::System, Place::Coherent, Place::Coherent]);
    std::io::Write::write_all(&mut ours, &[0]).unwrap();
    assert_eq!(wait(child), 0, "the child sees what there was");
    assert_eq!(port.read(start, &mut out), Ok(1));
    assert_eq!(out[PAGE], 99);
    port.migrate_to_device(start, &mut out).unwrap();
    assert_eq!(places(), [Place::Coherent; 4], "the copy migrates as any page");
    assert_eq!(port.migrate_to_system(start..start + 4 * PAGE), Ok(4));
    assert_eq!(places(), [Place::System; 4]);
}

/// Where copy-on-write has put another page is told by its frame. But the kernel makes a huge page of small ones by itself, which has other frames as well: the pages counted as copied,
/// in every twenty-fifth run of a case that took long enough for khugepaged. Here it is asked to (MADV_COLLAPSE).
fn pages_that_the_kernel_moves_stay_the_devices() {
    let station = station();
    let port = station.port(Owner { number: 3, coherent: true }).unwrap();
    let mut memory = filled(1024);
    let block = (memory.start() as usize).next_multiple_of(512 * PAGE);
    let mut out = vec![0; 256 * PAGE];
    port.migrate_to_device(block, &mut out).unwrap();
    let coherent = || sights(&port, block, 256).iter().filter(|sight| sight.place == Place::Coherent).count();
    let before = crate::harness::frame(block as *const u8);
    for _ in 0..2 {
        // SAFETY: memory of the test's own.
        unsafe { libc::madvise(block as *mut _, 512 * PAGE, 25) }; // MADV_COLLAPSE
        if crate::harness::frame(block as *const u8) == before {
            eprintln!("the kernel has not made a huge page of them: only the rest is looked at");
        }
        assert_eq!(coherent(), 256);
        let bytes = memory.slice::<u8>();
        let child = fork(false, || is_filled(bytes));
        assert_eq!(wait(child), 0);
        assert_eq!(coherent(), 256, "the fork has told anew which frames they have");
    }
    assert!(is_filled(memory.slice::<u8>()));
    let byte = memory.slice::<u8>().len() / 2;
    memory.slice::<u8>()[byte] = 1;
    assert_eq!(port.migrate_to_system(block..block + 256 * PAGE), Ok(256));
}

/// MADV_FREE dropped what was away, and left the mark of it: who touched that page waited for ever.
fn freed_pages_can_be_touched() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let mut memory = filled(8);
    let start = memory.start() as usize;
    let mut out = vec![0; 8 * PAGE];
    port.migrate_to_device(start, &mut out).unwrap();
    advise(memory.slice::<u8>(), libc::MADV_FREE);
    let bytes = memory.slice::<u8>();
    assert!(bytes.iter().all(|&byte| byte == 0) || is_filled(bytes));
    port.migrate_to_device(start, &mut out).unwrap();
    advise(memory.slice::<u8>(), libc::MADV_FREE);
    port.migrate_to_device(start, &mut out).unwrap();
    let bytes = memory.slice::<u8>();
    bytes.fill(1);
    port.migrate_to_device(start, &mut out).unwrap();
    // Half of it moves behind the rest, within one block.
    // SAFETY: memory of the test's own.
    let to = unsafe { libc::mremap(start as *mut _, 4 * PAGE, 8 * PAGE, libc::MREMAP_MAYMOVE) } as usize;
    assert!((0..4).all(|page| look(to + page * PAGE) == (false, true)));
    assert_eq!(port.read(to, &mut out), Ok(1));
    assert!(out[..4 * PAGE].iter().all(|&byte| byte == 1) && out[4 * PAGE..].iter().all(|&byte| byte == 0));
    // SAFETY: as above, of which nobody uses a part any more.
    unsafe { libc::munmap(to as *mut _, 8 * PAGE) };
}

fn exclusive_pages_are_revoked_by_any_touch() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let mut memory = filled(4);
    let start = memory.start() as usize;
    let mut out = vec![0; 4 * PAGE];
    port.exclusive(start, &mut out).unwrap();
    assert!(is_filled(&out) && port.is_exclusive(start..start + 4 * PAGE));
    assert!(sights(&port, start, 4).iter().all(|sight| *sight == Sight::default()));
    assert_eq!(port.migrate_to_system(start..start + 4 * PAGE), Ok(0));
    assert_eq!(memory.slice::<u8>()[5], 1);
    assert!(!port.is_exclusive(start..start + PAGE) && port.is_exclusive(start..start + 2 * PAGE));
    memory.slice::<u8>()[PAGE] = 9;
    assert!(!port.is_exclusive(start..start + 2 * PAGE));
    // SAFETY: memory of the test's own; its protection stays what it is.
    unsafe {
        let _change = port::change(start + 2 * PAGE..start + 4 * PAGE);
        libc::mprotect((start + 2 * PAGE) as *mut _, 2 * PAGE, libc::PROT_READ);
    }
    assert!(!port.is_exclusive(start..start + 4 * PAGE));
    let mut huge = Pages::huge(2 << 20);
    huge.slice::<u8>().fill(5);
    let first = huge.start() as usize;
    port.exclusive(first, &mut vec![0; 2 << 20]).unwrap();
    assert_eq!(huge.slice::<u8>()[7 * PAGE], 5);
    let left = (0..512).filter(|page| port.is_exclusive(first + page * PAGE..first + (page + 1) * PAGE)).count();
    assert_eq!(left, 511, "a touch revokes one page");
    assert_eq!(port.exclusive(start, &mut out), Err(PortError::Fault { address: start + 2 * PAGE }));
}

/// What the mapping at an address allows, as /proc/self/maps has it.
fn access_of(at: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        (usize::from_str_radix(start, 16).unwrap()..usize::from_str_radix(end, 16).unwrap()).contains(&at)
    });
    line.unwrap().split(' ').nth(1).unwrap().to_owned()
}

/// A mapping that may not be written is made writable for the moment in which pages of it move. Nobody can write there then.
fn nobody_writes_read_only_pages_while_they_move() {
    let station = station();
    nobody_writes(&station.port(private(1)).unwrap());
    // A page that moves into a mapping arrives writable: with a coherent device two of three runs failed.
    nobody_writes(&station.port(Owner { number: 3, coherent: true }).unwrap());
}

fn nobody_writes(port: &Port) {
    let memory = filled(4);
    let start = memory.start() as usize;
    // SAFETY: memory of the test's own.
    assert_eq!(unsafe { libc::mprotect(start as *mut _, 4 * PAGE, libc::PROT_READ) }, 0);
    let over = AtomicBool::new(false);
    let mut out = vec![0; 4 * PAGE];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut wrong = [99u8; 4];
            let local = libc::iovec { iov_base: wrong.as_mut_ptr().cast(), iov_len: 4 };
            let mut tries = 0;
            while !over.load(Ordering::Relaxed) {
                let remote = libc::iovec { iov_base: (start + tries % 4 * PAGE) as *mut _, iov_len: 4 };
                // SAFETY: bytes of its own, to memory of the test's own, that the kernel does not let be written.
                let written = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
                assert_eq!((written, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
                tries += 1;
            }
            tries
        });
        let end = Instant::now() + seconds(2);
        while Instant::now() < end && !writer.is_finished() {
            match port.migrate_to_device(start, &mut out) {
                Ok(()) => assert!(is_filled(&out)),
                Err(error) => assert!(matches!(error, PortError::Missing { .. }), "{error}"), // the writer had it brought home
            }
            port.migrate_to_system(start..start + 4 * PAGE).unwrap();
        }
        over.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 100);
    });
    port.read(start, &mut out).unwrap();
    assert!(is_filled(&out));
}

fn read_only_pages_migrate_and_stay_read_only() {
    let station = station();
    let port = station.port(private(1)).unwrap();
    let memory = filled(4);
    let start = memory.start() as usize;
    let mut out = vec![0; 4 * PAGE];
    for access in [libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_EXEC] {
        // SAFETY: memory of the test's own.
        assert_eq!(unsafe { libc::mprotect(start as *mut _, 4 * PAGE, access) }, 0);
        port.migrate_to_device(start, &mut out).unwrap();
        assert!(is_filled(&out) && look(start) == (false, true));
        assert_eq!(port.migrate_to_system(start..start + 4 * PAGE), Ok(4));
        let write = if access & libc::PROT_WRITE != 0 { "w" } else { "-" };
        assert_eq!(access_of(start), format!("r{write}xp"), "the mapping allows what it allowed");
    }
    // SAFETY: memory of the test's own.
    assert_eq!(unsafe { libc::mprotect(start as *mut _, 4 * PAGE, libc::PROT_READ) }, 0);
    port.migrate_to_device(start, &mut out).unwrap();
    assert!(is_filled(&out) && look(start) == (false, true));
    assert!(sights(&port, start, 4).iter().all(|sight| sight.place == Place::Private && !sight.write));
    // SAFETY: as above.
    assert_eq!(unsafe { port.write(start, &out) }, Err(PortError::Denied { address: start }));
    assert_eq!(port.migrate_to_system(start..start + 2 * PAGE), Ok(2));
    // SAFETY: as above.
    let bytes = unsafe { core::slice::from_raw_parts(start as *const u8, 4 * PAGE) };
    assert!(is_filled(bytes));
}
