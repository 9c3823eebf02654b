//! The sessions that the records of a log leave.

use std::collections::BTreeMap;

use crate::store::log::{Position, Record};
use crate::time::UnixMillis;

use super::{RecordError, SESSION, SESSION_END, SessionRecord, decode_end};

/// The body of a session's last record.
#[derive(Clone, Debug)]
pub struct FoundSession {
    /// Where the record is.
    pub position: Position,
    /// It can be read.
    pub body: Box<[u8]>,
    incarnation: u64,
    detached_at: Option<UnixMillis>,
}

/// The sessions of a log, while its records are replayed.
#[derive(Debug, Default)]
pub struct FoundSessions {
    by_key: BTreeMap<Box<str>, FoundSession>,
    /// The keys of the incarnations.
    keys: BTreeMap<u64, Box<str>>,
    largest: u64,
}

impl FoundSessions {
    /// Takes the next record.
    ///
    /// # Errors
    /// [`RecordError`]; the record says nothing.
    pub fn take(&mut self, record: &Record<'_>) -> Result<(), RecordError> {
        match record.kind {
            SESSION => {
                let session = SessionRecord::decode(record.body)?;
                self.session(&session, record);
            }
            SESSION_END => {
                let incarnation = decode_end(record.body)?;
                self.largest = self.largest.max(incarnation);
                if let Some(key) = self.keys.remove(&incarnation) {
                    self.by_key.remove(&key);
                }
            }
            kind => return Err(RecordError::Kind(kind)),
        }
        Ok(())
    }

    fn session(&mut self, session: &SessionRecord<'_>, record: &Record<'_>) {
        let incarnation = session.incarnation;
        self.largest = self.largest.max(incarnation);
        let found = FoundSession {
            position: record.position,
            body: record.body.into(),
            incarnation,
            detached_at: session.detached_at,
        };
        if let Some(old) = self.by_key.insert(session.key.into(), found)
            && old.incarnation != incarnation
        {
            self.keys.remove(&old.incarnation);
        }
        self.keys.insert(incarnation, session.key.into());
    }

    /// The largest incarnation that any record names.
    pub fn largest_incarnation(&self) -> u64 {
        self.largest
    }

    /// The sessions, the least recently connected first.
    pub fn into_sessions(self) -> Vec<FoundSession> {
        let mut all: Vec<FoundSession> = self.by_key.into_values().collect();
        all.sort_by_key(|s| (s.detached_at.is_none(), s.detached_at, s.position));
        all
    }
}
