//! Figures and how they are printed.
//!
//! A figure is the median of several runs, with the smallest and the largest beside it. Text is built whole and printed once.

use anyhow::Result;
use serde::Serialize;
use std::io::Write;
use std::time::Duration;

/// The median of some figures, and how far they spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// The middle one.
    pub(crate) median: f64,
    /// The smallest.
    pub(crate) low: f64,
    /// The largest.
    pub(crate) high: f64,
}

impl Figure {
    /// The figure of some runs.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Figure {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (middle, odd) = (values.len() / 2, values.len() % 2 == 1);
        let median = if odd { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Figure { median, low: values[0], high: values[values.len() - 1] }
    }

    /// The figure of some times, in seconds.
    pub(crate) fn of_times(times: &[Duration]) -> Figure {
        Figure::of(times.iter().map(Duration::as_secs_f64))
    }

    /// The figure of the quotients of runs that belong together.
    pub(crate) fn of_ratios(over: &[Duration], under: &[Duration]) -> Figure {
        Figure::of(over.iter().zip(under).map(|(over, under)| over.as_secs_f64() / under.as_secs_f64()))
    }
}

/// An error and its causes on one line, without those that the text before has named already.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

/// Prints text; colours go away if nobody sees them.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = anstream::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints one JSON object on a line of its own.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string(value)? + "\n"))
}

/// A time for people: "3.42 ms".
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// A number of bytes for people: "12.9 MB".
pub(crate) fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1e3 => format!("{bytes} B"),
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b if b < 1e9 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}

/// Rows of words as aligned columns, the first to the left and the others to the right, two spaces before each line.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|word| word.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::from(" ");
        for (column, (word, &width)) in row.iter().zip(&widths).enumerate() {
            line += &if column == 0 { format!(" {word:<width$}") } else { format!("   {word:>width$}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Drawings of some lines each beside each other, two spaces before and between them.
pub(crate) fn beside(drawings: &[Vec<String>]) -> String {
    let lines = drawings.iter().map(Vec::len).max().unwrap_or(0);
    let line =
        |line| drawings.iter().filter_map(|drawing: &Vec<String>| drawing.get(line)).map(String::as_str).collect::<Vec<_>>().join("  ");
    (0..lines).map(|at| format!("  {}\n", line(at).trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(Figure::of([3.0, 1.0, 2.0]), Figure { median: 2.0, low: 1.0, high: 3.0 });
        assert_eq!(Figure::of([4.0, 1.0, 2.0, 3.0]).median, 2.5);
        let [one, two, four] = [1, 2, 4].map(Duration::from_secs);
        assert_eq!(Figure::of_ratios(&[two, four, one], &[one, one, one]).median, 2.0);
    }

    #[test]
    fn a_cause_is_named_once() {
        let inner = || anyhow::anyhow!("no such file");
        assert_eq!(message(&inner().context("opening a.npy")), "opening a.npy: no such file");
        assert_eq!(message(&inner().context("opening a.npy: no such file")), "opening a.npy: no such file");
    }

    #[test]
    fn units_fit_the_size() {
        assert_eq!([time(12.3e-6), time(0.00342), time(2.5)], ["12.3 us", "3.42 ms", "2.50 s"]);
        assert_eq!([bytes(12), bytes(4096), bytes(12_900_000), bytes(2_500_000_000)], ["12 B", "4.1 kB", "12.9 MB", "2.50 GB"]);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".into(), "10".into()], vec!["bcd".into(), "5".into()]];
        assert_eq!(table(&rows), "  a     10\n  bcd    5\n");
    }
}
