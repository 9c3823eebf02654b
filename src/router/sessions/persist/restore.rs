//! Sessions begin with what an earlier process has left of them in the log.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::session::Session;
use crate::store::log::{Claims, Position};
use crate::time::UnixMillis;

use crate::router::account::Holder;
use crate::router::messages::{Kept, MessageClaims};
use crate::router::sessions::Sessions;
use crate::router::sessions::journal::{Journal, JournalTimes, Progress, RestoredClient};
use crate::router::sessions::shard::Shard;
use crate::router::types::SessionRef;

impl Sessions {
    /// From now on changes of sessions are marked for the log.
    pub(crate) fn keep_in_log(&self, times: JournalTimes) {
        for number in self.shards() {
            let numbers = self.numbers.clone();
            let journal = Journal::new(number, self.marked.clone(), times, numbers);
            self.shard(number).journal = Some(Box::new(journal));
        }
    }

    /// How long after a start no session ends and no will is published.
    pub(crate) fn restart_grace(&self) -> Duration {
        let shard = self.shard(0);
        let journal = shard.journal.as_ref();
        journal.map_or(Duration::ZERO, |journal| journal.restart_grace())
    }

    /// Incarnations go on behind this one.
    pub(crate) fn incarnations_from(&self, largest: u64) {
        self.incarnations.fetch_max(largest, Ordering::Relaxed);
    }

    /// From now on messages are kept in the log, with numbers behind `last`.
    pub(crate) fn keep_messages(&self, claims: &Arc<Claims>, started_at: UnixMillis, last: u64) {
        let kept = Kept {
            records: Arc::new(MessageClaims(claims.clone())),
            waker: self.marked.waker.clone(),
            started_at,
        };
        self.numbers.keep(kept, last);
    }

    /// Adds a session of an earlier process, whose record is at `place`. `publish_link` chooses its publish
    /// link.
    pub(crate) fn restore(
        &self,
        session: Session,
        holder: Holder,
        (client, progress): (RestoredClient, Progress),
        place: (Position, u32),
        publish_link: impl Fn(SessionRef) -> u8,
    ) -> SessionRef {
        let mut shard = self.shard(self.shard_of(session.key.client_id()));
        let at = shard.insert(session, holder);
        let reference = shard.reference(at);
        shard.slots[at as usize].publish_link = publish_link(reference);
        shard.begin_absence(at);
        shard.rejoin(at);
        shard.hold(at);
        shard.settle(at);
        let Shard {
            slots,
            journal,
            accounts,
            ..
        } = &mut *shard;
        if let (Some(journal), Some(slot)) = (journal, slots.get_mut(at as usize)) {
            slot.session.client_stays_away();
            if slot.session.outbound().queued() > 0 {
                accounts.list(slot, at);
            }
            journal.restored(at, &slot.session, place, client, progress);
        }
        self.charge(&mut shard);
        reference
    }

    /// All messages of the log are replayed.
    pub(crate) fn replayed(&self) {
        for number in self.shards() {
            let mut shard = self.shard(number);
            let Some(journal) = &mut shard.journal else {
                continue;
            };
            let progress = std::mem::take(&mut journal.progress);
            for (at, _) in progress.sorted(|_, progress| progress.connected) {
                let Shard {
                    slots, accounts, ..
                } = &mut *shard;
                if let Some(slot) = slots.get_mut(*at as usize) {
                    slot.session.client_stays_away();
                    if slot.session.outbound().queued() > 0 {
                        accounts.list(slot, *at);
                    }
                }
                shard.settle(*at);
            }
            self.charge(&mut shard);
        }
    }
}
