//! From the clients to the broker: into the queues of a publish link, and the answers back.

mod allowance;
mod arrivals;
mod pings;
pub mod queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::budget::Account;
use crate::mqtt::{Message, QoS, ReasonCode, Version};
use crate::session::{Incarnation, Token};
use crate::telemetry::{DeferReason, DropReason, metrics};
use crate::time::Millis;

use crate::router::handle::TaskWaker;
use crate::router::publish::allowance::Allowances;
use crate::router::publish::arrivals::Arrivals;
use crate::router::publish::queue::{Outgoing, PublishQueues};
use crate::router::sessions::{DueWill, Sessions};
use crate::router::types::SessionRef;

/// Bytes that a message takes beside its packet.
const MESSAGE_OVERHEAD_BYTES: u64 = 96;

/// How long QoS 0 publishes wait for a publish link that is being connected, longer than a dial with a probe
/// of the broker. Older ones are dropped.
pub const QOS0_WAIT: Duration = Duration::from_secs(10);

/// A publish of a client for the broker.
#[derive(Debug)]
pub struct ClientPublish {
    /// Names the publish in the broker's answer; `None`: nobody waits for an answer.
    pub token: Option<Token>,
    /// The message to publish.
    pub message: Message,
    /// The origin mark that the message is to carry, if the publisher has a No Local subscription that
    /// matches.
    pub origin_mark: Option<Incarnation>,
}

/// The bounds of the publishes that wait for the broker.
#[derive(Clone, Copy, Debug)]
pub(super) struct PublishBudgets {
    /// Bytes of all clients' publishes.
    pub bytes: u64,
    /// Bytes of one client's publishes.
    pub client_bytes: usize,
    /// Unanswered publishes of a 3.x client.
    pub v3_publishes: usize,
}

/// The publishes that wait for the broker.
#[derive(Debug)]
pub(super) struct Publishing {
    links: Box<[PublishLink]>,
    /// Publish links that sessions are spread over.
    used: AtomicU8,
    /// Publish links that are dialled. At most one more than are used: the last one, which is used
    /// once it has connected, and everything that the others had sent until then has arrived.
    wanted: AtomicU8,
    /// The link that was asked for last has connected, and waits for the others' publishes.
    growing: Mutex<bool>,
    budgets: PublishBudgets,
    /// The publishes that may go to the broker while data links lag.
    allowances: Allowances,
    /// Charged for every message that a client brings in.
    account: Arc<Account>,
}

/// One publish link, as the clients see it.
#[derive(Debug, Default)]
struct PublishLink {
    queues: Mutex<PublishQueues>,
    arrivals: Arrivals,
    waker: Arc<TaskWaker>,
    up: AtomicBool,
    /// When it was lost, or the process began, milliseconds.
    down_since: AtomicU64,
}

impl PublishLink {
    /// Whether it is down, and has been for so long that QoS 0 publishes do not wait for it.
    fn is_away(&self, now: Millis) -> bool {
        now >= Millis::new(self.down_since.load(Ordering::Relaxed)) + QOS0_WAIT
    }
}

impl Publishing {
    /// Begins with `links` publish links, which may grow to `links_max`, beside so many data links and
    /// shared links.
    pub(super) fn new(
        links: usize,
        links_max: usize,
        data_links: usize,
        budgets: PublishBudgets,
        account: Arc<Account>,
    ) -> Self {
        Self {
            links: (0..links_max).map(|_| PublishLink::default()).collect(),
            used: AtomicU8::new(links as u8),
            wanted: AtomicU8::new(links as u8),
            growing: Mutex::new(false),
            budgets,
            allowances: Allowances::new(data_links, links_max),
            account,
        }
    }

    /// Hands a publish to the client's publish link. A publish that cannot wait any more is answered
    /// 0x97, or at QoS 0 dropped, and counted.
    pub(super) fn publish(&self, sessions: &Sessions, publish_link: u8, outgoing: Outgoing) {
        let link = &self.links[usize::from(publish_link)];
        let session = outgoing.session;
        let away = !link.up.load(Ordering::Acquire);
        let mut queues = link.queues.lock();
        let refused = if self.account.used() > self.budgets.bytes {
            Some(DeferReason::Budget)
        } else if queues.bytes_of(session) > self.budgets.client_bytes {
            Some(DeferReason::ClientShare)
        } else {
            None
        };
        let message = &outgoing.message;
        let qos0 = message.qos() == QoS::AtMostOnce && outgoing.token.is_none();
        // QoS 0 does not wait for a broker that is away; wills and retained values do.
        let waits = !away || message.retain() || !link.is_away(outgoing.since);
        if qos0 && (refused.is_some() || !waits) {
            drop(queues);
            let reason = match refused {
                Some(_) => DropReason::UpstreamBudget,
                None => DropReason::UpstreamAwayQos0,
            };
            metrics().messages_dropped[reason].increment(1);
            return;
        }
        if let (Some(reason), Some(token)) = (refused, outgoing.token) {
            drop(queues);
            metrics().publishes_deferred[reason].increment(1);
            // A 3.x client was not read from before it came to this; what two of them pass at
            // once is kept.
            let answered = sessions.with(session, |s, _| {
                let v5 = s.version() == Version::V5;
                if v5 {
                    s.answered(token, ReasonCode::QUOTA_EXCEEDED);
                }
                v5
            });
            if answered != Some(false) {
                return;
            }
            queues = link.queues.lock();
        }
        let first = queues.is_empty();
        queues.push(outgoing);
        drop(queues);
        if first || !away {
            link.waker.raise();
        }
    }

    /// Publishes a client's will.
    pub(super) fn publish_will(&self, sessions: &Sessions, due: DueWill, now: Millis) {
        if !self.has_room() {
            return;
        }
        metrics().wills_published.increment(1);
        // A will is a publish by its own client, so No Local applies to it.
        let mark = sessions.with(due.session, |s, _| s.origin_mark(|| due.will.topic()));
        let publish = ClientPublish {
            token: None,
            message: due.will.charged_to(&self.account),
            origin_mark: mark.flatten(),
        };
        let outgoing = Outgoing::new(due.session, publish, now);
        self.publish(sessions, due.publish_link, outgoing);
    }

    /// Publishes a message of this node in the place of a client.
    pub(super) fn publish_own(
        &self,
        sessions: &Sessions,
        session: SessionRef,
        publish_link: u8,
        message: Message,
        now: Millis,
    ) {
        let publish = ClientPublish {
            token: None,
            message,
            origin_mark: None,
        };
        let outgoing = Outgoing::new(session, publish, now);
        self.publish(sessions, publish_link, outgoing);
    }

    /// Whether a publish that nobody waits for may be added. If not, it counts as dropped.
    pub(super) fn has_room(&self) -> bool {
        let room = self.account.used() <= self.budgets.bytes;
        if !room {
            metrics().messages_dropped[DropReason::UpstreamBudget].increment(1);
        }
        room
    }

    /// The account that is charged for the messages that clients bring in.
    pub(super) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Whether a 3.x client's next publish, of `size` bytes, has to wait in its socket: such a client
    /// cannot be told to come again. `unanswered` of its publishes wait for the broker.
    pub(super) fn defers(
        &self,
        session: SessionRef,
        publish_link: u8,
        unanswered: usize,
        size: usize,
    ) -> bool {
        let used = self.account.used();
        if unanswered >= self.budgets.v3_publishes {
            return true;
        }
        // The room that is kept free suffices for publishes of other threads in the same moment.
        let budget = self.budgets.bytes;
        let free = (budget / 64).min(1024 * 1024);
        if used > 0 && used + size as u64 + MESSAGE_OVERHEAD_BYTES > budget - free {
            return true;
        }
        let link = &self.links[usize::from(publish_link)];
        let bytes = link.queues.lock().bytes_of(session);
        bytes > 0 && bytes + size > self.budgets.client_bytes
    }

    /// The publish link that a session's publishes begin on: the same for all sessions of a client,
    /// one after the other, so that its publishes stay in order.
    pub(super) fn link_of(&self, session: SessionRef) -> u8 {
        place(session, self.used.load(Ordering::Relaxed))
    }

    /// The round of a publish link with which every publish that was handed to it until now has
    /// arrived at the broker.
    pub(super) fn next_round(&self, publish_link: u8) -> u32 {
        self.links[usize::from(publish_link)].arrivals.next_round()
    }

    /// Moves a session to the publish link that it would begin on now, once none of its publishes
    /// waits for its old link or is under way there: those without an acknowledgement arrive with
    /// round `round` of the old link. To be called before its next publish is handed over. Returns
    /// the publish link from here on.
    pub(super) fn move_session(
        &self,
        sessions: &Sessions,
        session: SessionRef,
        from: u8,
        round: u32,
    ) -> u8 {
        let old = &self.links[usize::from(from)];
        if !old.arrivals.has_passed(round) {
            old.arrivals.ask();
            return from;
        }
        let to = self.link_of(session);
        let mut shard = sessions.shard(session.shard);
        let Some(slot) = shard.get(session) else {
            return from;
        };
        if old.queues.lock().bytes_of(session) == 0 {
            slot.publish_link = to;
        }
        slot.publish_link
    }

    /// Whether publishes of a session that ended wait for its publish link.
    pub(super) fn is_waiting(&self, session: SessionRef, publish_link: u8) -> bool {
        let link = &self.links[usize::from(publish_link)];
        link.queues.lock().bytes_of(session) > 0
    }

    /// Whether the client's next session may begin on another publish link than this one.
    pub(super) fn may_move(&self, session: SessionRef, publish_link: u8) -> bool {
        let used = self.used.load(Ordering::Acquire);
        let wanted = self.wanted.load(Ordering::Acquire);
        [used, wanted]
            .iter()
            .any(|links| place(session, *links) != publish_link)
    }

    /// Publish links that are dialled.
    pub(super) fn links_wanted(&self) -> usize {
        usize::from(self.wanted.load(Ordering::Acquire))
    }

    /// Asks for another publish link, once the last that was asked for is there. Returns whether
    /// there will be one.
    pub(super) fn add_link(&self) -> bool {
        let used = self.used.load(Ordering::Acquire);
        if usize::from(used) >= self.links.len() {
            return false;
        }
        let (order, lax) = (Ordering::AcqRel, Ordering::Relaxed);
        let added = self.wanted.compare_exchange(used, used + 1, order, lax);
        if added.is_ok() {
            self.links[usize::from(used)].waker.raise();
        }
        added.is_ok()
    }

    /// Publish link `link` is connected, or not.
    pub(super) fn link_up(&self, link: usize, up: bool, now: Millis) {
        let was_up = self.links[link].up.swap(up, Ordering::AcqRel);
        if !up {
            let link = &self.links[link];
            if was_up {
                link.down_since.store(now.as_u64(), Ordering::Relaxed);
            }
            return link.arrivals.connection_lost(&mut link.queues.lock());
        }
        let mut growing = self.growing.lock();
        let used = usize::from(self.used.load(Ordering::Acquire));
        // Only the link that was asked for last can be the one behind the used links.
        if !*growing && link == used && link < self.links_wanted() {
            *growing = true;
            for older in &self.links[..used] {
                older.arrivals.await_ping(&mut older.queues.lock());
            }
        }
    }

    /// Whether publish link `link` is to send a PINGREQ now, behind everything that it took from its
    /// queues. If so, it counts as sent.
    pub(super) fn ping_due(&self, link: usize, now: Millis) -> bool {
        let link = &self.links[link];
        link.arrivals.is_open() && link.arrivals.ping_due(&mut link.queues.lock(), now)
    }

    /// The broker has answered a PINGREQ of publish link `link`.
    pub(super) fn ping_answered(&self, link: usize) {
        let answered = &self.links[link];
        if !answered.arrivals.ping_answered(&mut answered.queues.lock()) {
            return;
        }
        let mut growing = self.growing.lock();
        let used = self.used.load(Ordering::Acquire);
        let mut older = self.links[..usize::from(used)].iter();
        let awaits = |l: &PublishLink| l.queues.lock().pings.is_awaited();
        if *growing && !older.any(awaits) {
            *growing = false;
            self.used.store(used + 1, Ordering::Release);
        }
    }

    /// Whether publishes are limited, because data links lag.
    pub(super) fn is_limited(&self) -> bool {
        self.allowances.is_limited()
    }

    /// Takes up to `wanted` publishes of what the data links allow to publish link `link`. Returns how
    /// many it may send.
    pub(super) fn take_allowance(&self, link: usize, wanted: usize) -> usize {
        self.allowances.take(link, wanted)
    }

    /// Gives back publishes that publish link `link` did not have.
    pub(super) fn return_allowance(&self, link: usize, unused: usize) {
        self.allowances.give_back(link, unused);
    }

    /// Whether a publish link waits for the next round of data link `data_link`.
    pub(super) fn is_used_up(&self, data_link: usize) -> bool {
        self.allowances.is_used_up(data_link)
    }

    /// Limits the publishes of the next round of data link `data_link`; `None`: not any more.
    pub(super) fn limit(&self, data_link: usize, window: Option<u32>) {
        let used = self.used.load(Ordering::Relaxed);
        if self.allowances.begin_round(data_link, window, used) {
            for link in &self.links[..usize::from(used)] {
                link.waker.raise();
            }
        }
    }

    /// Works on the publishes that wait for publish link `link`.
    pub(super) fn queues<R>(&self, link: usize, f: impl FnOnce(&mut PublishQueues) -> R) -> R {
        f(&mut self.links[link].queues.lock())
    }

    /// Wakes the task of publish link `link`.
    pub(super) fn waker(&self, link: usize) -> &Arc<TaskWaker> {
        &self.links[link].waker
    }

    /// Publishes that wait for publish links.
    pub(super) fn waiting(&self) -> usize {
        self.links.iter().map(|l| l.queues.lock().len()).sum()
    }
}

/// The publish link of a session when so many are used. It depends on the client alone: sessions of
/// one client are in the same shard.
fn place(session: SessionRef, links: u8) -> u8 {
    // Fewer than 256.
    (session.shard % u16::from(links)) as u8
}

#[cfg(test)]
mod tests;
