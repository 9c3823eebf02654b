//! Answers that wait for the disk.

use super::*;

#[test]
fn connack_waits_for_a_change_that_is_not_on_the_disk() {
    let mut node = node();
    let mut judge = |what: &str, connect: Connect, waits: bool| {
        let client = node.connect(connect);
        assert_eq!(node.answers(client), !waits, "{what}");
        node.persist();
        assert_eq!(node.answers(client), waits, "{what}, on the disk");
    };
    judge("a new session", kept("a"), false);
    judge("a resume", kept("a"), false);
    judge("a will", with_will("a", "1"), true);
    judge("the same will", with_will("a", "1"), false);
    judge("another will", with_will("a", "2"), true);
    judge("no will", kept("a"), true);
    let expiry = Connect {
        expiry: 200,
        ..kept("a")
    };
    judge("another expiry", expiry, true);
    let clean = |id| Connect {
        clean_start: true,
        ..kept(id)
    };
    judge("a clean start", clean("a"), true);
    judge("a clean start over nothing", clean("b"), false);
    let brief = |clean_start, will| Connect {
        clean_start,
        will,
        expiry: 0,
        ..kept("c")
    };
    judge(
        "a session that ends with its connection",
        brief(true, None),
        false,
    );
    judge("its will", brief(true, will("1", 0)), true);
}

#[test]
fn a_takeover_before_the_commit_waits_for_it_too() {
    let mut node = node();
    node.connect(with_will("a", "1"));
    let batch = node.append();
    let client = node.connect(with_will("a", "1"));
    assert!(!node.answers(client));
    node.write();
    node.router.committed(&batch);
    assert!(!node.answers(client), "its own record is on its way");
    node.persist();
    assert!(node.answers(client));
}

#[test]
fn suback_and_unsuback_wait_for_the_record_of_a_kept_session() {
    let mut node = node();
    let client = node.kept("a");
    assert!(node.answers(client));
    node.subscribe(client, "t");
    assert!(!node.answers(client));
    node.persist();
    assert!(node.answers(client));
    node.unsubscribe(client, "t");
    assert!(!node.answers(client));
    node.persist();
    assert!(node.answers(client));
    let brief = node.connect(Connect {
        expiry: 0,
        ..kept("b")
    });
    node.answers(brief);
    node.subscribe(brief, "t");
    assert!(node.answers(brief), "it ends with its connection");
}
