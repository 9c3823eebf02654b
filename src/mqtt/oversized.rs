//! The beginning of a PUBLISH that is larger than allowed, so that the packet can be skipped.

use crate::mqtt::head::{Head, PUBLISH};
use crate::mqtt::read::Reader;
use crate::mqtt::{Decoder, Error, Publish, QoS, Receiver, Version};

/// Properties (MQTT 5 §3.3.2.3) up to this length are read, in bytes. Longer ones are skipped too.
const PROPERTIES_MAX_BYTES: usize = 8 * 1024;

/// The longest part of a packet that is read: topic, packet identifier, and properties with their
/// length.
const BEGINNING_MAX_BYTES: usize = 2 + 0xFFFF + 2 + 4 + PROPERTIES_MAX_BYTES;

/// A PUBLISH that is larger than [`Decoder::max`], without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Oversized {
    first: u8,
    /// The body up to the payload.
    beginning: Box<[u8]>,
    version: Version,
    receiver: Receiver,
    /// Size of the whole packet in bytes, fixed header included.
    pub size: usize,
}

impl Decoder {
    /// The beginning of a PUBLISH at the start of `buf` that [`Decoder::next`] found to be too large.
    /// `None`: more bytes are needed, in all fewer than 128 KiB.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if it is another packet; else every rule that these bytes break.
    pub fn oversized(&self, buf: &[u8]) -> Result<Option<Oversized>, Error> {
        let Some(head) = Head::read(buf, self.version, self.receiver, u32::MAX)? else {
            return Ok(None);
        };
        let size = head.len + head.remaining;
        if head.first >> 4 != PUBLISH {
            return Err(Error::TooLarge {
                size: size as u32,
                max: self.max,
            });
        }
        let body = &buf[head.len..size.min(buf.len())];
        let read = beginning(head.first, body, self.version).and_then(|beginning| {
            let (first, version, receiver) = (head.first, self.version, self.receiver);
            Publish::read(first, &beginning, version, receiver)?;
            Ok(Oversized {
                first,
                beginning,
                version,
                receiver,
                size,
            })
        });
        match read {
            // Bytes that are still to come may complete the field.
            Err(_) if body.len() < head.remaining.min(BEGINNING_MAX_BYTES) => Ok(None),
            read => read.map(Some),
        }
    }
}

/// The body of a PUBLISH up to the payload, without properties that are too long.
fn beginning(first: u8, body: &[u8], version: Version) -> Result<Box<[u8]>, Error> {
    let mut r = Reader(body);
    r.binary()?;
    if first >> 1 & 3 != QoS::AtMostOnce as u8 {
        r.packet_id()?;
    }
    let read = |r: &Reader<'_>| &body[..body.len() - r.0.len()];
    if version < Version::V5 {
        return Ok(read(&r).into());
    }
    let before = read(&r);
    let length = r.varint()? as usize;
    if length > PROPERTIES_MAX_BYTES {
        return Ok([before, &[0]].concat().into());
    }
    r.take(length)?;
    Ok(read(&r).into())
}

impl Oversized {
    /// The packet without its payload, and without properties if they are long.
    pub fn publish(&self) -> Publish<'_> {
        let read = Publish::read(self.first, &self.beginning, self.version, self.receiver);
        // It was legal when it was decoded.
        read.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoder(version: Version) -> Decoder {
        Decoder {
            version,
            receiver: Receiver::Client,
            max: 1024,
        }
    }

    /// A PUBLISH of 5,000 bytes after the fixed header, which begins like this.
    fn packet(first: u8, beginning: &[u8]) -> Vec<u8> {
        let mut packet = vec![first, 0x88, 0x27];
        packet.extend_from_slice(beginning);
        packet.resize(5003, b'x');
        packet
    }

    #[test]
    fn the_beginning_is_read_as_soon_as_it_is_there() {
        let v3 = packet(0x33, b"\0\x03a/b\0\x07");
        let v5 = packet(0x33, b"\0\x03a/b\0\x07\x02\x0B\x09");
        for (version, packet, needed) in [(Version::V311, v3, 10), (Version::V5, v5, 13)] {
            let decoder = decoder(version);
            assert!(matches!(decoder.next(&packet), Err(Error::TooLarge { .. })));
            for end in 0..needed {
                assert_eq!(decoder.oversized(&packet[..end]), Ok(None), "{end}");
            }
            let read = decoder.oversized(&packet[..needed]).expect("legal");
            let read = read.expect("complete");
            assert_eq!(read.size, 5003);
            let p = read.publish();
            assert_eq!((p.topic, p.packet_id), ("a/b", 7));
            assert_eq!((p.qos, p.retain), (QoS::AtLeastOnce, true));
            assert!(p.payload.is_empty());
            assert!(
                p.subscription_ids()
                    .eq((version == Version::V5).then_some(9))
            );
        }
    }

    #[test]
    fn long_properties_are_skipped() {
        // 60,000 bytes of properties.
        let mut bytes = vec![0x30, 0xFF, 0xFF, 0xFF, 0x7F];
        bytes.extend_from_slice(b"\0\x01t\xE0\xD4\x03\x0B");
        let read = decoder(Version::V5).oversized(&bytes).expect("legal");
        let read = read.expect("complete");
        assert_eq!(read.publish().topic, "t");
        assert_eq!(read.publish().subscription_ids().count(), 0);
    }

    #[test]
    fn other_packets_and_illegal_beginnings_are_refused() {
        let suback = [0x90, 0x88, 0x27];
        let refused = decoder(Version::V5).oversized(&suback);
        assert_eq!(
            refused,
            Err(Error::TooLarge {
                size: 5003,
                max: 1024
            })
        );
        for illegal in [&b"\0\x03a/#\0\x07"[..], b"\0\x03a/b\0\0"] {
            let packet = packet(0x32, illegal);
            assert!(decoder(Version::V311).oversized(&packet).is_err());
        }
    }
}
