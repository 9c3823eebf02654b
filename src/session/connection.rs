//! The state of a session that lasts as long as one network connection: limits, output, Keep Alive.

use std::borrow::Cow;
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::mqtt::{QoS, Version};
use crate::outbuf::OutBuf;
use crate::streams::{StreamId, StreamSet};
use crate::time::Millis;
use crate::topics::{FilterId, split_shared};

use crate::session::aliases::Aliases;
use crate::session::waiting::Waiting;
use crate::session::{RetainedDue, SessionLimits};

/// The output that may wait for a data stream before the last message is added.
const STREAM_OUTPUT_MAX_BYTES: usize = 16 * 1024;

/// What sets a client's topics and publishes apart from those of other clients.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// The prefix of all the client's topics and filters at the broker. The client does not see it.
    pub mount: Box<str>,
    /// The raw user properties that each of the client's publishes carries to the broker.
    pub sender: Box<[u8]>,
}

impl Scope {
    /// The client's filter as the broker sees it. `None`: it is longer than MQTT allows.
    pub(super) fn filter(&self, filter: &str) -> Option<String> {
        let whole = match split_shared(filter) {
            None => format!("{}{filter}", self.mount),
            Some((group, plain)) => format!("$share/{group}/{}{plain}", self.mount),
        };
        (whole.len() <= usize::from(u16::MAX)).then_some(whole)
    }

    /// A filter at the broker as its client named it: the inverse of `Scope::filter`.
    pub fn client_filter<'a>(&self, whole: &'a str) -> Cow<'a, str> {
        let unmounted = |filter: &'a str| filter.strip_prefix(&*self.mount).unwrap_or(filter);
        match split_shared(whole) {
            None => unmounted(whole).into(),
            Some((group, plain)) => format!("$share/{group}/{}", unmounted(plain)).into(),
        }
    }
}

/// The way of a connection's output past the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Commit {
    /// The output waits for nothing.
    None,
    /// The output has a packet that must not leave before the session's record.
    Wanted,
    /// The record is on its way to the disk, and no output is taken.
    Awaited,
    /// The record is on the disk, and the output is to be taken.
    Passed,
}

/// The state of one connection of a session.
#[derive(Debug)]
pub struct Connection {
    /// The number of the connection within its session; a later one has a larger number.
    pub connection_no: u64,
    /// Protocol version of this connection.
    pub version: Version,
    /// See [`ConnectionSpec::bridge`].
    pub bridge: bool,
    /// The client's Receive Maximum.
    pub receive_maximum: u16,
    /// The client's Maximum Packet Size in bytes, if it has one.
    maximum_packet_size: Option<u32>,
    /// One and a half times Keep Alive in milliseconds [MQTT-3.1.2-22].
    keep_alive: Option<NonZeroU32>,
    /// When the last packet arrived.
    pub last_seen: Millis,
    /// We leave bytes of the client unread, so its silence says nothing.
    pub unread: bool,
    /// The acknowledgement of a changed subscription waits until the change is on the disk.
    acknowledges_after_commit: bool,
    commit: Commit,
    /// What sets the client apart. `None`: nothing does.
    pub scope: Option<Arc<Scope>>,
    /// SUBSCRIBEs that wait for the broker.
    pub(super) pending: Vec<PendingSubscribe>,
    /// Live messages that wait for retained ones.
    pub(super) waiting: Option<Box<Waiting>>,
    /// Output for the control stream.
    output: OutBuf,
    /// Boxed, because few clients use data streams.
    data: Option<Box<DataStreams>>,
    /// Data streams for which the connection's task holds as much output as may wait.
    saturated: StreamSet,
    pub(super) aliases: Aliases,
    /// The output that the connection's task took last.
    pub taken: TakenOutput,
}

/// Output that a connection's task took, and has perhaps not written yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct TakenOutput {
    /// Bytes of all streams, without the parts that connections share.
    pub own_bytes: usize,
    /// Bytes of the shared parts.
    pub shared_bytes: usize,
    /// When the task last took output of the control stream.
    pub at: Millis,
    /// The bytes of the control stream's output that it took then.
    pub offered_bytes: usize,
}

/// The data streams of a connection.
#[derive(Debug, Default)]
struct DataStreams {
    /// Their output.
    output: Vec<(StreamId, OutBuf)>,
    /// Subscriptions made on them.
    bindings: Vec<StreamBinding>,
}

/// A subscription that was made on a data stream: its messages go there.
#[derive(Debug)]
struct StreamBinding {
    name: Box<str>,
    /// The router's number of the filter. `None` until the router has taken the subscription.
    filter: Option<FilterId>,
    stream: StreamId,
}

/// A SUBSCRIBE whose filters are not all answered yet.
#[derive(Debug)]
pub(super) struct PendingSubscribe {
    /// Its name toward the router: the packet identifier, unless another stream has the same one in
    /// use.
    pub key: u16,
    pub packet_id: u16,
    /// The stream of the SUBACK. `None`: it ended.
    pub stream: Option<StreamId>,
    /// Filters that are not answered.
    pub waiting: u16,
    pub codes: Vec<u8>,
    /// Filters that the SUBSCRIBE names more than once.
    pub repeated: Vec<RepeatedFilter>,
    /// Granted filters whose retained messages follow the SUBACK.
    pub retained: Vec<RetainedDue>,
}

/// A filter in a SUBSCRIBE that names it more than once. It is answered with its first place.
#[derive(Debug)]
pub(super) struct RepeatedFilter {
    pub index: u16,
    pub first: u16,
    /// The most that this place is granted.
    pub asked: QoS,
}

/// What a CONNECT fixes for its connection.
#[derive(Clone, Debug)]
pub struct ConnectionSpec {
    /// Protocol version.
    pub version: Version,
    /// The client is a bridge of MQTT 3, to whose subscriptions No Local and Retain As Published apply.
    pub bridge: bool,
    /// The client's Receive Maximum; 65,535 if it sent none.
    pub receive_maximum: u16,
    /// The client's Maximum Packet Size in bytes, if it has one.
    pub maximum_packet_size: Option<u32>,
    /// The client's Topic Alias Maximum.
    pub topic_alias_maximum: u16,
    /// The Keep Alive in force, in seconds.
    pub keep_alive: Option<NonZeroU16>,
    /// What sets the client apart. `None`: nothing does.
    pub scope: Option<Arc<Scope>>,
}

impl Connection {
    /// A connection that starts `now`.
    pub fn new(connection_no: u64, spec: &ConnectionSpec, now: Millis) -> Self {
        Self {
            connection_no,
            version: spec.version,
            bridge: spec.bridge,
            receive_maximum: spec.receive_maximum,
            maximum_packet_size: spec.maximum_packet_size,
            keep_alive: (spec.keep_alive)
                .and_then(|seconds| NonZeroU32::new(u32::from(seconds.get()) * 1500)),
            last_seen: now,
            unread: false,
            acknowledges_after_commit: false,
            commit: Commit::None,
            scope: spec.scope.clone(),
            pending: Vec::new(),
            waiting: None,
            output: OutBuf::default(),
            data: None,
            saturated: StreamSet::EMPTY,
            aliases: Aliases::new(spec.topic_alias_maximum),
            taken: TakenOutput {
                at: now,
                ..TakenOutput::default()
            },
        }
    }

    /// From now on the acknowledgement of a changed subscription waits until the change is on the disk.
    pub fn acknowledge_after_commit(&mut self) {
        self.acknowledges_after_commit = true;
    }

    /// A subscription has changed, and its acknowledgement is in the output.
    pub(super) fn subscription_changed(&mut self) {
        if self.acknowledges_after_commit {
            self.commit = Commit::Awaited;
        }
    }

    /// No output is taken until [`Connection::release`].
    pub fn withhold(&mut self) {
        self.commit = Commit::Awaited;
    }

    /// Whether no output is taken.
    pub fn is_withheld(&self) -> bool {
        self.commit == Commit::Awaited
    }

    /// The change that the output waits for is on the disk.
    pub fn release(&mut self) {
        self.commit = Commit::Passed;
    }

    /// A packet of the output must not leave before the session's record says so.
    pub(super) fn commit_first(&mut self) {
        if self.acknowledges_after_commit && self.commit != Commit::Awaited {
            self.commit = Commit::Wanted;
        }
    }

    /// Whether a message of QoS 2 may be added to the output. While output is on its way to the disk or from
    /// there, it must not come to depend on a later record.
    pub(super) fn takes_qos2(&self) -> bool {
        matches!(self.commit, Commit::None | Commit::Wanted)
    }

    /// Whether the output has a packet that needs the session's record. From then on no output is taken until
    /// [`Connection::release`].
    pub fn begin_commit(&mut self) -> bool {
        let wanted = self.commit == Commit::Wanted;
        if wanted {
            self.commit = Commit::Awaited;
        }
        wanted
    }

    /// Replaces the raw user properties that name the sender in each publish of the client.
    pub fn set_sender(&mut self, sender: Box<[u8]>) {
        if let Some(scope) = &mut self.scope {
            let mount = scope.mount.clone();
            *scope = Arc::new(Scope { mount, sender });
        }
    }

    /// Whether a packet is small enough for the client [MQTT-3.1.2-24]. `bytes` gives its size; few
    /// clients have a limit.
    pub(super) fn accepts(&self, bytes: impl FnOnce() -> usize) -> bool {
        self.maximum_packet_size
            .is_none_or(|max| bytes() <= max as usize)
    }

    /// When the client's silence exceeds its Keep Alive, unless a packet arrives before.
    pub fn silent_until(&self) -> Option<Millis> {
        let keep_alive = self.keep_alive?;
        Some(self.last_seen + Duration::from_millis(keep_alive.get().into()))
    }

    /// No longer watches the client's silence, because the connection was told to end.
    pub fn stop_keep_alive(&mut self) {
        self.keep_alive = None;
    }

    /// The output of the control stream.
    pub fn control(&mut self) -> &mut Vec<u8> {
        &mut self.output.buf
    }

    /// The output of a stream: a packet is answered where it arrived.
    pub fn output_on(&mut self, stream: StreamId) -> &mut Vec<u8> {
        &mut self.outbuf_on(stream).buf
    }

    /// The output of a stream, with its shared parts.
    pub fn outbuf_on(&mut self, stream: StreamId) -> &mut OutBuf {
        if stream.is_control() {
            return &mut self.output;
        }
        let all = &mut self.data.get_or_insert_default().output;
        let index = match all.iter().position(|(s, _)| *s == stream) {
            Some(index) => index,
            None => {
                all.push((stream, OutBuf::default()));
                all.len() - 1
            }
        };
        &mut all[index].1
    }

    /// The output of the data streams.
    fn data_output(&self) -> &[(StreamId, OutBuf)] {
        self.data.as_ref().map_or(&[], |data| &data.output)
    }

    /// The subscriptions made on data streams.
    fn bindings(&self) -> &[StreamBinding] {
        self.data.as_ref().map_or(&[], |data| &data.bindings)
    }

    /// Keeps the subscriptions on data streams for which `keep` returns true.
    fn retain_bindings(&mut self, keep: impl FnMut(&StreamBinding) -> bool) {
        if let Some(data) = &mut self.data {
            data.bindings.retain(keep);
        }
    }

    /// The data streams in `free` have sent all the output that was taken for them.
    pub fn streams_free(&mut self, free: StreamSet) {
        self.saturated = self.saturated & !free;
    }

    /// Takes the output of the streams in `free`: the control stream's is exchanged for
    /// `empty`, the data streams' is returned. Data streams with a full buffer get no more messages
    /// until [`Connection::streams_free`]. While the output is withheld, nothing is taken.
    pub fn take_output(&mut self, free: StreamSet, empty: &mut OutBuf) -> Vec<(StreamId, OutBuf)> {
        if self.is_withheld() {
            return Vec::new();
        }
        if free.contains(StreamId::CONTROL) {
            std::mem::swap(&mut self.output, empty);
        }
        if self.commit == Commit::Passed && self.data.is_none() && self.output.is_empty() {
            self.commit = Commit::None;
        }
        let Some(data) = &mut self.data else {
            return Vec::new();
        };
        let taken = if data.output.iter().all(|(s, _)| free.contains(*s)) {
            std::mem::take(&mut data.output)
        } else {
            let free = |output: &mut (StreamId, OutBuf)| free.contains(output.0);
            data.output.extract_if(.., free).collect()
        };
        if self.commit == Commit::Passed && self.output.is_empty() && data.output.is_empty() {
            self.commit = Commit::None;
        }
        let full = (taken.iter()).filter(|(_, bytes)| bytes.len() >= STREAM_OUTPUT_MAX_BYTES);
        self.saturated = full.fold(self.saturated, |all, (stream, _)| all.with(*stream));
        taken
    }

    /// Whether another delivery may be written for a stream.
    pub fn has_room(&self, limits: &SessionLimits, stream: StreamId) -> bool {
        self.has_room_of(limits.output_buffer.load(Ordering::Relaxed), stream)
    }

    fn has_room_of(&self, limit: usize, stream: StreamId) -> bool {
        if stream.is_control() {
            return self.output.len() < limit;
        }
        !self.saturated.contains(stream)
            && self.data_output_len(stream) < limit.min(STREAM_OUTPUT_MAX_BYTES)
    }

    /// Whether a SUBACK is due on a data stream, or output waits to be taken for it.
    pub(super) fn stream_busy(&self, stream: StreamId) -> bool {
        let subscribing = |p: &PendingSubscribe| p.stream == Some(stream);
        self.data_output_len(stream) > 0 || self.pending.iter().any(subscribing)
    }

    fn data_output_len(&self, stream: StreamId) -> usize {
        let mut all = self.data_output().iter();
        all.find(|(s, _)| *s == stream).map_or(0, |(_, b)| b.len())
    }

    /// The streams for which more than `max` bytes of output wait.
    pub fn full_streams(&self, max: usize) -> StreamSet {
        let control = match self.output.len() > max {
            true => StreamSet::CONTROL,
            false => StreamSet::EMPTY,
        };
        let data = self.data_output().iter().filter(|(_, b)| b.len() > max);
        data.fold(control, |full, (stream, _)| full.with(*stream))
    }

    /// The memory that the output of all streams costs, in bytes: without the parts of messages that
    /// connections share.
    pub fn own_output_len(&self) -> usize {
        let data = self.data_output().iter().map(|(_, b)| b.own_len());
        self.output.own_len() + data.sum::<usize>()
    }

    /// [`Connection::own_output_len`] and [`Connection::shared_output_len`].
    pub fn output_len(&self) -> (usize, usize) {
        let control = (self.output.own_len(), self.output.shared_len());
        let data = self.data_output().iter();
        data.fold(control, |(own, shared), (_, output)| {
            (own + output.own_len(), shared + output.shared_len())
        })
    }

    /// Bytes of output that other connections share.
    pub fn shared_output_len(&self) -> usize {
        let data = self.data_output().iter().map(|(_, b)| b.shared_len());
        self.output.shared_len() + data.sum::<usize>()
    }

    /// A subscription was made on a stream: its messages go there from now on.
    pub(super) fn bind(&mut self, name: &str, stream: StreamId) {
        self.retain_bindings(|b| *b.name != *name);
        if !stream.is_control() {
            let name = name.into();
            let bindings = &mut self.data.get_or_insert_default().bindings;
            bindings.push(StreamBinding {
                name,
                filter: None,
                stream,
            });
        }
    }

    /// Forgets filters that were refused: those of earlier SUBSCRIBEs have their numbers by now.
    pub(super) fn forget_refused(&mut self) {
        self.retain_bindings(|b| b.filter.is_some());
    }

    /// The router has taken a subscription, and its filter has a number.
    pub(super) fn numbered(&mut self, name: &str, filter: FilterId) {
        let mut all = self.data.iter_mut().flat_map(|data| &mut data.bindings);
        if let Some(binding) = all.find(|b| *b.name == *name) {
            binding.filter = Some(filter);
        }
    }

    /// The stream for the messages of a filter.
    pub(super) fn stream_of(&self, filter: FilterId) -> StreamId {
        let mut all = self.bindings().iter();
        all.find(|b| b.filter == Some(filter))
            .map_or(StreamId::CONTROL, |b| b.stream)
    }

    /// The messages of a data stream's subscriptions go on the control stream from now on.
    pub(super) fn unbind(&mut self, stream: StreamId) {
        self.retain_bindings(|b| b.stream != stream);
    }

    /// A data stream ended: nothing more is written for it, and its number may be used again.
    pub(super) fn stream_ended(&mut self, stream: StreamId) {
        self.unbind(stream);
        self.streams_free(StreamSet::EMPTY.with(stream));
        if let Some(data) = &mut self.data {
            data.output.retain(|(s, _)| *s != stream);
        }
        for pending in &mut self.pending {
            pending.stream.take_if(|s| *s == stream);
        }
        self.aliases.stream_ended(stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> Connection {
        let spec = ConnectionSpec {
            version: Version::V5,
            bridge: false,
            receive_maximum: u16::MAX,
            maximum_packet_size: None,
            topic_alias_maximum: 0,
            keep_alive: None,
            scope: None,
        };
        Connection::new(1, &spec, Millis::ZERO)
    }

    #[test]
    fn a_data_stream_has_no_room_until_a_large_message_is_written() {
        let mut connection = connection();
        let has_room = |c: &Connection, stream| c.has_room_of(1 << 20, stream);
        for (size, room) in [
            (STREAM_OUTPUT_MAX_BYTES - 1, true),
            (STREAM_OUTPUT_MAX_BYTES, false),
        ] {
            connection.output_on(StreamId::new(4)).extend(vec![0; size]);
            assert_eq!(has_room(&connection, StreamId::new(4)), room);
            let taken = connection.take_output(StreamSet::ALL, &mut OutBuf::default());
            assert_eq!(taken.len(), 1);
            // Other streams' messages are not affected.
            assert_eq!(has_room(&connection, StreamId::new(4)), room);
            assert!(
                has_room(&connection, StreamId::new(5)) && has_room(&connection, StreamId::CONTROL)
            );
        }
        connection.streams_free(StreamSet::ALL.without(StreamId::new(4)));
        assert!(!has_room(&connection, StreamId::new(4)));
        connection.streams_free(StreamSet::EMPTY.with(StreamId::new(4)));
        assert!(has_room(&connection, StreamId::new(4)));
    }

    #[test]
    fn streams_with_too_much_output_are_told_apart() {
        let mut connection = connection();
        let last = StreamSet::EMPTY.with(StreamId::new(15));
        connection.output_on(StreamId::new(3)).extend([0; 10]);
        connection.output_on(StreamId::new(15)).extend([0; 11]);
        assert_eq!(connection.full_streams(10), last);
        connection.control().extend([0; 11]);
        assert_eq!(connection.full_streams(10), last | StreamSet::CONTROL);
    }
}
