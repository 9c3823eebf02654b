//! The TLS settings of a listener, which can be given new certificates while it serves.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::server::{ProducesTickets, WebPkiClientVerifier};

use crate::transport::error::HandshakeError;
use crate::transport::tls::clients::{ClientCertificate, Clients};
use crate::transport::tls::early::EarlySessions;
use crate::transport::tls::error::{TlsError, config_error};
use crate::transport::tls::key_log::KeyLogFile;
use crate::transport::tls::material::Material;
use crate::transport::tls::provider::{provider, ticketer};
use crate::transport::tls::resolver::BySni;

/// The application protocol of MQTT (RFC 7301).
pub(in crate::transport) const ALPN_MQTT: &str = "mqtt";
/// The application protocol of HTTP/1.1, which WebSocket begins with.
pub(in crate::transport) const ALPN_HTTP: &str = "http/1.1";
/// The application protocol of HTTP/3, which WebTransport begins with.
pub(in crate::transport) const ALPN_H3: &str = "h3";

/// The certificates of a listener, ready for each transport.
pub struct ServerTls {
    current: RwLock<Arc<Configs>>,
}

/// The configurations of handshakes that begin at one time.
pub struct Configs {
    /// For `tls` (ALPN `mqtt`). A client that offers no ALPN is served too.
    pub(super) mqtt: Arc<ServerConfig>,
    /// For `wss` (ALPN `http/1.1`). A client that offers no ALPN is served too.
    pub(super) http: Arc<ServerConfig>,
    /// For QUIC: TLS 1.3 only, ALPN `mqtt` required (RFC 9001 section 8.1).
    pub(super) quic: Arc<ServerConfig>,
    clients: Option<Arc<Clients>>,
    tickets: Tickets,
    leaf: CertificateDer<'static>,
}

/// Stateless resumption, which needs no memory per client. Each transport has its own ticketer, so that
/// its tickets are never tried on another. A ticketer changes its key every six hours, and accepts the
/// tickets of the previous key.
#[derive(Clone)]
struct Tickets {
    mqtt: Arc<dyn ProducesTickets>,
    http: Arc<dyn ProducesTickets>,
    quic: Arc<dyn ProducesTickets>,
    /// In place of QUIC's tickets where early data is accepted.
    early: Option<Arc<EarlySessions>>,
}

impl Tickets {
    fn new(early_data: bool) -> Result<Self, TlsError> {
        Ok(Self {
            mqtt: ticketer()?,
            http: ticketer()?,
            quic: ticketer()?,
            early: early_data.then(Arc::default),
        })
    }
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerTls")
    }
}

impl std::fmt::Debug for Configs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Configs")
    }
}

impl ServerTls {
    /// The settings of a listener with these certificates; the first is the default. The first one's
    /// rules for client certificates and its key log hold for all, because a client that names another
    /// server must not be accepted by other rules. With `early_data`, QUIC's 0-RTT packets are accepted
    /// (RFC 9001 section 4.6).
    ///
    /// # Errors
    /// The certificate is missing, or a key log cannot be opened.
    pub fn new(materials: &[Arc<Material>], early_data: bool) -> Result<Self, TlsError> {
        let configs = Configs::new(materials, None, early_data)?;
        Ok(Self {
            current: RwLock::new(Arc::new(configs)),
        })
    }

    /// Loads a PEM chain, the server's own certificate first, and its key.
    ///
    /// # Errors
    /// The error names the file and its fault, also if certificate and key do not belong
    /// together.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        Self::new(&[Arc::new(Material::files(cert, key)?)], false)
    }

    /// A throw-away certificate for `names` (DNS names and addresses) that is valid for less than 14
    /// days and exists in memory only.
    ///
    /// # Errors
    /// [`TlsError::Generate`] if a name is not usable.
    pub fn ephemeral(names: &[String]) -> Result<Self, TlsError> {
        Self::new(&[Arc::new(Material::ephemeral(names)?)], false)
    }

    /// The default server certificate, DER.
    pub fn leaf(&self) -> Vec<u8> {
        self.current().leaf.to_vec()
    }

    /// SHA-256 of the default server certificate, for `serverCertificateHashes` of WebTransport.
    pub fn leaf_sha256(&self) -> Option<Vec<u8>> {
        let suite = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13()?;
        let hash = suite.common.hash_provider.hash(&self.current().leaf);
        Some(hash.as_ref().to_vec())
    }

    /// Makes the next configurations, for [`ServerTls::install`].
    ///
    /// # Errors
    /// See [`ServerTls::new`].
    pub fn prepare(&self, materials: &[Arc<Material>]) -> Result<Configs, TlsError> {
        let before = self.current();
        Configs::new(materials, Some(&before), before.tickets.early.is_some())
    }

    /// Lets handshakes begin with `next` from now on. Connections are left alone.
    pub fn install(&self, next: Configs) {
        let next = Arc::new(next);
        let before = std::mem::replace(&mut *self.current.write(), Arc::clone(&next));
        if let (Some(old), Some(new)) = (&before.tickets.early, &next.tickets.early)
            && !Arc::ptr_eq(old, new)
        {
            old.close();
        }
    }

    pub(in crate::transport) fn current(&self) -> Arc<Configs> {
        Arc::clone(&self.current.read())
    }

    /// The client's certificate after a handshake that began with `began`.
    pub(super) fn identify(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        began: &Arc<Configs>,
        resumed: bool,
    ) -> Result<Option<Box<ClientCertificate>>, HandshakeError> {
        let now = self.current();
        match &now.clients {
            Some(clients) => clients.identify(chain, resumed || !Arc::ptr_eq(&now, began)),
            None => Ok(None),
        }
    }

    /// The client's certificate after a handshake of QUIC, whose library does not report whether the
    /// handshake was a resumption. `identity` is the library's value for the peer.
    pub(in crate::transport) fn identify_any(
        &self,
        identity: Option<Box<dyn Any>>,
    ) -> Result<Option<Box<ClientCertificate>>, HandshakeError> {
        let chain = identity.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        self.identify(chain.as_ref().map(|chain| &***chain), &self.current(), true)
    }
}

impl Configs {
    /// The configuration of QUIC without HTTP/3.
    pub(in crate::transport) fn quic(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.quic)
    }

    /// The configuration of QUIC with HTTP/3 for WebTransport, where a client does not offer `mqtt`.
    pub(in crate::transport) fn quic_and_http3(&self) -> Arc<ServerConfig> {
        let mut config = (*self.quic).clone();
        config.alpn_protocols.push(ALPN_H3.as_bytes().to_vec());
        Arc::new(config)
    }

    fn new(
        materials: &[Arc<Material>],
        before: Option<&Self>,
        early_data: bool,
    ) -> Result<Self, TlsError> {
        let first = materials
            .first()
            .ok_or_else(|| TlsError::Config("no certificate".to_owned()))?;
        let clients = first.clients.clone();
        // A resumed client's certificate is not verified by TLS, so a ticket that was made under other
        // rules must not be accepted.
        let tickets = match (before.map(|b| (b, &b.clients)), &clients) {
            (Some((before, None)), None) => before.tickets.clone(),
            (Some((before, Some(old))), Some(new)) if old.accepts_as(new) => before.tickets.clone(),
            _ => Tickets::new(early_data)?,
        };
        let resolver = Arc::new(BySni::new(materials));
        let verifier = match &clients {
            Some(clients) => clients.verifier(),
            None => WebPkiClientVerifier::no_client_auth(),
        };
        let key_log = first.key_log.as_deref().map(KeyLogFile::open).transpose()?;
        let config = |alpn: &str, only13: bool, tickets: Option<&Arc<dyn ProducesTickets>>| {
            let versions: &[_] = if only13 {
                &[&rustls::version::TLS13]
            } else {
                rustls::DEFAULT_VERSIONS
            };
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(versions)
                .map_err(config_error)?
                .with_client_cert_verifier(Arc::clone(&verifier))
                .with_cert_resolver(Arc::clone(&resolver) as _);
            config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
            if let Some(tickets) = tickets {
                config.ticketer = Arc::clone(tickets);
            }
            config.send_tls13_tickets = 1;
            if let Some(key_log) = &key_log {
                config.key_log = Arc::clone(key_log);
            }
            Ok::<_, TlsError>(config)
        };
        // The library accepts early data only if it has no ticket keys.
        let ticket_key = tickets.early.is_none().then_some(&tickets.quic);
        let mut quic = config(ALPN_MQTT, true, ticket_key)?;
        if let Some(sessions) = &tickets.early {
            quic.session_storage = Arc::clone(sessions) as _;
            // QUIC bounds early data by flow control and allows no other number (RFC 9001 section 4.6.1).
            quic.max_early_data_size = u32::MAX;
        }
        Ok(Self {
            mqtt: Arc::new(config(ALPN_MQTT, false, Some(&tickets.mqtt))?),
            http: Arc::new(config(ALPN_HTTP, false, Some(&tickets.http))?),
            quic: Arc::new(quic),
            clients,
            tickets,
            leaf: first
                .certified
                .cert
                .first()
                .cloned()
                .unwrap_or_else(|| Vec::new().into()),
        })
    }
}
