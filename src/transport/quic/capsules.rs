//! What a WebTransport session's own stream carries once it is accepted:
//! capsules (RFC 9297) in HTTP/3 DATA frames (RFC 9114 section 7.2.1). Only one
//! matters, the session's end; all others are passed over, whatever they
//! declare as their length, so that nothing is kept for them.

use web_transport_proto::{Capsule, Frame, VarInt};

/// CLOSE_WEBTRANSPORT_SESSION (draft-ietf-webtrans-http3 section 6).
const CLOSE_SESSION: u64 = 0x2843;
/// The most bytes of a reason for closing, by the same section.
const REASON_MAX: u64 = 1024;
/// Frame types (RFC 9114 section 7.2): what may come here, and the last that
/// the standard itself gives out.
const DATA: u64 = 0x00;
const TRAILERS: u64 = 0x01;
const MAX_PUSH_ID: u64 = 0x0d;
/// A frame's or capsule's type and length.
const HEAD_MAX: usize = 16;

/// Reads the stream's bytes in whatever pieces they come.
#[derive(Debug, Default)]
pub(super) struct Capsules {
    frame: Parcel,
    capsule: Parcel,
    /// The close capsule's payload as far as it has come.
    code: Vec<u8>,
}

/// A type, a length and as many bytes: frames and capsules alike.
#[derive(Debug, Default)]
struct Parcel {
    head: Vec<u8>,
    kind: u64,
    left: u64,
}

/// What the bytes came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing that matters.
    Nothing,
    /// The peer closed the session with this code.
    Closed(u32),
    /// A frame that no peer may send here.
    Broken(&'static str),
}

impl Capsules {
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Seen {
        while !bytes.is_empty() {
            if self.frame.left == 0 {
                // SETTINGS, GOAWAY and the like belong to the control stream;
                // numbers past them are extensions, which are ignored.
                if self.frame.begin(&mut bytes)
                    && (TRAILERS + 1..=MAX_PUSH_ID).contains(&self.frame.kind)
                {
                    return Seen::Broken("an HTTP/3 frame on a stream that is not for it");
                }
                continue;
            }
            let (now, later) = bytes.split_at(room(bytes, self.frame.left));
            self.frame.left -= now.len() as u64;
            bytes = later;
            if self.frame.kind == DATA {
                match self.data(now) {
                    Seen::Nothing => {}
                    seen => return seen,
                }
            }
        }
        Seen::Nothing
    }

    fn data(&mut self, mut bytes: &[u8]) -> Seen {
        while !bytes.is_empty() {
            if self.capsule.left == 0 {
                if self.capsule.begin(&mut bytes)
                    && self.capsule.kind == CLOSE_SESSION
                    && !(4..=4 + REASON_MAX).contains(&self.capsule.left)
                {
                    return Seen::Broken("a close capsule of a wrong length");
                }
                continue;
            }
            let (now, later) = bytes.split_at(room(bytes, self.capsule.left));
            self.capsule.left -= now.len() as u64;
            bytes = later;
            if self.capsule.kind == CLOSE_SESSION {
                let missing = 4 - self.code.len();
                self.code.extend_from_slice(&now[..now.len().min(missing)]);
                // The reason is the peer's words: not for our log.
                if let Ok(code) = <[u8; 4]>::try_from(&self.code[..]) {
                    return Seen::Closed(u32::from_be_bytes(code));
                }
            }
        }
        Seen::Nothing
    }
}

impl Parcel {
    /// Takes bytes of the head; true when it is whole.
    fn begin(&mut self, bytes: &mut &[u8]) -> bool {
        while let Some((first, rest)) = bytes.split_first() {
            self.head.push(*first);
            *bytes = rest;
            let mut head = &self.head[..];
            if let (Ok(kind), Ok(left)) = (VarInt::decode(&mut head), VarInt::decode(&mut head)) {
                (self.kind, self.left) = (kind.into_inner(), left.into_inner());
                self.head = Vec::new();
                return true;
            }
            debug_assert!(self.head.len() < HEAD_MAX, "two varints have 16 bytes");
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

/// How many of `bytes` belong to what has `left` bytes left.
fn room(bytes: &[u8], left: u64) -> usize {
    usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()))
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
    fn every_way(bytes: &[u8], seen: &Seen) {
        for cut in 0..=bytes.len() {
            let mut capsules = Capsules::default();
            let first = capsules.feed(&bytes[..cut]);
            let got = match first {
                Seen::Nothing => capsules.feed(&bytes[cut..]),
                seen => seen,
            };
            assert_eq!(&got, seen, "cut at {cut}");
        }
        let mut capsules = Capsules::default();
        let got = bytes.iter().map(|b| capsules.feed(&[*b]));
        let got = got.into_iter().find(|s| *s != Seen::Nothing);
        assert_eq!(&got.unwrap_or(Seen::Nothing), seen);
    }

    #[test]
    fn our_own_close_is_read() {
        for code in [0, 1, 2, u32::MAX] {
            every_way(&close(code), &Seen::Closed(code));
        }
    }

    #[test]
    fn a_close_may_come_late_and_in_pieces() {
        // Grease frame, unknown capsule over two DATA frames, then the close, cut in two.
        let unknown = capsule(0x1234, &[7; 300]);
        let end = capsule(CLOSE_SESSION, b"\0\0\x01\x02because");
        let mut bytes = capsule(0x21 + 0x1f * 5, b"grease");
        bytes.extend(data(&unknown[..100]));
        bytes.extend(data(b""));
        bytes.extend(data(&unknown[100..]));
        bytes.extend(data(&end[..6]));
        bytes.extend(data(&end[6..]));
        every_way(&bytes, &Seen::Closed(0x102));
    }

    #[test]
    fn nothing_is_kept_for_what_is_passed_over() {
        let mut capsules = Capsules::default();
        // A frame of 2^62 - 1 bytes, in a thousand pieces.
        assert_eq!(capsules.feed(&[0x21, 0xff]), Seen::Nothing);
        assert_eq!(capsules.feed(&[0xff; 7]), Seen::Nothing);
        for _ in 0..1000 {
            assert_eq!(capsules.feed(&[0; 1000]), Seen::Nothing);
        }
        assert_eq!(capsules.frame.head.capacity(), 0);
        assert_eq!(capsules.code.capacity(), 0);
    }

    #[test]
    fn what_is_not_for_this_stream_is_told() {
        every_way(
            &capsule(0x04, b"\x01\x02"),
            &Seen::Broken("an HTTP/3 frame on a stream that is not for it"),
        );
        for wrong in [&[0; 3][..], &[0; 1029]] {
            every_way(
                &data(&capsule(CLOSE_SESSION, wrong)),
                &Seen::Broken("a close capsule of a wrong length"),
            );
        }
    }
}
