//! The certificates of all `[[tls]]`: read, given to the listeners, and read
//! again when SIGHUP comes or a file has changed.
//!
//! Files are looked at once a second. That sees a rename, a symbolic link that
//! points elsewhere (Kubernetes) and a network file system alike; a watch of
//! the kernel would have to follow each of them by its own rules.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::config::{CertSource, Config, Tls};
use crate::telemetry::{ReloadResult, metrics};
use crate::transport::{Material, ServerTls, TlsError};

use crate::runtime::dates::{Dated, Said};
use crate::runtime::error::StartError;

/// How often the files are looked at. A change is taken up when a second look
/// finds the same: certificate and key are seldom replaced in one step.
const LOOK: Duration = Duration::from_secs(1);

/// All certificates, and who serves them.
pub(super) struct Certificates {
    entries: Vec<Entry>,
    /// Each listener, with the places of its entries.
    served: Vec<(Arc<ServerTls>, Vec<usize>)>,
    /// How the files were when they were read last.
    read: Vec<Option<State>>,
    /// How they were at the last look, if that was different.
    changed: Option<Vec<Option<State>>>,
    said: Said,
}

struct Entry {
    tls: Tls,
    material: Arc<Material>,
}

/// What tells one state of a file from another; symbolic links are followed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl State {
    /// `None` for a file that is not there or may not be looked at.
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
    /// Reads everything.
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
            said: Said::default(),
        })
    }

    /// What a listener with these `[[tls]]` serves, with early data or not; `None` if it has none.
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

    /// What has a date, for `tidegate check` and for the log.
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

    /// Reads again on SIGHUP and when files change, until told to stop.
    pub(super) async fn watch(mut self, mut hangup: Signal, stop: CancellationToken) {
        self.tell();
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = hangup.recv() => true,
                _ = ticks.tick() => false,
            };
            // A file system that does not answer must hold up nothing else.
            let look = tokio::task::spawn_blocking(move || {
                self.look(asked);
                self
            });
            match look.await {
                Ok(again) => self = again,
                Err(error) => {
                    tracing::error!(%error, "Certificates are not read again any more");
                    return;
                }
            }
        }
    }

    fn look(&mut self, asked: bool) {
        let now = states(self.entries.iter().map(|entry| &entry.tls));
        let settled = self.changed.as_ref() == Some(&now);
        if asked || (now != self.read && settled) {
            // Noted as it was before the files are read: what changes meanwhile
            // is found at the next look.
            self.read = now;
            self.changed = None;
            self.reload(if asked { "SIGHUP" } else { "a file changed" });
        } else {
            self.changed = (now != self.read).then_some(now);
        }
        self.said.look(&self.dated(), SystemTime::now());
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
                self.tell();
            }
            Err(error) => {
                metrics().tls_reloads[ReloadResult::Failure].increment(1);
                tracing::error!(
                    why,
                    %error,
                    "Certificates could not be read again; all that held before still hold, until \
                     a file changes or SIGHUP comes"
                );
            }
        }
    }

    /// All or nothing; answers with the names of what is different.
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
        // From here on nothing can fail.
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

    /// Shows the dates, and what a person must not forget.
    fn tell(&self) {
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
                    "key_log is on: who has this file can read all connections; for debugging only"
                );
            }
        }
    }

    fn materials(&self) -> Vec<Arc<Material>> {
        let materials = self.entries.iter().map(|entry| &entry.material);
        materials.cloned().collect()
    }
}

/// Takes SIGHUP over; before that it ends the process.
pub(super) fn hangup() -> Result<Signal, StartError> {
    signal(SignalKind::hangup()).map_err(|e| StartError::Internal(format!("signals: {e}")))
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
