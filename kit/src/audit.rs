//! Bookkeeping of deliveries: loss, disorder and duplicates, told from stamps in the payloads.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::OnceLock;
use std::time::Instant;

/// Bytes that a stamp takes at the beginning of a payload.
pub const STAMP_LEN: usize = 20;

/// The bytes at the beginning of every payload of the kit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the stream: one publisher and topic.
    pub stream: u32,
    /// Sequence number in the stream, from 1.
    pub seq: u64,
    /// The time of sending, in nanoseconds of [`now_ns`].
    pub sent_ns: u64,
}

impl Stamp {
    /// A payload of `len` bytes (at least [`STAMP_LEN`]) that begins with this stamp.
    pub fn payload(&self, len: usize) -> Vec<u8> {
        let mut payload = vec![b'.'; len.max(STAMP_LEN)];
        self.write(&mut payload);
        payload
    }

    /// Writes the stamp over the beginning of a payload.
    ///
    /// # Panics
    /// If the payload is shorter than [`STAMP_LEN`].
    pub fn write(&self, payload: &mut [u8]) {
        payload[..4].copy_from_slice(&self.stream.to_be_bytes());
        payload[4..12].copy_from_slice(&self.seq.to_be_bytes());
        payload[12..20].copy_from_slice(&self.sent_ns.to_be_bytes());
    }

    /// Reads the stamp of a payload, if it is long enough to have one.
    pub fn read(payload: &[u8]) -> Option<Self> {
        let head = payload.get(..STAMP_LEN)?;
        Some(Self {
            stream: u32::from_be_bytes(head[..4].try_into().ok()?),
            seq: u64::from_be_bytes(head[4..12].try_into().ok()?),
            sent_ns: u64::from_be_bytes(head[12..20].try_into().ok()?),
        })
    }
}

/// Nanoseconds of a monotonic clock that starts with the first call in this process.
pub fn now_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos())
        .expect("a process does not live for 584 years")
}

/// The losses that a receiver's kind of session allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    /// Its session outlives its connections: nothing may be missing.
    Everything,
    /// Its session ends with the connection: messages may be missing between two connections only.
    WhileConnected,
    /// Order only: anything may be missing, nothing may come twice.
    Order,
}

/// A delivery that breaks the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The message came twice, and the second copy had no DUP.
    UnmarkedDuplicate,
    /// The message came after a later one on the same connection.
    Disorder {
        /// The sequence number that came just before this one.
        after: u64,
    },
    /// A second copy came on the same connection, or to a session that had received no first copy.
    Redelivered,
    /// The redelivery has another packet identifier than the first delivery.
    OtherPacketId {
        /// The packet identifier of the first delivery.
        first: u16,
    },
    /// Sequence numbers before this message are missing. They may still come, and then count as
    /// disorder.
    Gap {
        /// The number of missing messages.
        missing: u64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnmarkedDuplicate => write!(f, "a duplicate without DUP"),
            Self::Disorder { after } => write!(f, "out of order, after {after}"),
            Self::Redelivered => write!(f, "a duplicate that no resume explains"),
            Self::OtherPacketId { first } => write!(f, "another packet id than at first, {first}"),
            Self::Gap { missing } => write!(f, "{missing} missing before it"),
        }
    }
}

/// Everything that one receiver got.
#[derive(Debug)]
pub struct Audit {
    keeps: Keeps,
    streams: HashMap<u32, Stream>,
    connection: u64,
    /// Deliveries seen for the first time.
    pub fresh: u64,
    /// Legal duplicates: marked with DUP and explained by a resume.
    pub duplicates: u64,
    /// The faults, at most [`FAULTS_KEPT`], with stream and sequence number.
    pub faults: Vec<(u32, u64, Fault)>,
    /// All faults by name.
    pub fault_counts: BTreeMap<&'static str, u64>,
}

/// Faults that an audit keeps in full.
pub const FAULTS_KEPT: usize = 16;

/// How many packet identifiers of late deliveries a stream remembers.
const IDS_KEPT: usize = 256;

#[derive(Debug)]
struct Stream {
    /// The next sequence number that was never seen.
    next: u64,
    /// Numbers below `next` that were never seen.
    missing: BTreeSet<u64>,
    /// The last sequence number on a connection, and the number of that connection.
    last: (u64, u64),
    /// The packet identifiers of the last deliveries.
    ids: std::collections::VecDeque<(u64, u16)>,
}

impl Audit {
    /// An empty audit of a receiver that is about to connect for the first time.
    pub fn new(keeps: Keeps) -> Self {
        Self {
            keeps,
            streams: HashMap::new(),
            connection: 0,
            fresh: 0,
            duplicates: 0,
            faults: Vec::new(),
            fault_counts: BTreeMap::new(),
        }
    }

    /// Notes that the receiver has a new connection.
    pub fn connected(&mut self) {
        self.connection += 1;
    }

    /// Enters one delivery: its stamp, DUP flag and packet identifier (0 for QoS 0).
    pub fn deliver(&mut self, stamp: Stamp, dup: bool, id: u16) {
        let connection = self.connection;
        // The first number of a stream is 1. A session that keeps everything existed before it was
        // sent.
        let start = match self.keeps {
            Keeps::Everything => 1,
            Keeps::WhileConnected | Keeps::Order => stamp.seq,
        };
        let stream = self.streams.entry(stamp.stream).or_insert_with(|| Stream {
            next: start,
            missing: BTreeSet::new(),
            last: (0, 0),
            ids: std::collections::VecDeque::new(),
        });
        let mut faults = Vec::new();
        let (last_connection, last) = stream.last;
        let same = last_connection == connection;
        if same && stamp.seq < last {
            faults.push(Fault::Disorder { after: last });
        }
        if stamp.seq >= stream.next {
            let missing = stamp.seq - stream.next;
            let allowed = match self.keeps {
                Keeps::Everything => false,
                Keeps::WhileConnected => !same,
                Keeps::Order => true,
            };
            if missing > 0 && !allowed {
                faults.push(Fault::Gap { missing });
                // Bounded: a larger gap cannot be told apart from loss.
                stream
                    .missing
                    .extend(stream.next..stamp.seq.min(stream.next + 10_000));
            }
            stream.next = stamp.seq + 1;
            self.fresh += 1;
        } else if stream.missing.remove(&stamp.seq) {
            self.fresh += 1;
        } else {
            if !dup {
                faults.push(Fault::UnmarkedDuplicate);
            } else if self.keeps != Keeps::Everything || (same && stamp.seq <= last) {
                faults.push(Fault::Redelivered);
            } else {
                self.duplicates += 1;
            }
            let first = stream.ids.iter().rev().find(|(seq, _)| *seq == stamp.seq);
            if let Some((_, first)) = first
                && id != *first
            {
                faults.push(Fault::OtherPacketId { first: *first });
            }
        }
        stream.last = (connection, stamp.seq);
        if id != 0 && self.keeps == Keeps::Everything {
            if stream.ids.len() == IDS_KEPT {
                stream.ids.pop_front();
            }
            stream.ids.push_back((stamp.seq, id));
        }
        for fault in faults {
            self.fault(stamp, fault);
        }
    }

    /// The highest sequence number seen of a stream, or 0 before the first message.
    pub fn highest(&self, stream: u32) -> u64 {
        self.streams.get(&stream).map_or(0, |s| s.next - 1)
    }

    /// How many messages of a stream that went up to `sent` never came.
    pub fn lost(&self, stream: u32, sent: u64) -> u64 {
        match self.streams.get(&stream) {
            None => sent,
            Some(s) => s.missing.len() as u64 + sent.saturating_sub(s.next - 1),
        }
    }

    fn fault(&mut self, stamp: Stamp, fault: Fault) {
        let name = match fault {
            Fault::UnmarkedDuplicate => "duplicate without DUP",
            Fault::Disorder { .. } => "disorder",
            Fault::Redelivered => "redelivered without reason",
            Fault::OtherPacketId { .. } => "redelivered with another packet id",
            Fault::Gap { .. } => "gap",
        };
        *self.fault_counts.entry(name).or_default() += 1;
        if self.faults.len() < FAULTS_KEPT {
            self.faults.push((stamp.stream, stamp.seq, fault));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seq: u64) -> Stamp {
        Stamp {
            stream: 7,
            seq,
            sent_ns: 0,
        }
    }

    #[test]
    fn a_stamp_survives_its_payload() {
        let stamp = Stamp {
            stream: 3,
            seq: 1 << 40,
            sent_ns: 99,
        };
        let payload = stamp.payload(64);
        assert_eq!((payload.len(), Stamp::read(&payload)), (64, Some(stamp)));
        assert_eq!(Stamp::read(&payload[..19]), None);
    }

    #[test]
    fn a_resume_with_dup_is_legal() {
        let mut audit = Audit::new(Keeps::Everything);
        audit.connected();
        for seq in 1..=4 {
            audit.deliver(at(seq), false, seq as u16);
        }
        audit.connected();
        audit.deliver(at(3), true, 3);
        audit.deliver(at(4), true, 4);
        // The server sent this delivery to the old socket, where it never arrived.
        audit.deliver(at(5), true, 5);
        audit.deliver(at(6), false, 6);
        assert_eq!((audit.fresh, audit.duplicates), (6, 2));
        assert!(audit.faults.is_empty(), "{:?}", audit.faults);
        assert_eq!(
            (audit.lost(7, 6), audit.lost(7, 8), audit.lost(1, 2)),
            (0, 2, 2)
        );
    }

    #[test]
    fn faults_are_told_apart() {
        let mut audit = Audit::new(Keeps::Everything);
        audit.connected();
        audit.deliver(at(1), false, 1);
        audit.deliver(at(3), false, 3);
        audit.deliver(at(2), false, 2);
        audit.deliver(at(2), false, 9);
        let kinds: Vec<_> = audit.faults.iter().map(|(_, _, f)| f.clone()).collect();
        assert_eq!(
            kinds,
            [
                Fault::Gap { missing: 1 },
                Fault::Disorder { after: 3 },
                Fault::UnmarkedDuplicate,
                Fault::OtherPacketId { first: 2 },
            ]
        );
        assert_eq!(audit.lost(7, 3), 0);
    }

    #[test]
    fn a_clean_session_may_miss_what_came_between_its_connections() {
        let mut audit = Audit::new(Keeps::WhileConnected);
        audit.connected();
        audit.deliver(at(5), false, 1);
        audit.deliver(at(6), false, 2);
        audit.connected();
        audit.deliver(at(20), false, 1);
        assert!(audit.faults.is_empty());
        audit.deliver(at(22), false, 2);
        assert_eq!(audit.faults.len(), 1);
    }
}
