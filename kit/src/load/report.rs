//! The report at the end of a load: one line of JSON and a table for people.

use std::io;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::histogram::Histogram;
use crate::usage::Usage;

/// A server process to watch.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Its name in the report.
    pub name: String,
    /// Its process id.
    pub pid: u32,
}

impl std::str::FromStr for Watched {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, pid) = text.split_once('=').ok_or("NAME=PID is wanted")?;
        let pid = pid.parse().map_err(|_| format!("{pid} is no process id"))?;
        Ok(Self {
            name: name.to_owned(),
            pid,
        })
    }
}

/// The usage of all watched processes, and of this one, at one moment.
#[derive(Debug, Clone)]
pub struct Moment {
    servers: Vec<Usage>,
    own: Usage,
    at: std::time::Instant,
}

impl Moment {
    /// Reads them.
    ///
    /// # Errors
    /// A process is gone.
    pub fn now(watched: &[Watched]) -> io::Result<Self> {
        let gone = |w: &Watched, e: io::Error| io::Error::other(format!("{}: {e}", w.name));
        let usage = |w: &Watched| Usage::of(w.pid).map_err(|e| gone(w, e));
        Ok(Self {
            servers: watched.iter().map(usage).collect::<io::Result<_>>()?,
            own: Usage::of(std::process::id())?,
            at: std::time::Instant::now(),
        })
    }

    /// Time from an earlier moment to this one.
    pub fn since(&self, earlier: &Self) -> Duration {
        self.at - earlier.at
    }

    /// Private memory of the watched processes, in their order.
    pub fn private(&self) -> impl Iterator<Item = u64> {
        self.servers.iter().map(|usage| usage.private)
    }
}

/// A report being put together.
#[derive(Debug)]
pub struct Report(Vec<(String, Value)>);

impl Report {
    /// A report of the load with this name.
    pub fn new(load: &str) -> Self {
        Self(vec![("load".to_owned(), json!(load))])
    }

    /// Adds a figure.
    pub fn put(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        self.0.push((name.to_owned(), value.into()));
        self
    }

    /// Adds p50, p99, p99.9 and the maximum in microseconds.
    pub fn latency(&mut self, name: &str, histogram: &Histogram) -> &mut Self {
        let us = |ns: u64| (ns as f64 / 100.0).round() / 10.0;
        self.put(
            name,
            json!({
                "count": histogram.count(),
                "p50_us": us(histogram.quantile(0.5)),
                "p99_us": us(histogram.quantile(0.99)),
                "p99_9_us": us(histogram.quantile(0.999)),
                "max_us": us(histogram.max()),
            }),
        )
    }

    /// Adds the processor time and context switches of each process between two moments, `per` unit
    /// of work done in between.
    pub fn processes(
        &mut self,
        watched: &[Watched],
        (from, to): (&Moment, &Moment),
        (unit, per): (&str, u64),
    ) -> &mut Self {
        let seconds = to.since(from).as_secs_f64();
        let row = |name: &str, a: &Usage, b: &Usage| {
            let cpu = b.cpu().saturating_sub(a.cpu()).as_secs_f64();
            let user = b.user.saturating_sub(a.user).as_secs_f64();
            let each = if per == 0 {
                0.0
            } else {
                cpu * 1e9 / per as f64
            };
            json!({
                "name": name,
                "cpu_s": round(cpu, 2),
                "cpu_user_s": round(user, 2),
                "cpu_percent": round(cpu / seconds * 100.0, 1),
                format!("cpu_ns_per_{unit}"): round(each, 1),
                "wakes": b.wakes.saturating_sub(a.wakes),
                "private_bytes_before": a.private,
                "private_bytes_after": b.private,
                "open_files": b.open_files,
                "threads": b.threads,
            })
        };
        let rows = watched.iter().zip(from.servers.iter().zip(&to.servers));
        let rows: Vec<_> = rows.map(|(w, (a, b))| row(&w.name, a, b)).collect();
        self.put("servers", rows);
        self.put("load_tool", row("load tool", &from.own, &to.own))
    }

    /// Adds the growth of each process's private memory from one moment to another, per unit.
    pub fn growth(
        &mut self,
        name: &str,
        watched: &[Watched],
        (from, to): (&Moment, &Moment),
        units: u64,
    ) -> &mut Self {
        let each = |(w, (a, b)): (&Watched, (u64, u64))| {
            let grown = b as f64 - a as f64;
            (w.name.clone(), json!(round(grown / units.max(1) as f64, 1)))
        };
        let pairs = watched.iter().zip(from.private().zip(to.private()));
        self.put(name, pairs.map(each).collect::<Map<_, _>>())
    }

    /// The report as one JSON value.
    pub fn json(&self) -> Value {
        Value::Object(self.0.iter().cloned().collect())
    }

    /// Prints the table to standard error and the JSON line to standard output.
    pub fn print(&self) {
        eprint!("{}", self.table());
        println!("{}", self.json());
    }

    fn table(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.0 {
            match value {
                Value::Array(rows) => {
                    for row in rows {
                        text += &format!("{name:>24}  {}\n", inline(row));
                    }
                }
                Value::Object(_) => text += &format!("{name:>24}  {}\n", inline(value)),
                value => text += &format!("{name:>24}  {}\n", plain(value)),
            }
        }
        text
    }
}

/// A number with few digits after the point.
pub fn round(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

fn inline(value: &Value) -> String {
    let Value::Object(map) = value else {
        return plain(value);
    };
    let parts: Vec<_> = map
        .iter()
        .map(|(k, v)| format!("{k} {}", plain(v)))
        .collect();
    parts.join(", ")
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) if n.is_u64() && n.as_u64() > Some(9_999) => {
            let digits = n.to_string();
            let groups: Vec<_> = digits
                .as_bytes()
                .rchunks(3)
                .rev()
                .map(String::from_utf8_lossy)
                .collect();
            groups.join(" ")
        }
        other => other.to_string(),
    }
}
