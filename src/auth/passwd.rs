//! The password file. Each user has a line `user:$argon2id$...`. Empty lines and lines that begin with `#`
//! are ignored, and kept when the file is written.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use argon2::password_hash::{PasswordHash, PasswordHasher as _, PasswordVerifier as _, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};

use crate::auth::ANONYMOUS;
use crate::config::files;

/// The most memory that a hash may ask for, in KiB: as much as RFC 9106 section 4 recommends for a
/// machine with little of it.
pub(crate) const MEMORY_MAX_KIB: u32 = 64 * 1024;
/// The most passes over that memory.
const PASSES_MAX: u32 = 16;
/// The highest degree of parallelism (RFC 9106 section 3.1). It costs time, because one thread does all of it.
const PARALLELISM_MAX: u32 = 16;

/// A fault of a password file, or of an entry that is to be written to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A line has the wrong form.
    #[error("{}:{line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The mistake, and the allowed form.
        message: String,
    },
    /// The user name is not allowed.
    #[error("{0:?} is no user name: {1}")]
    User(String, &'static str),
    /// The hash failed.
    #[error("argon2: {0}")]
    Hash(argon2::password_hash::Error),
}

/// Reads all users and their hashes.
///
/// # Errors
/// The file cannot be read, or a line has the wrong form.
pub(crate) fn read(path: &Path) -> Result<HashMap<String, Arc<str>>, Error> {
    let text = files::read_text(path).map_err(|source| io(path, source))?;
    // The names come from outside, so the standard library's keyed hasher is right here.
    let mut users = HashMap::default();
    for (i, line) in text.lines().enumerate() {
        let wrong = |message: String| Error::Line {
            path: path.to_owned(),
            line: i + 1,
            message,
        };
        let Some((user, hash)) = entry(line) else {
            if is_ignored(line) {
                continue;
            }
            return Err(wrong(
                "not \"user:$argon2id$...\"; `tidegate passwd` writes it".to_owned(),
            ));
        };
        check_user(user).map_err(|e| wrong(e.to_string()))?;
        if let Err(why) = check_hash(hash) {
            return Err(wrong(format!("the hash of {user:?} {why}")));
        }
        if users.insert(user.to_owned(), Arc::from(hash)).is_some() {
            return Err(wrong(format!("{user:?} is there twice")));
        }
    }
    Ok(users)
}

/// Writes a user's password: it adds a line, or replaces the user's line. A missing file is created with
/// access for its owner only. The whole file is replaced at once.
///
/// # Errors
/// The name is not allowed, or the file cannot be read or written.
pub(crate) fn set(path: &Path, user: &str, password: &[u8]) -> Result<(), Error> {
    check_user(user)?;
    let line = format!("{user}:{}", hash(password)?);
    let text = match files::read_text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(io(path, error)),
    };
    let mut lines: Vec<&str> = text.lines().collect();
    match lines
        .iter()
        .position(|l| entry(l).is_some_and(|(u, _)| u == user))
    {
        Some(i) => lines[i] = &line,
        None => lines.push(&line),
    }
    replace(path, &(lines.join("\n") + "\n")).map_err(|source| io(path, source))
}

/// Hashes a password with argon2id and a random salt.
///
/// # Errors
/// The password is longer than argon2 accepts.
pub(crate) fn hash(password: &[u8]) -> Result<String, Error> {
    let salt =
        SaltString::encode_b64(&crate::auth::verified::random::<16>()).map_err(Error::Hash)?;
    let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::DEFAULT);
    let hash = argon.hash_password(password, &salt).map_err(Error::Hash)?;
    Ok(hash.to_string())
}

/// Whether a hash was made from this password. The check takes tens of milliseconds of processor time.
pub(crate) fn verify(hash: &str, password: &[u8]) -> bool {
    PasswordHash::new(hash)
        .is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
}

/// Whether a hash can be verified, within bounds: whoever tries a password makes this process spend the
/// memory and time that the hash asks for.
fn check_hash(hash: &str) -> Result<(), String> {
    const NOT_ARGON2: &str = "is not an argon2 hash";
    let parsed = PasswordHash::new(hash).map_err(|_| NOT_ARGON2)?;
    if !parsed.algorithm.as_str().starts_with("argon2") {
        return Err(NOT_ARGON2.to_owned());
    }
    let params = Params::try_from(&parsed).map_err(|e| format!("cannot be verified: {e}"))?;
    for (what, value, most) in [
        ("KiB of memory (m)", params.m_cost(), MEMORY_MAX_KIB),
        ("passes (t)", params.t_cost(), PASSES_MAX),
        ("as parallelism (p)", params.p_cost(), PARALLELISM_MAX),
    ] {
        if value > most {
            return Err(format!(
                "asks for {value} {what}; allowed are {most}: `tidegate passwd` makes a new one"
            ));
        }
    }
    Ok(())
}

fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io {
        path: path.to_owned(),
        source,
    }
}

fn is_ignored(line: &str) -> bool {
    line.trim().is_empty() || line.starts_with('#')
}

fn entry(line: &str) -> Option<(&str, &str)> {
    if is_ignored(line) {
        return None;
    }
    line.trim_end().split_once(':')
}

fn check_user(user: &str) -> Result<(), Error> {
    let why = if user.is_empty() || user.len() > 256 {
        "allowed are 1 to 256 bytes"
    } else if user == ANONYMOUS {
        "it stands for clients without one"
    } else if user.starts_with('#') || user.trim() != user {
        "it must not begin with # or have space at its ends"
    } else if user.chars().any(|c| c == ':' || c.is_control()) {
        "it must have no : and no control characters"
    } else {
        return Ok(());
    };
    Err(Error::User(user.to_owned(), why))
}

/// Writes a temporary file in the same folder and renames it, so that no reader sees half of the file.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let mode = std::fs::metadata(path).map_or(0o600, |m| m.permissions().mode() & 0o777);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let beside = path.with_file_name(name);
    let write = || {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&beside);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tidegate-pw-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn round_trip() {
        use std::os::unix::fs::PermissionsExt as _;
        let path = temp("round");
        set(&path, "alice", b"one").expect("written");
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).expect("text");
        std::fs::write(&path, format!("# people\n\n{text}")).expect("written");
        set(&path, "bob", b"two").expect("written");
        set(&path, "alice", b"three").expect("written");
        let users = read(&path).expect("read");
        assert_eq!(users.len(), 2);
        assert!(verify(&users["alice"], b"three"));
        assert!(!verify(&users["alice"], b"one"));
        assert!(verify(&users["bob"], b"two"));
        let text = std::fs::read_to_string(&path).expect("text");
        assert!(
            text.starts_with("# people\n\nalice:$argon2id$v=19$"),
            "{text}"
        );
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn wrong_lines_are_named() {
        let path = temp("wrong");
        let good = hash(b"x").expect("hash");
        for (text, line, part) in [
            ("alice\n".to_owned(), 1, "not \"user:"),
            ("#\n\nalice:secret\n".to_owned(), 3, "not an argon2 hash"),
            (format!("a:{good}\na:{good}\n"), 2, "there twice"),
            (format!("anonymous:{good}\n"), 1, "stands for"),
            (format!(":{good}\n"), 1, "1 to 256"),
        ] {
            std::fs::write(&path, &text).expect("written");
            let error = read(&path).expect_err("wrong").to_string();
            let start = format!("{}:{line}: ", path.display());
            assert!(
                error.starts_with(&start) && error.contains(part),
                "{text}: {error}"
            );
        }
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn a_byte_order_mark_hides_no_user() {
        let path = temp("bom");
        set(&path, "alice", b"one").expect("written");
        let text = std::fs::read_to_string(&path).expect("text");
        std::fs::write(&path, format!("\u{feff}{text}")).expect("written");
        assert!(verify(&read(&path).expect("read")["alice"], b"one"));
        set(&path, "alice", b"two").expect("written");
        let users = read(&path).expect("read");
        assert!(users.len() == 1 && verify(&users["alice"], b"two"));
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn what_a_hash_may_cost_is_bounded() {
        let path = temp("costs");
        let good = hash(b"x").expect("hash");
        let at = |m: u32, t: u32, p: u32| {
            let costs = format!("$m={m},t={t},p={p}$");
            assert!(good.contains("$m=19456,t=2,p=1$"), "{good}");
            let hash = good.replace("$m=19456,t=2,p=1$", &costs);
            std::fs::write(&path, format!("alice:{hash}\n")).expect("written");
            read(&path)
        };
        assert!(at(64 * 1024, 16, 16).is_ok());
        for (m, t, p, why) in [
            (64 * 1024 + 1, 1, 1, "65537 KiB of memory (m)"),
            (1024 * 1024, 2, 1, "1048576 KiB of memory (m)"),
            (1024, 17, 1, "17 passes (t)"),
            (1024, 1, 17, "17 as parallelism (p)"),
            (1, 1, 1, "cannot be verified"),
        ] {
            let error = at(m, t, p).expect_err("refused").to_string();
            assert!(error.contains(":1: ") && error.contains(why), "{error}");
        }
        std::fs::remove_file(&path).expect("removed");
    }

    #[test]
    fn names_that_no_user_can_have() {
        let path = temp("names");
        for name in ["", "anonymous", "a:b", "#a", " a", "a\n"] {
            assert!(
                matches!(set(&path, name, b"x"), Err(Error::User(..))),
                "{name:?}"
            );
        }
        assert!(!path.exists());
    }
}
