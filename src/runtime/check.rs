//! `tidegate check`: looks at everything that a configuration names, without opening a port.

use std::time::SystemTime;

use crate::config::Config;
use crate::topics::overlaps;

use crate::runtime::certificates::Certificates;
use crate::runtime::dates::Near;
use crate::runtime::error::StartError;
use crate::runtime::report::Findings;
use crate::runtime::{convert, loops, open_files, permissions, report};

/// Reads all files that the configuration names, as a start does, and reports listeners,
/// certificates, access rights and memory as text for a person.
///
/// # Errors
/// The error with which a start would fail.
pub fn check(config: &Config) -> Result<String, StartError> {
    convert::authenticator(config)?;
    let certificates = Certificates::load(config)?;
    validate_files(config)?;
    let findings = findings(config, &certificates);
    let cap = open_files::connection_cap(config, open_files::raise());
    Ok(report::report(config, &cap, &findings))
}

fn findings(config: &Config, certificates: &Certificates) -> Findings {
    let now = SystemTime::now();
    let mut findings = Findings::default();
    for dated in certificates.dated() {
        let (tls, what, place) = (&dated.tls, dated.what, dated.place());
        let line = format!("{tls:<16} {what} until {}, {place}", dated.until());
        findings.certificates.push(line);
        if dated.near(now) != Near::Far {
            let warning = format!("[[tls]] \"{tls}\": {place}: {}", dated.describe(now));
            findings.warnings.push(warning);
        }
    }
    for tls in config.tls.iter().filter(|tls| tls.key_log.is_some()) {
        findings.warnings.push(format!(
            "[[tls]] \"{}\": key_log is on: whoever has that file can read all connections",
            tls.name
        ));
    }
    findings.warnings.extend(permissions::warnings(config));
    findings
}

/// Reads the files of the upstream side, and compares its roots.
///
/// # Errors
/// [`StartError::Config`] with the key.
pub(super) fn validate_files(config: &Config) -> Result<(), StartError> {
    convert::client_tls(config)?;
    loops::refuse(config)?;
    validate_roots(config)?;
    config
        .upstream
        .read_password()
        .map_err(|e| StartError::Config(format!("upstream.password_file: {e}")))?;
    Ok(())
}

/// Roots must not overlap: each message arrives through one of them.
fn validate_roots(config: &Config) -> Result<(), StartError> {
    let roots = &config.upstream.roots;
    for (n, root) in roots.iter().enumerate() {
        if let Some(other) = roots[..n].iter().find(|other| overlaps(other, root)) {
            return Err(StartError::Config(format!(
                "upstream.roots[{n}]: {root:?} overlaps {other:?}; write the wider of them, or disjoint ones"
            )));
        }
    }
    Ok(())
}
