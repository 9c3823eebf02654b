//! The knowledge about a client's session: whether it is there, and whether a crash leaves it. Only answers
//! that the client was given count, and the time in which a healthy disk must have been written.

use crate::sim::store::PERSIST_WITHIN;
use crate::time::Millis;

/// Whether a client has a session. `None` in its fields: it is not known.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The process has the session.
    exists: Option<bool>,
    /// A process that follows a crash has it.
    on_disk: Option<bool>,
    /// The session outlives its connection.
    outlives: bool,
    /// When that changed last.
    changed_at: Millis,
    /// The answer to the last CONNECT, until it comes.
    connack: Option<Awaited>,
}

/// A CONNACK that has not come.
#[derive(Clone, Copy, Debug)]
struct Awaited {
    /// Session Present, if it is known before.
    present: Option<bool>,
    /// It waits for the disk for certain.
    waits: bool,
}

/// A client's CONNECT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionRequest {
    pub(crate) clean_start: bool,
    /// The session is to outlive the connection.
    pub(crate) outlives: bool,
    pub(crate) has_will: bool,
}

/// The meaning of a CONNACK for the client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// The session is the one that the client had.
    Resumed,
    /// It is a new one.
    New,
}

impl Default for Kept {
    fn default() -> Self {
        Self {
            exists: Some(false),
            on_disk: Some(false),
            outlives: false,
            changed_at: Millis::ZERO,
            connack: None,
        }
    }
}

impl Kept {
    /// The client connects. Its CONNECT takes effect at once, whatever the client is told. Returns whether it
    /// is known that an earlier session goes on.
    pub(crate) fn connects(&mut self, request: SessionRequest, now: Millis) -> Option<bool> {
        let SessionRequest {
            clean_start,
            outlives,
            has_will,
        } = request;
        let resumes = match clean_start {
            true => Some(false),
            false => self.exists,
        };
        let had = self.exists == Some(true);
        // Each will is another one than the recorded one.
        let replaces = clean_start && had && self.on_disk == Some(true);
        let changes = resumes == Some(true) && outlives != self.outlives;
        self.connack = Some(Awaited {
            present: resumes,
            waits: has_will || replaces || changes,
        });
        let same = resumes == Some(true) && !changes;
        if !same {
            self.on_disk = None;
            self.changed_at = now;
        }
        self.exists = Some(true);
        self.outlives = outlives;
        resumes
    }

    /// The client has received CONNACK. Returns what it means, and whether it proves that the disk has the
    /// session as it is now, with its will.
    ///
    /// # Errors
    /// Session Present is wrong.
    pub(crate) fn greeted(&mut self, present: bool) -> Result<(Greeting, bool), String> {
        let Some(Awaited {
            present: known,
            waits,
        }) = self.connack.take()
        else {
            return Err("has a second CONNACK".to_owned());
        };
        if known.is_some_and(|known| known != present) {
            return Err(format!("is told Session Present {present}"));
        }
        // A resume waits for a record that is on its way.
        let proves = waits || present && self.outlives;
        if proves {
            self.on_disk = Some(self.outlives);
        }
        let greeting = match present {
            true => Greeting::Resumed,
            false => Greeting::New,
        };
        Ok((greeting, proves))
    }

    /// The client has not received the CONNACK of its connection.
    pub(crate) fn awaits_connack(&self) -> bool {
        self.connack.is_some()
    }

    /// The client has received SUBACK or UNSUBACK, which wait for the disk.
    pub(crate) fn acknowledged(&mut self) {
        if self.outlives {
            self.on_disk = Some(true);
        }
    }

    /// The connection has ended. Returns whether the session has ended with it.
    pub(crate) fn disconnected(&mut self, now: Millis) -> bool {
        if !self.outlives {
            self.exists = Some(false);
            if self.on_disk != Some(false) {
                self.on_disk = None;
            }
            self.changed_at = now;
        }
        !self.outlives
    }

    /// The process is killed. `durable_since`: the disk has had everything but the latest changes since then.
    pub(crate) fn crashed(&mut self, durable_since: Option<Millis>, now: Millis) -> Survival {
        self.exists = match durable_since {
            None => None,
            Some(since) if is_written(self.changed_at, since, now) => {
                self.exists.map(|exists| exists && self.outlives)
            }
            Some(_) => self.on_disk,
        };
        self.on_disk = self.exists;
        self.connack = None;
        match self.exists {
            Some(true) => Survival::Survives,
            Some(false) => Survival::Ends,
            None => Survival::Unknown,
        }
    }
}

/// Whether a crash leaves a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Survival {
    Survives,
    Ends,
    Unknown,
}

/// Whether a change is on a disk that has been durable since some time.
pub(crate) fn is_written(changed_at: Millis, durable_since: Millis, now: Millis) -> bool {
    changed_at.max(durable_since) + PERSIST_WITHIN <= now
}
