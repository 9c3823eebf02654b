//! Crashes: the node is dropped at any moment, and begins again from its disk. The broker lives on.

use super::*;
use crate::sim::devices::message;
use crate::sim::kept::Survival;
use crate::sim::store::GRACE;
use crate::sim::testing::publish_of;
use crate::store::log::disk::sim::Fault;
use crate::streams::StreamId;

/// The longest time for which the node is away.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// The operations of the disk within which the power may fail.
const CUT_WITHIN: u64 = 8;

impl World {
    /// In a durable seed, the node may crash now.
    pub(crate) fn crash_perhaps(&mut self) {
        let Some(store) = &self.store else {
            return;
        };
        // Where not even a name could be changed, an old log cannot be told from a whole one.
        let is_marked = store.durable_since.is_some() || store.is_marked();
        if self.fate.chance(1) && is_marked {
            self.crash();
        }
    }

    /// In some durable seeds, the disk runs full or fails for a while.
    pub(crate) fn disk_fails_perhaps(&mut self) {
        let Some(store) = self.store.as_ref().filter(|_| self.disk_fails) else {
            return;
        };
        let fate = &mut self.fate;
        if self.disk_is_bad {
            if fate.chance(5) {
                self.mend_disk();
            }
            return;
        }
        if !fate.chance(2) {
            return;
        }
        match fate.below(3) {
            0 => store.disk.set_broken(true),
            1 => {
                let room = fate.below(4000) as usize;
                store.disk.set_capacity(Some(store.disk.used() + room));
            }
            _ => store.disk.fault(fate.below(10) as usize, Fault::Fail),
        }
        self.disk_is_bad = true;
        trace!(self, "the disk is bad");
    }

    /// The disk has room and works.
    pub(crate) fn mend_disk(&mut self) {
        if let Some(store) = &self.store {
            store.disk.set_broken(false);
            store.disk.set_capacity(None);
        }
        self.disk_is_bad = false;
    }

    fn crash(&mut self) {
        let has_filters = self.broker_has_filters();
        let (disk, durable_since) = self.stop_disk();
        self.exercised.crashes += 1;
        self.exercised.stale += u64::from(durable_since.is_none());
        trace!(
            self,
            "the node crashes, its disk durable since {durable_since:?}"
        );
        for n in 0..self.links.len() {
            self.lose_in_crash(n);
        }
        for n in 0..self.devices.len() {
            self.read_in_crash(n);
        }
        let now = self.now;
        let devices = self.devices.iter_mut();
        let survival: Vec<Survival> = devices
            .map(|d| d.kept.crashed(durable_since, now))
            .collect();
        self.oracle.crashed(durable_since, &survival, now);
        if !has_filters || self.broker_back_at.is_some_and(|(_, keep)| !keep) {
            self.oracle.links_lost_meanwhile();
        }
        trace!(self, "sessions after the crash: {survival:?}");
        let back = self.time_of_return();
        for (n, survival) in survival.iter().enumerate() {
            if self.devices[n].machine.take().is_some() {
                self.oracle.lost(n, true, now);
            }
            self.keep_wills(n, durable_since, back);
            if *survival == Survival::Ends {
                self.forget_session(n, now);
            }
            let device = &mut self.devices[n];
            device.away_until = match self.fate.chance(30) {
                true => back + GRACE + Duration::from_millis(self.fate.below(500)),
                false => back,
            };
        }
        self.pass_until(back);
        self.start_again(disk);
        self.judge_restored(&survival);
    }

    /// The disk as the next process finds it.
    fn stop_disk(&mut self) -> (SimDisk, Option<Millis>) {
        let fate = &mut self.fate;
        let Some(mut store) = self.store.take() else {
            unreachable!("a durable seed has a disk");
        };
        if fate.chance(50) && !self.disk_is_bad {
            let at = fate.below(CUT_WITHIN) as usize;
            store.disk.fault(at, Fault::Cut(fate.below(600) as usize));
            for _ in 0..fate.below(20) {
                let durable_since = store.durable_since;
                store.work(fate, self.now);
                if store.disk.is_cut() {
                    // The process ends here, and does not see the error.
                    store.durable_since = durable_since;
                    break;
                }
            }
        }
        // The mark of an old log is to be there.
        let power_fails = fate.chance(50) && store.durable_since.is_some();
        let disk = match store.disk.is_cut() || power_fails {
            true => store.disk.after_power_cut(|n| fate.below(n)),
            false => store.disk.after_kill(),
        };
        (disk, store.durable_since)
    }

    /// Some of the bytes on their way to the broker arrive.
    fn lose_in_crash(&mut self, n: usize) {
        let link = &mut self.links[n];
        let Some(mut conn) = link.conn.take() else {
            return;
        };
        let mut bytes = conn.to_broker.take(Millis::MAX);
        bytes.truncate(self.fate.below(bytes.len() as u64 + 1) as usize);
        let poison = links::poison_at(&bytes, link.version, &self.oracle);
        bytes.truncate(poison.unwrap_or(bytes.len()));
        // It has ended either way, and nobody reads the answers.
        let _ = self.broker.feed(&mut conn.broker, &bytes, &mut Vec::new());
        self.broker.drop_connection(&conn.broker);
    }

    /// Some of the bytes on their way to a client arrive. Its answers do not.
    fn read_in_crash(&mut self, n: usize) {
        if self.devices[n].machine.is_none() || self.fate.chance(30) {
            return;
        }
        let streams: Vec<StreamId> = self.devices[n].wires.keys().copied().collect();
        for stream in streams {
            let room = self.fate.below(300) as usize;
            if let Some(wire) = self.devices[n].wires.get_mut(&stream) {
                wire.limit(room);
            }
        }
        self.write(n);
        self.devices[n].machine = None;
        for wire in self.devices[n].wires.values_mut() {
            wire.unread = None;
        }
        self.decode(n);
        self.oracle.lost(n, true, self.now);
    }

    fn time_of_return(&mut self) -> Millis {
        let most = match self.fate.chance(50) {
            true => AWAY_MAX,
            false => Duration::from_millis(500),
        };
        let away = self.fate.below(most.as_millis() as u64);
        let step = STEP.as_millis() as u64;
        Millis::new((self.now.as_u64() + away).next_multiple_of(step))
    }

    /// Time passes without the node.
    fn pass_until(&mut self, back: Millis) {
        if self.broker_back_at.is_none() && self.stormy && self.fate.chance(20) {
            self.restart_broker();
        }
        if let Some((at, keep)) = self.broker_back_at
            && at <= back
        {
            self.now = self.now.max(at);
            self.broker.at(self.now);
            self.broker_back_at = None;
            self.broker.start(keep);
            trace!(self, "the broker is back, sessions kept {keep}");
        }
        for _ in 0..self.fate.below(4) {
            self.publish_outside();
        }
        self.now = back;
        self.node_now = Millis::ZERO;
        self.broker.at(back);
    }

    /// A client of the broker publishes while the node is away.
    fn publish_outside(&mut self) {
        let Some(mut connection) = self.broker.connect() else {
            return;
        };
        let (version, topic) = (self.setup.version, self.fate.pick(&TOPICS));
        let qos = self.fate.pick(&[QoS::AtLeastOnce, QoS::ExactlyOnce]);
        self.number += 1;
        let (number, outside) = (self.number, self.oracle.outside());
        let mut bytes = Vec::new();
        Connect {
            version,
            client_id: "outside",
            clean_start: true,
            ..Connect::default()
        }
        .encode(&mut bytes);
        bytes.extend(publish_of(
            version,
            1,
            &message(topic, &number.to_string(), qos, false),
        ));
        if qos == QoS::ExactlyOnce {
            encode_ack(
                version,
                AckKind::Pubrel,
                1,
                ReasonCode::SUCCESS,
                None,
                &mut bytes,
            );
        }
        self.oracle
            .published(outside, number, topic, qos, false, self.now);
        let fed = self.broker.feed(&mut connection, &bytes, &mut Vec::new());
        assert!(fed.is_ok(), "{fed:?}");
        self.broker.drop_connection(&connection);
        trace!(self, "outside, {number} is published on {topic} at {qos:?}");
        self.oracle
            .acknowledged(outside, number, ReasonCode::SUCCESS, self.now);
    }

    fn start_again(&mut self, disk: SimDisk) {
        self.process += 1;
        self.disk_is_bad = false;
        self.router = self.setup.router(self.now);
        self.store = Some(Store::open(disk, &self.router, self.now));
        self.links = self.setup.links(&self.router, self.process);
        self.oracle.started(self.now);
        trace!(self, "process {} starts", self.process);
    }

    fn judge_restored(&mut self, survival: &[Survival]) {
        for (n, survival) in survival.iter().enumerate() {
            let key = SessionKey::from(&*self.devices[n].id);
            let found = self.router.session(&key).filter(|s| s.expiry > 0);
            let filters = found.map(|session| {
                let all = session.subscriptions.iter();
                let all = all.map(|s| (s.filter.to_string(), s.options.qos));
                all.collect::<Vec<_>>()
            });
            trace!(self, "the log has for {n}: {filters:?}");
            self.oracle.judge_restored(n, *survival, filters.as_deref());
        }
    }

    /// The sessions of links that the node does not have any more are ended.
    pub(crate) fn end_stale_links(&mut self) {
        for stale in self.router.stale_links() {
            // This process has another session under that client identifier.
            let is_used = |l: &SimLink| l.conn.is_some() && stale.client_id.ends_with(&l.name);
            if self.links.iter().any(is_used) {
                continue;
            }
            let Some(mut connection) = self.broker.connect() else {
                return;
            };
            let mut bytes = Vec::new();
            links::clearing(self.setup.version, &stale.client_id, &mut bytes);
            // It ends, and with it the session.
            let _ = self.broker.feed(&mut connection, &bytes, &mut Vec::new());
            self.broker.drop_connection(&connection);
            self.router.stale_link_ended(&stale.client_id);
        }
    }

    /// After a crash, notes when the broker has all filters of clients again.
    pub(crate) fn check_regained(&mut self) {
        if self.oracle.awaits_filters() && self.broker_has_filters() {
            trace!(self, "the broker has all filters again");
            self.oracle.has_filters(self.now);
        }
    }

    /// Whether the broker has all filters of clients.
    fn broker_has_filters(&self) -> bool {
        let held = self.subscriptions_of_links();
        let mut all = self.oracle.filters().into_iter();
        let has = |filter: String| {
            let plain = crate::topics::split_shared(&filter).map_or(&*filter, |(_, f)| f);
            let covers = |name: &String| crate::topics::covers(name, plain) || *name == filter;
            held.iter().any(|(_, names)| names.iter().any(covers))
        };
        all.all(has)
    }
}
