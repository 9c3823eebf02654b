//! Reload: certificates on SIGHUP and when their files change, the password file on SIGHUP.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::auth::Authenticator;

use crate::runtime::certificates::Certificates;
use crate::runtime::error::StartError;

/// How often the certificates' files are compared with their earlier state.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Takes SIGHUP over; before that, the signal ends the process.
///
/// # Errors
/// [`StartError::Internal`].
pub(super) fn hangup() -> Result<Signal, StartError> {
    signal(SignalKind::hangup()).map_err(|e| StartError::Internal(format!("signals: {e}")))
}

/// The files that are read again while the process runs.
pub(super) struct Reload {
    pub(super) certificates: Certificates,
    pub(super) authenticator: Arc<Authenticator>,
}

impl Reload {
    /// Runs until `stop` is cancelled.
    pub(super) async fn run(mut self, mut hangup: Signal, stop: CancellationToken) {
        self.certificates.announce();
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = hangup.recv() => true,
                _ = ticks.tick() => false,
            };
            // A file system that does not answer must block only this task.
            let look = tokio::task::spawn_blocking(move || {
                self.certificates.look(asked);
                if asked {
                    reload_passwords(&self.authenticator);
                }
                self
            });
            match look.await {
                Ok(again) => self = again,
                Err(error) => {
                    tracing::error!(%error, "Certificates and passwords are not read again any more");
                    return;
                }
            }
        }
    }
}

fn reload_passwords(authenticator: &Authenticator) {
    match authenticator.reload() {
        Ok(Some(users)) => {
            tracing::info!(why = "SIGHUP", users, "The password file was read again");
        }
        // No listener uses a password file.
        Ok(None) => {}
        Err(error) => tracing::error!(
            why = "SIGHUP",
            %error,
            "The password file could not be read again; the earlier passwords stay in use until SIGHUP \
             comes"
        ),
    }
}
