//! The transports side by side: handshakes, deliveries, and the time to return after a cut.

use std::io;
use std::time::{Duration, Instant};

use super::lab::{Lab, median, of, words};
use crate::client::Client;
use crate::dial::{Dialer, Transport, Trust, Url};
use crate::link::Cut;
use crate::load::crowd::crowd;
use crate::netem::Netem;
use crate::tcp_relay::TcpRelay;
use crate::udp_relay::UdpRelay;
use crate::usage::Usage;
use crate::wire::Connect;

/// Every transport, the plain one first.
const WAYS: [&str; 6] = ["tcp", "tls", "ws", "wss", "quic", "webtransport"];

/// Connections of one round of handshakes, and how many at once.
const HANDSHAKES: usize = 1000;
const AT_ONCE: usize = 8;

/// Cuts per transport and network condition.
const CUTS: usize = 60;

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
}

/// Processor time of connecting and disconnecting, with full and with resumed TLS handshakes.
pub(super) fn handshakes(lab: &mut Lab) -> io::Result<()> {
    lab.say(&format!(
        "### Connecting: CONNECT to CONNACK and an orderly end, {HANDSHAKES} times, {AT_ONCE} at once\n"
    ));
    lab.say("| | TLS | CPU of Tidegate, µs | a CPU second |\n|---|---|---|---|");
    let pair = lab.pair(&WAYS)?;
    let runtime = runtime()?;
    for way in WAYS {
        let url = pair.edge.url(way);
        let secure = !matches!(url.transport, Transport::Tcp | Transport::Ws);
        let kinds: &[(&str, bool)] = match secure {
            true => &[("full", false), ("resumed", true)],
            false => &[("none", true)],
        };
        for (kind, tickets) in kinds {
            let dialer = match tickets {
                true => Dialer::new(&url, &Trust::Anything)?,
                false => Dialer::without_tickets(&url, &Trust::Anything)?,
            };
            let mut each = Vec::new();
            for round in 0..=lab.args.rounds {
                let count = if round == 0 { 2 * AT_ONCE } else { HANDSHAKES };
                let full = dialer.without_ticket();
                let before = Usage::of(pair.edge.pid())?.cpu();
                runtime
                    .block_on(crowd(count, AT_ONCE, |n| connect(&dialer, n)))
                    .map_err(io::Error::other)?;
                let spent = Usage::of(pair.edge.pid())?.cpu() - before;
                // The first run fetches tickets and warms up.
                if round > 0 {
                    let full = dialer.without_ticket() - full;
                    if full as usize > count / 50 {
                        let what = format!("{way}: {full} handshakes had no ticket");
                        return Err(io::Error::other(what));
                    }
                    each.push(spent.as_secs_f64() * 1e6 / count as f64);
                }
            }
            let each = median(&each);
            lab.say(&format!(
                "| {way} | {kind} | {each:.0} | {:.0} |",
                1e6 / each
            ));
        }
    }
    lab.say("");
    Ok(())
}

async fn connect(dialer: &Dialer, n: usize) -> Result<(), crate::client::ClientError> {
    let (client, _) = Client::connect(dialer, &Connect::new(format!("hand-{n}"))).await?;
    client.disconnect().await
}

/// Processor time of a delivery on each transport, relative to plain TCP.
pub(super) fn deliveries(lab: &mut Lab) -> io::Result<()> {
    let load = words("fan-out --qos 1 --payload 64 --publishers 1 --subscribers 100 --ahead 8");
    lab.say(&format!(
        "### Deliveries to 100 subscribers, 64 bytes, QoS 1, at most 8 messages under way\n\n`load {}`\n",
        load.join(" ")
    ));
    lab.say(
        "| | deliveries/s | a CPU second of Tidegate | CPU over that on tcp |\n|---|---|---|---|",
    );
    let pair = lab.pair(&WAYS)?;
    let mut cpu = vec![Vec::new(); WAYS.len()];
    let mut rate = vec![Vec::new(); WAYS.len()];
    for _ in 0..lab.args.rounds {
        for (n, way) in WAYS.iter().enumerate() {
            let to = words(&format!(
                "--url {} --seconds {}",
                pair.edge.url(way),
                lab.args.seconds
            ));
            let prefix = lab.prefix();
            let report = lab.run(&[&load, &to, &pair.watch(), &prefix])?;
            cpu[n].push(of(&report, "tidegate", "cpu_ns_per_delivery"));
            rate[n].push(report["deliveries_per_s"].as_f64().unwrap_or(f64::NAN));
        }
    }
    let plain = cpu[0].clone();
    for (n, way) in WAYS.iter().enumerate() {
        let ratios: Vec<f64> = cpu[n].iter().zip(&plain).map(|(a, b)| a / b).collect();
        lab.say(&format!(
            "| {way} | {:.0} | {:.0} | {:.2} |",
            median(&rate[n]),
            1e9 / median(&cpu[n]),
            median(&ratios)
        ));
    }
    lab.say("");
    Ok(())
}

/// From the dial after a cut to CONNACK with Session Present, over networks that lose packets.
pub(super) fn resume(lab: &mut Lab) -> io::Result<()> {
    lab.say(&format!(
        "### Back after a cut: from the dial to CONNACK, ms, {CUTS} cuts each\n\n\
         10 ms in each direction. What is lost of QUIC and WebTransport are datagrams; for the others it is an \
         emulation: a segment that is lost holds up what is behind it for 200 ms, a SYN for 1 s.\n"
    ));
    lab.say(
        "| | loss 0: p50 | p95 | 1 %: p50 | p95 | 5 %: p50 | p95 |\n|---|---|---|---|---|---|---|",
    );
    let pair = lab.pair(&WAYS)?;
    let runtime = runtime()?;
    for way in WAYS {
        let mut row = format!("| {way} |");
        for percent in [0, 1, 5] {
            let url = pair.edge.url(way);
            let mut took = runtime.block_on(cuts(url, percent))?;
            took.sort();
            let at = |share: usize| took[(took.len() - 1) * share / 100].as_secs_f64() * 1e3;
            row += &format!(" {:.0} | {:.0} |", at(50), at(95));
        }
        lab.say(&row);
    }
    lab.say("");
    Ok(())
}

async fn cuts(mut url: Url, percent: u32) -> io::Result<Vec<Duration>> {
    let netem = Netem {
        delay: Duration::from_millis(10),
        loss: f64::from(percent) / 100.0,
        ..Netem::FAIR
    };
    let server = Dialer::new(&url, &Trust::Anything)?.addr();
    let datagrams = matches!(url.transport, Transport::Quic | Transport::WebTransport);
    // Each server ends with its scope.
    let (udp, tcp);
    let relay = if datagrams {
        udp = UdpRelay::start(server, netem).await?;
        udp.addr()
    } else {
        tcp = TcpRelay::start(server, netem).await?;
        tcp.addr()
    };
    url.host = relay.ip().to_string();
    url.port = relay.port();
    let dialer = Dialer::new(&url, &Trust::Anything)?;
    let name = format!("cut-{}-{percent}", url.transport.name());
    let connect = Connect::new(name.clone()).clean(false).expiry(300);
    let (mut client, _) = Client::connect(&dialer, &connect)
        .await
        .map_err(io::Error::other)?;
    client
        .subscribe(&[&format!("{name}/#")], 1)
        .await
        .map_err(io::Error::other)?;
    let mut took = Vec::new();
    for _ in 0..CUTS {
        drop(client.cut(Cut::Reset));
        let begun = Instant::now();
        let (back, ack) = Client::connect(&dialer, &connect)
            .await
            .map_err(io::Error::other)?;
        took.push(begun.elapsed());
        if !ack.session_present {
            return Err(io::Error::other("the session is gone"));
        }
        client = back;
    }
    client.disconnect().await.map_err(io::Error::other)?;
    Ok(took)
}
