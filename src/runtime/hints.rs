//! What a newcomer is told to type.

use std::net::SocketAddr;

use crate::config::{Listener, Transport};

/// Name, transport and URL of a bound listener.
pub(super) fn address(listener: &Listener, bound: SocketAddr) -> (String, &'static str, String) {
    let scheme = match listener.transport {
        Transport::Tcp => "mqtt",
        Transport::Tls => "mqtts",
        Transport::Ws => "ws",
        Transport::Wss => "wss",
        Transport::Quic => "quic",
    };
    let path = if listener.transport.is_websocket() {
        listener.paths.first().map_or("", String::as_str)
    } else {
        ""
    };
    (
        listener.name.clone(),
        listener.transport.name(),
        format!("{scheme}://{bound}{path}"),
    )
}

/// The same for the WebTransport of a QUIC listener.
pub(super) fn webtransport(
    listener: &Listener,
    bound: SocketAddr,
) -> Option<(String, &'static str, String)> {
    let path = listener.paths.first().map_or("", String::as_str);
    listener.webtransport.then(|| {
        (
            listener.name.clone(),
            "webtransport",
            format!("https://{bound}{path}"),
        )
    })
}

/// What a page must know of a throw-away certificate to be let through by its browser.
pub(super) struct Certificate {
    /// The name of its `[[tls]]`.
    pub name: String,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// Lines to copy, for the built-in configuration.
pub(super) fn what_to_type(
    lines: &[(String, &'static str, String)],
    certificates: &[Certificate],
) -> String {
    let find = |transport| {
        lines
            .iter()
            .find(|(_, t, _)| *t == transport)
            .map(|(_, _, url)| url.as_str())
    };
    let mut out = String::from("\nTidegate runs with its embedded core. Try:\n");
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
            "Over QUIC (ALPN mqtt, certificate not verified: it is a throw-away one), for example with emqtt:\n  \
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
