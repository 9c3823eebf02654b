//! The certificates of all `[[tls]]`: read, given to the listeners, and read again on request and
//! when a file has changed.
//!
//! Files are compared with their earlier state once a second. This finds a rename, a symbolic link
//! that points elsewhere (Kubernetes) and a change on a network file system alike; for a watch by
//! the kernel, each of them would be a case of its own.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use crate::config::{CertSource, Config, Tls};
use crate::telemetry::{ReloadResult, metrics};
use crate::transport::{Material, ServerTls, TlsError};

use crate::runtime::dates::{Dated, ExpiryLog};
use crate::runtime::error::StartError;

/// All certificates, and the listeners that use them.
pub(super) struct Certificates {
    entries: Vec<Entry>,
    /// Each listener, with the indices of its entries.
    served: Vec<(Arc<ServerTls>, Vec<usize>)>,
    /// The state of the files when they were last read.
    read: Vec<Option<State>>,
    /// Their state at the last look, if it was different from `read`.
    changed: Option<Vec<Option<State>>>,
    reported: ExpiryLog,
}

struct Entry {
    tls: Tls,
    material: Arc<Material>,
}

/// Metadata that changes with a file's content. Symbolic links are followed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl State {
    /// `None` for a file that does not exist or whose metadata may not be read.
    fn of(file: &Path) -> Option<Self> {
        let meta = std::fs::metadata(file).ok()?;
        Some(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

impl Certificates {
    /// Reads all files.
    ///
    /// # Errors
    /// [`StartError::Config`] for the first file that cannot be used.
    pub(super) fn load(config: &Config) -> Result<Self, StartError> {
        let read = states(&config.tls);
        let mut entries = Vec::new();
        for tls in &config.tls {
            let material = Material::load(tls, None).map_err(|error| failed(tls, &error))?;
            entries.push(Entry {
                tls: tls.clone(),
                material: Arc::new(material),
            });
        }
        Ok(Self {
            entries,
            served: Vec::new(),
            read,
            changed: None,
            reported: ExpiryLog::default(),
        })
    }

    /// The TLS settings of a listener with these `[[tls]]` entries, with or without early data;
    /// `None` if it has no entry.
    pub(super) fn serve(
        &mut self,
        names: &[String],
        early_data: bool,
    ) -> Result<Option<Arc<ServerTls>>, StartError> {
        let place = |name: &String| self.entries.iter().position(|e| e.tls.name == *name);
        let places: Vec<usize> = names.iter().filter_map(place).collect();
        let Some(first) = places.first() else {
            return Ok(None);
        };
        let materials = pick(&places, &self.materials());
        let tls = ServerTls::new(&materials, early_data)
            .map_err(|error| failed(&self.entries[*first].tls, &error))?;
        let tls = Arc::new(tls);
        self.served.push((Arc::clone(&tls), places));
        Ok(Some(tls))
    }

    /// Everything that expires, for `tidegate check` and for the log.
    pub(super) fn dated(&self) -> Vec<Dated> {
        let mut all = Vec::new();
        for Entry { tls, material } in &self.entries {
            all.push(Dated {
                tls: tls.name.clone(),
                what: "certificate",
                file: match &tls.source {
                    CertSource::Files { cert, .. } => Some(cert.clone()),
                    CertSource::Throwaway => None,
                },
                validity: material.validity(),
            });
            if let (Some(validity), Some(clients)) = (material.crl_validity(), &tls.clients) {
                all.push(Dated {
                    tls: tls.name.clone(),
                    what: "revocation list",
                    file: clients.crl.first().cloned(),
                    validity,
                });
            }
        }
        all
    }

    /// Compares the files with their earlier state. Reads them again if `asked`, or if this look and
    /// the last one found the same change: certificate and key are seldom replaced in one step.
    pub(super) fn look(&mut self, asked: bool) {
        let now = states(self.entries.iter().map(|entry| &entry.tls));
        let settled = self.changed.as_ref() == Some(&now);
        if asked || (now != self.read && settled) {
            // The state is from before the files are read, so that the next look finds a change
            // that happens meanwhile.
            self.read = now;
            self.changed = None;
            self.reload(if asked { "SIGHUP" } else { "a file changed" });
        } else {
            self.changed = (now != self.read).then_some(now);
        }
        self.reported.report(&self.dated(), SystemTime::now());
    }

    fn reload(&mut self, why: &'static str) {
        match self.replace() {
            Ok(changed) => {
                metrics().tls_reloads[ReloadResult::Success].increment(1);
                let changed = match changed.is_empty() {
                    true => "none".to_owned(),
                    false => changed.join(" "),
                };
                tracing::info!(why, changed, "Certificates were read again");
                self.announce();
            }
            Err(error) => {
                metrics().tls_reloads[ReloadResult::Failure].increment(1);
                tracing::error!(
                    why,
                    %error,
                    "Certificates could not be read again; the earlier ones stay in use until a file \
                     changes or SIGHUP comes"
                );
            }
        }
    }

    /// Replaces all certificates, or none if one of them cannot be used. Returns the names of those
    /// that changed.
    fn replace(&mut self) -> Result<Vec<String>, StartError> {
        let mut fresh = Vec::new();
        for Entry { tls, material } in &self.entries {
            let loaded = Material::load(tls, Some(material)).map_err(|e| failed(tls, &e))?;
            fresh.push(Arc::new(loaded));
        }
        let differs = |i: &usize| !fresh[*i].is_same(&self.entries[*i].material);
        let mut next = Vec::new();
        for (tls, places) in &self.served {
            if places.iter().any(differs) {
                let configs = tls.prepare(&pick(places, &fresh));
                let first = &self.entries[places[0]].tls;
                next.push((tls, configs.map_err(|e| failed(first, &e))?));
            }
        }
        // From here on nothing fails.
        let changed = (0..fresh.len()).filter(differs);
        let changed = changed.map(|i| self.entries[i].tls.name.clone()).collect();
        for (tls, configs) in next {
            tls.install(configs);
        }
        for (entry, material) in self.entries.iter_mut().zip(fresh) {
            entry.material = material;
        }
        Ok(changed)
    }

    /// Updates the metrics of expiry dates, and warns of key logs.
    pub(super) fn announce(&self) {
        for Entry { tls, material } in &self.entries {
            let seconds = |at: SystemTime| {
                let since = at.duration_since(SystemTime::UNIX_EPOCH);
                since.unwrap_or_default().as_secs() as f64
            };
            let crl = material.crl_validity().map(|v| seconds(v.until));
            metrics().tls_expiry(&tls.name, seconds(material.validity().until), crl);
            if let Some(file) = &tls.key_log {
                tracing::warn!(
                    tls = tls.name,
                    file = %file.display(),
                    "key_log is on: whoever has this file can read all connections; for debugging only"
                );
            }
        }
    }

    fn materials(&self) -> Vec<Arc<Material>> {
        let materials = self.entries.iter().map(|entry| &entry.material);
        materials.cloned().collect()
    }
}

fn states<'a>(all: impl IntoIterator<Item = &'a Tls>) -> Vec<Option<State>> {
    let files = all.into_iter().flat_map(Tls::files);
    files.map(State::of).collect()
}

fn pick(places: &[usize], from: &[Arc<Material>]) -> Vec<Arc<Material>> {
    places.iter().map(|i| Arc::clone(&from[*i])).collect()
}

fn failed(tls: &Tls, error: &TlsError) -> StartError {
    StartError::Config(format!("[[tls]] name = \"{}\": {error}", tls.name))
}
