//! The number that stands for a topic filter.

use std::fmt;

/// The number of a topic filter. The router, its links and the store use it as the key of the filter
/// as long as the filter is known, and for a rest after that; then it may stand for another one.
///
/// Toward the broker the filter's Subscription Identifier is the number plus one, because 0 is not a
/// valid identifier (MQTT 5 §3.8.2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FilterId(pub u32);

impl fmt::Display for FilterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FilterId {
    /// Stands for all filters without wildcards: the topic of a message says which one it is. Its
    /// Subscription Identifier is the largest; tables of filters are far smaller.
    pub const EXACT: Self = Self(268_435_454);

    /// The number of the filter at a place in a table that is ordered by number.
    pub fn from_index(index: usize) -> Self {
        // Tables of filters are bounded far below 2^32 entries.
        Self(index as u32)
    }

    /// The filter's place in a table that is ordered by number.
    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// The Subscription Identifier that the broker is given for the filter.
    pub fn subscription_identifier(self) -> u32 {
        self.0 + 1
    }

    /// The filter that the broker names by a Subscription Identifier; `None` for 0, which names none.
    pub fn from_subscription_identifier(identifier: u32) -> Option<Self> {
        identifier.checked_sub(1).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subscription_identifier_is_the_number_plus_one() {
        assert_eq!(FilterId(0).subscription_identifier(), 1);
        for id in [FilterId(0), FilterId(7)] {
            let identifier = id.subscription_identifier();
            assert_eq!(FilterId::from_subscription_identifier(identifier), Some(id));
        }
        assert_eq!(FilterId::from_subscription_identifier(0), None);
    }
}
