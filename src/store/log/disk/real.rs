//! A directory of the file system.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::Disk;

/// The file whose lock says that a process uses the directory.
const LOCK: &str = "lock";
/// Records hold clients' messages: nobody but the process's user reads them.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Another process has the lock.
    #[error("{} is in use by another process, which has locked {}", .0.display(), .0.join(LOCK).display())]
    InUse(PathBuf),
    /// The directory, or the lock in it, cannot be made or opened.
    #[error("{}: {error}", path.display())]
    Io {
        /// The directory or file.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
}

/// A directory, locked against other processes for as long as this value lives. Its operations wait
/// for the disk, so they must not run on a thread of the runtime.
#[derive(Debug)]
pub struct RealDisk {
    directory: PathBuf,
    /// `None`: the directory has no lock file, which only a reader accepts.
    _lock: Option<File>,
}

impl RealDisk {
    /// Uses a directory for reading and writing; makes it and those above it if they do not exist. Only the
    /// process's user may read what it makes.
    ///
    /// # Errors
    /// If another process uses the directory, or it cannot be written.
    pub fn open(directory: &Path) -> Result<Self, DirectoryError> {
        make(directory)?;
        // Else a log that needs no change at the start would find out when it writes.
        uninterrupted(|| Ok(access(directory, Access::WRITE_OK | Access::EXEC_OK)?))
            .map_err(failure(directory.to_owned()))?;
        let path = directory.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(&path)
            .map_err(failure(path))?;
        Self::locked(directory, Some(lock), File::try_lock)
    }

    /// Uses a directory for reading only. Several readers may use it at once.
    ///
    /// # Errors
    /// If a process uses the directory for writing, or it cannot be read.
    pub fn open_to_read(directory: &Path) -> Result<Self, DirectoryError> {
        fs::read_dir(directory).map_err(failure(directory.to_owned()))?;
        let path = directory.join(LOCK);
        let lock = match File::open(&path) {
            Ok(lock) => Some(lock),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failure(path)(error)),
        };
        Self::locked(directory, lock, File::try_lock_shared)
    }

    fn locked(
        directory: &Path,
        lock: Option<File>,
        try_lock: fn(&File) -> Result<(), TryLockError>,
    ) -> Result<Self, DirectoryError> {
        let locked = uninterrupted(|| match lock.as_ref().map(try_lock) {
            None | Some(Ok(())) => Ok(true),
            Some(Err(TryLockError::WouldBlock)) => Ok(false),
            Some(Err(TryLockError::Error(error))) => Err(error),
        });
        match locked.map_err(failure(directory.join(LOCK)))? {
            true => Ok(Self {
                directory: directory.to_owned(),
                _lock: lock,
            }),
            false => Err(DirectoryError::InUse(directory.to_owned())),
        }
    }
}

/// Makes a directory and those above it that do not exist, and puts their names on the disk: they must
/// outlive a power cut, too.
fn make(directory: &Path) -> Result<(), DirectoryError> {
    let above = directory.parent().filter(|p| !p.as_os_str().is_empty());
    let above = above.unwrap_or(Path::new("."));
    if !above.is_dir() {
        make(above)?;
    }
    let made = DirBuilder::new().mode(DIRECTORY_MODE).create(directory);
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
        made => made.map_err(failure(directory.to_owned()))?,
    }
    sync_directory(above).map_err(failure(above.to_owned()))
}

/// Calls a function of the system again while a signal interrupts it. The standard library does so itself
/// when it opens, syncs and cuts files.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn failure(path: PathBuf) -> impl FnOnce(io::Error) -> DirectoryError {
    move |error| DirectoryError::Io { path, error }
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

impl Disk for RealDisk {
    type File = File;

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            // A name that is not text is not one of the log's.
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(self.directory.join(name))
    }

    fn open(&self, name: &str) -> io::Result<File> {
        File::open(self.directory.join(name))
    }

    fn open_to_write(&self, name: &str) -> io::Result<File> {
        let path = self.directory.join(name);
        OpenOptions::new().read(true).write(true).open(path)
    }

    fn len(&self, file: &File) -> io::Result<u64> {
        Ok(file.metadata()?.len())
    }

    fn read_at(&self, file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| file.read_at(buffer, offset))
    }

    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        uninterrupted(|| file.write_at(bytes, offset))
    }

    fn sync_data(&self, file: &File) -> io::Result<()> {
        uninterrupted(|| file.sync_data())
    }

    #[cfg(target_os = "linux")]
    fn reserve(&self, file: &File, bytes: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;

        uninterrupted(
            || match fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
                result => Ok(result?),
            },
        )
    }

    #[cfg(not(target_os = "linux"))]
    fn reserve(&self, _file: &File, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, file: &File) -> io::Result<()> {
        file.set_len(file.metadata()?.len())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        uninterrupted(|| fs::remove_file(self.directory.join(name)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        uninterrupted(|| fs::rename(self.directory.join(from), self.directory.join(to)))
    }

    fn sync_names(&self) -> io::Result<()> {
        sync_directory(&self.directory)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::store::log::{Options, Recovery};

    /// A directory below the system's for temporary files, removed at the end.
    struct Temporary(PathBuf);

    impl Temporary {
        fn new(name: &str) -> Self {
            let path = format!("tidegate-log-{name}-{}", std::process::id());
            Self(std::env::temp_dir().join(path))
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn mode(path: &Path) -> u32 {
        let metadata = fs::metadata(path).expect("it is there");
        metadata.permissions().mode() & 0o777
    }

    #[test]
    fn only_the_user_of_the_process_may_read_a_log() {
        let above = Temporary::new("modes");
        let directory = above.0.join("data").join("log");
        let disk = RealDisk::open(&directory).expect("it can be made");
        disk.create("00000001.seg").expect("it can be made");
        for made in [&above.0, &above.0.join("data"), &directory] {
            assert_eq!(mode(made), 0o700, "{}", made.display());
        }
        for file in ["lock", "00000001.seg"] {
            assert_eq!(mode(&directory.join(file)), 0o600, "{file}");
        }
    }

    #[test]
    fn a_directory_that_the_user_must_not_write_is_refused() {
        let above = Temporary::new("forbidden");
        drop(RealDisk::open(&above.0).expect("it can be made"));
        let read_only = fs::Permissions::from_mode(0o500);
        fs::set_permissions(&above.0, read_only).expect("it is ours");
        let opened = RealDisk::open(&above.0);
        fs::set_permissions(&above.0, fs::Permissions::from_mode(0o700)).expect("it is ours");
        // Nothing is forbidden to root.
        let is_root = rustix::process::geteuid().is_root();
        assert_eq!(opened.is_ok(), is_root, "{opened:?}");
    }

    #[test]
    fn a_call_that_a_signal_interrupts_is_made_again() {
        let mut results = vec![Ok(7), Err(io::ErrorKind::Interrupted)];
        let result = uninterrupted(|| {
            let result = results.pop().expect("two calls are enough");
            result.map_err(io::Error::from)
        });
        assert_eq!(result.ok(), Some(7));
    }

    #[test]
    fn a_file_that_is_larger_than_any_segment_is_not_read_to_its_end() {
        let above = Temporary::new("large");
        let disk = RealDisk::open(&above.0).expect("it can be made");
        let file = disk.create("00000001.seg").expect("it can be made");
        file.set_len(1 << 42)
            .expect("the file system has sparse files");
        let recovery = Recovery::open(disk, Options::new(7)).expect("it opens");
        let report = recovery.replay(|_| {}).expect("it is read").report;
        assert!(report.damaged > 0 && report.bytes == 1 << 42, "{report:?}");
    }
}
