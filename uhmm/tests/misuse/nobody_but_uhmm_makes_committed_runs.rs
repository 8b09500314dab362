//! What a device enters into its page table was copied: the token says so, and nobody else can make one.
use uhmm_core::driver::{Committed, Driver, MapRun};

fn misuse(driver: &dyn Driver, runs: &[MapRun]) {
    let _ = driver.map(Committed(runs));
}

fn main() {}
