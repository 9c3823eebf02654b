//! The D links' machine: filters out, messages in.
//!
//! It never publishes, and its reader never waits for a client: what arrives is put into the
//! sessions at once, and acknowledged in the order of arrival.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::mqtt::{
    AckKind, Message, MessageSpec, Packet, Property, Publish, QoS, ReasonCode, SubscribeOptions,
    Version, encode_ack, encode_subscribe, encode_unsubscribe,
};
use crate::router::{Arrived, LinkSession, Router};
use crate::session::Incarnation;
use crate::store::Store;
use crate::telemetry::metrics;
use crate::time::Millis;
use crate::topics::FilterId;

use crate::upstream::RESERVED_KEY;
use crate::upstream::link::machine::{LinkEnd, Machine, Up};
use crate::upstream::link::redelivery::Redelivery;

/// SUBSCRIBE and UNSUBSCRIBE packets that may be unanswered.
const REQUESTS_MAX: usize = 1000;
/// Filters in one packet where the core has no identifiers: AWS IoT Core takes no more.
const FILTERS_IN_PACKET: usize = 8;
/// Acknowledgements wait for nobody but the core itself.
const PACE: Duration = Duration::from_millis(2);
/// How often the core is asked whether it has our acknowledgements, milliseconds.
const CONFIRM_EVERY: u64 = 2000;
/// Bytes of filters in one packet.
const BYTES_IN_PACKET: usize = 8 * 1024;

/// A D link.
#[derive(Debug)]
pub struct Data {
    router: Arc<Router>,
    link: usize,
    /// Tells our origin marks from those of other processes.
    instance: u64,
    probes: Arc<str>,
    version: Version,
    identifiers: bool,
    keeps_retain: bool,
    connected_before: bool,
    last_id: u16,
    requests: HashMap<u16, Request, RandomState>,
    /// QoS 2 received and not released: kept while the core keeps the session.
    received: HashSet<u16, RandomState>,
    redelivery: Redelivery,
    batch: Vec<Arrived>,
    /// When the last PINGREQ behind acknowledgements was asked for.
    confirmed_at: u64,
    ping: bool,
    /// What had been received when each PINGREQ under way was sent, and its number.
    marks: VecDeque<(u64, u64)>,
}

#[derive(Debug)]
enum Request {
    Subscribe(SmallVec<[FilterId; 1]>),
    Unsubscribe(SmallVec<[FilterId; 1]>),
}

impl Data {
    /// The machine of D link `link`, with what `store` remembers of it.
    /// Messages below `probes` are of probes, and nobody's.
    pub fn new(
        router: Arc<Router>,
        link: usize,
        instance: u64,
        probes: Arc<str>,
        store: &dyn Store,
    ) -> Self {
        Self {
            router,
            link,
            instance,
            probes,
            version: Version::V5,
            identifiers: true,
            keeps_retain: true,
            connected_before: false,
            last_id: 0,
            requests: HashMap::default(),
            received: HashSet::default(),
            redelivery: Redelivery::new(store.ring(link)),
            batch: Vec::new(),
            confirmed_at: 0,
            ping: false,
            marks: VecDeque::new(),
        }
    }

    fn publish(&mut self, p: &Publish<'_>, now: Millis, out: &mut Vec<u8>) -> Result<(), LinkEnd> {
        metrics().upstream_received[crate::upstream::qos_label(p.qos)].increment(1);
        match p.qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => {
                encode_ack(
                    self.version,
                    AckKind::Puback,
                    p.packet_id,
                    ReasonCode::SUCCESS,
                    None,
                    out,
                );
                if self.redelivery.seen(p) {
                    metrics().upstream_redeliveries_suppressed.increment(1);
                    return Ok(());
                }
            }
            QoS::ExactlyOnce => {
                encode_ack(
                    self.version,
                    AckKind::Pubrec,
                    p.packet_id,
                    ReasonCode::SUCCESS,
                    None,
                    out,
                );
                if !self.received.insert(p.packet_id) {
                    metrics().upstream_redeliveries_suppressed.increment(1);
                    return Ok(());
                }
            }
        }
        if !self.keeps_retain && p.retain {
            // Without Retain Handling each SUBSCRIBE brings a replay; retained messages are
            // fetched on R for those who want them.
            return Ok(());
        }
        if crate::upstream::is_probe(p.topic, &self.probes) {
            return Ok(());
        }
        let mut filters: SmallVec<[FilterId; 2]> = SmallVec::new();
        if self.identifiers && p.has_subscription_ids {
            for identifier in p.subscription_ids() {
                if let Some(number) = FilterId::from_subscription_identifier(identifier)
                    && !filters.contains(&number)
                {
                    filters.push(number);
                }
            }
        }
        let message = Message::new(&MessageSpec {
            topic: p.topic,
            properties: p.properties,
            payload: p.payload,
            qos: p.qos,
            retain: p.retain,
            expires_at: crate::upstream::expires_at(p.message_expiry, now),
            strip_key: Some(RESERVED_KEY),
            account: Some(self.router.queue_account().clone()),
        });
        self.batch.push(Arrived {
            message,
            filters,
            link: self.link,
            origin_mark: origin_mark(p, self.instance),
        });
        Ok(())
    }

    fn answered(&mut self, packet_id: u16, codes: &[u8], now: Millis) -> Result<(), LinkEnd> {
        // What arrived before the answer was sent under the old state of things.
        self.flush(now);
        match self.requests.remove(&packet_id) {
            Some(Request::Subscribe(numbers)) => {
                for (i, number) in numbers.iter().enumerate() {
                    let code = codes.get(i).or(codes.last()).copied().unwrap_or(0x80);
                    self.router.suback(*number, ReasonCode(code), now);
                }
                Ok(())
            }
            Some(Request::Unsubscribe(numbers)) => {
                for number in numbers {
                    self.router.unsuback(number, now);
                }
                Ok(())
            }
            None => Err(LinkEnd::protocol(format!(
                "SUBACK or UNSUBACK for packet identifier {packet_id}, which is not in use"
            ))),
        }
    }

    fn flush(&mut self, now: Millis) {
        if !self.batch.is_empty() {
            self.router.fan_out(&mut self.batch, now);
            self.batch.clear();
        }
    }

    fn free_id(&mut self) -> u16 {
        crate::upstream::next_id(&mut self.last_id, |id| self.requests.contains_key(&id))
    }

    fn subscribe(&mut self, out: &mut Vec<u8>) {
        let in_packet = if self.identifiers {
            1
        } else {
            FILTERS_IN_PACKET
        };
        while self.requests.len() < REQUESTS_MAX {
            let room = REQUESTS_MAX - self.requests.len();
            let wanted = self.router.next_subscribes(self.link, room.min(200));
            if wanted.is_empty() {
                return;
            }
            let mut rest = &wanted[..];
            while !rest.is_empty() {
                let mut bytes = 0;
                let mut count = 0;
                for w in rest.iter().take(in_packet) {
                    bytes += w.name.len();
                    if count > 0 && bytes > BYTES_IN_PACKET {
                        break;
                    }
                    count += 1;
                }
                let (these, others) = rest.split_at(count);
                rest = others;
                let id = self.free_id();
                let identifier = self
                    .identifiers
                    .then(|| these[0].number.subscription_identifier());
                encode_subscribe(
                    self.version,
                    id,
                    identifier,
                    these
                        .iter()
                        .map(|w| (&*w.name, options(w.qos, self.keeps_retain))),
                    out,
                );
                let numbers = these.iter().map(|w| w.number).collect();
                self.requests.insert(id, Request::Subscribe(numbers));
            }
        }
    }

    fn unsubscribe(&mut self, out: &mut Vec<u8>) {
        while self.requests.len() < REQUESTS_MAX {
            let leaving = self.router.next_unsubscribes(self.link, FILTERS_IN_PACKET);
            if leaving.is_empty() {
                return;
            }
            for these in crate::upstream::by_bytes(&leaving, |(_, name)| name.len()) {
                let id = self.free_id();
                encode_unsubscribe(self.version, id, these.iter().map(|(_, n)| &**n), out);
                let numbers = these.iter().map(|(n, _)| *n).collect();
                self.requests.insert(id, Request::Unsubscribe(numbers));
            }
        }
    }
}

impl Machine for Data {
    fn up(&mut self, up: &Up, now: Millis, out: &mut Vec<u8>) {
        self.version = up.version;
        self.identifiers = up.identifiers;
        self.keeps_retain = up.keeps_retain;
        self.requests.clear();
        if up.doubtful {
            // Identifiers of another session mean nothing: in doubt it is delivered.
            self.received.clear();
        }
        if up.session_present {
            self.redelivery.resumed();
        } else {
            self.received.clear();
            self.redelivery.began_anew();
        }
        let first = !std::mem::replace(&mut self.connected_before, true);
        // Filters that the core may not have are subscribed again.
        let kept = match (up.session_present, up.doubtful) {
            (false, _) => LinkSession::New,
            (true, true) => LinkSession::Doubtful,
            (true, false) => LinkSession::Resumed,
        };
        let gap = self.router.data_link_up(self.link, kept, first, now);
        if gap {
            tracing::warn!(
                link = self.link,
                "The core lost this data link's session: its filters are subscribed again, messages of the gap are missed"
            );
        }
        self.poll(now, out);
    }

    fn packet(
        &mut self,
        packet: &Packet<'_>,
        now: Millis,
        out: &mut Vec<u8>,
    ) -> Result<(), LinkEnd> {
        match packet {
            Packet::Publish(p) => self.publish(p, now, out),
            Packet::Pubrel(a) => {
                self.received.remove(&a.packet_id);
                encode_ack(
                    self.version,
                    AckKind::Pubcomp,
                    a.packet_id,
                    ReasonCode::SUCCESS,
                    None,
                    out,
                );
                Ok(())
            }
            Packet::Suback(s) => self.answered(s.packet_id, s.codes, now),
            Packet::Unsuback(u) => self.answered(u.packet_id, u.codes, now),
            _ => Err(LinkEnd::protocol(
                "a packet that a data link does not expect",
            )),
        }
    }

    fn batch_ended(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.flush(now);
        self.poll(now, out);
    }

    fn poll(&mut self, now: Millis, out: &mut Vec<u8>) {
        self.subscribe(out);
        self.unsubscribe(out);
        if !self.marks.is_empty() {
            return;
        }
        if !self.redelivery.is_empty() && self.confirmed_at + CONFIRM_EVERY <= now {
            self.confirmed_at = now;
            self.ping = true;
        }
        self.ping |= self.router.fence_wanted(self.link);
    }

    fn pace(&self) -> Option<Duration> {
        // A core whose window may be small gets its acknowledgements at once.
        let paced = self.identifiers && self.requests.is_empty() && self.marks.is_empty();
        paced.then_some(PACE)
    }

    fn wants_ping(&mut self) -> bool {
        let wanted = std::mem::take(&mut self.ping);
        if wanted {
            let number = self.router.fence_begins(self.link);
            self.marks.push_back((self.redelivery.mark(), number));
        }
        wanted
    }

    fn ping_answered(&mut self, now: Millis) {
        // The core read our acknowledgements before it read the PINGREQ behind them.
        if let Some((mark, number)) = self.marks.pop_front() {
            self.redelivery.confirmed(mark);
            self.flush(now);
            self.router.fence_passed(self.link, number, now);
        }
    }

    fn down(&mut self, _end: &LinkEnd, now: Millis) {
        self.flush(now);
        self.requests.clear();
        self.marks.clear();
        self.ping = false;
        self.router.data_link_down(self.link, now);
    }
}

/// Retain Handling 2 and Retain As Published from the first SUBSCRIBE; never No Local, which
/// would hide every client's publishes from every other.
fn options(qos: QoS, retain_as_published: bool) -> SubscribeOptions {
    SubscribeOptions {
        qos,
        no_local: false,
        retain_as_published,
        retain_handling: 2,
    }
}

/// The origin mark, if this process wrote it.
fn origin_mark(publish: &Publish<'_>, instance: u64) -> Option<Incarnation> {
    if publish.properties.raw().len() < RESERVED_KEY.len() {
        return None;
    }
    for property in publish.properties.iter() {
        if let Property::UserProperty(key, value) = property
            && key == RESERVED_KEY
        {
            return parse_mark(value, instance);
        }
    }
    None
}

fn parse_mark(value: &str, instance: u64) -> Option<Incarnation> {
    let (of, mark) = value.split_once('.')?;
    if u64::from_str_radix(of, 16).ok()? != instance {
        return None;
    }
    Incarnation::new(u64::from_str_radix(mark, 16).ok()?)
}

#[cfg(test)]
mod tests;
