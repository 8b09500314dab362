//! The kernel of the search in its two forms, and what a launch of it needs.

use super::graph::Graph;
use anyhow::Result;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use uhmm::{Ctx, Device, Forms, Kernel, args, inout, inp, out};

/// The form in OpenCL C.
const SOURCE: &str = include_str!("bfs.cl");
/// The kernel's name in it.
const NAME: &str = "bfs";
/// Work items of a group, and nodes of the frontier that it takes; as the macro ITEMS.
const LOCAL: usize = 64;
/// Found nodes that a group keeps before it asks for room for them, in the form in Rust.
const HELD: usize = 64;
/// The distance of a node that was not reached.
pub(crate) const UNSEEN: u32 = u32::MAX;

/// A search as it goes on: all that the launches write.
pub(crate) struct Search {
    /// For each node (inout): how far it is from the start.
    pub(crate) distance: Vec<u32>,
    /// The nodes that the last level has reached, in any order; only the first `size` count.
    frontier: Vec<u32>,
    /// How many they are.
    pub(crate) size: usize,
    /// Room for those that the next one reaches (out).
    next: Vec<u32>,
    level: u32,
}

impl Search {
    /// Before the first level: only `start` is reached.
    pub(crate) fn new(nodes: usize, start: u32) -> Search {
        let mut search = Search { distance: vec![UNSEEN; nodes], frontier: vec![0; nodes], size: 1, next: vec![0; nodes], level: 0 };
        search.distance[start as usize] = 0;
        search.frontier[0] = start;
        search
    }

    /// The next level, by ordinary slices. All that the CPU looks at is how many nodes it has reached.
    pub(crate) fn step(&mut self, device: &Device, graph: &Graph) -> Result<()> {
        let mut found = [0u32];
        self.level += 1;
        let args = args![
            inout(&mut self.distance),
            out(&mut self.next),
            inout(&mut found),
            inp(&self.frontier[..self.size]),
            inp(&graph.first),
            inp(&graph.to),
            self.level
        ];
        device.run(&kernel(), self.size.div_ceil(LOCAL), args)?;
        core::mem::swap(&mut self.frontier, &mut self.next);
        self.size = found[0] as usize;
        Ok(())
    }
}

/// The kernel, in both forms.
fn kernel() -> Forms<impl Kernel> {
    Forms::new(bfs).opencl(SOURCE, NAME, LOCAL)
}

/// The form in Rust.
fn bfs(ctx: &Ctx<'_>) {
    let (distance, next, found) = (ctx.out::<u32>(0).atomic(), ctx.out::<u32>(1).atomic(), &ctx.out::<u32>(2).atomic()[0]);
    let (frontier, first, to) = (ctx.inp::<u32>(3), ctx.inp::<u32>(4), ctx.inp::<u32>(5));
    let level = ctx.value::<u32>(6);
    let (mut held, mut count) = ([0; HELD], 0);
    for &node in frontier.iter().skip(ctx.group() * LOCAL).take(LOCAL) {
        let (start, end) = (first[node as usize] as usize, first[node as usize + 1] as usize);
        for &node in &to[start..end] {
            let seen = &distance[node as usize];
            // Most nodes have been seen: a look is cheaper than an exchange.
            if seen.load(Relaxed) != UNSEEN || seen.compare_exchange(UNSEEN, level, Relaxed, Relaxed).is_err() {
                continue;
            }
            held[count] = node;
            count += 1;
            if count == HELD {
                release(&held, next, found);
                count = 0;
            }
        }
    }
    release(&held[..count], next, found);
}

/// Puts found nodes into the next frontier.
fn release(held: &[u32], next: &[AtomicU32], found: &AtomicU32) {
    if held.is_empty() {
        return;
    }
    let at = found.fetch_add(held.len() as u32, Relaxed) as usize;
    next[at..].iter().zip(held).for_each(|(room, &node)| room.store(node, Relaxed));
}
