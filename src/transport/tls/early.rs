//! The sessions that QUIC clients may resume where early data is accepted. The TLS library does not
//! accept early data with self-contained tickets (RFC 8446 section 8.1), so these sessions take memory,
//! which is bounded here.

use std::num::NonZeroUsize;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use rustls::server::StoresServerSessions;
use tokio::time::Instant;

/// The most sessions. Most take some hundred bytes, and a client's certificate.
const SESSIONS_MAX: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
/// The most bytes of all sessions.
const TOTAL_MAX_BYTES: usize = 16 * 1024 * 1024;
/// The most bytes of one session. A client may present a chain of 64 KB.
const SESSION_MAX_BYTES: usize = 8 * 1024;
/// The longest lifetime of a ticket of other transports.
const LIFETIME: Duration = Duration::from_hours(12);

/// Each session can be resumed once, so early data cannot be replayed.
pub(super) struct EarlySessions(Mutex<Kept>);

struct Kept {
    sessions: LruCache<Vec<u8>, (Vec<u8>, Instant)>,
    bytes: usize,
    closed: bool,
}

impl std::fmt::Debug for EarlySessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EarlySessions")
    }
}

impl Default for EarlySessions {
    fn default() -> Self {
        Self(Mutex::new(Kept {
            sessions: LruCache::new(SESSIONS_MAX),
            bytes: 0,
            closed: false,
        }))
    }
}

impl EarlySessions {
    /// Drops all sessions and keeps none from now on, because other rules hold. Connections that began
    /// under the old rules keep a reference for as long as they live.
    pub(super) fn close(&self) {
        let mut kept = self.0.lock();
        kept.closed = true;
        kept.sessions = LruCache::new(NonZeroUsize::MIN);
        kept.bytes = 0;
    }

    fn take_at(&self, key: &[u8], now: Instant) -> Option<Vec<u8>> {
        let mut kept = self.0.lock();
        let (session, since) = kept.sessions.pop(key)?;
        kept.bytes -= key.len() + session.len();
        (now.duration_since(since) < LIFETIME).then_some(session)
    }

    fn put_at(&self, key: Vec<u8>, session: Vec<u8>, now: Instant) -> bool {
        let bytes = key.len() + session.len();
        let mut kept = self.0.lock();
        if kept.closed || bytes > SESSION_MAX_BYTES {
            return false;
        }
        kept.bytes += bytes;
        // The session that it replaces or evicts.
        if let Some((key, (session, _))) = kept.sessions.push(key, (session, now)) {
            kept.bytes -= key.len() + session.len();
        }
        while kept.bytes > TOTAL_MAX_BYTES
            && let Some((key, (session, _))) = kept.sessions.pop_lru()
        {
            kept.bytes -= key.len() + session.len();
        }
        true
    }
}

impl StoresServerSessions for EarlySessions {
    fn put(&self, key: Vec<u8>, session: Vec<u8>) -> bool {
        self.put_at(key, session, Instant::now())
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        let kept = self.0.lock();
        let (session, since) = kept.sessions.peek(key)?;
        (since.elapsed() < LIFETIME).then(|| session.clone())
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.take_at(key, Instant::now())
    }

    fn can_cache(&self) -> bool {
        !self.0.lock().closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(sessions: &EarlySessions, n: u32, bytes: usize, now: Instant) -> bool {
        sessions.put_at(n.to_be_bytes().into(), vec![7; bytes], now)
    }

    fn has(sessions: &EarlySessions, n: u32) -> bool {
        sessions.get(&n.to_be_bytes()).is_some()
    }

    #[test]
    fn each_session_is_resumed_once_and_expires() {
        let (sessions, now) = (EarlySessions::default(), Instant::now());
        assert!(
            put(&sessions, 1, 10, now) && put(&sessions, 1, 20, now) && put(&sessions, 2, 5, now)
        );
        let key = 1_u32.to_be_bytes();
        assert_eq!(sessions.take_at(&key, now), Some(vec![7; 20]));
        assert_eq!(sessions.take_at(&key, now), None);
        assert_eq!(sessions.take_at(&2_u32.to_be_bytes(), now + LIFETIME), None);
        assert_eq!(sessions.0.lock().bytes, 0);
    }

    #[test]
    fn sessions_are_bounded_in_number_and_bytes_oldest_first() {
        let (sessions, now) = (EarlySessions::default(), Instant::now());
        assert!(!put(&sessions, 0, SESSION_MAX_BYTES, now));
        let most = SESSIONS_MAX.get() as u32;
        for n in 0..=most {
            assert!(put(&sessions, n, 100, now));
        }
        assert!(!has(&sessions, 0) && has(&sessions, 1) && has(&sessions, most));
        for n in 0..3000 {
            assert!(put(&sessions, n, SESSION_MAX_BYTES - 4, now));
        }
        let kept = sessions.0.lock();
        assert_eq!(
            (kept.bytes, kept.sessions.len()),
            (TOTAL_MAX_BYTES, TOTAL_MAX_BYTES / SESSION_MAX_BYTES)
        );
    }

    #[test]
    fn a_closed_store_keeps_nothing() {
        let (sessions, now) = (EarlySessions::default(), Instant::now());
        assert!(put(&sessions, 1, 10, now) && sessions.can_cache());
        sessions.close();
        assert!(!has(&sessions, 1) && !put(&sessions, 2, 10, now) && !sessions.can_cache());
    }
}
