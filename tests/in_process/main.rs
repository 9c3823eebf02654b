//! Modules of the library over loopback or in virtual time, within this process.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests spawn tasks and print"
)]

mod embedded;
mod transport;
