//! Who a client is.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::auth::{Denial, Identity};
use crate::config::AuthMode;
use crate::mqtt::{Connect, Version};
use crate::transport::{ClientCertificate, NameError};

use crate::client::Clients;
use crate::client::connect::{Refusal, RefusalCause};

/// The client identifier of a CONNECT, or one that is assigned to it.
fn client_id(connect: &Connect<'_>) -> Result<Arc<str>, Refusal> {
    if !connect.client_id.is_empty() {
        return Ok(connect.client_id.into());
    }
    let version = connect.version;
    if version < Version::V5 && (!connect.clean_start || version == Version::V31) {
        return Err(Refusal::new(RefusalCause::EmptyClientId));
    }
    Ok(assigned_id().into())
}

/// Verifies the client's credentials, and finds its client identifier. Returns the owner of the
/// client's sessions too.
///
/// # Errors
/// The client is refused.
pub(super) async fn authenticate(
    clients: &Clients,
    mode: AuthMode,
    connect: &Connect<'_>,
    certificate: Option<Box<ClientCertificate>>,
    from: SocketAddr,
) -> Result<(Identity, Arc<str>), Refusal> {
    if connect.authentication_method.is_some() {
        return Err(Refusal::new(RefusalCause::AuthMethod));
    }
    let client_id = client_id(connect)?;
    let name = certificate.map(|certificate| certificate.name());
    let verified = clients
        .authenticator
        .verify(
            mode,
            &client_id,
            (connect.username, connect.password),
            name.clone().and_then(Result::ok),
            from,
        )
        .await;
    match verified {
        Ok(principal) => Ok((Identity::new(principal.name, client_id), principal.owner)),
        Err(denial) => Err(refusal(denial, name)),
    }
}

/// The refusal of a client; `name` is the one in its certificate.
fn refusal<T>(denial: Denial, name: Option<Result<T, NameError>>) -> Refusal {
    Refusal::new(match denial {
        Denial::Certificate => match name {
            None => RefusalCause::NoCertificate,
            Some(Err(error)) => RefusalCause::CertificateName(error),
            Some(Ok(_)) => RefusalCause::AnonymousCertificate,
        },
        Denial::Credentials | Denial::ClientId | Denial::Busy => RefusalCause::Denied(denial),
    })
}

/// Unique, and too random to be guessed [MQTT-3.1.3-6].
fn assigned_id() -> String {
    let high = getrandom::u64().unwrap_or_default();
    let low = getrandom::u64().unwrap_or_default();
    format!("auto-{high:016x}{low:016x}")
}
