//! Client certificates: which are accepted, and which client they name.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{AlertDescription, CertificateError, Error, RootCertStore};

use crate::config::{CertificateIdentity, ClientAuth, ClientCertificates};
use crate::transport::error::{CertificateFault, HandshakeError, LibraryError};
use crate::transport::tls::error::TlsError;
use crate::transport::tls::pem;
use crate::transport::tls::provider::provider;
use crate::transport::tls::x509::{self, NameError, Validity};

/// A verified client certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate(Result<Arc<str>, NameError>);

impl ClientCertificate {
    /// The client's name in the certificate, by the `identity` of the `[[tls]]`.
    ///
    /// # Errors
    /// See [`NameError`].
    pub fn name(&self) -> Result<Arc<str>, NameError> {
        self.0.clone()
    }
}

/// The verification of the clients of a `[[tls]]`.
#[derive(Debug)]
pub(super) struct Clients {
    verifier: Arc<dyn ClientCertVerifier>,
    required: bool,
    identity: CertificateIdentity,
    authorities: Vec<CertificateDer<'static>>,
    crls: Vec<CertificateRevocationListDer<'static>>,
    /// The validity of the revocation list that expires first.
    pub(super) crl_validity: Option<Validity>,
}

impl Clients {
    pub(super) fn load(from: &ClientCertificates) -> Result<Self, TlsError> {
        let authorities = pem::certs(&from.ca)?;
        let roots = Arc::new(pem::roots(&from.ca)?);
        let required = from.auth == ClientAuth::Required;
        let mut crls = Vec::new();
        let mut crl_validity: Option<Validity> = None;
        for file in &from.crl {
            let bad = |reason: String| TlsError::BadCrl {
                file: file.to_owned(),
                reason,
            };
            let read = pem::crls(file)?;
            verifier(&roots, &read, required).map_err(bad)?;
            for crl in &read {
                let validity = x509::crl_validity(crl).map_err(bad)?;
                let earliest = [crl_validity, validity].into_iter().flatten();
                crl_validity = earliest.min_by_key(|validity| validity.until);
            }
            crls.extend(read);
        }
        Ok(Self {
            verifier: verifier(&roots, &crls, required).map_err(TlsError::Config)?,
            required,
            identity: from.identity,
            authorities,
            crls,
            crl_validity,
        })
    }

    pub(super) fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.verifier)
    }

    /// Whether both accept the same certificates. Then each may accept the tickets of the other.
    pub(super) fn accepts_as(&self, other: &Self) -> bool {
        self.required == other.required
            && self.authorities == other.authorities
            && self.crls == other.crls
    }

    /// The client that the certificate of a connection names. `again` verifies the certificate again,
    /// because this handshake resumed an earlier one, or its verifier has been replaced.
    pub(super) fn identify(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        again: bool,
    ) -> Result<Option<Box<ClientCertificate>>, HandshakeError> {
        let refused = |error: &Error| HandshakeError::ClientCertificate {
            fault: fault(error).unwrap_or(CertificateFault::Other),
            why: LibraryError::Tls(error.clone()),
        };
        let Some((leaf, rest)) = chain.and_then(<[_]>::split_first) else {
            return match self.required {
                true => Err(refused(&Error::NoCertificatesPresented)),
                false => Ok(None),
            };
        };
        if again {
            self.verifier
                .verify_client_cert(leaf, rest, UnixTime::now())
                .map_err(|error| refused(&error))?;
        }
        let name = x509::client_name(leaf, self.identity);
        Ok(Some(Box::new(ClientCertificate(name))))
    }
}

/// Every certificate of a chain is checked against the revocation lists, which must exist and be valid,
/// as with nginx and HAProxy: a list that is not renewed must not let revoked clients in.
fn verifier(
    roots: &Arc<RootCertStore>,
    crls: &[CertificateRevocationListDer<'static>],
    required: bool,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider())
        .with_crls(crls.iter().cloned())
        .enforce_revocation_expiration();
    let builder = match required {
        true => builder,
        false => builder.allow_unauthenticated(),
    };
    builder.build().map_err(|error| error.to_string())
}

/// The fault of the client's certificate, if the handshake failed for that reason.
pub(super) fn fault(error: &Error) -> Option<CertificateFault> {
    use CertificateError as E;
    Some(match error {
        Error::NoCertificatesPresented => CertificateFault::Missing,
        Error::InvalidCertificate(error) => match error {
            E::Expired | E::ExpiredContext { .. } => CertificateFault::Expired,
            E::NotValidYet | E::NotValidYetContext { .. } => CertificateFault::Expired,
            E::Revoked => CertificateFault::Revoked,
            E::UnknownIssuer
            | E::UnknownRevocationStatus
            | E::ExpiredRevocationList
            | E::ExpiredRevocationListContext { .. } => CertificateFault::Untrusted,
            _ => CertificateFault::Other,
        },
        _ => return None,
    })
}

/// The error of a handshake that the client ended with this alert, if it says that the client does
/// not accept our certificate.
pub(in crate::transport) fn refused_by_client(alert: AlertDescription) -> Option<HandshakeError> {
    use AlertDescription as A;
    let refused = matches!(
        alert,
        A::UnknownCA
            | A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateExpired
            | A::CertificateRevoked
            | A::CertificateUnknown
            // The issuer's name is that of an authority of the client's, and its key is another.
            | A::DecryptError
    );
    refused.then(|| HandshakeError::CertificateRefused {
        alert: format!("{alert:?}"),
    })
}

/// The fault of the client's certificate, if the alert that we sent says so (RFC 8446 section 6.2).
/// QUIC's library reports only the alert.
pub(in crate::transport) const fn fault_of_alert(
    alert: AlertDescription,
) -> Option<CertificateFault> {
    use AlertDescription as A;
    Some(match alert {
        A::CertificateRequired => CertificateFault::Missing,
        A::CertificateExpired => CertificateFault::Expired,
        A::CertificateRevoked => CertificateFault::Revoked,
        A::UnknownCA => CertificateFault::Untrusted,
        A::BadCertificate | A::UnsupportedCertificate | A::CertificateUnknown => {
            CertificateFault::Other
        }
        _ => return None,
    })
}
