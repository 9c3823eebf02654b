//! The way between a client and its machine: the control stream and the data streams, each with output
//! that the client has not read and with packets that the machine does not read yet.

use super::*;
use crate::streams::{StreamId, StreamSet};

/// Data streams that a client uses at most.
pub(crate) const STREAMS_MAX: u64 = 3;

/// What one client's connection may keep for it: for each stream a full buffer at the session, another
/// one at the machine, answers as far as the client is read, and the packet that goes beyond.
const OUTPUT_MAX_BYTES: usize = 400 * 1024;

/// A packet that the client sends.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    pub(crate) bytes: Vec<u8>,
    /// The packet identifier and the number of the message that the packet acknowledges.
    pub(crate) acknowledges: Option<(u16, u32)>,
}

impl From<Vec<u8>> for Outgoing {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            acknowledges: None,
        }
    }
}

/// One stream of a client's connection.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    /// Bytes that the transport took from the machine.
    input: Vec<u8>,
    /// Packets that wait until the machine reads the stream.
    outbox: VecDeque<Outgoing>,
    /// While the client reads nothing: how many bytes the transport takes.
    pub(crate) unread: Option<usize>,
    /// The client has ended its direction.
    ended: bool,
    /// The machine has ended its direction too.
    finished: bool,
}

impl Wire {
    /// The transport takes output, as far as there is room. Returns whether it took everything.
    fn take(&mut self, output: &mut OutBuf) -> bool {
        let room = self
            .unread
            .map_or(usize::MAX, |max| max.saturating_sub(self.input.len()));
        let mut room = room;
        while room > 0 && !output.is_empty() {
            let taken = output.rest().len().min(room);
            self.input.extend_from_slice(&output.rest()[..taken]);
            output.advance(taken);
            room -= taken;
        }
        let done = output.is_empty();
        if done {
            output.reset();
        }
        done
    }

    /// From now on the transport takes so many bytes.
    pub(crate) fn limit(&mut self, bytes: usize) {
        self.unread = Some(bytes);
    }

    /// Whether the client has not read all output.
    fn has_unread(&self) -> bool {
        self.unread.is_some() || !self.input.is_empty()
    }
}

impl Device {
    /// Whether a packet of the client would wait: behind a publish that waits, or because the client is
    /// left unread.
    pub(crate) fn is_busy(&self) -> bool {
        let paused = self.machine.as_ref().is_some_and(ClientMachine::paused);
        let waits = self.wires.values().any(|wire| !wire.outbox.is_empty());
        // A durable seed's client learns first whether its session is there.
        let greeting = self.kept.awaits_connack();
        paused || waits || greeting || self.left_unread.contains(StreamId::CONTROL)
    }

    /// Whether the client has not read all output of its connection.
    pub(crate) fn has_unread(&self) -> bool {
        self.wires.values().any(Wire::has_unread)
    }

    /// Whether the client has ended its direction of a stream: it cannot answer there.
    pub(crate) fn has_ended(&self, stream: StreamId) -> bool {
        self.wires.get(&stream).is_some_and(|wire| wire.ended)
    }

    /// A stream on which a packet is read at once: the control stream or a data stream.
    pub(crate) fn any_stream(&self, rng: &mut Rng) -> StreamId {
        let stream = StreamId::new(rng.below(self.streams + 1) as u8);
        let is_open = |wire: &Wire| !wire.ended && !wire.finished;
        let open = self.wires.get(&stream).is_none_or(is_open);
        match open && !self.left_unread.contains(stream) {
            true => stream,
            false => StreamId::CONTROL,
        }
    }

    /// A new connection: nothing of the last one arrives any more.
    pub(crate) fn forget_wires(&mut self) {
        self.left_unread = StreamSet::EMPTY;
        for (_, wire) in std::mem::take(&mut self.wires) {
            self.lose(wire);
        }
    }

    /// The packets of a stream that were not sent are lost with it.
    fn lose(&mut self, wire: Wire) {
        let lost = wire.outbox.into_iter().filter_map(|o| o.acknowledges);
        self.unsure.extend(lost);
    }
}

impl World {
    /// A client sends a packet on a stream.
    pub(crate) fn send(&mut self, n: usize, stream: StreamId, packet: Outgoing) {
        let wire = self.devices[n].wires.entry(stream).or_default();
        wire.outbox.push_back(packet);
        self.flush(n);
    }

    /// The machine reads packets of the streams that it does not leave unread.
    fn flush(&mut self, n: usize) {
        if self.is_withheld(n) {
            return;
        }
        let cx = context(&self.router, self.node_now);
        let device = &mut self.devices[n];
        let Some(machine) = &mut device.machine else {
            return;
        };
        for (stream, wire) in &mut device.wires {
            while !machine.paused()
                && !device.left_unread.contains(*stream)
                && let Some(packet) = wire.outbox.pop_front()
            {
                let reset = machine.received(&cx, *stream, &packet.bytes);
                assert!(reset.expect("it is legal").is_none());
            }
        }
    }

    /// Whether a connection waits for the disk, so that no packet of its client is taken.
    pub(crate) fn is_withheld(&self, n: usize) -> bool {
        let machine = self.devices[n]
            .machine
            .as_ref()
            .filter(|_| self.store.is_some());
        machine.is_some_and(|machine| {
            let caller = machine.caller();
            let withheld = |session: &mut Session| session.is_withheld();
            let (session, connection_no) = (caller.session, caller.connection_no);
            self.router.with(session, connection_no, |s, _| withheld(s)) == Some(true)
        })
    }

    /// Takes the steps of a woken connection task, and lets the client read the output.
    pub(crate) fn read(&mut self, n: usize) {
        let cx = context(&self.router, self.node_now);
        let device = &mut self.devices[n];
        let Some(machine) = &mut device.machine else {
            return;
        };
        machine
            .woken(cx.limits, Waker::noop())
            .expect("nothing ends it");
        let given_up = machine.watch(&cx, device.traffic);
        assert!(given_up.is_empty(), "nothing waits for that long");
        machine.resume(&cx).expect("it is legal");
        self.flush(n);
        self.write(n);
        self.decode(n);
        self.flush(n);
    }

    /// The machine's output goes into the streams.
    pub(crate) fn write(&mut self, n: usize) {
        let cx = context(&self.router, self.node_now);
        let device = &mut self.devices[n];
        let Some(machine) = &mut device.machine else {
            return;
        };
        loop {
            if machine.wants_to_send() {
                let output = machine.output(StreamId::CONTROL);
                let offered = output.rest().len();
                let done = device
                    .wires
                    .entry(StreamId::CONTROL)
                    .or_default()
                    .take(output);
                machine.sent(offered, done, self.node_now);
            }
            for stream in machine.streams().iter() {
                let wire = device.wires.entry(stream).or_default();
                let output = machine.output(stream);
                if !output.is_empty() {
                    let offered = output.rest().len();
                    let done = wire.take(output);
                    // The network carries everything: only the client is slow.
                    device.traffic.sent += 1;
                    device.traffic.acknowledged += 1;
                    machine.stream_sent(&cx, stream, offered, done, device.traffic);
                }
                wire.finished |= machine.finish(&cx, stream);
            }
            let more = machine.transmit(&self.router, self.node_now);
            if !more.expect("it has the session") {
                break;
            }
        }
        device.left_unread = machine.unread(&cx);
        self.exercised.left_unread += u64::from(!device.left_unread.is_empty());
        let late = match machine.paused() {
            true => None,
            false => machine.expired(&cx).expect("no packet is incomplete"),
        };
        assert!(late.is_none(), "no packet is incomplete");
        self.judge_output(n);
    }

    /// I20: what a client does not read stays within bounds.
    fn judge_output(&mut self, n: usize) {
        let Some(machine) = &mut self.devices[n].machine else {
            return;
        };
        let streams = machine.streams() | StreamSet::CONTROL;
        let taken: usize = streams.iter().map(|s| machine.output(s).len()).sum();
        let caller = machine.caller();
        let (session, connection_no) = (caller.session, caller.connection_no);
        let waiting = self.router.with(session, connection_no, |s, _| {
            s.connection().map_or(0, |c| c.own_output_len())
        });
        let kept = taken + waiting.unwrap_or(0);
        if kept > OUTPUT_MAX_BYTES {
            self.oracle.fault(format!(
                "{n} has {kept} bytes of output that it did not read"
            ));
        }
    }

    /// The client reads the streams that it does not leave unread, and answers.
    pub(crate) fn decode(&mut self, n: usize) {
        let version = self.devices[n].version;
        let decoder = Decoder {
            version,
            receiver: Receiver::Client,
            max: u32::MAX,
        };
        let streams: Vec<StreamId> = self.devices[n].wires.keys().copied().collect();
        for stream in streams {
            let Some(wire) = self.devices[n].wires.get_mut(&stream) else {
                continue;
            };
            if wire.unread.is_some() {
                continue;
            }
            let input = std::mem::take(&mut wire.input);
            if self.trace.is_on() {
                let to = format!("{}, stream {stream}", self.devices[n].id);
                self.trace.bytes(self.now, "router", &to, &input);
            }
            let mut used = 0;
            while let Some((packet, size)) = decoder.next(&input[used..]).expect("legal") {
                used += size;
                self.packet(n, stream, &packet);
            }
            let Some(wire) = self.devices[n].wires.get_mut(&stream) else {
                continue;
            };
            wire.input = input[used..].to_vec();
            if wire.finished && wire.input.is_empty() {
                trace!(self, "stream {stream} of {n} is gone");
                self.devices[n].wires.remove(&stream);
            }
        }
    }

    /// A client ends, resets, leaves unread or reads one of its streams.
    pub(crate) fn change_stream(&mut self, n: usize) {
        let streams: Vec<StreamId> = self.devices[n].wires.keys().copied().collect();
        if streams.is_empty() {
            return;
        }
        let stream = self.rng.pick(&streams);
        match self.rng.below(4) {
            0 if !stream.is_control() => self.end_stream(n, stream),
            1 if !stream.is_control() => self.reset_stream(n, stream),
            _ => self.leave_unread(n, stream),
        }
    }

    /// A client stops reading a stream, or begins again.
    fn leave_unread(&mut self, n: usize, stream: StreamId) {
        let room = self.rng.pick(&[0, 20, 1000, 20_000]);
        let Some(wire) = self.devices[n].wires.get_mut(&stream) else {
            return;
        };
        wire.unread = match wire.unread {
            Some(_) => None,
            None => Some(room),
        };
        trace!(self, "{n} leaves stream {stream} unread: {:?}", wire.unread);
        self.exercised.unread += u64::from(wire.unread.is_some());
        if !stream.is_control() {
            self.oracle.reordered(n);
        }
    }

    /// A client ends its direction of a data stream. It must not while it has a message of QoS 2 under
    /// way there, whose PUBREL belongs on that stream.
    fn end_stream(&mut self, n: usize, stream: StreamId) {
        let device = &mut self.devices[n];
        let mut open = device.open.iter();
        let needed = open.any(|o| o.stream == stream && o.qos == QoS::ExactlyOnce)
            || device.releasing.iter().any(|(_, on)| *on == stream);
        let (Some(wire), Some(machine)) = (device.wires.get_mut(&stream), &mut device.machine)
        else {
            return;
        };
        if wire.ended || needed || !wire.outbox.is_empty() || machine.paused() {
            return;
        }
        wire.ended = true;
        let cx = context(&self.router, self.node_now);
        let reset = machine.stream_closed(&cx, stream);
        assert!(reset.is_none(), "it sent whole packets");
        trace!(self, "{n} ends stream {stream}");
        self.exercised.ended += 1;
        self.oracle.reordered(n);
    }

    /// A client aborts a data stream in both directions. It sends its publishes of that stream again on
    /// the control stream.
    fn reset_stream(&mut self, n: usize, stream: StreamId) {
        let device = &mut self.devices[n];
        let Some(wire) = device.wires.remove(&stream) else {
            return;
        };
        let (finished, unread) = (wire.finished, wire.has_unread());
        device.lose(wire);
        device.asked.retain(|asked| asked.stream != stream);
        let cx = context(&self.router, self.node_now);
        if let Some(machine) = device.machine.as_mut().filter(|_| !finished) {
            machine.stream_ended(&cx, stream);
        }
        trace!(self, "{n} resets stream {stream}");
        self.exercised.reset += 1;
        self.oracle.reordered(n);
        self.oracle.lost(n, unread, self.now);
        self.send_again(n, stream);
    }

    /// At rest, clients read everything.
    pub(crate) fn read_all(&mut self) {
        let wires = self.devices.iter_mut().flat_map(|d| d.wires.values_mut());
        for wire in wires {
            wire.unread = None;
        }
    }
}
