//! The sessions that QUIC clients may resume where early data is taken. The TLS
//! library takes it by no ticket that would carry all by itself (RFC 8446
//! section 8.1), so here is what costs memory, and its bounds.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;
use rustls::server::StoresServerSessions;

/// Sessions, and bytes of all: most take some hundred, and a client's certificate.
const SESSIONS_MAX: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
const BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of one. A client may present a chain of 64 KB.
const SESSION_MAX: usize = 8 * 1024;
/// As long as a ticket of other transports is good at most.
const LIFETIME: Duration = Duration::from_hours(12);

/// Each is good for one resumption, so early data cannot be taken twice.
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
    /// Nothing is kept from now on: others have taken its place. Connections that began with it
    /// hold on to it for all their life.
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
        if kept.closed || bytes > SESSION_MAX {
            return false;
        }
        kept.bytes += bytes;
        // What it replaces, or pushes out.
        if let Some((key, (session, _))) = kept.sessions.push(key, (session, now)) {
            kept.bytes -= key.len() + session.len();
        }
        while kept.bytes > BYTES_MAX
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
    fn each_is_good_once_and_not_for_ever() {
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
    fn they_are_bounded_in_number_and_bytes_oldest_first() {
        let (sessions, now) = (EarlySessions::default(), Instant::now());
        assert!(!put(&sessions, 0, SESSION_MAX, now));
        let most = SESSIONS_MAX.get() as u32;
        for n in 0..=most {
            assert!(put(&sessions, n, 100, now));
        }
        assert!(!has(&sessions, 0) && has(&sessions, 1) && has(&sessions, most));
        for n in 0..3000 {
            assert!(put(&sessions, n, SESSION_MAX - 4, now));
        }
        let kept = sessions.0.lock();
        assert_eq!(
            (kept.bytes, kept.sessions.len()),
            (BYTES_MAX, BYTES_MAX / SESSION_MAX)
        );
    }

    #[test]
    fn what_was_replaced_keeps_nothing() {
        let (sessions, now) = (EarlySessions::default(), Instant::now());
        assert!(put(&sessions, 1, 10, now) && sessions.can_cache());
        sessions.close();
        assert!(!has(&sessions, 1) && !put(&sessions, 2, 10, now) && !sessions.can_cache());
    }
}
