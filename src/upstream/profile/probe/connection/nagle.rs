//! Whether the broker holds small packets back until earlier ones are acknowledged: Nagle's algorithm
//! (RFC 896), which TCP_NODELAY turns off.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::mqtt::encode_pingreq;
use crate::transport::dial::QuickAck;
use crate::upstream::profile::probe::connection::{Interrupted, ProbeConnection};

/// An answer that arrives so much later than one that was sent together with it was held back. The
/// system delays an acknowledgement for 40 ms or more.
const HELD_BACK: Duration = Duration::from_millis(15);
/// So many answers must have been held back. The network may delay one.
const HELD_BACK_SAMPLES: usize = 2;
/// Samples that are taken at most.
const SAMPLES_MAX: usize = 4;

impl<IO> ProbeConnection<'_, IO>
where
    IO: AsyncRead + AsyncWrite + QuickAck + Unpin + Send,
{
    /// Whether the broker holds small answers back until earlier ones are acknowledged. `None`: this is
    /// not a TCP connection, or this process had too little time to tell.
    pub(in crate::upstream::profile::probe) async fn holds_back(
        &mut self,
    ) -> Result<Option<bool>, Interrupted> {
        if !self.io.quick_ack(true) {
            return Ok(None);
        }
        let mut usual = Duration::MAX;
        let mut held_back = 0;
        for _ in 0..SAMPLES_MAX {
            let begun = Instant::now();
            self.ping(Vec::new()).await?;
            usual = usual.min(begun.elapsed());
            let begun = Instant::now();
            let gap = self.gap().await?;
            if gap >= HELD_BACK {
                held_back += 1;
            } else if begun.elapsed() < usual + HELD_BACK {
                return Ok(Some(false));
            }
            // Else both answers may have been there before this task could read the first one.
            if held_back == HELD_BACK_SAMPLES {
                return Ok(Some(true));
            }
        }
        Ok(None)
    }

    /// The time between the answers to two PINGREQs that are sent together, while TCP acknowledgements
    /// may be delayed.
    async fn gap(&mut self) -> Result<Duration, Interrupted> {
        let mut out = Vec::new();
        encode_pingreq(&mut out);
        encode_pingreq(&mut out);
        self.io.quick_ack(false);
        self.pingresps = 0;
        self.write(&out).await?;
        self.delays_acks = true;
        let mut first = None;
        while self.pingresps < 2 {
            self.read().await?;
            if self.pingresps > 0 {
                first.get_or_insert_with(Instant::now);
            }
        }
        self.delays_acks = false;
        Ok(first.map_or(Duration::ZERO, |at| at.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use bytes::BytesMut;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf, duplex};
    use tokio::time::sleep;

    use super::*;
    use crate::mqtt::Version;

    /// A connection that has TCP's setting.
    struct Tcp(DuplexStream);

    impl QuickAck for Tcp {
        fn quick_ack(&self, _: bool) -> bool {
            true
        }
    }

    impl AsyncRead for Tcp {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Tcp {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    /// When the answers to two PINGREQs arrive, milliseconds after the usual time.
    type Answers = [u64; 2];

    const TOGETHER: Answers = [0, 0];
    const HELD: Answers = [0, 40];
    /// The task reads after both have arrived.
    const READ_LATE: Answers = [45, 45];

    /// What the probe finds if the broker's usual answer takes `usual_ms`, and two PINGREQs are answered
    /// like this, the last way for ever.
    async fn found(usual_ms: u64, samples: &[Answers]) -> Option<bool> {
        let (ours, mut theirs) = duplex(1024);
        let broker = async {
            let mut samples = samples.to_vec();
            let mut input = BytesMut::new();
            while theirs.read_buf(&mut input).await.is_ok_and(|read| read > 0) {
                sleep(Duration::from_millis(usual_ms)).await;
                let pings = input.split().len() / 2;
                let answers = match (pings, samples.len()) {
                    (1, _) => TOGETHER,
                    (_, 1) => samples[0],
                    _ => samples.remove(0),
                };
                let [first, second] = answers;
                sleep(Duration::from_millis(first)).await;
                let mut answer: &[u8] = &[0xD0, 0, 0xD0, 0][..pings * 2];
                if second > first {
                    theirs.write_all(&answer[..2]).await.expect("a pipe");
                    sleep(Duration::from_millis(second - first)).await;
                    answer = &answer[2..];
                }
                theirs.write_all(answer).await.expect("a pipe");
            }
        };
        let mut io = Tcp(ours);
        let deadline = Instant::now() + Duration::from_secs(6);
        let rest = BytesMut::new();
        let (version, topic) = (Version::V5, "t");
        let mut probe = ProbeConnection::new(&mut io, version, topic, true, 20, rest, deadline);
        tokio::select! {
            found = probe.holds_back() => found.expect("the broker answers"),
            () = broker => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_were_held_back_are_told_from_answers_that_were_read_late() {
        for usual in [1, 200] {
            assert_eq!(found(usual, &[TOGETHER]).await, Some(false));
            assert_eq!(found(usual, &[HELD]).await, Some(true));
            assert_eq!(found(usual, &[HELD, TOGETHER]).await, Some(false));
            assert_eq!(found(usual, &[READ_LATE, HELD]).await, Some(true));
            assert_eq!(found(usual, &[READ_LATE, TOGETHER]).await, Some(false));
            assert_eq!(found(usual, &[READ_LATE]).await, None);
        }
    }
}
