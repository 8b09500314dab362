//! Which allocation holds an address, as far as that can be told from outside: for a pointer that comes without a length.
//!
//! | where it lies | its allocation |
//! |---|---|
//! | the heap of brk(2), or one of glibc's further arenas | the block, if the pointer is what malloc returned: where blocks begin cannot be told from a pointer into one, and one is taken for such only if what the block holds looks like marks |
//! | a large block, which malloc has mapped by itself | the block, from anywhere in it |
//! | anonymous memory else | the mapping, without blocks of malloc's that the kernel has merged it with; mappings of one program that lie side by side with the same rights are one to the kernel |
//! | a file, or shared memory | the mapping |
//! | a stack, statics | none: all kinds of things lie there together |
//!
//! Blocks are known by glibc's marks before them (malloc/malloc.c: `struct malloc_chunk`, malloc/arena.c: `heap_info`), which have been the same for as long as there are 64-bit
//! systems. Memory of another allocator looks as what it is made of: mappings.
//!
//! ```
//! use uhmm_os::{allocation, signal};
//!
//! signal::install(|_| false)?; // marks are read by guarded copies
//! let node = Box::new([7u64; 4]);
//! let at = node.as_ptr() as usize;
//! let range = allocation::holding(at).unwrap();
//! assert!(range.start == at && range.len() >= 32);
//! assert!(allocation::holding(at + 8).is_err());
//! # signal::uninstall();
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

use crate::maps::{Maps, Vma, VmaKind};
use crate::pagemap::{Entry, Pagemap};
use crate::{Errno, PAGE, copy};
use core::ops::Range;

/// Why no allocation is known to hold an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoAllocation {
    /// Nothing is mapped there.
    Unmapped,
    /// It lies in a heap, and is not what malloc returned.
    NotTheStart,
    /// It lies on a stack.
    Stack,
    /// It lies among the statics of the program or of a library.
    Static,
    /// It lies in pages of the kernel's.
    Special,
    /// The system does not tell.
    System(Errno),
}

impl NoAllocation {
    /// In words, with what to do.
    pub fn words(self) -> &'static str {
        match self {
            NoAllocation::Unmapped => "nothing is mapped there",
            NoAllocation::NotTheStart => {
                "it lies in a heap and is not what malloc returned: give that pointer, or declare the memory with inp, out or inout"
            }
            NoAllocation::Stack => "it lies on a stack, where other things are too: declare the memory with inp, out or inout",
            NoAllocation::Static => "it lies among statics, where other things are too: declare the memory with inp, out or inout",
            NoAllocation::Special => "the kernel's own pages lie there",
            NoAllocation::System(_) => "the system does not tell what is mapped there: declare the memory with inp, out or inout",
        }
    }
}

impl From<Errno> for NoAllocation {
    fn from(e: Errno) -> Self {
        NoAllocation::System(e)
    }
}

/// glibc's flags of a block: it has a mapping of its own; it belongs to another arena than the main one; the one before it is in use.
const MAPPED: usize = 2;
const OTHER_ARENA: usize = 4;
const BEFORE_IN_USE: usize = 1;
const FLAGS: usize = 7;
/// Bytes of the marks before a block.
const MARKS: usize = 16;
/// The address of an arena's heap, and the most bytes it has.
const ARENA: usize = 64 << 20;
/// Page-table entries that are read at a time.
const AT_ONCE: usize = 512;

/// The bytes of the allocation that holds `p`. It opens files of /proc; [`signal::install`](crate::signal::install) must have been called.
///
/// It looks at memory beside `p`, which nobody may unmap meanwhile, nor free `p`: else the answer means nothing.
///
/// # Errors
/// Why none is known.
pub fn holding(p: usize) -> Result<Range<usize>, NoAllocation> {
    let maps = Maps::open()?;
    let vma = maps.covering(p)?.ok_or(NoAllocation::Unmapped)?;
    let local = 0u8;
    let mapping = mapping(&maps, &vma)?;
    match vma.kind {
        VmaKind::Special => Err(NoAllocation::Special),
        VmaKind::Stack => Err(NoAllocation::Stack),
        _ if mapping.contains(&(&raw const local as usize)) => Err(NoAllocation::Stack),
        VmaKind::Heap => block(p, 0, mapping.end).ok_or(NoAllocation::NotTheStart),
        _ if vma.shared => Ok(mapping),
        VmaKind::File => beside_statics(p, mapping).ok_or(NoAllocation::Static),
        VmaKind::Anonymous => in_anonymous(p, beside_statics(p, mapping).ok_or(NoAllocation::Static)?),
    }
}

/// The mapping that `vma` is a part of: watching some of it, say, divides it for the kernel.
fn mapping(maps: &Maps, vma: &Vma) -> Result<Range<usize>, Errno> {
    let what = |vma: &Vma| (vma.read, vma.write, vma.exec, vma.shared, vma.kind, vma.inode, vma.dev);
    let follows = |a: &Vma, b: &Vma| what(a) == what(b) && (vma.kind != VmaKind::File || a.offset + (a.end - a.start) as u64 == b.offset);
    let (mut first, mut last) = (*vma, *vma);
    while let Some(before) = maps.covering(first.start - 1)?.filter(|before| follows(before, &first)) {
        first = before;
    }
    while let Some(after) = maps.covering(last.end)?.filter(|after| follows(&last, after)) {
        last = after;
    }
    Ok(first.start..last.end)
}

/// What is left of a mapping around `p` beside the segments of the program and its libraries; `None` if `p` lies in one of those.
fn beside_statics(p: usize, mapping: Range<usize>) -> Option<Range<usize>> {
    struct Look {
        p: usize,
        left: Option<Range<usize>>,
    }
    unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _: usize, data: *mut libc::c_void) -> libc::c_int {
        // SAFETY: libc gives a valid object with its headers, and `data` is what was given to it below.
        let (look, object) = unsafe { (&mut *data.cast::<Look>(), &*info) };
        // SAFETY: as above.
        let headers = unsafe { core::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)) };
        for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD) {
            let start = object.dlpi_addr as usize + header.p_vaddr as usize;
            let (start, end) = (start & !(PAGE - 1), (start + header.p_memsz as usize).next_multiple_of(PAGE));
            look.left = look.left.take().and_then(|left| match () {
                () if end <= look.p => Some(left.start.max(end)..left.end),
                () if start > look.p => Some(left.start..left.end.min(start)),
                () => None,
            });
        }
        0
    }
    let mut data = Look { p, left: Some(mapping) };
    // SAFETY: the function is called with what it expects, before this returns.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut data).cast()) };
    data.left
}

/// A number of the program's memory, if it can be read.
fn number(at: usize) -> Option<usize> {
    let mut bytes = [0u8; 8];
    // SAFETY: eight bytes of our own are written; what cannot be read is none (`holding` asks for the handler).
    unsafe { copy::guarded(bytes.as_mut_ptr(), at as *const u8, 8) }.ok()?;
    Some(usize::from_ne_bytes(bytes))
}

/// The block that malloc has returned as `p`, in a heap that ends before `end`, of an arena with these flags.
fn block(p: usize, arena: usize, end: usize) -> Option<Range<usize>> {
    if !p.is_multiple_of(16) {
        return None;
    }
    let mark = number(p - 8)?;
    let bytes = mark & !FLAGS;
    let next = (p - MARKS).checked_add(bytes).filter(|next| *next + MARKS <= end)?;
    let looks_right = mark & (MAPPED | OTHER_ARENA) == arena && bytes >= 32 && bytes.is_multiple_of(16);
    // The next one says whether this one is in use; its own size is that of a block as well.
    let after = number(next + 8).filter(|_| looks_right)?;
    (after & BEFORE_IN_USE != 0 && after & !FLAGS >= 16 && after & !FLAGS <= end + MARKS - next).then_some(p..next + 8)
}

/// What malloc has at `at`, where a page begins, of a mapping that ends before `end`: a block with a mapping of its own, or an arena's heap; and whether it is that.
fn of_malloc(at: usize, end: usize) -> Option<(Range<usize>, bool)> {
    let (first, second) = (number(at)?, number(at + 8)?);
    if at.is_multiple_of(ARENA) {
        // The first heap of an arena has the arena itself behind its marks; others name the one before.
        let (before, bytes) = (second, number(at + 16)?);
        let linked = if before == 0 { (at + 24..at + 256).contains(&first) } else { before.is_multiple_of(ARENA) && first % ARENA < 256 };
        if linked && bytes > 0 && bytes <= ARENA && bytes.is_multiple_of(PAGE) && at + bytes <= end {
            return Some((at..at + bytes, true));
        }
    }
    let bytes = second & !FLAGS;
    let is_block = first == 0 && second & FLAGS == MAPPED && bytes > 0 && bytes.is_multiple_of(PAGE);
    let last = at.checked_add(bytes).filter(|last| is_block && *last <= end)?;
    Some((at..last, false))
}

/// What holds `p` in a mapping that the kernel may have merged of several: malloc's parts of it are known by their marks. Pages without memory have none, and are left as they are.
fn in_anonymous(p: usize, mapping: Range<usize>) -> Result<Range<usize>, NoAllocation> {
    let pagemap = Pagemap::open_entries_only()?;
    let mut entries = [Entry::default(); AT_ONCE];
    let (mut low, mut at) = (mapping.start, mapping.start);
    while at < mapping.end {
        let count = AT_ONCE.min((mapping.end - at) / PAGE);
        let count = pagemap.entries(at, &mut entries[..count])?;
        if count == 0 {
            break;
        }
        let mut page = 0;
        while page < count {
            let here = at + page * PAGE;
            let Some((part, arena)) = Some(()).filter(|()| entries[page].present).and_then(|()| of_malloc(here, mapping.end)) else {
                page += 1;
                continue;
            };
            if part.start > p {
                return Ok(low..part.start);
            }
            if part.contains(&p) {
                return match arena {
                    true => block(p, OTHER_ARENA, part.end).ok_or(NoAllocation::NotTheStart),
                    false if p >= part.start + MARKS => Ok(part.start + MARKS..part.end),
                    false => Err(NoAllocation::NotTheStart),
                };
            }
            low = part.end;
            page += part.len() / PAGE; // possibly beyond what was read
        }
        at += page * PAGE;
    }
    Ok(low..mapping.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signal;

    fn usable(p: *const u8) -> usize {
        // SAFETY: the caller's pointer is one of malloc's.
        unsafe { libc::malloc_usable_size(p.cast_mut().cast()) }
    }

    fn map(pages: usize, flags: i32) -> *mut u8 {
        // SAFETY: a new mapping.
        let at = unsafe {
            libc::mmap(core::ptr::null_mut(), pages * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANONYMOUS | flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        at.cast()
    }

    fn blocks_are_known(count: usize) {
        let blocks: Vec<Vec<u8>> = (0..count).map(|i| vec![i as u8; 1 + i * 37]).collect();
        for block in &blocks {
            let at = block.as_ptr() as usize;
            assert_eq!(holding(at), Ok(at..at + usable(block.as_ptr())), "{} bytes", block.len());
            if block.len() > 40 {
                assert_eq!(holding(at + 16), Err(NoAllocation::NotTheStart), "{} bytes", block.len());
                assert_eq!(holding(at + 1), Err(NoAllocation::NotTheStart));
            }
        }
    }

    #[test]
    fn blocks_of_any_arena() {
        signal::install(|_| false).unwrap();
        blocks_are_known(300);
        // Threads have arenas of their own.
        std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(|| blocks_are_known(300)))));
    }

    #[test]
    fn what_a_block_holds_is_seldom_taken_for_marks() {
        signal::install(|_| false).unwrap();
        let mut block = Box::new([0usize; 16]);
        let at = block.as_ptr() as usize;
        let arena = number(at - 8).unwrap() & OTHER_ARENA;
        let mut with = |mark, after| {
            (block[1], block[5]) = (mark, after);
            holding(at + 16)
        };
        let right = 32 | arena | BEFORE_IN_USE;
        assert_eq!(with(right ^ OTHER_ARENA, right), Err(NoAllocation::NotTheStart), "of another arena");
        assert_eq!(with(right, right - BEFORE_IN_USE), Err(NoAllocation::NotTheStart), "not in use");
        assert_eq!(with(right - 16, right), Err(NoAllocation::NotTheStart), "too small");
        assert_eq!(with(right, right + (1 << 40)), Err(NoAllocation::NotTheStart), "a neighbour beyond the heap");
        assert!(with(right, right).is_ok(), "so much cannot be told apart");
    }

    #[test]
    fn large_blocks_and_mappings_beside_them() {
        signal::install(|_| false).unwrap();
        let first: Vec<u8> = vec![1; 40 << 20];
        let mapping = map(300, libc::MAP_PRIVATE);
        // SAFETY: the mapping is ours.
        unsafe { mapping.write_bytes(0xff, 300 * PAGE) };
        let second: Vec<u8> = vec![2; 40 << 20];
        for block in [&first, &second] {
            let at = block.as_ptr() as usize;
            for inside in [0, 1, PAGE, 20 << 20, (40 << 20) - 1] {
                assert_eq!(holding(at + inside), Ok(at..at + usable(block.as_ptr())), "{inside}");
            }
        }
        for inside in [0, 7, 299 * PAGE] {
            let range = holding(mapping as usize + inside).unwrap();
            assert!(range.start <= mapping as usize && mapping as usize + 300 * PAGE <= range.end);
            for block in [&first, &second] {
                assert!(!range.contains(&(block.as_ptr() as usize)), "a block of malloc's is no part of it");
            }
        }
        let shared = map(3, libc::MAP_SHARED) as usize;
        assert_eq!(holding(shared + 5000), Ok(shared..shared + 3 * PAGE));
        // SAFETY: nobody uses them.
        unsafe { (libc::munmap(mapping.cast(), 300 * PAGE), libc::munmap(shared as *mut _, 3 * PAGE)) };
        assert_eq!(holding(shared), Err(NoAllocation::Unmapped));
    }

    #[test]
    fn what_is_no_allocation() {
        signal::install(|_| false).unwrap();
        static DATA: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(7);
        static ZERO: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);
        let local = 5u64;
        assert_eq!(holding(&raw const local as usize), Err(NoAllocation::Stack));
        assert_eq!(holding(&raw const DATA as usize), Err(NoAllocation::Static));
        assert_eq!(holding(&raw const ZERO as usize), Err(NoAllocation::Static));
        assert_eq!(holding(8), Err(NoAllocation::Unmapped));
    }
}
