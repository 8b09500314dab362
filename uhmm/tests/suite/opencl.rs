//! Devices with OpenCL. Where there is none these tests say so, and are left out; UHMM_OPENCL=required makes that a failure.

use crate::conformance::failed;
use uhmm::{Ctx, Error, Forms, KernelFault, OpenCl, Uhmm, args, inout, inp, out};
use uhmm_core::conformance::{Named, Subject};
use uhmm_core::kernel::{Entry, Kernel};
use uhmm_core::mode::Mode;
use uhmm_core::{CoreRef, DeviceConfig};

crate::tests![conforms];

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
}";

/// A kernel that has no form in Rust.
struct Foreign(OpenCl);

impl Kernel for Foreign {
    fn run(&self, _: &Ctx<'_>) {
        panic!("it is written in OpenCL C only");
    }

    fn opencl(&self) -> Option<&OpenCl> {
        Some(&self.0)
    }
}

fn foreign(name: &'static str) -> Foreign {
    Foreign(OpenCl { source: CHECKED.into(), name: name.into(), local: [1; 3], options: "".into() })
}

fn conforms() {
    let dev = CoreRef::get().unwrap().device(DeviceConfig { memory: 16 << 20, ..DeviceConfig::new("opencl") }, uhmm_opencl::open).unwrap();
    let kernels = ["copy", "add_one", "sum", "fill_part", "follow_list"].map(foreign);
    let forms = |named| {
        let at = match named {
            Named::Copy => 0,
            Named::AddOne => 1,
            Named::Sum => 2,
            Named::FillPart => 3,
            Named::FollowList => 4,
            Named::Reach | Named::Fail => return None,
        };
        Some(Entry::new(&kernels[at]))
    };
    let mut subject = Subject::new(&dev).with_forms(&forms);
    let lesser = CoreRef::get().unwrap().mode() != Mode::Full;
    assert_eq!(failed(&mut subject, |name| lesser && crate::conformance::STAYS.contains(&name)), Vec::<&str>::new());
}
