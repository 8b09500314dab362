//! `uhmm bfs`: a breadth-first search on a device, a launch for each level. Graph, distances and frontiers stay there; between two levels the CPU looks at one number.

mod graph;
mod kernel;

use crate::series::{Measured, Series};
use crate::{options, report};
use anyhow::{Result, ensure};
use graph::Graph;
use kernel::{Search, UNSEEN};
use owo_colors::OwoColorize;
use serde::Serialize;
use std::collections::VecDeque;
use std::time::Instant;
use uhmm::{Device, Uhmm};

/// Where the search begins if nobody says it: at what nearly all packages need, against the edges.
const START: &str = "libc6";

/// Runs the command.
pub(crate) fn run(args: &options::Bfs, json: bool) -> Result<()> {
    let graph = match &args.graph {
        Some(path) => Graph::open(path)?,
        None => Graph::debian()?,
    };
    let by_default = args.graph.is_none() && args.from.is_none();
    let start = match &args.from {
        Some(name) => graph.node(name)?,
        None if by_default => graph.node(START)?,
        None => 0,
    };
    let reverse = args.reverse || by_default;
    let graph = if reverse { graph.reversed() } else { graph };
    let hmm = Uhmm::new()?;
    let device = hmm.device(&args.device)?;
    let found = search(&device, &graph, start)?;
    let clock = Instant::now();
    let want = plain(&graph, start);
    let plain_s = clock.elapsed().as_secs_f64();
    check(&graph, &found.distance, &want)?;
    let facts = Facts {
        device: device.name(),
        nodes: graph.names.len(),
        edges: graph.to.len(),
        start: &graph.names[start as usize],
        reverse,
        levels: levels(&found.distance),
        farthest: path(&graph, start, &found.distance).into_iter().map(|node| &*graph.names[node as usize]).collect(),
        measured: found.measured,
        plain_s,
    };
    if json { report::print_json(&facts) } else { report::print(&facts.text()) }
}

/// The JSON object: times in seconds.
#[derive(Serialize)]
struct Facts<'a> {
    device: &'a str,
    nodes: usize,
    edges: usize,
    start: &'a str,
    reverse: bool,
    /// How many nodes are 0, 1, 2 ... edges from the start.
    levels: Vec<usize>,
    /// A shortest way to a node that is as far away as any.
    farthest: Vec<&'a str>,
    #[serde(flatten)]
    measured: Measured,
    /// The same by a queue on one thread of the CPU.
    plain_s: f64,
}

impl Facts<'_> {
    fn text(&self) -> String {
        let edges = if self.reverse { "edges that are followed backwards" } else { "edges" };
        let title = format!("From {}", self.start);
        let mut text = format!("{} through {} nodes and {} {edges}, on {}\n\n", title.bold(), self.nodes, self.edges, self.device);
        let mut rows = vec![["edges from it", "nodes"].map(str::to_owned).to_vec()];
        rows.extend(self.levels.iter().enumerate().map(|(level, nodes)| vec![level.to_string(), nodes.to_string()]));
        text += &report::table(&rows);
        text += &format!(
            "\n  {} nodes are reached; one of the farthest:\n  {}\n\n",
            self.levels.iter().sum::<usize>(),
            self.farthest.join(", ")
        );
        text += &self.measured.text();
        text += &format!("  every distance is that of a queue on the CPU, in {}\n", report::time(self.plain_s));
        text
    }
}

struct Found {
    distance: Vec<u32>,
    measured: Measured,
}

/// Level after level on the device, until one reaches nothing.
fn search(device: &Device, graph: &Graph, start: u32) -> Result<Found> {
    let nodes = graph.names.len();
    let mut search = Search::new(nodes, start);
    let mut series = Series::new(device, 64);
    while search.size > 0 {
        // Distances and the counter both ways, the rest one way.
        let numbers = 2 * (nodes + 1) + nodes + search.size + graph.first.len() + graph.to.len();
        series.launch(numbers * size_of::<u32>(), || search.step(device, graph))?;
    }
    let distance = search.distance.to_vec(); // every distance is read, and comes home
    Ok(Found { distance, measured: series.end() })
}

/// The same by a queue.
fn plain(graph: &Graph, start: u32) -> Vec<u32> {
    let mut distance = vec![UNSEEN; graph.names.len()];
    distance[start as usize] = 0;
    let mut queue = VecDeque::from([start]);
    while let Some(node) = queue.pop_front() {
        for &to in graph.neighbours(node) {
            if distance[to as usize] == UNSEEN {
                distance[to as usize] = distance[node as usize] + 1;
                queue.push_back(to);
            }
        }
    }
    distance
}

/// Whole numbers: all equal.
fn check(graph: &Graph, got: &[u32], want: &[u32]) -> Result<()> {
    let say = |distance: u32| if distance == UNSEEN { "not reached".to_owned() } else { format!("{distance} edges away") };
    for (node, (&got, &want)) in got.iter().zip(want).enumerate() {
        ensure!(got == want, "wrong distance: {} is {} on the device, {} by a queue", graph.names[node], say(got), say(want));
    }
    Ok(())
}

/// How many nodes have each distance.
fn levels(distance: &[u32]) -> Vec<usize> {
    let mut levels = vec![];
    for &distance in distance.iter().filter(|&&distance| distance != UNSEEN) {
        let at = distance as usize;
        levels.resize(levels.len().max(at + 1), 0);
        levels[at] += 1;
    }
    levels
}

/// A shortest way from the start to a node that is as far away as any: the first of them.
fn path(graph: &Graph, start: u32, distance: &[u32]) -> Vec<u32> {
    let reached = (0..distance.len() as u32).filter(|&node| distance[node as usize] != UNSEEN);
    let mut way = vec![reached.rev().max_by_key(|&node| distance[node as usize]).unwrap_or(start)];
    while let Some(&last) = way.last().filter(|&&last| last != start) {
        let before =
            |&node: &u32| distance[node as usize].checked_add(1) == Some(distance[last as usize]) && graph.neighbours(node).contains(&last);
        let Some(node) = (0..distance.len() as u32).find(before) else { break };
        way.push(node);
    }
    way.reverse();
    way
}
