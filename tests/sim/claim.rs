//! What one session must and may receive of a message, by its subscriptions.

use tidegate::mqtt::{QoS, SubscribeOptions};

use crate::broker::{Copy, matching};
use crate::edge::QOS;
use crate::ledger::{Ledger, Owed, Sub};
use crate::oracle::{Rules, event};
use tidegate::time::Millis;
use tidegate::topics::FilterId;

/// One session's claim on a message, gathered from one subscription after the other.
pub(crate) struct Claim {
    /// The QoS levels that the delivery may have.
    pub qos: Vec<QoS>,
    /// The session must receive the message.
    must: bool,
    /// The highest QoS granted so far, and the QoS at which its copy is delivered.
    best: Option<(QoS, QoS)>,
    ids_needed: Vec<u32>,
    ids_allowed: Vec<u32>,
    retain_must: bool,
    retain_may: bool,
    /// Some subscription can bring the message.
    any: bool,
    /// Every subscription is granted and certain, so the QoS of the delivery is known exactly.
    settled: bool,
}

impl Claim {
    /// The claim of the session with this `ledger`, if it can receive the message at all.
    /// `own_at` is when the session's own client published the message, if it did.
    pub(crate) fn of(
        rules: Rules,
        ledger: &Ledger,
        copies: &[Copy],
        first: &Copy,
        own_at: Option<Millis>,
    ) -> Option<Self> {
        let most = copies.iter().map(|c| c.qos).max().unwrap_or_default();
        let mut claim = Self {
            qos: Vec::new(),
            must: false,
            best: None,
            ids_needed: Vec::new(),
            ids_allowed: Vec::new(),
            retain_must: false,
            retain_may: false,
            any: false,
            settled: true,
        };
        for sub in &ledger.subs {
            let serves = |(_, name): &(FilterId, String)| {
                rules.serves(name, &sub.filter) && matching(&sub.filter, &first.topic)
            };
            let copy = copies.iter().find(|copy| copy.filters.iter().any(serves));
            match copy {
                Some(copy) => claim.add_with_copy(sub, copy, most, own_at),
                None if matching(&sub.filter, &first.topic) => {
                    // The copy of a filter that the client left may bring the message, when the
                    // copy of this filter is lost.
                    let mut names = copies.iter().flat_map(|copy| &copy.filters);
                    claim.any |= names.any(|(_, name)| ledger.left.contains(&**name));
                    claim.add_without_copy(sub, first, most);
                }
                None => {}
            }
        }
        // The copy of a filter in doubt may be the decisive one, and may be missing.
        let mut doubt = ledger
            .subs
            .iter()
            .filter(|s| s.in_doubt && matching(&s.filter, &first.topic));
        claim.must &= !first.partial && doubt.next().is_none();
        if claim.settled
            && let Some((_, exact)) = claim.best
        {
            claim.qos = vec![exact];
        }
        claim.any.then_some(claim)
    }

    /// Adds a matching subscription that the broker does not hold yet. The session may already send
    /// the subscription's identifier.
    fn add_without_copy(&mut self, sub: &Sub, first: &Copy, most: QoS) {
        let asked = sub.asked.iter().map(|a| (a.options, a.identifier));
        let granted = sub.granted.iter().map(|(_, o, i)| (*o, *i));
        for (options, id) in asked.chain(granted) {
            self.ids_allowed.push(id);
            self.retain_may |= options.retain_as_published && first.retain;
            // The subscription's QoS may also decide how another filter's copy is delivered.
            self.qos.extend(up_to(options.qos.min(most)));
            self.settled = false;
        }
    }

    /// Adds a subscription whose filter is named by `copy`.
    fn add_with_copy(&mut self, sub: &Sub, copy: &Copy, most: QoS, own_at: Option<Millis>) {
        let hides = |o: &SubscribeOptions| own_at.is_some() && o.no_local;
        // A message published before No Local was asked for is not marked as the client's own.
        let unmarked = own_at.is_some_and(|at| at <= sub.no_local_since);
        let candidates = sub.granted.iter().copied().map(|(q, o, i)| (true, q, o, i));
        let asked = sub
            .asked
            .iter()
            .map(|a| (false, a.options.qos, a.options, a.identifier));
        for (granted, q, options, id) in candidates.chain(asked) {
            if hides(&options) && !unmarked {
                continue;
            }
            self.any = true;
            self.qos.push(q.min(copy.qos));
            self.settled &= !sub.guessed;
            if !granted || sub.guessed {
                // The broker may grant less, and another filter's copy may serve the subscription.
                self.qos.extend(up_to(q.min(most)));
            }
            self.ids_allowed.push(id);
            self.retain_may |= options.retain_as_published && copy.retain;
            if !granted || !sub.asked.is_empty() || hides(&options) {
                self.settled = false;
                continue;
            }
            self.must |= !sub.in_doubt;
            if id != 0 {
                self.ids_needed.push(id);
            }
            self.retain_must |= options.retain_as_published && copy.retain;
            if self.best.is_none_or(|(b, _)| q > b) {
                self.best = Some((q, q.min(copy.qos)));
            }
        }
        // While a new SUBSCRIBE replaces a granted subscription, one of the two always applies.
        self.must |= !sub.in_doubt
            && sub.granted.is_some_and(|(_, o, _)| !hides(&o))
            && sub.asked.iter().all(|a| !hides(&a.options));
    }

    /// The entry of the ledger for this claim on the message named `key`. `deferred`: it may have to wait
    /// for retained messages.
    pub(crate) fn owed(self, key: &str, first: &Copy, deferred: bool) -> Owed {
        Owed {
            event: event(key),
            key: key.to_owned(),
            topic: first.topic.clone(),
            must: self.must,
            qos: self.qos,
            ids_needed: self.ids_needed,
            ids_allowed: self.ids_allowed,
            retain_must: self.retain_must,
            retain_may: self.retain_may,
            retained: first.retain,
            expires_at: first.expires_at,
            deferred,
            written: false,
        }
    }
}

/// Every QoS up to `highest`.
fn up_to(highest: QoS) -> impl Iterator<Item = QoS> {
    QOS.into_iter().filter(move |level| *level <= highest)
}
