//! A kernel follows a linked list that the CPU has built of a million boxes. Only the pointer to its head is given: no node is declared, copied or
//! registered, and each page comes to the device when the kernel first touches it.
//!
//!     cargo run --release -p uhmm --example linked_list
#![allow(unsafe_code)] // raw pointers, as lists have them

use std::time::Instant;
use uhmm::{Ctx, Uhmm, args, out, ptr};

struct Node {
    next: *const Node,
    value: u64,
}

/// Adds up the values of a list. `next` is an ordinary pointer, which the CPU has stored; `ctx.ptr` says where the device sees it.
fn sum(ctx: &Ctx<'_>) {
    let mut total = [0u64, 0];
    let mut at = ctx.pointer::<Node>(1).cast_const();
    loop {
        // SAFETY: the list ends in a null pointer, and whoever launches lends it whole.
        let node = unsafe { &*at };
        total = [total[0] + node.value, total[1] + 1];
        if node.next.is_null() {
            break;
        }
        at = ctx.ptr(node.next);
    }
    ctx.out::<u64>(0).chunk(2).copy_from_slice(&total);
}

fn main() -> Result<(), uhmm::Error> {
    let mut head: *const Node = std::ptr::null();
    for value in 0..1_000_000 {
        head = Box::into_raw(Box::new(Node { next: head, value }));
    }

    let hmm = Uhmm::new()?;
    let dev = hmm.device("soft")?;
    let mut result = [0u64; 2];
    let start = Instant::now();
    // SAFETY: the kernel follows a list of nodes that live until it has ended, and only reads them.
    dev.run(&sum, 1, args![out(&mut result), unsafe { ptr(head) }])?;
    let took = start.elapsed();

    let [sum, nodes] = result;
    println!("{nodes} nodes, sum {sum}, in {took:?}");
    println!("device faults: {}, bytes that moved: {}", dev.stats().device_faults, dev.stats().bytes_to_device);
    assert_eq!((sum, nodes), (999_999 * 1_000_000 / 2, 1_000_000));

    // The list is still the program's own: freeing it brings the nodes home.
    let mut freed = 0;
    while !head.is_null() {
        // SAFETY: made by `Box::into_raw` above, and nobody else has it.
        let node = unsafe { Box::from_raw(head.cast_mut()) };
        head = node.next;
        freed += 1;
    }
    assert_eq!(freed, 1_000_000);
    Ok(())
}
