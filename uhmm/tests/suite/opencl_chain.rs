//! Launches that follow each other in a device's queue without a wait of the host's between them. Where there is no OpenCL these tests say so, and are left out.

use crate::harness::{fork, wait};
use crate::opencl::Foreign;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use uhmm::{Device, OpenCl, Uhmm, args, inout, inp, scope, val};
use uhmm_core::mode::Mode;

crate::tests![
    images_take_turns,
    what_a_member_has_written_is_there_when_it_has_ended,
    a_touch_ends_a_chain,
    who_wants_to_be_alone_ends_a_chain,
    a_fork_ends_a_chain,
    a_launch_that_may_fail_is_no_member,
    leases_begin_beside_a_chain,
    what_was_given_back_in_between_is_looked_at_anew,
];

const KERNELS: &str = "
__kernel void flow(__global uint *to, __global const uint *from, ulong uhmm_len_0) {
    ulong at = get_global_id(0);
    if (at < uhmm_len_0) to[at] = from[at] * 3 + from[at ? at - 1 : uhmm_len_0 - 1];
}
__kernel void more(__global uint *data, uint rounds, ulong uhmm_len_0) {
    ulong at = get_global_id(0);
    if (at >= uhmm_len_0) return;
    uint x = data[at];
    for (uint i = 0; i < rounds; i++) x = x * 1664525u + 1013904223u;
    for (uint i = 0; i < rounds; i++) x = (x - 1013904223u) * 4276115653u; // and back: the one factor is the other's inverse
    data[at] = x + 1;
}
__kernel void add(__global uint *data, __global const uint *one, ulong uhmm_len_0) {
    ulong at = get_global_id(0);
    if (at < uhmm_len_0) data[at] += one[0];
}
__kernel void follow(__global uint *data, ulong at, UHMM, ulong uhmm_len_0) {
    if (get_global_id(0) == 0) data[0] += *(__global const uint *)uhmm_ptr(at);
}";

const LOCAL: usize = 64;

fn kernel(name: &'static str) -> Foreign {
    Foreign(OpenCl { source: KERNELS.into(), name: name.into(), local: [LOCAL, 1, 1], options: "".into() })
}

fn opened() -> (Uhmm, Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.opencl("opencl").copies(true).memory(64 << 20).open().unwrap();
    (hmm, dev)
}

/// Slices that begin and end inside of pages, whose neighbours the CPU changes all the while: every byte is as it should be, and the device has not waited for the host.
fn images_take_turns() {
    let (hmm, dev) = opened();
    let step = kernel("flow");
    const LEN: usize = 100_003;
    const STEPS: usize = 301;
    let mut all = [vec![0u32; LEN + 50], vec![0u32; LEN + 50]];
    let beside = all.each_ref().map(|all| [all.as_ptr() as usize, &raw const all[LEN + 49] as usize]);
    let stop = AtomicBool::new(false);
    let before = dev.stats();
    let mut wanted: Vec<u32> = (0..LEN as u32).collect();
    let [a, b] = all.each_mut().map(|all| &mut all[3..3 + LEN]);
    a.copy_from_slice(&wanted);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for at in beside.iter().flatten().map(|&at| at as *mut u32) {
                    // SAFETY: an element of the vectors beside the slices, which nobody else uses; they live longer than the thread.
                    unsafe { at.write_volatile(at.read_volatile().wrapping_add(1)) };
                }
            }
        });
        scope(|scope| {
            let (mut from, mut to) = (scope.lend(a), scope.lend(b));
            let mut queue = scope.queue(&dev);
            for _ in 0..STEPS {
                queue.launch(&step, LEN.div_ceil(LOCAL), args![to.out(), from.inp()]);
                std::mem::swap(&mut from, &mut to);
            }
        })
        .unwrap();
        stop.store(true, Ordering::Relaxed);
    });
    for _ in 0..STEPS {
        wanted = (0..LEN).map(|at| wanted[at].wrapping_mul(3).wrapping_add(wanted[at.checked_sub(1).unwrap_or(LEN - 1)])).collect();
    }
    assert!(all[1][3..3 + LEN] == wanted);
    let counted = all.iter().map(|all| [all[0], all[LEN + 49]]);
    assert!(counted.flatten().all(|count| count > 0 && count == all[0][0]), "the neighbours have lost something");
    assert!(all.iter().all(|all| all[1..3] == [0; 2] && all[3 + LEN..LEN + 49].iter().all(|&x| x == 0)));
    let chained = (dev.stats() - before).launches_chained;
    assert!(hmm.mode() != Mode::Full || chained > STEPS as u64 / 10, "{chained} of {STEPS}");
}

/// The bytes at the ends, which no touch fetches, are the program's when the launch that has written them is over, whatever else is in the queue.
fn what_a_member_has_written_is_there_when_it_has_ended() {
    let (_hmm, dev) = opened();
    let more = kernel("more");
    const LEN: usize = 50_001;
    let mut all = vec![0u32; LEN + 10];
    let ends = [&raw const all[5] as usize, &raw const all[5 + LEN - 1] as usize];
    const CHAINS: u32 = 40;
    const EACH: u32 = 5;
    const MANY: u32 = CHAINS * EACH;
    scope(|scope| {
        let data = scope.lend(&mut all[5..5 + LEN]);
        let mut queue = scope.queue(&dev);
        for chain in 0..CHAINS {
            let launched: Vec<_> = (0..EACH).map(|_| queue.launch(&more, LEN.div_ceil(LOCAL), args![data.inout(), 100u32])).collect();
            for (launch, n) in launched.into_iter().zip(chain * EACH + 1..) {
                launch.wait().unwrap();
                // SAFETY: the vector lives as long as the scope; words that uhmm alone writes.
                let seen = ends.map(|at| unsafe { (at as *const u32).read_volatile() });
                assert!(seen.iter().all(|&seen| (n..=MANY).contains(&seen)), "{seen:?} after {n}");
            }
        }
    })
    .unwrap();
    assert!(all[5..5 + LEN].iter().all(|&x| x == MANY) && all[..5] == [0; 5] && all[5 + LEN..] == [0; 5]);
}

/// Launches that go on and on; `others` does something three times meanwhile, which has to come to its end soon.
fn while_a_chain_goes_on(dev: &Device, all: &mut [u32], others: impl Fn() + Sync) {
    let more = kernel("more");
    const MANY: usize = 400;
    const SOON: u64 = 80;
    let late = AtomicUsize::new(0);
    let len = all.len();
    let before = dev.stats();
    std::thread::scope(|threads| {
        scope(|scope| {
            let data = scope.lend(all);
            let mut queue = scope.queue(dev);
            let launched: Vec<_> = (0..MANY)
                .map(|n| {
                    if [20, 120, 220].contains(&n) {
                        threads.spawn(|| {
                            let begun = dev.stats();
                            others();
                            late.fetch_max((dev.stats() - begun).launches as usize, Ordering::SeqCst);
                        });
                    }
                    queue.launch(&more, len.div_ceil(LOCAL), args![data.inout(), 100u32])
                })
                .collect();
            launched.into_iter().for_each(|launch| launch.wait().unwrap());
        })
        .unwrap();
    });
    let late = late.load(Ordering::SeqCst) as u64;
    assert!(late < SOON, "it came after {late} more launches");
    assert!(all.iter().all(|&x| x == MANY as u32));
    assert!((dev.stats() - before).launches_chained > 20, "{:?}", dev.stats() - before);
}

/// A touch of what a chain has does not wait until nobody launches any more.
fn a_touch_ends_a_chain() {
    let (_hmm, dev) = opened();
    let mut all = vec![0u32; 20_000];
    let inside = &raw const all[10_000] as usize;
    // SAFETY: the vector lives longer than the thread; a plain load of a word.
    while_a_chain_goes_on(&dev, &mut all, || assert!(unsafe { (inside as *const u32).read_volatile() } < 400));
}

/// Nor does what must find no launch anywhere.
fn who_wants_to_be_alone_ends_a_chain() {
    let (hmm, dev) = opened();
    let mut all = vec![0u32; 20_000];
    while_a_chain_goes_on(&dev, &mut all, || hmm.evict_all().unwrap());
}

/// Nor does a fork, which waits for launches to end.
fn a_fork_ends_a_chain() {
    let (_hmm, dev) = opened();
    let mut all = vec![0u32; 20_000];
    while_a_chain_goes_on(&dev, &mut all, || assert_eq!(wait(fork(false, || true)), 0));
}

/// A kernel that follows stored pointers may miss: it stands in the queue alone, and its failure is its own.
fn a_launch_that_may_fail_is_no_member() {
    let (hmm, dev) = opened();
    let (more, follow) = (kernel("more"), kernel("follow"));
    let mut all = vec![0u32; 20_000];
    let groups = all.len().div_ceil(LOCAL);
    let before = dev.stats();
    let failed = scope(|scope| {
        let data = scope.lend(&mut all);
        let mut queue = scope.queue(&dev);
        let mut failed = vec![];
        for round in 0..20 {
            for _ in 0..10 {
                queue.launch(&more, groups, args![data.inout(), 10u32]);
            }
            let nowhere = 4096 * (round + 1) as u64;
            failed.push(queue.launch(&follow, groups, args![data.inout(), val(nowhere)]));
        }
        failed.into_iter().filter_map(|launch| launch.wait().err()).count()
    })
    .unwrap();
    assert_eq!(failed, 20);
    assert!(all.iter().all(|&x| x == 200));
    let stats = dev.stats() - before;
    assert_eq!((stats.launches, stats.launches_failed), (220, 20));
    assert!(hmm.mode() != Mode::Full || stats.launches_chained > 20, "{stats:?}");
    let before = dev.stats();
    let first = all.as_ptr() as u64;
    scope(|scope| {
        let data = scope.lend(&mut all);
        let mut queue = scope.queue(&dev);
        for _ in 0..50 {
            queue.launch(&follow, groups, args![data.inout(), val(first + 4)]);
        }
    })
    .unwrap();
    assert_eq!(((dev.stats() - before).launches_chained, all[0]), (0, 51 * 200));
}

/// A lease of what shares a page with a chain's argument begins and ends beside it; both sides' bytes are right.
fn leases_begin_beside_a_chain() {
    let (_hmm, dev) = opened();
    let more = kernel("more");
    let mut all = vec![0u32; 40_000];
    let (left, right) = all.split_at_mut(20_000); // one page has the end of one and the beginning of the other
    let groups = left.len().div_ceil(LOCAL);
    let mut leased = 0;
    scope(|scope| {
        let data = scope.lend(left);
        let mut queue = scope.queue(&dev);
        for _ in 0..30 {
            for _ in 0..10 {
                queue.launch(&more, groups, args![data.inout(), 100u32]);
            }
            let lease = dev.acquire(args![inout(right), 100u32]).unwrap();
            lease.run(&more, groups).unwrap();
            drop(lease);
            leased += 1;
        }
    })
    .unwrap();
    assert!(all[..20_000].iter().all(|&x| x == 300), "{:?}", all[..20_000].iter().find(|&&x| x != 300));
    assert!(all[20_000..].iter().all(|&x| x == leased), "{:?}", all[20_000..].iter().find(|&&x| x != leased));
}

/// A launch over part of what the one before it had goes on with its flight; the rest was the program's meanwhile, and a launch that needs it again is none of the chain's.
fn what_was_given_back_in_between_is_looked_at_anew() {
    let (_hmm, dev) = opened();
    let (add, more) = (kernel("add"), kernel("more"));
    let (mut all, mut one) = (vec![0u32; 20_000], vec![0u32; 8]);
    let groups = all.len().div_ceil(LOCAL);
    let data = all.as_mut_ptr() as usize;
    let mut wanted = 0;
    for round in 0..60u32 {
        one[0] = round;
        // SAFETY: two launches use it, one after the other, as an asynchronous interface lets a program do; all have ended when this returns.
        let [first, second, third] = [(); 3].map(|()| unsafe { std::slice::from_raw_parts_mut(data as *mut u32, 20_000) });
        scope(|scope| {
            let (first, second, third) = (scope.lend(first), scope.lend(second), scope.lend(third));
            let mut queue = scope.queue(&dev);
            let given = queue.launch(&add, groups, args![first.inout(), inp(&one)]);
            queue.launch(&more, groups, args![second.inout(), 300u32]);
            given.wait().unwrap();
            let at = one.as_ptr().cast_mut();
            // SAFETY: the launch that had it has ended; the next one that gets it is launched below.
            unsafe { at.write_volatile(1000 + round) };
            queue.launch(&add, groups, args![third.inout(), inp(&one)]);
        })
        .unwrap();
        wanted += round + 1 + 1000 + round;
        assert_eq!(all[10_000], wanted, "round {round}");
    }
}
