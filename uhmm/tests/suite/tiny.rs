//! The driver of the example is a driver: it passes every check, in every mode.

#[path = "../../examples/tiny_driver.rs"]
pub mod driver;

use uhmm_core::conformance::{CHECKS, Subject};
use uhmm_core::mode::Mode;
use uhmm_core::{CoreRef, DeviceConfig, OpenDriver};

crate::tests![it_passes_every_check, without_replayable_faults_as_well];

/// What holds only where data may stay on a device.
const STAYS: &[&str] = &["an_unchanged_relaunch_moves_nothing", "prefetch_and_evict", "bytes_and_pages_add_up"];

fn passes(config: DeviceConfig, open: OpenDriver) {
    let core = CoreRef::get().unwrap();
    let dev = core.device(config, open).unwrap();
    for check in CHECKS.iter().filter(|check| core.mode() == Mode::Full || !STAYS.contains(&check.name)) {
        println!("{}", check.name);
        (check.run)(&mut Subject::new(&dev));
    }
}

fn it_passes_every_check() {
    passes(DeviceConfig { memory: 16 << 20, ..DeviceConfig::new("tiny") }, driver::open);
}

fn without_replayable_faults_as_well() {
    passes(DeviceConfig { memory: 16 << 20, replayable_faults: false, ..DeviceConfig::new("tiny") }, driver::open);
}
