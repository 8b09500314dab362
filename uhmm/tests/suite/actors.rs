//! Threads that do what threads of programs do, each checking what it gets, for tests that move memory under them.

use crate::harness::{Handler, Pages, handle, in_a_child, lock, memfd};
use crate::own_memory::Shared;
use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::thread::JoinHandleExt;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

type Actor = fn(&'static Shared, usize);

const ACTORS: [(&str, Actor); 13] = [
    ("small allocations", small_allocations),
    ("large allocations", large_allocations),
    ("statics", statics),
    ("stacks", stacks),
    ("signals", signals),
    ("hand-over", hand_over),
    ("robust mutexes", robust_mutexes),
    ("a held robust mutex", held_robust_mutex),
    ("thread creation", thread_creation),
    ("fork", fork),
    ("spawn", programs),
    ("pipes and files", input_and_output),
    ("raw clone", raw_clone),
];
pub const COUNT: usize = ACTORS.len();
pub const NAMES: [&str; COUNT] = {
    let mut names = [""; COUNT];
    let mut at = 0;
    while at < COUNT {
        names[at] = ACTORS[at].0;
        at += 1;
    }
    names
};

/// Starts them all.
pub fn start(shared: &'static Shared) -> Vec<JoinHandle<()>> {
    locked_page();
    let threads = ACTORS.iter().enumerate().map(|(index, &(_, actor))| spawn(move || actor(shared, index)));
    threads.collect()
}

/// What threads that only compute leave to the others, and to the mover, after each round.
const BREATH: Duration = Duration::from_micros(300);

fn small_allocations(shared: &'static Shared, me: usize) {
    let mut random = fastrand::Rng::with_seed(1);
    let mut kept: Vec<(u8, Vec<u8>)> = vec![];
    while shared.rest(me) {
        sleep(BREATH);
        for _ in 0..200 {
            let value = random.u8(..);
            kept.push((value, vec![value; random.usize(1..3000)]));
            if kept.len() > 500 {
                let (value, data) = kept.swap_remove(random.usize(0..kept.len()));
                assert!(data.iter().all(|&x| x == value), "a small allocation");
            }
        }
    }
}

fn large_allocations(shared: &'static Shared, me: usize) {
    let mut random = fastrand::Rng::with_seed(2);
    while shared.rest(me) {
        sleep(BREATH);
        let mut data: Vec<u32> = vec![];
        for round in 0..4 {
            let len = data.len() + random.usize(1..300_000); // grows by realloc, also beyond where it stands
            let from = data.len();
            data.extend((from..len).map(|i| i as u32));
            assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32), "round {round} of a large allocation");
            data.truncate(len / 2 + 1);
            data.shrink_to_fit();
        }
    }
}

fn statics(shared: &'static Shared, me: usize) {
    const LEN: usize = 100_000;
    static ZEROED: [AtomicU32; LEN] = [const { AtomicU32::new(0) }; LEN];
    static FILLED: [AtomicU32; 5000] = [const { AtomicU32::new(1) }; 5000];
    let mut expected = 0;
    while shared.rest(me) {
        sleep(BREATH);
        for (i, x) in ZEROED.iter().enumerate() {
            assert_eq!(x.fetch_add(i as u32, Ordering::Relaxed), (i as u32).wrapping_mul(expected), "statics of zeros");
        }
        expected = expected.wrapping_add(1);
        for x in &FILLED {
            assert_eq!(x.fetch_add(1, Ordering::Relaxed), expected, "statics with a value");
        }
    }
}

thread_local! {
    static LOCAL: Cell<[u64; 600]> = const { Cell::new([0; 600]) };
}

fn stacks(shared: &'static Shared, me: usize) {
    /// The sum of what each depth keeps on the stack while the deeper ones run.
    fn deep(depth: u64) -> u64 {
        let mut frame = [depth; 200];
        std::hint::black_box(&mut frame);
        let below = if depth == 0 { 0 } else { deep(depth - 1) };
        std::hint::black_box(&frame).iter().sum::<u64>() + below
    }
    let mut round = 0u64;
    while shared.rest(me) {
        sleep(BREATH);
        assert_eq!(deep(300), 200 * 300 * 301 / 2, "frames");
        LOCAL.with(|local| {
            assert!(local.get().iter().all(|&x| x == round), "thread-local data");
            round += 1;
            local.set([round; 600]);
        });
    }
}

/// A thread that computes on its stack while another sends it signals, handled on that same stack.
fn signals(shared: &'static Shared, me: usize) {
    static HANDLED: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn handler(_: i32) {
        let frame = std::hint::black_box([3u32; 2000]);
        HANDLED.fetch_add(frame.iter().filter(|&&x| x == 3).count() / 2000, Ordering::Relaxed);
    }
    // SAFETY: it uses its stack and an atomic.
    unsafe { handle(libc::SIGUSR1, Handler::Plain(handler), libc::SA_RESTART) };
    let mut sent = 0;
    while shared.rest(me) {
        let end = Arc::new(AtomicBool::new(false));
        let until = end.clone();
        let target = spawn(move || {
            let data = std::hint::black_box([5u64; 4000]);
            while !until.load(Ordering::Relaxed) {
                assert_eq!(std::hint::black_box(&data).iter().sum::<u64>(), 20_000);
            }
        });
        let thread = target.as_pthread_t();
        for _ in 0..20 {
            // SAFETY: the thread is joined only after this.
            assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR1) }, 0);
            sent += 1;
            // A signal that is pending already is not sent twice.
            while HANDLED.load(Ordering::Relaxed) < sent {
                std::thread::yield_now();
            }
        }
        end.store(true, Ordering::Relaxed);
        assert!(target.join().is_ok(), "the target of signals");
        assert_eq!(HANDLED.load(Ordering::Relaxed), sent, "handled signals");
    }
}

fn hand_over(shared: &'static Shared, me: usize) {
    while shared.rest(me) {
        let turn = Arc::new((Mutex::new(0u32), Condvar::new()));
        let players = [0, 1].map(|player| {
            let turn = turn.clone();
            spawn(move || {
                for _ in 0..100 {
                    let mut count = turn.0.lock().unwrap();
                    while *count % 2 != player {
                        count = turn.1.wait(count).unwrap();
                    }
                    *count += 1;
                    turn.1.notify_all();
                }
            })
        });
        players.into_iter().for_each(|player| assert!(player.join().is_ok(), "a player"));
        assert_eq!(*turn.0.lock().unwrap(), 200);
    }
}

/// A robust mutex of the C library's.
#[derive(Clone, Copy)]
pub struct Robust(usize);

impl Robust {
    /// In place.
    ///
    /// # Safety
    /// There is room for one, aligned, in memory that nobody uses otherwise as long as this is used.
    pub unsafe fn new_at(at: usize) -> Self {
        // SAFETY: attributes of our own, which zeroes may be; for the mutex there is room, as the caller says.
        unsafe {
            let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
            assert_eq!(libc::pthread_mutexattr_init(&mut attributes), 0);
            assert_eq!(libc::pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST), 0);
            assert_eq!(libc::pthread_mutex_init(at as *mut _, &attributes), 0);
        }
        Robust(at)
    }

    /// On the heap, for good.
    pub fn new() -> Self {
        let place = Box::leak(Box::new(libc::PTHREAD_MUTEX_INITIALIZER));
        // SAFETY: it stays, and nobody else knows it.
        unsafe { Robust::new_at(place as *mut _ as usize) }
    }

    /// Locks it: 0, or `EOWNERDEAD`; or `ETIMEDOUT` after 20 s.
    pub fn lock(self) -> i32 {
        let mut limit = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a time of our own, and a mutex that is there.
        unsafe {
            libc::clock_gettime(libc::CLOCK_REALTIME, &mut limit);
            limit.tv_sec += 20;
            libc::pthread_mutex_timedlock(self.0 as *mut _, &limit)
        }
    }

    pub fn unlock(self) {
        // SAFETY: the mutex is there.
        assert_eq!(unsafe { libc::pthread_mutex_unlock(self.0 as *mut _) }, 0);
    }

    pub fn made_consistent(self) {
        // SAFETY: as above.
        assert_eq!(unsafe { libc::pthread_mutex_consistent(self.0 as *mut _) }, 0);
        self.unlock();
    }
}

/// Owners die; whoever comes next is told.
fn robust_mutexes(shared: &'static Shared, me: usize) {
    let fixed = Robust::new();
    let mut random = fastrand::Rng::with_seed(3);
    while shared.rest(me) {
        // One that all rounds use, and one where no mutex was before.
        let page = Pages::new(random.usize(1..20) * 4096);
        // SAFETY: inside `page`, which outlives this round's threads.
        let fresh = unsafe { Robust::new_at(page.start() as usize + page.len() - 512) };
        for mutex in [fixed, fresh] {
            let owner = spawn(move || {
                assert_eq!(fixed.lock(), 0);
                fixed.unlock();
                assert_eq!(mutex.lock(), 0, "a mutex that nobody holds");
            });
            if random.bool() {
                assert!(owner.join().is_ok(), "an owner");
            } else {
                while !owner.is_finished() {
                    std::thread::yield_now();
                }
            }
            assert_eq!(mutex.lock(), libc::EOWNERDEAD, "the mutex of a dead owner");
            mutex.made_consistent();
        }
    }
}

/// It holds one while it rests.
fn held_robust_mutex(shared: &'static Shared, me: usize) {
    loop {
        let mutex = Robust::new();
        assert_eq!(mutex.lock(), 0);
        let go_on = shared.rest(me);
        mutex.unlock();
        if !go_on {
            return;
        }
        sleep(Duration::from_micros(100));
    }
}

fn thread_creation(shared: &'static Shared, me: usize) {
    let mut random = fastrand::Rng::with_seed(4);
    while shared.rest(me) {
        let threads: Vec<_> = (0..random.usize(1..6))
            .map(|number| {
                let given = vec![number; 1000];
                spawn(move || {
                    let frame = std::hint::black_box([number; 3000]);
                    (given, frame.iter().sum::<usize>())
                })
            })
            .collect();
        for (number, thread) in threads.into_iter().enumerate() {
            let (given, sum) = thread.join().expect("a thread");
            assert!(sum == 3000 * number && given.len() == 1000 && given.iter().all(|&x| x == number), "thread {number}");
        }
    }
}

fn fork(shared: &'static Shared, me: usize) {
    let mut data: Vec<u32> = (0..200_000).collect();
    let mut round = 0;
    while shared.rest(me) {
        round += 1;
        data.iter_mut().for_each(|x| *x += 1);
        in_a_child(|| data.iter().enumerate().all(|(i, &x)| x == i as u32 + round));
        sleep(Duration::from_millis(100));
    }
}

fn programs(shared: &'static Shared, me: usize) {
    while shared.rest(me) {
        let text = format!("round {}", shared.beats[me].load(Ordering::Relaxed));
        let output = Command::new("echo").arg(&text).output().expect("echo");
        assert_eq!(output.stdout, (text + "\n").as_bytes(), "a program's output");
        sleep(Duration::from_millis(10));
    }
}

fn input_and_output(shared: &'static Shared, me: usize) {
    let (mut from, mut to) = std::io::pipe().expect("a pipe");
    let file = memfd();
    let mut random = fastrand::Rng::with_seed(5);
    while shared.rest(me) {
        sleep(BREATH);
        let sent: Vec<u8> = (0..random.usize(1..60_000)).map(|_| random.u8(..)).collect();
        let mut got = vec![0; sent.len()];
        to.write_all(&sent).expect("write");
        from.read_exact(&mut got).expect("read");
        assert!(sent == got, "through a pipe");
        got.fill(0);
        let offset = random.u64(0..100_000);
        file.write_all_at(&sent, offset).expect("write");
        file.read_exact_at(&mut got, offset).expect("read");
        assert!(sent == got, "through a file");
    }
}

/// A page of locked memory, which never moves.
pub fn locked_page() -> usize {
    static PAGE: AtomicUsize = AtomicUsize::new(0);
    if PAGE.load(Ordering::Relaxed) == 0 {
        // Between its neighbours it is a mapping of its own.
        let mut page = std::mem::ManuallyDrop::new(Pages::new(3 * 4096));
        let middle = &mut page.slice::<u8>()[4096..2 * 4096];
        assert!(lock(middle), "mlock a page");
        PAGE.store(middle.as_ptr() as usize, Ordering::Relaxed);
    }
    PAGE.load(Ordering::Relaxed)
}

struct Work {
    data: [u32; 3000],
    sum: AtomicU32,
}

/// A thread that no C library knows: what it uses is its stack, what it was given, and no thread-local data.
fn raw_clone(shared: &'static Shared, me: usize) {
    extern "C" fn run(work: *mut libc::c_void) -> i32 {
        // SAFETY: who clones gives this, and keeps it until the thread's word is cleared.
        let work = unsafe { &*work.cast::<Work>() };
        let mut copy = [0u32; 3000];
        copy.copy_from_slice(&work.data);
        work.sum.store(std::hint::black_box(&copy).iter().fold(0, |sum, x| sum.wrapping_add(*x)), Ordering::Release);
        0
    }
    let word = &shared.raw;
    let mut stack = vec![0u8; 256 << 10];
    let mut round = 0;
    while shared.rest(me) {
        round += 1;
        let mut work = Box::new(Work { data: [round; 3000], sum: AtomicU32::new(0) });
        word.store(1, Ordering::Release);
        let flags = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD | libc::CLONE_SYSVSEM;
        // SAFETY: the thread uses the stack, its work and the word, which stay until the kernel has cleared the word; that is waited for.
        unsafe {
            // It shares our thread-local data, so it must take no signal.
            let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
            let top = (stack.as_mut_ptr_range().end as usize & !15) as *mut libc::c_void;
            let argument = (&raw mut *work).cast();
            let tid =
                libc::clone(run, top, flags | libc::CLONE_CHILD_CLEARTID, argument, null_mut::<i32>(), null_mut::<u8>(), &raw const *word);
            assert!(tid > 0, "clone");
            libc::pthread_sigmask(libc::SIG_SETMASK, &old, null_mut());
            let limit = libc::timespec { tv_sec: 20, tv_nsec: 0 };
            while word.load(Ordering::Acquire) != 0 {
                let waited = libc::syscall(libc::SYS_futex, &raw const *word, libc::FUTEX_WAIT, 1, &limit);
                let error = std::io::Error::last_os_error().raw_os_error();
                assert!(waited == 0 || error != Some(libc::ETIMEDOUT), "the word of a raw thread is cleared");
            }
        }
        assert_eq!(work.sum.load(Ordering::Acquire), round.wrapping_mul(3000), "a raw thread");
        sleep(Duration::from_millis(1));
    }
}
