//! Messages that connected clients lost: an operator is warned of each loss.

use std::time::Duration;

use parking_lot::Mutex;

use crate::session::Session;
use crate::telemetry::{DropReason, RateLimited, clean};
use crate::time::Millis;

/// Characters of a client identifier or principal in a log line.
const LOGGED_CHARS: usize = 64;

static LOSSES: Mutex<Option<Losses>> = Mutex::new(None);
static WARNINGS: RateLimited = RateLimited::new(Duration::from_secs(1));

/// The losses since the last warning.
struct Losses {
    messages: u64,
    /// The client that lost the first of them.
    client_id: String,
    principal: String,
    reason: DropReason,
}

/// Notes that a session lost `messages` messages for `reason`. Only a loss of a connected client is
/// worth a warning.
pub(super) fn note(session: &Session, reason: DropReason, messages: u64) {
    if messages == 0 || !session.attached() {
        return;
    }
    let mut losses = LOSSES.lock();
    match &mut *losses {
        Some(losses) => losses.messages += messages,
        None => {
            *losses = Some(Losses {
                messages,
                client_id: clean(session.key.client_id(), LOGGED_CHARS),
                principal: clean(&session.principal, LOGGED_CHARS),
                reason,
            });
        }
    }
}

/// Warns of the losses since the last warning, at most once a second.
pub(super) fn warn(now: Millis) {
    let mut noted = LOSSES.lock();
    if noted.is_none() || WARNINGS.permit(now).is_none() {
        return;
    }
    if let Some(losses) = noted.take() {
        tracing::warn!(
            messages = losses.messages,
            client_id = losses.client_id,
            principal = losses.principal,
            reason = %losses.reason,
            "Messages for connected clients were dropped; the first of them is named"
        );
    }
}
