//! WebSocket framing on the server's side (RFC 6455 section 5). It streams: a payload is passed on as
//! it is received, so no memory is reserved for a declared length, and an idle connection holds no
//! buffer. Header layout and opcodes are tungstenite's.

use std::io::Cursor;

use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};

/// The longest header: 2 bytes, 8 of length, 4 of mask.
const HEADER_MAX_BYTES: usize = 14;
/// The longest payload of a control frame (RFC 6455 section 5.5).
const CONTROL_MAX_BYTES: usize = 125;
/// Close code 1014, which was registered after tungstenite's table was made.
const BAD_GATEWAY: u16 = 1014;

/// How the peer broke the rules of framing. `Display` is also the reason in the close frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Section 5.2: no extension was negotiated.
    #[error("reserved bits set")]
    ReservedBits,
    /// Section 5.2.
    #[error("reserved opcode")]
    ReservedOpcode,
    /// Section 5.1: a client masks its frames.
    #[error("frame not masked")]
    NotMasked,
    /// Section 5.5.
    #[error("control frame in fragments")]
    FragmentedControl,
    /// Section 5.5.
    #[error("control frame longer than 125 bytes")]
    LongControl,
    /// Section 5.4.
    #[error("continuation without a message begun")]
    Continuation,
    /// Section 5.4.
    #[error("new message inside a fragmented one")]
    Interleaved,
    /// [MQTT-6.0.0-1].
    #[error("text frame, only binary is allowed")]
    Text,
    /// The message has more bytes than the limit that holds now.
    #[error("message larger than the limit")]
    TooLarge,
    /// Section 5.5.1: a code has two bytes.
    #[error("close frame with half a code")]
    HalfCloseCode,
    /// Section 7.4.
    #[error("close code not allowed")]
    CloseCode,
    /// Section 5.5.1.
    #[error("close reason is not UTF-8")]
    CloseReason,
}

impl FrameError {
    /// The code for the close frame (section 7.4.1).
    pub const fn close_code(self) -> CloseCode {
        match self {
            Self::Text => CloseCode::Unsupported,
            Self::TooLarge => CloseCode::Size,
            Self::CloseReason => CloseCode::Invalid,
            Self::ReservedBits
            | Self::ReservedOpcode
            | Self::NotMasked
            | Self::FragmentedControl
            | Self::LongControl
            | Self::Continuation
            | Self::Interleaved
            | Self::HalfCloseCode
            | Self::CloseCode => CloseCode::Protocol,
        }
    }
}

/// Where a [`Decoder`] stopped: the last `rest` bytes of the input were not taken. After the limit was
/// raised they can be fed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stopped {
    pub fault: FrameError,
    pub rest: usize,
}

/// The requests of control frames. Each is answered at most once.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Requests {
    /// The payload of the last ping; only the last is answered (section 5.5.3).
    pub pong: Option<Vec<u8>>,
    /// The peer closes; the code to echo, if it gave one.
    pub close: Option<Option<u16>>,
}

/// The decoder of one connection.
#[derive(Debug)]
pub(super) struct Decoder {
    head: [u8; HEADER_MAX_BYTES],
    head_len: u8,
    frame: Option<Frame>,
    /// The bytes so far of a data message that is not complete.
    message: Option<u64>,
    /// The payload so far of a control frame that is not complete.
    control: Vec<u8>,
    limit: u64,
}

#[derive(Debug)]
struct Frame {
    opcode: OpCode,
    fin: bool,
    remaining: u64,
    mask: [u8; 4],
}

impl Decoder {
    /// `limit` is the most bytes that a message may have.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            head: [0; HEADER_MAX_BYTES],
            head_len: 0,
            frame: None,
            message: None,
            control: Vec::new(),
            limit: limit as u64,
        }
    }

    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit as u64;
    }

    /// Takes all of `input`, which is unmasked in place, appends the payload of binary messages to
    /// `out`, and notes control frames in `requests`. Bytes after a close frame are ignored (section
    /// 5.5.1).
    pub(super) fn feed(
        &mut self,
        mut input: &mut [u8],
        out: &mut Vec<u8>,
        requests: &mut Requests,
    ) -> Result<(), Stopped> {
        while requests.close.is_none() {
            if self.frame.is_none() {
                let rest = input.len();
                let used = self
                    .header(input)
                    .map_err(|fault| Stopped { fault, rest })?;
                input = &mut input[used..];
            }
            let Some(frame) = &mut self.frame else {
                return Ok(());
            };
            let take = usize::try_from(frame.remaining)
                .unwrap_or(usize::MAX)
                .min(input.len());
            let (payload, rest) = input.split_at_mut(take);
            input = rest;
            unmask(payload, &mut frame.mask);
            frame.remaining -= take as u64;
            let done = frame.remaining == 0;
            match frame.opcode {
                OpCode::Data(_) => {
                    out.extend_from_slice(payload);
                    if done && frame.fin {
                        self.message = None;
                    }
                }
                OpCode::Control(control) => {
                    self.control.extend_from_slice(payload);
                    if done {
                        let payload = std::mem::take(&mut self.control);
                        let rest = input.len();
                        end_control(control, payload, requests)
                            .map_err(|fault| Stopped { fault, rest })?;
                    }
                }
            }
            if !done {
                return Ok(());
            }
            self.frame = None;
        }
        Ok(())
    }

    /// Reads a header, if it is complete; returns the bytes of `input` used.
    fn header(&mut self, input: &[u8]) -> Result<usize, FrameError> {
        let had = usize::from(self.head_len);
        // Usually the input holds the complete header; otherwise its pieces are collected.
        let (parsed, used) = if had == 0 {
            parse(input)?
        } else {
            let more = input.len().min(HEADER_MAX_BYTES - had);
            self.head[had..had + more].copy_from_slice(&input[..more]);
            let (parsed, used) = parse(&self.head[..had + more])?;
            (parsed, used.saturating_sub(had))
        };
        let Some((header, length)) = parsed else {
            // There are fewer than HEADER_MAX_BYTES, or the header would be complete.
            if had == 0 {
                self.head[..input.len()].copy_from_slice(input);
            }
            self.head_len = (had + input.len()) as u8;
            return Ok(input.len());
        };
        // Nothing has changed if this fails.
        self.check(&header, length)?;
        self.head_len = 0;
        self.frame = Some(Frame {
            opcode: header.opcode,
            fin: header.is_final,
            remaining: length,
            mask: header.mask.unwrap_or_default(),
        });
        Ok(used)
    }

    fn check(&mut self, header: &FrameHeader, length: u64) -> Result<(), FrameError> {
        if header.rsv1 || header.rsv2 || header.rsv3 {
            return Err(FrameError::ReservedBits);
        }
        if header.mask.is_none() {
            return Err(FrameError::NotMasked);
        }
        let before = match (header.opcode, self.message) {
            (OpCode::Control(_), _) => {
                if !header.is_final {
                    return Err(FrameError::FragmentedControl);
                }
                if length > CONTROL_MAX_BYTES as u64 {
                    return Err(FrameError::LongControl);
                }
                return Ok(());
            }
            (OpCode::Data(Data::Continue), Some(before)) => before,
            (OpCode::Data(Data::Continue), None) => {
                return Err(FrameError::Continuation);
            }
            (_, Some(_)) => {
                return Err(FrameError::Interleaved);
            }
            // [MQTT-6.0.0-1]
            (OpCode::Data(Data::Text), None) => {
                return Err(FrameError::Text);
            }
            (OpCode::Data(_), None) => 0,
        };
        let size = before.saturating_add(length);
        if size > self.limit {
            return Err(FrameError::TooLarge);
        }
        self.message = Some(size);
        Ok(())
    }
}

/// Writes a control frame; `payload` has at most 125 bytes.
pub(super) fn control_frame(control: Control, payload: &[u8], out: &mut Vec<u8>) {
    let payload = &payload[..payload.len().min(CONTROL_MAX_BYTES)];
    let header = FrameHeader {
        opcode: OpCode::Control(control),
        ..FrameHeader::default()
    };
    header
        .format(payload.len() as u64, out)
        .expect("writing to a Vec cannot fail");
    out.extend_from_slice(payload);
}

/// Writes the header of an unfragmented binary message of `length` bytes into
/// `head`; returns its own length.
pub(super) fn binary_header(length: usize, head: &mut [u8; 10]) -> u8 {
    let header = FrameHeader {
        opcode: OpCode::Data(Data::Binary),
        ..FrameHeader::default()
    };
    let mut cursor = Cursor::new(&mut head[..]);
    header
        .format(length as u64, &mut cursor)
        .expect("an unmasked header has at most 10 bytes");
    cursor.position() as u8
}

fn parse(bytes: &[u8]) -> Result<(Option<(FrameHeader, u64)>, usize), FrameError> {
    let mut cursor = Cursor::new(bytes);
    match FrameHeader::parse(&mut cursor) {
        Ok(header) => Ok((header, cursor.position() as usize)),
        // Reading from a slice cannot fail, so the opcode is wrong.
        Err(_) => Err(FrameError::ReservedOpcode),
    }
}

fn end_control(
    control: Control,
    payload: Vec<u8>,
    requests: &mut Requests,
) -> Result<(), FrameError> {
    match control {
        Control::Ping => requests.pong = Some(payload),
        Control::Close => {
            requests.close = Some(match payload.as_slice() {
                [] => None,
                [_] => return Err(FrameError::HalfCloseCode),
                [a, b, reason @ ..] => {
                    let given = u16::from_be_bytes([*a, *b]);
                    if given != BAD_GATEWAY && !CloseCode::from(given).is_allowed() {
                        return Err(FrameError::CloseCode);
                    }
                    if std::str::from_utf8(reason).is_err() {
                        return Err(FrameError::CloseReason);
                    }
                    Some(given)
                }
            });
        }
        Control::Pong | Control::Reserved(_) => {}
    }
    Ok(())
}

/// XORs with `mask`, and rotates the mask to where the next piece begins.
fn unmask(bytes: &mut [u8], mask: &mut [u8; 4]) {
    let [a, b, c, d] = *mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let mut chunks = bytes.chunks_exact_mut(8);
    for chunk in &mut chunks {
        let word = u64::from_ne_bytes((&*chunk).try_into().expect("a chunk has 8 bytes"));
        chunk.copy_from_slice(&(word ^ wide).to_ne_bytes());
    }
    for (byte, key) in chunks.into_remainder().iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
    mask.rotate_left(bytes.len() % 4);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio_tungstenite::tungstenite::protocol::frame::Frame as Reference;

    use super::*;

    const MASK: [u8; 4] = [0xde, 0xad, 0xbe, 0xef];

    fn masked(opcode: OpCode, fin: bool, payload: &[u8]) -> Vec<u8> {
        let mut header = FrameHeader {
            opcode,
            is_final: fin,
            ..FrameHeader::default()
        };
        header.mask = Some(MASK);
        let mut bytes = Vec::new();
        Reference::from_payload(header, payload.to_vec().into())
            .format(&mut bytes)
            .expect("writes to a Vec");
        bytes
    }

    fn run(input: &[u8], step: usize, limit: usize) -> (Vec<u8>, Requests, Result<(), FrameError>) {
        let mut decoder = Decoder::new(limit);
        let (mut out, mut requests) = (Vec::new(), Requests::default());
        for piece in input.chunks(step) {
            if let Err(stopped) = decoder.feed(&mut piece.to_vec(), &mut out, &mut requests) {
                return (out, requests, Err(stopped.fault));
            }
        }
        (out, requests, Ok(()))
    }

    const BINARY: OpCode = OpCode::Data(Data::Binary);
    const CONTINUE: OpCode = OpCode::Data(Data::Continue);

    proptest! {
        #[test]
        fn any_split_gives_the_same_bytes(
            messages in prop::collection::vec(
                (prop::collection::vec(any::<u8>(), 0..400), 1usize..5, any::<bool>()), 1..8),
            step in 1usize..50,
        ) {
            let (mut wire, mut want, mut ping) = (Vec::new(), Vec::new(), None);
            for (payload, pieces, with_ping) in &messages {
                let size = payload.len().div_ceil(*pieces).max(1);
                let parts: Vec<_> = payload.chunks(size).collect();
                let parts = if parts.is_empty() { vec![&[][..]] } else { parts };
                for (i, part) in parts.iter().enumerate() {
                    let opcode = if i == 0 { BINARY } else { CONTINUE };
                    wire.extend(masked(opcode, i + 1 == parts.len(), part));
                    if *with_ping {
                        let text = part[..part.len().min(CONTROL_MAX_BYTES)].to_vec();
                        wire.extend(masked(OpCode::Control(Control::Ping), true, &text));
                        ping = Some(text);
                    }
                }
                want.extend_from_slice(payload);
            }
            let (out, requests, result) = run(&wire, step, 1 << 20);
            prop_assert_eq!(result, Ok(()));
            prop_assert_eq!(out, want);
            prop_assert_eq!(requests.pong, ping);
        }

        #[test]
        fn any_bytes_decode_or_fail(
            wire in prop::collection::vec(any::<u8>(), 0..300), step in 1usize..20,
        ) {
            let (out, _, _) = run(&wire, step, 100);
            prop_assert!(out.len() <= wire.len());
        }
    }

    #[test]
    fn long_payload_lengths() {
        for len in [125, 126, 65_535, 65_536, 70_001] {
            let payload = pattern(len);
            let (out, _, result) = run(&masked(BINARY, true, &payload), 1000, len);
            assert_eq!(result, Ok(()));
            assert_eq!(out, payload);
            let (_, _, result) = run(&masked(BINARY, true, &payload), 1000, len - 1);
            assert_eq!(
                result.expect_err("one past the limit"),
                FrameError::TooLarge
            );
        }
    }

    #[test]
    fn the_limit_counts_fragments_together() {
        let mut wire = masked(BINARY, false, &[0; 60]);
        wire.extend(masked(CONTINUE, true, &[0; 41]));
        let (out, _, result) = run(&wire, 7, 100);
        assert_eq!(result.expect_err("101 bytes"), FrameError::TooLarge);
        assert_eq!(out.len(), 60);
        assert_eq!(run(&wire, 7, 101).2, Ok(()));
    }

    #[test]
    fn a_message_that_was_too_large_passes_under_a_higher_limit() {
        let big = pattern(500);
        for split in 0..8 {
            let mut wire = masked(BINARY, true, b"small");
            let first = wire.len() + split;
            wire.extend(masked(BINARY, true, &big));
            let mut decoder = Decoder::new(100);
            let (mut out, mut requests) = (Vec::new(), Requests::default());
            let mut late = wire.split_off(first);
            let mut left = match decoder.feed(&mut wire, &mut out, &mut requests) {
                Ok(()) => Vec::new(),
                Err(stopped) => wire.split_off(wire.len() - stopped.rest),
            };
            left.append(&mut late);
            let stopped = decoder.feed(&mut left, &mut out, &mut requests);
            let stopped = stopped.expect_err("still too large");
            assert_eq!(stopped.fault, FrameError::TooLarge);
            assert_eq!(out, b"small");
            decoder.set_limit(500);
            let from = left.len() - stopped.rest;
            let fed = decoder.feed(&mut left[from..], &mut out, &mut requests);
            assert_eq!(fed, Ok(()));
            assert_eq!(out[5..], big, "split {split}");
        }
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn faults_have_their_codes() {
        let text = OpCode::Data(Data::Text);
        let ping = OpCode::Control(Control::Ping);
        let close = OpCode::Control(Control::Close);
        let mut unmasked = Vec::new();
        control_frame(Control::Ping, b"x", &mut unmasked);
        let mut inside = masked(BINARY, false, b"a");
        inside.extend(masked(BINARY, true, b"b"));
        let mut reserved = masked(BINARY, true, b"a");
        reserved[0] |= 0x40;
        let mut opcode = masked(BINARY, true, b"a");
        opcode[0] = 0x83;
        for (wire, want) in [
            (masked(text, true, b"hi"), CloseCode::Unsupported),
            (masked(text, true, b""), CloseCode::Unsupported),
            (unmasked, CloseCode::Protocol),
            (inside, CloseCode::Protocol),
            (masked(CONTINUE, true, b"a"), CloseCode::Protocol),
            (masked(ping, false, b"a"), CloseCode::Protocol),
            (masked(ping, true, &[0; 126]), CloseCode::Protocol),
            (masked(close, true, b"\x03"), CloseCode::Protocol),
            (masked(close, true, b"\x03\xed"), CloseCode::Protocol),
            (masked(close, true, b"\x03\xe8\xff"), CloseCode::Invalid),
            (reserved, CloseCode::Protocol),
            (opcode, CloseCode::Protocol),
        ] {
            for step in [1, 3, 500] {
                let fault = run(&wire, step, 1000).2.expect_err("must be refused");
                assert_eq!(fault.close_code(), want, "{fault:?} for {wire:02x?}");
            }
        }
    }

    #[test]
    fn nothing_is_read_behind_a_close() {
        let mut wire = masked(BINARY, true, b"before");
        wire.extend(masked(
            OpCode::Control(Control::Close),
            true,
            b"\x03\xe8bye",
        ));
        wire.extend(masked(BINARY, true, b"behind"));
        let (out, requests, result) = run(&wire, 4, 1000);
        assert_eq!(result, Ok(()));
        assert_eq!(out, b"before");
        assert_eq!(requests.close, Some(Some(1000)));
    }

    #[test]
    fn headers_of_binary_messages() {
        let mut head = [0; 10];
        assert_eq!(binary_header(125, &mut head), 2);
        assert_eq!(head[..2], [0x82, 125]);
        assert_eq!(binary_header(126, &mut head), 4);
        assert_eq!(head[..4], [0x82, 126, 0, 126]);
        assert_eq!(binary_header(65_536, &mut head), 10);
        assert_eq!(head, [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
    }
}
