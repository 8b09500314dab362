//! `uhmm demo`: what uhmm is for, for the eye, in a few seconds.

use crate::mul_mat::{Measured, Problem, Sides, launch, launches, measure};
use crate::report;
use crate::{digits, options};
use anyhow::{Result, ensure};
use owo_colors::OwoColorize;
use serde::Serialize;
use uhmm::{Ctx, Device, Uhmm, args, inp, out};

/// Runs the command.
pub(crate) fn run(args: &options::Demo, json: bool) -> Result<()> {
    let hmm = Uhmm::new()?;
    let device = hmm.device(&args.device)?;
    let problem = Problem::new(Sides::digits()?, device.threads())?;
    let pointer = pointer_on_both_sides(&device)?;
    let measured = measure(&device, &problem)?;
    let neighbours = neighbours(&device, &problem)?;
    if json {
        return report::print_json(&Json {
            device: &measured.device,
            pointer_cpu: pointer.cpu,
            pointer_device: pointer.device,
            explicit_s: measured.explicit.median,
            uhmm_s: measured.uhmm.median,
            named_right: neighbours.share(),
            images: neighbours.images,
        });
    }
    report::print(&text(&problem, &pointer, &measured, &neighbours)?)
}

#[derive(Serialize)]
struct Json<'a> {
    device: &'a str,
    pointer_cpu: usize,
    pointer_device: usize,
    explicit_s: f64,
    uhmm_s: f64,
    named_right: f64,
    images: usize,
}

/// One pointer as the program and as the kernel see it.
struct Pointer {
    cpu: usize,
    device: usize,
}

/// Gives the kernel a pointer as a plain number, and lets it say which number it got and whether data lie there.
fn pointer_on_both_sides(device: &Device) -> Result<Pointer> {
    let data = vec![42.0f32; 1 << 16];
    let cpu = data.as_ptr() as usize;
    let mut seen = [0usize; 2];
    let look = |ctx: &Ctx<'_>| {
        let number = ctx.value::<usize>(2);
        let data = ctx.inp::<f32>(1);
        let found = core::ptr::eq(ctx.ptr(number as *const f32), data.as_ptr()) && data.iter().all(|&value| value == 42.0);
        ctx.out::<usize>(0).chunk(2).copy_from_slice(&[number, usize::from(found)]);
    };
    device.run(&look, 1, args![out(&mut seen), inp(&data), cpu])?;
    ensure!(seen[1] == 1, "the kernel did not find the data at the program's pointer {cpu:#x}");
    Ok(Pointer { cpu, device: seen[0] })
}

/// Each image named like the one that is nearest to it.
struct Neighbours {
    images: usize,
    right: usize,
    /// An image that was named wrong, and its neighbour.
    wrong: Option<(usize, usize)>,
}

impl Neighbours {
    fn share(&self) -> f64 {
        self.right as f64 / self.images as f64
    }
}

/// Names every image from the product G of the images with their transpose: the squared distance of two images i and j is
/// G(i, i) + G(j, j) - 2 G(i, j).
fn neighbours(device: &Device, problem: &Problem) -> Result<Neighbours> {
    let labels = digits::labels()?;
    let images = labels.len();
    let mut gram = vec![0f32; images * images];
    launch(device, problem.shape, &mut gram, problem.a.as_slice(), problem.b.as_slice())?;
    let mut result = Neighbours { images, right: 0, wrong: None };
    for (i, row) in gram.chunks(images).enumerate() {
        let distance = |j: usize| gram[j * images + j] - 2.0 * row[j];
        let nearest = (0..images).filter(|&j| j != i).min_by(|&one, &other| distance(one).total_cmp(&distance(other)));
        match nearest {
            Some(nearest) if labels[nearest] == labels[i] => result.right += 1,
            Some(nearest) => result.wrong = result.wrong.or(Some((i, nearest))),
            None => {}
        }
    }
    Ok(result)
}

fn text(problem: &Problem, pointer: &Pointer, measured: &Measured, neighbours: &Neighbours) -> Result<String> {
    let labels = digits::labels()?;
    let mut text = format!(
        "{} handwritten digits, {} pixels each, multiplied with each other on the device \"{}\".\n\n",
        neighbours.images, problem.shape.k, measured.device
    );
    text += &side_by_side(problem, &[0, 1, 2, 3], &labels);
    text += &format!("\n{}\n\n", "One pointer".bold());
    text += &format!("  in the program   {:#x}\n  in the kernel    {:#x}\n", pointer.cpu, pointer.device);
    text += &format!("\n{}\n\n", "What the program has to write".bold());
    let row = |words: [&str; 5]| words.map(str::to_owned).to_vec();
    text += &report::table(&[
        row(["", "allocations", "copies there", "copies back", "frees"]),
        row(["explicit", "3", "2", "1", "3"]),
        row(["uhmm", "0", "0", "0", "0"]),
    ]);
    text += &format!("\n{}\n\n", "Three launches".bold());
    text += &launches(measured, true);
    text += &format!("\n{}\n\n", "What the product is good for".bold());
    let share = format!("{:.1} %", neighbours.share() * 100.0);
    text += &format!(
        "  named like its nearest neighbour, {} of the digits are right ({} of {})\n",
        share.green().bold(),
        neighbours.right,
        neighbours.images
    );
    if let Some((image, nearest)) = neighbours.wrong {
        text += &format!("  one that is not, and its neighbour:\n\n{}", side_by_side(problem, &[image, nearest], &labels));
    }
    Ok(text)
}

/// Some images beside each other, each with the digit that it shows below.
fn side_by_side(problem: &Problem, images: &[usize], labels: &[u8]) -> String {
    let pixels = problem.shape.k;
    let drawings: Vec<Vec<String>> = images.iter().map(|&image| digits::draw(&problem.a.as_slice()[image * pixels..][..pixels])).collect();
    let mut text = String::new();
    for line in 0..digits::SIDE {
        let parts: Vec<&str> = drawings.iter().map(|drawing| drawing[line].as_str()).collect();
        text += &format!("  {}\n", parts.join("  ").trim_end());
    }
    let names: Vec<String> = images.iter().map(|&image| format!("{:^16}", labels[image])).collect();
    text += &format!("  {}\n", names.join("  ").trim_end());
    text
}
