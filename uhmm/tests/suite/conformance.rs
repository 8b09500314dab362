//! Every device of this build does what every device must. And the checks themselves are checked: the device that does nothing fails all that
//! look at data, and passes the others.

use std::panic::{AssertUnwindSafe, catch_unwind};
use uhmm_core::conformance::{CHECKS, Named, Subject, rust_form};
use uhmm_core::mode::Mode;
use uhmm_core::{CoreRef, DeviceConfig, DeviceRef, OpenDriver};

crate::tests![soft, soft_with_little_memory_and_one_thread, soft_without_replayable_faults, soft_coherent, null, forms_of_a_drivers_own];

fn open(config: DeviceConfig, driver: OpenDriver) -> DeviceRef {
    CoreRef::get().unwrap().device(config, driver).unwrap()
}

/// The names of the checks that failed.
pub fn failed(subject: &mut Subject<'_>, skip: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut failed = vec![];
    for check in CHECKS.iter().filter(|check| !skip(check.name)) {
        // Said before, so that it is known which one hangs.
        println!("{}", check.name);
        if catch_unwind(AssertUnwindSafe(|| (check.run)(subject))).is_err() {
            failed.push(check.name);
        }
    }
    failed
}

/// What holds only where data may stay on a device.
pub const STAYS: &[&str] = &["an_unchanged_relaunch_moves_nothing", "prefetch_and_evict", "bytes_and_pages_add_up"];

fn passes(config: DeviceConfig) {
    let dev = open(config, uhmm_soft::open);
    let lesser = CoreRef::get().unwrap().mode() != Mode::Full;
    let mut subject = Subject::new(&dev);
    assert_eq!(failed(&mut subject, |name| lesser && STAYS.contains(&name)), Vec::<&str>::new());
    // Random operations again, otherwise.
    subject.seed = std::process::id().into();
    subject.steps = 1000;
    println!("seed {}", subject.seed);
    assert_eq!(failed(&mut subject, |name| !name.starts_with("random")), Vec::<&str>::new());
}

fn soft() {
    passes(DeviceConfig { memory: 16 << 20, threads: 2, ..DeviceConfig::new("soft") });
}

fn soft_with_little_memory_and_one_thread() {
    passes(DeviceConfig { memory: 8 << 20, threads: 1, ..DeviceConfig::new("soft") });
}

fn soft_without_replayable_faults() {
    passes(DeviceConfig { memory: 16 << 20, threads: 2, replayable_faults: false, ..DeviceConfig::new("soft") });
}

fn soft_coherent() {
    passes(DeviceConfig { memory: 16 << 20, threads: 2, coherent: true, ..DeviceConfig::new("soft") });
}

fn null() {
    let dev = open(DeviceConfig::new("null"), uhmm_null::open);
    let expected: Vec<&str> = CHECKS.iter().filter(|check| check.data).map(|check| check.name).collect();
    assert_eq!(failed(&mut Subject::new(&dev), |_| false), expected, "a device that runs nothing fails the checks of data, and only those");
    assert!(expected.len() > 15 && CHECKS.len() - expected.len() > 5);
}

/// A driver may bring its own forms of the kernels, and leave out the one that fails; a form that does something else is found.
fn forms_of_a_drivers_own() {
    let dev = open(DeviceConfig { memory: 8 << 20, threads: 2, ..DeviceConfig::new("soft") }, uhmm_soft::open);
    let few = |name: &str| !name.starts_with("two_ranges") && !name.starts_with("a_failing");
    let forms = |kernel| (kernel != Named::Fail).then(|| rust_form(kernel));
    assert_eq!(failed(&mut Subject::new(&dev).with_forms(&forms), few), Vec::<&str>::new());
    let wrong = |kernel| Some(rust_form(if kernel == Named::AddOne { Named::Copy } else { kernel }));
    assert_eq!(
        failed(&mut Subject::new(&dev).with_forms(&wrong), few),
        ["two_ranges_share_a_page", "a_failing_kernel_leaves_bytes_as_before_or_as_written"]
    );
}
