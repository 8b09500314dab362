//! Memory that is leased on an OpenCL device, for who works there with kernels and a queue of his own.

use crate::harness::*;
use cl3::command_queue as cq;
use cl3::types::{cl_command_queue, cl_kernel, cl_mem, cl_program};
use cl3::{event as ev, kernel as kn, program as pg};
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use uhmm::{Device, Error, Forms, Mode, OpenClMemory, Uhmm, args, fence, inout, inp, out};

crate::tests![
    kernels_of_ones_own_on_what_is_leased,
    a_fence_of_ones_own_queue,
    what_is_leased_does_not_move,
    an_argument_gives_way_to_what_lies_beside_a_lease,
    a_launch_that_would_move_what_is_leased_is_refused,
    only_opencl_devices_have_opencl_handles,
];

const SOURCE: &str = "
__kernel void axpy(__global uchar *memory, ulong to, ulong from, uint scale) {
    __global uint *r = (__global uint *)(memory + to);
    __global const uint *a = (__global const uint *)(memory + from);
    r[get_global_id(0)] += scale * a[get_global_id(0)];
}
__kernel void add_at(__global uint *memory, uint add) {
    memory[get_global_id(0)] += add;
}
__kernel void slowly(__global uchar *memory, ulong at, uint rounds) {
    __global uint *word = (__global uint *)(memory + at) + get_global_id(0);
    uint x = *word;
    for (uint i = 0; i < rounds; i++) x = x * 1664525u + 1013904223u;
    *word = x;
}";

/// A queue, a program and its kernels, as a program that uses OpenCL has them: in the device's context.
struct Own {
    queue: cl_command_queue,
    program: cl_program,
    kernels: Vec<cl_kernel>,
}

impl Own {
    fn new(dev: &Device) -> Own {
        let handles = dev.opencl_handles().unwrap();
        // SAFETY: context and device are those of an open device.
        let queue = unsafe { cq::create_command_queue(handles.context, handles.device, 0) }.unwrap();
        let program = pg::create_program_with_source(handles.context, &[SOURCE]).unwrap();
        pg::build_program(program, &[handles.device], c"", None, ptr::null_mut()).unwrap();
        let kernels = [c"axpy", c"add_at", c"slowly"].map(|name| kn::create_kernel(program, name).unwrap()).to_vec();
        Own { queue, program, kernels }
    }

    /// Enqueues a kernel with its first work item at `from`: its event.
    fn enqueue(&self, kernel: usize, args: &[&dyn Arg], from: usize, count: usize) -> cl3::types::cl_event {
        let kernel = self.kernels[kernel];
        for (index, arg) in args.iter().enumerate() {
            let bytes = arg.bytes();
            // SAFETY: so many bytes are there, and are copied.
            unsafe { kn::set_kernel_arg(kernel, index as u32, bytes.len(), bytes.as_ptr().cast::<c_void>()) }.unwrap();
        }
        let (offset, global) = ([from], [count]);
        // SAFETY: queue and kernel are alive, the arguments are set.
        let done =
            unsafe { cq::enqueue_nd_range_kernel(self.queue, kernel, 1, offset.as_ptr(), global.as_ptr(), ptr::null(), 0, ptr::null()) };
        cq::flush(self.queue).unwrap();
        done.unwrap()
    }

    fn run(&self, kernel: usize, args: &[&dyn Arg], from: usize, count: usize) {
        wait(self.enqueue(kernel, args, from, count));
    }
}

fn wait(event: cl3::types::cl_event) {
    ev::wait_for_events(&[event]).unwrap();
    // SAFETY: it is ours.
    unsafe { ev::release_event(event) }.unwrap();
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: all are this value's own.
        unsafe {
            self.kernels.iter().for_each(|&kernel| kn::release_kernel(kernel).unwrap());
            pg::release_program(self.program).unwrap();
            cq::release_command_queue(self.queue).unwrap();
        }
    }
}

/// What a kernel's argument is made of.
trait Arg {
    fn bytes(&self) -> Vec<u8>;
}
impl Arg for u32 {
    fn bytes(&self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}
impl Arg for u64 {
    fn bytes(&self) -> Vec<u8> {
        self.to_ne_bytes().to_vec()
    }
}
impl Arg for cl_mem {
    fn bytes(&self) -> Vec<u8> {
        (*self as usize).to_ne_bytes().to_vec()
    }
}

fn opened(megabytes: usize) -> (Uhmm, Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.opencl("opencl").copies(true).memory(megabytes << 20).open().unwrap();
    (hmm, dev)
}

fn words(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| (i * 2654435761 + seed) as u32).collect()
}

/// One's own kernel, in one's own queue, gets buffer and offset; the results are the program's when the lease has ended, and nothing beside them is written.
fn kernels_of_ones_own_on_what_is_leased() {
    let (hmm, dev) = opened(64);
    let own = Own::new(&dev);
    let a = words(1, 700_003);
    let mut r = words(2, 700_003);
    let mut expected = r.clone();
    for (round, at) in [0usize, 1, 777, 1024].into_iter().enumerate() {
        let count = 600_000;
        let scale = round as u32 + 3;
        {
            let lease = dev.acquire(args![inout(&mut r[at..at + count]), inp(&a[7..7 + count]), 5u32]).unwrap();
            let (to, from) = (lease.opencl(0).unwrap(), lease.opencl(1).unwrap());
            assert_eq!((to.len, from.len), (4 * count, 4 * count));
            let whole = dev.memory();
            assert!(to.buffer == from.buffer && to.offset + to.len <= whole && from.offset + from.len <= whole);
            assert_eq!(to.offset % 4096, lease.addr(0) % 4096, "it is aligned as in the process");
            own.run(0, &[&to.buffer, &(to.offset as u64), &(from.offset as u64), &scale], 0, count);
            // Or by the number of the first work item.
            own.run(1, &[&to.buffer, &round_add(round)], to.offset / 4, count);
        }
        for i in 0..count {
            expected[at + i] = expected[at + i].wrapping_add(scale.wrapping_mul(a[7 + i])).wrapping_add(round_add(round));
        }
        assert!(r == expected, "round {round}");
    }
    // What a lease finds there is what a launch has left, and the other way round.
    let lease = dev.acquire(args![inout(&mut r)]).unwrap();
    let before = lease.opencl(0).unwrap();
    own.run(1, &[&before.buffer, &1u32], before.offset / 4, expected.len());
    lease.run(&Forms::new(|_: &uhmm::Ctx<'_>| {}).opencl(ADD, "add", 1), expected.len()).unwrap();
    own.run(1, &[&before.buffer, &1u32], before.offset / 4, expected.len());
    assert_eq!(lease.opencl(0), Some(before));
    drop(lease);
    assert!(r.iter().zip(&expected).all(|(&r, &e)| r == e.wrapping_add(12)));
    drop(hmm);
}

fn round_add(round: usize) -> u32 {
    1 << round
}

/// What uhmm launches beside it.
const ADD: &str = "__kernel void add(__global uint *data) { data[get_global_id(0)] += 10; }";

/// The CPU's touch waits for the event of one's own kernel.
fn a_fence_of_ones_own_queue() {
    let (hmm, dev) = opened(64);
    let own = Own::new(&dev);
    let mut data = vec![7u32; 1 << 20];
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    let OpenClMemory { buffer, offset, .. } = lease.opencl(0).unwrap();
    let event = own.enqueue(2, &[&buffer, &(offset as u64), &1000u32], 0, 1 << 20) as usize;
    let (done, signal) = fence();
    // SAFETY: the vector stays, and nobody touches it before the signal but in full mode, where the touch waits.
    unsafe { lease.release(done.clone()) };
    let ended = AtomicBool::new(false);
    let wanted = (0..1000).fold(7u32, |x, _| x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait(event as cl3::types::cl_event);
            ended.store(true, Ordering::SeqCst);
            signal.done();
        });
        if hmm.mode() == Mode::Full {
            let seen = data[500_000];
            assert!(ended.load(Ordering::SeqCst) && seen == wanted, "the touch came back before the kernel's end: {seen}");
        }
    });
    assert!(done.is_done() && data.iter().all(|&x| x == wanted));
}

/// Launches of what lies beside a lease, in the same blocks, and of what needs the room, leave it where it is in the device's memory.
fn what_is_leased_does_not_move() {
    let (_hmm, dev) = opened(32);
    let own = Own::new(&dev);
    let kernel = Forms::new(|_: &uhmm::Ctx<'_>| panic!("it runs on another device")).opencl(ADD, "add", 64);
    // Three arrays that share blocks at both ends, none of which begins with a block.
    let mut memory = Pages::new(22 << 20);
    let all = memory.slice::<u32>();
    let from = (all.as_ptr() as usize).next_multiple_of(2 << 20) - all.as_ptr() as usize;
    let (_, rest) = all.split_at_mut(from / 4 + 100_000);
    let (left, rest) = rest.split_at_mut(1 << 20);
    let (leased, rest) = rest.split_at_mut(1 << 20);
    let (right, _) = rest.split_at_mut(1 << 20);
    let mut elsewhere: Vec<Vec<u32>> = (0..4).map(|i| words(i, 1 << 20)).collect();
    let far: Vec<Vec<u32>> = elsewhere.clone();
    left.fill(1);
    leased.fill(2);
    right.fill(3);
    for round in 1..=4u32 {
        let lease = dev.acquire(args![inout(leased)]).unwrap();
        let place = lease.opencl(0).unwrap();
        let add = |by: u32| own.run(1, &[&place.buffer, &by], place.offset / 4, 1 << 20);
        let stays = |what: &str| assert_eq!(lease.opencl(0), Some(place), "round {round}: {what}");
        add(1);
        // As another argument before it takes the room behind the lease, it has to give way.
        dev.run(&Forms::new(|_: &uhmm::Ctx<'_>| {}).opencl(TWO, "two", 64), (1 << 20) / 64, args![inout(&mut elsewhere[0]), inout(right)])
            .unwrap();
        stays("beside its end");
        add(2);
        dev.run(&kernel, left.len() / 64, args![inout(left)]).unwrap();
        stays("beside its beginning");
        add(4);
        for array in &mut elsewhere {
            dev.run(&kernel, array.len() / 64, args![inout(array)]).unwrap();
            stays("more than there is room for");
        }
        add(8);
        drop(lease);
        assert!(leased.iter().all(|&x| x == 2 + 15 * round), "round {round}");
        assert!(left.iter().all(|&x| x == 1 + 10 * round) && right.iter().all(|&x| x == 3 + 10 * round), "round {round}");
        for (i, (array, before)) in elsewhere.iter().zip(&far).enumerate() {
            let added = if i == 0 { 20 } else { 10 };
            assert!(array.iter().zip(before).all(|(&x, &b)| x == b.wrapping_add(added * round)), "round {round}");
        }
    }
}

const TWO: &str = "__kernel void two(__global uint *a, __global uint *b) { a[get_global_id(0)] += 10; b[get_global_id(0)] += 10; }";

/// The first argument has the only place in which the second one can be: it goes elsewhere.
fn an_argument_gives_way_to_what_lies_beside_a_lease() {
    let (_hmm, dev) = opened(56);
    let two = Forms::new(|_: &uhmm::Ctx<'_>| {}).opencl(TWO, "two", 64);
    let (mut memory, mut first) = (Pages::huge(8 << 20), Pages::huge(4 << 20));
    let (leased, rest) = memory.slice::<u32>().split_at_mut(5 << 18);
    let first = &mut first.slice::<u32>()[1 << 18..3 << 18]; // in two blocks
    let beside = &mut rest[..1 << 19]; // with half of it in a block of its own
    let lease = dev.acquire(args![inout(leased)]).unwrap();
    let place = lease.opencl(0).unwrap();
    let behind = place.offset / (2 << 20) + 3;
    assert!(behind + 3 <= dev.memory() / (2 << 20), "three units, and room behind them");
    // Whatever is before the lease is the program's, but for one unit.
    let taken = dev.alloc::<u8>((behind - 4) * (2 << 20)).unwrap();
    for round in 1..=2 {
        dev.run(&two, (1 << 19) / 64, args![inout(first), inout(beside)]).unwrap();
        assert!(first.iter().chain(&*beside).all(|&x| x == 10 * round));
        assert_eq!(lease.opencl(0), Some(place));
    }
    drop((lease, taken));
}

/// Two leases that lie apart on the device cannot both have a neighbour between them: that is an error, and everything is as before.
fn a_launch_that_would_move_what_is_leased_is_refused() {
    let (_hmm, dev) = opened(32);
    let own = Own::new(&dev);
    let kernel = Forms::new(|_: &uhmm::Ctx<'_>| {}).opencl(ADD, "add", 64);
    let mut memory = Pages::new(14 << 20);
    let all = memory.slice::<u32>();
    let from = (all.as_ptr() as usize).next_multiple_of(2 << 20) - all.as_ptr() as usize;
    let (_, rest) = all.split_at_mut(from / 4 + 1000);
    let (left, rest) = rest.split_at_mut(1 << 20);
    let (between, rest) = rest.split_at_mut(1 << 20);
    let (right, _) = rest.split_at_mut(1 << 20);
    left.fill(1);
    between.fill(2);
    right.fill(3);
    {
        let leases = [dev.acquire(args![inout(left)]).unwrap(), dev.acquire(args![inout(right)]).unwrap()];
        let places = [0, 1].map(|i| leases[i].opencl(0).unwrap());
        let error = dev.run(&kernel, between.len() / 64, args![inout(between)]).unwrap_err();
        assert!(matches!(error, Error::NoRoom { .. }), "{error}");
        assert_eq!([0, 1].map(|i| leases[i].opencl(0).unwrap()), places);
        assert!(between.iter().all(|&x| x == 2));
        places.iter().for_each(|place| own.run(1, &[&place.buffer, &5u32], place.offset / 4, 1 << 20));
    }
    assert!(left.iter().all(|&x| x == 6) && right.iter().all(|&x| x == 8));
    dev.run(&kernel, between.len() / 64, args![inout(between)]).unwrap();
    assert!(between.iter().all(|&x| x == 12), "and now there is a place for it");
}

fn only_opencl_devices_have_opencl_handles() {
    let (hmm, dev) = opened(16);
    let soft = hmm.soft("soft").memory(16 << 20).open().unwrap();
    let mut data = words(0, 10_000);
    assert!(soft.opencl_handles().is_none() && soft.acquire(args![inout(&mut data)]).unwrap().opencl(0).is_none());
    // Memory that the program allocated on the device itself, and a range of nothing.
    let own = Own::new(&dev);
    let (mut buffer, nothing) = (dev.alloc::<u32>(3000).unwrap(), [0u32; 0]);
    buffer.upload(&[1; 3000]).unwrap();
    let lease = dev.acquire(args![buffer.inout(), inp(&nothing), out(&mut data[5000..])]).unwrap();
    let place = lease.opencl(0).unwrap();
    own.run(1, &[&place.buffer, &7u32], place.offset / 4, 3000);
    assert_eq!((place.len, lease.opencl(1).map(|place| place.len)), (12_000, Some(0)));
    drop(lease);
    let mut back = vec![0; 3000];
    buffer.download(&mut back).unwrap();
    assert!(back.iter().all(|&x| x == 8));
}
