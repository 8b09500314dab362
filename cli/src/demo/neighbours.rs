//! What the product of the images with their transpose is good for: each is named like the one that is nearest to it.

use crate::mul_mat::{Problem, launch};
use crate::{digits, report};
use anyhow::Result;
use owo_colors::OwoColorize;
use uhmm::Device;

/// Each image named like the one that is nearest to it.
pub(super) struct Neighbours {
    pub(super) images: usize,
    right: usize,
    /// An image that was named wrong, and its neighbour.
    wrong: Option<(usize, usize)>,
}

/// Names every image from the product G of the images with their transpose: the squared distance of two images i and j is
/// G(i, i) + G(j, j) - 2 G(i, j).
pub(super) fn name(device: &Device, problem: &Problem) -> Result<Neighbours> {
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

impl Neighbours {
    pub(super) fn share(&self) -> f64 {
        self.right as f64 / self.images as f64
    }

    pub(super) fn text(&self, problem: &Problem, labels: &[u8]) -> String {
        let share = format!("{:.1} %", self.share() * 100.0);
        let mut text = format!(
            "  named like its nearest neighbour, {} of the digits are right ({} of {})\n",
            share.green().bold(),
            self.right,
            self.images
        );
        if let Some((image, nearest)) = self.wrong {
            text += &format!("  one that is not, and its neighbour:\n\n{}", side_by_side(problem, &[image, nearest], labels));
        }
        text
    }
}

/// Some images beside each other, each with the digit that it shows below.
pub(super) fn side_by_side(problem: &Problem, images: &[usize], labels: &[u8]) -> String {
    let pixels = problem.shape.k;
    let drawings: Vec<Vec<String>> =
        images.iter().map(|&image| digits::draw(&problem.a.as_slice()[image * pixels..][..pixels], digits::SIDE)).collect();
    let mut text = report::beside(&drawings);
    let names: Vec<String> = images.iter().map(|&image| format!("{:^16}", labels[image])).collect();
    text += &format!("  {}\n", names.join("  ").trim_end());
    text
}
