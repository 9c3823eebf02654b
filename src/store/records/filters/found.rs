//! The filters and links that the records of a log leave.

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use crate::store::log::{Position, Record};
use crate::time::UnixMillis;

use super::{
    FILTER, FILTER_GONE, FilterGoneRecord, FilterRecord, FilterState, LINK, LinkRecord, LinkState,
};
use crate::store::records::RecordError;

/// A filter that the broker has or may have. [`FilterRecord`] describes the fields.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are those of the record")]
pub struct FoundFilter {
    /// Where the record is, and the length of its body in bytes.
    pub place: (Position, u32),
    pub number: u32,
    pub session: NonZeroU64,
    pub name: Box<str>,
    pub asked: u8,
    pub state: FilterState,
}

/// A number that rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundRest {
    /// Where the record is, and the length of its body in bytes.
    pub place: (Position, u32),
    /// The number.
    pub number: u32,
    /// Until when it rests.
    pub until: UnixMillis,
}

/// A link session that the broker has or may have. [`LinkRecord`] describes the fields.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are those of the record")]
pub struct FoundLink {
    /// Where the record is, and the length of its body in bytes.
    pub place: (Position, u32),
    pub session: NonZeroU64,
    pub shared: bool,
    pub number: u8,
    pub identifiers: bool,
    pub keeps_retain: bool,
    /// [`LinkState::InDoubt`], and not [`LinkState::Begun`].
    pub in_doubt: bool,
    pub client_id: Box<str>,
    pub server: Box<str>,
}

#[derive(Debug)]
enum Number {
    Filter(FoundFilter),
    Rest(FoundRest),
}

/// The filters and links of a log, while its records are replayed.
#[derive(Debug, Default)]
pub struct FoundFilters {
    numbers: BTreeMap<u32, Number>,
    /// By client identifier.
    links: BTreeMap<Box<str>, FoundLink>,
    /// The largest number of a link session that any record names.
    largest: u64,
}

impl FoundFilters {
    /// Whether a kind of record is for [`take`](Self::take).
    pub fn takes(kind: u8) -> bool {
        matches!(kind, FILTER | FILTER_GONE | LINK)
    }

    /// Takes the next record.
    ///
    /// # Errors
    /// [`RecordError`]; the record says nothing.
    pub fn take(&mut self, record: &Record<'_>) -> Result<(), RecordError> {
        let place = (record.position, record.body.len() as u32);
        match record.kind {
            FILTER => self.filter(&FilterRecord::decode(record.body)?, place),
            FILTER_GONE => self.gone(FilterGoneRecord::decode(record.body)?, place),
            LINK => self.link(&LinkRecord::decode(record.body)?, place),
            kind => return Err(RecordError::Kind(kind)),
        }
        Ok(())
    }

    fn filter(&mut self, record: &FilterRecord<'_>, place: (Position, u32)) {
        self.largest = self.largest.max(record.session.get());
        let found = FoundFilter {
            place,
            number: record.number,
            session: record.session,
            name: record.name.into(),
            asked: record.asked,
            state: record.state,
        };
        self.numbers.insert(record.number, Number::Filter(found));
    }

    fn gone(&mut self, record: FilterGoneRecord, place: (Position, u32)) {
        let number = record.number;
        self.numbers.remove(&number);
        if let Some(until) = record.rests_until {
            let rest = FoundRest {
                place,
                number,
                until,
            };
            self.numbers.insert(number, Number::Rest(rest));
        }
    }

    fn link(&mut self, record: &LinkRecord<'_>, place: (Position, u32)) {
        self.largest = self.largest.max(record.session.get());
        if record.state == LinkState::Ended {
            self.links.remove(record.client_id);
            return;
        }
        let found = FoundLink {
            place,
            session: record.session,
            shared: record.shared,
            number: record.number,
            identifiers: record.identifiers,
            keeps_retain: record.keeps_retain,
            in_doubt: record.state == LinkState::InDoubt,
            client_id: record.client_id.into(),
            server: record.server.into(),
        };
        self.links.insert(record.client_id.into(), found);
    }

    /// The largest number of a link session that any record names.
    pub fn largest_session(&self) -> u64 {
        self.largest
    }

    /// The links, in the order of their client identifiers; the filters, in that of their numbers; and the
    /// numbers that rest.
    pub fn into_parts(self) -> (Vec<FoundLink>, Vec<FoundFilter>, Vec<FoundRest>) {
        let (mut filters, mut rests) = (Vec::new(), Vec::new());
        for number in self.numbers.into_values() {
            match number {
                Number::Filter(filter) => filters.push(filter),
                Number::Rest(rest) => rests.push(rest),
            }
        }
        (self.links.into_values().collect(), filters, rests)
    }
}
