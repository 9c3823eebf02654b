//! The way of sessions, filters and links into the log.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};

use crate::mqtt::{LinkOrigin, Message};
use crate::router::messages::Committed;
use crate::store::log::{Log, Mode, Owner, Pass, Piece, Position, Progress, Room};
use crate::telemetry::metrics;

use crate::store::records::LinkReleased;

use crate::router::Router;
use crate::router::SessionRef;
use crate::router::filters::persist::{FilterBatch, Rewritten};
use crate::router::sessions::persist::SessionBatch;

/// Records that were appended to the log together.
#[derive(Debug, Default)]
#[must_use]
pub struct Batch {
    /// The place of the last one. `None`: none was appended, or the log is degraded.
    pub last: Option<Position>,
    /// The bytes of room that the next record needs, if it did not find them.
    pub needs: Option<usize>,
    filters: FilterBatch,
    sessions: SessionBatch,
}

impl Batch {
    /// Whether nothing was marked.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.filters.is_empty()
    }

    /// How many sessions it has.
    #[cfg(test)]
    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }
}

/// The room that a batch of sessions reserves in the log.
const BATCH_BYTES: usize = 1 << 20;

impl Router {
    /// Whether records are to go into the log. Wakes the task behind `waker` when there are.
    pub fn has_marked(&self, waker: &Waker) -> bool {
        self.sessions.has_marked(waker)
    }

    /// Appends links, filters and sessions that have changed to the log, as many as find room, and each as
    /// it is now. `from` is the shard to begin with; it is changed for the next call. When the batch is on
    /// the disk, or the log is degraded, it is handed to [`Router::committed`].
    pub fn append_marked(&self, log: &Log, room: &mut Room, from: &mut u16) -> Batch {
        let filters = match self.sessions.marks().take_filters() {
            true => self.filters.append_marked(log, room),
            false => FilterBatch::default(),
        };
        let sessions = self.sessions.append_marked(log, room, from);
        Batch {
            last: sessions.last.or(filters.last),
            needs: sessions.needs,
            filters,
            sessions,
        }
    }

    /// The connections and links that waited for the records of this batch go on.
    pub fn committed(&self, batch: &Batch) {
        self.wake_links(self.filters.committed(&batch.filters));
        self.sessions.committed(&batch.sessions);
        if batch.sessions.has_messages() {
            for waker in &self.data {
                waker.raise();
            }
        }
    }

    /// Whether messages are kept in a log, so that their acknowledgements wait for it.
    pub(crate) fn keeps_messages(&self) -> bool {
        self.sessions.numbers().kept().is_some()
    }

    /// The broker has released a message of a link, or has forgotten all of them.
    pub(crate) fn link_released(&self, released: LinkReleased) -> Committed {
        self.sessions.numbers().link_released(released)
    }

    /// The messages of QoS 2 of a link that the broker may send again, from an earlier process.
    pub(crate) fn received_on(&self, link: usize) -> Vec<LinkOrigin> {
        self.sessions.numbers().received.of(link as u16)
    }

    /// How far the sessions of connected clients are is to be written now, if messages were written since.
    pub(crate) fn ask_for_checkpoint(&self) {
        self.sessions.numbers().ask_for_checkpoint();
    }

    /// The records of these messages are to be written now.
    pub(crate) fn write_messages(&self, messages: impl IntoIterator<Item = Message>) {
        self.sessions.numbers().write(messages);
    }

    /// The bytes of the last checkpoint in the log.
    #[cfg(test)]
    pub(crate) fn checkpoint_bytes(&self) -> u64 {
        self.sessions.checkpoint_bytes()
    }

    /// The process ends, and with it a connection. The session stays as it is: for the next process its
    /// client was connected until the end. False: sessions are not kept, or the connection is gone.
    pub(crate) fn suspend(&self, session: SessionRef, connection_no: u64) -> bool {
        self.sessions.suspend(session, connection_no)
    }
}

/// Sessions, filters and links as the owners of the log's records.
#[derive(Debug)]
pub struct SessionOwner {
    router: Arc<Router>,
    log: Log,
    pass: Pass,
    filters: Rewritten,
    /// The shard and the slot to go on with.
    next: (u16, usize),
}

impl SessionOwner {
    /// The sessions of a router, which writes to `log`.
    pub fn new(router: Arc<Router>, log: Log) -> Self {
        Self {
            router,
            log,
            pass: Pass::All,
            filters: Rewritten::default(),
            next: (0, 0),
        }
    }
}

impl Owner for SessionOwner {
    fn begin(&mut self, pass: Pass) {
        self.pass = pass;
        self.filters = Rewritten::default();
        self.next = (0, 0);
    }

    fn write(&mut self, piece: &mut Piece<'_>) -> Progress {
        let Self {
            router, filters, ..
        } = self;
        if let Progress::More = router.filters.rewrite(&self.log, self.pass, filters, piece) {
            return Progress::More;
        }
        let sessions = &self.router.sessions;
        sessions.rewrite(&self.log, self.pass, &mut self.next, piece)
    }
}

/// Writes the sessions that change, one batch after the other. It needs no I/O and no clock: it waits for
/// marked sessions, for room in the log, and for the log's commit.
#[derive(Debug)]
pub struct Persist {
    log: Log,
    /// The shard to begin with.
    from: u16,
    /// The room that the next batch needs, if that is more than usual.
    needs: usize,
    /// The batch that is being written.
    batch: Batch,
}

impl Persist {
    /// Nothing is written yet.
    pub fn new(log: Log) -> Self {
        Self {
            log,
            from: 0,
            needs: 0,
            batch: Batch::default(),
        }
    }

    /// Ends when sessions are to go into the log.
    pub async fn marked(router: &Router) {
        poll_fn(|cx| match router.has_marked(cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Lets the connections go on that wait for a batch which was not finished.
    pub fn release(&self, router: &Router) {
        router.committed(&self.batch);
    }

    /// Writes one batch, and waits until it is on the disk. Returns whether there was anything to write.
    pub async fn batch(&mut self, router: &Router) -> bool {
        let bytes = BATCH_BYTES.max(std::mem::take(&mut self.needs));
        let mut room = self.log.reserve(bytes).await;
        self.batch = router.append_marked(&self.log, &mut room, &mut self.from);
        drop(room);
        self.needs = self.batch.needs.unwrap_or(0);
        if let Some(position) = self.batch.last {
            // Degraded or not, everything goes on.
            let _ = self.log.wait(position).await;
        }
        if self.log.mode() == Mode::Closed {
            metrics().durability_degraded.set(1.0);
        }
        self.release(router);
        !self.batch.is_empty() || self.batch.needs.is_some()
    }
}
