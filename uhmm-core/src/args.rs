//! The arguments of a launch: `args![out(&mut r), inp(&a), inp(&b), m]`.
//!
//! An argument borrows what it names for as long as the launch runs, and travels as plain numbers ([`RawArg`]), so that it can be copied into memory that
//! never migrates. Safe arguments are bounded by plain data ([`Pod`]): any bytes that another program could have left there are a valid value.
//!
//! Who uses it: programs, by way of the crate `uhmm`; runtimes that launch kernels of their own, which make an [`Arg`] from a [`RawArg`]; drivers, which read them.
//!
//! ```
//! use uhmm_core::args;
//! use uhmm_core::args::{Access, RawArg, inout, inp, val};
//!
//! let (a, mut r) = ([1.0f32; 8], [0.0f32; 8]);
//! let args = args![inp(&a), inout(&mut r), 0.5f32, val([1u32, 2, 3])];
//! assert_eq!(args.raw().len(), 4);
//! assert!(matches!(args.raw()[0], RawArg::Slice { count: 8, size: 4, access: Access::In, device: None, .. }));
//! assert!(matches!(args.raw()[3], RawArg::Value { size: 12, .. }));
//! ```

#![allow(unsafe_code)] // two functions whose callers promise what safe ones borrow

use crate::reach::Reach;
use bytemuck::Pod;
use core::any::TypeId;
use core::marker::PhantomData;

/// The most arguments that one launch takes.
pub const MAX_ARGS: usize = 16;

/// How a launch uses an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read: the CPU keeps its copy.
    In,
    /// Only written: what the kernel leaves unwritten reads as before or as zero.
    Out,
    /// Read and written.
    InOut,
}

impl Access {
    /// Whether the kernel may write.
    pub fn writes(self) -> bool {
        self != Access::In
    }
}

/// One argument as the launch carries it: plain numbers, so that it can be copied into memory that never migrates.
#[derive(Clone, Copy, Debug)]
pub enum RawArg {
    /// A range of the process's memory, or of device memory that the program allocated itself.
    Slice {
        /// First byte: a process address, or a device address if `device` is set.
        start: usize,
        /// Elements.
        count: usize,
        /// Bytes of one element.
        size: usize,
        /// The element type.
        ty: TypeId,
        /// Its name, for messages.
        name: &'static str,
        /// What the kernel does with it.
        access: Access,
        /// The number of the device whose memory this is, if it is not the process's.
        device: Option<u32>,
    },
    /// A value of at most 16 bytes.
    Value {
        /// The bytes, from the start.
        bytes: [u8; 16],
        /// How many count.
        size: usize,
        /// The type.
        ty: TypeId,
        /// Its name, for messages.
        name: &'static str,
    },
    /// A bare pointer of the process: nothing is declared, the device fetches what it touches. On a device that cannot, it stands for the allocation that holds it.
    Pointer {
        /// The process address.
        address: usize,
        /// Where that allocation begins.
        start: usize,
        /// Its bytes; 0 as long as it has not been looked for, which a launch does on a device that needs it.
        bytes: usize,
    },
}

impl RawArg {
    /// An argument that is none.
    pub(crate) const NONE: Self = RawArg::Pointer { address: 0, start: 0, bytes: 0 };

    /// A bare pointer.
    pub const fn pointer(address: usize) -> Self {
        RawArg::Pointer { address, start: address, bytes: 0 }
    }

    /// First byte and one past the last of a process range, if it is one.
    pub(crate) fn process_range(&self) -> Option<(usize, usize, Access)> {
        match *self {
            RawArg::Slice { start, count, size, access, device: None, .. } => Some((start, start + count * size, access)),
            RawArg::Pointer { start, bytes, .. } if bytes > 0 => Some((start, start + bytes, Access::InOut)),
            _ => None,
        }
    }

    /// Likewise, `None` also if its end is no address: of arguments that have not been checked.
    pub(crate) fn checked_range(&self) -> Option<(usize, usize, Access)> {
        match *self {
            RawArg::Slice { start, count, size, .. } => {
                count.checked_mul(size).and_then(|bytes| start.checked_add(bytes)).and(self.process_range())
            }
            _ => self.process_range(),
        }
    }
}

/// One argument of a launch; it borrows what it names for as long as the launch runs.
#[derive(Debug)]
pub struct Arg<'a> {
    raw: RawArg,
    lent: bool,
    borrow: PhantomData<&'a mut u8>,
}

impl Arg<'_> {
    /// An argument from its parts.
    ///
    /// ```
    /// use core::any::{TypeId, type_name};
    /// use uhmm_core::args::{Access, Arg, Args, RawArg};
    ///
    /// /// An argument of a runtime that knows addresses and no borrows.
    /// ///
    /// /// # Safety
    /// /// As [`Arg::from_raw`].
    /// unsafe fn floats(start: usize, count: usize) -> Arg<'static> {
    ///     let (size, ty, name) = (4, TypeId::of::<f32>(), type_name::<f32>());
    ///     let raw = RawArg::Slice { start, count, size, ty, name, access: Access::In, device: None };
    ///     // SAFETY: the caller's promise.
    ///     unsafe { Arg::from_raw(raw) }
    /// }
    ///
    /// static A: [f32; 4] = [1.0; 4];
    /// // SAFETY: it is a static, and nobody writes it.
    /// let args = Args::new([unsafe { floats(A.as_ptr() as usize, 4) }]);
    /// assert_eq!(args.raw().len(), 1);
    /// ```
    ///
    /// # Safety
    /// The range, if it is one, must hold `count` initialised values of the type that `ty` names, borrowed for the lifetime of the
    /// argument (exclusively if it is written).
    pub unsafe fn from_raw(raw: RawArg) -> Self {
        Arg { raw, lent: false, borrow: PhantomData }
    }

    /// The value at `place`, of any type: for those that no safe argument takes, such as nodes with pointers in them.
    ///
    /// ```
    /// use uhmm_core::args::{Access, Arg};
    /// use uhmm_core::{args, args::out};
    ///
    /// struct Node { next: *const Node, value: u64 }
    ///
    /// let tail = Node { next: core::ptr::null(), value: 2 };
    /// let head = Node { next: &tail, value: 1 };
    /// let mut sum = [0u64];
    /// // SAFETY: both live as long as the arguments, and nobody changes them.
    /// let nodes = [&head, &tail].map(|node| unsafe { Arg::at(node, Access::In) });
    /// let args = args![out(&mut sum), &raw const head as u64].reaching(nodes);
    /// # let _ = (args, head.next, head.value, tail.value);
    /// ```
    ///
    /// # Safety
    /// As [`from_raw`](Self::from_raw); what a kernel leaves there must be a value of the type.
    pub unsafe fn at<T: 'static>(place: *const T, access: Access) -> Self {
        let (size, ty, name) = (size_of::<T>(), TypeId::of::<T>(), core::any::type_name::<T>());
        // SAFETY: by the contract.
        unsafe { Self::from_raw(RawArg::Slice { start: place as usize, count: 1, size, ty, name, access, device: None }) }
    }

    /// As plain numbers.
    pub fn raw(&self) -> RawArg {
        self.raw
    }
}

fn slice<T: Pod>(start: *const T, count: usize, access: Access) -> RawArg {
    RawArg::Slice {
        start: start as usize,
        count,
        size: size_of::<T>(),
        ty: TypeId::of::<T>(),
        name: core::any::type_name::<T>(),
        access,
        device: None,
    }
}

/// An argument that the kernel only reads.
pub fn inp<T: Pod>(data: &[T]) -> Arg<'_> {
    Arg { lent: false, raw: slice(data.as_ptr(), data.len(), Access::In), borrow: PhantomData }
}

/// An argument that the kernel only writes: its old contents are not sent to the device.
pub fn out<T: Pod>(data: &mut [T]) -> Arg<'_> {
    Arg { lent: false, raw: slice(data.as_ptr(), data.len(), Access::Out), borrow: PhantomData }
}

/// An argument that the kernel reads and writes.
pub fn inout<T: Pod>(data: &mut [T]) -> Arg<'_> {
    Arg { lent: false, raw: slice(data.as_ptr(), data.len(), Access::InOut), borrow: PhantomData }
}

/// Memory that several launches of one [scope](crate::scope) use, one after the other: each waits for those before it that write what it uses, or use what it
/// writes. Made by [`Scope::lend`](crate::scope::Scope::lend).
#[derive(Debug)]
pub struct Lent<'a, T> {
    start: *mut T,
    count: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Lent<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Lent<'_, T> {}

impl<'a, T: Pod> Lent<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Lent { start: data.as_mut_ptr(), count: data.len(), borrow: PhantomData }
    }

    /// As an argument that the kernel only reads.
    pub fn inp(self) -> Arg<'a> {
        Arg { lent: true, raw: slice(self.start, self.count, Access::In), borrow: PhantomData }
    }

    /// As an argument that the kernel only writes.
    pub fn out(self) -> Arg<'a> {
        Arg { lent: true, raw: slice(self.start, self.count, Access::Out), borrow: PhantomData }
    }

    /// As an argument that the kernel reads and writes.
    pub fn inout(self) -> Arg<'a> {
        Arg { lent: true, raw: slice(self.start, self.count, Access::InOut), borrow: PhantomData }
    }
}

/// A bare pointer, of which nothing is declared: a device with replayable faults fetches what the kernel touches.
///
/// On any other device it stands for the whole allocation that holds it, as if that were declared with [`inout`]: it is resident while the kernel runs, and may be written. Which
/// one that is, is looked for when it is launched ([`uhmm_os::allocation`]):
/// * for a pointer that the C library's malloc has returned (as a `Box`, a `Vec`, and C++'s `new` have it) the block; a pointer into a block is refused as far as it can be recognised, for where that
///   begins cannot be told, unless it is so large that malloc has mapped it by itself (from 128 KiB on, at first);
/// * for memory of mmap the mapping, from anywhere in it. Mappings that lie side by side with the same rights are one to the kernel, and so here;
/// * on stacks and among statics there is none: [`Error::Allocation`](crate::Error::Allocation).
///
/// Other allocators' memory is mappings, each with many blocks: declare ranges of it instead.
///
/// # Safety
/// Whatever the kernel reaches through this pointer must be valid for the accesses it makes until the launch has ended, as if the
/// kernel were a function that this thread calls. On a device without replayable faults it must be one of those above, and nobody else may use, free or unmap any byte of the
/// allocation until then.
pub unsafe fn ptr<'a, T>(address: *const T) -> Arg<'a> {
    Arg { lent: false, raw: RawArg::pointer(address as usize), borrow: PhantomData }
}

/// A value of any plain type up to 16 bytes. Numbers need no wrapper in [`args!`](crate::args!).
///
/// # Panics
/// If the type is larger than 16 bytes: pass a slice of one element instead.
pub fn val<'a, T: Pod>(value: T) -> Arg<'a> {
    let size = size_of::<T>();
    assert!(size <= 16, "a value argument has at most 16 bytes, {} has {size}: pass inp(&[value])", core::any::type_name::<T>());
    let mut bytes = [0; 16];
    bytes[..size].copy_from_slice(bytemuck::bytes_of(&value));
    Arg { lent: false, raw: RawArg::Value { bytes, size, ty: TypeId::of::<T>(), name: core::any::type_name::<T>() }, borrow: PhantomData }
}

/// What [`args!`](crate::args!) accepts: an [`Arg`], or a number.
pub trait IntoArg<'a> {
    /// The argument.
    fn into_arg(self) -> Arg<'a>;
}

impl<'a> IntoArg<'a> for Arg<'a> {
    fn into_arg(self) -> Arg<'a> {
        self
    }
}

macro_rules! numbers {
    ($($t:ty)*) => { $(impl<'a> IntoArg<'a> for $t {
        fn into_arg(self) -> Arg<'a> { val(self) }
    })* };
}
numbers!(u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64);

/// The arguments of a launch, in order. Made by [`args!`](crate::args!).
#[derive(Debug)]
pub struct Args<'a> {
    raw: [RawArg; MAX_ARGS],
    count: usize,
    lent: bool,
    /// In order.
    reaches: Vec<Reach>,
    borrow: PhantomData<&'a mut u8>,
}

impl<'a> Args<'a> {
    /// Arguments from a list.
    ///
    /// # Panics
    /// If there are more than [`MAX_ARGS`].
    pub fn new<const N: usize>(list: [Arg<'a>; N]) -> Self {
        const { assert!(N <= MAX_ARGS, "a launch takes at most 16 arguments") };
        let mut raw = [RawArg::NONE; MAX_ARGS];
        let mut lent = false;
        for (slot, arg) in raw.iter_mut().zip(list) {
            *slot = arg.raw;
            lent |= arg.lent;
        }
        Args { raw, count: N, lent, reaches: vec![], borrow: PhantomData }
    }

    /// Declares what the kernel reaches by pointers that are stored in memory: any number of ranges, such as the nodes of a list, which are no arguments of their own.
    ///
    /// A kernel in Rust follows such a pointer with [`Ctx::ptr`](crate::kernel::Ctx::ptr), one in OpenCL C with `uhmm_ptr`. On a device with replayable faults that works without this, and
    /// costs nothing more. Any other device gets copies of the ranges when the kernel starts, byte for byte, and gives back those that are written (`inout`; `out` is the same here) when it
    /// has ended well: memory beside them, on the same pages, is left to whoever uses it. Overlapping and adjacent ranges of one kind are merged, so that a pointer to
    /// anywhere in them leads on. A range that lies in one of the arguments is that argument's.
    ///
    /// Each launch copies all of them, and so does each run under a lease: what is large is better an argument, which stays on the device.
    ///
    /// ```
    /// use uhmm_core::args;
    /// use uhmm_core::args::{inout, out};
    ///
    /// let mut nodes: Vec<Box<[u64; 3]>> = (0..100).map(|i| Box::new([i; 3])).collect();
    /// let head = nodes[0].as_ptr() as u64;
    /// let mut sum = [0u64];
    /// let args = args![out(&mut sum), head].reaching(nodes.iter_mut().map(|node| inout(&mut node[..])));
    /// assert_eq!(args.reaches().len(), 100);
    /// ```
    ///
    /// # Panics
    /// If one of them is a value, a bare pointer or memory of a device.
    pub fn reaching(mut self, ranges: impl IntoIterator<Item = Arg<'a>>) -> Self {
        let Args { lent, reaches, .. } = &mut self;
        reaches.extend(ranges.into_iter().map(|arg| {
            *lent |= arg.lent;
            Reach::of(&arg.raw)
        }));
        // Nodes that were allocated one after the other are nearly in order: a stable sort makes use of that, and is the slower one for any other.
        let breaks = reaches.windows(2).filter(|pair| pair[0].start() > pair[1].start()).count();
        if breaks > reaches.len() / 32 {
            reaches.sort_unstable_by_key(Reach::start);
        } else if breaks > 0 {
            reaches.sort_by_key(Reach::start);
        }
        self
    }

    /// What is reached besides the arguments, in order.
    pub fn reaches(&self) -> &[Reach] {
        &self.reaches
    }

    /// Whether [`Lent`] memory is among them, which launches of devices may be using at this moment.
    pub fn are_lent(&self) -> bool {
        self.lent
    }

    /// The arguments as plain numbers.
    pub fn raw(&self) -> &[RawArg] {
        &self.raw[..self.count]
    }
}

/// The arguments of a launch: `args![out(&mut r), inp(&a), inp(&b), m]`.
///
/// Slices are named by [`inp`], [`out`] or [`inout`]; numbers stand for themselves; other plain values go through [`val`].
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { $crate::args::Args::new([$($crate::args::IntoArg::into_arg($arg)),*]) };
}
