//! Bytes to packets.

use super::fields::{Reader, error};
use super::props::{self, Props};
use super::{
    Ack, Codes, ConnAck, Connect, Packet, Publish, Reason, Subscribe, TYPE_NAMES, Unsubscribe,
    Version, Will, WireError, kind,
};

/// One packet's bytes, cut out of a stream.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// The first byte: packet type and flags.
    pub first: u8,
    /// The bytes after the fixed header.
    pub body: &'a [u8],
    /// Length of the whole packet in bytes.
    pub len: usize,
}

impl Frame<'_> {
    /// The packet type's number.
    pub fn kind(&self) -> u8 {
        self.first >> 4
    }
}

/// Cuts the first packet out of a stream; returns `None` when more bytes are needed.
///
/// # Errors
/// A remaining length of more than four bytes.
pub fn frame(bytes: &[u8]) -> Result<Option<Frame<'_>>, WireError> {
    let mut remaining = 0usize;
    for i in 0..4 {
        let Some(byte) = bytes.get(1 + i) else {
            return Ok(None);
        };
        remaining |= usize::from(byte & 0x7F) << (7 * i);
        if byte & 0x80 == 0 {
            if i > 0 && *byte == 0 {
                return Err(error("frame", "the remaining length is not minimal"));
            }
            let start = 2 + i;
            let Some(body) = bytes.get(start..start + remaining) else {
                return Ok(None);
            };
            return Ok(Some(Frame {
                first: bytes[0],
                body,
                len: start + remaining,
            }));
        }
    }
    Err(error(
        "frame",
        "the remaining length is longer than four bytes",
    ))
}

/// Decodes the first packet of a stream and returns it with its length in bytes, or `None` when
/// more bytes are needed. CONNECT is read by the version that it names itself.
///
/// # Errors
/// The packet breaks the specification of `version`.
pub fn decode(version: Version, bytes: &[u8]) -> Result<Option<(Packet, usize)>, WireError> {
    match frame(bytes)? {
        None => Ok(None),
        Some(frame) => Ok(Some((packet(version, &frame)?, frame.len))),
    }
}

/// The packet identifier and reason code of a PUBACK, PUBREC, PUBREL or PUBCOMP frame, or of a
/// SUBACK or UNSUBACK frame with code 0; `None` if the frame is too short.
pub fn ack_of(frame: &Frame<'_>) -> Option<(u16, u8)> {
    let id = u16::from_be_bytes([*frame.body.first()?, *frame.body.get(1)?]);
    let acks = matches!(frame.kind(), kind::PUBACK..=kind::PUBCOMP);
    let code = if acks {
        frame.body.get(2).copied()
    } else {
        None
    };
    Some((id, code.unwrap_or(0)))
}

/// A PUBLISH that borrows from the read buffer.
#[derive(Debug, Clone, Copy)]
pub struct PublishRef<'a> {
    /// DUP flag.
    pub dup: bool,
    /// QoS 0, 1 or 2.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
    /// Topic name; empty when a topic alias stands for it.
    pub topic: &'a str,
    /// Packet identifier; 0 for QoS 0.
    pub id: u16,
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> PublishRef<'a> {
    /// Reads a PUBLISH frame; its properties (5) are skipped.
    ///
    /// # Errors
    /// As [`decode`].
    pub fn read(version: Version, frame: &Frame<'a>) -> Result<Self, WireError> {
        let mut r = Reader::new(TYPE_NAMES[usize::from(frame.kind())], frame.body);
        let mut this = Self::head(frame, &mut r)?;
        if version.is_v5() {
            let len = r.var()? as usize;
            r.sub(len)?;
        }
        this.payload = r.rest();
        Ok(this)
    }

    fn head(frame: &Frame<'a>, r: &mut Reader<'a>) -> Result<Self, WireError> {
        let dup = frame.first & 8 != 0;
        let qos = frame.first >> 1 & 3;
        if qos == 3 {
            return Err(r.fault("QoS 3"));
        }
        if dup && qos == 0 {
            return Err(r.fault("DUP on QoS 0"));
        }
        let topic = r.text()?;
        if topic.contains(['+', '#']) {
            return Err(r.fault(format!("wildcard in topic {topic:?}")));
        }
        let id = if qos > 0 { r.id()? } else { 0 };
        let retain = frame.first & 1 != 0;
        Ok(Self {
            dup,
            qos,
            retain,
            topic,
            id,
            payload: &[],
        })
    }
}

fn packet(version: Version, frame: &Frame<'_>) -> Result<Packet, WireError> {
    let mut r = Reader::new(TYPE_NAMES[usize::from(frame.kind())], frame.body);
    let kind = frame.kind();
    let flags = frame.first & 15;
    let fixed = if matches!(kind, kind::PUBREL | kind::SUBSCRIBE | kind::UNSUBSCRIBE) {
        2
    } else {
        0
    };
    // MQTT 3.1 lets PUBREL, SUBSCRIBE and UNSUBSCRIBE carry DUP.
    let dup_of_31 = version == Version::V31 && fixed == 2 && flags == 10;
    if kind != kind::PUBLISH && flags != fixed && !dup_of_31 {
        return Err(r.fault(format!("reserved flags {flags:#x}")));
    }
    let packet = match kind {
        kind::CONNECT => Packet::Connect(Box::new(connect(&mut r)?)),
        kind::CONNACK => {
            let flags = r.byte()?;
            if flags > 1 {
                return Err(r.fault("reserved acknowledge flags"));
            }
            let code = r.byte()?;
            if flags == 1 && code != 0 {
                return Err(r.fault("Session Present with a refusal"));
            }
            let props = props_of(&mut r, version, kind)?;
            Packet::ConnAck(ConnAck {
                session_present: flags == 1,
                code,
                props,
            })
        }
        kind::PUBLISH => publish(version, frame, &mut r)?,
        kind::PUBACK => Packet::PubAck(ack(version, kind, &mut r)?),
        kind::PUBREC => Packet::PubRec(ack(version, kind, &mut r)?),
        kind::PUBREL => Packet::PubRel(ack(version, kind, &mut r)?),
        kind::PUBCOMP => Packet::PubComp(ack(version, kind, &mut r)?),
        kind::SUBSCRIBE => {
            let (id, props) = (r.id()?, props_of(&mut r, version, kind)?);
            let mut filters = Vec::new();
            while !r.is_empty() {
                filters.push((r.text()?.to_owned(), r.byte()?));
            }
            if filters.is_empty() {
                return Err(r.fault("no filter"));
            }
            Packet::Subscribe(Subscribe { id, props, filters })
        }
        kind::SUBACK => {
            let codes = codes(version, kind, &mut r)?;
            if codes.codes.is_empty() {
                return Err(r.fault("no code"));
            }
            Packet::SubAck(codes)
        }
        kind::UNSUBSCRIBE => {
            let (id, props) = (r.id()?, props_of(&mut r, version, kind)?);
            let mut filters = Vec::new();
            while !r.is_empty() {
                filters.push(r.text()?.to_owned());
            }
            if filters.is_empty() {
                return Err(r.fault("no filter"));
            }
            Packet::Unsubscribe(Unsubscribe { id, props, filters })
        }
        kind::UNSUBACK => {
            let codes = codes(version, kind, &mut r)?;
            if codes.codes.is_empty() == version.is_v5() {
                return Err(r.fault("UNSUBACK has codes in 5 and none in 3.x"));
            }
            Packet::UnsubAck(codes)
        }
        kind::PINGREQ => Packet::PingReq,
        kind::PINGRESP => Packet::PingResp,
        kind::DISCONNECT => Packet::Disconnect(reason(version, kind, &mut r)?),
        kind::AUTH if version.is_v5() => Packet::Auth(reason(version, kind, &mut r)?),
        _ => return Err(r.fault("a packet type that does not exist")),
    };
    if r.is_empty() {
        Ok(packet)
    } else {
        Err(r.fault(format!("{} bytes too many", r.remaining())))
    }
}

fn publish<'a>(
    version: Version,
    frame: &Frame<'a>,
    r: &mut Reader<'a>,
) -> Result<Packet, WireError> {
    let head = PublishRef::head(frame, r)?;
    let props = props_of(r, version, kind::PUBLISH)?;
    if head.topic.is_empty() && props.get(props::prop::TOPIC_ALIAS).is_none() {
        return Err(r.fault("no topic and no alias"));
    }
    Ok(Packet::Publish(Publish {
        dup: head.dup,
        qos: head.qos,
        retain: head.retain,
        topic: head.topic.to_owned(),
        id: head.id,
        props,
        payload: r.rest().to_vec(),
    }))
}

fn ack(version: Version, kind: u8, r: &mut Reader<'_>) -> Result<Ack, WireError> {
    let id = r.id()?;
    let reason = reason(version, kind, r)?;
    Ok(Ack {
        id,
        code: reason.code,
        props: reason.props,
    })
}

fn reason(version: Version, kind: u8, r: &mut Reader<'_>) -> Result<Reason, WireError> {
    let mut reason = Reason::default();
    if version.is_v5() && !r.is_empty() {
        reason.code = r.byte()?;
        if !r.is_empty() {
            reason.props = props_of(r, version, kind)?;
        }
    }
    Ok(reason)
}

fn codes(version: Version, kind: u8, r: &mut Reader<'_>) -> Result<Codes, WireError> {
    let (id, props) = (r.id()?, props_of(r, version, kind)?);
    Ok(Codes {
        id,
        props,
        codes: r.rest().to_vec(),
    })
}

fn connect(r: &mut Reader<'_>) -> Result<Connect, WireError> {
    let name = r.text()?;
    let level = r.byte()?;
    let version = match (name, Version::from_level(level)) {
        ("MQIsdp", Some(Version::V31)) => Version::V31,
        ("MQTT", Some(version)) if version != Version::V31 => version,
        _ => return Err(r.fault(format!("protocol {name:?} level {level}"))),
    };
    let flags = r.byte()?;
    if flags & 1 != 0 {
        return Err(r.fault("reserved connect flag"));
    }
    let keep_alive = r.two()?;
    let props = props_of(r, version, kind::CONNECT)?;
    let client_id = r.text()?.to_owned();
    let will = if flags & 4 != 0 {
        Some(Will {
            props: props_of(r, version, props::WILL)?,
            topic: r.text()?.to_owned(),
            payload: r.bytes()?.to_vec(),
            qos: flags >> 3 & 3,
            retain: flags & 0x20 != 0,
        })
    } else if flags & 0x38 != 0 {
        return Err(r.fault("will flags without a will"));
    } else {
        None
    };
    let username = if flags & 0x80 != 0 {
        Some(r.text()?.to_owned())
    } else {
        None
    };
    let password = if flags & 0x40 != 0 {
        Some(r.bytes()?.to_vec())
    } else {
        None
    };
    let clean = flags & 2 != 0;
    Ok(Connect {
        version,
        client_id,
        clean,
        keep_alive,
        props,
        will,
        username,
        password,
    })
}

/// The properties of a packet; MQTT 3 has none.
fn props_of(r: &mut Reader<'_>, version: Version, packet: u8) -> Result<Props, WireError> {
    match version {
        Version::V5 => props::take(r, packet),
        _ => Ok(Props::default()),
    }
}
