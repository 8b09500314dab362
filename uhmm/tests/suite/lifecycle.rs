//! One core a process, and nothing of it left when it ends.

use crate::harness::*;
use uhmm::{Ctx, Uhmm, args, inout};

crate::tests![
    two_users_share_one_core,
    libraries_with_copies_of_their_own_share_one_core,
    nothing_remains,
    everything_comes_home_at_the_end,
    the_programs_own_sigbus_handler_is_kept,
    programs_started_meanwhile_are_not_disturbed,
    launches_from_many_threads,
    the_programs_descriptors_are_its_own,
    a_forked_child_sees_the_contents,
    forks_during_launches,
    a_fork_where_no_descriptor_can_be_opened,
];

pub fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut names: Vec<String> = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok()).collect();
    names.sort();
    names
}

pub fn descriptors() -> Vec<String> {
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
    assert_eq!(first.open_devices().len(), 1, "the other's device is seen");
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

/// A program loads two libraries, each linked with uhmm. If each had a core, the second could not watch what the first does, and their devices
/// would take pages from each other behind their backs.
fn libraries_with_copies_of_their_own_share_one_core() {
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    let built = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("libuhmm_test_plugin") && name.ends_with(".so")
    });
    let newest = built.max_by_key(|path| path.metadata().unwrap().modified().unwrap()).expect("the plugin is built with the tests");
    let copies = std::env::temp_dir().join(format!("uhmm-plugins-{}", std::process::id()));
    std::fs::create_dir_all(&copies).unwrap();
    let load = |name: &str| {
        // The loader knows libraries by their file: a copy is another library.
        let path = copies.join(name);
        std::fs::copy(&newest, &path).unwrap();
        // SAFETY: the plugin, whose loading and unloading do nothing.
        unsafe { libloading::Library::new(&path).unwrap() }
    };
    let (one, two) = (load("one.so"), load("two.so"));
    std::fs::remove_dir_all(&copies).unwrap();
    let before = threads();
    let mut data: Vec<u32> = (0..1_000_000).collect();
    type Open = unsafe extern "C" fn() -> *mut u8;
    type Add = unsafe extern "C" fn(*mut u8, *mut u32, usize) -> usize;
    type Close = unsafe extern "C" fn(*mut u8);
    // SAFETY: the plugin's functions, of the types that it declares.
    let symbols = |library: &libloading::Library| unsafe {
        (
            *library.get::<Open>(b"plugin_open").unwrap(),
            *library.get::<Add>(b"plugin_add").unwrap(),
            *library.get::<Close>(b"plugin_close").unwrap(),
        )
    };
    let ((open1, add1, close1), (open2, add2, close2)) = (symbols(&one), symbols(&two));
    assert_ne!(open1 as *const () as usize, open2 as *const () as usize, "two copies");
    // SAFETY: each copy gets what it has opened, until it is closed, and data of that length. One that is unloaded is not called again.
    unsafe {
        let first = open1();
        assert!(!first.is_null());
        let alone = threads();
        let second = open2();
        assert!(!second.is_null());
        let mine = Uhmm::new().unwrap();
        assert_eq!(threads(), alone, "neither the second library nor the program starts a thread");
        for round in 0..3 {
            assert_eq!(add1(first, data.as_mut_ptr(), data.len()), 1);
            assert_eq!(add2(second, data.as_mut_ptr(), data.len()), 1);
            assert_eq!(pages_present(&data), 0);
            assert_eq!(data[0], 2 * round + 2);
        }
        // The one that started the core goes, and is unloaded; its code stays as long as it runs.
        close1(first);
        drop(one);
        assert_eq!(add2(second, data.as_mut_ptr(), data.len()), 1);
        let dev = mine.device("soft").unwrap();
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        drop((dev, mine));
        assert_eq!(pages_present(&data), 0);
        close2(second);
    }
    assert!(pages_present(&data) > 900, "the last one brings everything home");
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 8));
    assert_eq!(threads(), before);
}

/// Lines of /proc/self/maps where only uhmm maps anything: its own memory, and windows.
pub fn mappings_of_uhmm() -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ours = |line: &&str| {
        let start = line.split('-').next().and_then(|start| u64::from_str_radix(start, 16).ok()).unwrap_or(0);
        start < 1 << 47 && !matches!(start >> 44, 0b000 | 0b101 | 0b111)
    };
    maps.lines().filter(ours).map(String::from).collect()
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
        hmm.evict_on_signal(libc::SIGUSR2).unwrap();
        assert_eq!(data[7], 8);
        assert_ne!(descriptors(), before.1);
        assert!(mappings_of_uhmm().len() > 5);
    }
    assert_eq!((threads(), descriptors()), before);
    assert_eq!(fds(), fds_before);
    assert_eq!(mappings_of_uhmm(), Vec::<String>::new());
    // And nothing is watched for missing pages ("um") or writes ("uw").
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
        // SAFETY: the kernel gives it to a handler of this kind.
        let at = unsafe { (*info).si_addr() } as usize & !4095;
        SEEN.store(at, std::sync::atomic::Ordering::Relaxed);
        // SAFETY: a page of the mapping below, which nobody could use: it is beyond the file.
        unsafe { libc::mmap(at as *mut _, 4096, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0) };
    }
    // SAFETY: it makes a system call, and uses an atomic.
    unsafe { handle(libc::SIGBUS, Handler::Info(handler), 0) };
    let beyond_end = || {
        // A page beyond the end of its file raises SIGBUS.
        let page = map(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(&memfd())).cast::<u32>();
        // SAFETY: the handler maps a page there before the access is repeated.
        assert_eq!(unsafe { page.read_volatile() }, 0);
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
    // SAFETY: no value of the program owns one of these descriptors.
    assert_eq!(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) }, 0);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 2));
}

/// A page that is on a device has nothing in a forked child, which would read zeroes: everything comes home before a fork.
fn a_forked_child_sees_the_contents() {
    let (hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..1_000_000).collect();
    let shared: Vec<u32> = (0..500_000).collect();
    let sum = |ctx: &Ctx<'_>| assert_eq!(ctx.inp::<u32>(0)[77], 77);
    for round in 1..4 {
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        dev.run(&sum, 1, args![uhmm::inp(&shared)]).unwrap();
        assert_eq!(pages_present(&data), 0);
        in_a_child(|| {
            let inherited = data.iter().enumerate().all(|(i, &x)| x == i as u32 + round) && shared[499_999] == 499_999;
            data[5] = 0;
            // The parent's uhmm is not the child's, which may have one of its own.
            let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hmm.open_devices())).is_err();
            let mut own: Vec<u32> = (0..300_000).collect();
            let (_hmm, dev) = device(16);
            dev.run(&increment, groups(own.len()), args![inout(&mut own)]).unwrap();
            inherited && refused && own.iter().enumerate().all(|(i, &x)| x == i as u32 + 1)
        });
        assert_eq!(data[5], 5 + round, "the child's write is the child's");
    }
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert_eq!(pages_present(&data), 0, "migration goes on");
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 4));
}

/// The kernel's news of a fork brings a descriptor. The program had lowered its limit, so that it could not be read, and the fork waited for ever.
fn a_fork_where_no_descriptor_can_be_opened() {
    let (_hmm, dev) = device(16);
    let mut data = vec![7u32; 400_000];
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    // SAFETY: the limit of this process, which opens nothing meanwhile.
    unsafe {
        let mut limit = std::mem::zeroed();
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = 0;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
    in_a_child(|| data.iter().all(|&x| x == 8));
    // SAFETY: as above.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        assert!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur == 0, "the limit is what it was");
    }
}

/// Threads fork while others launch; each child sees what its thread had.
fn forks_during_launches() {
    let (_hmm, dev) = device(32);
    let end = std::time::Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for seed in 0..3u32 {
            let dev = &dev;
            scope.spawn(move || {
                increment_until(end, dev, seed, 300_000, |data, expected| in_a_child(|| data.iter().all(|&x| x == expected)))
            });
        }
    });
}
