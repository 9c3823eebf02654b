//! Files that every user of the machine may read or change, although they decide who may connect.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::config::{CertSource, Config};

const READABLE_BY_ALL: u32 = 0o004;
const WRITABLE_BY_ALL: u32 = 0o002;

/// A warning for each file with permissions that are too wide. A file that cannot be looked at is left
/// out: reading it fails with a better error.
pub(super) fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut look = |key: &str, file: Option<&Path>, unwanted: u32| {
        let Some(file) = file else {
            return;
        };
        let mode = std::fs::metadata(file).map_or(0, |meta| meta.permissions().mode());
        let (what, right) = match mode & unwanted {
            0 => return,
            READABLE_BY_ALL => ("read", "r"),
            WRITABLE_BY_ALL => ("change", "w"),
            _ => ("read and change", "rw"),
        };
        let file = file.display();
        warnings.push(format!(
            "{key}: every user of this machine may {what} {file}: chmod o-{right} {file}"
        ));
    };
    let secret = READABLE_BY_ALL | WRITABLE_BY_ALL;
    look(
        "the configuration",
        config.source.as_deref(),
        WRITABLE_BY_ALL,
    );
    for tls in &config.tls {
        let key = |key: &str| format!("[[tls]] \"{}\" {key}", tls.name);
        if let CertSource::Files { cert, key: file } = &tls.source {
            look(&key("cert"), Some(cert), WRITABLE_BY_ALL);
            look(&key("key"), Some(file), secret);
        }
        if let Some(clients) = &tls.clients {
            look(&key("client_ca"), Some(&clients.ca), WRITABLE_BY_ALL);
            for file in &clients.crl {
                look(&key("crl"), Some(file), WRITABLE_BY_ALL);
            }
        }
        look(&key("key_log"), tls.key_log.as_deref(), secret);
    }
    let (upstream, tls) = (&config.upstream, &config.upstream.tls);
    let password = upstream.password_file.as_deref();
    look("auth.file", config.auth.file.as_deref(), secret);
    look("upstream.password_file", password, secret);
    look("upstream.tls.key", tls.key.as_deref(), secret);
    look("upstream.tls.cert", tls.cert.as_deref(), WRITABLE_BY_ALL);
    look("upstream.tls.ca", tls.ca.as_deref(), WRITABLE_BY_ALL);
    warnings
}

/// Logs them.
pub(super) fn warn(config: &Config) {
    for warning in warnings(config) {
        tracing::warn!("{warning}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    #[test]
    fn files_that_all_may_read_or_change_are_named() {
        let dir = std::env::temp_dir().join(format!("tidegate-modes-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("made");
        let file = dir.join("passwd");
        fs::write(&file, "").expect("written");
        let mut config = Config::builtin();
        config.auth.file = Some(file.clone());
        config.upstream.tls.ca = Some(file.clone());
        for (mode, secret, public) in [
            (0o600, None, None),
            (0o660, None, None),
            (0o640, None, None),
            (0o644, Some("may read "), None),
            (0o602, Some("may change "), Some("may change ")),
            (0o666, Some("may read and change "), Some("may change ")),
        ] {
            fs::set_permissions(&file, Permissions::from_mode(mode)).expect("set");
            let found = warnings(&config);
            for (key, expected) in [("auth.file", secret), ("upstream.tls.ca", public)] {
                let warning = found.iter().find(|w| w.starts_with(key));
                assert_eq!(warning.is_some(), expected.is_some(), "{mode:o} {found:?}");
                let said = warning.zip(expected).is_none_or(|(w, e)| w.contains(e));
                assert!(said, "{mode:o} {found:?}");
            }
        }
        fs::remove_dir_all(&dir).expect("removed");
    }
}
