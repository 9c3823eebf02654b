//! MQTT 5 properties (MQTT 5 section 2.2.2).

use super::WireError;
use super::fields::{Reader, put_bytes, put_var};

/// Property identifiers.
pub mod prop {
    /// Payload Format Indicator, byte.
    pub const PAYLOAD_FORMAT: u8 = 1;
    /// Message Expiry Interval, four bytes, seconds.
    pub const MESSAGE_EXPIRY: u8 = 2;
    /// Content Type, string.
    pub const CONTENT_TYPE: u8 = 3;
    /// Response Topic, string.
    pub const RESPONSE_TOPIC: u8 = 8;
    /// Correlation Data, binary.
    pub const CORRELATION_DATA: u8 = 9;
    /// Subscription Identifier, variable byte integer.
    pub const SUBSCRIPTION_ID: u8 = 11;
    /// Session Expiry Interval, four bytes, seconds.
    pub const SESSION_EXPIRY: u8 = 17;
    /// Assigned Client Identifier, string.
    pub const ASSIGNED_CLIENT_ID: u8 = 18;
    /// Server Keep Alive, two bytes, seconds.
    pub const SERVER_KEEP_ALIVE: u8 = 19;
    /// Authentication Method, string.
    pub const AUTH_METHOD: u8 = 21;
    /// Authentication Data, binary.
    pub const AUTH_DATA: u8 = 22;
    /// Request Problem Information, byte.
    pub const REQUEST_PROBLEM: u8 = 23;
    /// Will Delay Interval, four bytes, seconds.
    pub const WILL_DELAY: u8 = 24;
    /// Request Response Information, byte.
    pub const REQUEST_RESPONSE: u8 = 25;
    /// Response Information, string.
    pub const RESPONSE_INFO: u8 = 26;
    /// Server Reference, string.
    pub const SERVER_REFERENCE: u8 = 28;
    /// Reason String, string.
    pub const REASON_STRING: u8 = 31;
    /// Receive Maximum, two bytes.
    pub const RECEIVE_MAX: u8 = 33;
    /// Topic Alias Maximum, two bytes.
    pub const TOPIC_ALIAS_MAX: u8 = 34;
    /// Topic Alias, two bytes.
    pub const TOPIC_ALIAS: u8 = 35;
    /// Maximum QoS, byte.
    pub const MAX_QOS: u8 = 36;
    /// Retain Available, byte.
    pub const RETAIN_AVAILABLE: u8 = 37;
    /// User Property, string pair.
    pub const USER_PROPERTY: u8 = 38;
    /// Maximum Packet Size, four bytes.
    pub const MAX_PACKET_SIZE: u8 = 39;
    /// Wildcard Subscription Available, byte.
    pub const WILDCARD_AVAILABLE: u8 = 40;
    /// Subscription Identifiers Available, byte.
    pub const SUBSCRIPTION_ID_AVAILABLE: u8 = 41;
    /// Shared Subscription Available, byte.
    pub const SHARED_AVAILABLE: u8 = 42;
}

/// A property's value by its type on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// One byte.
    Byte(u8),
    /// Two byte integer.
    Two(u16),
    /// Four byte integer.
    Four(u32),
    /// Variable byte integer.
    Var(u32),
    /// UTF-8 string.
    Text(String),
    /// Binary data.
    Data(Vec<u8>),
    /// UTF-8 string pair.
    Pair(String, String),
}

/// Properties in the order of the wire.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Props(pub Vec<(u8, Value)>);

impl Props {
    /// The first value of a property.
    pub fn get(&self, id: u8) -> Option<&Value> {
        self.0.iter().find(|(have, _)| *have == id).map(|(_, v)| v)
    }

    /// The first value of a numeric property.
    pub fn number(&self, id: u8) -> Option<u32> {
        match self.get(id)? {
            Value::Byte(n) => Some(u32::from(*n)),
            Value::Two(n) => Some(u32::from(*n)),
            Value::Four(n) | Value::Var(n) => Some(*n),
            _ => None,
        }
    }

    /// The first value of a string property.
    pub fn text(&self, id: u8) -> Option<&str> {
        match self.get(id)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// All values of a numeric property, such as Subscription Identifier.
    pub fn numbers(&self, id: u8) -> Vec<u32> {
        let one = |(have, value): &(u8, Value)| match value {
            Value::Var(n) | Value::Four(n) if *have == id => Some(*n),
            _ => None,
        };
        self.0.iter().filter_map(one).collect()
    }

    /// All User Properties, in order.
    pub fn user(&self) -> Vec<(&str, &str)> {
        self.0
            .iter()
            .filter_map(|(_, value)| match value {
                Value::Pair(k, v) => Some((k.as_str(), v.as_str())),
                _ => None,
            })
            .collect()
    }

    /// Replaces every value of a property by one.
    pub fn set(&mut self, id: u8, value: Value) {
        self.0.retain(|(have, _)| *have != id);
        self.0.push((id, value));
    }

    /// Returns the same properties and one more.
    pub fn with(mut self, id: u8, value: Value) -> Self {
        self.0.push((id, value));
        self
    }

    /// Whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Appends the properties with their length.
pub(super) fn put(props: &Props, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    for (id, value) in &props.0 {
        body.push(*id);
        match value {
            Value::Byte(n) => body.push(*n),
            Value::Two(n) => body.extend_from_slice(&n.to_be_bytes()),
            Value::Four(n) => body.extend_from_slice(&n.to_be_bytes()),
            Value::Var(n) => put_var(*n, &mut body),
            Value::Text(text) => put_bytes(text.as_bytes(), &mut body),
            Value::Data(data) => put_bytes(data, &mut body),
            Value::Pair(k, v) => {
                put_bytes(k.as_bytes(), &mut body);
                put_bytes(v.as_bytes(), &mut body);
            }
        }
    }
    let len = u32::try_from(body.len()).expect("test properties are far below 4 GiB");
    put_var(len, out);
    out.extend_from_slice(&body);
}

/// Reads properties with their length and checks that `packet` may carry each of them.
pub(super) fn take(r: &mut Reader<'_>, packet: u8) -> Result<Props, WireError> {
    let len = r.var()? as usize;
    let mut inner = r.sub(len)?;
    let mut props = Props::default();
    while !inner.is_empty() {
        let id = inner.byte()?;
        if !allowed(id, packet) {
            return Err(r.fault(format!("property {id} does not belong here")));
        }
        let repeats = id == prop::USER_PROPERTY || (id == prop::SUBSCRIPTION_ID && packet == 3);
        if !repeats && props.get(id).is_some() {
            return Err(r.fault(format!("property {id} appears twice")));
        }
        let value = match shape(id) {
            Shape::Byte => Value::Byte(inner.byte()?),
            Shape::Two => Value::Two(inner.two()?),
            Shape::Four => Value::Four(inner.four()?),
            Shape::Var => Value::Var(inner.var()?),
            Shape::Text => Value::Text(inner.text()?.to_owned()),
            Shape::Data => Value::Data(inner.bytes()?.to_vec()),
            Shape::Pair => Value::Pair(inner.text()?.to_owned(), inner.text()?.to_owned()),
        };
        let zero_is_illegal = matches!(
            id,
            prop::SUBSCRIPTION_ID | prop::RECEIVE_MAX | prop::TOPIC_ALIAS | prop::MAX_PACKET_SIZE
        );
        if zero_is_illegal && matches!(value, Value::Two(0) | Value::Four(0) | Value::Var(0)) {
            return Err(r.fault(format!("property {id} is zero")));
        }
        props.0.push((id, value));
    }
    Ok(props)
}

enum Shape {
    Byte,
    Two,
    Four,
    Var,
    Text,
    Data,
    Pair,
}

fn shape(id: u8) -> Shape {
    match id {
        1 | 23 | 25 | 36 | 37 | 40 | 41 | 42 => Shape::Byte,
        19 | 33 | 34 | 35 => Shape::Two,
        2 | 17 | 24 | 39 => Shape::Four,
        11 => Shape::Var,
        9 | 22 => Shape::Data,
        38 => Shape::Pair,
        _ => Shape::Text,
    }
}

/// The pseudo packet type of the will properties.
pub(super) const WILL: u8 = 0;

/// Table 2-4 of MQTT 5.
fn allowed(id: u8, packet: u8) -> bool {
    let packets: &[u8] = match id {
        1 | 2 | 3 | 8 | 9 => &[3, WILL],
        11 => &[3, 8],
        17 => &[1, 2, 14],
        18 | 19 | 26 | 36 | 37 | 40 | 41 | 42 => &[2],
        21 | 22 => &[1, 2, 15],
        23 | 25 => &[1],
        24 => &[WILL],
        28 => &[2, 14],
        31 => &[2, 4, 5, 6, 7, 9, 11, 14, 15],
        33 | 34 | 39 => &[1, 2],
        35 => &[3],
        38 => return true,
        _ => &[],
    };
    packets.contains(&packet)
}
