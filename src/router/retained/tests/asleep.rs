//! The order for sessions whose messages have been in backlogs, because their clients were away.

use super::*;

/// A time at which a client that left at the beginning has been away for long enough to sleep.
const LATER: Millis = Millis::new(2000);

/// A client of the same shard as the world's client: members of different shards do not sleep together.
fn neighbour(world: &World) -> (String, Connected) {
    let shard = world.client.session.shard;
    let mut clients = (0..).map(|n| {
        let id = format!("client {n}");
        let client = testing::kept_client_of(&world.router, &id, Version::V5, None, Millis::ZERO);
        (id, client)
    });
    let found = clients.find(|(_, client)| client.session.shard == shard);
    found.expect("some client has the shard")
}

/// A world whose client and its neighbour subscribe to `filter`, without retained messages. Returns the
/// neighbour's client identifier too.
fn two_subscribe(filter: &str) -> (World, String, FilterId) {
    let mut world = World::new();
    let (id, other) = neighbour(&world);
    let client = std::mem::replace(&mut world.client, other);
    world.subscribes_as(1, &[filter], 2);
    let number = world.grants()[0];
    assert_eq!(world.got(), ["SUBACK"]);
    world.disconnects();
    world.client = client;
    world.subscribes_as(1, &[filter], 2);
    assert_eq!(world.got(), ["SUBACK"]);
    (world, id, number)
}

impl World {
    fn connects(&mut self, id: &str) {
        self.client = testing::kept_client_of(&self.router, id, Version::V5, None, self.now);
    }

    fn asleep(&self) -> usize {
        self.router.totals().asleep
    }
}

#[test]
fn a_client_that_is_back_gets_its_backlog_and_a_new_subscription_in_order() {
    let (mut world, other, known) = two_subscribe("s");
    world.disconnects();
    world.now = LATER;
    world.brings(known, "s", "1");
    world.brings(known, "s", "2");
    assert_eq!(world.asleep(), 2);
    world.connects("a");
    assert_eq!(world.asleep(), 1);
    // It does not wait for its backlog before it subscribes.
    world.subscribes(&["t"]);
    let filter = world.grants()[0];
    assert_eq!(world.got(), ["1", "2", "SUBACK"]);
    world.brings(filter, "t", "live");
    world.brings(known, "s", "3");
    assert_eq!(world.got(), ["3"], "another subscription does not wait");
    world.fetches("t", "stored");
    assert_eq!(world.got(), ["stored retained", "live"]);
    world.connects(&other);
    assert_eq!(world.got(), ["1", "2", "3"]);
}

#[test]
fn a_client_that_subscribes_again_gets_its_backlog_before_the_retained_messages() {
    let (mut world, _, filter) = two_subscribe("t");
    world.disconnects();
    world.now = LATER;
    world.brings(filter, "t", "1");
    assert_eq!(world.asleep(), 2);
    world.connects("a");
    world.subscribes(&["t"]);
    world.brings(filter, "t", "2");
    assert_eq!(world.got(), ["1", "SUBACK"]);
    world.fetches("t", "stored");
    assert_eq!(world.got(), ["stored retained", "2"]);
}

#[test]
fn retained_messages_that_are_fetched_while_the_client_sleeps_come_once_behind_older_messages() {
    let (mut world, _, filter) = two_subscribe("t");
    world.subscribes(&["t"]);
    assert_eq!(world.got(), ["SUBACK"]);
    world.router.next_fetches(10);
    world.brings(filter, "t", "1");
    assert!(world.got().is_empty());
    world.disconnects();
    world.brings(filter, "t", "2");
    world.now = LATER;
    world.router.tick(world.now);
    world.brings(filter, "t", "3");
    assert_eq!(world.asleep(), 2);
    world.is_fetched(filter, "t", "stored");
    assert_eq!(world.asleep(), 1);
    world.brings(filter, "t", "4");
    world.connects("a");
    assert_eq!(world.got(), ["1", "2", "3", "stored retained", "4"]);
    world.brings(filter, "t", "5");
    assert_eq!(world.got(), ["5"], "nothing waits on the new connection");
    // The order holds again for the next SUBSCRIBE.
    world.subscribes(&["t", "u"]);
    world.brings(filter, "t", "6");
    assert!(world.got().is_empty());
    world.grants();
    assert_eq!(world.got(), ["SUBACK", "stored retained", "6"]);
}

#[test]
fn a_subscription_that_is_granted_while_its_client_sleeps_gets_its_retained_messages() {
    let (mut world, _, known) = two_subscribe("s");
    world.subscribes(&["t"]);
    world.disconnects();
    world.now = LATER;
    world.brings(known, "s", "1");
    assert_eq!(world.asleep(), 2);
    let filter = world.grants()[0];
    assert_eq!(world.asleep(), 1);
    world.brings(filter, "t", "2");
    world.fetches("t", "stored");
    world.brings(known, "s", "3");
    world.connects("a");
    assert_eq!(world.got(), ["1", "2", "stored retained", "3"]);
}
