//! The notation of values: durations, sizes, shares, choices.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// A duration with its unit, such as `"2h"` or `"250ms"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span(pub Duration);

/// A duration, or `"none"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpanOrNone(pub Option<Duration>);

/// One text, or a list of texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OneOrMore(pub Vec<String>);

/// A size with its unit, such as `"1MiB"`; a bare number is bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub u64);

/// A size, or a share in percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    Bytes(u64),
    Percent(u64),
}

impl Share {
    /// The share of a whole, in bytes.
    pub(super) fn of(self, whole: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => whole / 100 * percent,
        }
    }
}

/// For `deserialize_with`: a duration.
pub(super) fn duration<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    Span::deserialize(d).map(|span| span.0)
}

/// For `deserialize_with`: a duration or `"none"`.
pub(super) fn duration_or_none<'de, D: Deserializer<'de>>(
    d: D,
) -> Result<Option<Duration>, D::Error> {
    SpanOrNone::deserialize(d).map(|span| span.0)
}

/// For `deserialize_with`: a size in bytes.
pub(super) fn size<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    Size::deserialize(d).map(|size| size.0)
}

/// For `deserialize_with`: a size below 4 GiB.
pub(super) fn size32<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    let Size(size) = Size::deserialize(d)?;
    u32::try_from(size).map_err(|_| de::Error::custom("too large: must be below 4GiB"))
}

/// A value that is written as a string or a number.
pub(super) trait Written {
    type Value;
    /// The allowed values, for error messages.
    const WHAT: &'static str;
    fn text(text: &str) -> Result<Self::Value, String>;
    fn number(number: i64) -> Result<Self::Value, String> {
        Err(format!("{number} is not allowed; write {}", Self::WHAT))
    }
}

/// The visitor of a [`Written`].
pub(super) struct Read<T>(pub PhantomData<T>);

impl<T: Written> Visitor<'_> for Read<T> {
    type Value = T::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::WHAT)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T::Value, E> {
        T::text(text).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T::Value, E> {
        T::number(number).map_err(E::custom)
    }
}

macro_rules! deserialize_written {
    ($($ty:ty),+) => { $(
        impl<'de> Deserialize<'de> for $ty {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_any(Read::<$ty>(PhantomData))
            }
        }
    )+ };
}
deserialize_written!(Span, SpanOrNone, Size, Share);

impl<'de> Deserialize<'de> for OneOrMore {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Vec<String>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, or a list of texts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(vec![text.to_owned()])
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(list))
            }
        }
        d.deserialize_any(Texts).map(Self)
    }
}

impl Written for Span {
    type Value = Self;
    const WHAT: &'static str = "a duration such as \"250ms\", \"30s\", \"10m\", \"2h\" or \"7d\"";

    fn text(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|_| format!("{text:?} is not {}", Self::WHAT))
    }

    fn number(number: i64) -> Result<Self, String> {
        Err(format!("{number} has no unit; write {}", Self::WHAT))
    }
}

impl Written for SpanOrNone {
    type Value = Self;
    const WHAT: &'static str = "a duration such as \"30s\", or \"none\"";

    fn text(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => Span::text(text).map(|span| Self(Some(span.0))),
        }
    }

    fn number(number: i64) -> Result<Self, String> {
        Span::number(number).map(|span| Self(Some(span.0)))
    }
}

impl Written for Size {
    type Value = Self;
    const WHAT: &'static str = "a size such as \"64KiB\", \"1MiB\" or \"10GiB\"";

    fn text(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not {}", Self::WHAT);
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit: u64 = match text[digits.len()..].trim() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(unit).map(Self).ok_or_else(wrong)
    }

    fn number(number: i64) -> Result<Self, String> {
        u64::try_from(number)
            .map(Self)
            .map_err(|_| format!("{number} is not {}", Self::WHAT))
    }
}

impl Written for Share {
    type Value = Self;
    const WHAT: &'static str = "a share such as \"80%\" or a size such as \"2GiB\"";

    fn text(text: &str) -> Result<Self, String> {
        match text.strip_suffix('%').map(|n| n.trim().parse::<u64>()) {
            Some(Ok(percent @ 1..=100)) => Ok(Self::Percent(percent)),
            Some(_) => Err(format!("{text:?} is not a share from \"1%\" to \"100%\"")),
            None => Size::text(text)
                .map(|size| Self::Bytes(size.0))
                .map_err(|_| format!("{text:?} is not {}", Self::WHAT)),
        }
    }

    fn number(number: i64) -> Result<Self, String> {
        Size::number(number).map(|size| Self::Bytes(size.0))
    }
}

/// Names the values of an enum, and words that are known but not supported.
macro_rules! choices {
    ($ty:ident { $( $text:literal => $variant:ident, )+ } not supported { $( $refused:literal, )* }) => {
        impl $crate::config::units::Written for $ty {
            type Value = Self;
            const WHAT: &'static str = concat!("one of", $( " \"", $text, "\"", )+);

            fn text(text: &str) -> Result<Self, String> {
                let allowed: &[&str] = &[$( $text, )+];
                let refused: &[&str] = &[$( $refused, )*];
                match text {
                    $( $text => Ok(Self::$variant), )+
                    other => Err($crate::config::units::not_a_choice(other, allowed, refused)),
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $ty {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_any($crate::config::units::Read::<$ty>(std::marker::PhantomData))
            }
        }
    };
}
pub(super) use choices;

/// The message for a word that is not allowed.
pub(super) fn not_a_choice(text: &str, allowed: &[&str], refused: &[&str]) -> String {
    let list = |names: &[&str]| {
        let quoted: Vec<String> = names.iter().map(|n| format!("\"{n}\"")).collect();
        quoted.join(", ")
    };
    if refused.contains(&text) {
        return format!(
            "\"{text}\" is not supported by this version; allowed: {}",
            list(allowed)
        );
    }
    let near = crate::config::error::nearest(text, allowed.iter().copied());
    let hint = near.map_or(String::new(), |n| format!("; did you mean \"{n}\"?"));
    format!("{text:?} is not allowed{hint} (allowed: {})", list(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(Span::text("2h"), Ok(Span(Duration::from_secs(7200))));
        assert_eq!(Span::text("250ms"), Ok(Span(Duration::from_millis(250))));
        assert_eq!(Span::text("1h 30m"), Ok(Span(Duration::from_secs(5400))));
        assert!(Span::text("soon").is_err());
        assert!(Span::text("-1s").is_err());
        assert!(Span::text("").is_err());
        assert!(Span::number(30).unwrap_err().contains("30 has no unit"));
    }

    #[test]
    fn sizes() {
        assert_eq!(Size::text("1MiB"), Ok(Size(1 << 20)));
        assert_eq!(Size::text("64 KiB"), Ok(Size(65536)));
        assert_eq!(Size::text("10GiB"), Ok(Size(10 << 30)));
        assert_eq!(Size::text("2MB"), Ok(Size(2_000_000)));
        assert_eq!(Size::text("17"), Ok(Size(17)));
        assert!(Size::text("1.5MiB").is_err());
        assert!(Size::text("99999999TiB").is_err());
        assert!(Size::text("MiB").is_err());
        assert!(Size::text("ä").is_err());
        assert!(Size::number(-1).is_err());
    }

    #[test]
    fn shares() {
        assert_eq!(Share::text("80%"), Ok(Share::Percent(80)));
        assert_eq!(Share::Percent(25).of(1000), 250);
        assert_eq!(Share::text("1GiB").unwrap().of(7), 1 << 30);
        for wrong in ["0%", "101%", "%", "-1%", "many"] {
            assert!(Share::text(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn choices_say_what_is_not_supported_and_what_is_near() {
        assert_eq!(
            not_a_choice("disk", &["memory"], &["disk"]),
            "\"disk\" is not supported by this version; allowed: \"memory\""
        );
        assert_eq!(
            not_a_choice("oldst", &["oldest", "newest"], &[]),
            "\"oldst\" is not allowed; did you mean \"oldest\"? (allowed: \"oldest\", \"newest\")"
        );
    }
}
