//! Who a client is, and which topics it may use.
//!
//! A verified password is remembered as a keyed digest, so that a client that flaps costs no
//! password hashing.

mod acl;
pub(crate) mod passwd;
mod verified;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::config::{Auth, AuthMode, ClientIdRule};
use crate::mqtt::ReasonCode;

pub(crate) use acl::Acl;
pub(crate) use acl::expand;
use verified::{Digest, Recalled, Verified};

/// The principal of every anonymous client. No user can have this name.
pub(crate) const ANONYMOUS: &str = "anonymous";

/// A client, as access rules see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The owner of its sessions, and the name that `who` of a rule matches.
    pub principal: Arc<str>,
    /// Its verified user name, `%u` in a rule; `None` for an anonymous client, even if its CONNECT
    /// has a user name.
    pub username: Option<Arc<str>>,
    /// Its client identifier, `%c` in a rule.
    pub client_id: Arc<str>,
}

impl Identity {
    /// The identity of a verified principal that uses a client identifier.
    pub fn new(principal: Arc<str>, client_id: Arc<str>) -> Self {
        let username = (&*principal != ANONYMOUS).then(|| Arc::clone(&principal));
        Self {
            principal,
            username,
            client_id,
        }
    }

    /// The user name, if it was verified.
    pub fn verified_user(&self) -> Option<&str> {
        (&*self.principal != ANONYMOUS).then_some(self.username.as_deref()?)
    }
}

/// Verifies credentials.
pub struct Authenticator {
    file: Option<PathBuf>,
    client_id: ClientIdRule,
    anonymous: Arc<str>,
    users: RwLock<Users>,
    /// Bounds the threads that hash passwords, and with them the memory: argon2 takes 19 MiB each.
    hashing: Arc<Semaphore>,
    verified: Mutex<Verified>,
}

struct Users {
    /// User name to password hash.
    hashes: HashMap<String, Arc<str>>,
    /// The hash of a random password, verified for an unknown user, so that the time of an answer
    /// does not show which names exist.
    decoy: Arc<str>,
}

impl Authenticator {
    /// Reads the password file, if one is configured.
    ///
    /// # Errors
    /// When the file cannot be read, or a line of it is wrong.
    pub fn new(auth: &Auth) -> Result<Self, passwd::Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            file: auth.file.clone(),
            client_id: auth.client_id,
            anonymous: Arc::from(ANONYMOUS),
            users: RwLock::new(Users::read(auth.file.as_deref())?),
            hashing: Arc::new(Semaphore::new((cores / 2).clamp(1, 8))),
            verified: Mutex::new(Verified::new()),
        })
    }

    /// Reads the password file again, and forgets all verified passwords. Returns the number of
    /// users, or `None` if no password file is configured. Blocks for a password hash.
    ///
    /// # Errors
    /// As [`Authenticator::new`]; the earlier passwords then stay in use.
    pub fn reload(&self) -> Result<Option<usize>, passwd::Error> {
        let Some(file) = self.file.as_deref() else {
            return Ok(None);
        };
        let users = Users::read(Some(file))?;
        let count = users.hashes.len();
        *self.users.write() = users;
        self.verified.lock().forget();
        Ok(Some(count))
    }

    /// The principal of a client, or the reason code of its refusal:
    /// [`ReasonCode::BAD_USER_NAME_OR_PASSWORD`],
    /// [`ReasonCode::CLIENT_IDENTIFIER_NOT_VALID`],
    /// [`ReasonCode::NOT_AUTHORIZED`] without a certificate that names it where
    /// one is needed, or [`ReasonCode::SERVER_UNAVAILABLE`].
    ///
    /// `certificate` is the name in the client's certificate, which the
    /// transport has verified.
    ///
    /// # Errors
    /// The reason code for CONNACK.
    pub async fn verify(
        &self,
        mode: AuthMode,
        client_id: &str,
        username: Option<&str>,
        password: Option<&[u8]>,
        certificate: Option<Arc<str>>,
    ) -> Result<Arc<str>, ReasonCode> {
        let principal = match mode {
            AuthMode::Anonymous => return Ok(Arc::clone(&self.anonymous)),
            AuthMode::File => {
                let (Some(username), Some(password)) = (username, password) else {
                    return Err(ReasonCode::BAD_USER_NAME_OR_PASSWORD);
                };
                self.password(username, password).await?
            }
            // A certificate for "anonymous" must not give access to anonymous clients' sessions.
            AuthMode::Mtls => certificate
                .filter(|name| &**name != ANONYMOUS)
                .ok_or(ReasonCode::NOT_AUTHORIZED)?,
        };
        match self.client_id {
            ClientIdRule::Username if client_id != &*principal => {
                Err(ReasonCode::CLIENT_IDENTIFIER_NOT_VALID)
            }
            _ => Ok(principal),
        }
    }

    async fn password(&self, username: &str, password: &[u8]) -> Result<Arc<str>, ReasonCode> {
        let (hash, known) = self.users.read().hash(username);
        // The digest contains the hash, so a changed password invalidates it.
        let digest = self
            .verified
            .lock()
            .digest(&[username.as_bytes(), hash.as_bytes(), password]);
        if let Some(answer) = self.recall(&digest) {
            return answer;
        }
        let permit = Arc::clone(&self.hashing)
            .acquire_owned()
            .await
            .map_err(|_| ReasonCode::SERVER_UNAVAILABLE)?;
        // Another task may have verified the same password while this one waited.
        if let Some(answer) = self.recall(&digest) {
            return answer;
        }
        let secret = password.to_vec();
        let right = tokio::task::spawn_blocking(move || {
            // The thread keeps the permit, because it outlives a caller that gives up.
            let _permit = permit;
            passwd::verify(&hash, &secret)
        })
        .await
        .map_err(|_| ReasonCode::SERVER_UNAVAILABLE)?;
        let principal = (right && known).then(|| Arc::from(username));
        self.verified
            .lock()
            .remember(digest, principal.clone(), Instant::now());
        principal.ok_or(ReasonCode::BAD_USER_NAME_OR_PASSWORD)
    }

    fn recall(&self, digest: &Digest) -> Option<Result<Arc<str>, ReasonCode>> {
        match self.verified.lock().recall(digest, Instant::now()) {
            Recalled::Right(principal) => Some(Ok(principal)),
            Recalled::Wrong => Some(Err(ReasonCode::BAD_USER_NAME_OR_PASSWORD)),
            Recalled::Unknown => None,
        }
    }
}

impl Users {
    fn read(file: Option<&std::path::Path>) -> Result<Self, passwd::Error> {
        let (hashes, decoy) = match file {
            Some(path) => (
                passwd::read(path)?,
                passwd::hash(&verified::random::<32>())?.into(),
            ),
            None => (HashMap::default(), "".into()),
        };
        Ok(Self { hashes, decoy })
    }

    fn hash(&self, username: &str) -> (Arc<str>, bool) {
        match self.hashes.get(username) {
            Some(hash) => (Arc::clone(hash), true),
            None => (Arc::clone(&self.decoy), false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AclMode;

    /// An authenticator with one user, and its file, which is removed with it.
    struct Setup(Authenticator, PathBuf);
    impl Drop for Setup {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.1);
        }
    }

    fn setup(name: &str, client_id: ClientIdRule) -> Setup {
        let path =
            std::env::temp_dir().join(format!("tidegate-auth-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        passwd::set(&path, "alice", b"secret").expect("written");
        let auth = Auth {
            mode: AuthMode::File,
            file: Some(path.clone()),
            acl: AclMode::Open,
            client_id,
        };
        Setup(Authenticator::new(&auth).expect("read"), path)
    }

    const WRONG: Result<Arc<str>, ReasonCode> = Err(ReasonCode::BAD_USER_NAME_OR_PASSWORD);

    #[tokio::test]
    async fn passwords() {
        let setup = setup("passwords", ClientIdRule::Any);
        let verify = |user, password| setup.0.verify(AuthMode::File, "c", user, password, None);
        assert_eq!(
            verify(Some("alice"), Some(b"secret")).await,
            Ok("alice".into())
        );
        assert_eq!(verify(Some("alice"), Some(b"Secret")).await, WRONG);
        assert_eq!(verify(Some("bob"), Some(b"secret")).await, WRONG);
        assert_eq!(verify(Some("alice"), None).await, WRONG);
        assert_eq!(verify(None, None).await, WRONG);
    }

    #[tokio::test]
    async fn anonymous_clients_need_no_password() {
        let setup = setup("anonymous", ClientIdRule::Any);
        let answer = setup
            .0
            .verify(AuthMode::Anonymous, "c", Some("alice"), Some(b"x"), None)
            .await;
        assert_eq!(answer, Ok(ANONYMOUS.into()));
        assert_eq!(Identity::new(ANONYMOUS.into(), "c".into()).username, None);
    }

    #[tokio::test]
    async fn the_client_id_can_be_bound_to_the_user() {
        let setup = setup("bound", ClientIdRule::Username);
        let verify = |id| {
            setup
                .0
                .verify(AuthMode::File, id, Some("alice"), Some(b"secret"), None)
        };
        assert_eq!(verify("alice").await, Ok("alice".into()));
        for id in ["bob", ""] {
            assert_eq!(
                verify(id).await,
                Err(ReasonCode::CLIENT_IDENTIFIER_NOT_VALID)
            );
        }
    }

    #[tokio::test]
    async fn a_certificate_names_its_holder() {
        let setup = setup("certificate", ClientIdRule::Username);
        let verify = |id, name: Option<&str>| {
            let name = name.map(Arc::from);
            // The user name in CONNECT does not count.
            let user = Some("alice");
            setup.0.verify(AuthMode::Mtls, id, user, None, name)
        };
        assert_eq!(
            verify("device7", Some("device7")).await,
            Ok("device7".into())
        );
        let refused = verify("alice", Some("device7")).await;
        assert_eq!(refused, Err(ReasonCode::CLIENT_IDENTIFIER_NOT_VALID));
        for nobody in [None, Some(ANONYMOUS)] {
            assert_eq!(verify("c", nobody).await, Err(ReasonCode::NOT_AUTHORIZED));
        }
    }

    #[tokio::test]
    async fn a_flap_costs_no_hashing() {
        let setup = setup("flap", ClientIdRule::Any);
        let verify = |password| {
            setup
                .0
                .verify(AuthMode::File, "c", Some("alice"), Some(password), None)
        };
        assert_eq!(verify(b"secret").await, Ok("alice".into()));
        assert_eq!(verify(b"wrong!").await, WRONG);
        // Without a permit, hashing would wait for ever.
        let _all = Arc::clone(&setup.0.hashing)
            .acquire_many_owned(setup.0.hashing.available_permits() as u32)
            .await
            .expect("open");
        for _ in 0..1000 {
            assert_eq!(verify(b"secret").await, Ok("alice".into()));
            assert_eq!(verify(b"wrong!").await, WRONG);
        }
    }

    #[tokio::test]
    async fn a_changed_password_holds_after_a_reload() {
        let setup = setup("reload", ClientIdRule::Any);
        let verify = |password| {
            setup
                .0
                .verify(AuthMode::File, "c", Some("alice"), Some(password), None)
        };
        assert_eq!(verify(b"secret").await, Ok("alice".into()));
        passwd::set(&setup.1, "alice", b"new").expect("written");
        assert_eq!(setup.0.reload().expect("read"), Some(1));
        assert_eq!(verify(b"secret").await, WRONG);
        assert_eq!(verify(b"new").await, Ok("alice".into()));
        std::fs::write(&setup.1, "broken").expect("written");
        assert!(setup.0.reload().is_err());
        assert_eq!(verify(b"new").await, Ok("alice".into()));
    }
}
