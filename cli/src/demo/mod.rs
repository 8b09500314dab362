//! `uhmm demo`: what uhmm is for, for the eye, in a few seconds. Each act is a module: it runs, checks its result, and tells it.

mod list;
mod neighbours;
mod pointer;
mod words;

use crate::mul_mat::{Measured, Problem, Sides, launches, measure};
use crate::{digits, options, report};
use anyhow::Result;
use list::LinkedList;
use neighbours::Neighbours;
use owo_colors::OwoColorize;
use pointer::Pointer;
use serde::Serialize;
use uhmm::Uhmm;
use words::WordCount;

/// Runs the command.
pub(crate) fn run(args: &options::Demo, json: bool) -> Result<()> {
    let hmm = Uhmm::new()?;
    let device = hmm.device(&args.device)?;
    let problem = Problem::new(Sides::digits()?, device.threads())?;
    let acts = Acts {
        pointer: pointer::on_both_sides(&device)?,
        measured: measure(&device, &problem)?,
        neighbours: neighbours::name(&device, &problem)?,
        linked_list: list::follow(&device)?,
        word_count: words::count(&device)?,
    };
    if json { report::print_json(&Json::of(&acts)) } else { report::print(&text(&problem, &acts)?) }
}

/// What the acts have come to.
struct Acts {
    pointer: Pointer,
    measured: Measured,
    neighbours: Neighbours,
    linked_list: LinkedList,
    word_count: WordCount,
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
    linked_list: &'a LinkedList,
    word_count: &'a WordCount,
}

impl<'a> Json<'a> {
    fn of(acts: &'a Acts) -> Self {
        Json {
            device: &acts.measured.device,
            pointer_cpu: acts.pointer.cpu,
            pointer_device: acts.pointer.device,
            explicit_s: acts.measured.explicit.median,
            uhmm_s: acts.measured.uhmm.median,
            named_right: acts.neighbours.share(),
            images: acts.neighbours.images,
            linked_list: &acts.linked_list,
            word_count: &acts.word_count,
        }
    }
}

fn text(problem: &Problem, acts: &Acts) -> Result<String> {
    let labels = digits::labels()?;
    let mut text = format!(
        "{} handwritten digits, {} pixels each, multiplied with each other on the device \"{}\".\n\n",
        acts.neighbours.images, problem.shape.k, acts.measured.device
    );
    text += &neighbours::side_by_side(problem, &[0, 1, 2, 3], &labels);
    let row = |words: [&str; 5]| words.map(str::to_owned).to_vec();
    let to_write = report::table(&[
        row(["", "allocations", "copies there", "copies back", "frees"]),
        row(["explicit", "3", "2", "1", "3"]),
        row(["uhmm", "0", "0", "0", "0"]),
    ]);
    for (title, told) in [
        ("One pointer", acts.pointer.text()),
        ("What the program has to write", to_write),
        ("Three launches", launches(&acts.measured, true)),
        ("What the product is good for", acts.neighbours.text(problem, &labels)),
        ("A linked list, of which nothing is declared", acts.linked_list.text()),
        ("The words of a mapped file", acts.word_count.text()),
    ] {
        text += &format!("\n{}\n\n{told}", title.bold());
    }
    Ok(text)
}
