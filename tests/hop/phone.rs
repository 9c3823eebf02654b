//! A client with one session that comes and goes over several transports.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tidegate_kit::client::Client;
use tidegate_kit::dial::Dialer;
use tidegate_kit::ledger::Stamp;
use tidegate_kit::link::{Cut, Ghost};
use tidegate_kit::wire::{Ack, Connect, Packet, Publish, Version};

use super::{Result, Rng, stream};

/// Publishes of its own that it has open at once.
const OPEN_MAX: usize = 10;

/// A publish of its own that is not done.
#[derive(Debug)]
struct Open {
    id: u16,
    qos: u8,
    seq: u64,
    /// PUBREC is here.
    received: bool,
}

pub struct Phone {
    pub number: u32,
    pub rng: Rng,
    /// Messages that it has sent at QoS 1 and 2.
    pub said: [u64; 2],
    /// Which of QoS 1 it has sent again, and how often.
    pub resent: HashMap<u64, u64>,
    pub hops: usize,
    ways: Vec<Arc<Dialer>>,
    connect: Connect,
    client: Option<Client>,
    ghost: Option<Ghost>,
    open: VecDeque<Open>,
    next_id: u16,
    /// The last that came, of QoS 1 and 2.
    last: [u64; 2],
    /// Those of QoS 1 that may come again, with whether they came on this connection: their PUBACK may
    /// be lost with it.
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
    pub async fn connect(
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
        let (mut client, _) = Client::connect(&ways[0], &connect).await?;
        let filter = format!("hop/{number}/#");
        let codes = client.subscribe(&[&filter], 2).await?.codes;
        if codes != [2] {
            return Err(format!("SUBSCRIBE was answered {codes:?}").into());
        }
        Ok(Self {
            number,
            rng,
            said: [0; 2],
            resent: HashMap::new(),
            hops: 0,
            ways,
            connect,
            client: Some(client),
            ghost: None,
            open: VecDeque::new(),
            next_id: 0,
            last: [0; 2],
            unsure: HashMap::new(),
            unreleased: HashSet::new(),
        })
    }

    fn client(&mut self) -> Result<&mut Client> {
        Ok(self
            .client
            .as_mut()
            .ok_or("it is between two connections")?)
    }

    /// Says something, and takes `packets` of what comes.
    pub async fn live(&mut self, packets: usize) -> Result {
        for _ in 0..self.rng.below(4) {
            if self.open.len() < OPEN_MAX {
                self.say();
                self.client()?.flush().await?;
            }
        }
        for _ in 0..packets {
            let packet = self.client()?.next_within(Duration::from_secs(30)).await?;
            self.take(packet.ok_or("nothing comes any more")?)?;
            // Now and then it hops with answers unsent.
            if self.rng.chance(66) {
                self.client()?.flush().await?;
            }
        }
        // Now and then it knows that its PUBACKs came.
        if self.rng.chance(33) {
            self.client()?.ping().await?;
            self.unsure.retain(|_, here| !*here);
        }
        Ok(())
    }

    /// Vanishes, and comes back by the next way; or comes by that while the old one still stands.
    pub async fn hop(&mut self) -> Result {
        self.hops += 1;
        let way = self.ways[self.hops % self.ways.len()].clone();
        let old = self.client.take().ok_or("it is between two connections")?;
        let taken_over = if self.rng.chance(25) {
            Some(old)
        } else {
            let how = self.rng.pick(&[Cut::Reset, Cut::Close, Cut::Silent]);
            self.ghost = Some(old.cut(how));
            None
        };
        let (client, ack) = Client::connect(&way, &self.connect).await?;
        drop(taken_over);
        if !ack.session_present {
            return Err(format!("phone {}: its session is gone", self.number).into());
        }
        self.client = Some(client);
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
            self.client()?.queue(&packet);
        }
        self.client()?.flush().await?;
        Ok(())
    }

    /// Takes what is still to come: `one` messages of QoS 1 and `two` of QoS 2 there are in all.
    pub async fn rest(&mut self, one: u64, two: u64) -> Result {
        while self.last != [one, two] || !self.open.is_empty() || !self.unreleased.is_empty() {
            let packet = self.client()?.next().await?;
            self.take(packet)?;
            self.client()?.flush().await?;
        }
        // Nothing else is on its way.
        self.client()?.ping().await?;
        while let Some(packet) = self.client()?.buffered()? {
            self.take(packet)?;
        }
        Ok(())
    }

    fn say(&mut self) {
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
            client.queue(&packet);
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

    fn take(&mut self, packet: Packet) -> Result {
        let answer = match packet {
            Packet::Publish(publish) => Some(self.got(&publish)?),
            Packet::PubRel(ack) => {
                self.unreleased.remove(&ack.id);
                Some(Packet::PubComp(ack_of(ack.id)))
            }
            Packet::PubRec(ack) if ack.code < 0x80 => {
                let open = self.open.iter_mut().find(|o| o.id == ack.id && o.qos == 2);
                open.ok_or("PUBREC for nothing")?.received = true;
                Some(Packet::PubRel(ack_of(ack.id)))
            }
            Packet::PubAck(ack) if ack.code < 0x80 => {
                self.done(ack.id, 1)?;
                None
            }
            // 0x92: it was done before the hop, and the word on it was lost.
            Packet::PubComp(ack) if matches!(ack.code, 0 | 0x92) => {
                self.done(ack.id, 2)?;
                None
            }
            Packet::PingResp => None,
            other => return Err(format!("phone {}: unexpected {other:?}", self.number).into()),
        };
        if let (Some(answer), Some(client)) = (answer, &mut self.client) {
            client.queue(&answer);
        }
        Ok(())
    }

    fn done(&mut self, id: u16, qos: u8) -> Result {
        let at = self.open.iter().position(|o| o.id == id && o.qos == qos);
        self.open.remove(at.ok_or("an acknowledgement of nothing")?);
        Ok(())
    }

    /// One delivery, and its answer.
    fn got(&mut self, publish: &Publish) -> Result<Packet> {
        let stamp = Stamp::read(&publish.payload).ok_or("a foreign message")?;
        let (seq, qos, id) = (stamp.seq, publish.qos, publish.id);
        let last = self.last[usize::from(qos.max(1) - 1)];
        let wrong = |what: &str| {
            let (number, hops, dup) = (self.number, self.hops, publish.dup);
            format!(
                "phone {number} after {hops} hops: {seq} at QoS {qos} behind {last}, DUP {dup}: {what}"
            )
        };
        if qos == 0 || stamp.stream != stream(self.number, qos) || publish.retain {
            return Err(wrong("not what was sent").into());
        }
        match qos {
            1 if seq == last + 1 => {
                self.last[0] = seq;
                self.unsure.insert(seq, true);
            }
            // Once on each connection.
            1 if publish.dup && self.unsure.get(&seq) == Some(&false) => {
                self.unsure.insert(seq, true);
            }
            // Known by its identifier until PUBREL [MQTT-4.3.3-10].
            2 if self.unreleased.contains(&id) && publish.dup && seq <= last => {}
            2 if seq == last + 1 && !self.unreleased.contains(&id) => {
                self.unreleased.insert(id);
                self.last[1] = seq;
            }
            _ => return Err(wrong("not its turn").into()),
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
