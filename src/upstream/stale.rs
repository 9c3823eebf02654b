//! Ends the link sessions of an earlier process that no link has any more: the number of links, the client
//! identifiers or the place of shared subscriptions was changed. Otherwise the broker would queue for them.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::backoff::{Backoff, jittered};
use crate::config::{Protocol, Server};
use crate::mqtt::Version;
use crate::router::StaleLink;

use crate::upstream::broker::{LinkContext, V5Support};
use crate::upstream::connect::{ConnectError, end_session};

/// Ends all of them, and returns when the process ends at the latest.
pub(super) async fn end_all(context: Arc<LinkContext>) {
    let ending = async {
        for stale in context.router.stale_links() {
            end(&context, &stale).await;
        }
    };
    context.stop.run_until_cancelled(ending).await;
}

/// Tries until the server has answered.
async fn end(context: &LinkContext, stale: &StaleLink) {
    let config = &context.broker.access.config;
    let (client_id, server) = (&stale.client_id, &stale.server);
    let Some(at) = config.server_named(server) else {
        tracing::warn!(
            %client_id,
            %server,
            "A session that an earlier process had at a server is left there: the server is not among upstream.servers any more"
        );
        return context.router.stale_link_ended(client_id);
    };
    let mut backoff = Backoff::new(config.backoff_min, config.backoff_max);
    loop {
        let ended = timeout(
            config.connect_timeout,
            end_at(context, &config.servers[at], stale),
        );
        match ended.await.unwrap_or(Err(ConnectError::Timeout)) {
            Ok(()) => {
                tracing::info!(%client_id, %server, "The session of a link that is gone was ended");
                return context.router.stale_link_ended(client_id);
            }
            Err(error) => {
                tracing::debug!(%client_id, %server, "A session cannot be ended yet: {error}");
            }
        }
        let wait: Duration = backoff.next_wait();
        sleep(jittered(wait, getrandom::u32().unwrap_or(u32::MAX / 2))).await;
    }
}

async fn end_at(
    context: &LinkContext,
    server: &Server,
    stale: &StaleLink,
) -> Result<(), ConnectError> {
    let broker = &context.broker;
    let client_id = &stale.client_id;
    if broker.v5_support() != V5Support::Refused {
        match end_session(broker, server, Version::V5, client_id).await {
            Err(ConnectError::V5Refused) if broker.access.config.protocol == Protocol::Auto => {}
            other => return other,
        }
    }
    end_session(broker, server, Version::V311, client_id).await
}
