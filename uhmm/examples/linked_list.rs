//! A kernel follows a linked list that the CPU has built of boxes, on any device: `next` is an ordinary pointer that was stored in memory. A device with replayable faults is given only the
//! pointer to the head, and each page comes there when the kernel first touches it. On any other the nodes are declared with the launch; so the same call runs on both.
//!
//!     cargo run --release -p uhmm --example linked_list
//!     cargo run --release -p uhmm --example linked_list -- opencl
#![allow(unsafe_code)] // raw pointers, as lists have them

use std::time::Instant;
use uhmm::{Access, Arg, Ctx, Forms, Uhmm, args, out, ptr};

#[repr(C)]
struct Node {
    next: *const Node,
    value: u64,
}

/// Adds up the values of a list. `ctx.ptr` says where the device sees what the CPU has at `next`.
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

/// The same in OpenCL C: there it is `uhmm_ptr`.
const SOURCE: &str = "
typedef struct { ulong next, value; } node;
__kernel void sum(__global ulong *result, __global const node *at, UHMM) {
    ulong total = at->value, nodes = 1;
    while (at->next) {
        at = uhmm_ptr(at->next);
        total += at->value;
        nodes++;
    }
    result[0] = total;
    result[1] = nodes;
}";

fn main() -> Result<(), uhmm::Error> {
    let mut head: *const Node = std::ptr::null();
    for value in 0..1_000_000 {
        head = Box::into_raw(Box::new(Node { next: head, value }));
    }

    let hmm = Uhmm::new()?;
    let dev = hmm.device(&std::env::args().nth(1).unwrap_or("soft".into()))?;
    let kernel = Forms::new(sum).opencl(SOURCE, "sum", 1);
    let mut result = [0u64; 2];
    let start = Instant::now();
    // SAFETY: the kernel follows a list of nodes that live until it has ended, and only reads them.
    let args = args![out(&mut result), unsafe { ptr(head) }];
    let args = if dev.info().capabilities.replayable_faults {
        args
    } else {
        // SAFETY: as above.
        args.reaching(nodes(head).map(|node| unsafe { Arg::at(node, Access::In) }))
    };
    dev.run(&kernel, 1, args)?;
    let took = start.elapsed();

    let [sum, count] = result;
    println!("{count} nodes, sum {sum}, in {took:?}");
    println!("device faults: {}, bytes that moved: {}", dev.stats().device_faults, dev.stats().bytes_to_device);
    assert_eq!((sum, count), (999_999 * 1_000_000 / 2, 1_000_000));

    // The list is still the program's own: freeing it brings home what is away.
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

/// The nodes of a list, one after the other.
fn nodes(head: *const Node) -> impl Iterator<Item = *const Node> {
    let some = |node: *const Node| (!node.is_null()).then_some(node);
    // SAFETY: a list of nodes that live, which ends in a null pointer.
    std::iter::successors(some(head), move |node| some(unsafe { (**node).next }))
}
