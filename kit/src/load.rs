//! The load tool: loads of several shapes over every transport, and their cost to the servers.

pub mod args;
pub mod connect;
pub mod crowd;
pub mod drain;
pub mod flap;
pub mod histogram;
pub mod peer;
pub mod report;
pub mod traffic;

use std::process::ExitCode;

use args::{Cli, Common, Load};
use clap::Parser;
use report::Report;
use traffic::Shape;

/// Parses the command line, runs the load and prints its report: the JSON line on standard output,
/// the table on standard error. The exit code is 1 if messages of QoS 1 or 2 were lost or reordered.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    crate::process::raise_open_files();
    let threads = common(&cli.load).threads.max(1);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .expect("a runtime starts on a healthy system");
    let outcome = runtime.block_on(run(&cli.load));
    // Thousands of connections are dropped without DISCONNECT: an orderly end would take too long.
    runtime.shutdown_background();
    match outcome {
        Ok(report) => {
            report.print();
            let clean = common(&cli.load).qos == 0 || sound(&report);
            if clean {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(e) => {
            eprintln!("load: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one load.
///
/// # Errors
/// A connection cannot be made, or a watched process is gone.
pub async fn run(load: &Load) -> std::io::Result<Report> {
    match load {
        Load::Connect(args) => connect::run(args).await,
        Load::FanOut(args) => traffic::run("fan-out", args, Shape::One, (1, Some(500), 0.0)).await,
        Load::FanIn(args) => traffic::run("fan-in", args, Shape::All, (100, Some(1), 0.0)).await,
        Load::Pairs(args) => traffic::run("pairs", args, Shape::Own, (100, None, 0.0)).await,
        Load::Paced(args) => traffic::run("paced", args, Shape::Own, (100, None, 1000.0)).await,
        Load::Flap(args) => flap::run(args).await,
        Load::Drain(args) => drain::run(args).await,
    }
}

fn common(load: &Load) -> &Common {
    match load {
        Load::Connect(args) => &args.common,
        Load::FanOut(args) | Load::FanIn(args) | Load::Pairs(args) | Load::Paced(args) => {
            &args.common
        }
        Load::Flap(args) => &args.common,
        Load::Drain(args) => &args.common,
    }
}

/// Whether nothing was lost, reordered or duplicated without a mark.
fn sound(report: &Report) -> bool {
    let json = report.json();
    let zero = |name: &str| json.get(name).is_none_or(|v| v.as_u64() == Some(0));
    ["lost", "disorder", "duplicates_without_dup"]
        .into_iter()
        .all(zero)
}
