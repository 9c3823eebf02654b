//! Packets to bytes.

use super::fields::{put_bytes, put_var};
use super::props;
use super::{Ack, Codes, Connect, Packet, Props, Version, kind};

/// Appends one packet in the format of `version`.
///
/// # Panics
/// If a string is longer than 65,535 bytes or a packet longer than 268,435,455.
pub fn encode(packet: &Packet, version: Version, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    let flags = match packet {
        Packet::Connect(connect) => {
            put_connect(connect, &mut body);
            0
        }
        Packet::ConnAck(ack) => {
            body.extend_from_slice(&[u8::from(ack.session_present), ack.code]);
            if version.is_v5() {
                props::put(&ack.props, &mut body);
            }
            0
        }
        Packet::Publish(p) => {
            put_bytes(p.topic.as_bytes(), &mut body);
            if p.qos > 0 {
                body.extend_from_slice(&p.id.to_be_bytes());
            }
            if version.is_v5() {
                props::put(&p.props, &mut body);
            }
            body.extend_from_slice(&p.payload);
            u8::from(p.dup) << 3 | p.qos << 1 | u8::from(p.retain)
        }
        Packet::PubAck(a) | Packet::PubRec(a) | Packet::PubComp(a) => ack(a, version, &mut body),
        Packet::PubRel(a) => ack(a, version, &mut body) | 2,
        Packet::Subscribe(s) => {
            body.extend_from_slice(&s.id.to_be_bytes());
            if version.is_v5() {
                props::put(&s.props, &mut body);
            }
            for (filter, options) in &s.filters {
                put_bytes(filter.as_bytes(), &mut body);
                body.push(*options);
            }
            2
        }
        Packet::Unsubscribe(u) => {
            body.extend_from_slice(&u.id.to_be_bytes());
            if version.is_v5() {
                props::put(&u.props, &mut body);
            }
            for filter in &u.filters {
                put_bytes(filter.as_bytes(), &mut body);
            }
            2
        }
        Packet::SubAck(c) => codes(c, version, true, &mut body),
        Packet::UnsubAck(c) => codes(c, version, version.is_v5(), &mut body),
        Packet::PingReq | Packet::PingResp => 0,
        Packet::Disconnect(r) | Packet::Auth(r) => {
            if version.is_v5() && !(r.code == 0 && r.props.is_empty()) {
                body.push(r.code);
                tail(&r.props, &mut body);
            }
            0
        }
    };
    out.push(packet.kind() << 4 | flags);
    put_var(
        u32::try_from(body.len()).expect("a packet is far below 4 GiB"),
        out,
    );
    out.extend_from_slice(&body);
}

/// Appends a PUBLISH without properties, as loads send it.
///
/// # Panics
/// As [`encode`].
pub fn put_publish(
    version: Version,
    (dup, qos, id): (bool, u8, u16),
    topic: &str,
    payload: &[u8],
    out: &mut Vec<u8>,
) {
    let extra = if qos > 0 { 2 } else { 0 } + usize::from(version.is_v5());
    let len = 2 + topic.len() + extra + payload.len();
    out.push(kind::PUBLISH << 4 | u8::from(dup) << 3 | qos << 1);
    put_var(
        u32::try_from(len).expect("a packet is far below 4 GiB"),
        out,
    );
    put_bytes(topic.as_bytes(), out);
    if qos > 0 {
        out.extend_from_slice(&id.to_be_bytes());
    }
    if version.is_v5() {
        out.push(0);
    }
    out.extend_from_slice(payload);
}

/// Appends a successful PUBACK, PUBREC, PUBREL or PUBCOMP, the same four bytes in every version.
pub fn put_ack(packet: u8, id: u16, out: &mut Vec<u8>) {
    let flags = if packet == kind::PUBREL { 2 } else { 0 };
    out.extend_from_slice(&[packet << 4 | flags, 2]);
    out.extend_from_slice(&id.to_be_bytes());
}

fn put_connect(c: &Connect, body: &mut Vec<u8>) {
    let name: &[u8] = if c.version == Version::V31 {
        b"MQIsdp"
    } else {
        b"MQTT"
    };
    put_bytes(name, body);
    body.push(c.version.level());
    let mut flags = u8::from(c.clean) << 1;
    if let Some(will) = &c.will {
        flags |= 1 << 2 | will.qos << 3 | u8::from(will.retain) << 5;
    }
    flags |= u8::from(c.password.is_some()) << 6 | u8::from(c.username.is_some()) << 7;
    body.push(flags);
    body.extend_from_slice(&c.keep_alive.to_be_bytes());
    if c.version.is_v5() {
        props::put(&c.props, body);
    }
    put_bytes(c.client_id.as_bytes(), body);
    if let Some(will) = &c.will {
        if c.version.is_v5() {
            props::put(&will.props, body);
        }
        put_bytes(will.topic.as_bytes(), body);
        put_bytes(&will.payload, body);
    }
    if let Some(user) = &c.username {
        put_bytes(user.as_bytes(), body);
    }
    if let Some(password) = &c.password {
        put_bytes(password, body);
    }
}

fn ack(a: &Ack, version: Version, body: &mut Vec<u8>) -> u8 {
    body.extend_from_slice(&a.id.to_be_bytes());
    if version.is_v5() && !(a.code == 0 && a.props.is_empty()) {
        body.push(a.code);
        tail(&a.props, body);
    }
    0
}

fn codes(c: &Codes, version: Version, with_codes: bool, body: &mut Vec<u8>) -> u8 {
    body.extend_from_slice(&c.id.to_be_bytes());
    if version.is_v5() {
        props::put(&c.props, body);
    }
    if with_codes {
        body.extend_from_slice(&c.codes);
    }
    0
}

/// The property length may be omitted when the packet has no properties.
fn tail(props: &Props, body: &mut Vec<u8>) {
    if !props.is_empty() {
        props::put(props, body);
    }
}
