//! The cost of 100 flaps a second to the broker: packets and bytes on the links, compared with no
//! flaps.

use std::io;

use super::lab::{Lab, median, words};
use crate::recorder::{Diff, Recorder};
use crate::wire::kind;

/// Runs the same load without flaps and with 100 a second, through a recorder.
pub(super) fn upstream_idle(lab: &mut Lab) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let broker = lab.broker()?;
    let recorder = runtime.block_on(Recorder::start(broker.addr()))?;
    let edge = lab.edge(&["ws"], &recorder.url())?;
    let load = words("flap --qos 1 --payload 64 --connections 1000 --rate 500");
    let watch = words(&format!(
        "--pid tidegate={} --pid broker={}",
        edge.pid(),
        broker.pid()
    ));
    let to = words(&format!(
        "--url {} --seconds {}",
        edge.url("ws"),
        lab.args.seconds.max(10.0)
    ));
    // The same names in every run, so that filters and identifiers have the same length.
    let prefix = words("--prefix idle");
    let run = |flaps: u32| -> io::Result<(Diff, serde_json::Value)> {
        let before = recorder.snapshot();
        recorder.forget_publishes();
        let flaps = words(&format!("--flaps {flaps}"));
        let report = lab.run(&[&load, &to, &watch, &prefix, &flaps])?;
        Ok((recorder.snapshot().since(&before), report))
    };
    run(0)?;
    let (mut calm, mut stormy) = (Vec::new(), Vec::new());
    for _ in 0..lab.args.rounds.min(3) {
        calm.push(run(0)?);
        stormy.push(run(100)?);
    }
    lab.say(&format!(
        "### What the broker sees of 100 flaps a second, and of none\n\n`load {}`, a recorder on the links; keep-alive pings \
         ({:.0} and {:.0} packets) are left out\n",
        load.join(" "),
        median(&calm.iter().map(|(d, _)| pings(d) as f64).collect::<Vec<_>>()),
        median(&stormy.iter().map(|(d, _)| pings(d) as f64).collect::<Vec<_>>()),
    ));
    lab.say(
        "| | flaps | CONNECT | SUBSCRIBE | UNSUBSCRIBE | second copies | packets per message | bytes per message | broker's CPU, s |\n|---|---|---|---|---|---|---|---|---|",
    );
    for (title, runs) in [("none", &calm), ("100 a second", &stormy)] {
        let all = |figure: &dyn Fn(&Diff, &serde_json::Value) -> f64| {
            median(
                &runs
                    .iter()
                    .map(|(diff, report)| figure(diff, report))
                    .collect::<Vec<_>>(),
            )
        };
        let packets = |k: u8| all(&|diff, _| diff.to_broker[usize::from(k)] as f64);
        let flaps = all(&|_, r| r["flaps"].as_f64().unwrap_or(f64::NAN));
        let per = |d: &Diff, n: u64| n as f64 / d.to_broker[usize::from(kind::PUBLISH)] as f64;
        let all_packets = all(&|d, _| {
            per(
                d,
                d.packets_to_broker() + d.packets_to_tidegate() - pings(d),
            )
        });
        // A PINGREQ or PINGRESP has two bytes.
        let bytes = |d: &Diff| d.bytes_to_broker + d.bytes_to_tidegate - 2 * pings(d);
        let all_bytes = all(&|d, _| per(d, bytes(d)));
        let copies = all(&|d, _| d.second_copies as f64);
        let cpu = all(&|_, r| super::lab::of(r, "broker", "cpu_s"));
        lab.say(&format!(
            "| {title} | {flaps:.0} | {:.0} | {:.0} | {:.0} | {copies:.0} | {all_packets:.4} | {all_bytes:.3} | {cpu:.2} |",
            packets(kind::CONNECT),
            packets(kind::SUBSCRIBE),
            packets(kind::UNSUBSCRIBE),
        ));
    }
    let resumed: Vec<_> = stormy
        .iter()
        .map(|(_, r)| r["reconnect"]["p50_us"].as_f64().unwrap_or(f64::NAN))
        .collect();
    lab.say(&format!(
        "\nA flap's way back, median: {:.0} µs.\n",
        median(&resumed)
    ));
    drop(edge);
    runtime.shutdown_background();
    Ok(())
}

/// PINGREQ and PINGRESP packets: their number depends on time, not on the load.
fn pings(diff: &Diff) -> u64 {
    let ping = |packets: &[u64; 16]| {
        packets[usize::from(kind::PINGREQ)] + packets[usize::from(kind::PINGRESP)]
    };
    ping(&diff.to_broker) + ping(&diff.to_tidegate)
}
