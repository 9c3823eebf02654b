//! Records a second of the log, beside a bare loop of append and fdatasync, and the bytes written for
//! each byte of a record, at batches of 1, 16 and 256 records. The two take turns, since the speed of a disk
//! changes from second to second.
//!
//! `cargo bench --bench log -- [DIRECTORY]`; the directory says which disk, and is the system's for temporary
//! files otherwise.

#![allow(clippy::print_stdout, reason = "it prints figures")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tidegate::store::log::disk::RealDisk;
use tidegate::store::log::{
    Life, Log, Options, Owner, Pass, Piece, Progress, Recovery, WriterThread,
};

/// The body of a record: a message of 200 bytes with its sequence number.
const BODY_BYTES: usize = 208;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(1);

struct Nobody;

impl Owner for Nobody {
    fn begin(&mut self, _pass: Pass) {}

    fn write(&mut self, _piece: &mut Piece<'_>) -> Progress {
        Progress::Done
    }
}

/// What a round has done.
#[derive(Clone, Copy)]
struct Round {
    records_per_second: f64,
    written_per_byte: f64,
}

fn main() {
    let base = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let base = base.map_or_else(std::env::temp_dir, PathBuf::from);
    let directory = base.join(format!("tidegate-bench-log-{}", std::process::id()));
    fs::create_dir_all(&directory).expect("the directory can be made");
    println!("records of {BODY_BYTES} bytes in {}", directory.display());
    println!("batch  bare records/s  log records/s  log / bare  bytes written per byte: bare  log");
    for batch in [1, 16, 256] {
        let mut bare = Vec::new();
        let mut log = Vec::new();
        for round in 0..ROUNDS {
            let path = directory.join(format!("{batch}-{round}"));
            bare.push(bare_round(&path.with_extension("bare"), batch));
            log.push(log_round(&path.with_extension("log"), batch));
        }
        let (bare, log) = (median(bare), median(log));
        println!(
            "{batch:5}  {:14.0}  {:13.0}  {:10.2}  {:28.2}  {:3.2}",
            bare.records_per_second,
            log.records_per_second,
            log.records_per_second / bare.records_per_second,
            bare.written_per_byte,
            log.written_per_byte,
        );
    }
    reopen(&directory.join("reopened"));
    fs::remove_dir_all(&directory).expect("the directory can be removed");
}

/// Prints how long it takes to open a log of 100,000 records and read them all.
fn reopen(path: &Path) {
    let open = || {
        let disk = RealDisk::open(path).expect("the directory can be made");
        Recovery::open(disk, Options::new(7)).expect("it opens")
    };
    let replayed = open().replay(|_| {}).expect("it is empty");
    let (log, writer) = replayed.start().expect("it starts");
    let thread = WriterThread::spawn(writer, Nobody, |_, _, _| {});
    let thread = thread.expect("a thread");
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime");
    for _ in 0..100_000 {
        let mut room = runtime.block_on(log.reserve(Log::record_bytes(BODY_BYTES)));
        let body = [0x55; BODY_BYTES];
        let position = log.append(&mut room, 1, &[&body], Life::Living);
        position.expect("it fits").expect("the disk works");
    }
    thread.stop();
    let began = Instant::now();
    let replayed = open().replay(|_| {}).expect("it is read");
    let records = replayed.report.records;
    let _started = replayed.start().expect("it starts");
    println!(
        "opening a log of {records} records: {:.0?}",
        began.elapsed()
    );
}

fn median(mut rounds: Vec<Round>) -> Round {
    rounds.sort_by(|a, b| a.records_per_second.total_cmp(&b.records_per_second));
    rounds[rounds.len() / 2]
}

/// The bytes that this process has caused to be written, in whole pages.
fn written() -> u64 {
    let io = fs::read_to_string("/proc/self/io").expect("Linux counts bytes");
    let line = io
        .lines()
        .find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|n| n.parse().ok()).expect("a number")
}

fn measure(mut batch: impl FnMut() -> u64) -> Round {
    let (began, before) = (Instant::now(), written());
    let mut records = 0;
    while began.elapsed() < ROUND {
        records += batch();
    }
    let logical = records * Log::record_bytes(BODY_BYTES) as u64;
    Round {
        records_per_second: records as f64 / began.elapsed().as_secs_f64(),
        written_per_byte: (written() - before) as f64 / logical as f64,
    }
}

fn bare_round(path: &Path, batch: u64) -> Round {
    let file = File::create(path).expect("the file can be made");
    let bytes = vec![0x55; batch as usize * Log::record_bytes(BODY_BYTES)];
    let mut end = 0;
    let round = measure(|| {
        file.write_all_at(&bytes, end).expect("it is written");
        file.sync_data().expect("it is synced");
        end += bytes.len() as u64;
        batch
    });
    fs::remove_file(path).expect("the file can be removed");
    round
}

fn log_round(path: &Path, batch: u64) -> Round {
    let disk = RealDisk::open(path).expect("the directory can be made");
    let recovery = Recovery::open(disk, Options::new(7)).expect("it is empty");
    let replayed = recovery.replay(|_| {}).expect("it is empty");
    let (log, writer) = replayed.start().expect("it starts");
    let thread = WriterThread::spawn(writer, Nobody, |_, _, _| {});
    let thread = thread.expect("a thread");
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.expect("a runtime");
    let body = [0x55; BODY_BYTES];
    let round = measure(|| {
        let mut last = None;
        for _ in 0..batch {
            let mut room = log
                .try_reserve(Log::record_bytes(BODY_BYTES))
                .expect("few records wait");
            let position = log.append(&mut room, 1, &[&body], Life::Living);
            last = position.expect("it fits");
        }
        let last = last.expect("the disk works");
        runtime.block_on(log.wait(last));
        batch
    });
    thread.stop();
    fs::remove_dir_all(path).expect("the directory can be removed");
    round
}
