//! A device stays open as long as something is leased on it.
use uhmm::{Device, args, inp};

fn misuse(dev: Device, data: &[u32]) {
    let lease = dev.acquire(args![inp(data)]).unwrap();
    drop(dev);
    drop(lease);
}

fn main() {}
