//! Addresses, trusted certificates, and the opening of a byte stream over each transport.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::link::Link;
use crate::quic::QuicDialer;
use crate::tickets::Tickets;

/// A transport that carries MQTT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Plain TCP.
    Tcp,
    /// TLS over TCP.
    Tls,
    /// WebSocket.
    Ws,
    /// WebSocket over TLS.
    Wss,
    /// QUIC, ALPN `mqtt`, one bidirectional stream.
    Quic,
    /// WebTransport over HTTP/3, one bidirectional stream.
    WebTransport,
}

impl Transport {
    /// The name that URLs and reports use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Ws => "ws",
            Self::Wss => "wss",
            Self::Quic => "quic",
            Self::WebTransport => "webtransport",
        }
    }
}

/// A server's address: `tcp://host:port`, `tls://`, `ws://host:port/path`, `wss://`, `quic://`,
/// `webtransport://` (also `mqtt://` and `mqtts://`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// The transport.
    pub transport: Transport,
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Path of ws, wss and WebTransport, `/mqtt` when the URL has none.
    pub path: String,
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or(format!("{text}: no scheme"))?;
        let transport = match scheme {
            "tcp" | "mqtt" => Transport::Tcp,
            "tls" | "mqtts" | "ssl" => Transport::Tls,
            "ws" => Transport::Ws,
            "wss" => Transport::Wss,
            "quic" | "mqtt+quic" => Transport::Quic,
            "webtransport" | "https" => Transport::WebTransport,
            _ => return Err(format!("{text}: unknown scheme {scheme}")),
        };
        let (authority, path) = match rest.find('/') {
            Some(at) => (&rest[..at], &rest[at..]),
            None => (rest, "/mqtt"),
        };
        let (host, port) = authority
            .rsplit_once(':')
            .ok_or(format!("{text}: no port"))?;
        let port = port
            .parse()
            .map_err(|_| format!("{text}: bad port {port}"))?;
        let host = host.trim_matches(['[', ']']).to_owned();
        Ok(Self {
            transport,
            host,
            port,
            path: path.to_owned(),
        })
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = match self.transport {
            Transport::Ws | Transport::Wss | Transport::WebTransport => self.path.as_str(),
            _ => "",
        };
        write!(
            f,
            "{}://{}:{}{path}",
            self.transport.name(),
            self.host,
            self.port
        )
    }
}

/// Which server certificates are accepted.
#[derive(Debug, Clone, Default)]
pub enum Trust {
    /// All certificates, for loads against a throw-away certificate.
    #[default]
    Anything,
    /// Chains that end in one of these.
    Roots(Arc<RootCertStore>),
}

impl Trust {
    /// Trusts the certificates of a PEM file.
    ///
    /// # Errors
    /// The file cannot be read or holds no certificate.
    pub fn ca(path: &Path) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        let certs = CertificateDer::pem_file_iter(path).map_err(io::Error::other)?;
        for cert in certs {
            roots
                .add(cert.map_err(io::Error::other)?)
                .map_err(io::Error::other)?;
        }
        if roots.is_empty() {
            return Err(io::Error::other(format!(
                "{}: no certificate",
                path.display()
            )));
        }
        Ok(Self::Roots(Arc::new(roots)))
    }

    /// A TLS client configuration with these protocols offered.
    pub fn config(&self, alpn: &[&str]) -> rustls::ClientConfig {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("the provider supports TLS 1.2 and 1.3");
        let mut config = match self {
            Self::Anything => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Blind(provider)))
                .with_no_client_auth(),
            Self::Roots(roots) => builder
                .with_root_certificates(roots.clone())
                .with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }
}

/// Opens byte streams to one server.
#[derive(Debug)]
pub struct Dialer {
    url: Url,
    addr: SocketAddr,
    source: Option<IpAddr>,
    tls: Option<Arc<rustls::ClientConfig>>,
    quic: Option<QuicDialer>,
    tickets: Option<Arc<Tickets>>,
    /// Read buffer of a ws connection in bytes.
    ws_buffer: usize,
}

impl Dialer {
    /// A dialer to one URL; the host is resolved once.
    ///
    /// # Errors
    /// The host does not resolve, or the QUIC configuration is refused.
    pub fn new(url: &Url, trust: &Trust) -> io::Result<Self> {
        Self::build(url, trust, true)
    }

    /// A dialer without tickets: each of its TLS handshakes is a full one.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn without_tickets(url: &Url, trust: &Trust) -> io::Result<Self> {
        Self::build(url, trust, false)
    }

    fn build(url: &Url, trust: &Trust, tickets: bool) -> io::Result<Self> {
        let tickets = tickets.then(Tickets::new);
        let config = |alpn: &[&str]| {
            let mut config = trust.config(alpn);
            config.resumption = match &tickets {
                Some(tickets) => Resumption::store(tickets.clone()),
                None => Resumption::disabled(),
            };
            config
        };
        let addr = std::net::ToSocketAddrs::to_socket_addrs(&(url.host.as_str(), url.port))?
            .next()
            .ok_or_else(|| io::Error::other(format!("{url}: no address")))?;
        let tls =
            matches!(url.transport, Transport::Tls | Transport::Wss).then(|| Arc::new(config(&[])));
        let quic = match url.transport {
            Transport::Quic => Some(QuicDialer::new(addr, &url.host, config(&["mqtt"]))?),
            Transport::WebTransport => Some(QuicDialer::new(addr, &url.host, config(&["h3"]))?),
            _ => None,
        };
        Ok(Self {
            url: url.clone(),
            addr,
            source: None,
            tls,
            quic,
            tickets,
            ws_buffer: 8 * 1024,
        })
    }

    /// Binds connections to one local address, such as 127.0.0.2.
    pub fn source(mut self, source: IpAddr) -> Self {
        self.source = Some(source);
        self.quic = self.quic.map(|quic| quic.source(source));
        self
    }

    /// QUIC only: puts up to `connections` on one UDP socket. The default, 1, gives each connection
    /// its own socket, as [`Cut::Silent`](crate::link::Cut::Silent) requires.
    pub fn share_sockets(mut self, connections: usize) -> Self {
        self.quic = self.quic.map(|quic| quic.share(connections));
        self
    }

    /// Full TLS handshakes so far: the dialer had no ticket to offer although it could have had
    /// one.
    pub fn without_ticket(&self) -> u64 {
        self.tickets.as_ref().map_or(0, |t| t.missed())
    }

    /// The address behind the URL's host.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The URL that this dialer connects to.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Opens a byte stream, WebSocket and TLS handshakes included.
    ///
    /// # Errors
    /// The connection or a handshake failed.
    pub async fn open(&self) -> io::Result<Link> {
        // Boxed, so that the handshakes' state does not stay in every caller's future.
        Box::pin(async {
            match self.url.transport {
                Transport::Tcp => Ok(Link::tcp(self.tcp().await?)),
                Transport::Tls => Ok(Link::tls(self.tls().await?)),
                Transport::Ws => {
                    let stream = self.tcp().await?;
                    Ok(Link::ws(self.upgrade(stream).await?))
                }
                Transport::Wss => {
                    let stream = self.tls().await?;
                    Ok(Link::wss(self.upgrade(stream).await?))
                }
                Transport::Quic => {
                    let quic = self.quic.as_ref().expect("a quic URL makes a QUIC dialer");
                    Ok(Link::quic(quic.open().await?))
                }
                Transport::WebTransport => {
                    let quic = self.quic.as_ref().expect("so does this one");
                    let url = format!(
                        "https://{}:{}{}",
                        self.url.host,
                        self.addr.port(),
                        self.url.path
                    );
                    Ok(Link::webtransport(quic.open_session(&url).await?))
                }
            }
        })
        .await
    }

    /// Opens plain TCP to the server, for tests that write raw bytes.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn tcp(&self) -> io::Result<TcpStream> {
        let socket = if self.addr.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        if let Some(source) = self.source {
            socket.bind(SocketAddr::new(source, 0))?;
        }
        let stream = socket.connect(self.addr).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn tls(&self) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(self.url.host.clone()).map_err(io::Error::other)?;
        let tls = self
            .tls
            .as_ref()
            .expect("a tls or wss URL makes a TLS connector");
        TlsConnector::from(tls.clone())
            .connect(name, self.tcp().await?)
            .await
    }

    async fn upgrade<S>(&self, stream: S) -> io::Result<tokio_tungstenite::WebSocketStream<S>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        let mut request = self
            .url
            .to_string()
            .into_client_request()
            .map_err(io::Error::other)?;
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", HeaderValue::from_static("mqtt"));
        let config = WebSocketConfig::default()
            .read_buffer_size(self.ws_buffer)
            .write_buffer_size(self.ws_buffer);
        let (socket, response) =
            tokio_tungstenite::client_async_with_config(request, stream, Some(config))
                .await
                .map_err(io::Error::other)?;
        match response.headers().get("Sec-WebSocket-Protocol") {
            Some(protocol) if protocol == "mqtt" => Ok(socket),
            other => Err(io::Error::other(format!(
                "subprotocol {other:?} instead of mqtt"
            ))),
        }
    }
}

/// Accepts every certificate; signatures are still checked.
#[derive(Debug)]
struct Blind(Arc<CryptoProvider>);

impl ServerCertVerifier for Blind {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written() {
        let url: Url = "ws://127.0.0.1:8083/mqtt".parse().unwrap();
        assert_eq!((url.transport, url.port), (Transport::Ws, 8083));
        assert_eq!(url.to_string(), "ws://127.0.0.1:8083/mqtt");
        let url: Url = "mqtt://localhost:1883".parse().unwrap();
        assert_eq!(url.to_string(), "tcp://localhost:1883");
        assert!("http://x:1".parse::<Url>().is_err());
        assert!("tcp://x".parse::<Url>().is_err());
    }
}
