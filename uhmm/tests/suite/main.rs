//! Tests of the whole, on real memory of a real process. Each runs in a process of its own: the test binary executes itself.
//!
//! Where a page is, they ask the kernel (/proc/self/pagemap), never uhmm.
#![allow(unreachable_pub)] // everything here is of this binary alone
#![allow(unsafe_code)] // raw arguments, mappings, and kernels that follow pointers

#[allow(clippy::undocumented_unsafe_blocks)] // these do on purpose what callers must not, and do not say each time why it is sound
mod actors;
#[allow(clippy::undocumented_unsafe_blocks)]
mod any_memory;
#[allow(clippy::undocumented_unsafe_blocks)]
mod bad_input;
mod basics;
#[allow(clippy::undocumented_unsafe_blocks)]
mod closing;
#[allow(clippy::undocumented_unsafe_blocks)]
mod coherent;
#[allow(clippy::undocumented_unsafe_blocks)]
mod coherent_races;
mod conformance;
#[allow(clippy::undocumented_unsafe_blocks)]
mod dying;
#[allow(clippy::undocumented_unsafe_blocks)]
mod evict;
#[allow(clippy::undocumented_unsafe_blocks)]
mod faults;
mod harness;
#[allow(clippy::undocumented_unsafe_blocks)]
mod kernel_access;
#[allow(clippy::undocumented_unsafe_blocks)]
mod kernel_faults;
mod kernel_futex;
#[allow(clippy::undocumented_unsafe_blocks)]
mod lifecycle;
#[allow(clippy::undocumented_unsafe_blocks)]
mod mapping_races;
#[allow(clippy::undocumented_unsafe_blocks)]
mod mappings;
#[allow(clippy::undocumented_unsafe_blocks)]
mod modes;
#[allow(clippy::undocumented_unsafe_blocks)]
mod nothing_declared;
#[allow(clippy::undocumented_unsafe_blocks)]
mod own_memory;
#[allow(clippy::undocumented_unsafe_blocks)]
mod profiles;
#[allow(clippy::undocumented_unsafe_blocks)]
mod races;
#[allow(clippy::undocumented_unsafe_blocks)]
mod raw_fork;
#[allow(clippy::undocumented_unsafe_blocks)]
mod stories;
#[allow(clippy::undocumented_unsafe_blocks)]
mod undeclared;

fn main() {
    let mut tests = vec![];
    tests.extend(basics::TESTS);
    tests.extend(dying::TESTS);
    tests.extend(evict::TESTS);
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
    tests.extend(undeclared::TESTS);
    harness::run(&tests, modes::LESSER);
}
