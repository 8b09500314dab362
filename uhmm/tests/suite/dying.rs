//! Processes that stop or die of a signal, seen by another process: with `evict_on_signal`, all of their pages can be read then.

use crate::harness::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use uhmm::{args, inout};

crate::tests![a_stopped_process_can_be_read, a_core_dump_would_have_every_page, without_it_pages_would_be_missing];

const VICTIM: &str = "UHMM_TEST_VICTIM";
/// Elements of each of the victim's two arrays.
const COUNT: usize = 1 << 20;

/// What stops or dies: one array is on the device, and a thread relaunches with the other, for ever.
fn victim(deed: &str) {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let signals = [libc::SIGABRT, libc::SIGSEGV, libc::SIGQUIT, libc::SIGTSTP];
    // SAFETY: a structure of our own, and no handlers.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &none);
        for signal in signals {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    let (hmm, dev) = device(64);
    if deed != "unprepared" {
        signals.into_iter().for_each(|signal| hmm.evict_on_signal(signal).unwrap());
    }
    let away: Vec<u32> = (0..COUNT as u32).collect();
    let mut busy = vec![0u32; COUNT];
    println!("{} {}", away.as_ptr() as usize, busy.as_ptr() as usize);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                dev.prefetch(&away).unwrap();
                dev.run(&increment, groups(COUNT), args![inout(&mut busy)]).unwrap();
            }
        });
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).unwrap();
        match deed {
            "abort" | "unprepared" => std::process::abort(),
            // SAFETY: it ends the process: that is the test.
            "null" => unsafe { std::ptr::null_mut::<u32>().write_volatile(1) },
            _ => {
                std::io::stdin().read_to_string(&mut line).unwrap(); // until the parent has had enough
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(away.iter().enumerate().all(|(i, &x)| x == i as u32));
    assert!(busy.iter().all(|&x| x == busy[0] && x > 0));
}

/// A victim that works, and the addresses of its arrays.
fn start(name: &str, deed: &str) -> (Child, [u64; 2]) {
    let mut command = again(name);
    // A process group of its own: one that has no parent outside it is not stopped by SIGTSTP.
    let mut child = command.env(VICTIM, deed).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let addresses: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    std::thread::sleep(std::time::Duration::from_millis(50)); // some launches
    (child, addresses.try_into().unwrap())
}

/// Reads both arrays as a debugger does. An error is that of a page that is not there.
fn read(child: &Child, addresses: [u64; 2]) -> std::io::Result<[Vec<u32>; 2]> {
    let memory = std::fs::File::open(format!("/proc/{}/mem", child.id())).unwrap();
    let mut arrays = [vec![0u32; COUNT], vec![0u32; COUNT]];
    for (array, address) in arrays.iter_mut().zip(addresses) {
        memory.read_exact_at(bytemuck::cast_slice_mut(array), address)?;
    }
    Ok(arrays)
}

/// No launch is under way: its array is the same everywhere.
fn check(arrays: &std::io::Result<[Vec<u32>; 2]>) {
    let [away, busy] = arrays.as_ref().expect("all pages are there");
    assert!(away.iter().enumerate().all(|(i, &x)| x == i as u32));
    assert!(busy.iter().all(|&x| x == busy[0]));
}

/// Sends a signal to a child.
fn kill(pid: i32, signal: i32) {
    // SAFETY: it has numbers only.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// Waits until a child's state has changed: to what.
fn change_of(pid: i32, options: i32) -> i32 {
    let mut status = 0;
    // SAFETY: a status of our own.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, options) }, pid);
    status
}

fn a_stopped_process_can_be_read() {
    if let Ok(deed) = std::env::var(VICTIM) {
        return victim(&deed);
    }
    let (mut child, addresses) = start("suite::dying::a_stopped_process_can_be_read", "stop");
    let pid = child.id() as i32;
    for _round in 0..5 {
        kill(pid, libc::SIGTSTP);
        let status = change_of(pid, libc::WUNTRACED);
        assert!(libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTSTP, "{status:#x}");
        let arrays = read(&child, addresses);
        kill(pid, libc::SIGCONT);
        check(&arrays);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert!(child.wait().unwrap().success());
}

/// Follows the victim's main thread until it is about to leave its memory, which is after the kernel has written a core dump. What could be read then,
/// and the signal that it died of; `None` if this process may not trace.
#[allow(clippy::type_complexity)] // two results of one act
fn last_look(child: &mut Child, addresses: [u64; 2], signal: Option<i32>) -> Option<(std::io::Result<[Vec<u32>; 2]>, i32)> {
    let pid = child.id() as i32;
    // SAFETY: the requests below have numbers only.
    let trace = |request, data: usize| unsafe { libc::ptrace(request, pid, std::ptr::null_mut::<u8>(), data as *mut u8) };
    if trace(libc::PTRACE_SEIZE, libc::PTRACE_O_TRACEEXIT as usize) != 0 {
        eprintln!("this process may not trace its child ({}): not tested", std::io::Error::last_os_error());
        let _ = child.kill();
        return None;
    }
    match signal {
        Some(signal) => kill(pid, signal),
        None => child.stdin.as_mut().unwrap().write_all(b"\n").unwrap(),
    }
    let mut seen = None;
    loop {
        let status = change_of(pid, libc::__WALL);
        if libc::WIFSIGNALED(status) {
            return Some((seen.expect("it was seen"), libc::WTERMSIG(status)));
        }
        assert!(libc::WIFSTOPPED(status), "status {status:#x}");
        let event = status >> 16;
        if event == libc::PTRACE_EVENT_EXIT {
            seen = Some(read(child, addresses));
        }
        let deliver = if event == 0 { libc::WSTOPSIG(status) } else { 0 };
        assert_eq!(trace(libc::PTRACE_CONT, deliver as usize), 0);
    }
}

fn a_core_dump_would_have_every_page() {
    if let Ok(deed) = std::env::var(VICTIM) {
        return victim(&deed);
    }
    let deeds = [
        ("abort", None, libc::SIGABRT),
        ("null", None, libc::SIGSEGV),
        ("wait", Some(libc::SIGQUIT), libc::SIGQUIT),
        ("wait", Some(libc::SIGABRT), libc::SIGABRT),
    ];
    for (deed, signal, died_of) in deeds {
        let (mut child, addresses) = start("suite::dying::a_core_dump_would_have_every_page", deed);
        let Some((arrays, of)) = last_look(&mut child, addresses, signal) else { return };
        assert_eq!(of, died_of);
        check(&arrays);
    }
}

/// That the tests above can fail.
fn without_it_pages_would_be_missing() {
    if let Ok(deed) = std::env::var(VICTIM) {
        return victim(&deed);
    }
    let (mut child, addresses) = start("suite::dying::without_it_pages_would_be_missing", "unprepared");
    let Some((arrays, of)) = last_look(&mut child, addresses, None) else { return };
    assert_eq!((of, arrays.unwrap_err().raw_os_error()), (libc::SIGABRT, Some(libc::EIO)));
}
