//! uhmm's memory safety rests on what a driver does: who writes one says so.
use uhmm_core::driver::Driver;

#[derive(Debug)]
struct Mine;

impl Driver for Mine {}

fn main() {}
