//! Choosing the certificate for a client.

use std::collections::HashMap;
use std::sync::Arc;

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::transport::tls::material::Material;

type Keys = Vec<Arc<CertifiedKey>>;

/// Chooses by the name that the client asks for (SNI, RFC 6066 section 3): a certificate with that name,
/// then one with a wildcard that covers it, then the first of all. Among equals it takes the first whose
/// key the client can verify, so that an ECDSA and an RSA certificate can be used together.
#[derive(Debug)]
pub(super) struct BySni {
    all: Keys,
    exact: HashMap<String, Keys>,
    /// The key is the text after `*.`.
    wildcard: HashMap<String, Keys>,
}

impl BySni {
    pub(super) fn new(materials: &[Arc<Material>]) -> Self {
        let mut this = Self {
            all: Vec::new(),
            exact: HashMap::default(),
            wildcard: HashMap::default(),
        };
        for material in materials {
            this.all.push(Arc::clone(&material.certified));
            for name in &material.names {
                let (map, name) = match name.strip_prefix("*.") {
                    Some(parent) => (&mut this.wildcard, parent),
                    None => (&mut this.exact, name.as_str()),
                };
                let keys = map.entry(name.to_owned()).or_default();
                keys.push(Arc::clone(&material.certified));
            }
        }
        this
    }

    /// All certificates, the best match for the name first.
    fn order(&self, name: Option<&str>) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let name = name.map(str::to_ascii_lowercase).unwrap_or_default();
        let exact = self.exact.get(&name);
        // A wildcard stands for one label (RFC 9525 section 6.3).
        let parent = name.split_once('.').map(|(_, parent)| parent);
        let wildcard = parent.and_then(|parent| self.wildcard.get(parent));
        let named = exact.into_iter().chain(wildcard).flatten();
        named.chain(&self.all)
    }
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let schemes = hello.signature_schemes();
        let fits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        let mut order = self.order(hello.server_name());
        order.find(fits).or_else(|| self.all.first()).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn material(names: &[&str]) -> Arc<Material> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        Arc::new(Material::ephemeral(&names).expect("made"))
    }

    #[test]
    fn other_names_get_the_first_certificate() {
        let first = material(&["edge.example"]);
        let wide = material(&["*.example", "other.test"]);
        let exact = material(&["a.example"]);
        let all = [&first, &wide, &exact].map(Arc::clone);
        let resolver = BySni::new(&all);
        for (name, expected) in [
            (Some("edge.example"), &first),
            (Some("A.EXAMPLE"), &exact),
            (Some("b.example"), &wide),
            (Some("other.test"), &wide),
            (Some("a.b.example"), &first),
            (Some("example"), &first),
            (Some("unknown.test"), &first),
            (None, &first),
        ] {
            let found = resolver.order(name).next().expect("never empty");
            assert!(Arc::ptr_eq(found, &expected.certified), "{name:?}");
        }
    }
}
