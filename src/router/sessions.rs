//! The sessions: where each one is kept, and how connections come to them and leave them.

mod absences;
mod accounts;
mod backlog;
mod budget;
mod by_key;
pub(super) mod came;
pub(super) mod connect;
mod expiry;
mod fan_out;
mod gaps;
mod handover;
pub(super) mod journal;
mod losses;
mod members;
mod pass;
pub(super) mod persist;
mod primaries;
mod principals;
mod room;
pub(super) mod shard;
mod sleep;
mod slot;
mod sockets;
pub(super) mod subscriptions;
pub(super) mod tally;
pub(super) mod view;
mod waits;

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use crate::budget::{Account, Allowance, CacheAccounts};
use crate::mqtt::{Message, ReasonCode};
use crate::outbuf::OutBuf;
use crate::session::{Effect, Incarnation, Redelivery, Session, SessionKey, SessionLimits, Token};
use crate::store::log::Claim;
use crate::streams::{StreamId, StreamSet};
use crate::telemetry::{DropReason, metrics};
use crate::time::Millis;
use crate::topics::FilterId;

use crate::router::account::SessionAccount;
use crate::router::handle::ConnectionHandle;
use crate::router::lost::Lost;
use crate::router::messages::Numbers;
use crate::router::types::{BarrierNumbers, Due, Peer, SessionRef};
use absences::Absences;
use accounts::Accounts;
use budget::Evicting;
use journal::Marked;
use principals::Principals;
use shard::Shard;
use slot::Slot;
pub(crate) use slot::TYPICAL_SESSION_BYTES;
use tally::Tally;

/// Shards; at most 64, since a filter's shards are the bits of one word.
pub(super) const SHARDS: usize = 32;

/// The bounds of all sessions together.
#[derive(Clone, Copy, Debug)]
pub(super) struct SessionBudgets {
    /// Bytes of all queues.
    pub queue_bytes: u64,
    /// Bytes of the output of all connections.
    pub output_bytes: u64,
    /// An entry of the output that no socket takes for this long ends its connection.
    pub write_stall: Duration,
    /// Sessions that are detached for longer than this end where new ones need the room. `None`: none do.
    pub evict_after: Option<Duration>,
}

/// All sessions, spread over shards.
#[derive(Debug)]
pub(super) struct Sessions {
    limits: SessionLimits,
    budgets: SessionBudgets,
    account: Arc<SessionAccount>,
    shards: Box<[Mutex<Shard>]>,
    /// Sessions that were begun or started anew.
    incarnations: AtomicU64,
    /// Messages from the broker that are alive in a queue.
    queue_account: Arc<Account>,
    /// Retained messages in the cache, and those of them that are in a queue.
    cache_accounts: CacheAccounts,
    /// Bytes of the entries of all queues.
    entry_bytes: AtomicI64,
    /// Bytes of the output of all connections, and bytes that the shards have taken ahead.
    output_account: Arc<Account>,
    /// The limit of each connection's output without memory pressure, bytes.
    output_buffer: usize,
    /// The principals by their use of the queues.
    principals: Arc<Principals>,
    /// Held by the one caller that evicts.
    evicting: Mutex<Evicting>,
    /// Held by the one caller that ends a session to make room for another.
    making_room: Mutex<()>,
    /// Actions that could not be taken under a shard's lock; at most one entry for each ended session.
    deferred: Mutex<Vec<SessionActions>>,
    /// Tasks that wait for room among the publishes; at most one entry for each per tick.
    waiting_for_room: Mutex<Vec<Arc<ConnectionHandle>>>,
    /// Shards with sessions whose handovers wait for barriers.
    handovers: AtomicU64,
    /// Shards with sessions that are to go into the log.
    marked: Arc<Marked>,
    /// The numbers of messages for the log.
    numbers: Arc<Numbers>,
    /// The claim of the last checkpoint in the log.
    checkpoint: Mutex<Option<Claim>>,
}

/// Actions that are left to take once a shard's lock is given back.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct SessionActions {
    /// The shard of all the sessions.
    pub shard: u16,
    /// Subscriptions that ended, by their filter.
    pub released: Vec<FilterId>,
    /// Wills to publish.
    pub wills: Vec<DueWill>,
    /// Deliveries of shared subscriptions that other members are to get.
    pub redeliveries: Vec<Redelivery>,
    /// Changes of presence to publish.
    pub presence_changes: Vec<PresenceChange>,
    /// Closed sessions that are to be forgotten, unless their publish links need them.
    pub closed: Vec<ClosedSession>,
    /// Retained messages that are to follow a SUBACK which was not written: its connection ended.
    pub retained: Vec<Due>,
}

/// A session that is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClosedSession {
    pub session: SessionRef,
    pub publish_link: u8,
    /// Its client left not long ago, so that publishes may be under way that nobody has to answer.
    pub just_left: bool,
}

/// A will that is to be published.
#[derive(Debug)]
pub(super) struct DueWill {
    pub session: SessionRef,
    pub publish_link: u8,
    pub will: Message,
}

/// A client that came or went.
#[derive(Debug)]
pub(super) struct PresenceChange {
    pub session: SessionRef,
    pub publish_link: u8,
    pub key: SessionKey,
    /// The client's end of the new connection; `None` if the client went.
    pub peer: Option<Arc<Peer>>,
}

/// One answer of the broker to a client's publish.
#[derive(Clone, Copy, Debug)]
pub struct Answered {
    /// The publisher.
    pub session: SessionRef,
    /// Names the publish.
    pub token: Token,
    /// The broker's reason code.
    pub reason: ReasonCode,
    /// When the client handed the publish over.
    pub since: Millis,
}

impl Sessions {
    pub(super) fn new(
        limits: SessionLimits,
        budgets: SessionBudgets,
        lost: &Arc<Lost>,
        account: &Arc<SessionAccount>,
    ) -> Self {
        let output_account = Arc::new(Account::new());
        let principals = Arc::new(Principals::default());
        let shard = |number| {
            let output_account = output_account.clone();
            let output = Allowance::new(output_account, budgets.output_bytes, SHARDS as u64);
            let accounts = Accounts::new(number, output, principals.clone());
            let (lost, account) = (lost.clone(), account.clone());
            let mut shard = Shard::new(number, lost, account, accounts);
            if budgets.evict_after.is_some() {
                shard.absences = Absences::ordered();
            }
            Mutex::new(shard)
        };
        Self {
            shards: (0..SHARDS as u16).map(shard).collect(),
            account: account.clone(),
            budgets,
            incarnations: AtomicU64::new(0),
            queue_account: Arc::new(Account::new()),
            cache_accounts: CacheAccounts::default(),
            entry_bytes: AtomicI64::new(0),
            output_account,
            output_buffer: limits.output_buffer.load(Ordering::Relaxed),
            principals,
            evicting: Mutex::default(),
            making_room: Mutex::default(),
            deferred: Mutex::new(Vec::new()),
            waiting_for_room: Mutex::new(Vec::new()),
            handovers: AtomicU64::new(0),
            marked: Arc::default(),
            numbers: Arc::default(),
            checkpoint: Mutex::default(),
            limits,
        }
    }

    pub(super) fn limits(&self) -> &SessionLimits {
        &self.limits
    }

    /// The numbers of messages for the log.
    pub(super) fn numbers(&self) -> &Arc<Numbers> {
        &self.numbers
    }

    /// The account that messages from the broker are charged to.
    pub(super) fn queue_account(&self) -> &Arc<Account> {
        &self.queue_account
    }

    /// The accounts of retained messages in the cache.
    pub(super) fn cache_accounts(&self) -> &CacheAccounts {
        &self.cache_accounts
    }

    /// Bytes that all queues hold: messages once, and their entries. Messages that are in the cache of
    /// retained messages as well count there.
    pub(super) fn queue_used(&self) -> u64 {
        let entries = self.entry_bytes.load(Ordering::Relaxed).max(0) as u64;
        self.queue_account.used() + self.cache_accounts.queued_only() + entries
    }

    /// Bytes of output that wait for sockets, without the parts of messages that connections share.
    pub(super) fn output_used(&self) -> u64 {
        let spare = |shard: &Mutex<Shard>| shard.lock().accounts.output.spare();
        let spare: i64 = self.shards.iter().map(spare).sum();
        let used = self.output_account.used() as i64 - spare;
        used.max(0) as u64
    }

    /// Locks a shard.
    pub(super) fn shard(&self, number: u16) -> MutexGuard<'_, Shard> {
        #[cfg(test)]
        crate::router::locks::count(crate::router::locks::Lock::Shard);
        self.shards[usize::from(number)].lock()
    }

    /// The shard of all sessions of a client identifier, whatever their mounts.
    pub(super) fn shard_of(&self, client_id: &str) -> u16 {
        (self.limits.hash_seed.hash_one(client_id) % SHARDS as u64) as u16
    }

    fn next_incarnation(&self) -> Incarnation {
        Incarnation::nth(self.incarnations.fetch_add(1, Ordering::Relaxed))
    }

    /// Works on a session under its shard's lock. `None`: it is gone.
    pub(super) fn with<R>(
        &self,
        reference: SessionRef,
        f: impl FnOnce(&mut Session, &SessionLimits) -> R,
    ) -> Option<R> {
        let mut shard = self.shard(reference.shard);
        let slot = shard.get(reference)?;
        let result = f(&mut slot.session, &self.limits);
        shed(slot);
        self.settle(&mut shard, reference.slot);
        Some(result)
    }

    /// Works on a session under its shard's lock. `None`: `connection_no` is not its current
    /// connection any more.
    pub(super) fn with_connection<R>(
        &self,
        reference: SessionRef,
        connection_no: u64,
        f: impl FnOnce(&mut Session, &SessionLimits) -> R,
    ) -> Option<R> {
        let mut shard = self.shard(reference.shard);
        let slot = shard.connected(reference, connection_no)?;
        let result = f(&mut slot.session, &self.limits);
        shed(slot);
        self.settle(&mut shard, reference.slot);
        Some(result)
    }

    /// Works on a session under its shard's lock, for packets of its client. `None`:
    /// `connection_no` is not its current connection any more. Members that its UNSUBSCRIBEs end
    /// leave before the lock is given back: nothing follows an UNSUBACK.
    pub(super) fn feed<R>(
        &self,
        reference: SessionRef,
        connection_no: u64,
        effects: &mut Vec<Effect>,
        f: impl FnOnce(&mut Session, &SessionLimits, &mut Allowance, &mut Vec<Effect>) -> R,
    ) -> Option<R> {
        let mut shard = self.shard(reference.shard);
        let (slot, accounts) = shard.connected_with_accounts(reference, connection_no)?;
        let output = &mut accounts.output;
        let result = f(&mut slot.session, &self.limits, output, effects);
        shed(slot);
        let refused = std::mem::take(&mut slot.session.refused_publishes);
        if refused != Default::default() {
            let dropped = &metrics().messages_dropped;
            dropped[DropReason::Acl].increment(refused.denied.into());
            dropped[DropReason::Invalid].increment(refused.invalid.into());
        }
        for effect in effects.iter_mut() {
            if let Effect::Unsubscribe { filters } = effect {
                shard.unsubscribed(reference.slot, filters);
                shard.hold(reference.slot);
                shard.subscriptions_changed(reference.slot);
            }
        }
        self.settle(&mut shard, reference.slot);
        Some(result)
    }

    /// Forgets a closed session, unless its publish link needs it: `keep`.
    pub(super) fn forget(&self, session: SessionRef, keep: bool, now: Millis) {
        let mut shard = self.shard(session.shard);
        shard.forget(session, keep, now);
        self.charge(&mut shard);
    }

    /// A client's address changed within its connection.
    pub(super) fn moved(&self, reference: SessionRef, connection_no: u64, peer: Arc<Peer>) {
        let mut shard = self.shard(reference.shard);
        if let Some(slot) = shard.get(reference)
            && slot.session.connection_no() == connection_no
        {
            slot.peer = Some(peer);
        }
    }

    /// Wakes a task at the next tick: it waits for room, or for a deadline.
    pub(super) fn wake_soon(&self, handle: &Arc<ConnectionHandle>) {
        if handle.queue_up() {
            self.waiting_for_room.lock().push(handle.clone());
        }
    }

    /// Wakes the tasks that wait for the tick.
    pub(super) fn wake_waiting(&self) {
        let waiting = std::mem::take(&mut *self.waiting_for_room.lock());
        for handle in waiting {
            handle.unqueue();
        }
    }

    /// Fills up a connection's output and takes it. `empty` is exchanged for the bytes of the control
    /// stream; the returned bytes are for other streams, by number. Only the streams in `free`
    /// are taken from; `unsent` bytes taken earlier, own and shared ones, are still with the others.
    /// `None`: the connection is not the session's any more.
    pub(super) fn take_output(
        &self,
        reference: SessionRef,
        connection_no: u64,
        (free, unsent): (StreamSet, (usize, usize)),
        empty: &mut OutBuf,
        now: Millis,
    ) -> Option<Vec<(StreamId, OutBuf)>> {
        let mut shard = self.shard(reference.shard);
        let (slot, accounts) = shard.with_accounts(reference)?;
        if slot.session.connection_no() != connection_no {
            return None;
        }
        slot.woken = false;
        slot.session.connection()?.streams_free(free);
        slot.session.pump(&self.limits, now, &mut accounts.output);
        let connection = slot.session.connection()?;
        let commits = connection.begin_commit();
        let side = connection.take_output(free, empty);
        let taken = &mut connection.taken;
        (taken.own_bytes, taken.shared_bytes) = unsent;
        for (_, output) in &side {
            taken.own_bytes += output.own_len();
            taken.shared_bytes += output.shared_len();
        }
        // The task watches each data stream itself; the control stream stands for the connection.
        if free.contains(StreamId::CONTROL) {
            taken.at = now;
            taken.offered_bytes = empty.len();
            taken.own_bytes += empty.own_len();
            taken.shared_bytes += empty.shared_len();
        }
        let any = !empty.is_empty() || side.iter().any(|(_, b)| !b.is_empty());
        if any && let Some(handle) = &slot.handle {
            handle.sent(now);
        }
        shed(slot);
        if commits {
            shard.await_commit(reference.slot);
        }
        self.settle(&mut shard, reference.slot);
        Some(side)
    }

    /// Hands the broker's answers to the clients that wait for them.
    pub(super) fn answered(&self, answers: &[Answered], now: Millis) {
        let mut wakes = Vec::new();
        for answer in answers {
            metrics()
                .publish_ack_seconds
                .record(now.since(answer.since).as_secs_f64());
            let mut shard = self.shard(answer.session.shard);
            let Some(slot) = shard.get(answer.session) else {
                continue;
            };
            slot.session.answered(answer.token, answer.reason);
            if slot.session.attached() && !slot.woken {
                slot.woken = true;
                wakes.extend(slot.handle.clone());
            }
        }
        for handle in wakes {
            handle.raise();
        }
    }

    /// A session gave up filters that overlapping ones take over from, once every data link has
    /// brought everything that is under way. The barriers asked for after this call are given to
    /// [`await_barriers`](Self::await_barriers).
    pub(super) fn handover_begins(&self, session: SessionRef) {
        self.handovers
            .fetch_or(1 << session.shard, Ordering::SeqCst);
    }

    /// The handovers that a session began last wait for these barriers of the data links.
    pub(super) fn await_barriers(&self, session: SessionRef, barriers: &BarrierNumbers) {
        let mut shard = self.shard(session.shard);
        if shard.get(session).is_some() {
            shard.handovers.wait(session.slot, barriers);
        }
    }

    /// Whether handovers wait for barriers.
    pub(super) fn hands_over(&self) -> bool {
        self.handovers.load(Ordering::SeqCst) != 0
    }

    /// Barrier `number` of a data link has passed. Handovers that need another round of barriers get
    /// it from `next`. Returns the subscriptions whose handover is complete.
    pub(super) fn barrier_passed(
        &self,
        link: usize,
        number: u64,
        next: impl Fn() -> BarrierNumbers,
    ) -> Vec<(SessionRef, FilterId)> {
        let mut complete = Vec::new();
        let mut mask = self.handovers.load(Ordering::SeqCst);
        while mask != 0 {
            let index = mask.trailing_zeros() as u16;
            mask &= mask - 1;
            let mut gone = Vec::new();
            let mut shard = self.shard(index);
            shard.handovers.passed(link, number, &mut gone, &next);
            if shard.handovers.is_empty() {
                self.handovers.fetch_and(!(1 << index), Ordering::SeqCst);
            }
            let whose = |(slot, filter)| (shard.reference(slot), filter);
            complete.extend(gone.into_iter().map(whose));
        }
        complete
    }

    /// Brings a session's timer and the accounts in line after it was worked on.
    fn settle(&self, shard: &mut Shard, at: u32) {
        shard.settle(at);
        self.charge(shard);
    }

    /// Adds a shard's changes to the accounts; to be called before its lock is given back.
    pub(super) fn charge(&self, shard: &mut Shard) {
        let delta = std::mem::take(&mut shard.accounts.entry_bytes);
        if delta != 0 {
            self.entry_bytes.fetch_add(delta, Ordering::Relaxed);
        }
        shard.accounts.output.settle();
    }
}

/// Counts the messages that a session let go of.
fn shed(slot: &mut Slot) {
    if slot.session.outbound().shed != Default::default() {
        let mut tally = Tally::default();
        tally.shed(&mut slot.session);
        tally.flush();
    }
}
