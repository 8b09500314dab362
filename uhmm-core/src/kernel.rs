//! What runs on a device: [`Kernel`], [`Ctx`], [`Grid`]. Its arguments are made in [`mod@crate::args`].
//!
//! A kernel is an ordinary Rust function that is called once for each *group* of a grid, by several threads at once. It names its
//! arguments by position. Rules:
//! * a written argument is handed out once per group, and only in parts that no other group can be given;
//! * addresses in [`Ctx`] are the device's; a pointer that was stored in memory is followed through [`Ctx::ptr`].
//!
//! Who uses it: programs write kernels (a closure over [`Ctx`] is one). A driver is handed an [`Entry`] and the arguments as its device sees them, [`Bound`],
//! and calls the entry once for each group.
//!
//! ```
//! use uhmm_core::args;
//! use uhmm_core::args::{inp, out};
//! use uhmm_core::kernel::{Bound, Ctx, Entry, Grid};
//!
//! let double = |ctx: &Ctx<'_>| ctx.out::<u32>(0).chunk(1)[0] = 2 * ctx.inp::<u32>(1)[ctx.group()];
//!
//! let (a, mut r) = ([1u32, 2, 3], [0u32; 3]);
//! let args = args![out(&mut r), inp(&a)];
//! let bound = Bound::new(args.raw(), Grid::from(3), 0); // this device sees the process's addresses as they are
//! let entry = Entry::new(&double);
//! for group in 0..3 {
//!     // SAFETY: the arguments are borrowed, each group runs once, and none uses local memory.
//!     let ctx = unsafe { Ctx::new(&bound, group, core::ptr::null_mut(), 0) };
//!     // SAFETY: the kernel is alive.
//!     unsafe { entry.call(&ctx) }.expect("it does not panic");
//! }
//! assert_eq!(r, [2, 4, 6]);
//! ```
#![allow(unsafe_code)] // the slices a kernel sees are made here, from addresses that the launch has checked

mod out;

use crate::args::{Access, MAX_ARGS, RawArg};
use crate::reach::{Reached, Shared};
use crate::sync::AtomicUsize;
use bytemuck::Pod;
use core::any::TypeId;
use core::cell::Cell;
pub use out::{Atomic, Out};
use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The bytes of scratch memory ([`Ctx::local`]) that each group has.
pub const LOCAL_BYTES: usize = 4 << 20;

/// A function that a device runs, once for each group of the grid.
///
/// It is implemented for every `Fn(&Ctx<'_>) + Sync`. A kernel that panics fails its launch with the panic's message; the program
/// and later launches go on.
pub trait Kernel: Sync {
    /// Runs one group.
    fn run(&self, ctx: &Ctx<'_>);

    /// The same kernel in OpenCL C, if there is one: see [`Forms`].
    fn opencl_form(&self) -> Option<&OpenCl> {
        None
    }
}

/// A kernel as a function of an OpenCL C program.
///
/// Its parameters are the launch's arguments, in their order: a pointer to global memory for each range, `const` where the launch declares it with `inp`, and a value for each value.
/// Local memory is declared in the kernel itself, not as a parameter.
#[derive(Clone, Debug)]
pub struct OpenCl {
    /// The program.
    pub source: Cow<'static, str>,
    /// The kernel's name in it.
    pub name: Cow<'static, str>,
    /// Work items of one work group, along x, y and z. A group of the grid is a work group.
    pub local: [usize; 3],
    /// Options for the compiler, as clBuildProgram takes them.
    pub options: Cow<'static, str>,
}

/// One kernel in several forms: a device runs the one that it can.
///
/// ```
/// use uhmm_core::kernel::{Ctx, Forms, Kernel};
///
/// let double = Forms::new(|ctx: &Ctx<'_>| {
///     let part = ctx.out::<f32>(0).chunk(64);
///     part.iter_mut().for_each(|x| *x *= 2.0);
/// })
/// .opencl("__kernel void twice(__global float *data) { data[get_global_id(0)] *= 2; }", "twice", 64);
/// assert_eq!(double.opencl_form().unwrap().local, [64, 1, 1]);
/// ```
#[derive(Clone, Debug)]
pub struct Forms<K> {
    rust: K,
    opencl: Option<OpenCl>,
}

impl<K: Kernel> Forms<K> {
    /// A kernel with a form in Rust.
    pub fn new(rust: K) -> Self {
        Forms { rust, opencl: None }
    }

    /// Adds its form in OpenCL C: the program, the kernel's name in it, and the work items of a group.
    pub fn opencl(mut self, source: impl Into<Cow<'static, str>>, name: impl Into<Cow<'static, str>>, local: impl Into<Grid>) -> Self {
        let local = local.into().size;
        self.opencl = Some(OpenCl { source: source.into(), name: name.into(), local, options: Cow::Borrowed("") });
        self
    }

    /// Sets the options for the OpenCL compiler, as clBuildProgram takes them. Without a form in OpenCL C it does nothing.
    pub fn opencl_options(mut self, options: impl Into<Cow<'static, str>>) -> Self {
        if let Some(opencl) = &mut self.opencl {
            opencl.options = options.into();
        }
        self
    }
}

impl<K: Kernel> Kernel for Forms<K> {
    fn run(&self, ctx: &Ctx<'_>) {
        self.rust.run(ctx)
    }

    fn opencl_form(&self) -> Option<&OpenCl> {
        self.opencl.as_ref()
    }
}

impl<F: Fn(&Ctx<'_>) + Sync> Kernel for F {
    fn run(&self, ctx: &Ctx<'_>) {
        self(ctx)
    }
}

/// The groups of a launch: how many there are along x, y and z.
///
/// ```
/// use uhmm_core::kernel::Grid;
///
/// assert_eq!(Grid::from([64, 16]).groups(), Some(1024));
/// assert_eq!(Grid::from([usize::MAX, 2]).groups(), None); // more than can be counted: a launch refuses it
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Groups along x, y and z.
    pub size: [usize; 3],
}

impl Grid {
    /// All groups, or `None` if the product overflows.
    pub fn groups(self) -> Option<usize> {
        self.size[0].checked_mul(self.size[1])?.checked_mul(self.size[2])
    }
}

impl From<usize> for Grid {
    fn from(groups: usize) -> Self {
        Grid { size: [groups, 1, 1] }
    }
}

impl From<[usize; 2]> for Grid {
    fn from([x, y]: [usize; 2]) -> Self {
        Grid { size: [x, y, 1] }
    }
}

impl From<[usize; 3]> for Grid {
    fn from(size: [usize; 3]) -> Self {
        Grid { size }
    }
}

/// The arguments of one launch as its device sees them, shared by all of its groups.
#[derive(Debug)]
pub struct Bound {
    args: [RawArg; MAX_ARGS],
    count: usize,
    grid: Grid,
    mask: usize,
    /// For each written argument the part length that the first group asked for; 0 until then.
    parts: [AtomicUsize; MAX_ARGS],
    /// What it reaches besides, and where that was gathered.
    reaches: Shared,
    gathered: usize,
}

impl Bound {
    /// Binds arguments for a device that sees the process's address `v` at `v ^ mask`.
    pub fn new(args: &[RawArg], grid: Grid, mask: usize) -> Self {
        let mut all = [RawArg::NONE; MAX_ARGS];
        for (slot, arg) in all.iter_mut().zip(args) {
            *slot = *arg;
            match slot {
                RawArg::Slice { start, device: None, .. } => *start ^= mask,
                RawArg::Pointer { address, start, .. } => (*address, *start) = (*address ^ mask, *start ^ mask),
                _ => {}
            }
        }
        let parts = [const { AtomicUsize::new(0) }; MAX_ARGS];
        Bound { args: all, count: args.len(), grid, mask, parts, reaches: Shared::NONE, gathered: 0 }
    }

    /// With a list of what else is reached, which the device has from address `gathered` on.
    pub(crate) fn with_reaches(self, reaches: Shared, gathered: usize) -> Self {
        Bound { reaches, gathered, ..self }
    }

    /// What the launch reaches besides its arguments and the device has copies of, in order: for a driver whose kernels look pointers up by themselves.
    pub fn reached(&self) -> impl ExactSizeIterator<Item = Reached> + '_ {
        self.reaches.spots().iter().map(|spot| Reached { start: spot.start, end: spot.end, at: self.gathered + spot.offset })
    }

    /// Where the device has what the process has at `p`.
    fn find(&self, p: usize) -> usize {
        self.reaches.find(p).map_or(p ^ self.mask, |spot| self.gathered + spot.offset + (p - spot.start))
    }

    /// The grid of the launch.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// The arguments, in their order; addresses are the device's.
    pub fn args(&self) -> &[RawArg] {
        &self.args[..self.count]
    }
}

/// What one group of a launch knows: its place in the grid and its arguments.
#[derive(Debug)]
pub struct Ctx<'a> {
    bound: &'a Bound,
    group: usize,
    taken: Cell<u32>,
    local: (*mut u8, usize),
    local_used: Cell<usize>,
}

impl<'a> Ctx<'a> {
    /// The context of group number `group`.
    ///
    /// # Safety
    /// The ranges in `bound` must be valid at the addresses it holds while the context lives, written ranges reached by nobody but
    /// the groups of this launch, each group number used once; `local` must be `len` initialised bytes, aligned to 64, that nobody else uses.
    pub unsafe fn new(bound: &'a Bound, group: usize, local: *mut u8, len: usize) -> Self {
        Ctx { bound, group, taken: Cell::new(0), local: (local, len), local_used: Cell::new(0) }
    }

    /// The number of this group, from 0 to [`groups`](Self::groups) - 1.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The number of groups.
    pub fn groups(&self) -> usize {
        self.bound.grid.groups().unwrap_or(0)
    }

    /// The place of this group along x, y and z.
    pub fn group3(&self) -> [usize; 3] {
        let [x, y, _] = self.bound.grid.size;
        [self.group % x, self.group / x % y, self.group / (x * y)]
    }

    /// The grid.
    pub fn grid(&self) -> Grid {
        self.bound.grid
    }

    fn slice(&self, index: usize, want: TypeId, want_name: &str) -> (usize, usize, Access) {
        match self.bound.args[..self.bound.count].get(index) {
            Some(&RawArg::Slice { start, count, ty, name, access, .. }) => {
                assert!(ty == want, "argument {index} holds {name}, the kernel asked for {want_name}");
                (start, count, access)
            }
            Some(other) => panic!("argument {index} is no slice but {other:?}"),
            None => panic!("there is no argument {index}: the launch has {}", self.bound.count),
        }
    }

    /// Argument `index`, which was given as [`inp`](crate::args::inp).
    ///
    /// # Panics
    /// If there is no such argument, or it is of another type or kind. The launch then fails with that message.
    pub fn inp<T: Pod>(&self, index: usize) -> &'a [T] {
        let (start, count, access) = self.slice(index, TypeId::of::<T>(), core::any::type_name::<T>());
        assert!(access == Access::In, "argument {index} is written by this launch: use out({index})");
        if count == 0 {
            return &[];
        }
        // SAFETY: by the contract of `new` the range is valid and, being declared as read, not written while the launch runs.
        unsafe { core::slice::from_raw_parts(start as *const T, count) }
    }

    /// Argument `index`, which was given as [`out`](crate::args::out) or [`inout`](crate::args::inout). Each group may take it once.
    ///
    /// # Panics
    /// If there is no such argument, it is of another type or kind, or this group has taken it before.
    pub fn out<T: Pod>(&self, index: usize) -> Out<'a, T> {
        let (start, count, access) = self.slice(index, TypeId::of::<T>(), core::any::type_name::<T>());
        assert!(access.writes(), "argument {index} is only read by this launch: use inp({index})");
        let bit = 1 << index;
        assert!(self.taken.get() & bit == 0, "group {} has taken argument {index} before", self.group);
        self.taken.set(self.taken.get() | bit);
        Out::new(start as *mut T, count, self.group, &self.bound.parts[index])
    }

    /// Argument `index`, which was given as a value.
    ///
    /// # Panics
    /// If there is no such argument, or it is of another type or kind.
    pub fn value<T: Pod>(&self, index: usize) -> T {
        match &self.bound.args[..self.bound.count].get(index) {
            Some(RawArg::Value { bytes, size, ty, name }) => {
                let want = core::any::type_name::<T>();
                assert!(*ty == TypeId::of::<T>(), "argument {index} is a {name}, the kernel asked for {want}");
                bytemuck::pod_read_unaligned(&bytes[..*size])
            }
            Some(other) => panic!("argument {index} is no value but {other:?}"),
            None => panic!("there is no argument {index}: the launch has {}", self.bound.count),
        }
    }

    /// Argument `index`, which was given as [`ptr`](crate::args::ptr), as an address of the device.
    ///
    /// # Panics
    /// If there is no such argument, or it is of another kind.
    pub fn pointer<T>(&self, index: usize) -> *mut T {
        match self.bound.args[..self.bound.count].get(index) {
            Some(&RawArg::Pointer { address, .. }) => address as *mut T,
            Some(other) => panic!("argument {index} is no bare pointer but {other:?}"),
            None => panic!("there is no argument {index}: the launch has {}", self.bound.count),
        }
    }

    /// Where the device sees what the process has at `p`: how a kernel follows a pointer that it read from memory.
    pub fn ptr<T>(&self, p: *const T) -> *const T {
        self.bound.find(p as usize) as *const T
    }

    /// Like [`ptr`](crate::args::ptr)(Self::ptr), for writing.
    pub fn ptr_mut<T>(&self, p: *mut T) -> *mut T {
        self.bound.find(p as usize) as *mut T
    }

    /// Scratch memory of this group: `count` elements with unspecified contents, aligned to 64 bytes, from [`LOCAL_BYTES`] in all.
    ///
    /// # Panics
    /// If the group has less than that left.
    #[allow(clippy::mut_from_ref)] // each call hands out other bytes
    pub fn local<T: Pod>(&self, count: usize) -> &mut [T] {
        let from = self.local_used.get();
        let end = count.checked_mul(size_of::<T>()).and_then(|bytes| from.checked_add(bytes)).filter(|&end| end <= self.local.1);
        let Some(end) = end else {
            panic!(
                "{count} elements of {} bytes do not fit the {} bytes of scratch memory that are left",
                size_of::<T>(),
                self.local.1 - from
            )
        };
        assert!(align_of::<T>() <= 64, "scratch memory is aligned to 64 bytes");
        self.local_used.set(end.next_multiple_of(64).min(self.local.1));
        // SAFETY: `from..end` lies in the group's own scratch memory and was handed to nobody else, because `local_used` only grows;
        // it is aligned (64 divides `from`), initialised by the contract of `new`, and T is plain data.
        unsafe { core::slice::from_raw_parts_mut(self.local.0.add(from).cast(), count) }
    }
}

/// The most bytes of a panic message that are kept.
pub const MESSAGE_BYTES: usize = 200;

/// A short text without an allocation.
#[derive(Clone, Copy)]
pub struct Message {
    bytes: [u8; MESSAGE_BYTES],
    len: usize,
}

impl Message {
    /// The text, cut at [`MESSAGE_BYTES`].
    pub fn new(text: &str) -> Self {
        let mut len = text.len().min(MESSAGE_BYTES);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        Message { bytes, len }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

impl core::fmt::Debug for Message {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.as_str().fmt(f)
    }
}

/// A kernel without its type: what a launch carries.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    call: unsafe fn(*const (), &Ctx<'_>) -> Result<(), Message>,
    data: *const (),
    opencl: Option<core::ptr::NonNull<OpenCl>>,
}

// SAFETY: `data` is a `&K` with `K: Sync`, and `opencl` a part of it, kept alive by the contract of `Entry::call`.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

impl Entry {
    /// The entry of `kernel`.
    pub fn new<K: Kernel>(kernel: &K) -> Self {
        /// # Safety
        /// `data` is a `&K` that is alive.
        unsafe fn call<K: Kernel>(data: *const (), ctx: &Ctx<'_>) -> Result<(), Message> {
            // SAFETY: by the contract.
            let kernel = unsafe { &*data.cast::<K>() };
            catch_unwind(AssertUnwindSafe(|| kernel.run(ctx))).map_err(|payload| {
                let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(|s| s.as_str()));
                let message = Message::new(text.unwrap_or("a panic without a message"));
                drop(payload);
                message
            })
        }
        Entry { call: call::<K>, data: core::ptr::from_ref(kernel).cast(), opencl: kernel.opencl_form().map(core::ptr::NonNull::from) }
    }

    /// The kernel's form in OpenCL C, if it has one.
    ///
    /// # Safety
    /// The kernel that the entry was made of must be alive for as long as this is used.
    pub unsafe fn opencl<'a>(&self) -> Option<&'a OpenCl> {
        // SAFETY: it was a reference into the kernel, which is alive by the contract.
        self.opencl.map(|form| unsafe { form.as_ref() })
    }

    /// Runs one group; a panic comes back as its message.
    ///
    /// # Safety
    /// The kernel that the entry was made of must still be alive.
    pub unsafe fn call(&self, ctx: &Ctx<'_>) -> Result<(), Message> {
        // SAFETY: by the contract.
        unsafe { (self.call)(self.data, ctx) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args;
    use crate::args::{Args, inp, out, val};

    fn with_ctx<R>(args: Args<'_>, groups: usize, group: usize, f: impl FnOnce(&Ctx<'_>) -> R) -> R {
        let bound = Bound::new(args.raw(), groups.into(), 0);
        let mut local = vec![0u128; 8];
        // SAFETY: the arguments outlive the call and mask 0 leaves their addresses alone; the scratch memory is ours.
        let ctx = unsafe { Ctx::new(&bound, group, local.as_mut_ptr().cast(), 128) };
        f(&ctx)
    }

    #[test]
    fn parts_are_disjoint_and_cut_at_the_end() {
        let mut r = [0u32; 10];
        let base = r.as_ptr() as usize;
        let mut seen = vec![];
        for group in 0..4 {
            let (at, len) = with_ctx(args![out(&mut r)], 4, group, |ctx| {
                let part = ctx.out::<u32>(0).chunk(3);
                ((part.as_ptr() as usize - base) / 4, part.len())
            });
            seen.push((at, len));
        }
        assert_eq!(seen, [(0, 3), (3, 3), (6, 3), (9, 1)]);
    }

    #[test]
    #[should_panic(expected = "taken argument 0 before")]
    fn a_group_cannot_hold_its_part_twice() {
        let mut r = [0u32; 10];
        with_ctx(args![out(&mut r)], 1, 0, |ctx| {
            let _first = ctx.out::<u32>(0).chunk(3);
            let _second = ctx.out::<u32>(0).chunk(3);
        });
    }

    #[test]
    #[should_panic(expected = "holds f32, the kernel asked for u32")]
    fn types_are_checked() {
        with_ctx(args![inp(&[1f32])], 1, 0, |ctx| ctx.inp::<u32>(0).len());
    }

    #[test]
    fn values_and_scratch_memory() {
        with_ctx(args![7u32, val([1u8, 2, 3]), 2.5f64], 1, 0, |ctx| {
            assert_eq!((ctx.value::<u32>(0), ctx.value::<[u8; 3]>(1), ctx.value::<f64>(2)), (7, [1, 2, 3], 2.5));
            let a = ctx.local::<u8>(3);
            let b = ctx.local::<u8>(64);
            a.fill(1);
            b.fill(2);
            assert_eq!(a, [1, 1, 1]);
        });
    }

    #[test]
    fn a_panic_is_a_message() {
        let kernel = |_: &Ctx<'_>| panic!("number {}", 7);
        let entry = Entry::new(&kernel);
        // SAFETY: `kernel` is alive.
        let message = with_ctx(args![], 1, 0, |ctx| unsafe { entry.call(ctx) }).unwrap_err();
        assert_eq!(message.as_str(), "number 7");
    }
}
