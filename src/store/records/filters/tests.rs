use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::store::log::{Position, Record};

fn states() -> impl Strategy<Value = FilterState> {
    prop_oneof![
        Just(FilterState::Asked),
        (0..3u8).prop_map(FilterState::Granted),
        (0..3u8).prop_map(FilterState::Rising),
        Just(FilterState::Leaving),
    ]
}

fn link_states() -> impl Strategy<Value = LinkState> {
    prop_oneof![
        Just(LinkState::Begun),
        Just(LinkState::InDoubt),
        Just(LinkState::Ended),
    ]
}

fn session(number: u64) -> NonZeroU64 {
    NonZeroU64::new(number).expect("it is not 0")
}

proptest! {
    #[test]
    fn a_filter_is_read_as_it_was_written(
        number: u32,
        of in 1..=u64::MAX,
        name in ".{0,30}",
        asked in 0..3u8,
        state in states(),
    ) {
        let record = FilterRecord { number, session: session(of), name: &name, asked, state };
        let mut body = Vec::new();
        record.encode(&mut body);
        prop_assert_eq!(FilterRecord::decode(&body), Ok(record));
        for len in 0..body.len() {
            prop_assert_eq!(FilterRecord::decode(&body[..len]), Err(RecordError::Malformed));
        }
        body.push(0);
        prop_assert_eq!(FilterRecord::decode(&body), Err(RecordError::Malformed));
    }

    #[test]
    fn a_filter_that_is_gone_is_read_as_it_was_written(
        number: u32,
        rests_until in option::of(any::<u64>().prop_map(UnixMillis::new)),
    ) {
        let record = FilterGoneRecord { number, rests_until };
        let mut body = Vec::new();
        record.encode(&mut body);
        prop_assert_eq!(FilterGoneRecord::decode(&body), Ok(record));
        for len in 0..body.len() {
            prop_assert!(FilterGoneRecord::decode(&body[..len]).is_err());
        }
    }

    #[test]
    fn a_link_is_read_as_it_was_written(
        numbers in (1..=u64::MAX, any::<u8>()),
        flags in any::<(bool, bool, bool)>(),
        state in link_states(),
        names in (".{0,30}", ".{0,30}"),
    ) {
        let record = LinkRecord {
            session: session(numbers.0),
            shared: flags.0,
            number: numbers.1,
            identifiers: flags.1,
            keeps_retain: flags.2,
            state,
            client_id: &names.0,
            server: &names.1,
        };
        let mut body = Vec::new();
        record.encode(&mut body);
        prop_assert_eq!(LinkRecord::decode(&body), Ok(record));
        for len in 0..body.len() {
            prop_assert_eq!(LinkRecord::decode(&body[..len]), Err(RecordError::Malformed));
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(kind in 3..6u8, mut body in vec(any::<u8>(), 0..100)) {
        if let Some(version) = body.first_mut() {
            *version %= 3;
        }
        let record = Record { position: Position::new(1, 0), kind, body: &body };
        let _ = FoundFilters::default().take(&record);
    }
}

#[test]
fn a_record_of_a_later_version_is_refused() {
    let mut body = Vec::new();
    let record = FilterGoneRecord {
        number: 1,
        rests_until: None,
    };
    record.encode(&mut body);
    body[0] = RECORDS_VERSION + 1;
    let refused = RecordError::Version(RECORDS_VERSION + 1);
    assert_eq!(FilterGoneRecord::decode(&body), Err(refused));
    assert_eq!(FilterRecord::decode(&body), Err(refused));
    assert_eq!(LinkRecord::decode(&body), Err(refused));
}

/// Bodies with their kinds, in the order of a log.
#[derive(Default)]
struct Records(Vec<(u8, Vec<u8>)>);

impl Records {
    fn filter(mut self, number: u32, of: u64, state: FilterState) -> Self {
        let mut body = Vec::new();
        let record = FilterRecord {
            number,
            session: session(of),
            name: "a/+",
            asked: 1,
            state,
        };
        record.encode(&mut body);
        self.0.push((FILTER, body));
        self
    }

    fn gone(mut self, number: u32, until: Option<u64>) -> Self {
        let mut body = Vec::new();
        let record = FilterGoneRecord {
            number,
            rests_until: until.map(UnixMillis::new),
        };
        record.encode(&mut body);
        self.0.push((FILTER_GONE, body));
        self
    }

    fn link(mut self, client_id: &str, of: u64, state: LinkState) -> Self {
        let mut body = Vec::new();
        let record = LinkRecord {
            session: session(of),
            shared: false,
            number: 0,
            identifiers: true,
            keeps_retain: true,
            state,
            client_id,
            server: "mqtt://b",
        };
        record.encode(&mut body);
        self.0.push((LINK, body));
        self
    }

    fn found(&self) -> FoundFilters {
        let mut found = FoundFilters::default();
        for (at, (kind, body)) in self.0.iter().enumerate() {
            let record = Record {
                position: Position::new(1, at as u32),
                kind: *kind,
                body,
            };
            assert!(FoundFilters::takes(*kind));
            found.take(&record).expect("a record of ours");
        }
        found
    }
}

#[test]
fn the_last_record_of_a_number_counts() {
    let records = Records::default()
        .filter(1, 1, FilterState::Asked)
        .filter(2, 1, FilterState::Asked)
        .filter(3, 1, FilterState::Asked)
        .filter(1, 2, FilterState::Granted(1))
        .gone(2, Some(50))
        .gone(3, None)
        .gone(4, Some(60))
        .filter(4, 2, FilterState::Leaving);
    let (_, filters, rests) = records.found().into_parts();
    let filters: Vec<_> = filters
        .iter()
        .map(|f| (f.number, f.session.get(), f.state, f.place.0.offset()))
        .collect();
    assert_eq!(
        filters,
        [
            (1, 2, FilterState::Granted(1), 3),
            (4, 2, FilterState::Leaving, 7)
        ]
    );
    let rests: Vec<_> = rests.iter().map(|r| (r.number, r.until.as_u64())).collect();
    assert_eq!(rests, [(2, 50)]);
}

#[test]
fn the_last_record_of_a_client_identifier_counts_and_no_number_of_a_session_comes_again() {
    let records = Records::default()
        .link("d0", 1, LinkState::Begun)
        .link("d1", 2, LinkState::Begun)
        .link("d2", 9, LinkState::Begun)
        .link("d0", 1, LinkState::InDoubt)
        .link("d1", 3, LinkState::Begun)
        .link("d2", 9, LinkState::Ended);
    let found = records.found();
    assert_eq!(found.largest_session(), 9);
    let (links, _, _) = found.into_parts();
    let links: Vec<_> = links
        .iter()
        .map(|l| (&*l.client_id, l.session.get(), l.in_doubt))
        .collect();
    assert_eq!(links, [("d0", 1, true), ("d1", 3, false)]);
    let stale = Records::default().filter(1, 12, FilterState::Asked).found();
    assert_eq!(stale.largest_session(), 12);
}
