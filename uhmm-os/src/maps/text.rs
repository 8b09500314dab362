//! The text of `/proc/self/maps`, parsed byte by byte as it is read in pieces: no line needs to lie in one piece.
//!
//! `55d0c0a00000-55d0c0a21000 rw-p 00002000 fd:01 1234       /path or [word]`

use super::{Vma, VmaKind};
use crate::Errno;
use crate::syscall::pread;
use rustix::fd::BorrowedFd;

/// Bytes read at once, into the stack frame.
const PIECE: usize = 2048;

/// Where in a line the parser is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Field {
    Start,
    End,
    Flags,
    Offset,
    Major,
    Minor,
    Inode,
    Padding,
    Name,
}

/// A line: the numbers so far, and as much of the name as there is room for.
#[derive(Debug)]
pub(super) struct Line<'a> {
    field: Field,
    start: u64,
    end: u64,
    flags: [u8; 4],
    flags_len: usize,
    offset: u64,
    major: u64,
    minor: u64,
    inode: u64,
    name: &'a mut [u8],
    name_len: usize,
}

impl<'a> Line<'a> {
    pub(super) fn new(name: &'a mut [u8]) -> Self {
        Line {
            field: Field::Start,
            start: 0,
            end: 0,
            flags: [0; 4],
            flags_len: 0,
            offset: 0,
            major: 0,
            minor: 0,
            inode: 0,
            name,
            name_len: 0,
        }
    }

    fn reset(&mut self) {
        self.field = Field::Start;
        (self.start, self.end, self.offset) = (0, 0, 0);
        (self.major, self.minor, self.inode) = (0, 0, 0);
        (self.flags_len, self.name_len) = (0, 0);
    }

    /// Takes one byte; true when it ends the line.
    fn feed(&mut self, byte: u8) -> bool {
        if byte == b'\n' {
            return true;
        }
        match self.field {
            Field::Start => self.field = number(&mut self.start, 16, byte, b'-', Field::Start, Field::End),
            Field::End => self.field = number(&mut self.end, 16, byte, b' ', Field::End, Field::Flags),
            Field::Flags if byte == b' ' => self.field = Field::Offset,
            Field::Flags => {
                if let Some(flag) = self.flags.get_mut(self.flags_len) {
                    *flag = byte;
                    self.flags_len += 1;
                }
            }
            Field::Offset => self.field = number(&mut self.offset, 16, byte, b' ', Field::Offset, Field::Major),
            Field::Major => self.field = number(&mut self.major, 16, byte, b':', Field::Major, Field::Minor),
            Field::Minor => self.field = number(&mut self.minor, 16, byte, b' ', Field::Minor, Field::Inode),
            Field::Inode => self.field = number(&mut self.inode, 10, byte, b' ', Field::Inode, Field::Padding),
            Field::Padding if byte == b' ' => {}
            Field::Padding | Field::Name => {
                self.field = Field::Name;
                if let Some(slot) = self.name.get_mut(self.name_len) {
                    *slot = byte;
                }
                self.name_len += 1;
            }
        }
        false
    }

    /// The name, as far as it fitted.
    pub(super) fn name(&self) -> &[u8] {
        self.name.get(..self.name_len).unwrap_or(self.name)
    }

    /// Whether the name did not fit.
    pub(super) fn truncated(&self) -> bool {
        self.name_len > self.name.len()
    }

    pub(super) fn vma(&self) -> Vma {
        let dev = (self.major as u32, self.minor as u32);
        Vma {
            start: self.start as usize,
            end: self.end as usize,
            read: self.flags[0] == b'r',
            write: self.flags[1] == b'w',
            exec: self.flags[2] == b'x',
            shared: self.flags[3] == b's',
            offset: self.offset,
            inode: self.inode,
            dev,
            kind: VmaKind::new(self.inode, dev, self.name()),
            page_size: crate::PAGE,
        }
    }
}

/// Adds a digit to a number, or goes on to the next field at its end.
fn number(value: &mut u64, base: u64, byte: u8, end: u8, this: Field, next: Field) -> Field {
    if byte == end {
        return next;
    }
    let digit = match byte {
        b'0'..=b'9' => byte - b'0',
        b'a'..=b'f' => byte - b'a' + 10,
        _ => return this,
    };
    *value = value.wrapping_mul(base).wrapping_add(digit.into());
    this
}

/// The file, read from its start in pieces.
pub(super) struct Reader<'fd> {
    fd: BorrowedFd<'fd>,
    offset: u64,
    piece: [u8; PIECE],
    at: usize,
    len: usize,
}

impl<'fd> Reader<'fd> {
    pub(super) fn new(fd: BorrowedFd<'fd>) -> Self {
        Reader { fd, offset: 0, piece: [0; PIECE], at: 0, len: 0 }
    }

    /// Reads the next line into `line`; false at the end.
    pub(super) fn next(&mut self, line: &mut Line<'_>) -> Result<bool, Errno> {
        line.reset();
        loop {
            while self.at < self.len {
                let Some(&byte) = self.piece.get(self.at) else {
                    break;
                };
                self.at += 1;
                if line.feed(byte) {
                    return Ok(true);
                }
            }
            self.len = pread(self.fd, &mut self.piece, self.offset)?;
            self.offset += self.len as u64;
            self.at = 0;
            if self.len == 0 {
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse<'a>(text: &str, name: &'a mut [u8]) -> Line<'a> {
        let mut line = Line::new(name);
        let (last, head) = text.as_bytes().split_last().unwrap();
        assert!(head.iter().all(|&b| !line.feed(b)));
        assert!(line.feed(*last));
        line
    }

    #[test]
    fn a_file() {
        let mut name = [0; 64];
        let line = parse("7f12a000-7f12c000 r-xs 0000f000 fd:1a 131                     /a b/c (deleted)\n", &mut name);
        let vma = line.vma();
        assert_eq!((vma.start, vma.end, vma.offset, vma.inode, vma.dev), (0x7f12_a000, 0x7f12_c000, 0xf000, 131, (0xfd, 0x1a)));
        assert_eq!((vma.read, vma.write, vma.exec, vma.shared, vma.kind), (true, false, true, true, VmaKind::File));
        assert_eq!(line.name(), b"/a b/c (deleted)");
    }

    #[test]
    fn no_name_and_a_long_one() {
        let mut name = [0; 7];
        assert_eq!(parse("1000-2000 ---p 00000000 00:00 0 \n", &mut name).vma().kind, VmaKind::Anonymous);
        let line = parse("1000-2000 rw-p 00000000 00:00 0    [anon:uhmm]\n", &mut name);
        assert!(line.truncated());
        assert_eq!((line.vma().kind, line.name()), (VmaKind::Anonymous, b"[anon:u".as_slice()));
    }
}
