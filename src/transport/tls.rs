//! TLS: certificates and keys from files, and the configurations for servers
//! (TCP, WebSocket, QUIC) and for links to a core. The provider is named
//! explicitly everywhere, so that a second one in the build changes nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ProducesTickets;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};

use super::selfsigned;

/// Application protocols (RFC 7301).
pub(super) const ALPN_MQTT: &str = "mqtt";
pub(super) const ALPN_HTTP: &str = "http/1.1";

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
    /// Making a certificate failed.
    #[error("cannot make a certificate: {0}")]
    Generate(String),
    /// The library refused the configuration.
    #[error("TLS configuration: {0}")]
    Config(String),
}

/// A server's certificate, ready for each transport.
pub struct ServerTls {
    /// For `tls` (ALPN `mqtt`). A client that offers no ALPN is served too.
    pub(super) mqtt: Arc<ServerConfig>,
    /// For `wss` (ALPN `http/1.1`), likewise.
    pub(super) http: Arc<ServerConfig>,
    /// For QUIC: TLS 1.3 only, ALPN `mqtt` required (RFC 9001 section 8.1).
    pub(super) quic: Arc<ServerConfig>,
    leaf: CertificateDer<'static>,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerTls")
    }
}

impl ServerTls {
    /// Loads a PEM chain, the server's own certificate first, and its key.
    ///
    /// # Errors
    /// Names the file and what is wrong with it, also if the two do not belong
    /// together.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let chain = read_certs(cert)?;
        let key_der = read_key(key)?;
        Self::from_parts(chain, key_der, cert, key)
    }

    /// A throw-away certificate for `names` (DNS names and addresses) that is
    /// valid for less than 14 days and exists in memory only.
    ///
    /// # Errors
    /// [`TlsError::Generate`] if a name is not usable.
    pub fn ephemeral(names: &[String]) -> Result<Self, TlsError> {
        let (cert, key) = selfsigned::ephemeral(names)?;
        let memory = Path::new("(in memory)");
        Self::from_parts(vec![cert], key, memory, memory)
    }

    /// The server's own certificate, DER.
    pub fn leaf(&self) -> &[u8] {
        &self.leaf
    }

    fn from_parts(
        chain: Vec<CertificateDer<'static>>,
        key_der: PrivateKeyDer<'static>,
        cert: &Path,
        key: &Path,
    ) -> Result<Self, TlsError> {
        let certified = certified_key(chain, key_der, cert, key)?;
        let leaf = certified.cert[0].clone();
        let certified = Arc::new(SingleCertAndKey::from(certified));
        let config = |alpn: &str, only13: bool| -> Result<_, TlsError> {
            let versions: &[_] = if only13 {
                &[&rustls::version::TLS13]
            } else {
                rustls::DEFAULT_VERSIONS
            };
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(versions)
                .map_err(config_error)?
                .with_no_client_auth()
                .with_cert_resolver(Arc::clone(&certified) as _);
            config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
            // Stateless resumption: no memory per client. One ticketer each, so
            // that a ticket of one transport is never tried on another.
            config.ticketer = ticketer()?;
            config.send_tls13_tickets = 1;
            // No 0-RTT: a replayed CONNECT is a takeover.
            config.max_early_data_size = 0;
            Ok(Arc::new(config))
        };
        Ok(Self {
            mqtt: config(ALPN_MQTT, false)?,
            http: config(ALPN_HTTP, false)?,
            quic: config(ALPN_MQTT, true)?,
            leaf,
        })
    }
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
            Some(file) => roots_from(file)?,
            None => system_roots()?,
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(config_error)?
            .with_root_certificates(roots);
        let mut config = match (cert, key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(cert), Some(key)) => {
                let certified = certified_key(read_certs(cert)?, read_key(key)?, cert, key)?;
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

fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(file).map_err(|source| TlsError::Read {
        file: file.to_owned(),
        source,
    })
}

fn read_certs(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certs = CertificateDer::pem_slice_iter(&read(file)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| TlsError::Pem {
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
    if certs.is_empty() {
        return Err(TlsError::NoCertificate {
            file: file.to_owned(),
        });
    }
    Ok(certs)
}

fn read_key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use rustls::pki_types::pem::Error as PemError;
    PrivateKeyDer::from_pem_slice(&read(file)?).map_err(|error| match error {
        PemError::NoItemsFound => TlsError::NoKey {
            file: file.to_owned(),
        },
        error => TlsError::Pem {
            file: file.to_owned(),
            reason: error.to_string(),
        },
    })
}

fn roots_from(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for cert in read_certs(file)? {
        roots.add(cert).map_err(|error| TlsError::BadCertificate {
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
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
mod tests {
    use super::*;
    use crate::transport::selfsigned::tests::TempDir;

    fn names() -> Vec<String> {
        vec!["localhost".to_owned(), "127.0.0.1".to_owned()]
    }

    #[test]
    fn generated_files_load_on_both_sides() {
        let dir = TempDir::new();
        let files = selfsigned::generate(dir.path(), &names()).expect("generated");
        let tls = ServerTls::load(&files.cert, &files.key).expect("loads");
        assert!(!tls.leaf().is_empty());
        assert_eq!(tls.quic.alpn_protocols, [b"mqtt"]);
        assert_eq!(tls.http.alpn_protocols, [b"http/1.1"]);
        ClientTls::load(
            Some(&files.ca),
            Some(&files.cert),
            Some(&files.key),
            Some("core.example".to_owned()),
            vec!["mqtt".to_owned()],
        )
        .expect("client side loads");
    }

    #[test]
    fn errors_name_the_file_and_the_fault() {
        let dir = TempDir::new();
        let one = selfsigned::generate(&dir.path().join("one"), &names()).expect("one");
        let two = selfsigned::generate(&dir.path().join("two"), &names()).expect("two");
        let text = |cert: &Path, key: &Path| {
            ServerTls::load(cert, key)
                .expect_err("must be refused")
                .to_string()
        };
        let mismatch = text(&one.cert, &two.key);
        assert!(mismatch.contains("does not belong"), "{mismatch}");
        assert!(mismatch.contains("two/edge.key"), "{mismatch}");
        assert!(text(&one.key, &one.key).contains("holds no certificate"));
        assert!(text(&one.cert, &one.cert).contains("holds no unencrypted private key"));
        let missing = text(&dir.path().join("none.pem"), &one.key);
        assert!(missing.contains("none.pem: cannot be read"), "{missing}");
        let junk = dir.path().join("junk.pem");
        std::fs::write(
            &junk,
            "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n",
        )
        .expect("writes");
        assert!(text(&junk, &one.key).contains("junk.pem: not valid PEM"));
        std::fs::write(
            &junk,
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        )
        .expect("writes");
        assert!(text(&junk, &one.key).contains("junk.pem: certificate not usable"));
    }

    #[test]
    fn half_an_identity_is_refused() {
        let dir = TempDir::new();
        let files = selfsigned::generate(dir.path(), &names()).expect("generated");
        let error = ClientTls::load(Some(&files.ca), Some(&files.cert), None, None, vec![]);
        assert!(matches!(error, Err(TlsError::HalfIdentity)));
        let error = ClientTls::load(Some(&files.ca), None, None, Some("a b".into()), vec![]);
        assert!(matches!(error, Err(TlsError::ServerName(_))));
    }
}
