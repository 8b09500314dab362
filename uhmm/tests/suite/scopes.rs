//! Launches that nobody waits for at once.

use crate::harness::*;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, Error, args, inout, inp, out, scope};

crate::tests![
    results_are_there_when_the_scope_ends,
    lent_memory_goes_from_launch_to_launch_in_order,
    errors_come_from_who_waits_or_from_the_scope,
    the_next_launch_is_prepared_while_one_runs,
    what_a_launch_overwrites_is_not_taken_early,
    launches_of_which_the_device_holds_one,
    a_launch_waits_for_an_event_of_another_device,
    the_host_does_not_take_part,
    a_panic_waits_for_the_launches,
    more_launches_than_a_queue_holds,
    scopes_of_many_threads_on_two_devices,
];

fn double(ctx: &Ctx<'_>) {
    let first = ctx.group() * 1000;
    for (to, from) in ctx.out::<u32>(0).chunk(1000).iter_mut().zip(&ctx.inp::<u32>(1)[first..]) {
        *to = 2 * from;
    }
}

fn results_are_there_when_the_scope_ends() {
    let (_hmm, dev) = device(64);
    let a: Vec<u32> = (0..1_000_000).collect();
    let (mut r, mut s) = (vec![0; 1_000_000], vec![0; 1_000_000]);
    let started = scope(|scope| {
        let first = scope.launch(&dev, &double, 1000, args![out(&mut r), inp(&a)]);
        std::mem::forget(scope.launch(&dev, &double, 1000, args![out(&mut s), inp(&a)]));
        let event = first.event();
        first.wait().unwrap();
        assert!(event.is_done());
        a[5]
    });
    assert_eq!(started.unwrap(), 5);
    assert!(r.iter().zip(&s).zip(&a).all(|((r, s), a)| *r == 2 * a && *s == 2 * a));
}

fn lent_memory_goes_from_launch_to_launch_in_order() {
    let (_hmm, dev) = device(64);
    let (mut x, mut y) = (vec![1u32; 300_000], vec![0u32; 300_000]);
    for round in 0..10 {
        x.fill(1);
        scope(|scope| {
            let (x, y) = (scope.lend(&mut x), scope.lend(&mut y));
            for _ in 0..5 {
                scope.launch(&dev, &double, 300, args![y.out(), x.inp()]);
                scope.launch(&dev, &double, 300, args![x.out(), y.inp()]);
                scope.launch(&dev, &increment, 300, args![x.inout()]);
            }
        })
        .unwrap();
        let expected = (0..5).fold(1u32, |x, _| 4 * x + 1);
        assert!(x.iter().all(|&x| x == expected), "round {round}: {} is not {expected}", x[0]);
    }
}

fn errors_come_from_who_waits_or_from_the_scope() {
    let (_hmm, dev) = device(16);
    let mut data = vec![0u32; 5000];
    let fails = |_: &Ctx<'_>| panic!("on purpose");
    let result = scope(|scope| {
        let data = scope.lend(&mut data);
        let waited = scope.launch(&dev, &fails, 1, args![data.inout()]);
        assert!(matches!(waited.wait(), Err(Error::Kernel(_))));
        scope.launch(&dev, &increment, 5, args![data.inout()]);
    });
    assert!(result.is_ok(), "who waited has the error");
    let result = scope(|scope| {
        let data = scope.lend(&mut data);
        scope.launch(&dev, &increment, 0, args![data.inout()]);
        scope.launch(&dev, &fails, 1, args![data.inout()]);
        scope.launch(&dev, &increment, 5, args![data.inout()]);
    });
    assert!(matches!(result, Err(Error::Grid(_))), "the first that failed: {result:?}");
    let overlapping = scope(|scope| {
        let data = scope.lend(&mut data);
        scope.launch(&dev, &increment, 5, args![data.inout(), data.inp()]).wait()
    });
    assert!(matches!(overlapping, Ok(Err(Error::Overlap { .. }))));
    assert!(data.iter().all(|&x| x == 2), "{}", data[0]);
}

/// Waits in a kernel, 10 seconds at most: false if in vain.
fn until(flag: &AtomicBool) -> bool {
    let limit = Instant::now() + Duration::from_secs(10);
    while !flag.load(Ordering::SeqCst) && Instant::now() < limit {
        std::thread::yield_now();
    }
    flag.load(Ordering::SeqCst)
}

fn the_next_launch_is_prepared_while_one_runs() {
    let (_hmm, dev) = device(64);
    let (mut first, mut second) = (vec![0u32; 1000], vec![1u32; 1 << 20]);
    let moved = AtomicBool::new(false);
    let probe = &raw const second[500_000] as usize;
    let waits = |_: &Ctx<'_>| assert!(until(&moved), "the other launch's memory did not come while this one ran");
    scope(|scope| {
        scope.launch(&dev, &waits, 1, args![inout(&mut first)]);
        scope.launch(&dev, &increment, 1049, args![inout(&mut second)]);
        let limit = Instant::now() + Duration::from_secs(10);
        while present(probe as *const u32) && Instant::now() < limit {
            std::thread::yield_now();
        }
        moved.store(!present(probe as *const u32), Ordering::SeqCst);
    })
    .unwrap();
    assert!(second.iter().all(|&x| x == 2));
}

/// A kernel that follows a pointer into what the next launch overwrites still finds what was there.
fn what_a_launch_overwrites_is_not_taken_early() {
    let (_hmm, dev) = device(64);
    if !dev.info().capabilities.replayable_faults {
        return; // no pointer can be followed
    }
    let mut data = vec![7u32; 1 << 20];
    let source = vec![1u32; 1 << 20];
    let left = AtomicBool::new(false);
    let probe = &raw const source[500_000] as usize;
    let at = data.as_ptr() as usize;
    for _ in 0..5 {
        data.fill(7);
        left.store(false, Ordering::SeqCst);
        let follows = |ctx: &Ctx<'_>| {
            until(&left);
            std::thread::sleep(Duration::from_millis(20)); // time for what should wait
            for i in (0..1 << 20).step_by(1000) {
                // SAFETY: the vector outlives the launch; who overwrites it comes after this kernel on its device.
                assert_eq!(unsafe { *ctx.ptr((at as *const u32).add(i)) }, 7, "element {i}");
            }
        };
        scope(|scope| {
            scope.launch(&dev, &follows, 1, args![1u32]);
            scope.launch(&dev, &double, 1049, args![out(&mut data), inp(&source)]);
            // What is only read is shared with the device: its pages are there all the same.
            std::thread::sleep(Duration::from_millis(20));
            left.store(present(probe as *const u32), Ordering::SeqCst);
        })
        .unwrap();
        assert!(data.iter().all(|&x| x == 2));
    }
}

/// A launch that was prepared while another ran failed for want of room, though alone it fits.
fn launches_of_which_the_device_holds_one() {
    let hmm = uhmm::Uhmm::new().unwrap();
    for faults in [true, false] {
        let name = if faults { "small" } else { "small without faults" };
        let dev = hmm.soft(name).memory(16 << 20).threads(2).replayable_faults(faults).open().unwrap();
        let (mut x, mut y) = (vec![1u32; 3 << 20], vec![2u32; 3 << 20]);
        for _ in 0..3 {
            scope(|scope| {
                let (x, y) = (scope.lend(&mut x), scope.lend(&mut y));
                for _ in 0..3 {
                    scope.launch(&dev, &increment, groups(3 << 20), args![x.inout()]);
                    scope.launch(&dev, &increment, groups(3 << 20), args![y.inout()]);
                }
            })
            .unwrap();
        }
        assert!(x.iter().all(|&x| x == 10) && y.iter().all(|&y| y == 11));
    }
}

fn a_launch_waits_for_an_event_of_another_device() {
    let (hmm, one) = device(64);
    let two = hmm.soft("two").memory(64 << 20).threads(1).open().unwrap();
    let order = AtomicUsize::new(0);
    let slow = |_: &Ctx<'_>| {
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(order.fetch_add(1, Ordering::SeqCst), 0);
    };
    let after = |_: &Ctx<'_>| assert_eq!(order.fetch_add(1, Ordering::SeqCst), 1);
    for _ in 0..5 {
        order.store(0, Ordering::SeqCst);
        scope(|scope| {
            let (mut first, mut second) = (scope.queue(&one), scope.queue(&two));
            let launched = first.launch(&slow, 1, args![1u32]);
            second.wait_for(&launched.event());
            second.launch(&after, 1, args![1u32]);
        })
        .unwrap();
        assert_eq!(order.load(Ordering::SeqCst), 2);
    }
}

/// The host knows nothing of what devices do: two kernels could have had the same memory for writing, in safe code.
fn the_host_does_not_take_part() {
    let (_hmm, dev) = device(16);
    let mut data = vec![0u32; 1000];
    let refused = scope(|scope| {
        let data = scope.lend(&mut data);
        scope.launch(&dev, &increment, 1, args![data.inout()]);
        uhmm::Host::new(1).run(&increment, 1, args![data.inout()])
    });
    assert!(matches!(refused, Ok(Err(Error::Lent))));
    uhmm::Host::new(1).run(&increment, 1, args![inout(&mut data)]).unwrap();
    assert!(data.iter().all(|&x| x == 2));
}

fn a_panic_waits_for_the_launches() {
    let (_hmm, dev) = device(16);
    let mut data = vec![0u32; 1000];
    let slow = |ctx: &Ctx<'_>| {
        std::thread::sleep(Duration::from_millis(100));
        ctx.out::<u32>(0).chunk(1000).fill(3);
    };
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
        scope(|scope| {
            scope.launch(&dev, &slow, 1, args![inout(&mut data)]);
            panic!("on purpose");
        })
    }));
    assert!(result.is_err());
    assert!(data.iter().all(|&x| x == 3), "the launch had ended before the panic went on");
}

fn more_launches_than_a_queue_holds() {
    let (_hmm, dev) = device(16);
    let mut data = vec![0u32; 2000];
    scope(|scope| {
        let data = scope.lend(&mut data);
        for _ in 0..500 {
            scope.launch(&dev, &increment, 2, args![data.inout()]);
        }
    })
    .unwrap();
    assert!(data.iter().all(|&x| x == 500));
}

/// Threads launch over arrays of their own, which lie side by side, on two devices, one after the other as it comes; others touch and evict.
fn scopes_of_many_threads_on_two_devices() {
    let (hmm, one) = device(32);
    let two = hmm.soft("two").memory(32 << 20).threads(2).open().unwrap();
    let end = Instant::now() + seconds(5);
    let turns = AtomicU32::new(0);
    std::thread::scope(|threads| {
        for thread in 0..4u64 {
            let (hmm, one, two, turns) = (&hmm, &one, &two, &turns);
            threads.spawn(move || {
                let mut random = fastrand::Rng::with_seed(thread);
                let mut arrays: Vec<(Vec<u32>, u32)> = (0..4).map(|_| (vec![0; random.usize(1..150_000)], 0)).collect();
                while Instant::now() < end {
                    scope(|scope| {
                        for (data, value) in &mut arrays {
                            let (len, data) = (data.len(), scope.lend(data));
                            for _ in 0..random.u32(0..4) {
                                let dev = if random.bool() { one } else { two };
                                scope.launch(dev, &increment, groups(len), args![data.inout()]);
                                *value += 1;
                            }
                        }
                        if random.u32(..8) == 0 {
                            hmm.evict_all().unwrap();
                        }
                    })
                    .unwrap();
                    for (data, value) in &mut arrays {
                        let at = random.usize(..data.len());
                        assert_eq!(data[at], *value);
                        data.iter_mut().for_each(|x| *x += 1);
                        *value += 1;
                    }
                    turns.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let turns = turns.into_inner();
    assert!(turns > 10, "only {turns} turns");
}
