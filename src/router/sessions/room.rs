//! Room for new sessions: where `session.evict_after` is set, the least recently connected sessions end
//! once nine tenths of `memory.sessions` are used. Clients that are connected keep their sessions.

use std::time::Duration;

use crate::session::CloseReason;
use crate::telemetry::{RateLimited, SessionEndReason, clean};
use crate::time::Millis;

use crate::router::account::Holder;
use crate::router::sessions::connect::{Connect, Refused};
use crate::router::sessions::{SessionActions, Sessions};
use crate::router::types::SessionRef;

/// Detached sessions of a shard that are looked at for one whose end gives back room of the right share.
const LOOKED_AT_MAX: usize = 64;

/// Characters of a client identifier or principal in a log line.
const LOGGED_CHARS: usize = 64;

static ENDED: RateLimited = RateLimited::new(Duration::from_secs(1));

impl Sessions {
    /// Ends a detached session if this CONNECT would else get no session that is kept: among the sessions
    /// whose room it can use, the least recently connected one. `None`: there is room, or no session may
    /// end.
    pub(crate) fn make_room(&self, connect: &Connect, now: Millis) -> Option<SessionActions> {
        let after = self.budgets.evict_after?;
        let verdict = {
            let shard = self.shard(self.shard_of(connect.key.client_id()));
            self.judge(&shard, connect)
        };
        let Err(Refused::NotKept(full)) = verdict else {
            return None;
        };
        let holder = self.holder(connect);
        self.end_longest(after, |other| other.makes_room_for(holder, full), now)
    }

    /// Ends the least recently connected session if more is used than new sessions may use, even without
    /// `lingering` bytes of filters, which go by themselves. `None`: there is room, or no session may
    /// end.
    pub(crate) fn end_surplus(&self, lingering: u64, now: Millis) -> Option<SessionActions> {
        let after = self.budgets.evict_after?;
        let account = &self.account.bytes;
        if account.used().saturating_sub(lingering) <= account.keeping_max() {
            return None;
        }
        self.end_longest(after, |_| true, now)
    }

    /// Whether sessions may end to make room.
    pub(crate) fn makes_room(&self) -> bool {
        self.budgets.evict_after.is_some()
    }

    /// Ends the least recently connected session that has been detached for `after`, among the sessions
    /// of some holders. It locks one shard at a time.
    fn end_longest(
        &self,
        after: Duration,
        of: impl Fn(Holder) -> bool,
        now: Millis,
    ) -> Option<SessionActions> {
        // Else two callers would choose the same session.
        let _one_at_a_time = self.making_room.lock();
        let candidates = self.shards().filter_map(|number| {
            let shard = self.shard(number);
            let mut longest = shard.absences.longest(after, now).take(LOOKED_AT_MAX);
            let of_use = |at: u32| of(shard.slots[at as usize].holder);
            let (since, at) = longest.find(|(_, at)| of_use(*at))?;
            Some((since, shard.reference(at)))
        });
        let (since, session) = candidates.min()?;
        self.end_absent(session, since, now)
    }

    /// Ends a session whose client is away since `since`. `None`: its client came back.
    fn end_absent(
        &self,
        session: SessionRef,
        since: Millis,
        now: Millis,
    ) -> Option<SessionActions> {
        let mut shard = self.shard(session.shard);
        let slot = shard.get(session)?;
        if slot.session.attached() || slot.session.since() != since {
            return None;
        }
        if let Some(suppressed) = ENDED.permit(now) {
            tracing::warn!(
                client_id = clean(slot.session.key.client_id(), LOGGED_CHARS),
                principal = clean(&slot.session.principal, LOGGED_CHARS),
                away_seconds = now.since(since).as_secs(),
                suppressed,
                "A session was ended for others: memory.sessions is used up to nine tenths, and its client was away for longer than session.evict_after"
            );
        }
        let why = (CloseReason::SessionEnded, SessionEndReason::Memory);
        let actions = self.end_early(&mut shard, session.slot, why, now);
        self.charge(&mut shard);
        actions
    }
}

#[cfg(test)]
mod tests;
