//! `uhmm bench`: uhmm against the fewest system calls that could do each job, in pairs.
//!
//! A row is one figure of uhmm and one of its floor. The two run in turn, in changing order, on memory that was touched before; the
//! value and the floor are medians, the ratio is the median of the ratios within the pairs, so that what slows both down does not
//! count. Each row is printed as soon as it is known. `first_launch_4k` compares differences ([`first_launch`] says how).

mod first_launch;
mod kernel;
mod memory;
mod opencl;
mod peer;

use crate::options::{self, Group};
use crate::report::{self, Figure};
use anyhow::Result;
use owo_colors::OwoColorize;
use serde::Serialize;
use std::time::Duration;

/// Runs the command.
pub(crate) fn run(args: &options::Bench, json: bool) -> Result<()> {
    let mut print = |row: Row| {
        if json { report::print_json(&row) } else { report::print(&row.text()) }
    };
    if matches!(args.group, Group::Memory | Group::All) {
        memory::run(args, &mut print)?;
    }
    if matches!(args.group, Group::Kernel | Group::All) {
        kernel::run(args, &mut print)?;
    }
    if matches!(args.group, Group::OpenCl | Group::All) {
        opencl::run(args, &mut print)?;
    }
    Ok(())
}

/// One line of the output.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    value: f64,
    unit: &'static str,
    /// What the fewest system calls, or the known library, reach.
    floor: f64,
    /// Value over floor.
    ratio: f64,
    ratio_low: f64,
    ratio_high: f64,
    /// What the ratio should be: at least that for a rate, at most that for a time.
    goal: f64,
    met: bool,
    pairs: usize,
}

impl Row {
    fn text(&self) -> String {
        let sign = if is_rate(self.unit) { "≥" } else { "≤" };
        let verdict = if self.met { "met".green().to_string() } else { "missed".red().to_string() };
        format!(
            "{:<26} {:>8.2} {:<7} floor {:>8.2}  ratio {:.2} ({:.2} to {:.2})  goal {sign} {:.2} {verdict}\n",
            self.name, self.value, self.unit, self.floor, self.ratio, self.ratio_low, self.ratio_high, self.goal
        )
    }
}

fn is_rate(unit: &str) -> bool {
    unit.ends_with("/s")
}

/// What a row measures: how a time becomes a figure, and what to hope for.
#[derive(Clone, Copy)]
struct Measure {
    name: &'static str,
    unit: &'static str,
    /// For a rate, what is done in one run, in the unit times seconds; for a time, how many of them are in one run, divided by the
    /// units in a second.
    work: f64,
    goal: f64,
}

impl Measure {
    fn figure(&self, time: Duration) -> f64 {
        if is_rate(self.unit) { self.work / time.as_secs_f64() } else { time.as_secs_f64() / self.work }
    }

    /// The row of some pairs: times of uhmm and of its floor.
    fn row(&self, pairs: &[(Duration, Duration)]) -> Row {
        self.row_of(&pairs.iter().map(|&(ours, floor)| (self.figure(ours), self.figure(floor))).collect::<Vec<_>>())
    }

    /// The row of some pairs of figures whose difference counts, not their ratio.
    fn row_above(&self, figures: &[(f64, f64)]) -> Row {
        let above = Figure::of(figures.iter().map(|(ours, floor)| ours - floor));
        let row = self.row_of(figures);
        Row { ratio: above.median, ratio_low: above.low, ratio_high: above.high, met: above.median <= self.goal, ..row }
    }

    /// The row of some pairs of figures.
    fn row_of(&self, figures: &[(f64, f64)]) -> Row {
        let ratio = Figure::of(figures.iter().map(|(ours, floor)| ours / floor));
        Row {
            name: self.name,
            value: Figure::of(figures.iter().map(|&(ours, _)| ours)).median,
            unit: self.unit,
            floor: Figure::of(figures.iter().map(|&(_, floor)| floor)).median,
            ratio: ratio.median,
            ratio_low: ratio.low,
            ratio_high: ratio.high,
            goal: self.goal,
            met: if is_rate(self.unit) { ratio.median >= self.goal } else { ratio.median <= self.goal },
            pairs: figures.len(),
        }
    }
}

/// Runs both sides in turn, changing who is first, after one pair that does not count.
fn in_pairs<T>(pairs: u32, mut ours: impl FnMut() -> Result<T>, mut floor: impl FnMut() -> Result<T>) -> Result<Vec<(T, T)>> {
    ours()?;
    floor()?;
    let pair = |number| {
        Ok(if number % 2 == 0 {
            let ours = ours()?;
            (ours, floor()?)
        } else {
            let floor = floor()?;
            (ours()?, floor)
        })
    };
    (0..pairs).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_want_a_high_ratio_and_times_a_low_one() {
        let pairs = [(Duration::from_secs(2), Duration::from_secs(1)); 3];
        let rate = Measure { name: "rate", unit: "GB/s", work: 10.0, goal: 0.8 }.row(&pairs);
        assert_eq!((rate.value, rate.floor, rate.ratio, rate.met), (5.0, 10.0, 0.5, false));
        let time = Measure { name: "time", unit: "us", work: 4.0 / 1e6, goal: 2.5 }.row(&pairs);
        assert_eq!((time.value, time.floor, time.ratio, time.met), (500_000.0, 250_000.0, 2.0, true));
    }

    #[test]
    fn pairs_alternate_and_the_first_does_not_count() {
        let log = std::cell::RefCell::new(String::new());
        let side = |name| {
            let mut log = log.borrow_mut();
            log.push(name);
            Ok(log.len())
        };
        let pairs = in_pairs(2, || side('u'), || side('f')).unwrap();
        assert_eq!(log.borrow().as_str(), "ufuffu");
        assert_eq!(pairs, [(3, 4), (6, 5)]);
    }
}
