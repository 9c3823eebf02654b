//! Looks through the log of a directory that no process uses, and changes nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::disk::{DirectoryError, RealDisk};
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
    /// The directory cannot be read.
    #[error(transparent)]
    Directory(DirectoryError),
    /// The log cannot be read.
    #[error("{}: {error}", directory.display())]
    Open {
        /// The log's directory.
        directory: PathBuf,
        /// Why.
        error: OpenError,
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

/// Reads the log in `directory` and reports its segments, its records of each kind, and every place that
/// cannot be read.
///
/// # Errors
/// [`CheckError`] if the log cannot be read or is damaged.
pub fn check(directory: &Path) -> Result<String, CheckError> {
    let disk = RealDisk::open_to_read(directory).map_err(|error| match error {
        DirectoryError::InUse(_) => CheckError::InUse(error),
        DirectoryError::Io { .. } => CheckError::Directory(error),
    })?;
    let failed = |error| CheckError::Open {
        directory: directory.to_owned(),
        error,
    };
    let mut kinds = Kinds::default();
    let recovery = Recovery::open(disk, Options::new(0)).map_err(failed)?;
    let replayed = recovery.replay(|record| kinds.count(&record));
    let report = replayed.map_err(failed)?.report;
    let text = describe(&report, &kinds);
    match report.damaged {
        0 => Ok(text),
        damaged => Err(CheckError::Damaged {
            report: text,
            summary: format!("{}: {damaged} places are damaged", directory.display()),
        }),
    }
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
            "{} more damaged places",
            report.damaged - named
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
