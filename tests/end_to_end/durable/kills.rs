//! Kills at random moments while clients subscribe, unsubscribe, begin anew and change their wills: every
//! answer that a client has seen is true after the restart.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidegate_kit::client::{Client, ClientError};
use tidegate_kit::dial::Dialer;
use tidegate_kit::rng::Rng;
use tidegate_kit::wire::{Connect, Packet};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::{Node, Result, kept};

/// Clients that do this at the same time.
const CLIENTS: usize = 12;
const FILTERS: usize = 5;

/// A client's knowledge of its session, from the answers that it has got.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Whether there is a session. `None`: the answer is missing.
    exists: Option<bool>,
    /// Whether the session has the filter. Without an entry, an answer is missing.
    filters: BTreeMap<usize, bool>,
}

impl Known {
    /// A new session, whose CONNACK does not wait for the disk.
    fn anew() -> Self {
        Self {
            exists: None,
            filters: (0..FILTERS).map(|n| (n, false)).collect(),
        }
    }
}

fn id(client: usize) -> String {
    format!("client{client}")
}

fn filter(client: usize, number: usize) -> String {
    format!("to/{client}/{number}")
}

/// Acts until the connection breaks. `known` is then in line with the answers.
async fn act(dialer: &Dialer, client: usize, known: &mut Known, rng: &mut Rng) -> Result {
    loop {
        let clean = rng.below(8) == 0;
        let before = known.exists;
        if clean {
            // Old or new, until CONNACK tells.
            *known = Known::default();
        }
        let (mut connection, ack) =
            Client::connect(dialer, &kept(&id(client)).clean(clean)).await?;
        match (clean, before, ack.session_present) {
            (true, _, true) => return Err("Session Present 1 after a clean start".into()),
            (true, before, false) => {
                *known = Known::anew();
                // This CONNACK waited for the end of the old session.
                known.exists = before.filter(|exists| *exists);
            }
            (false, Some(true), false) => {
                return Err(format!("{} lost its session", id(client)).into());
            }
            (false, _, true) => known.exists = Some(true),
            (false, _, false) => *known = Known::anew(),
        }
        for _ in 0..rng.below(6) {
            let number = rng.below(FILTERS as u64) as usize;
            let name = filter(client, number);
            known.filters.remove(&number);
            let subscribes = rng.below(2) == 0;
            match subscribes {
                true => {
                    let codes = connection.subscribe(&[&name], 1).await?;
                    if codes.codes != [1] {
                        return Err(format!("{name}: {codes:?}").into());
                    }
                }
                false => drop(connection.unsubscribe(&[&name]).await?),
            }
            known.filters.insert(number, subscribes);
            if subscribes {
                known.exists = Some(true);
            }
        }
    }
}

/// The filters through which a client gets messages: the last message comes through a fresh one.
async fn reached(node: &Node, receiver: &mut Client, client: usize) -> Result<BTreeSet<usize>> {
    let probe = format!("probe/{client}");
    receiver.subscribe(&[&probe], 1).await?;
    let (mut publisher, _) = node
        .connect(&Connect::new(format!("p{client}")).clean(true))
        .await?;
    for number in 0..FILTERS {
        publisher.publish(&filter(client, number), b"", 1).await?;
    }
    publisher.publish(&probe, b"", 1).await?;
    let mut found = BTreeSet::new();
    loop {
        let Packet::Publish(publish) = receiver.next().await? else {
            continue;
        };
        receiver.acknowledge(&publish).await?;
        if publish.topic == probe {
            receiver.unsubscribe(&[&probe]).await?;
            return Ok(found);
        }
        let number = publish.topic.rsplit('/').next().unwrap_or_default();
        found.insert(number.parse()?);
    }
}

async fn judge(node: &Node, client: usize, known: &mut Known) -> Result {
    let (mut receiver, present) = node.connect(&kept(&id(client))).await?;
    if known.exists.is_some_and(|exists| exists != present) {
        return Err(format!(
            "{}: Session Present {present}, known: {known:?}",
            id(client)
        )
        .into());
    }
    if !present {
        *known = Known::anew();
        return Ok(());
    }
    // The broker has the restored filters again after some moments.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found = reached(node, &mut receiver, client).await?;
        let wrong = known
            .filters
            .iter()
            .find(|(n, has)| found.contains(n) != **has);
        match wrong {
            None => {
                known.exists = Some(true);
                known.filters = (0..FILTERS).map(|n| (n, found.contains(&n))).collect();
                return Ok(());
            }
            Some((number, false)) => {
                return Err(format!("{}: filter {number} is back: {known:?}", id(client)).into());
            }
            Some((number, true)) if Instant::now() > deadline => {
                return Err(format!("{}: filter {number} is lost: {known:?}", id(client)).into());
            }
            // It asks again, which takes several round trips.
            Some(_) => {}
        }
    }
}

#[test]
fn every_answer_that_a_client_has_seen_is_true_after_a_kill() {
    let kills = match std::env::var_os("TIDEGATE_FULL") {
        Some(_) => 100,
        None => 20,
    };
    let seed = super::seed();
    super::run(async move {
        let mut rng = Rng::new(seed);
        let mut node = Node::start("disk")?;
        let mut known: Vec<Known> = vec![
            Known {
                exists: Some(false),
                ..Known::anew()
            };
            CLIENTS
        ];
        for _ in 0..kills {
            let mut tasks = JoinSet::new();
            for (client, known) in std::mem::take(&mut known).into_iter().enumerate() {
                let dialer = node.tidegate.dialer("tcp");
                let mut rng = Rng::new(rng.next());
                tasks.spawn(async move {
                    let mut known = known;
                    let end = act(&dialer, client, &mut known, &mut rng).await;
                    (client, known, end)
                });
            }
            sleep(Duration::from_millis(20 + rng.below(400))).await;
            node.kill_and_start()?;
            let mut all = BTreeMap::new();
            while let Some(ended) = tasks.join_next().await {
                let (client, known, end) = ended?;
                if let Err(error) = end
                    && !matches!(
                        error.downcast_ref(),
                        Some(ClientError::Closed | ClientError::Io(_))
                    )
                    && error.downcast_ref::<std::io::Error>().is_none()
                {
                    return Err(error);
                }
                all.insert(client, known);
            }
            known = all.into_values().collect();
            for (client, known) in known.iter_mut().enumerate() {
                timeout(super::PATIENCE, judge(&node, client, known)).await??;
            }
        }
        Ok(())
    });
}
