//! `uhmm mul-mat`: a matrix product on a device by ordinary pointers, checked and timed.

mod problem;
mod programs;
mod rounds;

pub(crate) use problem::{Problem, Sides};
pub(crate) use programs::{launch, read_all};
pub(crate) use rounds::{Again, Measured, measure};

use crate::report::{self, bytes, time};
use crate::{npy, options};
use anyhow::{Context, Result};
use owo_colors::OwoColorize;
use serde::Serialize;
use uhmm::Uhmm;

/// Runs the command.
pub(crate) fn run(args: &options::MulMat, json: bool) -> Result<()> {
    let sides = Sides::from_args(args)?;
    let hmm = Uhmm::new()?;
    // Explicit copies need a device with memory of its own.
    let device = match args.device.starts_with("opencl") {
        true => hmm.opencl(&args.device).copies(true).open()?,
        false => hmm.device(&args.device)?,
    };
    let problem = Problem::new(sides, device.threads())?;
    // The product by the very pointers of the matrices, mapped files or not; it is what -o writes.
    let mut r = vec![f32::NAN; problem.shape.m * problem.shape.n];
    launch(&device, problem.shape, &mut r, problem.a.as_slice(), problem.b.as_slice())?;
    let error = problem.check("uhmm", &r)?;
    if let Some(path) = &args.output {
        npy::write(path, problem.shape.m, problem.shape.n, &r)?;
    }
    drop(r);
    let mut measured = measure(&device, &problem).context("timing the product")?;
    measured.max_rel_error = measured.max_rel_error.max(error);
    if json { report::print_json(&Json::of(&measured)) } else { report::print(&text(&measured)) }
}

/// The JSON object: times in seconds, medians of all rounds.
#[derive(Serialize)]
struct Json<'a> {
    device: &'a str,
    threads: usize,
    /// Rows of A, columns of A, columns of B.
    shape: [usize; 3],
    rounds: usize,
    native_s: f64,
    explicit_s: f64,
    uhmm_s: f64,
    /// The kernel's own time in uhmm's rounds, and in explicit's.
    kernel_s: f64,
    explicit_kernel_s: f64,
    /// uhmm over explicit: the median over the pairs, and the smallest and largest pair.
    ratio: f64,
    ratio_low: f64,
    ratio_high: f64,
    /// The largest difference from the library's product, relative to its largest element.
    max_rel_error: f64,
    bytes_to_device: u64,
    bytes_to_cpu: u64,
    cpu_faults: u64,
    device_faults: u64,
    unchanged: JsonAgain,
    one_row: JsonAgain,
}

#[derive(Serialize)]
struct JsonAgain {
    explicit_s: f64,
    uhmm_s: f64,
    /// uhmm's bytes.
    bytes_to_device: u64,
    bytes_to_cpu: u64,
    explicit_bytes_to_device: u64,
    explicit_bytes_to_cpu: u64,
}

impl JsonAgain {
    fn of(again: &Again, measured: &Measured) -> Self {
        JsonAgain {
            explicit_s: again.explicit.median,
            uhmm_s: again.uhmm.median,
            bytes_to_device: again.moved.bytes_to_device,
            bytes_to_cpu: again.moved.bytes_to_cpu,
            explicit_bytes_to_device: measured.shape.bytes_in(),
            explicit_bytes_to_cpu: measured.shape.bytes_out(),
        }
    }
}

impl<'a> Json<'a> {
    fn of(measured: &'a Measured) -> Self {
        let shape = measured.shape;
        Json {
            device: &measured.device,
            threads: measured.threads,
            shape: [shape.m, shape.k, shape.n],
            rounds: measured.rounds,
            native_s: measured.native.median,
            explicit_s: measured.explicit.median,
            uhmm_s: measured.uhmm.median,
            kernel_s: measured.kernel.median,
            explicit_kernel_s: measured.explicit_kernel.median,
            ratio: measured.ratio.median,
            ratio_low: measured.ratio.low,
            ratio_high: measured.ratio.high,
            max_rel_error: measured.max_rel_error,
            bytes_to_device: measured.moved.bytes_to_device,
            bytes_to_cpu: measured.moved.bytes_to_cpu,
            cpu_faults: measured.moved.cpu_faults,
            device_faults: measured.moved.device_faults,
            unchanged: JsonAgain::of(&measured.unchanged, measured),
            one_row: JsonAgain::of(&measured.one_row, measured),
        }
    }
}

fn text(measured: &Measured) -> String {
    let shape = measured.shape;
    let mut text = format!(
        "{} ({} x {}) times ({} x {}) on {}, {} threads; {} rounds, median (low to high)\n\n",
        "R = A B:".bold(),
        shape.m,
        shape.k,
        shape.k,
        shape.n,
        measured.device,
        measured.threads,
        measured.rounds
    );
    let row = |name: &str, figure: crate::report::Figure| {
        vec![name.to_owned(), time(figure.median), format!("({} to {})", time(figure.low), time(figure.high))]
    };
    text += &report::table(&[
        row("native", measured.native),
        row("explicit", measured.explicit),
        row("kernel of it", measured.explicit_kernel),
        row("uhmm", measured.uhmm),
        row("kernel of it", measured.kernel),
    ]);
    let ratio = measured.ratio;
    text += &format!("\n  uhmm / explicit: {} ({:.3} to {:.3})\n", format!("{:.3}", ratio.median).bold(), ratio.low, ratio.high);
    let moved = &measured.moved;
    text += &format!(
        "  uhmm moved {} to the device and {} to the CPU, with {} CPU faults and {} device faults\n",
        bytes(moved.bytes_to_device),
        bytes(moved.bytes_to_cpu),
        moved.cpu_faults,
        moved.device_faults
    );
    let error = measured.max_rel_error;
    text += &if error == 0.0 {
        "  the product is exactly the library's\n".to_owned()
    } else {
        format!("  largest relative error: {error:.1e}\n")
    };
    text += &format!("\n{}\n\n{}", "Launched again:".bold(), launches(measured, false));
    text
}

/// The launches as a table: time and bytes of explicit and of uhmm.
pub(crate) fn launches(measured: &Measured, with_first: bool) -> String {
    let explicit_bytes = format!("{} / {}", bytes(measured.shape.bytes_in()), bytes(measured.shape.bytes_out()));
    let row = |name: &str, explicit: f64, uhmm: f64, to_device: u64, to_cpu: u64| {
        let moved = format!("{} / {}", bytes(to_device), bytes(to_cpu));
        vec![name.to_owned(), time(explicit), explicit_bytes.clone(), time(uhmm), moved]
    };
    let again =
        |name, again: &Again| row(name, again.explicit.median, again.uhmm.median, again.moved.bytes_to_device, again.moved.bytes_to_cpu);
    let header = ["", "explicit", "there / back", "uhmm", "there / back"].map(str::to_owned).to_vec();
    let mut rows = vec![header];
    if with_first {
        let moved = &measured.moved;
        rows.push(row("first, all of R read", measured.explicit.median, measured.uhmm.median, moved.bytes_to_device, moved.bytes_to_cpu));
    }
    rows.push(again("nothing changed, R not read", &measured.unchanged));
    rows.push(again("one row of A changed, one row of R read", &measured.one_row));
    report::table(&rows)
}
