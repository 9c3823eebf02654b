//! What happens to devices by chance.

use std::time::Duration;

use tidegate::mqtt::{ReasonCode, SubscribeOptions, Version};

use crate::broker::Copy;
use crate::device::{Outgoing, WillSpec};
use crate::edge::{Edge, QOS};
use crate::pipe::Pipe;
use crate::world::{Link, World, trace};
use tidegate::time::{Deadline, Millis};

pub(crate) const FILTERS: [&str; 12] = [
    "a/b", "a/+", "a/#", "+/b", "#", "b", "b/+", "c/d/e", "c/#", "r/#", "r/1", "no/x",
];
/// No two of these filters match one topic.
pub(crate) const DISJOINT: [&str; 5] = ["a/b", "a/c", "b", "c/#", "r/#"];
const TOPICS: [&str; 7] = ["a/b", "a/c", "b", "b/b", "c/d/e", "c", "a"];
const TOO_DEEP: &str = "d/e/e/p/d/e/e/p/d/e/e/p/d/e/e/p/t";
const RETAINED: [&str; 3] = ["r/1", "r/2", "r/3"];

impl World {
    pub(crate) fn act(&mut self, n: usize) {
        if self.together && self.rng.chance(3) {
            self.cut_most();
        }
        let what = self.rng.below(100);
        let connected = self.devices[n].connected;
        match what {
            0..30 if connected => self.publish(n),
            0..30 if self.now >= self.away_until => self.connect(n),
            0..30 => self.publish_elsewhere(),
            30..45 => self.publish_elsewhere(),
            45..63 if connected => self.subscribe(n),
            63..70 if connected => {
                let count = self.rng.between(1, 2);
                let filters: Vec<&str> = (0..count).map(|_| self.rng.pick(self.filters)).collect();
                trace!(self, "{n} unsubscribes {filters:?}");
                let stream = self.devices[n].any_stream(&mut self.rng);
                self.devices[n].unsubscribe(&filters, stream);
            }
            70..78 => self.cut(n),
            78..82 if self.now >= self.away_until => {
                trace!(self, "{n} comes again");
                self.connect(n);
            }
            82..85 if connected => self.leave(n),
            85..88 => {
                if let Some(link) = self.devices[n].link.and_then(|l| self.links.get_mut(&l)) {
                    link.stalled = !link.stalled;
                }
            }
            88..90 if !self.broker.away => {
                let time = self
                    .rng
                    .pick(&[200, 3000, 15_000].map(Duration::from_millis));
                trace!(self, "the broker is away for {time:?}");
                self.broker.away = true;
                self.oracle.gone(self.now);
                self.oracle.inbound.broker_was_away = true;
                self.publish_links_up(false);
                self.broker.lose_pings();
                self.lose_fetches();
                self.broker_back_at = self.now + time;
            }
            90..91 if !self.broker.away && !self.broker.unlinked => {
                let kept = self.rng.chance(70);
                let time = self.rng.pick(&[0, 500, 5000].map(Duration::from_millis));
                trace!(
                    self,
                    "the data link is lost for {time:?}, session kept {kept}"
                );
                self.broker.lose_link(kept);
                self.router.data_link_down(0, self.now);
                self.oracle.gone(self.now);
                if !kept {
                    self.oracle.forgotten();
                }
                self.relinked_at = self.now + time;
                self.kept = kept;
            }
            91..93 if !self.broker.away => self.add_publish_link(),
            94..97 if connected => self.change_stream(n),
            93..94 if connected => {
                self.flush(n, true);
                if let Some(link) = self.devices[n].link.and_then(|l| self.links.get_mut(&l))
                    && link.up.stop()
                {
                    trace!(self, "{n} stops in the middle of a packet");
                }
            }
            _ => {}
        }
    }

    /// Most devices go away for a while, so that messages arrive for an audience that is away.
    fn cut_most(&mut self) {
        for n in 0..self.devices.len() {
            if self.rng.chance(80) {
                self.cut(n);
            }
        }
        let time = [500, 5000, 30_000].map(Duration::from_millis);
        self.away_until = self.now + self.rng.pick(&time);
    }

    /// A device ends, resets, leaves unread or reads one of its data streams.
    fn change_stream(&mut self, n: usize) {
        let Some(stream) = self.devices[n].open_stream(&mut self.rng) else {
            return;
        };
        self.flush(n, true);
        let device = &mut self.devices[n];
        let Some(link) = device.link.and_then(|l| self.links.get_mut(&l)) else {
            return;
        };
        let side = link.sides.entry(stream).or_default();
        match self.rng.below(3) {
            0 if device.end_stream(stream) => {
                trace!(self, "{n} ends stream {stream}");
                side.ended = Some(false);
            }
            1 => {
                trace!(self, "{n} resets stream {stream}");
                device.reset_stream(stream);
                side.up = Pipe::default();
                side.down = Pipe::default();
                side.reset_at = Some(self.now + Duration::from_millis(self.rng.below(300)));
            }
            _ => {
                side.stalled = !side.stalled;
                trace!(self, "{n} leaves stream {stream} unread: {}", side.stalled);
            }
        }
    }

    /// The router gets another publish link, if it may: clients move to it when nothing of theirs is
    /// on the way.
    fn add_publish_link(&mut self) {
        if self.router.add_publish_link() {
            trace!(self, "there is another publish link");
            self.router
                .publish_link_up(self.publish_links, true, self.now);
            self.publish_links += 1;
        }
    }

    pub(crate) fn connect(&mut self, n: usize) {
        if let Some(old) = self.devices[n].link {
            // The server's end of the old one hears nothing, or late.
            let late = self.rng.pick(&[0, 50, 100_000].map(Duration::from_millis));
            self.abandon(old, late);
        }
        let clean = self.devices[n].profile.clean != self.rng.chance(8);
        self.next_link += 1;
        let link = self.next_link;
        let will = self.rng.chance(40).then(|| WillSpec {
            topic: "will/t".into(),
            payload: format!("w{n}.{link}:").into_bytes(),
            qos: self.rng.pick(&QOS),
            delay: self.rng.pick(&[0, 1, 5, 100]),
        });
        trace!(self, "{n} connects, link {link}, clean {clean}, {will:?}");
        self.devices[n].connect(link, clean, will.as_ref(), self.now);
        self.links.insert(
            link,
            Box::new(Link {
                sides: Default::default(),
                up: Pipe::default(),
                down: Pipe::default(),
                edge: Edge::new(n, link),
                eof_at: None,
                stalled: false,
            }),
        );
    }

    pub(crate) fn cut(&mut self, n: usize) {
        let Some(link) = self.devices[n].link else {
            return;
        };
        let late = self.rng.pick(&[0, 0, 20, 3000].map(Duration::from_millis));
        trace!(self, "{n} is cut, link {link}");
        self.devices[n].lost();
        self.abandon(link, late);
    }

    pub(crate) fn abandon(&mut self, link: u64, late: Duration) {
        if let Some(l) = self.links.get_mut(&link) {
            l.eof_at = Some(self.now + late);
            // A part of the bytes under way still arrives.
            let keep = self.rng.below(l.up.chunks.len() as u64 + 1) as usize;
            l.up.chunks.truncate(keep);
            if let Some((_, last)) = l.up.chunks.back_mut()
                && self.rng.chance(50)
            {
                last.truncate(self.rng.below(last.len() as u64) as usize);
            }
            l.up.bytes = l.up.chunks.iter().map(|(_, c)| c.len()).sum();
        }
    }

    fn leave(&mut self, n: usize) {
        let v5 = self.devices[n].profile.version == Version::V5;
        let (reason, expiry) = match self.rng.below(4) {
            0 if v5 => (ReasonCode::DISCONNECT_WITH_WILL_MESSAGE, None),
            1 if v5 && self.devices[n].profile.expiry > 0 => {
                (ReasonCode::SUCCESS, Some(self.rng.pick(&[0, 7, 1000])))
            }
            _ => (ReasonCode::SUCCESS, None),
        };
        trace!(self, "{n} leaves: {reason:?} {expiry:?}");
        self.flush(n, true);
        self.devices[n].disconnect(reason, expiry);
        self.flush(n, false);
        if let Some(link) = self.devices[n].link {
            let at = self.links.get(&link).map_or(Millis::ZERO, |l| l.up.last);
            if let Some(l) = self.links.get_mut(&link) {
                l.eof_at = Some(at.max(self.now) + Duration::from_millis(500));
            }
        }
        self.devices[n].lost();
    }

    fn publish(&mut self, n: usize) {
        for _ in 0..self.rng.between(1, 4) {
            let qos = self.rng.pick(&QOS);
            let (topic, key) = match self.rng.below(20) {
                0 => ("$same/t", format!("same{n}")),
                1 => match self.next_key(n) {
                    // It has more levels than the limit allows.
                    key if self.sequence[n].is_multiple_of(2) => (TOO_DEEP, key),
                    key => ("deny/t", key),
                },
                2 => ("refused/t", self.next_key(n)),
                _ => (self.rng.pick(&TOPICS), self.next_key(n)),
            };
            let message = Outgoing {
                topic: topic.into(),
                payload: self.payload(&key),
                qos,
                retain: false,
                expiry: self.rng.chance(10).then(|| self.rng.between(1, 20) as u32),
            };
            trace!(
                self,
                "{n} publishes {key} on {topic} at {qos:?}, expiry {:?}", message.expiry
            );
            self.devices[n].publish(message, &mut self.rng);
        }
    }

    fn next_key(&mut self, n: usize) -> String {
        self.sequence[n] += 1;
        format!("d{n}.{}", self.sequence[n])
    }

    fn payload(&mut self, key: &str) -> Vec<u8> {
        // Identical messages stay identical.
        let long = key.starts_with('d') || key.starts_with('x');
        let length = match self.rng.below(10) {
            _ if !long => 0,
            0..7 => self.rng.below(30),
            7..9 => self.rng.between(80, 140),
            _ => self.rng.below(600),
        };
        format!("{key}:{}", "p".repeat(length as usize)).into_bytes()
    }

    /// Clients of the broker that are not ours.
    fn publish_elsewhere(&mut self) {
        if self.broker.away {
            return;
        }
        for _ in 0..self.rng.between(1, 6) {
            self.events += 1;
            self.oracle.latest = self.events;
            let retain = self.retained && self.rng.chance(30);
            let (topic, key) = match retain {
                true => (self.rng.pick(&RETAINED), format!("r#{}", self.events)),
                false => (self.rng.pick(&TOPICS), format!("x{}", self.events)),
            };
            let copy = Copy {
                filters: Vec::new(),
                topic: topic.into(),
                payload: self.payload(&key),
                qos: self.rng.pick(&QOS),
                retain,
                expires_at: match self.rng.below(12) {
                    0 if !retain => {
                        let seconds = self.rng.between(1, 15) as u32;
                        Some(Deadline::after_seconds(self.now, seconds))
                    }
                    _ => None,
                },
                origin_mark: None,
                partial: false,
            };
            trace!(self, "the broker takes {key} on {topic} at {:?}", copy.qos);
            self.broker.route(&copy, &mut self.rng, self.now);
        }
    }

    fn subscribe(&mut self, n: usize) {
        if self.devices[n].requests() > 20 {
            return;
        }
        let v5 = self.devices[n].profile.version == Version::V5;
        let mut filters: Vec<(&str, SubscribeOptions)> = Vec::new();
        for _ in 0..self.rng.between(1, 3) {
            let filter = self.rng.pick(self.filters);
            if filters.iter().any(|(f, _)| *f == filter) {
                continue;
            }
            let options = SubscribeOptions {
                qos: self.rng.pick(&QOS),
                no_local: v5 && self.rng.chance(20),
                retain_as_published: v5 && self.rng.chance(40),
                retain_handling: if v5 { self.rng.below(3) as u8 } else { 0 },
            };
            filters.push((filter, options));
        }
        let id = (v5 && self.rng.chance(50)).then(|| self.rng.between(1, 300) as u32);
        trace!(self, "{n} subscribes {filters:?} id {id:?}");
        let stream = self.devices[n].any_stream(&mut self.rng);
        trace!(self, "on stream {stream}");
        self.devices[n].subscribe(&filters, id, stream);
        if self.rng.chance(10) {
            let gone = filters[0].0;
            trace!(self, "{n} unsubscribes {gone} at once");
            self.devices[n].unsubscribe(&[gone], stream);
        }
    }
}
