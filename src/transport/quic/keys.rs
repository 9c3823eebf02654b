//! The keys by which a restarted server is known again: for stateless resets (RFC 9000 section
//! 10.3) and for address validation tokens (section 8.1).

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::{hkdf, hmac};
use quinn::crypto::{HandshakeTokenKey, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator};

/// What the keys of all QUIC listeners of a process come from.
#[derive(Clone)]
pub struct QuicSecret([u8; Self::LEN]);

impl fmt::Debug for QuicSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QuicSecret")
    }
}

impl QuicSecret {
    /// Its length, bytes.
    pub const LEN: usize = 32;

    /// A secret that an earlier process has used.
    pub const fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// A new one; what it is made from is `bytes`, to be kept.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn random() -> std::io::Result<(Self, [u8; Self::LEN])> {
        let mut bytes = [0; Self::LEN];
        getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
        Ok((Self(bytes), bytes))
    }

    /// The keys of one listener. Another has others: who may ask one for a reset of the connections
    /// of another could end them (RFC 9000 section 21.11).
    pub(super) fn keys(&self, listener: &str) -> Option<Keys> {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"tidegate quic").extract(&self.0);
        let mut reset = [0; Self::LEN];
        prk.expand(&[b"reset", listener.as_bytes()], Whole)
            .and_then(|okm| okm.fill(&mut reset))
            .ok()?;
        let about = [b"token", listener.as_bytes()];
        let token = prk.expand(&about, hkdf::HKDF_SHA256).ok()?;
        Some(Keys {
            reset: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &reset)),
            token: Arc::new(hkdf::Prk::from(token)),
        })
    }
}

struct Whole;

impl hkdf::KeyType for Whole {
    fn len(&self) -> usize {
        QuicSecret::LEN
    }
}

/// The keys of one listener.
pub(super) struct Keys {
    pub reset: Arc<dyn HmacKey>,
    pub token: Arc<dyn HandshakeTokenKey>,
}

/// Connection IDs of eight random bytes. The library's own carry a checksum by a key of the process,
/// and packets of clients of an earlier one would be dropped without a word.
pub(super) struct RandomIds;

const ID_LEN: usize = 8;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN];
        // Without randomness identifiers collide, and the library asks for another.
        let _ = getrandom::fill(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sign(secret: &QuicSecret, listener: &str) -> [u8; 32] {
        let keys = secret.keys(listener).expect("derived");
        let mut out = [0; 32];
        keys.reset.sign(b"an identifier", &mut out);
        out
    }

    #[test]
    fn keys_are_the_listener_s_and_the_secret_s() {
        let one = QuicSecret::new([1; 32]);
        let (other, bytes) = QuicSecret::random().expect("randomness");
        assert_eq!(sign(&one, "a"), sign(&QuicSecret::new([1; 32]), "a"));
        assert_ne!(sign(&one, "a"), sign(&one, "b"));
        assert_ne!(sign(&one, "a"), sign(&other, "a"));
        assert_eq!(sign(&other, "a"), sign(&QuicSecret::new(bytes), "a"));
    }

    #[test]
    fn identifiers_differ() {
        let mut ids = RandomIds;
        let first = ids.generate_cid();
        assert_eq!(first.len(), ids.cid_len());
        assert_ne!(first[..], ids.generate_cid()[..]);
    }
}
