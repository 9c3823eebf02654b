//! The model broker: it holds filters, takes publishes in its window, and sends each matching
//! message down the data link, in one of the ways that real brokers do.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tidegate::mqtt::{Message, MessageSpec, QoS, ReasonCode};
use tidegate::router::publish::queue::Outgoing;
use tidegate::router::{Answered, Arrived, Router};
use tidegate::session::Incarnation;
use tidegate::time::{Deadline, Millis};
use tidegate::topics::FilterId;

use tidegate_kit::rng::Rng;

/// How the broker shows overlapping filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copies {
    /// One copy for each filter, with its identifier.
    PerFilter,
    /// One copy with all identifiers, at the highest QoS.
    One,
    /// No identifiers; the filters do not overlap.
    Unnamed,
}

/// The packets on the data link to Tidegate, in order.
pub(crate) enum Item {
    Suback(FilterId, ReasonCode),
    Unsuback(FilterId),
    Pingresp(u64),
    /// Copies of one message.
    Copies(Vec<Copy>),
}

/// One copy, with the filters that it names or is for.
pub(crate) struct Copy {
    pub filters: Vec<(FilterId, String)>,
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: QoS,
    pub retain: bool,
    pub expires_at: Option<Deadline>,
    pub origin_mark: Option<Incarnation>,
    /// Other copies of the message are lost.
    pub partial: bool,
}

enum Request {
    Subscribe(FilterId, String, QoS),
    Unsubscribe(FilterId, String),
    Ping(u64),
}

/// What a publish link brings.
enum Upward {
    Publish(Box<Outgoing>),
    Pingreq,
}

/// One publish link. Its publishes and PINGREQs stay in order.
#[derive(Default)]
struct PublishWay {
    under_way: VecDeque<(Millis, Upward)>,
    last_at: Millis,
    /// When the answers to PINGREQs are there, in order.
    pongs: VecDeque<Millis>,
}

impl PublishWay {
    /// Publishes under way.
    fn publishes(&self) -> usize {
        let publishes = self.under_way.iter();
        publishes
            .filter(|(_, up)| matches!(up, Upward::Publish(_)))
            .count()
    }

    /// Something sets out.
    fn send(&mut self, up: Upward, at: Millis) {
        self.last_at = self.last_at.max(at);
        self.under_way.push_back((self.last_at, up));
    }
}

pub(crate) struct Broker {
    pub copies: Copies,
    /// The largest QoS that it grants.
    pub grants: QoS,
    pub away: bool,
    /// The data link is lost.
    pub unlinked: bool,
    pub held: BTreeMap<String, (FilterId, QoS)>,
    /// Filters held, with the QoS asked for.
    asked: BTreeMap<String, QoS>,
    /// Refuses these.
    pub refuses: &'static str,
    requests: VecDeque<(Millis, Request)>,
    /// The publishes that each publish link brings.
    publishes: Vec<PublishWay>,
    window: usize,
    answers: VecDeque<(Millis, Answered)>,
    down: VecDeque<(Millis, Item)>,
    last_at: [Millis; 3],
    /// Publishes seen, in order, for the oracle.
    pub forwarded: Vec<(Outgoing, bool)>,
    /// SUBSCRIBEs that were needless.
    pub faults: Vec<String>,
    /// Filters that were unsubscribed, with the time of their last SUBSCRIBE, for the oracle.
    pub unsubscribed: Vec<(String, Millis)>,
    /// When each filter was subscribed last.
    subscribed_at: BTreeMap<String, Millis>,
    pub retained: BTreeMap<String, (Vec<u8>, QoS)>,
}

impl Broker {
    pub(crate) fn new(copies: Copies, grants: QoS, window: usize, publish_links: usize) -> Self {
        Self {
            copies,
            grants,
            away: false,
            unlinked: false,
            held: BTreeMap::new(),
            asked: BTreeMap::new(),
            refuses: "no/#",
            requests: VecDeque::new(),
            publishes: (0..publish_links).map(|_| PublishWay::default()).collect(),
            window,
            answers: VecDeque::new(),
            down: VecDeque::new(),
            last_at: [Millis::ZERO; 3],
            forwarded: Vec::new(),
            faults: Vec::new(),
            unsubscribed: Vec::new(),
            subscribed_at: BTreeMap::new(),
            retained: BTreeMap::new(),
        }
    }

    pub(crate) fn idle(&self) -> bool {
        self.requests.is_empty()
            && self.publishes.iter().all(|way| way.publishes() == 0)
            && self.answers.is_empty()
            && self.down.is_empty()
    }

    /// Takes what the router has for it, and works.
    pub(crate) fn step(&mut self, router: &Router, rng: &mut Rng, now: Millis) {
        if self.away {
            return;
        }
        if !self.unlinked {
            // As the link does: a filter may take the place of another one.
            for (number, name) in router.next_unsubscribes(0, 8) {
                let at = self.at(0, rng, now);
                self.requests
                    .push_back((at, Request::Unsubscribe(number, name.to_string())));
            }
            for w in router.next_subscribes(0, 8) {
                let at = self.at(0, rng, now);
                self.requests
                    .push_back((at, Request::Subscribe(w.filter, w.name.to_string(), w.qos)));
            }
            if router.barrier_wanted(0) {
                let at = self.at(0, rng, now);
                self.requests
                    .push_back((at, Request::Ping(router.barrier_begins(0))));
            }
        }
        for (link, way) in self.publishes.iter_mut().enumerate() {
            while way.publishes() < self.window {
                let Some(outgoing) = router.publish_queues(link, |queues| queues.pop()) else {
                    break;
                };
                way.send(Upward::Publish(Box::new(outgoing)), now + delay(rng));
            }
            if router.publish_ping_due(link, now) {
                way.send(Upward::Pingreq, now);
            }
        }
        while self.requests.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, request)) = self.requests.pop_front() {
                self.request(request, rng, now);
            }
        }
        for link in 0..self.publishes.len() {
            let due = |(at, _): &mut (Millis, Upward)| *at <= now;
            while let Some((_, up)) = self.publishes[link].under_way.pop_front_if(due) {
                match up {
                    Upward::Publish(outgoing) => self.publish(*outgoing, rng, now),
                    Upward::Pingreq => self.publishes[link].pongs.push_back(now + PONG),
                }
            }
            while self.publishes[link]
                .pongs
                .pop_front_if(|at| *at <= now)
                .is_some()
            {
                router.publish_ping_answered(link);
            }
        }
        let mut due = Vec::new();
        while self.answers.front().is_some_and(|(at, _)| *at <= now) {
            due.extend(self.answers.pop_front().map(|(_, a)| a));
        }
        router.answered(&due, now);
    }

    /// The connections of the publish links are lost, and PINGREQs with them. Messages that were published
    /// arrive all the same.
    pub(crate) fn lose_pings(&mut self) {
        for way in &mut self.publishes {
            way.under_way
                .retain(|(_, up)| matches!(up, Upward::Publish(_)));
            way.pongs.clear();
        }
    }

    /// The data link is lost, and with it the packets under way, but for messages above QoS 0 of a
    /// session that is `kept`.
    pub(crate) fn lose_link(&mut self, kept: bool) {
        self.unlinked = true;
        self.requests.clear();
        // Unanswered requests are in doubt, and may be repeated.
        self.asked.clear();
        for (_, item) in &mut self.down {
            if let Item::Copies(copies) = item {
                let all = copies.len();
                copies.retain(|c| kept && c.qos > QoS::AtMostOnce);
                let partial = copies.len() < all;
                copies.iter_mut().for_each(|c| c.partial |= partial);
            }
        }
        self.down
            .retain(|(_, item)| matches!(item, Item::Copies(c) if !c.is_empty()));
        if !kept {
            self.held.clear();
        }
    }

    /// The next item of the data link that is due.
    pub(crate) fn next_item(&mut self, now: Millis) -> Option<Item> {
        if self.away || self.unlinked || self.down.front().is_none_or(|(at, _)| *at > now) {
            return None;
        }
        self.down.pop_front().map(|(_, item)| item)
    }

    /// A message of one of its other clients, or of ours.
    pub(crate) fn route(&mut self, message: &Copy, rng: &mut Rng, now: Millis) {
        if message.retain {
            if message.payload.is_empty() {
                self.retained.remove(&message.topic);
            } else {
                let value = (message.payload.clone(), message.qos);
                self.retained.insert(message.topic.clone(), value);
            }
        }
        let matching: Vec<(FilterId, String, QoS)> = self
            .held
            .iter()
            .filter(|(filter, _)| matching(filter, &message.topic))
            .map(|(filter, (number, qos))| (*number, filter.clone(), *qos))
            .collect();
        if matching.is_empty() {
            return;
        }
        let copy = |filters: Vec<(FilterId, String)>, qos: QoS| Copy {
            filters,
            topic: message.topic.clone(),
            payload: message.payload.clone(),
            qos: qos.min(message.qos),
            retain: message.retain,
            expires_at: message.expires_at,
            origin_mark: message.origin_mark,
            partial: false,
        };
        let copies = match self.copies {
            Copies::One => {
                let qos = matching
                    .iter()
                    .map(|(_, _, q)| *q)
                    .max()
                    .unwrap_or_default();
                let filters = matching.into_iter().map(|(n, f, _)| (n, f)).collect();
                vec![copy(filters, qos)]
            }
            _ => matching
                .into_iter()
                .map(|(n, f, q)| copy(vec![(n, f)], q))
                .collect(),
        };
        let at = self.at(2, rng, now);
        self.down.push_back((at, Item::Copies(copies)));
    }

    fn request(&mut self, request: Request, rng: &mut Rng, now: Millis) {
        let item = match request {
            Request::Subscribe(number, name, _) if matching_filter(self.refuses, &name) => {
                Item::Suback(number, ReasonCode::NOT_AUTHORIZED)
            }
            Request::Subscribe(number, name, qos) => {
                let granted = qos.min(self.grants);
                if let Some(before) = self.asked.insert(name.clone(), qos)
                    && before >= qos
                {
                    let fault = format!("{name} is asked for at {qos:?}, and was at {before:?}");
                    self.faults.push(fault);
                }
                self.subscribed_at.insert(name.clone(), now);
                self.held.insert(name, (number, granted));
                Item::Suback(number, ReasonCode(granted as u8))
            }
            Request::Unsubscribe(number, name) => {
                self.held.remove(&name);
                self.asked.remove(&name);
                if let Some(at) = self.subscribed_at.remove(&name) {
                    self.unsubscribed.push((name, at));
                }
                Item::Unsuback(number)
            }
            Request::Ping(number) => Item::Pingresp(number),
        };
        let at = self.at(2, rng, now);
        self.down.push_back((at, item));
    }

    fn publish(&mut self, outgoing: Outgoing, rng: &mut Rng, now: Millis) {
        let m = &outgoing.message;
        let refused = m.topic().starts_with("refused/");
        if !refused {
            let message = Copy {
                filters: Vec::new(),
                topic: m.topic().to_owned(),
                payload: m.payload().to_vec(),
                qos: m.qos(),
                retain: m.retain(),
                expires_at: m.expires_at(),
                origin_mark: outgoing.origin_mark,
                partial: false,
            };
            self.route(&message, rng, now);
        }
        if let Some(token) = outgoing.token {
            let reason = match refused {
                true => ReasonCode::NOT_AUTHORIZED,
                false => ReasonCode::SUCCESS,
            };
            let at = self.at(1, rng, now);
            self.answers.push_back((
                at,
                Answered {
                    session: outgoing.session,
                    token,
                    reason,
                    since: outgoing.since,
                },
            ));
        }
        self.forwarded.push((outgoing, refused));
    }

    /// A time after `now`, and not before what went before it on the same way.
    fn at(&mut self, way: usize, rng: &mut Rng, now: Millis) -> Millis {
        self.last_at[way] = self.last_at[way].max(now + delay(rng));
        self.last_at[way]
    }
}

/// How long PINGRESP of a publish link is under way.
const PONG: Duration = Duration::from_millis(20);

/// How long something is under way.
fn delay(rng: &mut Rng) -> Duration {
    Duration::from_millis(match rng.below(10) {
        0..4 => 0,
        4..9 => rng.below(40),
        _ => rng.below(1500),
    })
}

/// What the router is told of one copy.
pub(crate) fn arrived(copy: &Copy, copies: Copies, router: &Router) -> Arrived {
    Arrived {
        message: Message::new(&MessageSpec {
            topic: &copy.topic,
            properties: Default::default(),
            payload: &copy.payload,
            qos: copy.qos,
            retain: copy.retain,
            expires_at: copy.expires_at,
            strip_key: None,
            account: Some(router.queue_account().clone()),
        }),
        filters: match copies {
            Copies::Unnamed => Default::default(),
            _ => copy.filters.iter().map(|(n, _)| *n).collect(),
        },
        link: 0,
        origin_mark: copy.origin_mark,
        link_origin: None,
        skipped: false,
    }
}

/// Whether a filter matches a topic (§4.7), written apart from the program's own.
pub(crate) fn matching(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && (filter.starts_with('+') || filter.starts_with('#')) {
        return false;
    }
    matching_filter(filter, topic)
}

/// Whether each topic that matches `inner` matches `outer` too.
pub(crate) fn covers(outer: &str, inner: &str) -> bool {
    let (outer, inner): (Vec<&str>, Vec<&str>) =
        (outer.split('/').collect(), inner.split('/').collect());
    for (at, level) in outer.iter().enumerate() {
        match (*level, inner.get(at)) {
            ("#", _) => return true,
            ("+", Some(other)) if *other != "#" => {}
            (name, Some(other)) if name == *other => {}
            // `a/#` does not lie inside `a`, though both match "a".
            _ => return false,
        }
    }
    outer.len() == inner.len()
}

fn matching_filter(filter: &str, topic: &str) -> bool {
    let topic: Vec<&str> = topic.split('/').collect();
    let mut at = 0;
    for level in filter.split('/') {
        match level {
            "#" => return true,
            "+" if at < topic.len() => at += 1,
            name if topic.get(at) == Some(&name) => at += 1,
            _ => return false,
        }
    }
    at == topic.len()
}
