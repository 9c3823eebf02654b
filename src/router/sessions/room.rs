//! Room for new sessions: where `session.evict_after` is set, the least recently connected sessions end
//! once nine tenths of `memory.sessions` are used. Clients that are connected keep their sessions.

use std::sync::Arc;
use std::time::Duration;

use crate::session::{CloseReason, SessionKey};
use crate::telemetry::{RateLimited, SessionEndReason, clean};
use crate::time::Millis;

use crate::router::account::{Full, Holder};
use crate::router::sessions::connect::{Connect, Refused};
use crate::router::sessions::{SessionActions, Sessions};
use crate::router::types::SessionRef;

/// Detached sessions of a shard that are looked at for one whose end gives back room of the right share.
const LOOKED_AT_MAX: usize = 64;

/// Characters of a client identifier or principal in a log line.
const LOGGED_CHARS: usize = 64;

static ENDED: RateLimited = RateLimited::new(Duration::from_secs(1));

/// A session that was ended for others: the actions that are left to take, and what the log says of it.
#[derive(Debug)]
struct EndedForOthers {
    actions: SessionActions,
    key: SessionKey,
    principal: Arc<str>,
    away: Duration,
}

impl Sessions {
    /// Ends a detached session if this CONNECT would else get no session that is kept: among the sessions
    /// whose room it can use, the least recently connected one. `None`: there is room, or there will be
    /// without another session's end, or no session may end. `lingering` reads the bytes of filters that
    /// nobody uses, which go by themselves.
    pub(crate) fn make_room(
        &self,
        connect: &Connect,
        lingering: impl FnOnce() -> u64,
        now: Millis,
    ) -> Option<SessionActions> {
        let after = self.budgets.evict_after?;
        let demand = {
            let shard = self.shard(self.shard_of(connect.key.client_id()));
            self.demand(&shard, connect).ok()?
        };
        let Err(Refused::NotKept(full)) = self.judge(&demand) else {
            return None;
        };
        let (account, holder) = (&self.account.bytes, demand.charged);
        let comes_back = match full {
            Full::All => account.comes_back(demand.more, lingering()),
            Full::Principal | Full::Network => account.will_have_room_to_keep(holder, demand.more),
        };
        if comes_back {
            return None;
        }
        self.end_longest(after, |other| other.makes_room_for(holder, full), now)
    }

    /// Ends the least recently connected session if more is used than new sessions may use, even without
    /// the sessions that ended for others, and without `lingering` bytes of filters: these go by
    /// themselves. `None`: there is room, or no session may end.
    pub(crate) fn end_surplus(&self, lingering: u64, now: Millis) -> Option<SessionActions> {
        let after = self.budgets.evict_after?;
        if self.account.bytes.comes_back(0, lingering) {
            return None;
        }
        self.end_longest(after, |_| true, now)
    }

    /// Whether sessions may end to make room.
    pub(crate) fn makes_room(&self) -> bool {
        self.budgets.evict_after.is_some()
    }

    /// Ends the least recently connected session that has been detached for `after`, among the sessions
    /// of some holders.
    fn end_longest(
        &self,
        after: Duration,
        of: impl Fn(Holder) -> bool,
        now: Millis,
    ) -> Option<SessionActions> {
        let ended = {
            // Else two callers would choose the same session.
            let _one_at_a_time = self.making_room.lock();
            let candidates = self.absent_longest(after, of, now);
            self.end_first(candidates, now)?
        };
        // Without locks, because the log may be slow.
        if let Some(suppressed) = ENDED.permit(now) {
            tracing::warn!(
                client_id = clean(ended.key.client_id(), LOGGED_CHARS),
                principal = clean(&ended.principal, LOGGED_CHARS),
                away_seconds = ended.away.as_secs(),
                suppressed,
                "A session was ended for others: memory.sessions is used up to nine tenths, or the new client's share of it is, and the session's client was away for longer than session.evict_after"
            );
        }
        Some(ended.actions)
    }

    /// For each shard with such sessions, the least recently connected one that has been detached for
    /// `after` and is charged to some holders, and the time at which its client left: the least recently
    /// connected one first. It locks one shard at a time.
    fn absent_longest(
        &self,
        after: Duration,
        of: impl Fn(Holder) -> bool,
        now: Millis,
    ) -> Vec<(Millis, SessionRef)> {
        let candidates = self.shards().filter_map(|number| {
            let shard = self.shard(number);
            let mut longest = shard.absences.longest(after, now).take(LOOKED_AT_MAX);
            let of_use = |at: u32| of(shard.slots[at as usize].holder);
            let (since, at) = longest.find(|(_, at)| of_use(*at))?;
            Some((since, shard.reference(at)))
        });
        let mut candidates: Vec<(Millis, SessionRef)> = candidates.collect();
        candidates.sort_unstable();
        candidates
    }

    /// Ends the first of the sessions whose client has not come back meanwhile.
    fn end_first(
        &self,
        candidates: Vec<(Millis, SessionRef)>,
        now: Millis,
    ) -> Option<EndedForOthers> {
        let mut candidates = candidates.into_iter();
        candidates.find_map(|(since, session)| self.end_absent(session, since, now))
    }

    /// Ends a session whose client is away since `since`. `None`: its client came back.
    fn end_absent(
        &self,
        session: SessionRef,
        since: Millis,
        now: Millis,
    ) -> Option<EndedForOthers> {
        let mut shard = self.shard(session.shard);
        let known = &shard.get(session)?.session;
        if known.attached() || known.since() != since {
            return None;
        }
        let (key, principal) = (known.key.clone(), known.principal.clone());
        let why = (CloseReason::SessionEnded, SessionEndReason::Memory);
        let actions = self.end_early(&mut shard, session.slot, why, now)?;
        shard.ended_for_others(session.slot);
        self.charge(&mut shard);
        Some(EndedForOthers {
            actions,
            key,
            principal,
            away: now.since(since),
        })
    }
}

#[cfg(test)]
mod tests;
