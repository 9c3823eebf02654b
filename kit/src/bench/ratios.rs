//! Processor time and latency of Tidegate before mosquitto over mosquitto alone.

use std::io;

use serde_json::Value;

use super::lab::{Lab, Pair, median, of, reached, words};
use crate::process::Mosquitto;

/// One message to 500 subscribers, as fast as they go: Tidegate on ws against mosquitto on tcp.
pub(super) fn fan_out(lab: &mut Lab, qos: u8, bound: f64) -> io::Result<()> {
    let load = words(&format!(
        "fan-out --qos {qos} --payload 64 --publishers 1 --subscribers 500"
    ));
    let (alone, pair) = (lab.broker()?, lab.pair(&["ws"])?);
    let url = pair.edge.url("ws").to_string();
    let rounds = alternate(lab, &load, &alone, &pair, &url)?;
    let title = format!("Fan-out of 64 bytes to 500 subscribers, QoS {qos}, as fast as they go");
    lab.say(&format!(
        "### {title}\n\nTidegate on ws, mosquitto alone on tcp; `load {}`\n",
        load.join(" ")
    ));
    lab.say(
        "| | deliveries/s | CPU per delivery, ns | wakes per 1000 deliveries |\n|---|---|---|---|",
    );
    row(lab, "mosquitto alone", &rounds.alone, "mosquitto");
    row(lab, "tidegate", &rounds.pair, "tidegate");
    row(lab, "its broker", &rounds.pair, "broker");
    let cpu = |r: &Value, p: &str| of(r, p, "cpu_ns_per_delivery");
    let ratio = rounds.ratio(|a, b| cpu(b, "tidegate") / cpu(a, "mosquitto"));
    lab.say(&format!(
        "\nTidegate's CPU per delivery over mosquitto's: **{:.3}** (rounds {}), wanted at most {bound}: {}\n",
        median(&ratio),
        list(&ratio),
        reached(median(&ratio), bound)
    ));
    // Publishers that run ahead give the figure above its large batches; with few messages under
    // way at a time, each write carries less.
    let mut few = load.clone();
    few.extend(words("--ahead 8"));
    let rounds = alternate(lab, &few, &alone, &pair, &url)?;
    let ratio = rounds.ratio(|a, b| cpu(b, "tidegate") / cpu(a, "mosquitto"));
    lab.say(&format!(
        "With at most 8 messages under way (`--ahead 8`): {:.3} (rounds {}).\n",
        median(&ratio),
        list(&ratio)
    ));
    profile(lab, &load, &pair, &url)
}

/// 300 pairs on tcp at QoS 1, 5,000 messages a second together.
pub(super) fn pairs(lab: &mut Lab) -> io::Result<()> {
    let load = words("pairs --qos 1 --payload 64 --publishers 300 --rate 5000");
    let (alone, pair) = (lab.broker()?, lab.pair(&["tcp"])?);
    let url = pair.edge.url("tcp").to_string();
    let rounds = alternate(lab, &load, &alone, &pair, &url)?;
    lab.say(&format!(
        "### 300 pairs on tcp, QoS 1, 5,000 messages a second together\n\n`load {}`\n",
        load.join(" ")
    ));
    lab.say(
        "| | deliveries/s | CPU per delivery, ns | wakes per 1000 deliveries |\n|---|---|---|---|",
    );
    row(lab, "mosquitto alone", &rounds.alone, "mosquitto");
    row(lab, "tidegate", &rounds.pair, "tidegate");
    row(lab, "its broker", &rounds.pair, "broker");
    let cpu = |r: &Value, p: &str| of(r, p, "cpu_ns_per_delivery");
    let both = |r: &Value| cpu(r, "tidegate") + cpu(r, "broker");
    let ratio = rounds.ratio(|a, b| both(b) / cpu(a, "mosquitto"));
    lab.say(&format!(
        "\nCPU of Tidegate and its broker over mosquitto alone: **{:.2}** (rounds {}), wanted at most 1.6: {}\n",
        median(&ratio),
        list(&ratio),
        reached(median(&ratio), 1.6)
    ));
    latencies(lab, &rounds);
    profile(lab, &load, &pair, &url)
}

/// 100 pairs at 1,000 messages a second: the latency of a moderate load, over each transport.
pub(super) fn paced(lab: &mut Lab) -> io::Result<()> {
    let (alone, pair) = (lab.broker()?, lab.pair(&["tcp", "ws", "wss", "quic"])?);
    let load = words("paced --qos 1 --payload 64 --publishers 100 --rate 1000");
    lab.say(&format!(
        "### Latency at 1,000 messages a second, QoS 1\n\n`load {}`\n",
        load.join(" ")
    ));
    for transport in ["tcp", "ws", "wss", "quic"] {
        let url = pair.edge.url(transport).to_string();
        let rounds = alternate(lab, &load, &alone, &pair, &url)?;
        lab.say(&format!(
            "Tidegate on {transport}, mosquitto alone on tcp:\n"
        ));
        latencies(lab, &rounds);
    }
    Ok(())
}

/// The reports of all rounds.
struct Rounds {
    alone: Vec<Value>,
    pair: Vec<Value>,
}

impl Rounds {
    /// A ratio by round, of two measurements that were taken one after the other.
    fn ratio(&self, of: impl Fn(&Value, &Value) -> f64) -> Vec<f64> {
        self.alone
            .iter()
            .zip(&self.pair)
            .map(|(a, b)| of(a, b))
            .collect()
    }
}

/// The order A, B, A, B spreads other work on the machine over both.
fn alternate(
    lab: &mut Lab,
    load: &[String],
    alone: &Mosquitto,
    pair: &Pair,
    url: &str,
) -> io::Result<Rounds> {
    let seconds = words(&format!("--seconds {}", lab.args.seconds));
    let watch_alone = words(&format!("--pid mosquitto={}", alone.pid()));
    let to_alone = words(&format!("--url tcp://{}", alone.addr()));
    let to_edge = words(&format!("--url {url}"));
    let mut rounds = Rounds {
        alone: Vec::new(),
        pair: Vec::new(),
    };
    for _ in 0..lab.args.rounds {
        let prefix = lab.prefix();
        rounds
            .alone
            .push(lab.run(&[load, &to_alone, &watch_alone, &prefix, &seconds])?);
        let prefix = lab.prefix();
        rounds
            .pair
            .push(lab.run(&[load, &to_edge, &pair.watch(), &prefix, &seconds])?);
    }
    Ok(rounds)
}

fn profile(lab: &mut Lab, load: &[String], pair: &Pair, url: &str) -> io::Result<()> {
    let text = lab.profile(pair.edge.pid(), load, url)?;
    if !text.is_empty() {
        lab.say(&text);
    }
    Ok(())
}

fn row(lab: &mut Lab, title: &str, reports: &[Value], process: &str) {
    let all =
        |figure: &dyn Fn(&Value) -> f64| median(&reports.iter().map(figure).collect::<Vec<_>>());
    let rate = all(&|r| r["deliveries_per_s"].as_f64().unwrap_or(f64::NAN));
    let cpu = all(&|r| of(r, process, "cpu_ns_per_delivery"));
    let deliveries = |r: &Value| r["deliveries"].as_f64().unwrap_or(f64::NAN);
    let wakes = all(&|r| of(r, process, "wakes") / deliveries(r) * 1000.0);
    lab.say(&format!("| {title} | {rate:.0} | {cpu:.0} | {wakes:.1} |"));
}

fn latencies(lab: &mut Lab, rounds: &Rounds) {
    lab.say("| | p50, µs | p99, µs | p99.9, µs |\n|---|---|---|---|");
    for (title, reports) in [
        ("mosquitto alone", &rounds.alone),
        ("tidegate", &rounds.pair),
    ] {
        let all = |name: &str| {
            let one = |r: &Value| r["latency"][name].as_f64().unwrap_or(f64::NAN);
            median(&reports.iter().map(one).collect::<Vec<_>>())
        };
        let (p50, p99, p999) = (all("p50_us"), all("p99_us"), all("p99_9_us"));
        lab.say(&format!("| {title} | {p50:.0} | {p99:.0} | {p999:.0} |"));
    }
    lab.say("");
}

fn list(values: &[f64]) -> String {
    let texts: Vec<_> = values.iter().map(|v| format!("{v:.3}")).collect();
    texts.join(", ")
}
