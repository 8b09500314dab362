//! Pointers that are stored in memory, on devices that cannot fetch what they lead to: ranges declared with the launch, as many as there are nodes.

use crate::harness::{self, Pages};
use std::any::TypeId;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use uhmm::{Access, Arg, Ctx, Device, Error, Forms, Kernel, KernelFault, Uhmm, args, inout, inp, out, scope};
use uhmm_core::args::RawArg;
use uhmm_core::conformance::Node;

crate::tests![
    thousands_of_boxes_on_every_device,
    written_nodes_are_written_by_bytes,
    neighbours_are_merged,
    an_undeclared_node_is_told_and_nothing_is_written,
    a_kernel_that_fails_leaves_nodes_as_they_were,
    what_cannot_be_reached_is_an_error,
    memory_that_goes_away_is_an_error,
    more_than_fits_is_refused,
    nodes_of_arguments_are_theirs,
    nodes_that_are_on_a_device_come_home,
    leases_and_scopes,
    devices_take_turns_over_nodes,
    a_hundred_thousand_nodes,
];

const SOURCE: &str = "
typedef struct { ulong next, value; } node;
__kernel void follow(__global ulong *sum, ulong head, UHMM) {
    ulong total = 0, count = 0;
    while (head) {
        __global const node *n = uhmm_ptr(head);
        total += n->value;
        count++;
        head = n->next;
    }
    sum[0] = total;
    sum[1] = count;
}
__kernel void raise(ulong head, ulong rounds, UHMM) {
    for (ulong round = 0; round < rounds; round++)
        for (ulong at = head; at;) {
            __global node *n = uhmm_ptr(at);
            n->value += 1;
            at = n->next;
        }
}
__kernel void walk(__global ulong *sum, ulong first, ulong count, UHMM) {
    __global const node *n = uhmm_ptr(first);
    ulong total = 0;
    for (ulong i = 0; i < count; i++) total += n[i].value;
    sum[0] = total;
}
__kernel void vectors(__global ulong *sum, ulong first, ulong second, UHMM) {
    __global const ulong2 *a = uhmm_ptr(first), *b = uhmm_ptr(second);
    ulong2 both = *a + *b;
    sum[0] = both.x + both.y;
}";

fn follow() -> impl Kernel {
    let rust = |ctx: &Ctx<'_>| {
        let (mut sum, mut at) = ([0u64, 0], ctx.value::<u64>(1) as *const Node);
        while !at.is_null() {
            // SAFETY: the list's nodes are declared, and live until the launch has ended.
            let node = unsafe { &*ctx.ptr(at) };
            sum = [sum[0] + node.value, sum[1] + 1];
            at = node.next as *const Node;
        }
        ctx.out::<u64>(0).chunk(2).copy_from_slice(&sum);
    };
    Forms::new(rust).opencl(SOURCE, "follow", 1)
}

fn raise() -> impl Kernel {
    let rust = |ctx: &Ctx<'_>| {
        for _ in 0..ctx.value::<u64>(1) {
            let mut at = ctx.value::<u64>(0) as *mut Node;
            while !at.is_null() {
                // SAFETY: as in `follow`; they are declared as written, and nobody else uses them.
                let node = unsafe { &mut *ctx.ptr_mut(at) };
                node.value += 1;
                at = node.next as *mut Node;
            }
        }
    };
    Forms::new(rust).opencl(SOURCE, "raise", 1)
}

/// Nodes in boxes of their own, in the order of the list, which is not that of their addresses; with other blocks between them.
#[allow(clippy::vec_box)] // that each lies somewhere else is the point
fn boxes(count: u64) -> Vec<Box<Node>> {
    let mut random = fastrand::Rng::with_seed(count);
    let mut between: Vec<Vec<u8>> = vec![];
    let mut nodes: Vec<Box<Node>> = (0..count)
        .map(|_| {
            between.push(vec![1; random.usize(1..100)]);
            Box::new(Node { next: 0, value: 0 })
        })
        .collect();
    random.shuffle(&mut nodes);
    for i in 0..nodes.len() {
        nodes[i].value = i as u64;
        nodes[i].next = nodes.get(i + 1).map_or(0, |next| &raw const **next as u64);
    }
    nodes
}

fn read(nodes: &[Box<Node>]) -> impl Iterator<Item = Arg<'_>> {
    nodes.iter().map(|node| inp(core::slice::from_ref(&**node)))
}

fn written(nodes: &mut [Box<Node>]) -> impl Iterator<Item = Arg<'_>> {
    nodes.iter_mut().map(|node| inout(core::slice::from_mut(&mut **node)))
}

fn head(nodes: &[Box<Node>]) -> u64 {
    &raw const *nodes[0] as u64
}

fn opencl(megabytes: usize) -> (Uhmm, Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.opencl("opencl").memory(megabytes << 20).open().unwrap();
    (hmm, dev)
}

/// # Safety
/// Nobody uses what it names while a launch does.
unsafe fn bytes(start: usize, count: usize, access: Access) -> Arg<'static> {
    let raw = RawArg::Slice { start, count, size: 1, ty: TypeId::of::<u8>(), name: "u8", access, device: None };
    // SAFETY: the caller's promise.
    unsafe { Arg::from_raw(raw) }
}

fn thousands_of_boxes_on_every_device() {
    let hmm = Uhmm::new().unwrap();
    for kind in ["soft", "soft:nofault", "soft:coherent", "opencl"] {
        let dev = hmm.device(kind).unwrap();
        let mut nodes = boxes(20_000);
        let first = head(&nodes);
        let mut sum = [0u64; 2];
        dev.run(&follow(), 1, args![out(&mut sum), first].reaching(read(&nodes))).unwrap();
        assert_eq!(sum, [19_999 * 10_000, 20_000], "{kind}");
        let there = nodes.iter().filter(|node| harness::present(&raw const ***node)).count();
        assert!(there == 20_000 || kind == "soft", "{kind}: {there} nodes are where they were");
        dev.run(&raise(), 1, args![first, 3u64].reaching(written(&mut nodes))).unwrap();
        assert!(nodes.iter().enumerate().all(|(i, node)| node.value == i as u64 + 3), "{kind}");
        // Others of them for the next launch: nothing of the table is left.
        nodes.truncate(300);
        nodes[299].next = 0;
        dev.run(&follow(), 1, args![out(&mut sum), first].reaching(read(&nodes))).unwrap();
        assert_eq!(sum, [299 * 150 + 900, 300], "{kind}");
    }
}

/// Between the nodes, on the same pages and cache lines, lie counters of other threads, which count on while kernels run; and those threads allocate and free.
fn written_nodes_are_written_by_bytes() {
    const STRIDE: usize = 40; // node 16, counter 8, node 16, ...
    let (hmm, cl) = opencl(64);
    let nofault = hmm.soft("soft:nofault").replayable_faults(false).memory(64 << 20).open().unwrap();
    for dev in [&cl, &nofault] {
        let mut pages = Pages::new(3000 * STRIDE + 64);
        pages.slice::<u8>().fill(0);
        let base = pages.start() as usize;
        let node = |i: usize| base + i / 2 * STRIDE + i % 2 * 24;
        let counter = |i: usize| {
            // SAFETY: a counter between two nodes, of the mapping, which outlives the threads; it is used by atomic operations alone.
            unsafe { &*((base + i * STRIDE + 16) as *const AtomicU64) }
        };
        for i in 0..6000 {
            let next = if i == 5999 { 0 } else { node(i + 1) as u64 };
            // SAFETY: in the mapping, and nobody else's yet.
            unsafe { (node(i) as *mut Node).write(Node { next, value: 0 }) };
        }
        let (stop, running) = (AtomicBool::new(false), AtomicBool::new(false));
        let meanwhile = AtomicU64::new(0);
        let rounds = std::thread::scope(|scope| {
            let counts: Vec<_> = (0..2)
                .map(|thread| {
                    let (stop, running, meanwhile) = (&stop, &running, &meanwhile);
                    scope.spawn(move || {
                        let mut random = fastrand::Rng::with_seed(thread);
                        let mut kept: Vec<Vec<u8>> = vec![];
                        let mut rounds = 0u64;
                        while !stop.load(Ordering::Acquire) {
                            for i in (thread as usize..3000).step_by(2) {
                                counter(i).fetch_add(1, Ordering::Relaxed);
                            }
                            rounds += 1;
                            if running.load(Ordering::Acquire) {
                                meanwhile.fetch_add(1, Ordering::Relaxed);
                            }
                            kept.push(vec![1; random.usize(1..20_000)]);
                            if kept.len() > 100 {
                                kept.swap_remove(random.usize(..100));
                            }
                        }
                        rounds
                    })
                })
                .collect();
            for _ in 0..20 {
                // SAFETY: the nodes are this thread's, and no counter is among their bytes.
                let nodes = (0..6000).map(|i| unsafe { bytes(node(i), 16, Access::InOut) });
                let args = args![node(0) as u64, 20u64].reaching(nodes);
                running.store(true, Ordering::Release);
                dev.run(&raise(), 1, args).unwrap();
                running.store(false, Ordering::Release);
            }
            stop.store(true, Ordering::Release);
            counts.into_iter().map(|count| count.join().unwrap()).collect::<Vec<_>>()
        });
        for i in 0..3000 {
            assert_eq!(counter(i).load(Ordering::Relaxed), rounds[i % 2], "{}: counter {i}", dev.name());
        }
        for i in 0..6000 {
            // SAFETY: nobody writes it any more.
            let value = unsafe { (node(i) as *const Node).read().value };
            assert_eq!(value, 400, "{}: node {i}", dev.name());
        }
        assert!(meanwhile.into_inner() > 20, "{}: nobody waited for a kernel", dev.name());
        assert_eq!(dev.stats().pages_to_device, 0, "{}: no page has moved", dev.name());
    }
}

fn neighbours_are_merged() {
    let hmm = Uhmm::new().unwrap();
    let rust = |ctx: &Ctx<'_>| {
        let first = ctx.ptr(ctx.value::<u64>(1) as *const Node);
        // SAFETY: the ranges follow each other, and so they lie in one piece.
        let nodes = unsafe { core::slice::from_raw_parts(first, ctx.value::<u64>(2) as usize) };
        ctx.out::<u64>(0).chunk(1)[0] = nodes.iter().map(|node| node.value).sum();
    };
    let walk = Forms::new(rust).opencl(SOURCE, "walk", 1);
    for kind in ["opencl", "soft:nofault", "soft"] {
        let dev = hmm.device(kind).unwrap();
        // More than one piece that is copied at a time, in an order that is not theirs.
        let nodes: Vec<Node> = (0..200_000).map(|value| Node { next: 0, value }).collect();
        let mut order: Vec<usize> = (0..nodes.len()).step_by(10).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut order);
        let parts = order.iter().map(|&at| inp(&nodes[at..(at + 10 + at % 7).min(nodes.len())])); // each with some of the next
        let mut sum = [0u64];
        dev.run(&walk, 1, args![out(&mut sum), nodes.as_ptr() as u64, nodes.len() as u64].reaching(parts)).unwrap();
        assert_eq!(sum[0], 199_999 * 100_000, "{kind}");
        // Alignment is kept.
        #[repr(align(128))]
        struct Far([u64; 16]);
        let (a, b) = (Box::new(Far([1; 16])), Box::new(Far([30; 16])));
        let rust = |ctx: &Ctx<'_>| {
            let [a, b] = [1, 2].map(|arg| ctx.ptr(ctx.value::<u64>(arg) as *const Far));
            assert!(a.is_aligned() && b.is_aligned(), "{a:?} {b:?}");
            // SAFETY: both are declared.
            ctx.out::<u64>(0).chunk(1)[0] = unsafe { [a, b].map(|far| (*far).0[0] + (*far).0[1]).iter().sum() };
        };
        let vectors = Forms::new(rust).opencl(SOURCE, "vectors", 1);
        let small = [7u8; 3];
        let parts = [inp(&small), inp(&b.0), inp(&a.0)];
        dev.run(&vectors, 1, args![out(&mut sum), a.0.as_ptr() as u64, b.0.as_ptr() as u64].reaching(parts)).unwrap();
        assert_eq!(sum[0], 62, "{kind}");
    }
}

fn an_undeclared_node_is_told_and_nothing_is_written() {
    let (hmm, cl) = opencl(16);
    let nofault = hmm.device("soft:nofault").unwrap();
    for dev in [&cl, &nofault] {
        let mut nodes = boxes(1000);
        let first = head(&nodes);
        let missing = &raw const *nodes[700] as usize;
        let others = nodes.iter_mut().enumerate().filter(|(i, _)| *i != 700);
        let others = others.map(|(_, node)| inout(core::slice::from_mut(&mut **node)));
        let error = dev.run(&raise(), 1, args![first, 1u64].reaching(others)).unwrap_err();
        // The software device tells the first access beside what is declared: that of the value.
        let Error::Kernel(KernelFault::NotDeclared { address, .. }) = error else { panic!("{error}") };
        assert!(address == missing || address == missing + 8 && dev.name() != "opencl", "{address:#x}, not {missing:#x}");
        assert!(nodes.iter().enumerate().all(|(i, node)| node.value == i as u64), "{}: nothing was written", dev.name());
        // What is no pointer at all.
        nodes[999].next = 8;
        let error = dev.run(&raise(), 1, args![first, 1u64].reaching(written(&mut nodes))).unwrap_err();
        assert!(matches!(error, Error::Kernel(_)), "{error}");
        assert!(nodes.iter().enumerate().all(|(i, node)| node.value == i as u64));
    }
}

fn a_kernel_that_fails_leaves_nodes_as_they_were() {
    let (hmm, cl) = opencl(16);
    let nofault = hmm.device("soft:nofault").unwrap();
    let mut nodes = boxes(100);
    // It has no group of so many work items: it fails when it is to start.
    let never = Forms::new(|_: &Ctx<'_>| ()).opencl(SOURCE, "raise", 1 << 24);
    let first = head(&nodes);
    let error = cl.run(&never, 1, args![first, 1u64].reaching(written(&mut nodes))).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Refused(_))), "{error}");
    assert!(nodes.iter().enumerate().all(|(i, node)| node.value == i as u64));
    let panics = |ctx: &Ctx<'_>| {
        // SAFETY: it is declared.
        unsafe { (*ctx.ptr_mut(ctx.value::<u64>(0) as *mut Node)).value = 77 };
        panic!("when it has written");
    };
    let error = nofault.run(&panics, 1, args![first].reaching(written(&mut nodes))).unwrap_err();
    assert!(error.to_string().contains("when it has written"), "{error}");
    assert_eq!(nodes[0].value, 0);
    // And the devices go on.
    for dev in [&cl, &nofault] {
        dev.run(&raise(), 1, args![first, 1u64].reaching(written(&mut nodes))).unwrap();
    }
    assert!(nodes.iter().enumerate().all(|(i, node)| node.value == i as u64 + 2));
}

fn what_cannot_be_reached_is_an_error() {
    let hmm = Uhmm::new().unwrap();
    let never = || Forms::new(|_: &Ctx<'_>| unreachable!("it must not start")).opencl(SOURCE, "raise", 1);
    for kind in ["opencl", "soft:nofault", "soft"] {
        let dev = hmm.device(kind).unwrap();
        let mut pages = Pages::new(8 * 4096);
        pages.slice::<u8>().fill(7);
        let at = pages.start() as usize;
        // SAFETY: inside the mapping, of which nobody uses that part any more.
        unsafe { pages.unmap(4 * 4096, 4096) };
        // SAFETY: as above.
        let protect = |page: usize, access| assert_eq!(unsafe { libc::mprotect((at + page * 4096) as *mut _, 4096, access) }, 0);
        protect(5, libc::PROT_READ);
        protect(6, libc::PROT_NONE);
        let refused = |start: usize, len: usize, access: Access, address: usize, words: &str| {
            // SAFETY: it is refused, else the test ends with a panic.
            let args = args![0u64, 1u64].reaching([unsafe { bytes(start, len, access) }]);
            let error = dev.run(&never(), 1, args).unwrap_err();
            assert!(matches!(error, Error::Reached { address: told, .. } if told == address), "{kind}: {error:?}");
            assert!(error.to_string().contains(words), "{kind}: {error}");
        };
        refused(at + 4 * 4096 - 8, 16, Access::In, at + 4 * 4096, "not mapped");
        refused(at + 5 * 4096 + 8, 16, Access::InOut, at + 5 * 4096 + 8, "read-only");
        refused(at + 6 * 4096 + 8, 16, Access::In, at + 6 * 4096 + 8, "not readable");
        refused(0, 16, Access::In, 0, "no address");
        refused(at, usize::MAX / 2, Access::In, at, "no address");
        // In two ways at once.
        // SAFETY: as above.
        let two = |a: (usize, Access), b: (usize, Access)| unsafe { [bytes(at + a.0, 16, a.1), bytes(at + b.0, 16, b.1)] };
        let error = dev.run(&never(), 1, args![0u64, 1u64].reaching(two((0, Access::In), (15, Access::InOut)))).unwrap_err();
        assert!(matches!(error, Error::Reached { address, .. } if address == at + 15), "{error:?}");
        assert!(error.to_string().contains("twice"), "{error}");
        assert_eq!(pages.slice::<u8>()[..4 * 4096], [7; 4 * 4096]);
    }
    // What is no range is the program's mistake.
    let value = std::panic::catch_unwind(|| args![0u64].reaching([uhmm::val(1u64)]));
    assert!(value.unwrap_err().downcast_ref::<String>().unwrap().contains("give inp, out or inout"));
}

/// Mapped, as far as anybody can tell, but not there: a file that has become shorter.
fn memory_that_goes_away_is_an_error() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * 4096).unwrap();
    let at = harness::map(2 * 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, Some(&file)) as usize;
    let hmm = Uhmm::new().unwrap();
    for kind in ["opencl", "soft:nofault"] {
        let dev = hmm.device(kind).unwrap();
        let mut node = Box::new(Node { next: 0, value: 5 });
        let first = &raw const *node as u64;
        file.set_len(4096).unwrap();
        // SAFETY: nobody else uses either; that the file's page is gone is the test.
        let both =
            |node: &mut Node| unsafe { [bytes(at + 4096 + 100, 16, Access::InOut), bytes(&raw mut *node as usize, 16, Access::InOut)] };
        let error = dev.run(&raise(), 1, args![first, 1u64].reaching(both(&mut node))).unwrap_err();
        assert!(matches!(error, Error::Gone { address } if address == at + 4096 + 100), "{kind}: {error:?}");
        assert_eq!(node.value, 5, "it has not started");
        file.set_len(2 * 4096).unwrap();
        dev.run(&raise(), 1, args![first, 1u64].reaching(both(&mut node))).unwrap();
        assert_eq!(node.value, 6, "{kind}");
    }
}

fn more_than_fits_is_refused() {
    let (_hmm, dev) = opencl(8);
    let many = vec![1u64; 2 << 20];
    let mut sum = [0u64; 2];
    let never = follow();
    let error = dev.run(&never, 1, args![out(&mut sum), 0u64].reaching([inp(&many)])).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    // What fits takes the place of what is there.
    let mut data = vec![1u32; 1 << 20];
    let add = Forms::new(harness::increment).opencl("__kernel void add(__global uint *d) { d[get_global_id(0)]++; }", "add", 1);
    for _ in 0..3 {
        dev.run(&add, data.len(), args![inout(&mut data)]).unwrap();
        dev.run(&never, 1, args![out(&mut sum), 0u64].reaching([inp(&many[..650_000])])).unwrap();
        assert_eq!(sum, [0, 0]);
    }
    assert!(data.iter().all(|&x| x == 4));
}

fn nodes_of_arguments_are_theirs() {
    let hmm = Uhmm::new().unwrap();
    for kind in ["opencl", "soft:nofault", "soft"] {
        let dev = hmm.device(kind).unwrap();
        // An arena that is an argument, with whole pages that are away while the kernel runs, and boxes.
        let mut arena: Vec<Node> = (0..50_000).map(|i| Node { next: 0, value: i }).collect();
        let mut nodes = boxes(1000);
        for i in 0..1000 {
            arena[i * 50].next = &raw const *nodes[i] as u64;
            nodes[i].next = arena.get(i * 50 + 50).map_or(0, |next| &raw const *next as u64);
        }
        let first = arena.as_ptr() as u64;
        let mut sum = [0u64; 2];
        let each = arena.iter().step_by(50).map(|node| inp(core::slice::from_ref(node))).chain(read(&nodes));
        dev.run(&follow(), 1, args![out(&mut sum), first, inp(&arena)].reaching(each)).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(sum, [999 * 500 + 50 * 999 * 500, 2000], "{kind}");
        // A part of an argument is not enough, nor is one that is only read.
        let cut = core::mem::size_of_val(&arena[..40_000]);
        // SAFETY: it is refused.
        let part = unsafe { bytes(first as usize + cut - 8, 16, Access::In) };
        let error = dev.run(&follow(), 1, args![out(&mut sum), first, inp(&arena[..40_000])].reaching([part])).unwrap_err();
        assert!(matches!(error, Error::Reached { .. }) && error.to_string().contains("a part"), "{error}");
        // SAFETY: as above.
        let writes = unsafe { bytes(first as usize, 16, Access::InOut) };
        let error = dev.run(&follow(), 1, args![out(&mut sum), first, inp(&arena)].reaching([writes])).unwrap_err();
        assert!(matches!(error, Error::Reached { .. }), "{error}");
    }
}

/// Nodes on pages that an earlier launch has taken to a device: a launch that reaches them brings them home, whichever it is.
fn nodes_that_are_on_a_device_come_home() {
    let (hmm, cl) = opencl(64);
    let nofault = hmm.soft("soft:nofault").replayable_faults(false).memory(64 << 20).open().unwrap();
    let add = Forms::new(harness::increment).opencl(
        "__kernel void add(__global uint *d, ulong uhmm_len_0) { ulong i = get_global_id(0) * 1024; for (ulong k = i; k < min(i + 1024, uhmm_len_0); k++) d[k]++; }",
        "add",
        1,
    );
    let mut arena = vec![0u32; 3 << 20];
    for (round, (takes, reaches)) in [(&cl, &cl), (&cl, &nofault), (&nofault, &cl), (&nofault, &nofault)].into_iter().enumerate() {
        takes.run(&add, arena.len().div_ceil(1024), args![inout(&mut arena)]).unwrap();
        let start = arena.as_ptr() as u64;
        for at in (0..1000).map(|i| i * 3000) {
            let next = if at < 999 * 3000 { start + (at + 3000) * 4 } else { 0 };
            arena[at as usize] = next as u32;
            arena[at as usize + 1] = (next >> 32) as u32;
        }
        takes.prefetch(&arena).unwrap();
        let mut sum = [0u64; 2];
        let nodes = arena.chunks(3000).map(|part| inp(&part[..4])).take(1000);
        reaches.run(&follow(), 1, args![out(&mut sum), start].reaching(nodes)).unwrap();
        let value = round as u64 + 1;
        assert_eq!(sum, [1000 * (value + (value << 32)), 1000], "round {round}");
    }
}

fn leases_and_scopes() {
    let (hmm, cl) = opencl(64);
    let nofault = hmm.device("soft:nofault").unwrap();
    for dev in [&cl, &nofault] {
        let mut nodes = boxes(500);
        let mut data = vec![1u32; 100_000];
        let first = head(&nodes);
        let lease = dev.acquire(args![first, 2u64, inout(&mut data)].reaching(written(&mut nodes))).unwrap();
        let kernel = raise();
        lease.run(&kernel, 1).unwrap();
        // SAFETY: nobody writes it but a run of the lease, which has ended.
        assert_eq!(unsafe { (first as *const Node).read().value }, 2, "what a run has written is there when it returns");
        lease.run(&kernel, 1).unwrap();
        // While it is leased it is nobody else's.
        // SAFETY: it is refused.
        let one = unsafe { bytes(first as usize, 16, Access::InOut) };
        let error = dev.run(&kernel, 1, args![first, 1u64].reaching([one])).unwrap_err();
        assert!(matches!(error, Error::Reached { .. }) && error.to_string().contains("lease"), "{error}");
        // SAFETY: as above.
        let error = dev.run(&kernel, 1, args![first, 1u64, unsafe { bytes(first as usize, 16, Access::InOut) }]).unwrap_err();
        assert!(matches!(error, Error::Busy { index: 2, .. }), "{error}");
        drop(lease);
        assert!(nodes.iter().enumerate().all(|(i, node)| node.value == i as u64 + 4), "{}", dev.name());
        // Launches that nobody waits for.
        let mut lists: Vec<Vec<Box<Node>>> = (0..10).map(|_| boxes(300)).collect();
        scope(|scope| {
            for list in &mut lists {
                scope.launch(dev, &kernel, 1, args![head(list), 5u64].reaching(written(list)));
            }
        })
        .unwrap();
        assert!(lists.iter().flatten().enumerate().all(|(i, node)| node.value == i as u64 % 300 + 5), "{}", dev.name());
    }
}

/// The same memory, reached by launches of two devices and declared by those of a third, of a scope: never at the same time.
fn devices_take_turns_over_nodes() {
    let (hmm, cl) = opencl(64);
    let nofault = hmm.device("soft:nofault").unwrap();
    let soft = hmm.device("soft").unwrap();
    let kernel = raise();
    let mut arena: Vec<Node> = (0..2000).map(|_| Node { next: 0, value: 0 }).collect();
    for i in 0..1999 {
        arena[i].next = &raw const arena[i + 1] as u64;
    }
    let first = arena.as_ptr() as u64;
    scope(|scope| {
        let arena = scope.lend(&mut arena);
        for _ in 0..30 {
            scope.launch(&cl, &kernel, 1, args![first, 3u64].reaching([arena.inout()]));
            scope.launch(&nofault, &kernel, 1, args![first, 3u64].reaching([arena.inout()]));
            scope.launch(&soft, &kernel, 1, args![first, 3u64, arena.inout()]);
            scope.launch(&cl, &kernel, 1, args![first, 3u64, arena.inout()]);
        }
    })
    .unwrap();
    assert!(arena.iter().all(|node| node.value == 30 * 12), "{:?}", arena.iter().map(|node| node.value).take(5).collect::<Vec<_>>());
}

fn a_hundred_thousand_nodes() {
    let (_hmm, dev) = opencl(64);
    let mut nodes = boxes(100_000);
    let first = head(&nodes);
    let mut sum = [0u64; 2];
    for round in 0..3 {
        dev.run(&follow(), 1, args![out(&mut sum), first].reaching(read(&nodes))).unwrap();
        assert_eq!(sum, [99_999 * 50_000 + 100_000 * round, 100_000]);
        dev.run(&raise(), 1, args![first, 1u64].reaching(written(&mut nodes))).unwrap();
    }
}
