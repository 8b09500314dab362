//! One core a process, and nothing of it left when it ends.

use crate::harness::*;
use uhmm::{Ctx, Uhmm, args, inout};

crate::tests![
    two_users_share_one_core,
    nothing_remains,
    everything_comes_home_at_the_end,
    the_programs_own_sigbus_handler_is_kept,
    programs_started_meanwhile_are_not_disturbed,
    launches_from_many_threads,
    the_programs_descriptors_are_its_own,
];

fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut names: Vec<String> = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok()).collect();
    names.sort();
    names
}

fn descriptors() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut all = vec![];
    for task in tasks {
        for fd in std::fs::read_dir(task.unwrap().path().join("fd")).into_iter().flatten() {
            all.extend(std::fs::read_link(fd.unwrap().path()).map(|link| link.to_string_lossy().into_owned()));
        }
    }
    all.retain(|link| link.contains("userfaultfd") || link.contains("eventfd") || link.contains("pagemap"));
    all
}

fn two_users_share_one_core() {
    let first = Uhmm::new().unwrap();
    let alone = threads();
    let (second, dev) = std::thread::spawn(|| {
        let second = Uhmm::new().unwrap();
        let dev = second.device("soft").unwrap();
        (second, dev)
    })
    .join()
    .unwrap();
    assert_eq!(first.devices().len(), 1, "the other's device is seen");
    assert_eq!(threads().iter().filter(|name| name.starts_with("uhmm-monitor")).count(), 1);
    let same = first.device("soft").unwrap();
    let with = threads();
    assert!(with.len() > alone.len());
    let mut data = vec![1u32; 1_000_000];
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    same.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert_eq!(dev.stats(), same.stats());
    drop((first, dev));
    assert_eq!(data[0], 3);
    same.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    drop(second);
    assert_eq!(data[1], 4);
    assert_eq!(threads(), with, "the device's handle keeps the core");
}

fn nothing_remains() {
    let before = (threads(), descriptors());
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let fds_before = fds();
    for _ in 0..10 {
        let hmm = Uhmm::new().unwrap();
        let dev = hmm.soft("soft").memory(16 << 20).open().unwrap();
        let mut data: Vec<u32> = (0..1_000_000).collect();
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        dev.run(&|ctx: &Ctx<'_>| assert!(ctx.group() > 5), 6, args![inout(&mut data)]).unwrap_err();
        let _kept = dev.alloc::<u32>(5).unwrap();
        assert_eq!(data[7], 8);
        assert_ne!(descriptors(), before.1);
    }
    assert_eq!((threads(), descriptors()), before);
    assert_eq!(fds(), fds_before);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ours: Vec<&str> = maps.lines().filter(|line| line.contains("uhmm ") || line.contains("uhmm-") && line.contains("[anon")).collect();
    assert!(ours.is_empty(), "{ours:#?}");
    // Nothing lies at the addresses that only uhmm uses, and nothing is registered ("um": watched for missing pages).
    assert!(maps.lines().all(|line| !line.starts_with('2') && !line.starts_with('3')), "{maps}");
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    assert!(!smaps.lines().any(|line| line.starts_with("VmFlags") && (line.contains(" um") || line.contains(" uw"))));
}

fn everything_comes_home_at_the_end() {
    let mut data: Vec<u32> = (0..3_000_000).collect();
    {
        let (_hmm, dev) = device(64);
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        assert_eq!(pages_present(&data), 0);
    }
    assert!(pages_present(&data) > 2900);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
}

fn the_programs_own_sigbus_handler_is_kept() {
    static SEEN: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    extern "C" fn handler(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let at = unsafe { (*info).si_addr() } as usize & !4095;
        SEEN.store(at, std::sync::atomic::Ordering::Relaxed);
        unsafe { libc::mmap(at as *mut _, 4096, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0) };
    }
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) };
    let beyond_end = || {
        // A page beyond the end of its file raises SIGBUS.
        let file = unsafe { libc::memfd_create(c"empty".as_ptr(), 0) };
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, 3, libc::MAP_SHARED, file, 0) };
        assert_eq!(unsafe { page.cast::<u32>().read_volatile() }, 0);
        assert_eq!(SEEN.load(std::sync::atomic::Ordering::Relaxed), page as usize);
    };
    let hmm = Uhmm::new().unwrap();
    beyond_end();
    drop(hmm);
    beyond_end();
}

fn programs_started_meanwhile_are_not_disturbed() {
    let (_hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..1_000_000).collect();
    for round in 1..20 {
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        let output = std::process::Command::new("echo").arg("hello").output().unwrap();
        assert_eq!(output.stdout, b"hello\n");
        assert_eq!(data[5], 5 + round);
    }
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 19));
}

fn launches_from_many_threads() {
    let (_hmm, dev) = device(64);
    let mut parts: Vec<Vec<u32>> = (0..6).map(|part| vec![part; 100_000 + part as usize * 50_000]).collect();
    std::thread::scope(|scope| {
        for part in &mut parts {
            scope.spawn(|| {
                for _ in 0..50 {
                    dev.run(&increment, groups(part.len()), args![inout(part)]).unwrap();
                }
            });
        }
    });
    for (part, data) in parts.iter().enumerate() {
        assert!(data.iter().all(|&x| x == part as u32 + 50));
    }
}

/// The program may close whatever it likes: uhmm's descriptors are not in its table.
fn the_programs_descriptors_are_its_own() {
    let (_hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..1_000_000).collect();
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert_eq!(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) }, 0);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 2));
}
