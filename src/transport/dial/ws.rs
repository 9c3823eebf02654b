//! A WebSocket to a broker, as a stream of bytes [MQTT-6.0.0-1].

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, StatusCode};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};

/// The largest message that is accepted; a broker may put many packets into one.
const MESSAGE_MAX_BYTES: usize = 64 * 1024 * 1024;
/// The largest message that we send, because brokers limit frames.
const FRAME_BYTES: usize = 16 * 1024;

/// Why the upgrade to a WebSocket failed.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The broker answered with another status than 101 (RFC 6455 section 4.1).
    #[error("the broker answered HTTP {0}")]
    Status(StatusCode),
    /// The URL is not valid, the answer breaks a rule of WebSocket, or the connection failed.
    #[error("{0}")]
    Failed(Box<Error>),
}

impl From<Error> for UpgradeError {
    fn from(error: Error) -> Self {
        match error {
            Error::Http(response) => Self::Status(response.status()),
            other => Self::Failed(Box::new(other)),
        }
    }
}

/// The broker sent a text frame.
#[derive(Debug, thiserror::Error)]
#[error("the broker sent a text frame [MQTT-6.0.0-1]")]
struct TextFrame;

/// MQTT in binary messages.
#[derive(Debug)]
pub struct WsBytes<S> {
    ws: WebSocketStream<S>,
    input: Bytes,
    /// Bytes were passed to the WebSocket and may not be flushed.
    unflushed: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WsBytes<S> {
    /// The connection below the WebSocket.
    pub(super) fn get_ref(&self) -> &S {
        self.ws.get_ref()
    }
}

/// Upgrades a connection to a WebSocket. `authority` is host and port as in a URL.
///
/// # Errors
/// See [`UpgradeError`].
pub(super) async fn upgrade<S>(
    io: S,
    secure: bool,
    authority: &str,
    path: &str,
) -> Result<WsBytes<S>, UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let scheme = if secure { "wss" } else { "ws" };
    let mut request = format!("{scheme}://{authority}{path}").into_client_request()?;
    let protocol = HeaderValue::from_static("mqtt");
    request
        .headers_mut()
        .insert("Sec-WebSocket-Protocol", protocol);
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_MAX_BYTES))
        .max_frame_size(Some(MESSAGE_MAX_BYTES));
    let upgraded = tokio_tungstenite::client_async_with_config(request, io, Some(config)).await;
    let (ws, _) = upgraded?;
    Ok(WsBytes {
        ws,
        input: Bytes::new(),
        unflushed: false,
    })
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WsBytes<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // The request whose answer is awaited may not be flushed yet.
        if self.unflushed
            && let Poll::Ready(flushed) = self.ws.poll_flush_unpin(cx)
        {
            flushed.map_err(failed)?;
            self.unflushed = false;
        }
        while self.input.is_empty() {
            match ready!(self.ws.poll_next_unpin(cx)) {
                None | Some(Ok(Message::Close(_)) | Err(Error::ConnectionClosed)) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Ok(Message::Binary(bytes))) => self.input = bytes,
                Some(Ok(Message::Text(_))) => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, TextFrame);
                    return Poll::Ready(Err(error));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
            }
        }
        let size = self.input.len().min(buf.remaining());
        buf.put_slice(&self.input[..size]);
        self.input.advance(size);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WsBytes<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.ws.poll_ready_unpin(cx)).map_err(failed)?;
        let part = &buf[..buf.len().min(FRAME_BYTES)];
        let message = Message::Binary(Bytes::copy_from_slice(part));
        self.ws.start_send_unpin(message).map_err(failed)?;
        self.unflushed = true;
        Poll::Ready(Ok(part.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.ws.poll_flush_unpin(cx)).map_err(failed)?;
        self.unflushed = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(self.ws.poll_close_unpin(cx)) {
            Ok(()) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(failed(error))),
        }
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::other(other),
    }
}
