//! From the text of a file to plain values.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use crate::config::address::WS_PATH;
use crate::config::builtin::{
    MEMORY_MAX_PERCENT, MEMORY_QUEUES_PERCENT, MEMORY_SESSIONS_PERCENT, NODE_ID_EMBEDDED,
    PING_INTERVAL, TLS_NAME, listeners, throwaway,
};
use crate::config::choices::{
    AclMode, AuthMode, CertificateIdentity, ClientAuth, ClientIdRule, ProxyProtocol, RealIpHeader,
    ResponseTopicRule, Transport,
};
use crate::config::document::Document;
use crate::config::error::{Error, Problem};
use crate::config::types::{
    AclAllow, AclRule, Admin, Auth, CertSource, ClientCertificates, Config, Drain, Limits,
    Listener, Log, Memory, Node, Session, Store, Tls, Upstream,
};
use crate::config::units::{OneOrMore, Share, SpanOrNone};
use crate::config::{check, files, host, origin};

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When the file cannot be read, or all mistakes in it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = files::read_text(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Reads and checks a text. Errors name `path`, and relative paths are resolved against its
    /// directory.
    ///
    /// # Errors
    /// All mistakes in the text.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let invalid = |problems| Error::Invalid {
            path: path.to_owned(),
            problems,
        };
        let doc = Document::parse(text).map_err(|p| invalid(vec![p]))?;
        let file: File = toml::from_str(text).map_err(|e| invalid(vec![doc.problem(&e)]))?;
        let mut problems = Vec::new();
        let mut config = file.resolve(path, &doc, &mut problems);
        config.resolve_paths(path);
        check::check(&config, &doc, &mut problems);
        if problems.is_empty() {
            Ok(config)
        } else {
            problems.sort_by_key(|p| p.line);
            Err(invalid(problems))
        }
    }

    /// Resolves relative paths against the directory of the file.
    fn resolve_paths(&mut self, file: &Path) {
        // A file that is named without a directory is in the working directory. An empty path is not a
        // directory, and would leave a relative path without a parent.
        let base = match file.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let resolve = |path: &mut PathBuf| *path = base.join(&*path);
        resolve(&mut self.node.data_dir);
        for tls in &mut self.tls {
            if let CertSource::Files { cert, key } = &mut tls.source {
                resolve(cert);
                resolve(key);
            }
            if let Some(clients) = &mut tls.clients {
                resolve(&mut clients.ca);
                clients.crl.iter_mut().for_each(resolve);
            }
            tls.key_log.iter_mut().for_each(resolve);
        }
        let upstream = &mut self.upstream;
        let optional = [
            &mut upstream.password_file,
            &mut upstream.tls.ca,
            &mut upstream.tls.cert,
            &mut upstream.tls.key,
            &mut self.auth.file,
        ];
        optional.into_iter().flatten().for_each(resolve);
    }
}

/// A file, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    version: u32,
    node: Node,
    tls: Vec<RawTls>,
    listeners: Option<Vec<RawListener>>,
    upstream: Upstream,
    session: Session,
    limits: Limits,
    memory: RawMemory,
    store: Store,
    auth: RawAuth,
    acl: Vec<AclRule>,
    admin: Admin,
    log: Log,
    drain: Drain,
}

impl Default for File {
    fn default() -> Self {
        Self {
            version: 1,
            node: Node::default(),
            tls: Vec::new(),
            listeners: None,
            upstream: Upstream::default(),
            session: Session::default(),
            limits: Limits::default(),
            memory: RawMemory::default(),
            store: Store::default(),
            auth: RawAuth::default(),
            acl: Vec::new(),
            admin: Admin::default(),
            log: Log::default(),
            drain: Drain::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    name: String,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    #[serde(default)]
    crl: OneOrMore,
    client_auth: Option<ClientAuth>,
    identity: Option<CertificateIdentity>,
    key_log: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListener {
    name: Option<String>,
    transport: Transport,
    bind: SocketAddr,
    path: Option<OneOrMore>,
    tls: Option<OneOrMore>,
    origins: Option<Vec<String>>,
    auth: Option<AuthMode>,
    #[serde(default)]
    mount: String,
    trusted_proxies: Option<Vec<String>>,
    proxy_protocol: Option<ProxyProtocol>,
    real_ip_header: Option<RealIpHeader>,
    ping_interval: Option<SpanOrNone>,
    #[serde(default)]
    webtransport: bool,
    #[serde(default)]
    early_data: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMemory {
    max: Share,
    sessions: Share,
    queues: Share,
}

impl Default for RawMemory {
    fn default() -> Self {
        Self {
            max: Share::Percent(MEMORY_MAX_PERCENT),
            sessions: Share::Percent(MEMORY_SESSIONS_PERCENT),
            queues: Share::Percent(MEMORY_QUEUES_PERCENT),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAuth {
    mode: Option<AuthMode>,
    file: Option<PathBuf>,
    acl: Option<AclMode>,
    client_id: Option<ClientIdRule>,
    certificate_users: bool,
    response_topic: Option<ResponseTopicRule>,
}

impl<'de> Deserialize<'de> for AclAllow {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut allow = Self::default();
        for word in Vec::<String>::deserialize(d)? {
            match word.as_str() {
                "publish" => allow.publish = true,
                "subscribe" => allow.subscribe = true,
                other => {
                    let known = ["publish", "subscribe"];
                    return Err(D::Error::custom(crate::config::units::not_a_choice(
                        other,
                        &known,
                        &[],
                    )));
                }
            }
        }
        Ok(allow)
    }
}

impl File {
    fn resolve(self, path: &Path, doc: &Document<'_>, problems: &mut Vec<Problem>) -> Config {
        let mut say = |key: &str, message: String| {
            problems.push(Problem {
                line: doc.line(key),
                key: Some(key.to_owned()),
                message,
            });
        };
        if self.version != 1 {
            say(
                "version",
                format!("{} is not known; allowed: 1", self.version),
            );
        }
        let mode = self.auth.mode.unwrap_or(AuthMode::Anonymous);
        let acl = match (self.auth.acl, self.acl.is_empty()) {
            (Some(mode), _) => mode,
            (None, true) => AclMode::Open,
            (None, false) => AclMode::Rules,
        };
        let mut tls: Vec<Tls> = self
            .tls
            .into_iter()
            .enumerate()
            .map(|(i, raw)| raw.resolve(i, &mut say))
            .collect();
        if tls.is_empty() {
            tls.push(throwaway());
        }
        let listeners = match self.listeners {
            None => listeners()
                .into_iter()
                .map(|l| Listener { auth: mode, ..l })
                .collect(),
            Some(list) => list
                .into_iter()
                .enumerate()
                .map(|(i, raw)| raw.resolve(i, mode, &mut say))
                .collect(),
        };
        let mut node = self.node;
        if self.upstream.is_embedded() && node.id.is_empty() {
            NODE_ID_EMBEDDED.clone_into(&mut node.id);
        }
        let max = self.memory.max.of(host::memory());
        let mut config = Config {
            source: Some(path.to_owned()),
            node,
            tls,
            listeners,
            upstream: self.upstream,
            session: self.session,
            limits: self.limits,
            memory: Memory {
                max,
                sessions: self.memory.sessions.of(max),
                queues: self.memory.queues.of(max),
            },
            store: self.store,
            auth: Auth {
                mode,
                file: self.auth.file,
                acl,
                client_id: self.auth.client_id.unwrap_or(ClientIdRule::Any),
                certificate_users: self.auth.certificate_users,
                response_topic: self
                    .auth
                    .response_topic
                    .unwrap_or(ResponseTopicRule::Remove),
            },
            acl: self.acl,
            admin: self.admin,
            log: self.log,
            drain: self.drain,
        };
        config.fit_small_memory(|key| doc.has(key));
        config
    }
}

impl RawTls {
    fn resolve(self, i: usize, say: &mut impl FnMut(&str, String)) -> Tls {
        if self.client_ca.is_none() {
            for (key, written) in [
                ("crl", !self.crl.0.is_empty()),
                ("client_auth", self.client_auth.is_some()),
                ("identity", self.identity.is_some()),
            ] {
                if written {
                    let message = "needs client_ca, the authorities that issue client certificates";
                    say(&format!("tls[{i}].{key}"), message.to_owned());
                }
            }
        }
        let clients = self.client_ca.map(|ca| ClientCertificates {
            ca,
            crl: self.crl.0.into_iter().map(PathBuf::from).collect(),
            auth: self.client_auth.unwrap_or(ClientAuth::Required),
            identity: self.identity.unwrap_or(CertificateIdentity::Cn),
        });
        let source = match (self.cert, self.key) {
            (Some(cert), Some(key)) => CertSource::Files { cert, key },
            (None, None) => CertSource::Throwaway,
            _ => {
                let message = "cert and key belong together; `tidegate certs` makes a pair";
                say(&format!("tls[{i}]"), message.to_owned());
                CertSource::Throwaway
            }
        };
        Tls {
            name: self.name,
            source,
            clients,
            key_log: self.key_log,
        }
    }
}

impl RawListener {
    fn resolve(self, i: usize, mode: AuthMode, say: &mut impl FnMut(&str, String)) -> Listener {
        let transport = self.transport;
        let mut unused = |key: &str, only: &str| {
            let message = format!(
                "not used by transport \"{}\"; only {only} use it: remove it",
                transport.name()
            );
            say(&format!("listeners[{i}].{key}"), message);
        };
        let webtransport = self.webtransport && transport == Transport::Quic;
        if !transport.is_websocket() {
            if !webtransport {
                let only = "ws, wss, and quic with webtransport = true,";
                if self.path.is_some() {
                    unused("path", only);
                }
                if self.origins.is_some() {
                    unused("origins", only);
                }
            }
            for (key, written) in [
                ("real_ip_header", self.real_ip_header.is_some()),
                ("ping_interval", self.ping_interval.is_some()),
            ] {
                if written {
                    unused(key, "ws and wss");
                }
            }
        }
        if transport == Transport::Quic {
            for (key, written) in [
                ("trusted_proxies", self.trusted_proxies.is_some()),
                ("proxy_protocol", self.proxy_protocol.is_some()),
            ] {
                if written {
                    unused(key, "tcp, tls, ws and wss");
                }
            }
        }
        if self.webtransport && !webtransport {
            unused("webtransport", "quic listeners");
        }
        if self.early_data && transport != Transport::Quic {
            unused("early_data", "quic listeners");
        }
        if !transport.is_encrypted() && self.tls.is_some() {
            unused("tls", "tls, wss and quic");
        }
        let mut origins = Vec::new();
        for written in self.origins.iter().flatten() {
            match origin::parse(written) {
                Ok(origin) => origins.push(origin),
                Err(why) => {
                    let message = format!("{written:?} is no origin; {why}");
                    say(&format!("listeners[{i}].origins"), message);
                }
            }
        }
        let mut trusted_proxies = Vec::new();
        for (n, text) in self.trusted_proxies.iter().flatten().enumerate() {
            match network(text) {
                Ok(network) => trusted_proxies.push(network),
                Err(why) => say(&format!("listeners[{i}].trusted_proxies[{n}]"), why),
            }
        }
        Listener {
            name: self.name.unwrap_or_else(|| transport.name().to_owned()),
            transport,
            bind: self.bind,
            paths: self
                .path
                .map_or_else(|| vec![WS_PATH.to_owned()], |paths| paths.0),
            tls: match (transport.is_encrypted(), self.tls) {
                (false, _) => Vec::new(),
                (true, None) => vec![TLS_NAME.to_owned()],
                (true, Some(names)) => names.0,
            },
            origins,
            webtransport,
            early_data: self.early_data && transport == Transport::Quic,
            auth: self.auth.unwrap_or(mode),
            mount: self.mount,
            trusted_proxies,
            proxy_protocol: self.proxy_protocol.unwrap_or(ProxyProtocol::Off),
            // A proxy that sends a PROXY header passes the request on as it is, so a header in it is
            // the client's own.
            real_ip_header: self.real_ip_header.unwrap_or(match self.proxy_protocol {
                Some(ProxyProtocol::Required) => RealIpHeader::None,
                _ => RealIpHeader::XForwardedFor,
            }),
            ping_interval: self.ping_interval.map_or(Some(PING_INTERVAL), |p| p.0),
        }
    }
}

/// A network, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(address.to_canonical().into());
    }
    let wrong =
        || format!("{text:?} is no network; write it as \"10.0.0.0/8\" or \"2001:db8::/32\"");
    let network: IpNet = text.parse().map_err(|_| wrong())?;
    if let IpNet::V6(mapped) = &network
        && mapped.addr().to_ipv4_mapped().is_some()
    {
        return Err(format!("{text:?} is an IPv4 network; write it as one"));
    }
    if network.trunc() != network {
        return Err(format!(
            "{text:?} has bits behind its prefix; did you mean \"{}\"?",
            network.trunc()
        ));
    }
    Ok(network)
}
