//! What is leased outlives its lease.
use uhmm::{Device, Lease, args, inp};

fn misuse<'a>(dev: &'a Device) -> Lease<'a> {
    let data = vec![1u32; 100];
    dev.acquire(args![inp(&data)]).unwrap()
}

fn main() {}
