//! The load tool; `cargo run --release -p tidegate-kit --bin load -- --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_kit::load::main()
}
