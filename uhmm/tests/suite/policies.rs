//! Policies: those that come with uhmm do what they say, the most specific one is asked, and one that answers at random, or never sensibly, costs time but no data.

use crate::advice::{add, blocks, on_device, pages_on_device, right};
use crate::harness::*;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;
use uhmm::policy::*;
use uhmm::{Advice, Ctx, Error, Location, Uhmm, args, inout, inp, out, ptr};
use uhmm_core::conformance::{CHECKS, Subject};
use uhmm_core::{CoreRef, DeviceConfig};

crate::tests![
    on_demand_brings_what_is_touched,
    never_migrate_leaves_everything,
    the_most_specific_policy_is_asked,
    a_recording_says_what_was_decided,
    a_policy_chooses_what_leaves,
    a_pinned_block_leaves_last,
    a_policy_sees_who_touches_what,
    blocks_come_ahead_of_a_device,
    policies_are_kept_and_counted,
    a_panicking_policy_ends_the_process,
    random_policies_against_a_shadow,
    random_policies_and_a_device_without_faults,
    random_policies_and_a_coherent_device,
    random_policies_under_threads_and_workers,
    policies_change_while_everything_runs,
];

const BLOCK: usize = 2 << 20;
const PAGE: usize = 4096;

/// Writes the first byte of the second block of argument 0.
fn touch(ctx: &Ctx<'_>) {
    ctx.out::<u8>(0).chunk(4 * BLOCK)[BLOCK] = 200;
}

fn on_demand_brings_what_is_touched() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(4);
    let data = pages.slice::<u8>();
    dev.run(&touch, 1, args![inout(data)]).unwrap();
    assert_eq!(pages_present(data), 0, "else all moves that is declared");
    hmm.evict_all().unwrap();
    hmm.set_policy(OnDemand).unwrap();
    dev.run(&touch, 1, args![inout(data)]).unwrap();
    dev.run(&touch, 1, args![out(data)]).unwrap();
    assert_eq!((pages_present(data), pages_present(&data[BLOCK..2 * BLOCK])), (3 * 512, 0));
    assert_eq!(data[BLOCK], 200);
    data[BLOCK] = 0;
    assert!(right(data, 0));
    dev.run(&|ctx: &Ctx<'_>| assert!(right(ctx.inp::<u8>(0), 0)), 1, args![inp(data)]).unwrap();
    // Who cannot fetch what is touched gets what is declared.
    let other = hmm.soft("other").memory(64 << 20).threads(2).replayable_faults(false).open().unwrap();
    other.run(&add, 4, args![inout(data)]).unwrap();
    assert_eq!(pages_present(data), 0);
    assert!(right(data, 1));
}

fn never_migrate_leaves_everything() {
    for kind in ["soft", "soft:nofault", "soft:coherent"] {
        let hmm = Uhmm::new().unwrap();
        let dev = hmm.device(kind).unwrap();
        hmm.set_policy(NeverMigrate).unwrap();
        let mut pages = blocks(2);
        let data = pages.slice::<u8>();
        let physical: Vec<u64> = data.chunks(PAGE).map(|page| frame(page.as_ptr())).collect();
        for more in 1..4 {
            dev.run(&add, 2, args![inout(data)]).unwrap();
            assert_eq!(pages_present(data), 1024, "{kind}");
            assert!(right(data, more), "{kind}");
        }
        let faults = dev.stats().cpu_faults;
        assert!(right(data, 3));
        assert_eq!(dev.stats().cpu_faults, faults, "{kind}");
        dev.run(&|ctx: &Ctx<'_>| assert!(right(ctx.inp::<u8>(0), 3)), 1, args![inp(data)]).unwrap();
        dev.run(&|ctx: &Ctx<'_>| ctx.out::<u8>(0).chunk(BLOCK).fill(5), 2, args![out(data)]).unwrap();
        assert_eq!(pages_present(data), 1024, "{kind}");
        assert!(data.iter().all(|&x| x == 5), "{kind}");
        // They are the very same pages, as far as the kernel lets itself be asked.
        let same = data.chunks(PAGE).zip(&physical).filter(|(page, before)| frame(page.as_ptr()) == **before).count();
        assert!(same > 900, "{kind}: {same}"); // the kernel may have moved some of them
        if kind == "soft" {
            // What is not declared moves, no more of it than is touched.
            let kernel = |ctx: &Ctx<'_>| {
                // SAFETY: nobody else uses it meanwhile.
                unsafe { *ctx.pointer::<u8>(0) = 6 }
            };
            dev.run(&kernel, 1, args![bare(data)]).unwrap();
            assert_eq!((pages_present(data), data[0]), (1023, 6));
        }
    }
}

/// Counts what it is asked; decides as `Declared` does.
#[derive(Debug, Default)]
struct Counts {
    launches: AtomicU64,
    cpu_faults: AtomicU64,
}

impl Policy for Counts {
    fn launch(&self, declared: &Declaration) -> Prepare {
        self.launches.fetch_add(1, Ordering::Relaxed);
        Declared.launch(declared)
    }

    fn cpu_fault(&self, fault: &CpuFault) -> Return {
        self.cpu_faults.fetch_add(1, Ordering::Relaxed);
        Return { pages: Bits::one(fault.page), ..Return::default() }
    }
}

impl Counts {
    fn take(&self) -> (u64, u64) {
        (self.launches.swap(0, Ordering::Relaxed), self.cpu_faults.swap(0, Ordering::Relaxed))
    }
}

fn the_most_specific_policy_is_asked() {
    let (hmm, dev) = device(64);
    let other = hmm.soft("other").memory(64 << 20).threads(2).open().unwrap();
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    let process = hmm.set_policy(Counts::default()).unwrap();
    let mut go = |dev: &uhmm::Device| {
        hmm.evict_all().unwrap();
        dev.run(&add, 2, args![inout(data)]).unwrap();
        assert_eq!((read(&data[0]), pages_present(data)), (read(&data[0]), 1), "one touch, one page");
        // A touch in the middle of the second block.
        read(&data[BLOCK + BLOCK / 2]);
    };
    go(&dev);
    assert_eq!(process.take(), (2, 2));
    let device = dev.set_policy(Counts::default()).unwrap();
    go(&dev);
    assert_eq!((process.take(), device.take()), ((0, 0), (2, 2)));
    go(&other);
    assert_eq!((process.take(), device.take()), ((2, 2), (0, 0)), "the other device has none of its own");
    // The second half of the second block: launches ask for each part.
    let data = pages.slice::<u8>();
    let range = hmm.set_policy_for(&data[BLOCK + BLOCK / 2..], Counts::default()).unwrap();
    let mut go = |dev: &uhmm::Device| {
        hmm.evict_all().unwrap();
        dev.run(&add, 2, args![inout(data)]).unwrap();
        read(&data[0]);
        read(&data[BLOCK + BLOCK / 2]);
    };
    go(&dev);
    assert_eq!((process.take(), device.take(), range.take()), ((0, 0), (2, 1), (1, 1)));
    // What is unmapped takes its policy along, and what is closed.
    drop(pages);
    let mut pages = blocks(1);
    dev.run(&add, 1, args![inout(pages.slice::<u8>())]).unwrap();
    assert_eq!((process.take(), device.take(), range.take()), ((0, 0), (1, 0), (0, 0)));
    drop(dev);
    let dev = hmm.soft("again").memory(64 << 20).threads(2).open().unwrap();
    dev.run(&add, 1, args![inout(pages.slice::<u8>())]).unwrap();
    assert_eq!((process.take(), device.take(), range.take()), ((1, 0), (0, 0), (0, 0)));
    // The policy is there as long as anybody has it.
    drop((hmm, dev, other));
    assert_eq!(process.take(), (0, 0));
}

fn a_recording_says_what_was_decided() {
    let (hmm, dev) = device(64);
    let recording = hmm.set_policy(Recording::new(Declared, 4).unwrap()).unwrap();
    let mut pages = blocks(2);
    let data = pages.slice::<u8>();
    dev.run(&add, 2, args![inout(data)]).unwrap();
    let at = data.as_ptr() as usize;
    read(&data[3 * PAGE]);
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: nobody else uses it meanwhile.
        unsafe { *ctx.pointer::<u8>(0).add(3 * PAGE) = 6 }
    };
    dev.run(&kernel, 1, args![bare(data)]).unwrap();
    read(&data[3 * PAGE]);
    let told: Vec<_> = recording.records().map(|r| (r.decision, r.device, r.address, r.pages, r.write)).collect();
    let id = dev.id();
    let back = Decision::Return { duplicate: false, ahead: 0 };
    let expected = [
        (Decision::Launch(Placement::Move), id, at, 512, true),
        (Decision::Launch(Placement::Move), id, at + BLOCK, 512, true),
        (back, id, at + 3 * PAGE, 16, false),
        (Decision::Fetch { duplicate: false, ahead: 0 }, id, at + 3 * PAGE, 512, true),
    ];
    assert_eq!(told, expected);
    let totals = recording.totals();
    assert_eq!((totals.launches, totals.device_faults, totals.cpu_faults, totals.evictions, totals.not_kept), (2, 1, 2, 0, 1));
    assert_eq!(recording.inner(), &Declared);
}

/// The last candidate goes: the one that was used last.
#[derive(Debug, Default)]
struct Newest {
    seen: AtomicUsize,
}

impl Policy for Newest {
    fn evict(&self, pressure: &Pressure<'_>) -> usize {
        self.seen.store(pressure.candidates.len(), Ordering::Relaxed);
        pressure.candidates.len() - 1
    }
}

fn a_policy_chooses_what_leaves() {
    let (hmm, dev) = device(8);
    let policy = dev.set_policy(Newest::default()).unwrap();
    let mut pages = blocks(5);
    let data = pages.slice::<u8>();
    data.chunks(BLOCK).for_each(|block| dev.prefetch(block).unwrap());
    let home: Vec<bool> = data.chunks(BLOCK).map(|block| pages_present(block) == 512).collect();
    assert_eq!((home, policy.seen.load(Ordering::Relaxed)), (vec![false, false, false, true, false], 4));
    assert!(right(data, 0));
    drop(hmm);
}

/// Pins what is declared as read and written.
#[derive(Debug)]
struct Pins;

impl Policy for Pins {
    fn launch(&self, declared: &Declaration) -> Prepare {
        Prepare { pin: declared.access == Access::InOut, ..Declared.launch(declared) }
    }
}

fn a_pinned_block_leaves_last() {
    let (hmm, dev) = device(8);
    let oldest = |pins: bool| {
        hmm.evict_all().unwrap();
        let (mut first, mut rest) = (blocks(1), blocks(4));
        if pins {
            hmm.set_policy(Pins).unwrap();
        }
        dev.run(&add, 1, args![inout(first.slice::<u8>())]).unwrap();
        for block in rest.slice::<u8>().chunks_mut(BLOCK) {
            dev.run(&add, 1, args![out(block)]).unwrap();
        }
        pages_present(first.slice::<u8>()) == 512
    };
    assert!(oldest(false), "else the least recently used one goes");
    assert!(!oldest(true));
}

/// Notes the last of each kind of fault that it was asked about.
#[derive(Debug, Default)]
struct Looks {
    cpu: [AtomicUsize; 4],
    device: [AtomicUsize; 4],
    advised: AtomicBool,
}

impl Policy for Looks {
    fn cpu_fault(&self, fault: &CpuFault) -> Return {
        let told = [fault.address, fault.thread as usize, fault.write.into(), fault.history.migrations as usize];
        self.cpu.iter().zip(told).for_each(|(to, value)| to.store(value, Ordering::Relaxed));
        self.advised.store(fault.advice.preferred() == Some(Location::Home), Ordering::Relaxed);
        Declared.cpu_fault(fault)
    }

    fn device_fault(&self, fault: &DeviceFault) -> Fetch {
        let told = [fault.address, fault.device as usize, fault.write.into(), fault.history.cpu_faults as usize];
        self.device.iter().zip(told).for_each(|(to, value)| to.store(value, Ordering::Relaxed));
        Declared.device_fault(fault)
    }
}

fn a_policy_sees_who_touches_what() {
    let (hmm, dev) = device(64);
    let policy = hmm.set_policy(Looks::default()).unwrap();
    let of = |told: &[AtomicUsize; 4]| told.each_ref().map(|value| value.load(Ordering::Relaxed));
    let mut pages = blocks(1);
    let data = pages.slice::<u8>();
    let at = data.as_ptr() as usize;
    hmm.advise(data, Advice::PreferredLocation(Location::Home)).unwrap();
    dev.prefetch(data).unwrap();
    read(&data[777]);
    assert_eq!(of(&policy.cpu), [at + 777, gettid() as usize, 0, 1]);
    assert!(policy.advised.load(Ordering::Relaxed));
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: nobody else uses it meanwhile.
        unsafe { ctx.pointer::<u8>(0).add(5000).write_volatile(1) }
    };
    dev.run(&kernel, 1, args![bare(data)]).unwrap();
    assert_eq!(of(&policy.device), [at + 5000, dev.id() as usize, 1, 1]);
    write(&mut data[5000], 1);
    assert_eq!(of(&policy.cpu), [at + 5000, gettid() as usize, 1, 2]);
}

/// Two blocks more than the touched one.
#[derive(Debug)]
struct Two;

impl Policy for Two {
    fn device_fault(&self, fault: &DeviceFault) -> Fetch {
        Fetch { ahead: 2, ..Declared.device_fault(fault) }
    }
}

fn blocks_come_ahead_of_a_device() {
    let (hmm, dev) = device(64);
    let mut pages = blocks(5);
    let data = pages.slice::<u8>();
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: nobody else uses it meanwhile.
        unsafe { ctx.pointer::<u8>(0).write_volatile(0) }
    };
    let there = |data: &[u8]| data.chunks(BLOCK).map(|block| pages_on_device(&dev, block)).collect::<Vec<_>>();
    dev.run(&kernel, 1, args![bare(data)]).unwrap();
    assert_eq!(there(data), [512, 0, 0, 0, 0]);
    hmm.evict_all().unwrap();
    hmm.set_policy(Two).unwrap();
    dev.run(&kernel, 1, args![bare(data)]).unwrap();
    assert_eq!(there(data), [512, 512, 512, 0, 0]);
    assert_eq!(pages_present(data), 1024);
    assert!(right(data, 0));
}

fn policies_are_kept_and_counted() {
    let (hmm, dev) = device(8);
    for _ in 0..2 * MOST_POLICIES {
        hmm.set_policy(OnDemand).unwrap();
        dev.set_policy(Declared).unwrap(); // no value, no place
    }
    let mut kept = vec![];
    let error = loop {
        match hmm.set_policy(Counts::default()) {
            Ok(policy) => kept.push(policy),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::TooManyPolicies { most: MOST_POLICIES }), "{error}");
    assert_eq!(kept.len(), MOST_POLICIES - 2);
    let inside = |_: &Ctx<'_>| assert!(matches!(hmm.set_policy(Declared), Err(Error::Reentrant)));
    dev.run(&inside, 1, args![]).unwrap();
    // With the core they go.
    drop((kept, dev, hmm));
    let hmm = Uhmm::new().unwrap();
    hmm.set_policy(Counts::default()).unwrap();
}

#[derive(Debug)]
struct Panics;

impl Policy for Panics {
    fn launch(&self, _: &Declaration) -> Prepare {
        panic!("no idea of launches")
    }

    fn device_fault(&self, _: &DeviceFault) -> Fetch {
        panic!("no idea of devices")
    }

    fn cpu_fault(&self, _: &CpuFault) -> Return {
        panic!("no idea of touches")
    }
}

fn a_panicking_policy_ends_the_process() {
    if let Ok(what) = std::env::var("UHMM_TEST_PANICS") {
        let (hmm, dev) = device(8);
        hmm.set_policy(Panics).unwrap();
        let mut pages = blocks(1);
        let data = pages.slice::<u8>();
        match &*what {
            "launches" => dev.run(&add, 1, args![inout(data)]).unwrap(),
            "devices" => dev.run(&add_through_pointer, 1, args![bare(data)]).unwrap(),
            _ => {
                dev.prefetch(data).unwrap();
                read(&data[0]);
            }
        }
        std::process::exit(3);
    }
    for what in ["launches", "devices", "touches"] {
        let mut child = again("suite::policies::a_panicking_policy_ends_the_process");
        let out = child.env("UHMM_TEST_PANICS", what).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{what}: {}\n{said}", out.status);
        assert!(said.contains(&format!("no idea of {what}")), "{said}");
    }
}

fn add_through_pointer(ctx: &Ctx<'_>) {
    // SAFETY: nobody else uses it meanwhile.
    unsafe { *ctx.pointer::<u8>(0) += 1 }
}

/// Answers at random: any pages, any place, numbers without sense.
#[derive(Debug)]
struct Random {
    state: AtomicU64,
}

impl Random {
    fn new(seed: u64) -> Self {
        Random { state: AtomicU64::new(seed) }
    }

    fn next(&self) -> u64 {
        let mut x = self.state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn pages(&self) -> Bits {
        match self.next() % 4 {
            0 => Bits::EMPTY,
            1 => Bits::ALL,
            2 => {
                let (a, b) = (self.next() as usize % 513, self.next() as usize % 513);
                Bits::range(a.min(b)..a.max(b))
            }
            _ => (0..512).filter(|_| self.next().is_multiple_of(3)).fold(Bits::EMPTY, |sum, page| sum | Bits::one(page)),
        }
    }

    fn ahead(&self) -> usize {
        [0, 1, 3, usize::MAX][self.next() as usize % 4]
    }
}

impl Policy for Random {
    fn launch(&self, _: &Declaration) -> Prepare {
        let place = [Placement::Move, Placement::Duplicate, Placement::Map, Placement::OnTouch][self.next() as usize % 4];
        Prepare { place, pin: self.next().is_multiple_of(2) }
    }

    fn device_fault(&self, _: &DeviceFault) -> Fetch {
        let [duplicate, pin] = [0; 2].map(|_| self.next().is_multiple_of(2));
        Fetch { pages: self.pages(), duplicate, pin, ahead: self.ahead() }
    }

    fn cpu_fault(&self, _: &CpuFault) -> Return {
        if self.next().is_multiple_of(16) {
            std::thread::yield_now(); // too late
        }
        Return { pages: self.pages(), duplicate: self.next().is_multiple_of(2), ahead: self.ahead() }
    }

    fn evict(&self, pressure: &Pressure<'_>) -> usize {
        match self.next() % 4 {
            0 => usize::MAX,
            other => other as usize * pressure.candidates.len() / 3,
        }
    }
}

/// What a device must do it does under any policy, but for what is about where data is.
fn random_against_a_shadow(config: DeviceConfig) {
    let core = CoreRef::get().unwrap();
    let dev = core.device(config, uhmm_soft::open).unwrap();
    let mut subject = Subject::new(&dev);
    for seed in [1, 2, std::process::id().into()] {
        println!("seed {seed}");
        core.set_policy(Random::new(seed)).unwrap();
        (subject.seed, subject.steps) = (seed, 1000);
        let placed =
            ["an_unchanged_relaunch_moves_nothing", "prefetch_and_evict", "bytes_and_pages_add_up", "what_is_only_read_stays_as_it_was"];
        let failed: Vec<&str> = CHECKS
            .iter()
            .filter(|check| !placed.contains(&check.name) && (seed == 1 || check.name.starts_with("random")))
            .filter(|check| {
                println!("{}", check.name);
                catch_unwind(AssertUnwindSafe(|| (check.run)(&mut subject))).is_err()
            })
            .map(|check| check.name)
            .collect();
        assert_eq!(failed, Vec::<&str>::new(), "seed {seed}");
    }
}

fn random_policies_against_a_shadow() {
    random_against_a_shadow(DeviceConfig { memory: 16 << 20, threads: 2, ..DeviceConfig::new("soft") });
}

fn random_policies_and_a_device_without_faults() {
    random_against_a_shadow(DeviceConfig { memory: 16 << 20, threads: 2, replayable_faults: false, ..DeviceConfig::new("soft") });
}

fn random_policies_and_a_coherent_device() {
    random_against_a_shadow(DeviceConfig { memory: 16 << 20, threads: 2, coherent: true, ..DeviceConfig::new("soft") });
}

/// CPU threads and the device's workers add to words of the same pages, read-mostly ones among them, under a policy without sense: no update is lost, none happens twice, and
/// nobody sees a word go back.
fn random_policies_under_threads_and_workers() {
    const WORDS: usize = 3 << 20; // 12 MiB, the device has 8
    let (hmm, dev) = device(8);
    hmm.set_policy(Random::new(std::process::id().into())).unwrap();
    let pages = Pages::new(WORDS * 4);
    let memory = pages.atomics::<AtomicU32>();
    hmm.advise_range(pages.start() as usize, pages.len() / 3, Advice::ReadMostly).unwrap();
    let (stop, added) = (AtomicBool::new(false), AtomicU64::new(0));
    let end = Instant::now() + seconds(5);
    let work = |random: &mut fastrand::Rng, words: *const AtomicU32| {
        let mut n = 0;
        for _ in 0..30 {
            let page = random.usize(0..WORDS / 1024) * 1024;
            for _ in 0..random.usize(1..40) {
                // SAFETY: inside `memory`, which outlives the launches, and where all use atomics.
                let word = unsafe { &*words.add(page + random.usize(0..1024)) };
                if random.u8(0..4) == 0 {
                    n += 1;
                    word.fetch_add(1, Ordering::Relaxed);
                } else {
                    let first = word.load(Ordering::Relaxed);
                    assert!(word.load(Ordering::Relaxed) >= first, "a word has gone back");
                }
            }
        }
        added.fetch_add(n, Ordering::Relaxed);
    };
    let mut launches = 0;
    std::thread::scope(|scope| {
        for cpu in 0..3 {
            let (work, stop) = (&work, &stop);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(cpu);
                while !stop.load(Ordering::Relaxed) {
                    work(&mut random, memory.as_ptr());
                }
            });
        }
        while Instant::now() < end {
            launches += 1;
            let kernel = |ctx: &Ctx<'_>| {
                let mut random = fastrand::Rng::with_seed(launches << 8 | ctx.group() as u64);
                work(&mut random, ctx.pointer::<AtomicU32>(0).cast_const());
            };
            // SAFETY: as for the kernel.
            dev.run(&kernel, 4, args![unsafe { ptr(memory.as_ptr()) }]).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let sum: u64 = memory.iter().map(|word| u64::from(word.load(Ordering::Relaxed))).sum();
    assert_eq!(sum, added.load(Ordering::Relaxed), "no update is lost, none happens twice");
    let stats = dev.stats();
    assert!(launches > 5 && stats.device_faults > 100 && stats.cpu_faults > 100 && stats.pages_duplicated > 100, "{launches} {stats:?}");
}

/// Policies and advice are replaced while threads launch and touch.
fn policies_change_while_everything_runs() {
    let (hmm, dev) = device(16);
    let end = Instant::now() + seconds(5);
    let mut changes = 0;
    std::thread::scope(|scope| {
        for part in 0..2u32 {
            let dev = &dev;
            let look = |data: &[u32], expected| assert!(data.iter().step_by(500).all(|&x| x == expected));
            scope.spawn(move || increment_until(end, dev, part, 700_000, look));
        }
        let mut random = fastrand::Rng::with_seed(3);
        let mut pages = blocks(2);
        while Instant::now() < end {
            changes += 1;
            if changes < 100 {
                drop(hmm.set_policy(Random::new(random.u64(..))).unwrap());
            }
            match random.u8(0..4) {
                0 => drop(hmm.set_policy(Declared).unwrap()),
                1 => drop(dev.set_policy(NeverMigrate).unwrap()),
                2 => drop(dev.set_policy(OnDemand).unwrap()),
                _ => {
                    let data = pages.slice::<u8>();
                    let advice = [Advice::NoMigrate, Advice::ReadMostly, Advice::Normal, Advice::AccessedBy(dev.id()), Advice::WillNotNeed];
                    let at = random.usize(0..512) * PAGE;
                    hmm.advise(&data[at..at + random.usize(0..512) * PAGE], advice[random.usize(0..5)]).unwrap();
                    drop(hmm.set_policy_for(&data[at..at + 100 * PAGE], Declared).unwrap());
                    assert!(right(data, 0));
                }
            }
        }
    });
    assert!(changes > 20, "{changes}");
    let mut pages = blocks(1);
    dev.run(&add, 1, args![inout(pages.slice::<u8>())]).unwrap();
    assert!(right(pages.slice(), 1) && !on_device(&dev, std::ptr::null()));
}
