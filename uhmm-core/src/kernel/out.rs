//! A written argument in the hands of one group: [`Out`].
#![allow(unsafe_code)] // the slices are made here, from addresses that the launch has checked

use crate::sync::{AtomicUsize, Ordering};
use bytemuck::Pod;
use core::marker::PhantomData;

/// Stands for the length of a part where the argument is shared.
const SHARED: usize = usize::MAX;

/// Numbers that groups can share: see [`Out::atomic`].
///
/// ```
/// use core::sync::atomic::Ordering::Relaxed;
/// use uhmm_core::kernel::Ctx;
///
/// let count = |ctx: &Ctx<'_>| {
///     let even = ctx.inp::<u64>(1).iter().skip(ctx.group()).step_by(ctx.groups()).filter(|&x| x % 2 == 0).count();
///     ctx.out::<u32>(0).atomic()[0].fetch_add(even as u32, Relaxed); // argument 0 is given with inout
/// };
/// # let _ = |ctx: &Ctx<'_>| count(ctx);
/// ```
pub trait Atomic: Pod + private::Sealed {
    /// The same as an atomic.
    type Shared;
}

mod private {
    pub trait Sealed {}
}

macro_rules! atomics {
    ($($number:ty: $atomic:ident),*) => { $(
        impl private::Sealed for $number {}
        impl Atomic for $number {
            type Shared = core::sync::atomic::$atomic;
        }
        const _: () = assert!(size_of::<$number>() == size_of::<core::sync::atomic::$atomic>());
        const _: () = assert!(align_of::<$number>() == align_of::<core::sync::atomic::$atomic>());
    )* };
}

atomics!(u32: AtomicU32, u64: AtomicU64, i32: AtomicI32, i64: AtomicI64);

/// A written argument in the hands of one group.
#[derive(Debug)]
pub struct Out<'a, T> {
    start: *mut T,
    count: usize,
    group: usize,
    part: &'a AtomicUsize,
    data: PhantomData<&'a mut [T]>,
}

impl<'a, T: Pod> Out<'a, T> {
    /// The argument of `count` elements from `start`, for one group; all groups of the launch have one `part`.
    pub(super) fn new(start: *mut T, count: usize, group: usize, part: &'a AtomicUsize) -> Self {
        Out { start, count, group, part, data: PhantomData }
    }

    /// Elements of the whole argument.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The address of the first element on the device.
    pub fn as_ptr(&self) -> *const T {
        self.start
    }

    /// This group's own part: elements `group * len` up to `(group + 1) * len`, cut at the end of the argument (so possibly empty).
    ///
    /// # Panics
    /// If another group of the launch asked for another `len`, for the parts would overlap.
    pub fn chunk(self, len: usize) -> &'a mut [T] {
        assert!(len > 0, "a part has at least one element");
        let len = len.min(SHARED - 1); // as good as any that is longer than the argument
        if let Err(other) = self.part.compare_exchange(0, len, Ordering::Relaxed, Ordering::Relaxed) {
            assert!(other != SHARED, "another group shares this argument as atomics");
            assert!(other == len, "all groups must take parts of one length: {other} and {len}");
        }
        let from = self.group.saturating_mul(len).min(self.count);
        let to = from.saturating_add(len).min(self.count);
        if from == to {
            return &mut [];
        }
        // SAFETY: in bounds. No other group gets an element of it: group numbers differ and the length is one for all. This group
        // gets it once: `Ctx::out` hands the argument out once and `chunk` consumes it.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(from), to - from) }
    }

    /// The whole argument as atomics, which all groups share: for counters, queues, and whatever several groups may come to write.
    ///
    /// # Panics
    /// If another group of the launch took a part of it by [`chunk`](Self::chunk), for that is its alone.
    pub fn atomic(self) -> &'a [T::Shared]
    where
        T: Atomic,
    {
        if let Err(other) = self.part.compare_exchange(0, SHARED, Ordering::Relaxed, Ordering::Relaxed) {
            assert!(other == SHARED, "another group took a part of this argument, of {other} elements");
        }
        if self.count == 0 {
            return &[];
        }
        // SAFETY: in bounds and aligned, for it is a slice of T, which has the layout of its atomic (`Atomic` is sealed). While the launch runs the groups reach it only in this way: `chunk`
        // refuses what is shared, and this what has parts.
        unsafe { core::slice::from_raw_parts(self.start.cast::<T::Shared>().cast_const(), self.count) }
    }

    /// The whole argument as a raw pointer, for kernels that divide it in another way.
    pub fn into_raw(self) -> (*mut T, usize) {
        (self.start, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args;
    use crate::args::{Args, inout, out};
    use crate::kernel::{Bound, Ctx};

    /// Calls `f` for each group.
    fn each_group(groups: usize, args: Args<'_>, f: impl Fn(&Ctx<'_>)) {
        let bound = Bound::new(args.raw(), groups.into(), 0);
        for group in 0..groups {
            // SAFETY: the arguments outlive the call, mask 0 leaves their addresses alone, and there is no scratch memory.
            f(&unsafe { Ctx::new(&bound, group, core::ptr::null_mut(), 0) });
        }
    }

    #[test]
    #[should_panic(expected = "parts of one length: 3 and 4")]
    fn groups_cannot_take_parts_of_unequal_length() {
        each_group(2, args![out(&mut [0u32; 10])], |ctx| assert!(ctx.out::<u32>(0).chunk(3 + ctx.group()).len() > 2));
    }

    #[test]
    fn the_first_group_can_take_everything() {
        each_group(2, args![out(&mut [0u8; 10])], |ctx| assert_eq!(ctx.out::<u8>(0).chunk(usize::MAX).len(), [10, 0][ctx.group()]));
    }

    #[test]
    fn groups_share_atomics() {
        let mut sums = [0u64, 7];
        each_group(4, args![inout(&mut sums)], |ctx| {
            let shared = ctx.out::<u64>(0).atomic();
            assert_eq!(shared.len(), 2);
            shared[0].fetch_add(ctx.group() as u64, Ordering::Relaxed);
        });
        assert_eq!(sums, [6, 7]);
        each_group(2, args![inout(&mut [0u32; 0])], |ctx| assert!(ctx.out::<u32>(0).atomic().is_empty()));
    }

    #[test]
    #[should_panic(expected = "shares this argument as atomics")]
    fn what_is_shared_has_no_parts() {
        each_group(2, args![out(&mut [0u32; 10])], |ctx| match ctx.group() {
            0 => assert_eq!(ctx.out::<u32>(0).atomic().len(), 10),
            _ => assert!(ctx.out::<u32>(0).chunk(3).is_empty(), "it has nothing alone"),
        });
    }

    #[test]
    #[should_panic(expected = "took a part of this argument, of 3 elements")]
    fn what_has_parts_is_not_shared() {
        each_group(2, args![out(&mut [0u32; 10])], |ctx| match ctx.group() {
            0 => drop(ctx.out::<u32>(0).chunk(3)),
            _ => assert_eq!(ctx.out::<u32>(0).atomic().len(), 10),
        });
    }
}
