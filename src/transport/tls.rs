//! TLS: certificates and keys from files, and the configurations for servers
//! (TCP, WebSocket, QUIC) and for links to a core. The provider is named
//! explicitly everywhere, so that a second one in the build changes nothing.
//!
//! What the files of a `[[tls]]` hold is a [`Material`]; a listener's
//! [`ServerTls`] is made of one or several, and can be given new ones while it
//! serves.

mod accept;
mod clients;
mod early;
mod key_log;
mod material;
mod pem;
mod resolver;
mod server;
mod x509;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ProducesTickets;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, InconsistentKeys, RootCertStore};

pub(super) use accept::accept;
pub use clients::ClientCertificate;
pub(super) use clients::fault_of_alert;
pub use material::Material;
pub use server::{Configs, ServerTls};
pub use x509::Validity;

/// Application protocols (RFC 7301).
pub(super) const ALPN_MQTT: &str = "mqtt";
pub(super) const ALPN_HTTP: &str = "http/1.1";
pub(super) const ALPN_H3: &str = "h3";

/// What is wrong with a certificate, a key or a setting of TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not PEM, or the PEM is damaged.
    #[error("{}: not valid PEM: {reason}", file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// Why.
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
    /// A certificate is damaged or of an unknown form.
    #[error("{}: certificate not usable: {reason}", file.display())]
    BadCertificate {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// The key is of a kind that is not supported.
    #[error("{}: private key not usable: {reason}", file.display())]
    BadKey {
        /// The file.
        file: PathBuf,
        /// Why.
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
    /// Of certificate and key only one is given.
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
    /// A revocation list is damaged or of an unknown form.
    #[error("{}: revocation list not usable: {reason}", file.display())]
    BadCrl {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// The key log cannot be opened for writing.
    #[error("{}: key log cannot be written: {source}", file.display())]
    KeyLog {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Making a certificate failed.
    #[error("cannot make a certificate: {0}")]
    Generate(String),
    /// The library refused the configuration.
    #[error("TLS configuration: {0}")]
    Config(String),
}

/// The TLS side of a link to a core: the chain and the name are always
/// verified.
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub(super) config: Arc<ClientConfig>,
    pub(super) server_name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// `ca` is a PEM file of roots, by default the system's; `cert` and `key`
    /// are our own identity, if the core asks for one; `server_name` is
    /// verified in place of the host that is dialled; `alpn` is offered if it
    /// is not empty.
    ///
    /// # Errors
    /// Names the file or setting and what is wrong with it.
    pub fn load(
        ca: Option<&Path>,
        cert: Option<&Path>,
        key: Option<&Path>,
        server_name: Option<String>,
        alpn: Vec<String>,
    ) -> Result<Self, TlsError> {
        let roots = match ca {
            Some(file) => pem::roots(file)?,
            None => system_roots()?,
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(config_error)?
            .with_root_certificates(roots);
        let mut config = match (cert, key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(cert), Some(key)) => {
                let certified = certified_key(pem::certs(cert)?, pem::key(key)?, cert, key)?;
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
            _ => return Err(TlsError::HalfIdentity),
        };
        config.alpn_protocols = alpn.into_iter().map(String::into_bytes).collect();
        let server_name = server_name.map(|name| parse_name(&name)).transpose()?;
        Ok(Self {
            config: Arc::new(config),
            server_name,
        })
    }
}

pub(super) fn parse_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::ServerName(name.to_owned()))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn ticketer() -> Result<Arc<dyn ProducesTickets>, TlsError> {
    aws_lc_rs::Ticketer::new().map_err(config_error)
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn config_error(error: rustls::Error) -> TlsError {
    TlsError::Config(error.to_string())
}

fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key_der: PrivateKeyDer<'static>,
    cert: &Path,
    key: &Path,
) -> Result<CertifiedKey, TlsError> {
    let signing = provider()
        .key_provider
        .load_private_key(key_der)
        .map_err(|error| TlsError::BadKey {
            file: key.to_owned(),
            reason: error.to_string(),
        })?;
    let certified = CertifiedKey::new(chain, signing);
    match certified.keys_match() {
        Ok(()) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            Err(TlsError::Mismatch {
                cert: cert.to_owned(),
                key: key.to_owned(),
            })
        }
        Err(error) => Err(TlsError::BadCertificate {
            file: cert.to_owned(),
            reason: error.to_string(),
        }),
    }
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Systems carry odd old roots; one that cannot be used is no reason to stop.
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reason = found
            .errors
            .first()
            .map_or_else(|| "none installed".to_owned(), ToString::to_string);
        return Err(TlsError::NoRoots(reason));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests;
