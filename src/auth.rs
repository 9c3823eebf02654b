//! Authentication of clients, and access rules for their topics.
//!
//! A verified password is remembered as a keyed digest, so that a client's flap needs no password hashing.

mod acl;
pub(crate) mod passwd;
mod verified;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;

use crate::config::{Auth, AuthMode, ClientIdRule};
use crate::shares::Shares;

pub(crate) use acl::Acl;
pub(crate) use acl::expand;
use verified::{Digest, Recalled, Verified};

/// The principal of every anonymous client. No user can have this name.
pub(crate) const ANONYMOUS: &str = "anonymous";
/// Prefix of the name of a certificate where a user of the password file has the same name, or where
/// the name begins with this prefix. No user can have a colon in its name.
const CERTIFICATE: &str = "cert:";
/// Prefix of the name in the owner of a certificate's sessions. No user can have a control character
/// in its name.
const CERTIFICATE_OWNER: &str = "cert\0";

/// The verified identity of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Principal {
    /// The name that `who` of a rule matches, and `%u`.
    pub name: Arc<str>,
    /// The owner of its sessions. A user and a certificate of one name are two owners.
    pub owner: Arc<str>,
}

impl Principal {
    /// A principal that owns its sessions by its name.
    fn user(name: Arc<str>) -> Self {
        Self {
            owner: name.clone(),
            name,
        }
    }
}

/// The name of a session's owner for people, and whether a certificate stated it.
pub(crate) fn owner_name(owner: &str) -> (&str, bool) {
    match owner.strip_prefix(CERTIFICATE_OWNER) {
        Some(name) => (name, true),
        None => (owner, false),
    }
}

/// A client, as access rules see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The owner of its sessions, and the name that `who` of a rule matches.
    pub principal: Arc<str>,
    /// Its client identifier, `%c` in a rule.
    pub client_id: Arc<str>,
}

impl Identity {
    /// The identity of a verified principal that uses a client identifier.
    pub fn new(principal: Arc<str>, client_id: Arc<str>) -> Self {
        Self {
            principal,
            client_id,
        }
    }

    /// The verified user name, `%u` in a rule. `None` for an anonymous client, even if its CONNECT has a
    /// user name.
    pub fn verified_user(&self) -> Option<&str> {
        (&*self.principal != ANONYMOUS).then_some(&*self.principal)
    }
}

/// The reason why a client is denied access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The user name or the password is missing or wrong.
    #[error("the user name or the password is wrong")]
    Credentials,
    /// `auth.client_id` binds the client identifier to the principal, and CONNECT has another one.
    #[error(
        "auth.client_id = \"username\": the client identifier must be the user name, or the name in \
         the certificate"
    )]
    ClientId,
    /// The listener needs a certificate that names the client, and the client gave none.
    #[error("no certificate that names the client")]
    Certificate,
    /// The password cannot be verified at the moment.
    #[error("too many passwords to verify at once")]
    Busy,
}

/// Verifies credentials.
pub struct Authenticator {
    file: Option<PathBuf>,
    client_id: ClientIdRule,
    /// A certificate and the user of its name are one principal.
    certificate_users: bool,
    anonymous: Arc<str>,
    users: RwLock<Users>,
    /// Bounds the threads that hash passwords, and with them the memory: argon2 takes 19 MiB each, and
    /// at most [`passwd::MEMORY_MAX_KIB`].
    hashing: Arc<Shares>,
    verified: Mutex<Verified>,
}

/// The users of a password file.
pub(crate) struct Users {
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
    /// The file cannot be read, or a line has the wrong form.
    pub fn new(auth: &Auth) -> Result<Self, passwd::Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            file: auth.file.clone(),
            client_id: auth.client_id,
            certificate_users: auth.certificate_users,
            anonymous: Arc::from(ANONYMOUS),
            users: RwLock::new(Users::read(auth.file.as_deref())?),
            hashing: Arc::new(Shares::new((cores / 2).clamp(1, 8))),
            verified: Mutex::new(Verified::new()),
        })
    }

    /// Reads the password file again, without using it yet. `None`: none is configured. Blocks for a
    /// password hash.
    ///
    /// # Errors
    /// As [`Authenticator::new`].
    pub(crate) fn read_again(&self) -> Result<Option<Users>, passwd::Error> {
        let file = self.file.as_deref();
        file.map(|file| Users::read(Some(file))).transpose()
    }

    /// Uses another password file from now on, and forgets all verified passwords. Returns the users
    /// that the earlier one had and this one has not.
    pub(crate) fn replace(&self, users: Users) -> HashSet<String> {
        let mut current = self.users.write();
        let earlier = std::mem::replace(&mut *current, users);
        self.verified.lock().forget();
        let gone = earlier.hashes.into_keys();
        gone.filter(|name| !current.hashes.contains_key(name))
            .collect()
    }

    /// The principal of a client at `from`. `certificate` is the name in its certificate, which the
    /// transport has verified. A check that still waits for its turn ends when the future is dropped.
    ///
    /// # Errors
    /// See [`Denial`].
    pub(crate) async fn verify(
        &self,
        mode: AuthMode,
        client_id: &str,
        (username, password): (Option<&str>, Option<&[u8]>),
        certificate: Option<Arc<str>>,
        from: SocketAddr,
    ) -> Result<Principal, Denial> {
        let (name, principal) = match mode {
            AuthMode::Anonymous => return Ok(Principal::user(Arc::clone(&self.anonymous))),
            AuthMode::File => {
                let (Some(username), Some(password)) = (username, password) else {
                    return Err(Denial::Credentials);
                };
                let name = self.password(username, password, from).await?;
                (name.clone(), Principal::user(name))
            }
            // A certificate for "anonymous" must not give access to anonymous clients' sessions.
            AuthMode::Mtls => {
                let name = certificate
                    .filter(|name| &**name != ANONYMOUS)
                    .ok_or(Denial::Certificate)?;
                (name.clone(), self.of_certificate(name))
            }
        };
        match self.client_id {
            ClientIdRule::Username if client_id != &*name => Err(Denial::ClientId),
            _ => Ok(principal),
        }
    }

    /// Whether a principal that was verified may still connect: a password file without its user may have
    /// been read since.
    pub(crate) fn still_knows(&self, mode: AuthMode, principal: &str) -> bool {
        mode != AuthMode::File || self.users.read().is_user(principal)
    }

    /// The principal of a certificate. It is another one than the user of the same name, unless the
    /// configuration makes both one.
    fn of_certificate(&self, name: Arc<str>) -> Principal {
        if self.certificate_users {
            return Principal::user(name);
        }
        let owner = format!("{CERTIFICATE_OWNER}{name}").into();
        let is_taken = name.starts_with(CERTIFICATE) || self.users.read().is_user(&name);
        let name = match is_taken {
            true => format!("{CERTIFICATE}{name}").into(),
            false => name,
        };
        Principal { name, owner }
    }

    async fn password(
        &self,
        username: &str,
        password: &[u8],
        from: SocketAddr,
    ) -> Result<Arc<str>, Denial> {
        let (hash, known) = self.users.read().hash(username);
        // The digest contains the hash, so a changed password invalidates it.
        let digest = self
            .verified
            .lock()
            .digest(&[username.as_bytes(), hash.as_bytes(), password]);
        if let Some(answer) = self.recall(&digest) {
            return answer;
        }
        let permit = self.hashing.acquire(from).await;
        // Another task may have verified the same password while this one waited.
        if let Some(answer) = self.recall(&digest) {
            return answer;
        }
        let (secret, checked) = (password.to_vec(), hash.clone());
        let right = tokio::task::spawn_blocking(move || {
            // The thread keeps the permit, because it outlives a caller that gives up.
            let _permit = permit;
            passwd::verify(&checked, &secret)
        })
        .await
        .map_err(|_| Denial::Busy)?;
        // The password file may have been replaced meanwhile.
        let right = right && known && self.users.read().hash(username) == (hash, true);
        let principal = right.then(|| Arc::from(username));
        self.verified
            .lock()
            .remember(digest, principal.clone(), Instant::now());
        principal.ok_or(Denial::Credentials)
    }

    fn recall(&self, digest: &Digest) -> Option<Result<Arc<str>, Denial>> {
        match self.verified.lock().recall(digest, Instant::now()) {
            Recalled::Right(principal) => Some(Ok(principal)),
            Recalled::Wrong => Some(Err(Denial::Credentials)),
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

    /// The number of users.
    pub(crate) fn count(&self) -> usize {
        self.hashes.len()
    }

    fn is_user(&self, name: &str) -> bool {
        self.hashes.contains_key(name)
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
    use crate::config::{AclMode, ResponseTopicRule};
    use crate::shares::{SharePermit, at};

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
            certificate_users: false,
            response_topic: ResponseTopicRule::Remove,
        };
        Setup(Authenticator::new(&auth).expect("read"), path)
    }

    impl Setup {
        /// The name of the principal that the credentials lead to, for a client at 192.0.2.1.
        async fn verify(
            &self,
            mode: AuthMode,
            id: &str,
            user: Option<&str>,
            password: Option<&[u8]>,
            certificate: Option<&str>,
        ) -> Result<Arc<str>, Denial> {
            let (credentials, certificate) = ((user, password), certificate.map(Arc::from));
            let from = at("192.0.2.1");
            let verified = self
                .0
                .verify(mode, id, credentials, certificate, from)
                .await;
            verified.map(|principal| principal.name)
        }
    }

    impl Setup {
        /// All permits for hashing: no password can be hashed while they are kept.
        fn all_permits(&self) -> Vec<SharePermit> {
            let networks = (0..=u8::MAX).map(|network| at(&format!("192.0.{network}.1")));
            let of = |from| std::iter::from_fn(move || self.0.hashing.try_acquire(from));
            networks.flat_map(of).collect()
        }
    }

    const WRONG: Result<Arc<str>, Denial> = Err(Denial::Credentials);

    #[tokio::test]
    async fn passwords() {
        let setup = setup("passwords", ClientIdRule::Any);
        let verify = |user, password| setup.verify(AuthMode::File, "c", user, password, None);
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
            .verify(AuthMode::Anonymous, "c", Some("alice"), Some(b"x"), None)
            .await;
        assert_eq!(answer, Ok(ANONYMOUS.into()));
        let anonymous = Identity::new(ANONYMOUS.into(), "c".into());
        assert_eq!(anonymous.verified_user(), None);
    }

    #[tokio::test]
    async fn the_client_id_can_be_bound_to_the_user() {
        let setup = setup("bound", ClientIdRule::Username);
        let verify = |id| setup.verify(AuthMode::File, id, Some("alice"), Some(b"secret"), None);
        assert_eq!(verify("alice").await, Ok("alice".into()));
        for id in ["bob", ""] {
            assert_eq!(verify(id).await, Err(Denial::ClientId));
        }
    }

    #[tokio::test]
    async fn a_certificate_names_its_holder() {
        let setup = setup("certificate", ClientIdRule::Username);
        let verify = |id, name: Option<&'static str>| {
            // The user name in CONNECT does not count.
            let user = Some("alice");
            setup.verify(AuthMode::Mtls, id, user, None, name)
        };
        assert_eq!(
            verify("device7", Some("device7")).await,
            Ok("device7".into())
        );
        let refused = verify("alice", Some("device7")).await;
        assert_eq!(refused, Err(Denial::ClientId));
        for nobody in [None, Some(ANONYMOUS)] {
            assert_eq!(verify("c", nobody).await, Err(Denial::Certificate));
        }
    }

    #[tokio::test]
    async fn a_flap_costs_no_hashing() {
        let setup = setup("flap", ClientIdRule::Any);
        let verify =
            |password| setup.verify(AuthMode::File, "c", Some("alice"), Some(password), None);
        assert_eq!(verify(b"secret").await, Ok("alice".into()));
        assert_eq!(verify(b"wrong!").await, WRONG);
        // Without a permit, hashing would wait for ever.
        let _kept = setup.all_permits();
        for _ in 0..1000 {
            assert_eq!(verify(b"secret").await, Ok("alice".into()));
            assert_eq!(verify(b"wrong!").await, WRONG);
        }
    }

    #[tokio::test]
    async fn a_changed_password_holds_after_a_reload() {
        let setup = setup("reload", ClientIdRule::Any);
        let verify =
            |password| setup.verify(AuthMode::File, "c", Some("alice"), Some(password), None);
        assert_eq!(verify(b"secret").await, Ok("alice".into()));
        passwd::set(&setup.1, "alice", b"new").expect("written");
        let again = setup.0.read_again().expect("read").expect("a file");
        assert_eq!(again.count(), 1);
        assert!(setup.0.replace(again).is_empty());
        assert_eq!(verify(b"secret").await, WRONG);
        assert_eq!(verify(b"new").await, Ok("alice".into()));
        std::fs::write(&setup.1, "broken").expect("written");
        assert!(setup.0.read_again().is_err());
        assert_eq!(verify(b"new").await, Ok("alice".into()));
    }

    #[tokio::test]
    async fn a_removed_user_is_named() {
        let setup = setup("removed", ClientIdRule::Any);
        passwd::set(&setup.1, "bob", b"x").expect("written");
        setup
            .0
            .replace(setup.0.read_again().expect("read").expect("a file"));
        std::fs::write(&setup.1, "# nobody\n").expect("written");
        passwd::set(&setup.1, "bob", b"x").expect("written");
        let again = setup.0.read_again().expect("read").expect("a file");
        assert_eq!(setup.0.replace(again), ["alice".to_owned()].into());
    }

    #[tokio::test]
    async fn a_user_who_is_removed_while_the_password_is_checked_is_refused() {
        let setup = setup("meanwhile", ClientIdRule::Any);
        let kept = setup.all_permits();
        let password = Some(&b"secret"[..]);
        let check = setup.verify(AuthMode::File, "c", Some("alice"), password, None);
        let mut check = std::pin::pin!(check);
        assert!(futures_util::poll!(&mut check).is_pending(), "it waits");
        std::fs::write(&setup.1, "# nobody\n").expect("written");
        let again = setup.0.read_again().expect("read").expect("a file");
        assert_eq!(setup.0.replace(again), ["alice".to_owned()].into());
        drop(kept);
        assert_eq!(check.await, WRONG);
    }

    #[tokio::test]
    async fn a_user_and_a_certificate_of_one_name_are_two_principals() {
        let mut setup = setup("two", ClientIdRule::Any);
        let credentials = (Some("alice"), Some(&b"secret"[..]));
        let from = at("192.0.2.1");
        let user = setup.0.verify(AuthMode::File, "c", credentials, None, from);
        let user = user.await.expect("right");
        let certificate = |name: &str| setup.0.of_certificate(name.into());
        let alice = certificate("alice");
        assert!(user.name != alice.name && user.owner != alice.owner);
        assert_eq!(&*alice.name, "cert:alice");
        assert_eq!(owner_name(&alice.owner), ("alice", true));
        assert_eq!(owner_name(&user.owner), ("alice", false));
        // Nobody else has the name, so rules need no other one.
        let device = certificate("device7");
        assert_eq!(&*device.name, "device7");
        // A user who is added later gets no session of the certificate.
        assert_eq!(owner_name(&device.owner), ("device7", true));
        // Nor does a certificate with the name that rules give to another one.
        assert_eq!(&*certificate("cert:alice").name, "cert:cert:alice");
        setup.0.certificate_users = true;
        assert_eq!(setup.0.of_certificate("alice".into()), user);
    }

    #[tokio::test]
    async fn one_network_does_not_keep_the_others_from_their_passwords() {
        let setup = setup("shares", ClientIdRule::Any);
        let check = |user: &'static str, from| {
            let credentials = (Some(user), Some(&b"secret"[..]));
            setup.0.verify(AuthMode::File, "c", credentials, None, from)
        };
        let flood = at("192.0.2.1");
        let names: Vec<&'static str> = (0..2000)
            .map(|n| &*Box::leak(format!("u{n}").into_boxed_str()))
            .collect();
        let mut waiting: Vec<_> = names
            .iter()
            .map(|name| Box::pin(check(name, flood)))
            .collect();
        for one in &mut waiting {
            assert!(futures_util::poll!(one).is_pending());
        }
        let began = Instant::now();
        let answer = check("alice", at("192.0.2.2")).await;
        assert_eq!(answer.expect("right").name, "alice".into());
        // Two thousand hashes take a minute; this one waits behind the running ones.
        assert!(began.elapsed() < std::time::Duration::from_secs(5));
        // Checks that still wait end with their clients.
        drop(waiting);
        let last = check("nobody", flood).await;
        assert_eq!(last, Err(Denial::Credentials));
        assert!(began.elapsed() < std::time::Duration::from_secs(10));
    }
}
