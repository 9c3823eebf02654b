//! A file with the secrets of connections, for debugging with a packet analyser. It is written only if
//! the configuration names a file.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::KeyLog;

use crate::transport::tls::error::TlsError;

/// A file in the format of `SSLKEYLOGFILE`.
#[derive(Debug)]
pub(super) struct KeyLogFile(Mutex<File>);

impl KeyLogFile {
    /// Opens a file to append to. A new file is readable by its owner only.
    pub(super) fn open(file: &Path) -> Result<Arc<dyn KeyLog>, TlsError> {
        let opened = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(file);
        match opened {
            Ok(opened) => Ok(Arc::new(Self(Mutex::new(opened)))),
            Err(source) => Err(TlsError::KeyLog {
                file: file.to_owned(),
                source,
            }),
        }
    }
}

impl KeyLog for KeyLogFile {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        let line = format!("{label} {} {}\n", hex(client_random), hex(secret));
        // One write, so that lines of several listeners do not mix. A full disk must not end connections.
        let _ = self.0.lock().write_all(line.as_bytes());
    }
}
