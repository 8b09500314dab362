//! Children that are made past libc's fork, by clone(2): they see what the parent had, wherever it was, as long as the parent lives until they are filled.

use crate::harness::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;
use uhmm::{Ctx, args, inout, inp, out};

crate::tests![what_is_on_the_device, from_many_threads_while_kernels_run, a_child_that_faults_on_its_own];

/// A child of which the C library is not told.
fn child(right: impl FnOnce() -> bool) -> i32 {
    fork(true, right)
}

fn what_is_on_the_device() {
    let (_hmm, dev) = device(64);
    let mut moved: Vec<u32> = (0..3_000_000).collect();
    let mut shared: Vec<u32> = (0..1_000_000).collect();
    let mut sum = vec![0u64; 1];
    let total = |ctx: &Ctx<'_>| ctx.out::<u64>(0).chunk(1)[0] = ctx.inp::<u32>(1).iter().map(|&x| u64::from(x)).sum();
    for round in 1..4u32 {
        dev.run(&increment, groups(moved.len()), args![inout(&mut moved)]).unwrap();
        dev.run(&total, 1, args![out(&mut sum), inp(&shared)]).unwrap();
        assert_eq!(pages_present(&moved), 0);
        let pid = child(|| {
            let right = moved.iter().enumerate().all(|(i, &x)| x == i as u32 + round);
            // What was shared with the device can be written: nobody serves the child's protection.
            shared.iter_mut().for_each(|x| *x += 1);
            right && shared.iter().enumerate().all(|(i, &x)| x == i as u32 + 1)
        });
        assert_eq!(wait(pid), 0, "round {round}: the child sees what the parent had");
        assert_eq!(pages_present(&moved), 0, "the parent's pages stay on the device");
    }
    assert!(moved.iter().enumerate().all(|(i, &x)| x == i as u32 + 3));
}

/// Threads that did nothing but fork kept launches and touches from ever getting through: while one fork's child was filled the next was raised, during which the
/// kernel lets nothing move, and a worker's pages were taken again before it had run. One launch took 20 to 140 seconds.
fn from_many_threads_while_kernels_run() {
    let (_hmm, dev) = device(64);
    // All bytes of a row are equal, whenever one looks, but for the row that a kernel is at.
    let mut still: Vec<u32> = vec![7; 1_000_000];
    let mut busy: Vec<u32> = vec![0; 1_000_000];
    dev.run(&increment, groups(still.len()), args![inout(&mut still)]).unwrap();
    let stop = AtomicBool::new(false);
    let forks = AtomicU32::new(0);
    let launches = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let pid = child(|| still.iter().all(|&x| x == 8));
                    assert_eq!(wait(pid), 0);
                    forks.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let end = Instant::now() + seconds(5);
        let mut rounds = 0;
        while Instant::now() < end {
            dev.run(&increment, groups(busy.len()), args![inout(&mut busy)]).unwrap();
            rounds += 1;
            if rounds % 3 == 0 {
                assert!(busy.iter().all(|&x| x == rounds));
            }
            // What stands still comes home and leaves again.
            assert_eq!(still[rounds as usize * 1000 % still.len()], 8);
            dev.prefetch(&still).unwrap();
        }
        launches.store(rounds, Ordering::Relaxed);
        stop.store(true, Ordering::Relaxed);
    });
    assert!(forks.into_inner() > 10);
    assert!(launches.into_inner() > 1, "launches starve");
}

/// A child has inherited the signal handler, and the pointer to a core that it does not have: its own SIGSEGV ended in the handler, not where it belongs.
fn a_child_that_faults_on_its_own() {
    extern "C" fn handler(_: libc::c_int) {
        // SAFETY: it ends here.
        unsafe { libc::_exit(42) };
    }
    // Before uhmm's, which hands on what is not its own.
    // SAFETY: it ends the process by a system call.
    unsafe { handle(libc::SIGSEGV, Handler::Plain(handler), libc::SA_RESTART) };
    let (_hmm, dev) = device(64);
    let mut data = vec![1u32; 100_000];
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    let pid = child(|| {
        // SAFETY: nothing is there: its handler ends the child.
        unsafe { std::ptr::without_provenance::<u8>(16).read_volatile() };
        false
    });
    let status = wait(pid);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 42, "{status:#x}");
}
