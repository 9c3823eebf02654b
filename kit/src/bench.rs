//! The comparison of Tidegate before mosquitto with mosquitto alone: the same load on both in turn,
//! and the medians of the ratios, written as markdown.

mod broker_side;
mod lab;
mod memory;
mod ratios;
mod transports;
mod upstream_idle;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lab::Lab;

/// Compares Tidegate before mosquitto with mosquitto alone and appends the figures to a file.
#[derive(Debug, Clone, Parser)]
pub struct Args {
    /// The release build of tidegate; by default the one beside this program
    #[arg(long)]
    pub tidegate: Option<PathBuf>,
    /// The release build of the load tool; by default the one beside this program
    #[arg(long)]
    pub load: Option<PathBuf>,
    /// File to which the figures are appended; by default they are only printed
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// Rounds of each comparison, A and B in turn
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Seconds measured in each round
    #[arg(long, default_value_t = 6.0)]
    pub seconds: f64,
    /// Connections and sessions of the memory figures
    #[arg(long, default_value_t = 5000)]
    pub connections: usize,
    /// Runs only these: fan-out-0, fan-out-1, pairs, paced, upstream-idle, memory-ws, memory-wss,
    /// memory-quic, memory-tcp, memory-tls, memory-webtransport, sessions, filters, fairness,
    /// handshakes, deliveries, resume; repeat
    #[arg(long)]
    pub only: Vec<String>,
    /// Adds a profile and a count of system calls to the ratios (needs perf and strace)
    #[arg(long)]
    pub profile: bool,
}

/// Runs the comparisons.
pub fn main() -> ExitCode {
    let args = Args::parse();
    crate::process::raise_open_files();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> io::Result<()> {
    let mut lab = Lab::new(args)?;
    type Bench = fn(&mut Lab) -> io::Result<()>;
    let all: [(&str, Bench); 17] = [
        ("fan-out-0", |lab| ratios::fan_out(lab, 0, 0.25)),
        ("fan-out-1", |lab| ratios::fan_out(lab, 1, 0.20)),
        ("pairs", ratios::pairs),
        ("paced", ratios::paced),
        ("upstream-idle", upstream_idle::upstream_idle),
        ("memory-ws", |lab| {
            memory::connections(lab, "ws", (8192.0, 4096.0))
        }),
        ("memory-wss", |lab| {
            memory::connections(lab, "wss", (16_384.0, 10_240.0))
        }),
        ("memory-quic", |lab| {
            memory::connections(lab, "quic", (36_864.0, 30_720.0))
        }),
        ("memory-tcp", |lab| {
            memory::connections(lab, "tcp", (8192.0, 4096.0))
        }),
        ("memory-tls", |lab| {
            memory::connections(lab, "tls", (16_384.0, 10_240.0))
        }),
        ("memory-webtransport", |lab| {
            memory::connections(lab, "webtransport", (49_152.0, 36_864.0))
        }),
        ("sessions", memory::sessions),
        ("filters", broker_side::filters),
        ("fairness", broker_side::fairness),
        ("handshakes", transports::handshakes),
        ("deliveries", transports::deliveries),
        ("resume", transports::resume),
    ];
    for name in &args.only {
        if !all.iter().any(|(have, _)| have == name) {
            return Err(io::Error::other(format!("there is no bench {name}")));
        }
    }
    lab.say(&lab.heading());
    for (name, bench) in all {
        if args.only.is_empty() || args.only.iter().any(|only| only == name) {
            eprintln!("# {name}");
            bench(&mut lab).map_err(|e| io::Error::other(format!("{name}: {e}")))?;
        }
    }
    let text = lab.text();
    match &args.output {
        None => print!("{text}"),
        Some(path) => {
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)?;
            file.write_all(text.as_bytes())?;
            eprintln!("appended to {}", path.display());
        }
    }
    Ok(())
}
