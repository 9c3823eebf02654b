//! Secrets that are kept in `node.data_dir` over restarts: the one of the QUIC listeners, and the node's.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use blake2::Digest;

use crate::config::files;
use crate::hashing::HashSeed;
use crate::transport::QuicSecret;

/// The length of a secret, bytes.
const SECRET_BYTES: usize = QuicSecret::LEN;
const CHECK_SUM_BYTES: usize = 4;

/// A file with a secret.
struct Kept {
    /// The file's name in the directory.
    name: &'static str,
    /// The first word of its one line. The secret and a check sum follow, in hexadecimal.
    head: &'static str,
    /// The secret, in logs.
    what: &'static str,
    /// What follows if the earlier secret is missing, in logs.
    lost: &'static str,
}

const QUIC: Kept = Kept {
    name: "quic.key",
    head: "tidegate-quic-key-1",
    what: "QUIC key",
    lost: "clients of the process before learn by their idle time-out that it is gone",
};

const NODE: Kept = Kept {
    name: "node.key",
    head: "tidegate-node-key-1",
    what: "node's key",
    lost: "a message that is under way at a restart can reach its own publisher in spite of No Local, or come twice",
};

/// Values of the node that are the same in each process with the same `node.data_dir`.
pub(super) struct NodeSecret([u8; SECRET_BYTES]);

impl NodeSecret {
    /// Reads the secret of an earlier process, or makes a new one.
    ///
    /// # Errors
    /// The system has no randomness.
    pub(super) fn load(dir: &Path) -> io::Result<Self> {
        NODE.load(dir).map(Self)
    }

    /// Tells the node's origin marks from those of other nodes; never 0.
    pub(super) fn instance(&self) -> u64 {
        self.number("instance") | 1
    }

    /// Spreads filters over links, and clients over shards.
    pub(super) fn hash_seed(&self) -> HashSeed {
        HashSeed::from_random([self.number("hash"), self.number("hash shared")])
    }

    /// The key of the digests of received messages.
    pub(super) fn digests(&self) -> HashSeed {
        HashSeed::from_random([self.number("digest"), self.number("digest shared")])
    }

    /// Nobody can tell the secret, or another number, from this one.
    fn number(&self, about: &str) -> u64 {
        let digest = blake2::Blake2s256::new()
            .chain_update(self.0)
            .chain_update(about);
        let digest = digest.finalize();
        let bytes = digest.first_chunk().expect("a digest has 32 bytes");
        u64::from_le_bytes(*bytes)
    }
}

/// Reads the QUIC secret of an earlier process, or makes a new one. Without the earlier secret, clients of
/// that process notice only by their idle time-out that it is gone.
pub(super) fn load(dir: &Path) -> io::Result<QuicSecret> {
    QUIC.load(dir).map(QuicSecret::new)
}

impl Kept {
    fn load(&self, dir: &Path) -> io::Result<[u8; SECRET_BYTES]> {
        let file = dir.join(self.name);
        match self.read(&file) {
            Ok(Ok(secret)) => return Ok(secret),
            Ok(Err(why)) => {
                let aside = dir.join(format!("{}.damaged", self.name));
                tracing::warn!(
                    file = %file.display(),
                    kept_as = %aside.display(),
                    "The {} is damaged ({why}): a new one takes its place, and {}",
                    self.what, self.lost
                );
                let _ = fs::rename(&file, aside);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                self.not_kept(&file, &error);
                return random();
            }
        }
        let secret = random()?;
        match self.write(dir, &file, &secret) {
            Ok(()) => tracing::info!(file = %file.display(), "New {}", self.what),
            Err(error) => self.not_kept(&file, &error),
        }
        Ok(secret)
    }

    fn not_kept(&self, file: &Path, error: &io::Error) {
        tracing::warn!(
            file = %file.display(),
            "The {} cannot be kept ({error}): after a restart {}; make node.data_dir writable",
            self.what, self.lost
        );
    }

    fn read(&self, file: &Path) -> io::Result<Result<[u8; SECRET_BYTES], &'static str>> {
        let text = match files::read_text(file) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Ok(Err("it is not text"));
            }
            other => other?,
        };
        if fs::metadata(file)?.permissions().mode() & 0o077 != 0 {
            tracing::warn!(
                file = %file.display(),
                "Others than the owner may read or change the {}: chmod 600", self.what
            );
        }
        Ok(self.parse(&text))
    }

    fn parse(&self, text: &str) -> Result<[u8; SECRET_BYTES], &'static str> {
        let mut words = text.split_whitespace();
        if words.next() != Some(self.head) {
            return Err("its first word is wrong");
        }
        let mut bytes = || words.next().and_then(unhex).unwrap_or_default();
        let (secret, check_sum) = (bytes(), bytes());
        let secret: [u8; SECRET_BYTES] = secret.try_into().map_err(|_| "its length is wrong")?;
        match check_sum == check(&secret) {
            true => Ok(secret),
            false => Err("its check sum is wrong"),
        }
    }

    /// Writes a new file and renames it, so that a reader never sees half of a secret.
    fn write(&self, dir: &Path, file: &Path, secret: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let line = format!("{} {} {}\n", self.head, hex(secret), hex(&check(secret)));
        let fresh: PathBuf = dir.join(format!("{}.{}", self.name, std::process::id()));
        let result = write_new(&fresh, &line)
            .and_then(|()| fs::rename(&fresh, file))
            .and_then(|()| File::open(dir)?.sync_all());
        if result.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        result
    }
}

fn random() -> io::Result<[u8; SECRET_BYTES]> {
    let mut secret = [0; SECRET_BYTES];
    getrandom::fill(&mut secret).map_err(io::Error::from)?;
    Ok(secret)
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
            fs::read_to_string(self.0.join(QUIC.name)).expect("is there")
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
        let mode = fs::metadata(dir.0.join(QUIC.name))
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
        let flipped = good.replace(QUIC.head, &format!("{} 0", QUIC.head));
        for bad in ["", "junk", &good[..50], &flipped, "\u{0}"] {
            fs::write(dir.0.join(QUIC.name), bad).expect("written");
            assert!(QUIC.parse(bad).is_err(), "{bad:?}");
            load(&dir.0).expect("replaced");
            assert!(QUIC.parse(&dir.text()).is_ok());
            let aside = fs::read_to_string(dir.0.join("quic.key.damaged"));
            assert_eq!(aside.expect("kept"), bad);
        }
        assert!(QUIC.parse(&good).is_ok());
        let mut digits: Vec<char> = good.chars().collect();
        let at = QUIC.head.len() + 3;
        digits[at] = if digits[at] == '0' { '1' } else { '0' };
        let one_off: String = digits.into_iter().collect();
        assert_eq!(QUIC.parse(&one_off).err(), Some("its check sum is wrong"));
    }

    #[test]
    fn a_node_has_the_same_values_in_each_process() {
        use std::hash::BuildHasher as _;
        let dir = Dir::new("node");
        let (one, two) = (NodeSecret::load(&dir.0), NodeSecret::load(&dir.0));
        let (one, two) = (one.expect("made"), two.expect("read"));
        assert_eq!(one.instance(), two.instance());
        assert_ne!(one.instance(), 0);
        let hashes = |secret: &NodeSecret| {
            let seeds = [secret.hash_seed(), secret.digests()];
            seeds.map(|seed| seed.hash_one("a/b"))
        };
        assert_eq!(hashes(&one), hashes(&two));
        assert_ne!(hashes(&one)[0], hashes(&one)[1]);
        let other = Dir::new("other-node");
        let other = NodeSecret::load(&other.0).expect("made");
        assert_ne!(one.instance(), other.instance());
        assert_ne!(hashes(&one), hashes(&other));
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
