//! futex(2) on words that are on the device: the kernel reads, and sometimes writes, the word of who waits and of who wakes.
use crate::harness::*;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

crate::tests![waits_and_wakes, a_waiter_is_woken_while_its_word_is_away, words_that_the_kernel_writes, locks_on_pages_that_keep_leaving,];

/// Small and huge pages, with a word at the end of the first block's first page.
fn each_word(test: impl Fn(&uhmm::Device, &[u8], &AtomicU32)) {
    for huge in [false, true] {
        let (_hmm, dev) = device(32);
        let mut pages = if huge { Pages::huge(2 << 20) } else { Pages::new(2 << 20) };
        let data = pages.slice::<u8>();
        data.fill(1);
        for at in [0, 4092, (1 << 20) + 4] {
            // SAFETY: inside the pages, which outlive it, and aligned; nobody reads these bytes through the slice.
            let word = unsafe { &*data.as_ptr().add(at).cast::<AtomicU32>() };
            test(&dev, data, word);
        }
    }
}

/// Sends it all to the device. Nobody touches it meanwhile, so it is there after one prefetch.
fn away(dev: &uhmm::Device, data: &[u8]) {
    dev.prefetch(data).unwrap();
    assert_eq!(pages_present(data), 0, "the word is on the device");
}

/// futex(2) without a time limit; -1 and errno, or its result.
fn futex(word: &AtomicU32, operation: i32, value: u32, more: [usize; 3]) -> isize {
    // SAFETY: the word is alive; of the other arguments those that are addresses are of what the caller keeps alive.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, more[0], more[1], more[2]) };
    result as isize
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

const PRIVATE: i32 = libc::FUTEX_PRIVATE_FLAG;

/// Private words, which the kernel knows by their address, and others, which it knows by their page.
const KINDS: [i32; 2] = [PRIVATE, 0];

/// The value is compared in the kernel.
fn waits_and_wakes() {
    each_word(|dev, data, word| {
        for kind in KINDS {
            word.store(5, Ordering::Relaxed);
            away(dev, data);
            assert_eq!((futex(word, libc::FUTEX_WAIT | kind, 4, [0; 3]), errno()), (-1, libc::EAGAIN));
            away(dev, data);
            let soon = [0i64, 2_000_000];
            assert_eq!((futex(word, libc::FUTEX_WAIT | kind, 5, [soon.as_ptr() as usize, 0, 0]), errno()), (-1, libc::ETIMEDOUT));
            away(dev, data);
            assert_eq!(futex(word, libc::FUTEX_WAKE | kind, 1, [0; 3]), 0);
            assert_eq!(word.load(Ordering::Relaxed), 5);
        }
    });
}

/// Waits until a thread sleeps in futex(2) and has read its word. One that is in the call may also sleep because its word is away: only the kernel's own
/// function tells the two apart.
fn wait_until_asleep(tid: i32) {
    let limit = Instant::now() + Duration::from_secs(20);
    let read = |file| std::fs::read_to_string(format!("/proc/self/task/{tid}/{file}")).unwrap_or_default();
    while !(read("wchan").starts_with("futex_") && read("syscall").starts_with(&format!("{} ", libc::SYS_futex))) {
        assert!(Instant::now() < limit, "it never waits: it is in {:?}, call {:?}", read("wchan"), read("syscall"));
        std::thread::yield_now();
    }
}

/// Somebody waits; the page leaves while he sleeps; a private word is found by its address, wherever its page is.
fn a_waiter_is_woken_while_its_word_is_away() {
    each_word(|dev, data, word| {
        word.store(5, Ordering::Relaxed);
        away(dev, data);
        std::thread::scope(|scope| {
            let (tell, tid) = std::sync::mpsc::channel();
            let waiter = scope.spawn(move || {
                tell.send(gettid()).unwrap();
                futex(word, libc::FUTEX_WAIT | PRIVATE, 5, [0; 3])
            });
            wait_until_asleep(tid.recv().unwrap());
            away(dev, data);
            assert_eq!(futex(word, libc::FUTEX_WAKE | PRIVATE, 1, [0; 3]), 1, "somebody is woken");
            assert_eq!(waiter.join().unwrap(), 0);
        });
    });
}

/// FUTEX_CMP_REQUEUE reads. FUTEX_WAKE_OP and the priority-inheriting lock write, and there the kernel does not wait for a page that is away: it says EFAULT
/// and has changed nothing, or it does it all; and it does it once the page is home.
fn words_that_the_kernel_writes() {
    each_word(|dev, data, word| {
        let other = AtomicU32::new(0);
        word.store(42, Ordering::Relaxed);
        let requeue = libc::FUTEX_CMP_REQUEUE | PRIVATE;
        away(dev, data);
        assert_eq!((futex(word, requeue, 1, [1, other.as_ptr() as usize, 41]), errno()), (-1, libc::EAGAIN));
        away(dev, data);
        assert_eq!(futex(word, requeue, 1, [1, other.as_ptr() as usize, 42]), 0);
        let add_two = libc::FUTEX_OP(libc::FUTEX_OP_ADD, 2, libc::FUTEX_OP_CMP_EQ, 40) as usize;
        let tid = gettid() as u32;
        let add = || futex(&other, libc::FUTEX_WAKE_OP | PRIVATE, 1, [1, word.as_ptr() as usize, add_two]);
        let lock = || futex(word, libc::FUTEX_LOCK_PI | PRIVATE, 0, [0; 3]);
        let unlock = || futex(word, libc::FUTEX_UNLOCK_PI | PRIVATE, 0, [0; 3]);
        let calls: [(&dyn Fn() -> isize, u32, u32); 3] = [(&add, 40, 42), (&lock, 0, tid), (&unlock, tid, 0)];
        for (call, before, after) in calls {
            word.store(before, Ordering::Relaxed);
            away(dev, data);
            let result = call();
            if result == -1 {
                assert_eq!(errno(), libc::EFAULT);
                assert_eq!(word.load(Ordering::Relaxed), before, "it failed, and has changed the word"); // this brings it home
                assert_eq!(call(), 0);
            }
            assert_eq!(word.load(Ordering::Relaxed), after);
        }
    });
}

/// Threads share a counter under std's mutex and pass it on with its condition variable, while their page is sent away over and over.
fn locks_on_pages_that_keep_leaving() {
    use std::sync::{Condvar, Mutex};
    let (_hmm, dev) = device(32);
    let mut pages = Pages::new(4 << 20);
    pages.slice::<u8>().fill(0);
    let at = pages.start();
    let data: &[u8] = pages.slice();
    struct Shared {
        turn: Mutex<u64>,
        changed: Condvar,
    }
    let at = at.wrapping_add(5000).cast::<Shared>();
    // SAFETY: inside the pages, which outlive the threads, and aligned; through the slice nobody reads or writes any more.
    let shared = unsafe {
        at.write(Shared { turn: Mutex::new(0), changed: Condvar::new() });
        &*at
    };
    let end = Instant::now() + seconds(5);
    const OVER: u64 = u64::MAX;
    std::thread::scope(|scope| {
        for me in 0..3 {
            scope.spawn(move || {
                let mut turn = shared.turn.lock().unwrap();
                loop {
                    while *turn % 3 != me && *turn != OVER {
                        turn = shared.changed.wait(turn).unwrap();
                    }
                    if *turn == OVER {
                        return;
                    }
                    *turn += 1;
                    shared.changed.notify_all();
                }
            });
        }
        let mut before = 0;
        let mut sent = 0;
        while Instant::now() < end {
            dev.prefetch(data).unwrap();
            sent += 1;
            let limit = Instant::now() + Duration::from_secs(20);
            // They go on, whatever was away when.
            loop {
                let now = *shared.turn.lock().unwrap();
                if now > before {
                    before = now;
                    break;
                }
                assert!(Instant::now() < limit, "nobody has got the turn {before} for 20 s");
                std::thread::yield_now();
            }
        }
        *shared.turn.lock().unwrap() = OVER;
        shared.changed.notify_all();
        assert!(sent > 100 && before > 300, "sent away {sent} times, {before} turns");
    });
}
