//! Dates and names in certificates and revocation lists, which the verifying library does not expose.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use x509_parser::prelude::{
    ASN1Time, CertificateRevocationList, FromDer, GeneralName, X509Certificate,
};

use crate::config::CertificateIdentity;

/// The most bytes of a client's name in its certificate.
const NAME_MAX_BYTES: usize = 512;

/// A time span of validity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first instant.
    pub from: SystemTime,
    /// The last instant.
    pub until: SystemTime,
}

impl Validity {
    fn new(from: ASN1Time, until: ASN1Time) -> Self {
        Self {
            from: instant(from),
            until: instant(until),
        }
    }
}

/// An earlier date than 1970 becomes 1970.
fn instant(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// The dates of a certificate, and its DNS names in lower case.
pub(super) fn dates_and_names(der: &[u8]) -> Result<(Validity, Vec<String>), String> {
    let (_, cert) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
    let validity = cert.validity();
    let names = alternative_names(&cert)
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    Ok((
        Validity::new(validity.not_before, validity.not_after),
        names,
    ))
}

/// The dates of a revocation list. A list without a date of the next update never expires.
pub(super) fn crl_validity(der: &[u8]) -> Result<Option<Validity>, String> {
    let (_, crl) = CertificateRevocationList::from_der(der).map_err(|error| error.to_string())?;
    let until = crl.next_update();
    Ok(until.map(|until| Validity::new(crl.last_update(), until)))
}

/// Why a client certificate does not name a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The certificate cannot be parsed.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// The subject has no common name.
    #[error("its subject has no common name (CN)")]
    NoCommonName,
    /// The subject has several common names, and two readers could choose different ones.
    #[error("its subject has more than one common name (CN)")]
    CommonNames,
    /// The common name has a string type that is not supported.
    #[error("its common name (CN) is of an unknown string type")]
    StringType,
    /// No DNS name among the subject alternative names.
    #[error("it has no DNS name among its subject alternative names")]
    NoDnsName,
    /// No URI among the subject alternative names.
    #[error("it has no URI among its subject alternative names")]
    NoUri,
    /// The name is empty, longer than 512 bytes, or has control characters.
    #[error("its name is empty, longer than 512 bytes, or has control characters")]
    Unusable,
}

/// The client that a verified certificate names.
pub(super) fn client_name(
    der: &[u8],
    identity: CertificateIdentity,
) -> Result<Arc<str>, NameError> {
    let (_, cert) = X509Certificate::from_der(der).map_err(|_| NameError::Unreadable)?;
    let mut names = alternative_names(&cert).iter();
    let name = match identity {
        CertificateIdentity::Cn => {
            let mut all = cert.subject().iter_common_name();
            let one = all.next().ok_or(NameError::NoCommonName)?;
            if all.next().is_some() {
                return Err(NameError::CommonNames);
            }
            let text = one.as_str();
            text.map_err(|_| NameError::StringType)?.to_owned()
        }
        CertificateIdentity::SanDns => names
            .find_map(|name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                _ => None,
            })
            .ok_or(NameError::NoDnsName)?,
        CertificateIdentity::SanUri => names
            .find_map(|name| match name {
                GeneralName::URI(name) => Some((*name).to_owned()),
                _ => None,
            })
            .ok_or(NameError::NoUri)?,
    };
    match name.is_empty() || name.len() > NAME_MAX_BYTES || name.contains(char::is_control) {
        true => Err(NameError::Unusable),
        false => Ok(name.into()),
    }
}

fn alternative_names<'a>(cert: &'a X509Certificate<'_>) -> &'a [GeneralName<'a>] {
    match cert.subject_alternative_name() {
        Ok(Some(extension)) => &extension.value.general_names,
        _ => &[],
    }
}
