//! Where in a JSON text its parts are, to the byte.
//!
//! Only for a text that a JSON parser has accepted: nothing is judged here, and a text that is no JSON gives a wrong
//! place, never a panic.

use std::ops::Range;

/// A member of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// The key as written, quotes and escapes included.
    pub(super) key: Range<usize>,
    /// Its value, without white space around it.
    pub(super) value: Range<usize>,
}

/// The members of the object that begins at `at`.
pub(super) fn members(text: &str, at: usize) -> Vec<Member> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut here = blank(bytes, at + 1);
    while bytes.get(here) == Some(&b'"') {
        let key = here..string(bytes, here);
        // The colon, and what is around it.
        let value = blank(bytes, blank(bytes, key.end) + 1);
        let value = value..self::value(bytes, value);
        here = next(bytes, value.end);
        found.push(Member { key, value });
    }
    found
}

/// The elements of the array that begins at `at`.
pub(super) fn elements(text: &str, at: usize) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut here = blank(bytes, at + 1);
    while bytes.get(here).is_some_and(|byte| *byte != b']') {
        let element = here..value(bytes, here);
        here = next(bytes, element.end);
        found.push(element);
    }
    found
}

/// Where the document's value begins.
pub(super) fn start(text: &str) -> usize {
    blank(text.as_bytes(), 0)
}

/// Behind a comma, or at what closes.
fn next(bytes: &[u8], at: usize) -> usize {
    let at = blank(bytes, at);
    if bytes.get(at) == Some(&b',') { blank(bytes, at + 1) } else { at }
}

fn blank(bytes: &[u8], mut at: usize) -> usize {
    while bytes.get(at).is_some_and(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')) {
        at += 1;
    }
    at
}

/// The end of the string whose opening quote is at `at`.
fn string(bytes: &[u8], at: usize) -> usize {
    let mut here = at + 1;
    while let Some(byte) = bytes.get(here) {
        match byte {
            b'"' => return here + 1,
            b'\\' => here += 2,
            _ => here += 1,
        }
    }
    bytes.len()
}

/// The end of the value at `at`; never before `at + 1`, so that callers get on.
fn value(bytes: &[u8], at: usize) -> usize {
    match bytes.get(at) {
        Some(b'"') => string(bytes, at),
        Some(b'{' | b'[') => nested(bytes, at),
        _ => {
            let mut here = at + 1;
            while bytes
                .get(here)
                .is_some_and(|byte| !matches!(byte, b',' | b']' | b'}' | b' ' | b'\t' | b'\n' | b'\r'))
            {
                here += 1;
            }
            here.min(bytes.len())
        }
    }
}

fn nested(bytes: &[u8], at: usize) -> usize {
    let (mut here, mut depth) = (at, 0_usize);
    while let Some(byte) = bytes.get(here) {
        match byte {
            b'"' => {
                here = string(bytes, here);
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return here + 1;
                }
            }
            _ => {}
        }
        here += 1;
    }
    bytes.len()
}
