//! A small HTTP client and a strict reader of the Prometheus text exposition format.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Fetches a path over HTTP/1.1; returns status and body.
///
/// # Errors
/// The server does not answer, or not in HTTP.
pub fn get(addr: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let wait = Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&addr, wait)?;
    stream.set_read_timeout(Some(wait))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer).map_err(io::Error::other)?;
    let fault = || io::Error::other("not an HTTP answer");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(fault)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .ok_or_else(fault)?;
    if head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked")
    {
        return Ok((status, unchunk(body).ok_or_else(fault)?));
    }
    Ok((status, body.to_owned()))
}

fn unchunk(mut body: &str) -> Option<String> {
    let mut out = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n")?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        if size == 0 {
            return Some(out);
        }
        out += rest.get(..size)?;
        body = rest.get(size + 2..)?;
    }
}

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The full name, with `_bucket`, `_sum` or `_count` where it has one.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// A scrape.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Metric families by name, with their type.
    pub types: BTreeMap<String, String>,
    /// All samples, in their order.
    pub samples: Vec<Sample>,
}

impl Metrics {
    /// Reads a scrape as strictly as `promtool check metrics` does: names and labels well formed, HELP
    /// and TYPE before the samples and once, the samples of a family together, no sample twice,
    /// counters ending in `_total`, histograms cumulative and complete.
    ///
    /// # Errors
    /// The first rule that is broken, with its line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut this = Self::default();
        let (mut helped, mut closed) = (BTreeSet::new(), BTreeSet::new());
        let mut open = String::new();
        let mut seen = BTreeSet::new();
        if !text.is_empty() && !text.ends_with('\n') {
            return Err("the last line does not end".to_owned());
        }
        for (i, line) in text.lines().enumerate() {
            let fault = |what: &str| Err(format!("line {}: {what}: {line}", i + 1));
            if line.is_empty() {
                continue;
            }
            let family = if let Some(rest) = line.strip_prefix("# HELP ") {
                let name = rest.split(' ').next().unwrap_or("");
                if rest.len() <= name.len() + 1 {
                    return fault("no help text");
                }
                if !helped.insert(name.to_owned()) {
                    return fault("a second HELP");
                }
                name.to_owned()
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let Some((name, kind)) = rest.split_once(' ') else {
                    return fault("no type");
                };
                if !["counter", "gauge", "histogram", "summary", "untyped"].contains(&kind) {
                    return fault("unknown type");
                }
                if kind == "counter" && !name.ends_with("_total") {
                    return fault("a counter not called _total");
                }
                if kind != "counter" && name.ends_with("_total") {
                    return fault("called _total without being a counter");
                }
                if this
                    .types
                    .insert(name.to_owned(), kind.to_owned())
                    .is_some()
                {
                    return fault("a second TYPE");
                }
                name.to_owned()
            } else if line.starts_with('#') {
                continue;
            } else {
                let sample = match sample(line) {
                    Ok(sample) => sample,
                    Err(what) => return fault(&what),
                };
                let family = this.family(&sample.name);
                if !this.types.contains_key(&family) {
                    return fault("a sample without TYPE");
                }
                if !helped.contains(&family) {
                    return fault("a metric without HELP");
                }
                if !seen.insert((sample.name.clone(), sample.labels.clone())) {
                    return fault("a sample twice");
                }
                if this.types[&family] == "counter" && sample.value < 0.0 {
                    return fault("a negative counter");
                }
                this.samples.push(sample);
                family
            };
            if family != open {
                if closed.contains(&family) {
                    return fault("the samples of a family are not together");
                }
                closed.insert(std::mem::replace(&mut open, family));
            }
        }
        this.check_histograms()?;
        Ok(this)
    }

    /// The sum over all samples of a name whose labels include all given labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let matches = |s: &&Sample| {
            s.name == name
                && labels
                    .iter()
                    .all(|(k, v)| s.labels.get(*k).is_some_and(|have| have == v))
        };
        self.samples.iter().filter(matches).map(|s| s.value).sum()
    }

    /// Whether the scrape has a sample with this name.
    pub fn has(&self, name: &str) -> bool {
        self.samples.iter().any(|s| s.name == name)
    }

    fn family(&self, name: &str) -> String {
        for suffix in ["_bucket", "_sum", "_count"] {
            if let Some(base) = name.strip_suffix(suffix)
                && matches!(
                    self.types.get(base).map(String::as_str),
                    Some("histogram" | "summary")
                )
            {
                return base.to_owned();
            }
        }
        name.to_owned()
    }

    fn check_histograms(&self) -> Result<(), String> {
        for (family, _) in self.types.iter().filter(|(_, kind)| *kind == "histogram") {
            let bucket = format!("{family}_bucket");
            let mut series: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
            for s in self.samples.iter().filter(|s| s.name == bucket) {
                let mut labels = s.labels.clone();
                let le = labels
                    .remove("le")
                    .ok_or(format!("{family}: a bucket without le"))?;
                let le = number(&le).ok_or(format!("{family}: le {le}"))?;
                series.entry(labels).or_default().push((le, s.value));
            }
            for (labels, buckets) in series {
                if !buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1) {
                    return Err(format!("{family} {labels:?}: buckets are not cumulative"));
                }
                let count = format!("{family}_count");
                let count = self
                    .samples
                    .iter()
                    .find(|s| s.name == count && s.labels == labels);
                let last = buckets.last().copied();
                match (last, count) {
                    (Some((f64::INFINITY, n)), Some(count)) if n == count.value => {}
                    _ => {
                        return Err(format!(
                            "{family} {labels:?}: no +Inf bucket equal to count"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

fn sample(line: &str) -> Result<Sample, String> {
    let end = line.find(['{', ' ']).ok_or("no value")?;
    let name = line[..end].to_owned();
    let legal = |c: char, first: bool| {
        c.is_ascii_alphabetic() || c == '_' || c == ':' || (!first && c.is_ascii_digit())
    };
    if name.is_empty() || !name.chars().enumerate().all(|(i, c)| legal(c, i == 0)) {
        return Err("bad metric name".to_owned());
    }
    let mut labels = BTreeMap::new();
    let mut rest = &line[end..];
    if let Some(mut inner) = rest.strip_prefix('{') {
        loop {
            if let Some(after) = inner.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, after) = inner.split_once("=\"").ok_or("bad label")?;
            if key.is_empty()
                || !key
                    .chars()
                    .enumerate()
                    .all(|(i, c)| c != ':' && legal(c, i == 0))
            {
                return Err(format!("bad label name {key}"));
            }
            let (value, after) = quoted(after).ok_or("a label value does not end")?;
            if labels.insert(key.to_owned(), value).is_some() {
                return Err(format!("label {key} twice"));
            }
            inner = after.strip_prefix(',').unwrap_or(after);
        }
    }
    let mut words = rest.split_whitespace();
    let value = words.next().and_then(number).ok_or("bad value")?;
    Ok(Sample {
        name,
        labels,
        value,
    })
}

/// Splits a label value at its closing quote from the text that follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[i + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                c @ ('\\' | '"') => c,
                _ => return None,
            }),
            c => value.push(c),
        }
    }
    None
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        _ => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_total An a.\n# TYPE a_total counter\na_total{x=\"1\"} 2\n\
        a_total{x=\"2\\\"\"} 3\n# HELP h_seconds An h.\n# TYPE h_seconds histogram\n\
        h_seconds_bucket{le=\"0.1\"} 1\nh_seconds_bucket{le=\"+Inf\"} 2\nh_seconds_sum 0.4\n\
        h_seconds_count 2\n";

    #[test]
    fn a_good_scrape_is_read() {
        let metrics = Metrics::parse(GOOD).unwrap();
        assert_eq!(metrics.sum("a_total", &[]), 5.0);
        assert_eq!(metrics.sum("a_total", &[("x", "1")]), 2.0);
        assert!(metrics.has("h_seconds_count") && !metrics.has("b"));
    }

    #[test]
    fn broken_scrapes_are_refused() {
        for (from, to) in [
            ("# TYPE a_total counter\n", ""),
            ("# HELP a_total An a.\n", ""),
            ("a_total{x=\"1\"} 2", "a_total{x=\"2\\\"\"} 2"),
            ("le=\"+Inf\"} 2", "le=\"+Inf\"} 0"),
            ("le=\"+Inf\"} 2", "le=\"1\"} 2"),
            ("h_seconds_count 2", "h_seconds_count 3"),
            ("x=\"1\"", "x=1"),
            ("TYPE h_seconds histogram", "TYPE h_seconds counter"),
        ] {
            let text = GOOD.replace(from, to);
            assert!(Metrics::parse(&text).is_err(), "{text}");
        }
    }
}
