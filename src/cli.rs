//! The command line.

mod check;
mod files;
mod passwd;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::auth::Authenticator;
use crate::config::{Config, LogFormat, Server};
use crate::telemetry;

pub use check::{PlanLine, memory_plan};

/// Usage or configuration is wrong; trying again will not help.
pub const EXIT_USAGE: u8 = 64;
/// Something that should not happen did.
pub const EXIT_INTERNAL: u8 = 70;
/// Something is in the way that may go, such as a port that is taken.
pub const EXIT_TEMPORARY: u8 = 75;

/// A command that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// [`EXIT_USAGE`], [`EXIT_INTERNAL`] or [`EXIT_TEMPORARY`].
    pub code: u8,
    /// What is wrong, and the remedy.
    pub message: String,
}

impl Failure {
    /// A failure with an exit code.
    pub fn new(code: u8, message: impl std::fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
}

/// Makes certificates for names in a directory; answers with the files.
pub type MakeCerts<'a> = dyn Fn(&Path, &[String]) -> Result<Vec<PathBuf>, Failure> + 'a;

/// What a configuration names, as far as it is good.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// A line for each certificate and revocation list, with its date.
    pub certificates: Vec<String>,
    /// What works, and should not stay as it is.
    pub warnings: Vec<String>,
}

/// What the commands do that is not the command line's own work.
pub struct Commands<'a> {
    /// Runs until it is told to end; the number is the cap on connections that
    /// the configuration and the open-file limit allow.
    pub run: &'a dyn Fn(Config, usize) -> Result<(), Failure>,
    /// Looks at what a configuration names, such as certificates.
    pub check: &'a dyn Fn(&Config) -> Result<Findings, Failure>,
    /// `tidegate certs`.
    pub certs: &'a MakeCerts<'a>,
    /// `tidegate probe`: what is seen of the core that a configuration names, as text.
    pub probe: &'a dyn Fn(&Config) -> Result<String, Failure>,
}

/// Lets many phones and browsers connect, break off and come back without
/// their MQTT broker noticing.
#[derive(Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run; without --config on loopback, with an embedded core
    Run {
        /// Configuration file (TOML)
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check a configuration and say what it costs
    Check {
        /// Configuration file (TOML)
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Make a certificate authority and a server certificate
    Certs {
        /// Directory for the files
        #[arg(long, value_name = "DIR", default_value = "certs")]
        out: PathBuf,
        /// Name or address that clients connect to; may be repeated
        #[arg(long = "name", value_name = "NAME", default_values = ["localhost", "127.0.0.1", "::1"])]
        names: Vec<String>,
    },
    /// Say what a core does where brokers differ, and which of its settings to raise
    Probe {
        /// Address of the core, such as mqtt://127.0.0.1:1883; else that of the configuration
        #[arg(value_name = "URL", required_unless_present = "config")]
        server: Option<Server>,
        /// Configuration file (TOML), for credentials, TLS and the probe's topic
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// User name
        #[arg(long, value_name = "NAME")]
        username: Option<String>,
        /// File that holds the password
        #[arg(long, value_name = "FILE", requires = "username")]
        password_file: Option<PathBuf>,
        /// PEM file of trusted roots
        #[arg(long, value_name = "FILE")]
        ca: Option<PathBuf>,
    },
    /// Set a user's password, read from the terminal or standard input
    Passwd {
        /// Password file; made if it is not there
        file: PathBuf,
        /// User name
        user: String,
    },
}

/// Does what the command line says.
pub fn main(commands: &Commands<'_>) -> ExitCode {
    match dispatch(std::env::args_os(), commands) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "{}", failure.message.trim_end());
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(
    arguments: impl IntoIterator<Item = OsString>,
    commands: &Commands<'_>,
) -> Result<(), Failure> {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        // Help and version are no failures, and go to standard output.
        Err(text) if !text.use_stderr() => return print(&text.render().to_string()),
        Err(error) => return Err(Failure::new(EXIT_USAGE, error.render())),
    };
    match cli.command {
        Command::Run { config } => run(config.as_deref(), commands),
        Command::Check { config } => check(config.as_deref(), commands),
        Command::Certs { out, names } => {
            let files = (commands.certs)(&out, &names)?;
            let lines: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
            print(&(lines.join("\n") + "\n"))
        }
        Command::Probe {
            server,
            config,
            username,
            password_file,
            ca,
        } => {
            let mut config = load(config.as_deref())?;
            let upstream = &mut config.upstream;
            upstream.servers = server.map_or_else(|| upstream.servers.clone(), |s| vec![s]);
            upstream.username = username.or(upstream.username.take());
            upstream.password_file = password_file.or(upstream.password_file.take());
            upstream.tls.ca = ca.or(upstream.tls.ca.take());
            print(&(commands.probe)(&config)?)
        }
        Command::Passwd { file, user } => passwd::run(&file, &user),
    }
}

fn run(file: Option<&Path>, commands: &Commands<'_>) -> Result<(), Failure> {
    let config = load(file)?;
    let json = config.log.format == LogFormat::Json;
    telemetry::log::init(&config.log.level, json).map_err(|e| Failure::new(EXIT_USAGE, e))?;
    let cap = files::connection_cap(&config, files::raise());
    if let Some(warning) = &cap.warning {
        tracing::warn!("{warning}");
    }
    (commands.run)(config, cap.connections)
}

fn check(file: Option<&Path>, commands: &Commands<'_>) -> Result<(), Failure> {
    let config = load(file)?;
    Authenticator::new(&config.auth).map_err(|e| Failure::new(EXIT_USAGE, e))?;
    let findings = (commands.check)(&config)?;
    let cap = files::connection_cap(&config, files::raise());
    print(&check::report(&config, &cap, &findings))
}

fn load(file: Option<&Path>) -> Result<Config, Failure> {
    match file {
        Some(path) => Config::load(path).map_err(|e| Failure::new(EXIT_USAGE, e)),
        None => Ok(Config::builtin()),
    }
}

/// Writes to standard output; a reader that went away is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(EXIT_INTERNAL, format!("standard output: {e}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
