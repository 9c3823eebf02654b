//! A directory of the file system.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::Disk;

/// The file whose lock says that a process uses the directory.
const LOCK: &str = "lock";

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
    /// Uses a directory for reading and writing; makes it if it does not exist.
    ///
    /// # Errors
    /// If another process uses the directory, or it cannot be written.
    pub fn open(directory: &Path) -> Result<Self, DirectoryError> {
        let failed = |path: &Path| failure(path.to_owned());
        fs::create_dir_all(directory).map_err(failed(directory))?;
        // The name of the directory must outlive a power cut, too.
        let above = directory.parent().filter(|p| !p.as_os_str().is_empty());
        let above = above.unwrap_or(Path::new("."));
        sync_directory(above).map_err(failed(above))?;
        let path = directory.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed(&path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                directory: directory.to_owned(),
                _lock: Some(lock),
            }),
            Err(TryLockError::WouldBlock) => Err(DirectoryError::InUse(directory.to_owned())),
            Err(TryLockError::Error(error)) => Err(failure(path)(error)),
        }
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
        match lock.as_ref().map(File::try_lock_shared).transpose() {
            Ok(_) => Ok(Self {
                directory: directory.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(DirectoryError::InUse(directory.to_owned())),
            Err(TryLockError::Error(error)) => Err(failure(path)(error)),
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
        File::create_new(self.directory.join(name))
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
        file.read_at(buffer, offset)
    }

    fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        file.write_at(bytes, offset)
    }

    fn sync_data(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    #[cfg(target_os = "linux")]
    fn reserve(&self, file: &File, bytes: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;

        match fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn reserve(&self, _file: &File, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, file: &File) -> io::Result<()> {
        file.set_len(file.metadata()?.len())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.directory.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.directory.join(from), self.directory.join(to))
    }

    fn sync_names(&self) -> io::Result<()> {
        sync_directory(&self.directory)
    }
}
