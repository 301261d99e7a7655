//! A number or an inclusive range of numbers: ports, user ids, group ids.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a span counts.
pub trait Unit: Copy + Ord + fmt::Display + FromStr + Into<u64> + TryFrom<u64> {
    /// The smallest number that means something.
    const MIN: Self;
    /// What a text should have been, for errors.
    const EXPECTED: &'static str;
}

impl Unit for u16 {
    const MIN: Self = 1;
    const EXPECTED: &'static str = "a port (80) nor a range of ports (8000-8100)";
}

impl Unit for u32 {
    const MIN: Self = 0;
    const EXPECTED: &'static str = "a numeric id (1000) nor a range of ids (1000-1999)";
}

/// One number (`80`) or an inclusive range (`8000-8100`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span<T> {
    /// The first number.
    pub first: T,
    /// The last number, equal to `first` for a single one.
    pub last: T,
}

/// Ports of TCP or UDP.
pub type Ports = Span<u16>;
/// User ids or group ids. Numbers only: a name would be looked up, and a lookup can hang.
pub type Ids = Span<u32>;

impl<T: Copy + Ord> Span<T> {
    /// A single number.
    pub const fn one(number: T) -> Self {
        Self { first: number, last: number }
    }

    /// Whether the number is in the range.
    pub fn contains(self, number: T) -> bool {
        self.first <= number && number <= self.last
    }

    /// Whether both have a number in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// The text is neither a number nor a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is neither {expected}")]
pub struct ParseSpanError {
    text: String,
    expected: &'static str,
}

impl<T: Unit> FromStr for Span<T> {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseSpanError { text: text.to_owned(), expected: T::EXPECTED };
        let number = |t: &str| t.trim().parse::<T>().ok().filter(|n| *n >= T::MIN).ok_or_else(wrong);
        let (first, last) = match text.split_once(['-', ':']) {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(text)?, number(text)?),
        };
        if first > last {
            return Err(wrong());
        }
        Ok(Self { first, last })
    }
}

impl<T: Unit> fmt::Display for Span<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl<T: Unit> Serialize for Span<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.first == self.last {
            serializer.serialize_u64(self.first.into())
        } else {
            serializer.collect_str(self)
        }
    }
}

impl<'de, T: Unit> Deserialize<'de> for Span<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrText<T>(PhantomData<T>);
        impl<T: Unit> Visitor<'_> for NumberOrText<T> {
            type Value = Span<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "either {}", T::EXPECTED.replace(" nor ", " or "))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Span<T>, E> {
                self.visit_str(&value.to_string())
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Span<T>, E> {
                self.visit_str(&value.to_string())
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Span<T>, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(NumberOrText(PhantomData))
    }
}
