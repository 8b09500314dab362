//! Graphs, read from adjacency lists.
//!
//! A file is text, as it is or compressed with gzip. A line has a node and, behind it, the nodes that edges lead to from it, with white space between them; what follows a `#` is a comment.
//! networkx.read_adjlist reads the same, and so do others. A file is checked whole before any of it is used.

use crate::npy;
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Debian's packages and what they depend on. Source and licence: the file NOTICE.
static DEBIAN: &[u8] = include_bytes!("../../data/debian-12-depends.adjlist.gz");

/// A graph with names, whose edges have a direction.
#[derive(Debug)]
pub(crate) struct Graph {
    /// The nodes' names, in the order in which the file has them.
    pub(crate) names: Vec<String>,
    /// For each node where in `to` its edges begin; and the number of all edges.
    pub(crate) first: Vec<u32>,
    /// Where the edges lead, node by node.
    pub(crate) to: Vec<u32>,
}

impl Graph {
    /// The graph that comes with the program.
    pub(crate) fn debian() -> Result<Graph> {
        Self::parse(DEBIAN)
    }

    /// Reads a file.
    pub(crate) fn open(path: &Path) -> Result<Graph> {
        Self::read(path).with_context(|| format!("{}", path.display()))
    }

    fn read(path: &Path) -> Result<Graph> {
        let mut bytes = vec![];
        npy::open_file(path)?.read_to_end(&mut bytes)?;
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Graph> {
        let mut unpacked = vec![];
        let bytes = if bytes.starts_with(&[0x1f, 0x8b]) {
            flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut unpacked).map_err(explain)?;
            &unpacked
        } else {
            bytes
        };
        let no_text = bytes.iter().position(|byte| byte.is_ascii_control() && !byte.is_ascii_whitespace());
        let text = match (core::str::from_utf8(bytes), no_text) {
            (Ok(text), None) => text,
            (Err(error), None) => bail!("not a graph: byte {} is no text, and a list of edges is", error.valid_up_to()),
            (_, Some(at)) => bail!("not a graph: byte {at} is no text, and a list of edges is"),
        };
        ensure!(text.is_empty() || text.ends_with('\n'), "the file is cut short: its last line does not end");
        Self::of_lines(text.lines())
    }

    fn of_lines<'t>(lines: impl Iterator<Item = &'t str>) -> Result<Graph> {
        let mut numbers = HashMap::new();
        let mut edges = vec![];
        let mut node = |name: &'t str| {
            let next = numbers.len();
            *numbers.entry(name).or_insert(next)
        };
        for line in lines {
            let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
            let Some(from) = words.next().map(&mut node) else { continue };
            edges.extend(words.map(|to| (from, node(to))));
        }
        ensure!(!numbers.is_empty(), "the graph has no nodes");
        ensure!(
            numbers.len().max(edges.len()) < u32::MAX as usize,
            "the graph is too large: at most {} nodes and edges are supported",
            u32::MAX - 1
        );
        let mut names = vec![String::new(); numbers.len()];
        numbers.into_iter().for_each(|(name, number)| names[number] = name.to_owned());
        let (first, to) = by_node(names.len(), || edges.iter().map(|&(from, to)| (from as u32, to as u32)));
        Ok(Graph { names, first, to })
    }

    /// The same nodes, with all edges turned round.
    pub(crate) fn reversed(self) -> Graph {
        let (first, to) = by_node(self.names.len(), || self.edges().map(|(from, to)| (to, from)));
        Graph { names: self.names, first, to }
    }

    /// All edges: from where, to where.
    fn edges(&self) -> impl Iterator<Item = (u32, u32)> {
        (0..self.names.len() as u32).flat_map(|from| self.neighbours(from).iter().map(move |&to| (from, to)))
    }

    /// Where the edges of a node lead.
    pub(crate) fn neighbours(&self, node: u32) -> &[u32] {
        &self.to[self.first[node as usize] as usize..self.first[node as usize + 1] as usize]
    }

    /// The node of that name.
    pub(crate) fn node(&self, name: &str) -> Result<u32> {
        let found = self.names.iter().position(|known| known == name);
        let found = found.with_context(|| format!("the graph has no node {name}; one of its {} is {}", self.names.len(), self.names[0]))?;
        Ok(found as u32)
    }
}

/// The edges one node after the other: where each node's begin, and where they lead.
fn by_node<I: Iterator<Item = (u32, u32)>>(nodes: usize, edges: impl Fn() -> I) -> (Vec<u32>, Vec<u32>) {
    let mut first = vec![0u32; nodes + 1];
    edges().for_each(|(from, _)| first[from as usize + 1] += 1);
    for node in 0..nodes {
        first[node + 1] += first[node];
    }
    let mut free = first.clone();
    let mut all = vec![0; first[nodes] as usize];
    for (from, to) in edges() {
        let at = &mut free[from as usize];
        all[*at as usize] = to;
        *at += 1;
    }
    (first, all)
}

/// What is wrong with a compressed file.
fn explain(error: std::io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::UnexpectedEof => anyhow::anyhow!("the file is cut short"),
        _ => anyhow::anyhow!("the file is damaged: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_edges_are_those_of_the_lines() {
        let graph = Graph::parse(b"# two\nb a  c # and d\n\na\nc a\n").unwrap();
        assert_eq!((graph.names.join(""), &graph.first[..], &graph.to[..]), ("bac".into(), &[0, 2, 2, 3][..], &[1, 2, 1][..]));
        let back = graph.reversed();
        assert_eq!((&back.first[..], &back.to[..]), (&[0, 0, 2, 3][..], &[0, 2, 0][..]));
        assert_eq!(back.reversed().to, [1, 2, 1]);
    }

    /// As networkx has it.
    #[test]
    fn the_bundled_graph_is_whole() {
        let graph = Graph::debian().unwrap();
        assert_eq!((graph.names.len(), graph.to.len()), (98_417, 319_502));
        let zoo = graph.neighbours(graph.node("mail-transport-agent").unwrap());
        assert!(zoo.iter().any(|&node| graph.names[node as usize] == "exim4-daemon-light"));
    }
}
