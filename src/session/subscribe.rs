//! SUBSCRIBE and UNSUBSCRIBE: a session checks the filters, and the router's answers become SUBACKs.

use std::borrow::Cow;
use std::num::NonZeroU32;
use std::sync::Arc;

use crate::hashing::{LookUp, LookUpSet};
use crate::mqtt::{
    QoS, ReasonCode, Subscribe, SubscribeOptions, Unsubscribe, Version, encode_suback,
    encode_unsuback, has_discouraged,
};
use crate::streams::StreamId;
use crate::time::Millis;
use crate::topics::split_shared;

use crate::session::connection::{PendingSubscribe, RepeatedFilter, Scope};
use crate::session::subscriptions::v3_options;
use crate::session::{
    CloseReason, Effect, Policy, RetainedDue, Session, SessionLimits, SubscribeRequest,
    Subscription,
};

/// SUBSCRIBEs of one client that may wait for the broker.
const PENDING_MAX: usize = 100;

/// Filters of one SUBSCRIBE that are checked, repeated ones included; more are refused. An
/// UNSUBSCRIBE with more ends the connection.
const FILTERS_MAX: usize = u16::MAX as usize;

/// A filter that the SUBSCRIBE has named.
struct Seen {
    /// Its first place in the SUBSCRIBE.
    index: u16,
    /// Its place among the requests. `None`: it was refused.
    request: Option<usize>,
    /// The QoS of its first place, until it is named again.
    asked: Option<QoS>,
}

/// Up to this number of filters in a SUBSCRIBE, each is compared with all subscriptions of its session:
/// a set of them costs more.
const COMPARED_MAX: usize = 8;

/// The filters of a session's subscriptions.
enum Known<'a> {
    List(&'a [Subscription]),
    Set(LookUpSet<&'a str>),
}

impl<'a> Known<'a> {
    /// For the check of a SUBSCRIBE with `filters` filters.
    fn new(subscriptions: &'a [Subscription], filters: usize) -> Self {
        match filters <= COMPARED_MAX {
            true => Self::List(subscriptions),
            false => Self::Set(subscriptions.iter().map(|s| &*s.name).collect()),
        }
    }

    fn contains(&self, filter: &str) -> bool {
        match self {
            Self::List(all) => all.iter().any(|s| *s.name == *filter),
            Self::Set(all) => all.contains(filter),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::List(all) => all.len(),
            Self::Set(all) => all.len(),
        }
    }
}

/// The filters of one SUBSCRIBE while they are checked.
struct Check<'a> {
    limits: &'a SessionLimits,
    policy: &'a dyn Policy,
    scope: Option<&'a Scope>,
    /// The client is a bridge of MQTT 3.
    bridge: bool,
    /// Too many SUBSCRIBEs wait already.
    too_many_pending: bool,
    known: Known<'a>,
    /// The filters that this SUBSCRIBE adds to them.
    added: usize,
    /// The bytes of both.
    bytes: usize,
    seen: LookUp<&'a str, Seen>,
    /// The SUBACK's codes. Those of requests are replaced by the router's answers.
    codes: Vec<u8>,
    requests: Vec<SubscribeRequest>,
    repeated: Vec<RepeatedFilter>,
}

impl<'a> Check<'a> {
    /// Checks one filter of the SUBSCRIBE.
    fn filter(&mut self, filter: &'a str, mut options: SubscribeOptions) {
        if self.bridge {
            options = v3_options(options, filter, true);
        }
        if self.codes.len() >= FILTERS_MAX {
            self.codes.push(ReasonCode::QUOTA_EXCEEDED.0);
            return;
        }
        let index = self.codes.len() as u16;
        if self.seen.contains_key(filter) {
            self.repeat(index, filter, options);
            return;
        }
        let whole = match self.scope.map(|s| s.filter(filter)) {
            None => Some(Cow::Borrowed(filter)),
            Some(whole) => whole.map(Cow::Owned),
        };
        let refused = self.refusal(filter, whole.as_deref());
        self.codes
            .push(refused.unwrap_or(ReasonCode::UNSPECIFIED_ERROR).0);
        let request = whole.filter(|_| refused.is_none()).map(|whole| {
            if !self.known.contains(&whole) {
                self.added += 1;
                self.bytes += filter.len();
            }
            self.requests.push(SubscribeRequest {
                index,
                filter: whole.into(),
                options,
            });
            self.requests.len() - 1
        });
        let seen = Seen {
            index,
            request,
            asked: Some(options.qos),
        };
        self.seen.insert(filter, seen);
    }

    /// Why a filter is refused. `whole`: the filter at the broker, unless it is too long.
    fn refusal(&self, filter: &str, whole: Option<&str>) -> Option<ReasonCode> {
        let plain = split_shared(filter).map_or(filter, |(_, plain)| plain);
        if self.too_many_pending || self.seen.len() >= self.limits.subscriptions_max {
            return Some(ReasonCode::QUOTA_EXCEEDED);
        }
        let Some(whole) = whole else {
            return Some(ReasonCode::TOPIC_FILTER_INVALID);
        };
        let mount = self.scope.map_or("", |scope| &scope.mount);
        if has_discouraged(filter) || !self.limits.allows_levels(mount, plain) {
            return Some(ReasonCode::TOPIC_FILTER_INVALID);
        }
        if !self.policy.may_subscribe(mount, filter) {
            return Some(ReasonCode::NOT_AUTHORIZED);
        }
        let full = self.known.len() + self.added >= self.limits.subscriptions_max
            || self.bytes + filter.len() > self.limits.filter_bytes_max;
        (full && !self.known.contains(whole)).then_some(ReasonCode::QUOTA_EXCEEDED)
    }

    /// The SUBSCRIBE names a filter again. This counts as another SUBSCRIBE [MQTT-3.8.4-5]: the later
    /// options replace the earlier, and the subscription is not new any more.
    fn repeat(&mut self, index: u16, filter: &str, options: SubscribeOptions) {
        let Some(seen) = self.seen.get_mut(filter) else {
            return;
        };
        self.codes.push(self.codes[usize::from(seen.index)]);
        let Some(request) = seen.request else {
            return;
        };
        let request = &mut self.requests[request].options;
        *request = SubscribeOptions {
            retain_handling: match options.retain_handling {
                0 => 0,
                _ => request.retain_handling,
            },
            ..options
        };
        let first = seen.index;
        let own = seen.asked.take().map(|asked| (first, asked));
        for (index, asked) in own.into_iter().chain([(index, options.qos)]) {
            self.repeated.push(RepeatedFilter {
                index,
                first,
                asked,
            });
        }
    }
}

impl Session {
    pub(super) fn subscribe(
        &mut self,
        stream: StreamId,
        subscribe: &Subscribe<'_>,
        limits: &SessionLimits,
        policy: &dyn Policy,
        effects: &mut Vec<Effect>,
    ) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(());
        };
        let packet_id = subscribe.packet_id;
        let pending = &connection.pending;
        let same = |p: &PendingSubscribe| p.stream == Some(stream) && p.packet_id == packet_id;
        if pending.iter().any(same) {
            return Err(CloseReason::PacketIdInUse);
        }
        let free = |key: &u16| !pending.iter().any(|p| p.key == *key);
        let key = std::iter::once(packet_id).chain(0..).find(free);
        let key = key.unwrap_or(packet_id);
        let filters = subscribe.filters().take(COMPARED_MAX + 1).count();
        let bytes = self.subscriptions.iter().map(|s| s.name.len()).sum();
        let mut check = Check {
            limits,
            policy,
            scope: connection.scope.as_deref(),
            bridge: connection.bridge,
            too_many_pending: pending.len() >= PENDING_MAX,
            added: 0,
            bytes,
            known: Known::new(&self.subscriptions, filters),
            seen: LookUp::default(),
            codes: Vec::new(),
            requests: Vec::new(),
            repeated: Vec::new(),
        };
        for (filter, options) in subscribe.filters() {
            check.filter(filter, options);
        }
        let Check {
            codes,
            requests,
            repeated,
            ..
        } = check;
        let over_limit = |code: &&u8| **code == ReasonCode::QUOTA_EXCEEDED.0;
        let over_limit = codes.iter().filter(over_limit).count();
        if over_limit > 0 {
            effects.push(Effect::SubscribeOverLimit {
                filters: over_limit,
            });
        }
        connection.forget_refused();
        for request in &requests {
            connection.bind(&request.filter, stream);
        }
        connection.pending.push(PendingSubscribe {
            key,
            packet_id,
            stream: Some(stream),
            // At most FILTERS_MAX.
            waiting: requests.len() as u16,
            codes,
            repeated,
            retained: Vec::new(),
        });
        if requests.is_empty() {
            return self.finish_subscribe(key).map(drop);
        }
        effects.push(Effect::Subscribe {
            packet_id: key,
            identifier: subscribe.subscription_id.and_then(NonZeroU32::new),
            requests,
        });
        Ok(())
    }

    /// The outcome for one filter of a SUBSCRIBE, named as in [`Effect::Subscribe`]. The SUBACK is
    /// written with the last one. `retained`: its retained messages are to follow. Returns the
    /// subscriptions whose retained messages are to follow now.
    ///
    /// # Errors
    /// [`CloseReason::SubscribeRefused`]: MQTT 3.1 has no code for a refusal.
    pub fn subscribed(
        &mut self,
        packet_id: u16,
        index: u16,
        code: ReasonCode,
        retained: Option<RetainedDue>,
    ) -> Result<Vec<RetainedDue>, CloseReason> {
        let all = self.phase.connection_mut().map(|c| &mut c.pending);
        let mut all = all.into_iter().flatten();
        let Some(pending) = all.find(|p| p.key == packet_id) else {
            return Ok(retained.into_iter().collect());
        };
        pending.retained.extend(retained);
        if let Some(slot) = pending.codes.get_mut(usize::from(index)) {
            *slot = code.0;
        }
        pending.waiting = pending.waiting.saturating_sub(1);
        if pending.waiting == 0 {
            if let Some(connection) = self.phase.connection_mut() {
                connection.subscription_changed();
            }
            return self.finish_subscribe(packet_id);
        }
        Ok(Vec::new())
    }

    fn finish_subscribe(&mut self, key: u16) -> Result<Vec<RetainedDue>, CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(Vec::new());
        };
        let due = |p: &PendingSubscribe| p.key == key;
        let Some(at) = connection.pending.iter().position(due) else {
            return Ok(Vec::new());
        };
        let mut pending = connection.pending.swap_remove(at);
        if connection.pending.is_empty() {
            connection.pending = Vec::new();
        }
        // The first place comes after its repetitions, since they take its code.
        for repeated in pending.repeated.iter().rev() {
            let code = pending.codes[usize::from(repeated.first)];
            let granted = code < 0x80;
            let code = match granted {
                true => code.min(repeated.asked as u8),
                false => code,
            };
            pending.codes[usize::from(repeated.index)] = code;
        }
        let version = connection.version;
        if version == Version::V31 && pending.codes.iter().any(|c| *c >= 0x80) {
            return Err(CloseReason::SubscribeRefused);
        }
        if let Some(stream) = pending.stream {
            let out = connection.output_on(stream);
            encode_suback(version, pending.packet_id, &pending.codes, out);
        }
        Ok(pending.retained)
    }

    pub(super) fn unsubscribe(
        &mut self,
        stream: StreamId,
        unsubscribe: &Unsubscribe<'_>,
        limits: &SessionLimits,
        now: Millis,
        effects: &mut Vec<Effect>,
    ) -> Result<(), CloseReason> {
        if unsubscribe.filters().nth(FILTERS_MAX).is_some() {
            return self.refuse_unsubscribe(stream, unsubscribe);
        }
        let mut codes = Vec::new();
        let mut places: Vec<usize> = Vec::new();
        let scope = self.phase.connection().and_then(|c| c.scope.clone());
        let all = &self.subscriptions;
        let is_long = unsubscribe.filters().nth(COMPARED_MAX).is_some();
        let mut known: Option<LookUp<&str, usize>> = is_long.then(|| {
            let places = all.iter().enumerate();
            places.map(|(at, s)| (&*s.name, at)).collect()
        });
        for filter in unsubscribe.filters() {
            let whole = scope.as_ref().and_then(|s| s.filter(filter));
            let name = whole.as_deref().unwrap_or(filter);
            let place = match &mut known {
                Some(known) => known.remove(name),
                None => {
                    let place = all.iter().position(|s| *s.name == *name);
                    place.filter(|at| !places.contains(at))
                }
            };
            codes.push(match place {
                Some(_) => ReasonCode::SUCCESS.0,
                None => ReasonCode::NO_SUBSCRIPTION_EXISTED.0,
            });
            places.extend(place);
        }
        // Messages that came before the UNSUBSCRIBE go before the UNSUBACK.
        self.end_waits(&places, limits, now);
        self.forget_retained(&places);
        let filters = match places.is_empty() {
            true => Vec::new(),
            false => self.end_subscriptions(&places),
        };
        if let Some(connection) = self.phase.connection_mut() {
            let version = connection.version;
            let out = connection.output_on(stream);
            encode_unsuback(version, unsubscribe.packet_id, &codes, out);
            if !filters.is_empty() {
                connection.subscription_changed();
            }
        }
        if !filters.is_empty() {
            effects.push(Effect::Unsubscribe { filters });
        }
        Ok(())
    }
}

impl Session {
    /// An UNSUBSCRIBE names too many filters: none of its subscriptions ends.
    ///
    /// # Errors
    /// UNSUBACK of MQTT 3 cannot say so.
    fn refuse_unsubscribe(
        &mut self,
        stream: StreamId,
        unsubscribe: &Unsubscribe<'_>,
    ) -> Result<(), CloseReason> {
        let Some(connection) = self.phase.connection_mut() else {
            return Ok(());
        };
        let version = connection.version;
        if version < Version::V5 {
            return Err(CloseReason::UnsubscribeFilters);
        }
        let codes: Vec<u8> = (unsubscribe.filters())
            .map(|_| ReasonCode::IMPLEMENTATION_SPECIFIC_ERROR.0)
            .collect();
        let out = connection.output_on(stream);
        encode_unsuback(version, unsubscribe.packet_id, &codes, out);
        Ok(())
    }

    /// Ends the subscriptions of these filters, named as the broker knows them, without telling the
    /// client. For a connection that has just begun, where no live messages wait for retained ones.
    pub(crate) fn revoke(&mut self, filters: &[Arc<str>], effects: &mut Vec<Effect>) {
        let named: LookUpSet<&str> = filters.iter().map(|name| &**name).collect();
        let all = self.subscriptions.iter().enumerate();
        let places: Vec<usize> = all
            .filter(|(_, subscription)| named.contains(&*subscription.name))
            .map(|(at, _)| at)
            .collect();
        let filters = self.end_subscriptions(&places);
        if !filters.is_empty() {
            effects.push(Effect::Unsubscribe { filters });
        }
    }
}

#[cfg(test)]
mod tests;
