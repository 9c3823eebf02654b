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
            self.clients.acl.store(Arc::new(Acl::of(&fresh)));
            (self.config.auth.acl, self.config.acl) = (fresh.auth.acl, fresh.acl);
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
