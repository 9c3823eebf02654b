//! Servers of `upstream.servers` that are listeners of this process: every message would circle.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};

use crate::config::{Config, Server, Transport};

use crate::runtime::error::StartError;

/// Looks for such a server by the addresses. Names are looked up, which may take as long as the
/// system's resolver does; a name without an address is left to the links.
///
/// # Errors
/// [`StartError::Config`] with the key.
pub(super) fn refuse(config: &Config) -> Result<(), StartError> {
    for (n, server) in config.upstream.servers.iter().enumerate() {
        let Server::Remote { host, port, .. } = server else {
            continue;
        };
        let Ok(addresses) = (host.as_str(), *port).to_socket_addrs() else {
            continue;
        };
        for address in addresses {
            let own = config.listeners.iter().find(|listener| {
                listener.transport != Transport::Quic && leads_to(address, listener.bind)
            });
            if let Some(listener) = own {
                return Err(StartError::Config(format!(
                    "upstream.servers[{n}]: {server} is listener \"{}\" of this Tidegate, so every \
                     message would circle: write the broker's address",
                    listener.name
                )));
            }
        }
    }
    Ok(())
}

/// Whether a connection to `address` arrives at a listener that is bound to `bind`.
fn leads_to(address: SocketAddr, bind: SocketAddr) -> bool {
    // The system chooses the port of a listener with port 0, and nobody can name it before.
    if address.port() != bind.port() || bind.port() == 0 {
        return false;
    }
    let (to, at) = (address.ip().to_canonical(), bind.ip().to_canonical());
    to == at || to.is_unspecified() || (at.is_unspecified() && is_of_this_machine(to))
}

/// Whether an address belongs to this machine: only then a socket can be bound to it.
fn is_of_this_machine(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_server_that_is_a_listener_of_its_own_is_refused() {
        let found = |server: &str, transport: &str, bind: &str| {
            let text = format!(
                "[node]\nid = \"a\"\n[upstream]\nservers = [\"mqtt://192.0.2.1\", \"{server}\"]\n\
                 [auth]\nacl = \"open\"\n\
                 [[listeners]]\ntransport = \"quic\"\nbind = \"127.0.0.1:1\"\n\
                 [[listeners]]\nname = \"own\"\ntransport = \"{transport}\"\nbind = \"{bind}\"\n"
            );
            let config = Config::parse(&text, Path::new("t.toml")).expect("a configuration");
            match refuse(&config) {
                Ok(()) => false,
                Err(error) => {
                    let error = error.to_string();
                    let named = error.contains("upstream.servers[1]") && error.contains("\"own\"");
                    assert!(named, "{error}");
                    true
                }
            }
        };
        assert!(found("mqtt://127.0.0.1:1883", "tcp", "127.0.0.1:1883"));
        assert!(found("mqtt://localhost:1883", "tcp", "127.0.0.1:1883"));
        assert!(found("mqtt://127.0.0.1:1883", "tcp", "0.0.0.0:1883"));
        assert!(found("mqtt://127.0.0.1:1883", "tcp", "[::]:1883"));
        assert!(found("mqtt://[::1]:1883", "tcp", "[::]:1883"));
        assert!(found(
            "mqtt://[::ffff:127.0.0.1]:1883",
            "tcp",
            "127.0.0.1:1883"
        ));
        assert!(found("ws://127.0.0.1:8083/mqtt", "ws", "127.0.0.1:8083"));
        assert!(!found("mqtt://127.0.0.1:1884", "tcp", "127.0.0.1:1883"));
        assert!(!found("mqtt://127.0.0.2:1883", "tcp", "127.0.0.1:1883"));
        assert!(!found("mqtt://192.0.2.7:1883", "tcp", "0.0.0.0:1883"));
        // UDP is another space of ports.
        assert!(!found("mqtt://127.0.0.1:1", "tcp", "127.0.0.1:1883"));
    }
}
