//! An application message, stored once for all its receivers.

use std::sync::Arc;

use triomphe::ThinArc;

use crate::budget::Account;

use crate::mqtt::numbered::Numbered;
use crate::mqtt::props::{RESPONSE_TOPIC, forwarded};
use crate::mqtt::text::cut;
use crate::mqtt::{Properties, QoS};
use crate::time::{Deadline, Millis};

/// The parts of a message.
#[derive(Clone, Debug)]
pub struct MessageSpec<'a> {
    /// A valid topic name.
    pub topic: &'a str,
    /// As received. Only properties that travel with the message are kept (§3.3.2.3).
    pub properties: Properties<'a>,
    /// Application message.
    pub payload: &'a [u8],
    /// QoS it was published with.
    pub qos: QoS,
    /// RETAIN as received.
    pub retain: bool,
    /// When it expires [MQTT-3.3.2-5]; `None`: never.
    pub expires_at: Option<Deadline>,
    /// User properties with this key, or with a key that begins with it and `-`, are removed.
    pub strip_key: Option<&'a str>,
    /// Charged with [`Message::size`] for as long as the message lives.
    pub account: Option<Arc<Account>>,
}

/// What a client's scope makes of its messages.
#[derive(Clone, Copy, Debug)]
pub struct Mounting<'a> {
    /// The prefix of the topic and of the Response Topic; each together with it has at most 65,535
    /// bytes.
    pub mount: &'a str,
    /// Raw user properties, added after the message's own.
    pub sender: &'a [u8],
    /// Whether a Response Topic is kept.
    pub response_topic: bool,
}

impl Mounting<'static> {
    /// Changes nothing.
    pub const NONE: Self = Self {
        mount: "",
        sender: &[],
        response_topic: true,
    };
}

/// Topic, raw forwardable properties and payload in one exact-size allocation; a clone is a
/// reference.
#[derive(Clone)]
pub struct Message(ThinArc<Head, u8>);

// `body` of the allocation: topic with its length prefix, properties, payload.
struct Head {
    expires_at: Option<Deadline>,
    /// `None` unless messages go into a log.
    numbered: Option<Box<Numbered>>,
    _charge: Option<Charge>,
    properties: u32,
    topic: u16,
    qos: QoS,
    retain: bool,
}

/// Releases the message's charge with its last reference.
struct Charge {
    account: Arc<Account>,
    /// A message has far fewer than 4 GiB.
    bytes: u32,
}

impl Charge {
    fn new(account: Arc<Account>, body: usize) -> Self {
        let bytes = size_of_body(body);
        account.charge(bytes);
        let bytes = bytes as u32;
        Self { account, bytes }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.release(self.bytes as usize);
    }
}

/// Reference count, head and length before the body.
const OVERHEAD: usize = size_of::<usize>() * 2 + size_of::<Head>();

fn size_of_body(len: usize) -> usize {
    // Allocators round up; 16 is the common step.
    (OVERHEAD + len).next_multiple_of(16)
}

impl Message {
    /// Copies the parts of `spec`. Keeps payload format indicator, content type, response topic,
    /// correlation data and user properties, in order ([MQTT-3.3.2-4], [MQTT-3.3.2-15] to
    /// [MQTT-3.3.2-18], [MQTT-3.3.2-20]).
    pub fn new(spec: &MessageSpec<'_>) -> Message {
        Self::mounted(spec, &Mounting::NONE)
    }

    /// [`Message::new`] below the mount of its publisher.
    pub fn mounted(spec: &MessageSpec<'_>, mounting: &Mounting<'_>) -> Message {
        let Mounting {
            mount,
            sender,
            response_topic,
        } = *mounting;
        let topic = cut(spec.topic);
        let topic_len = mount.len() + topic.len();
        let kept = || {
            let all = forwarded(spec.properties, spec.strip_key);
            all.filter(move |span| response_topic || span[0] != RESPONSE_TOPIC)
        };
        let is_moved = |span: &[u8]| !mount.is_empty() && span[0] == RESPONSE_TOPIC;
        let moved = |span: &[u8]| if is_moved(span) { mount.len() } else { 0 };
        let properties = kept().map(|span| span.len() + moved(span)).sum::<usize>() + sender.len();
        let len = 2 + topic_len + properties + spec.payload.len();
        let head = Head {
            _charge: spec
                .account
                .clone()
                .map(|account| Charge::new(account, len)),
            expires_at: spec.expires_at,
            numbered: None,
            properties: properties as u32,
            topic: topic_len as u16,
            qos: spec.qos,
            retain: spec.retain,
        };
        let mut arc = zeroed(head, len);
        arc.with_arc_mut(|arc| {
            let inner = triomphe::Arc::get_mut(arc).expect("made here and not yet shared");
            let mut at = inner.slice_mut();
            fill(&mut at, &(topic_len as u16).to_be_bytes());
            fill(&mut at, mount.as_bytes());
            fill(&mut at, topic.as_bytes());
            for span in kept() {
                if is_moved(span) {
                    let text = &span[3..];
                    fill(&mut at, &[RESPONSE_TOPIC]);
                    fill(&mut at, &((mount.len() + text.len()) as u16).to_be_bytes());
                    fill(&mut at, mount.as_bytes());
                    fill(&mut at, text);
                } else {
                    fill(&mut at, span);
                }
            }
            fill(&mut at, sender);
            fill(&mut at, spec.payload);
        });
        Message(arc)
    }

    /// Gives the message its number for the log. It must have no other reference yet; else nothing happens.
    pub fn number(&mut self, numbered: Numbered) {
        self.0.with_arc_mut(|arc| {
            if let Some(inner) = triomphe::Arc::get_mut(arc) {
                inner.header_mut().numbered = Some(Box::new(numbered));
            }
        });
    }

    /// Its number for the log, if it has one.
    pub fn numbered(&self) -> Option<&Numbered> {
        self.0.header.header.numbered.as_deref()
    }

    /// Its sequence number in the log, if it has one.
    pub fn sequence(&self) -> Option<u64> {
        self.numbered().map(Numbered::sequence)
    }

    /// Topic name.
    pub fn topic(&self) -> &str {
        std::str::from_utf8(&self.wire_topic()[2..]).unwrap_or_default()
    }

    /// Raw properties that travel with the message, without a length prefix.
    pub fn properties(&self) -> &[u8] {
        let at = self.topic_end();
        &self.0.slice[at..at + self.0.header.header.properties as usize]
    }

    /// Application message.
    pub fn payload(&self) -> &[u8] {
        &self.0.slice[self.topic_end() + self.0.header.header.properties as usize..]
    }

    /// QoS it was published with.
    pub fn qos(&self) -> QoS {
        self.0.header.header.qos
    }

    /// RETAIN as received.
    pub fn retain(&self) -> bool {
        self.0.header.header.retain
    }

    /// When it expires; `None`: never.
    pub fn expires_at(&self) -> Option<Deadline> {
        self.0.header.header.expires_at
    }

    /// Whether its Message Expiry Interval has passed [MQTT-3.3.2-5].
    pub fn has_expired(&self, now: Millis) -> bool {
        self.expires_at().is_some_and(|at| at.is_due(now))
    }

    /// The Message Expiry Interval that remains, in seconds, rounded up [MQTT-3.3.2-6]; `None`: the
    /// message never expires.
    pub fn remaining_expiry(&self, now: Millis) -> Option<u32> {
        let at = self.expires_at()?.time();
        let seconds = at.as_u64().saturating_sub(now.as_u64()).div_ceil(1000);
        Some(u32::try_from(seconds).unwrap_or(u32::MAX))
    }

    /// Bytes on the heap that this message costs, however often it is referenced.
    pub fn size(&self) -> usize {
        size_of_body(self.0.slice.len())
    }

    /// A copy with another expiry, charged to no account.
    pub fn expiring_at(&self, expires_at: Option<Deadline>) -> Message {
        Message::new(&MessageSpec {
            topic: self.topic(),
            properties: Properties(self.properties()),
            payload: self.payload(),
            qos: self.qos(),
            retain: self.retain(),
            expires_at,
            strip_key: None,
            account: None,
        })
    }

    /// A copy that is charged to `account`; it outlives its original in another store.
    pub fn charged_to(&self, account: &Arc<Account>) -> Message {
        Message::new(&MessageSpec {
            topic: self.topic(),
            properties: Properties(self.properties()),
            payload: self.payload(),
            qos: self.qos(),
            retain: self.retain(),
            expires_at: self.expires_at(),
            strip_key: None,
            account: Some(account.clone()),
        })
    }

    /// Whether both are the same stored message.
    pub fn ptr_eq(&self, other: &Message) -> bool {
        self.0.ptr() == other.0.ptr()
    }

    /// References to the stored message, this one included.
    pub fn refs(&self) -> usize {
        ThinArc::strong_count(&self.0)
    }

    /// The topic with its length prefix, as on the wire.
    pub(crate) fn wire_topic(&self) -> &[u8] {
        &self.0.slice[..self.topic_end()]
    }

    /// Properties and payload, which lie together.
    pub(crate) fn tail(&self) -> &[u8] {
        &self.0.slice[self.topic_end()..]
    }

    /// The last bytes of properties and payload.
    pub fn end(&self, bytes: usize) -> &[u8] {
        let body = &self.0.slice;
        &body[body.len().saturating_sub(bytes)..]
    }

    fn topic_end(&self) -> usize {
        2 + usize::from(self.0.header.header.topic)
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Payloads stay out of logs.
        f.debug_struct("Message")
            .field("topic", &self.topic())
            .field("qos", &self.qos())
            .field("retain", &self.retain())
            .field("payload_len", &self.payload().len())
            .finish_non_exhaustive()
    }
}

// A thin arc is made from a slice or an exact iterator; the pieces come apart, so it is made of
// zeros first.
fn zeroed(head: Head, len: usize) -> ThinArc<Head, u8> {
    static ZEROS: [u8; 4096] = [0; 4096];
    match ZEROS.get(..len) {
        Some(zeros) => ThinArc::from_header_and_slice(head, zeros),
        None => ThinArc::from_header_and_iter(head, std::iter::repeat_n(0, len)),
    }
}

fn fill(at: &mut &mut [u8], bytes: &[u8]) {
    let (now, later) = std::mem::take(at).split_at_mut(bytes.len());
    now.copy_from_slice(bytes);
    *at = later;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec<'a>(topic: &'a str, properties: &'a [u8], payload: &'a [u8]) -> MessageSpec<'a> {
        MessageSpec {
            topic,
            properties: Properties(properties),
            payload,
            qos: QoS::AtLeastOnce,
            retain: true,
            expires_at: Some(Deadline::at(Millis::new(5))),
            strip_key: None,
            account: None,
        }
    }

    #[test]
    fn keeps_what_travels() {
        // Expiry, format, alias, two user properties, content type.
        let raw =
            b"\x02\0\0\0\x09\x01\x01\x23\0\x01\x26\0\x01k\0\x01v\x26\0\x01x\0\x01v\x03\0\x01t";
        let all = Message::new(&spec("a/b", raw, b"hello"));
        assert_eq!(all.topic(), "a/b");
        assert_eq!(
            all.properties(),
            b"\x01\x01\x26\0\x01k\0\x01v\x26\0\x01x\0\x01v\x03\0\x01t"
        );
        assert_eq!(all.payload(), b"hello");
        assert_eq!(
            (all.qos(), all.retain(), all.expires_at()),
            (QoS::AtLeastOnce, true, Some(Deadline::at(Millis::new(5))))
        );
        let less = Message::new(&MessageSpec {
            strip_key: Some("k"),
            ..spec("a", raw, b"")
        });
        assert_eq!(less.properties(), b"\x01\x01\x26\0\x01x\0\x01v\x03\0\x01t");
    }

    #[test]
    fn a_response_topic_is_mounted_or_removed() {
        let raw = b"\x01\x01\x08\0\x01r\x09\0\x01c";
        let spec = spec("a", raw, b"x");
        let mount = Mounting {
            mount: "t/",
            sender: b"\x26\0\x01k\0\x01v",
            response_topic: true,
        };
        let mounted = Message::mounted(&spec, &mount);
        assert_eq!(mounted.topic(), "t/a");
        assert_eq!(
            mounted.properties(),
            b"\x01\x01\x08\0\x03t/r\x09\0\x01c\x26\0\x01k\0\x01v"
        );
        assert_eq!(mounted.payload(), b"x");
        let removed = Message::mounted(
            &spec,
            &Mounting {
                mount: "",
                response_topic: false,
                ..mount
            },
        );
        assert_eq!(removed.topic(), "a");
        assert_eq!(
            removed.properties(),
            b"\x01\x01\x09\0\x01c\x26\0\x01k\0\x01v"
        );
    }

    #[test]
    fn a_clone_is_the_same_message() {
        let one = Message::new(&spec("a", b"", b""));
        let two = one.clone();
        assert!(one.ptr_eq(&two) && !one.ptr_eq(&Message::new(&spec("a", b"", b""))));
        assert_eq!(one.refs(), 2);
        drop(two);
        assert_eq!(one.refs(), 1);
        assert_eq!(size_of::<Message>(), size_of::<usize>());
    }

    #[test]
    fn any_size_is_stored() {
        for len in [0, 1, 4000, 4093, 4094, 4095, 100_000] {
            let payload = vec![7; len];
            let message = Message::new(&spec("t", b"", &payload));
            assert_eq!(message.payload(), payload);
            assert_eq!(message.topic(), "t");
            assert!((len..len + 96).contains(&message.size()));
        }
    }

    #[test]
    fn the_payload_stays_out_of_debug() {
        let shown = format!("{:?}", Message::new(&spec("t", b"", b"secret")));
        assert!(
            shown.contains("payload_len: 6") && !shown.contains("secret"),
            "{shown}"
        );
    }
}
