//! Sessions whose time has come: expiry, due wills, keep alive, and queues that end their session.

use crate::session::{CloseReason, SessionKey};
use crate::telemetry::{SessionEndReason, metrics};
use crate::time::Millis;

use crate::router::sessions::connect::{count_lost, leave};
use crate::router::sessions::shard::Shard;
use crate::router::sessions::{DueWill, PresenceChange, SHARDS, SessionActions, Sessions};

impl Sessions {
    /// The numbers of all shards.
    pub(crate) fn shards(&self) -> impl Iterator<Item = u16> + use<> {
        0..SHARDS as u16
    }

    /// Ends the sessions and connections of one shard whose time has come.
    pub(crate) fn tick(&self, number: u16, now: Millis) -> SessionActions {
        let mut actions = SessionActions {
            shard: number,
            ..SessionActions::default()
        };
        let mut shard = self.shard(number);
        shard.now = shard.now.max(now);
        shard.mark_away(now);
        while let Some(at) = shard.fired(now) {
            let Some(slot) = shard.slots.get_mut(at as usize) else {
                continue;
            };
            if !slot.session.attached() {
                expire(&mut shard, at, now, &mut actions);
                continue;
            }
            if let Some(connection) = slot.session.connection()
                && connection.unread
            {
                connection.last_seen = now;
            }
            if slot.session.deadline().is_some_and(|at| at <= now)
                && let Some(handle) = &slot.handle
            {
                handle.close(CloseReason::KeepAlive);
                // Asked once; the task ends the connection.
                if let Some(connection) = slot.session.connection() {
                    connection.stop_keep_alive();
                }
            }
            shard.settle(at);
        }
        self.end_late_waits(&mut shard, now);
        self.charge(&mut shard);
        actions
    }

    /// Ends a session with its connection, because its queue is full and `session.queue_full` is
    /// `"end_session"`. The actions are deferred, since the caller has the shard's lock.
    pub(crate) fn end_full(&self, shard: &mut Shard, at: u32, now: Millis) {
        let why = (CloseReason::SessionQueueFull, SessionEndReason::QueueFull);
        let ended = self.end_early(shard, at, why, now);
        ended.into_iter().for_each(|actions| self.defer(actions));
    }

    /// Ends a session and its connection because an operator asks for it. `None`: no session has this key.
    pub(crate) fn end_by_operator(&self, key: &SessionKey, now: Millis) -> Option<SessionActions> {
        let mut shard = self.shard(self.shard_of(key.client_id()));
        let at = shard.find(key)?;
        let why = (CloseReason::Operator, SessionEndReason::Admin);
        let actions = self.end_early(&mut shard, at, why, now);
        self.charge(&mut shard);
        actions
    }

    /// Ends a session before its time. `None`: it has ended already.
    pub(super) fn end_early(
        &self,
        shard: &mut Shard,
        at: u32,
        (reason, label): (CloseReason, SessionEndReason),
        now: Millis,
    ) -> Option<SessionActions> {
        let slot = shard.slots.get_mut(at as usize)?;
        if slot.session.is_closed() {
            return None;
        }
        if let Some(handle) = slot.handle.take() {
            handle.close(reason);
        }
        metrics().sessions_ended[label].increment(1);
        // If a client is connected, `detach` moves the time by which the session has its places in both orders.
        shard.unlist(at);
        shard.end_absence(at);
        let slot = shard.slots.get_mut(at as usize)?;
        slot.session.expiry = 0;
        let ended = slot.session.detach(&self.limits, false, now);
        count_lost(&ended);
        let reference = shard.reference(at);
        Some(leave(shard, reference, ended, now))
    }

    /// Keeps actions for the next tick.
    pub(crate) fn defer(&self, actions: SessionActions) {
        self.deferred.lock().push(actions);
    }

    /// Takes the actions that were deferred.
    pub(crate) fn take_deferred(&self) -> Vec<SessionActions> {
        // The list is taken out whole: a caller that holds a shard's lock may have something to
        // defer, and the actions need such locks.
        std::mem::take(&mut *self.deferred.lock())
    }
}

/// Ends a detached session whose time has come, and takes out its will if it is due.
fn expire(shard: &mut Shard, at: u32, now: Millis, actions: &mut SessionActions) {
    let session = shard.reference(at);
    let Some(slot) = shard.get(session) else {
        return;
    };
    let mut ended = slot.session.expire(now);
    let publish_link = slot.publish_link;
    if ended.absent {
        actions.presence_changes.push(PresenceChange {
            session,
            publish_link,
            key: slot.session.key.clone(),
            peer: None,
        });
    }
    shard.hold(at);
    shard.compare_with_record(at);
    actions.redeliveries.append(&mut ended.shared);
    actions.wills.extend(ended.will.take().map(|will| DueWill {
        session,
        publish_link,
        will,
    }));
    if ended.forget {
        shard.outlived(at, now, actions);
    } else if ended.session {
        metrics().sessions_ended[SessionEndReason::Expired].increment(1);
        count_lost(&ended);
        shard.end_absence(at);
        shard.finish(at, now, actions);
    } else {
        shard.settle(at);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::mqtt::{Message, MessageSpec, Properties, QoS};
    use crate::router::testing;

    #[test]
    fn deferred_actions_are_taken_without_the_lock_of_their_list() {
        let router = testing::router();
        let client = testing::client(&router, "c");
        let will = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: b"x",
            qos: QoS::AtMostOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        router.sessions.defer(SessionActions {
            wills: vec![DueWill {
                session: client.session,
                publish_link: 0,
                will,
            }],
            ..SessionActions::default()
        });
        // The thread with this lock may have something to defer; the will waits for the lock.
        let shard = router.sessions.shard(client.session.shard);
        std::thread::scope(|scope| {
            scope.spawn(|| router.tick(Millis::new(1)));
            loop {
                let deferred = router
                    .sessions
                    .deferred
                    .try_lock_for(Duration::from_secs(10));
                if deferred.expect("it is free").is_empty() {
                    break;
                }
                std::thread::yield_now();
            }
            drop(shard);
        });
    }
}
