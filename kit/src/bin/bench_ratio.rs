//! Tidegate before mosquitto against mosquitto alone; `scripts/bench.sh` builds and runs it.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_kit::bench::main()
}
