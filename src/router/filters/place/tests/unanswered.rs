//! Filters that clients were granted without the broker's answer: their subscriptions count once the
//! broker has answered for the filter in which they lie, wherever that is by then.

use super::*;

#[test]
fn a_filter_granted_before_the_broker_was_there_gets_its_messages_from_the_one_around_it() {
    let mut world = World::before_the_broker(config(8, LONG));
    let [a, b] = ["a", "b"].map(|id| world.client(id));
    world.ask(a, &["a/#"]);
    world.ask(b, &["a/b"]);
    world.pass_unanswered();
    assert_eq!((world.seen(a).0, world.seen(b).0), (vec![1], vec![1]));
    world.connect();
    world.pass(Duration::ZERO);
    assert_eq!(world.held(), ["a/#"]);
    world.bring(0, "a/b", 1);
    assert_eq!(world.seen(a).1, [1]);
    assert_eq!(world.seen(b).1, [1]);
}

#[test]
fn a_filter_whose_outer_one_is_refused_at_last_gets_its_messages_from_another() {
    let mut world = World::new(8, LONG);
    world.refused = vec!["a/#"];
    let [a, b, c] = ["a", "b", "c"].map(|id| world.client(id));
    world.ask(a, &["a/#"]);
    world.ask(b, &["a/b"]);
    world.pass_unanswered();
    assert_eq!(world.seen(b).0, [1]);
    world.ask(c, &["#"]);
    world.answer(1);
    assert_eq!(world.seen(c).0, [1]);
    world.answer(0);
    assert_eq!(world.held(), ["#"]);
    world.bring(1, "a/b", 1);
    assert_eq!(world.seen(b).1, [1]);
}

#[test]
fn a_filter_inside_a_root_that_was_refused_first_gets_its_messages_once_it_is_granted() {
    let mut world = World::before_the_broker(RouterConfig {
        roots: vec!["r/#".to_owned()],
        ..config(8, LONG)
    });
    world.connect();
    let [a, b] = ["a", "b"].map(|id| world.client(id));
    world.ask(a, &["r/x"]);
    world.pass_unanswered();
    assert_eq!(world.seen(a).0, [1]);
    world.refused = vec!["r/#"];
    world.pass(Duration::ZERO);
    world.refused.clear();
    assert_eq!(world.subscribe(b, &["r/y"]), [1]);
    assert_eq!(world.held(), ["r/#"]);
    let link = (world.held.iter().position(|h| h.contains("r/#"))).expect("it is subscribed");
    world.bring(link, "r/x", 1);
    assert_eq!(world.seen(a).1, [1]);
}

#[test]
fn a_filter_gets_its_messages_while_the_one_around_it_is_still_raised() {
    let mut world = World::new(8, LONG);
    let [a, b] = ["a", "b"].map(|id| world.client(id));
    world.ask_at(QoS::AtMostOnce, a, &["a/#"]);
    let asked = world.router.next_subscribes(0, 10);
    assert_eq!(asked.len(), 1);
    world.ask(b, &["a/b"]);
    world.pass_unanswered();
    assert_eq!(world.seen(b).0, [1]);
    (world.router).suback(asked[0].filter, ReasonCode(0), world.now);
    world.bring(0, "a/b", 1);
    assert_eq!(world.seen(b).1, [1], "the broker has the filter");
    world.answer(0);
    world.bring(0, "a/b", 2);
    assert_eq!(world.seen(b).1, [2]);
}

#[test]
fn a_client_that_is_granted_a_filter_the_broker_has_yet_to_answer_has_a_gap() {
    let mut world = World::new(8, LONG);
    let [a, b, c] = ["a", "b", "c"].map(|id| world.client(id));
    let gaps = |world: &World, id: &str| world.router.session(&id.into()).map(|s| s.gaps);
    world.ask(a, &["a/#"]);
    world.pass_unanswered();
    assert_eq!(gaps(&world, "a"), Some(1));
    for (client, id, filter) in [(b, "b", "a/#"), (c, "c", "a/b")] {
        world.ask(client, &[filter]);
        assert_eq!(world.seen(client).0, [1], "it is granted at once");
        assert_eq!(
            gaps(&world, id),
            Some(1),
            "messages until the answer are missed"
        );
    }
    world.pass(Duration::ZERO);
    world.ask(c, &["a/+"]);
    assert_eq!(world.seen(c).0, [1]);
    assert_eq!(gaps(&world, "c"), Some(1), "the broker has answered");
}

#[test]
fn a_client_is_told_the_qos_that_it_gets_once_the_broker_answers() {
    let mut world = World::new(1, LONG);
    let [a, b] = ["a", "b"].map(|id| world.client(id));
    assert_eq!(world.subscribe(a, &["a/b"]), [1]);
    world.unsubscribe(a, "a/b");
    // `a/b` yields.
    world.ask_at(QoS::AtMostOnce, b, &["a/#"]);
    world.pass_unanswered();
    assert_eq!(world.seen(b).0, [0]);
    world.ask(a, &["a/b"]);
    // With its UNSUBACK it comes to lie inside `a/#`, which is then raised.
    for (id, name) in world.router.next_unsubscribes(0, 10) {
        world.held[0].remove(&*name);
        world.router.unsuback(id, world.now);
    }
    assert_eq!(world.seen(a).0, [1]);
    world.answer(0);
    let session = world.router.session(&"a".into()).expect("it is there");
    assert_eq!(session.subscriptions[0].options.qos, QoS::AtLeastOnce);
}

#[test]
fn a_client_that_is_refused_a_filter_has_no_subscription_on_it_from_before() {
    let mut world = World::new(1, LONG);
    let [a, b, c] = ["a", "b", "c"].map(|id| world.client(id));
    let filters = |world: &World, id: &str| -> Vec<String> {
        let session = world.router.session(&id.into()).expect("it is there");
        let all = session.subscriptions.iter();
        all.map(|s| s.filter.to_string()).collect()
    };
    world.refused = vec!["#"];
    world.ask(a, &["#"]);
    world.ask(b, &["a/#"]);
    world.ask(c, &["+/b"]);
    world.pass_unanswered();
    assert_eq!(world.seen(c).0, [1]);
    // The broker refuses `#`, and nothing else can take the filters inside it.
    world.answer(0);
    assert!(world.held().is_empty());
    assert_eq!(filters(&world, "c"), ["+/b"]);
    assert_eq!(world.subscribe(c, &["+/b"]), [0x97]);
    assert!(filters(&world, "c").is_empty());
    assert_eq!(filters(&world, "b"), ["a/#"]);
}
