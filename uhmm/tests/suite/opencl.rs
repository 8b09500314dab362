//! Devices with OpenCL. Where there is none these tests say so, and are left out; UHMM_OPENCL=required makes that a failure.

use crate::conformance::failed;
use crate::harness::Pages;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use uhmm::{Advice, Ctx, Error, Forms, KernelFault, Location, OpenCl, To, Uhmm, args, inout, inp, out};
use uhmm_core::conformance::{Named, Subject};
use uhmm_core::driver::{DeviceInfo, Driver};
use uhmm_core::kernel::{Entry, Kernel};
use uhmm_core::mode::Mode;
use uhmm_core::own::OwnBox;
use uhmm_core::{CoreRef, DeviceConfig};
use uhmm_os::PAGE;

crate::tests![
    conforms,
    one_kernel_on_every_device,
    a_written_range_is_not_the_cpus_while_the_kernel_runs,
    a_kernel_that_uses_the_processs_memory_is_found_out,
    small_arguments_are_copied,
    touches_of_the_program_are_not_the_kernels,
    a_touch_is_served_before_a_launch_or_after_it,
    a_touch_of_what_a_kernel_writes_waits_for_its_end,
    wrong_kernels_are_refused_in_words,
    devices_are_found_by_name,
    devices_are_found_by_several_threads_at_once,
    the_runtimes_threads_allocate_beside_what_is_away,
    arrays_beyond_the_devices_memory_take_turns,
    what_was_prefetched_is_in_one_piece,
    local_memory_is_each_groups_own,
    what_can_be_reached_is_copied,
    strided_pages_go_there_and_back,
];

/// The kernels of the checks.
const CHECKED: &str = "
__kernel void copy(__global uchar *to, __global const uchar *from, ulong part, ulong uhmm_len_0) {
    ulong start = get_group_id(0) * part, end = min(start + part, uhmm_len_0);
    for (ulong i = start; i < end; i++) to[i] = from[i];
}
__kernel void add_one(__global uchar *data, ulong part, ulong uhmm_len_0) {
    ulong start = get_group_id(0) * part, end = min(start + part, uhmm_len_0);
    for (ulong i = start; i < end; i++) data[i]++;
}
__kernel void sum(__global ulong *sums, __global const uchar *data, ulong part, ulong uhmm_len_0, ulong uhmm_len_1) {
    ulong start = get_group_id(0) * part, end = min(start + part, uhmm_len_1), sum = 0;
    for (ulong i = start; i < end; i++) sum += data[i];
    if (get_group_id(0) < uhmm_len_0) sums[get_group_id(0)] = sum;
}
__kernel void fill_part(__global uchar *data, ulong part, ulong from, ulong len, ulong value, ulong uhmm_len_0) {
    ulong start = get_group_id(0) * part, end = min(start + part, uhmm_len_0);
    for (ulong i = start + from; i < min(start + from + len, end); i++) data[i] = (uchar)value;
}
struct node { ulong next, value; };
__kernel void follow_list(__global ulong *sum, ulong head, UHMM) {
    ulong total = 0;
    while (head != 0) {
        __global const struct node *node = uhmm_ptr(head);
        total += node->value;
        head = node->next;
    }
    sum[0] = total;
}
__kernel void reach(__global ulong *seen, __global uchar *at) {
    seen[0] = at[0];
    at[0]++;
}";

/// A kernel that has no form in Rust.
pub struct Foreign(pub OpenCl);

impl Kernel for Foreign {
    fn run(&self, _: &Ctx<'_>) {
        panic!("it is written in OpenCL C only");
    }

    fn opencl_form(&self) -> Option<&OpenCl> {
        Some(&self.0)
    }
}

pub fn foreign(name: &'static str) -> Foreign {
    Foreign(OpenCl { source: CHECKED.into(), name: name.into(), local: [1; 3], options: "".into() })
}

/// That of some kernels which a check asks for.
pub(crate) fn form(kernels: &[Foreign], named: Named) -> Option<Entry> {
    let name = match named {
        Named::Copy => "copy",
        Named::AddOne => "add_one",
        Named::Sum => "sum",
        Named::FillPart => "fill_part",
        Named::FollowList => "follow_list",
        Named::Reach => "reach",
        Named::Fail => return None,
    };
    kernels.iter().find(|kernel| kernel.0.name == name).map(Entry::new)
}

fn conforms() {
    let dev = CoreRef::get()
        .unwrap()
        .device(DeviceConfig { memory: 16 << 20, ..DeviceConfig::new("opencl") }, uhmm_opencl::open_with_copies)
        .unwrap();
    let kernels = ["copy", "add_one", "sum", "fill_part", "follow_list"].map(foreign);
    let forms = |named| form(&kernels, named);
    let mut subject = Subject::new(&dev).with_forms(&forms);
    let lesser = CoreRef::get().unwrap().mode() != Mode::Full;
    assert_eq!(failed(&mut subject, |name| lesser && crate::conformance::STAYS.contains(&name)), Vec::<&str>::new());
}

const ADD: &str = "
__kernel void add(__global float *r, __global const float *a, float scale) {
    size_t i = get_global_id(0);
    r[i] += scale * a[i];
}
__kernel void slow(__global uint *data, uint rounds) {
    uint x = data[get_global_id(0)];
    for (uint i = 0; i < rounds; i++) x = x * 1664525u + 1013904223u;
    data[get_global_id(0)] = x;
}";

fn add(ctx: &Ctx<'_>) {
    let from = ctx.group() * 64;
    for (r, a) in ctx.out::<f32>(0).chunk(64).iter_mut().zip(&ctx.inp::<f32>(1)[from..]) {
        *r += ctx.value::<f32>(2) * a;
    }
}

fn opened(megabytes: usize) -> (Uhmm, uhmm::Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.opencl("opencl").copies(true).memory(megabytes << 20).open().unwrap();
    (hmm, dev)
}

/// One kernel value runs on both kinds of device, at any alignment.
fn one_kernel_on_every_device() {
    let (hmm, cl) = opened(64);
    let soft = hmm.soft("soft").memory(64 << 20).open().unwrap();
    let kernel = Forms::new(add).opencl(ADD, "add", 64);
    let a: Vec<f32> = (0..1_000_013).map(|i| i as f32).collect();
    let mut r = vec![1.0f32; 1_000_013];
    for (round, dev) in [&cl, &soft, &cl, &cl].into_iter().enumerate() {
        for at in [0, 1, 13] {
            dev.run(&kernel, 10_000, args![inout(&mut r[at..at + 640_000]), inp(&a[13 - at..640_013 - at]), 0.5f32]).unwrap();
        }
        assert!(r[640_013..].iter().all(|&x| x == 1.0), "nothing beside it was written");
        let right = |i: usize| {
            [0usize, 1, 13].into_iter().filter(|&at| (at..at + 640_000).contains(&i)).fold(0.0, |sum, at| sum + 0.5 * a[i - at + 13 - at])
        };
        for i in [0, 1, 12, 13, 1000, 639_999, 640_000, 640_005, 640_012] {
            let wanted = 1.0 + (round + 1) as f32 * right(i);
            assert!((r[i] - wanted).abs() <= wanted.abs() * 1e-5, "round {round}: r[{i}] is {}, not {wanted}", r[i]);
        }
    }
}

/// PoCL runs in this process, so that a kernel which touched the program's own pages would give right answers too. While it runs they are not there.
fn a_written_range_is_not_the_cpus_while_the_kernel_runs() {
    let (_hmm, dev) = opened(64);
    let mut data = vec![7u32; 4 << 20];
    let middle = &raw const data[2 << 20] as usize;
    let seen = std::sync::atomic::AtomicBool::new(false);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let one = |x: u32, rounds: u32| (0..rounds).fold(x, |x, _| x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut empty = 0;
            while !stop.load(std::sync::atomic::Ordering::Acquire) {
                empty += u32::from(!crate::harness::present(middle as *const u32));
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            seen.store(empty > 20, std::sync::atomic::Ordering::Release);
        });
        let kernel = Foreign(OpenCl { source: ADD.into(), name: "slow".into(), local: [64, 1, 1], options: "".into() });
        dev.run(&kernel, data.len() / 64, args![inout(&mut data), 300u32]).unwrap();
        stop.store(true, std::sync::atomic::Ordering::Release);
        watch.join().unwrap();
    });
    assert!(seen.into_inner(), "the page was away for as long as the kernel ran");
    assert_eq!(crate::harness::pages_present(&data), 0, "and nothing has come back by itself");
    let wanted = one(7, 300);
    assert!(data.iter().all(|&x| x == wanted));
}

/// PoCL's kernels could use any address of the process, if they had one. So every test of this device shows that they have none: a driver that gave them one would fail here.
fn a_kernel_that_uses_the_processs_memory_is_found_out() {
    let (_hmm, dev) = opened(64);
    // One worker of the runtime's will wait for a page, and another one has to bring it.
    if uhmm_opencl::choose("opencl").unwrap().kind != "cpu" || dev.threads() < 2 {
        println!("left out: kernels of this device have no address of the process, or it has one thread only");
        return;
    }
    let mut data = vec![7u32; 1 << 20];
    let mut seen = [0u32; 4];
    let cheat = Foreign(OpenCl { source: CHEAT.into(), name: "cheat".into(), local: [1; 3], options: "".into() });
    for round in 0..3u32 {
        let at = &raw const data[500_000] as u64;
        let error = dev.run(&cheat, 1, args![inout(&mut data), out(&mut seen), at]).unwrap_err();
        assert!(matches!(error, Error::Kernel(KernelFault::HostAddress { address }) if address as u64 == at), "{error}");
        assert!(data.iter().enumerate().all(|(i, &x)| x == 7 || (i < 10 && x == 8)), "as before or as written");
        assert_eq!(dev.stats().launches_failed, u64::from(round) + 1);
        data.fill(7);
        let kernel = Foreign(OpenCl { source: ADD.into(), name: "slow".into(), local: [64, 1, 1], options: "".into() });
        dev.run(&kernel, data.len() / 64, args![inout(&mut data), 1u32]).unwrap();
        assert!(data.iter().all(|&x| x == 7u32.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)), "the next one runs");
        data.fill(7);
    }
}

const CHEAT: &str = "
__kernel void cheat(__global uint *data, __global uint *seen, ulong address) {
    for (uint i = 0; i < 10; i++) data[i] += 1;
    seen[0] = *(volatile __global uint *)address;
}";

/// Nor does a touch of the program's own threads fail a launch.
fn touches_of_the_program_are_not_the_kernels() {
    let (_hmm, dev) = opened(64);
    let mut data = Pages::new(4 << 20);
    let words = (data.start() as usize, data.len() / 4);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut random = fastrand::Rng::with_seed(5);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // SAFETY: the mapping outlives the thread; who touches it while a launch has it waits.
                    let word = unsafe { ((words.0 + 4 * random.usize(..words.1)) as *const u32).read_volatile() };
                    assert!(word <= 20);
                }
            });
        }
        let kernel = Foreign(OpenCl { source: LITTLE.into(), name: "little".into(), local: [64, 1, 1], options: "".into() });
        for _ in 0..20 {
            let all = data.slice::<u32>();
            dev.run(&kernel, all.len() / 64, args![inout(all)]).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(data.slice::<u32>().iter().all(|&x| x == 20) && dev.stats().cpu_faults > 0);
}

/// A launch over what the last one has left unchanged looks at no block. A touch that the monitor had begun to serve when such a launch began, having seen that nobody held the page, took it home while
/// the kernel ran: what the kernel wrote there was lost, or the program saw what had been before.
fn a_touch_is_served_before_a_launch_or_after_it() {
    let (_hmm, dev) = opened(64);
    let mut data = Pages::new(4 << 20);
    let words = (data.start() as usize, data.len() / 4);
    let kernel = Foreign(OpenCl { source: LITTLE.into(), name: "little".into(), local: [64, 1, 1], options: "".into() });
    let all = data.slice::<u32>();
    all.fill(0);
    let (stop, run) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(5);
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                let at = words.0 + 4 * random.usize(..words.1);
                // SAFETY: the mapping outlives the thread; who touches it while a launch has it waits.
                let word = unsafe { (at as *const u32).read_volatile() } as usize;
                assert!(word <= run.load(Ordering::SeqCst) + 1);
                // Most launches find everything as the one before it has left it.
                while !stop.load(Ordering::Relaxed) && run.load(Ordering::SeqCst) < seen + 3 {
                    std::hint::spin_loop();
                }
                seen = run.load(Ordering::SeqCst);
            }
        });
        // They take the monitor's core away now and then.
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let end = std::time::Instant::now() + crate::harness::seconds(4);
        while std::time::Instant::now() < end {
            dev.run(&kernel, all.len() / 64, args![inout(all)]).unwrap();
            run.fetch_add(1, Ordering::SeqCst);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let run = run.into_inner() as u32;
    let wrong = all.iter().filter(|&&x| x != run).count();
    assert_eq!(wrong, 0, "of {run} launches");
}

/// What is small is not taken away: it is copied there and back, and no touch has to fetch it. Large arguments beside it move.
fn small_arguments_are_copied() {
    let (hmm, dev) = opened(64);
    let kernel = Foreign(OpenCl { source: LITTLE.into(), name: "little".into(), local: [64, 1, 1], options: "".into() });
    let (mut small, mut large) = (Pages::new(15 * PAGE), Pages::new(16 * PAGE));
    let before = dev.stats();
    for round in 1..=3 {
        for (data, stays) in [(&mut small, true), (&mut large, hmm.mode() != Mode::Full)] {
            let all = data.slice::<u32>();
            dev.run(&kernel, all.len() / 64, args![inout(all)]).unwrap();
            assert_eq!(crate::harness::present(&raw const all[5000]), stays);
            assert!(all.iter().all(|&x| x == round));
        }
    }
    let moved = dev.stats() - before;
    assert!(moved.pages_bounced >= 3 * 15 && moved.bytes_to_cpu >= 3 * 31 * PAGE as u64, "{moved:?}");
}

const LITTLE: &str = "__kernel void little(__global uint *data) { data[get_global_id(0)]++; }";

/// A thread that touches a page which a running kernel writes sees what the kernel has made of it, and goes on when it has ended.
fn a_touch_of_what_a_kernel_writes_waits_for_its_end() {
    let (_hmm, dev) = opened(64);
    let kernel = Foreign(OpenCl { source: ADD.into(), name: "slow".into(), local: [64, 1, 1], options: "".into() });
    let wanted = (0..300u32).fold(7u32, |x, _| x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    for _ in 0..3 {
        let mut data = vec![7u32; 4 << 20];
        let places = [1 << 20, 2 << 20, 3 << 20].map(|at| &raw const data[at] as usize);
        std::thread::scope(|scope| {
            let touchers = places.map(|place| {
                scope.spawn(move || {
                    let place = place as *const u32;
                    while crate::harness::present(place) {
                        std::thread::yield_now();
                    }
                    // SAFETY: the vector lives as long as the scope; a plain load of a whole word, which the kernel writes by way of the device's memory.
                    unsafe { place.read_volatile() }
                })
            });
            dev.run(&kernel, data.len() / 64, args![inout(&mut data), 300u32]).unwrap();
            assert!(touchers.map(|toucher| toucher.join().unwrap()).iter().all(|&seen| seen == wanted), "not what the kernel has made");
        });
        assert!(data.iter().all(|&x| x == wanted));
    }
}

/// Everything that can be wrong with a kernel is said before anything moves, in the compiler's words where they are its own.
fn wrong_kernels_are_refused_in_words() {
    let (_hmm, dev) = opened(16);
    let mut r = vec![1.0f32; 100_000];
    let a = vec![2.0f32; 100_000];
    let refused = |result: Result<(), Error>, words: &[&str]| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::NotLoaded { .. }), "{error:?}");
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let form = |source: &'static str, name: &'static str| Forms::new(add).opencl(source, name, 64);
    refused(dev.run(&add, 10, args![inout(&mut r), inp(&a), 0.5f32]), &["no form in OpenCL C"]);
    refused(
        dev.run(&form("__kernel void f(__global float *r) { r[0] = nonsense; }", "f"), 1, args![inout(&mut r)]),
        &["CL_BUILD_PROGRAM_FAILURE", "nonsense", "1:"],
    );
    refused(dev.run(&form(ADD, "subtract"), 1, args![inout(&mut r)]), &["no kernel subtract"]);
    refused(dev.run(&form(ADD, "add"), 10, args![inout(&mut r), inp(&a)]), &["3 parameters", "2 arguments"]);
    refused(dev.run(&form(ADD, "add"), 10, args![inout(&mut r), inp(&a), 0.5f64]), &["argument 2", "float", "f64"]);
    refused(dev.run(&form(ADD, "add"), 10, args![inout(&mut r), 0.5f32, inp(&a)]), &["argument 1", "pointer"]);
    refused(dev.run(&form(ADD, "add"), 10, args![inp(&r), inp(&a), 0.5f32]), &["argument 0", "const"]);
    refused(dev.run(&form("__kernel void f(__global float *r, __local float *l) {}", "f"), 1, args![inout(&mut r), 1u32]), &["__local"]);
    let hidden = "#define P __global float *r, uint n
        __kernel void f(P) { __local float l[64]; l[get_local_id(0)] = r[n]; barrier(CLK_LOCAL_MEM_FENCE); r[get_local_id(0)] = l[n]; }";
    refused(dev.run(&form(hidden, "f"), 1, args![inout(&mut r), 1u32]), &["local memory", "without macros"]);
    assert_eq!(dev.stats().pages_to_device, 0, "nothing has moved for any of them");
    // A work size that the device refuses is found when the kernel starts: memory reads as before.
    let large = Forms::new(add).opencl(ADD, "add", 1 << 20);
    let error = dev.run(&large, 1, args![inout(&mut r), inp(&a), 0.5f32]).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelFault::Refused(_))) && error.to_string().contains("CL_INVALID_WORK"), "{error}");
    assert!(r.iter().all(|&x| x == 1.0));
    // And what was right all along runs.
    dev.run(&form(ADD, "add"), 100_000 / 64, args![inout(&mut r), inp(&a), 0.5f32]).unwrap();
    assert!(r[..99_968].iter().all(|&x| x == 2.0) && r[99_968..].iter().all(|&x| x == 1.0));
}

/// Devices are found by number, type and words of their names; what is not there is said with what is.
fn devices_are_found_by_name() {
    let all = uhmm_opencl::devices();
    let first = &all[0];
    let word = first.name.split(' ').next().unwrap().to_lowercase();
    for name in ["opencl", "opencl:0", &format!("opencl:{}", first.kind), &format!("opencl:{word}")] {
        assert_eq!(uhmm_opencl::choose(name).unwrap().id, "opencl:0", "{name}");
    }
    let hmm = Uhmm::new().unwrap();
    let listed = || hmm.devices().into_iter().find(|device| device.name == "opencl:0").unwrap();
    assert!(listed().open.is_none() && listed().hardware.unwrap().contains(&first.name));
    let dev = hmm.opencl("opencl:0").memory(4 << 20).open().unwrap();
    assert!(listed().open.is_some_and(|info| info.name == dev.name()));
    let error = Uhmm::new().unwrap().device("opencl:no such thing").unwrap_err().to_string();
    assert!(error.contains("opencl:0") && error.contains(&first.name), "{error}");
    let error = Uhmm::new().unwrap().opencl("opencl").copies(true).memory(first.largest + (4 << 20)).open().unwrap_err().to_string();
    assert!(error.contains("more than"), "{error}");
}

/// PoCL makes its devices when they are first asked for, and ended the process if two threads did so.
fn devices_are_found_by_several_threads_at_once() {
    let start = std::sync::Barrier::new(4);
    std::thread::scope(|scope| {
        let names = [0; 4].map(|_| {
            scope.spawn(|| {
                start.wait();
                uhmm_opencl::devices().into_iter().map(|device| device.name).collect::<Vec<_>>()
            })
        });
        let [first, rest @ ..] = names.map(|thread| thread.join().unwrap());
        assert!(!first.is_empty() && rest.iter().all(|names| *names == first));
    });
}

/// The runtime lives in this process and allocates from the heap that the nodes of a list lie in.
fn the_runtimes_threads_allocate_beside_what_is_away() {
    let (_hmm, dev) = opened(64);
    let kernels = [foreign("follow_list"), foreign("add_one")];
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            // As threads of the runtime do: small and large blocks, between the nodes and beside the arrays.
            scope.spawn(|| {
                let mut kept: Vec<Vec<u8>> = vec![];
                let mut random = fastrand::Rng::with_seed(3);
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    kept.push(vec![1; random.usize(1..20_000)]);
                    if kept.len() > 200 {
                        kept.swap_remove(random.usize(..200));
                    }
                }
            });
        }
        for round in 0..40u64 {
            let mut nodes: Vec<uhmm_core::conformance::Node> =
                (0..5_000).map(|i| uhmm_core::conformance::Node { next: 0, value: i ^ round }).collect();
            for i in 0..nodes.len() - 1 {
                nodes[i].next = &raw const nodes[i + 1] as u64;
            }
            let head = nodes.as_ptr() as u64;
            let mut bytes: Vec<u8> = vec![round as u8; 50_000 + 1000 * round as usize];
            let mut sum = [0u64];
            dev.run(&kernels[0], 1, args![out(&mut sum), head, inp(&nodes)]).unwrap();
            dev.run(&kernels[1], bytes.len().div_ceil(1000), args![inout(&mut bytes), 1000u64]).unwrap();
            assert_eq!(sum[0], nodes.iter().map(|node| node.value).sum::<u64>());
            assert!(bytes.iter().all(|&x| x == round as u8 + 1));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// Arrays that are too many for the device take turns on it; what one launch cannot have at once is said with the sizes.
fn arrays_beyond_the_devices_memory_take_turns() {
    let (_hmm, dev) = opened(32);
    let kernel = Forms::new(add).opencl(ADD, "add", 64);
    let a = vec![1.0f32; 1 << 20];
    let mut all: Vec<Vec<f32>> = (0..12).map(|i| vec![i as f32; 1 << 20]).collect();
    for round in 1..=3 {
        for (i, r) in all.iter_mut().enumerate() {
            dev.run(&kernel, r.len() / 64, args![inout(r), inp(&a), 2.0f32]).unwrap();
            if (i + round) % 5 == 0 {
                assert_eq!(r[12_345], i as f32 + 2.0 * round as f32);
            }
        }
    }
    for (i, r) in all.iter().enumerate() {
        assert!(r.iter().all(|&x| x == i as f32 + 6.0), "array {i}");
    }
    let mut large = vec![0.0f32; 10 << 20];
    let error = dev.run(&kernel, 1, args![inout(&mut large), inp(&a), 2.0f32]).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }) && error.to_string().contains("33554432"), "{error}");
}

/// A prefetch goes in parts; a launch finds all of it in one piece, and moves nothing again: but for the first, if the arrays share a block, for then both get a common place.
fn what_was_prefetched_is_in_one_piece() {
    let (hmm, dev) = opened(128);
    let kernel = Forms::new(add).opencl(ADD, "add", 64);
    let a = vec![1.0f32; 5 << 20];
    let mut r = vec![1.0f32; 5 << 20];
    for round in 1..=3 {
        hmm.prefetch(&r, To::Device(&dev)).unwrap().wait().unwrap();
        dev.prefetch(&a).unwrap();
        let before = dev.stats().pages_to_device;
        dev.run(&kernel, r.len() / 64, args![inout(&mut r), inp(&a), 1.0f32]).unwrap();
        let moved = dev.stats().pages_to_device - before;
        assert!(moved < 16 || round == 1, "round {round}: {moved} pages moved again");
        assert!(r.iter().all(|&x| x == 1.0 + round as f32));
    }
}

/// Each group turns its numbers round in local memory many times. In a kernel that another one calls, PoCL makes one variable of all groups', and two threads get in each other's way.
fn local_memory_is_each_groups_own() {
    const TURN: &str = "
#define NAME turn // no kernel turn(int): kernel void turn(
__kernel __attribute__((work_group_size_hint(64, 1, 1))) void turn(__global uint *restrict r, const uint rounds, UHMM, __global const ulong *restrict at, ulong uhmm_len_0)
{
    __local uint own[64];
    const size_t item = get_local_id(0);
    __global const uint *from = uhmm_ptr(at[0]);
    own[item] = from[get_global_id(0)];
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint round = 0; round < rounds; round++) {
        const uint x = own[(item + 1) % 64];
        barrier(CLK_LOCAL_MEM_FENCE);
        own[item] = x;
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (get_global_id(0) < uhmm_len_0)
        r[get_global_id(0)] = own[item];
}";
    let (_hmm, dev) = opened(64);
    let kernel = Foreign(OpenCl { source: TURN.into(), name: "turn".into(), local: [64, 1, 1], options: "".into() });
    let data: Vec<u32> = (0..64 * 500).collect();
    let mut r = vec![0u32; data.len() - 9];
    let at = [data.as_ptr() as u64];
    for shift in 0..3 {
        dev.run(&kernel, 500, args![out(&mut r[shift..]), 641u32, inp(&at), inp(&data)]).unwrap();
        for (i, &x) in r[shift..].iter().enumerate() {
            assert_eq!(x as usize, i / 64 * 64 + (i + 1) % 64, "number {i}");
        }
    }
}

/// The driver asked by itself, as any other.
fn what_can_be_reached_is_copied() {
    fn open(config: &DeviceConfig, mode: Mode, others: &[DeviceInfo]) -> Result<OwnBox<dyn Driver>, Error> {
        uhmm_opencl::open_with_copies(config, mode, others).inspect(|driver| crate::halfway::batches(&**driver))
    }
    crate::halfway::asked(DeviceConfig::new("opencl"), open);
}

/// Between launches the CPU changes every so-manieth page of what stays on the device. Those pages alone come and go, and what is between them is what it was.
fn strided_pages_go_there_and_back() {
    let (hmm, dev) = opened(64);
    let full = hmm.mode() == Mode::Full;
    let mut memory = Pages::new(8 << 20);
    let data = memory.slice::<u32>();
    let pages = data.len() / 1024;
    if full {
        hmm.advise(&*data, Advice::PreferredLocation(Location::Device(dev.id()))).unwrap();
    }
    let kernel = Foreign(OpenCl { source: LITTLE.into(), name: "little".into(), local: [64, 1, 1], options: "".into() });
    data.iter_mut().zip(0..).for_each(|(x, i)| *x = i);
    let mut want = data.to_vec();
    for (round, stride) in [4, 3, 2, 7, 16, 511, 1].into_iter().enumerate() {
        dev.run(&kernel, data.len() / 64, args![inout(&mut *data)]).unwrap();
        want.iter_mut().for_each(|x| *x += 1);
        let touched = (round..pages).step_by(stride);
        for page in touched.clone() {
            let at = page * 1024 + page % 1024;
            assert_eq!(data[at], want[at], "stride {stride}: page {page}");
            (data[at], want[at]) = (page as u32, page as u32);
        }
        let before = dev.stats().pages_to_device;
        dev.run(&kernel, data.len() / 64, args![inout(&mut *data)]).unwrap();
        want.iter_mut().for_each(|x| *x += 1);
        let moved = dev.stats().pages_to_device - before;
        assert!(!full || moved == touched.len() as u64, "stride {stride}: {moved} pages went for {}", touched.len());
        // What the CPU has touched now leaves gaps in what comes home from the device.
        for page in (1..pages).step_by(stride + 1) {
            assert_eq!(data[page * 1024], want[page * 1024], "stride {stride}: page {page}");
        }
        dev.evict(&*data).unwrap();
        assert!(*data == *want, "stride {stride}");
    }
}
