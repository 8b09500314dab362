//! `uhmm k-means`: clusters of handwritten digits, round after round on a device. The points and their labels stay there; between two rounds the CPU looks at the sums of the groups.

pub(crate) mod kernel;
pub(crate) mod points;

use crate::series::{Measured, Series};
use crate::{digits, options, report};
use anyhow::{Result, ensure};
use kernel::{Centroids, DIM, Round, Shape, launch};
use owo_colors::OwoColorize;
use points::points;
use serde::Serialize;
use std::time::Instant;
use uhmm::{Device, Uhmm};

/// Runs the command.
pub(crate) fn run(args: &options::KMeans, json: bool) -> Result<()> {
    let (count, clusters) = (args.points as usize, args.clusters as usize);
    ensure!(clusters <= count, "{clusters} clusters of {count} points: there must be a point for each");
    let points = points(count)?;
    let hmm = Uhmm::new()?;
    let device = hmm.device(&args.device)?;
    let shape = Shape::new(count, clusters, device.threads());
    let found = cluster(&device, shape, &points, args.rounds as usize)?;
    let start = Instant::now();
    check(&found, &plain(shape, &points, args.rounds as usize))?;
    let plain_s = start.elapsed().as_secs_f64();
    let named = Named::of(&found, clusters)?;
    if json {
        let Found { settled, measured, .. } = found;
        let (sizes, share_named) = (named.sizes, named.share);
        return report::print_json(&Json {
            device: device.name(),
            points: count,
            clusters,
            settled,
            sizes,
            share_named,
            measured,
            plain_s,
        });
    }
    report::print(&text(&device, shape, &found, &named, plain_s))
}

/// The JSON object: times in seconds.
#[derive(Serialize)]
struct Json<'a> {
    device: &'a str,
    points: usize,
    clusters: usize,
    /// Whether the last round has changed nothing.
    settled: bool,
    /// The points of each cluster.
    sizes: Vec<usize>,
    /// How much of the points show the digit that is the most frequent in their cluster.
    share_named: f64,
    #[serde(flatten)]
    measured: Measured,
    /// The same by plain loops on one thread of the CPU.
    plain_s: f64,
}

/// What the rounds have come to.
struct Found {
    labels: Vec<u8>,
    centroids: Centroids,
    settled: bool,
    measured: Measured,
}

/// The first centroids: points that are chosen at random, the same ones every time.
fn chosen(shape: Shape) -> Vec<usize> {
    fastrand::Rng::with_seed(1).choose_multiple(0..shape.points, shape.clusters)
}

/// Rounds on the device until no label changes, or there were enough.
fn cluster(device: &Device, shape: Shape, points: &[f32], most: usize) -> Result<Found> {
    let mut centroids = Centroids::of_points(chosen(shape).into_iter().map(|i| &points[i * DIM..][..DIM]));
    let mut round = Round::new(shape);
    let mut series = Series::new(device, most);
    // The labels both ways, everything else one way.
    let bytes =
        size_of_val(points) + 2 * round.labels.len() + size_of_val(&round.sums[..]) + size_of_val(&round.counts[..]) + centroids.bytes();
    let mut settled = false;
    for _ in 0..most {
        series.launch(bytes, || launch(device, shape, &mut round, points, &centroids))?;
        centroids.update(shape, &round);
        settled = round.changed(shape) == 0;
        if settled {
            break;
        }
    }
    let labels = round.labels.to_vec(); // every label is read, and comes home
    Ok(Found { labels, centroids, settled, measured: series.end() })
}

/// The same by plain loops over whole numbers: the labels, the centroids in sixteenths, and how many rounds it took.
fn plain(shape: Shape, points: &[f32], most: usize) -> (Vec<u8>, Vec<[i64; DIM]>, usize) {
    let points: Vec<[i64; DIM]> = points.as_chunks::<DIM>().0.iter().map(|point| point.map(|x| 16 * x as i64)).collect();
    let mut centroids: Vec<[i64; DIM]> = chosen(shape).into_iter().map(|i| points[i]).collect();
    let mut labels = vec![u8::MAX; points.len()];
    for round in 1..=most {
        let before = labels.clone();
        let mut sums = vec![([0i64; DIM], 0i64); shape.clusters];
        for (label, point) in labels.iter_mut().zip(&points) {
            let distance = |c: &[i64; DIM]| point.iter().zip(c).map(|(x, c)| (x - c) * (x - c)).sum::<i64>();
            let nearest = (0..shape.clusters).min_by_key(|&j| distance(&centroids[j])).unwrap_or(0);
            *label = nearest as u8;
            sums[nearest].0.iter_mut().zip(point).for_each(|(sum, x)| *sum += x);
            sums[nearest].1 += 1;
        }
        for (c, (sum, count)) in centroids.iter_mut().zip(&sums).filter(|(_, (_, count))| *count > 0) {
            *c = sum.map(|sum| (sum as f64 / *count as f64).round() as i64);
        }
        if labels == before {
            return (labels, centroids, round);
        }
    }
    (labels, centroids, most)
}

/// Nothing is rounded but the means, so everything has to be equal.
fn check(found: &Found, (labels, centroids, rounds): &(Vec<u8>, Vec<[i64; DIM]>, usize)) -> Result<()> {
    let measured = found.measured.launches;
    ensure!(measured == *rounds, "wrong clusters: the device needed {measured} rounds, plain loops {rounds}");
    for (i, (got, want)) in found.labels.iter().zip(labels).enumerate() {
        ensure!(got == want, "wrong clusters: point {i} is in cluster {got} on the device, in {want} by plain loops");
    }
    for (i, (got, &want)) in found.centroids.all.iter().zip(centroids.as_flattened()).enumerate() {
        let (j, pixel) = (i / DIM, i % DIM);
        ensure!(
            f64::from(*got) * 16.0 == want as f64,
            "wrong clusters: pixel {pixel} of centroid {j} is {got} on the device, {} by plain loops",
            want as f64 / 16.0
        );
    }
    Ok(())
}

/// The clusters and the digits that they are.
struct Named {
    sizes: Vec<usize>,
    /// The most frequent digit of each cluster; 0 in one without points.
    digits: Vec<usize>,
    /// How much of all points show that of their cluster.
    share: f64,
}

impl Named {
    fn of(found: &Found, clusters: usize) -> Result<Named> {
        let names = digits::labels()?;
        let mut counts = vec![[0usize; 10]; clusters];
        for (&label, &name) in found.labels.iter().zip(names.iter().cycle()) {
            counts[usize::from(label)][usize::from(name)] += 1;
        }
        let most = |counts: &[usize; 10]| (0..10).rev().max_by_key(|&digit| counts[digit]).unwrap_or(0);
        let right: usize = counts.iter().map(|counts| counts[most(counts)]).sum();
        Ok(Named {
            sizes: counts.iter().map(|counts| counts.iter().sum()).collect(),
            digits: counts.iter().map(most).collect(),
            share: right as f64 / found.labels.len() as f64,
        })
    }
}

fn text(device: &Device, shape: Shape, found: &Found, named: &Named, plain_s: f64) -> String {
    let title = format!("{} clusters", shape.clusters);
    let end = if found.settled { "until no label changed" } else { "and labels still change" };
    let mut text = format!(
        "{} of {} handwritten digits on {}: {} rounds, {end}\n\n",
        title.bold(),
        shape.points,
        device.name(),
        found.measured.launches
    );
    let drawings: Vec<Vec<String>> = found.centroids.all.chunks(DIM).map(|centroid| digits::draw(centroid, digits::SIDE)).collect();
    for (drawings, first) in drawings.chunks(ACROSS).zip((0..).step_by(ACROSS)) {
        text += &report::beside(drawings);
        let names = (first..first + drawings.len()).map(|j| format!("{:^16}", format!("{}, {} points", named.digits[j], named.sizes[j])));
        text += &format!("  {}\n\n", names.collect::<Vec<_>>().join("  ").trim_end());
    }
    text += &found.measured.text();
    let share = format!("{:.1} %", named.share * 100.0);
    text += &format!("  {share} of the points show the digit that is the most frequent in their cluster\n");
    text += &format!("  labels and centroids are those of plain loops on the CPU, in {}\n", report::time(plain_s));
    text
}

/// Drawings in a line.
const ACROSS: usize = 5;
