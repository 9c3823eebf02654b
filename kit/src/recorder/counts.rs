//! The recorder's counts, and the difference between two snapshots of them.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasher, RandomState};

use super::Toward;
use crate::audit::Stamp;
use crate::wire::{Connect, Publish, TYPE_NAMES, kind};

/// Second copies remembered in full.
const SECOND_COPIES_KEPT: usize = 100;

/// Illegal packets remembered in full.
const ILLEGAL_KEPT: usize = 20;

#[derive(Debug, Default)]
pub(super) struct Counts {
    now: Snapshot,
    /// Keyed twice, so that 128 bits of digest make a chance collision impossible in practice.
    keys: [RandomState; 2],
    published: HashMap<(u64, u64), u32>,
    /// Only topics that begin with this prefix are remembered; a link's own probes may repeat.
    watched: String,
}

/// The counts of the recorder up to a moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Packets toward the broker by packet type number.
    pub to_broker: [u64; 16],
    /// Packets toward Tidegate by packet type number.
    pub to_tidegate: [u64; 16],
    /// Bytes toward the broker.
    pub bytes_to_broker: u64,
    /// Bytes toward Tidegate.
    pub bytes_to_tidegate: u64,
    /// Filters in SUBSCRIBE packets and how often each was sent.
    pub subscribed: BTreeMap<String, u64>,
    /// Filters in UNSUBSCRIBE packets and how often each was sent.
    pub unsubscribed: BTreeMap<String, u64>,
    /// Links by the order in which they connected.
    pub links: Vec<LinkInfo>,
    /// The number of publishes toward the broker whose topic and payload had already passed.
    pub second_copies: u64,
    /// The first of those publishes.
    pub second_copies_seen: Vec<SecondCopy>,
    /// Publishes toward the broker by topic with its last level cut off, for reports.
    pub published_below: BTreeMap<String, u64>,
    /// Packets that the recorder could not read, with their direction.
    pub illegal: Vec<String>,
}

/// One link's CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkInfo {
    /// Client identifier.
    pub client_id: String,
    /// Protocol level: 4 or 5.
    pub level: u8,
    /// Clean Start or Clean Session.
    pub clean: bool,
}

/// A publish toward the broker that had already passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecondCopy {
    /// Topic name.
    pub topic: String,
    /// DUP flag of the second copy.
    pub dup: bool,
    /// Packet identifier of the second copy.
    pub id: u16,
    /// Client identifier of the link that sent it.
    pub link: String,
    /// The kit's stamp, or the first bytes of the payload.
    pub payload: String,
}

impl Counts {
    pub(super) fn snapshot(&self) -> Snapshot {
        self.now.clone()
    }

    pub(super) fn watch(&mut self, prefix: &str) {
        prefix.clone_into(&mut self.watched);
    }

    pub(super) fn forget_publishes(&mut self) {
        self.published.clear();
    }

    pub(super) fn packet(&mut self, toward: Toward, kind: u8, bytes: usize) {
        let (packets, total) = match toward {
            Toward::Broker => (&mut self.now.to_broker, &mut self.now.bytes_to_broker),
            Toward::Tidegate => (&mut self.now.to_tidegate, &mut self.now.bytes_to_tidegate),
        };
        packets[usize::from(kind)] += 1;
        *total += bytes as u64;
    }

    pub(super) fn connect(&mut self, connect: &Connect) {
        self.now.links.push(LinkInfo {
            client_id: connect.client_id.clone(),
            level: connect.version.level(),
            clean: connect.clean,
        });
    }

    pub(super) fn subscribe(&mut self, filter: &str) {
        *self.now.subscribed.entry(filter.to_owned()).or_default() += 1;
    }

    pub(super) fn unsubscribe(&mut self, filter: &str) {
        *self.now.unsubscribed.entry(filter.to_owned()).or_default() += 1;
    }

    pub(super) fn publish(&mut self, link: &str, publish: &Publish) {
        if !publish.topic.starts_with(&self.watched) {
            return;
        }
        let message = (&publish.topic, &publish.payload);
        let digest = (
            self.keys[0].hash_one(message),
            self.keys[1].hash_one(message),
        );
        let copies = self.published.entry(digest).or_default();
        *copies += 1;
        if *copies > 1 {
            self.now.second_copies += 1;
            if self.now.second_copies_seen.len() < SECOND_COPIES_KEPT {
                self.now.second_copies_seen.push(SecondCopy {
                    topic: publish.topic.clone(),
                    dup: publish.dup,
                    id: publish.id,
                    link: link.to_owned(),
                    payload: show(&publish.payload),
                });
            }
        }
        let below = publish
            .topic
            .rsplit_once('/')
            .map_or(&*publish.topic, |(head, _)| head);
        *self
            .now
            .published_below
            .entry(below.to_owned())
            .or_default() += 1;
    }

    pub(super) fn illegal(&mut self, what: String) {
        if self.now.illegal.len() < ILLEGAL_KEPT {
            self.now.illegal.push(what);
        }
    }
}

impl Snapshot {
    /// The counts since `earlier`.
    pub fn since(&self, earlier: &Self) -> Diff {
        let minus = |new: &[u64; 16], old: &[u64; 16]| std::array::from_fn(|i| new[i] - old[i]);
        let grown = |new: &BTreeMap<String, u64>, old: &BTreeMap<String, u64>| {
            new.iter()
                .map(|(k, n)| (k.clone(), n - old.get(k).copied().unwrap_or(0)))
                .filter(|(_, n)| *n > 0)
                .collect()
        };
        let copies = earlier.second_copies_seen.len();
        Diff {
            to_broker: minus(&self.to_broker, &earlier.to_broker),
            to_tidegate: minus(&self.to_tidegate, &earlier.to_tidegate),
            bytes_to_broker: self.bytes_to_broker - earlier.bytes_to_broker,
            bytes_to_tidegate: self.bytes_to_tidegate - earlier.bytes_to_tidegate,
            subscribed: grown(&self.subscribed, &earlier.subscribed),
            unsubscribed: grown(&self.unsubscribed, &earlier.unsubscribed),
            links: self.links[earlier.links.len()..].to_vec(),
            second_copies: self.second_copies - earlier.second_copies,
            second_copies_seen: self.second_copies_seen[copies..].to_vec(),
            illegal: self.illegal[earlier.illegal.len()..].to_vec(),
        }
    }
}

/// The counts between two snapshots.
#[derive(Debug, Clone, Default)]
pub struct Diff {
    /// Packets toward the broker by packet type number.
    pub to_broker: [u64; 16],
    /// Packets toward Tidegate by packet type number.
    pub to_tidegate: [u64; 16],
    /// Bytes toward the broker.
    pub bytes_to_broker: u64,
    /// Bytes toward Tidegate.
    pub bytes_to_tidegate: u64,
    /// Filters subscribed to.
    pub subscribed: BTreeMap<String, u64>,
    /// Filters unsubscribed from.
    pub unsubscribed: BTreeMap<String, u64>,
    /// Links that connected.
    pub links: Vec<LinkInfo>,
    /// The number of publishes that had already passed.
    pub second_copies: u64,
    /// The first of those publishes.
    pub second_copies_seen: Vec<SecondCopy>,
    /// Packets that could not be read.
    pub illegal: Vec<String>,
}

impl Diff {
    /// Whether the broker noticed nothing: no CONNECT, SUBSCRIBE, UNSUBSCRIBE or DISCONNECT, no
    /// second copy of a publish, no illegal packet.
    pub fn is_quiet(&self) -> bool {
        let disturbing = [
            kind::CONNECT,
            kind::SUBSCRIBE,
            kind::UNSUBSCRIBE,
            kind::DISCONNECT,
        ];
        disturbing
            .iter()
            .all(|k| self.to_broker[usize::from(*k)] == 0)
            && self.second_copies == 0
            && self.illegal.is_empty()
    }

    /// Packets toward the broker in all.
    pub fn packets_to_broker(&self) -> u64 {
        self.to_broker.iter().sum()
    }

    /// Packets toward Tidegate in all.
    pub fn packets_to_tidegate(&self) -> u64 {
        self.to_tidegate.iter().sum()
    }
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |packets: &[u64; 16]| {
            let some = packets.iter().enumerate().filter(|(_, n)| **n > 0);
            let text: Vec<_> = some
                .map(|(i, n)| format!("{} {n}", TYPE_NAMES[i]))
                .collect();
            if text.is_empty() {
                "nothing".to_owned()
            } else {
                text.join(", ")
            }
        };
        writeln!(
            f,
            "toward the broker: {} ({} bytes)",
            named(&self.to_broker),
            self.bytes_to_broker
        )?;
        let bytes = self.bytes_to_tidegate;
        writeln!(
            f,
            "toward tidegate: {} ({bytes} bytes)",
            named(&self.to_tidegate)
        )?;
        for link in &self.links {
            writeln!(f, "CONNECT of {link:?}")?;
        }
        for (filter, n) in self.subscribed.iter().take(20) {
            writeln!(f, "SUBSCRIBE {filter} ({n})")?;
        }
        for (filter, n) in self.unsubscribed.iter().take(20) {
            writeln!(f, "UNSUBSCRIBE {filter} ({n})")?;
        }
        if self.second_copies > 0 {
            writeln!(f, "{} second copies of publishes:", self.second_copies)?;
        }
        for copy in self.second_copies_seen.iter().take(20) {
            writeln!(f, "  {copy:?}")?;
        }
        for what in &self.illegal {
            writeln!(f, "illegal: {what}")?;
        }
        Ok(())
    }
}

fn show(payload: &[u8]) -> String {
    match Stamp::read(payload) {
        Some(stamp) if stamp.sent_ns < 1 << 60 => {
            format!("stream {} seq {}", stamp.stream, stamp.seq)
        }
        _ => String::from_utf8_lossy(&payload[..payload.len().min(48)]).into_owned(),
    }
}
