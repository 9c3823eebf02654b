//! PUBACK, PUBREC, PUBREL, PUBCOMP (MQTT 5 §3.4 to §3.7) and the two pings.

use crate::mqtt::head;
use crate::mqtt::props::{self, Properties, Property};
use crate::mqtt::read::Reader;
use crate::mqtt::write::{put_head, put_u16};
use crate::mqtt::{Error, ReasonCode, Version, reason};

/// Which acknowledgement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum AckKind {
    /// Answers QoS 1.
    Puback,
    /// First answer to QoS 2.
    Pubrec,
    /// The QoS 2 sender's release.
    Pubrel,
    /// Last answer of QoS 2.
    Pubcomp,
}

impl AckKind {
    fn first(self) -> u8 {
        match self {
            AckKind::Puback => head::PUBACK << 4,
            AckKind::Pubrec => head::PUBREC << 4,
            AckKind::Pubrel => head::PUBREL << 4 | 0b0010,
            AckKind::Pubcomp => head::PUBCOMP << 4,
        }
    }
}

/// An acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack<'a> {
    /// Never 0.
    pub packet_id: u16,
    /// A code listed for the packet; success in 3.x.
    pub reason: ReasonCode,
    /// Reason string and user properties.
    pub properties: Properties<'a>,
}

impl<'a> Ack<'a> {
    #[inline]
    pub(crate) fn read(kind: AckKind, body: &'a [u8], version: Version) -> Result<Self, Error> {
        let mut r = Reader(body);
        let mut ack = Ack {
            packet_id: r.packet_id()?,
            reason: ReasonCode::SUCCESS,
            properties: Properties(&[]),
        };
        if version == Version::V5 && !r.is_empty() {
            ack.reason = ReasonCode(r.u8()?);
            let listed = match kind {
                AckKind::Puback | AckKind::Pubrec => reason::PUBACK,
                AckKind::Pubrel | AckKind::Pubcomp => reason::PUBREL,
            };
            if !listed.has(ack.reason.0) {
                return Err(Error::Protocol(
                    "reason code not listed for this acknowledgement [MQTT-3.4.2-1]",
                ));
            }
            if !r.is_empty() {
                ack.properties = props::read(&mut r, props::ON_ACK, |_| {})?;
            }
        }
        r.end()?;
        Ok(ack)
    }

    /// The reason string, if any.
    pub fn reason_string(&self) -> Option<&'a str> {
        self.properties.iter().find_map(|p| match p {
            Property::ReasonString(s) => Some(s),
            _ => None,
        })
    }
}

/// Appends an acknowledgement. It takes four bytes in MQTT 3, and in MQTT 5 if the code is success
/// and no reason string is given.
#[inline]
pub fn encode_ack(
    version: Version,
    kind: AckKind,
    packet_id: u16,
    reason: ReasonCode,
    reason_string: Option<&str>,
    out: &mut Vec<u8>,
) {
    let [high, low] = packet_id.to_be_bytes();
    if version != Version::V5 || (reason == ReasonCode::SUCCESS && reason_string.is_none()) {
        out.extend_from_slice(&[kind.first(), 2, high, low]);
    } else if reason_string.is_none() {
        out.extend_from_slice(&[kind.first(), 3, high, low, reason.0]);
    } else {
        let block = [reason_string.map(Property::ReasonString)];
        let len = 3 + props::framed_len(props::block_len(&block));
        if put_head(kind.first(), len, out) {
            put_u16(packet_id, out);
            out.push(reason.0);
            props::put_block(&block, out);
        }
    }
}

/// Appends a PINGREQ.
pub fn encode_pingreq(out: &mut Vec<u8>) {
    out.extend_from_slice(&[head::PINGREQ << 4, 0]);
}

/// Appends a PINGRESP.
pub fn encode_pingresp(out: &mut Vec<u8>) {
    out.extend_from_slice(&[head::PINGRESP << 4, 0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortest_form_is_written() {
        let bytes = |version, kind, reason, text| {
            let mut out = Vec::new();
            encode_ack(version, kind, 0x0102, reason, text, &mut out);
            out
        };
        let (ok, full) = (ReasonCode::SUCCESS, ReasonCode::QUOTA_EXCEEDED);
        assert_eq!(
            bytes(Version::V5, AckKind::Puback, ok, None),
            [0x40, 2, 1, 2]
        );
        assert_eq!(
            bytes(Version::V5, AckKind::Pubrec, full, None),
            [0x50, 3, 1, 2, 0x97]
        );
        assert_eq!(
            bytes(Version::V311, AckKind::Pubrec, full, Some("x")),
            [0x50, 2, 1, 2]
        );
        assert_eq!(
            bytes(Version::V31, AckKind::Pubrel, ok, None),
            [0x62, 2, 1, 2]
        );
        assert_eq!(
            bytes(Version::V5, AckKind::Pubcomp, ok, Some("x")),
            [0x70, 8, 1, 2, 0, 4, 0x1F, 0, 1, b'x']
        );
    }

    #[test]
    fn reason_string_is_found() {
        let body = [0, 1, 0, 11, 0x26, 0, 1, b'k', 0, 1, b'v', 0x1F, 0, 1, b'x'];
        let ack = Ack::read(AckKind::Puback, &body, Version::V5).expect("legal");
        assert_eq!(ack.reason_string(), Some("x"));
        assert_eq!(
            Ack::read(AckKind::Puback, &body[..2], Version::V5)
                .expect("legal")
                .reason_string(),
            None
        );
    }

    #[test]
    fn pings() {
        let mut out = Vec::new();
        encode_pingreq(&mut out);
        encode_pingresp(&mut out);
        assert_eq!(out, [0xC0, 0, 0xD0, 0]);
    }
}
