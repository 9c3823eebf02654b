//! How a session begins, loses its connection, gets another one and ends.

use std::time::Duration;

use crate::mqtt::{Message, Version};
use crate::time::{Deadline, Millis};

use crate::session::connection::{Connection, ConnectionSpec};
use crate::session::entry::Redelivery;
use crate::session::incarnation::Incarnation;
use crate::session::outbound::Outbound;
use crate::session::phase::Online;
use crate::session::will::Will;
use crate::session::{RetainedDue, Session, SessionLimits};

/// What the caller has to do after a connection or session ended, or a deadline passed.
#[derive(Debug, Default)]
pub struct Ended {
    /// Publish this will now.
    pub will: Option<Message>,
    /// A will was dropped unpublished: count it.
    pub will_cancelled: bool,
    /// The session is over: release its subscriptions.
    pub session: bool,
    /// The closed session need not be remembered any longer: remove it.
    pub forget: bool,
    /// Messages that end with the session.
    pub messages: usize,
    /// Deliveries of shared subscriptions that another member is to get.
    pub shared: Vec<Redelivery>,
    /// Publish that the client is absent.
    pub absent: bool,
    /// Subscriptions whose SUBACK was not written yet: their retained messages are to be sent.
    pub retained: Vec<RetainedDue>,
}

/// The outcome of [`Session::attach`].
#[derive(Debug)]
pub struct Attached {
    /// Number of the connection.
    pub connection_no: u64,
    /// Publish this will of the connection that was taken over now.
    pub will: Option<Message>,
    /// A will was cancelled: a delayed one by this resume [MQTT-3.1.3-9], or by a DISCONNECT on the
    /// connection that this one replaces.
    pub will_cancelled: bool,
    /// Publish that the client is present.
    pub present: bool,
    /// The options of the session's subscriptions have changed.
    pub options_changed: bool,
    /// Subscriptions of the connection that this one replaces, whose SUBACK was not written yet: their
    /// retained messages are to be sent.
    pub retained: Vec<RetainedDue>,
}

impl Session {
    /// Starts the session anew on the same client identifier [MQTT-3.1.2-4]; [`Session::attach`]
    /// follows. The publishes that the broker still has are remembered, so that a copy that the
    /// client sends again is not forwarded twice. The will of the old session is due
    /// [MQTT-3.1.3-9], unless the client is back within `grace`.
    pub fn restart(&mut self, incarnation: Incarnation, grace: Duration, now: Millis) -> Ended {
        let back = !grace.is_zero() && (self.attached() || now < self.since + grace);
        let mut ended = self.end();
        let will = self.will.take();
        match back {
            true => ended.will_cancelled = will.is_some(),
            false => ended.will = will.map(|w| w.publish(now)),
        }
        self.incarnation = incarnation;
        self.gaps = 0;
        ended
    }

    /// Begins a connection; one that is there is taken over. Its will is due if it has no delay, because
    /// its client sent no DISCONNECT (§3.1.2.5, [MQTT-3.1.4-3]); a grace covers the takeover. `expiry`
    /// is in seconds. Unacknowledged messages of an earlier connection are sent again by
    /// [`Session::pump`].
    pub fn attach(
        &mut self,
        spec: &ConnectionSpec,
        expiry: u32,
        will: Option<Will>,
        limits: &SessionLimits,
        now: Millis,
    ) -> Attached {
        let (mut due, mut retained) = (None, Vec::new());
        if self.attached() {
            retained = self.forget_connection(limits, now);
            due = (self.will).take_if(|w| w.delay == 0 && limits.will_grace.is_zero());
        } else {
            if let Some(idle) = &mut self.idle {
                idle.drop_aged(limits, now);
            }
        }
        let discarded = self.phase.take_will_discarded();
        let will_cancelled = self.will.take().is_some() | discarded;
        self.connection_no += 1;
        self.expiry = expiry;
        self.version = spec.version;
        let options_changed = self.set_bridge(spec.bridge);
        self.since = now;
        self.will = will.map(Box::new);
        let online = Box::new(Online {
            outbound: self.take_outbound(),
            connection: Connection::new(self.connection_no, spec, now),
        });
        Attached {
            connection_no: self.connection_no,
            will: due.map(|w| w.publish(now)),
            will_cancelled,
            present: self.phase.attach(online, limits.presence),
            options_changed,
            retained,
        }
    }

    /// Ends the connection. `normal`: DISCONNECT 0x00, which discards the will [MQTT-3.14.4-3]. A session
    /// without a connection ends if its expiry is 0 now.
    pub fn detach(&mut self, limits: &SessionLimits, normal: bool, now: Millis) -> Ended {
        if self.attached() {
            self.since = now;
        }
        let retained = self.forget_connection(limits, now);
        let grace = limits.will_grace;
        let mut ended = Ended {
            will_cancelled: self.phase.take_will_discarded(),
            retained,
            ..Ended::default()
        };
        if normal {
            ended.will_cancelled |= self.will.take().is_some();
        }
        let outbound = self.take_outbound();
        // A client that sends DISCONNECT does not flap.
        ended.absent = self
            .phase
            .detach(if normal { Duration::ZERO } else { grace }, now);
        self.last_id = outbound.last_id();
        if !outbound.is_idle() {
            self.idle = Some(Box::new(outbound));
        }
        if self.expiry == 0 {
            // The grace begins when the client goes.
            let back_until = self.since + grace;
            match self.will.as_deref_mut() {
                Some(will) if now < back_until => will.due_at = Some(Deadline::at(back_until)),
                _ => ended.will = self.will.take().map(|w| w.publish(now)),
            }
            let over = self.end();
            ended.session = true;
            ended.messages = over.messages;
            ended.shared = over.shared;
            ended.retained = Vec::new();
            return ended;
        }
        let has_shared = self.outbound().has_shared();
        let share_at = now + limits.shared_redeliver_after;
        self.phase.wait_until(
            (self.expiry != u32::MAX).then(|| Deadline::after_seconds(now, self.expiry)),
            has_shared.then(|| Deadline::at(share_at)),
        );
        match self.will.as_deref_mut() {
            Some(will) if will.delay == 0 && grace.is_zero() => {
                ended.will = self.will.take().map(|w| w.publish(now));
            }
            Some(will) => {
                // Whichever comes first: the delay or the session's end.
                let delay = Duration::from_secs(will.delay.min(self.expiry).into());
                will.due_at = Some(Deadline::at(now + delay.max(grace)));
            }
            None => {}
        }
        ended
    }

    /// The packets that were under way on the connection are to be sent again on the next one. Returns
    /// the subscriptions whose SUBACK was not written, and whose retained messages are to follow.
    fn forget_connection(&mut self, limits: &SessionLimits, now: Millis) -> Vec<RetainedDue> {
        self.queue_waiting(now);
        if let Some(online) = self.phase.online_mut() {
            online.outbound.connection_ended(limits);
        }
        if let Some(inbound) = &mut self.inbound {
            inbound.connection_ended();
        }
        let pending = self.phase.connection_mut().map(|c| &mut c.pending);
        let pending = pending.into_iter().flat_map(std::mem::take);
        pending.flat_map(|p| p.retained).collect()
    }

    /// Gives the memory of the sending half back, if no client is connected and there is nothing to send.
    pub fn forget_idle(&mut self) {
        if let Some(idle) = self.idle.take_if(|idle| idle.is_idle()) {
            self.last_id = idle.last_id();
        }
    }

    /// Takes the sending half out, with or without a connection.
    fn take_outbound(&mut self) -> Outbound {
        match (self.phase.online_mut(), self.idle.take()) {
            (Some(online), _) => std::mem::take(&mut online.outbound),
            (None, Some(idle)) => *idle,
            (None, None) => Outbound::after(self.last_id),
        }
    }

    /// Ends the session's state. The will is left to the caller.
    fn end(&mut self) -> Ended {
        let deferred = self.deferred();
        let mut outbound = self.take_outbound();
        let shared = outbound.take_shared();
        let messages = outbound.queued() + outbound.in_flight() + deferred;
        self.last_id = 0;
        if let Some(inbound) = &mut self.inbound {
            inbound.restart();
        }
        if let Some(connection) = self.phase.connection_mut() {
            connection.pending = Vec::new();
            connection.waiting = None;
        }
        self.phase.close();
        Ended {
            session: true,
            messages,
            shared,
            ..Ended::default()
        }
    }

    /// Carries out the steps that are due by [`Session::deadline`] on a session without a connection.
    pub fn expire(&mut self, now: Millis) -> Ended {
        let mut ended = Ended::default();
        if self.attached() {
            return ended;
        }
        let passed = self.phase.expire(now);
        // A will that a grace defers waits beyond the session's end.
        let due = |will: &mut Box<Will>| will.due_at.is_some_and(|at| at.is_due(now));
        let will = self.will.take_if(due).map(|w| w.publish(now));
        if passed.share {
            ended.shared = (self.idle.as_mut()).map_or_else(Vec::new, |idle| idle.take_shared());
        }
        if passed.end {
            let shared = std::mem::take(&mut ended.shared);
            ended = self.end();
            ended.shared.extend(shared);
        }
        Ended {
            will,
            absent: passed.absent,
            forget: passed.forget,
            ..ended
        }
    }

    /// The will and the absence that a grace defers become due, because another principal takes
    /// the place of this closed session.
    pub fn give_up_grace(&mut self, now: Millis) -> Ended {
        Ended {
            will: self.will.take().map(|w| w.publish(now)),
            absent: self.phase.take_absence(),
            ..Ended::default()
        }
    }

    /// When [`Session::expire`] next has something to do or, while a client is connected, its Keep
    /// Alive runs out. `None`: never.
    pub fn deadline(&self) -> Option<Millis> {
        if let Some(connection) = self.connection_ref() {
            return connection.silent_until();
        }
        let will = self.will.as_ref().and_then(|w| w.due_at);
        let all = [will, self.phase.deadline()];
        all.into_iter().flatten().min().map(Deadline::time)
    }

    /// Whether the session is over: it is only remembered.
    pub fn is_closed(&self) -> bool {
        self.phase.is_closed()
    }

    /// A closed session is remembered until `at`; [`Session::expire`] then says to forget it.
    pub fn remember_until(&mut self, at: Millis) {
        self.phase.remember_until(at);
    }

    /// Whether a closed session is still of use: the broker has publishes of it, or a grace defers
    /// its will or absence.
    pub fn worth_remembering(&self) -> bool {
        let publishes = self.inbound.as_ref().is_some_and(|i| i.has_unclaimed());
        publishes || self.will.is_some() || self.phase.owes_absence()
    }

    /// Publishes of a closed session are not recognised any longer.
    pub fn forget_publishes(&mut self) {
        if let Some(inbound) = &mut self.inbound {
            inbound.forget_unclaimed();
        }
    }

    /// Whether a client is connected.
    pub fn attached(&self) -> bool {
        self.phase.is_attached()
    }

    /// Number of the latest connection: each one's is larger than the one before it.
    pub fn connection_no(&self) -> u64 {
        self.connection_no
    }

    /// Protocol version of the latest connection.
    pub fn version(&self) -> Version {
        self.version
    }
}
