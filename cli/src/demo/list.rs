//! A kernel follows a linked list of a million boxes: its head is all that it is given.
#![allow(unsafe_code)] // a bare pointer is lent to the kernel, which follows it

use crate::report::{bytes, time};
use anyhow::{Result, ensure};
use serde::Serialize;
use std::time::Instant;
use uhmm::{Ctx, Device, args, out, ptr};

const NODES: u64 = 1_000_000;

struct Node {
    next: Option<Box<Node>>,
    value: u64,
}

/// How it went.
#[derive(Serialize)]
pub(super) struct LinkedList {
    nodes: u64,
    seconds: f64,
    device_faults: u64,
    bytes_to_device: u64,
}

/// Adds up the values of the list at argument 1, and counts them.
fn sum(ctx: &Ctx<'_>) {
    let mut found = [0u64, 0];
    let mut at = ctx.pointer::<Node>(1).cast_const();
    loop {
        // SAFETY: the list is lent whole, and nobody changes it meanwhile.
        let node = unsafe { &*at };
        found = [found[0] + node.value, found[1] + 1];
        let Some(next) = &node.next else { break };
        at = ctx.ptr(&raw const **next);
    }
    ctx.out::<u64>(0).chunk(2).copy_from_slice(&found);
}

/// Runs the act.
pub(super) fn follow(device: &Device) -> Result<LinkedList> {
    let mut head = Box::new(Node { next: None, value: 0 });
    for value in 1..NODES {
        head = Box::new(Node { next: Some(head), value });
    }
    let mut result = [0u64; 2];
    let (before, start) = (device.stats(), Instant::now());
    // SAFETY: the kernel reads the nodes of the list, which live until it has ended.
    let launched = device.run(&sum, 1, args![out(&mut result), unsafe { ptr(&raw const *head) }]);
    let (seconds, moved) = (start.elapsed().as_secs_f64(), device.stats() - before);
    // Node by node: dropped as a whole, it would need a stack as deep as the list is long.
    let mut rest = Some(head);
    while let Some(node) = rest {
        rest = node.next;
    }
    launched?;
    ensure!(result == [NODES * (NODES - 1) / 2, NODES], "the kernel found {} nodes with a sum of {}", result[1], result[0]);
    Ok(LinkedList { nodes: result[1], seconds, device_faults: moved.device_faults, bytes_to_device: moved.bytes_to_device })
}

impl LinkedList {
    pub(super) fn text(&self) -> String {
        format!(
            "  {} boxes, followed from the first in {}: {} device faults, {} moved; the sum is right\n",
            self.nodes,
            time(self.seconds),
            self.device_faults,
            bytes(self.bytes_to_device)
        )
    }
}
