//! Data links that are added for many filters, where the broker has Subscription Identifiers.

use super::*;

/// With ten filters for each link another one is opened, from two links to four.
fn world() -> World {
    let world = World::before_the_broker(RouterConfig {
        data_link_filters: 10,
        ..config(4, Duration::from_secs(600))
    });
    world
        .router
        .set_broker_features(&testing::facts(), world.now);
    for link in 0..2 {
        (world.router).data_link_up(link, LinkSession::New, true, world.now);
    }
    world
}

impl World {
    /// The client subscribes to `count` filters with this prefix, and the broker grants them.
    fn subscribe_many(&mut self, client: Connected, prefix: &str, count: usize) {
        for n in 0..count {
            self.ask(client, &[&format!("{prefix}/{n}")]);
            self.grant();
        }
    }

    fn grant(&mut self) {
        for link in 0..4 {
            for wanted in self.router.next_subscribes(link, 10) {
                let code = ReasonCode(wanted.qos as u8);
                self.router.suback(wanted.filter, code, self.now);
                self.held[link].insert((*wanted.name).to_owned());
            }
        }
    }

    fn wanted(&self) -> Vec<usize> {
        (0..4)
            .filter(|link| self.router.filter_link_wanted(*link))
            .collect()
    }

    fn filters(&self) -> Vec<usize> {
        (0..4).map(|link| self.router.filters_on(link)).collect()
    }
}

#[test]
fn many_filters_open_another_link_and_use_it_once_it_is_connected() {
    let mut world = world();
    let client = testing::client(&world.router, "a");
    world.subscribe_many(client, "first", 20);
    assert_eq!(world.wanted(), [0, 1]);
    world.subscribe_many(client, "second", 10);
    assert_eq!(world.wanted(), [0, 1, 2]);
    // The broker may not take more connections.
    assert_eq!(world.filters()[2..], [0, 0]);
    (world.router).data_link_up(2, LinkSession::New, true, world.now);
    world.subscribe_many(client, "third", 10);
    let there = world.filters();
    assert!(there[2] > 0 && there[3] == 0, "{there:?}");
    assert_eq!(world.held[2].len(), there[2]);
    assert_eq!(world.wanted(), [0, 1, 2, 3]);
    // While it is away, others take the new ones.
    world.router.data_link_down(2, world.now);
    world.subscribe_many(client, "fourth", 10);
    assert_eq!(world.filters()[2..], [there[2], 0]);
}

#[test]
fn overlapping_filters_of_a_client_stay_on_one_link() {
    let mut world = world();
    let client = testing::client(&world.router, "a");
    world.subscribe_many(client, "first", 40);
    for link in 2..4 {
        (world.router).data_link_up(link, LinkSession::New, true, world.now);
    }
    world.ask(client, &["x/#"]);
    world.grant();
    let before = world.filters();
    let other = testing::client(&world.router, "b");
    world.ask(other, &["x/#"]);
    world.subscribe_many(other, "x", 20);
    let after = world.filters();
    let grown: Vec<usize> = (0..4).filter(|link| after[*link] > before[*link]).collect();
    assert_eq!(grown.len(), 1, "{before:?}, then {after:?}");
}
