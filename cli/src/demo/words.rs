//! The words of a mapped file are counted on the device: a mapping is a slice like any other.

use crate::report::{bytes, time};
use crate::{digits, npy};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Instant;
use uhmm::{Ctx, Device, args, inp, out};

/// Bytes that a group looks at.
const PART: usize = 1 << 20;
/// Times that all pixels of all digits are written into the file.
const TIMES: usize = 20;

/// How it went.
#[derive(Serialize)]
pub(super) struct WordCount {
    bytes: u64,
    words: u64,
    seconds: f64,
}

/// Counts the words that begin in this group's part: where the byte before is white space, or is not there.
fn count_words(ctx: &Ctx<'_>) {
    let text = ctx.inp::<u8>(1);
    let from = ctx.group() * PART;
    let mut in_word = from > 0 && !text[from - 1].is_ascii_whitespace();
    let mut words = 0;
    for byte in &text[from..text.len().min(from + PART)] {
        let was_in_word = core::mem::replace(&mut in_word, !byte.is_ascii_whitespace());
        words += u64::from(in_word && !was_in_word);
    }
    ctx.out::<u64>(0).chunk(1)[0] = words;
}

/// Runs the act, on a file that has one word for each pixel of the digits, and is gone afterwards.
pub(super) fn count(device: &Device) -> Result<WordCount> {
    let mut text = String::new();
    let images = digits::images()?;
    for (i, pixel) in images.as_slice().iter().enumerate() {
        write!(text, "{pixel}{}", if i % digits::SIDE == digits::SIDE - 1 { '\n' } else { ' ' })?;
    }
    let mut file = tempfile::tempfile().context("making a temporary file")?;
    for _ in 0..TIMES {
        file.write_all(text.as_bytes()).context("writing a temporary file")?;
    }
    let map = npy::map_file(&file).context("mapping a temporary file")?;
    let groups = map.len().div_ceil(PART);
    let mut parts = vec![0u64; groups];
    let start = Instant::now();
    device.run(&count_words, groups, args![out(&mut parts), inp(&map[..])])?;
    let words = parts.iter().sum();
    let seconds = start.elapsed().as_secs_f64();
    let expected = (TIMES * images.as_slice().len()) as u64;
    ensure!(words == expected, "the kernel counted {words} words of {expected}");
    Ok(WordCount { bytes: map.len() as u64, words, seconds })
}

impl WordCount {
    pub(super) fn text(&self) -> String {
        format!("  {} words in {}, counted in {}; the number is right\n", self.words, bytes(self.bytes), time(self.seconds))
    }
}
