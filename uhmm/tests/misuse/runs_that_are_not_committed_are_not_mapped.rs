//! A device is not asked to map runs that nothing says are valid.
use uhmm_core::driver::{Driver, MapRun};

fn misuse(driver: &dyn Driver, runs: &[MapRun]) {
    let _ = driver.map(runs);
}

fn main() {}
