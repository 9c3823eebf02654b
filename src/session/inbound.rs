//! What comes from the client: publishes that wait for the core, and QoS 2 identifiers.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::mqtt::{Message, QoS, ReasonCode};

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
}

#[derive(Debug)]
struct Entry {
    token: Token,
    lane: u8,
    state: State,
    /// To recognise a re-sent publish after a clean start.
    message: Option<Message>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// At the core, or on its way there.
    Waiting(QoS),
    /// The core answered while the client was away; it cannot have seen it.
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
    /// Left by an earlier session of a client that starts clean: joined by DUP, identifier and content.
    orphans: Vec<Entry>,
    sequence: u64,
    waiting: usize,
}

impl Inbound {
    /// Publishes of QoS 1 and 2 not yet answered, and QoS 2 not yet released.
    pub fn open(&self) -> usize {
        self.entries.len()
    }

    /// Publishes that wait for the core's answer.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Judges a publish of QoS 1 or 2.
    pub fn arrive(
        &mut self,
        packet_id: u16,
        lane: u8,
        dup: bool,
        same_as: impl Fn(&Message) -> bool,
        qos: QoS,
    ) -> Arrival {
        if let Some(entry) = self.entries.get_mut(&packet_id) {
            match entry.state {
                State::Waiting(q) if q == qos => {
                    entry.lane = lane;
                    return Arrival::Joined;
                }
                State::Answered(q, reason) if dup && q == qos => {
                    self.answered(packet_id, q, reason);
                    return Arrival::Answered(reason);
                }
                State::Received if qos == QoS::ExactlyOnce => return Arrival::Received,
                _ => {
                    // The identifier is used anew: what it meant before is over.
                    if matches!(entry.state, State::Waiting(_)) {
                        self.waiting -= 1;
                    }
                    self.entries.remove(&packet_id);
                }
            }
        } else if dup
            && let Some(index) = self.orphans.iter().position(|o| {
                o.token.packet_id() == packet_id && o.message.as_ref().is_some_and(&same_as)
            })
        {
            let mut orphan = self.orphans.swap_remove(index);
            orphan.lane = lane;
            let state = orphan.state;
            match state {
                State::Waiting(q) if q == qos => {
                    self.waiting += 1;
                    self.entries.insert(packet_id, orphan);
                    return Arrival::Joined;
                }
                State::Answered(q, reason) if q == qos => {
                    self.entries.insert(packet_id, orphan);
                    self.answered(packet_id, q, reason);
                    return Arrival::Answered(reason);
                }
                _ => {}
            }
        }
        if !dup {
            // The client goes on with new messages: it has sent again what it would.
            self.entries
                .retain(|_, e| !matches!(e.state, State::Answered(..)));
        }
        self.sequence += 1;
        let token = Token::new(self.sequence, packet_id);
        self.waiting += 1;
        self.entries.insert(
            packet_id,
            Entry {
                token,
                lane,
                state: State::Waiting(qos),
                message: None,
            },
        );
        Arrival::New(token)
    }

    fn answered(&mut self, packet_id: u16, qos: QoS, reason: ReasonCode) {
        if qos == QoS::ExactlyOnce && !reason.is_error() {
            if let Some(entry) = self.entries.get_mut(&packet_id) {
                entry.state = State::Received;
                entry.message = None;
            }
        } else {
            self.entries.remove(&packet_id);
            self.shrink();
        }
    }

    /// Keeps the message of a forwarded publish until it is answered.
    pub fn keep(&mut self, token: Token, message: &Message) {
        if let Some(entry) = self.entries.get_mut(&token.packet_id())
            && entry.token == token
        {
            entry.message = Some(message.clone());
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
            if !attached {
                entry.state = State::Answered(qos, reason);
                return None;
            }
            self.answered(packet_id, qos, reason);
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

    /// A new session takes the place of this one: only what the core still has is remembered.
    pub fn restart(&mut self) {
        let mut left: Vec<Entry> = self.entries.drain().map(|(_, e)| e).collect();
        left.retain(|e| e.state != State::Received);
        left.append(&mut self.orphans);
        left.truncate(ORPHANS_MAX);
        self.orphans = left;
        self.waiting = 0;
    }

    /// Something of an ended session is still worth recognising.
    pub fn has_orphans(&self) -> bool {
        !self.orphans.is_empty()
    }

    /// Forgets what ended sessions left.
    pub fn forget_orphans(&mut self) {
        self.orphans = Vec::new();
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
    use crate::mqtt::{MessageSpec, Properties};

    fn message(payload: &[u8]) -> Message {
        Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload,
            qos: QoS::AtLeastOnce,
            retain: false,
            expires_at: u64::MAX,
            strip_key: None,
            account: None,
        })
    }

    fn new(inbound: &mut Inbound, id: u16, qos: QoS) -> Token {
        match inbound.arrive(id, 0, false, |_| false, qos) {
            Arrival::New(token) => token,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_copy_sent_again_joins_the_first_while_it_waits() {
        let mut inbound = Inbound::default();
        let token = new(&mut inbound, 7, QoS::AtLeastOnce);
        let again = inbound.arrive(7, 0, true, |_| false, QoS::AtLeastOnce);
        assert_eq!(again, Arrival::Joined);
        assert!(inbound.answer(token, ReasonCode::SUCCESS, true).is_some());
        assert_eq!(inbound.open(), 0);
    }

    #[test]
    fn an_answer_that_came_while_away_serves_the_copy_and_only_it() {
        let mut inbound = Inbound::default();
        let token = new(&mut inbound, 7, QoS::AtLeastOnce);
        assert_eq!(inbound.answer(token, ReasonCode::SUCCESS, false), None);
        let again = inbound.arrive(7, 0, true, |_| false, QoS::AtLeastOnce);
        assert_eq!(again, Arrival::Answered(ReasonCode::SUCCESS));
        // [MQTT-4.3.2-5]: from now on the identifier means a new message.
        let next = inbound.arrive(7, 0, true, |_| true, QoS::AtLeastOnce);
        assert!(matches!(next, Arrival::New(_)));
    }

    #[test]
    fn a_clean_start_joins_only_what_is_marked_and_equal() {
        let mut inbound = Inbound::default();
        let first = message(b"on");
        let token = new(&mut inbound, 1, QoS::AtLeastOnce);
        inbound.keep(token, &first);
        inbound.restart();
        let fresh = inbound.arrive(1, 0, false, |m| m.payload() == b"on", QoS::AtLeastOnce);
        assert!(
            matches!(fresh, Arrival::New(_)),
            "a legal identical message"
        );
        let mut inbound = Inbound::default();
        let token = new(&mut inbound, 1, QoS::AtLeastOnce);
        inbound.keep(token, &first);
        inbound.restart();
        let other = inbound.arrive(1, 0, true, |m| m.payload() == b"off", QoS::AtLeastOnce);
        assert!(matches!(other, Arrival::New(_)));
        inbound.restart();
        let same = inbound.arrive(1, 0, true, |m| m.payload() == b"on", QoS::AtLeastOnce);
        assert_eq!(same, Arrival::Joined);
        let answer = inbound.answer(token, ReasonCode::SUCCESS, true);
        assert_eq!(answer.map(|a| a.packet_id), Some(1));
    }

    #[test]
    fn qos_2_is_received_once_until_released() {
        let mut inbound = Inbound::default();
        let token = new(&mut inbound, 3, QoS::ExactlyOnce);
        assert!(inbound.answer(token, ReasonCode::SUCCESS, true).is_some());
        let again = inbound.arrive(3, 0, true, |_| false, QoS::ExactlyOnce);
        assert_eq!(again, Arrival::Received);
        assert!(inbound.release(3));
        assert!(!inbound.release(3));
    }
}
