//! The server's end of one connection: what the connection task does, without sockets.

use std::sync::Arc;
use std::task::Waker;

use tidegate::mqtt::{
    Connack, Decoder, Message, MessageSpec, Packet, QoS, ReasonCode, Receiver, Version,
    decode_connect, encode_disconnect,
};
use tidegate::router::handle::ConnectionHandle;
use tidegate::router::{Caller, Connect, Peer, Router, SessionRef};
use tidegate::session::{CloseReason, ConnectionSpec, Policy, Will};
use tidegate::time::Millis;

use crate::oracle::{Oracle, key};

/// Everything is allowed, but for publishes below `deny/`.
struct Allowed;

impl Policy for Allowed {
    fn may_publish(&self, topic: &str) -> bool {
        !topic.starts_with("deny/")
    }

    fn may_subscribe(&self, _filter: &str) -> bool {
        true
    }
}

struct Open {
    /// One and a half times Keep Alive, milliseconds.
    patience: u64,
    session: SessionRef,
    connection_no: u64,
    version: Version,
}

pub struct Edge {
    pub device: usize,
    pub link: u64,
    open: Option<Open>,
    wake: Arc<ConnectionHandle>,
    input: Vec<u8>,
    /// Taken from the session, on its way to the socket.
    pub output: Vec<u8>,
    pub ended: Option<CloseReason>,
    /// CONNACK is on its way.
    answered: bool,
    /// When the last packet came.
    last_in: u64,
    /// A 3.x client with too much under way: not read from.
    pub held: bool,
}

impl Edge {
    pub fn new(device: usize, link: u64) -> Self {
        Self {
            device,
            link,
            open: None,
            wake: Arc::default(),
            input: Vec::new(),
            output: Vec::new(),
            ended: None,
            answered: false,
            last_in: 0,
            held: false,
        }
    }

    /// Its state, for a report.
    pub fn state(&self) -> String {
        let (held, input, output) = (self.held, self.input.len(), self.output.len());
        format!(
            "link {} held {held} input {input} output {output} ended {:?}",
            self.link, self.ended
        )
    }

    /// Whether these bytes make its CONNECT whole.
    pub fn completes(&self, bytes: &[u8]) -> bool {
        let all = [&self.input, bytes].concat();
        self.open.is_none() && matches!(decode_connect(&all, 16 * 1024), Ok(Some(_)))
    }

    /// Bytes came.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Result<(), String> {
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut used = 0;
        if self.open.is_none() {
            let decoded = decode_connect(&input, 16 * 1024).map_err(|e| e.to_string())?;
            let Some((connect, size)) = decoded else {
                self.input = input;
                return Ok(());
            };
            used = size;
            self.connect(&connect, router, oracle, now)?;
        }
        used += self.packets(&input[used..], router, oracle, now)?;
        self.input = input[used..].to_vec();
        Ok(())
    }

    fn connect(
        &mut self,
        c: &tidegate::mqtt::Connect<'_>,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Result<(), String> {
        let version = c.version;
        let asked = match version {
            Version::V5 => c.session_expiry.unwrap_or(0),
            _ if c.clean_start => 0,
            _ => oracle.rules.expiry_v3,
        };
        let will = c.will.map(|w| {
            let message = Message::new(&MessageSpec {
                topic: w.topic,
                properties: w.properties,
                payload: w.payload,
                qos: w.qos,
                retain: w.retain,
                expires_at: u64::MAX,
                strip_key: None,
                account: None,
            });
            Will::new(message, w.delay, w.message_expiry)
        });
        let will_seen = c.will.map(|w| (key(w.payload), w.delay, w.qos));
        oracle.connecting(
            self.device,
            self.link,
            c.clean_start,
            c.session_expiry,
            will_seen,
            now,
        );
        let limits = &router.limits();
        let (receive_max, aliases) = (limits.receive_max, limits.topic_alias_max);
        let mut told = false;
        let connected = router
            .connect(
                Connect {
                    client_id: c.client_id.into(),
                    principal: "someone".into(),
                    clean_start: c.clean_start,
                    expiry: asked.min(limits.expiry_max),
                    spec: ConnectionSpec {
                        version,
                        receive_maximum: c.receive_maximum.unwrap_or(u16::MAX),
                        maximum_packet_size: c.maximum_packet_size.unwrap_or(u32::MAX),
                        topic_alias_maximum: c.topic_alias_maximum,
                        problem_information: c.request_problem_information,
                        keep_alive: c.keep_alive,
                        scope: None,
                    },
                    will,
                    handle: self.wake.clone(),
                    peer: Arc::new(Peer {
                        listener: "sim".into(),
                        transport: "sim",
                        ping_after: None,
                        address: ([127, 0, 0, 1], 1).into(),
                    }),
                },
                now,
                |present, out| {
                    told = present;
                    Connack {
                        session_present: present,
                        receive_maximum: Some(receive_max),
                        topic_alias_maximum: Some(aliases),
                        ..Connack::default()
                    }
                    .encode(version, out);
                },
            )
            .map_err(|e| format!("{e:?}"))?;
        if told != connected.present {
            return Err("CONNACK says another Session Present than the router".into());
        }
        oracle.connected(self.device, connected.present)?;
        self.last_in = now;
        self.open = Some(Open {
            patience: u64::from(c.keep_alive) * 1500,
            session: connected.session,
            connection_no: connected.connection_no,
            version,
        });
        Ok(())
    }

    fn packets(
        &mut self,
        bytes: &[u8],
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Result<usize, String> {
        let mut used = 0;
        while let Some((size, more)) = self.batch(&bytes[used..], router, oracle, now)? {
            used += size;
            if !more {
                return Ok(used);
            }
        }
        Ok(bytes.len())
    }

    /// Works off packets up to a SUBSCRIBE. Returns the bytes used, and whether there is more;
    /// `None`: the connection is over.
    fn batch(
        &mut self,
        bytes: &[u8],
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Result<Option<(usize, bool)>, String> {
        let Some(open) = &self.open else {
            return Ok(None);
        };
        let decoder = Decoder {
            version: open.version,
            receiver: Receiver::Server,
            max: router.limits().packet_max,
        };
        let (device, mut used) = (self.device, 0);
        let (version, reference) = (open.version, open.session);
        let mut effects = Vec::new();
        let outcome = router.feed(
            open.session,
            open.connection_no,
            &mut effects,
            |session, limits, effects| {
                let mut close: Option<CloseReason> = None;
                let mut more = false;
                let mut held = false;
                while let Ok(Some((packet, size))) = decoder.next(&bytes[used..]) {
                    if let Packet::Publish(p) = &packet {
                        let v3 = version < Version::V5 && p.qos as u8 > 0;
                        let waiting = session.publishes_waiting();
                        held = session.subscribing()
                            || (v3 && router.defers_publish(reference, 0, waiting, size));
                        if held {
                            break;
                        }
                    }
                    used += size;
                    oracle.took(device, &packet, now);
                    if let Err(end) = session.packet(0, &packet, limits, &Allowed, now, effects) {
                        if !matches!(packet, Packet::Disconnect(_)) {
                            let what = crate::packets::short(&packet);
                            return Err(format!("{what} ends the connection: {end:?}"));
                        }
                        close = Some(end);
                        break;
                    }
                    if matches!(packet, Packet::Subscribe(_)) {
                        more = true;
                        break;
                    }
                }
                session.pump(limits, now);
                if let Some(connection) = session.connection() {
                    connection.unread = held;
                }
                Ok((close, held, more))
            },
        );
        let caller = Caller {
            session: open.session,
            connection_no: open.connection_no,
            publish_link: 0,
        };
        router.apply(caller, effects, now);
        if used > 0 && self.wake.closing().is_none() {
            self.last_in = now;
        }
        let Some(outcome) = outcome else {
            // Taken over; the wake tells.
            return Ok(None);
        };
        let (close, held, more) = outcome?;
        self.held = held;
        if let Some(close) = close {
            self.end(close, router, oracle, now)?;
            return Ok(None);
        }
        Ok(Some((used, more)))
    }

    /// What the task does when it is woken, or its socket takes more.
    pub fn poll(
        &mut self,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Result<(), String> {
        if self.ended.is_some() {
            return Ok(());
        }
        if self.open.is_none() {
            return Ok(());
        }
        self.wake.take(Waker::noop());
        if self.held {
            self.last_in = now;
        }
        if let Some(open) = &self.open
            && open.patience > 0
        {
            let silence = now - self.last_in;
            let closed = self.wake.closing();
            let kept = closed == Some(CloseReason::KeepAlive);
            if kept && silence < open.patience || closed.is_none() && silence > open.patience + 600
            {
                return Err(format!(
                    "silent for {silence} of {} ms, closed: {closed:?} [MQTT-3.1.2-22]",
                    open.patience
                ));
            }
        }
        if let Some(close) = self.wake.closing() {
            return self.end(close, router, oracle, now);
        }
        if self.held {
            self.receive(&[], router, oracle, now)?;
            if self.ended.is_some() {
                return Ok(());
            }
        }
        let Some(open) = &self.open else {
            return Ok(());
        };
        loop {
            let mut taken = Vec::new();
            let side = router.take_output(open.session, open.connection_no, &mut taken, now);
            match side {
                None => {
                    return Err("the session has no connection, and its wake says nothing".into());
                }
                Some(side) if !side.is_empty() => return Err("output on another lane".into()),
                Some(_) => {}
            }
            oracle.wrote(self.device, self.link, &taken, now)?;
            if taken.is_empty() {
                return Ok(());
            }
            self.answered = true;
            self.output.append(&mut taken);
            if self.output.len() > 4096 {
                return Ok(());
            }
        }
    }

    /// What the session wrote and nobody took yet; before it is thrown away.
    pub fn peek(
        &mut self,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Result<(), String> {
        let Some(open) = &self.open else {
            return Ok(());
        };
        let left = router.with(open.session, open.connection_no, |s, _| {
            s.connection().map(|c| c.control().clone())
        });
        match left.flatten() {
            Some(bytes) => oracle.wrote(self.device, self.link, &bytes, now),
            None => Ok(()),
        }
    }

    /// The socket is gone.
    pub fn eof(&mut self, router: &Router, oracle: &mut Oracle, now: Millis) -> Result<(), String> {
        self.end(
            // It has the same consequences as the client's own DISCONNECT.
            CloseReason::DisconnectWithWill,
            router,
            oracle,
            now,
        )
    }

    fn end(
        &mut self,
        reason: CloseReason,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Result<(), String> {
        if self.ended.is_some() {
            return Ok(());
        }
        self.peek(router, oracle, now)?;
        self.ended = Some(reason);
        let Some(open) = &self.open else {
            return Ok(());
        };
        let normal = reason.discards_will();
        if reason.reason_code() == ReasonCode::QUOTA_EXCEEDED {
            // The session is gone, with what it had written.
            oracle.inbound.answers_lost(self.device);
        }
        router.disconnected(open.session, open.connection_no, normal, now);
        oracle.closed(self.device, self.link, normal, now);
        // Nothing before CONNACK [MQTT-3.14.0-1].
        if open.version == Version::V5 && !reason.by_client() && self.answered {
            encode_disconnect(
                open.version,
                reason.reason_code(),
                None,
                None,
                &mut self.output,
            );
        }
        self.input.clear();
        Ok(())
    }
}

/// The QoS that a device's will or publish may have.
pub const QOS: [QoS; 3] = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce];
