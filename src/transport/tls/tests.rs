//! Good and bad files.

use std::path::Path;

use super::*;
use crate::transport::selfsigned::{self, tests::TempDir};

fn names() -> Vec<String> {
    vec!["localhost".to_owned(), "127.0.0.1".to_owned()]
}

#[test]
fn generated_files_load_on_both_sides() {
    let dir = TempDir::new();
    let files = selfsigned::generate(dir.path(), &names()).expect("generated");
    let tls = ServerTls::load(&files.cert, &files.key).expect("loads");
    assert!(!tls.leaf().is_empty());
    assert_eq!(tls.current().quic.alpn_protocols, [b"mqtt"]);
    assert_eq!(tls.current().http.alpn_protocols, [b"http/1.1"]);
    ClientTls::load(
        Some(&files.ca),
        Some(&files.cert),
        Some(&files.key),
        Some("broker.example".to_owned()),
        vec!["mqtt".to_owned()],
    )
    .expect("client side loads");
}

#[test]
fn errors_name_the_file_and_the_fault() {
    let dir = TempDir::new();
    let one = selfsigned::generate(&dir.path().join("one"), &names()).expect("one");
    let two = selfsigned::generate(&dir.path().join("two"), &names()).expect("two");
    let text = |cert: &Path, key: &Path| {
        ServerTls::load(cert, key)
            .expect_err("must be refused")
            .to_string()
    };
    let mismatch = text(&one.cert, &two.key);
    assert!(mismatch.contains("does not belong"), "{mismatch}");
    assert!(mismatch.contains("two/edge.key"), "{mismatch}");
    assert!(text(&one.key, &one.key).contains("holds no certificate"));
    assert!(text(&one.cert, &one.cert).contains("holds no unencrypted private key"));
    let missing = text(&dir.path().join("none.pem"), &one.key);
    assert!(missing.contains("none.pem: cannot be read"), "{missing}");
    let junk = dir.path().join("junk.pem");
    std::fs::write(
        &junk,
        "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n",
    )
    .expect("writes");
    assert!(text(&junk, &one.key).contains("junk.pem: not valid PEM"));
    std::fs::write(
        &junk,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .expect("writes");
    assert!(text(&junk, &one.key).contains("junk.pem: certificate not usable"));
}

#[test]
fn half_an_identity_is_refused() {
    let dir = TempDir::new();
    let files = selfsigned::generate(dir.path(), &names()).expect("generated");
    let error = ClientTls::load(Some(&files.ca), Some(&files.cert), None, None, vec![]);
    assert!(matches!(error, Err(TlsError::HalfIdentity)));
    let error = ClientTls::load(Some(&files.ca), None, None, Some("a b".into()), vec![]);
    assert!(matches!(error, Err(TlsError::ServerName(_))));
}
