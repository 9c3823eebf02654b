//! The server's end of one connection: the machine that ships, with pipes instead of a socket.

mod judge;

use std::collections::BTreeMap;
use std::num::{NonZeroU8, NonZeroU16};
use std::sync::{Arc, LazyLock};
use std::task::Waker;
use std::time::Duration;

use tidegate::client::End;
use tidegate::client::connect::{Admission, Applicant};
use tidegate::client::machine::{Context, Limits, Machine, StreamReset};
use tidegate::config;
use tidegate::mqtt::{Connect, QoS, Version, decode_connect};
use tidegate::router::{Peer, Router};
use tidegate::session::{CloseReason, Policy};
use tidegate::streams::{StreamId, StreamSet};
use tidegate::telemetry::DisconnectReason;
use tidegate::time::Millis;
use tidegate::transport::{Closed, Traffic};

use crate::oracle::{Checked, Oracle, key};

/// The owner of all sessions.
pub(crate) const OWNER: &str = "someone";
/// From a packet's first byte to its last.
const PACKET_DEADLINE: Duration = Duration::from_secs(10);
/// The longest time between two looks at a deadline.
const LATE_MAX: Duration = Duration::from_millis(600);

static LIMITS: LazyLock<Limits> = LazyLock::new(|| Limits {
    input: Arc::default(),
    input_max_bytes: 1 << 30,
    packet_deadline: PACKET_DEADLINE,
    write_stall: Duration::from_secs(60),
    turn_packets: NonZeroU8::new(5).expect("not 0"),
});

/// Everything is allowed, but for publishes below `deny/`.
struct Allowed;

impl Policy for Allowed {
    fn may_publish(&self, _: &str, topic: &str) -> bool {
        !topic.starts_with("deny/")
    }

    fn may_subscribe(&self, _: &str, _filter: &str) -> bool {
        true
    }
}

/// What a call of the machine needs.
fn context(router: &Router, now: Millis) -> Context<'_> {
    Context {
        router,
        policy: &Allowed,
        limits: &LIMITS,
        now,
    }
}

/// One stream of the connection, as the oracle sees it.
#[derive(Default)]
struct Judged {
    /// Bytes that the machine was given, from the first packet on that it has not taken.
    input: Vec<u8>,
    /// Since when those bytes are there, or their packets are read again.
    since: Millis,
    /// Bytes of the machine's output that the oracle has seen.
    output: usize,
    /// Bytes of the session's output that the oracle has seen ahead of their time.
    ahead: usize,
}

pub(crate) struct Edge {
    pub device: usize,
    pub link: u64,
    machine: Option<Machine>,
    version: Version,
    /// One and a half times Keep Alive, if there is one.
    patience: Option<Duration>,
    /// An incomplete CONNECT.
    input: Vec<u8>,
    streams: BTreeMap<StreamId, Judged>,
    /// Bytes on their way to the socket, by stream.
    pub output: BTreeMap<StreamId, Vec<u8>>,
    pub ended: Option<DisconnectReason>,
    /// When the last packet was taken.
    last_in: Millis,
    /// The streams that are left unread.
    pub unread: StreamSet,
    /// Streams that the machine wants to be reset.
    pub resets: Vec<StreamReset>,
    /// Streams that their client has ended, and whose last packets the machine has yet to take.
    ending: StreamSet,
    /// Streams whose direction to the client the server has ended too.
    pub finished: Vec<StreamId>,
    traffic: Traffic,
}

impl Edge {
    pub(crate) fn new(device: usize, link: u64) -> Self {
        Self {
            device,
            link,
            machine: None,
            version: Version::V5,
            patience: None,
            input: Vec::new(),
            streams: BTreeMap::new(),
            output: BTreeMap::new(),
            ended: None,
            last_in: Millis::ZERO,
            unread: StreamSet::EMPTY,
            resets: Vec::new(),
            ending: StreamSet::EMPTY,
            finished: Vec::new(),
            traffic: Traffic::default(),
        }
    }

    /// Its state, for a report.
    pub(crate) fn state(&self) -> String {
        let paused = self.is_paused();
        let (unread, ended) = (self.unread, self.ended);
        format!(
            "link {} paused {paused} unread {unread:?} output {:?} ended {ended:?}",
            self.link, self.output
        )
    }

    /// Whether nothing is to be read for now.
    pub(crate) fn is_paused(&self) -> bool {
        self.machine.as_ref().is_some_and(Machine::paused)
    }

    /// Whether all output has left.
    pub(crate) fn has_sent_all(&self) -> bool {
        self.output.values().all(Vec::is_empty)
    }

    /// Whether these bytes make its CONNECT whole.
    pub(crate) fn completes(&self, bytes: &[u8]) -> bool {
        let all = [&self.input, bytes].concat();
        let first = self.machine.is_none() && self.ended.is_none();
        first && matches!(decode_connect(&all, 16 * 1024), Ok(Some(_)))
    }

    /// Bytes arrived on a stream.
    pub(crate) fn receive(
        &mut self,
        stream: StreamId,
        bytes: &[u8],
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        if self.ended.is_some() {
            return Ok(());
        }
        if self.machine.is_some() {
            return self.packets(stream, bytes, router, oracle, now);
        }
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let decoded = decode_connect(&input, 16 * 1024).map_err(|e| e.to_string())?;
        let Some((connect, size)) = decoded else {
            self.input = input;
            return Ok(());
        };
        self.connect(&connect, router, oracle, now)?;
        self.packets(StreamId::CONTROL, &input[size..], router, oracle, now)
    }

    fn connect(
        &mut self,
        connect: &Connect<'_>,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        let will = connect.will.map(|w| (key(w.payload), w.delay, w.qos));
        let (device, link, clean) = (self.device, self.link, connect.clean_start);
        oracle.connecting(device, link, clean, connect.session_expiry, will, now);
        let seconds = |n: u32| Duration::from_secs(n.into());
        let limits = router.limits();
        let admission = Admission {
            router,
            policy: &Allowed,
            session: &config::Session {
                expiry_v3: seconds(oracle.rules.expiry_v3),
                expiry_max: seconds(limits.expiry_max),
                ..config::Session::default()
            },
            limits: &config::Limits {
                receive_max: limits.receive_max,
                topic_alias_max: limits.topic_alias_max,
                ..config::Limits::default()
            },
            now,
        };
        let applicant = Applicant {
            client_id: connect.client_id.into(),
            owner: OWNER.into(),
            scope: None,
            added_bytes: 0,
            keep_alive_max: None,
            peer: Arc::new(Peer {
                listener: "sim".into(),
                transport: "sim",
                address: ([127, 0, 0, 1], 1).into(),
            }),
            ping_after: None,
        };
        let admitted = admission.admit(connect, applicant);
        let admitted = admitted.map_err(|refusal| format!("{refusal:?}"))?;
        oracle.connected(self.device, admitted.present)?;
        self.last_in = now;
        self.version = connect.version;
        let patience =
            |keep_alive: NonZeroU16| Duration::from_millis(1500) * keep_alive.get().into();
        self.patience = admitted.keep_alive.map(patience);
        self.machine = Some(admitted.machine);
        Ok(())
    }

    /// Gives the machine bytes of one stream.
    fn packets(
        &mut self,
        stream: StreamId,
        bytes: &[u8],
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        let judged = self.streams.entry(stream).or_default();
        if judged.input.is_empty() {
            judged.since = now;
        }
        judged.input.extend_from_slice(bytes);
        let result = machine.received(&context(router, now), stream, bytes);
        self.judge_taken(result, router, oracle, now)
    }

    /// The packets on these streams have their time anew, since they were not read.
    fn restart_deadlines(&mut self, streams: StreamSet, now: Millis) {
        for (number, judged) in &mut self.streams {
            if streams.contains(*number) {
                judged.since = now;
            }
        }
    }

    /// What the task does when it is woken, or its socket takes more. `room` are the streams that
    /// take output.
    pub(crate) fn poll(
        &mut self,
        room: StreamSet,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        if machine.paused() || !self.unread.is_empty() {
            self.last_in = now;
        }
        let waits_for_turn = machine.turn_is_over();
        let woken = machine.woken(&LIMITS, Waker::noop());
        self.judge_silence(woken.as_ref().err(), now)?;
        if let Err(end) = woken {
            return self.end(end, router, oracle, now);
        }
        // A stream that is given up takes its output with it.
        self.peek(router, oracle, now)?;
        let cx = context(router, now);
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        let resets = machine.watch(&cx, self.traffic);
        self.reset(resets, oracle);
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        if machine.paused() {
            let result = machine.resume(&cx);
            if !waits_for_turn {
                self.restart_deadlines(StreamSet::ALL, now);
            }
            self.judge_taken(result, router, oracle, now)?;
            self.judge_ending(router, oracle, now)?;
        }
        loop {
            self.send(room, router, now);
            let Some(machine) = &mut self.machine else {
                return Ok(());
            };
            match machine.transmit(router, now) {
                Ok(true) => self.judge_output(oracle, now)?,
                Ok(false) => break,
                Err(end) => return self.end(end, router, oracle, now),
            }
        }
        self.finish(router, oracle, now);
        if let Some(machine) = &mut self.machine
            && !machine.paused()
        {
            let before = std::mem::replace(&mut self.unread, machine.unread(&cx));
            self.restart_deadlines(before & !self.unread, now);
        }
        Ok(())
    }

    /// Offers the output to the pipes.
    fn send(&mut self, room: StreamSet, router: &Router, now: Millis) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let streams = machine.streams() | StreamSet::CONTROL;
        for stream in streams.iter() {
            let output = machine.output(stream);
            let offered = output.len();
            let done = room.contains(stream);
            if offered > 0 && done {
                self.traffic.sent += 1;
                self.traffic.acknowledged += 1;
                let taken = self.output.entry(stream).or_default();
                taken.append(&mut std::mem::take(output).to_vec());
                self.streams.entry(stream).or_default().output = 0;
            }
            if stream.is_control() && machine.wants_to_send() | (offered > 0) {
                machine.sent(offered, done, now);
            } else if offered > 0 {
                let cx = context(router, now);
                machine.stream_sent(&cx, stream, offered, done, self.traffic);
            }
        }
    }

    /// All bytes that have arrived are read: no packet may be incomplete for too long.
    pub(crate) fn expire(&mut self, router: &Router, oracle: &mut Oracle, now: Millis) -> Checked {
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        if machine.paused() {
            return Ok(());
        }
        match machine.expired(&context(router, now)) {
            Ok(None) => self.judge_incomplete(now),
            Ok(Some(reset)) => {
                self.judge_late(reset.stream, now)?;
                self.reset([reset], oracle);
                Ok(())
            }
            Err(end) => {
                self.judge_late(StreamId::CONTROL, now)?;
                self.end(end, router, oracle, now)
            }
        }
    }

    /// Ends our direction of streams that their client has ended.
    fn finish(&mut self, router: &Router, oracle: &mut Oracle, now: Millis) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        for stream in machine.streams().iter() {
            if machine.finish(&context(router, now), stream) {
                oracle.stream_ended(self.device, self.link, stream);
                self.streams.remove(&stream);
                self.finished.push(stream);
            }
        }
    }

    /// Whether a CONNECT of its client waits until it has read everything that has arrived.
    pub(crate) fn is_to_be_read_out(&self) -> bool {
        let machine = self.machine.as_ref();
        machine.is_some_and(|machine| machine.handle().take_successors().is_some())
    }

    /// Whether the machine takes bytes of data streams.
    pub(crate) fn is_open(&self) -> bool {
        self.machine.is_some()
    }

    /// The client ended its direction of a data stream.
    pub(crate) fn stream_closed(
        &mut self,
        stream: StreamId,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        self.look_ahead(stream, router, oracle, now)?;
        if let Some(machine) = &mut self.machine {
            let reset = machine.stream_closed(&context(router, now), stream);
            if reset.is_some() {
                return Err("a stream ended in the middle of a packet".into());
            }
            self.ending = self.ending.with(stream);
        }
        self.judge_ending(router, oracle, now)
    }

    /// Tells the oracle of streams that their client has ended, once all their packets are taken.
    fn judge_ending(&mut self, router: &Router, oracle: &mut Oracle, now: Millis) -> Checked {
        for stream in self.ending.iter() {
            let untaken = |m: &Machine| m.untaken(stream);
            if self.machine.as_ref().map_or(0, untaken) == 0 {
                self.ending = self.ending.without(stream);
                self.look_ahead(stream, router, oracle, now)?;
                oracle.stream_closed(self.device, self.link, stream);
            }
        }
        Ok(())
    }

    /// The machine has ended data streams; the device has yet to hear of it.
    fn reset(&mut self, resets: impl IntoIterator<Item = StreamReset>, oracle: &mut Oracle) {
        for reset in resets {
            oracle.stream_ended(self.device, self.link, reset.stream);
            self.streams.remove(&reset.stream);
            self.ending = self.ending.without(reset.stream);
            self.output.remove(&reset.stream);
            self.resets.push(reset);
        }
    }

    /// The client broke a data stream off.
    pub(crate) fn stream_ended(
        &mut self,
        stream: StreamId,
        router: &Router,
        oracle: &mut Oracle,
        now: Millis,
    ) -> Checked {
        self.look_ahead(stream, router, oracle, now)?;
        if let Some(machine) = &mut self.machine {
            machine.stream_ended(&context(router, now), stream);
            self.ending = self.ending.without(stream);
            oracle.stream_ended(self.device, self.link, stream);
            self.streams.remove(&stream);
            self.output.remove(&stream);
        }
        Ok(())
    }

    /// The socket is gone.
    pub(crate) fn eof(&mut self, router: &Router, oracle: &mut Oracle, now: Millis) -> Checked {
        let end = End::Transport(Closed::Eof);
        let Some(machine) = &mut self.machine else {
            self.ended.get_or_insert(end.label());
            return Ok(());
        };
        match machine.take_rest(&context(router, now)) {
            Ok(resets) => {
                self.judge_taken(Ok(None), router, oracle, now)?;
                self.reset(resets, oracle);
                self.end(end, router, oracle, now)
            }
            earlier => self.judge_taken(earlier.map(|_| None), router, oracle, now),
        }
    }

    fn end(&mut self, end: End, router: &Router, oracle: &mut Oracle, now: Millis) -> Checked {
        use DisconnectReason as D;
        if self.machine.is_none() {
            return Ok(());
        }
        // A 3.1 client can be told of a refused filter in no other way.
        let refused = end.label() == D::Other && self.version == Version::V31;
        if !refused
            && !matches!(
                end.label(),
                D::Normal
                    | D::NormalWithWill
                    | D::Closed
                    | D::KeepAlive
                    | D::TakenOver
                    | D::SessionEnded
                    | D::Quota
                    | D::PacketDeadline
            )
        {
            return Err(format!("the connection ends: {end:?}"));
        }
        // This end drops the output, as the loss of the network does.
        let dropped = matches!(end, End::Session(CloseReason::QueueBudget));
        if end.is_lost() || dropped {
            self.peek(router, oracle, now)?;
        }
        let Some(machine) = self.machine.take() else {
            return Ok(());
        };
        self.ended = Some(end.label());
        // A full queue may end the session after the router has asked for the end for another reason.
        let caller = machine.caller();
        let there = router.with(caller.session, caller.connection_no, |_, _| ());
        let ended_full = oracle.rules.ends_full && there.is_none() && end.label() != D::TakenOver;
        if end.label() == D::Quota || ended_full {
            // The session is gone, with what it had written.
            oracle.inbound.answers_lost(self.device);
        }
        let remains = machine.ended(router, &end, now);
        let streams = remains.streams.into_iter();
        for (stream, output) in streams.chain([(StreamId::CONTROL, remains.output)]) {
            let judged = self.streams.entry(stream).or_default();
            let rest = output.to_vec();
            if dropped {
                (judged.output, judged.ahead) = (0, 0);
            }
            let fresh = &rest[judged.output..];
            let fresh = &fresh[judged.ahead.min(fresh.len())..];
            oracle.wrote(self.device, self.link, stream, fresh, now)?;
            self.output.entry(stream).or_default().extend(rest);
        }
        oracle.closed(self.device, self.link, end.discards_will(), now);
        Ok(())
    }
}

/// The QoS that a device's will or publish may have.
pub(crate) const QOS: [QoS; 3] = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce];
