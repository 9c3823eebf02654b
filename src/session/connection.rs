//! What lives only as long as one network connection: limits, aliases, output, keepalive.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use foldhash::fast::RandomState;

use crate::mqtt::{Alias, ReasonCode, Version, split_shared};

use super::{Close, SessionLimits};

/// Aliases given toward one client at most, whatever it offers: each costs its topic's bytes.
const ALIASES_OUT_MAX: u16 = 64;
/// Bytes of the topics behind one client's aliases, in each direction.
const ALIAS_BYTES_MAX: usize = 128 * 1024;

/// Topics and their aliases toward the client; boxed, since few clients offer any.
type AliasesOut = HashMap<Box<str>, u16, RandomState>;

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
    pub generation: u64,
    /// Protocol version of this connection.
    pub version: Version,
    /// The client's Receive Maximum.
    pub receive_maximum: u16,
    /// The client's Maximum Packet Size in bytes.
    pub maximum_packet_size: usize,
    /// The client takes Reason Strings outside CONNACK and DISCONNECT [MQTT-3.1.2-29].
    pub problem_information: bool,
    /// One and a half times Keep Alive in milliseconds; 0: none [MQTT-3.1.2-22].
    pub keep_alive: u64,
    /// When the last packet came.
    pub last_seen: u64,
    /// Its socket is left unread by us: its silence is not the client's.
    pub unread: bool,
    /// The client was asked to go, and why: nothing more is written for it.
    pub closing: bool,
    /// What sets its client apart; `None`: nothing.
    pub scope: Option<Arc<Scope>>,
    /// SUBSCRIBEs that wait for the core.
    pub(super) pending: Vec<PendingSubscribe>,
    output: Vec<u8>,
    side_output: Vec<(u8, Vec<u8>)>,
    aliases_in: Vec<Option<Arc<str>>>,
    aliases_out: Option<Box<AliasesOut>>,
    alias_out_max: u16,
}

/// A SUBSCRIBE whose filters are not all answered yet.
#[derive(Debug)]
pub(super) struct PendingSubscribe {
    pub packet_id: u16,
    pub lane: u8,
    pub waiting: u16,
    pub codes: Vec<u8>,
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
    pub fn new(generation: u64, spec: &ConnectionSpec, now: u64) -> Self {
        Self {
            generation,
            version: spec.version,
            receive_maximum: spec.receive_maximum,
            maximum_packet_size: spec.maximum_packet_size as usize,
            problem_information: spec.problem_information,
            keep_alive: u64::from(spec.keep_alive) * 1500,
            last_seen: now,
            unread: false,
            closing: false,
            scope: spec.scope.clone(),
            pending: Vec::new(),
            output: Vec::new(),
            side_output: Vec::new(),
            aliases_in: Vec::new(),
            aliases_out: None,
            alias_out_max: spec.topic_alias_maximum.min(ALIASES_OUT_MAX),
        }
    }

    /// The output of the control lane.
    pub fn control(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// The output of `lane`: answers go where the packet came from.
    pub fn lane(&mut self, lane: u8) -> &mut Vec<u8> {
        if lane == 0 {
            return &mut self.output;
        }
        let index = match self.side_output.iter().position(|(l, _)| *l == lane) {
            Some(index) => index,
            None => {
                self.side_output.push((lane, Vec::new()));
                self.side_output.len() - 1
            }
        };
        &mut self.side_output[index].1
    }

    /// Bytes wait to be taken by the connection's task.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty() || !self.side_output.is_empty()
    }

    /// Exchanges the control lane's output with `empty`, and takes the other lanes'.
    pub fn take_output(&mut self, empty: &mut Vec<u8>) -> Vec<(u8, Vec<u8>)> {
        std::mem::swap(&mut self.output, empty);
        std::mem::take(&mut self.side_output)
    }

    /// Room for another delivery before the output buffer's limit.
    pub fn has_room(&self, limits: &SessionLimits) -> bool {
        self.output.len() < limits.output_buffer.load(Ordering::Relaxed) && !self.closing
    }

    /// Bytes of output that wait.
    pub fn output_len(&self) -> usize {
        self.output.len()
    }

    /// Defines or uses a client's alias.
    ///
    /// # Errors
    /// It was never defined, or the topics of all aliases together are too long to keep.
    pub fn resolve_alias(&mut self, alias: u16, topic: &str) -> Result<Arc<str>, Close> {
        let undefined = Close {
            reason: ReasonCode::PROTOCOL_ERROR,
            why: "a topic alias that was never defined",
        };
        let index = usize::from(alias).checked_sub(1).ok_or(undefined)?;
        if topic.is_empty() {
            let known = self.aliases_in.get(index).cloned().flatten();
            return known.ok_or(undefined);
        }
        if self.aliases_in.len() <= index {
            self.aliases_in.resize(index + 1, None);
        }
        let others: usize = self.aliases_in.iter().flatten().map(|t| t.len()).sum();
        if others + topic.len() > ALIAS_BYTES_MAX {
            return Err(Close {
                reason: ReasonCode::QUOTA_EXCEEDED,
                why: "the topics behind the client's aliases are too long to keep",
            });
        }
        let topic: Arc<str> = topic.into();
        self.aliases_in[index] = Some(topic.clone());
        Ok(topic)
    }

    /// The alias for a delivery on `topic`: first come, first served [MQTT-3.1.2-26].
    pub fn alias_for(&mut self, topic: &str) -> Alias {
        if self.alias_out_max == 0 {
            return Alias::None;
        }
        let table = self.aliases_out.get_or_insert_default();
        if let Some(alias) = table.get(topic) {
            return Alias::Use(*alias);
        }
        let next = table.len() as u16 + 1;
        if next > self.alias_out_max {
            return Alias::None;
        }
        table.insert(topic.into(), next);
        Alias::Define(next)
    }
}
