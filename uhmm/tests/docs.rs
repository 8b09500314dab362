//! Each public module of the libraries opens with an example, or says where one is (`Examples:`) or why there is none (`No example:`).

use std::path::{Path, PathBuf};

/// The libraries, from the root of the repository.
const CRATES: [&str; 6] = ["uhmm", "uhmm-core", "uhmm-os", "drivers/soft", "drivers/null", "drivers/faulty"];

/// Whether documentation, one line each, has code that is compiled, or one of the two sentences.
fn is_shown<'a>(doc: impl IntoIterator<Item = &'a str>) -> bool {
    let mut inside = false;
    doc.into_iter().map(str::trim).any(|line| match line.strip_prefix("```") {
        Some(kind) => {
            inside = !inside;
            inside && !kind.split(',').any(|word| ["text", "ignore", "compile_fail"].contains(&word.trim()))
        }
        None => !inside && ["Examples: ", "No example: "].iter().any(|start| line.starts_with(start)),
    })
}

/// The `//!` lines at the start of a file.
fn header(source: &str) -> Vec<&str> {
    let start = source.lines().skip_while(|line| line.is_empty() || line.starts_with("#!["));
    start.map_while(|line| line.strip_prefix("//!")).collect()
}

/// The `///` lines above line number `at`, attributes between them left out.
fn above<'a>(lines: &[&'a str], at: usize) -> Vec<&'a str> {
    let back = lines[..at].iter().rev().map(|line| line.trim_start());
    let near = back.take_while(|line| line.starts_with("///") || line.starts_with("#["));
    let mut doc: Vec<_> = near.filter_map(|line| line.strip_prefix("///")).collect();
    doc.reverse();
    doc
}

/// Looks at a module's file and at the public modules in it; their names go to `seen`, and of those that show nothing to `bare`.
fn walk(file: &Path, folder: &Path, name: &str, doc_above: &[&str], seen: &mut Vec<String>, bare: &mut Vec<String>) {
    let source = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    seen.push(name.to_owned());
    if !is_shown(doc_above.iter().copied().chain(header(&source))) {
        bare.push(name.to_owned());
    }
    let lines: Vec<_> = source.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let Some(rest) = line.strip_prefix("pub mod ") else { continue };
        let inner = rest.trim_end_matches([' ', '{', '}', ';']);
        let (inner_name, doc) = (format!("{name}::{inner}"), above(&lines, at));
        if rest.ends_with(';') {
            let beside = folder.join(format!("{inner}.rs"));
            let file: PathBuf = if beside.exists() { beside } else { folder.join(inner).join("mod.rs") };
            walk(&file, &folder.join(inner), &inner_name, &doc, seen, bare);
        } else {
            seen.push(inner_name.clone());
            let within = lines[at + 1..].iter().map_while(|line| line.trim_start().strip_prefix("//!"));
            if !is_shown(doc.into_iter().chain(within)) {
                bare.push(inner_name);
            }
        }
    }
}

#[test]
fn each_public_module_has_an_example_or_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
    let (mut seen, mut bare) = (vec![], vec![]);
    for name in CRATES {
        let folder = root.join(name).join("src");
        walk(&folder.join("lib.rs"), &folder, name, &[], &mut seen, &mut bare);
    }
    for known in ["uhmm::policy", "uhmm-core::mirror::change", "uhmm-os::signal::hook"] {
        assert!(seen.iter().any(|name| name == known), "{known} was not found: the check does not see all modules, only {seen:?}");
    }
    assert!(
        bare.is_empty(),
        "public modules whose documentation has no example, and no line that begins with \"Examples:\" or \"No example:\": {bare:?}"
    );
}

#[test]
fn what_counts_as_an_example() {
    assert!(is_shown(["What it is.", "", "```", "let a = 1;", "```"]));
    assert!(is_shown([" ```no_run", " ```"]));
    assert!(is_shown([" Examples: see there."]) && is_shown([" No example: it needs a device."]));
    assert!(!is_shown(["What it is."]) && !is_shown(["```text", "Examples: none", "```"]) && !is_shown(["```ignore", "```"]));
}
