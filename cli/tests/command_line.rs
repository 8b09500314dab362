//! The `uhmm` command from outside: what it prints, and how it ends. What needs the right to handle page faults is reported as
//! ignored where this user has not got it.

#[path = "command_line/work.rs"]
mod work;

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;
use tempfile::TempDir;

type Outcome = Result<(), Failed>;

fn main() {
    let full = json(&["doctor", "--json"]).is_ok_and(|doctor| doctor["mode"] == "full");
    let needs_rights = |name: &str, test: fn() -> Outcome| Trial::test(name, test).with_ignored_flag(!full);
    let mut trials = vec![
        Trial::test("doctor_has_all_keys", doctor_has_all_keys),
        Trial::test("doctor_needs_no_rights", doctor_needs_no_rights),
        Trial::test("one_file_alone_is_a_usage_error", one_file_alone),
        Trial::test("files_that_do_not_fit_are_refused", files_that_do_not_fit),
        Trial::test("infinite_values_are_refused", infinite_values),
        Trial::test("a_pipe_is_no_matrix", a_pipe_is_no_matrix),
        Trial::test("a_closed_pipe_is_no_error", a_closed_pipe),
        Trial::test("no_colours_without_a_terminal", no_colours),
        Trial::test("run_says_what_is_missing", run_says_what_is_missing),
        Trial::test("run_becomes_the_program", run_becomes_the_program),
        Trial::test("run_ends_as_a_shell_without_a_program", run_ends_as_a_shell),
        needs_rights("no_such_device", no_such_device),
        needs_rights("digits_are_exact", digits_are_exact),
        needs_rights("random_matrices", random_matrices),
        needs_rights("files_are_multiplied_and_the_product_written", files_are_multiplied),
        needs_rights("the_product_may_replace_a_side", the_product_may_replace_a_side),
        needs_rights("a_product_that_cannot_be_written", a_product_that_cannot_be_written),
        needs_rights("demo_shows_everything", demo_shows_everything),
        needs_rights("demo_has_all_keys", demo_has_all_keys),
        needs_rights("bench_prints_one_object_a_line", bench_prints_lines),
    ];
    for bad in bad_files() {
        trials.push(Trial::test(format!("bad_file_{}", bad.name), move || bad.is_refused()));
    }
    trials.extend(work::trials(full));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn uhmm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uhmm"));
    command.args(args).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn succeeded(output: &Output) -> Outcome {
    if output.status.success() { Ok(()) } else { Err(format!("{}: {}", output.status, text(&output.stderr)).into()) }
}

/// The one JSON object that a command prints.
fn json(args: &[&str]) -> Result<Value, Failed> {
    let output = uhmm(args).output()?;
    succeeded(&output)?;
    let out = text(&output.stdout);
    ensure(out.lines().count() == 1, || format!("not one line: {out}"))?;
    Ok(serde_json::from_str(&out)?)
}

fn ensure(holds: bool, message: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(message().into()) }
}

fn has_keys(value: &Value, keys: &[&str]) -> Outcome {
    keys.iter().try_for_each(|key| ensure(value.get(key).is_some(), || format!("no {key} in {value}")))
}

/// It must fail with exit status 1 and one line on standard error that has all of `words`.
fn fails_with(args: &[&str], words: &[&str]) -> Outcome {
    let output = uhmm(args).output()?;
    let error = text(&output.stderr);
    ensure(output.status.code() == Some(1), || format!("{}: {error}", output.status))?;
    ensure(output.stdout.is_empty(), || format!("output in spite of the error: {}", text(&output.stdout)))?;
    ensure(error.starts_with("error: ") && error.lines().count() == 1, || format!("not one line with error: {error}"))?;
    words.iter().try_for_each(|word| ensure(error.contains(word), || format!("{word:?} is not in: {error}")))
}

fn check_doctor(doctor: &Value) -> Outcome {
    has_keys(doctor, &["kernel", "mode", "features", "huge_pages", "devices", "missing"])?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure(doctor["kernel"] == release.trim(), || format!("kernel {}", doctor["kernel"]))?;
    for missing in doctor["missing"].as_array().ok_or("missing is no list")? {
        let how = missing["how_to_get"].as_str().unwrap_or_default();
        ensure(!how.is_empty(), || format!("no how_to_get in {missing}"))?;
    }
    Ok(())
}

fn doctor_has_all_keys() -> Outcome {
    check_doctor(&json(&["doctor", "--json"])?)
}

/// As root, the same as nobody: a copy of the program that nobody can reach.
fn doctor_needs_no_rights() -> Outcome {
    let folder = TempDir::new()?;
    let copy = folder.path().join("uhmm");
    // By another process: were it open for writing here while another test forks, it could not be run ("text file busy").
    let copied = Command::new("cp").args([env!("CARGO_BIN_EXE_uhmm").as_ref(), copy.as_os_str()]).status()?;
    ensure(copied.success(), || copied.to_string())?;
    readable_by_all(folder.path())?;
    let mut command = Command::new(&copy);
    if fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0) {
        std::os::unix::process::CommandExt::uid(&mut command, 65534);
    }
    let output = command.args(["doctor", "--json"]).output()?;
    succeeded(&output)?;
    let doctor: Value = serde_json::from_str(&text(&output.stdout))?;
    check_doctor(&doctor)?;
    let missing = doctor["missing"].as_array().map_or(0, Vec::len);
    ensure(doctor["mode"] == "full" || missing > 0, || format!("nothing is said to be missing: {doctor}"))
}

fn readable_by_all(path: &Path) -> Outcome {
    Ok(fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?)
}

fn one_file_alone() -> Outcome {
    let output = uhmm(&["mul-mat", "a.npy"]).output()?;
    ensure(output.status.code() == Some(2), || output.status.to_string())?;
    ensure(text(&output.stderr).starts_with("error: "), || text(&output.stderr))
}

fn a_closed_pipe() -> Outcome {
    let mut child = uhmm(&["doctor"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    succeeded(&output)?;
    ensure(output.stderr.is_empty(), || text(&output.stderr))
}

fn no_colours() -> Outcome {
    let output = uhmm(&["doctor"]).output()?;
    succeeded(&output)?;
    ensure(!output.stdout.contains(&0x1b), || text(&output.stdout))
}

fn no_such_device() -> Outcome {
    fails_with(&["mul-mat", "--device", "abacus"], &["no such device", "abacus", "soft"])
}

const KEYS: &[&str] = &[
    "device",
    "shape",
    "native_s",
    "explicit_s",
    "uhmm_s",
    "kernel_s",
    "ratio",
    "max_rel_error",
    "bytes_to_device",
    "bytes_to_cpu",
    "cpu_faults",
    "device_faults",
    "unchanged",
    "one_row",
];

fn check_mul_mat(result: &Value, shape: [u64; 3]) -> Outcome {
    has_keys(result, KEYS)?;
    for key in ["unchanged", "one_row"] {
        has_keys(&result[key], &["explicit_s", "uhmm_s", "bytes_to_device", "bytes_to_cpu"])?;
    }
    ensure(result["device"] == "soft" && result["shape"] == serde_json::json!(shape), || format!("{result}"))?;
    ensure(result["rounds"].as_u64() >= Some(9), || format!("{} rounds", result["rounds"]))?;
    for key in ["native_s", "explicit_s", "uhmm_s", "kernel_s", "ratio"] {
        ensure(result[key].as_f64().is_some_and(|value| value > 0.0), || format!("{key} is {}", result[key]))?;
    }
    let (kernel, whole) = (result["kernel_s"].as_f64(), result["uhmm_s"].as_f64());
    ensure(kernel <= whole, || format!("the kernel took {kernel:?} of {whole:?}"))?;
    // Nothing changed and nothing read: nothing to move, but for the pages at the ends of the three arrays that hold other data too.
    let edges = Some(3 * 2 * 4096);
    let unchanged = &result["unchanged"];
    ensure(unchanged["bytes_to_device"].as_u64() <= edges && unchanged["bytes_to_cpu"].as_u64() <= edges, || format!("{unchanged}"))
}

fn digits_are_exact() -> Outcome {
    let result = json(&["mul-mat", "--json"])?;
    check_mul_mat(&result, [1797, 64, 1797])?;
    ensure(result["max_rel_error"] == 0.0, || format!("error {}", result["max_rel_error"]))?;
    // All of R came home, and only it (in whole pages); one row of it costs a part of that.
    let (home, row) = (result["bytes_to_cpu"].as_u64(), result["one_row"]["bytes_to_cpu"].as_u64());
    let r = 1797 * 1797 * 4;
    ensure(home >= Some(r / 2) && home <= Some(2 * r), || format!("{home:?} bytes came home, R has {r}"))?;
    ensure(row > Some(0) && row < home, || format!("{row:?} bytes came home for one row, {home:?} for all"))
}

fn random_matrices() -> Outcome {
    let result = json(&["mul-mat", "--size", "100", "--json"])?;
    check_mul_mat(&result, [100, 100, 100])?;
    ensure(result["max_rel_error"].as_f64() < Some(1e-5), || format!("error {}", result["max_rel_error"]))
}

fn files_are_multiplied() -> Outcome {
    let (m, k, n) = (37, 5, 3000);
    let a: Vec<f32> = (0..m * k).map(|i| (i % 7) as f32 - 3.0).collect();
    let b: Vec<f32> = (0..k * n).map(|i| (i % 11) as f32 - 5.0).collect();
    let folder = TempDir::new()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (a_path, b_path, r_path) = (path("a.npy"), path("b.npy"), path("r.npy"));
    fs::write(&a_path, npy("<f4", false, &format!("({m}, {k})"), &a))?;
    fs::write(&b_path, npy("<f4", false, &format!("({k}, {n})"), &b))?;
    let result = json(&["mul-mat", &a_path, &b_path, "-o", &r_path, "--json"])?;
    check_mul_mat(&result, [m as u64, k as u64, n as u64])?;
    let written = fs::read(&r_path)?;
    let data = written.split_at(written.len() - m * n * 4).1;
    ensure(text(&written).contains(&format!("({m}, {n})")), || "the shape is not in the header".into())?;
    for (at, got) in data.as_chunks::<4>().0.iter().enumerate() {
        let want: f32 = (0..k).map(|i| a[at / n * k + i] * b[i * n + at % n]).sum();
        ensure(f32::from_le_bytes(*got) == want, || format!("element {at} is {}, not {want}", f32::from_le_bytes(*got)))?;
    }
    Ok(())
}

/// The product may replace a matrix that is still mapped.
fn the_product_may_replace_a_side() -> Outcome {
    let folder = TempDir::new()?;
    let side: Vec<f32> = (0..300 * 300).map(|i| (i % 5) as f32).collect();
    let [a, b] = write_files(&folder, &npy("<f4", false, "(300, 300)", &side), &npy("<f4", false, "(300, 300)", &side))?;
    let before = fs::read(&b)?;
    json(&["mul-mat", &a, &b, "-o", &b, "--json"])?;
    let after = fs::read(&b)?;
    ensure(after.len() == before.len() && after != before, || "the file was not replaced".into())?;
    ensure(fs::read_dir(folder.path())?.count() == 2, || "a temporary file is left".into())
}

fn a_product_that_cannot_be_written() -> Outcome {
    fails_with(&["mul-mat", "-o", "/nowhere/r.npy"], &["writing /nowhere/r.npy", "No such file"])
}

fn demo_shows_everything() -> Outcome {
    let output = uhmm(&["demo"]).output()?;
    succeeded(&output)?;
    let out = text(&output.stdout);
    for word in [
        "One pointer",
        "allocations",
        "Three launches",
        "nothing changed",
        "nearest neighbour, 98.8 %",
        "██",
        "1000000 boxes",
        "2300160 words",
    ] {
        ensure(out.contains(word), || format!("{word:?} is not in: {out}"))?;
    }
    let pointers: Vec<&str> = out.split_whitespace().filter(|word| word.starts_with("0x")).collect();
    ensure(pointers.len() == 2 && pointers[0] == pointers[1], || format!("pointers {pointers:?}"))
}

fn demo_has_all_keys() -> Outcome {
    let started = Instant::now();
    let demo = json(&["demo", "--json"])?;
    ensure(started.elapsed().as_secs() < 60, || format!("it took {:?}, and should take a few seconds", started.elapsed()))?;
    has_keys(
        &demo,
        &["device", "pointer_cpu", "pointer_device", "explicit_s", "uhmm_s", "named_right", "images", "linked_list", "word_count"],
    )?;
    ensure(demo["pointer_cpu"] == demo["pointer_device"], || format!("{demo}"))?;
    let list = &demo["linked_list"];
    has_keys(list, &["nodes", "seconds", "device_faults", "bytes_to_device"])?;
    // A box of two words takes 32 bytes of the heap. A fault brings a block of 2 MiB of them.
    ensure(list["nodes"] == 1_000_000 && list["seconds"].as_f64() > Some(0.0), || format!("{list}"))?;
    ensure(list["bytes_to_device"].as_u64().is_some_and(|bytes| (31 << 20..80 << 20).contains(&(bytes + (1 << 20)))), || {
        format!("{list}")
    })?;
    ensure(list["device_faults"].as_u64().is_some_and(|faults| (10..1000).contains(&faults)), || format!("{list}"))?;
    let count = &demo["word_count"];
    has_keys(count, &["bytes", "words", "seconds"])?;
    ensure(count["words"] == 20 * 1797 * 64 && count["seconds"].as_f64() > Some(0.0), || format!("{count}"))?;
    ensure(count["bytes"].as_u64() > Some(2 * 20 * 1797 * 64), || format!("{count}"))
}

/// The names of the rows that a bench prints, each of which has all keys.
fn rows(args: &[&str]) -> Result<Vec<String>, Failed> {
    let output = uhmm(&[args, &["--pairs", "1", "--json"]].concat()).output()?;
    succeeded(&output)?;
    let out = text(&output.stdout);
    let mut names = vec![];
    for line in out.lines() {
        let row: Value = serde_json::from_str(line)?;
        has_keys(&row, &["name", "value", "unit", "floor", "ratio", "goal", "met"])?;
        // A difference of two times may be anything, on a machine that does other things meanwhile.
        let least = if row["name"] == "first_launch_4k" { f64::MIN } else { 0.0 };
        ensure(row["value"].as_f64() > Some(least) && row["floor"].as_f64() > Some(least), || line.into())?;
        names.push(row["name"].as_str().unwrap_or_default().to_owned());
    }
    Ok(names)
}

fn has_rows(names: &[String], expected: &[&str]) -> Outcome {
    for name in expected {
        ensure(names.iter().any(|have| have == name), || format!("no row {name} in {names:?}"))?;
    }
    Ok(())
}

fn bench_prints_lines() -> Outcome {
    let names = rows(&["bench", "memory", "--size", "8"])?;
    let expected = [
        "migrate_to_device_2m",
        "migrate_home_2m",
        "migrate_to_device_4k",
        "migrate_home_4k",
        "fault_4k",
        "fault_64k",
        "peer_migrate_2m",
        "first_launch_4k",
    ];
    has_rows(&names, &expected)
}

/// Every program of the bench checks its result, so that this is a test of uhmm on OpenCL as well.
fn bench_of_opencl() -> Outcome {
    let expected = [
        "opencl_mul_mat_1024",
        "opencl_mul_mat_1024_fresh",
        "opencl_mul_mat_1024_kernel",
        "opencl_mul_mat_2048",
        "opencl_vadd_256m",
        "opencl_vadd_256m_fresh",
        "opencl_stencil",
        "opencl_kmeans",
        "opencl_sparse_1pct",
        "opencl_scattered_1pct",
        "opencl_strided",
        "opencl_launch_resident_1m",
        "opencl_launch_resident_1g",
        "opencl_page_awaited",
        "opencl_page_scattered",
        "opencl_page_strided",
        "opencl_page_guarded",
        "opencl_page_run",
    ];
    has_rows(&rows(&["bench", "opencl"])?, &expected)
}

/// The bytes of a .npy file, format 1.0.
fn npy(descr: &str, fortran: bool, shape: &str, data: &[f32]) -> Vec<u8> {
    let order = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

fn write_files(folder: &TempDir, a: &[u8], b: &[u8]) -> std::io::Result<[String; 2]> {
    let paths = ["a.npy", "b.npy"].map(|name| folder.path().join(name));
    fs::write(&paths[0], a)?;
    fs::write(&paths[1], b)?;
    Ok(paths.map(|path: PathBuf| path.to_string_lossy().into_owned()))
}

fn files_that_do_not_fit() -> Outcome {
    let folder = TempDir::new()?;
    let [a, b] = write_files(&folder, &npy("<f4", false, "(2, 3)", &[1.0; 6]), &npy("<f4", false, "(2, 3)", &[1.0; 6]))?;
    fails_with(&["mul-mat", &a, &b], &["do not fit", "A is 2 x 3", "B is 2 x 3"])
}

fn infinite_values() -> Outcome {
    let good = npy("<f4", false, "(1, 1)", &[1.0]);
    for value in [f32::NAN, f32::INFINITY] {
        let folder = TempDir::new()?;
        let [a, b] = write_files(&folder, &npy("<f4", false, "(1, 1)", &[value]), &good)?;
        fails_with(&["mul-mat", &a, &b], &["A holds infinite values or values that are no number"])?;
    }
    let folder = TempDir::new()?;
    let [a, b] = write_files(&folder, &npy("<f4", false, "(1, 1)", &[1e30]), &npy("<f4", false, "(1, 1)", &[1e30]))?;
    fails_with(&["mul-mat", &a, &b], &["can exceed what f32 holds", "scale the matrices down"])
}

/// A pipe that nobody writes to: `mul-mat` waited for its other end.
fn a_pipe_is_no_matrix() -> Outcome {
    let folder = TempDir::new()?;
    let [a, b] = write_files(&folder, &npy("<f4", false, "(1, 1)", &[1.0]), &[])?;
    fs::remove_file(&b)?;
    assert!(Command::new("mkfifo").arg(&b).status()?.success());
    fails_with(&["mul-mat", &a, &b], &["b.npy", "not a regular file"])
}

/// A left matrix that must be refused, in a file `a.npy`.
struct BadFile {
    name: &'static str,
    bytes: Vec<u8>,
    /// The length that the file is given afterwards, with a hole at its end.
    length: Option<u64>,
    words: &'static [&'static str],
}

impl BadFile {
    fn is_refused(&self) -> Outcome {
        let folder = TempDir::new()?;
        let path = folder.path().join("a.npy");
        let mut file = fs::File::create(&path)?;
        file.write_all(&self.bytes)?;
        if let Some(length) = self.length {
            file.set_len(length)?;
        }
        let other = folder.path().join("b.npy");
        fs::write(&other, npy("<f4", false, "(2, 2)", &[1.0; 4]))?;
        let words: Vec<&str> = ["a.npy"].iter().chain(self.words).copied().collect();
        fails_with(&["mul-mat", &path.to_string_lossy(), &other.to_string_lossy()], &words)
    }
}

fn bad_files() -> Vec<BadFile> {
    let bad = |name, bytes, words| BadFile { name, bytes, length: None, words };
    let good = || npy("<f4", false, "(2, 2)", &[1.0; 4]);
    let with = |descr, shape| npy(descr, false, shape, &[1.0; 4]);
    let mut cut = good();
    cut.truncate(cut.len() - 3);
    let mut cut_header = good();
    cut_header.truncate(30);
    let mut longer = good();
    longer.push(0);
    let mut no_dictionary = good();
    no_dictionary[10] = b'[';
    let large = with("<f4", "(4294967296, 1)");
    let large_length = Some(large.len() as u64 - 16 + 4 * 4_294_967_296);
    vec![
        bad("f64", with("<f8", "(1, 2)"), &["type", "<f8", "astype('<f4')"]),
        bad("i32", with("<i4", "(2, 2)"), &["type", "<i4", "astype('<f4')"]),
        bad("big_endian", with(">f4", "(2, 2)"), &["big-endian", "astype('<f4')"]),
        bad("fortran_order", npy("<f4", true, "(2, 2)", &[1.0; 4]), &["Fortran order", "ascontiguousarray"]),
        bad("one_dimension", with("<f4", "(4,)"), &["1 dimensions", "reshape"]),
        bad("three_dimensions", with("<f4", "(1, 2, 2)"), &["3 dimensions", "reshape"]),
        bad("no_rows", npy("<f4", false, "(0, 2)", &[]), &["0 rows", "at least 1"]),
        bad("cut_short", cut, &["cut short", "3 bytes"]),
        bad("cut_in_its_header", cut_header, &["cut short", "header"]),
        bad("trailing_data", longer, &["1 bytes follow the last element"]),
        bad("no_npy", b"PK\x03\x04 something else".to_vec(), &["not a .npy file"]),
        bad("empty", vec![], &["empty"]),
        bad("damaged_header", no_dictionary, &["header cannot be read"]),
        bad("overflow", with("<f4", "(1099511627776, 1099511627776)"), &["too large"]),
        BadFile { name: "beyond_u32", bytes: large, length: large_length, words: &["4294967296 rows", "4294967295"] },
    ]
}

/// The command alone in a folder, as if its library had not been built.
fn alone(folder: &TempDir) -> std::io::Result<Command> {
    let command = folder.path().join("uhmm");
    // By another process: a descriptor that is open for writing here could be inherited by what another test just starts, and the file is busy (ETXTBSY) as long as that has it.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_uhmm")).arg(&command).status()?;
    if !copied.success() {
        return Err(std::io::Error::other(format!("cp: {copied}")));
    }
    let mut command = Command::new(command);
    command.stdin(Stdio::null()).env_remove("LD_PRELOAD");
    Ok(command)
}

fn run_says_what_is_missing() -> Outcome {
    let output = alone(&TempDir::new()?)?.args(["run", "--dmirror", "--", "true"]).output()?;
    let said = text(&output.stderr);
    if output.status.code() == Some(1) && said.contains("cargo build --release -p uhmm-dmirror") { Ok(()) } else { Err(said.into()) }
}

fn run_becomes_the_program() -> Outcome {
    let folder = TempDir::new()?;
    let library = folder.path().join("libuhmm_dmirror.so");
    fs::write(&library, "")?; // the loader warns of it, and goes on
    let output = alone(&folder)?.args(["run", "--dmirror", "--", "sh", "-c", "echo $LD_PRELOAD; exit 7"]).output()?;
    let said = text(&output.stdout);
    if output.status.code() == Some(7) && said.trim() == library.to_string_lossy() { Ok(()) } else { Err(said.into()) }
}

/// The status 1 was the program's own as well as that of a program that is not there.
fn run_ends_as_a_shell() -> Outcome {
    let folder = TempDir::new()?;
    fs::write(folder.path().join("libuhmm_dmirror.so"), "")?;
    let text_file = folder.path().join("text");
    fs::write(&text_file, "no program")?;
    for (program, status) in [("uhmm-no-such-program", 127), ("/no/such/program", 127), (&text_file.to_string_lossy(), 126), ("/", 126)] {
        let output = alone(&folder)?.args(["run", "--dmirror", "--", program]).output()?;
        let said = text(&output.stderr);
        let told = said.starts_with(&format!("error: cannot run {program}: ")) && said.lines().count() == 1;
        ensure(output.status.code() == Some(status) && told, || format!("{program}: {}: {said}", output.status))?;
    }
    Ok(())
}
