//! The clients of the simulation: they subscribe, publish, acknowledge, and lose their connections.

use super::*;

/// A client.
pub(crate) struct Device {
    pub(crate) id: String,
    pub(crate) version: Version,
    /// The will of the connection, or of the one that was cut.
    pub(crate) will: Option<SimWill>,
    pub(crate) machine: Option<ClientMachine>,
    pub(crate) last_id: u16,
    /// Its publishes without an acknowledgement: packet identifier, number, QoS.
    pub(crate) open: Vec<(u16, u32, QoS)>,
    /// SUBSCRIBE packets without an answer: packet identifier, filters.
    pub(crate) asked: Vec<(u16, Vec<(String, SubscribeOptions)>)>,
}

impl Device {
    /// Whether a publish waits for the answer to a SUBSCRIBE before it.
    pub(crate) fn is_paused(&self) -> bool {
        self.machine.as_ref().is_some_and(ClientMachine::paused)
    }
}

/// A will.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SimWill {
    pub(crate) number: u32,
    pub(crate) topic: &'static str,
    pub(crate) qos: QoS,
    pub(crate) delay: Duration,
    /// When it is published, once the connection was cut.
    pub(crate) due: Option<Millis>,
}

fn message(topic: &str, number: u32, qos: QoS, retain: bool) -> crate::mqtt::Message {
    crate::mqtt::Message::new(&crate::mqtt::MessageSpec {
        topic,
        properties: Properties::default(),
        payload: number.to_string().as_bytes(),
        qos,
        retain,
        expires_at: None,
        strip_key: None,
        account: None,
    })
}

impl World {
    /// Tells the oracle of the wills that are due.
    pub(crate) fn publish_due_wills(&mut self) {
        for n in 0..self.devices.len() {
            let will = self.devices[n].will;
            let due = will.filter(|w| w.due.is_some_and(|due| due <= self.now));
            if let Some(will) = due {
                self.devices[n].will = None;
                trace!(
                    self,
                    "the will {} of {n} on {} is due", will.number, will.topic
                );
                self.oracle
                    .will_published(n, will.number, will.topic, will.qos, self.now);
            }
        }
    }

    fn new_will(&mut self, n: usize) -> Option<SimWill> {
        if !self.rng.chance(40) {
            return None;
        }
        self.number += 1;
        let delay = Duration::from_secs(self.rng.pick(&[0, 1]));
        Some(SimWill {
            number: self.number,
            topic: self.rng.pick(&TOPICS),
            qos: self.rng.pick(&[QoS::AtLeastOnce, QoS::ExactlyOnce]),
            delay: if self.devices[n].version == Version::V5 {
                delay
            } else {
                Duration::ZERO
            },
            due: None,
        })
    }

    pub(crate) fn connect(&mut self, n: usize) {
        let sim_will = self.new_will(n);
        let payload = sim_will.map(|w| w.number.to_string());
        let will = sim_will
            .zip(payload.as_ref())
            .map(|(w, payload)| mqtt::Will {
                qos: w.qos,
                retain: false,
                topic: w.topic,
                payload: payload.as_bytes(),
                delay: w.delay.as_secs() as u32,
                message_expiry: None,
                properties: Properties::default(),
            });
        let device = &mut self.devices[n];
        device.will = sim_will;
        let v5 = device.version == Version::V5;
        let connect = Connect {
            version: device.version,
            client_id: &device.id,
            clean_start: false,
            session_expiry: v5.then_some(u32::MAX),
            will,
            ..Connect::default()
        };
        let machine = admit(&self.router, &connect, self.now);
        device.machine = Some(machine);
        // Answers to the SUBSCRIBEs of the last connection do not arrive any more.
        device.asked.clear();
        let open = std::mem::take(&mut device.open);
        trace!(self, "{n} connects, its will {:?}", self.devices[n].will);
        // Publishes without an acknowledgement are sent again [MQTT-4.4.0-1].
        for (id, number, qos) in open {
            self.devices[n].open.push((id, number, qos));
            let topic = self.oracle.topic_of(number);
            let retain = self.oracle.is_retained(number);
            self.send_publish(n, id, &message(topic, number, qos, retain), true);
        }
    }

    pub(crate) fn cut(&mut self, n: usize) {
        if let Some(machine) = self.devices[n].machine.take() {
            let end = End::from_closed(Closed::Eof);
            machine.ended(&self.router, &end, self.now);
            self.oracle.cut(n, self.now);
            trace!(self, "{n} is cut");
            if let Some(will) = &mut self.devices[n].will {
                will.due = Some(self.now + will.delay);
            }
            self.publish_due_wills();
        }
    }

    pub(crate) fn send(&mut self, n: usize, bytes: &[u8]) {
        let cx = context(&self.router, self.now);
        if let Some(machine) = &mut self.devices[n].machine {
            let reset = machine.received(&cx, 0, bytes);
            assert!(reset.expect("it is legal").is_none());
        }
    }

    pub(crate) fn next_id(&mut self, n: usize) -> u16 {
        let device = &mut self.devices[n];
        device.last_id = device.last_id.checked_add(1).unwrap_or(1);
        device.last_id
    }

    pub(crate) fn subscribe(&mut self, n: usize) {
        let id = self.next_id(n);
        let v5 = self.devices[n].version == Version::V5;
        let mut filters = Vec::new();
        for _ in 0..self.rng.between(1, 2) {
            let filter = self.rng.pick(&FILTERS);
            if filters.iter().any(|(f, _): &(String, _)| f == filter) {
                continue;
            }
            let shared = filter.starts_with("$share");
            let options = SubscribeOptions {
                qos: self
                    .rng
                    .pick(&[QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]),
                no_local: v5 && !shared && self.profile.keeps_properties() && self.rng.chance(15),
                retain_as_published: false,
                retain_handling: if v5 { self.rng.below(3) as u8 } else { 0 },
            };
            filters.push((filter.to_owned(), options));
        }
        self.ask(n, id, filters);
    }

    pub(crate) fn ask(&mut self, n: usize, id: u16, filters: Vec<(String, SubscribeOptions)>) {
        let mut bytes = Vec::new();
        let all = filters.iter().map(|(f, o)| (f.as_str(), *o));
        encode_subscribe(self.devices[n].version, id, None, all, &mut bytes);
        trace!(
            self,
            "{n} subscribes {id} {:?}",
            filters.iter().map(|(f, o)| (f, o.qos)).collect::<Vec<_>>()
        );
        self.oracle.subscribes(n, &filters, self.now);
        self.devices[n].asked.push((id, filters));
        self.send(n, &bytes);
    }

    pub(crate) fn unsubscribe(&mut self, n: usize) {
        let Some(filter) = self.oracle.any_filter(n, &mut self.rng) else {
            return;
        };
        // A SUBSCRIBE without an answer would be answered after the UNSUBSCRIBE.
        if self.devices[n]
            .asked
            .iter()
            .any(|(_, f)| f.iter().any(|(f, _)| *f == filter))
        {
            return;
        }
        let id = self.next_id(n);
        let mut bytes = Vec::new();
        encode_unsubscribe(
            self.devices[n].version,
            id,
            std::iter::once(filter.as_str()),
            &mut bytes,
        );
        trace!(self, "{n} unsubscribes {filter}");
        self.oracle.unsubscribes(n, &filter, self.now);
        self.send(n, &bytes);
    }

    pub(crate) fn publish(&mut self, n: usize) {
        let topic = self.rng.pick(&TOPICS);
        let qos = self
            .rng
            .pick(&[QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce]);
        self.number += 1;
        let number = self.number;
        let id = match qos {
            QoS::AtMostOnce => 0,
            _ => self.next_id(n),
        };
        // Only one client publishes retained messages on each topic, so that their order is known.
        let retain = TOPICS.iter().position(|t| *t == topic) == Some(n) && self.rng.chance(50);
        self.oracle
            .published(n, number, topic, qos, retain, self.now);
        let mut poison = false;
        if qos > QoS::AtMostOnce {
            self.devices[n].open.push((id, number, qos));
            poison = self.poisonous && self.rng.chance(5);
        }
        if poison {
            self.oracle.set_poison(number);
        }
        trace!(
            self,
            "{n} publishes {number} on {topic} at {qos:?}{}",
            match (poison, retain) {
                (true, _) => ", poison",
                (_, true) => ", retained",
                _ => "",
            }
        );
        self.send_publish(n, id, &message(topic, number, qos, retain), false);
    }

    fn send_publish(&mut self, n: usize, id: u16, message: &crate::mqtt::Message, dup: bool) {
        let mut bytes = Vec::new();
        crate::mqtt::Delivery {
            version: self.devices[n].version,
            dup,
            qos: message.qos(),
            retain: message.retain(),
            packet_id: id,
            alias: crate::mqtt::Alias::None,
            message_expiry: None,
            subscription_ids: &[],
            user_property: None,
            hidden: 0,
        }
        .encode(message, &mut bytes);
        self.send(n, &bytes);
    }

    /// A client reads its output, and answers it.
    pub(crate) fn read(&mut self, n: usize) {
        let cx = context(&self.router, self.now);
        let Some(machine) = &mut self.devices[n].machine else {
            return;
        };
        machine.woken(Waker::noop()).expect("nothing ends it");
        machine.resume(&cx).expect("it is legal");
        if machine.paused() {
            // Its acknowledgements would wait too, and be lost with the connection.
            return;
        }
        let mut out = Vec::new();
        while machine
            .transmit(&self.router, self.now)
            .expect("it has the session")
        {
            out.append(&mut machine.output(0).buf);
            machine.sent(0, true, self.now);
        }
        self.trace
            .bytes(self.now, "router", &self.devices[n].id, &out);
        let version = self.devices[n].version;
        let decoder = Decoder {
            version,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let mut used = 0;
        let mut answers = Vec::new();
        while let Some((packet, size)) = decoder.next(&out[used..]).expect("legal") {
            used += size;
            match packet {
                Packet::Publish(p) => self.got(n, &p, &mut answers),
                Packet::Pubrel(a) => answers.push((AckKind::Pubcomp, a.packet_id)),
                Packet::Pubrec(a) => {
                    self.done(n, a.packet_id, a.reason);
                    if !a.reason.is_error() {
                        answers.push((AckKind::Pubrel, a.packet_id));
                    }
                }
                Packet::Puback(a) => self.done(n, a.packet_id, a.reason),
                Packet::Suback(s) => {
                    let asked = &mut self.devices[n].asked;
                    let Some(at) = asked.iter().position(|(id, _)| *id == s.packet_id) else {
                        continue;
                    };
                    let (_, filters) = asked.remove(at);
                    trace!(
                        self,
                        "{n} is granted {:?} {:?} to {}",
                        filters.iter().map(|f| &f.0).collect::<Vec<_>>(),
                        s.codes,
                        s.packet_id
                    );
                    for ((filter, options), code) in filters.iter().zip(s.codes) {
                        self.oracle.granted(n, filter, options, *code, self.now);
                    }
                }
                _ => {}
            }
        }
        for (kind, id) in answers {
            let mut bytes = Vec::new();
            encode_ack(version, kind, id, ReasonCode::SUCCESS, None, &mut bytes);
            self.send(n, &bytes);
        }
    }

    pub(crate) fn got(&mut self, n: usize, p: &Publish<'_>, answers: &mut Vec<(AckKind, u16)>) {
        let text = String::from_utf8_lossy(p.payload);
        let number: u32 = text.parse().expect("a number of ours");
        trace!(
            self,
            "{n} gets {number} at {:?}{}{}",
            p.qos,
            if p.dup { " dup" } else { "" },
            if p.retain { " retained" } else { "" }
        );
        let got = Got {
            number,
            qos: p.qos,
            retain: p.retain,
            at: self.now,
        };
        self.oracle.received(n, p.topic, got);
        match p.qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => answers.push((AckKind::Puback, p.packet_id)),
            QoS::ExactlyOnce => answers.push((AckKind::Pubrec, p.packet_id)),
        }
    }

    pub(crate) fn done(&mut self, n: usize, id: u16, reason: ReasonCode) {
        let open = &mut self.devices[n].open;
        let Some(at) = open.iter().position(|(known, _, _)| *known == id) else {
            return;
        };
        let (_, number, _) = open.remove(at);
        self.oracle.acknowledged(n, number, reason, self.now);
    }
}
