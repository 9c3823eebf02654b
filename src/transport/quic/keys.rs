//! The keys that stay the same across restarts: those of stateless resets (RFC 9000 section 10.3) and
//! of address validation tokens (section 8.1).

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::{hkdf, hmac};
use quinn::crypto::{HandshakeTokenKey, HmacKey};
use quinn::{ConnectionId, ConnectionIdGenerator};
use quinn_proto::InvalidCid;

/// The secret from which the keys of all QUIC listeners of a process are derived.
#[derive(Clone)]
pub struct QuicSecret([u8; Self::LEN]);

impl fmt::Debug for QuicSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QuicSecret")
    }
}

impl QuicSecret {
    /// The length, bytes.
    pub const LEN: usize = 32;

    /// The secret of an earlier process.
    pub const fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// A new secret, and its bytes, which the caller keeps for the next process.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn random() -> std::io::Result<(Self, [u8; Self::LEN])> {
        let mut bytes = [0; Self::LEN];
        getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
        Ok((Self(bytes), bytes))
    }

    /// The keys of one listener. Listeners must not share keys: a client of one could get resets for
    /// connections of another and end them (RFC 9000 section 21.11).
    pub(super) fn keys(&self, listener: &str) -> Option<Keys> {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"tidegate quic").extract(&self.0);
        let mac = |what: &[u8]| {
            let mut key = [0; Self::LEN];
            let about = [what, listener.as_bytes()];
            prk.expand(&about, SecretLength).ok()?.fill(&mut key).ok()?;
            Some(hmac::Key::new(hmac::HMAC_SHA256, &key))
        };
        let about = [b"token", listener.as_bytes()];
        let token = prk.expand(&about, hkdf::HKDF_SHA256).ok()?;
        Some(Keys {
            reset: Arc::new(mac(b"reset")?),
            ids: Ids(mac(b"connection identifier")?),
            token: Arc::new(hkdf::Prk::from(token)),
        })
    }
}

struct SecretLength;

impl hkdf::KeyType for SecretLength {
    fn len(&self) -> usize {
        QuicSecret::LEN
    }
}

/// The keys of one listener.
pub(super) struct Keys {
    pub reset: Arc<dyn HmacKey>,
    pub token: Arc<dyn HandshakeTokenKey>,
    pub ids: Ids,
}

/// Connection identifiers: random bytes and a check, so that packets with any other identifier are not
/// answered. The library's own check uses a key of the process, so it would silently drop the packets
/// of an earlier process's clients.
#[derive(Clone)]
pub(super) struct Ids(hmac::Key);

const RANDOM_BYTES: usize = 5;
const CHECK_BYTES: usize = 3;

impl Ids {
    fn check(&self, random: &[u8]) -> [u8; CHECK_BYTES] {
        let tag = hmac::sign(&self.0, random);
        let mut check = [0; CHECK_BYTES];
        check.copy_from_slice(&tag.as_ref()[..CHECK_BYTES]);
        check
    }
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; RANDOM_BYTES + CHECK_BYTES];
        // Without randomness identifiers collide, and the library asks for another one.
        let _ = getrandom::fill(&mut id[..RANDOM_BYTES]);
        let check = self.check(&id[..RANDOM_BYTES]);
        id[RANDOM_BYTES..].copy_from_slice(&check);
        ConnectionId::new(&id)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        match id.split_at_checked(RANDOM_BYTES) {
            Some((random, check)) if check == self.check(random) => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        RANDOM_BYTES + CHECK_BYTES
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
    fn keys_depend_on_listener_and_secret() {
        let one = QuicSecret::new([1; 32]);
        let (other, bytes) = QuicSecret::random().expect("randomness");
        assert_eq!(sign(&one, "a"), sign(&QuicSecret::new([1; 32]), "a"));
        assert_ne!(sign(&one, "a"), sign(&one, "b"));
        assert_ne!(sign(&one, "a"), sign(&other, "a"));
        assert_eq!(sign(&other, "a"), sign(&QuicSecret::new(bytes), "a"));
    }

    #[test]
    fn identifiers_are_valid_for_the_same_secret_only() {
        let ids = |n| QuicSecret::new([n; 32]).keys("a").expect("derived").ids;
        let id = ids(1).generate_cid();
        assert_eq!(id.len(), ids(1).cid_len());
        assert_ne!(id[..], ids(1).generate_cid()[..]);
        assert!(ids(1).validate(&id).is_ok());
        assert!(ids(2).validate(&id).is_err());
        assert!(ids(1).validate(&ConnectionId::new(&id[..4])).is_err());
        assert!(ids(1).validate(&ConnectionId::new(b"any junk")).is_err());
    }
}
