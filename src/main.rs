//! The `tidegate` command.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tidegate::cli::{self, Commands, EXIT_INTERNAL, EXIT_USAGE, Failure};
use tidegate::config::{CertSource, Config};
use tidegate::runtime;
use tidegate::transport::selfsigned::{GenerateError, generate};
use tidegate::transport::{ClientTls, ServerTls, TlsError};

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main(&Commands {
        run: &run,
        check: &check,
        certs: &certs,
    })
}

fn run(config: Config, connections: usize) -> Result<(), Failure> {
    let threads = tokio::runtime::Runtime::new()
        .map_err(|e| Failure::new(EXIT_INTERNAL, format!("threads: {e}")))?;
    threads
        .block_on(runtime::run(config, connections))
        .map_err(failed)
}

/// Loads every certificate that a run would load.
fn check(config: &Config) -> Result<(), Failure> {
    let wrong = |place: String| {
        move |error: TlsError| Failure::new(EXIT_USAGE, format!("{place}: {error}"))
    };
    for tls in &config.tls {
        if let CertSource::Files { cert, key } = &tls.source {
            let place = format!("[[tls]] name = \"{}\"", tls.name);
            ServerTls::load(cert, key).map_err(wrong(place))?;
        }
    }
    let tls = &config.upstream.tls;
    if tls.ca.is_some() || tls.cert.is_some() {
        ClientTls::load(
            tls.ca.as_deref(),
            tls.cert.as_deref(),
            tls.key.as_deref(),
            tls.server_name.clone(),
            tls.alpn.clone(),
        )
        .map_err(wrong("[upstream.tls]".to_owned()))?;
    }
    Ok(())
}

fn failed(error: runtime::StartError) -> Failure {
    Failure::new(error.exit_code(), error)
}

fn certs(out: &Path, names: &[String]) -> Result<Vec<PathBuf>, Failure> {
    let made = generate(out, names).map_err(|error| {
        let code = match error {
            GenerateError::Write { .. } => EXIT_INTERNAL,
            _ => EXIT_USAGE,
        };
        Failure::new(code, error)
    })?;
    Ok(vec![made.ca, made.ca_key, made.cert, made.key])
}
