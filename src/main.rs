//! The `tidegate` command.

use std::path::Path;
use std::process::ExitCode;

use tidegate::cli::{self, Commands, EXIT_INTERNAL, EXIT_USAGE, Failure, Findings};
use tidegate::config::Config;
use tidegate::runtime;
use tidegate::transport::selfsigned;

#[cfg(feature = "mimalloc")]
use mimalloc::MiMalloc as Allocator;
#[cfg(not(feature = "mimalloc"))]
use std::alloc::System as Allocator;

#[cfg(not(feature = "heap-metric"))]
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

#[cfg(feature = "heap-metric")]
#[global_allocator]
static ALLOCATOR: cap::Cap<Allocator> = cap::Cap::new(Allocator, usize::MAX);

fn main() -> ExitCode {
    cli::main(&Commands {
        run: &run,
        check: &check,
        certs: &certs,
        probe: &probe,
    })
}

fn run(config: Config, connections: usize) -> Result<(), Failure> {
    #[cfg(feature = "heap-metric")]
    tidegate::telemetry::count_heap(|| ALLOCATOR.allocated());
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("tidegate")
        .build()
        .map_err(|e| Failure::new(EXIT_INTERNAL, format!("threads cannot be started: {e}")))?;
    let result = tokio
        .block_on(runtime::run(config, connections))
        .map_err(|e| Failure::new(e.exit_code(), e));
    // What did not end within the grace is not waited for.
    tokio.shutdown_background();
    result
}

fn check(config: &Config) -> Result<Findings, Failure> {
    let checked = runtime::check(config).map_err(|e| Failure::new(e.exit_code(), e))?;
    Ok(Findings {
        certificates: checked.certificates,
        warnings: checked.warnings,
    })
}

fn probe(config: &Config) -> Result<String, Failure> {
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(EXIT_INTERNAL, format!("no runtime: {e}")))?;
    tokio
        .block_on(runtime::probe(config))
        .map_err(|e| Failure::new(e.exit_code(), e))
}

fn certs(out: &Path, names: &[String]) -> Result<Vec<std::path::PathBuf>, Failure> {
    let made = selfsigned::generate(out, names).map_err(|e| Failure::new(EXIT_USAGE, e))?;
    Ok(vec![made.ca, made.ca_key, made.cert, made.key])
}
