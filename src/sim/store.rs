//! The sessions of the node on a simulated disk: the log, its writer, and the task that writes sessions which
//! change. Each of their steps is a step of the simulation, so a crash can come between any two.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake};

use super::*;
use crate::router::{Persist, SessionOwner};
use crate::store::log::disk::Disk as _;
use crate::store::log::{Log, Options, Recovery, Step, Writer};
use crate::store::records::{FoundFilters, FoundSessions};

/// How many seeds keep their sessions on the disk, in a hundred.
pub(crate) const DURABLE_PERCENT: u64 = 33;

/// After a start, no session ends and no will is published for this long.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// Every change is on a healthy disk after this time.
pub(crate) const PERSIST_WITHIN: Duration = Duration::from_millis(300);

/// The time between two moments in which the disk has caught up.
const CATCH_UP_MS: u64 = 200;

/// A segment is small, so that runs have several.
const SEGMENT_BYTES: u32 = 12 * 1024;

/// The most bytes of living records without a session: those of links and their filters.
const LIVING_MAX_BYTES: u64 = 4096;

/// The end of the name of the file that marks an old log.
const STALE: &str = ".stale";

fn options() -> Options {
    Options {
        segment_bytes: SEGMENT_BYTES,
        commit_records_max: 8,
        commit_bytes_max: 8192,
        ..Options::new(7)
    }
}

/// A task was woken.
#[derive(Debug)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// See the module.
pub(crate) struct Store {
    pub(crate) disk: SimDisk,
    log: Log,
    writer: Writer<SimDisk>,
    owner: SessionOwner,
    persist: Pin<Box<dyn Future<Output = ()>>>,
    woken: Arc<Woken>,
    /// Since this time the log has everything but the latest changes. `None`: it is degraded.
    pub(crate) durable_since: Option<Millis>,
    /// How often it became durable again.
    returned: u64,
}

impl Store {
    /// Reads the log that is on a disk, and begins its sessions, as a process does at its start. `now` is the
    /// time of the run.
    pub(crate) fn open(disk: SimDisk, router: &Arc<Router>, now: Millis) -> Self {
        router.keep_sessions(GRACE);
        router.keep_filters();
        let recovery = Recovery::open(disk.clone(), options()).expect("the disk can be read");
        let claims = recovery.claims().clone();
        let (mut found, mut filters) = (FoundSessions::default(), FoundFilters::default());
        let replayed = recovery.replay(|record| {
            let taken = match FoundFilters::takes(record.kind) {
                true => filters.take(&record),
                false => found.take(&record),
            };
            taken.expect("a record of ours");
        });
        let replayed = replayed.expect("the disk can be read");
        let is_trusted = !replayed.report.stale;
        let first_shared = router.shared_link(0);
        let client_id = |link| data_link_id(link, first_shared);
        router.restore_filters(filters, client_id, is_trusted, &claims, Millis::ZERO);
        router.restore_all(&found, &claims, !is_trusted, Millis::ZERO);
        let (log, writer) = replayed.start().expect("the directory can be written");
        Self {
            durable_since: log.committed().is_some().then_some(now),
            owner: SessionOwner::new(router.clone(), log.clone()),
            persist: Box::pin(persist(Persist::new(log.clone()), router.clone())),
            woken: Arc::new(Woken(AtomicBool::new(true))),
            disk,
            log,
            writer,
            returned: 0,
        }
    }

    /// The task that writes the sessions goes on, if something has woken it.
    fn persist(&mut self) {
        if self.woken.0.swap(false, Ordering::AcqRel) {
            let waker = Waker::from(self.woken.clone());
            let polled = self.persist.as_mut().poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending(), "the task never ends");
        }
    }

    /// The writer of the log does one thing. Returns whether there was something to do.
    fn write(&mut self, now: Millis) -> bool {
        match self.writer.step(&mut self.owner, now) {
            Step::Idle { .. } => return false,
            Step::Degraded(_) => self.durable_since = None,
            Step::Returned => {
                self.durable_since = Some(now);
                self.returned += 1;
            }
            _ => {}
        }
        true
    }

    /// Some steps of a disk that takes its time.
    pub(crate) fn work(&mut self, fate: &mut Rng, now: Millis) {
        if now.as_u64().is_multiple_of(CATCH_UP_MS) {
            return self.catch_up(now);
        }
        for _ in 0..fate.below(4) {
            match fate.chance(50) {
                true => self.persist(),
                false => drop(self.write(now)),
            }
        }
    }

    /// Everything that waits goes to the disk.
    pub(crate) fn catch_up(&mut self, now: Millis) {
        for _ in 0..1000 {
            self.persist();
            let wrote = self.write(now);
            if self.disk.is_cut() || !wrote && !self.woken.0.load(Ordering::Acquire) {
                return;
            }
        }
        panic!("the writer never rests");
    }

    /// Whether the next process can tell that the log is an old one.
    pub(crate) fn is_marked(&self) -> bool {
        let names = self.disk.list().unwrap_or_default();
        names.iter().any(|name| name.ends_with(STALE))
    }

    /// How many sessions the next process would find.
    fn sessions_on_disk(&self) -> usize {
        let recovery = Recovery::open(self.disk.after_kill(), options()).expect("it can be read");
        let mut found = FoundSessions::default();
        let replayed = recovery.replay(|record| {
            // Records of other kinds are of no interest here.
            let _ = found.take(&record);
        });
        replayed.expect("it can be read");
        found.sessions().len()
    }

    /// The bytes of the records that are needed.
    pub(crate) fn living_bytes(&self) -> u64 {
        self.log.claims().living_bytes()
    }
}

/// The client identifier of a data link or shared link with this number in the router.
pub(crate) fn data_link_id(link: usize, first_shared: usize) -> String {
    match link.checked_sub(first_shared) {
        Some(shared) => format!("edge-s{shared}"),
        None => format!("edge-d{link}"),
    }
}

async fn persist(mut persist: Persist, router: Arc<Router>) {
    loop {
        Persist::marked(&router).await;
        persist.batch(&router).await;
    }
}

impl World {
    /// The disk of a durable seed works.
    pub(crate) fn store_works(&mut self) {
        if let Some(store) = &mut self.store {
            store.work(&mut self.fate, self.now);
        }
    }

    /// When all sessions have ended, the log has none, and needs only a few bytes.
    pub(crate) fn check_log_is_empty(&mut self) {
        let Some(store) = &mut self.store else {
            return;
        };
        store.catch_up(self.now);
        self.exercised.returned += store.returned;
        let found = store.sessions_on_disk();
        // The last checkpoint stays.
        let living = store.living_bytes() - self.router.checkpoint_bytes();
        if store.durable_since.is_none() {
            self.oracle.fault("the log stays degraded".to_owned());
        } else if living > LIVING_MAX_BYTES || found > 0 {
            self.oracle.fault(format!(
                "no session is left, and the log has {found}, and needs {living} bytes"
            ));
        }
    }
}
