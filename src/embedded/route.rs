//! Subscriptions, fan-out and retained messages of an embedded broker.

use std::time::Duration;

use smallvec::SmallVec;

use crate::embedded::outbound::Queued;
use crate::embedded::quirks::{Overlap, Shared};
use crate::embedded::state::State;
use crate::embedded::subscription::{Filter, LateReplay, Member, Place};
use crate::mqtt::{Message, QoS, ReasonCode, SubscribeOptions, Version};
use crate::telemetry::{DropReason, RateLimited, metrics};
use crate::topics::split_shared;

/// Delayed replays that wait at once. Beyond it, one is sent without its delay.
const LATE_REPLAYS_MAX: usize = 100_000;

static FULL: RateLimited = RateLimited::new(Duration::from_secs(10));

/// One copy of a message for one session.
struct Copy {
    session: u32,
    /// Copies of a session that are in the same queue can be merged.
    queue: u8,
    qos: QoS,
    retain: bool,
    ids: SmallVec<[u32; 2]>,
}

impl State {
    /// Subscribes to one filter of a SUBSCRIBE, queues its retained messages or plans to, and
    /// returns the SUBACK code.
    pub(crate) fn subscribe(
        &mut self,
        key: u32,
        name: &str,
        mut options: SubscribeOptions,
        id: Option<u32>,
    ) -> ReasonCode {
        options.qos = options.qos.min(self.options.max_qos);
        let id = id.filter(|_| !self.options.quirks().no_ids);
        if let Some((group, filter)) = split_shared(name) {
            if self.options.quirks().shared == Shared::Refused {
                return ReasonCode::SHARED_SUBSCRIPTIONS_NOT_SUPPORTED;
            }
            let session = key;
            let member = Member {
                session,
                options,
                id,
                both_queues: false,
            };
            self.shared.join(group, filter, member);
            let known = &mut self.sessions[key as usize].subscriptions;
            known.insert(name.into(), Place::Group);
            return ReasonCode(options.qos as u8);
        }
        let filter = match self.trie.get(name) {
            Some(filter) => filter,
            None => {
                let filter = self.filters.insert(Filter {
                    name: name.into(),
                    members: Vec::new(),
                }) as u32;
                self.trie.insert(name, filter);
                filter
            }
        };
        let members = &mut self.filters[filter as usize].members;
        let member = Member {
            session: key,
            options,
            id,
            both_queues: false,
        };
        let old = members.iter_mut().find(|m| m.session == key);
        let known = old.is_some();
        match old {
            // Replaced as a whole [MQTT-3.8.4-3].
            Some(old) => {
                let both_queues = self.options.quirks().overlap == Overlap::TwoQueues
                    && (old.both_queues
                        || (old.options.qos == QoS::AtMostOnce)
                            != (options.qos == QoS::AtMostOnce));
                *old = Member {
                    both_queues,
                    ..member
                };
            }
            None => members.push(member),
        }
        let session = &mut self.sessions[key as usize];
        let (version, serial) = (session.version, session.serial);
        if !known {
            session
                .subscriptions
                .insert(name.into(), Place::Filter(filter));
        }
        let replay = match options.retain_handling {
            _ if version != Version::V5 => true,
            0 => true,
            1 => !known,
            _ => false,
        };
        if replay && self.options.retain_available {
            let late = LateReplay {
                session: key,
                serial,
                filter: name.into(),
                qos: options.qos,
                id,
            };
            self.plan_replay(late);
        }
        ReasonCode(options.qos as u8)
    }

    /// Unsubscribes from one filter. Returns whether the session was subscribed to it.
    pub(crate) fn unsubscribe(&mut self, key: u32, name: &str) -> bool {
        let session = &mut self.sessions[key as usize];
        let Some(place) = session.subscriptions.remove(name) else {
            return false;
        };
        self.leave(key, name, place);
        true
    }

    pub(crate) fn unsubscribe_all(&mut self, key: u32) {
        let subscriptions = std::mem::take(&mut self.sessions[key as usize].subscriptions);
        for (name, place) in subscriptions {
            self.leave(key, &name, place);
        }
    }

    /// Stores a message if it is retained, and queues it for each session with a matching
    /// subscription. Returns whether there was any. `origin` is the session that published it.
    pub(crate) fn publish(&mut self, origin: u32, message: &Message) -> bool {
        self.counts.published += 1;
        if message.retain() && self.options.retain_available {
            let max = self.options.retained_bytes_max;
            if !self.retained.set(message, max) {
                self.counts.dropped_full += 1;
                self.tell_dropped(self.counts.dropped_full - 1);
            }
        }
        let mut matched: SmallVec<[u32; 16]> = SmallVec::new();
        self.trie
            .for_each_match(message.topic(), |filter| matched.push(filter));
        let shared = self.offer_shared(message);
        if matched.is_empty() {
            return shared;
        }
        // The order of copies must not depend on the shape of the trie.
        matched.sort_unstable();
        let live_retain = message.retain() && !self.options.quirks().no_rap;
        let overlap = self.options.quirks().overlap;
        let two_queues = overlap == Overlap::TwoQueues;
        let mut copies: SmallVec<[Copy; 16]> = SmallVec::new();
        for filter in matched {
            for member in &self.filters[filter as usize].members {
                let options = &member.options;
                if options.no_local && member.session == origin {
                    continue;
                }
                let copy = |qos: QoS| Copy {
                    session: member.session,
                    queue: u8::from(two_queues && qos > QoS::AtMostOnce),
                    qos: message.qos().min(qos),
                    retain: live_retain && options.retain_as_published,
                    ids: id_list(member.id),
                };
                copies.push(copy(options.qos));
                if member.both_queues {
                    copies.push(copy(match options.qos {
                        QoS::AtMostOnce => QoS::AtLeastOnce,
                        _ => QoS::AtMostOnce,
                    }));
                }
            }
        }
        if overlap != Overlap::Many {
            merge(&mut copies, overlap != Overlap::LowestQos);
        }
        for copy in copies {
            let entry = Queued {
                message: message.clone(),
                ids: copy.ids,
                qos: copy.qos,
                retain: copy.retain,
            };
            self.offer(copy.session, entry);
        }
        true
    }

    /// Sends a delayed replay, unless the subscription has ended.
    pub(crate) fn replay_late(&mut self, late: &LateReplay) {
        let still = self
            .sessions
            .get(late.session as usize)
            .is_some_and(|s| s.serial == late.serial && s.subscriptions.contains_key(&late.filter));
        if still {
            self.replay(late);
        }
    }

    fn plan_replay(&mut self, late: LateReplay) {
        let delay = self.options.quirks().late_retained;
        let Some(delay) = delay.filter(|_| self.late.len() < LATE_REPLAYS_MAX) else {
            return self.replay(&late);
        };
        let at = self.now + delay;
        let serial = self.next_serial();
        self.late.insert((at, serial), late);
    }

    fn replay(&mut self, to: &LateReplay) {
        for message in self.retained.matching(&to.filter, self.now) {
            let entry = Queued {
                qos: message.qos().min(to.qos),
                ids: id_list(to.id),
                retain: true,
                message,
            };
            self.offer(to.session, entry);
        }
    }

    /// Queues one copy, and has the connection woken.
    fn offer(&mut self, key: u32, entry: Queued) {
        let Some(session) = self.sessions.get_mut(key as usize) else {
            return;
        };
        // QoS 0 is not kept for a session without a connection.
        if session.connection.is_none() && entry.qos == QoS::AtMostOnce {
            return;
        }
        let before = self.counts.dropped_full;
        self.counts.dropped_full += session.out.push(entry, &self.options);
        if !session.woken
            && let Some(connection) = &session.connection
        {
            session.woken = true;
            self.to_wake.push(connection.clone());
        }
        self.tell_dropped(before);
        self.make_room();
    }

    /// Brings all messages together under their limit: the session with the most bytes in its queue
    /// loses the oldest of them, a quarter at a time.
    fn make_room(&mut self) {
        let max = self.options.memory_max_bytes;
        if self.account.used() <= max {
            return;
        }
        // A little below, so that not every message needs room.
        let target = max - max / 32;
        let before = self.counts.dropped_full;
        while self.account.used() > target {
            let sessions = self.sessions.iter_mut().map(|(_, session)| session);
            let Some(largest) = sessions.max_by_key(|session| session.out.queue_bytes()) else {
                break;
            };
            let rest = largest.out.queue_bytes() / 4 * 3;
            let account = &self.account;
            let dropped = largest.out.drop_oldest(rest, || account.used() <= target);
            // The rest is in flight or retained.
            if dropped == 0 {
                break;
            }
            self.counts.dropped_full += dropped;
        }
        self.tell_dropped(before);
    }

    /// Counts and logs the messages that were dropped since `dropped_full` was at `before`.
    fn tell_dropped(&self, before: u64) {
        let dropped = self.counts.dropped_full - before;
        if dropped == 0 {
            return;
        }
        metrics().messages_dropped[DropReason::EmbeddedFull].increment(dropped);
        if let Some(suppressed) = FULL.permit(self.now) {
            tracing::warn!(
                dropped,
                suppressed,
                "The embedded broker drops its oldest messages: they exceed an eighth of memory.max, or a queue of {} messages",
                self.options.queue_max
            );
        }
    }

    /// Queues a copy for one member of each matching group. Returns whether there was any.
    fn offer_shared(&mut self, message: &Message) -> bool {
        if self.options.quirks().shared != Shared::Working {
            return false;
        }
        let sessions = &self.sessions;
        let connected = |key: u32| {
            let session = sessions.get(key as usize);
            session.is_some_and(|s| s.connection.is_some())
        };
        let picked = self.shared.pick(message.topic(), connected);
        for member in &picked {
            let entry = Queued {
                message: message.clone(),
                ids: id_list(member.id),
                qos: message.qos().min(member.options.qos),
                retain: message.retain() && member.options.retain_as_published,
            };
            self.offer(member.session, entry);
        }
        !picked.is_empty()
    }

    fn leave(&mut self, key: u32, name: &str, place: Place) {
        let filter = match (place, split_shared(name)) {
            (Place::Filter(filter), _) => filter,
            (Place::Group, Some((group, filter))) => {
                return self.shared.leave(group, filter, key);
            }
            (Place::Group, None) => return,
        };
        let entry = &mut self.filters[filter as usize];
        entry.members.retain(|m| m.session != key);
        if entry.members.is_empty() {
            let entry = self.filters.remove(filter as usize);
            self.trie.remove(&entry.name);
        }
    }
}

/// Leaves one copy for each queue of a session, at the place of its first.
fn merge(copies: &mut SmallVec<[Copy; 16]>, highest: bool) {
    if copies.len() < 2 {
        return;
    }
    copies.sort_by_key(|c| (c.session, c.queue));
    copies.dedup_by(|next, kept| {
        if (next.session, next.queue) != (kept.session, kept.queue) {
            return false;
        }
        kept.qos = if highest {
            kept.qos.max(next.qos)
        } else {
            kept.qos.min(next.qos)
        };
        kept.retain |= next.retain;
        kept.ids.append(&mut next.ids);
        true
    });
}

fn id_list(id: Option<u32>) -> SmallVec<[u32; 2]> {
    id.into_iter().collect()
}
