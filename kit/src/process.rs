//! Starting and ending the servers that tests and benches need, and their folders and ports.

mod mosquitto;
mod tidegate;

pub use mosquitto::{Mosquitto, MosquittoConfig};
pub use tidegate::{Listening, Tidegate, TidegateConfig};

use std::io::{self, BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a server may take to start or to end before a test gives up.
pub const START_PATIENCE: Duration = Duration::from_secs(30);

/// Log lines kept of a child.
const LOG_LINES: usize = 50_000;

/// A folder below the system's temporary one, removed when dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes a new, empty folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(name: &str) -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = format!("tidegate-{name}-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(folder);
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // TIDEGATE_KEEP=1 keeps configurations and logs for inspection after a failure.
        if std::env::var_os("TIDEGATE_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// A TCP port of the loopback address that is free at this moment.
///
/// # Errors
/// None is free.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until a TCP address accepts.
///
/// # Errors
/// The address did not accept a connection within `wait`.
pub fn wait_until_it_accepts(addr: SocketAddr, wait: Duration) -> io::Result<()> {
    let deadline = Instant::now() + wait;
    loop {
        match TcpStream::connect_timeout(&addr, Duration::from_millis(500)) {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Raises this process's soft limit of open files to the hard one and returns it.
pub fn raise_open_files() -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// A child process that is killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Server {
    /// Takes a child; its standard error, if piped, is its log.
    pub(crate) fn new(mut child: Child, name: &'static str) -> Self {
        let log = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stderr.take().map(|stderr| {
            let log = log.clone();
            std::thread::spawn(move || collect(stderr, name, &log))
        });
        Self { child, log, reader }
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log
            .lock()
            .expect("a line is pushed without a panic")
            .clone()
    }

    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(
            pid.ok_or(io::ErrorKind::InvalidInput)?,
            signal,
        )?)
    }

    /// Waits for the end of the child, and for its last lines. A child of the child may keep its standard
    /// error open: the lines are not awaited any longer than the end.
    pub(crate) fn wait(&mut self, wait: Duration) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + wait;
        loop {
            let late = Instant::now() > deadline;
            if let Some(status) = self.child.try_wait()?
                && (late || self.reader.as_ref().is_none_or(JoinHandle::is_finished))
            {
                return Ok(status);
            }
            if late {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the process did not end",
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Keeps a child's lines; TIDEGATE_LOG=1 also shows them.
fn collect(from: impl Read, name: &str, log: &Mutex<Vec<String>>) {
    let show = std::env::var_os("TIDEGATE_LOG").is_some();
    for line in BufReader::new(from).lines() {
        let Ok(line) = line else { return };
        if show {
            eprintln!("{name}: {line}");
        }
        let mut log = log.lock().expect("a line is pushed without a panic");
        if log.len() < LOG_LINES {
            log.push(line);
        }
    }
}
