//! The three modes: which tests run in which, how root becomes an ordinary user for the lesser ones, and what is special to them.

use crate::harness::*;
use libtest_mimic::Failed;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;
use uhmm::{Args, Ctx, Error, Mode, To, Uhmm, args, inout, inp, out, ptr};

crate::tests![full_mode_is_the_first_choice,];

/// Tests of the lesser modes alone: names, functions.
pub const LESSER: &[Test] = &[
    lesser("suite::modes::results_are_home_when_run_returns", results_are_home_when_run_returns),
    lesser("suite::modes::a_system_call_reads_and_writes_what_a_launch_used", a_system_call_reads_and_writes_what_a_launch_used),
    lesser("suite::modes::what_was_only_read_is_not_copied_again", what_was_only_read_is_not_copied_again),
    lesser("suite::modes::a_forked_child_sees_the_contents", a_forked_child_sees_the_contents),
    lesser("suite::modes::undeclared_memory", undeclared_memory),
    lesser("suite::modes::what_is_left_on_the_device", what_is_left_on_the_device),
    lesser("suite::modes::a_lease_takes_nothing_away", a_lease_takes_nothing_away),
    lesser("suite::modes::a_mirror_needs_userfaultfd", a_mirror_needs_userfaultfd),
    lesser("suite::modes::more_than_the_device_holds", more_than_the_device_holds),
    lesser("suite::modes::hints_are_taken_or_do_nothing", hints_are_taken_or_do_nothing),
];

const fn lesser(name: &'static str, run: fn()) -> Test {
    Test { name, run, full: true }
}

/// What is about pages that stay on a device, or about the process's userfaultfd itself: true in full mode only.
const FULL_ONLY: &[&str] = &[
    "advice::",
    "ahead::",
    "scopes::the_next_launch_is_prepared_while_one_runs",
    "leases::nothing_but_its_end_makes_a_lease_leave",
    "basics::pages_leave_and_come_back",
    "basics::huge_pages_leave_and_come_back_huge",
    "basics::an_unchanged_relaunch_moves_nothing",
    "basics::a_changed_row_moves_a_block",
    "basics::prefetch_and_evict",
    "basics::two_devices_take_turns",
    "contract::",
    "failing::",
    "opencl_batches::",
    "opencl_failing::",
    "halfway::",
    "promises::",
    "faults::twice_the_capacity_by_launches",
    "hints::",
    "faults::twice_the_capacity_by_faults",
    "faults::the_least_recently_used_block_goes",
    "kernel_faults::a_kernel_that_forgets_to_translate_is_told_the_address",
    "bad_input::without_rights_the_error_says_what_gives_them",
    "lifecycle::libraries_with_copies_of_their_own_share_one_core",
    "lifecycle::everything_comes_home_at_the_end",
    "lifecycle::a_forked_child_sees_the_contents",
    "mappings::unmapped_memory_frees_the_devices",
    "mappings::dropped_pages_read_zero",
    "mappings::remapped_pages_keep_their_contents",
    "mappings::pages_shared_by_a_fork_move_after_it",
    "modes::full_mode_is_the_first_choice",
    "raw_fork::",
    "mappings::a_mapping_that_is_watched_in_part",
    "any_memory::locked_memory",
    "any_memory::memory_pinned",
    "dying::",
    "evict::",
    "kernel_access::",
    "kernel_futex::",
    "opencl::a_touch_of_what_a_kernel_writes",
    "opencl::a_written_range",
    "opencl::a_touch_is_served",
    "opencl_chain::a_touch",
    "opencl_chain::who_wants",
    "opencl_chain::a_fork",
    "opencl::a_kernel_that_uses",
    "opencl::touches_of_the_program",
    "opencl::what_was_prefetched",
    "own_memory::",
    "policies::",
    "ports::",
    "peer_drivers::",
    "peers::",
    "prefetches::",
    "closing::",
    "coherent::the_cpu_uses",
    "coherent::pages_have_been",
    "coherent::a_launch_uses",
    "coherent::the_least",
    "coherent::unmapped",
    "coherent::forks",
    "coherent::pinned",
    "coherent::what_a_dying",
    "coherent_races::",
    "nothing_declared::",
    "profiles::null",
    "mirror_looks::pages_o",
];

/// What follows pointers that are not declared, which needs userfaultfd.
const NOT_IN_NONE: &[&str] = &[
    "faults::",
    "undeclared::",
    "modes::more_than",
    "profiles::",
    "kernel_faults::a_wild_pointer",
    "kernel_faults::a_write_to_read_only",
    "modes::what_was_only_read",
    "mirror::",
    "mirror_looks::",
];

/// Whether a test is also run in this lesser mode.
pub fn runs_in(name: &str, mode: Mode) -> bool {
    let listed = |list: &[&str]| list.iter().any(|prefix| name.starts_with(prefix));
    // Races and stories are about full mode's machinery, and take their time.
    let not_here = mode == Mode::None && listed(NOT_IN_NONE);
    !(listed(FULL_ONLY) || listed(&["races::", "stories::", "mapping_races::", "mirror_races::"]) || not_here)
}

/// The command, run by an ordinary user: as root, by nobody, who can reach a copy of this binary.
pub fn as_ordinary_user(command: &Command) -> Result<Command, Failed> {
    static COPY: OnceLock<Result<std::path::PathBuf, String>> = OnceLock::new();
    let root = is_root();
    let program = if root {
        let copied = COPY.get_or_init(|| {
            let folder = tempfile::Builder::new().prefix("uhmm-suite").tempdir().map_err(|e| e.to_string())?.keep();
            std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).map_err(|e| e.to_string())?;
            let copy = folder.join("suite");
            std::fs::copy(command.get_program(), &copy).map_err(|e| e.to_string())?;
            // SAFETY: a function that stays.
            unsafe { libc::atexit(remove_copy) };
            Ok(copy)
        });
        copied.clone().map_err(Failed::from)?.into_os_string()
    } else {
        command.get_program().into()
    };
    extern "C" fn remove_copy() {
        if let Some(Ok(copy)) = COPY.get() {
            let _ = std::fs::remove_dir_all(copy.parent().unwrap_or(copy));
        }
    }
    let mut own = Command::new(program);
    for (name, value) in command.get_envs() {
        own.env(name, value.unwrap_or_default());
    }
    if root {
        own.uid(65534).gid(65534);
    }
    // PoCL has no devices where it cannot make its folder.
    own.current_dir("/").env("POCL_CACHE_DIR", std::env::temp_dir().join("uhmm-suite-pocl-of-nobody"));
    Ok(own)
}

fn opened() -> (Uhmm, uhmm::Device) {
    let (hmm, dev) = device(32);
    let asked = std::env::var(Mode::VARIABLE).unwrap();
    assert_eq!(hmm.mode().name(), asked, "the mode that was asked for");
    assert!(!is_root(), "an ordinary user");
    (hmm, dev)
}

fn full_mode_is_the_first_choice() {
    assert_eq!(Uhmm::new().unwrap().mode(), Mode::Full);
    // SAFETY: no other thread uses the environment: uhmm's do not.
    unsafe { std::env::set_var(Mode::VARIABLE, "half") };
    assert!(matches!(Uhmm::new(), Err(Error::NoMode { name }) if name == "half"));
}

fn results_are_home_when_run_returns() {
    let (_hmm, dev) = opened();
    let mut data: Vec<u32> = (0..1_000_000).collect();
    for round in 1..4 {
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        let (start, end) = (data.as_ptr() as usize, data.as_ptr_range().end as usize);
        assert_eq!(pages_present(&data), end / 4096 - start.div_ceil(4096), "round {round}");
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + round));
    }
}

/// The kernel does not wait for faults of an ordinary user's userfaultfd: read(2) into a protected or missing page fails with EFAULT.
fn a_system_call_reads_and_writes_what_a_launch_used() {
    let (_hmm, dev) = opened();
    let mut a = vec![1u8; 300_000];
    let mut r = vec![0u8; 300_000];
    let copy = |ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(usize::MAX).copy_from_slice(ctx.inp::<u8>(1));
    let mut pipe = std::io::pipe().unwrap();
    for round in 0..20u8 {
        dev.run(&copy, 1, args![out(&mut r), inp(&a)]).unwrap();
        let n = 50_000; // fits a pipe
        assert_eq!(pipe.1.write(&r[7777..][..n]).unwrap(), n, "round {round}: the result is written");
        a.fill(round);
        dev.run(&copy, 1, args![out(&mut r), inp(&a)]).unwrap();
        // Into what was only read, and so is watched for writes.
        assert_eq!(pipe.0.read(&mut a[5..][..n]).unwrap(), n, "round {round}: the input is read into");
        dev.run(&copy, 1, args![out(&mut r), inp(&a)]).unwrap();
        assert!(r == a, "round {round}: what the kernel has written to the input is seen");
    }
}

fn what_was_only_read_is_not_copied_again() {
    let (_hmm, dev) = opened();
    let mut a: Vec<u32> = (0..2_000_000).collect();
    let mut r = vec![0u32; a.len()];
    let add = |ctx: &Ctx<'_>| {
        let base = ctx.group() * 1000;
        let a = ctx.inp::<u32>(1);
        ctx.out::<u32>(0).chunk(1000).iter_mut().enumerate().for_each(|(i, r)| *r = a[base + i] + 1);
    };
    dev.run(&add, groups(a.len()), args![out(&mut r), inp(&a)]).unwrap();
    for round in 0..5 {
        let at = 300_000 * round + 17;
        a[at] = 7;
        let before = dev.stats();
        dev.run(&add, groups(a.len()), args![out(&mut r), inp(&a)]).unwrap();
        let moved = dev.stats() - before;
        // The page that was written, and the edges of the result; a huge page as a whole.
        assert!((4096..=3 << 20).contains(&moved.bytes_to_device), "round {round}: {moved:?}");
        assert!(r.iter().zip(&a).all(|(r, a)| *r == a + 1), "round {round}");
    }
}

fn a_forked_child_sees_the_contents() {
    let (_hmm, dev) = opened();
    let mut data: Vec<u32> = (0..500_000).collect();
    let a = data.clone();
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    let sum = |ctx: &Ctx<'_>| ctx.out::<u64>(0).chunk(1)[0] = ctx.inp::<u32>(1).iter().map(|&x| u64::from(x)).sum();
    let mut total = [0u64];
    dev.run(&sum, 1, args![out(&mut total), inp(&a)]).unwrap();
    // Past libc's fork, too.
    for raw in [false, true] {
        let child =
            fork(raw, || data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1) && a.iter().enumerate().all(|(i, &x)| x == i as u32));
        assert_eq!(wait(child), 0, "raw {raw}");
    }
}

/// Only with userfaultfd: what the kernel has touched is in step when the launch has ended. Without it, such arguments are refused.
fn undeclared_memory() {
    static mut TOTAL: u64 = 5;
    let (hmm, dev) = opened();
    let mut list: Option<Box<Node>> = None;
    for value in 0..10_000 {
        list = Some(Box::new(Node { value, next: list }));
    }
    let head = list.as_deref().map_or(std::ptr::null(), std::ptr::from_ref);
    let follow = |ctx: &Ctx<'_>| {
        let mut at = ctx.pointer::<Node>(0);
        let total = ctx.pointer::<u64>(1);
        while !at.is_null() {
            // SAFETY: a node of the list, which nobody else uses while the launch runs.
            let node = unsafe { &mut *ctx.ptr_mut(at) };
            // SAFETY: the same is true of the total.
            unsafe { *total += node.value };
            node.value += 1;
            at = node.next.as_deref_mut().map_or(std::ptr::null_mut(), std::ptr::from_mut);
        }
    };
    // SAFETY: both outlive the launch, and are used by the kernel alone.
    let pointers = unsafe { [ptr(head), ptr(&raw const TOTAL)] };
    let result = dev.run(&follow, 1, Args::new(pointers));
    if hmm.mode() == Mode::None {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("declare"), "{text}");
        return;
    }
    result.unwrap();
    // SAFETY: the launch has ended.
    assert_eq!(unsafe { TOTAL }, 5 + 10_000 * 9_999 / 2);
    let mut at = list.as_deref();
    let mut value = 10_000;
    while let Some(node) = at {
        assert_eq!(node.value, value);
        value -= 1;
        at = node.next.as_deref();
    }
}

/// What the program lets stay there is away until it is touched, comes home for libc's fork, and is not there at all for a child that was forked past that.
fn what_is_left_on_the_device() {
    let (hmm, dev) = opened();
    let mut data: Vec<u32> = (0..1_000_000).collect();
    if hmm.mode() == Mode::None {
        let text = dev.leave(&mut data).unwrap_err().to_string();
        assert!(text.contains("there is no userfaultfd"), "{text}");
        return;
    }
    dev.leave(&mut data).unwrap();
    for round in 1..4 {
        dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
        assert_eq!(pages_present(&data), 0, "round {round}: it stays");
    }
    let before = dev.stats();
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    let moved = dev.stats() - before;
    assert!(moved.bytes_to_device <= 2 * 4096, "only the edges are copied again: {moved:?}");
    // Past libc's fork: the child gets SIGSEGV, not zeros.
    for raw in [true, false] {
        let status = wait(fork(raw, || data.iter().enumerate().all(|(i, &x)| x == i as u32 + 4)));
        assert!(if raw { libc::WIFSIGNALED(status) } else { status == 0 }, "raw {raw}: {status:#x}");
    }
    dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
    assert_eq!(pages_present(&data), 0, "after the fork it stays again");
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 5));
}

/// Also of what is left on the device: a child could not be given what a lease keeps there.
fn a_lease_takes_nothing_away() {
    let (hmm, dev) = opened();
    let mut data: Vec<u32> = (0..1_000_000).collect();
    if hmm.mode() == Mode::UserModeOnly {
        dev.leave(&mut data).unwrap();
    }
    let probe = data.as_ptr_range();
    let (start, len) = (probe.start as usize, data.len());
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    // SAFETY: the memory is there; who has the lease writes elsewhere until it ends.
    let seen = move || unsafe { std::slice::from_raw_parts(start as *const u32, len) }.iter().enumerate().all(|(i, &x)| x == i as u32);
    assert_eq!(wait(fork(false, seen)), 0);
    lease.run(&increment, groups(len)).unwrap();
    drop(lease);
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1));
}

/// Snapshots must stay until the launch has ended. Making room for another chose the oldest of them, sent nothing home, and chose it again, for ever.
fn more_than_the_device_holds() {
    let (hmm, _dev) = opened();
    let dev = hmm.soft("small").memory(4 << 20).open().unwrap();
    let mut data = vec![1u8; 16 << 20];
    let sum = |ctx: &Ctx<'_>| {
        // SAFETY: the launch borrows so many.
        let bytes = unsafe { std::slice::from_raw_parts(ctx.pointer::<u8>(0), 16 << 20) };
        std::hint::black_box(bytes.iter().step_by(4096).map(|&x| u64::from(x)).sum::<u64>());
    };
    let error = dev.run(&sum, 1, args![bare(&mut data)]).unwrap_err();
    assert!(matches!(error, Error::Kernel(uhmm::KernelFault::NoRoom { .. })), "{error}");
    let mut few = vec![1u32; 1000];
    dev.run(&increment, 1, args![inout(&mut few)]).unwrap();
    assert!(few.iter().all(|&x| x == 2));
}

/// What is only a hint may do nothing, and what is a promise is kept.
fn hints_are_taken_or_do_nothing() {
    let (hmm, dev) = opened();
    let mut data: Vec<u32> = (0..1_000_000).collect();
    let all = pages_present(&data);
    hmm.prefetch(&data, To::Device(&dev)).unwrap().wait().unwrap();
    hmm.prefetch(&data, To::Home).unwrap().wait().unwrap();
    assert_eq!(pages_present(&data), all, "nothing leaves the program");
    let sum = |ctx: &Ctx<'_>| ctx.out::<u64>(0).chunk(1)[0] = ctx.inp::<u32>(1).iter().map(|&x| u64::from(x)).sum();
    let mut total = [0u64];
    dev.run(&sum, 1, args![out(&mut total), inp(&data)]).unwrap();
    let residency = hmm.residency(&data).unwrap();
    let copies = residency.duplicated();
    assert_eq!(residency.system() + copies, size_of_val(&data[..]));
    assert!(if hmm.mode() == Mode::None { copies == 0 } else { copies > 3_900_000 }, "{residency:?}");
    let part = 1000..900_000;
    hmm.discard(&mut data[part.clone()]).unwrap();
    let base = data.as_ptr() as usize;
    let first = ((base + part.start * 4).next_multiple_of(4096) - base) / 4;
    let last = ((base + part.end * 4) / 4096 * 4096 - base) / 4;
    // The copies that the device has kept are stale now.
    dev.run(&sum, 1, args![out(&mut total), inp(&data)]).unwrap();
    let expected = (0..1_000_000u64).filter(|&i| !(first as u64..last as u64).contains(&i)).sum::<u64>();
    assert_eq!(total[0], expected);
    assert!(data.iter().enumerate().all(|(i, &x)| x == if (first..last).contains(&i) { 0 } else { i as u32 }));
    // A range that may stay on the device is as in full mode.
    if dev.leave(&mut data).is_ok() {
        hmm.prefetch(&data, To::Device(&dev)).unwrap().wait().unwrap();
        assert_eq!(pages_present(&data), 0);
        let before = dev.stats();
        hmm.discard(&mut data).unwrap();
        assert_eq!((dev.stats() - before).bytes_to_cpu, 0);
        let inside = (4096 - base % 4096) / 4 % 1024..((base + data.len() * 4) / 4096 * 4096 - base) / 4;
        assert!(data[inside].iter().all(|&x| x == 0));
    }
}

struct Node {
    value: u64,
    next: Option<Box<Node>>,
}

fn a_mirror_needs_userfaultfd() {
    let hmm = Uhmm::new().unwrap();
    let memory = Pages::new(4096);
    let start = memory.start() as usize;
    let table = uhmm::mirror::PageTable::new(start..start + 4096).unwrap();
    match hmm.mirror(start..start + 4096, table) {
        Ok(mirror) => {
            assert_eq!(hmm.mode(), Mode::UserModeOnly);
            let pages = mirror.snapshot(start..start + 4096, std::time::Duration::from_secs(1)).unwrap();
            assert!(pages.entries[0].is_watched());
        }
        Err(refused) => {
            assert_eq!(hmm.mode(), Mode::None);
            assert!(refused.to_string().contains("userfaultfd"), "{refused}");
        }
    }
}
