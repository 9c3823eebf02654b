//! The parsers alone, under the crate's own name, and the properties that they must have.
//!
//! The files of the crate are included by their paths, here and nowhere else. A dependency on the crate
//! would bring TLS, QUIC and their C code into every fuzz build, with sanitizers, and would need the
//! parsers of the transports to be public. The included parsers use nothing else of the crate.

extern crate self as tidegate;

// Inline modules, so that each file finds its own modules beside it.
#[allow(
    dead_code,
    reason = "the rest of the crate is not here to use all of it"
)]
#[path = "../../src"]
mod sources {
    pub mod budget;
    pub mod hashing;
    pub mod mqtt;
    pub mod qos;
    pub mod time;
    pub mod topics;
}

pub use sources::{budget, hashing, mqtt, qos, time, topics};

/// The properties that the tests of the codec hold too.
#[allow(dead_code, reason = "the tests use more of them")]
#[path = "../../tests/codec/properties"]
pub mod properties {
    pub mod packets;
    pub mod topics;
}

/// The parsers that see a client's bytes before MQTT does. Each function holds a property for any bytes.
#[allow(
    dead_code,
    reason = "the rest of the crate is not here to use all of it"
)]
#[path = "../../src/transport"]
pub mod transport {
    mod forwarded;
    mod proxy {
        mod header;

        use header::{Step, parse};

        /// More bytes never change a verdict.
        pub fn header(input: &[u8]) {
            let last = parse(input);
            for n in 0..input.len() {
                match parse(&input[..n]) {
                    Ok(Step::More(wanted)) => assert!(wanted > n),
                    verdict => {
                        assert_eq!(verdict, last);
                        break;
                    }
                }
            }
        }
    }
    mod quic {
        mod capsules;

        use capsules::{Capsules, Found};

        /// Any way to cut the bytes gives the same result.
        pub fn capsules(bytes: &[u8], step: usize) {
            let whole = Capsules::default().feed(bytes);
            let mut capsules = Capsules::default();
            let mut pieces = bytes.chunks(step).map(|piece| capsules.feed(piece));
            let cut = pieces.find(|found| *found != Found::Nothing);
            assert_eq!(cut.unwrap_or(Found::Nothing), whole);
        }
    }
    mod ws {
        mod frame;

        use frame::{Decoder, FrameError, Requests};

        fn decode(bytes: &[u8], step: usize) -> (Vec<u8>, Requests, Option<FrameError>) {
            let mut decoder = Decoder::new(1000);
            let (mut out, mut requests) = (Vec::new(), Requests::default());
            let mut input = bytes.to_vec();
            let fed = input
                .chunks_mut(step)
                .try_for_each(|piece| decoder.feed(piece, &mut out, &mut requests));
            (out, requests, fed.err().map(|stopped| stopped.fault))
        }

        /// Any way to cut the bytes gives the same result, and no more bytes than were received.
        pub fn frames(bytes: &[u8], step: usize) {
            let whole = decode(bytes, usize::MAX);
            assert!(whole.0.len() <= bytes.len());
            assert_eq!(decode(bytes, step), whole);
        }
    }

    pub use proxy::header;
    pub use quic::capsules;
    pub use ws::frames;

    /// The bytes that a client sends do not change the hop that its proxy adds, whether they stand before
    /// it or in a quoted value of it.
    pub fn hops(client: &[u8]) {
        let added = Some(Some(std::net::SocketAddr::from(([192, 0, 2, 7], 0))));
        let last = |lines: &[u8]| forwarded::forwarded([lines].into_iter()).pop();
        let before = last(&[client, b", for=192.0.2.7"].concat());
        assert!(before.is_none() || before == added);
        let mut quoted = b"for=192.0.2.7;host=\"".to_vec();
        for byte in client {
            if matches!(byte, b'"' | b'\\') {
                quoted.push(b'\\');
            }
            quoted.push(*byte);
        }
        quoted.push(b'"');
        let quoted = last(&quoted);
        assert!(quoted.is_none() || quoted == added);
        let forged = [client, b", 192.0.2.7"].concat();
        let last = forwarded::x_forwarded_for([forged.as_slice()].into_iter()).pop();
        assert_eq!(last, added);
    }
}

/// The log of sessions: the reader of its segments, and its records.
#[allow(dead_code, reason = "the rest of the crate uses more of it")]
#[path = "../../src/store"]
pub mod store {
    pub mod log {
        mod format;
        mod position;
        mod reader;

        pub use position::Position;
        pub use reader::Record;

        use crc32c::crc32c;

        use format::{HEADER_BYTES, Header, RecordHead};
        use reader::{Part, SegmentReader};

        const SALT: u64 = 0x5EED;

        /// Any bytes are read to their end, each at most once.
        pub fn segment(bytes: &[u8], known_end: Option<u16>) {
            let _ = Header::decode(bytes);
            let bytes = [&[0; HEADER_BYTES as usize], bytes].concat();
            let known_end = known_end.map(|end| HEADER_BYTES + u32::from(end));
            let mut at = HEADER_BYTES;
            for part in SegmentReader::new(&bytes, 1, SALT, known_end) {
                let (position, len) = match part {
                    Part::Record(record) => (record.position, record.bytes()),
                    Part::Filler { position, bytes } | Part::Damaged { position, bytes } => {
                        (position, bytes)
                    }
                };
                assert_eq!(position.offset(), at);
                at += len;
            }
            assert!(
                at <= (bytes.len() as u32)
                    .max(known_end.unwrap_or(0))
                    .max(HEADER_BYTES)
            );
        }

        /// Records beside damaged bytes are read, and nothing else is. `bodies` are cut into records at each
        /// zero; `damage` has an offset and a mask in each three bytes.
        pub fn damaged(bodies: &[u8], damage: &[u8]) {
            let mut bytes = vec![0; HEADER_BYTES as usize];
            let mut wanted = Vec::new();
            for body in bodies.split(|byte| *byte == 0) {
                let from = bytes.len();
                let head = RecordHead {
                    position: Position::new(1, from as u32),
                    kind: body.len() as u8,
                    body_len: body.len() as u32,
                    commit_start: body.len() % 2 == 0,
                    filler: body.len() % 5 == 4,
                };
                bytes.extend_from_slice(&head.encode(SALT, crc32c(body)));
                bytes.extend_from_slice(body);
                wanted.push((from..bytes.len(), body, !head.filler));
            }
            for change in damage.chunks_exact(3) {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
                let at = at + HEADER_BYTES as usize;
                if at >= bytes.len() || change[2] == 0 {
                    continue;
                }
                bytes[at] ^= change[2];
                for (range, _, intact) in &mut wanted {
                    *intact &= !range.contains(&at);
                }
            }
            let known_end = Some(bytes.len() as u32);
            let mut read =
                SegmentReader::new(&bytes, 1, SALT, known_end).filter_map(|part| match part {
                    Part::Record(record) => Some((record.position.offset() as usize, record.body)),
                    Part::Filler { .. } | Part::Damaged { .. } => None,
                });
            // Two changes of one byte may cancel each other, so records that were changed may be read, too.
            for (range, body, intact) in wanted {
                if intact {
                    let found = read.by_ref().find(|(at, _)| *at == range.start);
                    assert_eq!(found, Some((range.start, body)));
                }
            }
        }
    }

    pub mod records;
}

pub use store::log;

/// The records of sessions, filters and links in the log.
pub mod session_records {
    use tidegate::store::log::{Position, Record};
    use tidegate::store::records::{
        CheckpointRecord, FilterGoneRecord, FilterRecord, FoundFilters, FoundSessions,
        LinkReleased, LinkRecord, MessageRecord, SessionRecord,
        decode_end, encode_end,
    };

    /// Any bytes are a record or an error, and a record has one form only.
    pub fn body(body: &[u8]) {
        if let Ok(record) = SessionRecord::decode(body) {
            let mut again = Vec::new();
            record.encode(&mut again);
            assert_eq!(again, body);
        }
        if let Ok(incarnation) = decode_end(body) {
            assert_eq!(encode_end(incarnation), body);
        }
        if let Ok(record) = MessageRecord::decode(body) {
            let mut again = Vec::new();
            record.encode(&mut again);
            assert_eq!(again, body);
        }
        if let Ok(record) = CheckpointRecord::decode(body) {
            let mut again = Vec::new();
            record.encode(&mut again);
            assert_eq!(again, body);
        }
        if let Ok(record) = LinkReleased::decode(body) {
            assert_eq!(record.encode(), body);
        }
        let mut again = Vec::new();
        if let Ok(record) = FilterRecord::decode(body) {
            record.encode(&mut again);
            assert_eq!(again, body);
        }
        again.clear();
        if let Ok(record) = FilterGoneRecord::decode(body) {
            record.encode(&mut again);
            assert_eq!(again, body);
        }
        again.clear();
        if let Ok(record) = LinkRecord::decode(body) {
            record.encode(&mut again);
            assert_eq!(again, body);
        }
    }

    /// A log of any records is read. Each record has its kind, its length, and its body.
    pub fn log(mut bytes: &[u8]) {
        let (mut found, mut filters) = (FoundSessions::default(), FoundFilters::default());
        let mut offset = 0;
        while let Some((&[kind, len], rest)) = bytes.split_first_chunk() {
            let (body, rest) = rest.split_at(usize::from(len).min(rest.len()));
            self::body(body);
            let position = Position::new(1, offset);
            let record = Record {
                position,
                kind,
                body,
            };
            // An error is an answer, too.
            let _ = match FoundFilters::takes(kind) {
                true => filters.take(&record),
                false => found.take(&record),
            };
            offset += u32::from(len) + 1;
            bytes = rest;
        }
        for session in found.sessions() {
            assert!(SessionRecord::decode(&session.body).is_ok());
        }
    }
}
