//! The oracle's half for what clients publish: forwarded once, in order, never swallowed; wills
//! once or not at all.

use std::collections::BTreeMap;
use std::time::Duration;

use tidegate::mqtt::{Publish, QoS, ReasonCode};
use tidegate::time::Millis;

use crate::oracle::{Checked, key};
use tidegate::streams::StreamId;

/// How long an ended session's publishes are recognised; a little less.
const REMEMBERED: Duration = Duration::from_secs(115);

struct Logical {
    key: String,
    qos: QoS,
    acknowledged: bool,
    /// The stream whose order it keeps; `None`: it was sent again, perhaps on another.
    stream: Option<StreamId>,
    /// Answered with a refusal, or to be refused by the broker, which 3.x does not say.
    refused: bool,
}

#[derive(Clone, Copy)]
struct Track {
    logical: usize,
    answered: bool,
    /// Where it came in last.
    stream: StreamId,
    /// PUBREL came: the identifier is free [MQTT-4.3.3-12].
    released: bool,
    session: u64,
    /// When that session ended, if it has.
    ended_at: Option<Millis>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum WillState {
    /// Its client is connected.
    Armed,
    Due(Millis),
    Cancelled,
    Fired,
}

struct Will {
    key: String,
    delay: u32,
    qos: QoS,
    state: WillState,
}

#[derive(Default)]
struct Publisher {
    published: Vec<Logical>,
    track: BTreeMap<u16, Track>,
    session: u64,
    will: Option<usize>,
    /// The latest of its unique messages that went to the broker, for each stream.
    last: BTreeMap<StreamId, u64>,
}

#[derive(Default)]
struct Count {
    forwarded: usize,
    allowed: usize,
}

pub(crate) struct Inbound {
    publishers: Vec<Publisher>,
    counts: BTreeMap<String, Count>,
    by_key: BTreeMap<String, (usize, Millis)>,
    wills: Vec<Will>,
    pub broker_was_away: bool,
    /// The budget of publishes is so small that wills are lost by it.
    pub tight: bool,
}

impl Inbound {
    pub(crate) fn new(devices: usize) -> Self {
        Self {
            publishers: (0..devices).map(|_| Publisher::default()).collect(),
            counts: BTreeMap::new(),
            by_key: BTreeMap::new(),
            wills: Vec::new(),
            broker_was_away: false,
            tight: false,
        }
    }

    /// Who published a message, and when the router took it.
    pub(crate) fn publisher(&self, key: &str) -> Option<(usize, Millis)> {
        self.by_key.get(key).copied()
    }

    /// How often the broker got a message. A message of the broker's other clients counts once.
    pub(crate) fn forwards(&self, key: &str) -> usize {
        self.counts.get(key).map_or(1, |c| c.forwarded)
    }

    pub(crate) fn connected(&mut self, device: usize, will: Option<(String, u32, QoS)>) {
        let p = &mut self.publishers[device];
        p.will = None;
        if let Some((key, delay, qos)) = will {
            p.will = Some(self.wills.len());
            self.wills.push(Will {
                key,
                delay,
                qos,
                state: WillState::Armed,
            });
        }
    }

    /// The session goes on with a new connection: its will is cancelled [MQTT-3.1.3-9], unless it has
    /// no delay and the connection before was taken over (§3.1.2.5).
    pub(crate) fn resumed(&mut self, device: usize, now: Millis) {
        let Some(at) = self.publishers[device].will else {
            return;
        };
        let will = &mut self.wills[at];
        will.state = match will.state {
            WillState::Armed if will.delay == 0 => WillState::Due(now),
            WillState::Armed => WillState::Cancelled,
            WillState::Due(due) if due > now => WillState::Cancelled,
            ref other => other.clone(),
        };
        if let WillState::Due(due) = will.state {
            self.by_key.insert(will.key.clone(), (device, due));
        }
    }

    /// The connection ended; the session ends `expiry` seconds later.
    pub(crate) fn closed(&mut self, device: usize, normal: bool, expiry: u32, now: Millis) {
        if let Some(at) = self.publishers[device].will {
            let will = &mut self.wills[at];
            if will.state == WillState::Armed {
                will.state = match normal {
                    true => WillState::Cancelled,
                    false => {
                        WillState::Due(now + Duration::from_secs(will.delay.min(expiry).into()))
                    }
                };
                // It is its client's own, for No Local.
                if let WillState::Due(due) = will.state {
                    self.by_key.insert(will.key.clone(), (device, due));
                }
            }
        }
    }

    /// The session is over: its will is due now at the latest.
    pub(crate) fn ended(&mut self, device: usize, now: Millis) {
        let p = &mut self.publishers[device];
        let session = p.session;
        let of_it = p.track.values_mut().filter(|t| t.session == session);
        of_it.for_each(|t| t.ended_at = Some(now));
        p.session += 1;
        if let Some(at) = p.will.take() {
            let will = &mut self.wills[at];
            will.state = match will.state {
                WillState::Armed => WillState::Due(now),
                WillState::Due(due) => WillState::Due(due.min(now)),
                ref other => other.clone(),
            };
            if let WillState::Due(due) = will.state {
                self.by_key.insert(will.key.clone(), (device, due));
            }
        }
    }

    /// Answers may have been written that nobody saw.
    pub(crate) fn answers_lost(&mut self, device: usize) {
        for track in self.publishers[device].track.values_mut() {
            track.answered = true;
        }
    }

    /// The session takes a PUBLISH.
    pub(crate) fn publish(
        &mut self,
        device: usize,
        stream: StreamId,
        topic: &str,
        publish: &Publish<'_>,
        now: Millis,
    ) {
        let key = key(publish.payload);
        let p = &mut self.publishers[device];
        let id = publish.packet_id;
        if publish.qos > QoS::AtMostOnce
            && publish.dup
            && let Some(track) = p.track.get_mut(&id)
            && !track.released
            && p.published[track.logical].key == key
            && p.published[track.logical].qos == publish.qos
        {
            // A copy of one that was seen. It may be forwarded again only where the protocol
            // makes it a new one [MQTT-4.3.2-5], or where nobody remembers the first.
            let other_session = track.session != p.session;
            // Or it is another of the identical ones, whose first copy was lost.
            let another = key.starts_with("same");
            let long_ago = track.ended_at.is_some_and(|at| now > at + REMEMBERED);
            let forgotten = other_session && (another || long_ago);
            let refused = p.published[track.logical].refused;
            let free = publish.qos == QoS::AtLeastOnce || other_session || refused;
            let new = track.answered && free;
            if track.stream != stream {
                p.published[track.logical].stream = None;
            }
            track.stream = stream;
            track.session = p.session;
            track.ended_at = None;
            if forgotten || new {
                track.answered = false;
                self.counts.entry(key).or_default().allowed += 1;
            }
            return;
        }
        let count = self.counts.entry(key.clone()).or_default();
        count.allowed += 1;
        let refused = topic.starts_with("deny/") || topic.starts_with("d/e/e/p/");
        if refused {
            count.allowed = 0;
        }
        self.by_key.insert(key.clone(), (device, now));
        p.published.push(Logical {
            key,
            qos: publish.qos,
            acknowledged: false,
            // One that was lost with its stream, or with a connection, comes late.
            stream: (!publish.dup).then_some(stream),
            refused: refused || topic.starts_with("refused/"),
        });
        if publish.qos > QoS::AtMostOnce {
            let track = Track {
                logical: p.published.len() - 1,
                answered: false,
                stream,
                released: false,
                session: p.session,
                ended_at: None,
            };
            p.track.insert(id, track);
        }
    }

    /// PUBREL came.
    pub(crate) fn released(&mut self, device: usize, id: u16) {
        if let Some(track) = self.publishers[device].track.get_mut(&id) {
            track.released = true;
        }
    }

    /// PUBACK or PUBREC was written.
    pub(crate) fn answered(
        &mut self,
        device: usize,
        stream: StreamId,
        id: u16,
        qos: QoS,
        reason: ReasonCode,
    ) -> Checked {
        let p = &mut self.publishers[device];
        let Some(track) = p.track.get_mut(&id) else {
            return Err("it answers nothing [MQTT-2.2.1-5]".into());
        };
        track.answered = true;
        if track.stream != stream {
            let on = track.stream;
            return Err(format!("it answers on stream {stream} what came on {on}"));
        }
        let logical = &mut p.published[track.logical];
        if logical.qos != qos {
            return Err(format!(
                "it answers a publish of {:?} [MQTT-3.3.4-1]",
                logical.qos
            ));
        }
        if reason.is_error() {
            logical.refused = true;
        } else {
            logical.acknowledged = true;
        }
        Ok(())
    }

    /// The broker got a publish. `refused`: it will not route it.
    pub(crate) fn forwarded(&mut self, payload: &[u8], qos: QoS, now: Millis) -> Checked {
        let key = key(payload);
        if let Some(will) = self.wills.iter_mut().find(|w| w.key == key) {
            let before = std::mem::replace(&mut will.state, WillState::Fired);
            return match before {
                WillState::Due(at) if at <= now => Ok(()),
                other => Err(format!(
                    "will {key} is published, but it is {other:?} (I16)"
                )),
            };
        }
        let count = self.counts.entry(key.clone()).or_default();
        count.forwarded += 1;
        if count.forwarded > count.allowed {
            return Err(format!(
                "{key} went to the broker {} times, {} are right [MQTT-4.3.3-10]",
                count.forwarded, count.allowed
            ));
        }
        // d<device>.<number>
        let Some((device, number)) = key.strip_prefix('d').and_then(|k| k.split_once('.')) else {
            return Ok(());
        };
        let device: usize = device.parse().map_err(|_| "a foreign payload")?;
        let number: u64 = number.parse().map_err(|_| "a foreign payload")?;
        let p = &mut self.publishers[device];
        let sent = p.published.iter().find(|l| l.key == key);
        if sent.is_none_or(|l| l.qos != qos) {
            return Err(format!("{key} has {qos:?} at the broker"));
        }
        // One that was refused for want of room, and is sent again, comes late.
        let stream = sent.filter(|l| !l.refused).and_then(|l| l.stream);
        if count.forwarded == 1
            && let Some(stream) = stream
        {
            let last = p.last.entry(stream).or_default();
            if number <= *last {
                return Err(format!("{key} after {last}: out of order (I19)"));
            }
            *last = number.max(*last);
        }
        Ok(())
    }

    /// At rest: acknowledged publishes are at the broker.
    pub(crate) fn settled(&self) -> Checked {
        let mut acknowledged: BTreeMap<&str, usize> = BTreeMap::new();
        for l in self.publishers.iter().flat_map(|p| &p.published) {
            if l.acknowledged && !l.refused {
                *acknowledged.entry(&l.key).or_default() += 1;
            }
        }
        for (key, acknowledged) in acknowledged {
            let forwarded = self.counts.get(key).map_or(0, |c| c.forwarded);
            if forwarded < acknowledged {
                return Err(format!(
                    "{acknowledged} of {key} were acknowledged, the broker has {forwarded} (I7)"
                ));
            }
        }
        Ok(())
    }

    /// At the very end: no will is left.
    pub(crate) fn wills_settled(&self, now: Millis) -> Checked {
        for will in &self.wills {
            if let WillState::Due(at) = will.state
                && at <= now
                && !self.tight
                && !(will.qos == QoS::AtMostOnce && self.broker_was_away)
            {
                return Err(format!(
                    "will {} was due at {at} and never published (I16)",
                    will.key
                ));
            }
        }
        Ok(())
    }
}
