//! A session's subscriptions: SUBSCRIBE and UNSUBSCRIBE, and what is in force.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::mqtt::{
    QoS, ReasonCode, Subscribe, SubscribeOptions, Unsubscribe, Version, encode_suback,
    encode_unsuback, has_discouraged,
};
use crate::topics::{FilterId, split_shared};

use crate::session::connection::{Again, NOWHERE, PendingSubscribe};
use crate::session::overlap::clash;
use crate::session::{
    CloseReason, Effect, Policy, Session, SessionLimits, SubscribeRequest, Unsubscribed,
};

/// SUBSCRIBEs of one client that may wait for the core.
const PENDING_MAX: usize = 100;

/// Filters of one SUBSCRIBE that are looked at, the same one again included: those behind are
/// refused. An UNSUBSCRIBE has no more.
const FILTERS_MAX: usize = u16::MAX as usize;

/// A filter that a SUBSCRIBE has named.
struct Seen {
    /// Its first place in the SUBSCRIBE.
    index: u16,
    /// Its place among those that passed.
    wanted: Option<usize>,
    /// The QoS that it was first named with, until it is named again.
    asked: Option<QoS>,
}

/// A filter is named again in one SUBSCRIBE: as if it were another SUBSCRIBE [MQTT-3.8.4-5], so the
/// later options hold, and what was there before it is replaced and not new.
fn follow(options: &mut SubscribeOptions, later: SubscribeOptions) {
    let retain_handling = match later.retain_handling {
        0 => 0,
        _ => options.retain_handling,
    };
    *options = SubscribeOptions {
        retain_handling,
        ..later
    };
}

/// A subscription of this session.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The router's number of the filter.
    pub filter: FilterId,
    /// The topic filter; shared with the router's table.
    pub name: Arc<str>,
    /// Granted QoS and options.
    pub options: SubscribeOptions,
    /// QoS that the client asked for.
    pub asked: QoS,
    /// The client's Subscription Identifier.
    pub identifier: Option<NonZeroU32>,
    /// Set once the core granted it: only then can it be the senior of overlapping ones.
    pub active: bool,
    /// How many other subscriptions of this session may match the same topic; kept by the session.
    pub overlaps: u32,
    /// `$share/group/filter`: the router hands each message to one member.
    pub shared: bool,
    /// It has a wildcard: two filters without overlap only if they are one.
    pub wild: bool,
    /// Bytes of its client's mount, where what is below it begins with a wildcard; else 0.
    pub wild_below: u16,
}

impl Subscription {
    /// Where a filter that begins with `mount` begins with a wildcard below it.
    pub fn wild_below(name: &str, mount: usize) -> u16 {
        let plain = split_shared(name).map_or(name, |(_, plain)| plain);
        match plain.as_bytes().get(mount) {
            // A filter is no longer than 65,535 bytes.
            Some(b'+' | b'#') => mount as u16,
            _ => 0,
        }
    }

    /// To its client the topic begins with `$`, and the filter with a wildcard: they do not match
    /// [MQTT-4.7.2-1]. The core, which sees the mount before them, says that they do.
    pub fn hides(&self, topic: &str) -> bool {
        hides(self.wild_below, topic)
    }
}

/// The same of a subscription's [`wild_below`](Subscription::wild_below).
pub fn hides(wild_below: u16, topic: &str) -> bool {
    wild_below > 0 && topic.as_bytes().get(usize::from(wild_below)) == Some(&b'$')
}

impl Session {
    pub(super) fn subscribe(
        &mut self,
        stream: u8,
        subscribe: &Subscribe<'_>,
        limits: &SessionLimits,
        policy: &dyn Policy,
        effects: &mut Vec<Effect>,
    ) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(());
        };
        let id = subscribe.packet_id;
        let pending = &connection.pending;
        if pending
            .iter()
            .any(|p| p.stream == stream && p.packet_id == id)
        {
            return Err(CloseReason::PacketIdInUse);
        }
        let taken = |key: &u16| pending.iter().any(|p| p.key == *key);
        let key = std::iter::once(id).chain(0..).find(|key| !taken(key));
        let key = key.unwrap_or(id);
        let mut codes = Vec::new();
        let mut wanted: Vec<SubscribeRequest> = Vec::new();
        let mut again = Vec::new();
        let mut seen: HashMap<&str, Seen, RandomState> = HashMap::default();
        let known = self.subscriptions.iter().map(|s| &*s.name);
        let known: HashSet<&str, RandomState> = known.collect();
        let mut fresh = 0;
        let mut bytes: usize = known.iter().map(|name| name.len()).sum();
        for (index, (filter, options)) in subscribe.filters().enumerate() {
            if index >= FILTERS_MAX {
                codes.push(ReasonCode::QUOTA_EXCEEDED.0);
                continue;
            }
            let index = index as u16;
            if let Some(first) = seen.get_mut(filter) {
                codes.push(codes[usize::from(first.index)]);
                if let Some(at) = first.wanted {
                    follow(&mut wanted[at].options, options);
                    let own = first.asked.take().map(|qos| (first.index, qos));
                    for (index, asked) in own.into_iter().chain([(index, options.qos)]) {
                        again.push(Again {
                            index,
                            first: first.index,
                            asked,
                        });
                    }
                }
                continue;
            }
            let scope = connection.scope.as_deref();
            let whole = match scope.map(|s| s.filter(filter)) {
                None => Some(Cow::Borrowed(filter)),
                Some(whole) => whole.map(Cow::Owned),
            };
            let at_core = whole.as_deref().unwrap_or(filter);
            let is_known = known.contains(at_core);
            let plain = split_shared(filter).map_or(filter, |(_, plain)| plain);
            let refused = if connection.pending.len() >= PENDING_MAX
                || seen.len() >= limits.subscriptions_max
            {
                Some(ReasonCode::QUOTA_EXCEEDED)
            } else if whole.is_none()
                || has_discouraged(filter)
                || plain.split('/').count() > limits.topic_levels_max
            {
                Some(ReasonCode::TOPIC_FILTER_INVALID)
            } else if !policy.may_subscribe(filter) {
                Some(ReasonCode::NOT_AUTHORIZED)
            } else if !is_known
                && (known.len() + fresh >= limits.subscriptions_max
                    || bytes + filter.len() > limits.filter_bytes_max)
            {
                Some(ReasonCode::QUOTA_EXCEEDED)
            } else {
                None
            };
            // Replaced by the answer of each filter that passed.
            codes.push(refused.unwrap_or(ReasonCode::UNSPECIFIED_ERROR).0);
            let passed = refused.is_none();
            let first = Seen {
                index,
                wanted: passed.then_some(wanted.len()),
                asked: Some(options.qos),
            };
            seen.insert(filter, first);
            if passed {
                if !is_known {
                    fresh += 1;
                    bytes += filter.len();
                }
                wanted.push(SubscribeRequest {
                    index,
                    filter: at_core.into(),
                    options,
                });
            }
        }
        connection.forget_refused();
        for wanted in &wanted {
            connection.bind(&wanted.filter, stream);
        }
        connection.pending.push(PendingSubscribe {
            key,
            packet_id: id,
            stream,
            // At most FILTERS_MAX.
            waiting: wanted.len() as u16,
            codes,
            again,
        });
        if wanted.is_empty() {
            return self.finish_subscribe(key);
        }
        effects.push(Effect::Subscribe {
            packet_id: key,
            identifier: subscribe.subscription_id.and_then(NonZeroU32::new),
            wanted,
        });
        Ok(())
    }

    /// The outcome for one filter of a SUBSCRIBE, named as in [`Effect::Subscribe`]; the SUBACK goes
    /// out with the last.
    ///
    /// # Errors
    /// [`CloseReason`]: MQTT 3.1 has no code for a refusal.
    pub fn subscribed(
        &mut self,
        packet_id: u16,
        index: u16,
        code: ReasonCode,
    ) -> Result<(), CloseReason> {
        let all = self
            .phase
            .connection_mut()
            .into_iter()
            .flat_map(|c| &mut c.pending);
        let Some(pending) = all.into_iter().find(|p| p.key == packet_id) else {
            return Ok(());
        };
        if let Some(slot) = pending.codes.get_mut(usize::from(index)) {
            *slot = code.0;
        }
        pending.waiting = pending.waiting.saturating_sub(1);
        if pending.waiting == 0 {
            return self.finish_subscribe(packet_id);
        }
        Ok(())
    }

    fn finish_subscribe(&mut self, key: u16) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(());
        };
        let due = |p: &PendingSubscribe| p.key == key;
        let Some(at) = connection.pending.iter().position(due) else {
            return Ok(());
        };
        let mut pending = connection.pending.swap_remove(at);
        if connection.pending.is_empty() {
            connection.pending = Vec::new();
        }
        // Behind its copies comes the first itself.
        for again in pending.again.iter().rev() {
            let code = pending.codes[usize::from(again.first)];
            let granted = code < 0x80;
            let code = if granted {
                code.min(again.asked as u8)
            } else {
                code
            };
            pending.codes[usize::from(again.index)] = code;
        }
        let version = connection.version;
        if version == Version::V31 && pending.codes.iter().any(|c| *c >= 0x80) {
            return Err(CloseReason::SubscribeRefused);
        }
        if pending.stream == NOWHERE {
            return Ok(());
        }
        let out = connection.output_on(pending.stream);
        encode_suback(version, pending.packet_id, &pending.codes, out);
        Ok(())
    }

    /// Puts a subscription in force, or replaces the one on the same filter [MQTT-3.8.4-3].
    /// Returns the one it replaced.
    pub fn add_subscription(&mut self, mut new: Subscription) -> Option<Subscription> {
        if let Some(connection) = self.phase.connection_mut() {
            connection.numbered(&new.name, new.filter);
        }
        if let Some(old) = self
            .subscriptions
            .iter_mut()
            .find(|s| s.filter == new.filter)
        {
            new.overlaps = old.overlaps;
            new.active = old.active;
            return Some(std::mem::replace(old, new));
        }
        for other in &mut self.subscriptions {
            if clash(other, &new) {
                other.overlaps += 1;
                new.overlaps += 1;
            }
        }
        // Most have one: room for four would be the larger part of a session.
        if self.subscriptions.is_empty() {
            self.subscriptions.reserve_exact(1);
        }
        self.subscriptions.push(new);
        None
    }

    /// The core granted it: behind those that it granted before. Whether it had not until now.
    pub fn activate_subscription(&mut self, filter: FilterId) -> bool {
        let all = &mut self.subscriptions;
        let Some(at) = all.iter().position(|s| s.filter == filter && !s.active) else {
            return false;
        };
        let mut granted = all.remove(at);
        granted.active = true;
        let behind = all.iter().position(|s| !s.active).unwrap_or(all.len());
        all.insert(behind, granted);
        true
    }

    /// The subscription on a filter number.
    pub fn subscription(&mut self, filter: FilterId) -> Option<&mut Subscription> {
        self.subscriptions.iter_mut().find(|s| s.filter == filter)
    }

    /// Takes a subscription away.
    pub fn remove_subscription(&mut self, filter: FilterId) -> Option<Subscription> {
        let at = self.subscriptions.iter().position(|s| s.filter == filter)?;
        let removed = self.subscriptions.remove(at);
        if let Some(connection) = self.phase.connection_mut() {
            connection.bind(&removed.name, 0);
        }
        let mut left = removed.overlaps;
        for other in &mut self.subscriptions {
            if left == 0 {
                break;
            }
            if clash(other, &removed) {
                other.overlaps -= 1;
                left -= 1;
            }
        }
        Some(removed)
    }

    /// Takes a subscription away that its client gave up.
    fn leave_subscription(&mut self, filter: FilterId) -> Option<Unsubscribed> {
        let all = &self.subscriptions;
        let at = all.iter().position(|s| s.filter == filter)?;
        let (left, younger) = (&all[at], &all[at + 1..]);
        let mut primary_over = Vec::new();
        if left.active && left.overlaps > 0 {
            let over = younger.iter().filter(|s| s.active && clash(s, left));
            primary_over.extend(over.map(|s| s.filter));
        }
        let left = self.remove_subscription(filter)?;
        Some(Unsubscribed {
            filter,
            name: left.name,
            no_local: left.options.no_local,
            primary_over,
        })
    }

    pub(super) fn unsubscribe(
        &mut self,
        stream: u8,
        unsubscribe: &Unsubscribe<'_>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), CloseReason> {
        if unsubscribe.filters().nth(FILTERS_MAX).is_some() {
            return Err(CloseReason::UnsubscribeFilters);
        }
        let mut codes = Vec::new();
        let mut filters = Vec::new();
        let scope = self.phase.connection().and_then(|c| c.scope.clone());
        let numbers = self
            .subscriptions
            .iter()
            .map(|s| (s.name.clone(), s.filter));
        let mut numbers: HashMap<Arc<str>, FilterId, RandomState> = numbers.collect();
        for filter in unsubscribe.filters() {
            let whole = scope.as_ref().and_then(|s| s.filter(filter));
            let at_core = whole.as_deref().unwrap_or(filter);
            let number = numbers.remove(at_core);
            codes.push(match number {
                Some(_) => ReasonCode::SUCCESS.0,
                None => ReasonCode::NO_SUBSCRIPTION_EXISTED.0,
            });
            if let Some(number) = number {
                filters.extend(self.leave_subscription(number));
            }
        }
        if let Some(connection) = self.phase.connection_mut() {
            let version = connection.version;
            let out = connection.output_on(stream);
            encode_unsuback(version, unsubscribe.packet_id, &codes, out);
        }
        if !filters.is_empty() {
            effects.push(Effect::Unsubscribe { filters });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
