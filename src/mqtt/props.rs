//! MQTT 5 properties (§2.2.2): validated in one pass, kept raw, read again on demand.

use crate::mqtt::read::Reader;
use crate::mqtt::write::{bytes_len, put_bytes, put_str, put_u16, put_u32, put_varint, str_len};
use crate::mqtt::{Error, QoS, head::varint_len};

/// Properties that decoding has validated, without their length prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Properties<'a>(pub(crate) &'a [u8]);

impl<'a> Properties<'a> {
    /// The bytes as they were on the wire, without the length prefix.
    pub fn raw(&self) -> &'a [u8] {
        self.0
    }

    /// Properties that we wrote ourselves.
    pub(crate) fn own(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The properties in wire order ([MQTT-3.3.2-18]).
    pub fn iter(&self) -> impl Iterator<Item = Property<'a>> + Clone + use<'a> {
        let mut r = Reader(self.0);
        std::iter::from_fn(move || Property::read(r.u8().ok()?, &mut r).ok())
    }

    /// The user properties in wire order.
    pub fn user_properties(&self) -> impl Iterator<Item = (&'a str, &'a str)> + Clone + use<'a> {
        self.iter().filter_map(|p| match p {
            Property::UserProperty(key, value) => Some((key, value)),
            _ => None,
        })
    }
}

macro_rules! properties {
    ($($variant:ident($id:literal, $kind:ident, $text:literal);)*) => {
        /// One property of MQTT 5 (§2.2.2.2), borrowed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Property<'a> {
            $(#[doc = $text] $variant(ty!($kind 'a)),)*
            /// Name and value; may be there many times, order kept ([MQTT-3.3.2-18]).
            UserProperty(&'a str, &'a str),
        }

        impl<'a> Property<'a> {
            /// The identifier on the wire.
            pub const fn id(&self) -> u8 {
                match self {
                    $(Property::$variant(_) => $id,)*
                    Property::UserProperty(..) => USER_PROPERTY,
                }
            }

            /// Bytes on the wire, identifier included.
            pub(crate) fn size(&self) -> usize {
                1 + match *self {
                    $(Property::$variant(v) => size!($kind v),)*
                    Property::UserProperty(k, v) => str_len(k) + str_len(v),
                }
            }

            /// Appends identifier and value.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
                out.push(self.id());
                match *self {
                    $(Property::$variant(v) => put!($kind v out),)*
                    Property::UserProperty(k, v) => {
                        put_str(k, out);
                        put_str(v, out);
                    }
                }
            }

            /// How long the value of an identifier is.
            const fn width(id: u8) -> Width {
                match id {
                    $($id => width!($kind),)*
                    _ => Width::Pair,
                }
            }

            // Types only; whether a value is allowed is `check`.
            #[inline]
            fn read(id: u8, r: &mut Reader<'a>) -> Result<Property<'a>, Error> {
                Ok(match id {
                    $($id => Property::$variant(get!($kind r)),)*
                    USER_PROPERTY => Property::UserProperty(r.string()?, r.string()?),
                    _ => return Err(UNLISTED),
                })
            }
        }
    };
}
macro_rules! ty {
    (byte $a:lifetime) => { u8 };
    (two $a:lifetime) => { u16 };
    (four $a:lifetime) => { u32 };
    (varint $a:lifetime) => { u32 };
    (string $a:lifetime) => { &$a str };
    (binary $a:lifetime) => { &$a [u8] };
}
macro_rules! width {
    (byte) => {
        Width::Fixed(1)
    };
    (two) => {
        Width::Fixed(2)
    };
    (four) => {
        Width::Fixed(4)
    };
    (varint) => {
        Width::Varint
    };
    (string) => {
        Width::Field
    };
    (binary) => {
        Width::Field
    };
}
macro_rules! size {
    (byte $v:ident) => {{
        let _ = $v;
        1
    }};
    (two $v:ident) => {{
        let _ = $v;
        2
    }};
    (four $v:ident) => {{
        let _ = $v;
        4
    }};
    (varint $v:ident) => {
        varint_len($v as usize)
    };
    (string $v:ident) => {
        str_len($v)
    };
    (binary $v:ident) => {
        bytes_len($v)
    };
}
macro_rules! put {
    (byte $v:ident $out:ident) => {
        $out.push($v)
    };
    (two $v:ident $out:ident) => {
        put_u16($v, $out)
    };
    (four $v:ident $out:ident) => {
        put_u32($v, $out)
    };
    (varint $v:ident $out:ident) => {
        put_varint($v as usize, $out)
    };
    (string $v:ident $out:ident) => {
        put_str($v, $out)
    };
    (binary $v:ident $out:ident) => {
        put_bytes($v, $out)
    };
}
macro_rules! get {
    (byte $r:ident) => {
        $r.u8()?
    };
    (two $r:ident) => {
        $r.u16()?
    };
    (four $r:ident) => {
        $r.u32()?
    };
    (varint $r:ident) => {
        $r.varint()?
    };
    (string $r:ident) => {
        $r.string()?
    };
    (binary $r:ident) => {
        $r.binary()?
    };
}

pub(crate) const MESSAGE_EXPIRY: u8 = 0x02;
pub(crate) const RESPONSE_TOPIC: u8 = 0x08;
pub(crate) const TOPIC_ALIAS: u8 = 0x23;
pub(crate) const USER_PROPERTY: u8 = 0x26;
pub(crate) const SUBSCRIPTION_IDENTIFIER: u8 = 0x0B;

properties! {
    PayloadFormatIndicator(0x01, byte, "0: bytes; 1: UTF-8. Whether the payload is, is the receiver's to check.");
    MessageExpiryInterval(0x02, four, "Seconds that the message lives.");
    ContentType(0x03, string, "MIME or other description of the payload.");
    ResponseTopic(0x08, string, "Topic name for a response, without wildcards ([MQTT-3.3.2-14]).");
    CorrelationData(0x09, binary, "Ties a response to its request.");
    SubscriptionIdentifier(0x0B, varint, "1 to 268,435,455.");
    SessionExpiryInterval(0x11, four, "Seconds that the session outlives its connection; 0xFFFFFFFF: for ever.");
    AssignedClientIdentifier(0x12, string, "The client identifier that the server chose.");
    ServerKeepAlive(0x13, two, "Seconds; overrides the client's ([MQTT-3.2.2-21]).");
    AuthenticationMethod(0x15, string, "Name of the method of extended authentication (§4.12).");
    AuthenticationData(0x16, binary, "Defined by the method.");
    RequestProblemInformation(0x17, byte, "0: no reason strings or user properties on most packets ([MQTT-3.1.2-29]).");
    WillDelayInterval(0x18, four, "Seconds from the loss of the connection to the will.");
    RequestResponseInformation(0x19, byte, "1: the client asks for response information.");
    ResponseInformation(0x1A, string, "Basis for response topics.");
    ServerReference(0x1C, string, "Another server to use.");
    ReasonString(0x1F, string, "For people and logs.");
    ReceiveMaximum(0x21, two, "QoS 1 and 2 publishes that may be unacknowledged, from 1.");
    TopicAliasMaximum(0x22, two, "Highest topic alias that is accepted.");
    TopicAlias(0x23, two, "Stands for a topic name on this connection, from 1.");
    MaximumQoS(0x24, byte, "0 or 1; absent: 2.");
    RetainAvailable(0x25, byte, "0 or 1; absent: 1.");
    MaximumPacketSize(0x27, four, "Bytes, fixed header included, from 1.");
    WildcardSubscriptionAvailable(0x28, byte, "0 or 1; absent: 1.");
    SubscriptionIdentifierAvailable(0x29, byte, "0 or 1; absent: 1.");
    SharedSubscriptionAvailable(0x2A, byte, "0 or 1; absent: 1.");
}

const UNLISTED: Error = Error::Malformed("property not listed for this packet (§2.2.2.2)");
const TWICE: Error = Error::Protocol("property included twice");

/// Which properties a packet type may carry: bit n is identifier n.
#[derive(Clone, Copy)]
pub(crate) struct Allowed {
    pub once: u64,
    pub many: u64,
}

const fn set(ids: &[u8]) -> u64 {
    let mut bits = 0;
    let mut i = 0;
    while i < ids.len() {
        bits |= 1 << ids[i];
        i += 1;
    }
    bits
}

const fn allow(ids: &[u8]) -> Allowed {
    Allowed {
        once: set(ids),
        many: 1 << USER_PROPERTY,
    }
}

pub(crate) const ON_CONNECT: Allowed = allow(&[0x11, 0x15, 0x16, 0x17, 0x19, 0x21, 0x22, 0x27]);
pub(crate) const ON_WILL: Allowed = allow(&[0x01, 0x02, 0x03, 0x08, 0x09, 0x18]);
pub(crate) const ON_CONNACK: Allowed = allow(&[
    0x11, 0x12, 0x13, 0x15, 0x16, 0x1A, 0x1C, 0x1F, 0x21, 0x22, 0x24, 0x25, 0x27, 0x28, 0x29, 0x2A,
]);
/// From a client: without subscription identifiers ([MQTT-3.3.4-6]).
pub(crate) const ON_PUBLISH_BY_CLIENT: Allowed = allow(&[0x01, 0x02, 0x03, 0x08, 0x09, 0x23]);
pub(crate) const ON_PUBLISH_BY_SERVER: Allowed = Allowed {
    once: ON_PUBLISH_BY_CLIENT.once,
    many: 1 << USER_PROPERTY | 1 << SUBSCRIPTION_IDENTIFIER,
};
/// The properties that travel with an application message (§3.3.2.3).
pub(crate) const FORWARDED: Allowed = allow(&[0x01, 0x03, 0x08, 0x09]);
/// PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK, UNSUBACK.
pub(crate) const ON_ACK: Allowed = allow(&[0x1F]);
pub(crate) const ON_SUBSCRIBE: Allowed = allow(&[0x0B]);
pub(crate) const ON_UNSUBSCRIBE: Allowed = allow(&[]);
/// The session expiry is the client's only ([MQTT-3.14.2-2]).
pub(crate) const ON_DISCONNECT_BY_CLIENT: Allowed = allow(&[0x11, 0x1C, 0x1F]);
pub(crate) const ON_DISCONNECT_BY_SERVER: Allowed = allow(&[0x1C, 0x1F]);
pub(crate) const ON_AUTH: Allowed = allow(&[0x15, 0x16, 0x1F]);

/// Reads the length prefix and validates every property; `each` sees them once, in order, but for
/// user properties.
#[inline(always)]
pub(crate) fn read<'a>(
    r: &mut Reader<'a>,
    allowed: Allowed,
    each: impl FnMut(Property<'a>),
) -> Result<Properties<'a>, Error> {
    // Most packets have none ([MQTT-2.2.2-1]).
    if let [0, rest @ ..] = r.0 {
        r.0 = rest;
        return Ok(Properties(&[]));
    }
    read_some(r, allowed, each)
}

#[inline(never)]
fn read_some<'a>(
    r: &mut Reader<'a>,
    allowed: Allowed,
    mut each: impl FnMut(Property<'a>),
) -> Result<Properties<'a>, Error> {
    let len = r.varint()? as usize;
    let raw = r.take(len)?;
    let mut rest = Reader(raw);
    let mut seen = 0u64;
    while !rest.is_empty() {
        // Identifiers are variable byte integers, but all that are listed take one byte.
        let id = rest.u8()?;
        let bit = 1u64.checked_shl(u32::from(id)).unwrap_or(0);
        if (allowed.once | allowed.many) & bit == 0 {
            return Err(unlisted(id));
        }
        if seen & bit & !allowed.many != 0 {
            return Err(TWICE);
        }
        seen |= bit;
        match id {
            // The two that every other message has are read without the detour; neither has
            // values that `check` would look at.
            USER_PROPERTY => {
                rest.skip_string()?;
                rest.skip_string()?;
            }
            MESSAGE_EXPIRY => each(Property::MessageExpiryInterval(rest.u32()?)),
            _ => {
                let property = Property::read(id, &mut rest)?;
                check(&property)?;
                each(property);
            }
        }
    }
    Ok(Properties(raw))
}

// Two cases have their own statement, the rest are malformed by §2.2.2.2.
#[cold]
fn unlisted(id: u8) -> Error {
    match id {
        SUBSCRIPTION_IDENTIFIER => {
            Error::Protocol("Subscription Identifier not allowed here [MQTT-3.3.4-6]")
        }
        0x11 => Error::Protocol("Session Expiry Interval not allowed here [MQTT-3.14.2-2]"),
        _ => UNLISTED,
    }
}

// Values that a type could hold but the specification excludes.
#[inline]
fn check(property: &Property<'_>) -> Result<(), Error> {
    use Property as P;
    match *property {
        P::PayloadFormatIndicator(v)
        | P::RequestProblemInformation(v)
        | P::RequestResponseInformation(v)
        | P::MaximumQoS(v)
        | P::RetainAvailable(v)
        | P::WildcardSubscriptionAvailable(v)
        | P::SubscriptionIdentifierAvailable(v)
        | P::SharedSubscriptionAvailable(v)
            if v > 1 =>
        {
            Err(Error::Protocol("property that is 0 or 1 has another value"))
        }
        P::ReceiveMaximum(0) => Err(Error::Protocol("Receive Maximum 0 (§3.1.2.11.3)")),
        P::MaximumPacketSize(0) => Err(Error::Protocol("Maximum Packet Size 0 (§3.1.2.11.4)")),
        P::SubscriptionIdentifier(0) => {
            Err(Error::Protocol("Subscription Identifier 0 (§3.8.2.1.2)"))
        }
        P::TopicAlias(0) => Err(Error::TopicAlias("alias 0 [MQTT-3.3.2-8]")),
        P::ResponseTopic(topic) if !crate::topics::valid_topic_name(topic) => Err(Error::Protocol(
            "Response Topic is empty or has wildcards [MQTT-3.3.2-14]",
        )),
        _ => Ok(()),
    }
}

enum Width {
    Fixed(usize),
    Varint,
    /// A length of two bytes and as much.
    Field,
    /// Two fields.
    Pair,
}

/// The place of the Response Topic among raw properties: the index of its identifier, and its text.
pub(crate) fn response_topic(properties: &[u8]) -> Option<(usize, &[u8])> {
    let mut at = 0;
    for span in Spans(properties) {
        if span[0] == RESPONSE_TOPIC {
            return Some((at, &span[3..]));
        }
        at += span.len();
    }
    None
}

/// Validated raw properties, each as the bytes it takes, not looked into.
#[derive(Clone, Copy)]
struct Spans<'a>(&'a [u8]);

impl<'a> Iterator for Spans<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let mut r = Reader(self.0);
        match Property::width(r.u8().ok()?) {
            Width::Fixed(len) => drop(r.take(len).ok()?),
            Width::Varint => drop(r.varint().ok()?),
            Width::Field => drop(r.binary().ok()?),
            Width::Pair => drop((r.binary().ok()?, r.binary().ok()?)),
        }
        let (span, rest) = self.0.split_at(self.0.len() - r.0.len());
        self.0 = rest;
        Some(span)
    }
}

/// Bytes of a property block without its length prefix.
pub(crate) fn block_len(properties: &[Option<Property<'_>>]) -> usize {
    properties.iter().flatten().map(Property::size).sum()
}

/// Appends the length prefix and the properties.
pub(crate) fn put_block(properties: &[Option<Property<'_>>], out: &mut Vec<u8>) {
    put_varint(block_len(properties), out);
    for property in properties.iter().flatten() {
        property.write(out);
    }
}

/// Bytes of a property block with its length prefix.
pub(crate) fn framed_len(block: usize) -> usize {
    varint_len(block) + block
}

/// Maximum QoS as a property value: absent means 2.
pub(crate) fn maximum_qos(v: u8) -> QoS {
    if v == 0 {
        QoS::AtMostOnce
    } else {
        QoS::AtLeastOnce
    }
}

/// The bytes of each property that travels with a message (§3.3.2.3), in order. User properties with
/// the key `strip`, or a key that begins with it and `-`, are omitted.
#[inline]
pub(crate) fn forwarded<'a>(
    properties: Properties<'a>,
    strip: Option<&str>,
) -> impl Iterator<Item = &'a [u8]> {
    Spans(properties.0).filter(move |span| match span[0] {
        USER_PROPERTY => {
            let key = Reader(&span[1..]).binary();
            strip.is_none_or(|strip| {
                let rest = key
                    .as_ref()
                    .ok()
                    .and_then(|k| k.strip_prefix(strip.as_bytes()));
                !rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'-')))
            })
        }
        id => FORWARDED.once & (1 << id) != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_bytes_come_back_as_properties() {
        let block = b"\x0E\x26\0\x01k\0\x01v\x26\0\x01k\0\x01w";
        let mut seen = Vec::new();
        let mut r = Reader(block);
        let properties = read(&mut r, ON_ACK, |p| seen.push(p)).expect("legal");
        assert!(r.is_empty() && properties.raw() == &block[1..]);
        assert!(seen.is_empty(), "user properties are not shown");
        assert_eq!(properties.iter().count(), 2);
        assert!(properties.user_properties().eq([("k", "v"), ("k", "w")]));
    }

    #[test]
    fn sizes_are_those_written() {
        let all = [
            Property::PayloadFormatIndicator(1),
            Property::SubscriptionIdentifier(16_384),
            Property::ReceiveMaximum(1),
            Property::MaximumPacketSize(1),
            Property::ReasonString("é"),
            Property::CorrelationData(&[0, 1]),
            Property::UserProperty("", "x"),
        ];
        let mut out = Vec::new();
        put_block(&all.map(Some), &mut out);
        assert_eq!(out.len(), framed_len(block_len(&all.map(Some))));
        assert!(Properties(&out[1..]).iter().eq(all));
    }

    #[test]
    fn spans_are_those_read() {
        let mut wire = Vec::new();
        for id in 0..=u8::MAX {
            // Zeros do for every type: a number, an empty string, two of them.
            let mut value = Reader(&[0; 8]);
            if Property::read(id, &mut value).is_ok() {
                wire.push([&[id], &[0; 8][value.0.len()..]].concat());
            }
        }
        assert_eq!(wire.len(), 27);
        assert!(Spans(&wire.concat()).eq(wire.iter().map(|one| &one[..])));
    }

    #[test]
    fn each_identifier_is_allowed_somewhere_only() {
        let lists = [
            ON_CONNECT,
            ON_WILL,
            ON_CONNACK,
            ON_PUBLISH_BY_CLIENT,
            ON_PUBLISH_BY_SERVER,
            ON_ACK,
            ON_SUBSCRIBE,
            ON_UNSUBSCRIBE,
            ON_DISCONNECT_BY_CLIENT,
            ON_DISCONNECT_BY_SERVER,
            ON_AUTH,
        ];
        let any = lists
            .iter()
            .fold(0, |bits, list| bits | list.once | list.many);
        // The 27 of §2.2.2.2.
        assert_eq!(any.count_ones(), 27);
        for id in 0..=u8::MAX {
            let block = [1, id];
            let got = read(&mut Reader(&block), ON_PUBLISH_BY_CLIENT, |_| {});
            assert!(got.is_err(), "{id}");
        }
    }
}
