//! `/proc/self/maps` (proc_pid_maps(5)): which mapping holds an address, by the `PROCMAP_QUERY` ioctl (Linux 6.11), or, on older
//! kernels, from the text, read in pieces into the stack frame.
//!
//! Everything but opening is *Fault path*. A mapping may change as soon as it has been looked up: a notifier's sequence number must
//! tell.
//!
//! Who uses it: `uhmm-core`, to tell what may move; `uhmm doctor`.
//!
//! ```
//! use uhmm_os::maps::Maps;
//!
//! let maps = Maps::open()?;
//! let buffer = vec![0u8; 1 << 20];
//! let vma = maps.covering(buffer.as_ptr() as usize)?.expect("it is mapped");
//! assert!(vma.is_private_anonymous() && vma.write);
//! assert!(maps.covering(0)?.is_none());
//!
//! let code = Maps::open as *const () as usize;
//! let mut name = [0; 4096];
//! assert!(maps.name(code, &mut name)?.is_some()); // the path of the program
//! # Ok::<(), uhmm_os::Errno>(())
//! ```

mod text;

use crate::Errno;
use crate::syscall::{abi, ioctl, iowr};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use text::{Line, Reader};

const QUERY: u32 = iowr::<abi::procmap_query>(b'f', 17);
const READABLE: u64 = abi::procmap_query_flags::PROCMAP_QUERY_VMA_READABLE as u64;
const WRITABLE: u64 = abi::procmap_query_flags::PROCMAP_QUERY_VMA_WRITABLE as u64;
const EXECUTABLE: u64 = abi::procmap_query_flags::PROCMAP_QUERY_VMA_EXECUTABLE as u64;
const SHARED: u64 = abi::procmap_query_flags::PROCMAP_QUERY_VMA_SHARED as u64;
const OR_NEXT: u64 = abi::procmap_query_flags::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64;

/// Longer than any name in brackets: the kernel allows 80 bytes for a name of an anonymous mapping.
const BRACKETED: usize = 128;

/// What lies behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmaKind {
    /// Nothing: anonymous memory, named (`[anon:...]`) or not.
    Anonymous,
    /// A file, a device, or shared memory (shared anonymous memory is a file to the kernel).
    File,
    /// The main thread's stack.
    Stack,
    /// The heap that brk(2) moves.
    Heap,
    /// Pages of the kernel's: vdso, vvar and the like.
    Special,
}

impl VmaKind {
    fn new(inode: u64, dev: (u32, u32), name: &[u8]) -> Self {
        if inode != 0 || dev != (0, 0) {
            return VmaKind::File;
        }
        match name {
            b"[heap]" => VmaKind::Heap,
            [b'[', b's', b't', b'a', b'c', b'k', b']' | b':', ..] => VmaKind::Stack,
            [b'[', b'a', b'n', b'o', b'n', b':', ..] | [] => VmaKind::Anonymous,
            [b'[', ..] => VmaKind::Special,
            _ => VmaKind::File,
        }
    }
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: usize,
    /// One past the last.
    pub end: usize,
    /// It may be read.
    pub read: bool,
    /// It may be written.
    pub write: bool,
    /// It may be executed.
    pub exec: bool,
    /// Writes are shared (`MAP_SHARED`).
    pub shared: bool,
    /// Where in the file it starts, in bytes.
    pub offset: u64,
    /// The file's inode; 0 if there is none.
    pub inode: u64,
    /// The file's device, major and minor.
    pub dev: (u32, u32),
    /// What lies behind it.
    pub kind: VmaKind,
    /// Bytes of its pages: more than 4096 for huge pages of a pool (hugetlbfs). Where only /proc/self/maps can be asked it is always 4096.
    pub page_size: usize,
}

impl Vma {
    /// Whether its pages are private anonymous ones: those that userfaultfd can move.
    pub fn is_private_anonymous(&self) -> bool {
        !self.shared && matches!(self.kind, VmaKind::Anonymous | VmaKind::Stack | VmaKind::Heap)
    }

    fn holds(&self, va: usize) -> bool {
        self.start <= va && va < self.end
    }
}

/// The mappings of this process.
#[derive(Debug)]
pub struct Maps {
    fd: OwnedFd,
    text_only: bool,
}

impl Maps {
    /// Opens `/proc/self/maps`.
    ///
    /// # Errors
    /// Those of open(2): `ENOENT` without /proc.
    pub fn open() -> Result<Self, Errno> {
        let fd = rustix::fs::open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut maps = Maps { fd, text_only: false };
        maps.text_only = maps.query(0, OR_NEXT, &mut []) == Err(Errno::NOTTY);
        Ok(maps)
    }

    /// The same, but every look-up reads the text, as on kernels without `PROCMAP_QUERY`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_text_only() -> Result<Self, Errno> {
        Ok(Maps { text_only: true, ..Self::open()? })
    }

    /// Whether this kernel has the `PROCMAP_QUERY` ioctl; without it a look-up reads the text from its start.
    pub fn has_query(&self) -> bool {
        !self.text_only
    }

    /// The mapping that holds `va`, or else the next one above it; `None` above the last. *Fault path.*
    ///
    /// # Errors
    /// Those of reading the file: `EBADF` on a thread that does not have the descriptor, `ESRCH` while the process exits.
    pub fn find(&self, va: usize) -> Result<Option<Vma>, Errno> {
        if self.text_only {
            return Ok(self.read_until(va, &mut [0; BRACKETED])?.map(|line| line.vma()));
        }
        let mut name = [0; BRACKETED];
        let found = match self.query(va, OR_NEXT, &mut name) {
            // Only a file's name is so long; its mapping is told without it.
            Err(Errno::NAMETOOLONG) => self.query(va, OR_NEXT, &mut []),
            other => other,
        };
        match found {
            Ok(answer) => Ok(Some(answer.vma(&name))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The mapping that holds `va`, if there is one. *Fault path.*
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn covering(&self, va: usize) -> Result<Option<Vma>, Errno> {
        Ok(self.find(va)?.filter(|vma| vma.holds(va)))
    }

    /// The name of the mapping that holds `va`: a path, or a word in brackets; `None` if there is no mapping or it has no name.
    /// *Fault path.*
    ///
    /// A newline in a path reads `\012` where the text is read.
    ///
    /// # Errors
    /// `ENAMETOOLONG`: the buffer is too small (a path has up to 4096 bytes, with the final zero); else as [`find`](Self::find).
    pub fn name<'a>(&self, va: usize, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>, Errno> {
        let len = if self.text_only {
            match self.read_until(va, buffer)? {
                Some(line) if line.vma().holds(va) && !line.truncated() => line.name().len(),
                Some(line) if line.vma().holds(va) => return Err(Errno::NAMETOOLONG),
                _ => 0,
            }
        } else {
            match self.query(va, 0, buffer) {
                Ok(answer) => answer.name_len,
                Err(Errno::NOENT) => 0,
                Err(e) => return Err(e),
            }
        };
        Ok(buffer.get(..len).filter(|name| !name.is_empty()))
    }

    fn query(&self, va: usize, flags: u64, name: &mut [u8]) -> Result<Answer, Errno> {
        // SAFETY: the structure is plain integers.
        let mut arg: abi::procmap_query = unsafe { core::mem::zeroed() };
        arg.size = size_of::<abi::procmap_query>() as u64;
        arg.query_flags = flags;
        arg.query_addr = va as u64;
        if !name.is_empty() {
            arg.vma_name_addr = name.as_mut_ptr() as u64;
            arg.vma_name_size = name.len().min(abi::PATH_MAX as usize) as u32;
        }
        // SAFETY: the name's address and size are a slice of ours (or 0: no name wanted).
        unsafe { ioctl(self.fd.as_fd(), QUERY, &mut arg) }?;
        // The kernel counts the final zero.
        let name_len = if name.is_empty() { 0 } else { (arg.vma_name_size as usize).saturating_sub(1) };
        Ok(Answer { arg, name_len })
    }

    /// The first line of the text whose mapping ends above `va`.
    fn read_until<'a>(&self, va: usize, name: &'a mut [u8]) -> Result<Option<Line<'a>>, Errno> {
        let mut reader = Reader::new(self.fd.as_fd());
        let mut line = Line::new(name);
        while reader.next(&mut line)? {
            let vma = line.vma();
            if vma.start > isize::MAX as usize {
                break; // vsyscall: an address of the kernel's half, which the ioctl does not know either
            }
            if vma.end > va {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}

/// What the ioctl said.
#[derive(Debug)]
struct Answer {
    arg: abi::procmap_query,
    name_len: usize,
}

impl PartialEq for Answer {
    fn eq(&self, other: &Self) -> bool {
        self.arg.vma_start == other.arg.vma_start
    }
}

impl Answer {
    fn vma(&self, name: &[u8]) -> Vma {
        let a = &self.arg;
        let dev = (a.dev_major, a.dev_minor);
        Vma {
            start: a.vma_start as usize,
            end: a.vma_end as usize,
            read: a.vma_flags & READABLE != 0,
            write: a.vma_flags & WRITABLE != 0,
            exec: a.vma_flags & EXECUTABLE != 0,
            shared: a.vma_flags & SHARED != 0,
            offset: a.vma_offset,
            inode: a.inode,
            dev,
            kind: VmaKind::new(a.inode, dev, name.get(..self.name_len).unwrap_or(&[])),
            page_size: a.vma_page_size as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_number() {
        assert_eq!(QUERY, 0xC068_6611); // from the kernel's fs.h
    }

    #[test]
    fn kinds() {
        let kind = |name: &str| VmaKind::new(0, (0, 0), name.as_bytes());
        assert_eq!(kind(""), VmaKind::Anonymous);
        assert_eq!(kind("[anon:glibc: malloc]"), VmaKind::Anonymous);
        assert_eq!(kind("[stack]"), VmaKind::Stack);
        assert_eq!(kind("[stack:17]"), VmaKind::Stack);
        assert_eq!(kind("[heap]"), VmaKind::Heap);
        assert_eq!(kind("[vvar_vclock]"), VmaKind::Special);
        assert_eq!(VmaKind::new(7, (0, 1), b"/dev/zero (deleted)"), VmaKind::File);
    }
}
