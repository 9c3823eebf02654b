//! The load tool; `cargo run --release --example load -- --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_kit::load::main()
}
