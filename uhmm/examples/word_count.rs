//! Counts the words of a mapped file on a device: `inp(&mmap[..])`, as for any slice.
//!
//!     cargo run --release -p uhmm --example word_count -- FILE
//!
//! Without a file it writes one of its own.
#![allow(unsafe_code)] // maps a file

use memmap2::Mmap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::time::Instant;
use uhmm::{Ctx, Uhmm, args, inp, out};

/// Bytes that each group looks at.
const PART: usize = 1 << 20;

/// Counts the words that begin in this group's part: a word begins where the byte before is white space, or is not there.
fn count_words(ctx: &Ctx<'_>) {
    let text = ctx.inp::<u8>(1);
    let from = ctx.group() * PART;
    let mut in_word = from > 0 && !text[from - 1].is_ascii_whitespace();
    let mut words = 0;
    for byte in &text[from..text.len().min(from + PART)] {
        let was_in_word = std::mem::replace(&mut in_word, !byte.is_ascii_whitespace());
        words += u64::from(in_word && !was_in_word);
    }
    ctx.out::<u64>(0).chunk(1)[0] = words;
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let own = std::env::temp_dir().join(format!("uhmm-words-{}.txt", std::process::id()));
    let argument = std::env::args_os().nth(1);
    let file = match &argument {
        Some(path) => File::open(path)?,
        None => {
            let mut file = BufWriter::new(File::create(&own)?);
            for number in 0..1_000_000 {
                write!(file, "word {number}{}", if number % 8 == 7 { "\n" } else { " " })?;
            }
            file.flush()?;
            File::open(&own)?
        }
    };
    // SAFETY: nobody changes the file meanwhile.
    let mmap = unsafe { Mmap::map(&file)? };

    let hmm = Uhmm::new()?;
    let dev = hmm.device("soft")?;
    let groups = mmap.len().div_ceil(PART).max(1);
    let mut words = vec![0u64; groups];
    let start = Instant::now();
    dev.run(&count_words, groups, args![out(&mut words), inp(&mmap[..])])?;
    let total: u64 = words.iter().sum();
    println!("{total} words in {} bytes, in {:?}", mmap.len(), start.elapsed());

    let expected = mmap.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).count();
    assert_eq!(total, expected as u64);
    if argument.is_none() {
        assert_eq!(total, 2_000_000);
        std::fs::remove_file(&own)?;
    }
    Ok(())
}
