//! Throw-away certificates: an authority and a server certificate for the loopback names.

use std::io;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// The PEM files of one authority and one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certs {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The server's certificate, for `localhost`, 127.0.0.1 and ::1.
    pub cert: PathBuf,
    /// The server's private key.
    pub key: PathBuf,
}

impl Certs {
    /// Makes new certificates in a folder: `ca.pem`, `server.pem`, `server.key`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn make(dir: &Path) -> io::Result<Self> {
        Self::make_for(dir, &["localhost", "127.0.0.1", "::1"])
    }

    /// Makes new certificates for the given names.
    ///
    /// # Errors
    /// As [`make`](Self::make).
    pub fn make_for(dir: &Path, names: &[&str]) -> io::Result<Self> {
        let ca_key = KeyPair::generate().map_err(io::Error::other)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(io::Error::other)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "tidegate kit authority");
        let ca_cert = params.self_signed(&ca_key).map_err(io::Error::other)?;
        let issuer = Issuer::new(params, ca_key);
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let names = names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>();
        let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "tidegate kit server");
        let cert = params.signed_by(&key, &issuer).map_err(io::Error::other)?;
        let this = Self {
            ca: dir.join("ca.pem"),
            cert: dir.join("server.pem"),
            key: dir.join("server.key"),
        };
        std::fs::write(&this.ca, ca_cert.pem())?;
        std::fs::write(&this.cert, cert.pem())?;
        std::fs::write(&this.key, key.serialize_pem())?;
        Ok(this)
    }
}
