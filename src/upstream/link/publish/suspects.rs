//! Clients whose publishes may have made the broker end the link.
//!
//! A QoS 0 publish has no acknowledgement, so nothing shows which one the broker ended the link for.
//! Once it has ended the link, QoS 0 publishes are watched for a while: they are kept until a PINGREQ
//! behind them is answered. When the link ends again, the clients of the kept publishes are suspects.
//! Each publish of a suspect is tried: sent while nothing else is on its way. If the broker ends the
//! link then, the publish is the reason, and its client's publishes pause.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::mqtt::Message;
use crate::router::{Router, SessionRef};
use crate::telemetry::{DropReason, clean, metrics};
use crate::time::Millis;

/// How long QoS 0 publishes are watched, and clients are remembered, after the link has ended.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Watched publishes that may be on their way.
pub(super) const WATCHED_MAX: usize = 32;
/// The pause of a client after its first publish that ended the link; it doubles with each further
/// one.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Publishes of a suspect that the broker must take before it is trusted again. They double each time
/// that it becomes a suspect.
const TRIALS: u32 = 8;
/// The most of them.
const TRIALS_MAX: u32 = 4096;
/// The time between two trials, which belongs to the other clients.
const TRIAL_PAUSE: Duration = Duration::from_millis(20);
/// How long a trial waits for other publishes to be acknowledged.
const ALONE_WAIT: Duration = Duration::from_secs(1);
/// Clients that are remembered.
pub(super) const CLIENTS_MAX: usize = 1024;

/// A client whose publishes may be the reason.
#[derive(Debug)]
struct Suspect {
    /// Publishes that the broker must take, one at a time; 0: it is trusted again.
    trials_left: u32,
    /// How often it became a suspect.
    suspicions: u32,
    /// How often a publish of it was found to be the reason.
    convictions: u32,
    /// Its publishes pause until then.
    paused_until: Millis,
    /// QoS 0 publishes that waited in the pause are to be dropped.
    paused: bool,
    /// When it was last suspected or found.
    since: Millis,
}

/// The publish that is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trial {
    session: SessionRef,
    /// The packet identifier; `None` at QoS 0.
    id: Option<u16>,
    /// Nothing else is on its way.
    alone: bool,
}

/// What may be sent next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Publishes of clients that are not suspects.
    Others,
    /// Nothing, until answers have arrived.
    Wait,
    /// One publish of a suspect. `alone`: nothing else is on its way.
    Suspect { alone: bool },
}

/// The suspects of one publish link.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    clients: BTreeMap<SessionRef, Suspect>,
    /// QoS 0 publishes are watched until then.
    watched_until: Option<Millis>,
    /// QoS 0 publishes that the broker has perhaps not read.
    unread: VecDeque<(SessionRef, Message)>,
    /// PINGREQs without an answer: how many of `unread` each has behind it.
    pings: VecDeque<usize>,
    trial: Option<Trial>,
    /// The next trial begins then at the earliest.
    next_trial: Millis,
    /// Since when a trial waits for others' publishes to be acknowledged.
    waits_since: Option<Millis>,
}

impl Suspects {
    /// Whether there is nothing to do: the usual state.
    pub(super) fn is_idle(&self) -> bool {
        self.watched_until.is_none() && self.clients.is_empty() && self.trial.is_none()
    }

    /// QoS 0 publishes that may be sent now.
    pub(super) fn room(&self) -> usize {
        match self.watched_until {
            Some(_) => WATCHED_MAX.saturating_sub(self.unread.len()),
            None => usize::MAX,
        }
    }

    /// A QoS 0 publish was sent.
    pub(super) fn sent(&mut self, session: SessionRef, message: &Message) {
        if self.watched_until.is_some() {
            self.unread.push_back((session, message.clone()));
        }
    }

    /// Whether a PINGREQ is to be sent now.
    pub(super) fn wants_ping(&mut self) -> bool {
        let wanted = self.pings.is_empty() && !self.unread.is_empty();
        if wanted {
            self.pings.push_back(self.unread.len());
        }
        wanted
    }

    /// A PINGREQ was answered: the broker has read the publishes before it.
    pub(super) fn ping_answered(&mut self, now: Millis) -> Option<SessionRef> {
        let read = self.pings.pop_front().unwrap_or_default();
        self.unread.drain(..read.min(self.unread.len()));
        match self.trial {
            Some(trial) if trial.id.is_none() && self.unread.is_empty() => self.passed(trial, now),
            _ => None,
        }
    }

    /// The broker has acknowledged a publish. Returns a client that is trusted again.
    pub(super) fn acknowledged(&mut self, id: u16, now: Millis) -> Option<SessionRef> {
        match self.trial {
            Some(trial) if trial.id == Some(id) => self.passed(trial, now),
            _ => None,
        }
    }

    fn passed(&mut self, trial: Trial, now: Millis) -> Option<SessionRef> {
        self.trial = None;
        self.next_trial = now + TRIAL_PAUSE;
        let suspect = self.clients.get_mut(&trial.session)?;
        suspect.trials_left = suspect.trials_left.saturating_sub(1);
        (suspect.trials_left == 0).then_some(trial.session)
    }

    /// Whether a client's publishes may be tried now.
    pub(super) fn is_due(&self, session: SessionRef, now: Millis) -> bool {
        let suspect = self.clients.get(&session);
        suspect.is_none_or(|suspect| suspect.paused_until <= now)
    }

    /// Clients whose pause is over. Their QoS 0 publishes that waited are to be dropped.
    pub(super) fn resumed(&mut self, now: Millis) -> Vec<SessionRef> {
        let paused = |s: &Suspect| s.paused && s.paused_until <= now;
        let over = self.clients.iter_mut().filter(|(_, s)| paused(s));
        over.map(|(session, suspect)| {
            suspect.paused = false;
            *session
        })
        .collect()
    }

    /// Whose turn it is. `waiting`: a suspect has a publish that may be tried; `on_the_way`: publishes
    /// have no acknowledgement.
    pub(super) fn turn(&mut self, waiting: bool, on_the_way: bool, now: Millis) -> Turn {
        if self.trial.is_some() {
            return Turn::Wait;
        }
        if !waiting || now < self.next_trial {
            self.waits_since = None;
            return Turn::Others;
        }
        let alone = !on_the_way && self.unread.is_empty();
        let since = *self.waits_since.get_or_insert(now);
        if !alone && now < since + ALONE_WAIT {
            return Turn::Wait;
        }
        self.waits_since = None;
        Turn::Suspect { alone }
    }

    /// A publish of a suspect was sent.
    pub(super) fn tries(&mut self, session: SessionRef, id: Option<u16>, alone: bool) {
        self.trial = Some(Trial { session, id, alone });
    }

    /// The publish with this packet identifier will not be acknowledged.
    pub(super) fn gives_up(&mut self, id: u16) {
        self.trial = self.trial.filter(|trial| trial.id != Some(id));
    }

    /// Whether the publish with this packet identifier is tried alone.
    pub(super) fn is_tried(&self, id: u16) -> bool {
        self.trial
            .is_some_and(|trial| trial.alone && trial.id == Some(id))
    }

    /// The broker ended the link, and no other. Returns the QoS 0 publish that is the reason, if it
    /// was tried, and the clients that are suspects from now on.
    pub(super) fn link_ended(
        &mut self,
        now: Millis,
    ) -> (Option<(SessionRef, Message)>, Vec<SessionRef>) {
        self.watched_until = Some(now + REMEMBERED);
        let tried = self.trial.is_some_and(|t| t.alone && t.id.is_none());
        if tried && let Some(reason) = self.unread.pop_front() {
            self.convict(reason.0, now);
            return (Some(reason), Vec::new());
        }
        let sessions: Vec<SessionRef> = self.unread.iter().map(|(s, _)| *s).collect();
        let new = sessions.into_iter().filter(|s| self.suspect(*s, now));
        (None, new.collect())
    }

    /// Nothing that was sent on the last connection can be answered any more. `kept`: the publish
    /// with this packet identifier is sent again.
    pub(super) fn connection_ended(&mut self, kept: impl Fn(u16) -> bool) {
        self.unread.clear();
        self.pings.clear();
        self.waits_since = None;
        self.trial = self.trial.filter(|trial| trial.id.is_some_and(kept));
    }

    /// A client becomes a suspect. Returns false if it was one, or if no more are remembered.
    fn suspect(&mut self, session: SessionRef, now: Millis) -> bool {
        if self.clients.len() >= CLIENTS_MAX && !self.clients.contains_key(&session) {
            return false;
        }
        let suspect = self.clients.entry(session).or_insert(Suspect {
            trials_left: 0,
            suspicions: 0,
            convictions: 0,
            paused_until: Millis::ZERO,
            paused: false,
            since: now,
        });
        suspect.since = now;
        if suspect.trials_left > 0 {
            return false;
        }
        suspect.suspicions += 1;
        let doubled = TRIALS.saturating_mul(1 << (suspect.suspicions - 1).min(16));
        suspect.trials_left = doubled.min(TRIALS_MAX);
        true
    }

    /// A publish of a client is the reason. Returns whether the client is a new suspect.
    pub(super) fn convict(&mut self, session: SessionRef, now: Millis) -> bool {
        let new = self.suspect(session, now);
        if let Some(suspect) = self.clients.get_mut(&session) {
            let pause = PAUSE_MIN * (1 << suspect.convictions.min(10));
            suspect.convictions += 1;
            suspect.paused_until = now + pause.min(PAUSE_MAX);
            suspect.paused = true;
            suspect.trials_left = suspect.trials_left.max(TRIALS);
        }
        new
    }

    /// Forgets old suspicions. Returns the clients that were suspects until now.
    pub(super) fn forget(&mut self, now: Millis) -> Vec<SessionRef> {
        if self.unread.is_empty() && self.watched_until.is_some_and(|until| until <= now) {
            self.watched_until = None;
        }
        let mut forgotten = Vec::new();
        let tried = self.trial.map(|trial| trial.session);
        self.clients.retain(|session, suspect| {
            let keep = now < suspect.since + REMEMBERED || tried == Some(*session);
            if !keep {
                forgotten.push(*session);
            }
            keep
        });
        forgotten
    }
}

/// Counts and logs a publish that the broker ended the link for.
pub(super) fn log_quarantined(
    router: &Router,
    link: usize,
    session: SessionRef,
    message: &Message,
) {
    metrics().messages_dropped[DropReason::Quarantined].increment(1);
    let client = router.session_key(session);
    tracing::error!(
        client_id = %clean(client.as_ref().map_or("", |key| key.client_id()), 256),
        topic = %clean(message.topic(), 256),
        payload_bytes = message.payload().len(),
        qos = message.qos() as u8,
        link,
        "A publish was quarantined: the broker closed the connection each time it was sent"
    );
}
