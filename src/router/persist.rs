//! The sessions' way into the log.

use std::sync::Arc;
use std::task::Waker;

use crate::store::log::{Log, Owner, Pass, Piece, Progress, Room};

use crate::router::Router;
use crate::router::SessionRef;
use crate::router::sessions::persist::Batch;

impl Router {
    /// Whether sessions are to go into the log. Wakes the task behind `waker` when there are.
    pub fn has_marked(&self, waker: &Waker) -> bool {
        self.sessions.has_marked(waker)
    }

    /// Appends sessions that have changed to the log, as many as find room, and each as it is now. `from` is
    /// the shard to begin with; it is changed for the next call. When the batch is on the disk, or the log
    /// is degraded, it is handed to [`Router::committed`].
    pub fn append_marked(&self, log: &Log, room: &mut Room, from: &mut u16) -> Batch {
        self.sessions.append_marked(log, room, from)
    }

    /// The connections that waited for the records of this batch go on.
    pub fn committed(&self, batch: &Batch) {
        self.sessions.committed(batch);
    }

    /// The process ends, and with it a connection. The session stays as it is: for the next process its
    /// client was connected until the end. False: sessions are not kept, or the connection is gone.
    pub(crate) fn suspend(&self, session: SessionRef, connection_no: u64) -> bool {
        self.sessions.suspend(session, connection_no)
    }
}

/// The sessions as the owner of the log's records.
#[derive(Debug)]
pub struct SessionOwner {
    router: Arc<Router>,
    log: Log,
    pass: Pass,
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
            next: (0, 0),
        }
    }
}

impl Owner for SessionOwner {
    fn begin(&mut self, pass: Pass) {
        self.pass = pass;
        self.next = (0, 0);
    }

    fn write(&mut self, piece: &mut Piece<'_>) -> Progress {
        let sessions = &self.router.sessions;
        sessions.rewrite(&self.log, self.pass, &mut self.next, piece)
    }
}
