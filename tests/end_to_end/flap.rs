//! The flap test: clients vanish and come back, and the broker notices nothing.
//!
//! A recorder stands between Tidegate and mosquitto. While the clients flap under live traffic it must
//! see no CONNECT, no SUBSCRIBE, no UNSUBSCRIBE and no second copy of a publish; the clients must lose
//! nothing, get nothing out of order, and get duplicates only with DUP.
//!
//! `TIDEGATE_FULL=1` runs the full counts, `FLAP_SEED` repeats the choices of another run, and
//! `FLAP_CLIENTS`, `FLAP_FLAPS` and `FLAP_RATE` change the counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate_kit::dial::{Dialer, Trust};
use tidegate_kit::fleet::{Fleet, Plan, Verdict};
use tidegate_kit::link::Cut;
use tidegate_kit::process::{MosquittoConfig, TidegateConfig, raise_open_files};
use tidegate_kit::recorder::Recorder;

#[test]
fn a_fleet_over_ws_flaps_and_the_broker_notices_nothing() {
    let full = std::env::var_os("TIDEGATE_FULL").is_some();
    let (clients, flaps, rate) = if full {
        (2000, 10_000, 150.0)
    } else {
        (300, 1500, 60.0)
    };
    // Mostly RST; now and then a FIN without DISCONNECT, or a connection that falls silent.
    let cuts = vec![Cut::Reset, Cut::Reset, Cut::Reset, Cut::Close, Cut::Silent];
    run("ws", clients, flaps, rate, cuts);
}

#[test]
fn a_fleet_over_quic_flaps_and_the_broker_notices_nothing() {
    let full = std::env::var_os("TIDEGATE_FULL").is_some();
    let (clients, flaps, rate) = if full {
        (200, 1000, 30.0)
    } else {
        (40, 200, 10.0)
    };
    run("quic", clients, flaps, rate, vec![Cut::Silent, Cut::Reset]);
}

fn run(transport: &str, clients: usize, flaps: usize, rate: f64, cuts: Vec<Cut>) {
    let _machine = crate::alone();
    raise_open_files();
    let plan = Plan {
        clients: from_env("FLAP_CLIENTS", clients),
        group: 100,
        flaps: from_env("FLAP_FLAPS", flaps),
        flap_rate: from_env("FLAP_RATE", rate),
        rate: 200.0,
        aimed: 3,
        will_delay: 30,
        ack_delay: Duration::from_millis(800),
        cuts,
        prefix: "flap".to_owned(),
        seed: from_env("FLAP_SEED", 0x7469_6465),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    let limit = Duration::from_secs_f64(240.0 + plan.flaps as f64 / plan.flap_rate * 2.0);
    let outcome = runtime.block_on(async {
        tokio::time::timeout(limit, flap(transport, plan))
            .await
            .unwrap_or_else(|_| Err(format!("the test did not end within {} s", limit.as_secs())))
    });
    runtime.shutdown_background();
    if let Err(what) = outcome {
        panic!("over {transport}: {what}");
    }
}

async fn flap(transport: &str, plan: Plan) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    let mut report = Vec::new();
    // The broker's window must not limit publishes while its acknowledgements are delayed: Tidegate
    // would rightly open more links then.
    let broker = MosquittoConfig {
        max_inflight_messages: Some(2000),
        ..MosquittoConfig::default()
    };
    let broker = broker.start().map_err(text)?;
    let recorder = Recorder::start(broker.addr()).await.map_err(text)?;
    recorder.watch(&format!("{}/", plan.prefix));
    recorder.delay_acks(plan.ack_delay);
    let tidegate = TidegateConfig::new(env!("CARGO_BIN_EXE_tidegate"), &recorder.url())
        .listen(&[transport])
        .start()
        .map_err(text)?;
    let edge = Arc::new(tidegate.dialer(transport));
    let at_broker = format!("tcp://{}", broker.addr()).parse()?;
    let at_broker = Dialer::new(&at_broker, &Trust::Anything).map_err(text)?;

    let start = Instant::now();
    let seed = plan.seed;
    let mut fleet = Fleet::gather(plan.clone(), edge, &at_broker)
        .await
        .map_err(text)?;
    report.push(format!("gathered after {:?}", start.elapsed()));
    fleet.warm_up().await;
    let absorbed = |m: &tidegate_kit::metrics::Metrics| m.sum("tidegate_flaps_absorbed_total", &[]);
    let before = recorder.snapshot();
    let absorbed_before = absorbed(&tidegate.metrics().map_err(text)?);

    let back = fleet.flap().await.map_err(text);
    report.push(format!("all back after {:?}", start.elapsed()));
    fleet.come_to_rest(Duration::from_secs(30)).await;
    report.push(format!("at rest after {:?}", start.elapsed()));
    let diff = recorder.snapshot().since(&before);
    let absorbed = absorbed(&tidegate.metrics().map_err(text)?) - absorbed_before;
    let resumes = fleet.resumes();
    let verdict = fleet.judge().await;

    let mut faults = Vec::new();
    if let Err(e) = back {
        faults.push(e);
    }
    if !verdict.is_good() {
        faults.push("clients lost, reordered or duplicated messages".to_owned());
    }
    if !diff.is_quiet() {
        faults.push("the broker noticed the flaps".to_owned());
    }
    if verdict.flaps != plan.flaps as u64 {
        faults.push(format!(
            "{} of {} flaps were completed",
            verdict.flaps, plan.flaps
        ));
    }
    if absorbed < resumes as f64 {
        faults.push(format!(
            "tidegate_flaps_absorbed_total rose by {absorbed}, but {resumes} clients resumed"
        ));
    }
    report.push(verdict.to_string());
    report.push(format!("the broker during the flaps:\n{diff}"));
    report.push(format!("tidegate_flaps_absorbed_total rose by {absorbed}"));
    report.push(format!("FLAP_SEED={seed}"));
    let report = report.join("\n");
    if faults.is_empty() {
        println!("{report}");
        return Ok(());
    }
    let log = tidegate.log();
    let said = about(&log, &verdict, &plan.prefix);
    let tail = &log[log.len().saturating_sub(20)..];
    Err(format!(
        "{}\n{report}\ntidegate about the first of these clients:\n{said}\nand at the end:\n{}",
        faults.join("\n"),
        tail.join("\n")
    ))
}

/// The lines of Tidegate's log about the clients with faults.
fn about(log: &[String], verdict: &Verdict, prefix: &str) -> String {
    let mut text = String::new();
    for client in verdict.clients.iter().take(3) {
        let id = format!("client_id=\"{prefix}-{client}\"");
        let lines: Vec<_> = log.iter().filter(|line| line.contains(&id)).collect();
        for line in &lines[lines.len().saturating_sub(12)..] {
            text += line;
            text.push('\n');
        }
    }
    text
}

fn from_env<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}
