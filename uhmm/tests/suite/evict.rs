//! Everything comes home: when the program asks, and before the action of a signal.

use crate::harness::*;
use std::io::Read;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, Device, Error, Uhmm, args, inout, inp};

crate::tests![
    evict_all_brings_everything_home,
    evict_all_waits_for_another_devices_launch,
    evict_all_beside_launches,
    a_raised_signal_finds_everything_at_home,
    another_process_sends_the_signal,
    the_earlier_action_is_kept,
    signals_that_cannot_be_had,
    a_signal_without_uhmm,
    a_signal_in_a_forked_child,
    a_kernel_that_does_not_end,
    a_kernel_raises_the_signal,
    a_signal_to_a_thread_that_holds_off_launches,
    signals_beside_launches_and_forks,
];

/// 4 MiB that hold their index, on the device.
struct Away {
    data: Vec<u32>,
    all: usize,
}

impl Away {
    fn new() -> Self {
        let data: Vec<u32> = (0..1 << 20).collect();
        let all = pages_present(&data);
        assert!(all >= 1023);
        Away { data, all }
    }

    fn go(&self, dev: &Device) {
        dev.prefetch(&self.data).unwrap();
        assert_eq!(pages_present(&self.data), 0);
    }

    fn is_home(&self) -> bool {
        pages_present(&self.data) == self.all
    }

    fn check(&self) {
        assert!(self.data.iter().enumerate().all(|(i, &x)| x == i as u32));
    }
}

fn evict_all_brings_everything_home() {
    let (hmm, one) = device(64);
    let two = hmm.soft("two").memory(64 << 20).threads(1).open().unwrap();
    let (first, second, shared) = (Away::new(), Away::new(), Away::new());
    for _ in 0..3 {
        first.go(&one);
        second.go(&two);
        two.run(&|ctx: &Ctx<'_>| assert_eq!(ctx.inp::<u32>(0)[5], 5), 1, args![inp(&shared.data)]).unwrap();
        hmm.evict_all().unwrap();
        assert!(first.is_home() && second.is_home());
        let before = hmm.stats();
        [&first, &second, &shared].into_iter().for_each(Away::check);
        assert_eq!((hmm.stats() - before).cpu_faults, 0, "nothing is left to fetch");
        // Also what was duplicated is the CPU's alone.
        let mut written = shared.data[0];
        // SAFETY: what is there already; nobody else uses it.
        unsafe { (&raw const shared.data[0]).cast_mut().write_volatile(written) };
        written ^= shared.data[0];
        assert_eq!((written, (hmm.stats() - before).cpu_faults), (0, 0));
    }
    let inside = |_: &Ctx<'_>| assert!(matches!(hmm.evict_all(), Err(Error::Reentrant)));
    one.run(&inside, 1, args![]).unwrap();
    Uhmm::new().unwrap().evict_all().unwrap();
}

/// A launch, and what lets it end.
fn until_released(dev: &Device, data: &mut [u32], runs: &AtomicBool, end: &AtomicBool) {
    let kernel = |ctx: &Ctx<'_>| {
        ctx.out::<u32>(0).chunk(1 << 20)[7] = 9;
        runs.store(true, Ordering::Release);
        while !end.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
    };
    dev.run(&kernel, 1, args![inout(data)]).unwrap();
}

fn wait_for(flag: &AtomicBool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !flag.load(Ordering::Acquire) {
        assert!(Instant::now() < limit, "it never comes");
        std::thread::yield_now();
    }
}

static RUNS: AtomicBool = AtomicBool::new(false);
static END: AtomicBool = AtomicBool::new(false);

fn evict_all_waits_for_another_devices_launch() {
    let (hmm, _one) = device(64);
    let two = hmm.soft("two").memory(64 << 20).threads(1).open().unwrap();
    let mut pages = Pages::new(4 << 20); // whole pages: nothing of them has to stay for the launch
    let used = pages.slice::<u32>();
    used.fill(1);
    std::thread::scope(|scope| {
        let launch = scope.spawn(|| until_released(&two, used, &RUNS, &END));
        wait_for(&RUNS);
        let evicted = scope.spawn(|| hmm.evict_all().unwrap());
        std::thread::sleep(Duration::from_secs(2)); // time enough on a busy machine, too
        assert!(!evicted.is_finished(), "it waits for the launch");
        END.store(true, Ordering::Release);
        launch.join().unwrap();
        evicted.join().unwrap();
    });
    let used = pages.slice::<u32>();
    assert_eq!(pages_present(used), 1024);
    assert_eq!((used[6], used[7]), (1, 9));
}

/// It waits for a launch and holds up the next; nobody hangs and nothing is lost.
fn evict_all_beside_launches() {
    let (hmm, dev) = device(16);
    let end = Instant::now() + seconds(5);
    std::thread::scope(|scope| {
        for part in 0..2u32 {
            let dev = &dev;
            let look = |data: &[u32], expected| assert!(data.iter().step_by(1000).all(|&x| x == expected));
            scope.spawn(move || increment_until(end, dev, part, 300_000, look));
        }
        let mut times = 0;
        while Instant::now() < end {
            hmm.evict_all().unwrap();
            times += 1;
        }
        assert!(times > 20, "{times}");
    });
}

static SEEN: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);
static WATCHED: AtomicUsize = AtomicUsize::new(0);

/// Counts the pages of the watched data. Opening a file by a path that is short allocates nothing.
extern "C" fn count_pages(_: i32) {
    // SAFETY: `watch` is given what outlives the signals; it is not read, only named.
    let data = unsafe { std::slice::from_raw_parts(WATCHED.load(Ordering::Relaxed) as *const u32, 1 << 20) };
    SEEN.store(pages_present(data), Ordering::Relaxed);
    CALLS.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn count_pages_and_info(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives it to a handler of this kind.
    assert!(unsafe { (*info).si_signo } == signal && !context.is_null());
    count_pages(signal);
}

/// Lets [`count_pages`] handle a signal.
fn count_at(signal: i32, flags: i32) {
    // SAFETY: it allocates nothing and takes no lock.
    unsafe { handle(signal, Handler::Plain(count_pages), flags) };
}

fn watch(away: &Away) {
    WATCHED.store(away.data.as_ptr() as usize, Ordering::Relaxed);
    SEEN.store(0, Ordering::Relaxed);
}

fn a_raised_signal_finds_everything_at_home() {
    let (hmm, dev) = device(64);
    let away = Away::new();
    count_at(libc::SIGUSR1, libc::SA_RESETHAND);
    // SAFETY: it does the same, and looks at what it is given.
    unsafe { handle(libc::SIGABRT, Handler::Info(count_pages_and_info), 0) };
    for signal in [libc::SIGUSR1, libc::SIGABRT] {
        hmm.evict_on_signal(signal).unwrap();
        away.go(&dev);
        watch(&away);
        raise(signal);
        assert_eq!(SEEN.load(Ordering::Relaxed), away.all, "pages at home when the handler ran");
        away.check();
    }
    let calls = CALLS.load(Ordering::Relaxed);
    // SA_RESETHAND: the handler is not there a second time; the signal still brings everything home, and so does one without a handler.
    hmm.evict_on_signal(libc::SIGUSR2).unwrap();
    hmm.evict_on_signal(libc::SIGUSR2).unwrap();
    for signal in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGRTMAX()] {
        hmm.evict_on_signal(signal).unwrap();
        away.go(&dev);
        raise(signal);
        assert!(away.is_home());
    }
    assert_eq!(CALLS.load(Ordering::Relaxed), calls);
    away.check();
}

fn another_process_sends_the_signal() {
    let (hmm, dev) = device(64);
    let away = Away::new();
    count_at(libc::SIGUSR2, 0);
    hmm.evict_on_signal(libc::SIGUSR2).unwrap();
    for round in 1..5 {
        away.go(&dev);
        watch(&away);
        let sent = Command::new("kill").args(["-USR2", &std::process::id().to_string()]).status().unwrap();
        assert!(sent.success());
        let limit = Instant::now() + Duration::from_secs(20);
        while CALLS.load(Ordering::Relaxed) < round {
            assert!(Instant::now() < limit, "the handler never ran");
            std::thread::yield_now();
        }
        assert_eq!(SEEN.load(Ordering::Relaxed), away.all);
        away.check();
    }
}

/// What sigaction(2) tells is there again when uhmm has ended; and a system call is restarted, or not, as the program has asked.
fn the_earlier_action_is_kept() {
    const SA_RESTORER: i32 = 0x0400_0000; // which glibc adds
    let now = |signal| {
        let action = action(signal);
        // SAFETY: a set of our own.
        let blocked = unsafe { libc::sigismember(&action.sa_mask, libc::SIGHUP) };
        (action.sa_sigaction, action.sa_flags & !SA_RESTORER, blocked)
    };
    count_at(libc::SIGUSR1, 0);
    count_at(libc::SIGUSR2, libc::SA_RESTART);
    let signals = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM, libc::SIGSEGV];
    let before = signals.map(now);
    let away = Away::new();
    watch(&away);
    {
        let (hmm, dev) = device(64);
        signals.into_iter().for_each(|signal| hmm.evict_on_signal(signal).unwrap());
        away.go(&dev);
        let interrupted = |signal| {
            let me = gettid();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(30));
                    send(me, signal);
                    std::thread::sleep(Duration::from_millis(30));
                    send(me, libc::SIGUSR1);
                });
                let mut pipe = std::io::pipe().unwrap();
                let started = Instant::now();
                assert_eq!(pipe.0.read(&mut [0]).unwrap_err().raw_os_error(), Some(libc::EINTR));
                started.elapsed()
            })
        };
        assert!(interrupted(libc::SIGUSR2) >= Duration::from_millis(55), "the read was not restarted");
        assert!(away.is_home());
    }
    assert_eq!(signals.map(now), before);
}

fn signals_that_cannot_be_had() {
    let hmm = Uhmm::new().unwrap();
    for signal in [0, -1, libc::SIGKILL, libc::SIGSTOP, 32, 33, 65, i32::MAX] {
        let error = hmm.evict_on_signal(signal).unwrap_err();
        assert!(error.to_string().contains(&format!("signal {signal} cannot be handled")), "{error}");
    }
}

/// uhmm has ended; the program's handler, installed meanwhile, hands on to ours.
fn a_signal_without_uhmm() {
    let away = Away::new();
    count_at(libc::SIGUSR2, 0);
    static BELOW: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn over(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let below: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            // SAFETY: uhmm's handler, which is of this kind.
            unsafe { std::mem::transmute(BELOW.load(Ordering::Relaxed)) };
        below(signal, info, context);
    }
    for round in 0..3 {
        let (hmm, dev) = device(64);
        hmm.evict_on_signal(libc::SIGUSR2).unwrap();
        if round == 1 {
            BELOW.store(action(libc::SIGUSR2).sa_sigaction, Ordering::Relaxed);
            // SAFETY: it does what the one below does.
            unsafe { handle(libc::SIGUSR2, Handler::Info(over), 0) };
        }
        away.go(&dev);
        watch(&away);
        raise(libc::SIGUSR2);
        assert_eq!(SEEN.load(Ordering::Relaxed), away.all, "round {round}");
        drop((hmm, dev));
        let (calls, started) = (CALLS.load(Ordering::Relaxed), Instant::now());
        raise(libc::SIGUSR2);
        assert_eq!(CALLS.load(Ordering::Relaxed), calls + 1, "round {round}");
        assert!(started.elapsed() < Duration::from_secs(2));
    }
}

/// A child has no evictor: by fork, and by a clone that no library is told of.
fn a_signal_in_a_forked_child() {
    let (hmm, dev) = device(64);
    let away = Away::new();
    count_at(libc::SIGUSR2, 0);
    hmm.evict_on_signal(libc::SIGUSR2).unwrap();
    watch(&away);
    for raw in [false, true] {
        away.go(&dev);
        let calls = CALLS.load(Ordering::Relaxed);
        let pid = fork(raw, || {
            let started = Instant::now();
            send(gettid(), libc::SIGUSR2);
            let called = CALLS.load(Ordering::Relaxed) == calls + 1;
            called && started.elapsed() < Duration::from_secs(2)
        });
        assert_eq!(wait(pid), 0, "raw: {raw}");
        away.go(&dev);
        raise(libc::SIGUSR2);
        assert_eq!(SEEN.load(Ordering::Relaxed), away.all, "the parent's evictor serves on");
    }
    away.check();
}

/// The handler does not wait for ever, and everything is home but what the launch uses.
fn a_kernel_that_does_not_end() {
    let (hmm, dev) = device(64);
    let away = Away::new();
    let mut used = vec![1u32; 1 << 20];
    hmm.evict_on_signal(libc::SIGUSR2).unwrap();
    away.go(&dev);
    std::thread::scope(|scope| {
        let launch = scope.spawn(|| until_released(&dev, &mut used, &RUNS, &END));
        wait_for(&RUNS);
        let started = Instant::now();
        raise(libc::SIGUSR2);
        let took = started.elapsed();
        let home = away.is_home();
        END.store(true, Ordering::Release);
        launch.join().unwrap();
        assert!(home && took < Duration::from_secs(14), "{took:?}");
    });
    assert_eq!((used[6], used[7]), (1, 9));
    away.check();
}

/// A kernel's own fault: its launch cannot end while its worker is in the handler, and is not waited for.
fn a_kernel_raises_the_signal() {
    let (hmm, dev) = device(64);
    let away = Away::new();
    count_at(libc::SIGFPE, 0);
    hmm.evict_on_signal(libc::SIGFPE).unwrap();
    away.go(&dev);
    watch(&away);
    let mut data = vec![1u32; 1 << 20];
    let kernel = |ctx: &Ctx<'_>| {
        ctx.out::<u32>(0).chunk(1 << 20).fill(3);
        let started = Instant::now();
        raise(libc::SIGFPE);
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    };
    dev.run(&kernel, 1, args![inout(&mut data)]).unwrap();
    assert_eq!((SEEN.load(Ordering::Relaxed), CALLS.load(Ordering::Relaxed)), (away.all, 1));
    assert!(data.iter().all(|&x| x == 3));
}

/// The story: the signal came to a thread that was closing a device, or forking, and so held off launches. Its handler waited for the evictor, and that for the
/// thread, five seconds.
fn a_signal_to_a_thread_that_holds_off_launches() {
    count_at(libc::SIGUSR2, libc::SA_RESTART);
    let away = Away::new();
    watch(&away);
    let hmm = Uhmm::new().unwrap();
    hmm.evict_on_signal(libc::SIGUSR2).unwrap();
    let end = Instant::now() + seconds(5);
    let (tid, mut longest) = (gettid(), Duration::ZERO);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Not too often, for the kernel begins a fork again that a signal interrupts; and at any point of what takes some milliseconds.
            for round in 0u64.. {
                if Instant::now() >= end {
                    break;
                }
                send(tid, libc::SIGUSR2);
                std::thread::sleep(Duration::from_micros(20_000 + round * 7919 % 10_000));
            }
        });
        while Instant::now() < end {
            let started = Instant::now();
            let dev = device(64).1;
            dev.prefetch(&away.data).unwrap();
            drop(dev);
            in_a_child(|| true);
            longest = longest.max(started.elapsed());
        }
    });
    assert!(CALLS.load(Ordering::Relaxed) > 20, "{CALLS:?}");
    assert!(longest < Duration::from_secs(4), "one of them took {longest:?}");
    away.check();
}

/// Signals interrupt threads wherever they are: in a launch, in a fault, in the beginning and the end of uhmm, in a fork.
fn signals_beside_launches_and_forks() {
    count_at(libc::SIGUSR2, libc::SA_RESTART);
    let away = Away::new();
    watch(&away);
    let end = Instant::now() + seconds(5);
    let tids = [const { AtomicI32::new(0) }; 2];
    let work = |part: usize| {
        tids[part].store(gettid(), Ordering::Relaxed);
        let mut expected = part as u32;
        let mut data = vec![expected; 200_000];
        while Instant::now() < end {
            let (hmm, dev) = device(16);
            hmm.evict_on_signal(libc::SIGUSR2).unwrap();
            for _ in 0..4 {
                dev.prefetch(&away.data).unwrap();
                dev.run(&increment, groups(data.len()), args![inout(&mut data)]).unwrap();
                expected += 1;
            }
            in_a_child(|| data.iter().all(|&x| x == expected));
            drop((hmm, dev));
            assert!(data.iter().all(|&x| x == expected));
        }
        tids[part].store(0, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        let work = &work;
        (0..2).for_each(|part| drop(scope.spawn(move || work(part))));
        while Instant::now() < end {
            for tid in tids.iter().map(|tid| tid.load(Ordering::Relaxed)).filter(|&tid| tid != 0) {
                send(tid, libc::SIGUSR2);
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    });
    assert!(CALLS.load(Ordering::Relaxed) > 20, "{CALLS:?}");
    away.check();
}
