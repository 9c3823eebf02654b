//! Who a client is.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::auth::Identity;
use crate::config::AuthMode;
use crate::mqtt::{Connect, ReasonCode, Version};
use crate::telemetry::RefusedReason;
use crate::transport::ClientCertificate;

use crate::client::Clients;
use crate::client::connect::Refusal;

/// The client identifier of a CONNECT, or one that is assigned to it.
fn client_id(connect: &Connect<'_>) -> Result<Arc<str>, Refusal> {
    if !connect.client_id.is_empty() {
        return Ok(connect.client_id.into());
    }
    let version = connect.version;
    if version < Version::V5 && (!connect.clean_start || version == Version::V31) {
        return Err(Refusal::new(
            RefusedReason::ClientId,
            ReasonCode::CLIENT_IDENTIFIER_NOT_VALID,
            "an empty client identifier needs Clean Session [MQTT-3.1.3-8]",
        ));
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
        return Err(Refusal::new(
            RefusedReason::AuthMethod,
            ReasonCode::BAD_AUTHENTICATION_METHOD,
            "enhanced authentication is not offered",
        ));
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
        Err(code) => Err(refusal(code, name)),
    }
}

/// Why the authenticator refused a client; `name` is the one in its certificate.
fn refusal<T>(code: ReasonCode, name: Option<Result<T, &'static str>>) -> Refusal {
    let (label, why) = match code {
        ReasonCode::NOT_AUTHORIZED => (
            RefusedReason::NotAuthorized,
            match name {
                None => "the client gave no certificate",
                Some(Err(why)) => why,
                Some(Ok(_)) => "the name in its certificate stands for clients without one",
            },
        ),
        ReasonCode::CLIENT_IDENTIFIER_NOT_VALID => (
            RefusedReason::ClientId,
            "auth.client_id = \"username\": the client identifier must be the user name, or the \
             name in the certificate",
        ),
        ReasonCode::BAD_USER_NAME_OR_PASSWORD => (
            RefusedReason::BadCredentials,
            "the user name or the password is wrong",
        ),
        _ => (RefusedReason::Other, "too many passwords to verify at once"),
    };
    Refusal::new(label, code, why)
}

/// Unique, and too random to be guessed [MQTT-3.1.3-6].
fn assigned_id() -> String {
    let high = getrandom::u64().unwrap_or_default();
    let low = getrandom::u64().unwrap_or_default();
    format!("auto-{high:016x}{low:016x}")
}
