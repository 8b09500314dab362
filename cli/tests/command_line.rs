//! The `uhmm` command from outside: what it prints, and how it ends.
fn main() {}
