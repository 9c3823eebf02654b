//! What comes from the client: publishes that wait for the core, and QoS 2 identifiers.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::mqtt::{QoS, ReasonCode};

/// Names one publish of one session while the core has it: never reused within the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

impl Token {
    fn new(sequence: u64, packet_id: u16) -> Self {
        Self(sequence << 16 | u64::from(packet_id))
    }

    /// The client's packet identifier.
    pub fn packet_id(self) -> u16 {
        self.0 as u16
    }
}

/// A publish of QoS 1 or 2 as it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The client's packet identifier.
    pub packet_id: u16,
    /// Where it came in.
    pub lane: u8,
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
    lane: u8,
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
}

/// An answer from the core, translated for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The client's packet identifier.
    pub packet_id: u16,
    /// Where the publish came in.
    pub lane: u8,
    /// Its QoS: 1 is answered by PUBACK, 2 by PUBREC.
    pub qos: QoS,
}

/// The receiving half of a session.
#[derive(Debug, Default)]
pub struct Inbound {
    entries: HashMap<u16, Entry, RandomState>,
    /// Left by earlier sessions of a client that starts clean: joined by DUP, identifier, content.
    orphans: Vec<Entry>,
    sequence: u64,
    waiting: usize,
    /// Of the entries, those that the core answered while the client was away.
    answered: usize,
    /// A new message came since the session began: what was to be sent again was.
    progressed: bool,
}

impl Inbound {
    /// Publishes of QoS 1 and 2 that the client may count as unanswered, and QoS 2 not released.
    pub fn open(&self) -> usize {
        self.entries.len() - self.answered
    }

    /// Publishes that wait for the core's answer.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Judges a publish of QoS 1 or 2; at most `open_max` may be open.
    pub fn arrive(&mut self, publish: &Incoming, open_max: usize) -> Arrival {
        let id = publish.packet_id;
        if let Some(entry) = self.entries.get_mut(&id) {
            let same = entry.digest == publish.digest;
            let again = publish.dup || publish.qos == QoS::ExactlyOnce;
            match entry.state {
                State::Waiting(q) if q == publish.qos && same && again => {
                    entry.lane = publish.lane;
                    entry.here = true;
                    return Arrival::Joined;
                }
                State::Answered(q, reason) if q == publish.qos && same && again => {
                    self.settle(id, q, reason);
                    return Arrival::Answered(reason);
                }
                State::Received if publish.qos == QoS::ExactlyOnce => return Arrival::Received,
                // The identifier is used anew: what it meant before is over [MQTT-4.3.2-5].
                _ => self.remove(id),
            }
        } else if publish.dup
            && let Some(index) = self
                .orphans
                .iter()
                .position(|o| o.token.packet_id() == id && o.digest == publish.digest)
        {
            let orphan = self.orphans.swap_remove(index);
            let claimed = Entry {
                lane: publish.lane,
                here: true,
                ..orphan
            };
            match orphan.state {
                State::Waiting(q) if q == publish.qos => {
                    self.waiting += 1;
                    self.entries.insert(id, claimed);
                    return Arrival::Joined;
                }
                State::Answered(q, reason) if q == publish.qos => {
                    if q == QoS::ExactlyOnce && !reason.is_error() {
                        let state = State::Received;
                        self.entries.insert(id, Entry { state, ..claimed });
                    }
                    return Arrival::Answered(reason);
                }
                _ => {}
            }
        }
        if self.open() >= open_max {
            return Arrival::TooMany;
        }
        if !publish.dup {
            self.progress();
        }
        self.sequence += 1;
        let token = Token::new(self.sequence, id);
        self.waiting += 1;
        self.entries.insert(
            id,
            Entry {
                token,
                lane: publish.lane,
                state: State::Waiting(publish.qos),
                digest: publish.digest,
                here: true,
            },
        );
        Arrival::New(token)
    }

    /// The client goes on with new messages: it has sent again what it would.
    fn progress(&mut self) {
        self.progressed = true;
        if self.answered > 0 {
            self.entries
                .retain(|_, e| !matches!(e.state, State::Answered(..)));
            self.answered = 0;
        }
    }

    fn remove(&mut self, id: u16) {
        match self.entries.remove(&id).map(|e| e.state) {
            Some(State::Waiting(_)) => self.waiting -= 1,
            Some(State::Answered(..)) => self.answered -= 1,
            _ => {}
        }
    }

    /// An answer that the client is told now.
    fn settle(&mut self, id: u16, qos: QoS, reason: ReasonCode) {
        if qos == QoS::ExactlyOnce && !reason.is_error() {
            if let Some(entry) = self.entries.get_mut(&id) {
                if matches!(entry.state, State::Answered(..)) {
                    self.answered -= 1;
                }
                entry.state = State::Received;
            }
        } else {
            if let Some(entry) = self.entries.remove(&id)
                && matches!(entry.state, State::Answered(..))
            {
                self.answered -= 1;
            }
            self.shrink();
        }
    }

    /// The core's answer. `None`: nobody is to be told (away, or the identifier means another).
    pub fn answer(&mut self, token: Token, reason: ReasonCode, attached: bool) -> Option<Answer> {
        let packet_id = token.packet_id();
        if let Some(entry) = self.entries.get_mut(&packet_id)
            && entry.token == token
            && let State::Waiting(qos) = entry.state
        {
            self.waiting -= 1;
            let lane = entry.lane;
            if !attached || !entry.here {
                // Told when the client sends its copy, which it has not done on this connection.
                entry.state = State::Answered(qos, reason);
                self.answered += 1;
                return None;
            }
            self.settle(packet_id, qos, reason);
            return Some(Answer {
                packet_id,
                lane,
                qos,
            });
        }
        if let Some(orphan) = self.orphans.iter_mut().find(|o| o.token == token)
            && let State::Waiting(qos) = orphan.state
        {
            orphan.state = State::Answered(qos, reason);
        }
        None
    }

    /// The client's PUBREL. False: the identifier is unknown.
    pub fn release(&mut self, packet_id: u16) -> bool {
        let known = matches!(self.entries.get(&packet_id), Some(e) if e.state == State::Received);
        if known {
            self.entries.remove(&packet_id);
            self.shrink();
        }
        known
    }

    /// The connection is gone.
    pub fn detached(&mut self) {
        for entry in self.entries.values_mut() {
            entry.here = false;
        }
    }

    /// A new session takes the place of this one: only what the core has, or had while the client
    /// was away, is remembered.
    pub fn restart(&mut self) {
        let mut left: Vec<Entry> = self.entries.drain().map(|(_, e)| e).collect();
        left.retain(|e| e.state != State::Received);
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
    pub fn has_orphans(&self) -> bool {
        !self.orphans.is_empty()
    }

    fn shrink(&mut self) {
        if self.entries.is_empty() && self.entries.capacity() > 16 {
            self.entries = HashMap::default();
        }
    }
}

/// Publishes of ended sessions remembered for one client.
const ORPHANS_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(packet_id: u16, dup: bool, qos: QoS, digest: u64) -> Incoming {
        Incoming {
            packet_id,
            lane: 0,
            dup,
            qos,
            digest,
        }
    }

    const ONE: QoS = QoS::AtLeastOnce;
    const TWO: QoS = QoS::ExactlyOnce;
    const OK: ReasonCode = ReasonCode::SUCCESS;

    fn new(inbound: &mut Inbound, id: u16, qos: QoS, digest: u64) -> Token {
        match inbound.arrive(&publish(id, false, qos, digest), 10) {
            Arrival::New(token) => token,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_copy_sent_again_joins_the_first_while_it_waits() {
        let mut inbound = Inbound::default();
        let token = new(&mut inbound, 7, ONE, 1);
        inbound.detached();
        assert_eq!(
            inbound.arrive(&publish(7, true, ONE, 1), 10),
            Arrival::Joined
        );
        assert!(inbound.answer(token, OK, true).is_some());
        assert_eq!(inbound.open(), 0);
    }

    #[test]
    fn an_answer_that_came_before_the_copy_serves_it_and_only_it() {
        for attached in [false, true] {
            let mut inbound = Inbound::default();
            let token = new(&mut inbound, 7, ONE, 1);
            inbound.detached();
            assert_eq!(inbound.answer(token, OK, attached), None);
            let again = inbound.arrive(&publish(7, true, ONE, 1), 10);
            assert_eq!(again, Arrival::Answered(OK));
            // [MQTT-4.3.2-5]: from now on the identifier means a new message.
            let next = inbound.arrive(&publish(7, true, ONE, 1), 10);
            assert!(matches!(next, Arrival::New(_)));
        }
    }

    #[test]
    fn another_message_under_the_same_identifier_is_not_joined() {
        let mut inbound = Inbound::default();
        let first = new(&mut inbound, 1, ONE, 1);
        inbound.detached();
        let second = new(&mut inbound, 1, ONE, 2);
        assert_eq!(inbound.answer(first, OK, true), None);
        assert!(inbound.answer(second, OK, true).is_some());
    }

    #[test]
    fn a_clean_start_joins_only_what_is_marked_and_equal() {
        let mut inbound = Inbound::default();
        let token = new(&mut inbound, 1, ONE, 1);
        inbound.restart();
        let other = inbound.arrive(&publish(1, true, ONE, 2), 10);
        assert!(matches!(other, Arrival::New(_)));
        let mut inbound = Inbound::default();
        let again = new(&mut inbound, 1, ONE, 1);
        assert_eq!(token, again);
        inbound.restart();
        assert_eq!(
            inbound.arrive(&publish(1, true, ONE, 1), 10),
            Arrival::Joined
        );
        assert!(inbound.answer(again, OK, true).is_some());
        let mut inbound = Inbound::default();
        new(&mut inbound, 1, ONE, 1);
        inbound.restart();
        let fresh = inbound.arrive(&publish(1, false, ONE, 1), 10);
        assert!(
            matches!(fresh, Arrival::New(_)),
            "a legal identical message"
        );
    }

    #[test]
    fn what_an_earlier_session_left_does_not_outlive_its_successor_s_progress() {
        let mut inbound = Inbound::default();
        let old = new(&mut inbound, 1, ONE, 1);
        inbound.restart();
        inbound.answer(old, OK, true);
        let other = new(&mut inbound, 2, ONE, 2);
        inbound.answer(other, OK, true);
        inbound.restart();
        let again = inbound.arrive(&publish(1, true, ONE, 1), 10);
        assert!(matches!(again, Arrival::New(_)));
    }

    #[test]
    fn one_past_the_limit_is_refused_and_leaves_nothing() {
        let mut inbound = Inbound::default();
        for id in 1..=10 {
            new(&mut inbound, id, ONE, 0);
        }
        assert_eq!(
            inbound.arrive(&publish(11, false, ONE, 0), 10),
            Arrival::TooMany
        );
        assert_eq!(inbound.open(), 10);
        assert_eq!(inbound.waiting(), 10);
    }

    #[test]
    fn answers_while_away_do_not_count_against_the_client() {
        let mut inbound = Inbound::default();
        let tokens: Vec<Token> = (1..=10).map(|id| new(&mut inbound, id, ONE, 0)).collect();
        inbound.detached();
        for token in tokens {
            inbound.answer(token, OK, false);
        }
        new(&mut inbound, 20, ONE, 0);
        assert_eq!(inbound.open(), 1);
    }

    #[test]
    fn qos_2_is_received_once_until_released() {
        let mut inbound = Inbound::default();
        let token = new(&mut inbound, 3, TWO, 1);
        assert!(inbound.answer(token, OK, true).is_some());
        assert_eq!(
            inbound.arrive(&publish(3, true, TWO, 1), 10),
            Arrival::Received
        );
        assert!(inbound.release(3));
        assert!(!inbound.release(3));
    }
}
