//! Topic names and topic filters: validity, matching, and an index of filters. Knows no packets.

mod filter;
mod id;
pub(crate) mod scan;
mod trie;

#[cfg(test)]
pub(crate) use filter::comparisons;
pub use filter::{
    covers, has_wildcard, is_bridge_state, matches, overlaps, split_shared, valid_filter,
    valid_topic_name,
};
pub use id::FilterId;
pub use trie::FilterTrie;

/// The longest topic name or filter, in bytes: a two-byte length precedes it (MQTT 5 §1.5.4).
pub(crate) const MAX_FIELD: usize = u16::MAX as usize;
