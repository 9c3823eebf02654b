//! The connections of clients: how they begin, how they end, and the fate of their sessions.

use super::*;
use crate::mqtt::encode_disconnect;
use crate::sim::kept::{Greeting, SessionRequest};
use crate::streams::StreamId;

impl World {
    pub(crate) fn connect(&mut self, n: usize) {
        let sim_will = self.new_will(n);
        let payload = sim_will.map(|w| w.number.to_string());
        let will = sim_will
            .zip(payload.as_ref())
            .map(|(w, payload)| mqtt::Will {
                qos: w.qos,
                retain: false,
                topic: w.topic,
                payload: payload.as_bytes(),
                delay: w.delay.as_secs() as u32,
                message_expiry: None,
                properties: Properties::default(),
            });
        let v5 = self.devices[n].version == Version::V5;
        let (clean_start, expiry) = self.session_request(v5);
        let request = SessionRequest {
            clean_start,
            outlives: if v5 { expiry > 0 } else { !clean_start },
            has_will: sim_will.is_some(),
        };
        if std::mem::take(&mut self.devices[n].begun_anew) {
            // Its last CONNACK, which did not come, said so.
            self.forget_session(n, self.now);
        }
        let resumes = self.devices[n].kept.connects(request, self.now);
        if resumes.is_none() {
            let key = SessionKey::from(&*self.devices[n].id);
            let found = self.router.session(&key).filter(|s| s.expiry > 0);
            self.devices[n].begun_anew = found.is_none();
        }
        self.set_will(n, sim_will, resumes);
        if clean_start {
            self.forget_session(n, self.now);
        }
        let device = &mut self.devices[n];
        let connect = Connect {
            version: device.version,
            client_id: &device.id,
            clean_start,
            session_expiry: v5.then_some(expiry),
            will,
            ..Connect::default()
        };
        let machine = admit(&self.router, &connect, self.node_now);
        device.machine = Some(machine);
        // Answers to the requests of the last connection do not arrive any more.
        device.asked.clear();
        device.unsubscribing.clear();
        device.forget_wires();
        trace!(
            self,
            "{n} connects, clean {clean_start}, expiry {expiry}, its will {:?}",
            self.devices[n].wills.current
        );
        let device = &mut self.devices[n];
        device
            .open
            .iter_mut()
            .for_each(|open| open.stream = StreamId::CONTROL);
        device
            .releasing
            .iter_mut()
            .for_each(|(_, on)| *on = StreamId::CONTROL);
        // In a durable seed, the client learns first whether its session is there.
        if self.store.is_none() {
            self.send_again(n, StreamId::CONTROL);
        }
    }

    /// Clean Start and expiry of a CONNECT. Only clients of durable seeds begin anew, or end their sessions.
    fn session_request(&mut self, v5: bool) -> (bool, u32) {
        if self.store.is_none() {
            return (false, u32::MAX);
        }
        let clean_start = self.fate.chance(10);
        let expiry = match v5 {
            true => self.fate.pick(&[u32::MAX, u32::MAX, u32::MAX, 1000, 0]),
            false => u32::MAX,
        };
        (clean_start, expiry)
    }

    /// A client has received CONNACK.
    pub(crate) fn greeted(&mut self, n: usize, present: bool) {
        let device = &mut self.devices[n];
        let (greeting, proves) = match device.kept.greeted(present) {
            Ok(told) => told,
            Err(fault) => return self.oracle.fault(format!("{n} {fault}")),
        };
        device.begun_anew = false;
        trace!(self, "{n} is told Session Present {present}");
        if proves {
            self.devices[n].wills.proven();
            self.oracle.ends_on_disk(n);
        }
        if greeting == Greeting::New {
            let crash = self.oracle.last_crash();
            self.forget_session(n, crash.unwrap_or(self.now));
        }
        if self.store.is_some() {
            self.send_again(n, StreamId::CONTROL);
        }
    }

    /// A client's session has ended at this time, and with it the client's own state of it.
    pub(crate) fn forget_session(&mut self, n: usize, at: Millis) {
        let device = &mut self.devices[n];
        device.unsure.clear();
        device.receiving.clear();
        device.releasing.clear();
        for open in std::mem::take(&mut device.open) {
            self.oracle.given_up(open.number);
        }
        self.oracle.session_ended(n, at);
    }

    pub(crate) fn cut(&mut self, n: usize) {
        let unread = self.devices[n].has_unread();
        if let Some(machine) = self.devices[n].machine.take() {
            let end = End::Transport(Closed::Eof);
            machine.ended(&self.router, &end, self.node_now);
            trace!(self, "{n} is cut");
            self.disconnected(n, unread);
        }
    }

    /// A client sends DISCONNECT, which discards its will, and is gone.
    pub(crate) fn leave(&mut self, n: usize) {
        if self.devices[n].is_busy() || self.is_withheld(n) {
            return self.cut(n);
        }
        let unread = self.devices[n].has_unread();
        let cx = context(&self.router, self.node_now);
        let Some(mut machine) = self.devices[n].machine.take() else {
            return;
        };
        let mut bytes = Vec::new();
        let reason = ReasonCode::NORMAL_DISCONNECTION;
        encode_disconnect(self.devices[n].version, reason, None, None, &mut bytes);
        let ended = machine.received(&cx, StreamId::CONTROL, &bytes);
        let end = ended.expect_err("it ends the connection");
        machine.ended(&self.router, &end, self.node_now);
        trace!(self, "{n} leaves");
        self.devices[n].wills.discard(self.now);
        self.disconnected(n, unread);
        // Longer than the disk may take, so that a crash finds the client away.
        if self.store.is_some() && self.fate.chance(50) {
            let away = Duration::from_millis(self.fate.below(1500));
            self.devices[n].away_until = self.now + away;
        }
    }

    /// The connection of a client has ended.
    fn disconnected(&mut self, n: usize, unread: bool) {
        self.oracle.lost(n, unread, self.now);
        let over = self.devices[n].kept.disconnected(self.now);
        if let Some(will) = &mut self.devices[n].wills.current {
            let delay = if over { Duration::ZERO } else { will.delay };
            will.due = Some(self.now + delay);
        }
        self.publish_due_wills();
        if over {
            self.forget_session(n, self.now);
        }
    }
}
