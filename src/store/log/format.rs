//! The bytes of a segment. All numbers are little endian.
//!
//! A segment begins with its header, which is written twice, at 0 and at 4096, so that neither a damaged
//! byte nor a damaged sector costs the segment:
//!
//! | bytes | content |
//! |---|---|
//! | 8 | the mark of a log |
//! | 4 | the version of the format |
//! | 4 | CRC-32C of these 12 bytes: every version of the format has these 16 bytes |
//! | 4 | the segment's number |
//! | 8 | the log's salt |
//! | 4 | where the records of the segment before this one end; all ones: not known, or this is the first one |
//! | 4 | CRC-32C of the 32 bytes before |
//!
//! The bytes between the copies are not used. Records follow the second copy, without gaps:
//!
//! | bytes | content |
//! |---|---|
//! | 4 | length of the body; the highest bit is set in the first record of a commit, the next one in a filler |
//! | 2 | check of the head: the inverted low bits of a CRC-32C of salt, position, length and kind |
//! | 1 | kind |
//! | 4 | CRC-32C of body, salt, position, length and kind |
//! | n | body |
//!
//! Salt and position are in the checksums, so that bytes inside a body, which a client may have
//! chosen, are never taken for a record, and neither is a record at another place. Zeros are never a
//! record: without a body, both checksums are of the same bytes, and one of them is inverted.
//!
//! A filler is a record whose body means nothing. The start after a crash puts it where a commit has a
//! hole, so that the hole is not taken for damage later.

use crc32c::{crc32c, crc32c_append};

use super::position::Position;

/// The version of the format. A log of a newer version is refused.
pub const VERSION: u32 = 1;
/// Where the copies of a header are, in bytes from the start of the segment.
pub(super) const HEADER_COPIES_AT: [u32; 2] = [0, 4096];
/// The bytes before the first record: the header, both copies.
pub const HEADER_BYTES: u32 = HEADER_COPIES_AT[1] + COPY_BYTES as u32;
/// The bytes of a record before its body.
pub const RECORD_HEAD_BYTES: u32 = 11;
/// The longest body: an MQTT packet of the greatest length, and a mebibyte for its owner.
pub const BODY_BYTES_MAX: usize = (1 << 28) + (1 << 20);

const MARK: [u8; 8] = *b"tidelog\n";
/// The bytes that every version has in common.
const PREFIX_BYTES: usize = 16;
/// One copy of a header.
pub(super) const COPY_BYTES: usize = 36;
const NO_PREVIOUS: u32 = u32::MAX;
const COMMIT_START: u32 = 1 << 31;
const FILLER: u32 = 1 << 30;

/// The header of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The segment's number.
    pub segment: u32,
    /// A number of this log, which nobody outside can know.
    pub salt: u64,
    /// The end of the records of the segment before this one, in bytes from its start. `None`: it is not
    /// known, or the log began with this segment.
    pub previous_end: Option<u32>,
}

/// Why a header cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// Another version of the format, which this process does not read.
    Version(u32),
    /// Both copies are damaged, or missing.
    Damaged,
}

impl Header {
    /// The bytes of one copy.
    pub(super) fn encode(&self) -> [u8; COPY_BYTES] {
        let mut copy = [0; COPY_BYTES];
        copy[..8].copy_from_slice(&MARK);
        copy[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let prefix = crc32c(&copy[..12]);
        copy[12..16].copy_from_slice(&prefix.to_le_bytes());
        copy[16..20].copy_from_slice(&self.segment.to_le_bytes());
        copy[20..28].copy_from_slice(&self.salt.to_le_bytes());
        let previous = self.previous_end.unwrap_or(NO_PREVIOUS);
        copy[28..32].copy_from_slice(&previous.to_le_bytes());
        let crc = crc32c(&copy[..32]);
        copy[32..].copy_from_slice(&crc.to_le_bytes());
        copy
    }

    /// The header at the start of a segment's bytes, and whether both copies are intact.
    ///
    /// # Errors
    /// [`HeaderError::Version`] if a copy is of another version, [`HeaderError::Damaged`] if neither copy
    /// can be read.
    pub fn decode(bytes: &[u8]) -> Result<(Self, bool), HeaderError> {
        let copies = HEADER_COPIES_AT.map(|at| {
            let copy = bytes.get(at as usize..).unwrap_or_default();
            Self::decode_copy(&copy[..copy.len().min(COPY_BYTES)])
        });
        match copies {
            [Err(HeaderError::Version(found)), _] | [_, Err(HeaderError::Version(found))] => {
                Err(HeaderError::Version(found))
            }
            [Ok(first), second] => Ok((first, second == Ok(first))),
            [Err(HeaderError::Damaged), second] => Ok((second?, false)),
        }
    }

    fn decode_copy(copy: &[u8]) -> Result<Self, HeaderError> {
        if copy.len() < PREFIX_BYTES || copy[..8] != MARK || crc32c(&copy[..12]) != u32_at(copy, 12)
        {
            return Err(HeaderError::Damaged);
        }
        let version = u32_at(copy, 8);
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        if copy.len() < COPY_BYTES || crc32c(&copy[..32]) != u32_at(copy, 32) {
            return Err(HeaderError::Damaged);
        }
        let previous = u32_at(copy, 28);
        Ok(Self {
            segment: u32_at(copy, 16),
            salt: u64::from(u32_at(copy, 20)) | u64::from(u32_at(copy, 24)) << 32,
            previous_end: (previous != NO_PREVIOUS).then_some(previous),
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

/// The fields of a record that its head contains.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordHead {
    pub(super) position: Position,
    pub(super) kind: u8,
    /// At most [`BODY_BYTES_MAX`].
    pub(super) body_len: u32,
    /// Whether the record is the first one of a commit: everything before it was on the disk then.
    pub(super) commit_start: bool,
    /// Whether the record only fills a hole.
    pub(super) filler: bool,
}

impl RecordHead {
    /// The bytes before the body. `body_crc` is the CRC-32C of the body alone.
    pub(super) fn encode(&self, salt: u64, body_crc: u32) -> [u8; RECORD_HEAD_BYTES as usize] {
        let context = self.context(salt);
        let mut head = [0; RECORD_HEAD_BYTES as usize];
        head[..4].copy_from_slice(&self.length_field().to_le_bytes());
        head[4..6].copy_from_slice(&check(&context).to_le_bytes());
        head[6] = self.kind;
        head[7..].copy_from_slice(&crc32c_append(body_crc, &context).to_le_bytes());
        head
    }

    /// The fields of a head whose check is not yet known to be right.
    fn decode(head: &[u8], position: Position) -> Self {
        let length = u32_at(head, 0);
        Self {
            position,
            kind: head[6],
            body_len: length & !(COMMIT_START | FILLER),
            commit_start: length & COMMIT_START != 0,
            filler: length & FILLER != 0,
        }
    }

    const fn length_field(&self) -> u32 {
        let start = if self.commit_start { COMMIT_START } else { 0 };
        self.body_len | start | if self.filler { FILLER } else { 0 }
    }

    /// The bytes that the checksums cover beside the body.
    fn context(&self, salt: u64) -> [u8; 21] {
        let mut context = [0; 21];
        context[..8].copy_from_slice(&salt.to_le_bytes());
        context[8..16].copy_from_slice(&self.position.as_u64().to_le_bytes());
        context[16..20].copy_from_slice(&self.length_field().to_le_bytes());
        context[20] = self.kind;
        context
    }
}

/// Inverted, since the CRC of the same bytes may be zero.
fn check(context: &[u8; 21]) -> u16 {
    !crc32c(context) as u16
}

/// The bytes of a filler that takes `len` bytes at `position`, at least a head's.
pub(super) fn filler(position: Position, len: u32, salt: u64) -> Vec<u8> {
    let body = vec![0; len.saturating_sub(RECORD_HEAD_BYTES) as usize];
    let head = RecordHead {
        position,
        kind: 0,
        body_len: body.len() as u32,
        commit_start: false,
        filler: true,
    };
    let mut bytes = head.encode(salt, crc32c(&body)).to_vec();
    bytes.extend_from_slice(&body);
    bytes
}

/// The size that the head of a record at the start of `bytes` tells, also if its body is cut off.
pub(super) fn record_bytes(bytes: &[u8], position: Position, salt: u64) -> Option<u32> {
    let head = bytes.get(..RECORD_HEAD_BYTES as usize)?;
    let fields = RecordHead::decode(head, position);
    let is_head = check(&fields.context(salt)).to_le_bytes() == head[4..6]
        && fields.body_len as usize <= BODY_BYTES_MAX;
    is_head.then_some(RECORD_HEAD_BYTES + fields.body_len)
}

/// The outcome of reading bytes as a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    Record {
        kind: u8,
        body: &'a [u8],
        commit_start: bool,
    },
    /// A filler of this many bytes.
    Filler(u32),
    /// The head is intact, the body is not: the record has this many bytes.
    BadBody(u32),
    /// Not a record.
    BadHead,
}

/// Reads the record at the start of `bytes`, which are at `position`.
pub(super) fn parse(bytes: &[u8], position: Position, salt: u64) -> Parsed<'_> {
    let Some((head, rest)) = bytes.split_at_checked(RECORD_HEAD_BYTES as usize) else {
        return Parsed::BadHead;
    };
    let fields = RecordHead::decode(head, position);
    let len = fields.body_len as usize;
    if len > BODY_BYTES_MAX || len > rest.len() {
        return Parsed::BadHead;
    }
    let context = fields.context(salt);
    if check(&context).to_le_bytes() != head[4..6] {
        return Parsed::BadHead;
    }
    let body = &rest[..len];
    if crc32c_append(crc32c(body), &context) != u32_at(head, 7) {
        return Parsed::BadBody(RECORD_HEAD_BYTES + fields.body_len);
    }
    if fields.filler {
        return Parsed::Filler(RECORD_HEAD_BYTES + fields.body_len);
    }
    Parsed::Record {
        kind: fields.kind,
        body,
        commit_start: fields.commit_start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        segment: 7,
        salt: 0x0123_4567_89AB_CDEF,
        previous_end: Some(4711),
    };

    fn record(body: &[u8], position: Position) -> Vec<u8> {
        let head = RecordHead {
            position,
            kind: 3,
            body_len: body.len() as u32,
            commit_start: true,
            filler: false,
        };
        let mut bytes = head.encode(HEADER.salt, crc32c(body)).to_vec();
        bytes.extend_from_slice(body);
        bytes
    }

    /// The bytes of a segment before its first record.
    fn both(header: &Header) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES as usize];
        for at in HEADER_COPIES_AT {
            bytes[at as usize..][..COPY_BYTES].copy_from_slice(&header.encode());
        }
        bytes
    }

    #[test]
    fn a_header_survives_any_damaged_byte_and_any_damaged_sector() {
        let bytes = both(&HEADER);
        assert_eq!(Header::decode(&bytes), Ok((HEADER, true)));
        for start in HEADER_COPIES_AT.map(|at| at as usize) {
            for at in start..start + COPY_BYTES {
                for mask in [1, 0x80, 0xFF] {
                    let mut damaged = bytes.clone();
                    damaged[at] ^= mask;
                    assert_eq!(
                        Header::decode(&damaged),
                        Ok((HEADER, false)),
                        "byte {at} ^ {mask}"
                    );
                }
            }
        }
        for sector in (0..bytes.len()).step_by(512) {
            let mut damaged = bytes.clone();
            let end = (sector + 512).min(damaged.len());
            damaged[sector..end].fill(0xA5);
            let header = Header::decode(&damaged).map(|(header, _)| header);
            assert_eq!(header, Ok(HEADER), "sector at {sector}");
        }
        assert_eq!(Header::decode(&bytes[..10]), Err(HeaderError::Damaged));
        assert_eq!(Header::decode(&[0; 5000]), Err(HeaderError::Damaged));
        let first = Header {
            previous_end: None,
            ..HEADER
        };
        assert_eq!(Header::decode(&both(&first)), Ok((first, true)));
    }

    #[test]
    fn zeros_are_never_a_record() {
        // With this salt, the CRC-32C of a head of zeros at this place is zero.
        let (salt, position) = (0x5EED_5199_791F, Position::new(1, 4096));
        let head = RecordHead::decode(&[0; RECORD_HEAD_BYTES as usize], position);
        assert_eq!(crc32c(&head.context(salt)), 0);
        for len in [11, 12, 100] {
            assert_eq!(parse(&vec![0; len], position, salt), Parsed::BadHead);
        }
    }

    #[test]
    fn a_filler_takes_the_place_of_a_hole_and_has_no_record() {
        for len in [RECORD_HEAD_BYTES, 12, 400] {
            let position = Position::new(3, 5000);
            let bytes = filler(position, len, HEADER.salt);
            assert_eq!(bytes.len(), len as usize);
            assert_eq!(parse(&bytes, position, HEADER.salt), Parsed::Filler(len));
            assert_eq!(record_bytes(&bytes[..11], position, HEADER.salt), Some(len));
            assert_eq!(record_bytes(&bytes[..11], position, 1), None);
        }
    }

    #[test]
    fn a_newer_version_is_recognised_by_the_bytes_that_all_versions_share() {
        let mut bytes = HEADER.encode()[..PREFIX_BYTES].to_vec();
        bytes[8..12].copy_from_slice(&9u32.to_le_bytes());
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Damaged));
        let crc = crc32c(&bytes[..12]);
        bytes[12..].copy_from_slice(&crc.to_le_bytes());
        bytes.extend_from_slice(&[0xAA; 100]);
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Version(9)));
    }

    #[test]
    fn a_record_is_read_only_at_its_own_place() {
        let position = Position::new(2, 80);
        let bytes = record(b"body", position);
        let read = Parsed::Record {
            kind: 3,
            body: b"body",
            commit_start: true,
        };
        assert_eq!(parse(&bytes, position, HEADER.salt), read);
        assert_eq!(parse(&bytes, position, 1), Parsed::BadHead);
        assert_eq!(
            parse(&bytes, Position::new(2, 81), HEADER.salt),
            Parsed::BadHead
        );
        assert_eq!(
            parse(&bytes, Position::new(3, 80), HEADER.salt),
            Parsed::BadHead
        );
        assert_eq!(
            parse(&bytes[..bytes.len() - 1], position, HEADER.salt),
            Parsed::BadHead
        );
    }

    #[test]
    fn every_damaged_byte_of_a_record_is_noticed_and_a_damaged_body_keeps_its_length() {
        for len in [0, 1, 5, 600] {
            let position = Position::new(1, 80);
            let bytes = record(&vec![0x55; len], position);
            for at in 0..bytes.len() {
                for mask in 1..=255 {
                    let mut damaged = bytes.clone();
                    damaged[at] ^= mask;
                    let parsed = parse(&damaged, position, HEADER.salt);
                    if at < 7 {
                        assert_eq!(parsed, Parsed::BadHead, "byte {at} ^ {mask}");
                    } else {
                        assert_eq!(
                            parsed,
                            Parsed::BadBody(bytes.len() as u32),
                            "byte {at} ^ {mask}"
                        );
                    }
                }
                if len > 5 && at > 20 {
                    break;
                }
            }
        }
    }
}
