//! The TLS settings of links to a broker.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, RootCertStore};

use crate::transport::tls::error::{TlsError, config_error};
use crate::transport::tls::pem;
use crate::transport::tls::provider::{certified_key, provider};

/// The TLS settings of links to a broker. The chain and the name are always verified.
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub(in crate::transport) config: Arc<ClientConfig>,
    pub(in crate::transport) server_name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// `ca` is a PEM file of roots, by default the system's. `cert` and `key` are our own identity, if
    /// the broker asks for one. `server_name` is verified in place of the host that is dialled. `alpn`
    /// is offered if it is not empty.
    ///
    /// # Errors
    /// The error names the file or setting and its fault.
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

/// A DNS name or an address to verify.
pub(in crate::transport) fn parse_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::ServerName(name.to_owned()))
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Some systems have old roots that cannot be used; the others suffice.
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
