//! Device faults and eviction: what is not declared is fetched, what does not fit makes room.

use crate::harness::*;
use uhmm::{Ctx, args, inout, inp, ptr};

crate::tests![
    a_kernel_follows_pointers,
    what_a_kernel_writes_through_a_pointer_comes_back,
    twice_the_capacity_by_launches,
    twice_the_capacity_by_faults,
    the_least_recently_used_block_goes
];

struct Node {
    next: *const Node,
    value: u64,
}

#[allow(clippy::vec_box)] // the point is that each node is an allocation of its own
fn list(nodes: usize) -> (Vec<Box<Node>>, u64) {
    let mut list: Vec<Box<Node>> = vec![];
    let mut random = fastrand::Rng::with_seed(2);
    for _ in 0..nodes {
        let next = list.last().map_or(std::ptr::null(), |node| &raw const **node);
        list.push(Box::new(Node { next, value: random.u64(0..1000) }));
    }
    let sum = list.iter().map(|node| node.value).sum();
    (list, sum)
}

fn a_kernel_follows_pointers() {
    let (_hmm, dev) = device(256);
    let (list, expected) = list(200_000);
    let head = &raw const **list.last().unwrap();
    let mut sum = [0u64];
    let kernel = |ctx: &Ctx<'_>| {
        let mut total = 0;
        let mut at = ctx.pointer::<Node>(1).cast_const();
        while at != ctx.ptr(std::ptr::null()) {
            // SAFETY: a node of the list, which outlives the launch, and which nobody changes.
            let node = unsafe { &*at };
            total += node.value;
            at = ctx.ptr(node.next);
        }
        ctx.out::<u64>(0).chunk(1)[0] = total;
    };
    // SAFETY: as for the kernel.
    dev.run(&kernel, 1, args![inout(&mut sum), unsafe { ptr(head) }]).unwrap();
    assert_eq!(sum[0], expected);
    assert!(dev.stats().device_faults > 0);
    assert_eq!(list.iter().map(|node| node.value).sum::<u64>(), expected);
}

fn what_a_kernel_writes_through_a_pointer_comes_back() {
    let (_hmm, dev) = device(64);
    let mut data: Vec<u32> = (0..2_000_000).collect();
    let kernel = |ctx: &Ctx<'_>| {
        let p = ctx.pointer::<u32>(0);
        for i in (ctx.group()..2_000_000).step_by(ctx.groups() * 100) {
            // SAFETY: an element of the data, which the launch borrows, and which is this group's own.
            unsafe { *p.add(i) += 1 };
        }
    };
    dev.run(&kernel, 2, args![bare(&mut data)]).unwrap();
    for (i, &x) in data.iter().enumerate() {
        let touched = i % 200 < 2;
        assert_eq!(x, i as u32 + u32::from(touched), "{i}");
    }
    // A page that both have becomes the device's when the device writes it.
    let sum = |ctx: &Ctx<'_>| {
        let p = ctx.pointer::<u32>(1);
        let mut total = 0u64;
        for (i, &x) in ctx.inp::<u32>(0).iter().enumerate() {
            total += u64::from(x);
            if i % 5000 == 0 {
                // SAFETY: an element of the data, after the loop has read it; no other group is there.
                unsafe { *p.add(i) = 9 };
            }
        }
        std::hint::black_box(total);
    };
    // SAFETY: as for the kernel.
    let pointer = unsafe { ptr(data.as_mut_ptr()) };
    dev.run(&sum, 1, args![inp(&data), pointer]).unwrap();
    let data = std::hint::black_box(&data);
    assert!(data.iter().step_by(5000).all(|&x| x == 9));
}

fn twice_the_capacity_by_launches() {
    let (_hmm, dev) = device(16);
    let mut data: Vec<u32> = (0..8 << 20).collect(); // 32 MiB
    for _round in 0..3 {
        for part in data.chunks_mut(700_000) {
            dev.run(&increment, groups(part.len()), args![inout(part)]).unwrap();
        }
        assert!(data.len() * 4 / 4096 - pages_present(&data) <= (16 << 20) / 4096, "no more is away than fits the device");
    }
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 3));
    assert!(dev.stats().evictions > 0);
}

fn twice_the_capacity_by_faults() {
    let (_hmm, dev) = device(16);
    let mut data: Vec<u32> = (0..8 << 20).collect();
    let len = data.len();
    let kernel = move |ctx: &Ctx<'_>| {
        let p = ctx.pointer::<u32>(0);
        let per = len / ctx.groups();
        for i in ctx.group() * per..(ctx.group() + 1) * per {
            // SAFETY: an element of the data, which the launch borrows, and which is this group's own.
            unsafe { *p.add(i) += 1 };
        }
    };
    for _ in 0..2 {
        dev.run(&kernel, 16, args![bare(&mut data)]).unwrap();
    }
    assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 2));
}

fn the_least_recently_used_block_goes() {
    let (_hmm, dev) = device(8);
    let mut parts: Vec<Pages> = (0..4).map(|_| Pages::huge(2 << 20)).collect();
    for part in &mut parts {
        part.slice::<u32>().fill(1);
        dev.prefetch(part.slice::<u32>()).unwrap();
    }
    assert!(parts.iter_mut().all(|part| pages_present(part.slice::<u32>()) == 0));
    // The first is used again, so the second is the oldest.
    let first = parts[0].slice::<u32>();
    dev.run(&increment, groups(first.len()), args![inout(first)]).unwrap();
    let mut fifth = Pages::huge(2 << 20);
    fifth.slice::<u32>().fill(1);
    dev.prefetch(fifth.slice::<u32>()).unwrap();
    let home: Vec<bool> = parts.iter_mut().map(|part| pages_present(part.slice::<u32>()) > 0).collect();
    assert_eq!(home, [false, true, false, false]);
}
