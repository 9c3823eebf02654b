//! The calls of the clients' connections.

use std::sync::Arc;

use crate::budget::{Account, Allowance};
use crate::mqtt::QoS;
use crate::outbuf::OutBuf;
use crate::session::{CloseReason, Effect, Session, SessionKey, SessionLimits};
use crate::streams::{StreamId, StreamSet};
use crate::time::Millis;

use crate::router::handle::ConnectionHandle;
use crate::router::publish::queue::Outgoing;
use crate::router::{ClientPublish, Peer, Predecessor, Router, SessionInfo, SessionRef, Totals};

impl Router {
    /// The limits of every session.
    pub fn limits(&self) -> &SessionLimits {
        self.sessions.limits()
    }

    /// The account that messages from the broker are charged to.
    pub fn queue_account(&self) -> &Arc<Account> {
        self.sessions.queue_account()
    }

    /// Bytes that all queues hold: messages once, and their entries.
    pub fn queue_used(&self) -> u64 {
        self.sessions.queue_used()
    }

    /// Bytes that are charged for sessions and filters.
    pub fn session_bytes(&self) -> u64 {
        self.account.bytes.used()
    }

    /// Filters in the table, in use or lingering.
    pub fn filters_known(&self) -> usize {
        self.filters.read().len()
    }

    /// Bytes of output that wait for sockets.
    pub fn output_used(&self) -> u64 {
        self.sessions.output_used()
    }

    /// Whether the output of all connections is over its budget.
    pub fn output_pressed(&self) -> bool {
        self.sessions.output_pressed()
    }

    /// The largest QoS that the broker accepts.
    pub fn maximum_qos(&self) -> QoS {
        self.broker.maximum_qos()
    }

    /// Whether clients are granted shared subscriptions.
    pub fn shares(&self) -> bool {
        self.config.local_groups || self.broker.shared()
    }

    /// Whether No Local subscriptions are granted, as far as the broker is known.
    pub fn no_local_available(&self) -> bool {
        self.broker.properties()
    }

    /// Whether the broker keeps retained messages.
    pub fn retain_available(&self) -> bool {
        self.broker.retain_available()
    }

    /// The smaller of our and the broker's Maximum Packet Size, bytes. Room for the properties that we
    /// add to a forwarded packet is taken off the broker's.
    pub fn packet_max(&self) -> u32 {
        let broker = self.broker.packet_max();
        self.limits().packet_max.min(broker.saturating_sub(64))
    }

    /// The connection that a CONNECT of this principal would take over now, unless it is `known`. The
    /// client's DISCONNECT may be among the bytes that have arrived there, so the connection is asked to
    /// read them; the caller waits for a bounded time until they are read.
    pub fn predecessor(
        &self,
        key: &SessionKey,
        principal: &str,
        known: Option<(SessionRef, u64)>,
    ) -> Option<Predecessor> {
        self.sessions.predecessor(key, principal, known)
    }

    /// Works on a session under its shard's lock. `None`: `connection_no` is not its current
    /// connection any more.
    pub fn with<R>(
        &self,
        session: SessionRef,
        connection_no: u64,
        f: impl FnOnce(&mut Session, &SessionLimits) -> R,
    ) -> Option<R> {
        self.sessions.with_connection(session, connection_no, f)
    }

    /// Works on a session under its shard's lock, for packets of its client. `None`:
    /// `connection_no` is not its current connection any more. The effects are for
    /// [`Router::apply`].
    pub(crate) fn feed<R>(
        &self,
        session: SessionRef,
        connection_no: u64,
        effects: &mut Vec<Effect>,
        f: impl FnOnce(&mut Session, &SessionLimits, &mut Allowance, &mut Vec<Effect>) -> R,
    ) -> Option<R> {
        self.sessions.feed(session, connection_no, effects, f)
    }

    /// A client's address changed within its connection.
    pub fn moved(&self, session: SessionRef, connection_no: u64, peer: Arc<Peer>) {
        self.sessions.moved(session, connection_no, peer);
    }

    /// Wakes a task at the next tick: it waits for room, or for a deadline.
    pub fn wake_soon(&self, handle: &Arc<ConnectionHandle>) {
        self.sessions.wake_soon(handle);
    }

    /// Fills up the output of a connection, and takes it. Some of its streams may not have taken all of
    /// their earlier output: only the streams in `free` are taken from, while `unsent` bytes, own and
    /// shared ones, are still with the others. `empty` is exchanged for the bytes of the control
    /// stream; those of the others are returned, by number. `None`: the connection is not the
    /// session's any more.
    pub(crate) fn take_streams(
        &self,
        session: SessionRef,
        connection_no: u64,
        (free, unsent): (StreamSet, (usize, usize)),
        empty: &mut OutBuf,
        now: Millis,
    ) -> Option<Vec<(StreamId, OutBuf)>> {
        self.sessions
            .take_output(session, connection_no, (free, unsent), empty, now)
    }

    /// Hands a publish to the client's publish link. A publish that cannot wait any more is answered
    /// 0x97, or at QoS 0 dropped, and counted.
    pub fn publish(
        &self,
        session: SessionRef,
        publish_link: u8,
        publish: ClientPublish,
        now: Millis,
    ) {
        let outgoing = Outgoing::new(session, publish, now);
        self.publishing
            .publish(&self.sessions, publish_link, outgoing);
    }

    /// Whether a 3.x client's next publish, of `size` bytes, has to wait in its socket: such a client
    /// cannot be told to come again. `waiting` of its publishes wait for the broker.
    pub(crate) fn defers_publish(
        &self,
        session: SessionRef,
        publish_link: u8,
        waiting: usize,
        size: usize,
    ) -> bool {
        self.publishing.defers(session, publish_link, waiting, size)
    }

    /// The publish link that a session's publishes would begin on now.
    pub fn publish_link(&self, session: SessionRef) -> u8 {
        self.publishing.link_of(session)
    }

    /// The round of a publish link with which every publish that was handed to it until now has
    /// arrived at the broker.
    pub(crate) fn next_publish_round(&self, publish_link: u8) -> u32 {
        self.publishing.next_round(publish_link)
    }

    /// Moves a session to the publish link that it would begin on now, once none of its publishes
    /// waits for its old link or is under way there: those without an acknowledgement arrive with
    /// round `round` of the old link. To be called before its next publish is handed over. Returns
    /// the publish link from here on.
    pub(crate) fn move_publishes(&self, session: SessionRef, from: u8, round: u32) -> u8 {
        self.publishing
            .move_session(&self.sessions, session, from, round)
    }

    /// The time by which `bytes` that are offered to a socket from `since` on must be taken.
    pub fn stalled_at(&self, since: Millis, bytes: usize) -> Millis {
        self.sessions.stalled_at(since, bytes)
    }

    /// Ends connections whose socket takes too little. Walks over all sessions, so it is not called at
    /// each tick.
    pub fn close_stalled(&self, now: Millis) {
        self.sessions.close_stalled(now);
    }

    /// Asks for a WebSocket ping on silent connections. Walks over all sessions, so it is not called at
    /// each tick.
    pub fn ping_idle(&self, now: Millis) {
        self.sessions.ping_idle(now);
    }

    /// Asks up to `most` connections to end.
    pub fn close_some(&self, reason: CloseReason, most: usize) {
        self.sessions.close_some(reason, most);
    }

    /// Up to `limit` sessions in the order of their keys, after `after`.
    pub fn sessions(&self, after: Option<&str>, limit: usize) -> Vec<SessionInfo> {
        self.sessions.list(after, limit)
    }

    /// The keys of a client identifier's sessions, one for each mount. Walks over a shard.
    pub(crate) fn session_keys(&self, client_id: &str) -> Vec<SessionKey> {
        self.sessions.keys_of(client_id)
    }

    /// The session of a key.
    pub fn session(&self, key: &SessionKey) -> Option<SessionInfo> {
        self.sessions.find(key)
    }

    /// Ends a session and its connection because an operator asks for it. False: no session has this key.
    pub fn end_session(&self, key: &SessionKey, now: Millis) -> bool {
        let actions = self.sessions.end_by_operator(key, now);
        actions.map(|actions| self.settle(actions, now)).is_some()
    }

    /// Ends the connections of principals that lost the right to connect; their sessions stay. Walks
    /// over all sessions. Returns the number of connections.
    pub(crate) fn close_of(&self, is_removed: impl Fn(&str) -> bool) -> usize {
        self.sessions.close_of(is_removed)
    }

    /// Sums over all sessions.
    pub fn totals(&self) -> Totals {
        self.sessions.totals()
    }
}
