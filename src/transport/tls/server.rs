//! The TLS side of a listener, which can be given new certificates while it
//! serves.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::server::{ProducesTickets, WebPkiClientVerifier};

use crate::transport::limits::HandshakeError;
use crate::transport::tls::clients::Clients;
use crate::transport::tls::early::EarlySessions;
use crate::transport::tls::key_log::KeyLogFile;
use crate::transport::tls::resolver::BySni;
use crate::transport::tls::{
    ALPN_H3, ALPN_HTTP, ALPN_MQTT, ClientCertificate, Material, TlsError, config_error, provider,
    ticketer,
};

/// The certificates of a listener, ready for each transport.
pub struct ServerTls {
    current: RwLock<Arc<Configs>>,
}

/// What holds for the handshakes that begin now.
pub struct Configs {
    /// For `tls` (ALPN `mqtt`). A client that offers no ALPN is served too.
    pub(super) mqtt: Arc<ServerConfig>,
    /// For `wss` (ALPN `http/1.1`), likewise.
    pub(super) http: Arc<ServerConfig>,
    /// For QUIC: TLS 1.3 only, ALPN `mqtt` required (RFC 9001 section 8.1).
    pub(super) quic: Arc<ServerConfig>,
    clients: Option<Arc<Clients>>,
    tickets: Tickets,
    leaf: CertificateDer<'static>,
}

/// Stateless resumption: no memory per client. One ticketer each, so that a
/// ticket of one transport is never tried on another. Each changes its key by
/// itself every six hours and takes what the key before made.
#[derive(Clone)]
struct Tickets {
    mqtt: Arc<dyn ProducesTickets>,
    http: Arc<dyn ProducesTickets>,
    quic: Arc<dyn ProducesTickets>,
    /// In place of the tickets for QUIC where early data is taken.
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
    /// A listener with these certificates; the first is the default. Which
    /// client certificates are taken and where keys are logged, the first says
    /// for all, because a client that names another server must not get in by
    /// other rules. With `early_data` what a QUIC client sends in 0-RTT packets
    /// is taken (RFC 9001 section 4.6).
    ///
    /// # Errors
    /// When there is none, or a key log cannot be opened.
    pub fn new(materials: &[Arc<Material>], early_data: bool) -> Result<Self, TlsError> {
        let configs = Configs::new(materials, None, early_data)?;
        Ok(Self {
            current: RwLock::new(Arc::new(configs)),
        })
    }

    /// Loads a PEM chain, the server's own certificate first, and its key.
    ///
    /// # Errors
    /// Names the file and what is wrong with it, also if the two do not belong
    /// together.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        Self::new(&[Arc::new(Material::files(cert, key)?)], false)
    }

    /// A throw-away certificate for `names` (DNS names and addresses) that is
    /// valid for less than 14 days and exists in memory only.
    ///
    /// # Errors
    /// [`TlsError::Generate`] if a name is not usable.
    pub fn ephemeral(names: &[String]) -> Result<Self, TlsError> {
        Self::new(&[Arc::new(Material::ephemeral(names)?)], false)
    }

    /// The server's own certificate, the default one, DER.
    pub fn leaf(&self) -> Vec<u8> {
        self.current().leaf.to_vec()
    }

    /// SHA-256 of the server's own certificate: what a browser may be told to
    /// trust (`serverCertificateHashes` of WebTransport).
    pub fn leaf_sha256(&self) -> Option<Vec<u8>> {
        let suite = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13()?;
        let hash = suite.common.hash_provider.hash(&self.current().leaf);
        Some(hash.as_ref().to_vec())
    }

    /// Makes what is to hold next, for [`ServerTls::install`].
    ///
    /// # Errors
    /// As [`ServerTls::new`].
    pub fn prepare(&self, materials: &[Arc<Material>]) -> Result<Configs, TlsError> {
        let before = self.current();
        Configs::new(materials, Some(&before), before.tickets.early.is_some())
    }

    /// From now on handshakes begin with `next`; connections are left alone.
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

    /// Who a client is whose handshake began with `began` and is done.
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

    /// The same for QUIC, whose library does not tell whether the handshake
    /// was a resumption; `identity` is what it has of the peer.
    pub(in crate::transport) fn identify_any(
        &self,
        identity: Option<Box<dyn Any>>,
    ) -> Result<Option<Box<ClientCertificate>>, HandshakeError> {
        let chain = identity.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        self.identify(chain.as_ref().map(|chain| &***chain), &self.current(), true)
    }
}

impl Configs {
    /// What a QUIC handshake goes by.
    pub(in crate::transport) fn quic(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.quic)
    }

    /// The same, and HTTP/3 for WebTransport where a client offers no `mqtt`.
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
        // A ticket carries the client's certificate past its verification, so
        // one that was made by other rules must not be taken.
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
        // The library takes early data only where it has no ticket keys.
        let ticket_key = tickets.early.is_none().then_some(&tickets.quic);
        let mut quic = config(ALPN_MQTT, true, ticket_key)?;
        if let Some(sessions) = &tickets.early {
            quic.session_storage = Arc::clone(sessions) as _;
            // QUIC bounds it by flow control and knows no other number (RFC 9001 section 4.6.1).
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
