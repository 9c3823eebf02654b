//! The name of a session.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// Stands between the two parts. Neither a client identifier nor a mount can contain it
/// [MQTT-1.5.4-2].
const SEPARATOR: char = '\0';

/// The name of a session: a client identifier, and the mount of the listener where its client connects.
/// The same client identifier behind two mounts is two sessions.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionKey(Arc<str>);

impl SessionKey {
    /// The key of a client identifier behind a mount, which is empty for a listener without one.
    pub fn new(client_id: &Arc<str>, mount: &str) -> Self {
        Self(match mount {
            "" => client_id.clone(),
            mount => format!("{client_id}{SEPARATOR}{mount}").into(),
        })
    }

    /// The client identifier.
    pub fn client_id(&self) -> &str {
        let parts = self.0.split_once(SEPARATOR);
        parts.map_or(&self.0, |(client_id, _)| client_id)
    }

    /// The mount.
    pub fn mount(&self) -> &str {
        let parts = self.0.split_once(SEPARATOR);
        parts.map_or("", |(_, mount)| mount)
    }

    /// Both parts as one text. Keys are in its order: by client identifiers, and then by mounts.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for SessionKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} below {:?}", self.client_id(), self.mount())
    }
}

impl From<&str> for SessionKey {
    /// The key of a client identifier without a mount.
    fn from(client_id: &str) -> Self {
        Self(client_id.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_makes_another_key() {
        let id: Arc<str> = "phone".into();
        let keys = ["", "a/", "b/"].map(|mount| SessionKey::new(&id, mount));
        for (key, mount) in keys.iter().zip(["", "a/", "b/"]) {
            assert_eq!((key.client_id(), key.mount()), ("phone", mount));
        }
        assert!(keys[0] < keys[1] && keys[1] < keys[2] && keys[2] < "phone2".into());
        assert_eq!(keys[0], "phone".into());
    }
}
