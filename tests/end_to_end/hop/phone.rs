//! A client with one session that comes and goes over several transports. On transports with data
//! streams it publishes on one and subscribes on another.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tidegate_kit::audit::Stamp;
use tidegate_kit::dial::{Dialer, Transport};
use tidegate_kit::link::{Abandoned, Cut};
use tidegate_kit::streams::{CONTROL, Event, Streams};
use tidegate_kit::wire::{Ack, Connect, Packet, Publish, Subscribe, Version};
use tokio::time::timeout;

use super::{Result, Rng, stream};

/// The packet identifier of the phone's SUBSCRIBEs; its publishes never use it.
const SUBSCRIBE_ID: u16 = 60_001;
/// The test fails if a phone waits longer than this for a packet.
const QUIET: Duration = Duration::from_secs(30);
/// The phone's own publishes that may be open at once.
const OPEN_MAX: usize = 10;

/// One of the phone's publishes, not yet completed.
#[derive(Debug)]
struct Open {
    id: u16,
    qos: u8,
    seq: u64,
    /// Whether PUBREC has arrived.
    received: bool,
}

/// The way from deliveries on the control stream to deliveries on the data stream. Messages that
/// the session sent on control before the SUBSCRIBE on a data stream come first in order, but
/// streams are not ordered among each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Join {
    /// No delivery has come on the data stream yet.
    Apart,
    /// PINGREQ has been sent; PINGRESP arrives after all older packets on control.
    Asked,
    Done,
}

pub(super) struct Phone {
    pub number: u32,
    pub rng: Rng,
    /// The number of messages that the phone has sent at QoS 1 and 2.
    pub said: [u64; 2],
    /// The QoS 1 messages that the phone has sent again, and how often.
    pub resent: HashMap<u64, u64>,
    pub hops: usize,
    /// Deliveries that came on data streams.
    pub on_data: u64,
    ways: Vec<Arc<Dialer>>,
    connect: Connect,
    client: Option<Streams>,
    /// The stream on which the phone publishes.
    up: u32,
    /// The stream on which the phone subscribed.
    down: u32,
    /// Whether SUBACK is awaited on that stream.
    subscribing: bool,
    join: Join,
    /// Packets that came on `down` and must wait for older packets on control.
    held: VecDeque<Packet>,
    abandoned: Option<Abandoned>,
    open: VecDeque<Open>,
    next_id: u16,
    /// The last sequence numbers received at QoS 1 and 2.
    last: [u64; 2],
    /// QoS 1 messages that may come again because their PUBACK may be lost, and whether each has
    /// come on this connection.
    unsure: HashMap<u64, bool>,
    /// QoS 2 deliveries without PUBREL.
    unreleased: HashSet<u16>,
}

impl std::fmt::Debug for Phone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Phone")
            .field("said", &self.said)
            .field("open", &self.open)
            .field("last", &self.last)
            .field("unreleased", &self.unreleased)
            .finish_non_exhaustive()
    }
}

impl Phone {
    pub(super) async fn connect(
        number: u32,
        version: Version,
        ways: Vec<Arc<Dialer>>,
        rng: Rng,
    ) -> Result<Self> {
        let connect = Connect::new(format!("hop-{number}")).version(version);
        let mut connect = connect.clean(false).keep_alive(300).receive_max(50);
        if version == Version::V5 {
            connect = connect.expiry(3600);
        }
        let (client, _) = Streams::connect(&ways[0], &connect).await?;
        let mut phone = Self {
            number,
            rng,
            said: [0; 2],
            resent: HashMap::new(),
            hops: 0,
            on_data: 0,
            ways,
            connect,
            client: Some(client),
            up: CONTROL,
            down: CONTROL,
            subscribing: false,
            join: Join::Done,
            held: VecDeque::new(),
            abandoned: None,
            open: VecDeque::new(),
            next_id: 0,
            last: [0; 2],
            unsure: HashMap::new(),
            unreleased: HashSet::new(),
        };
        phone.branch_out(true).await?;
        while phone.subscribing {
            let next = timeout(QUIET, phone.next()).await;
            let (stream, packet) = next.map_err(|_| "no SUBACK")??;
            phone.take(stream, packet)?;
        }
        Ok(phone)
    }

    /// Opens data streams on a new connection, if the transport has them.
    async fn branch_out(&mut self, subscribe: bool) -> Result {
        let way = self.ways[self.hops % self.ways.len()].url().transport;
        let several = matches!(way, Transport::Quic | Transport::WebTransport);
        (self.up, self.down) = (CONTROL, CONTROL);
        if several {
            self.up = self.client()?.open().await?;
            self.down = self.client()?.open().await?;
        }
        self.held.clear();
        self.join = match several {
            true => Join::Apart,
            false => Join::Done,
        };
        self.subscribing = several || subscribe;
        if self.subscribing {
            let subscribe = Packet::Subscribe(Subscribe {
                id: SUBSCRIBE_ID,
                filters: vec![(format!("hop/{}/#", self.number), 2)],
                ..Subscribe::default()
            });
            let down = self.down;
            self.client()?.queue(down, &subscribe);
        }
        Ok(())
    }

    /// The next packet and the stream on which it came.
    async fn next(&mut self) -> Result<(u32, Packet)> {
        loop {
            if self.join == Join::Done
                && let Some(packet) = self.held.pop_front()
            {
                return Ok((self.down, packet));
            }
            let (stream, event) = self.client()?.next().await?;
            let Event::Packet(packet) = event else {
                return Err(format!("phone {}: stream {stream} is gone", self.number).into());
            };
            if stream == CONTROL && packet == Packet::PingResp && self.join == Join::Asked {
                self.join = Join::Done;
            }
            if stream == self.down && self.join == Join::Apart {
                if !matches!(packet, Packet::Publish(_)) {
                    return Ok((stream, packet));
                }
                self.join = Join::Asked;
                self.client()?.queue(CONTROL, &Packet::PingReq);
            }
            if stream != self.down || self.join == Join::Done {
                return Ok((stream, packet));
            }
            self.held.push_back(packet);
        }
    }

    fn client(&mut self) -> Result<&mut Streams> {
        Ok(self.client.as_mut().ok_or("the phone has no connection")?)
    }

    /// Publishes some messages and takes `packets` packets.
    pub(super) async fn live(&mut self, packets: usize) -> Result {
        for _ in 0..self.rng.below(4) {
            if self.open.len() < OPEN_MAX {
                self.publish();
                self.client()?.flush().await?;
            }
        }
        for _ in 0..packets {
            let next = timeout(QUIET, self.next()).await;
            let (stream, packet) = next.map_err(|_| "no packet arrives any more")??;
            self.take(stream, packet)?;
            // Sometimes the answers stay unsent until the next hop.
            if self.rng.chance(66) {
                self.client()?.flush().await?;
            }
        }
        // Sometimes the phone waits until the server has received its PUBACKs.
        if self.rng.chance(33) {
            self.client()?.barrier().await?;
            self.unsure.retain(|_, here| !*here);
        }
        Ok(())
    }

    /// Vanishes and comes back over the next transport, or takes the session over while the old
    /// connection still stands.
    pub(super) async fn hop(&mut self) -> Result {
        self.hops += 1;
        let way = self.ways[self.hops % self.ways.len()].clone();
        let old = self.client.take().ok_or("the phone has no connection")?;
        let taken_over = if self.rng.chance(25) {
            Some(old)
        } else {
            let how = self.rng.pick(&[Cut::Reset, Cut::Close, Cut::Silent]);
            self.abandoned = Some(old.cut(how));
            None
        };
        let (client, ack) = Streams::connect(&way, &self.connect).await?;
        drop(taken_over);
        if !ack.session_present {
            return Err(format!("phone {}: the session was not present", self.number).into());
        }
        self.client = Some(client);
        self.branch_out(false).await?;
        let up = self.up;
        for here in self.unsure.values_mut() {
            *here = false;
        }
        for at in 0..self.open.len() {
            let open = &self.open[at];
            if open.qos == 1 {
                *self.resent.entry(open.seq).or_default() += 1;
            }
            let packet = match open.received {
                true => Packet::PubRel(ack_of(open.id)),
                false => Packet::Publish(self.message(open, true)),
            };
            self.client()?.queue(up, &packet);
        }
        self.client()?.flush().await?;
        Ok(())
    }

    /// Takes the remaining messages: the phone must receive `one` messages of QoS 1 and `two` of
    /// QoS 2 in total.
    pub(super) async fn rest(&mut self, one: u64, two: u64) -> Result {
        while self.last != [one, two] || !self.open.is_empty() || !self.unreleased.is_empty() {
            let (stream, packet) = self.next().await?;
            self.take(stream, packet)?;
            self.client()?.flush().await?;
        }
        // After this barrier no other packet is on its way.
        self.client()?.barrier().await?;
        while let Some(next) = self.next().now_or_never() {
            let (stream, packet) = next?;
            self.take(stream, packet)?;
        }
        Ok(())
    }

    fn publish(&mut self) {
        let qos = 1 + self.rng.below(2) as u8;
        let seq = &mut self.said[usize::from(qos - 1)];
        *seq += 1;
        let seq = *seq;
        self.next_id = self.next_id % 60_000 + 1;
        let open = Open {
            id: self.next_id,
            qos,
            seq,
            received: false,
        };
        let packet = Packet::Publish(self.message(&open, false));
        self.open.push_back(open);
        if let Some(client) = &mut self.client {
            client.queue(self.up, &packet);
        }
    }

    fn message(&self, open: &Open, dup: bool) -> Publish {
        let stamp = Stamp {
            stream: stream(self.number, open.qos),
            seq: open.seq,
            sent_ns: 0,
        };
        Publish {
            dup,
            qos: open.qos,
            topic: format!("hop/up/{}/{}", self.number, open.qos),
            id: open.id,
            payload: stamp.payload(32),
            ..Publish::default()
        }
    }

    fn take(&mut self, stream: u32, packet: Packet) -> Result {
        let place = match packet {
            // Control may carry deliveries of an earlier connection.
            Packet::Publish(_) | Packet::PubRel(_) => stream == self.down || stream == CONTROL,
            Packet::PubAck(_) | Packet::PubRec(_) | Packet::PubComp(_) => stream == self.up,
            Packet::SubAck(_) => stream == self.down,
            _ => stream == CONTROL,
        };
        if !place {
            let (number, up, down) = (self.number, self.up, self.down);
            let what = format!(
                "phone {number}: on stream {stream}, with publishes on {up} and the subscription on \
                 {down}: {packet:?}"
            );
            return Err(what.into());
        }
        let answer = match packet {
            Packet::Publish(publish) => {
                self.on_data += u64::from(stream != CONTROL);
                Some(self.got(&publish)?)
            }
            Packet::SubAck(codes)
                if self.subscribing && codes.id == SUBSCRIBE_ID && codes.codes == [2] =>
            {
                self.subscribing = false;
                None
            }
            Packet::PubRel(ack) => {
                self.unreleased.remove(&ack.id);
                Some(Packet::PubComp(ack_of(ack.id)))
            }
            Packet::PubRec(ack) if ack.code < 0x80 => {
                let open = self.open.iter_mut().find(|o| o.id == ack.id && o.qos == 2);
                open.ok_or("a PUBREC for no open publish")?.received = true;
                Some(Packet::PubRel(ack_of(ack.id)))
            }
            Packet::PubAck(ack) if ack.code < 0x80 => {
                self.done(ack.id, 1)?;
                None
            }
            // 0x92: the exchange was complete before the hop, and its PUBCOMP was lost.
            Packet::PubComp(ack) if matches!(ack.code, 0 | 0x92) => {
                self.done(ack.id, 2)?;
                None
            }
            Packet::PingResp => None,
            other => return Err(format!("phone {}: unexpected {other:?}", self.number).into()),
        };
        if let (Some(answer), Some(client)) = (answer, &mut self.client) {
            client.queue(stream, &answer);
        }
        Ok(())
    }

    fn done(&mut self, id: u16, qos: u8) -> Result {
        let at = self.open.iter().position(|o| o.id == id && o.qos == qos);
        self.open
            .remove(at.ok_or("an acknowledgement for no open publish")?);
        Ok(())
    }

    /// Checks one delivery and returns its answer.
    fn got(&mut self, publish: &Publish) -> Result<Packet> {
        let stamp = Stamp::read(&publish.payload).ok_or("the payload has no stamp")?;
        let (seq, qos, id) = (stamp.seq, publish.qos, publish.id);
        let last = self.last[usize::from(qos.max(1) - 1)];
        let wrong = |what: &str| {
            let (number, hops, dup) = (self.number, self.hops, publish.dup);
            format!(
                "phone {number} after {hops} hops: {seq} at QoS {qos} behind {last}, DUP {dup}: {what}"
            )
        };
        if qos == 0 || stamp.stream != stream(self.number, qos) || publish.retain {
            return Err(wrong("the message differs from the published one").into());
        }
        match qos {
            1 if seq == last + 1 => {
                self.last[0] = seq;
                self.unsure.insert(seq, true);
            }
            // A redelivery may come once on each connection.
            1 if publish.dup && self.unsure.get(&seq) == Some(&false) => {
                self.unsure.insert(seq, true);
            }
            // Until PUBREL, the packet identifier marks a redelivery [MQTT-4.3.3-10].
            2 if self.unreleased.contains(&id) && publish.dup && seq <= last => {}
            2 if seq == last + 1 && !self.unreleased.contains(&id) => {
                self.unreleased.insert(id);
                self.last[1] = seq;
            }
            _ => return Err(wrong("the message is out of order or duplicated").into()),
        }
        Ok(match qos {
            1 => Packet::PubAck(ack_of(id)),
            _ => Packet::PubRec(ack_of(id)),
        })
    }
}

fn ack_of(id: u16) -> Ack {
    Ack {
        id,
        ..Ack::default()
    }
}
