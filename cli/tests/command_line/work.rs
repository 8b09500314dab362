//! `uhmm stencil`, `k-means` and `bfs`, on `soft` and, where there is one, on an OpenCL device. UHMM_OPENCL=required makes it a failure that there is none.

use crate::{Outcome, ensure, fails_with, has_keys, json, succeeded, text, uhmm};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use tempfile::TempDir;

/// A test on the device of that name.
type Test = fn(&str) -> Outcome;

const DEVICES: [&str; 2] = ["soft", "opencl"];

/// All trials; `full` says whether this user may handle page faults.
pub(crate) fn trials(full: bool) -> Vec<Trial> {
    let opencl = has_opencl();
    let tests: [(&str, Test); 7] = [
        ("heat_flows_over_the_digits", heat_flows_over_the_digits),
        ("images_of_any_shape", images_of_any_shape),
        ("clusters_of_the_digits", clusters_of_the_digits),
        ("one_round_of_clusters", one_round_of_clusters),
        ("distances_in_debian", distances_in_debian),
        ("distances_in_a_file", distances_in_a_file),
        ("work_is_told_in_words", told_in_words),
    ];
    let mut trials = vec![];
    for device in DEVICES {
        for (name, test) in tests {
            let ignored = !full || (device == "opencl" && !opencl);
            trials.push(Trial::test(format!("{name}_{device}"), move || test(device)).with_ignored_flag(ignored));
        }
    }
    trials.push(Trial::test("bench_of_opencl", super::bench_of_opencl).with_ignored_flag(!full || !opencl));
    trials.push(Trial::test("bad_graphs_are_refused", bad_graphs_are_refused));
    trials.push(Trial::test("bad_images_are_refused", bad_images_are_refused));
    trials.push(Trial::test("more_clusters_than_points_are_refused", || {
        fails_with(&["k-means", "--points", "5", "--clusters", "6"], &["6 clusters of 5 points"])
    }));
    trials
}

/// Whether there is an OpenCL device, or has to be.
fn has_opencl() -> bool {
    let of_opencl = |device: &Value| device["name"].as_str().is_some_and(|name| name.starts_with("opencl"));
    let found = json(&["doctor", "--json"]).is_ok_and(|doctor| doctor["devices"].as_array().is_some_and(|all| all.iter().any(of_opencl)));
    if !found && std::env::var("UHMM_OPENCL").is_ok_and(|value| value == "required") {
        return true;
    }
    if !found {
        eprintln!(
            "tests of OpenCL are ignored: there is no device (for the CPU, on Debian: apt-get install ocl-icd-libopencl1 pocl-opencl-icd)"
        );
    }
    found
}

/// What all three say, with so many launches.
fn check_series(result: &Value, device: &str, launches: Option<u64>) -> Outcome {
    has_keys(result, &["first_s", "later_s", "later_kernel_s", "bytes_to_cpu", "cpu_faults", "device_faults", "plain_s"])?;
    ensure(result["device"].as_str().is_some_and(|name| name.starts_with(device)), || format!("{result}"))?;
    ensure(launches.is_none_or(|launches| result["launches"] == launches), || format!("{launches:?} launches: {result}"))?;
    ensure(result["first_s"].as_f64() > Some(0.0) && result["first_kernel_s"].as_f64() > Some(0.0), || format!("{result}"))
}

/// The data went there once, and were not copied for every launch. (An OpenCL device may use them where they are.)
fn stayed_there(result: &Value, bytes: u64) -> Outcome {
    let moved = result["bytes_to_device"].as_u64().ok_or("no bytes_to_device")?;
    let least = if result["device"] == "soft" { bytes / 2 } else { 0 };
    ensure((least..3 * bytes).contains(&moved), || format!("{bytes} bytes of data, {moved} moved: {result}"))
}

fn heat_flows_over_the_digits(device: &str) -> Outcome {
    let result = json(&["stencil", "--size", "1021", "--steps", "20", "--device", device, "--json"])?;
    check_series(&result, device, Some(20))?;
    ensure(result["width"] == 1021 && result["height"] == 1021, || format!("{result}"))?;
    stayed_there(&result, 1021 * 1021 * 4)
}

fn write_png(path: &Path, width: u32, height: u32, color: png::ColorType, bytes: &[u8]) -> Outcome {
    let mut encoder = png::Encoder::new(File::create(path)?, width, height);
    encoder.set_color(color);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(bytes)?;
    Ok(writer.finish()?)
}

fn read_png(path: &Path) -> Result<((u32, u32), Vec<u8>), Failed> {
    let mut reader = png::Decoder::new(std::io::BufReader::new(File::open(path)?)).read_info()?;
    let mut bytes = vec![0; reader.output_buffer_size().ok_or("too large")?];
    let info = reader.next_frame(&mut bytes)?;
    Ok(((info.width, info.height), bytes))
}

/// Around every width of a vector, and colours; the result is written, and is what a step makes of a single white pixel.
fn images_of_any_shape(device: &str) -> Outcome {
    let folder = TempDir::new()?;
    let [from, to] = ["in.png", "out.png"].map(|name| folder.path().join(name));
    let (from_name, to_name) = (from.to_string_lossy(), to.to_string_lossy());
    for (width, height) in [(1, 1), (1, 9), (7, 3), (8, 1), (9, 2), (17, 5), (2500, 3)] {
        let noise: Vec<u8> = (0..width * height * 3).map(|i| (i * 7919 % 251) as u8).collect();
        write_png(&from, width, height, png::ColorType::Rgb, &noise)?;
        let result = json(&["stencil", &from_name, "-o", &to_name, "--steps", "3", "--device", device, "--json"])?;
        check_series(&result, device, Some(3))?;
        ensure(read_png(&to)?.0 == (width, height), || format!("another size than {width} x {height}"))?;
    }
    let mut one = vec![0; 25];
    one[12] = 255;
    write_png(&from, 5, 5, png::ColorType::Grayscale, &one)?;
    json(&["stencil", &from_name, "-o", &to_name, "--steps", "1", "--device", device, "--json"])?;
    let (_, bytes) = read_png(&to)?;
    let mut want = vec![0; 25];
    want[12] = 51; // a fifth stays, and a fifth goes each way
    [7, 11, 13, 17].into_iter().for_each(|at| want[at] = 51);
    ensure(bytes == want, || format!("{bytes:?}"))?;
    for (to, words) in [("/dev/full", "No space left"), ("/no/such/folder/r.png", "No such file")] {
        let args = ["stencil", &from_name, "--steps", "1", "-o", to, "--device", device];
        fails_with(&args, &[&format!("writing {to}: "), words])?;
    }
    Ok(())
}

fn clusters_of_the_digits(device: &str) -> Outcome {
    for (points, clusters) in [("1797", "10"), ("20000", "30"), ("130", "1"), ("10", "10")] {
        let result = json(&["k-means", "--points", points, "--clusters", clusters, "--device", device, "--json"])?;
        check_series(&result, device, None)?;
        let sizes = result["sizes"].as_array().ok_or("no sizes")?;
        ensure(sizes.len().to_string() == clusters, || format!("{result}"))?;
        ensure(sizes.iter().filter_map(Value::as_u64).sum::<u64>().to_string() == points, || format!("{result}"))?;
        // Ten clusters find four digits of five by themselves, and thirty more; one names a tenth.
        let least = if clusters == "1" { 0.09 } else { 0.75 };
        ensure(result["settled"] == true && result["share_named"].as_f64() > Some(least), || format!("{result}"))?;
        if points == "20000" {
            stayed_there(&result, 20_000 * 64 * 4)?;
        }
    }
    Ok(())
}

/// One round is enough for the check, and says that it was not the last.
fn one_round_of_clusters(device: &str) -> Outcome {
    let result = json(&["k-means", "--points", "3000", "--clusters", "29", "--rounds", "1", "--device", device, "--json"])?;
    check_series(&result, device, Some(1))?;
    ensure(result["settled"] == false && result["later_s"].is_null(), || format!("{result}"))
}

/// The numbers are those that a dozen lines of Python count in the file.
fn distances_in_debian(device: &str) -> Outcome {
    let result = json(&["bfs", "--device", device, "--json"])?;
    check_series(&result, device, Some(14))?;
    ensure(result["nodes"] == 98_417 && result["edges"] == 319_502 && result["reverse"] == true, || format!("{result}"))?;
    let levels = json!([1, 21810, 17674, 12139, 5997, 967, 1364, 421, 1158, 127, 191, 112, 154, 11]);
    ensure(result["levels"] == levels && result["start"] == "libc6", || format!("{result}"))?;
    ensure(result["farthest"].as_array().is_some_and(|way| way.len() == 14 && way[0] == "libc6"), || format!("{result}"))?;
    stayed_there(&result, 4 * (98_417 * 2 + 319_502))?;
    let result = json(&["bfs", "--from", "gnome", "--device", device, "--json"])?;
    let levels = json!([1, 37, 295, 504, 366, 629, 265, 83, 49, 8, 20, 35, 52, 89, 46, 20, 5]);
    ensure(result["levels"] == levels && result["reverse"] == false, || format!("{result}"))
}

/// A tree whose root has a thousand children, each with three: a node that a whole group expands, beside many small ones; and a node that nothing leads to.
fn distances_in_a_file(device: &str) -> Outcome {
    let folder = TempDir::new()?;
    let path = folder.path().join("tree.txt");
    let mut lines = String::from("# a tree\nroot");
    (0..1000).for_each(|i| lines += &format!(" c{i}"));
    lines += "\nelsewhere root\n";
    (0..1000).for_each(|i| lines += &format!("c{i} c{i}a c{i}b root c{i}a\n"));
    fs::write(&path, lines)?;
    let name = path.to_string_lossy();
    let result = json(&["bfs", &name, "--device", device, "--json"])?;
    check_series(&result, device, Some(3))?;
    ensure(result["levels"] == json!([1, 1000, 2000]) && result["start"] == "root" && result["nodes"] == 3002, || format!("{result}"))?;
    let result = json(&["bfs", &name, "--from", "c7b", "--reverse", "--device", device, "--json"])?;
    // Backwards: its parent, the root, and then all that leads there.
    ensure(result["levels"] == json!([1, 1, 1, 1000]), || format!("{result}"))?;
    ensure(result["farthest"].as_array().is_some_and(|way| way.len() == 4 && way[2] == "root"), || format!("{result}"))
}

fn told_in_words(device: &str) -> Outcome {
    let told: [(&[&str], &[&str]); 3] = [
        (&["stencil", "--size", "200", "--steps", "2"], &["200 x 200 pixels", "██", "2 launches", "every pixel is what plain loops"]),
        (
            &["k-means", "--points", "1797"],
            &["10 clusters", "until no label changed", "██", "79.0 %", "labels and centroids are those of plain loops"],
        ),
        (
            &["bfs"],
            &["From libc6", "319502 edges", "62126 nodes are reached", "libc6, ", "14 launches", "every distance is that of a queue"],
        ),
    ];
    for (args, words) in told {
        let output = uhmm(args).args(["--device", device]).output()?;
        succeeded(&output)?;
        let out = text(&output.stdout);
        for word in words.iter().chain(&["to the device and", "CPU faults", "copies around every launch"]) {
            ensure(out.contains(word), || format!("{word:?} is not in: {out}"))?;
        }
    }
    Ok(())
}

fn bad_graphs_are_refused() -> Outcome {
    let bundled = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("data/debian-12-depends.adjlist.gz"))?;
    let mut damaged = bundled.clone();
    damaged[bundled.len() / 2] ^= 0x55;
    let folder = TempDir::new()?;
    let path = folder.path().join("graph");
    let name = path.to_string_lossy();
    let cases: [(&[u8], &[&str]); 8] = [
        (&bundled[..bundled.len() - 5], &["cut short"]),
        (&bundled[..bundled.len() / 2], &["cut short"]),
        (&damaged, &["damaged"]),
        (b"a b c\nd e", &["cut short", "last line"]),
        (b"\x89PNG\r\n\x1a\n\0\0", &["not a graph"]),
        (b"a b\n\xff\xfe c\n", &["not a graph", "byte 4"]),
        (b"# nothing\n\n", &["no nodes"]),
        (b"", &["empty"]),
    ];
    for (bytes, words) in cases {
        fs::write(&path, bytes)?;
        let words: Vec<&str> = ["graph: "].iter().chain(words).copied().collect();
        fails_with(&["bfs", &name], &words)?;
    }
    fs::write(&path, "a b\n")?;
    fails_with(&["bfs", &name, "--from", "z"], &["no node z", "2", "is a"])?;
    fails_with(&["bfs", "--from", "no-such-package"], &["no node no-such-package", "98417"])?;
    fs::remove_file(&path)?;
    fails_with(&["bfs", &name], &["graph: No such file"])?;
    fails_with(&["bfs", &folder.path().to_string_lossy()], &["not a regular file"])
}

fn bad_images_are_refused() -> Outcome {
    let folder = TempDir::new()?;
    let path = folder.path().join("image.png");
    let name = path.to_string_lossy();
    write_png(&path, 40, 40, png::ColorType::Grayscale, &[7; 1600])?;
    let good = fs::read(&path)?;
    let cases: [(&[u8], &[&str]); 4] = [
        (&good[..good.len() / 2], &["cut short"]),
        (&good[..20], &["cut short"]),
        (b"P5 3 3 255 no PNG at all", &["not a PNG file"]),
        (b"", &["empty"]),
    ];
    for (bytes, words) in cases {
        fs::write(&path, bytes)?;
        let words: Vec<&str> = ["image.png: "].iter().chain(words).copied().collect();
        fails_with(&["stencil", &name], &words)?;
    }
    fs::remove_file(&path)?;
    fails_with(&["stencil", &name], &["image.png: No such file"])?;
    fails_with(&["stencil", &folder.path().to_string_lossy()], &["not a regular file"])
}
