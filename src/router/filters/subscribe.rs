//! A client's SUBSCRIBE and UNSUBSCRIBE at the table of filters.

use std::sync::Arc;

use crate::mqtt::{QoS, ReasonCode};
use crate::router::account::Full;
use crate::router::filters::Filters;
use crate::router::filters::actions::{Answered, Confirmed, LinkSet};
use crate::router::filters::filter::{Filter, Phase};
use crate::router::filters::table::Table;
use crate::router::types::{Grant, PendingGrant, SessionRef, Subscriber};
use crate::telemetry::SubscribeRefusedReason;
use crate::time::Millis;
use crate::topics::FilterId;

/// A filter that a client may have.
#[derive(Debug)]
pub(in crate::router) struct Admitted {
    pub filter: FilterId,
    /// The filter's name, shared with the table.
    pub name: Arc<str>,
    /// Granted at once. `None`: the broker is to be asked.
    pub grant: Option<Grant>,
    /// Links that have something to send.
    pub wake: LinkSet,
}

/// Why a client does not get a filter.
#[derive(Debug)]
pub(in crate::router) enum Refusal {
    /// The table has no room, or none for this client: the part that is used up, and the limit.
    Full(Full, SubscribeRefusedReason),
    /// The broker has closed links for it.
    Quarantined,
    /// It overlaps this filter on every data link, and the broker has no Subscription Identifiers.
    Overlaps(Arc<str>),
}

/// What becomes of a SUBSCRIBE whose subscription has joined its session.
#[derive(Debug)]
pub(in crate::router) struct Settled {
    pub next: Next,
    /// The broker has confirmed the filter since it was admitted.
    pub confirmed: Option<Confirmed>,
    /// Links that have something to send.
    pub wake: LinkSet,
}

/// The next step of a SUBSCRIBE.
#[derive(Debug)]
pub(in crate::router) enum Next {
    /// It waits for a SUBACK.
    Await,
    /// The client is to be answered with the grant.
    Answer,
    /// The SUBACK came since the filter was admitted.
    Answered(Answered),
}

impl Filters {
    /// Gives a session in `shard` a reference to a filter at `qos`. If the filter is granted at once, its
    /// overlapping subscriptions are raised to this QoS as well.
    ///
    /// # Errors
    /// [`Refusal`]; nothing changed.
    pub(crate) fn admit(
        &self,
        name: &str,
        qos: QoS,
        shard: u16,
        subscriber: &Subscriber,
        now: Millis,
    ) -> Result<Admitted, Refusal> {
        let overlapping = &subscriber.overlapping;
        let hash = self.hash(name);
        let mut table = self.write();
        if table.suspects.is_quarantined(name, now) {
            return Err(Refusal::Quarantined);
        }
        let room = table.has_room(name, subscriber.holder);
        room.map_err(|(full, reason)| Refusal::Full(full, reason))?;
        let (id, name) = table.intern(name);
        table.hold(id, subscriber.holder);
        if let Err(other) = table.place(id, hash, &overlapping.all, now) {
            if table.get(id).is_some_and(|f| f.mask() == 0) {
                table.remove(id, now);
            }
            return Err(Refusal::Overlaps(other));
        }
        table.reference(id, shard);
        if table.source(id) != id {
            table.want(id, qos);
        }
        let mut wake = table.take_woken();
        let source = table.get(table.source(id));
        let granted = source.filter(|f| f.grants(qos));
        let grant = granted.map(|f| (f.grant(qos), f.is_confirmed()));
        if grant.is_some_and(|(_, confirmed)| !confirmed) {
            table.presume_inner(id);
        }
        let grant = grant.map(|(qos, confirmed)| Grant {
            qos,
            confirmed,
            behind: table.raise(&overlapping.active, qos, &mut wake),
        });
        Ok(Admitted {
            filter: id,
            name,
            grant,
            wake,
        })
    }

    /// The number of a filter that is known, and that clients are not granted at present.
    pub(crate) fn unserved(&self, name: &str) -> Option<FilterId> {
        let mut table = self.write();
        if !table.knows(name) {
            return None;
        }
        let (id, _) = table.intern(name);
        let served = table.get(id).is_some_and(Filter::is_granted);
        (!served).then_some(id)
    }

    /// The subscription of an admitted filter has joined its session; it `replaced` one on the same
    /// filter. `late` are overlapping subscriptions that became active since the filter was admitted.
    pub(crate) fn joined(
        &self,
        grant: &PendingGrant,
        admitted: Option<Grant>,
        replaced: bool,
        late: &[FilterId],
        now: Millis,
    ) -> Settled {
        let (id, shard) = (grant.filter, grant.subscribe.session.shard);
        let mut wake = LinkSet::default();
        let mut table = self.write();
        if replaced {
            table.unreference(id, shard, now);
        }
        let source = table.source(id);
        let Some(admitted) = admitted else {
            let granted = table.get(source).filter(|f| f.grants(grant.qos));
            let granted = granted.map(|f| (f.grant(grant.qos), f.is_confirmed()));
            let refused =
                granted.is_none() && table.is_refused(source, grant.subscribe.session, now);
            let next = match granted {
                Some((granted, confirmed)) => {
                    if !confirmed {
                        table.presume_inner(id);
                    }
                    Next::Answered(Answered {
                        grants: vec![*grant],
                        code: ReasonCode(granted as u8),
                        confirmed,
                    })
                }
                None if refused => Next::Answered(Answered {
                    grants: vec![*grant],
                    code: ReasonCode::QUOTA_EXCEEDED,
                    confirmed: false,
                }),
                None => {
                    table.await_suback(id, *grant);
                    if source != id {
                        table.awaiting_outer.insert(id);
                    }
                    table.request(source, grant.qos);
                    wake.extend(table.get(source).and_then(Filter::link));
                    wake |= table.take_woken();
                    Next::Await
                }
            };
            return Settled {
                next,
                confirmed: None,
                wake,
            };
        };
        let confirmed = table.get(source).filter(|f| f.is_confirmed());
        let confirmed = confirmed
            .filter(|_| !admitted.confirmed)
            .map(|f| Confirmed {
                filter: id,
                mask: 1 << shard,
                granted: f.granted(),
            });
        let behind = table.raise(late, grant.qos, &mut wake).or(admitted.behind);
        let next = match behind.is_some_and(|on| table.await_rising(on, *grant)) {
            true => Next::Await,
            false => Next::Answer,
        };
        Settled {
            next,
            confirmed,
            wake,
        }
    }

    /// Other subscriptions of a client bring the messages of a filter as well, which the client has at
    /// `qos`: the broker is to have them at this QoS too. The client's SUBSCRIBE, if there is one, waits
    /// for the last of them. Returns whether it waits.
    pub(crate) fn raise(
        &self,
        overlapping: &[FilterId],
        qos: QoS,
        grant: Option<PendingGrant>,
    ) -> (bool, LinkSet) {
        let mut wake = LinkSet::default();
        let mut table = self.write();
        let behind = table.raise(overlapping, qos, &mut wake);
        let waits = match (behind, grant) {
            (Some(on), Some(grant)) => table.await_rising(on, grant),
            _ => false,
        };
        (waits, wake)
    }

    /// Gives back references of sessions in `shard`.
    pub(crate) fn release(&self, filters: &[FilterId], shard: u16, now: Millis) {
        if filters.is_empty() {
            return;
        }
        let mut table = self.write();
        for filter in filters {
            table.unreference(*filter, shard, now);
        }
    }

    /// Gives back references of clients that unsubscribed. Filters that nobody else uses linger on
    /// these clients' accounts.
    pub(crate) fn unsubscribed(&self, gone: &[(SessionRef, FilterId)], now: Millis) {
        if gone.is_empty() {
            return;
        }
        let most = self.config.client_lingering_max;
        let bytes = self.config.client_lingering_bytes_max;
        let mut table = self.write();
        for (session, filter) in gone {
            table.unreference(*filter, session.shard, now);
            table.charge(*filter, *session, most, bytes);
        }
    }
}

impl Table {
    /// Raises filters to `qos`. Returns the last one whose SUBACK at that QoS is still to come: answers
    /// come in order, so once that one is there, they all are.
    fn raise(&mut self, filters: &[FilterId], qos: QoS, wake: &mut LinkSet) -> Option<FilterId> {
        if qos == QoS::AtMostOnce {
            return None;
        }
        let mut last = None;
        for filter in filters {
            let source = self.source(*filter);
            if source != *filter {
                self.want(*filter, qos);
            }
            let Some(filter) = self.get(source) else {
                continue;
            };
            if filter.wanted() < qos && filter.phase() != Phase::Absent {
                wake.extend(filter.link());
                self.request(source, qos);
            }
            let filter = self.get(source);
            let waits = filter.is_some_and(|f| f.is_rising() && f.granted() < qos);
            last = waits.then_some(source).or(last);
        }
        *wake |= self.take_woken();
        last
    }

    /// Lets a granted SUBSCRIBE wait for the SUBACK of `on`. False: that filter has its answer.
    fn await_rising(&mut self, on: FilterId, grant: PendingGrant) -> bool {
        let rising = self.get(on).is_some_and(Filter::is_rising);
        if rising {
            self.await_suback(on, grant);
        }
        rising
    }
}
