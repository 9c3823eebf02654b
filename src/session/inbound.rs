//! What comes from the client: publishes that wait for the core, and QoS 2 identifiers.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::mqtt::{QoS, ReasonCode};

/// Names one publish of one session while the core has it: never reused within the session.
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

    /// Where it came in first.
    fn key(self) -> Key {
        Key(self.0 as u32 & 0xFF_FFFF)
    }
}

/// A stream and a packet identifier: clients may count identifiers on each stream apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key(u32);

impl Key {
    fn new(stream: u8, packet_id: u16) -> Self {
        Self(u32::from(stream) << 16 | u32::from(packet_id))
    }

    fn stream(self) -> u8 {
        (self.0 >> 16) as u8
    }
}

/// A publish of QoS 1 or 2 as it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The client's packet identifier.
    pub packet_id: u16,
    /// Where it came in.
    pub stream: u8,
    /// DUP.
    pub dup: bool,
    /// 1 or 2.
    pub qos: QoS,
    /// Of topic and payload.
    pub digest: u64,
}

/// What a publish with this identifier means now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// A new message: forward it.
    New(Token),
    /// The first copy still waits for the core: the two are one.
    Joined,
    /// The core answered this one while the client was away: answer it, do not forward it.
    Answered(ReasonCode),
    /// QoS 2, received, not released: PUBREC again [MQTT-4.3.3-10].
    Received,
    /// New, and more than may be open; nothing was kept of it.
    TooMany,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    token: Token,
    stream: u8,
    state: State,
    /// To recognise a copy, also after a clean start.
    digest: u64,
    /// It came, or came again, on the current connection: only then an answer means something.
    here: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// At the core, or on its way there.
    Waiting(QoS),
    /// The core answered, and the client cannot have seen it.
    Answered(QoS, ReasonCode),
    /// PUBREC sent, PUBREL awaited.
    Received,
    /// A PUBREL came that means this one, or another of the same identifier on another stream.
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

/// An answer from the core, translated for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The client's packet identifier.
    pub packet_id: u16,
    /// Where the publish came in.
    pub stream: u8,
    /// Its QoS: 1 is answered by PUBACK, 2 by PUBREC.
    pub qos: QoS,
}

/// The receiving half of a session.
#[derive(Debug, Default)]
pub struct Inbound {
    entries: HashMap<Key, Entry, RandomState>,
    /// Of data streams that are gone, with their connection or before it: known again on any stream
    /// by DUP, identifier and content.
    adrift: Vec<Entry>,
    /// Unsubscribed by earlier sessions of a client that starts clean: joined by DUP, identifier, content.
    orphans: Vec<Entry>,
    sequence: u64,
    waiting: usize,
    /// Of the entries, those that the core answered while the client was away.
    answered: usize,
    /// A new message came since the session began: what was to be sent again was.
    progressed: bool,
    /// The client has published on data streams, which keep no order with each other.
    sided: bool,
}

impl Inbound {
    /// Publishes of QoS 1 and 2 that the client may count as unanswered, and QoS 2 not released.
    pub fn open(&self) -> usize {
        let waits = |e: &&Entry| matches!(e.state, State::Waiting(_));
        let adrift = self.adrift.iter().filter(waits).count();
        self.entries.len() - self.answered + adrift
    }

    /// Publishes that wait for the core's answer.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Something that came on this stream has yet to be answered there.
    pub fn busy(&self, stream: u8) -> bool {
        let waits = |e: &Entry| e.stream == stream && matches!(e.state, State::Waiting(_));
        self.waiting > 0 && self.entries.values().any(waits)
    }

    /// Judges a publish of QoS 1 or 2; at most `open_max` may be open.
    pub fn arrive(&mut self, publish: &Incoming, open_max: usize) -> Arrival {
        self.sided |= publish.stream != 0;
        let key = Key::new(publish.stream, publish.packet_id);
        if let Some(entry) = self.entries.get_mut(&key) {
            let same = entry.digest == publish.digest;
            let again = publish.dup || publish.qos == QoS::ExactlyOnce;
            match entry.state {
                State::Waiting(q) if q == publish.qos && same && again => {
                    entry.here = true;
                    return Arrival::Joined;
                }
                // Over several streams an answer may be older than what goes by its identifier now.
                State::Answered(q, reason)
                    if q == publish.qos && same && (publish.dup || again && !self.sided) =>
                {
                    self.settle(key, q, reason);
                    return Arrival::Answered(reason);
                }
                // Without DUP it may be a new one, behind a PUBREL that came on another stream.
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
            // The identifier is used anew: what it meant before is over [MQTT-4.3.2-5].
            self.remove(key);
        }
        if self.open() >= open_max {
            return Arrival::TooMany;
        }
        if !publish.dup {
            self.progress();
        }
        self.sequence += 1;
        let token = Token::new(self.sequence, key);
        self.waiting += 1;
        self.entries.insert(
            key,
            Entry {
                token,
                stream: publish.stream,
                state: State::Waiting(publish.qos),
                digest: publish.digest,
                here: true,
            },
        );
        Arrival::New(token)
    }

    /// A copy of what came on another stream, that one or its connection being gone, or of what an
    /// ended session left.
    fn again_elsewhere(&mut self, publish: &Incoming, key: Key) -> Option<Arrival> {
        let same = |e: &Entry| {
            e.token.packet_id() == publish.packet_id
                && e.digest == publish.digest
                && e.state.is_of(publish)
        };
        let control = Key::new(0, publish.packet_id);
        let before = |e: &&Entry| key != control && !e.here && same(e);
        let found = if let Some(at) = self.adrift.iter().position(same) {
            self.adrift.swap_remove(at)
        } else if self.entries.get(&control).filter(before).is_some() {
            let entry = self.entries.remove(&control)?;
            self.answered -= usize::from(matches!(entry.state, State::Answered(..)));
            entry
        } else if !self.entries.contains_key(&key) {
            let at = self.orphans.iter().position(same)?;
            let orphan = self.orphans.swap_remove(at);
            self.waiting += usize::from(matches!(orphan.state, State::Waiting(_)));
            orphan
        } else {
            return None;
        };
        self.keep_marks(publish.packet_id, found.state);
        let mut claimed = Entry {
            stream: publish.stream,
            here: true,
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
            self.drift(other);
        }
        Some(arrival)
    }

    /// The client goes on with new messages: it has sent again what it would.
    fn progress(&mut self) {
        self.progressed = true;
        // On one stream those would have come first.
        if self.answered > 0 && !self.sided {
            self.entries
                .retain(|_, e| !matches!(e.state, State::Answered(..)));
            self.answered = 0;
        }
    }

    fn remove(&mut self, key: Key) {
        match self.entries.remove(&key).map(|e| e.state) {
            Some(State::Waiting(_)) => self.waiting -= 1,
            Some(State::Answered(..)) => self.answered -= 1,
            _ => {}
        }
    }

    /// An answer that the client is told now.
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

    /// The core's answer. `None`: nobody is to be told (away, or the identifier means another).
    pub fn answer(&mut self, token: Token, reason: ReasonCode, attached: bool) -> Option<Answer> {
        if let Some(key) = self.find(token)
            && let Some(entry) = self.entries.get_mut(&key)
            && let State::Waiting(qos) = entry.state
        {
            self.waiting -= 1;
            let stream = entry.stream;
            if !attached || !entry.here {
                // Told when the client sends its copy, which it has not done on this connection.
                entry.state = State::Answered(qos, reason);
                self.answered += 1;
                return None;
            }
            self.settle(key, qos, reason);
            return Some(Answer {
                packet_id: token.packet_id(),
                stream,
                qos,
            });
        }
        for (entry, counted) in
            (self.adrift.iter_mut().map(|e| (e, 1))).chain(self.orphans.iter_mut().map(|e| (e, 0)))
        {
            if entry.token == token
                && let State::Waiting(qos) = entry.state
            {
                entry.state = State::Answered(qos, reason);
                self.waiting -= counted;
                break;
            }
        }
        None
    }

    /// Where a publish is: mostly still where it came in.
    fn find(&self, token: Token) -> Option<Key> {
        let key = token.key();
        let at_first = self.entries.get(&key).is_some_and(|e| e.token == token);
        if at_first || !self.sided {
            return at_first.then_some(key);
        }
        let mut all = self.entries.iter();
        all.find(|(_, e)| e.token == token).map(|(key, _)| *key)
    }

    /// The client's PUBREL, which may come on any stream. False: the identifier is unknown.
    pub fn release(&mut self, stream: u8, packet_id: u16) -> bool {
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
        if !self.sided {
            return false;
        }
        // Of several it is not said which: each is known until as many have come.
        let mut all = of_identifier(&mut self.entries, &mut self.adrift, packet_id);
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

    /// Whether a PUBREL that came on another stream can have meant this one: a new message under the
    /// identifier says so.
    fn released_elsewhere(&mut self, key: Key) -> bool {
        if self
            .entries
            .get(&key)
            .is_some_and(|e| e.state == State::Released)
        {
            return true;
        }
        let id = key.0 as u16;
        let mut all = of_identifier(&mut self.entries, &mut self.adrift, id);
        let other = all.find(|e| e.state == State::Released);
        // Then it did not mean the other.
        other.map(|e| e.state = State::Received).is_some()
    }

    /// One of several with the same identifier is gone in state `state`: the PUBRELs that came count
    /// for those that are left.
    fn keep_marks(&mut self, packet_id: u16, state: State) {
        if !self.sided || !state.received() {
            return;
        }
        let mut all = of_identifier(&mut self.entries, &mut self.adrift, packet_id);
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
        self.adrift.retain(|e| !gone(e));
        self.shrink();
    }

    /// The connection is gone, and with it what its data streams were.
    pub fn detached(&mut self) {
        for entry in self.entries.values_mut() {
            entry.here = false;
        }
        self.set_adrift(|key| key.stream() != 0);
    }

    /// A data stream is gone.
    pub fn stream_ended(&mut self, stream: u8) {
        self.set_adrift(|key| key.stream() == stream);
    }

    fn set_adrift(&mut self, which: impl Fn(Key) -> bool) {
        if !self.sided {
            return;
        }
        let keys: Vec<Key> = self.entries.keys().copied().filter(|k| which(*k)).collect();
        for key in keys {
            if let Some(entry) = self.entries.remove(&key) {
                self.answered -= usize::from(matches!(entry.state, State::Answered(..)));
                self.drift(entry);
            }
        }
        self.shrink();
    }

    fn drift(&mut self, entry: Entry) {
        let here = false;
        self.adrift.push(Entry { here, ..entry });
        if self.adrift.len() > ADRIFT_MAX {
            let settled = |e: &Entry| !matches!(e.state, State::Waiting(_));
            if let Some(oldest) = self.adrift.iter().position(settled) {
                self.adrift.remove(oldest);
            }
        }
    }

    /// A new session takes the place of this one: only what the core has, or had while the client
    /// was away, is remembered.
    pub fn restart(&mut self) {
        let mut left: Vec<Entry> = self.entries.drain().map(|(_, e)| e).collect();
        left.append(&mut self.adrift);
        left.retain(|e| !e.state.received());
        if !self.progressed {
            left.append(&mut self.orphans);
        }
        left.truncate(ORPHANS_MAX);
        self.orphans = left;
        self.waiting = 0;
        self.answered = 0;
        self.progressed = false;
    }

    /// Something of an ended session is still worth recognising.
    pub fn has_unclaimed(&self) -> bool {
        !self.orphans.is_empty()
    }

    fn shrink(&mut self) {
        if self.entries.is_empty() && self.entries.capacity() > 16 {
            self.entries = HashMap::default();
        }
    }
}

/// QoS 2 publishes with an identifier that were received and are not released for sure.
fn of_identifier<'a>(
    entries: &'a mut HashMap<Key, Entry, RandomState>,
    adrift: &'a mut [Entry],
    packet_id: u16,
) -> impl Iterator<Item = &'a mut Entry> {
    // What is left of gone streams first: those that live can say it themselves.
    let mine = move |e: &&mut Entry| e.token.packet_id() == packet_id && e.state.received();
    adrift.iter_mut().chain(entries.values_mut()).filter(mine)
}

/// Publishes of gone data streams remembered for one client, beside those that the core has.
const ADRIFT_MAX: usize = 1000;
/// Publishes of ended sessions remembered for one client.
const ORPHANS_MAX: usize = 1000;

#[cfg(test)]
mod tests;
