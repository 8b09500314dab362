//! Kernels that are given bare pointers: what they touch comes to them, page by page, also while the CPU uses the same pages.

use crate::harness::*;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use uhmm::{Ctx, args, out, ptr};

crate::tests![
    a_list_of_a_million_boxes,
    a_list_that_the_kernel_changes,
    a_flag_and_bytes_go_back_and_forth,
    a_flag_in_one_block_bytes_in_another,
    counters_of_both_sides_on_one_page,
];

struct Node {
    next: *const Node,
    value: AtomicU64,
}

const NODES: u64 = 1_000_000;

/// A list whose order is not that of the addresses, in boxes of their own, which the device may have.
struct List {
    nodes: Vec<*mut Node>,
    head: *const Node,
}

impl List {
    fn new() -> Self {
        let new = |value| Box::into_raw(Box::new(Node { next: std::ptr::null(), value: AtomicU64::new(value * 3) }));
        let mut nodes: Vec<*mut Node> = (0..NODES).map(new).collect();
        // Runs of 1000 in order, the runs shuffled: else a device of any kind would fault at each node when it is small.
        let mut runs: Vec<_> = nodes.chunks(1000).collect();
        fastrand::Rng::with_seed(4).shuffle(&mut runs);
        let order = runs.concat();
        for pair in order.windows(2) {
            // SAFETY: boxes that nobody else has.
            unsafe { (*pair[0]).next = pair[1] };
        }
        nodes.sort_unstable();
        List { nodes, head: order[0] }
    }

    /// All nodes, as they lie.
    fn nodes(&self) -> impl Iterator<Item = &Node> {
        // SAFETY: boxes that live as long as the list; whoever has a node changes it by its atomic only.
        self.nodes.iter().map(|&node| unsafe { &*node })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: each is from `Box::into_raw`, once.
        self.nodes.drain(..).for_each(|node| drop(unsafe { Box::from_raw(node) }));
    }
}

/// Sum and count of a list's values.
///
/// # Safety
/// A node of a [`List`] that lives.
unsafe fn follow(ctx: &Ctx<'_>, head: *const Node, mut visit: impl FnMut(&Node)) {
    let mut stored = head;
    while !stored.is_null() {
        // SAFETY: the caller says so; all change it by its atomic only.
        let node = unsafe { &*ctx.ptr(stored) };
        visit(node);
        stored = node.next;
    }
}

fn a_list_of_a_million_boxes() {
    let (_hmm, dev) = device(256);
    let list = List::new();
    let mut result = [0u64; 2];
    let kernel = |ctx: &Ctx<'_>| {
        let head = ctx.ptr(ctx.pointer::<Node>(1).cast_const()); // flipped twice: as the program has it
        let mut found = [0, 0];
        // SAFETY: the list lives until the end of the test.
        unsafe { follow(ctx, head, |node| found = [found[0] + node.value.load(Ordering::Relaxed), found[1] + 1]) };
        ctx.out::<u64>(0).chunk(2).copy_from_slice(&found);
    };
    for _ in 0..2 {
        // SAFETY: as for the kernel.
        dev.run(&kernel, 1, args![out(&mut result), unsafe { ptr(list.head) }]).unwrap();
        assert_eq!(result, [3 * NODES * (NODES - 1) / 2, NODES]);
    }
    let faults = dev.stats().device_faults;
    assert!((10..2000).contains(&faults), "a fault brings many nodes: {faults}");
    assert!(!present(list.nodes[list.nodes.len() / 2]), "the nodes are on the device");
    assert_eq!(list.nodes().next().unwrap().value.load(Ordering::Relaxed) % 3, 0);
}

/// The device writes every node, the CPU every other one after that, and the device sees it.
fn a_list_that_the_kernel_changes() {
    let (_hmm, dev) = device(24); // less than the list needs
    let list = List::new();
    let address = list.head as usize;
    let kernel = |ctx: &Ctx<'_>| {
        let add = |node: &Node| {
            node.value.fetch_add(1, Ordering::Relaxed);
        };
        // SAFETY: the list lives until the end of the test.
        unsafe { follow(ctx, ctx.value::<usize>(0) as *const Node, add) };
    };
    for round in 1..=2u64 {
        dev.run(&kernel, 1, args![address]).unwrap();
        for node in list.nodes().step_by(2) {
            node.value.fetch_add(3, Ordering::Relaxed);
        }
        let sum: u64 = list.nodes().map(|node| node.value.load(Ordering::Relaxed)).sum();
        assert_eq!(sum, 3 * NODES * (NODES - 1) / 2 + round * (NODES + 3 * NODES / 2));
    }
}

/// Whose turn it is, and bytes that belong to whose turn it is.
struct Game {
    turn: *const AtomicU32,
    bytes: *const UnsafeCell<[u8; 1000]>,
}

// SAFETY: whose turn it is uses the bytes, alone.
unsafe impl Sync for Game {}

/// All turns of one side until the time is over; the CPU's side says when that is.
fn play(game: &Game, odd: u32, end: Option<Instant>) -> u32 {
    const OVER: u32 = u32::MAX;
    // SAFETY: it outlives the game.
    let turn = unsafe { &*game.turn };
    let mut mine = odd;
    loop {
        let limit = Instant::now() + Duration::from_secs(20);
        let mut now = turn.load(Ordering::Acquire);
        while now != mine {
            if now == OVER {
                return mine;
            }
            assert!(now == mine.wrapping_sub(1), "turn {now} instead of {mine}");
            assert!(Instant::now() < limit, "the turn {mine} never comes");
            std::thread::yield_now(); // looking takes the page from the other side
            now = turn.load(Ordering::Acquire);
        }
        // SAFETY: they outlive the game, and it is this side's turn.
        let bytes = unsafe { &mut *UnsafeCell::raw_get(game.bytes) };
        assert!(bytes.iter().all(|&byte| byte == mine as u8), "turn {mine}: {bytes:?}");
        bytes.fill((mine + 1) as u8);
        if end.is_some_and(|end| Instant::now() > end && mine > 2 * TURNS) {
            turn.store(OVER, Ordering::Release);
            return mine;
        }
        turn.store(mine + 1, Ordering::Release);
        mine += 2;
    }
}

/// Turns of each side at least.
const TURNS: u32 = 1000;

/// A game in these pages.
fn game(pages: &mut Pages, bytes: usize) {
    let (_hmm, dev) = device(16);
    assert!(bytes >= 4 && bytes + 1000 <= pages.len());
    let game = Game { turn: pages.start().cast(), bytes: pages.at(bytes).cast() };
    let kernel = |ctx: &Ctx<'_>| {
        let seen = Game { turn: ctx.pointer::<AtomicU32>(0), bytes: ctx.pointer::<UnsafeCell<[u8; 1000]>>(1) };
        play(&seen, 1, None);
    };
    let played = std::thread::scope(|scope| {
        let cpu = scope.spawn(|| play(&game, 0, Some(Instant::now() + seconds(2))));
        // SAFETY: both outlive the launch, and are used in turns.
        let launched = unsafe { dev.run(&kernel, 1, args![ptr(game.turn), ptr(game.bytes)]) };
        launched.unwrap();
        cpu.join().unwrap()
    });
    let stats = dev.stats();
    assert!(stats.device_faults > u64::from(TURNS) / 4, "{played} turns: {stats:?}");
    assert!(stats.cpu_faults > u64::from(TURNS) / 4, "{played} turns: {stats:?}");
}

/// One page with a flag at its start and bytes at its end, alone and among others.
fn a_flag_and_bytes_go_back_and_forth() {
    for mut pages in [Pages::new(4096), Pages::new(64 << 10), Pages::huge(2 << 20)] {
        pages.slice::<u8>().fill(0);
        game(&mut pages, 3000);
    }
}

/// Two pages that move on their own: what was written before the flag is seen after it all the same.
fn a_flag_in_one_block_bytes_in_another() {
    let mut pages = Pages::new(8 << 20);
    pages.slice::<u8>()[..4096].fill(0);
    game(&mut pages, (4 << 20) + 500);
}

/// Neither waits for the other: each counts in its own word of one page, and both count together in a third.
fn counters_of_both_sides_on_one_page() {
    let (_hmm, dev) = device(16);
    let mut pages = Pages::new(4096);
    pages.slice::<u8>().fill(0);
    let words: &[AtomicU64] = pages.atomics();
    let end = Instant::now() + seconds(5);
    let count = |words: &[AtomicU64], mine: usize| {
        let mut n = 0u64;
        while n < 500 || Instant::now() < end {
            words[mine].fetch_add(1, Ordering::Relaxed);
            words[511].fetch_add(1, Ordering::Relaxed);
            n += 1;
            assert_eq!(words[mine].load(Ordering::Relaxed), n, "an update is lost");
        }
        n
    };
    let address = words.as_ptr() as usize;
    let mut of_device = [0u64];
    let kernel = |ctx: &Ctx<'_>| {
        // SAFETY: the page, which outlives the launch, and which all use by atomics.
        let words = unsafe { std::slice::from_raw_parts(ctx.ptr(ctx.value::<usize>(1) as *const AtomicU64), 512) };
        ctx.out::<u64>(0).chunk(1)[0] = count(words, 1);
    };
    let of_cpu = std::thread::scope(|scope| {
        let cpu = scope.spawn(|| count(words, 0));
        dev.run(&kernel, 1, args![out(&mut of_device), address]).unwrap();
        cpu.join().unwrap()
    });
    assert_eq!(words[511].load(Ordering::Relaxed), of_cpu + of_device[0]);
    assert!(dev.stats().device_faults > 20 && dev.stats().cpu_faults > 20, "{:?}", dev.stats());
}
