//! Pages of an array that go to the device: one by one, as one piece, as one rectangle, and together.
#![allow(unsafe_code)] // the data is borrowed until it has been waited for

use crate::cl::{Buffer, Cl, Result};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The program.
pub struct Pages<'c> {
    cl: &'c Cl,
    buffer: Buffer<'c, u8>,
}

/// How pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// One after the other, each waited for.
    Awaited,
    /// Each by a call of its own, without waiting in between.
    Together,
    /// As one piece: they follow each other.
    Piece,
    /// As one rectangle: they are so many pages apart.
    Rectangle(usize),
}

impl<'c> Pages<'c> {
    /// Over a buffer of so many bytes.
    ///
    /// # Errors
    /// What OpenCL says.
    pub fn new(cl: &'c Cl, bytes: usize) -> Result<Self> {
        Ok(Pages { cl, buffer: cl.buffer(bytes)? })
    }

    /// Copies the pages of these numbers to where they belong, and waits for that.
    ///
    /// # Errors
    /// What OpenCL says.
    ///
    /// # Panics
    /// If the data has no such pages.
    pub fn send(&mut self, data: &[u8], pages: &[usize], how: How) -> Result<()> {
        let Some(&first) = pages.first() else { return Ok(()) };
        let page = |number: usize| &data[number * PAGE..(number + 1) * PAGE];
        // SAFETY: the data is borrowed until `finish` has returned.
        let begun = unsafe {
            match how {
                How::Awaited => pages.iter().try_for_each(|&at| self.buffer.write(at * PAGE, page(at)).and_then(|()| self.cl.finish())),
                How::Together => pages.iter().try_for_each(|&at| self.buffer.write(at * PAGE, page(at))),
                How::Piece => self.buffer.write(first * PAGE, &data[first * PAGE..(first + pages.len()) * PAGE]),
                How::Rectangle(apart) => self.buffer.write_rows(first * PAGE, &data[first * PAGE..], PAGE, pages.len(), apart * PAGE),
            }
        };
        begun.and(self.cl.finish())
    }
}
