//! The log on a real disk: its process is killed again and again, and `tidegate store check` judges what
//! it left.
//!
//! `TIDEGATE_FULL=1` kills ten times as often; `STORE_SEED` repeats the choices of another run.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use tidegate::store::log::disk::RealDisk;
use tidegate::store::log::{
    self, Claim, Claims, Durability, Life, Log, Options, Owner, Pass, Piece, Position, Progress,
    Recovery, WriterThread,
};
use tidegate_kit::process::TempDir;
use tidegate_kit::rng::Rng;

/// The keys of the model; record n sets key n modulo this number.
const KEYS: u64 = 64;
/// The test of the process that is killed.
const KILLED: &str = "store::a_killed_process_leaves_every_record_that_it_called_safe";
/// Names the directory of the process that is killed.
const DIRECTORY: &str = "TIDEGATE_TEST_STORE";
/// The longest time without a line of the process that is killed.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Records that one acknowledgement covers.
const BATCH: u64 = 16;

fn options() -> Options {
    Options {
        segment_bytes: 64 << 10,
        ..Options::new(0x7E57)
    }
}

fn body(n: u64) -> Vec<u8> {
    let mut body = n.to_le_bytes().to_vec();
    body.resize(8 + n as usize * 31 % 400, n as u8);
    body
}

fn number(body: &[u8]) -> u64 {
    let n = u64::from_le_bytes(body[..8].try_into().expect("eight bytes"));
    assert_eq!(body, self::body(n), "a record was changed");
    n
}

/// The last record of each key, with its claim.
#[derive(Default)]
struct Memory {
    last: BTreeMap<u64, (u64, Option<Claim>)>,
    pass: Option<Pass>,
    written: Option<u64>,
}

impl Memory {
    fn set(&mut self, n: u64, position: Option<Position>, claims: &Claims) {
        let claim = position.map(|at| Claim::new(at, body(n).len()));
        let old = self.last.insert(n % KEYS, (n, claim));
        if let Some((_, Some(claim))) = old {
            claims.release(claim);
        }
    }
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Memory>>, Arc<Claims>);

impl Owner for Shared {
    fn begin(&mut self, pass: Pass) {
        let mut memory = self.0.lock().expect("no panic");
        memory.pass = Some(pass);
        memory.written = None;
    }

    fn write(&mut self, piece: &mut Piece<'_>) -> Progress {
        let mut memory = self.0.lock().expect("no panic");
        loop {
            let from = memory.written.map_or(0, |key| key + 1);
            let next = memory.last.range(from..).next();
            let Some((key, (n, claim))) = next.map(|(key, last)| (*key, *last)) else {
                return Progress::Done;
            };
            if piece.is_full() {
                return Progress::More;
            }
            memory.written = Some(key);
            let belongs = match memory.pass {
                Some(Pass::Until(last)) => claim.is_some_and(|claim| claim.segment <= last),
                _ => true,
            };
            if belongs {
                let position = piece.append(1, &[&body(n)]).expect("it is small");
                memory.set(n, position, &self.1);
            }
        }
    }
}

/// Appends records until its process is killed, and prints the number of each last one of a batch that is
/// safe.
fn append(directory: &Path) {
    let disk = RealDisk::open(directory).expect("the directory is free");
    let recovery = Recovery::open(disk, options()).expect("the log opens");
    let claims = recovery.claims().clone();
    let mut memory = Memory::default();
    let replayed = recovery.replay(|record| {
        let n = number(record.body);
        claims.claim(Claim::new(record.position, record.body.len()));
        memory.set(n, Some(record.position), &claims);
    });
    let (log, writer) = replayed.expect("it is read").start().expect("it starts");
    let first = memory.last.values().map(|(n, _)| n + 1).max().unwrap_or(0);
    let memory = Shared(Arc::new(Mutex::new(memory)), claims.clone());
    let report = |step: &log::Step, _, _: log::Sizes| {
        assert!(!matches!(step, log::Step::Degraded(_)), "{step:?}");
    };
    let thread = WriterThread::spawn(writer, memory.clone(), report);
    let _thread = thread.expect("a thread");
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(async {
        let mut out = std::io::stdout();
        for n in first.. {
            let body = body(n);
            let mut room = log.reserve(Log::record_bytes(body.len())).await;
            let position = {
                let mut memory = memory.0.lock().expect("no panic");
                let position = log.append(&mut room, 1, &[&body], Life::Living);
                let position = position.expect("it fits").expect("the disk works");
                memory.set(n, Some(position), &claims);
                position
            };
            if n % BATCH == 0 {
                assert_eq!(log.wait(position).await, Durability::Durable);
                writeln!(out, "\nsafe {n}").expect("the parent reads");
                out.flush().expect("the parent reads");
            }
        }
    });
}

/// Lets the process run for some time, kills it, and returns the last number that it has printed.
fn run_and_kill(directory: &Path, after: Duration) -> Option<u64> {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", KILLED, "--nocapture"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let (send, received) = mpsc::channel();
    std::thread::spawn(move || {
        let sent = lines
            .map_while(Result::ok)
            .try_for_each(|line| send.send(line));
        drop(sent);
    });
    let mut last = None;
    let mut kill_at = None;
    loop {
        let line = match received.recv_timeout(SILENCE_MAX) {
            Ok(line) => line,
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the process printed nothing for {SILENCE_MAX:?}");
            }
        };
        let Some(n) = line.strip_prefix("safe ") else {
            continue;
        };
        last = Some(n.parse().expect("a number"));
        let kill_at = *kill_at.get_or_insert_with(|| Instant::now() + after);
        if Instant::now() >= kill_at {
            // The rest of the lines is read to the end.
            let _ = child.kill();
        }
    }
    let status = child.wait().expect("it has ended");
    assert!(
        !status.success() && last.is_some(),
        "it was not killed: {status}"
    );
    last
}

fn check(data: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["store", "check"])
        .arg(data)
        .output()
        .expect("it runs")
}

/// The processes that it kills run this test, too: with a directory in their environment.
#[test]
fn a_killed_process_leaves_every_record_that_it_called_safe() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return append(Path::new(&directory));
    }
    let full = std::env::var_os("TIDEGATE_FULL").is_some();
    let seed = std::env::var("STORE_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("STORE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let data = TempDir::new("store").expect("a directory");
    let directory = data.path().join(log::DIRECTORY);
    for round in 0..if full { 50 } else { 5 } {
        let safe = run_and_kill(&directory, Duration::from_millis(rng.between(1, 400)));
        let safe = safe.expect("it printed something");
        let checked = check(data.path());
        assert!(checked.status.success(), "round {round}: {checked:?}");
        let disk = RealDisk::open(&directory).expect("nobody else uses it");
        let recovery = Recovery::open(disk, options()).expect("the log opens");
        let mut last = BTreeMap::new();
        let replayed = recovery.replay(|record| {
            let n = number(record.body);
            last.insert(n % KEYS, n);
        });
        assert_eq!(replayed.expect("it is read").report.damaged, 0);
        for n in safe.saturating_sub(KEYS - 1)..=safe {
            let found = last.get(&(n % KEYS)).copied();
            assert!(found >= Some(n), "round {round}: key of {n} is {found:?}");
        }
    }
}

#[test]
fn store_check_names_damage_and_tells_by_its_exit_code() {
    let data = TempDir::new("check").expect("a directory");
    for (directory, reason) in [
        ("nowhere", "there is no such directory"),
        ("empty", "no file"),
    ] {
        let data = data.path().join(directory);
        if directory == "empty" {
            fs::create_dir_all(data.join(log::DIRECTORY)).expect("it can be made");
        }
        let none = check(&data);
        assert_eq!(none.status.code(), Some(64), "{none:?}");
        let message = String::from_utf8_lossy(&none.stderr).into_owned();
        assert!(message.contains(reason), "{message}");
    }
    let directory = data.path().join(log::DIRECTORY);
    run_and_kill(&directory, Duration::from_millis(50));
    let sound = check(data.path());
    let text = String::from_utf8_lossy(&sound.stdout).into_owned();
    assert_eq!(sound.status.code(), Some(0), "{sound:?}");
    assert!(
        text.contains("format version: 1\n") && text.ends_with("damaged places: 0\n"),
        "{text}"
    );
    // A process that uses the store keeps others out.
    let disk = RealDisk::open(&directory).expect("nobody else uses it");
    let busy = check(data.path());
    assert_eq!(busy.status.code(), Some(75), "{busy:?}");
    let message = String::from_utf8_lossy(&busy.stderr).into_owned();
    assert!(
        message.contains("is in use by another process"),
        "{message}"
    );
    drop(disk);
    let segments = fs::read_dir(&directory).expect("it lists");
    let segments = segments.map(|entry| entry.expect("it lists").path());
    let segment = segments
        .filter(|p| p.extension().is_some_and(|e| e == "seg"))
        .min();
    let segment = segment.expect("there is one");
    let mut bytes = fs::read(&segment).expect("it is read");
    bytes[log::HEADER_BYTES as usize + 15] ^= 4;
    fs::write(&segment, bytes).expect("it is written");
    let damaged = check(data.path());
    let text = String::from_utf8_lossy(&damaged.stdout).into_owned();
    assert_eq!(damaged.status.code(), Some(70), "{damaged:?}");
    assert!(
        text.contains(", offset 4132: ") && text.contains("damaged places: 1"),
        "{text}"
    );
}
