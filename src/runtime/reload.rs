//! Reload: certificates on SIGHUP and when their files change, the password file and the access rules
//! on SIGHUP.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::auth::Acl;
use crate::client::Clients;
use crate::config::Config;

use crate::runtime::certificates::Certificates;
use crate::runtime::error::StartError;
use crate::runtime::permissions;

/// How often the certificates' files are compared with their earlier state.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Takes SIGHUP over; before that, the signal ends the process.
///
/// # Errors
/// [`StartError::Internal`].
pub(super) fn hangup() -> Result<Signal, StartError> {
    signal(SignalKind::hangup()).map_err(|e| StartError::Internal(format!("signals: {e}")))
}

/// The task that reads files again while the process runs.
pub(super) struct Reload {
    pub(super) hangup: Signal,
    pub(super) files: Arc<Mutex<Files>>,
}

/// The files that are read again.
pub(super) struct Files {
    pub(super) certificates: Certificates,
    pub(super) clients: Arc<Clients>,
    /// The configuration of the start.
    pub(super) config: Config,
}

impl Reload {
    /// Runs until `stop` is cancelled.
    pub(super) async fn run(&mut self, stop: CancellationToken) {
        self.files.lock().certificates.announce();
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = self.hangup.recv() => true,
                _ = ticks.tick() => false,
            };
            // A file system that does not answer must block only this task.
            let files = self.files.clone();
            let look = tokio::task::spawn_blocking(move || files.lock().look(asked));
            if look.await.is_err() {
                // It panicked: this task begins again.
                return;
            }
        }
    }
}

impl Files {
    /// Reads the files again that have changed; all of them if somebody has `asked`.
    fn look(&mut self, asked: bool) {
        self.certificates.look(asked);
        if asked {
            permissions::warn(&self.config);
            self.reload_access();
        }
    }

    /// Reads the password file and the rules again: all of it is used from now on, or nothing.
    fn reload_access(&mut self) {
        if let Err((what, error)) = self.read_access() {
            tracing::error!(
                why = "SIGHUP",
                error,
                "{what} could not be read again; the earlier passwords and rules stay in use until SIGHUP \
                 comes"
            );
        }
    }

    /// # Errors
    /// The file that cannot be used, and why.
    fn read_access(&mut self) -> Result<(), (&'static str, String)> {
        let rules = self.read_rules();
        let rules = rules.map_err(|error| ("The configuration with the access rules", error))?;
        let users = self.clients.authenticator.read_again();
        let users = users.map_err(|error| ("The password file", error.to_string()))?;
        // From here on nothing fails.
        if let Some(fresh) = rules {
            let rules = fresh.acl.len();
            (self.config.auth.acl, self.config.acl) = (fresh.auth.acl, fresh.acl);
            // Not of `fresh`: the probes that are sent keep the topic of the start.
            self.clients.replace_rules(Acl::of(&self.config));
            tracing::info!(why = "SIGHUP", rules, "The access rules were read again");
        }
        if let Some(fresh) = users {
            let users = fresh.count();
            let gone = self.clients.authenticator.replace(fresh);
            let closed = match gone.is_empty() {
                true => 0,
                false => self.clients.router.close_of(|owner| gone.contains(owner)),
            };
            tracing::info!(
                why = "SIGHUP",
                users,
                removed = gone.len(),
                closed,
                "The password file was read again"
            );
        }
        Ok(())
    }

    /// The configuration as its file is now, if there is one. Only its rules are used: what else has
    /// changed takes effect at the next start.
    fn read_rules(&self) -> Result<Option<Config>, String> {
        let Some(path) = &self.config.source else {
            return Ok(None);
        };
        let fresh = Config::load(path).map_err(|error| error.to_string())?;
        Ok(Some(fresh))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{ANONYMOUS, Identity};
    use crate::clock::Clock;
    use crate::runtime::convert;
    use crate::store::Memory;

    #[test]
    fn rules_that_are_read_again_still_protect_the_probes_that_are_sent() {
        let path = std::env::temp_dir().join(format!("tidegate-reload-{}", std::process::id()));
        let write = |probe_topic| {
            let text = format!(
                "[node]\nid = \"a\"\n\
                 [upstream]\nservers = [\"embedded:\"]\nprobe_topic = \"{probe_topic}\"\n\
                 [auth]\nacl = \"open\"\n\
                 [[listeners]]\ntransport = \"tcp\"\nbind = \"127.0.0.1:0\"\n"
            );
            std::fs::write(&path, text).expect("written");
        };
        write("first/probe");
        let config = Config::load(&path).expect("a configuration");
        let clock = Clock::default();
        let router = Arc::new(convert::router(&config, clock, &Memory, None));
        let clients = Arc::new(convert::clients(&config, router, clock).expect("no files"));
        let mut files = Files {
            certificates: Certificates::load(&config).expect("no files"),
            clients: clients.clone(),
            config,
        };
        // A change of the probes' topic takes effect at the next start.
        write("second/probe");
        files.look(true);
        std::fs::remove_file(&path).expect("removed");
        let identity = Identity::new(ANONYMOUS.into(), "c".into());
        let may = |topic| clients.acl.load().may_publish(&identity, "", topic);
        assert!(!may("first/probe/x"));
        assert!(may("second/probe/x"));
    }
}
