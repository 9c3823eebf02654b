//! Sessions begin, are resumed, taken over and left.

use std::sync::Arc;

use parking_lot::MutexGuard;

use crate::session::{CloseReason, ConnectionSpec, Ended, Session, SessionKey, Will};
use crate::telemetry::{DropReason, SessionEndReason, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::account::{Full, Holder};
use crate::router::handle::{ConnectionHandle, TaskWaker};
use crate::router::sessions::shard::Shard;
use crate::router::sessions::slot::SESSION_BYTES;
use crate::router::sessions::subscriptions::request;
use crate::router::sessions::{DueWill, PresenceChange, SessionActions, Sessions, shed};
use crate::router::types::{Due, Peer, SessionRef};

/// An authenticated CONNECT.
#[derive(Debug)]
pub struct Connect {
    /// The client identifier, assigned if the client sent none, and its mount.
    pub key: SessionKey,
    /// The authenticated principal.
    pub principal: Arc<str>,
    /// The principal is the one of all anonymous clients.
    pub anonymous: bool,
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
    /// The client's end of the connection.
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
    /// The publish link for the session's publishes.
    pub publish_link: u8,
    /// The round of that link with which the publishes of the client's earlier connections have
    /// arrived at the broker.
    pub publish_round: u32,
}

/// A connection that a CONNECT is about to take over. It was asked to read everything that has arrived.
#[derive(Clone, Debug)]
pub struct Predecessor {
    /// The session and the number of the connection.
    pub connection: (SessionRef, u64),
    /// Raised when everything is read, or the connection has ended.
    pub is_read: Arc<TaskWaker>,
}

/// The reason why a client gets no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The client identifier's session belongs to another principal.
    Principal,
    /// The account of sessions has no room, or none for this client.
    Full(Full),
    /// The account of sessions has no room, or none for this client, for a new session that is kept while
    /// its client is away. Other sessions may still find room.
    NotKept(Full),
}

/// The room that a CONNECT needs in the account of sessions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    /// Who a new session of the client is charged to.
    holder: Holder,
    /// Who the bytes are charged to: the holder of the client's session, if there is one.
    pub(super) charged: Holder,
    /// Bytes.
    pub(super) more: u64,
    /// The session is to be kept while its client is away, and was not until now.
    begins_to_be_kept: bool,
}

/// Actions that are left to take after a CONNECT.
#[derive(Debug)]
pub(in crate::router) struct ConnectActions {
    pub session: SessionActions,
    /// Groups of shared subscriptions whose member is connected again.
    pub groups: Vec<FilterId>,
}

impl Sessions {
    /// The connection that a CONNECT of this principal would take over now, unless it is `known`.
    pub(crate) fn predecessor(
        &self,
        key: &SessionKey,
        principal: &str,
        known: Option<(SessionRef, u64)>,
    ) -> Option<Predecessor> {
        let shard = self.shard(self.shard_of(key.client_id()));
        let at = shard.find(key)?;
        let slot = &shard.slots[at as usize];
        let connection = (shard.reference(at), slot.session.connection_no());
        let takes_over = slot.session.attached() && *slot.session.principal == *principal;
        if !takes_over || known == Some(connection) {
            return None;
        }
        let is_read = Arc::<TaskWaker>::default();
        slot.handle.as_ref()?.await_read_out(is_read.clone());
        Some(Predecessor {
            connection,
            is_read,
        })
    }

    /// Gives a client its session. `publish_link` chooses the publish link of a new session.
    /// `connack` writes the CONNACK, told Session Present, before anything else can be written
    /// [MQTT-3.2.0-1].
    ///
    /// # Errors
    /// [`Refused`]; nothing changed.
    pub(crate) fn connect(
        &self,
        connect: Connect,
        now: Millis,
        publish_link: impl Fn(SessionRef) -> u8,
        connack: impl FnOnce(bool, &mut Vec<u8>),
    ) -> Result<(Connected, ConnectActions), Refused> {
        let number = self.shard_of(connect.key.client_id());
        let mut actions = SessionActions {
            shard: number,
            ..SessionActions::default()
        };
        let mut shard = self.shard(number);
        let demand = self.demand(&shard, &connect)?;
        self.judge(&demand)?;
        let holder = demand.holder;
        let (known, taken_over) = take_over(&mut shard, &connect, &mut actions, now);
        let (at, present) = match known {
            Some(at) => {
                shard.move_to(at, holder);
                let resumed = self.resume(&mut shard, at, &connect, taken_over, &mut actions, now);
                (at, resumed)
            }
            None => {
                let (key, principal) = (connect.key.clone(), connect.principal.clone());
                let session = Session::new(key, principal, self.next_incarnation(), now);
                let at = shard.insert(session, holder);
                let reference = shard.reference(at);
                shard.slots[at as usize].publish_link = publish_link(reference);
                (at, false)
            }
        };
        let attached = self.attach(shard, at, connect, present, now, connack);
        let (reference, publish_link) = (attached.session, attached.publish_link);
        actions.presence_changes.extend(attached.presence);
        actions.wills.extend(attached.will);
        actions.retained.extend(attached.retained);
        if taken_over {
            metrics().takeovers.increment(1);
        }
        if present {
            metrics().flaps_absorbed.increment(1);
        }
        let connected = Connected {
            session: reference,
            connection_no: attached.connection_no,
            present,
            taken_over,
            publish_link,
            // The owner of the publish links tells it.
            publish_round: 0,
        };
        let actions = ConnectActions {
            session: actions,
            groups: attached.groups,
        };
        Ok((connected, actions))
    }

    /// The room that the account must have, so that a client gets its session.
    ///
    /// # Errors
    /// The session is another principal's.
    pub(super) fn demand(&self, shard: &Shard, connect: &Connect) -> Result<Demand, Refused> {
        let holder = self.holder(connect);
        let will = connect.will.as_ref().map_or(0, Will::bytes);
        let known = shard.find(&connect.key);
        let known = known.map(|at| &shard.slots[at as usize]);
        let (charged, more, is_kept) = match known {
            Some(slot) if slot.session.principal == connect.principal => {
                let more = will.saturating_sub(slot.will_bytes as usize);
                let is_kept = slot.session.expiry > 0 && !slot.session.is_closed();
                (slot.holder, more, is_kept)
            }
            Some(slot) if !slot.session.is_closed() => return Err(Refused::Principal),
            _ => {
                let names = connect.key.as_str().len() + connect.principal.len();
                (holder, SESSION_BYTES + names + will, false)
            }
        };
        Ok(Demand {
            holder,
            charged,
            more: more as u64,
            begins_to_be_kept: connect.expiry > 0 && !is_kept,
        })
    }

    /// Judges whether the account has room for a client's session.
    pub(super) fn judge(&self, demand: &Demand) -> Result<(), Refused> {
        let (account, more) = (&self.account.bytes, demand.more);
        if demand.begins_to_be_kept {
            let room = account.has_room_to_keep(demand.charged, more);
            room.map_err(Refused::NotKept)
        } else if more > 0 {
            let room = account.has_room(demand.charged, more);
            room.map_err(Refused::Full)
        } else {
            Ok(())
        }
    }

    /// Who a new session of this client is charged to.
    pub(super) fn holder(&self, connect: &Connect) -> Holder {
        let principal = (!connect.anonymous).then_some(&*connect.principal);
        self.account.holder(principal, connect.peer.address.ip())
    }

    /// Resumes a known session, or starts it anew. Returns whether it is resumed.
    fn resume(
        &self,
        shard: &mut Shard,
        at: u32,
        connect: &Connect,
        taken_over: bool,
        actions: &mut SessionActions,
        now: Millis,
    ) -> bool {
        let session = shard.reference(at);
        let slot = &mut shard.slots[at as usize];
        let closed = slot.session.is_closed();
        // A session without expiry ends with the connection that is taken from it.
        let over = closed || connect.clean_start || (taken_over && slot.session.expiry == 0);
        if !over {
            return true;
        }
        let journal = shard.journal.as_ref();
        let restart_grace = journal.filter(|_| slot.session.is_restored());
        let grace = restart_grace.map_or(self.limits.will_grace, |j| j.restart_grace());
        let ended = slot.session.restart(self.next_incarnation(), grace, now);
        if ended.will_cancelled {
            metrics().wills_cancelled.increment(1);
        }
        if !closed {
            metrics().sessions_ended[SessionEndReason::CleanStart].increment(1);
            count_lost(&ended);
        }
        let publish_link = slot.publish_link;
        actions.redeliveries = ended.shared;
        actions.wills.extend(ended.will.map(|will| DueWill {
            session,
            publish_link,
            will,
        }));
        actions.released = shard.release(at);
        false
    }

    /// Begins the connection of a session.
    fn attach(
        &self,
        mut shard: MutexGuard<'_, Shard>,
        at: u32,
        connect: Connect,
        present: bool,
        now: Millis,
        connack: impl FnOnce(bool, &mut Vec<u8>),
    ) -> Attached {
        shard.now = shard.now.max(now);
        self.wake(&mut shard, at);
        shard.unlist(at);
        shard.end_absence(at);
        let session = shard.reference(at);
        let slot = &mut shard.slots[at as usize];
        let attached = slot.session.attach(
            &connect.spec,
            connect.expiry,
            connect.will,
            &self.limits,
            now,
        );
        let publish_link = slot.publish_link;
        let presence = attached.present.then(|| PresenceChange {
            session,
            publish_link,
            key: connect.key,
            peer: Some(connect.peer.clone()),
        });
        slot.handle = Some(connect.handle);
        slot.peer = Some(connect.peer);
        slot.woken = true;
        let shared = slot.session.subscriptions().iter().filter(|s| s.shared);
        let groups = shared.map(|s| s.filter).collect();
        let incarnation = slot.session.incarnation;
        let retained = attached
            .retained
            .iter()
            .map(|due| request(session, incarnation, *due));
        let retained = retained.collect();
        if let Some(connection) = slot.session.connection() {
            connack(present, connection.control());
        }
        shard.withhold_connack(at, present);
        if let Some((slot, accounts)) = shard.with_accounts(session) {
            slot.session.pump(&self.limits, now, &mut accounts.output);
            shed(slot);
        }
        if attached.options_changed {
            shard.rejoin(at);
        }
        shard.hold(at);
        shard.settle(at);
        self.charge(&mut shard);
        drop(shard);
        if attached.will_cancelled {
            metrics().wills_cancelled.increment(1);
        }
        let will = attached.will.map(|will| DueWill {
            session,
            publish_link,
            will,
        });
        Attached {
            session,
            connection_no: attached.connection_no,
            publish_link,
            will,
            presence,
            groups,
            retained,
        }
    }

    /// A connection ended. `normal`: by DISCONNECT 0x00, which discards the will. Returns whether the
    /// session ended with it; `None` if another connection has the session.
    pub(crate) fn disconnected(
        &self,
        reference: SessionRef,
        connection_no: u64,
        normal: bool,
        now: Millis,
    ) -> Option<(bool, SessionActions)> {
        let mut shard = self.shard(reference.shard);
        let slot = shard.connected(reference, connection_no)?;
        let ended = slot.session.detach(&self.limits, normal, now);
        if normal {
            // The client goes for longer than a flap, and gives up its will.
            slot.will_bytes = 0;
        }
        shed(slot);
        if ended.will_cancelled {
            metrics().wills_cancelled.increment(1);
        }
        if ended.session {
            metrics().sessions_ended[SessionEndReason::NotKept].increment(1);
        }
        let over = ended.session;
        let actions = leave(&mut shard, reference, ended, now);
        self.charge(&mut shard);
        Some((over, actions))
    }
}

/// A session's new connection.
#[derive(Debug)]
struct Attached {
    session: SessionRef,
    connection_no: u64,
    publish_link: u8,
    /// The will of the connection that was taken over.
    will: Option<DueWill>,
    presence: Option<PresenceChange>,
    groups: Vec<FilterId>,
    retained: Vec<Due>,
}

/// Ends the connection that a client identifier's session has. Returns the session's slot, and whether
/// it had a connection. The session of another principal is over, and makes room.
fn take_over(
    shard: &mut Shard,
    connect: &Connect,
    actions: &mut SessionActions,
    now: Millis,
) -> (Option<u32>, bool) {
    let Some(at) = shard.find(&connect.key) else {
        return (None, false);
    };
    let slot = &mut shard.slots[at as usize];
    let foreign = slot.session.principal != connect.principal;
    let taken_over = slot.session.attached();
    if taken_over && let Some(handle) = slot.handle.take() {
        handle.close(CloseReason::TakenOver);
    }
    if !foreign {
        return (Some(at), taken_over);
    }
    // The grace of the closed session's client is over.
    let ended = slot.session.give_up_grace(now);
    let (publish_link, key) = (slot.publish_link, slot.session.key.clone());
    let session = shard.reference(at);
    actions.wills.extend(ended.will.map(|will| DueWill {
        session,
        publish_link,
        will,
    }));
    if ended.absent {
        actions.presence_changes.push(PresenceChange {
            session,
            publish_link,
            key,
            peer: None,
        });
    }
    shard.remove(at);
    (None, taken_over)
}

/// Detaches or removes a session whose connection ended. Returns the actions that are left to take.
pub(super) fn leave(
    shard: &mut Shard,
    session: SessionRef,
    mut ended: Ended,
    now: Millis,
) -> SessionActions {
    let mut actions = SessionActions {
        shard: session.shard,
        redeliveries: std::mem::take(&mut ended.shared),
        ..SessionActions::default()
    };
    if let Some(slot) = shard.get(session) {
        let incarnation = slot.session.incarnation;
        let retained = std::mem::take(&mut ended.retained).into_iter();
        actions.retained = retained
            .map(|due| request(session, incarnation, due))
            .collect();
        let publish_link = slot.publish_link;
        if let Some(will) = ended.will.take() {
            actions.wills.push(DueWill {
                session,
                publish_link,
                will,
            });
        }
        if ended.absent {
            actions.presence_changes.push(PresenceChange {
                session,
                publish_link,
                key: slot.session.key.clone(),
                peer: None,
            });
        }
    }
    shard.detached(session.slot, &ended, now, &mut actions);
    actions
}

/// Counts the messages that end with a session.
pub(super) fn count_lost(ended: &Ended) {
    if ended.messages > 0 {
        metrics().messages_dropped[DropReason::SessionEnd].increment(ended.messages as u64);
    }
}

#[cfg(test)]
mod tests;
