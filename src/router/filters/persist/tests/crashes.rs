use tidegate_kit::rng::Rng;

use super::*;

const CLIENTS: [&str; 3] = ["x", "y", "z"];
const FILTERS: [&str; 12] = [
    "a",
    "a/b",
    "a/+",
    "a/#",
    "+/b",
    "#",
    "b/c/d",
    "b/+/d",
    "c",
    "$share/g/a/+",
    "$share/h/c",
    "d/e",
];

/// Kills and power cuts at random moments, while clients subscribe and unsubscribe, links break, and the broker
/// forgets sessions.
fn crash(seed: u64, identifiers: bool) {
    let mut rng = Rng::new(seed);
    let mut node = Node::new(identifiers);
    for _ in 0..4 {
        for client in CLIENTS {
            node.connect(client);
        }
        for _ in 0..rng.below(120) {
            step(&mut node, &mut rng);
            node.check();
        }
        // Requests whose answers never come.
        if rng.below(2) == 0 {
            let client = node.connect(CLIENTS[rng.below(3) as usize]);
            change(&mut node, client, &mut rng);
        }
        for _ in 0..rng.below(6) {
            node.persist_a_little();
        }
        for link in 0..node.links.len() {
            if node.links[link].up && rng.below(2) == 0 {
                node.send(link);
            }
            for _ in 0..rng.below(4) {
                node.read(link);
            }
        }
        let disk = match rng.below(2) {
            0 => node.disk.after_kill(),
            _ => node.disk.after_power_cut(|below| rng.below(below)),
        };
        node = node.restart_on(disk, Duration::from_secs(rng.below(900)));
        if rng.below(2) == 0 {
            node.settle();
            node.check_all(&CLIENTS);
        }
    }
    for _ in 0..rng.below(60) {
        step(&mut node, &mut rng);
    }
    node.settle();
    // All moves end, and everything that nobody needs has left.
    for _ in 0..20 {
        node.advance(Duration::from_secs(15));
        node.settle();
    }
    node.check_all(&CLIENTS);
}

/// A client subscribes or unsubscribes.
fn change(node: &mut Node, client: Connected, rng: &mut Rng) {
    let filter = FILTERS[rng.below(FILTERS.len() as u64) as usize];
    match rng.below(3) {
        0 => node.unsubscribe(client, filter),
        _ => {
            let qos = QoS::from_u8(rng.below(3) as u8).unwrap_or_default();
            node.subscribe(client, filter, qos);
        }
    }
}

fn step(node: &mut Node, rng: &mut Rng) {
    let link = rng.below(node.links.len() as u64) as usize;
    let up = node.links[link].up;
    match rng.below(20) {
        0..=4 => {
            let client = node.connect(CLIENTS[rng.below(3) as usize]);
            change(node, client, rng);
        }
        5..=8 if up => node.send(link),
        9..=10 if up => node.read(link),
        11..=13 if up => {
            node.read(link);
            node.answer(link);
        }
        14 if up && rng.below(3) == 0 => {
            for _ in 0..rng.below(4) {
                node.read(link);
            }
            node.disconnect(link);
        }
        15 if rng.below(6) == 0 => {
            (0..node.links.len()).for_each(|link| node.disconnect(link));
            node.broker.sessions.clear();
        }
        5..=15 if !up => {
            let clean = node.announce(link);
            let present = node.broker.connect(&client_id("a", link), clean);
            match rng.below(8) {
                // Its answer is lost.
                0 => node.links[link].in_doubt = true,
                _ => node.connected(link, present),
            }
        }
        16..=17 => node.persist(),
        18 => {
            for _ in 0..rng.below(4) {
                node.persist_a_little();
            }
        }
        _ => {
            node.advance(Duration::from_millis(rng.below(3000)));
            if up && node.router.barrier_wanted(link) && node.links[link].sent.is_empty() {
                let number = node.router.barrier_begins(link);
                node.router.barrier_passed(link, number, node.now);
            }
        }
    }
}

#[test]
fn after_crashes_the_broker_has_what_the_sessions_need_and_nothing_else() {
    let seeds = std::env::var("TIDEGATE_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok());
    for seed in 0..seeds.unwrap_or(40) {
        for identifiers in [true, false] {
            let outcome = std::panic::catch_unwind(|| crash(seed, identifiers));
            outcome.unwrap_or_else(|_| panic!("seed {seed}, identifiers {identifiers}"));
        }
    }
}
