//! What lives only as long as one network connection: limits, aliases, output, keepalive.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use foldhash::fast::RandomState;

use crate::mqtt::{Alias, QoS, Version};
use crate::time::Millis;
use crate::topics::{FilterId, split_shared};

use crate::session::{CloseReason, SessionLimits};

/// Aliases given toward one client at most, whatever it offers: each costs its topic's bytes.
const ALIASES_OUT_MAX: u16 = 64;
/// Bytes of the topics behind one client's aliases, in each direction.
const ALIAS_BYTES_MAX: usize = 128 * 1024;

/// Bytes of output that may wait for a data stream, but for the last message.
const STREAM_OUTPUT_MAX_BYTES: usize = 16 * 1024;

/// Topics and their aliases toward the client; boxed, since few clients offer any. Streams keep no
/// order with each other, so an alias is used on the stream that defined it only.
#[derive(Debug, Default)]
struct AliasesOut {
    table: HashMap<Box<str>, (u16, u8), RandomState>,
    given: u16,
}

/// What sets a client's topics and publishes apart from those of others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// All its topics and filters are below this at the core, and the client does not see it.
    pub mount: Box<str>,
    /// Raw user properties that each of its publishes carries to the core.
    pub sender: Box<[u8]>,
}

impl Scope {
    /// The filter that this one of the client's is at the core; `None`: it is too long.
    pub(super) fn filter(&self, filter: &str) -> Option<String> {
        let whole = match split_shared(filter) {
            None => format!("{}{filter}", self.mount),
            Some((group, plain)) => format!("$share/{group}/{}{plain}", self.mount),
        };
        (whole.len() <= usize::from(u16::MAX)).then_some(whole)
    }
}

/// The state of one connection of a session.
#[derive(Debug)]
pub struct Connection {
    /// Which connection of the session this is; a later one has a larger number.
    pub connection_no: u64,
    /// Protocol version of this connection.
    pub version: Version,
    /// The client's Receive Maximum.
    pub receive_maximum: u16,
    /// The client's Maximum Packet Size in bytes.
    pub maximum_packet_size: usize,
    /// The client takes Reason Strings outside CONNACK and DISCONNECT [MQTT-3.1.2-29].
    pub problem_information: bool,
    /// One and a half times Keep Alive in milliseconds [MQTT-3.1.2-22].
    keep_alive: Option<NonZeroU32>,
    /// When the last packet came.
    pub last_seen: u64,
    /// Its socket, or one of its streams, is left unread by us: its silence is not the client's.
    pub unread: bool,
    /// The client was asked to go, and why: nothing more is written for it.
    pub closing: bool,
    /// What sets its client apart; `None`: nothing.
    pub scope: Option<Arc<Scope>>,
    /// SUBSCRIBEs that wait for the core.
    pub(super) pending: Vec<PendingSubscribe>,
    output: Vec<u8>,
    side_output: Vec<(u8, Vec<u8>)>,
    /// Data streams whose connection's task has as much as may wait for one, as bits.
    laden: u16,
    /// Subscriptions made on data streams.
    bound: Vec<Bound>,
    /// Of each stream: a client may keep them for each stream apart.
    aliases_in: Vec<Vec<Option<Arc<str>>>>,
    aliases_out: Option<Box<AliasesOut>>,
    alias_out_max: u16,
}

/// The stream of what nobody is told any more: its stream is gone.
pub(super) const NOWHERE: u8 = u8::MAX;

/// A subscription that was made on a data stream: its messages go there.
#[derive(Debug)]
struct Bound {
    name: Box<str>,
    /// The router's number of the filter; `None` until the router has taken the subscription.
    filter: Option<FilterId>,
    stream: u8,
}

/// A SUBSCRIBE whose filters are not all answered yet.
#[derive(Debug)]
pub(super) struct PendingSubscribe {
    /// Names it to the router: its packet identifier, unless another stream has the same in use.
    pub key: u16,
    pub packet_id: u16,
    /// Where the SUBACK goes.
    pub stream: u8,
    pub waiting: u16,
    pub codes: Vec<u8>,
    /// Filters that it names more than once.
    pub again: Vec<Again>,
}

/// A filter in a SUBSCRIBE that names it more than once: answered with the first.
#[derive(Debug)]
pub(super) struct Again {
    pub index: u16,
    pub first: u16,
    /// It is granted no more than this.
    pub asked: QoS,
}

/// What a CONNECT fixed for its connection.
#[derive(Clone, Debug)]
pub struct ConnectionSpec {
    /// Protocol version.
    pub version: Version,
    /// The client's Receive Maximum; 65,535 if it sent none.
    pub receive_maximum: u16,
    /// The client's Maximum Packet Size in bytes; `u32::MAX` if it sent none.
    pub maximum_packet_size: u32,
    /// The client's Topic Alias Maximum.
    pub topic_alias_maximum: u16,
    /// Request Problem Information.
    pub problem_information: bool,
    /// The Keep Alive in force, in seconds; 0: none.
    pub keep_alive: u16,
    /// What sets the client apart; `None`: nothing.
    pub scope: Option<Arc<Scope>>,
}

impl Connection {
    /// A connection that starts `now`.
    pub fn new(connection_no: u64, spec: &ConnectionSpec, now: Millis) -> Self {
        Self {
            connection_no,
            version: spec.version,
            receive_maximum: spec.receive_maximum,
            maximum_packet_size: spec.maximum_packet_size as usize,
            problem_information: spec.problem_information,
            keep_alive: NonZeroU32::new(u32::from(spec.keep_alive) * 1500),
            last_seen: now,
            unread: false,
            closing: false,
            scope: spec.scope.clone(),
            pending: Vec::new(),
            output: Vec::new(),
            side_output: Vec::new(),
            laden: 0,
            bound: Vec::new(),
            aliases_in: Vec::new(),
            aliases_out: None,
            alias_out_max: spec.topic_alias_maximum.min(ALIASES_OUT_MAX),
        }
    }

    /// What its publishes tell of their sender from now on, raw user properties.
    pub fn set_sender(&mut self, sender: Box<[u8]>) {
        if let Some(scope) = &mut self.scope {
            let mount = scope.mount.clone();
            *scope = Arc::new(Scope { mount, sender });
        }
    }

    /// When the client's silence exceeds its Keep Alive, unless a packet arrives before.
    pub fn silent_until(&self) -> Option<Millis> {
        let keep_alive = self.keep_alive?;
        Some(self.last_seen + Millis::from(keep_alive.get()))
    }

    /// Ends the watch over the client's silence: its end was asked for.
    pub fn stop_keep_alive(&mut self) {
        self.keep_alive = None;
    }

    /// The output of the control stream.
    pub fn control(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// The output of `stream`: answers go where the packet came from.
    pub fn output_on(&mut self, stream: u8) -> &mut Vec<u8> {
        if stream == 0 {
            return &mut self.output;
        }
        let index = match self.side_output.iter().position(|(l, _)| *l == stream) {
            Some(index) => index,
            None => {
                self.side_output.push((stream, Vec::new()));
                self.side_output.len() - 1
            }
        };
        &mut self.side_output[index].1
    }

    /// Bytes wait to be taken by the connection's task.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty() || !self.side_output.is_empty()
    }

    /// The streams that are set in `free` have taken all that they were given.
    pub fn streams_free(&mut self, free: u16) {
        self.laden &= !free;
    }

    /// Takes the output of the streams that are set in `free`: the control stream's in exchange for
    /// `empty`.
    pub fn take_output(&mut self, free: u16, empty: &mut Vec<u8>) -> Vec<(u8, Vec<u8>)> {
        if free & 1 != 0 {
            std::mem::swap(&mut self.output, empty);
        }
        let taken = if self.side_output.iter().all(|(l, _)| free & 1 << l != 0) {
            std::mem::take(&mut self.side_output)
        } else {
            let free = |side: &mut (u8, Vec<u8>)| free & 1 << side.0 != 0;
            self.side_output.extract_if(.., free).collect()
        };
        let laden = taken
            .iter()
            .filter(|(_, b)| b.len() >= STREAM_OUTPUT_MAX_BYTES);
        self.laden |= laden.fold(0, |all, (stream, _)| all | 1 << stream);
        taken
    }

    /// Room for another delivery on `stream` before its limit.
    pub fn has_room(&self, limits: &SessionLimits, stream: u8) -> bool {
        self.has_room_of(limits.output_buffer.load(Ordering::Relaxed), stream)
    }

    fn has_room_of(&self, limit: usize, stream: u8) -> bool {
        !self.closing
            && match stream {
                0 => self.output.len() < limit,
                stream => {
                    self.laden & 1 << stream == 0
                        && self.side_len(stream) < limit.min(STREAM_OUTPUT_MAX_BYTES)
                }
            }
    }

    /// A SUBACK is due on a data stream, or something waits to be taken for it.
    pub(super) fn stream_busy(&self, stream: u8) -> bool {
        self.side_len(stream) > 0 || self.pending.iter().any(|p| p.stream == stream)
    }

    fn side_len(&self, stream: u8) -> usize {
        let mut all = self.side_output.iter();
        all.find(|(l, _)| *l == stream).map_or(0, |(_, b)| b.len())
    }

    /// The streams for which more than `max` bytes of output wait, as bits.
    pub fn full_streams(&self, max: usize) -> u16 {
        let control = u16::from(self.output.len() > max);
        let side = self.side_output.iter().filter(|(_, b)| b.len() > max);
        side.fold(control, |full, (stream, _)| full | 1 << stream)
    }

    /// Bytes of output that wait, on all streams.
    pub fn output_len(&self) -> usize {
        self.output.len() + self.side_output.iter().map(|(_, b)| b.len()).sum::<usize>()
    }

    /// A subscription was made on `stream`: its messages go there from now on.
    pub(super) fn bind(&mut self, name: &str, stream: u8) {
        self.bound.retain(|b| *b.name != *name);
        if stream != 0 {
            let (name, filter) = (name.into(), None);
            self.bound.push(Bound {
                name,
                filter,
                stream,
            });
        }
    }

    /// Filters that no subscription came of: those of earlier SUBSCRIBEs have their numbers by now.
    pub(super) fn forget_refused(&mut self) {
        self.bound.retain(|b| b.filter.is_some());
    }

    /// The number of a filter is known.
    pub(super) fn numbered(&mut self, name: &str, filter: FilterId) {
        if let Some(bound) = self.bound.iter_mut().find(|b| *b.name == *name) {
            bound.filter = Some(filter);
        }
    }

    /// The stream that a filter's messages go on.
    pub(super) fn stream_of(&self, filter: FilterId) -> u8 {
        let mut all = self.bound.iter();
        all.find(|b| b.filter == Some(filter))
            .map_or(0, |b| b.stream)
    }

    /// Subscriptions of a data stream go on the control stream from now on.
    pub(super) fn unbind(&mut self, stream: u8) {
        self.bound.retain(|b| b.stream != stream);
    }

    /// A data stream is gone: nothing goes there any more, and its number may be used again.
    pub(super) fn stream_ended(&mut self, stream: u8) {
        self.unbind(stream);
        self.streams_free(1 << stream);
        self.side_output.retain(|(l, _)| *l != stream);
        for pending in self.pending.iter_mut().filter(|p| p.stream == stream) {
            pending.stream = NOWHERE;
        }
        if let Some(aliases) = self.aliases_in.get_mut(usize::from(stream)) {
            *aliases = Vec::new();
        }
        if let Some(aliases) = &mut self.aliases_out {
            aliases.table.retain(|_, (_, l)| *l != stream);
        }
    }

    /// Defines or uses a client's alias on the stream `stream`.
    ///
    /// # Errors
    /// It was never defined, or the topics of all aliases together are too long to keep.
    pub fn resolve_alias(
        &mut self,
        stream: u8,
        alias: u16,
        topic: &str,
    ) -> Result<Arc<str>, CloseReason> {
        let undefined = CloseReason::TopicAliasUndefined;
        let index = usize::from(alias).checked_sub(1).ok_or(undefined)?;
        let stream = usize::from(stream);
        if topic.is_empty() {
            let known = self.aliases_in.get(stream).and_then(|a| a.get(index));
            return known.cloned().flatten().ok_or(undefined);
        }
        if self.aliases_in.len() <= stream {
            self.aliases_in.resize(stream + 1, Vec::new());
        }
        if self.aliases_in[stream].len() <= index {
            self.aliases_in[stream].resize(index + 1, None);
        }
        let all = self.aliases_in.iter().flatten().flatten();
        let others: usize = all.map(|t| t.len()).sum();
        if others + topic.len() > ALIAS_BYTES_MAX {
            return Err(CloseReason::TopicAliasBytes);
        }
        let topic: Arc<str> = topic.into();
        self.aliases_in[stream][index] = Some(topic.clone());
        Ok(topic)
    }

    /// The alias for a delivery on `topic`: first come, first served [MQTT-3.1.2-26].
    pub fn alias_for(&mut self, topic: &str, stream: u8) -> Alias {
        if self.alias_out_max == 0 {
            return Alias::None;
        }
        let aliases = self.aliases_out.get_or_insert_default();
        match aliases.table.get(topic) {
            Some((alias, on)) if *on == stream => return Alias::Use(*alias),
            Some(_) => return Alias::None,
            None => {}
        }
        // Not used again after its stream: the client may know it still.
        if aliases.given == self.alias_out_max {
            return Alias::None;
        }
        aliases.given += 1;
        aliases.table.insert(topic.into(), (aliases.given, stream));
        Alias::Define(aliases.given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> Connection {
        let spec = ConnectionSpec {
            version: Version::V5,
            receive_maximum: u16::MAX,
            maximum_packet_size: u32::MAX,
            topic_alias_maximum: 0,
            problem_information: false,
            keep_alive: 0,
            scope: None,
        };
        Connection::new(1, &spec, 0)
    }

    #[test]
    fn a_data_stream_has_no_room_until_a_large_message_is_written() {
        let mut connection = connection();
        let has_room = |c: &Connection, stream| c.has_room_of(1 << 20, stream);
        for (size, room) in [
            (STREAM_OUTPUT_MAX_BYTES - 1, true),
            (STREAM_OUTPUT_MAX_BYTES, false),
        ] {
            connection.output_on(4).extend(vec![0; size]);
            assert_eq!(has_room(&connection, 4), room);
            let taken = connection.take_output(u16::MAX, &mut Vec::new());
            assert_eq!(taken.len(), 1);
            // The others' messages are not its concern.
            assert_eq!(has_room(&connection, 4), room);
            assert!(has_room(&connection, 5) && has_room(&connection, 0));
        }
        connection.streams_free(!(1 << 4));
        assert!(!has_room(&connection, 4));
        connection.streams_free(1 << 4);
        assert!(has_room(&connection, 4));
    }

    #[test]
    fn streams_with_too_much_output_are_told_apart() {
        let mut connection = connection();
        connection.output_on(3).extend([0; 10]);
        connection.output_on(15).extend([0; 11]);
        assert_eq!(connection.full_streams(10), 1 << 15);
        connection.control().extend([0; 11]);
        assert_eq!(connection.full_streams(10), 1 << 15 | 1);
    }
}
