//! A client's TLS session tickets, and how often one was at hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::NamedGroup;
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::pki_types::ServerName;

/// The number of server names for which tickets are kept; a dialer uses one name.
const NAMES: usize = 4;

/// Keeps tickets in memory and counts the handshakes that had no ticket to offer.
#[derive(Debug)]
pub(crate) struct Tickets {
    kept: Arc<ClientSessionMemoryCache>,
    missed: AtomicU64,
}

impl Tickets {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            kept: Arc::new(ClientSessionMemoryCache::new(NAMES)),
            missed: AtomicU64::new(0),
        })
    }

    /// The number of full handshakes: no ticket was available.
    pub(crate) fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.kept.set_kx_hint(name, group);
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.kept.kx_hint(name)
    }

    fn set_tls12_session(&self, name: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.kept.set_tls12_session(name, value);
    }

    fn tls12_session(&self, name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.kept.tls12_session(name)
    }

    fn remove_tls12_session(&self, name: &ServerName<'static>) {
        self.kept.remove_tls12_session(name);
    }

    fn insert_tls13_ticket(&self, name: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.kept.insert_tls13_ticket(name, value);
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let ticket = self.kept.take_tls13_ticket(name);
        if ticket.is_none() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
        ticket
    }
}
