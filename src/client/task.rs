//! The task of a connection after CONNACK: it owns the socket, and moves bytes between the socket and
//! the [`Machine`].

mod close;
mod read_out;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{self, Poll};

use crate::auth::Identity;
use crate::router::Peer;
use crate::streams::{StreamId, StreamSet};
use crate::telemetry::{RateLimited, clean, metrics};
use crate::time::Millis;
use crate::transport::{Closed, ConnectionTask, Stream};

use crate::client::connect::{AcceptedConnection, AcceptedSession};
use crate::client::end::End;
use crate::client::machine::{self, Machine, StreamReset};
use crate::client::scope::sender_moved;
use crate::client::{ClientPolicy, Clients, LOGGED_CHARS, OpenGuard, connection_lines};
use read_out::{ReadOut, ReadPast};

/// Rounds of writing and reading before a busy connection gives the others their turn.
const ROUNDS_MAX: usize = 8;

static RESETS: RateLimited = connection_lines();
static MOVES: RateLimited = connection_lines();

thread_local! {
    // One read buffer per worker: an idle connection has none.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct Task<'a> {
    clients: &'a Clients,
    socket: Stream,
    identity: Box<Identity>,
    peer: Arc<Peer>,
    machine: Machine,
    /// Present while everything that has arrived is read, whatever would be left unread.
    read_out: Option<Box<ReadOut>>,
    read_past: ReadPast,
    /// The time of the last wake-up: the clock is read once for all that a wake-up brings.
    now: Millis,
}

/// Serves the connection to its end.
pub(super) fn serve(
    clients: Arc<Clients>,
    accepted: Box<AcceptedConnection>,
    guard: OpenGuard,
) -> ConnectionTask {
    Box::pin(async move {
        let mut accepted = accepted;
        let early = std::mem::take(&mut accepted.input);
        let mut task = Task::new(&clients, accepted);
        let end = task.run(early).await;
        // Boxed, so that the task is small while the connection lives.
        Box::pin(close::close(task, end)).await;
        drop(guard);
    })
}

/// What the machine borrows of the process and of its client.
fn with_context<R>(
    clients: &Clients,
    identity: &Identity,
    now: Millis,
    call: impl FnOnce(&machine::Context<'_>) -> R,
) -> R {
    call(&machine::Context {
        router: &clients.router,
        policy: &ClientPolicy { clients, identity },
        limits: &clients.machine_limits,
        now,
    })
}

impl<'a> Task<'a> {
    fn new(clients: &'a Clients, accepted: Box<AcceptedConnection>) -> Self {
        let AcceptedConnection {
            stream, session, ..
        } = *accepted;
        let AcceptedSession {
            machine,
            identity,
            peer,
        } = session;
        Self {
            clients,
            socket: stream,
            identity,
            peer,
            machine,
            read_out: None,
            read_past: ReadPast::default(),
            now: clients.clock.now(),
        }
    }

    /// Calls the machine with its context.
    fn on_machine<R>(&mut self, call: impl FnOnce(&mut Machine, &machine::Context<'_>) -> R) -> R {
        let machine = &mut self.machine;
        with_context(self.clients, &self.identity, self.now, |cx| {
            call(machine, cx)
        })
    }

    /// Runs until something ends the connection; `early` are the bytes that arrived with CONNECT.
    fn run(&mut self, early: Vec<u8>) -> impl Future<Output = End> {
        let first = || self.received(StreamId::CONTROL, &early).err();
        let mut end = catch_unwind(AssertUnwindSafe(first)).unwrap_or_else(|_| Some(End::Panicked));
        poll_fn(move |cx| match end.take() {
            Some(end) => Poll::Ready(end),
            None => catch_unwind(AssertUnwindSafe(|| self.poll(cx)))
                .unwrap_or_else(|_| Poll::Ready(End::Panicked)),
        })
    }

    fn poll(&mut self, cx: &mut task::Context<'_>) -> Poll<End> {
        self.now = self.clients.clock.now();
        let polled = match self.make_progress(cx) {
            Ok(polled) => polled,
            Err(end) => return Poll::Ready(end),
        };
        let waits = self.machine.paused() && !self.machine.turn_is_over();
        if waits || self.machine.deadline().is_some() {
            // The broker's answers wake a paused client too; the tick is its second chance.
            self.clients.router.wake_soon(self.machine.handle());
        }
        match polled {
            Poll::Ready(()) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Writes and reads. Ready: there may be more to do at once.
    fn make_progress(&mut self, cx: &mut task::Context<'_>) -> Result<Poll<()>, End> {
        self.machine
            .woken(&self.clients.machine_limits, cx.waker())?;
        if let Some(successors) = self.machine.handle().take_successors() {
            ReadOut::begin(&mut self.read_out, successors);
        }
        if self.machine.handle().take_ping() {
            // A ping that cannot be sent now is sent with the next output.
            let _ = self.socket.poll_ping(cx);
        }
        if self.machine.has_blocked_streams() {
            let traffic = self.socket.traffic();
            for reset in self.on_machine(|machine, cx| machine.watch(cx, traffic)) {
                self.reset(&reset);
            }
        }
        for _ in 0..ROUNDS_MAX {
            self.write(cx)?;
            if self.machine.paused() {
                let reset = self.on_machine(Machine::resume)?;
                self.reset_if(reset);
                if self.machine.turn_is_over() {
                    break;
                }
                if self.machine.paused() {
                    if self.is_last_read() {
                        ReadOut::finish(&mut self.read_out)?;
                    }
                    return Ok(Poll::Pending);
                }
                continue;
            }
            if self.machine.turn_is_over() {
                break;
            }
            let unread = self.on_machine(Machine::unread);
            if self.read_out.is_some() && self.read_past.is_enough(unread) {
                ReadOut::finish(&mut self.read_out)?;
            }
            if self.read_out.is_some() {
                self.socket.pause_streams(StreamSet::EMPTY);
            } else if unread == StreamSet::ALL {
                return Ok(Poll::Pending);
            } else {
                self.socket.pause_streams(unread);
            }
            match self.poll_read(cx) {
                Poll::Ready(read) => {
                    let bytes = read?;
                    self.read_past.has_read(bytes, unread);
                    if let Some(read_out) = &mut self.read_out
                        && read_out.has_read(bytes)
                    {
                        ReadOut::finish(&mut self.read_out)?;
                    }
                }
                Poll::Pending => {
                    let reset = self.on_machine(Machine::expired)?;
                    if reset.is_none() {
                        self.look_for_arrivals(cx)?;
                        return Ok(Poll::Pending);
                    }
                    self.reset_if(reset);
                }
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Whether nothing more can be sent, and only the bytes that have arrived are still read.
    fn is_last_read(&self) -> bool {
        self.read_out.as_ref().is_some_and(|r| r.is_last())
    }

    /// A read is pending: ends the read-out if nothing more had arrived.
    fn look_for_arrivals(&mut self, cx: &mut task::Context<'_>) -> Result<(), End> {
        if let Some(read_out) = &mut self.read_out
            && read_out.poll_quiet(cx, self.socket.arrivals()).is_ready()
        {
            ReadOut::finish(&mut self.read_out)?;
        }
        Ok(())
    }

    /// Writes, as long as the transport takes output. When it fails, bytes that arrived before are still
    /// read: a client that sends DISCONNECT and closes its socket lets our next write fail.
    fn write(&mut self, cx: &mut task::Context<'_>) -> Result<(), End> {
        if self.is_last_read() {
            return Ok(());
        }
        match self.poll_write(cx) {
            Err(end @ End::Transport(_)) => {
                ReadOut::before(&mut self.read_out, end);
                Ok(())
            }
            result => result,
        }
    }

    /// Writes until nothing is left or the socket takes no more.
    fn poll_write(&mut self, cx: &mut task::Context<'_>) -> Result<(), End> {
        loop {
            if self.machine.wants_to_send() {
                let output = self.machine.output(StreamId::CONTROL);
                let offered = output.len();
                let sent = self.socket.poll_send(cx, StreamId::CONTROL, output);
                metrics()
                    .bytes_sent
                    .increment((offered - output.len()) as u64);
                let done = match sent {
                    Poll::Ready(Ok(())) => true,
                    Poll::Ready(Err(closed)) => return Err(End::Transport(closed)),
                    Poll::Pending => false,
                };
                self.machine.sent(offered, done, self.now);
                if !done && !self.machine.has_streams() {
                    return Ok(());
                }
            }
            if self.machine.has_streams() {
                self.poll_streams(cx)?;
            }
            if !self.machine.transmit(&self.clients.router, self.now)? {
                return Ok(());
            }
        }
    }

    /// Writes the output of the data streams, and ends each stream that is done.
    fn poll_streams(&mut self, cx: &mut task::Context<'_>) -> Result<(), End> {
        for number in self.machine.streams().iter() {
            let output = self.machine.output(number);
            if !output.is_empty() {
                let offered = output.len();
                let sent = self.socket.poll_send(cx, number, output);
                metrics()
                    .bytes_sent
                    .increment((offered - output.len()) as u64);
                let done = match sent {
                    Poll::Ready(Ok(())) => true,
                    Poll::Pending => false,
                    Poll::Ready(Err(Closed::StreamReset(_))) => {
                        self.on_machine(|machine, cx| machine.stream_ended(cx, number));
                        continue;
                    }
                    Poll::Ready(Err(closed)) => return Err(End::Transport(closed)),
                };
                let traffic = self.socket.traffic();
                self.on_machine(|m, cx| m.stream_sent(cx, number, offered, done, traffic));
            }
            if self.on_machine(|machine, cx| machine.finish(cx, number)) {
                self.socket.finish_stream(number);
            }
        }
        Ok(())
    }

    /// Reads once, and gives the machine the bytes. Returns their number.
    fn poll_read(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<usize, End>> {
        let mut scratch = SCRATCH.with(RefCell::take);
        scratch.clear();
        let polled = self.socket.poll_recv(cx, &mut scratch);
        let result = match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(Closed::StreamReset(number))) => {
                self.on_machine(|machine, cx| machine.stream_ended(cx, number));
                Poll::Ready(Ok(0))
            }
            Poll::Ready(Err(closed)) => Poll::Ready(Err(End::Transport(closed))),
            Poll::Ready(Ok(recv)) => {
                metrics().bytes_received.increment(recv.bytes as u64);
                if let Some(address) = self.socket.take_new_peer() {
                    self.moved(address);
                }
                let result = self.received(recv.stream, &scratch);
                if recv.finished {
                    let number = recv.stream;
                    let reset = self.on_machine(|machine, cx| machine.stream_closed(cx, number));
                    self.reset_if(reset);
                }
                Poll::Ready(result.map(|()| recv.bytes))
            }
        };
        SCRATCH.with(|s| s.replace(scratch));
        result
    }

    /// Gives the machine bytes of one stream.
    fn received(&mut self, stream: StreamId, bytes: &[u8]) -> Result<(), End> {
        let reset = self.on_machine(|machine, cx| machine.received(cx, stream, bytes))?;
        self.reset_if(reset);
        Ok(())
    }

    /// Takes the packets that wait for the next turn.
    fn take_rest(&mut self) -> Result<(), End> {
        for reset in self.on_machine(Machine::take_rest)? {
            self.reset(&reset);
        }
        Ok(())
    }

    fn reset_if(&mut self, reset: Option<StreamReset>) {
        if let Some(reset) = reset {
            self.reset(&reset);
        }
    }

    /// Aborts a data stream whose own fault has ended it.
    fn reset(&mut self, reset: &StreamReset) {
        if let Some(suppressed) = RESETS.permit(self.now) {
            tracing::info!(
                client_id = clean(&self.identity.client_id, LOGGED_CHARS),
                listener = &*self.peer.listener,
                peer = %self.socket.current_peer().unwrap_or(self.peer.address),
                reason = %reset.reason,
                code = reset.cause.code().0,
                suppressed,
                "Data stream reset: {}",
                reset.cause
            );
        }
        self.socket
            .reset_stream(reset.stream, reset.cause.code().0.into());
    }

    /// The client's address has changed.
    fn moved(&mut self, address: SocketAddr) {
        if let Some(suppressed) = MOVES.permit(self.now) {
            tracing::info!(
                client_id = clean(&self.identity.client_id, LOGGED_CHARS),
                listener = &*self.peer.listener,
                transport = self.peer.transport,
                from = %self.peer.address,
                peer = %address,
                suppressed,
                "Client's address changed"
            );
        }
        let peer = Peer {
            address,
            ..(*self.peer).clone()
        };
        self.peer = Arc::new(peer);
        let router = &self.clients.router;
        let caller = self.machine.caller();
        router.moved(caller.session, caller.connection_no, self.peer.clone());
        let listener = &self.peer.listener;
        if let Some(sender) = sender_moved(self.clients, listener, &self.identity, address) {
            router.set_sender(caller.session, caller.connection_no, sender);
        }
    }
}
