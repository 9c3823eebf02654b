//! The stream of a WebTransport session's request, after the request: capsules (RFC 9297) in HTTP/3
//! DATA frames (RFC 9114 section 7.2.1). Only the capsule that ends the session matters. All others are
//! skipped, whatever their length, and take no memory.

use web_transport_proto::{Capsule, Frame, VarInt};

/// CLOSE_WEBTRANSPORT_SESSION (draft-ietf-webtrans-http3 section 6).
const CLOSE_SESSION: u64 = 0x2843;
/// The most bytes of a reason for closing, by the same section.
const REASON_MAX_BYTES: u64 = 1024;
/// Frame types (RFC 9114 section 7.2): the two that may come on this stream, and the last one that the
/// standard assigns.
const DATA: u64 = 0x00;
const TRAILERS: u64 = 0x01;
const MAX_PUSH_ID: u64 = 0x0d;
/// The longest type and length of a frame or capsule.
const HEAD_MAX_BYTES: usize = 16;

/// Decodes the stream's bytes, in pieces of any size.
#[derive(Debug, Default)]
pub(super) struct Capsules {
    frame: Parcel,
    capsule: Parcel,
    /// The first bytes of the close capsule's payload.
    code: Vec<u8>,
}

/// A frame or a capsule: a type, a length and as many bytes.
#[derive(Debug, Default)]
struct Parcel {
    head: Vec<u8>,
    kind: u64,
    remaining: u64,
}

/// The result of decoding some bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing that matters.
    Nothing,
    /// The peer closed the session with this code.
    Closed(u32),
    /// The peer broke the rules.
    Broken(CapsuleError),
}

/// How the peer broke the rules of a session's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapsuleError {
    /// A frame type that belongs to another kind of stream (RFC 9114 section 7.2).
    #[error("an HTTP/3 frame on a stream that is not for it")]
    Frame,
    /// The close capsule has no code, or too long a reason.
    #[error("a close capsule of a wrong length")]
    CloseLength,
}

impl Capsules {
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Found {
        while !bytes.is_empty() {
            if self.frame.remaining == 0 {
                // SETTINGS, GOAWAY and others belong to the control stream. Higher numbers are
                // extensions, which are ignored.
                if self.frame.begin(&mut bytes)
                    && (TRAILERS + 1..=MAX_PUSH_ID).contains(&self.frame.kind)
                {
                    return Found::Broken(CapsuleError::Frame);
                }
                continue;
            }
            let (now, later) = bytes.split_at(room(bytes, self.frame.remaining));
            self.frame.remaining -= now.len() as u64;
            bytes = later;
            if self.frame.kind == DATA {
                match self.data(now) {
                    Found::Nothing => {}
                    found => return found,
                }
            }
        }
        Found::Nothing
    }

    fn data(&mut self, mut bytes: &[u8]) -> Found {
        while !bytes.is_empty() {
            if self.capsule.remaining == 0 {
                if self.capsule.begin(&mut bytes)
                    && self.capsule.kind == CLOSE_SESSION
                    && !(4..=4 + REASON_MAX_BYTES).contains(&self.capsule.remaining)
                {
                    return Found::Broken(CapsuleError::CloseLength);
                }
                continue;
            }
            let (now, later) = bytes.split_at(room(bytes, self.capsule.remaining));
            self.capsule.remaining -= now.len() as u64;
            bytes = later;
            if self.capsule.kind == CLOSE_SESSION {
                let missing = 4 - self.code.len();
                self.code.extend_from_slice(&now[..now.len().min(missing)]);
                // The peer chose the words of the reason, so they are not logged.
                if let Ok(code) = <[u8; 4]>::try_from(&self.code[..]) {
                    return Found::Closed(u32::from_be_bytes(code));
                }
            }
        }
        Found::Nothing
    }
}

impl Parcel {
    /// Takes bytes of the type and the length; true when both are complete.
    fn begin(&mut self, bytes: &mut &[u8]) -> bool {
        while let Some((first, rest)) = bytes.split_first() {
            self.head.push(*first);
            *bytes = rest;
            let mut head = &self.head[..];
            if let (Ok(kind), Ok(length)) = (VarInt::decode(&mut head), VarInt::decode(&mut head)) {
                (self.kind, self.remaining) = (kind.into_inner(), length.into_inner());
                self.head = Vec::new();
                return true;
            }
            debug_assert!(
                self.head.len() < HEAD_MAX_BYTES,
                "two varints have 16 bytes"
            );
        }
        false
    }
}

/// The DATA frame that ends a session.
pub(super) fn close(code: u32) -> Vec<u8> {
    let mut capsule = Vec::new();
    Capsule::CloseWebTransportSession {
        code,
        reason: String::new(),
    }
    .encode(&mut capsule);
    let mut out = Vec::new();
    Frame::DATA.encode(&mut out);
    VarInt::from_u32(capsule.len() as u32).encode(&mut out);
    out.extend_from_slice(&capsule);
    out
}

/// How many of `bytes` belong to a frame or capsule that has `remaining` more bytes.
fn room(bytes: &[u8], remaining: u64) -> usize {
    usize::try_from(remaining).map_or(bytes.len(), |remaining| remaining.min(bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(payload: &[u8]) -> Vec<u8> {
        let mut out = vec![0];
        VarInt::from_u32(payload.len() as u32).encode(&mut out);
        out.extend_from_slice(payload);
        out
    }

    fn capsule(kind: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        VarInt::from_u64(kind).expect("a varint").encode(&mut out);
        VarInt::from_u32(payload.len() as u32).encode(&mut out);
        out.extend_from_slice(payload);
        out
    }

    /// Byte by byte, all at once, and cut in two everywhere.
    fn every_way(bytes: &[u8], found: &Found) {
        for cut in 0..=bytes.len() {
            let mut capsules = Capsules::default();
            let first = capsules.feed(&bytes[..cut]);
            let got = match first {
                Found::Nothing => capsules.feed(&bytes[cut..]),
                found => found,
            };
            assert_eq!(&got, found, "cut at {cut}");
        }
        let mut capsules = Capsules::default();
        let got = bytes.iter().map(|b| capsules.feed(&[*b]));
        let got = got.into_iter().find(|s| *s != Found::Nothing);
        assert_eq!(&got.unwrap_or(Found::Nothing), found);
    }

    #[test]
    fn our_own_close_is_read() {
        for code in [0, 1, 2, u32::MAX] {
            every_way(&close(code), &Found::Closed(code));
        }
    }

    #[test]
    fn a_close_may_be_late_and_in_pieces() {
        // Grease frame, unknown capsule over two DATA frames, then the close, cut in two.
        let unknown = capsule(0x1234, &[7; 300]);
        let end = capsule(CLOSE_SESSION, b"\0\0\x01\x02because");
        let mut bytes = capsule(0x21 + 0x1f * 5, b"grease");
        bytes.extend(data(&unknown[..100]));
        bytes.extend(data(b""));
        bytes.extend(data(&unknown[100..]));
        bytes.extend(data(&end[..6]));
        bytes.extend(data(&end[6..]));
        every_way(&bytes, &Found::Closed(0x102));
    }

    #[test]
    fn skipped_bytes_take_no_memory() {
        let mut capsules = Capsules::default();
        // A frame of 2^62 - 1 bytes, in a thousand pieces.
        assert_eq!(capsules.feed(&[0x21, 0xff]), Found::Nothing);
        assert_eq!(capsules.feed(&[0xff; 7]), Found::Nothing);
        for _ in 0..1000 {
            assert_eq!(capsules.feed(&[0; 1000]), Found::Nothing);
        }
        assert_eq!(capsules.frame.head.capacity(), 0);
        assert_eq!(capsules.code.capacity(), 0);
    }

    #[test]
    fn broken_rules_are_reported() {
        every_way(
            &capsule(0x04, b"\x01\x02"),
            &Found::Broken(CapsuleError::Frame),
        );
        for wrong in [&[0; 3][..], &[0; 1029]] {
            every_way(
                &data(&capsule(CLOSE_SESSION, wrong)),
                &Found::Broken(CapsuleError::CloseLength),
            );
        }
    }
}
