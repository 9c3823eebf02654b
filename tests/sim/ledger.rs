//! The messages that one session is owed, and the messages written for it.

mod wants;

use std::collections::{BTreeMap, BTreeSet};

use tidegate::mqtt::{Publish, QoS, SubscribeOptions, Version};
use tidegate::streams::StreamId;
use tidegate::time::{Deadline, Millis};

use wants::{Replayed, wants};

pub(crate) use wants::Want;

/// One message that a session is to get, or may get.
#[derive(Clone, Debug)]
pub(crate) struct Owed {
    pub key: String,
    pub topic: String,
    /// Order in which the broker took the messages.
    pub event: u64,
    /// A granted subscription matches; else only one that is not answered yet.
    pub must: bool,
    /// The QoS that the delivery may have.
    pub qos: Vec<QoS>,
    pub ids_needed: Vec<u32>,
    pub ids_allowed: Vec<u32>,
    /// RETAIN as published, and who wants to see it.
    pub retain_must: bool,
    pub retain_may: bool,
    pub retained: bool,
    pub expires_at: Option<Deadline>,
    /// It may have waited for the retained messages of its subscription, while others went on.
    pub deferred: bool,
    pub written: bool,
}

#[derive(Clone, Debug)]
struct Flight {
    packet_id: u16,
    /// Where it was written first, and last.
    first: StreamId,
    stream: StreamId,
    key: String,
    qos: QoS,
    released: bool,
    retain: bool,
    ids: Vec<u32>,
}

/// What a connection may be sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    pub receive_max: usize,
    pub open: BTreeSet<u16>,
    /// Messages that were in flight at the start of the connection and have been sent again.
    resent: BTreeSet<u16>,
    /// In order, with the streams whose order they keep.
    to_resend: Vec<(u16, StreamId)>,
    /// Sent again because their stream has ended, in any order with others.
    again: BTreeSet<u16>,
    /// An eviction may take the messages in flight.
    pub evicts: bool,
    /// The time at which the session writes.
    pub now: Millis,
}

/// One subscription, as the packets show it.
#[derive(Clone, Debug)]
pub(crate) struct Sub {
    pub filter: String,
    pub granted: Option<(QoS, SubscribeOptions, u32)>,
    /// When the grant was written.
    pub granted_at: Option<Millis>,
    /// Asked and not answered: connection, packet identifier, index, options, identifier.
    pub asked: Vec<Ask>,
    /// Since when No Local is asked for.
    pub no_local_since: Millis,
    /// It may be granted before the broker has it, after the hold time.
    pub in_doubt: bool,
    /// It was: the broker may grant less, or in steps.
    pub guessed: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub link: u64,
    pub packet_id: u16,
    pub index: usize,
    pub options: SubscribeOptions,
    pub identifier: u32,
    pub at: Millis,
    /// In order of arrival.
    pub number: u64,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    pub owed: Vec<Owed>,
    /// Gaps of the data link that the session was told of, whether or not it missed a message.
    pub link_gaps: u64,
    /// Gaps that the session was told of because a filter was granted without the broker's answer,
    /// whether or not it missed a message.
    pub late_gaps: u64,
    /// When it asked for each filter whose answer may still be due.
    pub asked_at: Vec<Millis>,
    /// For QoS 0, and for QoS 1 and 2, on each stream: the next entry that may be written. Streams
    /// keep no order with each other.
    next: BTreeMap<(usize, StreamId), usize>,
    /// The same for each topic: the last entry that was written.
    last: BTreeMap<(usize, StreamId, String), usize>,
    inflight: Vec<Flight>,
    /// The newest retained message that was sent, by class, stream and topic.
    replayed: BTreeMap<(bool, StreamId, String), Replayed>,
    pub wants: Vec<Want>,
    pub subs: Vec<Sub>,
    /// Filters that it unsubscribed from: a message on its way by one may come for another.
    pub left: BTreeSet<String>,
    /// Retained messages that might have been live ones or replays.
    pub ambiguous: usize,
    mistaken: usize,
    /// The retained values delivered live, by topic and whether they are above QoS 0: QoS 0 passes
    /// messages that wait for the window.
    live: BTreeMap<(String, bool), Vec<Live>>,
    /// Connections that have begun.
    connections: u64,
}

/// A retained value that was delivered live.
#[derive(Clone, Copy, Debug)]
struct Live {
    event: u64,
    connection: u64,
    stream: StreamId,
    packet_id: u16,
}

impl Live {
    /// Whether this value was surely delivered before the PUBLISH `p` on a stream of `connection`.
    /// The streams of one connection keep no order with each other, but packet identifiers are given
    /// in the order of sending.
    fn is_before(&self, connection: u64, stream: StreamId, p: &Publish<'_>) -> bool {
        let numbered = p.qos > QoS::AtMostOnce;
        self.connection != connection
            || self.stream == stream
            || numbered && p.packet_id.wrapping_sub(self.packet_id) < 0x8000
    }
}

impl Owed {
    /// Whether a PUBLISH can be this one.
    fn fits(&self, version: Version, topic: &str, p: &Publish<'_>) -> Result<(), String> {
        if self.topic != topic {
            return Err(format!("it is on {topic}, published on {}", self.topic));
        }
        if !self.qos.contains(&p.qos) {
            let (is, fit) = (p.qos, &self.qos);
            return Err(format!("it has {is:?}, not one of {fit:?} [MQTT-3.8.4-8]"));
        }
        if p.retain && !self.retain_may || !p.retain && self.retain_must {
            return Err(format!("RETAIN is {} [MQTT-3.3.1-12]", p.retain));
        }
        if version == Version::V5 {
            let ids: Vec<u32> = p.subscription_ids().collect();
            let missing = self.ids_needed.iter().find(|i| !ids.contains(i));
            let foreign = ids.iter().find(|i| !self.ids_allowed.contains(i));
            if missing.or(foreign).is_some() {
                return Err(format!(
                    "identifiers {ids:?}, needed {:?}, allowed {:?} [MQTT-3.3.4-4]",
                    self.ids_needed, self.ids_allowed
                ));
            }
        }
        Ok(())
    }
}

impl Ledger {
    /// A connection of this session begins.
    pub(crate) fn window(&mut self, receive_max: usize) -> Window {
        self.connections += 1;
        for want in &mut self.wants {
            want.asked = None;
            want.suback_lost = false;
            want.in_order = false;
        }
        Window {
            receive_max,
            open: BTreeSet::new(),
            resent: BTreeSet::new(),
            evicts: false,
            now: Millis::ZERO,
            again: BTreeSet::new(),
            to_resend: self
                .inflight
                .iter()
                .filter(|f| !f.released)
                .map(|f| (f.packet_id, f.first))
                .collect(),
        }
    }

    /// The session wrote a PUBLISH.
    pub(crate) fn wrote(
        &mut self,
        w: &mut Window,
        version: Version,
        stream: StreamId,
        topic: &str,
        key: &str,
        p: &Publish<'_>,
    ) -> Result<(), String> {
        if p.dup {
            return self.again(w, stream, key, p);
        }
        if p.qos > QoS::AtMostOnce {
            self.opens(w, stream, key, p)?;
        }
        if p.message_expiry == Some(0) {
            return Err("an expired message is sent [MQTT-3.3.2-5]".into());
        }
        let class = usize::from(p.qos > QoS::AtMostOnce);
        let from = self.next.get(&(class, stream)).copied().unwrap_or(0);
        // A publisher may have sent it twice: the first that it can be.
        let candidates = self.owed.iter().enumerate();
        let candidates = candidates.filter(|(at, o)| o.key == key && (*at >= from || o.deferred));
        let (mut at, mut first, mut misfit) = (None, None, None);
        for (index, owed) in candidates {
            match owed.fits(version, topic, p) {
                Ok(()) => {
                    first = first.or(Some(index));
                    if !owed.written {
                        at = Some(index);
                        break;
                    }
                }
                Err(error) if !owed.written => misfit = misfit.or(Some(error)),
                Err(_) => {}
            }
        }
        // Where a retained message could be both, it says nothing of the order.
        let mut asked = self.wants.iter_mut();
        if p.retain
            && at.is_some()
            && let Some(want) = asked.find(|w| wants(w, topic, key))
        {
            self.ambiguous += 1;
            *want.got.entry(key.to_owned()).or_default() += 1;
            return Ok(());
        }
        if at.is_none() && self.twin(version, topic, key, p) {
            return Ok(());
        }
        let Some(at) = at else {
            return match (p.retain, misfit) {
                (false, Some(error)) => Err(error),
                _ => self.replay(stream, topic, key, p),
            };
        };
        self.is_in_order(at, class, stream)?;
        self.goes_live(topic, (class > 0, stream), w.now);
        self.is_newer(at, topic, (class > 0, stream))?;
        let owed = &mut self.owed[at];
        owed.written = true;
        // Of a message that was published twice, nobody can tell which one this is: the other may
        // have come at QoS 0 or on another stream.
        if !owed.deferred {
            self.next.insert((class, stream), first.unwrap_or(at) + 1);
        }
        if owed.retained {
            let live = self.live.entry((topic.to_owned(), class > 0));
            live.or_default().push(Live {
                event: owed.event,
                connection: self.connections,
                stream,
                packet_id: p.packet_id,
            });
        }
        Ok(())
    }

    /// Messages of one topic keep their order, those too that waited for retained messages.
    fn is_in_order(&mut self, at: usize, class: usize, stream: StreamId) -> Result<(), String> {
        let owed = &self.owed[at];
        // Of a message that was published twice, nobody can tell which one this is.
        if self.owed.iter().filter(|o| o.key == owed.key).count() > 1 {
            return Ok(());
        }
        let way = (class, stream, owed.topic.clone());
        match self.last.insert(way, at) {
            Some(last) if last > at => Err(format!(
                "it comes behind {} on its topic [MQTT-4.6.0-5]",
                self.owed[last].key
            )),
            _ => Ok(()),
        }
    }

    /// A PUBLISH above QoS 0 takes a place in the client's window.
    fn opens(
        &mut self,
        w: &mut Window,
        stream: StreamId,
        key: &str,
        p: &Publish<'_>,
    ) -> Result<(), String> {
        if !w.evicts {
            let unreceived = |f: &Flight, id: u16| f.packet_id == id && !f.released;
            let open = |id: &&u16| self.inflight.iter().any(|f| unreceived(f, **id));
            let mut waiting = w.to_resend.iter().map(|(id, _)| id);
            if let Some(id) = waiting.find(|id| open(id) && !w.resent.contains(id)) {
                return Err(format!(
                    "a new PUBLISH before {id} is sent again [MQTT-4.6.0-1]"
                ));
            }
        }
        if w.evicts {
            self.inflight.retain(|f| f.packet_id != p.packet_id);
        }
        if self.inflight.iter().any(|f| f.packet_id == p.packet_id) {
            return Err(format!(
                "packet identifier {} is in use [MQTT-2.2.1-4]",
                p.packet_id
            ));
        }
        self.inflight.push(Flight {
            packet_id: p.packet_id,
            first: stream,
            stream,
            key: key.to_owned(),
            qos: p.qos,
            released: false,
            retain: p.retain,
            ids: p.subscription_ids().collect(),
        });
        w.open.insert(p.packet_id);
        if w.open.len() > w.receive_max {
            return Err(format!(
                "{} unacknowledged, Receive Maximum {} [MQTT-3.3.4-9]",
                w.open.len(),
                w.receive_max
            ));
        }
        Ok(())
    }

    /// A message that was published twice, and whose later copy came first, at QoS 0.
    fn twin(&mut self, version: Version, topic: &str, key: &str, p: &Publish<'_>) -> bool {
        let mut same = self.owed.iter().filter(|o| o.key == key && o.written);
        if !same.any(|o| o.fits(version, topic, p).is_ok()) {
            return false;
        }
        let mut left = self.owed.iter_mut().filter(|o| o.key == key && !o.written);
        let left = left.next();
        let found = left.is_some();
        if let Some(owed) = left {
            owed.written = true;
        }
        found
    }

    /// A stream has ended: unacknowledged messages written on it are sent again.
    pub(crate) fn stream_closed(&mut self, w: &mut Window, stream: StreamId) {
        let open = self.inflight.iter().filter(|f| f.stream == stream);
        w.again.extend(open.map(|f| f.packet_id));
    }

    fn again(
        &mut self,
        w: &mut Window,
        stream: StreamId,
        key: &str,
        p: &Publish<'_>,
    ) -> Result<(), String> {
        let id = p.packet_id;
        if !stream.is_control() {
            return Err(format!("DUP for {id} on a data stream"));
        }
        let Some(flight) = self.inflight.iter_mut().find(|f| f.packet_id == id) else {
            return Err(format!("DUP for {id}, which was never sent [MQTT-3.3.1-3]"));
        };
        if flight.released {
            return Err(format!("PUBLISH {id} again after PUBREC [MQTT-4.3.3-6]"));
        }
        let ids = flight.ids.iter().copied();
        let same = flight.retain == p.retain && p.subscription_ids().eq(ids);
        if flight.key != key || flight.qos != p.qos || !same {
            return Err(format!("DUP {id} is another message"));
        }
        flight.stream = stream;
        if w.again.remove(&id) {
            return Ok(());
        }
        let mut expected = w.to_resend.iter();
        let Some((_, first)) = expected.by_ref().find(|(i, _)| *i == id) else {
            return Err(format!("{id} is sent again, and was not sent before"));
        };
        let later = |(i, on): &(u16, StreamId)| on == first && w.resent.contains(i);
        match w.resent.contains(&id) || expected.any(later) {
            false => {
                w.resent.insert(id);
            }
            true => {
                return Err(format!(
                    "{id} is sent again out of order or twice [MQTT-4.4.0-1]"
                ));
            }
        }
        w.open.insert(id);
        if w.open.len() > w.receive_max {
            return Err("Receive Maximum exceeded on resume [MQTT-3.3.4-9]".into());
        }
        Ok(())
    }

    /// The client's PUBACK, PUBREC or PUBCOMP came to the session.
    pub(crate) fn acknowledged(&mut self, w: &mut Window, id: u16, qos: QoS) {
        w.open.remove(&id);
        self.inflight.retain(|f| f.packet_id != id || f.qos != qos);
    }

    pub(crate) fn received(&mut self, id: u16) {
        let known = self.inflight.iter_mut().find(|f| f.packet_id == id);
        if let Some(flight) = known {
            flight.released = true;
        }
    }

    /// PUBREL is written.
    pub(crate) fn released(&mut self, id: u16) -> Result<(), String> {
        match self.inflight.iter().find(|f| f.packet_id == id) {
            Some(f) if f.released => Ok(()),
            _ => Err(format!(
                "PUBREL for {id}, which has no PUBREC [MQTT-4.3.3-4]"
            )),
        }
    }

    /// Owed for sure and never written: all, and all without the messages that expired by `now`.
    pub(crate) fn missing(&self, now: Millis) -> (usize, usize, usize) {
        let left = || self.owed.iter().filter(|o| !o.written);
        // Sent twice by its publisher, a message is one key owed twice: the written copy may have
        // been the one that was owed for sure.
        let spare = |o: &Owed| {
            let same = self.owed.iter().filter(|s| s.key == o.key && s.written);
            same.filter(|s| !s.must).count()
        };
        let missed = |o: &&Owed| {
            let before = left().filter(|s| s.must && s.key == o.key);
            o.must && before.take_while(|s| !std::ptr::eq(*s, *o)).count() >= spare(o)
        };
        let must = left().filter(missed).count();
        let expired = |o: &&Owed| o.expires_at.is_some_and(|at| at.is_due(now));
        let alive = left().filter(missed).filter(|o| !expired(o)).count();
        (must, alive, left().count())
    }

    /// Messages above QoS 0 that the session was to get and did not, and that have not expired.
    pub(crate) fn lost_for_no_limit(&self, now: Millis) -> usize {
        let sure = |o: &&Owed| o.must && !o.qos.contains(&QoS::AtMostOnce);
        let lost = self.owed.iter().filter(|o| !o.written).filter(sure);
        let lost = lost.filter(|o| !o.expires_at.is_some_and(|at| at.is_due(now)));
        // Sent twice by its publisher, a message is one key owed twice.
        let twice = |o: &&Owed| self.owed.iter().filter(|s| s.key == o.key).count() > 1;
        lost.filter(|o| !twice(o)).count()
    }
}
