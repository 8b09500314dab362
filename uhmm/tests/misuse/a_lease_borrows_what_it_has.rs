//! What is leased for writing is nobody else's until the lease has ended.
use uhmm::{Device, args, inout};

fn misuse(dev: &Device, mut data: Vec<u32>) {
    let lease = dev.acquire(args![inout(&mut data)]).unwrap();
    data[0] = 1;
    drop(lease);
}

fn main() {}
