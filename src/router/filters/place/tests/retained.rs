//! The cached retained messages of filters that yielded their link to others.

use super::*;

impl World {
    /// Subscribes and asks for retained messages. The broker has yet to answer.
    fn ask_with_retained(&mut self, client: Connected, filter: &str) {
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            ..SubscribeOptions::default()
        };
        self.ask_with(options, client, &[filter]);
    }

    /// Fetches the retained messages of the one filter that is due: a message on this topic.
    fn fetch(&mut self, topic: &str, number: u32) {
        let due = self.router.next_fetches(10);
        assert_eq!(due.len(), 1, "{due:?}");
        let message = Message::new(&MessageSpec {
            topic,
            properties: Properties::default(),
            payload: number.to_string().as_bytes(),
            qos: QoS::AtMostOnce,
            retain: true,
            expires_at: None,
            strip_key: None,
            account: None,
        });
        self.router.fetched(due[0].0, &message, self.now);
        self.router.fetch_ended(&[due[0].0], true, self.now);
        self.pass(Duration::ZERO);
    }
}

/// The filter `a/#`, whose retained messages are in the cache, has yielded its link to `+/+`. Its
/// UNSUBSCRIBE is not answered yet. If there is a second link, `+/c` is there.
fn yielded(data_links_max: usize) -> (World, Connected, Connected) {
    let mut world = World::new(data_links_max, LONG);
    let [a, b] = ["a", "b"].map(|id| world.client(id));
    world.ask_with_retained(a, "a/#");
    world.answer(0);
    world.fetch("a/x", 1);
    assert_eq!(world.seen(a), (vec![1], vec![1]));
    assert!(world.router.retained_bytes() > 0);
    if data_links_max > 1 {
        assert_eq!(world.subscribe(b, &["+/c"]), [1]);
    }
    world.unsubscribe(a, "a/#");
    world.ask(b, &["+/+"]);
    (world, a, b)
}

#[test]
fn the_cache_of_a_filter_that_is_refused_after_it_yielded_is_given_back() {
    let (mut world, a, b) = yielded(1);
    world.ask_with_retained(a, "a/#");
    world.answer(0);
    assert_eq!(world.seen(b).0, [1]);
    assert_eq!(world.seen(a).0, [0x97]);
    // Nobody has it any more, and it lingers.
    world.ask_with_retained(a, "a/#");
    assert_eq!(world.seen(a).0, [0x97]);
    world.pass(Duration::ZERO);
    assert_eq!(world.router.retained_bytes(), 0);
}

#[test]
fn a_filter_that_yielded_and_lies_inside_another_now_is_fetched_anew() {
    let (mut world, a, b) = yielded(3);
    let c = world.client("c");
    world.ask_with_retained(a, "a/#");
    world.ask(c, &["#"]);
    // `#` is on a link of its own, which is faster. Then the first one's UNSUBACK comes.
    world.answer(2);
    assert_eq!(world.seen(c).0, [1]);
    world.answer(0);
    assert_eq!(world.seen(b).0, [1]);
    assert_eq!(world.held(), ["#", "+/+", "+/c"]);
    // The value may have changed while nothing brought `a/#`.
    world.fetch("a/x", 2);
    assert_eq!(world.seen(a), (vec![1], vec![2]));
}
