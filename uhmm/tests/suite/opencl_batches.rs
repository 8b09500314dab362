//! Copies of many blocks at once: what a launch only reads goes to an OpenCL device in two large batches. What the program does to that memory meanwhile, and what a device that fails leaves of it.

use crate::harness::*;
use crate::opencl::Foreign;
use std::any::TypeId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Arg, Error, OpenCl, args, out};
use uhmm_core::args::{Access, RawArg};
use uhmm_core::driver::{self, *};
use uhmm_core::kernel::Entry;
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::{CoreRef, DeviceConfig, DeviceRef};
use uhmm_faulty::{Call, Fault, all_well, order, outstanding};
use uhmm_os::{BLOCK, PAGE};

crate::tests![
    a_large_argument_goes_in_two_copies,
    what_is_written_while_it_is_copied_is_copied_again,
    what_is_dropped_while_it_is_copied_reads_as_zero,
    what_is_unmapped_while_it_is_copied_fails_the_launch,
    a_copy_of_many_blocks_fails,
];

const LEN: usize = 40 * BLOCK;
const WORDS: usize = LEN / size_of::<u32>();
const SOURCE: &str = "__kernel void next(__global uint *r, __global const uint *a) { r[get_global_id(0)] = a[get_global_id(0)] + 1; }";

/// Lent pieces of batches, those that follow each other counted as one, and their bytes. Not in `.bss`, for they are counted on the fault path.
#[unsafe(link_section = ".data")]
static LENT: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// The next such batch, once the device has copied it and before uhmm hears of that, waits for the program: nothing, asked for, at hand.
#[unsafe(link_section = ".data")]
static PAUSE: AtomicU64 = AtomicU64::new(0);
/// An address in the middle of what that batch has copied: nobody reads there any more.
#[unsafe(link_section = ".data")]
static COPIED: AtomicU64 = AtomicU64::new(0);
const ASKED: u64 = 1;
const TAKEN: u64 = 2;
const AT_HAND: u64 = 3;

/// A driver around another one that counts, and pauses.
#[derive(Debug)]
struct Pausing(OwnBox<dyn Driver>);

fn is_lent(dma: &&Dma) -> bool {
    dma.kind == DmaKind::LentToDevice
}

// SAFETY: what the other driver promises, later.
unsafe impl Forward for Pausing {
    fn inner(&self) -> &dyn Driver {
        &*self.0
    }

    fn wait(&self, fence: Fence, batch: &[Dma], limit: Duration) -> Result<(), DmaError> {
        let result = self.0.wait(fence, batch, limit);
        if batch.iter().any(|dma| is_lent(&dma)) {
            let follows = |pair: &&[Dma]| {
                let [at, next] = [0, 1].map(|i| pair[i].frame as usize * PAGE + pair[i].offset);
                pair[1].kind == pair[0].kind && next == at + pair[0].len && pair[1].host == pair[0].host + pair[0].len
            };
            let joined = batch.windows(2).filter(follows).filter(|pair| is_lent(&&pair[0])).count();
            LENT[0].fetch_add((batch.iter().filter(is_lent).count() - joined) as u64, Ordering::SeqCst);
            LENT[1].fetch_add(batch.iter().filter(is_lent).map(|dma| dma.len as u64).sum(), Ordering::SeqCst);
            if PAUSE.compare_exchange(ASKED, TAKEN, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                let middle = batch.iter().filter(is_lent).count() / 2;
                COPIED.store(batch.iter().filter(is_lent).nth(middle).unwrap().host as u64, Ordering::SeqCst);
                PAUSE.store(AT_HAND, Ordering::SeqCst);
                let start = Instant::now();
                while PAUSE.load(Ordering::SeqCst) == AT_HAND && start.elapsed() < Duration::from_secs(20) {
                    uhmm_os::thread::sleep_micros(100);
                }
            }
        }
        result
    }
}

fn open(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
    Ok(driver::boxed(c"pausing", Pausing(uhmm_opencl::open_with_copies(config, mode, others)?)).unwrap())
}

fn device(open: uhmm_core::OpenDriver) -> DeviceRef {
    CoreRef::get().unwrap().device(DeviceConfig { memory: 256 << 20, ..DeviceConfig::new("opencl") }, open).unwrap()
}

fn next(dev: &DeviceRef, r: &mut [u32], a: &Pages) -> Result<(), Error> {
    let (start, count) = (a.start() as usize, r.len());
    let raw = RawArg::Slice { start, count, size: 4, ty: TypeId::of::<u32>(), name: "u32", access: Access::In, device: None };
    let kernel = Foreign(OpenCl { source: SOURCE.into(), name: "next".into(), local: [64, 1, 1], options: "".into() });
    // SAFETY: so many words of the mapping; what is done to it while it is copied is what is tested.
    dev.run(Entry::new(&kernel), (count / 64).into(), &args![out(r), unsafe { Arg::from_raw(raw) }])
}

/// A launch, and what the program does when a large part of `a` has been copied and uhmm has not heard of it.
fn next_while(dev: &DeviceRef, r: &mut [u32], a: &Pages, meanwhile: impl FnOnce() + Send) -> Result<(), Error> {
    PAUSE.store(ASKED, Ordering::SeqCst);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while PAUSE.load(Ordering::SeqCst) != AT_HAND {
                std::thread::yield_now();
            }
            meanwhile();
            assert_eq!(PAUSE.swap(0, Ordering::SeqCst), AT_HAND, "it was done during the copy");
        });
        next(dev, r, a)
    })
}

fn number(a: &mut Pages, from: u32) {
    a.slice::<u32>().iter_mut().zip(from..).for_each(|(x, i)| *x = i);
}

fn is(data: &[u32], from: u32) -> bool {
    data.iter().zip(from..).all(|(&x, i)| x == i)
}

/// Each of two threads takes half of it; a launch that finds it there copies nothing.
fn a_large_argument_goes_in_two_copies() {
    let dev = device(open);
    let (mut a, mut r) = (Pages::new(LEN), vec![0; WORDS]);
    for round in 0..4 {
        number(&mut a, round);
        let before = [0, 1].map(|i| LENT[i].load(Ordering::SeqCst));
        next(&dev, &mut r, &a).unwrap();
        let [copies, bytes] = [0, 1].map(|i| LENT[i].load(Ordering::SeqCst) - before[i]);
        assert!(is(&r, round + 1), "round {round}");
        assert_eq!(bytes as usize, LEN, "round {round}");
        assert!(copies <= 3, "round {round}: {copies} copies"); // the mapping's ends share blocks with others
        next(&dev, &mut r, &a).unwrap();
        assert!(is(&r, round + 1) && LENT[1].load(Ordering::SeqCst) - before[1] == bytes, "round {round}");
    }
}

/// The kernel sees it, though the device had copied what was there before; and so does the program.
fn what_is_written_while_it_is_copied_is_copied_again() {
    let dev = device(open);
    let (mut a, mut r) = (Pages::new(LEN), vec![0; WORDS]);
    for round in 1..4u32 {
        number(&mut a, 0);
        let places = [0, 1, WORDS / 3, WORDS / 2, WORDS - 1];
        let before = LENT[1].load(Ordering::SeqCst);
        let atomics = a.atomics::<std::sync::atomic::AtomicU32>();
        next_while(&dev, &mut r, &a, || places.iter().for_each(|&at| atomics[at].store(u32::MAX - round, Ordering::SeqCst))).unwrap();
        for (at, &x) in r.iter().enumerate() {
            let wanted = if places.contains(&at) { u32::MAX - round } else { at as u32 };
            assert!(x == wanted + 1 && atomics[at].load(Ordering::SeqCst) == wanted, "round {round}: word {at} is {x}");
        }
        let copied = (LENT[1].load(Ordering::SeqCst) - before) as usize;
        assert!((LEN + 1..=LEN + places.len() * BLOCK).contains(&copied), "round {round}: {copied} bytes");
    }
}

/// MADV_DONTNEED of blocks that the device has just copied.
fn what_is_dropped_while_it_is_copied_reads_as_zero() {
    let dev = device(open);
    let (mut a, mut r) = (Pages::new(LEN), vec![0; WORDS]);
    let gone = LEN / 4 + PAGE..LEN / 4 * 3;
    for round in 1..4 {
        number(&mut a, round);
        let (at, len) = (a.at(gone.start) as usize, gone.len());
        // SAFETY: inside the mapping.
        next_while(&dev, &mut r, &a, || unsafe { assert_eq!(libc::madvise(at as *mut _, len, libc::MADV_DONTNEED), 0) }).unwrap();
        let words = gone.start / 4..gone.end / 4;
        for (at, (&x, &there)) in r.iter().zip(a.slice::<u32>().iter()).enumerate() {
            let wanted = if words.contains(&at) { 0 } else { at as u32 + round };
            assert!(x == wanted + 1 && there == wanted, "round {round}: word {at} is {x} of {there}");
        }
    }
}

/// The launch says so; all else is as it was, and free to be used. (What the device still reads must not be unmapped: that ends the process.)
fn what_is_unmapped_while_it_is_copied_fails_the_launch() {
    let dev = device(open);
    let (mut a, mut r) = (Pages::new(LEN), vec![0; WORDS]);
    number(&mut a, 5);
    r.fill(3);
    let len = 3 * PAGE;
    // SAFETY: inside the mapping, and nobody looks there any more.
    let unmap = || unsafe { assert_eq!(libc::munmap(COPIED.load(Ordering::SeqCst) as *mut _, len), 0) };
    let error = next_while(&dev, &mut r, &a, unmap).unwrap_err();
    let at = COPIED.load(Ordering::SeqCst) as usize;
    assert!(matches!(error, Error::Gone { address } if (at..at + len).contains(&address)), "{error}");
    assert!(r.iter().all(|&x| x == 3), "no kernel ran");
    let before = (at - a.start() as usize) / 4 / 64 * 64;
    // SAFETY: what is left of the mapping before the gap.
    let left = unsafe { std::slice::from_raw_parts_mut(a.start().cast::<u32>(), before) };
    assert!(is(left, 5));
    left.iter_mut().for_each(|x| *x += 1);
    next(&dev, &mut r[..before], &a).unwrap();
    assert!(is(&r[..before], 7) && r[before..].iter().all(|&x| x == 3));
    std::mem::forget(a); // somebody else's memory may be in the gap
}

/// Each batch in turn: nothing has changed, what was on its way is the program's as before, and the next launch copies that and no more.
fn a_copy_of_many_blocks_fails() {
    let dev = device(uhmm_faulty::around(uhmm_opencl::open_with_copies));
    let (mut a, mut r) = (Pages::new(LEN), vec![0; WORDS]);
    let mut failures = 0;
    for nth in (1..4).chain((4..).step_by(7)) {
        number(&mut a, nth);
        r.fill(0);
        let before = dev.stats();
        order(Call::ToDevice, Fault::Failed, nth, 1);
        let result = next(&dev, &mut r, &a);
        let struck = outstanding(Call::ToDevice) == 0;
        all_well();
        assert_eq!(result.is_err(), struck, "batch {nth}: {result:?}");
        if !struck {
            break;
        }
        failures += 1;
        assert!(r.iter().all(|&x| x == 0) && is(a.slice(), nth), "batch {nth}");
        let half = (dev.stats() - before).pages_duplicated;
        next(&dev, &mut r, &a).unwrap();
        assert!(is(&r, nth + 1) && is(a.slice(), nth), "batch {nth}: the next launch is right");
        let all = (dev.stats() - before).pages_duplicated;
        assert_eq!(all as usize, LEN / PAGE, "batch {nth}: {half} of them by the launch that failed");
    }
    assert!(failures > 2, "{failures}");
}
