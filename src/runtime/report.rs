//! The report of `tidegate check` on a valid configuration.

use std::fmt::Write as _;

use crate::config::{AclMode, AuthMode, ClientAuth, Config, Listener, Transport};
use crate::router::TYPICAL_SESSION_BYTES;
use crate::telemetry::{Label as _, MemoryAccount};

use crate::runtime::convert;
use crate::runtime::open_files::Cap;

const KIB: u64 = 1 << 10;
/// Memory of one TLS or QUIC handshake.
const HANDSHAKE_BYTES: u64 = 64 * KIB;
/// Bytes that a QUIC client may have sent and we not read before its CONNECT.
const UNAUTHENTICATED_BYTES: u64 = 32 * KIB;

/// Findings in the files that a valid configuration names.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    /// A line for each certificate and revocation list, with its date.
    pub(super) certificates: Vec<String>,
    /// Things that work now and should be changed all the same.
    pub(super) warnings: Vec<String>,
}

/// The most memory that one account may use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PlanLine {
    account: MemoryAccount,
    bytes: u64,
    /// The keys that set the number, or how it was computed.
    from: String,
}

/// The most memory that each account may use with so many connections, all of them idle.
fn memory_plan(config: &Config, connections: usize) -> Vec<PlanLine> {
    let line = |account, bytes, from: &str| PlanLine {
        account,
        bytes,
        from: from.to_owned(),
    };
    let idle = config
        .listeners
        .iter()
        .map(|l| idle_bytes(l.transport))
        .max();
    let idle = idle.unwrap_or_default();
    let has = |any: &[Transport]| config.listeners.iter().any(|l| any.contains(&l.transport));
    let quic = has(&[Transport::Quic]);
    // TLS and QUIC have `handshakes_max` places each.
    let kinds = u64::from(has(&[Transport::Tls, Transport::Wss])) + u64::from(quic);
    let handshakes = kinds * u64::from(config.limits.handshakes_max);
    let unauthenticated = match quic {
        true => format!(
            ", with QUIC up to {} more before CONNECT",
            size(UNAUTHENTICATED_BYTES)
        ),
        false => String::new(),
    };
    let sessions = config.memory.sessions;
    let kept = sessions / 10 * 9 / TYPICAL_SESSION_BYTES as u64;
    let mut plan = vec![
        line(
            MemoryAccount::Sessions,
            sessions,
            &format!(
                "memory.sessions; nine tenths hold about {kept} sessions with a subscription each"
            ),
        ),
        line(MemoryAccount::Queues, config.memory.queues, "memory.queues"),
        line(
            MemoryAccount::PublishesWaiting,
            config.upstream.publishes_waiting,
            "upstream.publishes_waiting",
        ),
        line(
            MemoryAccount::RetainedCache,
            config.upstream.retained_cache,
            "upstream.retained_cache",
        ),
        line(
            MemoryAccount::Handshakes,
            handshakes * HANDSHAKE_BYTES,
            &format!(
                "limits.handshakes_max for each of TLS and QUIC, {} each",
                size(HANDSHAKE_BYTES)
            ),
        ),
        line(
            MemoryAccount::Connections,
            connections as u64 * idle,
            &format!(
                "{connections} connections, about {} each while idle{unauthenticated}",
                size(idle)
            ),
        ),
    ];
    if config.upstream.is_embedded() {
        plan.push(line(
            MemoryAccount::EmbeddedBroker,
            convert::embedded_bytes(config),
            "an eighth of memory.max",
        ));
    }
    plan
}

/// The whole report, for standard output.
pub(super) fn report(config: &Config, cap: &Cap, findings: &Findings) -> String {
    let mut out = String::new();
    let mut say = |line: std::fmt::Arguments<'_>| {
        let _ = writeln!(out, "{line}");
    };
    match &config.source {
        Some(path) => say(format_args!("{}: valid", path.display())),
        None => say(format_args!("built-in configuration: valid")),
    }
    say(format_args!("\nlisteners"));
    for listener in &config.listeners {
        let auth = match listener.auth {
            AuthMode::Anonymous => "anonymous",
            AuthMode::File => "password file",
            AuthMode::Mtls => "client certificate",
        };
        let also = certificates_of(config, listener);
        let (name, transport, bind) = (&listener.name, listener.transport.name(), listener.bind);
        say(format_args!(
            "  {name:<16} {transport:<5} {bind}, {auth}{also}"
        ));
    }
    if !findings.certificates.is_empty() {
        say(format_args!("certificates"));
        for line in &findings.certificates {
            say(format_args!("  {line}"));
        }
    }
    let servers: Vec<String> = config
        .upstream
        .servers
        .iter()
        .map(ToString::to_string)
        .collect();
    say(format_args!("broker\n  {}", servers.join(", ")));
    match config.auth.acl {
        AclMode::Open => say(format_args!("topics\n  open to every client")),
        AclMode::Rules => say(format_args!("topics\n  {} rules", config.acl.len())),
    }

    let plan = memory_plan(config, cap.connections);
    let sum: u64 = plan.iter().map(|line| line.bytes).sum();
    let max = config.memory.max;
    say(format_args!("memory, at worst"));
    for PlanLine {
        account,
        bytes,
        from,
    } in &plan
    {
        say(format_args!(
            "  {:<18} {:>10}  {from}",
            account.name(),
            size(*bytes)
        ));
    }
    say(format_args!("  {:<18} {:>10}", "sum", size(sum)));
    say(format_args!(
        "  {:<18} {:>10}  memory.max",
        "total",
        size(max)
    ));
    let busy = u64::from(config.limits.packet_max) + u64::from(config.limits.output_buffer);
    say(format_args!(
        "  the rest, {}, is for {} clients at once with a largest packet and a \
         full output buffer ({} each)",
        size(max.saturating_sub(sum)),
        (max.saturating_sub(sum) / busy).min(cap.connections as u64),
        size(busy),
    ));
    say(format_args!("connections\n  {} at once", cap.connections));
    if sum > max {
        say(format_args!(
            "warning: these accounts are together larger than memory.max: lower memory.queues, \
             upstream.publishes_waiting or limits.connections_max, or raise memory.max"
        ));
    }
    if let Some(note) = &cap.note {
        say(format_args!("note: {note}"));
    }
    for warning in findings.warnings.iter().chain(&cap.warning) {
        say(format_args!("warning: {warning}"));
    }
    out
}

/// Whether a listener asks its clients for a certificate, for the end of its line.
fn certificates_of(config: &Config, listener: &Listener) -> &'static str {
    let first = listener.tls.first();
    let tls = config.tls.iter().find(|t| Some(&t.name) == first);
    match tls.and_then(|tls| tls.clients.as_ref()).map(|c| c.auth) {
        Some(ClientAuth::Required) => ", certificate required",
        Some(ClientAuth::Optional) => ", certificate optional",
        None => "",
    }
}

/// Most bytes of an idle connection; the benches check it.
fn idle_bytes(transport: Transport) -> u64 {
    match transport {
        Transport::Tcp | Transport::Ws => 8 * KIB,
        Transport::Tls | Transport::Wss => 16 * KIB,
        Transport::Quic | Transport::WebTransport => 36 * KIB,
    }
}

/// A number of bytes with its unit.
fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if value.fract() == 0.0 {
        format!("{value} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Memory;

    fn cap(connections: usize) -> Cap {
        Cap {
            connections,
            warning: None,
            note: None,
        }
    }

    fn config() -> Config {
        let mut config = Config::builtin();
        config.memory = Memory {
            max: 8 << 30,
            sessions: 1 << 30,
            queues: 2 << 30,
        };
        config
    }

    #[test]
    fn accounts_are_named_with_their_keys_and_summed() {
        let findings = Findings {
            certificates: vec!["default          certificate until then".to_owned()],
            warnings: vec![],
        };
        let report = report(&config(), &cap(10_000), &findings);
        let kept = (1 << 30) / 10 * 9 / TYPICAL_SESSION_BYTES;
        let sessions = format!(
            "  sessions                1 GiB  memory.sessions; nine tenths hold about {kept} sessions with a subscription each"
        );
        for line in [
            "built-in configuration: valid",
            "  quic             quic  127.0.0.1:14567, anonymous",
            "  embedded:",
            "  default          certificate until then",
            &sessions,
            "  queues                  2 GiB  memory.queues",
            "  publishes_waiting      64 MiB  upstream.publishes_waiting",
            "  connections         351.6 MiB  10000 connections, about 36 KiB each while idle, with QUIC up to 32 KiB more before CONNECT",
            "  embedded_broker         1 GiB  an eighth of memory.max",
            "  sum                   4.6 GiB",
            "  total                   8 GiB  memory.max",
            "  10000 at once",
        ] {
            assert!(report.lines().any(|l| l == line), "{line}\n{report}");
        }
        assert!(!report.contains("warning"), "{report}");
    }

    #[test]
    fn a_plan_larger_than_the_memory_has_a_warning() {
        let mut config = config();
        config.memory.max = 3 << 30;
        let report = report(&config, &cap(100_000), &Findings::default());
        assert!(report.contains("warning: these accounts"), "{report}");
    }

    #[test]
    fn sizes() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(64 << 20), "64 MiB");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(5 << 50), "5120 TiB");
    }
}
