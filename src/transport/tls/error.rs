//! Errors of certificates, keys and settings.

use std::io;
use std::path::PathBuf;

/// A fault of a certificate, a key or a setting of TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is not PEM, or the PEM is damaged.
    #[error("{}: not valid PEM: {reason}", file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// The reason in the library's words.
        reason: String,
    },
    /// No `CERTIFICATE` section in the file.
    #[error("{}: holds no certificate (\"-----BEGIN CERTIFICATE-----\")", file.display())]
    NoCertificate {
        /// The file.
        file: PathBuf,
    },
    /// No private key section in the file.
    #[error("{}: holds no unencrypted private key (PKCS#8, PKCS#1 or SEC1)", file.display())]
    NoKey {
        /// The file.
        file: PathBuf,
    },
    /// A certificate is damaged or has an unknown format.
    #[error("{}: certificate not usable: {reason}", file.display())]
    BadCertificate {
        /// The file.
        file: PathBuf,
        /// The reason in the library's words.
        reason: String,
    },
    /// The key has a type that is not supported.
    #[error("{}: private key not usable: {reason}", file.display())]
    BadKey {
        /// The file.
        file: PathBuf,
        /// The reason in the library's words.
        reason: String,
    },
    /// The key belongs to another certificate.
    #[error("{}: this key does not belong to the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// Only one of certificate and key is given.
    #[error("a client certificate needs both cert and key")]
    HalfIdentity,
    /// The system has no usable root certificates.
    #[error("no root certificates found on this system: {0}; set ca")]
    NoRoots(String),
    /// `server_name` is neither a DNS name nor an address.
    #[error("server name \"{0}\" is neither a DNS name nor an IP address")]
    ServerName(String),
    /// No `X509 CRL` section in the file.
    #[error("{}: holds no revocation list (\"-----BEGIN X509 CRL-----\")", file.display())]
    NoCrl {
        /// The file.
        file: PathBuf,
    },
    /// A revocation list is damaged or has an unknown format.
    #[error("{}: revocation list not usable: {reason}", file.display())]
    BadCrl {
        /// The file.
        file: PathBuf,
        /// The reason in the library's words.
        reason: String,
    },
    /// The key log cannot be opened for writing.
    #[error("{}: key log cannot be written: {source}", file.display())]
    KeyLog {
        /// The file.
        file: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Making a certificate failed.
    #[error("cannot make a certificate: {0}")]
    Generate(String),
    /// The library refused the configuration.
    #[error("TLS configuration: {0}")]
    Config(String),
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn config_error(error: rustls::Error) -> TlsError {
    TlsError::Config(error.to_string())
}
