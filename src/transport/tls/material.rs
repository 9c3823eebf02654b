//! The files of one `[[tls]]`, read and checked.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::config::{CertSource, Tls};
use crate::transport::selfsigned;
use crate::transport::tls::clients::Clients;
use crate::transport::tls::error::TlsError;
use crate::transport::tls::pem;
use crate::transport::tls::provider::certified_key;
use crate::transport::tls::x509::{self, Validity};

/// The names in the throw-away certificate.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// A certificate with its key, and the rules for client certificates.
pub struct Material {
    pub(super) certified: Arc<CertifiedKey>,
    /// DNS names, in lower case; they may begin with `*.`.
    pub(super) names: Vec<String>,
    pub(super) clients: Option<Arc<Clients>>,
    pub(super) key_log: Option<PathBuf>,
    validity: Validity,
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Material")
    }
}

impl Material {
    /// Reads the files. `before` is the result of an earlier call, whose throw-away certificate is kept.
    ///
    /// # Errors
    /// The error names the file and its fault, also if certificate and key do not belong
    /// together.
    pub fn load(tls: &Tls, before: Option<&Self>) -> Result<Self, TlsError> {
        let mut this = match (&tls.source, before) {
            (CertSource::Files { cert, key }, _) => Self::files(cert, key)?,
            (CertSource::Throwaway, None) => Self::ephemeral(&LOOPBACK.map(str::to_owned))?,
            (CertSource::Throwaway, Some(before)) => Self {
                certified: Arc::clone(&before.certified),
                names: before.names.clone(),
                clients: None,
                key_log: None,
                validity: before.validity,
            },
        };
        let clients = tls.clients.as_ref().map(Clients::load).transpose()?;
        this.clients = clients.map(Arc::new);
        this.key_log.clone_from(&tls.key_log);
        Ok(this)
    }

    /// A certificate and its key, without client certificates.
    pub(super) fn files(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        Self::from_parts(pem::certs(cert)?, pem::key(key)?, cert, key)
    }

    /// A throw-away certificate for `names`, in memory only.
    pub(super) fn ephemeral(names: &[String]) -> Result<Self, TlsError> {
        let (cert, key) = selfsigned::ephemeral(names)?;
        let memory = Path::new("(in memory)");
        Self::from_parts(vec![cert], key, memory, memory)
    }

    fn from_parts(
        chain: Vec<CertificateDer<'static>>,
        key_der: PrivateKeyDer<'static>,
        cert: &Path,
        key: &Path,
    ) -> Result<Self, TlsError> {
        let certified = certified_key(chain, key_der, cert, key)?;
        let (validity, names) = x509::dates_and_names(
            certified.cert.first().map_or(&[], |leaf| leaf),
        )
        .map_err(|reason| TlsError::BadCertificate {
            file: cert.to_owned(),
            reason,
        })?;
        Ok(Self {
            certified: Arc::new(certified),
            names,
            clients: None,
            key_log: None,
            validity,
        })
    }

    /// The validity of the server's own certificate.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// The validity of the revocation list that expires first.
    pub fn crl_validity(&self) -> Option<Validity> {
        self.clients.as_ref()?.crl_validity
    }

    /// Whether clients cannot tell the two apart.
    pub fn is_same(&self, other: &Self) -> bool {
        let clients = match (&self.clients, &other.clients) {
            (Some(one), Some(two)) => one.accepts_as(two),
            (None, None) => true,
            _ => false,
        };
        clients && self.certified.cert == other.certified.cert
    }
}
