//! The fixed header and the variable byte integer (MQTT 5 §2.1, §1.5.5).

use crate::mqtt::{Error, Receiver, Version};

/// The largest remaining length, and the largest variable byte integer.
pub const MAX_REMAINING_BYTES: usize = 268_435_455;

pub(crate) const CONNECT: u8 = 1;
pub(crate) const CONNACK: u8 = 2;
pub(crate) const PUBLISH: u8 = 3;
pub(crate) const PUBACK: u8 = 4;
pub(crate) const PUBREC: u8 = 5;
pub(crate) const PUBREL: u8 = 6;
pub(crate) const PUBCOMP: u8 = 7;
pub(crate) const SUBSCRIBE: u8 = 8;
pub(crate) const SUBACK: u8 = 9;
pub(crate) const UNSUBSCRIBE: u8 = 10;
pub(crate) const UNSUBACK: u8 = 11;
pub(crate) const PINGREQ: u8 = 12;
pub(crate) const PINGRESP: u8 = 13;
pub(crate) const DISCONNECT: u8 = 14;
pub(crate) const AUTH: u8 = 15;

/// A variable byte integer as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Varint {
    pub value: u32,
    /// Bytes that it took, 1 to 4.
    pub len: usize,
}

impl Varint {
    /// [MQTT-1.5.5-1]
    #[inline]
    pub(crate) const fn is_minimal(self) -> bool {
        self.len == varint_len(self.value as usize)
    }
}

/// Reads a variable byte integer; None = needs more bytes. Minimality is the caller's to judge.
#[inline(always)]
pub(crate) fn read_varint(buf: &[u8]) -> Result<Option<Varint>, Error> {
    // Most lengths take one or two bytes, so those cases come first.
    match *buf {
        [a, ..] if a < 0x80 => Ok(Some(Varint {
            value: u32::from(a),
            len: 1,
        })),
        [a, b, ..] if b < 0x80 => Ok(Some(Varint {
            value: u32::from(a & 0x7F) | u32::from(b) << 7,
            len: 2,
        })),
        _ => read_long_varint(buf),
    }
}

fn read_long_varint(buf: &[u8]) -> Result<Option<Varint>, Error> {
    let mut value = 0u32;
    for (i, &byte) in buf.iter().take(4).enumerate() {
        value |= u32::from(byte & 0x7F) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(Some(Varint { value, len: i + 1 }));
        }
    }
    if buf.len() >= 4 {
        return Err(Error::Malformed(
            "variable byte integer of more than four bytes",
        ));
    }
    Ok(None)
}

/// Bytes that a value takes as a variable byte integer.
#[inline]
pub(crate) const fn varint_len(value: usize) -> usize {
    match value {
        0..=0x7F => 1,
        0x80..=0x3FFF => 2,
        0x4000..=0x1F_FFFF => 3,
        _ => 4,
    }
}

/// A fixed header whose first byte was found legal and whose size is in bounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub first: u8,
    /// Bytes of the fixed header, 2 to 5.
    pub len: usize,
    /// Bytes after the fixed header.
    pub remaining: usize,
}

impl Head {
    /// `None`: more bytes are needed. Flags, role and size are checked as soon as their bytes are there.
    #[inline(always)]
    pub(crate) fn read(
        buf: &[u8],
        version: Version,
        receiver: Receiver,
        max: u32,
    ) -> Result<Option<Head>, Error> {
        let Some((&first, rest)) = buf.split_first() else {
            return Ok(None);
        };
        check_first(first, version, receiver)?;
        let Some(length) = read_varint(rest)? else {
            return Ok(None);
        };
        if version == Version::V5 && !length.is_minimal() {
            return Err(Error::Malformed(
                "remaining length is not minimal [MQTT-1.5.5-1]",
            ));
        }
        Head::bounded(first, length, max).map(Some)
    }

    /// The size bound, judged before the body is awaited.
    #[inline]
    pub(crate) fn bounded(first: u8, length: Varint, max: u32) -> Result<Head, Error> {
        let size = length.value + length.len as u32 + 1;
        if size > max {
            return Err(Error::TooLarge { size, max });
        }
        Ok(Head {
            first,
            len: length.len + 1,
            remaining: length.value as usize,
        })
    }
}

/// Packet type, flags and direction (MQTT 5 §2.1.2, §2.1.3).
#[inline(always)]
fn check_first(first: u8, version: Version, receiver: Receiver) -> Result<(), Error> {
    let (kind, flags) = (first >> 4, first & 0x0F);
    if kind == PUBLISH {
        if flags & 0b0110 == 0b0110 {
            return Err(Error::Malformed("PUBLISH with QoS 3 [MQTT-3.3.1-4]"));
        }
        if flags & 0b1110 == 0b1000 {
            return Err(Error::Malformed("PUBLISH with DUP at QoS 0 [MQTT-3.3.1-2]"));
        }
        return Ok(());
    }
    check_other(kind, flags, version, receiver)
}

fn check_other(kind: u8, flags: u8, version: Version, receiver: Receiver) -> Result<(), Error> {
    if kind == 0 || (kind == AUTH && version != Version::V5) {
        return Err(Error::Malformed("reserved packet type"));
    }
    let wanted = match kind {
        PUBREL | SUBSCRIBE | UNSUBSCRIBE => 0b0010,
        _ => 0,
    };
    // MQTT 3.1 §2.1 lets these three carry DUP.
    let may_dup = version == Version::V31 && wanted != 0;
    if flags != wanted && !(may_dup && flags == wanted | 0b1000) {
        return Err(Error::Malformed(
            "reserved flags in the fixed header [MQTT-2.1.3-1]",
        ));
    }
    let legal = match kind {
        CONNECT | SUBSCRIBE | UNSUBSCRIBE | PINGREQ => receiver == Receiver::Server,
        CONNACK | SUBACK | UNSUBACK | PINGRESP => receiver == Receiver::Client,
        DISCONNECT => receiver == Receiver::Server || version == Version::V5,
        _ => true,
    };
    if !legal {
        return Err(Error::Protocol(match receiver {
            Receiver::Server => "packet type that only a server may send",
            Receiver::Client => "packet type that only a client may send",
        }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints() {
        for (bytes, value) in [
            (&[0x00][..], 0),
            (&[0x7F], 127),
            (&[0x80, 0x01], 128),
            (&[0xFF, 0x7F], 16_383),
            (&[0x80, 0x80, 0x01], 16_384),
            (&[0xFF, 0xFF, 0x7F], 2_097_151),
            (&[0x80, 0x80, 0x80, 0x01], 2_097_152),
            (&[0xFF, 0xFF, 0xFF, 0x7F], 268_435_455),
        ] {
            let got = read_varint(bytes).expect("legal").expect("complete");
            assert_eq!((got.value, got.len), (value, bytes.len()));
            assert!(got.is_minimal());
            for cut in 0..bytes.len() {
                assert_eq!(read_varint(&bytes[..cut]), Ok(None));
            }
        }
        let padded = read_varint(&[0x80, 0x00])
            .expect("legal")
            .expect("complete");
        assert!(!padded.is_minimal());
        assert!(read_varint(&[0xFF, 0xFF, 0xFF, 0xFF]).is_err());
    }

    #[test]
    fn bound_is_judged_without_the_body() {
        let buf = [0x30, 0x80, 0x01];
        assert!(matches!(
            Head::read(&buf, Version::V5, Receiver::Server, 130),
            Err(Error::TooLarge {
                size: 131,
                max: 130
            })
        ));
        assert!(Head::read(&buf, Version::V5, Receiver::Server, 131).is_ok());
    }

    #[test]
    fn flags_and_direction() {
        let ok =
            |first, version, receiver| Head::read(&[first, 0], version, receiver, u32::MAX).is_ok();
        use Receiver::{Client, Server};
        use Version::{V5, V31, V311};
        assert!(ok(0x62, V311, Server) && !ok(0x6A, V311, Server) && ok(0x6A, V31, Server));
        assert!(ok(0x8A, V31, Server) && !ok(0x8A, V5, Server) && !ok(0x80, V31, Server));
        assert!(!ok(0x00, V5, Server) && !ok(0xF0, V311, Server) && ok(0xF0, V5, Client));
        assert!(ok(0xE0, V311, Server) && !ok(0xE0, V311, Client) && ok(0xE0, V5, Client));
        assert!(!ok(0x20, V5, Server) && ok(0x20, V5, Client) && !ok(0x10, V5, Client));
        assert!(!ok(0x36, V5, Server) && !ok(0x38, V5, Server) && ok(0x3A, V5, Server));
    }
}
