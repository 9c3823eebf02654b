use super::*;
use crate::store::log::Life;
use crate::store::records::{FILTER, FilterRecord, FilterState};

/// A node whose client `c` has these filters.
fn node_with(identifiers: bool, filters: &[&str]) -> Node {
    let mut node = Node::new(identifiers);
    node.settle();
    let client = node.connect("c");
    for filter in filters {
        node.subscribe(client, filter, QoS::AtLeastOnce);
        node.settle();
    }
    node
}

#[test]
fn a_subscribe_waits_for_the_record_of_its_filter() {
    let mut node = Node::new(true);
    node.settle();
    let client = node.connect("c");
    node.subscribe(client, "a", QoS::AtLeastOnce);
    let sent = |node: &mut Node| {
        (0..2).for_each(|link| node.send(link));
        node.links.iter().map(|l| l.sent.len()).sum::<usize>()
    };
    assert_eq!(sent(&mut node), 0);
    let batch = node.append();
    assert_eq!(sent(&mut node), 0, "it is not on the disk yet");
    node.write();
    assert_eq!(sent(&mut node), 0);
    node.router.committed(&batch);
    assert_eq!(sent(&mut node), 1);
    assert_eq!(node.append().last, None, "nothing else is to be written");
    node.settle();
    // A higher QoS is announced, too.
    let client = node.connect("c");
    node.subscribe(client, "a", QoS::ExactlyOnce);
    assert_eq!(sent(&mut node), 0);
    node.persist();
    assert_eq!(sent(&mut node), 1);
}

#[test]
fn an_unsubscribe_waits_for_the_record_and_is_repeated_after_a_kill() {
    for read in [false, true] {
        let mut node = node_with(true, &["$share/g/a", "b"]);
        let number = node.number("$share/g/a");
        let shared = node.config.data_links_max;
        let client = node.connect("c");
        node.unsubscribe(client, "$share/g/a");
        node.advance(Duration::from_millis(100));
        node.send(shared);
        assert!(node.links[shared].sent.is_empty());
        node.persist();
        node.send(shared);
        assert_eq!(node.links[shared].sent.len(), 1);
        if read {
            node.read(shared);
        }
        let mut node = node.restart();
        assert_eq!(node.number("$share/g/a"), number, "it rests until UNSUBACK");
        let before = node.broker.unsubscribes;
        node.settle();
        assert_eq!(node.broker.unsubscribes, before + 1);
        assert_eq!(node.at_broker(shared), [""; 0]);
        node.check_all(&["c"]);
        assert_eq!(node.number("$share/g/a"), None);
    }
}

#[test]
fn a_number_keeps_the_rest_of_its_rest() {
    let mut node = node_with(true, &["$share/g/a"]);
    let number = node.number("$share/g/a").expect("it has one");
    let client = node.connect("c");
    node.unsubscribe(client, "$share/g/a");
    node.settle();
    let gone_at = node.now;
    let mut node = node.restart();
    node.settle();
    assert!(node.router.filters.read().is_tombstone(number));
    for n in 0..3 {
        let client = node.connect("c");
        node.subscribe(client, &format!("early/{n}"), QoS::AtMostOnce);
        assert_ne!(node.number(&format!("early/{n}")), Some(number));
    }
    node.settle();
    // Over several starts no more than ten minutes.
    let disk = node.disk.after_kill();
    let rest = Duration::from_secs(600).saturating_sub(gone_at.since(Millis::ZERO));
    let mut node = node.restart_on(disk, rest);
    node.settle();
    let client = node.connect("c");
    node.subscribe(client, "late", QoS::AtMostOnce);
    assert_eq!(node.number("late"), Some(number));
    node.settle();
    node.check_all(&["c"]);
}

#[test]
fn a_start_asks_for_nothing_that_the_broker_has() {
    for identifiers in [true, false] {
        let filters = ["a/+", "a/b", "a/b/c", "+/b", "$share/g/a/+", "#", "q/r"];
        let node = node_with(identifiers, &filters);
        let (before, sessions) = (node.broker.subscribes, node.broker.sessions.clone());
        let mut node = node.restart();
        assert_eq!(node.filters_of("c").len(), filters.len());
        assert!(node.router.filters.lost().is_empty());
        // They are granted at once, without any link.
        let other = node.connect("other");
        node.subscribe(other, "a/+", QoS::AtLeastOnce);
        let table = node.router.filters.read();
        let id = table.exact("a/+").expect("it is known");
        let source = table.get(table.source(id)).expect("it is known");
        assert!(source.is_granted() && !source.is_awaited());
        drop(table);
        node.settle();
        assert_eq!(node.broker.subscribes, before);
        assert_eq!(node.broker.sessions, sessions);
        node.check_all(&["c", "other"]);
    }
}

#[test]
fn filters_that_nobody_needs_linger_and_leave() {
    for identifiers in [true, false] {
        let mut node = node_with(identifiers, &["a/+", "a/b", "c"]);
        for filter in ["a/+", "c"] {
            let client = node.connect("c");
            node.unsubscribe(client, filter);
        }
        node.persist();
        let mut node = node.restart();
        node.settle();
        node.advance(Duration::from_secs(25));
        node.settle();
        assert_eq!(node.count_at_broker(), 1, "{:?}", node.broker.sessions);
        node.check_all(&["c"]);
    }
}

#[test]
fn a_session_that_the_broker_lost_is_a_gap_and_is_begun_anew_for_the_next_start() {
    for identifiers in [true, false] {
        let node = node_with(identifiers, &["a/+", "b"]);
        let gaps = |node: &Node| node.router.session(&SessionKey::from("c")).map(|s| s.gaps);
        let mut node = node.restart();
        node.broker.sessions.clear();
        let before = gaps(&node);
        node.settle();
        assert!(gaps(&node) > before);
        node.check_all(&["c"]);
        let subscribes = node.broker.subscribes;
        let mut node = node.restart();
        node.settle();
        assert_eq!(node.broker.subscribes, subscribes);
        node.check_all(&["c"]);
    }
}

#[test]
fn a_session_that_began_while_the_process_died_is_not_trusted() {
    for first in [true, false] {
        let mut node = node_with(true, &["a/+", "b"]);
        if first {
            node = node.restart();
        } else {
            (0..2).for_each(|link| node.disconnect(link));
        }
        // The broker loses its sessions, and begins others for CONNECTs that are never answered.
        node.broker.sessions.clear();
        for link in 0..2 {
            let clean = node.announce(link);
            assert!(!clean);
            node.broker.connect(&client_id("a", link), clean);
        }
        let mut node = node.restart();
        node.settle();
        node.check_all(&["c"]);
        let subscribes = node.broker.subscribes;
        let mut node = node.restart();
        node.settle();
        assert_eq!(node.broker.subscribes, subscribes, "the doubt is over");
    }
}

#[test]
fn filters_of_links_that_are_gone_are_placed_anew() {
    let names: Vec<String> = (0..12).map(|n| format!("f/{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for (data_links, prefix, stale) in [(1, "a", 1), (2, "b", 2)] {
        let node = node_with(true, &names);
        assert!(!node.at_broker(1).is_empty());
        let config = RouterConfig {
            data_links,
            data_links_max: data_links,
            ..config()
        };
        let disk = node.disk.after_kill();
        let mut node = Node::start(disk, 5_000_000, node.broker, config, prefix);
        assert_eq!(node.router.stale_links().len(), stale);
        node.settle();
        for link in node.router.stale_links() {
            node.broker.sessions.remove(&*link.client_id);
            node.router.stale_link_ended(&link.client_id);
        }
        node.persist();
        node.check_all(&["c"]);
        assert_eq!(node.count_at_broker(), names.len());
        let subscribes = node.broker.subscribes;
        let mut node = node.restart();
        assert_eq!(node.router.stale_links(), []);
        node.settle();
        assert_eq!(node.broker.subscribes, subscribes);
        node.check_all(&["c"]);
    }
}

#[test]
fn a_broker_that_has_changed_its_properties_gets_all_filters_anew() {
    for identifiers in [true, false] {
        let node = node_with(identifiers, &["a/+", "a/b", "+/b"]);
        let mut node = node.restart();
        node.broker.identifiers = !identifiers;
        node.settle();
        node.check_all(&["c"]);
        let subscribes = node.broker.subscribes;
        let mut node = node.restart();
        node.settle();
        assert_eq!(node.broker.subscribes, subscribes);
        node.check_all(&["c"]);
    }
}

#[test]
fn roots_and_local_groups_are_the_same_after_a_start() {
    for identifiers in [true, false] {
        let broker = Broker {
            identifiers,
            ..Broker::default()
        };
        let config = RouterConfig {
            roots: vec!["r/#".to_owned()],
            local_groups: true,
            ..config()
        };
        let mut node = Node::start(SimDisk::default(), 1, broker, config, "a");
        node.settle();
        let client = node.connect("c");
        for filter in ["r/1", "r/+", "$share/g/r/2", "$share/g/s", "t"] {
            node.subscribe(client, filter, QoS::AtLeastOnce);
            node.settle();
        }
        let (before, count) = (node.broker.subscribes, node.count_at_broker());
        assert_eq!(count, 3, "the root, s and t");
        let mut node = node.restart();
        node.settle();
        assert_eq!(node.broker.subscribes, before);
        assert_eq!(node.count_at_broker(), count);
        node.check_all(&["c"]);
    }
}

#[test]
fn reclaim_and_a_return_from_degraded_mode_keep_all_records() {
    let mut node = node_with(true, &["$share/g/gone", "kept/+"]);
    let client = node.connect("c");
    node.unsubscribe(client, "$share/g/gone");
    node.settle();
    for n in 0..60 {
        let client = node.connect("c");
        node.subscribe(client, &format!("often/{}", n % 7), QoS::AtMostOnce);
        let client = node.connect("c");
        node.unsubscribe(client, &format!("often/{}", n % 7));
        node.settle();
    }
    let subscribes = node.broker.subscribes;
    let mut node = node.restart();
    node.settle();
    assert_eq!(node.broker.subscribes, subscribes);
    node.check_all(&["c"]);
    // Degraded, everything goes on.
    node.disk.set_capacity(Some(0));
    let client = node.connect("c");
    node.subscribe(client, "degraded", QoS::AtMostOnce);
    node.settle();
    node.check_all(&["c"]);
    assert!(node.at_broker(0).contains(&"degraded") || node.at_broker(1).contains(&"degraded"));
    node.disk.set_capacity(None);
    node.advance(Duration::from_secs(120));
    node.settle();
    assert!(node.log.committed().is_some());
    let subscribes = node.broker.subscribes;
    let mut node = node.restart();
    assert!(node.filters_of("c").contains(&"degraded".to_owned()));
    node.settle();
    assert_eq!(node.broker.subscribes, subscribes);
    node.check_all(&["c"]);
}

#[test]
fn after_a_crash_in_degraded_mode_all_links_begin_anew() {
    let mut node = node_with(true, &["a", "b"]);
    node.disk.set_capacity(Some(0));
    let client = node.connect("c");
    node.subscribe(client, "c", QoS::AtMostOnce);
    node.settle();
    let disk = node.disk.after_kill();
    disk.set_capacity(None);
    let mut node = node.restart_on(disk, Duration::ZERO);
    node.settle();
    node.check_all(&["c"]);
    assert_eq!(node.filters_of("c"), ["a", "b"]);
    assert_eq!(node.count_at_broker(), 2);
}

#[test]
fn an_inner_filter_stays_inside_an_outer_one_that_lingers() {
    let mut node = node_with(false, &["a/+"]);
    let other = node.connect("other");
    node.subscribe(other, "a/b", QoS::AtLeastOnce);
    node.settle();
    let client = node.connect("c");
    node.unsubscribe(client, "a/+");
    node.persist();
    let subscribes = node.broker.subscribes;
    let mut node = node.restart();
    assert!(node.router.filters.lost().is_empty());
    node.settle();
    assert_eq!(node.broker.subscribes, subscribes);
    assert_eq!(node.at_broker(0), ["a/+"]);
    node.check_all(&["other"]);
    // It moves when the outer one goes.
    for _ in 0..4 {
        node.advance(Duration::from_secs(15));
        node.settle();
    }
    assert_eq!(node.count_at_broker(), 1);
    node.check_all(&["other"]);
}

#[test]
fn two_overlapping_filters_are_not_restored_on_one_link() {
    let mut node = node_with(false, &["x/a"]);
    let table = node.router.filters.read();
    let session = table.journal.as_ref().and_then(|j| j.links[0].session);
    let session = session.expect("the link has connected").number;
    drop(table);
    // As after the loss of the record that said that the older one was leaving.
    let mut body = Vec::new();
    let record = FilterRecord {
        number: 77,
        session,
        name: "x/+",
        asked: 1,
        state: FilterState::Granted(1),
    };
    record.encode(&mut body);
    let mut room = node.log.try_reserve(1 << 20).expect("there is room");
    let appended = node.log.append(&mut room, FILTER, &[&body], Life::Living);
    assert!(appended.is_ok());
    node.write();
    let broker = node.broker.sessions.get_mut(&client_id("a", 0));
    let broker = broker.expect("the link has a session");
    broker.clear();
    broker.insert("x/+".to_owned(), (FilterId(77), QoS::AtLeastOnce));
    let mut node = node.restart();
    let table = node.router.filters.read();
    let on_link = table.of_link(0).filter(|(_, f)| f.is_active());
    assert_eq!(on_link.count(), 1);
    drop(table);
    node.settle();
    node.check_all(&["c"]);
}

#[test]
fn a_session_stays_in_doubt_until_the_records_of_all_its_filters_are_written() {
    let filters: Vec<String> = (0..30).map(|n| format!("f/{n}")).collect();
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    let mut node = node_with(true, &filters);
    assert!(node.at_broker(0).len() > 10);
    node.disconnect(0);
    node.links[0].in_doubt = true;
    node.connect_link(0);
    let batch = node.append();
    assert!(batch.last.is_some());
    // The first of several commits.
    let step = node.writer.step(&mut node.owner, node.now);
    assert!(matches!(step, Step::Committed { .. }), "{step:?}");
    let node = node.restart();
    assert!(node.router.restored_link(0).is_some_and(|l| l.in_doubt));
    let mut node = node.restart();
    node.settle();
    node.check_all(&["c"]);
}
