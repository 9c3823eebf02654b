//! A session in its shard, with the charges for it.

use std::sync::Arc;

use crate::session::{ENTRY_BYTES, SUBSCRIPTION_BYTES, Session};
use crate::time::Deadline;

use crate::router::account::Holder;
use crate::router::handle::ConnectionHandle;
use crate::router::types::Peer;

/// Bytes of a session beside its names, its will and its subscriptions, as measured: its state, the
/// client's address, and its entries in the tables of its shard.
pub(super) const SESSION_BYTES: usize = size_of::<Slot>() + 272;

/// Bytes that are charged for a session with one subscription and with names of 48 bytes together, for
/// people who want to know how many sessions find room.
pub(crate) const TYPICAL_SESSION_BYTES: usize = SESSION_BYTES + SUBSCRIPTION_BYTES + 48;

/// A session with the router's own data about it.
#[derive(Debug)]
pub(in crate::router) struct Slot {
    pub slot_version: u32,
    pub session: Session,
    pub handle: Option<Arc<ConnectionHandle>>,
    /// The client's end of the latest connection, for the admin API and the log.
    pub peer: Option<Arc<Peer>>,
    /// The connection's task has been woken and has not looked at its output since.
    pub woken: bool,
    /// The number of its principal's share of the shard.
    pub(super) share: u32,
    /// It is in the order in which queues are evicted.
    pub(super) listed: bool,
    /// The publish link of its publishes.
    pub publish_link: u8,
    /// The time of the session's entry among the timers.
    pub(super) armed: Option<Deadline>,
    /// Bytes charged to the account of entries.
    pub(super) charged_entry_bytes: u32,
    /// Bytes charged to the account of output.
    pub(super) charged_output_bytes: u32,
    /// Who the session is charged to.
    pub holder: Holder,
    /// Bytes charged to the account of sessions.
    pub(super) charged_bytes: u32,
    /// The part of them for the will of the last CONNECT. It stays when the will is published, so that
    /// the client finds room for its will when it comes back.
    pub(super) will_bytes: u32,
    /// The session ended to make room for others, and its bytes are noted as coming back.
    pub(super) ended_for_others: bool,
    /// Bytes charged to the principal: each message in full, with its entry.
    pub(super) charged_queue_bytes: u64,
    /// The filters in which the session sleeps.
    pub(super) asleep: u32,
}

impl Slot {
    /// Charges the session's queue and output. Returns the bytes that are to be added to the accounts.
    pub(super) fn charge(&mut self) -> Charge {
        let mut idle = 0;
        if !self.session.attached() {
            self.session.forget_idle();
            idle = self.session.idle_bytes();
        }
        let outbound = self.session.outbound();
        let entries = (outbound.entries() + self.session.deferred()) * ENTRY_BYTES;
        let entries = entries + outbound.identifier_bytes() + idle;
        let messages = outbound.queued_bytes() + outbound.in_flight_bytes();
        let messages = messages + self.session.deferred_bytes();
        let (mut output, mut shared) = (0, 0);
        if let Some(connection) = self.session.connection_ref() {
            let waiting = connection.output_len();
            output = (waiting.0 + connection.taken.own_bytes) as u32;
            shared = waiting.1 + connection.taken.shared_bytes;
        }
        // Both are bounded far below 4 GiB by the budgets.
        let entry_bytes = (entries + self.session.inbound_bytes()) as u32;
        self.charge_for(entry_bytes, output, (messages + shared + entries) as u64)
    }

    /// Bytes of the session for the account of sessions. Notes the part for the will.
    pub(super) fn session_bytes(&mut self) -> u32 {
        let session = &self.session;
        // The limits of wills and subscriptions keep both numbers far below 4 GiB.
        let will = session.will_bytes() as u32;
        if will > 0 || session.attached() || session.is_closed() {
            self.will_bytes = will;
        }
        (SESSION_BYTES + session.held_bytes()) as u32 + self.will_bytes
    }

    /// Gives the session's charge back. Returns the bytes that are to be added to the accounts.
    pub(super) fn discharge(&mut self) -> Charge {
        self.charge_for(0, 0, 0)
    }

    fn charge_for(&mut self, entry_bytes: u32, output: u32, queued: u64) -> Charge {
        let change = Charge {
            entries: i64::from(entry_bytes) - i64::from(self.charged_entry_bytes),
            output: i64::from(output) - i64::from(self.charged_output_bytes),
            queued: queued as i64 - self.charged_queue_bytes as i64,
        };
        self.charged_entry_bytes = entry_bytes;
        self.charged_output_bytes = output;
        self.charged_queue_bytes = queued;
        change
    }

    /// Whether the client's connection keeps messages in memory that the queue does not have.
    pub(super) fn holds_messages(&self) -> bool {
        self.shared_output() > 0 || self.session.outbound().in_flight_bytes() > 0
    }

    /// Bytes of messages in the output of the client's connection.
    pub(super) fn shared_output(&self) -> usize {
        let connection = self.session.connection_ref();
        connection.map_or(0, |c| c.shared_output_len() + c.taken.shared_bytes)
    }
}

/// A slot in an order. Packed, because the sets of them have an entry for each session: 12 bytes where the
/// key takes 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C, packed(4))]
pub(super) struct SlotBy<K>(pub K, pub u32);

const _: () = assert!(size_of::<SlotBy<u64>>() == 12);

/// The change of a session's charges, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Charge {
    /// Of the account of queue entries.
    pub(super) entries: i64,
    /// Of the account of output.
    pub(super) output: i64,
    /// Of the principal's use of the queues: each message counts in full, with its entry.
    pub(super) queued: i64,
}
