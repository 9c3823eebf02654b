//! The secret of the QUIC listeners, kept in `node.data_dir` over restarts.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use blake2::Digest;

use crate::config::files;
use crate::transport::QuicSecret;

/// The file's name in the directory.
const NAME: &str = "quic.key";
/// The first word of its one line. The secret and a check sum follow, in hexadecimal.
const HEAD: &str = "tidegate-quic-key-1";
const CHECK_SUM_BYTES: usize = 4;

/// Reads the secret of an earlier process, or makes a new one. Without the earlier secret, clients of
/// that process notice only by their idle time-out that it is gone.
pub(super) fn load(dir: &Path) -> io::Result<QuicSecret> {
    let file = dir.join(NAME);
    match read(&file) {
        Ok(Ok(secret)) => return Ok(secret),
        Ok(Err(why)) => {
            let aside = dir.join("quic.key.damaged");
            tracing::warn!(
                file = %file.display(),
                kept_as = %aside.display(),
                "The QUIC key is damaged ({why}): a new one takes its place, and clients of the \
                 process before learn by their idle time-out that it is gone"
            );
            let _ = fs::rename(&file, aside);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            not_kept(&file, &error);
            return Ok(QuicSecret::random()?.0);
        }
    }
    let (secret, bytes) = QuicSecret::random()?;
    match write(dir, &file, &bytes) {
        Ok(()) => tracing::info!(file = %file.display(), "New QUIC key"),
        Err(error) => not_kept(&file, &error),
    }
    Ok(secret)
}

fn not_kept(file: &Path, error: &io::Error) {
    tracing::warn!(
        file = %file.display(),
        "The QUIC key cannot be kept ({error}): after a restart clients learn by their idle \
         time-out that this process is gone; make node.data_dir writable"
    );
}

fn read(file: &Path) -> io::Result<Result<QuicSecret, &'static str>> {
    let text = match files::read_text(file) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Ok(Err("it is not text"));
        }
        other => other?,
    };
    if fs::metadata(file)?.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            file = %file.display(),
            "Others than the owner may read or change the QUIC key: chmod 600"
        );
    }
    Ok(parse(&text))
}

fn parse(text: &str) -> Result<QuicSecret, &'static str> {
    let mut words = text.split_whitespace();
    if words.next() != Some(HEAD) {
        return Err("its first word is wrong");
    }
    let mut bytes = || words.next().and_then(unhex).unwrap_or_default();
    let (secret, check_sum) = (bytes(), bytes());
    let secret: [u8; QuicSecret::LEN] = secret.try_into().map_err(|_| "its length is wrong")?;
    match check_sum == check(&secret) {
        true => Ok(QuicSecret::new(secret)),
        false => Err("its check sum is wrong"),
    }
}

/// Writes a new file and renames it, so that a reader never sees half of a secret.
fn write(dir: &Path, file: &Path, secret: &[u8]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let line = format!("{HEAD} {} {}\n", hex(secret), hex(&check(secret)));
    let fresh: PathBuf = dir.join(format!("{NAME}.{}", std::process::id()));
    let result = write_new(&fresh, &line)
        .and_then(|()| fs::rename(&fresh, file))
        .and_then(|()| File::open(dir)?.sync_all());
    if result.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    result
}

fn write_new(file: &Path, line: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut out = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)?;
    out.write_all(line.as_bytes())?;
    out.sync_all()
}

fn check(secret: &[u8]) -> Vec<u8> {
    let sum = blake2::Blake2s256::digest(secret);
    sum[..CHECK_SUM_BYTES].to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.len()
        .is_multiple_of(2)
        .then(|| digits.map(byte).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let name = format!("tidegate-secret-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&dir);
            Self(dir)
        }

        fn text(&self) -> String {
            fs::read_to_string(self.0.join(NAME)).expect("is there")
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_second_start_finds_what_the_first_kept() {
        let dir = Dir::new("kept");
        load(&dir.0).expect("made");
        let first = dir.text();
        let mode = fs::metadata(dir.0.join(NAME))
            .expect("is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        load(&dir.0).expect("read");
        assert_eq!(dir.text(), first);
        assert_eq!(fs::read_dir(&dir.0).expect("a directory").count(), 1);
    }

    #[test]
    fn a_damaged_file_is_told_set_aside_and_replaced() {
        let dir = Dir::new("damaged");
        load(&dir.0).expect("made");
        let good = dir.text();
        let flipped = good.replace(HEAD, &format!("{HEAD} 0"));
        for bad in ["", "junk", &good[..50], &flipped, "\u{0}"] {
            fs::write(dir.0.join(NAME), bad).expect("written");
            assert!(parse(bad).is_err(), "{bad:?}");
            load(&dir.0).expect("replaced");
            assert!(parse(&dir.text()).is_ok());
            let aside = fs::read_to_string(dir.0.join("quic.key.damaged"));
            assert_eq!(aside.expect("kept"), bad);
        }
        assert!(parse(&good).is_ok());
        let mut digits: Vec<char> = good.chars().collect();
        let at = HEAD.len() + 3;
        digits[at] = if digits[at] == '0' { '1' } else { '0' };
        let one_off: String = digits.into_iter().collect();
        assert_eq!(parse(&one_off).err(), Some("its check sum is wrong"));
    }

    #[test]
    fn without_a_place_to_keep_it_the_process_serves_as_well() {
        let dir = Dir::new("nowhere");
        fs::create_dir_all(&dir.0).expect("made");
        let file = dir.0.join("a-file");
        fs::write(&file, "").expect("written");
        load(&file.join("below")).expect("goes on");
    }
}
