//! The lines on standard output once the process serves clients.

use std::io::Write as _;
use std::time::Duration;

use tokio::time::timeout;

use crate::config::{CertSource, Config, Listener, Transport};
use crate::telemetry;
use crate::transport::Bound;

/// How long the reader of standard output may delay the start.
const PRINT_WAIT: Duration = Duration::from_secs(2);

/// A bound address.
pub(super) struct Address {
    /// The listener's name, or `admin`.
    name: String,
    transport: &'static str,
    url: String,
}

/// The throw-away certificate of a WebTransport listener. A page has to name it, or the browser
/// refuses it.
struct Certificate {
    /// The name of its `[[tls]]`.
    name: String,
    /// SHA-256, hexadecimal.
    sha256: String,
}

/// Everything that is printed, collected while the listeners are still at hand.
pub(super) struct Ready {
    addresses: Vec<Address>,
    certificates: Vec<Certificate>,
    /// Without a configuration file the user is shown commands to try.
    first_run: bool,
}

impl Ready {
    pub(super) fn new(config: &Config, listeners: &[Bound], admin: std::net::SocketAddr) -> Self {
        let mut addresses: Vec<Address> = listeners.iter().map(address).collect();
        addresses.extend(listeners.iter().filter_map(webtransport));
        addresses.push(Address {
            name: "admin".to_owned(),
            transport: "http",
            url: format!("http://{admin}"),
        });
        Self {
            addresses,
            certificates: throwaway(config, listeners),
            first_run: config.source.is_none(),
        }
    }

    /// Prints every bound address, then `ready`.
    ///
    /// Tidegate serves clients whether or not anybody reads its standard output: an error changes
    /// nothing, and a reader that takes nothing does not stop the process.
    pub(super) async fn print(&self) {
        let mut out = String::new();
        for Address {
            name,
            transport,
            url,
        } in &self.addresses
        {
            out.push_str(&format!("listening {name} {transport} {url}\n"));
        }
        for Certificate { name, sha256 } in &self.certificates {
            out.push_str(&format!("certificate {name} sha256 {sha256}\n"));
        }
        out.push_str("ready\n");
        if self.first_run {
            out.push_str(&first_commands(&self.addresses, &self.certificates));
        }
        let printing = tokio::task::spawn_blocking(move || {
            // A reader of both streams finds the warnings of the start before `ready`.
            telemetry::log::flush();
            let mut stdout = std::io::stdout().lock();
            let _ = stdout.write_all(out.as_bytes());
            let _ = stdout.flush();
        });
        let _ = timeout(PRINT_WAIT, printing).await;
    }
}

fn address(bound: &Bound) -> Address {
    let config = bound.listener();
    let scheme = match config.transport {
        Transport::Tcp => "mqtt",
        Transport::Tls => "mqtts",
        Transport::Ws => "ws",
        Transport::Wss => "wss",
        Transport::Quic => "quic",
        Transport::WebTransport => "https",
    };
    let path = match config.transport.is_websocket() {
        true => first_path(config),
        false => "",
    };
    Address {
        name: config.name.clone(),
        transport: config.transport.name(),
        url: format!("{scheme}://{}{path}", bound.local_addr()),
    }
}

/// The WebTransport address of a QUIC listener, if it serves browsers.
fn webtransport(bound: &Bound) -> Option<Address> {
    let config = bound.listener();
    config.webtransport.then(|| Address {
        name: config.name.clone(),
        transport: Transport::WebTransport.name(),
        url: format!("https://{}{}", bound.local_addr(), first_path(config)),
    })
}

fn first_path(listener: &Listener) -> &str {
    listener.paths.first().map_or("", String::as_str)
}

/// The throw-away certificates of WebTransport listeners.
fn throwaway(config: &Config, listeners: &[Bound]) -> Vec<Certificate> {
    let throwaway = config
        .tls
        .iter()
        .filter(|tls| matches!(tls.source, CertSource::Throwaway));
    let found = throwaway.filter_map(|tls| {
        let user = listeners.iter().find(|bound| {
            let listener = bound.listener();
            listener.webtransport && listener.tls.first() == Some(&tls.name)
        })?;
        let sha256 = user.tls()?.leaf_sha256()?;
        Some(Certificate {
            name: tls.name.clone(),
            sha256: sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    });
    found.collect()
}

/// Commands to copy, for a first run.
fn first_commands(addresses: &[Address], certificates: &[Certificate]) -> String {
    let find = |transport| {
        addresses
            .iter()
            .find(|a| a.transport == transport)
            .map(|a| a.url.as_str())
    };
    let mut out = String::from(
        "\nTidegate runs with its embedded broker. Try (with mosquitto's clients: apt-get install mosquitto-clients):\n",
    );
    if let Some(tcp) = find("tcp") {
        let (host, port) = tcp
            .trim_start_matches("mqtt://")
            .rsplit_once(':')
            .unwrap_or((tcp, ""));
        out.push_str(&format!(
            "  mosquitto_sub -h {host} -p {port} -V 5 -i phone -c -x 300 -q 1 -t 'demo/#' -v\n  \
             mosquitto_pub -h {host} -p {port} -q 1 -t demo/hello -m world\n\
             Stop the first with Ctrl-C, publish again, start it again: the message is there.\n"
        ));
    }
    if let Some(ws) = find("ws") {
        out.push_str(&format!(
            "In a browser or Node (npm install mqtt):\n  \
             const mqtt = require('mqtt'); const c = mqtt.connect('{ws}');\n  \
             c.on('connect', () => c.subscribe('demo/#')); c.on('message', (t, m) => console.log(t, m.toString()));\n"
        ));
    }
    if let Some(quic) = find("quic") {
        out.push_str(&format!(
            "Over QUIC (ALPN mqtt, certificate not verified: it is a throw-away certificate), for example with emqtt:\n  \
             emqtt sub --enable-quic true -h {} -p {} -t 'demo/#'\n",
            quic.trim_start_matches("quic://")
                .rsplit_once(':')
                .map_or("127.0.0.1", |(h, _)| h),
            quic.rsplit_once(':').map_or("14567", |(_, p)| p),
        ));
    }
    if let (Some(url), Some(certificate)) = (find("webtransport"), certificates.first()) {
        out.push_str(&format!(
            "In a browser over WebTransport, with clients/mqtt-webtransport, from a page on this machine:\n  \
             connect(mqtt, '{}', {{ webTransport: {{ url: '{url}', serverCertificateHashes: ['{}'] }} }})\n",
            find("ws").unwrap_or_default(),
            certificate.sha256,
        ));
    }
    out
}
