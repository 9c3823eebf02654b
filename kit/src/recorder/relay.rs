//! The relay's reading, delaying and writing of bytes.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::counts::Counts;
use super::{Behaviour, Toward};
use crate::wire::{Frame, Packet, Version, decode, frame, kind, prop};

/// Batches that may wait in one direction of one link.
const BATCHES: usize = 4096;

#[derive(Clone)]
pub(super) struct Shared {
    pub(super) broker: SocketAddr,
    pub(super) behaviour: watch::Receiver<Behaviour>,
    pub(super) counts: Arc<Mutex<Counts>>,
}

/// The facts about a link that both directions need, from its CONNECT.
#[derive(Debug)]
struct Opened {
    version: Version,
    client_id: String,
    /// Topic aliases that Tidegate has set on this link.
    aliases: HashMap<u32, String>,
}

/// Packets that are due together.
struct Batch {
    due: Option<Instant>,
    bytes: Bytes,
}

pub(super) async fn accept(listener: TcpListener, shared: Shared) {
    while let Ok((stream, _)) = listener.accept().await {
        if shared.behaviour.borrow().refuse {
            let _ = stream.set_zero_linger();
            continue;
        }
        tokio::spawn(link(stream, shared.clone()));
    }
}

async fn link(mut stream: TcpStream, mut shared: Shared) {
    let Ok(mut broker) = TcpStream::connect(shared.broker).await else {
        let _ = stream.set_zero_linger();
        return;
    };
    let _ = (stream.set_nodelay(true), broker.set_nodelay(true));
    let generation = shared.behaviour.borrow_and_update().generation;
    let mut behaviour = shared.behaviour.clone();
    let cut = {
        let (from_tidegate, to_tidegate) = stream.split();
        let (from_broker, to_broker) = broker.split();
        let opened = Mutex::new(None);
        let up = direction(Toward::Broker, from_tidegate, to_broker, &shared, &opened);
        let down = direction(Toward::Tidegate, from_broker, to_tidegate, &shared, &opened);
        tokio::select! {
            _ = async { tokio::join!(up, down) } => false,
            _ = behaviour.wait_for(|b| b.generation > generation) => true,
        }
    };
    if cut {
        let _ = (stream.set_zero_linger(), broker.set_zero_linger());
    }
}

/// Reads, counts and passes on one direction until it ends.
async fn direction(
    toward: Toward,
    from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    shared: &Shared,
    opened: &Mutex<Option<Opened>>,
) {
    let (batches, waiting) = mpsc::channel(BATCHES);
    let write = write(toward, to, waiting, shared.behaviour.clone());
    let read = read(toward, from, batches, shared, opened);
    let _ = tokio::join!(read, write);
}

async fn read(
    toward: Toward,
    mut from: ReadHalf<'_>,
    batches: mpsc::Sender<Batch>,
    shared: &Shared,
    opened: &Mutex<Option<Opened>>,
) -> io::Result<()> {
    let mut buf = BytesMut::with_capacity(64 * 1024);
    loop {
        buf.reserve(16 * 1024);
        if from.read_buf(&mut buf).await? == 0 {
            return Ok(());
        }
        let delay = shared.behaviour.borrow().ack_delay;
        let (whole, acks) = count(toward, &buf, shared, opened);
        if whole == 0 {
            continue;
        }
        let due = (acks && !delay.is_zero()).then(|| Instant::now() + delay);
        let bytes = buf.split_to(whole).freeze();
        if batches.send(Batch { due, bytes }).await.is_err() {
            return Ok(());
        }
    }
}

async fn write(
    toward: Toward,
    mut to: WriteHalf<'_>,
    mut waiting: mpsc::Receiver<Batch>,
    mut behaviour: watch::Receiver<Behaviour>,
) -> io::Result<()> {
    while let Some(batch) = waiting.recv().await {
        if let Some(due) = batch.due {
            sleep_until(due).await;
        }
        let paused = |b: &Behaviour| match toward {
            Toward::Broker => b.paused_to_broker,
            Toward::Tidegate => b.paused_to_tidegate,
        };
        if behaviour.wait_for(|b| !paused(b)).await.is_err() {
            return Ok(());
        }
        to.write_all(&batch.bytes).await?;
    }
    to.shutdown().await
}

/// Counts the whole packets of a buffer. Returns their length, and whether the broker acknowledges
/// publishes among them.
fn count(
    toward: Toward,
    buf: &[u8],
    shared: &Shared,
    opened: &Mutex<Option<Opened>>,
) -> (usize, bool) {
    let mut counts = shared.counts.lock().expect("counting does not panic");
    let mut opened = opened.lock().expect("counting does not panic");
    let (mut at, mut acks) = (0, false);
    loop {
        match frame(&buf[at..]) {
            Ok(Some(f)) => {
                counts.packet(toward, f.kind(), f.len);
                acks |= toward == Toward::Tidegate
                    && matches!(f.kind(), kind::PUBACK | kind::PUBREC | kind::PUBCOMP);
                if let Err(what) = inspect(toward, &f, &buf[at..], &mut counts, &mut opened) {
                    counts.illegal(format!("{toward:?}: {what}"));
                }
                at += f.len;
            }
            Ok(None) => return (at, acks),
            Err(e) => {
                // These bytes are not MQTT: pass them on unchanged and record the fault.
                counts.illegal(format!("{toward:?}: {e}"));
                return (buf.len(), acks);
            }
        }
    }
}

/// Every packet is decoded in full: packets must be legal in both directions.
fn inspect(
    toward: Toward,
    f: &Frame<'_>,
    bytes: &[u8],
    counts: &mut Counts,
    opened: &mut Option<Opened>,
) -> Result<(), String> {
    let version = opened.as_ref().map_or(Version::V5, |o| o.version);
    let decoded = decode(version, &bytes[..f.len]).map_err(|e| e.to_string())?;
    let Some((packet, _)) = decoded.filter(|_| toward == Toward::Broker) else {
        return Ok(());
    };
    match packet {
        Packet::Connect(connect) => {
            counts.connect(&connect);
            let client_id = connect.client_id.clone();
            let aliases = HashMap::new();
            *opened = Some(Opened {
                version: connect.version,
                client_id,
                aliases,
            });
        }
        Packet::Publish(mut publish) => {
            let link = opened.as_mut().ok_or("PUBLISH before CONNECT")?;
            if let Some(alias) = publish.props.number(prop::TOPIC_ALIAS) {
                if publish.topic.is_empty() {
                    publish.topic = link.aliases.get(&alias).ok_or("unknown alias")?.clone();
                } else {
                    link.aliases.insert(alias, publish.topic.clone());
                }
            }
            counts.publish(&link.client_id, &publish);
        }
        Packet::Subscribe(subscribe) => {
            subscribe
                .filters
                .iter()
                .for_each(|(filter, _)| counts.subscribe(filter));
        }
        Packet::Unsubscribe(unsubscribe) => {
            unsubscribe
                .filters
                .iter()
                .for_each(|filter| counts.unsubscribe(filter));
        }
        _ => {}
    }
    Ok(())
}
