//! Sessions begin, are resumed, taken over, left and ended.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mqtt::Message;
use crate::session::{CloseReason, ConnectionSpec, Ended, Incarnation, Redelivery, Session, Will};
use crate::telemetry::{DropReason as DropCause, SessionEndReason, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::Router;
use crate::router::handle::ConnectionHandle;
use crate::router::publish::ClientPublish;
use crate::router::sessions::shard::Shard;
use crate::router::types::{Peer, SessionRef};

/// How long publishes of an ended session are recognised when its client sends them again.
const REMEMBER_CLOSED_MS: u64 = 2 * 60 * 1000;

/// An authenticated CONNECT.
#[derive(Debug)]
pub struct Connect {
    /// The client identifier, assigned if the client sent none.
    pub client_id: Arc<str>,
    /// Who it is.
    pub principal: Arc<str>,
    /// Clean Start, or Clean Session.
    pub clean_start: bool,
    /// Session Expiry Interval in force, seconds.
    pub expiry: u32,
    /// What CONNECT fixed for the connection.
    pub spec: ConnectionSpec,
    /// The will.
    pub will: Option<Will>,
    /// Reaches the connection's task.
    pub handle: Arc<ConnectionHandle>,
    /// Where it comes from.
    pub peer: Arc<Peer>,
}

/// A session with its new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    /// The session.
    pub session: SessionRef,
    /// The connection's number.
    pub connection_no: u64,
    /// Session Present [MQTT-3.2.2-3].
    pub present: bool,
    /// A live connection of the same session was ended.
    pub taken_over: bool,
    /// The P link for the session's publishes.
    pub publish_link: u8,
}

/// Why a session is not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The client identifier's session belongs to another principal.
    Principal,
}

impl Router {
    /// Gives a client its session. `connack` writes the CONNACK, told Session Present, before
    /// anything else can be written [MQTT-3.2.0-1].
    ///
    /// # Errors
    /// [`Refused`]; nothing changed.
    pub fn connect(
        &self,
        connect: Connect,
        now: Millis,
        connack: impl FnOnce(bool, &mut Vec<u8>),
    ) -> Result<Connected, Refused> {
        let mut wills: Vec<(SessionRef, u8, Message)> = Vec::new();
        let mut released: Vec<FilterId> = Vec::new();
        let mut news: Vec<(SessionRef, u8, Arc<str>)> = Vec::new();
        let mut redeliveries = Vec::new();
        let number = self.shard_of(&connect.client_id);
        let mut shard = self.shards[number].lock();
        let mut known = shard.by_id.get(&connect.client_id).copied();
        let mut taken_over = false;
        if let Some(at) = known {
            let slot = &mut shard.slots[at as usize];
            let foreign = slot.session.principal != connect.principal;
            if foreign && !slot.session.is_closed() {
                return Err(Refused::Principal);
            }
            if slot.session.attached() {
                taken_over = true;
                if let Some(handle) = slot.handle.take() {
                    handle.close(CloseReason::TakenOver);
                }
            }
            if foreign {
                // What its client's grace held back is due now.
                let ended = slot.session.give_up_grace(now);
                let (link, id) = (slot.publish_link, slot.session.client_id.clone());
                let reference = shard.reference(at);
                wills.extend(ended.will.map(|will| (reference, link, will)));
                if ended.absent {
                    news.push((reference, link, id));
                }
                shard.remove(at);
                known = None;
            }
        }
        let present;
        let at = match known {
            Some(at) => {
                let reference = shard.reference(at);
                let slot = &mut shard.slots[at as usize];
                // A session without expiry ends with the connection that is taken from it.
                let over = slot.session.is_closed()
                    || connect.clean_start
                    || (taken_over && slot.session.expiry == 0);
                present = !over;
                if over {
                    let was_closed = slot.session.is_closed();
                    let grace = self.limits.will_grace;
                    let ended = slot.session.restart(self.next_incarnation(), grace, now);
                    if ended.will_cancelled {
                        metrics().wills_cancelled.increment(1);
                    }
                    if !was_closed {
                        metrics().sessions_ended[SessionEndReason::CleanStart].increment(1);
                        self.count_lost(&ended);
                    }
                    redeliveries = ended.shared;
                    let link = slot.publish_link;
                    wills.extend(ended.will.map(|will| (reference, link, will)));
                    released = shard.release(at);
                }
                at
            }
            None => {
                present = false;
                let at = shard.insert(Session::new(
                    connect.client_id.clone(),
                    connect.principal.clone(),
                    self.next_incarnation(),
                    now,
                ));
                let reference = shard.reference(at);
                shard.slots[at as usize].publish_link = self.publish_link(reference);
                at
            }
        };
        shard.unlist(at);
        let reference = shard.reference(at);
        let slot = &mut shard.slots[at as usize];
        let attached = slot.session.attach(
            &connect.spec,
            connect.expiry,
            connect.will,
            &self.limits,
            now,
        );
        slot.handle = Some(connect.handle);
        slot.peer = Some(connect.peer.clone());
        slot.woken = true;
        slot.taken = 0;
        slot.offered = 0;
        slot.taken_at = now;
        let publish_link = slot.publish_link;
        let shared = slot.session.subscriptions().iter().filter(|s| s.shared);
        let shared: Vec<FilterId> = shared.map(|s| s.filter).collect();
        if let Some(connection) = slot.session.connection() {
            connack(present, connection.control());
        }
        slot.session.pump(&self.limits, now);
        shard.settle(at);
        self.charge_entries(&mut shard);
        drop(shard);
        if !shared.is_empty() {
            self.members_came(&shared, reference);
        }
        if attached.will_cancelled {
            metrics().wills_cancelled.increment(1);
        }
        if taken_over {
            metrics().takeovers.increment(1);
        }
        if present {
            metrics().flaps_absorbed.increment(1);
        }
        self.release(&released, number as u16, now);
        for (session, link, will) in wills {
            self.publish_will(session, link, will, now);
        }
        self.share_again(redeliveries, now);
        for (session, link, client_id) in news {
            self.tell_presence(session, link, &client_id, None, now);
        }
        if attached.present {
            let (id, peer) = (&connect.client_id, Some(&*connect.peer));
            self.tell_presence(reference, publish_link, id, peer, now);
        }
        Ok(Connected {
            session: reference,
            connection_no: attached.connection_no,
            present,
            taken_over,
            publish_link,
        })
    }

    /// A connection ended. `normal`: by DISCONNECT 0x00, which discards the will. True if the
    /// session ended with it.
    pub fn disconnected(
        &self,
        reference: SessionRef,
        connection_no: u64,
        normal: bool,
        now: Millis,
    ) -> bool {
        let mut shard = self.shards[usize::from(reference.shard)].lock();
        let Some(slot) = shard.get(reference) else {
            return false;
        };
        // Another connection has the session.
        if slot.session.connection_no() != connection_no || !slot.session.attached() {
            return false;
        }
        let mut ended = slot.session.detach(&self.limits, normal, now);
        let link = slot.publish_link;
        let client_id = ended.absent.then(|| slot.session.client_id.clone());
        self.shed(slot);
        let filters = shard.detached(reference.slot, &ended, now, now + REMEMBER_CLOSED_MS);
        self.charge_entries(&mut shard);
        drop(shard);
        self.release(&filters, reference.shard, now);
        if let Some(will) = ended.will.take() {
            self.publish_will(reference, link, will, now);
        }
        if let Some(client_id) = client_id {
            self.tell_presence(reference, link, &client_id, None, now);
        }
        if ended.will_cancelled {
            metrics().wills_cancelled.increment(1);
        }
        if ended.session {
            metrics().sessions_ended[SessionEndReason::NotKept].increment(1);
        }
        self.share_again(std::mem::take(&mut ended.shared), now);
        ended.session
    }

    /// Ends sessions whose time has come and publishes wills that are due.
    pub(in crate::router) fn expire(
        &self,
        shard: &mut Shard,
        slot: u32,
        now: Millis,
        due: &mut Due,
    ) {
        let reference = shard.reference(slot);
        let Some(s) = shard.get(reference) else {
            return;
        };
        let mut ended = s.session.expire(now);
        let link = s.publish_link;
        if ended.absent {
            due.news
                .push((reference, link, s.session.client_id.clone()));
        }
        due.shared.append(&mut ended.shared);
        due.wills
            .extend(ended.will.take().map(|will| (reference, link, will)));
        if ended.forget {
            shard.remove(slot);
        } else if ended.session {
            metrics().sessions_ended[SessionEndReason::Expired].increment(1);
            self.count_lost(&ended);
            due.filters
                .extend(shard.finish(slot, now + REMEMBER_CLOSED_MS));
        } else {
            shard.settle(slot);
        }
    }

    /// `queue_full = "end_session"`: the session goes, with its connection.
    pub(in crate::router) fn end_full_session(&self, shard: &mut Shard, slot: u32, now: Millis) {
        let Some(s) = shard.slots.get_mut(slot as usize) else {
            return;
        };
        if s.session.is_closed() {
            return;
        }
        if let Some(handle) = s.handle.take() {
            handle.close(CloseReason::SessionQueueFull);
        }
        metrics().sessions_ended[SessionEndReason::QueueFull].increment(1);
        s.session.expiry = 0;
        let ended = s.session.detach(&self.limits, false, now);
        let link = s.publish_link;
        let client_id = s.session.client_id.clone();
        self.count_lost(&ended);
        let reference = shard.reference(slot);
        let filters = shard.detached(slot, &ended, now, now + REMEMBER_CLOSED_MS);
        self.defer(Due {
            filters,
            wills: ended
                .will
                .map(|w| (reference, link, w))
                .into_iter()
                .collect(),
            shared: ended.shared,
            news: ended
                .absent
                .then_some((reference, link, client_id))
                .into_iter()
                .collect(),
            shard: reference.shard,
        });
    }

    fn count_lost(&self, ended: &Ended) {
        if ended.messages > 0 {
            metrics().messages_dropped[DropCause::SessionEnd].increment(ended.messages as u64);
        }
    }

    fn publish_will(&self, session: SessionRef, link: u8, will: Message, now: Millis) {
        let account = &self.limits.publish_account;
        if account.used() > self.config.publishes_waiting {
            metrics().messages_dropped[DropCause::UpstreamBudget].increment(1);
            return;
        }
        metrics().wills_published.increment(1);
        // No Local hides a client's will from it, as any other publish of its.
        let origin_mark = {
            let mut shard = self.shards[usize::from(session.shard)].lock();
            let slot = shard.get(session);
            slot.and_then(|slot| slot.session.origin_mark(will.topic()))
        };
        let will = will.charged_to(account);
        self.publish(
            session,
            link,
            ClientPublish {
                token: None,
                message: will,
                origin_mark,
            },
            now,
        );
    }

    /// Does what could not be done under a shard's lock.
    pub(in crate::router) fn settle_due(&self, due: Due, now: Millis) {
        self.release(&due.filters, due.shard, now);
        for (session, link, will) in due.wills {
            self.publish_will(session, link, will, now);
        }
        self.share_again(due.shared, now);
        for (session, link, client_id) in due.news {
            self.tell_presence(session, link, &client_id, None, now);
        }
    }

    pub(in crate::router) fn next_incarnation(&self) -> Incarnation {
        Incarnation::nth(self.incarnations.fetch_add(1, Ordering::Relaxed))
    }
}

/// What is left to do once a shard's lock is given back.
#[derive(Debug, Default)]
pub(in crate::router) struct Due {
    pub filters: Vec<FilterId>,
    pub wills: Vec<(SessionRef, u8, Message)>,
    pub shared: Vec<Redelivery>,
    /// Clients whose absence is to be told.
    pub news: Vec<(SessionRef, u8, Arc<str>)>,
    pub shard: u16,
}
