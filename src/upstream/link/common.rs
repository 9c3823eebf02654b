//! What the link machines share.

use std::sync::Arc;
use std::time::Duration;

use crate::mqtt::{AckKind, Oversized, Publish, QoS, ReasonCode, Version, encode_ack};
use crate::telemetry::{DropReason, RateLimited, clean, metrics};
use crate::time::Millis;
use crate::topics::{FilterId, has_wildcard, split_shared};

/// User properties with this key are ours. They are stripped from clients' packets, and from
/// messages of the broker.
pub(crate) const RESERVED_KEY: &str = "tidegate";

/// Bytes of filters in one SUBSCRIBE or UNSUBSCRIBE.
const REQUEST_FILTER_BYTES: usize = 8 * 1024;

/// Whether the topics of a filter's messages name the filter. Several such filters may share a packet and
/// its Subscription Identifier.
pub(super) fn is_exact(name: &str) -> bool {
    !has_wildcard(name) && split_shared(name).is_none()
}

/// Bytes that a filter costs in an UNSUBSCRIBE beside its text, rounded up.
const FILTER_OVERHEAD_BYTES: usize = 4;

/// Whether a topic lies below `probes`, where the probes of this node and of others publish.
pub(super) fn is_probe(topic: &str, probes: &str) -> bool {
    let rest = topic.strip_prefix(probes);
    rest.is_some_and(|rest| rest.starts_with('/'))
}

/// Acknowledges a message of the broker: PUBACK or PUBREC.
pub(super) fn acknowledge(version: Version, p: &Publish<'_>, out: &mut Vec<u8>) {
    let kind = match p.qos {
        QoS::AtMostOnce => return,
        QoS::AtLeastOnce => AckKind::Puback,
        QoS::ExactlyOnce => AckKind::Pubrec,
    };
    encode_ack(version, kind, p.packet_id, ReasonCode::SUCCESS, None, out);
}

/// Answers the broker's PUBREL with PUBCOMP.
pub(super) fn complete(version: Version, packet_id: u16, out: &mut Vec<u8>) {
    let (kind, success) = (AckKind::Pubcomp, ReasonCode::SUCCESS);
    encode_ack(version, kind, packet_id, success, None, out);
}

/// The next packet identifier after `last` that is not in use. Fewer than 65,535 must be in use.
pub(super) fn next_id(last: &mut u16, in_use: impl Fn(u16) -> bool) -> u16 {
    loop {
        *last = last.wrapping_add(1);
        if *last != 0 && !in_use(*last) {
            return *last;
        }
    }
}

/// Cuts a list of filters into parts for one packet each, of at most `count_max` filters and
/// `REQUEST_FILTER_BYTES` bytes. A filter that is larger makes a part of its own.
pub(super) fn in_packets<T>(
    all: &[T],
    count_max: usize,
    size: impl Fn(&T) -> usize,
) -> impl Iterator<Item = &[T]> {
    let mut rest = all;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let count = rest
            .iter()
            .take(count_max)
            .take_while(|item| {
                let first = bytes == 0;
                bytes += size(item);
                first || bytes <= REQUEST_FILTER_BYTES
            })
            .count();
        let (these, others) = rest.split_at(count);
        rest = others;
        (!these.is_empty()).then_some(these)
    })
}

/// Bytes of a filter in an UNSUBSCRIBE, rounded up.
pub(super) fn unsubscribe_bytes((_, name): &(FilterId, Arc<str>)) -> usize {
    name.len() + FILTER_OVERHEAD_BYTES
}

/// Lines about skipped messages: each names its topic, and a flood of them is cut off.
static SKIPPED: RateLimited = RateLimited::burst(20, Duration::from_secs(10));

/// Counts and logs a message of the broker that was skipped. `link`: the link's role.
pub(super) fn count_skipped(packet: &Oversized, link: &'static str, now: Millis) {
    metrics().messages_dropped[DropReason::UpstreamTooLarge].increment(1);
    if let Some(suppressed) = SKIPPED.permit(now) {
        let publish = packet.publish();
        tracing::warn!(
            link,
            topic = %clean(publish.topic, 256),
            bytes = packet.size,
            qos = publish.qos as u8,
            retain = publish.retain,
            suppressed,
            "A message of the broker was skipped: it is larger than limits.packet_max"
        );
    }
}
