//! The broker's half of a run: its links to the router, played in order.

use std::time::Duration;

use tidegate::mqtt::{Message, MessageSpec};
use tidegate::router::Arrived;

use crate::broker::{Item, arrived, matching};
use crate::oracle::Checked;
use crate::world::{Fetch, World, trace};

impl World {
    /// The publish links that exist come up, or go down.
    pub(crate) fn publish_links_up(&self, up: bool) {
        for link in 0..self.publish_links {
            self.router.publish_link_up(link, up, self.now);
        }
    }

    pub(crate) fn broker_works(&mut self) -> Checked {
        if self.broker.away && self.now >= self.broker_back_at {
            trace!(self, "the broker is back");
            self.broker.away = false;
            if !self.broker.unlinked {
                self.oracle.away.1 = Some(self.now);
            }
            self.publish_links_up(true);
        }
        if self.broker.unlinked && !self.broker.away && self.now >= self.relinked_at {
            trace!(self, "the data link is back");
            self.broker.unlinked = false;
            self.oracle.away.1 = Some(self.now);
            let kept = match self.kept {
                true => tidegate::router::LinkSession::Resumed,
                false => tidegate::router::LinkSession::New,
            };
            let before = self.gaps();
            self.router.data_link_up(0, kept, false, self.now);
            for ((before, after), c) in before.iter().zip(self.gaps()).zip(&mut self.oracle.clients)
            {
                c.ledger.link_gaps += after - before;
            }
        }
        self.broker.step(&self.router, &mut self.rng, self.now);
        for (filter, since) in std::mem::take(&mut self.broker.unsubscribed) {
            self.oracle.unsubscribed(&filter, since);
        }
        let forwarded = std::mem::take(&mut self.broker.forwarded);
        self.forwarded += forwarded.len() as u64;
        for (outgoing, refused) in &forwarded {
            let m = &outgoing.message;
            let key = crate::oracle::key(m.payload());
            trace!(self, "the broker gets {key} on {}", m.topic());
            let inbound = &mut self.oracle.inbound;
            inbound.forwarded(m.payload(), m.qos(), self.now)?;
            if !refused {
                self.oracle.routed(m.topic(), &self.broker.held)?;
            }
        }
        drop(forwarded);
        if let Some(fault) = self.broker.faults.pop() {
            return Err(format!("a needless SUBSCRIBE: {fault} (I21)"));
        }
        self.broker_sends()?;
        self.fetches_work();
        Ok(())
    }

    /// The data link: in order, answers apart from messages.
    fn broker_sends(&mut self) -> Checked {
        let mut batch = Vec::new();
        while let Some(item) = self.broker.next_item(self.now) {
            match item {
                // The broker sends nothing that is past its expiry.
                Item::Copies(copies)
                    if copies[0].expires_at.is_some_and(|at| at.is_due(self.now)) => {}
                Item::Copies(copies) => {
                    self.oracle.arrives(&copies, self.now);
                    trace!(
                        self,
                        "arrives {} for {:?}",
                        crate::oracle::key(&copies[0].payload),
                        copies.iter().map(|c| &c.filters).collect::<Vec<_>>()
                    );
                    let copies = copies.iter();
                    batch.extend(copies.map(|c| arrived(c, self.broker.copies, &self.router)));
                }
                Item::Suback(number, code) => {
                    self.hand_over(&mut batch)?;
                    trace!(self, "SUBACK of the broker for {number}: {code:?}");
                    let held = &self.broker.held;
                    if let Some((name, _)) = held.iter().find(|(_, (n, _))| *n == number) {
                        self.oracle.holds(name);
                    }
                    self.router.suback(number, code, self.now);
                }
                Item::Unsuback(number) => {
                    self.hand_over(&mut batch)?;
                    trace!(self, "UNSUBACK of the broker for {number}");
                    self.router.unsuback(number, self.now);
                }
                Item::Pingresp(number) => {
                    self.hand_over(&mut batch)?;
                    self.router.barrier_passed(0, number, self.now);
                }
            }
        }
        self.hand_over(&mut batch)
    }

    fn hand_over(&mut self, batch: &mut Vec<Arrived>) -> Checked {
        if batch.is_empty() {
            return Ok(());
        }
        let before = self.gaps();
        self.router.fan_out(batch, self.now);
        batch.clear();
        self.oracle.delivered_all(&before, &self.gaps())
    }

    /// The retained link is lost, and its fetches are made anew.
    pub(crate) fn lose_fetches(&mut self) {
        for fetch in std::mem::take(&mut self.fetches) {
            self.router.fetch_ended(&[fetch.number], false, self.now);
            self.oracle.fetched_anew(&fetch.filter, false);
        }
    }

    /// The retained link.
    fn fetches_work(&mut self) {
        if self.broker.away {
            return;
        }
        for (number, name) in self.router.next_fetches(4) {
            let at = self.now + Duration::from_millis(self.rng.below(200));
            self.fetches.push_back(Fetch {
                at,
                number,
                filter: name.to_string(),
                found: None,
            });
        }
        let Some(fetch) = self.fetches.front_mut() else {
            return;
        };
        if fetch.at > self.now {
            return;
        }
        match &mut fetch.found {
            None => {
                let found = self.broker.retained.iter();
                let found = found.filter(|(topic, _)| matching(&fetch.filter, topic));
                let found = found.map(|(t, (p, q))| (t.clone(), p.clone(), *q));
                fetch.found = Some(found.collect());
            }
            Some(found) => match found.pop_front() {
                Some((topic, payload, qos)) => {
                    let message = Message::new(&MessageSpec {
                        topic: &topic,
                        properties: Default::default(),
                        payload: &payload,
                        qos,
                        retain: true,
                        expires_at: None,
                        strip_key: None,
                        account: Some(self.router.queue_account().clone()),
                    });
                    self.router.fetched(fetch.number, &message, self.now);
                    trace!(self, "fetched {topic} {}", crate::oracle::key(&payload));
                    return;
                }
                None => {
                    // Live messages wait no longer.
                    self.router.fetch_answered(&[fetch.number], self.now);
                    let complete = self.rng.chance(90);
                    self.router.fetch_ended(&[fetch.number], complete, self.now);
                    if !complete {
                        self.oracle.fetched_anew(&fetch.filter, true);
                    }
                    self.fetches.pop_front();
                    return;
                }
            },
        }
        // A retained message that is found now may come much later.
        let delay = Duration::from_millis(self.rng.below(1000));
        if let Some(fetch) = self.fetches.front_mut() {
            fetch.at = self.now + delay;
        }
    }
}
