//! `uhmm stencil`: heat flows over an image on a device, launch after launch over the same two arrays; the CPU looks when it is over.

pub(crate) mod image;
pub(crate) mod kernel;

use crate::series::{Measured, Series};
use crate::{options, report};
use anyhow::{Result, ensure};
use image::Image;
use kernel::{RATE, Shape, launch};
use owo_colors::OwoColorize;
use serde::Serialize;
use std::time::Instant;
use uhmm::{Device, Uhmm};

/// Runs the command.
pub(crate) fn run(args: &options::Stencil, json: bool) -> Result<()> {
    let image = match &args.image {
        Some(path) => Image::open(path)?,
        None => Image::digits(args.size as usize)?,
    };
    let hmm = Uhmm::new()?;
    let device = hmm.device(&args.device)?;
    let (result, measured) = spread(&device, &image, args.steps)?;
    let start = Instant::now();
    check(&result, &plain(&image, args.steps))?;
    let plain_s = start.elapsed().as_secs_f64();
    if let Some(path) = &args.output {
        result.write(path)?;
    }
    let Shape { width, height } = image.shape;
    if json {
        return report::print_json(&Json { device: device.name(), width, height, rate: RATE, measured, plain_s });
    }
    let mut text = format!("{} over {width} x {height} pixels on {}, {} steps\n\n", "Heat flows".bold(), device.name(), args.steps);
    text += &report::beside(&[image.corner(ROWS_DRAWN), result.corner(ROWS_DRAWN)]);
    text += &format!("\n{}  every pixel is what plain loops on the CPU make of it, in {}\n", measured.text(), report::time(plain_s));
    report::print(&text)
}

/// Lines of the drawings.
const ROWS_DRAWN: usize = 16;

/// The JSON object: times in seconds.
#[derive(Serialize)]
struct Json<'a> {
    device: &'a str,
    width: usize,
    height: usize,
    rate: f32,
    #[serde(flatten)]
    measured: Measured,
    /// The same by plain loops on one thread of the CPU.
    plain_s: f64,
}

/// So many steps on the device.
fn spread(device: &Device, image: &Image, steps: u32) -> Result<(Image, Measured)> {
    let shape = image.shape;
    let (mut from, mut to) = (image.pixels.clone(), vec![f32::NAN; shape.len()]);
    let mut series = Series::new(device, steps as usize);
    for _ in 0..steps {
        series.launch(2 * size_of_val(&from[..]), || launch(device, shape, &mut to, &from))?;
        core::mem::swap(&mut from, &mut to);
    }
    let pixels = from.to_vec(); // every pixel is read, and comes home
    Ok((Image { shape, pixels }, series.end()))
}

/// The same by loops as one would write them down.
fn plain(image: &Image, steps: u32) -> Image {
    let Shape { width, height } = image.shape;
    let (mut from, mut to) = (image.pixels.clone(), vec![f32::NAN; image.shape.len()]);
    for _ in 0..steps {
        for y in 0..height {
            for x in 0..width {
                let at = |y: usize, x: usize| from[y.min(height - 1) * width + x.min(width - 1)];
                let above_below = at(y.saturating_sub(1), x) + at(y + 1, x);
                let beside = at(y, x.saturating_sub(1)) + at(y, x + 1);
                to[y * width + x] = at(y, x) + RATE * (above_below + beside - 4.0 * at(y, x));
            }
        }
        core::mem::swap(&mut from, &mut to);
    }
    Image { shape: image.shape, pixels: from }
}

/// The order of all operations is the same, so every bit has to be.
fn check(got: &Image, want: &Image) -> Result<()> {
    for (at, (got, want_here)) in got.pixels.iter().zip(&want.pixels).enumerate() {
        let (y, x) = (at / want.shape.width, at % want.shape.width);
        ensure!(
            got.to_bits() == want_here.to_bits(),
            "wrong heat: the device has {got} in row {y}, column {x}, plain loops have {want_here}"
        );
    }
    Ok(())
}
