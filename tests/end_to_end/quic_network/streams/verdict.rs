//! The rules for messages on several streams: deliveries to a client, and a client's publishes at a
//! listener.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tidegate_kit::audit::Stamp;
use tidegate_kit::streams::CONTROL;
use tidegate_kit::wire::Publish;

/// The connection and the stream of one delivery.
type Place = (u32, u32);

/// The messages that a client got.
#[derive(Default)]
pub(super) struct Deliveries {
    /// The number of the connection.
    pub connection: u32,
    /// By flow, the sequence numbers of the messages that came, with the place of the last copy.
    flows: HashMap<u32, BTreeMap<u64, Place>>,
    /// The last message by place and flow: streams are not ordered among each other.
    last: HashMap<(Place, u32), u64>,
    /// QoS 2 deliveries that have not been released.
    unreleased: HashMap<u16, (u32, u64)>,
    /// Streams of this connection that the client or the server has ended.
    ended: BTreeSet<u32>,
    /// The number of distinct messages that came.
    pub fresh: usize,
    /// The numbers of deliveries on data streams and on control.
    pub on_data: u64,
    pub on_control: u64,
    /// The number of legal second copies.
    pub again: u64,
}

impl Deliveries {
    pub(super) fn connected(&mut self) {
        self.connection += 1;
        self.ended.clear();
    }

    /// Notes that the client acknowledges no further delivery on this stream.
    pub(super) fn ended(&mut self, stream: u32) {
        self.ended.insert(stream);
    }

    /// Whether a packet may have been lost on the way to the client, so that a message which it
    /// never saw may carry DUP.
    fn may_miss(&self) -> bool {
        self.connection > 1 || !self.ended.is_empty()
    }

    /// Judges a delivery. Returns false if the client ignores it, because its stream has ended and
    /// it comes again.
    pub(super) fn take(&mut self, stream: u32, publish: &Publish) -> Result<bool, String> {
        let stamp = Stamp::read(&publish.payload).ok_or("the payload has no stamp")?;
        let (flow, seq, place) = (stamp.stream, stamp.seq, (self.connection, stream));
        let wrong = |what: &str| {
            let (qos, id, dup) = (publish.qos, publish.id, publish.dup);
            Err(format!(
                "{seq} of flow {flow}, QoS {qos}, identifier {id}, DUP {dup}, on {place:?}: {what}"
            ))
        };
        if publish.qos != super::qos_of(flow) || publish.retain {
            return wrong("QoS or RETAIN differ from the publish");
        }
        if self.ended.contains(&stream) {
            return Ok(false);
        }
        if stream == CONTROL {
            self.on_control += 1;
        } else {
            self.on_data += 1;
        }
        let last = self.last.insert((place, flow), seq).unwrap_or(0);
        if seq <= last {
            return wrong(&format!("behind {last}"));
        }
        let before = self.flows.entry(flow).or_default().insert(seq, place);
        if publish.qos == 2 {
            match self.unreleased.insert(publish.id, (flow, seq)) {
                // Until PUBREL, the packet identifier names the message.
                Some(known) if known != (flow, seq) => {
                    return wrong("another message still uses the packet identifier");
                }
                Some(_) if !publish.dup => return wrong("a second copy without DUP"),
                Some(_) => {}
                None if before.is_some() => return wrong("a second delivery after PUBREL"),
                None => {}
            }
        }
        let Some((connection, on)) = before else {
            self.fresh += 1;
            return match publish.dup && !self.may_miss() {
                true => wrong("DUP on the first delivery, with no connection or stream lost"),
                false => Ok(true),
            };
        };
        self.again += 1;
        if !publish.dup {
            return wrong("a second copy without DUP");
        }
        if connection == self.connection && !self.ended.contains(&on) {
            return wrong("a second copy although the stream of the first is alive");
        }
        Ok(true)
    }

    pub(super) fn released(&mut self, id: u16) {
        self.unreleased.remove(&id);
    }

    /// Whether all messages of `flows` up to `count` have come and been released.
    pub(super) fn complete(&self, flows: impl IntoIterator<Item = u32>, count: u64) -> bool {
        let whole = |flow| self.flows.get(&flow).map_or(0, |f| f.len()) as u64 == count;
        self.unreleased.is_empty() && flows.into_iter().all(whole)
    }

    /// The last sequence number by flow.
    pub(super) fn last(&self) -> HashMap<u32, u64> {
        let last = |here: &BTreeMap<u64, Place>| here.last_key_value().map_or(0, |(seq, _)| *seq);
        self.flows
            .iter()
            .map(|(f, here)| (*f, last(here)))
            .collect()
    }

    /// Checks that each flow's messages up to `last` have come.
    pub(super) fn gapless(&self, last: &HashMap<u32, u64>) -> Result<(), String> {
        for (flow, last) in last {
            let missing = self.missing(*flow, *last);
            if !missing.is_empty() {
                let connection = self.connection;
                return Err(format!(
                    "flow {flow} up to {last}: {missing:?} did not arrive by connection {connection}"
                ));
            }
        }
        Ok(())
    }

    /// The first five missing messages, for an error text.
    pub(super) fn missing(&self, flow: u32, count: u64) -> Vec<u64> {
        let here = self.flows.get(&flow);
        let missing = |seq: &u64| here.is_none_or(|h| !h.contains_key(seq));
        (1..=count).filter(missing).take(5).collect()
    }
}

/// The publishes of all clients that a listener received.
#[derive(Default)]
pub(super) struct Heard {
    last: HashMap<u32, u64>,
    again: HashMap<(u32, u64), u64>,
}

impl Heard {
    /// Checks that each flow is in order; only QoS 1 may come again.
    pub(super) fn take(&mut self, publish: &Publish) -> Result<(), String> {
        let stamp = Stamp::read(&publish.payload).ok_or("the payload has no stamp")?;
        let last = self.last.entry(stamp.stream).or_default();
        match stamp.seq {
            seq if seq == *last + 1 => *last = seq,
            seq if seq <= *last && super::qos_of(stamp.stream) == 1 => {
                *self.again.entry((stamp.stream, seq)).or_default() += 1;
            }
            seq => {
                let flow = stamp.stream;
                return Err(format!("message {seq} of flow {flow} arrived after {last}"));
            }
        }
        Ok(())
    }

    /// Checks at the end that `count` messages of each flow came, and none more often than it was
    /// sent.
    pub(super) fn judge(
        &self,
        flows: impl IntoIterator<Item = u32>,
        count: u64,
        resent: &HashMap<(u32, u64), u64>,
    ) -> Result<(), String> {
        for flow in flows {
            let last = self.last.get(&flow).copied().unwrap_or_default();
            if last != count {
                return Err(format!(
                    "{last} messages of flow {flow} arrived, not {count}"
                ));
            }
        }
        for (message, times) in &self.again {
            let may = resent.get(message).copied().unwrap_or_default();
            if *times > may {
                return Err(format!(
                    "{message:?} was sent again {may} times and arrived again {times} times"
                ));
            }
        }
        Ok(())
    }
}
