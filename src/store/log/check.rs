//! Looks through the log of a directory that no process uses, and changes nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use super::disk::{DirectoryError, Disk, RealDisk};
use super::format::VERSION;
use super::open::{OpenError, Recovery};
use super::report::{DamageKind, Report};
use super::{Options, Record};

/// Why a log is not in order.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A process uses the log.
    #[error(transparent)]
    InUse(DirectoryError),
    /// Another directory, user or program is needed.
    #[error("{}: {reason}", directory.display())]
    NoLog {
        /// The log's directory.
        directory: PathBuf,
        /// Why this one does not do.
        reason: String,
    },
    /// The disk fails.
    #[error("{}: {reason}", directory.display())]
    Disk {
        /// The log's directory.
        directory: PathBuf,
        /// The operation and the system's error.
        reason: String,
    },
    /// Records are lost.
    #[error("{summary}")]
    Damaged {
        /// The whole report, a line for each damaged place.
        report: String,
        /// The number of damaged places.
        summary: String,
    },
}

impl CheckError {
    /// An error of the system, which `reason` contains.
    fn of(directory: &Path, kind: io::ErrorKind, reason: String) -> Self {
        let directory = directory.to_owned();
        match kind {
            io::ErrorKind::NotFound => {
                let reason = "there is no such directory, so no node has stored anything here";
                Self::NoLog {
                    directory,
                    reason: reason.to_owned(),
                }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory => {
                Self::NoLog { directory, reason }
            }
            _ => Self::Disk { directory, reason },
        }
    }

    fn of_open(directory: &Path, error: &OpenError) -> Self {
        let reason = error.to_string();
        match error {
            OpenError::Disk(failure) => Self::of(directory, failure.error.kind(), reason),
            OpenError::Version { .. } => Self::NoLog {
                directory: directory.to_owned(),
                reason,
            },
        }
    }
}

/// Reads the log in `directory` and reports its segments, its records of each kind, and every place that
/// cannot be read.
///
/// # Errors
/// [`CheckError`] if the log cannot be read or is damaged.
pub fn check(directory: &Path) -> Result<String, CheckError> {
    let disk = RealDisk::open_to_read(directory).map_err(|error| match &error {
        DirectoryError::InUse(_) => CheckError::InUse(error),
        DirectoryError::Io { path, error } => {
            CheckError::of(path, error.kind(), format!("cannot open: {error}"))
        }
    })?;
    check_log(disk, directory)
}

fn check_log<D: Disk>(disk: D, directory: &Path) -> Result<String, CheckError> {
    let failed = |error| CheckError::of_open(directory, &error);
    let mut kinds = Kinds::default();
    let recovery = Recovery::open(disk, Options::new(0)).map_err(failed)?;
    if !recovery.has_log() {
        return Err(CheckError::NoLog {
            directory: directory.to_owned(),
            reason: "there is no file of a log".to_owned(),
        });
    }
    let replayed = recovery.replay(|record| kinds.count(&record));
    let report = replayed.map_err(failed)?.report;
    let text = describe(&report, &kinds);
    let places = match report.damaged {
        0 => return Ok(text),
        1 => "1 place is damaged".to_owned(),
        damaged => format!("{damaged} places are damaged"),
    };
    Err(CheckError::Damaged {
        report: text,
        summary: format!("{}: {places}", directory.display()),
    })
}

/// The number of records of each kind, and their bytes.
#[derive(Default)]
struct Kinds(BTreeMap<u8, (u64, u64)>);

impl Kinds {
    fn count(&mut self, record: &Record<'_>) {
        let (records, bytes) = self.0.entry(record.kind).or_default();
        *records += 1;
        *bytes += u64::from(record.bytes());
    }
}

fn describe(report: &Report, kinds: &Kinds) -> String {
    let mut text = String::new();
    let mut line = |line: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{line}");
    };
    for damage in &report.damages {
        line(format_args!("{damage}"));
    }
    let counted = |kind| kind != DamageKind::Unfinished;
    let named = report.damages.iter().filter(|d| counted(d.kind)).count() as u64;
    if report.damaged > named {
        line(format_args!(
            "further damaged places: {}",
            report.damaged - named
        ));
    }
    for name in &report.foreign {
        line(format_args!(
            "{name} was not read: no log gives this number"
        ));
    }
    if report.stale {
        line(format_args!(
            "stale: the disk was full or failed when the process ended, and later records are missing"
        ));
    }
    line(format_args!("format version: {VERSION}"));
    line(format_args!(
        "segments: {} ({} bytes)",
        report.segments, report.bytes
    ));
    line(format_args!("records: {}", report.records));
    for (kind, (records, bytes)) in &kinds.0 {
        line(format_args!("  kind {kind}: {records} ({bytes} bytes)"));
    }
    line(format_args!("damaged places: {}", report.damaged));
    text
}

#[cfg(test)]
mod tests {
    use super::super::disk::sim::SimDisk;
    use super::*;

    #[test]
    fn a_failing_disk_is_told_from_a_directory_without_a_log() {
        let of = |kind| CheckError::of(Path::new("data/log"), kind, "cannot list".to_owned());
        for kind in [
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::NotFound,
            io::ErrorKind::NotADirectory,
        ] {
            assert!(matches!(of(kind), CheckError::NoLog { .. }), "{kind}");
        }
        let error = of(io::ErrorKind::Other);
        assert!(matches!(error, CheckError::Disk { .. }));
        assert_eq!(error.to_string(), "data/log: cannot list");
    }

    #[test]
    fn a_single_damaged_place_is_counted_as_one() {
        let disk = SimDisk::default();
        for name in ["00000002.live", "00000001.damaged"] {
            disk.create(name).expect("it works");
        }
        let error = check_log(disk, Path::new("log")).expect_err("it is damaged");
        assert_eq!(error.to_string(), "log: 1 place is damaged");
    }
}
