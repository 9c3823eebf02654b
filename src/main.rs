//! The `tidegate` command.

use std::path::Path;
use std::process::ExitCode;

use tidegate::cli::{
    self, Command, EXIT_INTERNAL, EXIT_TEMPORARY, EXIT_USAGE, Failure, StoreCommand,
};
use tidegate::config::{Config, LogFormat};
use tidegate::runtime::{self, StartError};
use tidegate::store::log::{self, CheckError};
use tidegate::telemetry;
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
    match cli::parse(std::env::args_os()).and_then(execute) {
        Ok(()) => {
            telemetry::log::finish("");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            telemetry::log::finish(&format!("{}\n", failure.message.trim_end()));
            ExitCode::from(failure.code)
        }
    }
}

fn execute(command: Option<Command>) -> Result<(), Failure> {
    match command {
        Some(Command::Run { config }) => run(cli::load(config.as_deref())?),
        Some(Command::Check { config }) => {
            let config = cli::load(config.as_deref())?;
            cli::print(&runtime::check(&config).map_err(failure)?)
        }
        Some(Command::Certs { out, names }) => certs(&out, &names),
        Some(Command::Probe(arguments)) => probe(&arguments.config()?),
        Some(Command::Store(StoreCommand::Check { directory })) => check_store(&directory),
        Some(Command::Passwd { file, user }) => cli::set_password(&file, &user),
        None => Ok(()),
    }
}

fn run(config: Config) -> Result<(), Failure> {
    let json = config.log.format == LogFormat::Json;
    telemetry::log::init(&config.log.level, json).map_err(|e| Failure::new(EXIT_USAGE, e))?;
    runtime::log_panics();
    #[cfg(feature = "heap-metric")]
    telemetry::count_heap(|| ALLOCATOR.allocated());
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("tidegate")
        .build()
        .map_err(|e| Failure::new(EXIT_INTERNAL, format!("threads cannot be started: {e}")))?;
    let result = tokio.block_on(runtime::run(config)).map_err(failure);
    // Tasks that have not ended within the grace period are not waited for.
    tokio.shutdown_background();
    result
}

fn probe(config: &Config) -> Result<(), Failure> {
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(EXIT_INTERNAL, format!("no runtime: {e}")))?;
    let report = tokio.block_on(runtime::probe(config)).map_err(failure)?;
    cli::print(&report)
}

fn certs(out: &Path, names: &[String]) -> Result<(), Failure> {
    let made = selfsigned::generate(out, names).map_err(|e| Failure::new(EXIT_USAGE, e))?;
    let files = [made.ca, made.ca_key, made.cert, made.key];
    let lines: String = files.iter().map(|f| format!("{}\n", f.display())).collect();
    cli::print(&lines)
}

fn check_store(directory: &Path) -> Result<(), Failure> {
    let checked = log::check(&directory.join(log::DIRECTORY));
    match checked {
        Ok(report) => cli::print(&report),
        // The report is the result of the command, damaged or not.
        Err(CheckError::Damaged { report, summary }) => {
            cli::print(&report)?;
            Err(Failure::new(EXIT_INTERNAL, summary))
        }
        Err(error @ CheckError::InUse(_)) => Err(Failure::new(EXIT_TEMPORARY, error)),
        Err(error @ CheckError::NoLog { .. }) => Err(Failure::new(EXIT_USAGE, error)),
        Err(error @ CheckError::Disk { .. }) => Err(Failure::new(EXIT_INTERNAL, error)),
    }
}

fn failure(error: StartError) -> Failure {
    let code = match error {
        StartError::Config(_) => EXIT_USAGE,
        StartError::Temporary(_) => EXIT_TEMPORARY,
        StartError::Internal(_) => EXIT_INTERNAL,
    };
    Failure::new(code, error)
}
