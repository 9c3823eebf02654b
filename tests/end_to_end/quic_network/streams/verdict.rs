//! What may come to a client that has several streams: of its deliveries, and at the listener of its
//! publishes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tidegate_kit::audit::Stamp;
use tidegate_kit::streams::CONTROL;
use tidegate_kit::wire::Publish;

/// One delivery of a message: the connection and the stream that it came on.
type Place = (u32, u32);

/// What a client got.
#[derive(Default)]
pub struct Deliveries {
    /// Number of the connection.
    pub connection: u32,
    /// By flow, the messages that came and where the last copy did.
    flows: HashMap<u32, BTreeMap<u64, Place>>,
    /// By place and flow, the last message: streams keep no order with each other.
    last: HashMap<(Place, u32), u64>,
    /// QoS 2 deliveries that are not released.
    unreleased: HashMap<u16, (u32, u64)>,
    /// Streams of this connection that the client has ended, or the server.
    ended: BTreeSet<u32>,
    /// Messages that came.
    pub fresh: usize,
    /// Deliveries on data streams, and on control.
    pub on_data: u64,
    pub on_control: u64,
    /// Copies that came again, as they must.
    pub again: u64,
}

impl Deliveries {
    pub fn connected(&mut self) {
        self.connection += 1;
        self.ended.clear();
    }

    /// The client acknowledges nothing more on this stream.
    pub fn ended(&mut self, stream: u32) {
        self.ended.insert(stream);
    }

    /// Something was lost on the way to the client, so that DUP may stand on what it never saw.
    fn may_miss(&self) -> bool {
        self.connection > 1 || !self.ended.is_empty()
    }

    /// Judges a delivery; false: it is left alone, and comes again.
    pub fn take(&mut self, stream: u32, publish: &Publish) -> Result<bool, String> {
        let stamp = Stamp::read(&publish.payload).ok_or("a foreign message")?;
        let (flow, seq, place) = (stamp.stream, stamp.seq, (self.connection, stream));
        let wrong = |what: &str| {
            let (qos, id, dup) = (publish.qos, publish.id, publish.dup);
            Err(format!(
                "{seq} of flow {flow}, QoS {qos}, identifier {id}, DUP {dup}, on {place:?}: {what}"
            ))
        };
        if publish.qos != super::qos_of(flow) || publish.retain {
            return wrong("not as it was published");
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
                // Known by its identifier until PUBREL.
                Some(known) if known != (flow, seq) => return wrong("its identifier is in use"),
                Some(_) if !publish.dup => return wrong("again without DUP"),
                Some(_) => {}
                None if before.is_some() => return wrong("twice"),
                None => {}
            }
        }
        let Some((connection, on)) = before else {
            self.fresh += 1;
            return match publish.dup && !self.may_miss() {
                true => wrong("DUP, and it was never sent before"),
                false => Ok(true),
            };
        };
        self.again += 1;
        if !publish.dup {
            return wrong("again without DUP");
        }
        if connection == self.connection && !self.ended.contains(&on) {
            return wrong("again, and its stream lives");
        }
        Ok(true)
    }

    pub fn released(&mut self, id: u16) {
        self.unreleased.remove(&id);
    }

    /// All of `flows` is here, up to `count`, and released.
    pub fn complete(&self, flows: impl IntoIterator<Item = u32>, count: u64) -> bool {
        let whole = |flow| self.flows.get(&flow).map_or(0, |f| f.len()) as u64 == count;
        self.unreleased.is_empty() && flows.into_iter().all(whole)
    }

    /// The last of each flow.
    pub fn last(&self) -> HashMap<u32, u64> {
        let last = |here: &BTreeMap<u64, Place>| here.last_key_value().map_or(0, |(seq, _)| *seq);
        self.flows
            .iter()
            .map(|(f, here)| (*f, last(here)))
            .collect()
    }

    /// Of each flow everything up to `last` is here.
    pub fn gapless(&self, last: &HashMap<u32, u64>) -> Result<(), String> {
        for (flow, last) in last {
            let missing = self.missing(*flow, *last);
            if !missing.is_empty() {
                let connection = self.connection;
                return Err(format!(
                    "of flow {flow} up to {last} {missing:?} did not come on connection {connection}"
                ));
            }
        }
        Ok(())
    }

    /// The first of what is still to come, for the eye.
    pub fn missing(&self, flow: u32, count: u64) -> Vec<u64> {
        let here = self.flows.get(&flow);
        let missing = |seq: &u64| here.is_none_or(|h| !h.contains_key(seq));
        (1..=count).filter(missing).take(5).collect()
    }
}

/// What a listener heard of all clients' publishes.
#[derive(Default)]
pub struct Heard {
    last: HashMap<u32, u64>,
    again: HashMap<(u32, u64), u64>,
}

impl Heard {
    /// Each flow is in order; only QoS 1 may come again.
    pub fn take(&mut self, publish: &Publish) -> Result<(), String> {
        let stamp = Stamp::read(&publish.payload).ok_or("a foreign message")?;
        let last = self.last.entry(stamp.stream).or_default();
        match stamp.seq {
            seq if seq == *last + 1 => *last = seq,
            seq if seq <= *last && super::qos_of(stamp.stream) == 1 => {
                *self.again.entry((stamp.stream, seq)).or_default() += 1;
            }
            seq => {
                let flow = stamp.stream;
                return Err(format!("{seq} of flow {flow} was heard behind {last}"));
            }
        }
        Ok(())
    }

    /// At the end: `count` of each flow, and no message more often than it was sent.
    pub fn judge(
        &self,
        flows: impl IntoIterator<Item = u32>,
        count: u64,
        resent: &HashMap<(u32, u64), u64>,
    ) -> Result<(), String> {
        for flow in flows {
            let last = self.last.get(&flow).copied().unwrap_or_default();
            if last != count {
                return Err(format!("of flow {flow} {last} messages were heard"));
            }
        }
        for (message, times) in &self.again {
            let may = resent.get(message).copied().unwrap_or_default();
            if *times > may {
                return Err(format!(
                    "{message:?} was sent {may} times again and heard {times} times again"
                ));
            }
        }
        Ok(())
    }
}
