//! The exposition, read by a parser that accepts no mistake.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// A series: its sorted labels.
type Labels = Vec<(String, String)>;

/// The samples of one metric.
#[derive(Debug)]
struct Metric {
    kind: String,
    /// Sample name, labels, value.
    samples: Vec<(String, Labels, f64)>,
}

/// Reads the text exposition format 0.0.4.
fn parse(text: &str) -> Result<BTreeMap<String, Metric>, String> {
    if !text.ends_with('\n') {
        return Err("the last line does not end".to_owned());
    }
    let mut metrics = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut current: Option<(String, Metric)> = None;
    for line in text.lines().filter(|l| !l.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').ok_or(format!("no help: {line}"))?;
            if help.trim().is_empty() || !helped.insert(name.to_owned()) {
                return Err(format!("empty or second help: {line}"));
            }
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or(format!("no type: {line}"))?;
            if !["counter", "gauge", "histogram"].contains(&kind) {
                return Err(format!("unwanted type: {line}"));
            }
            if !helped.contains(name) || !legal_name(name) {
                return Err(format!("no help or no name: {line}"));
            }
            let metric = Metric {
                kind: kind.to_owned(),
                samples: Vec::new(),
            };
            let done = current.replace((name.to_owned(), metric));
            finish(done, &mut metrics)?;
        } else if line.starts_with('#') {
            return Err(format!("stray comment: {line}"));
        } else {
            let (name, metric) = current.as_mut().ok_or(format!("untyped: {line}"))?;
            let (sample, labels, value) = parse_sample(line)?;
            let suffixes: &[&str] = match metric.kind.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            if !suffixes.iter().any(|s| sample == format!("{name}{s}")) {
                return Err(format!("not of {name}: {line}"));
            }
            metric.samples.push((sample, labels, value));
        }
    }
    finish(current, &mut metrics)?;
    Ok(metrics)
}

fn finish(
    done: Option<(String, Metric)>,
    metrics: &mut BTreeMap<String, Metric>,
) -> Result<(), String> {
    let Some((name, metric)) = done else {
        return Ok(());
    };
    let mut seen = BTreeSet::new();
    for (sample, labels, value) in &metric.samples {
        if !seen.insert((sample.clone(), labels.clone())) {
            return Err(format!("twice: {sample} {labels:?}"));
        }
        if metric.kind != "gauge" && (!value.is_finite() || *value < 0.0) {
            return Err(format!("value: {sample} {labels:?} {value}"));
        }
    }
    if metric.samples.is_empty() {
        return Err(format!("no samples: {name}"));
    }
    if metric.kind == "histogram" {
        check_histogram(&name, &metric)?;
    }
    match metrics.insert(name.clone(), metric) {
        None => Ok(()),
        Some(_) => Err(format!("two groups: {name}")),
    }
}

fn check_histogram(name: &str, metric: &Metric) -> Result<(), String> {
    let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    let mut counts = BTreeMap::new();
    let mut sums = BTreeSet::new();
    for (sample, labels, value) in &metric.samples {
        let mut labels = labels.clone();
        if sample.ends_with("_bucket") {
            let at = labels.iter().position(|(k, _)| k == "le");
            let (_, le) = labels.remove(at.ok_or(format!("no le: {name}"))?);
            let le = if le == "+Inf" {
                f64::INFINITY
            } else {
                le.parse().map_err(|_| le)?
            };
            buckets.entry(labels).or_default().push((le, *value));
        } else if sample.ends_with("_count") {
            counts.insert(labels, *value);
        } else {
            sums.insert(labels);
        }
    }
    for (labels, count) in &counts {
        let buckets = buckets.get(labels).ok_or(format!("no buckets: {name}"))?;
        let rising = buckets
            .windows(2)
            .all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1);
        let last = buckets.last().ok_or(format!("no buckets: {name}"))?;
        if !rising || last.0 != f64::INFINITY || last.1 != *count || !sums.contains(labels) {
            return Err(format!("buckets: {name}"));
        }
    }
    if counts.len() == buckets.len() {
        Ok(())
    } else {
        Err(format!("counts: {name}"))
    }
}

fn parse_sample(line: &str) -> Result<(String, Labels, f64), String> {
    let bad = || format!("sample: {line}");
    let end = line.find(['{', ' ']).ok_or_else(bad)?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").ok_or_else(bad)?;
            if !legal_name(label) || label.contains(':') || label.starts_with("__") {
                return Err(bad());
            }
            let (value, after) = parse_quoted(after).ok_or_else(bad)?;
            labels.push((label.to_owned(), value));
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        rest = &rest[1..];
    }
    labels.sort();
    if labels.windows(2).any(|w| w[0].0 == w[1].0) || !legal_name(name) {
        return Err(bad());
    }
    let value = rest.strip_prefix(' ').ok_or_else(bad)?;
    Ok((name.to_owned(), labels, value.parse().map_err(|_| bad())?))
}

fn parse_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[i + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                c @ ('"' | '\\') => c,
                _ => return None,
            }),
            c => value.push(c),
        }
    }
    None
}

fn legal_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(legal)
}

/// A set in which everything has happened once.
fn used() -> Metrics {
    let metrics = Metrics::new();
    let listener = metrics.listener("odd \"name\"\\", "wss");
    listener.connections_open.increment(1.0);
    listener.connections.increment(1);
    let link = metrics.link("d0", true);
    link.up.set(1.0);
    link.disconnects[LinkDownReason::KeepAlive].increment(2);
    metrics.messages_dropped[DropReason::Budget].increment(7);
    metrics.tls_expiry("default", 1.8e9, Some(1.7e9));
    metrics.tls_reloads[ReloadResult::Success].increment(1);
    metrics.messages_received[QoS::AtLeastOnce].increment(1);
    metrics.sessions[SessionState::Detached].set(3.0);
    metrics.memory_budget_bytes[MemoryAccount::Queues].set(1e9);
    metrics.packet_rejected(0x95, "Packet too large");
    metrics.packet_rejected(0x95, "Packet too large");
    metrics.connect_seconds.record(0.003);
    metrics.connect_seconds.record(99.0);
    metrics.publish_ack_seconds.record(0.0);
    metrics.delivery_ack_seconds.record(0.2);
    metrics
}

fn value(metrics: &BTreeMap<String, Metric>, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: Labels = labels
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    let family = metrics
        .iter()
        .find(|(n, _)| name.starts_with(n.as_str()))
        .unwrap_or_else(|| panic!("no {name}"));
    let found = family
        .1
        .samples
        .iter()
        .find(|(n, l, _)| n == name && *l == wanted);
    found.unwrap_or_else(|| panic!("no {name} {labels:?}")).2
}

#[test]
fn the_exposition_is_strictly_legal_and_conventional() {
    let text = used().render();
    let metrics = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    for (name, metric) in &metrics {
        let ours = name.starts_with("tidegate_") || name.starts_with("process_");
        assert!(ours, "{name}");
        assert_eq!(metric.kind == "counter", name.ends_with("_total"), "{name}");
        if metric.kind == "histogram" {
            assert!(name.ends_with("_seconds"), "{name}");
        }
        for (_, labels, _) in &metric.samples {
            for (label, _) in labels {
                let bounded = [
                    "listener",
                    "transport",
                    "link",
                    "reason",
                    "qos",
                    "action",
                    "task",
                    "state",
                    "account",
                    "result",
                    "tls",
                    "code",
                    "version",
                    "le",
                ];
                assert!(bounded.contains(&label.as_str()), "{name} {label}");
            }
        }
    }
}

#[test]
fn values_arrive() {
    let text = used().render();
    let metrics = parse(&text).expect("legal");
    let listener = [("listener", "odd \"name\"\\"), ("transport", "wss")];
    assert_eq!(value(&metrics, "tidegate_connections_open", &listener), 1.0);
    assert_eq!(
        value(&metrics, "tidegate_upstream_link_up", &[("link", "d0")]),
        1.0
    );
    let down = [("link", "d0"), ("reason", "keep_alive")];
    assert_eq!(
        value(&metrics, "tidegate_upstream_disconnects_total", &down),
        2.0
    );
    let budget = [("reason", "budget")];
    assert_eq!(
        value(&metrics, "tidegate_messages_dropped_total", &budget),
        7.0
    );
    let qos = [("qos", "1")];
    assert_eq!(
        value(&metrics, "tidegate_messages_received_total", &qos),
        1.0
    );
    let rejected = [("code", "0x95"), ("reason", "Packet too large")];
    assert_eq!(
        value(&metrics, "tidegate_packets_rejected_total", &rejected),
        2.0
    );
    assert_eq!(value(&metrics, "tidegate_connect_seconds_count", &[]), 2.0);
    assert_eq!(
        value(
            &metrics,
            "tidegate_connect_seconds_bucket",
            &[("le", "0.005")]
        ),
        1.0
    );
    for (name, least) in [
        ("process_cpu_seconds_total", 0.0),
        ("process_open_fds", 3.0),
        ("process_max_fds", 0.0),
        ("process_start_time_seconds", 1.6e9),
        ("process_resident_memory_bytes", 1e6),
        ("process_virtual_memory_bytes", 1e6),
    ] {
        assert!(value(&metrics, name, &[]) >= least, "{name}");
    }
    assert_eq!(value(&metrics, "tidegate_flaps_absorbed_total", &[]), 0.0);
}

#[test]
fn the_same_labels_give_the_same_series() {
    let metrics = Metrics::new();
    metrics.listener("a", "tcp").connections.increment(1);
    metrics.listener("a", "tcp").connections.increment(1);
    let text = metrics.render();
    let line = "tidegate_connections_total{listener=\"a\",transport=\"tcp\"} 2\n";
    assert!(text.contains(line), "{text}");
}

/// Each value has a name of its own, at the place that it says.
#[test]
fn label_values_are_distinct() {
    fn distinct<L: Label>() {
        let names: BTreeSet<_> = L::ALL.iter().map(|v| v.name()).collect();
        assert_eq!(names.len(), L::ALL.len());
        assert!(L::ALL.iter().enumerate().all(|(i, v)| v.index() == i));
    }
    distinct::<RefusedReason>();
    distinct::<DisconnectReason>();
    distinct::<SessionEndReason>();
    distinct::<DropReason>();
    distinct::<DeferReason>();
    distinct::<HandshakeReason>();
    distinct::<LinkDownReason>();
    distinct::<StreamReason>();
    distinct::<UpstreamTlsReason>();
    distinct::<MemoryAccount>();
    distinct::<AcceptErrorReason>();
    distinct::<ReloadResult>();
    distinct::<SubscribeRefusedReason>();
}

/// The judge of Prometheus itself, where it is installed.
#[test]
fn promtool_agrees() {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped());
    let Ok(mut child) = promtool
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    else {
        eprintln!("promtool is not installed; only our own parser has judged");
        return;
    };
    let mut stdin = child.stdin.take().expect("piped");
    stdin
        .write_all(used().render().as_bytes())
        .expect("written");
    drop(stdin);
    let output = child.wait_with_output().expect("ended");
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}

#[test]
fn the_parser_forgives_nothing() {
    let good = "# HELP a_total x\n# TYPE a_total counter\na_total 1\n";
    assert!(parse(good).is_ok());
    for bad in [
        "# HELP a_total x\n# TYPE a_total counter\na_total 1",
        "# TYPE a_total counter\na_total 1\n",
        "a_total 1\n",
        "# HELP a_total x\n# TYPE a_total counter\na_total 1\na_total 2\n",
        "# HELP a_total x\n# TYPE a_total counter\na_total{b=\"\\x\"} 1\n",
        "# HELP a_total x\n# TYPE a_total counter\na_total{b=\"c\"} one\n",
        "# HELP a_total x\n# TYPE a_total counter\na_total -1\n",
        "# HELP a x\n# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 1\n",
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}
