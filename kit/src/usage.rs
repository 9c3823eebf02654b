//! The resource usage of a process, read from `/proc`.

use std::io;
use std::time::Duration;

/// Processor time, memory and open files of a process at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time in user mode.
    pub user: Duration,
    /// Processor time in the kernel on its behalf.
    pub system: Duration,
    /// Private resident memory in bytes (`Private_Clean` and `Private_Dirty`, huge pages among them).
    pub private: u64,
    /// Resident memory in bytes.
    pub resident: u64,
    /// Open file descriptors.
    pub open_files: u64,
    /// Threads.
    pub threads: u64,
    /// Voluntary context switches of all threads: the number of times that a thread went to sleep.
    pub wakes: u64,
}

impl Usage {
    /// Reads the usage of a process.
    ///
    /// # Errors
    /// The process is gone or belongs to someone else.
    pub fn of(pid: u32) -> io::Result<Self> {
        let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let sum = |name: &str| -> u64 {
            let lines = rollup.lines().filter(|line| line.starts_with(name));
            lines
                .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
                .sum::<u64>()
                * 1024
        };
        let (user, system, threads) = stat(pid)?;
        let open_files = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        let (private, resident) = (sum("Private_"), sum("Rss:"));
        Ok(Self {
            wakes: wakes(pid)?,
            user,
            system,
            private,
            resident,
            open_files,
            threads,
        })
    }

    /// Processor time in user mode and in the kernel together.
    pub fn cpu(&self) -> Duration {
        self.user + self.system
    }
}

/// Processor time alone, cheaper to read than [`Usage::of`].
///
/// # Errors
/// As [`Usage::of`].
pub fn cpu(pid: u32) -> io::Result<Duration> {
    stat(pid).map(|(user, system, _)| user + system)
}

fn wakes(pid: u32) -> io::Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the reading.
        let status = std::fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        sum += line.and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

/// Fields 14, 15 and 20 of `/proc/<pid>/stat` (proc(5)), counted after the name in parentheses.
fn stat(pid: u32) -> io::Result<(Duration, Duration, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    let field = |n: usize| -> u64 {
        after_name
            .split_whitespace()
            .nth(n - 3)
            .and_then(|f| f.parse().ok())
            .unwrap_or(0)
    };
    let tick = 1.0 / rustix::param::clock_ticks_per_second() as f64;
    let time = |ticks: u64| Duration::from_secs_f64(ticks as f64 * tick);
    Ok((time(field(14)), time(field(15)), field(20)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_this_process() {
        let usage = Usage::of(std::process::id()).unwrap();
        assert!(
            usage.private > 100_000 && usage.resident >= usage.private,
            "{usage:?}"
        );
        assert!(usage.open_files >= 3 && usage.threads >= 1, "{usage:?}");
    }
}
