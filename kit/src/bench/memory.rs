//! The private memory of a connection, a detached session and a queued message.

use std::io;

use super::lab::{Lab, median, reached, words};

/// Growth per idle subscribed connection, in fresh processes each time.
pub(super) fn connections(
    lab: &mut Lab,
    transport: &str,
    (bound, wanted): (f64, f64),
) -> io::Result<()> {
    let n = lab.args.connections;
    let load = words(&format!(
        "connect --connections {n} --base {} --qos 1",
        n / 5
    ));
    let (mut tidegate, mut broker, mut rate) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..lab.args.rounds.min(3) {
        let pair = lab.pair(&[transport])?;
        let to = words(&format!("--url {}", pair.edge.url(transport)));
        let prefix = lab.prefix();
        let report = lab.run(&[&load, &to, &pair.watch(), &prefix])?;
        let ended = report["ended_meanwhile"].as_u64();
        if ended != Some(0) {
            return Err(io::Error::other(format!(
                "{ended:?} connections ended meanwhile"
            )));
        }
        let growth = |name: &str| {
            report["private_bytes_per_connection"][name]
                .as_f64()
                .unwrap_or(f64::NAN)
        };
        tidegate.push(growth("tidegate"));
        broker.push(growth("broker"));
        rate.push(report["connections_per_s"].as_f64().unwrap_or(f64::NAN));
    }
    let bytes = median(&tidegate);
    lab.say(&format!(
        "### Memory of an idle subscribed connection on {transport}\n\n`load {}`\n",
        load.join(" ")
    ));
    lab.say(&format!(
        "**{bytes:.0} bytes** of private memory each from {} to {n} connections (runs {}), wanted at most {bound:.0}: {}; \
         better is {wanted:.0}: {}. Its broker grew by {:.0} each. {:.0} connects and subscribes a second.\n",
        n / 5,
        list(&tidegate),
        reached(bytes, bound),
        reached(bytes, wanted),
        median(&broker),
        median(&rate),
    ));
    Ok(())
}

/// Growth per detached session and per queued reference to a shared message.
pub(super) fn sessions(lab: &mut Lab) -> io::Result<()> {
    let n = lab.args.connections;
    let load = words(&format!(
        "drain --connections {n} --base {} --messages 200 --qos 1",
        n / 5
    ));
    let own = words(&format!(
        "drain --connections {n} --base {} --qos 1 --topics {n} --messages 0",
        n / 5
    ));
    let (mut session, mut reference, mut rate) = (Vec::new(), Vec::new(), Vec::new());
    let mut apart = Vec::new();
    for _ in 0..lab.args.rounds.min(3) {
        let pair = lab.pair(&["ws"])?;
        let to = words(&format!("--url {}", pair.edge.url("ws")));
        let prefix = lab.prefix();
        let report = lab.run(&[&load, &to, &pair.watch(), &prefix])?;
        let figure = |name: &str| report[name]["tidegate"].as_f64().unwrap_or(f64::NAN);
        session.push(figure("private_bytes_per_detached_session"));
        reference.push(figure("private_bytes_per_queued_reference"));
        rate.push(report["deliveries_per_s"].as_f64().unwrap_or(f64::NAN));

        let pair = lab.pair(&["ws"])?;
        let to = words(&format!("--url {}", pair.edge.url("ws")));
        let prefix = lab.prefix();
        let report = lab.run(&[&own, &to, &pair.watch(), &prefix])?;
        let grown = &report["private_bytes_per_detached_session"]["tidegate"];
        apart.push(grown.as_f64().unwrap_or(f64::NAN));
    }
    lab.say(&format!(
        "### Memory of detached sessions\n\n`load {}`\n",
        load.join(" ")
    ));
    let (each, entry) = (median(&session), median(&reference));
    lab.say(&format!(
        "A detached session with one subscription: **{each:.0} bytes** (runs {}), wanted at most 1024: {}.\n",
        list(&session),
        reached(each, 1024.0)
    ));
    lab.say(&format!(
        "The same where each session has a topic of its own (`--topics {n}`), its filter and its share of the \
         aggregation included: {:.0} bytes (runs {}).\n",
        median(&apart),
        list(&apart)
    ));
    lab.say(&format!(
        "A queued reference to a shared message: **{entry:.1} bytes** (runs {}), wanted at most 48: {}. \
         The queues were drained at {:.0} deliveries a second.\n",
        list(&reference),
        reached(entry, 48.0),
        median(&rate)
    ));
    Ok(())
}

fn list(values: &[f64]) -> String {
    let texts: Vec<_> = values.iter().map(|v| format!("{v:.1}")).collect();
    texts.join(", ")
}
