//! A disk in memory that knows which of its bytes and names are safe, can be cut off at any operation
//! and byte, and fails as it is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Disk;

/// The bytes of a disk's sector unless a test says otherwise.
const SECTOR_BYTES: usize = 512;

/// What goes wrong at an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The operation fails. After a failed `sync_data`, a part of the written bytes never reaches the disk.
    Fail,
    /// The operation fails with this kind of error, and does nothing.
    Error(io::ErrorKind),
    /// A write takes only this many bytes, and succeeds. Other operations are not affected.
    Short(usize),
    /// The power fails during the operation. A write has taken this many bytes. Nothing is possible
    /// afterwards.
    Cut(usize),
}

/// An operation that changes the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The name of the method of [`Disk`].
    pub name: &'static str,
    /// The bytes of a write; 0 for other operations.
    pub bytes: usize,
}

/// A disk in memory. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimDisk(Arc<Mutex<State>>);

/// An open file of a [`SimDisk`].
#[derive(Clone, Copy, Debug)]
pub struct SimFile(u64);

#[derive(Debug)]
struct State {
    /// The bytes that the disk writes as a whole, or not at all.
    sector_bytes: usize,
    files: BTreeMap<u64, Contents>,
    next_file: u64,
    names: Names,
    /// The names on the disk.
    safe_names: Names,
    /// Changes of names that are not on the disk yet, in order.
    pending: Vec<Change>,
    operations: Vec<Operation>,
    faults: BTreeMap<usize, Fault>,
    hook: Option<Hook>,
    /// All operations fail, or none that a fault does not name.
    broken: bool,
    cut: bool,
    /// The most bytes that all files together may have.
    capacity: Option<usize>,
}

struct Hook(&'static str, Box<dyn FnOnce() + Send>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a call during {}", self.0)
    }
}

type Names = BTreeMap<String, u64>;

#[derive(Clone, Debug)]
enum Change {
    Create(String, u64),
    Remove(String),
    Rename(String, String),
}

#[derive(Clone, Debug, Default)]
struct Contents {
    written: Vec<u8>,
    safe: Vec<u8>,
    /// The sectors that the next `sync_data` puts on the disk.
    dirty: BTreeSet<usize>,
    /// Bytes that cannot be read.
    unreadable: Vec<Range<usize>>,
}

impl Default for SimDisk {
    fn default() -> Self {
        Self::with_sectors(SECTOR_BYTES)
    }
}

impl SimDisk {
    /// An empty disk that writes `sector_bytes` bytes as a whole. Sectors that are smaller than a record
    /// make a power cut leave holes inside of records and commits.
    pub fn with_sectors(sector_bytes: usize) -> Self {
        Self::of(State::new(sector_bytes))
    }

    /// Makes an operation go wrong: the `at`th from now on, counted from 0.
    pub fn fault(&self, at: usize, fault: Fault) {
        let mut state = self.0.lock();
        let at = state.operations.len() + at;
        state.faults.insert(at, fault);
    }

    /// Runs `call` during the next operation of this name. It must not use the disk.
    pub fn during(&self, operation: &'static str, call: impl FnOnce() + Send + 'static) {
        self.0.lock().hook = Some(Hook(operation, Box::new(call)));
    }

    /// Makes all operations fail, or work again.
    pub fn set_broken(&self, broken: bool) {
        self.0.lock().broken = broken;
    }

    /// Limits the bytes of all files together.
    pub fn set_capacity(&self, bytes: Option<usize>) {
        self.0.lock().capacity = bytes;
    }

    /// The operations that changed the disk, or would have.
    pub fn operations(&self) -> Vec<Operation> {
        self.0.lock().operations.clone()
    }

    /// Whether the power has failed.
    pub fn is_cut(&self) -> bool {
        self.0.lock().cut
    }

    /// The bytes of all files together.
    pub fn used(&self) -> usize {
        self.0.lock().used()
    }

    /// The content of a file, as it would be read.
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.0.lock();
        Some(state.files[state.names.get(name)?].written.clone())
    }

    /// Changes a file's content on the disk, as damage does. The file must exist.
    pub fn damage(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.0.lock();
        let id = state.names[name];
        let file = state.files.get_mut(&id).expect("a name has a file");
        change(&mut file.written);
        file.safe = file.written.clone();
        file.dirty.clear();
    }

    /// Makes bytes of a file unreadable, until they are written; all bytes: the file cannot be opened. The file
    /// must exist.
    pub fn make_unreadable(&self, name: &str, range: Range<usize>) {
        let mut state = self.0.lock();
        let id = state.names[name];
        state
            .files
            .get_mut(&id)
            .expect("a name has a file")
            .unreadable
            .push(range);
    }

    /// The disk as the next process finds it when only the process has died: everything written is
    /// there.
    pub fn after_kill(&self) -> Self {
        let old = self.0.lock();
        Self::of(State {
            files: old.files.clone(),
            next_file: old.next_file,
            names: old.names.clone(),
            safe_names: old.safe_names.clone(),
            pending: old.pending.clone(),
            ..State::new(old.sector_bytes)
        })
    }

    /// The disk as the next process finds it after a power cut: everything synced, and any part of the
    /// rest. `choose(n)` returns a number below `n`.
    pub fn after_power_cut(&self, mut choose: impl FnMut(u64) -> u64) -> Self {
        let old = self.0.lock();
        let mut names = old.safe_names.clone();
        for change in &old.pending {
            if choose(2) == 0 {
                change.apply(&mut names);
            }
        }
        let mut files = BTreeMap::new();
        for id in names.values() {
            let content = old.files[id].survive(old.sector_bytes, &mut choose);
            let contents = Contents {
                written: content.clone(),
                safe: content,
                ..Contents::default()
            };
            files.insert(*id, contents);
        }
        Self::of(State {
            files,
            next_file: old.next_file,
            safe_names: names.clone(),
            names,
            ..State::new(old.sector_bytes)
        })
    }

    fn of(state: State) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }
}

impl Change {
    /// A change whose file did not survive has no effect.
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Create(name, id) => {
                names.insert(name.clone(), *id);
            }
            Self::Remove(name) => {
                names.remove(name);
            }
            Self::Rename(from, to) => {
                if let Some(id) = names.remove(from) {
                    names.insert(to.clone(), id);
                }
            }
        }
    }
}

impl Contents {
    /// The bytes after a power cut: of each sector either the safe or the written ones.
    fn survive(&self, sector_bytes: usize, choose: &mut impl FnMut(u64) -> u64) -> Vec<u8> {
        let mut content = self.safe.clone();
        let sectors = self.written.len().div_ceil(sector_bytes);
        for sector in 0..sectors {
            let from = sector * sector_bytes;
            let to = (from + sector_bytes).min(self.written.len());
            let safe = self.safe.get(from..to.min(self.safe.len()));
            if safe != Some(&self.written[from..to]) && choose(2) == 0 {
                self.keep(sector, sector_bytes, &mut content);
            }
        }
        content
    }

    /// Puts the written bytes of a sector into `content`. Zeros fill the sectors before it.
    fn keep(&self, sector: usize, sector_bytes: usize, content: &mut Vec<u8>) {
        let from = sector * sector_bytes;
        let to = (from + sector_bytes).min(self.written.len());
        if content.len() < to {
            content.resize(to, 0);
        }
        content[from..to].copy_from_slice(&self.written[from..to]);
    }
}

impl State {
    fn new(sector_bytes: usize) -> Self {
        Self {
            sector_bytes,
            files: BTreeMap::new(),
            next_file: 0,
            names: Names::new(),
            safe_names: Names::new(),
            pending: Vec::new(),
            operations: Vec::new(),
            faults: BTreeMap::new(),
            hook: None,
            broken: false,
            cut: false,
            capacity: None,
        }
    }

    fn used(&self) -> usize {
        self.names
            .values()
            .map(|id| self.files[id].written.len())
            .sum()
    }

    /// Counts an operation, and makes it go wrong if that is due. Returns how many of its bytes a write
    /// takes, and the error that follows.
    fn begin(&mut self, name: &'static str, bytes: usize) -> (usize, io::Result<()>) {
        if self.cut {
            return (0, Err(io::Error::other("the power is off")));
        }
        if let Some(hook) = self.hook.take_if(|hook| hook.0 == name) {
            hook.1();
        }
        let fault = self.faults.remove(&self.operations.len());
        self.operations.push(Operation { name, bytes });
        match fault {
            _ if self.broken => (0, Err(io::Error::other("the disk is broken"))),
            None => (bytes, Ok(())),
            Some(Fault::Fail) => (0, Err(io::Error::other("a fault"))),
            Some(Fault::Error(kind)) => (0, Err(kind.into())),
            Some(Fault::Short(n)) => (n.min(bytes), Ok(())),
            Some(Fault::Cut(n)) => {
                self.cut = true;
                (n.min(bytes), Err(io::Error::other("the power fails")))
            }
        }
    }

    fn file(&mut self, file: SimFile) -> &mut Contents {
        self.files.get_mut(&file.0).expect("files are kept")
    }

    fn id(&self, name: &str) -> io::Result<u64> {
        let id = self.names.get(name).copied();
        id.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.names);
        self.pending.push(change);
    }
}

impl Disk for SimDisk {
    type File = SimFile;

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<SimFile> {
        let mut state = self.0.lock();
        state.begin("create", 0).1?;
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = state.next_file;
        state.next_file += 1;
        state.files.insert(id, Contents::default());
        state.change(Change::Create(name.to_owned(), id));
        Ok(SimFile(id))
    }

    fn open(&self, name: &str) -> io::Result<SimFile> {
        let state = self.0.lock();
        let id = state.id(name)?;
        match state.files[&id].unreadable.contains(&(0..usize::MAX)) {
            true => Err(rustix::io::Errno::IO.into()),
            false => Ok(SimFile(id)),
        }
    }

    fn open_to_write(&self, name: &str) -> io::Result<SimFile> {
        self.open(name)
    }

    fn len(&self, file: &SimFile) -> io::Result<u64> {
        Ok(self.0.lock().file(*file).written.len() as u64)
    }

    fn read_at(&self, file: &SimFile, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        let contents = state.file(*file);
        let from = offset as usize;
        let rest = contents.written.get(from..).unwrap_or_default();
        let n = rest.len().min(buffer.len());
        let touches = |range: &Range<usize>| range.start < from + n && from < range.end;
        if contents.unreadable.iter().any(touches) {
            return Err(rustix::io::Errno::IO.into());
        }
        buffer[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn write_at(&self, file: &SimFile, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        let (mut n, result) = state.begin("write_at", bytes.len());
        let mut full = false;
        let from = offset as usize;
        if let Some(capacity) = state.capacity {
            let growth = (from + n).saturating_sub(state.file(*file).written.len());
            let room = capacity.saturating_sub(state.used());
            full = growth > room;
            n -= growth.saturating_sub(room).min(n);
        }
        let sector_bytes = state.sector_bytes;
        let contents = state.file(*file);
        if n > 0 {
            if contents.written.len() < from + n {
                contents.written.resize(from + n, 0);
            }
            contents.written[from..from + n].copy_from_slice(&bytes[..n]);
            contents
                .unreadable
                .retain(|range| range.end <= from || from + n <= range.start);
            let sectors = from / sector_bytes..=(from + n - 1) / sector_bytes;
            contents.dirty.extend(sectors);
        }
        result?;
        if full && n == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(n)
    }

    fn sync_data(&self, file: &SimFile) -> io::Result<()> {
        let mut state = self.0.lock();
        let result = state.begin("sync_data", 0).1;
        if state.cut {
            return result;
        }
        let sector_bytes = state.sector_bytes;
        let contents = state.file(*file);
        let dirty = std::mem::take(&mut contents.dirty);
        let mut safe = std::mem::take(&mut contents.safe);
        for sector in dirty {
            // A failed call forgets which bytes it has not written: every second sector here.
            if result.is_ok() || sector % 2 == 1 {
                contents.keep(sector, sector_bytes, &mut safe);
            }
        }
        contents.safe = safe;
        result
    }

    fn reserve(&self, _file: &SimFile, bytes: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin("reserve", 0).1?;
        match state.capacity {
            Some(capacity) if state.used() as u64 + bytes > capacity as u64 => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }

    fn trim(&self, _file: &SimFile) -> io::Result<()> {
        self.0.lock().begin("trim", 0).1
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin("remove", 0).1?;
        state.id(name)?;
        state.change(Change::Remove(name.to_owned()));
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin("rename", 0).1?;
        state.id(from)?;
        state.change(Change::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.begin("sync_names", 0).1?;
        state.safe_names = state.names.clone();
        state.pending.clear();
        Ok(())
    }
}
