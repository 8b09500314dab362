//! An OpenCL device that shares the process's pointers, where there is one: nothing moves, and nothing is watched.

use crate::conformance::{STAYS, failed};
use crate::harness::*;
use crate::opencl::Foreign;
use uhmm::{Device, OpenCl, Stats, Uhmm, args, inout, inp, out, ptr};
use uhmm_core::conformance::Subject;
use uhmm_core::{CoreRef, DeviceConfig};

crate::tests![
    conforms,
    pointers_pass_through_untouched,
    stored_and_bare_pointers_are_followed,
    it_can_be_driven_with_copies_all_the_same,
    what_another_device_has_comes_when_it_is_touched,
    a_lease_is_the_memory_itself,
];

/// The name of a device that shares pointers.
pub fn device() -> Option<String> {
    uhmm_opencl::devices().into_iter().find(|device| device.system_pointers).map(|device| device.id)
}

const SOURCE: &str = "
__kernel void axpy(__global uint *r, __global const uint *a, uint scale, ulong uhmm_len_0) {
    size_t i = get_global_id(0);
    if (i < uhmm_len_0) r[i] += scale * a[i];
}
struct node { ulong next, value; };
ulong total(ulong at, UHMM) {
    ulong total = 0;
    while (at != 0) {
        __global const struct node *node = uhmm_ptr(at);
        total += node->value;
        at = node->next;
    }
    return total;
}
__kernel void follow(__global ulong *sum, ulong head, UHMM) { sum[0] = total(head, uhmm_memory, uhmm_ranges); }
__kernel void bare(__global ulong *sum, __global const ulong *words, ulong count) {
    for (ulong i = 0; i < count; i++) sum[0] += words[i];
}";

fn kernel(name: &'static str, local: usize) -> Foreign {
    Foreign(OpenCl { source: SOURCE.into(), name: name.into(), local: [local, 1, 1], options: "".into() })
}

/// Checks of a device's memory, of which this one has none.
const MEMORY: &[&str] = &["too_much_at_once_is_refused", "memory_of_the_devices_own", "a_full_device_makes_room"];

/// It does what every device must, but for what is about data that stays on one.
fn conforms() {
    let name = Box::leak(device().expect("such a device").into_boxed_str());
    let dev = CoreRef::get().unwrap().device(DeviceConfig::new(name), uhmm_opencl::open).unwrap();
    let kernels = ["copy", "add_one", "sum", "fill_part", "follow_list", "reach"].map(crate::opencl::foreign);
    let forms = |named| crate::opencl::form(&kernels, named);
    assert_eq!(
        failed(&mut Subject::new(&dev).with_forms(&forms), |name| STAYS.contains(&name) || MEMORY.contains(&name)),
        Vec::<&str>::new()
    );
}

fn opened() -> (Uhmm, Device) {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.opencl(&device().expect("such a device")).open().unwrap();
    assert_eq!(dev.memory(), 0);
    (hmm, dev)
}

/// Whether the kernel has a userfaultfd for the mapping at this address: `um` and `uw` of its flags (proc_pid_smaps(5)).
fn is_watched(at: usize) -> bool {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in text.lines() {
        if let Some((from, to)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
            let number = |digits| usize::from_str_radix(digits, 16).unwrap();
            inside = (number(from)..number(to)).contains(&at);
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return flags.split(' ').any(|flag| ["um", "uw", "ui"].contains(&flag));
        }
    }
    panic!("nothing is mapped at {at:#x}");
}

fn nothing_has_moved(dev: &Device, launches: u64) {
    let stats = dev.stats();
    let kernel_nanos = stats.kernel_nanos;
    assert_eq!(stats, Stats { launches, kernel_nanos, ..Stats::default() });
}

/// At any alignment, in memory of any kind: the kernel uses the program's own pages, which nobody watches.
fn pointers_pass_through_untouched() {
    let (_hmm, dev) = opened();
    let a: Vec<u32> = (0..1_000_013).collect();
    let mut memory = Pages::new(4 << 20);
    let r = memory.slice::<u32>();
    for round in 1..=3u32 {
        for at in [0usize, 1, 13] {
            dev.run(&kernel("axpy", 64), 10_000, args![inout(&mut r[at..at + 639_990]), inp(&a[13 - at..]), 2u32]).unwrap();
        }
        let sum = |i: usize| {
            [0usize, 1, 13].iter().filter(|&&at| (at..at + 639_990).contains(&i)).map(|at| 2 * (i - at + 13 - at) as u32).sum::<u32>()
        };
        assert!(r.iter().enumerate().all(|(i, &x)| x == round * sum(i)), "round {round}");
    }
    nothing_has_moved(&dev, 9);
    assert!(!is_watched(r.as_ptr() as usize) && !is_watched(a.as_ptr() as usize));
    let mut on_the_stack = [1u32; 100];
    dev.run(&kernel("axpy", 64), 2, args![inout(&mut on_the_stack), inp(&a[..128]), 1u32]).unwrap();
    assert!(on_the_stack.iter().enumerate().all(|(i, &x)| x == 1 + i as u32));
}

/// Of which nothing is declared.
fn stored_and_bare_pointers_are_followed() {
    let (_hmm, dev) = opened();
    let mut nodes: Vec<Box<[u64; 2]>> = (0..10_000).map(|i| Box::new([0, i])).collect();
    for i in 0..nodes.len() - 1 {
        nodes[i][0] = &raw const *nodes[i + 1] as u64;
    }
    let mut sum = [0u64];
    let wanted = 9_999 * 10_000 / 2;
    dev.run(&kernel("follow", 1), 1, args![out(&mut sum), &raw const *nodes[0] as u64]).unwrap();
    assert_eq!(sum[0], wanted);
    // SAFETY: the list outlives the launch, and nobody changes it.
    dev.run(&kernel("follow", 1), 1, args![out(&mut sum), unsafe { ptr(&*nodes[0]) }]).unwrap();
    assert_eq!(sum[0], wanted);
    let words: Vec<u64> = (0..100_000).collect();
    sum = [0];
    // SAFETY: as above.
    dev.run(&kernel("bare", 1), 1, args![inout(&mut sum), unsafe { ptr(words.as_ptr()) }, words.len() as u64]).unwrap();
    assert_eq!(sum[0], 99_999 * 100_000 / 2);
    nothing_has_moved(&dev, 3);
}

fn it_can_be_driven_with_copies_all_the_same() {
    let hmm = Uhmm::new().unwrap();
    let dev = hmm.opencl(&device().expect("such a device")).copies(true).memory(32 << 20).open().unwrap();
    assert_eq!(dev.memory(), 32 << 20);
    let a: Vec<u32> = (0..1 << 20).collect();
    let mut r = vec![1u32; 1 << 20];
    dev.run(&kernel("axpy", 64), (1 << 20) / 64, args![inout(&mut r), inp(&a), 3u32]).unwrap();
    assert!(r.iter().enumerate().all(|(i, &x)| x == 1 + 3 * i as u32));
    assert!(dev.stats().bytes_to_device >= 8 << 20);
}

fn what_another_device_has_comes_when_it_is_touched() {
    let (hmm, dev) = opened();
    let soft = hmm.soft("soft").memory(32 << 20).open().unwrap();
    let a: Vec<u32> = (0..1 << 20).collect();
    let mut r = vec![1u32; 1 << 20];
    for round in 1..=3u32 {
        soft.run(&increment, groups(r.len()), args![inout(&mut r)]).unwrap();
        dev.run(&kernel("axpy", 64), (1 << 20) / 64, args![inout(&mut r), inp(&a), 3u32]).unwrap();
        assert!(r.iter().enumerate().all(|(i, &x)| x == 1 + round + 3 * round * i as u32), "round {round}");
    }
    nothing_has_moved(&dev, 3);
}

fn a_lease_is_the_memory_itself() {
    let (_hmm, dev) = opened();
    let mut data = vec![7u32; 100_000];
    let at = data.as_ptr() as usize;
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    assert_eq!((lease.addr(0), lease.opencl(0)), (at, None), "a kernel of one's own gets the pointer");
    assert!(dev.opencl_handles().is_some());
    drop(lease);
    assert!(data.iter().all(|&x| x == 7));
}
