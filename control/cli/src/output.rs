//! Tables as kumactl prints them, YAML, JSON, and times.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::args::Format;

pub(crate) fn to_yaml<T: Serialize>(value: &T) -> anyhow::Result<String> {
    let value = serde_json::to_value(value)?;
    Ok(ursa_model::yaml::to_string(&value)?)
}

pub(crate) fn from_yaml<T: DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    Ok(serde_json::from_value(ursa_model::yaml::from_str(text)?)?)
}

/// Writes to standard output. Whoever reads it may stop early (`| head`), and then nothing is left to do.
pub(crate) fn write(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// As `print!`, by [`write`].
macro_rules! put {
    ($($arg:tt)*) => { crate::output::write(&format!($($arg)*)) };
}

/// As `println!`, by [`write`].
macro_rules! say {
    ($($arg:tt)*) => { crate::output::write(&(format!($($arg)*) + "\n")) };
}

pub(crate) use {put, say};

/// Prints a document; `Format::Table` is the caller's business.
pub(crate) fn document(format: Format, value: &Value) -> anyhow::Result<()> {
    if format == Format::Yaml {
        put!("{}", to_yaml(value)?);
    } else {
        say!("{}", serde_json::to_string_pretty(value)?);
    }
    Ok(())
}

/// Columns three spaces apart, no borders, nothing after the last column.
pub(crate) fn render(headers: &[&str], rows: &[Vec<String>]) -> String {
    if headers.is_empty() {
        return String::new();
    }
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
        cells.chain([headers[at].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headers.len()).map(width).collect();
    let mut text = String::new();
    let header: Vec<String> = headers.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&header).chain(rows) {
        for (at, cell) in row.iter().enumerate() {
            text.push_str(cell);
            if at + 1 < row.len() {
                let padding = widths[at] - cell.chars().count() + 3;
                text.extend(std::iter::repeat_n(' ', padding));
            }
        }
        text.push('\n');
    }
    text
}

pub(crate) fn table(headers: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let rows: Vec<_> = rows.into_iter().collect();
    put!("{}", render(headers, &rows));
}

/// A span as it stands in an AGE or AGO cell.
pub(crate) fn age(milliseconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    const YEAR: i64 = 365 * DAY;
    // A second of clock difference between here and the server is no future.
    if milliseconds < -1000 {
        return "never".to_owned();
    }
    let seconds = (milliseconds / 1000).max(0);
    match seconds {
        0..MINUTE => format!("{seconds}s"),
        MINUTE..HOUR => format!("{}m", seconds / MINUTE),
        HOUR..DAY => format!("{}h", seconds / HOUR),
        DAY..YEAR => format!("{}d", seconds / DAY),
        _ => format!("{}y", seconds / YEAR),
    }
}

/// The age of an RFC 3339 time; absent, unreadable and zero times are `never`.
pub(crate) fn ago(time: Option<&Value>) -> String {
    let Some(time) = time.and_then(Value::as_str) else { return "never".to_owned() };
    match OffsetDateTime::parse(time, &Rfc3339) {
        Ok(time) if time.year() > 1 => {
            let span = OffsetDateTime::now_utc() - time;
            age(i64::try_from(span.whole_milliseconds()).unwrap_or(i64::MAX))
        }
        _ => "never".to_owned(),
    }
}

/// A string field, empty when absent.
pub(crate) fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

/// `k=v,k=v`
pub(crate) fn labels(value: &Value) -> String {
    let pairs = value.get("labels").and_then(Value::as_object).into_iter().flatten();
    let pairs: Vec<String> =
        pairs.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
    pairs.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_as_kumactl_prints_them() {
        assert_eq!(render(&[], &[]), "");
        assert_eq!(render(&["MESH", "NAME"], &[]), "MESH   NAME\n");
        let rows = [vec!["default".into(), "example".into()], vec!["playground".into(), "demo".into()]];
        assert_eq!(
            render(&["MESH", "NAME"], &rows),
            "MESH         NAME\ndefault      example\nplayground   demo\n"
        );
    }

    #[test]
    fn spans_are_as_kumactl_prints_them() {
        let cases = [(-2000, "never"), (0, "0s"), (59_999, "59s"), (3_599_999, "59m"), (7_200_000, "2h")];
        for (milliseconds, expected) in cases {
            assert_eq!(age(milliseconds), expected);
        }
    }
}
