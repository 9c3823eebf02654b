//! The wills of clients: when each is due, and which of them a crash may leave on the disk.

use super::*;
use crate::sim::kept::is_written;
use crate::sim::store::GRACE;

/// A will.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SimWill {
    pub(crate) number: u32,
    pub(crate) topic: &'static str,
    pub(crate) qos: QoS,
    pub(crate) delay: Duration,
    /// When it is published, once the connection was cut.
    pub(crate) due: Option<Millis>,
}

/// The wills of a client.
#[derive(Debug, Default)]
pub(crate) struct Wills {
    /// The will of the connection, or of the one that was cut.
    pub(crate) current: Option<SimWill>,
    /// When its CONNECT was sent.
    sent_at: Millis,
    /// The client was told that the disk has it.
    on_disk: bool,
    /// The process has it from the disk, and its client has not been back.
    restored: bool,
    /// Wills that are over, and that the disk may still have.
    old: Vec<OldWill>,
    /// All wills that the client ever had.
    all: Vec<SimWill>,
}

/// A will that the disk may still have.
#[derive(Clone, Copy, Debug)]
struct OldWill {
    will: SimWill,
    /// When it was discarded, replaced or published. `None`: an earlier process knew.
    over_at: Option<Millis>,
}

impl Wills {
    /// The disk has the current will, and no other one.
    pub(crate) fn proven(&mut self) {
        self.old.clear();
        self.on_disk = true;
    }

    fn is_over(&mut self, will: SimWill, now: Millis) {
        self.old.push(OldWill {
            will,
            over_at: Some(now),
        });
    }

    /// The client has sent DISCONNECT.
    pub(crate) fn discard(&mut self, now: Millis) {
        if let Some(will) = self.current.take() {
            self.is_over(will, now);
        }
    }
}

impl World {
    /// Tells the oracle of the wills that are due.
    pub(crate) fn publish_due_wills(&mut self) {
        for n in 0..self.devices.len() {
            let will = self.devices[n].wills.current;
            let due = will.filter(|w| w.due.is_some_and(|due| due <= self.now));
            if let Some(will) = due {
                self.devices[n].wills.discard(self.now);
                trace!(
                    self,
                    "the will {} of {n} on {} is due", will.number, will.topic
                );
                self.oracle
                    .will_published(n, will.number, will.topic, will.qos, self.now);
            }
        }
    }

    pub(crate) fn new_will(&mut self, n: usize) -> Option<SimWill> {
        if !self.rng.chance(40) {
            return None;
        }
        self.number += 1;
        let delay = Duration::from_secs(self.rng.pick(&[0, 1]));
        Some(SimWill {
            number: self.number,
            topic: self.rng.pick(&TOPICS),
            qos: self.rng.pick(&[QoS::AtLeastOnce, QoS::ExactlyOnce]),
            delay: if self.devices[n].version == Version::V5 {
                delay
            } else {
                Duration::ZERO
            },
            due: None,
        })
    }

    /// A CONNECT takes effect: it cancels the will that waits, or publishes it where it ends the session.
    /// `resumes`: whether the session goes on, if that is known.
    pub(crate) fn set_will(&mut self, n: usize, will: Option<SimWill>, resumes: Option<bool>) {
        let now = self.now;
        let wills = &mut self.devices[n].wills;
        for old in &mut wills.old {
            old.over_at.get_or_insert(now);
        }
        if let Some(waiting) = wills.current.take() {
            wills.is_over(waiting, now);
            let at_the_same_time = waiting.due.is_some_and(|due| due <= now + STEP);
            let ends = resumes == Some(false);
            if at_the_same_time || resumes.is_none() || ends && wills.restored {
                self.oracle.will_may_come(n, &waiting, now);
            } else if ends {
                trace!(self, "the will {} of {n} is published", waiting.number);
                self.oracle
                    .will_published(n, waiting.number, waiting.topic, waiting.qos, now);
            }
        }
        let wills = &mut self.devices[n].wills;
        wills.current = will;
        wills.all.extend(will);
        wills.sent_at = now;
        wills.on_disk = false;
        wills.restored = false;
    }

    /// A crash leaves the wills that are on the disk, which are published a while after `back`, when the node
    /// starts again. `durable_since`: the disk has had everything but the latest changes since then.
    pub(crate) fn keep_wills(&mut self, n: usize, durable_since: Option<Millis>, back: Millis) {
        let now = self.now;
        let is_written = |at| durable_since.is_some_and(|since| is_written(at, since, now));
        let wills = &mut self.devices[n].wills;
        wills.old.retain(|old| !old.over_at.is_some_and(is_written));
        let mut current = wills.current.take();
        if durable_since.is_none() {
            let all = wills.all.iter();
            let old = all.map(|will| OldWill {
                will: *will,
                over_at: None,
            });
            wills.old = old.collect();
            current = None;
        }
        let on_disk = wills.on_disk || is_written(wills.sent_at);
        if let Some(will) = &mut current {
            // The wills of several sessions follow each other by a millisecond.
            will.due = Some(back + GRACE + STEP);
            if on_disk && wills.old.is_empty() {
                wills.current = current;
                wills.on_disk = true;
            } else {
                wills.is_over(*will, now);
            }
        }
        wills.restored = true;
        for old in &mut wills.old {
            old.over_at = None;
        }
        for old in wills.old.clone() {
            self.oracle.will_may_come(n, &old.will, back);
        }
        trace!(
            self,
            "wills of {n} on the disk: {:?}", self.devices[n].wills
        );
    }
}
