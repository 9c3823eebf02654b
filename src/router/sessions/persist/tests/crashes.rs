//! Power cuts at any operation of the disk.

use super::*;

/// A client's knowledge of its session, from the answers that it was given.
#[derive(Clone, Default)]
struct Known {
    exists: Option<bool>,
    filters: [Option<bool>; 4],
}

/// Clients connect, begin anew, subscribe and unsubscribe, and the power fails at any operation of the disk.
/// Every answer that a client was given holds for the next process.
#[test]
fn every_answer_that_a_client_was_given_holds_after_a_crash() {
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let mut node = node();
        let mut known: [Known; 3] = Default::default();
        for crash in 0..4 {
            node.disk
                .fault(rng.below(60) as usize, Fault::Cut(rng.below(600) as usize));
            act(&mut node, &mut known, &mut rng);
            let disk = node.disk.after_power_cut(|n| rng.below(n.max(1)));
            node = node.restart_on(disk, Duration::from_secs(rng.below(3)));
            for (n, known) in known.iter_mut().enumerate() {
                let filters = node.filters(&format!("c{n}"));
                let said = format!("seed {seed}, crash {crash}, client {n}: {filters:?}");
                if let Some(exists) = known.exists {
                    assert_eq!(filters.is_some(), exists, "{said}");
                }
                let filters = filters.unwrap_or_default();
                for (f, known) in known.filters.iter_mut().enumerate() {
                    let has = filters.contains(&format!("f{f}"));
                    assert!(known.is_none_or(|known| known == has), "{said}, filter {f}");
                    *known = Some(has);
                }
                known.exists = Some(node.filters(&format!("c{n}")).is_some());
            }
        }
    }
}

/// Acts until the power has failed.
fn act(node: &mut Node, known: &mut [Known; 3], rng: &mut Rng) {
    let mut batch: Option<Batch> = None;
    let mut clients: [Option<Connected>; 3] = [None; 3];
    // For each client, its knowledge once it is answered.
    let mut told: [Option<Known>; 3] = Default::default();
    for _ in 0..400 {
        if node.disk.is_cut() {
            return;
        }
        if rng.chance(40) {
            let step = node.writer.step(&mut node.owner, node.now);
            if node.disk.is_cut() {
                return;
            }
            drop(step);
        }
        if let Some(under_way) = batch.take_if(|batch| node.is_decided(batch)) {
            node.router.committed(&under_way);
        }
        if batch.is_none() && rng.chance(50) {
            batch = Some(node.append()).filter(|batch| !batch.is_empty());
        }
        let n = rng.below(3) as usize;
        if let Some(client) = clients[n]
            && told[n].is_some()
        {
            if node.answers(client) {
                known[n] = told[n].take().expect("it waits");
            } else if rng.chance(90) {
                continue;
            } else {
                // It connects anew.
                clients[n] = None;
            }
        }
        told[n] = Some(next(node, &mut clients[n], &mut known[n], n, rng));
    }
}

/// One act of a client. Returns what it knows once it is answered; until then it knows less.
fn next(
    node: &mut Node,
    client: &mut Option<Connected>,
    known: &mut Known,
    n: usize,
    rng: &mut Rng,
) -> Known {
    let mut then = known.clone();
    match client {
        Some(connected) if rng.chance(80) => {
            let f = rng.below(4) as usize;
            let subscribes = rng.chance(60);
            match subscribes {
                true => node.subscribe(*connected, &format!("f{f}")),
                false => node.unsubscribe(*connected, &format!("f{f}")),
            }
            known.filters[f] = None;
            then.filters[f] = Some(subscribes);
            if subscribes {
                then.exists = Some(true);
            }
        }
        _ => {
            let clean_start = rng.chance(20);
            let connected = node.connect(Connect {
                clean_start,
                will: rng
                    .chance(30)
                    .then(|| will(&rng.below(2).to_string(), 0))
                    .flatten(),
                ..kept(&format!("c{n}"))
            });
            if !connected.present {
                let existed = known.exists == Some(true);
                *known = Known::default();
                then = Known {
                    exists: existed.then_some(true),
                    filters: [Some(false); 4],
                };
            } else {
                then.exists = Some(true);
            }
            *client = Some(connected);
        }
    }
    then
}
