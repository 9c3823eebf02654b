//! The open-file limit, and the number of connections that it allows.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::{Config, Setting, Transport};

/// Files kept free for listeners, links, the admin side and the runtime.
const OTHER_FILES: u64 = 192;

/// The cap on connections.
pub(super) struct Cap {
    pub connections: usize,
    /// Why it is lower than configured, and the remedy.
    pub warning: Option<String>,
    /// Why it is lower than the default, which nobody asked for.
    pub note: Option<String>,
}

/// Raises the soft limit on open files to the hard one, and returns the limit that holds then;
/// `None`: unlimited.
pub(super) fn raise() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    }
}

/// The smaller of `limits.connections_max` and the number that a limit on open files allows.
pub(super) fn connection_cap(config: &Config, files: Option<u64>) -> Cap {
    let wanted = u64::from(config.limits.connections_max.value());
    // All QUIC connections of a listener share its one socket.
    let has_tcp = config
        .listeners
        .iter()
        .any(|l| l.transport != Transport::Quic);
    let allowed = match files {
        Some(files) if has_tcp => files.saturating_sub(OTHER_FILES).max(1),
        _ => u64::MAX,
    };
    let connections = usize::try_from(wanted.min(allowed)).unwrap_or(usize::MAX);
    let lower = (allowed < wanted).then(|| {
        let need = wanted + OTHER_FILES;
        format!(
            "The open-file limit allows {connections} connections, not limits.connections_max = \
             {wanted}: raise it to {need} (systemd: LimitNOFILE={need}; docker: --ulimit \
             nofile={need}; shell, as root: ulimit -n {need}), or lower limits.connections_max"
        )
    });
    let (warning, note) = match config.limits.connections_max {
        Setting::Default(_) => (None, lower),
        Setting::Configured(_) => (lower, None),
    };
    Cap {
        connections,
        warning,
        note,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_caps_and_says_how_to_raise_it() {
        let mut config = Config::builtin();
        config.limits.connections_max = Setting::Configured(50_000);
        let cap = connection_cap(&config, Some(1024));
        assert_eq!((cap.connections, cap.note), (832, None));
        let warning = cap.warning.expect("a warning");
        assert!(warning.contains("832 connections"), "{warning}");
        assert!(warning.contains("LimitNOFILE=50192"), "{warning}");
        assert_eq!(connection_cap(&config, Some(10)).connections, 1);
    }

    #[test]
    fn a_limit_below_the_default_is_no_warning() {
        let cap = connection_cap(&Config::builtin(), Some(1024));
        assert_eq!((cap.connections, cap.warning), (832, None));
        let note = cap.note.expect("a note");
        assert!(note.contains("LimitNOFILE=100192"), "{note}");
    }

    #[test]
    fn a_limit_that_is_high_enough_has_no_warning() {
        let mut config = Config::builtin();
        for files in [None, Some(100_192), Some(1 << 40)] {
            let cap = connection_cap(&config, files);
            let said = (cap.warning, cap.note);
            assert_eq!((cap.connections, said), (100_000, (None, None)));
        }
        config.listeners.retain(|l| l.transport == Transport::Quic);
        assert_eq!(connection_cap(&config, Some(1024)).connections, 100_000);
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let hard = getrlimit(Resource::Nofile).maximum;
        assert_eq!(raise(), hard);
        assert_eq!(getrlimit(Resource::Nofile).current, hard);
    }
}
