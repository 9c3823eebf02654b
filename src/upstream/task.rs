//! The task of one link: dials, serves the connection, and reconnects with a back-off.

use std::future::poll_fn;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::time::{Instant, sleep};

use crate::backoff::{Backoff, jittered, worth_logging};
use crate::config::Server;
use crate::router::LinkSession;
use crate::router::handle::TaskWaker;
use crate::supervise::{Health, keep_running};
use crate::telemetry::{LinkDownReason, TaskKind};

use crate::upstream::broker::LinkContext;
use crate::upstream::connect::{ConnectError, Established, establish};
use crate::upstream::discover::profile_of;
use crate::upstream::duplicate_node::DuplicateNodeWatch;
use crate::upstream::link::end::LinkEnd;
use crate::upstream::link::machine::{Handshake, Machine};
use crate::upstream::profile::BrokerProfile;
use crate::upstream::pump::{Conditions, serve};
use crate::upstream::role::Role;
use crate::upstream::status::LinkStatus;

/// A connection that lasted this long shows that the broker is well.
const STABLE: Duration = Duration::from_secs(10);

/// Why a link is down.
#[derive(Debug, thiserror::Error)]
enum LinkDown {
    /// Its connection could not be made.
    #[error(transparent)]
    NotConnected(ConnectError),
    /// Its connection ended.
    #[error(transparent)]
    Ended(LinkEnd),
}

impl LinkDown {
    /// The metric label.
    fn label(&self) -> LinkDownReason {
        match self {
            Self::NotConnected(error) => error.label(),
            Self::Ended(end) => end.label(),
        }
    }
}

/// Runs a link until the process ends. A panic costs the link its connection: the machine, with the
/// publishes that the broker has not acknowledged, outlives it.
pub(super) async fn run<M: Machine>(
    context: Arc<LinkContext>,
    health: Arc<Health>,
    link: Arc<LinkStatus>,
    machine: M,
    wake: Arc<TaskWaker>,
) {
    let (stop, name) = (context.stop.clone(), format!("link {}", link.name));
    let number = data_link(&context, &link);
    let restored = number.and_then(|number| context.router.restored_link(number));
    let servers = &context.broker.access.config;
    let session_at = (restored.as_ref()).and_then(|link| servers.server_named(&link.server));
    let task = LinkTask {
        placement: context.placement.load(Ordering::Acquire),
        backoff: Backoff::new(
            context.broker.access.config.backoff_min,
            context.broker.access.config.backoff_max,
        ),
        context,
        link,
        machine,
        wake,
        ends: 0,
        session_at,
        unanswered: restored.is_some_and(|link| link.in_doubt),
        panicked: false,
        duplicate_node: DuplicateNodeWatch::default(),
    };
    keep_running(TaskKind::Link, name, health, stop, task, |task| {
        Box::pin(task.run())
    })
    .await;
}

/// The router's number of a link that carries filters.
fn data_link(context: &LinkContext, link: &LinkStatus) -> Option<usize> {
    match link.role {
        Role::Data => Some(link.number),
        Role::Shared => Some(context.router.shared_link(link.number)),
        Role::Publish | Role::Retained => None,
    }
}

/// Waits until the link has something to do. The first data links and the retained link always have.
async fn wanted(context: &LinkContext, link: &LinkStatus, wake: &TaskWaker) {
    let router = &context.router;
    let now = || match link.role {
        Role::Retained => true,
        Role::Data => router.filter_link_wanted(link.number),
        Role::Shared => router.filter_link_wanted(router.shared_link(link.number)),
        Role::Publish => link.number < router.publish_links_wanted(),
    };
    while !now() {
        poll_fn(|cx| match wake.take(cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }
}

/// Waits until the disk knows of the CONNECT that is about to be sent. After a crash, it is known by that
/// whether the broker has the link's session.
async fn announce(
    context: &LinkContext,
    link: &LinkStatus,
    wake: &TaskWaker,
    server: &Server,
    clean: bool,
) {
    let router = &context.router;
    let number = data_link(context, link).filter(|_| router.keeps_link_sessions());
    let Some(number) = number else {
        return;
    };
    let client_id = context.broker.client_id(&link.name);
    router.link_connects(number, clean, &client_id, &server.to_string());
    poll_fn(|cx| {
        // Before the look, so that it is woken for a commit after it.
        wake.take(cx.waker());
        match router.may_connect(number) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    // It may have been woken for something else.
    wake.raise();
}

struct LinkTask<M> {
    context: Arc<LinkContext>,
    link: Arc<LinkStatus>,
    machine: M,
    wake: Arc<TaskWaker>,
    /// The server that has a session of this link, begun by this process or by the earlier ones of its store.
    session_at: Option<usize>,
    /// A CONNECT may have begun a session at the broker, and its answer did not arrive.
    unanswered: bool,
    /// The last connection ended with a panic.
    panicked: bool,
    /// The placement of filters that the session was made for.
    placement: u64,
    backoff: Backoff,
    /// Connections in a row that ended soon.
    ends: u64,
    duplicate_node: DuplicateNodeWatch,
}

impl<M: Machine> LinkTask<M> {
    async fn run(&mut self) {
        let stop = self.context.stop.clone();
        let wanted = wanted(&self.context, &self.link, &self.wake);
        if stop.run_until_cancelled(wanted).await.is_none() {
            return;
        }
        self.link.starts();
        // When the process ends, an attempt is dropped where it waits. A connection that is being
        // served ends by itself.
        while !stop.is_cancelled() {
            let server = self.context.server.load(Ordering::Acquire);
            let Some(down) = self.attempt(server).await else {
                return;
            };
            if stop.is_cancelled() {
                return;
            }
            let wait = self.failed(server, &down);
            if stop.run_until_cancelled(sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// One connection, from the dial to its end. Returns why it failed or ended; `None`: the process
    /// ends.
    async fn attempt(&mut self, server: usize) -> Option<LinkDown> {
        let context = self.context.clone();
        let placement = context.placement.load(Ordering::Acquire);
        if self.link.role.has_filters() && placement != self.placement {
            self.session_at = None;
        }
        self.placement = placement;
        self.duplicate_node
            .judge(&context.broker, &self.link, &context.times);
        let clean = self.session_at != Some(server);
        let address = &context.broker.access.config.servers[server];
        let announced = announce(&context, &self.link, &self.wake, address, clean);
        context.stop.run_until_cancelled(announced).await?;
        let dialling = Box::pin(establish(&context.broker, &self.link, address, clean));
        let down = match context.stop.run_until_cancelled(dialling).await? {
            Ok(established) => LinkDown::Ended(self.serve(server, established).await),
            Err(error) => {
                self.unanswered |= error.may_have_begun_session();
                context.fail_over(server);
                self.duplicate_node.unreachable();
                LinkDown::NotConnected(error)
            }
        };
        self.link.metrics().disconnects[down.label()].increment(1);
        self.link.set_last_error(down.to_string());
        Some(down)
    }

    async fn serve(&mut self, server: usize, established: Established) -> LinkEnd {
        let context = self.context.clone();
        self.session_at = Some(server);
        let in_doubt = std::mem::take(&mut self.unanswered);
        let session = match (established.session_present, in_doubt) {
            (false, _) => LinkSession::New,
            (true, true) => LinkSession::Doubtful,
            (true, false) => LinkSession::Resumed,
        };
        let since = Instant::now();
        // Counted before the broker is probed: meanwhile another link's trouble is its own.
        context.connected.fetch_add(1, Ordering::AcqRel);
        context.times.connected(&self.link.name);
        let served = AssertUnwindSafe(self.serve_session(server, session, established));
        let served = served.catch_unwind().await;
        let end = served.as_ref().map_or(&LinkEnd::Panicked, |end| end);
        let now = context.clock.now();
        let for_a_packet = self.machine.has_sent() && end.may_be_for_a_packet();
        let told = AssertUnwindSafe(|| self.machine.disconnected(end, now));
        let told = panic::catch_unwind(told);
        context.connected.fetch_sub(1, Ordering::AcqRel);
        self.link.disconnected();
        self.ended(end, since.elapsed(), for_a_packet);
        match (served, told) {
            (Ok(end), Ok(())) => end,
            (Err(panic), _) | (_, Err(panic)) => {
                self.link.metrics().disconnects[LinkDownReason::Panic].increment(1);
                self.link.set_last_error(LinkEnd::Panicked.to_string());
                panic::resume_unwind(panic)
            }
        }
    }

    async fn serve_session(
        &mut self,
        server: usize,
        session: LinkSession,
        established: Established,
    ) -> LinkEnd {
        let context = self.context.clone();
        let profile = match profile_of(&context, server, &established.capabilities).await {
            Ok(profile) => profile,
            Err(end) => {
                context.fail_over(server);
                self.session_at = None;
                self.backoff.set_longest();
                return end;
            }
        };
        self.connected(&established, &profile);
        let handshake = Handshake::new(session, &profile);
        let conditions = Conditions {
            placement: self.placement,
            server,
        };
        serve(
            &context,
            &self.link,
            &mut self.machine,
            &self.wake,
            (established, &handshake),
            conditions,
        )
        .await
    }

    /// Draws the conclusions from the end of a connection.
    fn ended(&mut self, end: &LinkEnd, lasted: Duration, for_a_packet: bool) {
        let reason = end.label();
        let now = self.context.clock.now();
        if let Some(suppressed) = self.context.outage.ended(reason, now) {
            tracing::info!(
                link = self.link.name,
                %reason,
                suppressed,
                "Link to the broker ended: {end}"
            );
        }
        // A link on which nothing was unanswered shows a second process better.
        if !for_a_packet {
            self.duplicate_node.ended(end, lasted);
        }
        self.context.times.ended(&self.link.name);
        let panicked = matches!(end, LinkEnd::Panicked);
        if panicked && self.panicked {
            // A message that the broker sends again may be the reason: it ends with the session.
            self.session_at = None;
        }
        self.panicked = panicked;
        match end.label() {
            // Two processes that take the link from each other at every turn serve nobody.
            LinkDownReason::TakenOver => self.backoff.set_longest(),
            LinkDownReason::Failover => self.backoff.reset(),
            // The packet will be found. Meanwhile others wait for the link.
            _ if lasted > STABLE || for_a_packet => self.backoff.reset(),
            // A broker that ends connections for no reason of ours does not let us connect.
            _ => {}
        }
        self.ends = match lasted > STABLE {
            true => 0,
            false => self.ends + 1,
        };
    }

    fn connected(&self, established: &Established, profile: &BrokerProfile) {
        let context = &self.context;
        context.outage.connected();
        let features = profile.features();
        if context
            .router
            .set_broker_features(&features, context.clock.now())
        {
            context.placement.fetch_add(1, Ordering::AcqRel);
        }
        let capabilities = &established.capabilities;
        let protocol = capabilities.version.name();
        let server = self.link.connected(protocol);
        tracing::info!(
            link = self.link.name,
            server,
            protocol,
            session_present = established.session_present,
            receive_maximum = capabilities.receive_maximum,
            identifiers = features.identifiers,
            "Link to the broker is up"
        );
    }

    /// The link is down. Returns how long to wait before the next attempt.
    fn failed(&mut self, server: usize, down: &LinkDown) -> Duration {
        let random = getrandom::u32().unwrap_or(u32::MAX / 2);
        let wait = jittered(self.backoff.next_wait(), random);
        let context = &self.context;
        let server = &context.broker.access.config.servers[server];
        let connected = matches!(down, LinkDown::Ended(_));
        if !connected && context.connected.load(Ordering::Acquire) == 0 {
            let now = context.clock.now();
            if let Some(attempts) = context.outage.failed(down.label(), now) {
                tracing::warn!(%server, attempts, "No link to the broker is up: {down}");
            }
            return wait;
        }
        let attempts = self.backoff.failures();
        // The first end of a connection has its line already.
        let known = connected && attempts == 1;
        if !known && worth_logging(self.ends.max(attempts)) {
            tracing::warn!(
                link = self.link.name,
                %server,
                attempts,
                wait_ms = wait.as_millis() as u64,
                "Link to the broker is down: {down}"
            );
        }
        wait
    }
}
