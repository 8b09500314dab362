//! Tests of the whole, on real memory of a real process. Each runs in a process of its own: the test binary executes itself.
//!
//! Where a page is, they ask the kernel (/proc/self/pagemap), never uhmm.
#![allow(unreachable_pub)] // everything here is of this binary alone
#![allow(unsafe_code)] // raw arguments, mappings, and kernels that follow pointers

mod actors;
mod advice;
mod ahead;
mod any_memory;
mod bad_input;
mod basics;
mod closing;
mod coherent;
mod coherent_races;
mod conformance;
mod contract;
mod dying;
mod evict;
mod failing;
mod faults;
mod flights;
mod halfway;
mod harness;
mod hints;
mod kernel_access;
mod kernel_faults;
mod kernel_futex;
mod leases;
mod lifecycle;
mod mapping_races;
mod mappings;
mod mirror;
mod mirror_looks;
mod mirror_races;
mod modes;
mod nothing_declared;
mod own_memory;
mod peer_drivers;
mod peers;
mod policies;
mod ports;
mod prefetches;
mod profiles;
mod promises;
mod races;
mod raw_fork;
mod scopes;
mod stories;
mod tiny;
mod undeclared;

fn main() {
    let mut tests = vec![];
    tests.extend(advice::TESTS);
    tests.extend(ahead::TESTS);
    tests.extend(basics::TESTS);
    tests.extend(contract::TESTS);
    tests.extend(dying::TESTS);
    tests.extend(evict::TESTS);
    tests.extend(failing::TESTS);
    tests.extend(faults::TESTS);
    tests.extend(halfway::TESTS);
    tests.extend(hints::TESTS);
    tests.extend(kernel_access::TESTS);
    tests.extend(kernel_faults::TESTS);
    tests.extend(kernel_futex::TESTS);
    tests.extend(leases::TESTS);
    tests.extend(scopes::TESTS);
    tests.extend(flights::TESTS);
    tests.extend(bad_input::TESTS);
    tests.extend(lifecycle::TESTS);
    tests.extend(closing::TESTS);
    tests.extend(coherent::TESTS);
    tests.extend(coherent_races::TESTS);
    tests.extend(policies::TESTS);
    tests.extend(ports::TESTS);
    tests.extend(profiles::TESTS);
    tests.extend(promises::TESTS);
    tests.extend(conformance::TESTS);
    tests.extend(mappings::TESTS);
    tests.extend(mirror::TESTS);
    tests.extend(mirror_looks::TESTS);
    tests.extend(mirror_races::TESTS);
    tests.extend(modes::TESTS);
    tests.extend(nothing_declared::TESTS);
    tests.extend(mapping_races::TESTS);
    tests.extend(any_memory::TESTS);
    tests.extend(own_memory::TESTS);
    tests.extend(peer_drivers::TESTS);
    tests.extend(peers::TESTS);
    tests.extend(prefetches::TESTS);
    tests.extend(races::TESTS);
    tests.extend(raw_fork::TESTS);
    tests.extend(stories::TESTS);
    tests.extend(tiny::TESTS);
    tests.extend(undeclared::TESTS);
    harness::run(&tests, modes::LESSER);
}
