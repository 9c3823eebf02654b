//! The records that are written, and the sessions that a restart begins from them.

use super::*;

#[test]
fn a_restart_brings_sessions_back_with_their_subscriptions() {
    let mut node = node();
    let client = node.kept("a");
    for filter in ["t/+", "u", "$share/g/s"] {
        node.subscribe(client, filter);
        node.persist();
    }
    node.unsubscribe(client, "u");
    let gone = node.kept("gone");
    node.subscribe(gone, "t/+");
    node.persist();
    node.connect(Connect {
        clean_start: true,
        expiry: 0,
        ..kept("gone")
    });
    node.persist();
    let node = node.restart(Duration::from_secs(1));
    assert_eq!(
        node.filters("a"),
        Some(vec!["t/+".into(), "$share/g/s".into()])
    );
    assert_eq!(node.filters("gone"), None);
    let client = node.kept("a");
    assert!(
        client.present && node.answers(client),
        "a resume waits for nothing"
    );
    let gaps = node.router.session(&SessionKey::from("a")).map(|s| s.gaps);
    assert_eq!(gaps, Some(1));
}

#[test]
fn an_overlapping_subscription_of_a_lower_qos_is_asked_for_at_the_qos_of_a_later_one() {
    let mut node = node();
    let client = node.kept("a");
    for (filter, qos) in [
        ("+/+", QoS::AtMostOnce),
        ("other", QoS::AtMostOnce),
        ("+/b", QoS::ExactlyOnce),
    ] {
        node.subscribe_at(client, filter, qos);
        node.persist();
    }
    let node = node.restart(Duration::ZERO);
    for (filter, qos) in [
        ("+/+", QoS::ExactlyOnce),
        ("other", QoS::AtMostOnce),
        ("+/b", QoS::ExactlyOnce),
    ] {
        assert!(
            node.granted.contains(&(filter.to_owned(), qos)),
            "{filter}: {:?}",
            node.granted
        );
    }
}

#[test]
fn a_flap_writes_nothing_and_an_absence_is_written_once() {
    let mut node = node();
    let client = node.connect(with_will("a", "1"));
    assert_eq!(node.persist(), 1);
    let delayed = || Connect {
        will: will("1", 60),
        ..kept("b")
    };
    let mut flapping = node.connect(delayed());
    assert_eq!(node.persist(), 1);
    for _ in 0..10 {
        node.leave(flapping, false);
        node.advance(Duration::from_secs(4));
        flapping = node.connect(delayed());
        assert_eq!(node.persist(), 0);
    }
    node.leave(flapping, false);
    node.advance(Duration::from_secs(6));
    assert_eq!(node.persist(), 1);
    node.advance(Duration::from_secs(6));
    assert_eq!(node.persist(), 0);
    node.connect(delayed());
    assert_eq!(node.persist(), 1, "it is back");
    node.leave(client, true);
    assert_eq!(node.persist(), 1, "the will is discarded");
}

#[test]
fn an_expiry_goes_on_and_a_grace_comes_before_every_end() {
    for (away, lives) in [(10, true), (95, true), (200, false)] {
        let mut node = node();
        let client = node.kept("a");
        node.persist();
        node.leave(client, false);
        node.advance(Duration::from_secs(6));
        node.persist();
        let mut node = node.restart(Duration::from_secs(away));
        node.advance(GRACE - Duration::from_secs(1));
        assert!(node.filters("a").is_some());
        node.advance(Duration::from_secs(2));
        assert_eq!(
            node.filters("a").is_some(),
            lives && away + 36 < 100,
            "{away} s"
        );
        // Its end is written, and holds.
        node.persist();
        let ended = node.filters("a").is_none();
        let node = node.restart(Duration::ZERO);
        assert_eq!(node.filters("a").is_none(), ended);
    }
}

#[test]
fn a_will_is_published_once_after_the_grace_unless_its_client_is_back() {
    let brief = |id: &str| Connect {
        expiry: 0,
        clean_start: true,
        ..with_will(id, id)
    };
    let mut node = node();
    for id in ["kept", "back"] {
        node.connect(with_will(id, id));
    }
    let late = Connect {
        will: will("late", 60),
        ..kept("late")
    };
    node.connect(late);
    for id in ["brief", "brief back"] {
        node.connect(brief(id));
    }
    let bye = node.connect(with_will("bye", "bye"));
    node.persist();
    node.leave(bye, true);
    node.persist();
    let mut node = node.restart(Duration::from_secs(1000));
    node.advance(GRACE - Duration::from_secs(1));
    assert_eq!(node.wills(), [""; 0]);
    node.connect(with_will("back", "back"));
    node.connect(Connect {
        will: None,
        ..brief("brief back")
    });
    node.advance(Duration::from_secs(2));
    let mut wills = node.wills();
    wills.sort_unstable();
    assert_eq!(wills, ["brief", "kept"]);
    node.persist();
    let mut node = node.restart(Duration::ZERO);
    node.advance(GRACE + Duration::from_secs(1));
    let mut wills = node.wills();
    wills.sort_unstable();
    // Of the delay, 31 s had passed.
    assert_eq!(
        wills,
        ["back", "late"],
        "the first process published the others"
    );
    node.advance(Duration::from_secs(60));
    assert_eq!(node.wills(), [""; 0]);
}

#[test]
fn a_will_that_was_discarded_counts_again_with_the_next_connect() {
    for written in [false, true] {
        let mut node = node();
        let client = node.connect(with_will("a", "1"));
        node.persist();
        node.leave(client, true);
        if written {
            node.persist();
        }
        let client = node.connect(with_will("a", "1"));
        assert_eq!(node.answers(client), !written);
        node.persist();
        let mut node = node.restart(Duration::ZERO);
        node.advance(GRACE + Duration::from_secs(1));
        assert_eq!(node.wills(), ["1"]);
    }
}

#[test]
fn a_disk_that_fails_stops_nobody_and_is_written_anew_when_it_works_again() {
    let mut node = node();
    let a = node.kept("a");
    node.subscribe(a, "before");
    node.persist();
    assert!(node.answers(a));
    node.disk.set_broken(true);
    node.subscribe(a, "while");
    node.persist();
    assert_eq!(node.log.mode(), Mode::Degraded);
    assert!(node.answers(a), "it waits no longer");
    let b = node.connect(with_will("b", "b"));
    assert!(!node.answers(b));
    node.persist();
    assert!(node.answers(b));
    node.connect(Connect {
        clean_start: true,
        ..kept("c")
    });
    node.persist();
    node.disk.set_broken(false);
    node.advance(Duration::from_secs(100));
    node.write();
    assert_eq!(node.log.mode(), Mode::Durable);
    let node = node.restart(Duration::ZERO);
    assert_eq!(
        node.filters("a"),
        Some(vec!["before".into(), "while".into()])
    );
    assert!(node.filters("b").is_some() && node.filters("c").is_some());
}

#[test]
fn a_log_that_grows_is_written_again_and_keeps_every_session() {
    let mut node = node();
    let names: Vec<String> = (0..20).map(|n| format!("quiet{n}")).collect();
    for name in &names {
        let client = node.kept(name);
        node.subscribe(client, &format!("t/{name}"));
    }
    node.persist();
    for round in 0..1000 {
        let client = node.connect(with_will("busy", &round.to_string()));
        node.persist();
        assert!(node.answers(client));
    }
    let living = node.writer.sizes().living_bytes;
    let bytes = node.writer.sizes().bytes;
    assert!(
        bytes < 2 * living + 6 * u64::from(SEGMENT_BYTES),
        "{bytes} bytes for {living}"
    );
    let node = node.restart(Duration::ZERO);
    for name in &names {
        assert_eq!(node.filters(name), Some(vec![format!("t/{name}")]));
    }
}

#[test]
fn a_drain_leaves_sessions_and_wills_as_they_are() {
    let mut node = node();
    let client = node.connect(with_will("a", "a"));
    node.persist();
    assert!(node.router.suspend(client.session, client.connection_no));
    assert_eq!(node.persist(), 0);
    let mut node = node.restart(Duration::ZERO);
    node.advance(GRACE + Duration::from_secs(1));
    assert_eq!(node.wills(), ["a"]);
    let router = testing::router();
    let client = testing::client(&router, "c");
    assert!(
        !router.suspend(client.session, client.connection_no),
        "it has no log"
    );
}
