//! What a Debian package needs, directly or not: a breadth-first search on a device, a launch for each level. The graph, the distances and the frontiers stay there; the CPU reads how many
//! nodes a level has found.
//!
//!     cargo run --release -p uhmm --example bfs                  # on soft
//!     cargo run --release -p uhmm --example bfs -- opencl gnome  # the same, in OpenCL C, from another package

use flate2::read::GzDecoder;
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::sync::atomic::Ordering::Relaxed;
use uhmm::{Ctx, Forms, Uhmm, args, inout, inp, out};

const UNSEEN: u32 = u32::MAX;
/// Nodes of a group.
const PART: usize = 64;

/// The form in Rust, for `soft`: several groups may come to the same node, so they share the distances (argument 0), the next frontier (1) and the number of its nodes (2) as atomics.
fn expand(ctx: &Ctx<'_>) {
    let [distance, next, found] = [0, 1, 2].map(|index| ctx.out::<u32>(index).atomic());
    let [frontier, first, to] = [3, 4, 5].map(|index| ctx.inp::<u32>(index));
    let level: u32 = ctx.value(6);
    for &node in frontier.iter().skip(ctx.group() * PART).take(PART) {
        for &node in &to[first[node as usize] as usize..first[node as usize + 1] as usize] {
            if distance[node as usize].compare_exchange(UNSEEN, level, Relaxed, Relaxed).is_ok() {
                next[found[0].fetch_add(1, Relaxed) as usize].store(node, Relaxed);
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The form in OpenCL C, for OpenCL devices: its name, and the work items of a group.
    let kernel = Forms::new(expand).opencl(include_str!("../../cli/src/bfs/bfs.cl"), "bfs", PART);
    let mut words = std::env::args().skip(1);
    let dev = Uhmm::new()?.device(&words.next().unwrap_or("soft".into()))?;
    let start = words.next().unwrap_or("libreoffice".into());

    // A line has a package and all that it depends on. The edges of node v become to[first[v]] up to to[first[v + 1] - 1].
    let file = &include_bytes!("../../cli/data/debian-12-depends.adjlist.gz")[..];
    let (mut numbers, mut lists) = (HashMap::new(), vec![]);
    for line in BufReader::new(GzDecoder::new(file)).lines() {
        let mut number = |name: &str| {
            let new = numbers.len() as u32;
            *numbers.entry(name.to_owned()).or_insert(new)
        };
        lists.push(line?.split('#').next().unwrap_or("").split_whitespace().map(&mut number).collect::<Vec<u32>>());
    }
    lists.sort_by_key(|list| list.first().copied());
    let mut first = vec![0u32; numbers.len() + 1];
    lists.iter().filter(|list| !list.is_empty()).for_each(|list| first[list[0] as usize + 1] += list.len() as u32 - 1);
    (0..numbers.len()).for_each(|node| first[node + 1] += first[node]);
    let to: Vec<u32> = lists.iter().flat_map(|list| list.iter().skip(1)).copied().collect();

    let start = *numbers.get(&start).ok_or(format!("Debian has no package {start}"))?;
    let mut distance = vec![UNSEEN; numbers.len()];
    let (mut frontier, mut next) = (vec![start; numbers.len()], vec![0; numbers.len()]);
    distance[start as usize] = 0;
    let mut size = 1;
    for level in 1u32.. {
        let mut found = [0u32];
        let args = args![inout(&mut distance), out(&mut next), inout(&mut found), inp(&frontier[..size]), inp(&first), inp(&to), level];
        dev.run(&kernel, size.div_ceil(PART), args)?;
        std::mem::swap(&mut frontier, &mut next);
        size = found[0] as usize;
        if size == 0 {
            break;
        }
        println!("{size} packages are {level} steps away");
    }
    let needed = distance.iter().filter(|&&distance| distance != UNSEEN).count() - 1;
    println!("it needs {needed} of {} packages; {} bytes went to the device", numbers.len(), dev.stats().bytes_to_device);
    Ok(())
}
