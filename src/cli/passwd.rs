//! `tidegate passwd FILE USER`.

use std::io::{self, BufRead, IsTerminal as _, Write as _};
use std::path::Path;

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::auth::passwd::{self, Error};
use crate::config::files;

use crate::cli::{EXIT_INTERNAL, EXIT_USAGE, Failure};

/// Longest password that CONNECT can carry (MQTT 5 §1.5.6).
const PASSWORD_MAX_BYTES: usize = 65535;

/// Reads a password from the terminal or standard input, and writes its hash to a password file.
///
/// # Errors
/// [`EXIT_USAGE`] for a password or user name that is not allowed or a damaged file,
/// [`EXIT_INTERNAL`] for a file that cannot be written.
pub fn set_password(file: &Path, user: &str) -> Result<(), Failure> {
    let stdin = io::stdin();
    let password = if stdin.is_terminal() {
        ask(user)
    } else {
        first_line(&mut stdin.lock())
    }
    .map_err(|e| Failure::new(EXIT_USAGE, format!("password: {e}")))?;
    store(file, user, &password)
}

fn store(file: &Path, user: &str, password: &[u8]) -> Result<(), Failure> {
    if password.is_empty() {
        return Err(Failure::new(EXIT_USAGE, "password: it must not be empty"));
    }
    passwd::set(file, user, password).map_err(|error| {
        let code = match error {
            Error::User(..) | Error::Line { .. } => EXIT_USAGE,
            _ => EXIT_INTERNAL,
        };
        Failure::new(code, error)
    })
}

/// Asks twice, without echo.
fn ask(user: &str) -> io::Result<Vec<u8>> {
    let hidden = Hidden::new()?;
    let mut answers = Vec::new();
    for prompt in [format!("Password for {user}: "), "Again: ".to_owned()] {
        let mut terminal = io::stderr();
        terminal.write_all(prompt.as_bytes())?;
        answers.push(first_line(&mut io::stdin().lock())?);
        terminal.write_all(b"\n")?;
    }
    drop(hidden);
    if answers[0] != answers[1] {
        return Err(io::Error::other("the two are not the same"));
    }
    Ok(answers.swap_remove(0))
}

/// The first line without its end, and without a byte order mark.
fn first_line(input: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut limited = io::Read::take(input, PASSWORD_MAX_BYTES as u64 + 2);
    limited.read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
    }
    let line = files::without_bom(&line).to_vec();
    if line.len() > PASSWORD_MAX_BYTES {
        return Err(io::Error::other("longer than 65535 bytes"));
    }
    Ok(line)
}

/// A terminal that does not echo, until it is dropped.
struct Hidden(Termios);

impl Hidden {
    fn new() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that went away.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_is_the_password() {
        let line = |text: &[u8]| first_line(&mut io::Cursor::new(text.to_vec()));
        assert_eq!(line(b"secret\nmore").unwrap(), b"secret");
        assert_eq!(line(b"secret\r\n").unwrap(), b"secret");
        assert_eq!(line(b" a b ").unwrap(), b" a b ");
        assert_eq!(line(b"\xef\xbb\xbfsecret\r\n").unwrap(), b"secret");
        assert_eq!(line(b"").unwrap(), b"");
        assert_eq!(
            line(&[b'x'; PASSWORD_MAX_BYTES]).unwrap().len(),
            PASSWORD_MAX_BYTES
        );
        assert!(line(&[b'x'; PASSWORD_MAX_BYTES + 1]).is_err());
        assert!(line(&[b'x'; PASSWORD_MAX_BYTES * 3]).is_err());
    }

    #[test]
    fn failures_have_their_codes() {
        let dir = std::env::temp_dir();
        let path = dir.join(format!("tidegate-cli-passwd-{}", std::process::id()));
        let code = |result: Result<(), Failure>| result.map_err(|f| f.code);
        assert_eq!(code(store(&path, "alice", b"")), Err(EXIT_USAGE));
        assert_eq!(code(store(&path, "a:b", b"x")), Err(EXIT_USAGE));
        assert_eq!(
            code(store(&dir.join("none/x"), "a", b"x")),
            Err(EXIT_INTERNAL)
        );
        assert_eq!(code(store(&path, "alice", b"x")), Ok(()));
        let users = passwd::read(&path).expect("read");
        std::fs::remove_file(&path).expect("removed");
        assert!(passwd::verify(&users["alice"], b"x"));
    }
}
