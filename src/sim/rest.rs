//! The end of a run: everything comes to rest, a client reads the retained messages, and all clients go.

use super::*;

/// The steps within which everything comes to rest, poison left out.
const REST_STEPS: u32 = 800;

/// The steps that each poison publish of a client may delay its later ones: two connections of the link
/// end, and the client pauses for two seconds.
const POISON_STEPS: u32 = 400;

impl World {
    /// Lets everything come to rest: the publishes that wait behind poison, then the rest.
    pub(super) fn rest(&mut self) {
        let unanswered = |d: &Device| !d.open.is_empty() || !d.releasing.is_empty();
        for _ in 0..self.poisons_sent * POISON_STEPS {
            if self.router.publishes_waiting() == 0 && !self.devices.iter().any(unanswered) {
                break;
            }
            self.step();
        }
        for _ in 0..REST_STEPS {
            self.step();
        }
    }

    /// I6: a client that subscribes now receives the retained messages as the broker has them, fetched or
    /// from the cache.
    pub(super) fn check_retained(&mut self) {
        let id = self.next_id(0);
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: 0,
        };
        let filters = ["a/#", "c"].map(|f| (f.to_owned(), options));
        let since = self.now;
        let asked = Asked {
            id,
            stream: StreamId::CONTROL,
            filters: filters.into(),
        };
        self.ask(0, asked);
        for _ in 0..200 {
            self.step();
        }
        for (topic, payload) in self.broker.retained() {
            let number = number_of(&payload);
            self.oracle.has_retained(0, &topic, number, since);
        }
    }

    /// All clients go for good, for longer than ended sessions are remembered and filters linger.
    pub(super) fn end(&mut self) {
        for n in 0..self.devices.len() {
            self.cut(n);
            let key = SessionKey::from(&*self.devices[n].id);
            self.router.end_session(&key, self.node_now);
        }
        for _ in 0..300 {
            self.advance(Duration::from_secs(1));
            self.step();
        }
    }
}
