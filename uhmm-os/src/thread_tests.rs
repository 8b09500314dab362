//! Threads as the kernel shows them.

use super::*;
use crate::uffd::EventFd;
use core::marker::PhantomData;
use std::fs::{read_link, read_to_string};
use std::os::fd::AsRawFd;
use std::sync::Barrier;
use std::sync::atomic::AtomicI32;

/// A thread that borrows its closure until it is joined.
struct Here<'a>(Thread, PhantomData<&'a mut ()>);

impl Here<'_> {
    fn join(self) {
        self.0.join();
    }
}

/// Runs a closure on a thread of ours.
fn run_here<'a, F: FnMut() + Send>(name: &CStr, f: &'a mut F) -> Here<'a> {
    unsafe extern "C" fn call_it<F: FnMut()>(f: *mut ()) {
        // SAFETY: the closure is borrowed until the thread is joined: no test drops one before, or asserts while one runs.
        unsafe { (*f.cast::<F>())() }
    }
    // SAFETY: as above.
    Here(unsafe { spawn(name, 256 << 10, call_it::<F>, (f as *mut F).cast()) }.unwrap(), PhantomData)
}

fn status(tid: u32, field: &str) -> String {
    let text = read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
    text.lines().find_map(|l| l.strip_prefix(field)).unwrap().trim_start_matches(':').trim().to_owned()
}

#[test]
fn is_set_up_as_promised() {
    let (mut tid, mut local, mut alternate) = (0, 0, (0, -1, 0));
    let (mut name, mut mask) = (String::new(), String::new());
    let mut body = || {
        let here = 0u8;
        local = &raw const here as usize;
        tid = gettid();
        let mut stack = libc::stack_t { ss_sp: core::ptr::null_mut(), ss_flags: -1, ss_size: 0 };
        // SAFETY: only asks.
        unsafe { libc::sigaltstack(core::ptr::null(), &mut stack) };
        alternate = (stack.ss_sp as usize, stack.ss_flags, stack.ss_size);
        (name, mask) = (status(tid, "Name"), status(tid, "SigBlk"));
    };
    let thread = run_here(c"uhmm-test-thread-long", &mut body);
    let (known, memory) = (thread.0.tid(), thread.0.memory.start()..thread.0.memory.end());
    thread.join();
    assert_eq!(tid, known);
    assert!(memory.contains(&local));
    assert_eq!(alternate, (memory.start + 2 * PAGE, 0, ALTERNATE));
    assert_eq!(name, "uhmm-test-threa");
    // Open: ILL 4, TRAP 5, BUS 7, FPE 8, SEGV 11 (not ABRT 6, which abort opens itself), and KILL 9, STOP 19, which cannot be blocked; 32 and 33 for glibc.
    let open: u64 = [4, 5, 7, 8, 11, 9, 19, 32, 33].iter().map(|n| 1u64 << (n - 1)).sum();
    assert_eq!(u64::from_str_radix(&mask, 16).unwrap(), !open);
}

#[test]
fn the_spawning_threads_mask_is_as_before() {
    let before = status(gettid(), "SigBlk");
    run_here(c"uhmm-test-mask", &mut || {}).join();
    assert_eq!(status(gettid(), "SigBlk"), before);
}

#[test]
fn nothing_is_left_after_join() {
    // By address, for the tests beside this one have mappings too: where nobody else is placed.
    let area = 0x2010_0000_0000..0x2020_0000_0000;
    let mappings = || {
        let maps = read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| area.contains(&usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap())).count()
    };
    unsafe extern "C" fn nothing(_: *mut ()) {}
    let len = Thread::memory_len(128 << 10).unwrap();
    let threads: Vec<_> = (0..20)
        .map(|i| {
            let reserve =
                Reserve { hint: area.start + i * (1 << 30), len, align: PAGE, name: c"uhmm-test-left", prot: Prot::ReadWrite, exact: true };
            // SAFETY: the function does nothing; the memory is fresh.
            unsafe { spawn_in(map(&reserve).unwrap(), c"uhmm-test-left", nothing, core::ptr::null_mut()) }.unwrap()
        })
        .collect();
    assert!(mappings() >= 60, "three accessible parts each, and the guards between them");
    threads.into_iter().for_each(Thread::join);
    assert_eq!(mappings(), 0);
}

#[test]
fn runs_in_memory_that_is_given() {
    let hint = 0x2000_0000_0000;
    let len = Thread::memory_len(128 << 10).unwrap();
    let reserve = Reserve { hint, len, align: PAGE, name: c"uhmm-test-given", prot: Prot::ReadWrite, exact: true };
    let mut ran = false;
    let mut body = || ran = true;
    unsafe extern "C" fn call_it<F: FnMut()>(f: *mut ()) {
        let here = 0u8;
        assert!((0x2000_0000_0000..0x2000_0100_0000).contains(&(&raw const here as usize)));
        // SAFETY: the closure outlives the thread, which is joined below.
        unsafe { (*f.cast::<F>())() }
    }
    fn run<F: FnMut()>(memory: Mapping, f: &mut F) -> Thread {
        // SAFETY: as above.
        unsafe { spawn_in(memory, c"uhmm-test-given", call_it::<F>, (f as *mut F).cast()) }.unwrap()
    }
    run(map(&reserve).unwrap(), &mut body).join();
    assert!(ran);
    assert!(map(&reserve).is_ok(), "the place is free again");
}

#[test]
fn guards_lie_below_both_stacks() {
    let mut nothing = || {};
    let thread = run_here(c"uhmm-test-guard", &mut nothing);
    let maps = crate::maps::Maps::open().unwrap();
    let start = thread.0.memory.start();
    for guard in [start + PAGE, start + 2 * PAGE + ALTERNATE] {
        let vma = maps.covering(guard).unwrap().unwrap();
        assert_eq!((vma.start, vma.end, vma.read, vma.write), (guard, guard + PAGE, false, false));
    }
    thread.join();
}

#[test]
fn too_small_a_stack_is_enlarged() {
    unsafe extern "C" fn nothing(_: *mut ()) {}
    // SAFETY: a function that does nothing.
    unsafe { spawn(c"uhmm-test-small", 1, nothing, core::ptr::null_mut()) }.unwrap().join();
}

#[test]
fn fork_beside_a_thread_works() {
    let end = Barrier::new(2);
    let mut body = || {
        end.wait();
    };
    let thread = run_here(c"uhmm-test-fork", &mut body);
    // SAFETY: the children end at once.
    let statuses = [(); 10].map(|()| unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(7);
        }
        let mut status = -1;
        libc::waitpid(pid, &mut status, 0);
        status
    });
    end.wait();
    thread.join();
    let well = |status: i32| libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7;
    assert!(statuses.into_iter().all(well), "children died: {statuses:x?}");
}

#[test]
fn own_descriptors_survive_what_the_program_closes() {
    let outside = EventFd::new().unwrap();
    let mut results = (Err(Errno::NOSYS), Ok(()), Err(Errno::NOSYS), 0);
    let (step, number) = (Barrier::new(2), AtomicI32::new(-1));
    let mut body = || {
        results.0 = unshare_files();
        results.1 = outside.signal();
        let inside = EventFd::new().unwrap();
        number.store(inside.as_fd().as_raw_fd(), Ordering::Relaxed);
        step.wait();
        step.wait();
        results.2 = inside.signal();
        results.3 = std::fs::read_dir("/proc/thread-self/fd").unwrap().count();
    };
    let thread = run_here(c"uhmm-test-files", &mut body);
    step.wait();
    let fd = number.load(Ordering::Relaxed);
    // Nothing is asserted while the other thread uses this frame.
    let link = read_link(format!("/proc/self/task/{}/fd/{fd}", thread.0.tid()));
    // What a program does that closes everything; here only a number that no test has open.
    // SAFETY: closes nothing that exists in this table.
    unsafe { libc::syscall(libc::SYS_close_range, 900, u32::MAX, 0) };
    step.wait();
    thread.join();
    assert_eq!(link.unwrap().to_str(), Some("anon_inode:[eventfd]"));
    assert_eq!((results.0, results.1, results.2), (Ok(()), Err(Errno::BADF), Ok(())));
    assert!(results.3 <= 5, "{} descriptors: 0, 1, 2, ours and the directory's", results.3);
    assert_eq!(outside.signal(), Ok(()));
}

#[test]
fn affinity() {
    let all = num_cores();
    let (mut one, mut here, mut errors) = (0, 0, vec![]);
    run_here(c"uhmm-test-core", &mut || {
        let core = current_core();
        set_affinity(&[core]).unwrap();
        yield_now();
        (one, here) = (num_cores(), current_core().abs_diff(core));
        errors = vec![set_affinity(&[]), set_affinity(&[CORES])];
    })
    .join();
    assert_eq!((one, here), (1, 0));
    assert_eq!(errors, [Err(Errno::INVAL); 2]);
    assert_eq!(num_cores(), all);
    assert_eq!(all, std::thread::available_parallelism().unwrap().get());
}

#[test]
fn who_is_kept_off_a_core_runs_on_the_others() {
    let aside = Aside::default();
    let cores: Vec<usize> = {
        let list = read_to_string("/proc/thread-self/status").unwrap();
        let mask = list.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            first.parse::<usize>().unwrap()..=last.parse().unwrap()
        };
        mask.split(',').flat_map(range).collect()
    };
    let turn = Barrier::new(2);
    std::thread::scope(|scope| {
        let kept_off = scope.spawn(|| {
            aside.enter();
            turn.wait();
            let mut seen = vec![];
            for _ in &cores {
                turn.wait();
                yield_now();
                seen.push((num_cores(), current_core()));
                turn.wait();
            }
            seen
        });
        turn.wait();
        for &core in &cores {
            set_affinity(&[core]).unwrap();
            aside.keep_off();
            turn.wait();
            turn.wait();
        }
        let others = (cores.len() - 1).max(1);
        for (&core, (may, ran)) in cores.iter().zip(kept_off.join().unwrap()) {
            assert_eq!(may, others);
            assert!(ran != core || cores.len() == 1, "it ran on core {ran}, which it was kept off");
        }
    });
}
