//! The sessions on the disk: the log is read at the start, written while the process runs, and completed at
//! its end.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::config::{Config, Durability};
use crate::router::{Persist, Router, SessionOwner};
use crate::store::log::disk::{DirectoryError, RealDisk};
use crate::store::log::{
    DIRECTORY, Log, OpenError, Options, Position, Record, Recovery, Report, Sizes, Step, Writer,
    WriterThread,
};
use crate::store::records::{FoundFilters, FoundSessions, RecordError};
use crate::telemetry::metrics;
use crate::upstream::{Role, client_id};

use crate::runtime::error::StartError;

/// Damaged places that are named in the log at the start, at most.
const NAMED_MAX: usize = 100;
/// How long the end of the process waits for the disk, twice at most. A kill costs no acknowledged change.
const FLUSH: Duration = Duration::from_secs(2);

/// The log of a process that keeps its sessions on the disk.
#[derive(Debug)]
pub(super) struct SessionStore {
    log: Log,
    thread: WriterThread,
}

/// Opens the log of `config`, and begins the sessions that it has. `None`: sessions end with the process.
///
/// # Errors
/// [`StartError`], with the file and the remedy.
pub(super) async fn open(
    config: &Config,
    router: &Arc<Router>,
    clock: Clock,
) -> Result<Option<SessionStore>, StartError> {
    if config.store.durability == Durability::Memory {
        return Ok(None);
    }
    let directory = config.node.data_dir.join(DIRECTORY);
    let grace = config.session.restart_grace;
    let sessions_max = config.memory.sessions;
    let router = router.clone();
    let links = LinkNames::of(config, &router);
    let opened = tokio::task::spawn_blocking(move || {
        router.keep_sessions(grace);
        router.keep_filters();
        load(&directory, &router, &links, clock).inspect(|_| warn_of_size(&router, sessions_max))
    });
    let failed = |e| StartError::Internal(format!("reading the log: {e}"));
    opened.await.map_err(failed)?.map(Some)
}

/// The client identifiers of the data links and shared links, by the router's numbers.
struct LinkNames(Vec<String>);

impl LinkNames {
    fn of(config: &Config, router: &Router) -> Self {
        let upstream = &config.upstream;
        let name =
            |role: Role, number| client_id(upstream, &config.node.id, &role.link_name(number));
        let first_shared = router.shared_link(0);
        let data = (0..first_shared).map(|number| name(Role::Data, number));
        let shared = 0..usize::from(upstream.shared_links.max);
        Self(
            data.chain(shared.map(|number| name(Role::Shared, number)))
                .collect(),
        )
    }
}

/// Sessions that were promised are kept, even if they find no room any more.
fn warn_of_size(router: &Router, max_bytes: u64) {
    let bytes = router.session_bytes();
    if bytes > max_bytes {
        tracing::warn!(
            bytes,
            max_bytes,
            "The restored sessions need more than memory.sessions: no new session is kept until others have ended"
        );
    }
}

/// Reads the log and begins its sessions.
fn load(
    directory: &Path,
    router: &Arc<Router>,
    links: &LinkNames,
    clock: Clock,
) -> Result<SessionStore, StartError> {
    let began = clock.now();
    // Only its owner may read the wills of clients. RealDisk reports a directory that cannot be made.
    if let Some(data_dir) = directory.parent() {
        let _ = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir);
    }
    let disk = RealDisk::open(directory).map_err(|error| match error {
        DirectoryError::InUse(_) => StartError::Temporary(format!(
            "node.data_dir: {error}: give each Tidegate a directory of its own"
        )),
        DirectoryError::Io { .. } => StartError::Config(format!(
            "node.data_dir: {error}: store.durability = \"disk\" needs a directory that can be written"
        )),
    })?;
    let options = Options::new(getrandom::u64().unwrap_or_default());
    let failed = |error| not_opened(directory, error);
    let recovery = Recovery::open(disk, options).map_err(failed)?;
    let claims = recovery.claims().clone();
    let mut found = Found::default();
    let replayed = recovery.replay(|record| found.visit(&record));
    let replayed = replayed.map_err(failed)?;
    if let Some((position, error)) = found.refused {
        return Err(StartError::Config(format!(
            "node.data_dir: {}: {position}: {error}: use the program that wrote it",
            directory.display()
        )));
    }
    report(&replayed.report, found.malformed);
    let name = |link: usize| links.0.get(link).cloned().unwrap_or_default();
    let is_complete = !replayed.report.stale;
    router.restore_filters(found.filters, name, is_complete, &claims, clock.now());
    let restored = router.restore_all(&found.sessions, &claims, !is_complete, clock.now());
    let (log, writer) = replayed.start().map_err(failed)?;
    // A log that was left degraded is so until it is written anew, and so is one whose disk fails at once.
    let is_degraded = log.committed().is_none();
    metrics().durability_degraded.set(f64::from(is_degraded));
    let took = clock.now().since(began);
    metrics().store_replay_seconds.set(took.as_secs_f64());
    tracing::info!(
        sessions = restored,
        directory = %directory.display(),
        took_ms = took.as_millis() as u64,
        "Sessions were restored from the disk"
    );
    let thread = spawn(writer, router, &log);
    let thread = thread.map_err(|e| StartError::Internal(format!("the log's thread: {e}")))?;
    Ok(SessionStore { log, thread })
}

fn not_opened(directory: &Path, error: OpenError) -> StartError {
    let text = format!("node.data_dir: {}: {error}", directory.display());
    match error {
        OpenError::Disk(_) | OpenError::Version { .. } => StartError::Config(text),
    }
}

/// Names the places that cannot be read, and files that are not of the log.
fn report(report: &Report, malformed: u64) {
    for damage in report.damages.iter().take(NAMED_MAX) {
        tracing::warn!("The log of sessions cannot be read at {damage}");
    }
    let damaged = report.damaged + malformed;
    metrics().store_damaged.increment(damaged);
    if damaged > 0 {
        tracing::warn!(
            damaged,
            "Places of the log of sessions are damaged: sessions may be missing, or be as they were earlier; `tidegate store check` names each place"
        );
    }
    for file in report.foreign.iter().take(NAMED_MAX) {
        tracing::warn!(
            file,
            "A file in the log's directory has the name of a segment that no log has: it is left alone"
        );
    }
    if report.stale {
        tracing::warn!(
            "The log of sessions lacks its last records: the disk was full or failed when the last process ended"
        );
    }
}

/// The findings of a replay.
#[derive(Debug, Default)]
struct Found {
    sessions: FoundSessions,
    filters: FoundFilters,
    /// Records that are intact and say nothing.
    malformed: u64,
    /// The first record of a later program.
    refused: Option<(Position, RecordError)>,
}

impl Found {
    fn visit(&mut self, record: &Record<'_>) {
        let position = record.position;
        let taken = match FoundFilters::takes(record.kind) {
            true => self.filters.take(record),
            false => self.sessions.take(record),
        };
        match taken {
            Ok(()) => {}
            Err(RecordError::Malformed) => {
                self.malformed += 1;
                if self.malformed <= NAMED_MAX as u64 {
                    tracing::warn!("The log of sessions has a malformed record at {position}");
                }
            }
            Err(error) => {
                self.refused.get_or_insert((position, error));
            }
        }
    }
}

fn spawn(
    writer: Writer<RealDisk>,
    router: &Arc<Router>,
    log: &Log,
) -> std::io::Result<WriterThread> {
    let owner = SessionOwner::new(router.clone(), log.clone());
    WriterThread::spawn(writer, owner, |step, took, sizes| {
        written(step, took, sizes);
    })
}

/// Counts and logs a step of the log's writer.
fn written(step: &Step, took: Duration, sizes: Sizes) {
    let metrics = metrics();
    metrics.store_bytes.set(sizes.bytes as f64);
    metrics.store_living_bytes.set(sizes.living_bytes as f64);
    match step {
        Step::Committed { records, .. } => {
            metrics.store_records.increment(u64::from(*records));
            metrics.store_commit_seconds.record(took.as_secs_f64());
        }
        Step::Degraded(failure) => {
            metrics.durability_degraded.set(1.0);
            tracing::error!(
                "Sessions are not written to the disk any more: cannot {failure}; everything goes on, and a restart would find them as they were"
            );
        }
        Step::NotDeleted(failure) => {
            tracing::warn!("A part of the log of sessions is not deleted yet: cannot {failure}");
        }
        Step::Returned => {
            metrics.durability_degraded.set(0.0);
            tracing::warn!("Sessions are written to the disk again");
        }
        Step::Idle { .. }
        | Step::Rewritten
        | Step::Deleted { .. }
        | Step::StillDegraded(_)
        | Step::Returning => {}
    }
}

impl SessionStore {
    /// The side of the log for the persist task.
    pub(super) fn log(&self) -> Log {
        self.log.clone()
    }

    /// Writes everything that waits, and ends the log. The persist task has ended.
    pub(super) async fn close(self, router: &Router) {
        let log = self.log;
        let mut persist = Persist::new(log.clone());
        // So that the next process does not send messages again that clients have acknowledged.
        router.ask_for_checkpoint();
        let rest = async { while persist.batch(router).await {} };
        let flushed = tokio::time::timeout(FLUSH, rest).await.is_ok();
        let thread = self.thread;
        let stopped = tokio::task::spawn_blocking(move || thread.stop());
        let stopped = tokio::time::timeout(FLUSH, stopped).await.is_ok();
        // The log has ended. It knows a place up to which it is safe only if it did so in order.
        if flushed && stopped && log.committed().is_some() {
            tracing::info!("All sessions are on the disk");
        } else {
            tracing::error!("Not all sessions could be written to the disk");
        }
    }
}

/// Runs `persist` until `stop` is cancelled. While one batch is written, the next one gathers.
pub(super) async fn persist(persist: &mut Persist, router: &Router, stop: CancellationToken) {
    persist.release(router);
    loop {
        let marked = Persist::marked(router);
        if stop.run_until_cancelled(marked).await.is_none() {
            return;
        }
        persist.batch(router).await;
    }
}
