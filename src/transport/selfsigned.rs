//! Making certificates: a small CA with one server certificate in files, and a throw-away certificate in
//! memory for a first run.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::transport::tls::error::TlsError;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Validity begins this long before now, because clocks differ.
const BACKDATE: Duration = Duration::from_secs(60 * 60);
/// Browsers accept a certificate by its hash only if it is valid for at most 14 days.
const EPHEMERAL_VALIDITY: Duration = Duration::from_secs(13 * 24 * 60 * 60);
const LEAF_DAYS: u32 = 397;
const CA_DAYS: u32 = 3650;

/// The files that [`generate`] wrote.
#[derive(Clone, Debug)]
pub struct Generated {
    /// `ca.pem`: the authority that clients should trust.
    pub ca: PathBuf,
    /// `ca.key`: signs further certificates; keep it away from servers.
    pub ca_key: PathBuf,
    /// `edge.pem`: the server's chain.
    pub cert: PathBuf,
    /// `edge.key`: the server's key.
    pub key: PathBuf,
}

/// Why [`generate`] failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// A file exists already; nothing was written.
    #[error("{}: exists already and is not overwritten", .0.display())]
    Exists(PathBuf),
    /// A file or the folder cannot be written.
    #[error("{}: cannot be written: {source}", file.display())]
    Write {
        /// The file or folder.
        file: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A name is not usable, or the library failed.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Makes a CA (10 years) and a server certificate (397 days, ECDSA P-256) for `names` (DNS names and
/// addresses), and writes them to `out_dir`, which is created if needed. Keys get mode 0600.
///
/// # Errors
/// See [`GenerateError`]. Existing files are never overwritten.
pub fn generate(out_dir: &Path, names: &[String]) -> Result<Generated, GenerateError> {
    let files = Generated {
        ca: out_dir.join("ca.pem"),
        ca_key: out_dir.join("ca.key"),
        cert: out_dir.join("edge.pem"),
        key: out_dir.join("edge.key"),
    };
    for file in [&files.ca, &files.ca_key, &files.cert, &files.key] {
        if file.exists() {
            return Err(GenerateError::Exists(file.clone()));
        }
    }
    let made = make(names).map_err(|error| TlsError::Generate(error.to_string()))?;
    std::fs::create_dir_all(out_dir).map_err(|source| GenerateError::Write {
        file: out_dir.to_owned(),
        source,
    })?;
    for (file, text, mode) in [
        (&files.ca_key, &made.ca_key, 0o600),
        (&files.ca, &made.ca, 0o644),
        (&files.key, &made.key, 0o600),
        (&files.cert, &made.chain, 0o644),
    ] {
        write(file, text, mode).map_err(|source| GenerateError::Write {
            file: file.clone(),
            source,
        })?;
    }
    Ok(files)
}

/// A self-signed ECDSA P-256 certificate for `names`, valid for 13 days.
pub(super) fn ephemeral(
    names: &[String],
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TlsError> {
    let make = || -> Result<_, rcgen::Error> {
        let key = KeyPair::generate()?;
        let cert = leaf_params(names, EPHEMERAL_VALIDITY)?.self_signed(&key)?;
        Ok((cert.der().clone(), key.serialize_der()))
    };
    let (cert, key) = make().map_err(|error| TlsError::Generate(error.to_string()))?;
    Ok((cert, PrivateKeyDer::Pkcs8(key.into())))
}

struct Made {
    ca: String,
    ca_key: String,
    chain: String,
    key: String,
}

fn make(names: &[String]) -> Result<Made, rcgen::Error> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name
        .push(DnType::CommonName, "Tidegate private CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut ca, DAY * CA_DAYS);
    let ca_cert = ca.self_signed(&ca_key)?;

    let key = KeyPair::generate()?;
    let mut leaf = leaf_params(names, DAY * LEAF_DAYS)?;
    leaf.use_authority_key_identifier_extension = true;
    let ca_key_pem = ca_key.serialize_pem();
    let cert = leaf.signed_by(&key, &Issuer::new(ca, ca_key))?;
    Ok(Made {
        ca: ca_cert.pem(),
        ca_key: ca_key_pem,
        chain: cert.pem() + &ca_cert.pem(),
        key: key.serialize_pem(),
    })
}

fn leaf_params(names: &[String], valid: Duration) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    let common = names.first().map_or("tidegate", String::as_str);
    params.distinguished_name.push(DnType::CommonName, common);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    set_validity(&mut params, valid);
    Ok(params)
}

fn set_validity(params: &mut CertificateParams, valid: Duration) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + now + valid;
}

fn write(file: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(file)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A folder that is removed when this is dropped.
    pub(in crate::transport) struct TempDir(PathBuf);

    impl TempDir {
        pub(in crate::transport) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let path =
                std::env::temp_dir().join(format!("tidegate-transport-{}-{n}", std::process::id()));
            std::fs::create_dir_all(&path).expect("temporary folder");
            Self(path)
        }

        pub(in crate::transport) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn keys_are_private_and_nothing_is_overwritten() {
        let dir = TempDir::new();
        let out = dir.path().join("deep/certs");
        let names = ["localhost".to_owned(), "::1".to_owned()];
        let files = generate(&out, &names).expect("generated");
        for key in [&files.key, &files.ca_key] {
            let mode = std::fs::metadata(key).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        let before = std::fs::read(&files.cert).expect("there");
        let again = generate(&out, &names).expect_err("must be refused");
        assert!(again.to_string().contains("exists already"), "{again}");
        assert_eq!(std::fs::read(&files.cert).expect("there"), before);
    }

    #[test]
    fn a_bad_name_is_an_error() {
        assert!(ephemeral(&["not ascii: ü".to_owned()]).is_err());
        assert!(ephemeral(&["localhost".to_owned()]).is_ok());
    }
}
