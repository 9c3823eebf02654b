//! The streams of one connection. Each connection has a control stream; over QUIC and WebTransport a
//! client may open data streams beside it.

use std::fmt;
use std::ops::{BitAnd, BitOr, Not};

/// The number of a stream within its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u8);

impl StreamId {
    /// The stream that a connection begins and ends with.
    pub const CONTROL: Self = Self(0);
    /// The number of streams that one connection may have, the control stream included.
    pub const COUNT: usize = 16;

    /// The stream with this number, below [`StreamId::COUNT`]; data streams have 1 and more.
    pub const fn new(number: u8) -> Self {
        debug_assert!((number as usize) < Self::COUNT);
        Self(number)
    }

    /// The stream at a place in a table that is ordered by number and has at most
    /// [`StreamId::COUNT`] places.
    pub const fn from_index(index: usize) -> Self {
        debug_assert!(index < Self::COUNT);
        Self(index as u8)
    }

    /// The stream's place in a table that is ordered by number.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether it is the control stream.
    pub const fn is_control(self) -> bool {
        self.0 == Self::CONTROL.0
    }

    /// The number.
    pub const fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of streams of one connection.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamSet(u16);

const _: () = assert!(StreamId::COUNT == u16::BITS as usize);

impl StreamSet {
    /// No stream.
    pub const EMPTY: Self = Self(0);
    /// The control stream and every data stream.
    pub const ALL: Self = Self(u16::MAX);
    /// The control stream alone.
    pub const CONTROL: Self = Self::EMPTY.with(StreamId::CONTROL);
    /// Every data stream.
    pub const DATA: Self = Self(!Self::CONTROL.0);

    /// The set and this stream.
    #[must_use]
    pub const fn with(self, stream: StreamId) -> Self {
        Self(self.0 | 1 << stream.0)
    }

    /// The set without this stream.
    #[must_use]
    pub const fn without(self, stream: StreamId) -> Self {
        Self(self.0 & !(1 << stream.0))
    }

    /// Whether the stream belongs to the set.
    pub const fn contains(self, stream: StreamId) -> bool {
        self.0 & 1 << stream.0 != 0
    }

    /// Whether no stream belongs to the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The streams, by their numbers.
    pub fn iter(self) -> impl Iterator<Item = StreamId> {
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let first = StreamId(rest.0.trailing_zeros() as u8);
            rest = rest.without(first);
            Some(first)
        })
    }
}

impl FromIterator<StreamId> for StreamSet {
    fn from_iter<I: IntoIterator<Item = StreamId>>(streams: I) -> Self {
        streams.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl BitOr for StreamSet {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for StreamSet {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for StreamSet {
    type Output = Self;

    fn not(self) -> Self {
        Self(!self.0)
    }
}

impl fmt::Debug for StreamSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(self.iter().map(StreamId::number))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_the_streams_that_were_put_in() {
        let [one, last] = [1, 15].map(StreamId::new);
        let set = StreamSet::CONTROL.with(last).with(one);
        let all = [StreamId::CONTROL, one, last];
        assert!(set.iter().eq(all));
        assert_eq!(set, all.into_iter().collect());
        assert!((set & StreamSet::DATA).iter().eq([one, last]));
        assert!(set.contains(last) && !set.without(last).contains(last));
        assert_eq!(!StreamSet::EMPTY, StreamSet::ALL);
        assert_eq!(StreamSet::ALL.iter().count(), StreamId::COUNT);
        assert_eq!(StreamSet::DATA | StreamSet::CONTROL, StreamSet::ALL);
        assert_eq!(format!("{set:?}"), "{0, 1, 15}");
    }
}
