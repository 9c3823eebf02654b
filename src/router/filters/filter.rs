//! One filter: where the broker sends its messages from, how far its SUBSCRIBE is, what clients are
//! granted on it, and who uses it.
//!
//! The fields are private to this file. The transitions say what has happened, change the state,
//! and return what has to be done.

mod grants;
mod outcome;
mod restored;
mod suspicion;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use smallvec::SmallVec;

use crate::mqtt::{QoS, ReasonCode};
use crate::router::account::Holder;
use crate::router::types::PendingGrant;
use crate::time::Millis;
use crate::topics::{FilterId, split_shared};

pub use outcome::LinkSession;
pub(in crate::router) use outcome::{Release, Resumed, SubackOutcome, Unsubacked};

/// Where the messages of a filter come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Placement {
    /// The broker's capabilities are not known yet, or it has no room for the filter.
    Unplaced,
    /// From a subscription of its own, on this data or shared link.
    Link(u8),
    /// From the subscription of this filter, in which it lies: a root, or another filter on a data
    /// link where the broker has no Subscription Identifiers.
    Inside(FilterId),
    /// A group of shared subscribers that exists at this node alone. Its messages are those of
    /// `plain`, the filter without the share name.
    Local { plain: FilterId },
}

/// How far a filter is at the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router) enum Phase {
    /// Not subscribed.
    Absent,
    /// A SUBSCRIBE is to be sent as soon as the link can send it.
    Pending,
    /// The SUBSCRIBE is sent and not answered.
    Subscribing,
    /// The broker has granted the filter.
    Active {
        /// A SUBSCRIBE for a higher QoS is to be sent, or is sent and not answered.
        raising: bool,
    },
    /// An UNSUBSCRIBE is to be sent, or is sent and not answered.
    Unsubscribing,
}

/// What a client that asks for a filter gets, apart from the filter's phase: a filter that was
/// granted stays so while its link is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It waits for the broker's SUBACK.
    AwaitingSuback,
    /// It is granted at once, since the broker granted the filter before.
    Granted,
    /// It is granted at once although the broker has not answered in time. Such subscriptions do
    /// not count as active until it has.
    Presumed,
    /// It waits for the SUBACK. Others were granted the filter without the broker's answer, and are
    /// not active yet.
    Withdrawn,
}

/// One filter. Its name does not change, and neither does whether it is a root.
#[derive(Debug)]
pub(in crate::router) struct Filter {
    name: Arc<str>,
    /// `$share/group/filter`.
    shared: bool,
    /// Kept subscribed by configuration, whether clients use it or not.
    root: bool,
    placement: Placement,
    phase: Phase,
    standing: Standing,
    /// The highest QoS that was asked for.
    wanted: QoS,
    /// The QoS of the last SUBSCRIBE, if the broker may have it, answered or not.
    asked: Option<QoS>,
    /// What clients are granted at most: by the last SUBACK, or presumed; `None` before.
    granted: Option<QoS>,
    /// Local groups that get its messages.
    groups: Vec<FilterId>,
    /// Shards with sessions that use it, as bits.
    mask: u64,
    /// How many subscriptions each of these shards has.
    references: SmallVec<[(u16, u32); 1]>,
    /// SUBSCRIBEs of clients that wait for the broker's answer on this filter.
    awaiting_suback: Vec<PendingGrant>,
    /// Since when nobody uses it; `None`: it is in use.
    idle_since: Option<Millis>,
    /// Messages that arrived for nobody since then.
    unread: AtomicU32,
    /// How often the broker has ended the link while its SUBSCRIBE had no answer, since the last one.
    ends: u8,
    /// Who it is charged to.
    pub(super) holder: Option<Holder>,
}

// A million filters may be known at once.
const _: () = assert!(size_of::<Filter>() <= 144);

impl Filter {
    /// A filter that is about to be used.
    pub(crate) fn new(name: Arc<str>) -> Self {
        Self {
            shared: split_shared(&name).is_some(),
            name,
            root: false,
            placement: Placement::Unplaced,
            phase: Phase::Absent,
            standing: Standing::AwaitingSuback,
            wanted: QoS::AtMostOnce,
            asked: None,
            granted: None,
            groups: Vec::new(),
            mask: 0,
            references: SmallVec::new(),
            awaiting_suback: Vec::new(),
            idle_since: None,
            unread: AtomicU32::new(0),
            ends: 0,
            holder: None,
        }
    }

    /// A filter that is known from an earlier process, and that nobody uses yet.
    pub(crate) fn idle(name: Arc<str>, since: Millis) -> Self {
        Self {
            idle_since: Some(since),
            ..Self::new(name)
        }
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Whether it is `$share/group/filter`.
    pub(crate) fn is_shared(&self) -> bool {
        self.shared
    }

    /// The filter without its share name.
    pub(crate) fn topics(&self) -> &str {
        match self.shared {
            true => split_shared(&self.name).map_or(&self.name, |(_, topics)| topics),
            false => &self.name,
        }
    }

    /// Whether it is kept subscribed by configuration.
    pub(crate) fn is_root(&self) -> bool {
        self.root
    }

    pub(crate) fn placement(&self) -> Placement {
        self.placement
    }

    /// The link that carries its own subscription, if it has one.
    pub(crate) fn link(&self) -> Option<usize> {
        match self.placement {
            Placement::Link(link) => Some(usize::from(link)),
            Placement::Unplaced | Placement::Inside(_) | Placement::Local { .. } => None,
        }
    }

    /// The other filter that its messages come through, if it has no subscription of its own.
    pub(crate) fn source(&self) -> Option<FilterId> {
        match self.placement {
            Placement::Inside(source) | Placement::Local { plain: source } => Some(source),
            Placement::Unplaced | Placement::Link(_) => None,
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the broker has granted it, so far as is known.
    pub(crate) fn is_active(&self) -> bool {
        matches!(self.phase, Phase::Active { .. })
    }

    /// Whether the broker is still to answer for the QoS that is wanted.
    pub(crate) fn is_rising(&self) -> bool {
        match self.phase {
            Phase::Pending | Phase::Subscribing => true,
            Phase::Active { raising } => raising,
            Phase::Absent | Phase::Unsubscribing => false,
        }
    }

    /// Whether clients that ask are granted it without waiting for the broker.
    pub(crate) fn is_granted(&self) -> bool {
        self.is_active() || matches!(self.standing, Standing::Granted | Standing::Presumed)
    }

    /// Whether the broker's answer stands behind what clients are granted now.
    pub(crate) fn is_confirmed(&self) -> bool {
        self.is_active() || !self.is_presumed()
    }

    /// Whether clients have subscriptions on it that do not count until the broker answers.
    pub(crate) fn is_presumed(&self) -> bool {
        matches!(self.standing, Standing::Presumed | Standing::Withdrawn)
    }

    /// The highest QoS that was asked for.
    pub(crate) fn wanted(&self) -> QoS {
        self.wanted
    }

    /// The QoS that clients are granted at most.
    pub(crate) fn granted(&self) -> QoS {
        self.granted.unwrap_or_default()
    }

    /// Whether a client can be granted `qos` at once. If more was asked for, the answer to that is
    /// awaited.
    pub(crate) fn grants(&self, qos: QoS) -> bool {
        let awaited = self.is_rising() && !self.is_presumed() && self.granted() < qos;
        self.is_granted() && self.wanted >= qos && !awaited
    }

    /// The QoS that a client gets that asked for `qos`. Without the broker's answer it is what the
    /// broker was asked for.
    pub(crate) fn grant(&self, qos: QoS) -> QoS {
        match self.is_presumed() {
            true => self.wanted.min(qos),
            false => self.granted().min(qos),
        }
    }

    /// Local groups that get its messages.
    pub(crate) fn groups(&self) -> &[FilterId] {
        &self.groups
    }

    /// Shards with sessions that use it, as bits.
    pub(crate) fn mask(&self) -> u64 {
        self.mask
    }

    /// Whether neither a subscription nor a local group uses it.
    pub(crate) fn is_unused(&self) -> bool {
        self.references.is_empty() && self.groups.is_empty()
    }

    /// Whether somebody uses it, or waits for an answer on it.
    pub(crate) fn is_wanted(&self) -> bool {
        self.idle_since.is_none() || self.is_awaited()
    }

    /// Whether clients wait for an answer on it.
    pub(crate) fn is_awaited(&self) -> bool {
        !self.awaiting_suback.is_empty()
    }

    /// Since when nobody uses it; `None`: it is in use.
    pub(crate) fn idle_since(&self) -> Option<Millis> {
        self.idle_since
    }

    /// A message arrived and nobody got it.
    pub(crate) fn count_unread(&self) {
        self.unread.fetch_add(1, Ordering::Relaxed);
    }

    /// Messages that arrived for nobody since it became idle.
    pub(crate) fn unread(&self) -> u32 {
        self.unread.load(Ordering::Relaxed)
    }
}

/// Placement.
impl Filter {
    /// It is a root from now on: wanted at the highest QoS for as long as the process runs. Returns
    /// since when it was idle, if it was.
    pub(crate) fn make_root(&mut self) -> Option<Millis> {
        self.root = true;
        // An earlier process may have subscribed it.
        self.request(QoS::ExactlyOnce);
        self.idle_since.take()
    }

    /// A link is chosen.
    pub(crate) fn place_on(&mut self, link: u8) {
        self.placement = Placement::Link(link);
    }

    /// It lies inside another filter, and is active as long as that one is.
    pub(crate) fn place_inside(&mut self, outer: FilterId) {
        self.placement = Placement::Inside(outer);
        self.phase = Phase::Active { raising: false };
        self.asked = None;
    }

    /// It lies inside another filter, and is to be subscribed on a link of its own.
    pub(crate) fn begin_move(&mut self) {
        self.phase = Phase::Pending;
        self.asked = None;
    }

    /// Its SUBSCRIBE on a link of its own is taken back. Whether an UNSUBSCRIBE is to be sent.
    pub(crate) fn abort_move(&mut self) -> bool {
        let at_broker = self.phase != Phase::Absent && self.asked.is_some();
        if at_broker {
            self.phase = Phase::Unsubscribing;
        }
        at_broker
    }

    /// It is a group of this node alone, for the messages of `plain`.
    pub(crate) fn place_locally(&mut self, plain: FilterId) {
        self.placement = Placement::Local { plain };
        self.phase = Phase::Active { raising: false };
    }

    /// The placement no longer holds, because the broker's capabilities changed.
    pub(crate) fn unplace(&mut self) {
        self.placement = Placement::Unplaced;
    }

    /// It was subscribed on another link, and is to be subscribed on its new one. Whether a SUBSCRIBE
    /// is to be queued.
    pub(crate) fn moved(&mut self) -> bool {
        let wanted = self.phase != Phase::Absent && self.link().is_some();
        if wanted {
            self.phase = Phase::Pending;
        }
        wanted
    }

    /// It is subscribed though no client uses it. Whether it has become idle by that.
    pub(crate) fn make_idle(&mut self) -> bool {
        self.idle_if_unused(Millis::ZERO)
    }

    /// No link can take it, or the broker cannot serve it.
    pub(crate) fn unservable(&mut self) {
        self.phase = Phase::Absent;
        self.withdraw();
    }

    fn withdraw(&mut self) {
        self.standing = match self.is_presumed() {
            true => Standing::Withdrawn,
            false => Standing::AwaitingSuback,
        };
    }
}

/// The conversation with the broker.
impl Filter {
    /// Somebody wants it at `qos`. Whether a SUBSCRIBE is to be queued; if one is under way, the
    /// next follows its answer.
    pub(crate) fn request(&mut self, qos: QoS) -> bool {
        let higher = qos > self.wanted;
        self.wanted = self.wanted.max(qos);
        match self.phase {
            Phase::Absent => {
                self.phase = Phase::Pending;
                true
            }
            Phase::Active { raising: false } if higher => {
                self.phase = Phase::Active { raising: true };
                true
            }
            Phase::Active { .. } | Phase::Pending | Phase::Subscribing | Phase::Unsubscribing => {
                false
            }
        }
    }

    /// Somebody wants it at `qos`; another filter brings its messages at present.
    pub(crate) fn want(&mut self, qos: QoS) {
        self.wanted = self.wanted.max(qos);
    }

    /// Its turn among the SUBSCRIBEs of the link has come. The QoS to ask for, at least `floor`;
    /// `None`: nothing is to be sent.
    pub(crate) fn subscribe_sent(&mut self, floor: QoS) -> Option<QoS> {
        match self.phase {
            Phase::Pending => self.phase = Phase::Subscribing,
            Phase::Active { raising: true } => {}
            Phase::Active { raising: false }
            | Phase::Absent
            | Phase::Subscribing
            | Phase::Unsubscribing => return None,
        }
        self.wanted = self.wanted.max(floor);
        self.asked = Some(self.wanted);
        Some(self.wanted)
    }

    /// The broker's SUBACK, or our own answer in its place.
    pub(crate) fn suback(&mut self, code: ReasonCode) -> SubackOutcome {
        let first = match self.phase {
            Phase::Subscribing => true,
            Phase::Active { raising: true } => false,
            Phase::Active { raising: false }
            | Phase::Absent
            | Phase::Pending
            | Phase::Unsubscribing => return SubackOutcome::Stray,
        };
        if code.is_error() {
            if first {
                self.phase = Phase::Absent;
                self.asked = None;
                self.withdraw();
            } else {
                self.phase = Phase::Active { raising: false };
            }
            return SubackOutcome::Refused;
        }
        self.ends = 0;
        let asked = self.asked.unwrap_or_default();
        let again = self.wanted > asked;
        let presumed = self.is_presumed();
        self.phase = Phase::Active { raising: again };
        self.granted = QoS::from_u8(code.0);
        self.standing = match presumed && again {
            true => Standing::Presumed,
            false => Standing::Granted,
        };
        SubackOutcome::Granted {
            asked,
            again,
            presumed,
        }
    }

    /// The broker has not answered in time: clients are granted the filter without its answer.
    pub(crate) fn presume(&mut self) {
        self.standing = Standing::Presumed;
        self.granted = Some(self.wanted);
    }

    /// The broker has answered for the filter in which it lies. Whether clients were granted it before
    /// without that answer.
    pub(crate) fn outer_answered(&mut self) -> bool {
        let presumed = self.is_presumed();
        self.standing = Standing::AwaitingSuback;
        presumed
    }

    /// Its link is connected again. A request that was under way when the link was lost is in doubt, and
    /// is repeated, which is harmless.
    pub(crate) fn resume(&mut self, session: LinkSession) -> Resumed {
        if session == LinkSession::New {
            self.asked = None;
        }
        let resumed = match self.phase {
            Phase::Absent => Resumed::Rests,
            Phase::Active { raising: false } if session == LinkSession::Resumed => Resumed::Rests,
            Phase::Active { raising: true } if session == LinkSession::Resumed => {
                return Resumed::Subscribe;
            }
            Phase::Active { .. } => Resumed::Regain,
            Phase::Pending | Phase::Subscribing => Resumed::Subscribe,
            Phase::Unsubscribing if self.is_wanted() => Resumed::Subscribe,
            Phase::Unsubscribing if session == LinkSession::New => Resumed::Remove,
            Phase::Unsubscribing => Resumed::Unsubscribe,
        };
        if matches!(resumed, Resumed::Subscribe | Resumed::Regain) {
            self.phase = Phase::Pending;
        }
        resumed
    }

    /// Nobody uses it, and it is to go. A filter that is only to be subscribed again may still be at
    /// the broker.
    pub(crate) fn release(&mut self) -> Release {
        if self.is_awaited() {
            return Release::Later;
        }
        let at_broker = match self.phase {
            Phase::Active { .. } => true,
            Phase::Pending => self.asked.is_some(),
            Phase::Absent => false,
            Phase::Subscribing | Phase::Unsubscribing => return Release::Later,
        };
        match self.placement {
            Placement::Link(link) if at_broker => {
                self.phase = Phase::Unsubscribing;
                // Whoever asks now waits for the next SUBSCRIBE.
                self.withdraw();
                Release::Unsubscribe(link)
            }
            _ => Release::Remove,
        }
    }

    /// The broker's UNSUBACK.
    pub(crate) fn unsuback(&mut self) -> Unsubacked {
        if self.phase != Phase::Unsubscribing {
            return Unsubacked::Stray;
        }
        self.phase = Phase::Absent;
        self.withdraw();
        match self.is_wanted() {
            true => Unsubacked::Again(self.wanted),
            false => Unsubacked::Remove,
        }
    }
}

/// Its users.
impl Filter {
    /// One more subscription of a session in `shard`. Returns since when it was idle, if it was.
    pub(crate) fn reference(&mut self, shard: u16) -> Option<Millis> {
        self.mask |= 1 << shard;
        match self.references.iter_mut().find(|(s, _)| *s == shard) {
            Some((_, count)) => *count += 1,
            None => self.references.push((shard, 1)),
        }
        self.use_again()
    }

    /// One subscription of a session in `shard` less. Whether it is idle from now on.
    pub(crate) fn unreference(&mut self, shard: u16, now: Millis) -> bool {
        if let Some(at) = self.references.iter().position(|(s, _)| *s == shard) {
            self.references[at].1 -= 1;
            if self.references[at].1 == 0 {
                self.references.swap_remove(at);
                self.mask &= !(1 << shard);
            }
        }
        self.idle_if_unused(now)
    }

    /// A local group gets its messages. Returns since when it was idle, if it was.
    pub(crate) fn add_group(&mut self, group: FilterId) -> Option<Millis> {
        if !self.groups.contains(&group) {
            self.groups.push(group);
        }
        self.use_again()
    }

    /// A local group is gone. Whether it is idle from now on.
    pub(crate) fn remove_group(&mut self, group: FilterId, now: Millis) -> bool {
        self.groups.retain(|g| *g != group);
        self.idle_if_unused(now)
    }

    fn use_again(&mut self) -> Option<Millis> {
        *self.unread.get_mut() = 0;
        self.idle_since.take()
    }

    fn idle_if_unused(&mut self, now: Millis) -> bool {
        let idle = self.is_unused() && self.idle_since.is_none() && !self.root;
        if idle {
            self.idle_since = Some(now);
        }
        idle
    }
}

#[cfg(test)]
mod tests;
