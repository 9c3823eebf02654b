//! What the link machines share.

use std::sync::Arc;

use crate::topics::FilterId;

/// User properties with this key are ours. They are stripped from clients' packets, and from
/// messages of the broker.
pub(crate) const RESERVED_KEY: &str = "tidegate";

/// Bytes of filters in one SUBSCRIBE or UNSUBSCRIBE.
const REQUEST_FILTER_BYTES: usize = 8 * 1024;

/// Bytes that a filter costs in an UNSUBSCRIBE beside its text, rounded up.
const FILTER_OVERHEAD_BYTES: usize = 4;

/// Whether a topic lies below `probes`, where the probes of this node and of others publish.
pub(super) fn is_probe(topic: &str, probes: &str) -> bool {
    let rest = topic.strip_prefix(probes);
    rest.is_some_and(|rest| rest.starts_with('/'))
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
