//! Many connections, some handshakes at a time.

use std::fmt::Display;
use std::future::Future;
use std::io;

use futures_util::{StreamExt, stream};

/// Runs `make` for 0 to `n`, at most `at_once` together, and returns the results in order.
///
/// # Errors
/// The first failure, with its number.
pub async fn crowd<T, E, F>(
    n: usize,
    at_once: usize,
    make: impl Fn(usize) -> F,
) -> io::Result<Vec<T>>
where
    E: Display,
    F: Future<Output = Result<T, E>>,
{
    let numbered = |i: usize| {
        let future = make(i);
        async move {
            future
                .await
                .map_err(|e| io::Error::other(format!("connection {i}: {e}")))
        }
    };
    let mut all = stream::iter(0..n).map(numbered).buffered(at_once.max(1));
    let mut done = Vec::with_capacity(n);
    while let Some(one) = all.next().await {
        done.push(one?);
    }
    Ok(done)
}
