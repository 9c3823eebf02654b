//! Reading PEM files, with errors that name the file and the fault.

use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::config;
use crate::transport::tls::error::TlsError;

fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    config::files::read(file).map_err(|source| TlsError::Read {
        file: file.to_owned(),
        source,
    })
}

pub(super) fn certs(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certs = CertificateDer::pem_slice_iter(&read(file)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| TlsError::Pem {
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
    if certs.is_empty() {
        return Err(TlsError::NoCertificate {
            file: file.to_owned(),
        });
    }
    Ok(certs)
}

pub(super) fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(file)?).map_err(|error| match error {
        PemError::NoItemsFound => TlsError::NoKey {
            file: file.to_owned(),
        },
        error => TlsError::Pem {
            file: file.to_owned(),
            reason: error.to_string(),
        },
    })
}

pub(super) fn roots(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for cert in certs(file)? {
        roots.add(cert).map_err(|error| TlsError::BadCertificate {
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

/// The revocation lists of a file.
pub(super) fn crls(file: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let crls = CertificateRevocationListDer::pem_slice_iter(&read(file)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| TlsError::Pem {
            file: file.to_owned(),
            reason: error.to_string(),
        })?;
    if crls.is_empty() {
        return Err(TlsError::NoCrl {
            file: file.to_owned(),
        });
    }
    Ok(crls)
}
