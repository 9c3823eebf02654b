//! Reads CONNECT.

use std::future::poll_fn;
use std::sync::Arc;

use crate::budget::Account;
use crate::mqtt::{answerable, decode_connect};
use crate::transport::{Closed, Detected, Stream, Unauthenticated, detect};

use crate::client::connect::{Refusal, RefusalCause};
use crate::client::machine::{KEEP_BYTES, ReadBuffer};

/// One network may hold this fraction of the bytes of incomplete CONNECTs, once half of them are used.
const NETWORK_SHARE: u64 = 8;

/// Reads until the CONNECT is complete; it may have `connect_max` bytes. `account`, the account of all
/// incomplete CONNECTs, may hold `max_bytes`; from half of them on, one network may hold an eighth.
/// `share` is the connection's part of its network's share.
///
/// # Errors
/// The connection is refused.
pub(super) async fn read_connect(
    stream: &mut Stream,
    input: &mut ReadBuffer,
    connect_max: u32,
    (account, max_bytes): (&Arc<Account>, u64),
    mut share: Option<&mut Unauthenticated>,
) -> Result<(), Refusal> {
    loop {
        if is_complete(input.bytes(), connect_max)? {
            return Ok(());
        }
        // The deadline is that of the whole CONNECT phase.
        input.settle(false, None);
        let held = share
            .as_deref_mut()
            .map_or(0, |s| s.hold(input.bytes().len()));
        let used = account.used();
        let greedy = used > max_bytes / 2 && held > max_bytes / NETWORK_SHARE;
        if (used > max_bytes || greedy) && input.bytes().len() > KEEP_BYTES {
            return Err(Refusal::new(RefusalCause::ConnectBudget));
        }
        let mut more = Vec::new();
        match poll_fn(|cx| stream.poll_recv(cx, &mut more)).await {
            Ok(_) => input.extend(account, &more),
            Err(closed) => {
                return Err(Refusal::new(RefusalCause::Closed(closed)));
            }
        }
    }
}

/// Whether the bytes begin with a whole CONNECT.
fn is_complete(bytes: &[u8], connect_max: u32) -> Result<bool, Refusal> {
    let other = detect(bytes).filter(|detected| *detected != Detected::Mqtt);
    match (decode_connect(bytes, connect_max), other) {
        (Ok(Some(_)), _) => Ok(true),
        (Ok(None), None) => Ok(false),
        // The first byte of another protocol may pass for an incomplete packet.
        (Ok(None), Some(other)) => Err(Refusal::new(RefusalCause::OtherProtocol(other))),
        (Err(error), detected) => Err(Refusal {
            // Only a client that sent a CONNECT can read an answer.
            answer: answerable(bytes),
            ..Refusal::new(RefusalCause::Packet { error, detected })
        }),
    }
}

/// Reads on while the client's credentials are checked, and ends when the client has gone. The bytes
/// are appended to `more`, up to about [`KEEP_BYTES`]: with more of them nothing is read, and the
/// deadline alone ends the wait.
pub(super) async fn until_gone(stream: &mut Stream, more: &mut Vec<u8>) -> Closed {
    loop {
        if more.len() > KEEP_BYTES {
            return std::future::pending().await;
        }
        let mut read = Vec::new();
        match poll_fn(|cx| stream.poll_recv(cx, &mut read)).await {
            Ok(_) => more.append(&mut read),
            Err(closed) => return closed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn a_connect_is_charged_while_it_is_not_whole() {
        let account = Arc::new(Account::new());
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let mut stream = Stream::pipe(server);
        // Of 16,000 bytes.
        let mut connect = vec![0x10, 0x80, 0x7d, 0, 4];
        connect.extend_from_slice(b"MQTT\x05\x02\0\0");
        connect.resize(6000, 0);
        client.write_all(&connect).await.expect("written");
        let mut input = ReadBuffer::default();
        let mut read = Box::pin(read_connect(
            &mut stream,
            &mut input,
            16_384,
            (&account, 6000),
            None,
        ));
        assert!(futures_util::poll!(&mut read).is_pending());
        assert_eq!(account.used(), 6000);
        client.write_all(b"x").await.expect("written");
        let refusal = read.await.expect_err("one more than there is room for");
        assert!(
            matches!(refusal.cause, RefusalCause::ConnectBudget),
            "{refusal:?}"
        );
        drop(input);
        assert_eq!(account.used(), 0);
    }
}
