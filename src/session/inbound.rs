//! The receiving half of a session: publishes that wait for the broker, and QoS 2 identifiers.

use crate::hashing::{HashSeed, SeededMap};
use crate::mqtt::{QoS, ReasonCode};
use crate::streams::StreamId;

/// Names one publish of one session toward the router. It is never reused within the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

impl Token {
    fn new(sequence: u64, key: Key) -> Self {
        Self(sequence << 24 | u64::from(key.0))
    }

    /// The client's packet identifier.
    pub fn packet_id(self) -> u16 {
        self.0 as u16
    }

    /// The stream and identifier of its first copy.
    fn key(self) -> Key {
        Key(self.0 as u32 & 0xFF_FFFF)
    }
}

/// A stream and a packet identifier, since clients may number each stream separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key(u32);

impl Key {
    fn new(stream: StreamId, packet_id: u16) -> Self {
        Self(u32::from(stream.number()) << 16 | u32::from(packet_id))
    }

    fn stream(self) -> StreamId {
        StreamId::from_index((self.0 >> 16) as usize)
    }
}

/// A publish of QoS 1 or 2 as it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The client's packet identifier.
    pub packet_id: u16,
    /// The stream on which it arrived.
    pub stream: StreamId,
    /// DUP.
    pub dup: bool,
    /// 1 or 2.
    pub qos: QoS,
    /// Digest of topic and payload.
    pub digest: u64,
}

/// How many publishes of QoS 1 and 2 a client may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenMax {
    /// Receive Maximum, as announced: the limit for QoS 2. See [`Inbound::is_full`] for QoS 1.
    pub announced: usize,
    /// The limit for both together.
    pub hard: usize,
}

/// What an arriving publish means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// A new message: forward it.
    New(Token),
    /// A copy of a publish that waits for the broker: the broker's answer serves both.
    Joined,
    /// A copy of a publish that the broker answered while the client was away: answer it, and do not
    /// forward it.
    Answered(ReasonCode),
    /// A copy of a QoS 2 publish that is received and not released: PUBREC again [MQTT-4.3.3-10].
    Received,
    /// A new message beyond the number that may be open. Nothing was kept of it.
    TooMany,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    token: Token,
    stream: StreamId,
    state: State,
    /// Recognises a copy, also after a clean start.
    digest: u64,
    /// It arrived on the current connection, so the client expects an answer there.
    current: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The broker has it, or it is on its way there.
    Waiting(QoS),
    /// The broker answered, and the client cannot have seen the answer.
    Answered(QoS, ReasonCode),
    /// PUBREC sent, PUBREL awaited.
    Received,
    /// A PUBREL arrived that means this publish, or one with the same identifier on another stream.
    Released,
}

impl State {
    fn received(self) -> bool {
        matches!(self, Self::Received | Self::Released)
    }

    fn is_of(self, publish: &Incoming) -> bool {
        match self {
            Self::Waiting(qos) | Self::Answered(qos, _) => qos == publish.qos,
            Self::Received | Self::Released => publish.qos == QoS::ExactlyOnce,
        }
    }
}

/// An answer from the broker, for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The client's packet identifier.
    pub packet_id: u16,
    /// The stream on which the publish arrived.
    pub stream: StreamId,
    /// Its QoS: PUBACK answers 1, PUBREC answers 2.
    pub qos: QoS,
}

/// The receiving half of a session.
#[derive(Debug)]
pub struct Inbound {
    /// Keyed from the configured seed, because the order decides which of several publishes with one
    /// packet identifier a PUBREL means.
    entries: SeededMap<Key, Entry>,
    /// Publishes whose stream has closed. A retransmission may arrive on any stream; it is matched by
    /// DUP, packet identifier and content.
    detached: Vec<Entry>,
    /// Publishes of the client's earlier sessions, which began anew. A copy is matched in the same
    /// way.
    unclaimed: Vec<Entry>,
    sequence: u64,
    waiting: usize,
    /// Those of QoS 1 among them: the broker's answer to one of them makes room for another publish.
    waiting_qos1: usize,
    /// Publishes that the router has and the broker has not answered, including publishes of the
    /// client's earlier sessions and publishes whose identifier the client has used again.
    under_way: u32,
    /// The number of entries that the broker answered while the client was away.
    answered: usize,
    /// A new message arrived since the session began, so the client has sent its copies before it.
    progressed: bool,
    /// The client has published on data streams, which keep no order with each other.
    multi_stream: bool,
}

impl Inbound {
    /// The receiving half of a new session.
    pub fn new(hasher: HashSeed) -> Self {
        Self {
            entries: SeededMap::with_hasher(hasher),
            detached: Vec::new(),
            unclaimed: Vec::new(),
            sequence: 0,
            waiting: 0,
            waiting_qos1: 0,
            under_way: 0,
            answered: 0,
            progressed: false,
            multi_stream: false,
        }
    }

    /// Publishes of QoS 1 and 2 that the client may count as unanswered, and QoS 2 not released.
    pub fn open(&self) -> usize {
        let waits = |e: &&Entry| matches!(e.state, State::Waiting(_));
        let detached = self.detached.iter().filter(waits).count();
        self.entries.len() - self.answered + detached
    }

    /// Whether a publish without DUP is to wait unread: the client has as many publishes open as it
    /// was told, and the broker's answer to one of them will make room. A publish of QoS 2 leaves its
    /// place only with PUBREL, which could not be read meanwhile, so such places are not waited for.
    pub fn is_full(&self, stream: StreamId, packet_id: u16, announced: usize) -> bool {
        self.waiting_qos1 > 0
            && self.entries.len() + self.detached.len() >= announced
            && self.open() >= announced
            && !self.entries.contains_key(&Key::new(stream, packet_id))
    }

    /// Bytes that the entries take.
    pub fn bytes(&self) -> usize {
        let lists = self.detached.capacity() + self.unclaimed.capacity();
        lists * size_of::<Entry>() + self.entries.capacity() * size_of::<(Key, Entry)>()
    }

    /// Publishes that wait for the broker's answer.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Publishes that the broker has yet to answer, of the client's earlier sessions too.
    pub fn under_way(&self) -> u32 {
        self.under_way
    }

    /// Whether a publish that arrived on this stream has yet to be answered there.
    pub fn busy(&self, stream: StreamId) -> bool {
        let waits = |e: &Entry| e.stream == stream && matches!(e.state, State::Waiting(_));
        self.waiting > 0 && self.entries.values().any(waits)
    }

    /// Judges a publish of QoS 1 or 2.
    pub fn arrive(&mut self, publish: &Incoming, open_max: OpenMax) -> Arrival {
        self.multi_stream |= !publish.stream.is_control();
        let key = Key::new(publish.stream, publish.packet_id);
        if let Some(entry) = self.entries.get_mut(&key) {
            let same = entry.digest == publish.digest;
            let again = publish.dup || publish.qos == QoS::ExactlyOnce;
            match entry.state {
                State::Waiting(q) if q == publish.qos && same && again => {
                    entry.current = true;
                    return Arrival::Joined;
                }
                // With several streams, the answer may belong to an earlier use of the identifier.
                State::Answered(q, reason)
                    if q == publish.qos && same && (publish.dup || again && !self.multi_stream) =>
                {
                    self.settle(key, q, reason);
                    return Arrival::Answered(reason);
                }
                // Without DUP it may be a new message, whose PUBREL arrived on another stream.
                State::Received if publish.qos == QoS::ExactlyOnce && same && publish.dup => {
                    return Arrival::Received;
                }
                _ => {}
            }
        }
        if publish.dup
            && let Some(arrival) = self.again_elsewhere(publish, key)
        {
            return arrival;
        }
        if let Some(entry) = self.entries.get(&key) {
            let received = entry.state.received() && publish.qos == QoS::ExactlyOnce;
            if received && (publish.dup || !self.released_elsewhere(key)) {
                return Arrival::Received;
            }
            // The client uses the identifier for a new message [MQTT-4.3.2-5].
            self.remove(key);
        }
        let open = self.open();
        let qos2 = publish.qos == QoS::ExactlyOnce;
        if open >= open_max.hard || qos2 && open - self.waiting_qos1 >= open_max.announced {
            return Arrival::TooMany;
        }
        if !publish.dup {
            self.progress();
        }
        self.sequence += 1;
        let token = Token::new(self.sequence, key);
        self.begin_wait(publish.qos);
        self.under_way += 1;
        self.entries.insert(
            key,
            Entry {
                token,
                stream: publish.stream,
                state: State::Waiting(publish.qos),
                digest: publish.digest,
                current: true,
            },
        );
        Arrival::New(token)
    }

    /// A copy of a publish from another stream, if that stream or its connection ended, or from an
    /// ended session.
    fn again_elsewhere(&mut self, publish: &Incoming, key: Key) -> Option<Arrival> {
        let same = |e: &Entry| {
            e.token.packet_id() == publish.packet_id
                && e.digest == publish.digest
                && e.state.is_of(publish)
        };
        let control = Key::new(StreamId::CONTROL, publish.packet_id);
        let before = |e: &&Entry| key != control && !e.current && same(e);
        let found = if let Some(at) = self.detached.iter().position(same) {
            self.detached.swap_remove(at)
        } else if self.entries.get(&control).filter(before).is_some() {
            let entry = self.entries.remove(&control)?;
            self.answered -= usize::from(matches!(entry.state, State::Answered(..)));
            entry
        } else if !self.entries.contains_key(&key) {
            let at = self.unclaimed.iter().position(same)?;
            let unclaimed = self.unclaimed.swap_remove(at);
            if let State::Waiting(qos) = unclaimed.state {
                self.begin_wait(qos);
            }
            unclaimed
        } else {
            return None;
        };
        self.keep_marks(publish.packet_id, found.state);
        let mut claimed = Entry {
            stream: publish.stream,
            current: true,
            ..found
        };
        let arrival = match found.state {
            State::Waiting(_) => Arrival::Joined,
            State::Answered(qos, reason) if qos == QoS::AtLeastOnce || reason.is_error() => {
                return Some(Arrival::Answered(reason));
            }
            State::Answered(_, reason) => Arrival::Answered(reason),
            State::Received | State::Released => Arrival::Received,
        };
        if arrival != Arrival::Joined {
            claimed.state = State::Received;
        }
        if let Some(other) = self.entries.insert(key, claimed) {
            self.answered -= usize::from(matches!(other.state, State::Answered(..)));
            self.keep_detached(other);
        }
        Some(arrival)
    }

    /// The client sends new messages, so it has sent its copies.
    fn progress(&mut self) {
        self.progressed = true;
        // On a single stream the copies would have arrived first.
        if self.answered > 0 && !self.multi_stream {
            self.entries
                .retain(|_, e| !matches!(e.state, State::Answered(..)));
            self.answered = 0;
        }
    }

    /// A publish of this QoS waits for the broker's answer.
    fn begin_wait(&mut self, qos: QoS) {
        self.waiting += 1;
        self.waiting_qos1 += usize::from(qos == QoS::AtLeastOnce);
    }

    /// A publish of this QoS waits no longer for the broker's answer, or is not counted any more.
    fn end_wait(&mut self, qos: QoS) {
        self.waiting -= 1;
        self.waiting_qos1 -= usize::from(qos == QoS::AtLeastOnce);
    }

    fn remove(&mut self, key: Key) {
        match self.entries.remove(&key).map(|e| e.state) {
            Some(State::Waiting(qos)) => self.end_wait(qos),
            Some(State::Answered(..)) => self.answered -= 1,
            _ => {}
        }
    }

    /// The client gets this answer now.
    fn settle(&mut self, key: Key, qos: QoS, reason: ReasonCode) {
        if qos == QoS::ExactlyOnce && !reason.is_error() {
            if let Some(entry) = self.entries.get_mut(&key) {
                if matches!(entry.state, State::Answered(..)) {
                    self.answered -= 1;
                }
                entry.state = State::Received;
            }
        } else {
            if let Some(entry) = self.entries.remove(&key)
                && matches!(entry.state, State::Answered(..))
            {
                self.answered -= 1;
            }
            self.shrink();
        }
    }

    /// The broker's answer, or the router's in its place: exactly one for each token. `None`: the client
    /// gets none now, because it is away or uses the identifier for another message.
    pub fn answer(&mut self, token: Token, reason: ReasonCode, attached: bool) -> Option<Answer> {
        self.under_way = self.under_way.saturating_sub(1);
        if let Some(key) = self.find(token)
            && let Some(entry) = self.entries.get_mut(&key)
            && let State::Waiting(qos) = entry.state
        {
            let stream = entry.stream;
            let later = !attached || !entry.current;
            if later {
                // The client gets it for its copy, which it has not sent on this connection yet.
                entry.state = State::Answered(qos, reason);
                self.answered += 1;
            }
            self.end_wait(qos);
            if later {
                return None;
            }
            self.settle(key, qos, reason);
            return Some(Answer {
                packet_id: token.packet_id(),
                stream,
                qos,
            });
        }
        for (entry, counted) in (self.detached.iter_mut().map(|e| (e, true)))
            .chain(self.unclaimed.iter_mut().map(|e| (e, false)))
        {
            if entry.token == token
                && let State::Waiting(qos) = entry.state
            {
                entry.state = State::Answered(qos, reason);
                if counted {
                    self.end_wait(qos);
                }
                break;
            }
        }
        None
    }

    /// The entry of a publish, which is mostly still under the key of its arrival.
    fn find(&self, token: Token) -> Option<Key> {
        let key = token.key();
        let at_first = self.entries.get(&key).is_some_and(|e| e.token == token);
        if at_first || !self.multi_stream {
            return at_first.then_some(key);
        }
        let mut all = self.entries.iter();
        all.find(|(_, e)| e.token == token).map(|(key, _)| *key)
    }

    /// The client's PUBREL, which may arrive on any stream. False: the identifier is unknown.
    pub fn release(&mut self, stream: StreamId, packet_id: u16) -> bool {
        let key = Key::new(stream, packet_id);
        if self.entries.get(&key).is_some_and(|e| e.state.received()) {
            let state = self
                .entries
                .remove(&key)
                .map_or(State::Received, |e| e.state);
            self.keep_marks(packet_id, state);
            self.shrink();
            return true;
        }
        if !self.multi_stream {
            return false;
        }
        // It does not say which of several publishes it means, so all of them stay known until as many
        // PUBRELs have arrived.
        let mut all = of_identifier(&mut self.entries, &mut self.detached, packet_id);
        let Some(one) = all.find(|e| e.state == State::Received) else {
            return false;
        };
        one.state = State::Released;
        let more = all.any(|e| e.state == State::Received);
        drop(all);
        if !more {
            self.forget_released(packet_id);
        }
        true
    }

    /// Whether a PUBREL on another stream can have meant this publish, given that the client now
    /// sends a new message with its identifier.
    fn released_elsewhere(&mut self, key: Key) -> bool {
        if self
            .entries
            .get(&key)
            .is_some_and(|e| e.state == State::Released)
        {
            return true;
        }
        let id = key.0 as u16;
        let mut all = of_identifier(&mut self.entries, &mut self.detached, id);
        let other = all.find(|e| e.state == State::Released);
        // Then the PUBREL did not mean the other publish.
        other.map(|e| e.state = State::Received).is_some()
    }

    /// One of several publishes with the same identifier is removed from state `state`. The PUBRELs
    /// that have arrived count for the remaining ones.
    fn keep_marks(&mut self, packet_id: u16, state: State) {
        if !self.multi_stream || !state.received() {
            return;
        }
        let mut all = of_identifier(&mut self.entries, &mut self.detached, packet_id);
        let mut more = false;
        if let Some(one) = all.find(|e| e.state == State::Received) {
            more = true;
            if state == State::Released {
                one.state = State::Released;
                more = all.any(|e| e.state == State::Received);
            }
        }
        drop(all);
        if !more {
            self.forget_released(packet_id);
        }
    }

    fn forget_released(&mut self, packet_id: u16) {
        let gone = |e: &Entry| e.token.packet_id() == packet_id && e.state == State::Released;
        self.entries.retain(|_, e| !gone(e));
        self.detached.retain(|e| !gone(e));
        self.shrink();
    }

    /// The connection ended, and its data streams with it.
    pub fn connection_ended(&mut self) {
        for entry in self.entries.values_mut() {
            entry.current = false;
        }
        self.detach_where(|key| !key.stream().is_control());
    }

    /// A data stream ended.
    pub fn stream_ended(&mut self, stream: StreamId) {
        self.detach_where(|key| key.stream() == stream);
    }

    fn detach_where(&mut self, which: impl Fn(Key) -> bool) {
        if !self.multi_stream {
            return;
        }
        let keys: Vec<Key> = self.entries.keys().copied().filter(|k| which(*k)).collect();
        for key in keys {
            if let Some(entry) = self.entries.remove(&key) {
                self.answered -= usize::from(matches!(entry.state, State::Answered(..)));
                self.keep_detached(entry);
            }
        }
        self.shrink();
    }

    fn keep_detached(&mut self, entry: Entry) {
        let current = false;
        self.detached.push(Entry { current, ..entry });
        if self.detached.len() > DETACHED_MAX {
            let settled = |e: &Entry| !matches!(e.state, State::Waiting(_));
            if let Some(oldest) = self.detached.iter().position(settled) {
                self.detached.remove(oldest);
            }
        }
    }

    /// The session begins anew. Its publishes that the broker has, or answered while the client was
    /// away, are remembered.
    pub fn restart(&mut self) {
        let mut left: Vec<Entry> = self.entries.drain().map(|(_, e)| e).collect();
        left.append(&mut self.detached);
        left.retain(|e| !e.state.received());
        // With several streams a new message may overtake the copies.
        if !self.progressed || self.multi_stream {
            left.append(&mut self.unclaimed);
        }
        left.truncate(UNCLAIMED_MAX);
        self.unclaimed = left;
        self.waiting = 0;
        self.waiting_qos1 = 0;
        self.answered = 0;
        self.progressed = false;
    }

    /// Whether publishes of ended sessions are still to be recognised.
    pub fn has_unclaimed(&self) -> bool {
        !self.unclaimed.is_empty()
    }

    /// Publishes of ended sessions are not recognised any longer.
    pub fn forget_unclaimed(&mut self) {
        self.unclaimed = Vec::new();
    }

    fn shrink(&mut self) {
        if self.entries.is_empty() && self.entries.capacity() > 16 {
            self.entries = SeededMap::with_hasher(*self.entries.hasher());
        }
    }
}

/// QoS 2 publishes with this identifier that are received and not surely released.
fn of_identifier<'a>(
    entries: &'a mut SeededMap<Key, Entry>,
    detached: &'a mut [Entry],
    packet_id: u16,
) -> impl Iterator<Item = &'a mut Entry> {
    // Those of ended streams first: a live stream can send its own PUBREL.
    let mine = move |e: &&mut Entry| e.token.packet_id() == packet_id && e.state.received();
    detached.iter_mut().chain(entries.values_mut()).filter(mine)
}

/// Publishes of ended data streams that are remembered for one client, beside publishes that wait for
/// the broker.
const DETACHED_MAX: usize = 1000;
/// Publishes of ended sessions that are remembered for one client.
const UNCLAIMED_MAX: usize = 1000;

#[cfg(test)]
mod tests;
