//! Tests of the whole, on real memory of a real process. Each runs in a process of its own: the test binary executes itself.
//!
//! Where a page is, they ask the kernel (/proc/self/pagemap), never uhmm.
#![allow(unreachable_pub)] // everything here is of this binary alone
#![allow(unsafe_code)] // raw arguments, mappings, and kernels that follow pointers

mod actors;
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
mod harness;
mod kernel_access;
mod kernel_faults;
mod kernel_futex;
mod lifecycle;
mod mapping_races;
mod mappings;
mod modes;
mod nothing_declared;
mod own_memory;
mod profiles;
mod races;
mod raw_fork;
mod stories;
mod tiny;
mod undeclared;

fn main() {
    let mut tests = vec![];
    tests.extend(ahead::TESTS);
    tests.extend(basics::TESTS);
    tests.extend(contract::TESTS);
    tests.extend(dying::TESTS);
    tests.extend(evict::TESTS);
    tests.extend(failing::TESTS);
    tests.extend(faults::TESTS);
    tests.extend(kernel_access::TESTS);
    tests.extend(kernel_faults::TESTS);
    tests.extend(kernel_futex::TESTS);
    tests.extend(bad_input::TESTS);
    tests.extend(lifecycle::TESTS);
    tests.extend(closing::TESTS);
    tests.extend(coherent::TESTS);
    tests.extend(coherent_races::TESTS);
    tests.extend(profiles::TESTS);
    tests.extend(conformance::TESTS);
    tests.extend(mappings::TESTS);
    tests.extend(modes::TESTS);
    tests.extend(nothing_declared::TESTS);
    tests.extend(mapping_races::TESTS);
    tests.extend(any_memory::TESTS);
    tests.extend(own_memory::TESTS);
    tests.extend(races::TESTS);
    tests.extend(raw_fork::TESTS);
    tests.extend(stories::TESTS);
    tests.extend(tiny::TESTS);
    tests.extend(undeclared::TESTS);
    harness::run(&tests, modes::LESSER);
}
