//! The servers under test, and the running of the load tool against them.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::Args;
use crate::process::{Mosquitto, MosquittoConfig, TempDir, Tidegate, TidegateConfig};

/// The settings and figures that all comparisons share.
#[derive(Debug)]
pub(super) struct Lab {
    tidegate: PathBuf,
    load: PathBuf,
    pub(super) args: Args,
    text: String,
    runs: u32,
}

/// Tidegate before a broker of its own.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) broker: Mosquitto,
    pub(super) edge: Tidegate,
}

impl Pair {
    /// The load tool's options for watching both processes.
    pub(super) fn watch(&self) -> Vec<String> {
        let (edge, broker) = (self.edge.pid(), self.broker.pid());
        [
            "--pid".into(),
            format!("tidegate={edge}"),
            "--pid".into(),
            format!("broker={broker}"),
        ]
        .into()
    }
}

impl Lab {
    pub(super) fn new(args: &Args) -> io::Result<Self> {
        let here = std::env::current_exe()?;
        let beside = here.parent().unwrap_or(Path::new("."));
        let given = |path: &Option<PathBuf>, default: PathBuf| match path {
            Some(path) => path.clone(),
            None => default,
        };
        let load = given(&args.load, beside.join("load"));
        let tidegate = given(&args.tidegate, beside.join("../tidegate"));
        for path in [&load, &tidegate] {
            if !path.is_file() {
                let path = path.display();
                return Err(io::Error::other(format!(
                    "{path} is not built (cargo build --release)"
                )));
            }
        }
        Ok(Self {
            tidegate,
            load,
            args: args.clone(),
            text: String::new(),
            runs: 0,
        })
    }

    /// A broker as all comparisons use it: no queue limit, a window that does not matter.
    pub(super) fn broker(&self) -> io::Result<Mosquitto> {
        let max_inflight_messages = Some(2000);
        MosquittoConfig {
            max_inflight_messages,
            ..MosquittoConfig::default()
        }
        .start()
    }

    /// Tidegate with these listeners before a fresh broker.
    pub(super) fn pair(&self, listeners: &[&str]) -> io::Result<Pair> {
        let broker = self.broker()?;
        let edge = self.edge(listeners, &broker.url())?;
        Ok(Pair { broker, edge })
    }

    /// Tidegate with these listeners before a broker's URL.
    pub(super) fn edge(&self, listeners: &[&str], broker: &str) -> io::Result<Tidegate> {
        self.config(listeners, broker).start()
    }

    /// The configuration of a Tidegate with these listeners before a broker's URL, not started yet.
    pub(super) fn config(&self, listeners: &[&str], broker: &str) -> TidegateConfig {
        let level = "\"warn\"";
        TidegateConfig::new(&self.tidegate, broker)
            .listen(listeners)
            .set("log", "level", level)
            .set("limits", "connect_rate_max", "50000")
    }

    /// A prefix for topics and client identifiers that no other run has, always of one length.
    pub(super) fn prefix(&mut self) -> Vec<String> {
        self.runs += 1;
        vec!["--prefix".to_owned(), format!("b{:04}", self.runs)]
    }

    /// Runs the load tool and returns its report.
    pub(super) fn run(&self, parts: &[&[String]]) -> io::Result<Value> {
        let args: Vec<_> = parts.concat();
        let output = Command::new(&self.load)
            .args(&args)
            .stderr(Stdio::piped())
            .output()?;
        let line = String::from_utf8_lossy(&output.stdout);
        let report: Option<Value> = serde_json::from_str(line.trim()).ok();
        let complaint = String::from_utf8_lossy(&output.stderr);
        let Some(report) = report else {
            return Err(io::Error::other(format!(
                "load {}: {complaint}",
                args.join(" ")
            )));
        };
        if !output.status.success() {
            // A run that lost messages gives no valid figure.
            return Err(io::Error::other(format!(
                "load {}: {report}",
                args.join(" ")
            )));
        }
        Ok(report)
    }

    /// Profiles a process and counts its system calls, each while the load tool runs once more.
    /// Returns an empty text unless the caller asked for it.
    pub(super) fn profile(&mut self, pid: u32, load: &[String], to: &str) -> io::Result<String> {
        if !self.args.profile {
            return Ok(String::new());
        }
        let to = words(&format!("--url {to} --seconds 4"));
        let prefix = self.prefix();
        let mut perf = Observer::perf(pid)?;
        self.run(&[load, &to, &prefix])?;
        let profile = perf.finish()?;
        let prefix = self.prefix();
        let mut strace = Observer::strace(pid)?;
        let report = self.run(&[load, &to, &prefix])?;
        let calls = strace.finish()?;
        let deliveries = &report["deliveries"];
        Ok(format!(
            "Tidegate's profile:\n\n```\n{profile}```\n\nIts system calls, connects included, with \
             {deliveries} deliveries in 4 of the 6 seconds (strace slows it down):\n\n```\n{calls}```\n"
        ))
    }

    /// Adds a line or more to the report.
    pub(super) fn say(&mut self, text: &str) {
        eprintln!("{text}");
        self.text.push_str(text);
        self.text.push('\n');
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The command and the machine, for the head of the report.
    pub(super) fn heading(&self) -> String {
        let output = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output();
            let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
            text.unwrap_or_default()
                .lines()
                .next()
                .unwrap_or("?")
                .trim()
                .to_owned()
        };
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu
            .lines()
            .find_map(|l| l.strip_prefix("model name"))
            .unwrap_or("?");
        let brokers = std::thread::available_parallelism().map_or(0, usize::from);
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let args: Vec<_> = std::env::args().skip(1).collect();
        format!(
            "\n## Tidegate before mosquitto, against mosquitto alone\n\n\
             {} · commit {} · `scripts/bench.sh {}`\n\n\
             {brokers} × {} · Linux {} · {} · {} · load average at the start {}\n",
            output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            output("git", &["describe", "--always", "--dirty"]),
            args.join(" "),
            model.trim_start_matches(['\t', ' ', ':']),
            output("uname", &["-r"]),
            output("rustc", &["--version"]),
            output("mosquitto", &["-h"]),
            load.split(' ').next().unwrap_or("?"),
        )
    }
}

/// perf or strace watching a running process.
struct Observer {
    child: Child,
    /// The file that perf writes; strace writes none.
    data: Option<TempDir>,
}

impl Observer {
    fn perf(pid: u32) -> io::Result<Self> {
        let data = TempDir::new("perf")?;
        let file = data.path().join("data");
        let mut command = Command::new("perf");
        command
            .args(["record", "-q", "-F", "997", "-p", &pid.to_string(), "-o"])
            .arg(file);
        Self::start(command, Some(data))
    }

    fn strace(pid: u32) -> io::Result<Self> {
        let mut command = Command::new("strace");
        command.args(["-c", "-f", "-S", "calls", "-p", &pid.to_string()]);
        Self::start(command, None)
    }

    fn start(mut command: Command, data: Option<TempDir>) -> io::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let piped = command.stdout(Stdio::null()).stderr(Stdio::piped());
        let child = piped
            .spawn()
            .map_err(|e| io::Error::other(format!("{name}: {e}")))?;
        std::thread::sleep(std::time::Duration::from_millis(300));
        Ok(Self { child, data })
    }

    /// Stops watching; returns the head of the output.
    fn finish(&mut self) -> io::Result<String> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or(io::ErrorKind::InvalidInput)?, Signal::INT)?;
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            io::Read::read_to_string(&mut stderr, &mut text)?;
        }
        self.child.wait()?;
        let lines: Vec<_> = match &self.data {
            None => {
                let table = text.find("% time").map_or("", |at| &text[at..]);
                table.lines().take(12).map(str::to_owned).collect()
            }
            Some(data) => {
                let mut report = Command::new("perf");
                report.args(["report", "--stdio", "--no-children", "-i"]);
                let output = report
                    .arg(data.path().join("data"))
                    .stderr(Stdio::null())
                    .output()?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let rows = text
                    .lines()
                    .filter(|l| !l.starts_with('#') && !l.trim().is_empty());
                rows.take(25)
                    .map(|l| l.trim_end().chars().take(120).collect())
                    .collect()
            }
        };
        Ok(lines.iter().map(|line| format!("{line}\n")).collect())
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Command line words.
pub(super) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// The median: the mean of the middle two for an even number, NaN for an empty list.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// A figure of the process with this name in a report.
pub(super) fn of(report: &Value, process: &str, figure: &str) -> f64 {
    let servers = report["servers"].as_array();
    let row = servers.and_then(|rows| rows.iter().find(|row| row["name"] == process));
    row.and_then(|row| row[figure].as_f64()).unwrap_or(f64::NAN)
}

/// A verdict on a figure that must not be above its bound.
pub(super) fn reached(value: f64, bound: f64) -> &'static str {
    if value <= bound {
        "reached"
    } else {
        "**missed**"
    }
}
