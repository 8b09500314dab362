//! The kernels of the checks, and their Rust forms.

#[allow(unused_imports)] // for the documentation
use crate::args::{inout, inp, out, ptr};
use crate::kernel::{Ctx, Entry};

/// The kernels, with their arguments. Numbers are `u64` values. Group `g` works on its own *part*: bytes `g * part` up to `(g + 1) * part`,
/// cut at the end of the argument (and so perhaps none).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Named {
    /// `[out u8, inp u8, part]`: copies the part. Both are of one length.
    Copy,
    /// `[inout u8, part]`: adds 1 to each byte of the part, 255 becoming 0.
    AddOne,
    /// `[out u64, inp u8, part]`: element `g` becomes the sum of part `g` of the bytes.
    Sum,
    /// `[out u8, part, from, len, value]`: of the part, writes `value` to bytes `from` up to `from + len` (cut at its end), and touches no other.
    FillPart,
    /// `[out u64, head]`, and perhaps more arguments, which only declare memory: follows a list of [`Node`]s from process address `head` to address 0, and
    /// writes the wrapping sum of their values to element 0. One group.
    FollowList,
    /// `[out u64, ptr]`: writes the byte at the bare pointer to element 0, and adds 1 to that byte. One group. Only for devices with
    /// replayable faults.
    Reach,
    /// `[out or inout u8, part, group]`: writes 238 to the first byte of the part, then group `group` fails, however kernels of the device do that.
    Fail,
}

/// An element of the list of [`Named::FollowList`].
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Node {
    /// The process address of the next node, 0 at the end.
    pub next: u64,
    /// What is added up.
    pub value: u64,
}

/// What [`Named::Fail`] writes.
pub(super) const FAILED: u8 = 238;

/// The kernel as a Rust function.
pub fn rust_form(kernel: Named) -> Entry {
    match kernel {
        Named::Copy => Entry::new(&copy),
        Named::AddOne => Entry::new(&add_one),
        Named::Sum => Entry::new(&sum),
        Named::FillPart => Entry::new(&fill_part),
        Named::FollowList => Entry::new(&follow_list),
        Named::Reach => Entry::new(&reach),
        Named::Fail => Entry::new(&fail),
    }
}

fn number(ctx: &Ctx<'_>, index: usize) -> usize {
    ctx.value::<u64>(index) as usize
}

fn copy(ctx: &Ctx<'_>) {
    let part = number(ctx, 2);
    let from = &ctx.inp::<u8>(1)[(ctx.group() * part).min(ctx.inp::<u8>(1).len())..];
    for (to, from) in ctx.out::<u8>(0).chunk(part).iter_mut().zip(from) {
        *to = *from;
    }
}

fn add_one(ctx: &Ctx<'_>) {
    ctx.out::<u8>(0).chunk(number(ctx, 1)).iter_mut().for_each(|x| *x = x.wrapping_add(1));
}

fn sum(ctx: &Ctx<'_>) {
    let part = ctx.inp::<u8>(1).chunks(number(ctx, 2)).nth(ctx.group()).unwrap_or(&[]);
    let sum = part.iter().map(|&x| u64::from(x)).sum();
    ctx.out::<u64>(0).chunk(1).fill(sum);
}

fn fill_part(ctx: &Ctx<'_>) {
    let (from, len) = (number(ctx, 2), number(ctx, 3));
    let part = ctx.out::<u8>(0).chunk(number(ctx, 1));
    part.iter_mut().skip(from).take(len).for_each(|x| *x = number(ctx, 4) as u8);
}

#[allow(unsafe_code)]
fn follow_list(ctx: &Ctx<'_>) {
    let mut at = number(ctx, 1) as *const Node;
    let mut sum = 0u64;
    while !at.is_null() {
        // SAFETY: the launch that names the list promises that its nodes are valid at their addresses; the device sees them where `ptr` says.
        let node = unsafe { ctx.ptr(at).read_volatile() };
        sum = sum.wrapping_add(node.value);
        at = node.next as *const Node;
    }
    ctx.out::<u64>(0).chunk(1).fill(sum);
}

#[allow(unsafe_code)]
fn reach(ctx: &Ctx<'_>) {
    let at = ctx.pointer::<u8>(1);
    // SAFETY: the launch that names the byte promises that it is valid, and nobody else's while the launch runs.
    let byte = unsafe {
        let byte = at.read_volatile();
        at.write_volatile(byte.wrapping_add(1));
        byte
    };
    ctx.out::<u64>(0).chunk(1).fill(u64::from(byte));
}

fn fail(ctx: &Ctx<'_>) {
    if let Some(first) = ctx.out::<u8>(0).chunk(number(ctx, 1)).first_mut() {
        *first = FAILED;
    }
    assert!(ctx.group() != number(ctx, 2), "told to fail in group {}", ctx.group());
}
