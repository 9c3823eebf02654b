//! How far a data link lags behind the broker, and how many publishes may go to the broker meanwhile.
//!
//! A broker acknowledges a publish when it has taken it, whether or not the data link keeps up with the
//! copies. The broker answers a PINGREQ behind the messages that it had sent, so the round trip is their
//! age: the lag. While it is too long, the publish links may take a *window* of publishes in each
//! *round*, which ends with the answer to a PINGREQ. The first whole round lets the link catch up and shows
//! how much it delivers, the second shows the round trip on an empty link. From then on the window shrinks
//! in proportion to the lag, and grows while all of it is used and the lag is short.

use std::time::Duration;

use crate::time::Millis;

/// A lag beyond this, over the round trip on an empty link, begins the limit.
const LAG_MAX: Duration = Duration::from_millis(20);
/// The lag that the window aims at, over the round trip on an empty link.
const LAG_TARGET: Duration = Duration::from_millis(10);
/// The smallest window, publishes.
const WINDOW_MIN: u32 = 8;
/// The least time between two PINGREQs while publishes are limited.
const ROUND_MIN: Duration = Duration::from_millis(5);
/// A PINGREQ is due after this many messages,
const MESSAGES: u32 = 128;
/// or after fewer, if they arrived slowly.
const SLOW_MESSAGES: u32 = 16;
/// The time after which a PINGREQ is due for [`SLOW_MESSAGES`].
const SLOW: Duration = Duration::from_millis(20);
/// The limit ends when the lag was short and no window was used up for so long. A flood that pauses for less
/// finds the window that it had.
const CALM: Duration = Duration::from_secs(2);
/// Rounds in a row with the smallest window, after which the lag is not caused by publishes of ours.
const FLOOR_ROUNDS: u8 = 2;
/// A link that brings nothing for so long, and for [`SILENT_POLLS`], does not lag: it is dead, or idle.
const SILENT: Duration = Duration::from_millis(250);
const SILENT_POLLS: u8 = 5;

/// What follows from a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing changes.
    Keep,
    /// A round begins in which so many publishes may go to the broker.
    Limit(u32),
    /// Publishes are not limited any more.
    Lift,
}

/// The measurements of one data link's connection.
#[derive(Debug, Default)]
pub(super) struct LagMeter {
    /// The round trip on an empty link, as far as it is known.
    base: Duration,
    /// When a PINGREQ was last sent.
    pinged_at: Option<Millis>,
    /// Messages since then.
    arrived: u32,
    /// When the last message arrived.
    arrived_at: Millis,
    /// Calls of [`LagMeter::waiting`] since then.
    silent_polls: u8,
    limit: Option<Limit>,
    /// The last round trip.
    last: Duration,
}

/// The limit on publishes.
#[derive(Debug)]
struct Limit {
    phase: Phase,
    /// Publishes in a round.
    window: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// The PINGREQ was sent before the limit, and publishes behind it.
    Begin,
    /// The link catches up.
    CatchUp,
    /// The link is empty, and had delivered this many messages in this time.
    Measure(u32, Duration),
    /// The window follows the lag.
    Follow {
        /// Rounds in a row with the smallest window and a long lag.
        floor_rounds: u8,
        /// Since when the lag is short and no window is used up.
        calm_since: Option<Millis>,
    },
}

impl LagMeter {
    /// Messages have arrived and are delivered.
    pub(super) fn arrived(&mut self, messages: usize, now: Millis) {
        let messages = u32::try_from(messages).unwrap_or(u32::MAX);
        self.arrived = self.arrived.saturating_add(messages);
        self.arrived_at = now;
        self.silent_polls = 0;
    }

    /// Whether a PINGREQ is due. To be asked while none is unanswered.
    pub(super) fn is_due(&self, now: Millis) -> bool {
        let rested = |least| self.pinged_at.is_none_or(|at| now >= at + least);
        match self.limit {
            Some(_) => rested(ROUND_MIN),
            None => self.arrived >= MESSAGES || self.arrived >= SLOW_MESSAGES && rested(SLOW),
        }
    }

    /// A PINGREQ was sent.
    pub(super) fn pinged(&mut self, now: Millis) {
        self.pinged_at = Some(now);
        self.arrived = 0;
    }

    /// The link has connected to a broker that answers within about `answers_within`.
    pub(super) fn connected(&mut self, answers_within: Duration) {
        let base = answers_within;
        *self = Self {
            base,
            ..Self::default()
        };
    }

    /// The lag that was measured last.
    pub(super) fn last(&self) -> Duration {
        self.last
    }

    /// The PINGREQ that was sent last is still unanswered.
    pub(super) fn waiting(&mut self, now: Millis) -> Verdict {
        if self.limit.is_some() {
            self.silent_polls = self.silent_polls.saturating_add(1);
            let silent = self.silent_polls >= SILENT_POLLS && now >= self.arrived_at + SILENT;
            return if silent { self.lift() } else { Verdict::Keep };
        }
        match self.arrived > 0 && self.age(now) > self.base + LAG_MAX {
            true => self.begin(Phase::Begin),
            false => Verdict::Keep,
        }
    }

    /// The PINGREQ that was sent last is answered. `used_up`: the window was.
    pub(super) fn answered(&mut self, used_up: bool, now: Millis) -> Verdict {
        let lag = self.age(now);
        self.last = lag;
        let arrived = self.arrived;
        let Some(limit) = &mut self.limit else {
            let late = lag > self.base + LAG_MAX;
            self.base = self.base.min(lag);
            return match late {
                true => self.begin(Phase::CatchUp),
                false => Verdict::Keep,
            };
        };
        let follow = |calm_since, floor_rounds| Phase::Follow {
            calm_since,
            floor_rounds,
        };
        match limit.phase {
            Phase::Begin => limit.phase = Phase::CatchUp,
            Phase::CatchUp => limit.phase = Phase::Measure(arrived, lag),
            Phase::Measure(delivered, within) => {
                self.base = lag;
                limit.window = in_proportion(delivered, lag + LAG_TARGET, within);
                limit.phase = follow(None, 0);
            }
            Phase::Follow { floor_rounds, .. } if lag > self.base + LAG_TARGET => {
                let at_floor = limit.window <= WINDOW_MIN;
                let floor_rounds = if at_floor { floor_rounds + 1 } else { 0 };
                if floor_rounds >= FLOOR_ROUNDS {
                    self.base = lag;
                }
                // Others publish at the broker, too: a quarter of what arrives is left to the clients.
                let least = arrived / 4;
                limit.window = in_proportion(limit.window, self.base + LAG_TARGET, lag).max(least);
                limit.phase = follow(None, floor_rounds % FLOOR_ROUNDS);
            }
            Phase::Follow { calm_since, .. } => {
                self.base = self.base.min(lag);
                let since = calm_since.unwrap_or(now);
                if used_up {
                    limit.window = limit.window.saturating_add(limit.window / 4 + 1);
                    limit.phase = follow(None, 0);
                } else if now < since + CALM {
                    limit.phase = follow(Some(since), 0);
                } else {
                    return self.lift();
                }
            }
        }
        Verdict::Limit(limit.window)
    }

    /// The time since the last PINGREQ.
    fn age(&self, now: Millis) -> Duration {
        self.pinged_at.map_or(Duration::ZERO, |at| now.since(at))
    }

    fn begin(&mut self, phase: Phase) -> Verdict {
        let window = WINDOW_MIN;
        self.silent_polls = 0;
        self.limit = Some(Limit { phase, window });
        Verdict::Limit(window)
    }

    fn lift(&mut self) -> Verdict {
        self.limit = None;
        self.arrived = 0;
        Verdict::Lift
    }
}

/// The part of `window` that `part` is of `whole`, but no less than the smallest window.
fn in_proportion(window: u32, part: Duration, whole: Duration) -> u32 {
    let whole = whole.as_micros().max(1);
    let scaled = u128::from(window) * part.as_micros() / whole;
    u32::try_from(scaled).unwrap_or(u32::MAX).max(WINDOW_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link whose broker answers after `base`, and which delivers `rate` messages in a millisecond, while
    /// clients publish as many as they may, but no more than `flood` in a millisecond.
    struct Rig {
        meter: LagMeter,
        base: u64,
        rate: u64,
        flood: u64,
        now: u64,
        /// Messages at the broker.
        backlog: u64,
        /// What remains of the window.
        window: Option<u64>,
        used_up: bool,
        /// When a PINGREQ was sent, and the messages before its answer once the broker has it.
        ping: Option<(u64, Option<u64>)>,
    }

    impl Rig {
        fn new(base: u64, rate: u64, flood: u64) -> Self {
            let (window, ping) = (None, None);
            let mut meter = LagMeter::default();
            meter.connected(Duration::from_millis(4 * base));
            Self {
                meter,
                base,
                rate,
                flood,
                now: 0,
                backlog: 0,
                window,
                used_up: false,
                ping,
            }
        }

        fn follow(&mut self, verdict: Verdict) {
            match verdict {
                Verdict::Keep => {}
                Verdict::Limit(window) => self.window = Some(window.into()),
                Verdict::Lift => self.window = None,
            }
        }

        /// A millisecond passes. Returns the lag of a message that is published now, in milliseconds.
        fn step(&mut self) -> u64 {
            self.now += 1;
            let now = Millis::new(self.now);
            let published = match &mut self.window {
                None => self.flood,
                Some(window) => {
                    let published = self.flood.min(*window);
                    *window -= published;
                    self.used_up |= *window == 0;
                    published
                }
            };
            self.backlog += published;
            let delivered = self.backlog.min(self.rate);
            self.backlog -= delivered;
            if delivered > 0 {
                self.meter.arrived(delivered as usize, now);
            }
            if let Some((at, before)) = &mut self.ping {
                if self.now >= *at + self.base {
                    let waits = before.map(|n| n.saturating_sub(delivered));
                    *before = Some(waits.unwrap_or(self.backlog));
                }
                let verdict = match before {
                    Some(0) => {
                        self.ping = None;
                        self.meter.answered(std::mem::take(&mut self.used_up), now)
                    }
                    _ => self.meter.waiting(now),
                };
                self.follow(verdict);
            }
            if self.ping.is_none() && self.meter.is_due(now) {
                self.meter.pinged(now);
                self.ping = Some((self.now, None));
            }
            self.base + self.backlog / self.rate
        }

        /// The longest lag in `ms` milliseconds, and the messages that were delivered.
        fn run(&mut self, ms: u64) -> u64 {
            (0..ms).map(|_| self.step()).max().unwrap_or_default()
        }
    }

    #[test]
    fn a_flood_is_limited_to_what_the_link_delivers() {
        for (base, rate, flood) in [(1, 20, 60), (1, 1, 50), (40, 20, 100), (1, 20, 21)] {
            let mut rig = Rig::new(base, rate, flood);
            // The link first delivers the messages from before the limit.
            rig.run(5000);
            let longest = rig.run(10_000);
            assert!(
                longest <= base + 60,
                "{longest} ms at {base} {rate} {flood}"
            );
            // The link is kept busy.
            let idle = (0..10_000).filter(|_| {
                rig.step();
                rig.backlog == 0
            });
            let idle = idle.count();
            assert!(idle < 3_000, "{idle} ms idle at {base} {rate} {flood}");
        }
    }

    #[test]
    fn nothing_is_limited_where_the_link_keeps_up() {
        for (base, rate, flood) in [(1, 20, 20), (80, 20, 10), (500, 20, 10), (1, 1, 1)] {
            let mut rig = Rig::new(base, rate, flood);
            rig.run(3_000);
            for _ in 0..5_000 {
                rig.step();
                assert!(rig.window.is_none(), "at {base} {rate} {flood}");
            }
        }
    }

    #[test]
    fn the_limit_ends_with_the_flood() {
        let mut rig = Rig::new(1, 20, 60);
        rig.run(1000);
        assert!(rig.window.is_some());
        rig.flood = 5;
        rig.run(1000);
        assert!(rig.window.is_some(), "it may go on");
        rig.run(2000);
        assert_eq!(rig.window, None);
    }

    #[test]
    fn a_dead_link_limits_nothing() {
        let mut rig = Rig::new(1, 20, 60);
        rig.run(1000);
        rig.rate = 0;
        assert!(rig.window.is_some() && rig.meter.limit.is_some());
        for ms in 0..1000 {
            rig.now += 1;
            let verdict = rig.meter.waiting(Millis::new(rig.now));
            rig.follow(verdict);
            if rig.window.is_none() {
                assert!((240..300).contains(&ms), "{ms}");
                return;
            }
        }
        panic!("the publishes wait for a dead link");
    }

    #[test]
    fn a_quiet_link_sends_no_pingreq() {
        let mut meter = LagMeter::default();
        for ms in 0..10_000 {
            let now = Millis::new(ms);
            assert!(!meter.is_due(now));
            if ms % 1000 == 0 {
                meter.arrived(1, now);
            }
        }
    }
}
