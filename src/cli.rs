//! The command line: arguments, exit codes, and the question for a password.

mod passwd;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, Server};

pub use passwd::set_password;

/// Exit code for wrong usage or a wrong configuration: trying again will not help.
pub const EXIT_USAGE: u8 = 64;
/// Exit code for an error that should not happen.
pub const EXIT_INTERNAL: u8 = 70;
/// Exit code for a cause that may pass, such as a port in use.
pub const EXIT_TEMPORARY: u8 = 75;

/// Why a command did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// [`EXIT_USAGE`], [`EXIT_INTERNAL`] or [`EXIT_TEMPORARY`].
    pub code: u8,
    /// The problem and its remedy.
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

/// Lets many phones and browsers connect, break off and come back without
/// their MQTT broker noticing.
#[derive(Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// A command with its arguments.
// The comments on variants and fields are the help texts.
#[derive(Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Run; without --config on loopback, with an embedded broker
    Run {
        /// Configuration file (TOML)
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check a configuration and print the memory that it may use
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
    /// Show how a broker behaves where brokers differ, and which of its settings to raise
    Probe(ProbeArgs),
    /// Look at the store of a node that is not running
    #[command(subcommand)]
    Store(StoreCommand),
    /// Set a user's password, read from the terminal or standard input
    Passwd {
        /// Password file; made if there is none
        file: PathBuf,
        /// User name
        user: String,
    },
}

/// The commands of `tidegate store`.
// The comments on variants and fields are the help texts.
#[derive(Debug, PartialEq, Eq, Subcommand)]
pub enum StoreCommand {
    /// Read the log, change nothing, and name each damaged record
    Check {
        /// The node's data directory (node.data_dir)
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

/// The arguments of `tidegate probe`.
#[derive(Args, Debug, PartialEq, Eq)]
pub struct ProbeArgs {
    /// Address of the broker, such as mqtt://127.0.0.1:1883. Default: that of the configuration
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
}

impl ProbeArgs {
    /// The named configuration, with the other arguments in place of its values.
    ///
    /// # Errors
    /// As [`load`].
    pub fn config(self) -> Result<Config, Failure> {
        let mut config = load(self.config.as_deref())?;
        let upstream = &mut config.upstream;
        if let Some(server) = self.server {
            upstream.servers = vec![server];
        }
        upstream.username = self.username.or(upstream.username.take());
        upstream.password_file = self.password_file.or(upstream.password_file.take());
        upstream.tls.ca = self.ca.or(upstream.tls.ca.take());
        Ok(config)
    }
}

/// The command that the arguments name; `None` when they asked for help or the version, which then
/// has been printed.
///
/// # Errors
/// [`EXIT_USAGE`] with clap's explanation.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Command>, Failure> {
    match Cli::try_parse_from(arguments) {
        Ok(cli) => Ok(Some(cli.command)),
        Err(text) if !text.use_stderr() => print(&text.render().to_string()).map(|()| None),
        Err(error) => Err(Failure::new(EXIT_USAGE, error.render())),
    }
}

/// Reads a configuration file; without one, the built-in configuration.
///
/// # Errors
/// [`EXIT_USAGE`] with all mistakes in the file.
pub fn load(file: Option<&Path>) -> Result<Config, Failure> {
    match file {
        Some(path) => Config::load(path).map_err(|e| Failure::new(EXIT_USAGE, e)),
        None => Ok(Config::builtin()),
    }
}

/// Writes to standard output. A reader that went away is not a failure.
///
/// # Errors
/// [`EXIT_INTERNAL`] when the text cannot be written.
pub fn print(text: &str) -> Result<(), Failure> {
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
