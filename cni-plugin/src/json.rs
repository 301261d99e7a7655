//! Finding a member of a JSON text as it stands there: what isn't ours goes on byte for byte, whatever its numbers are.

/// The text of a member of the object that `text` is; of several of that name the last, as every JSON reader takes
/// it. `None` also when `text` is no object: the parser says better what is wrong with it.
pub(crate) fn member<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = text.trim_ascii_start().strip_prefix('{')?;
    let mut found = None;
    loop {
        rest = rest.trim_ascii_start();
        let key = string(rest)?;
        let is_it = serde_json::from_str::<String>(key).is_ok_and(|key| key == name);
        rest = rest.get(key.len()..)?.trim_ascii_start().strip_prefix(':')?.trim_ascii_start();
        let value = value(rest)?;
        if is_it {
            found = Some(value);
        }
        rest = rest.get(value.len()..)?.trim_ascii_start();
        match rest.strip_prefix(',') {
            Some(next) => rest = next,
            None => return rest.starts_with('}').then_some(found)?,
        }
    }
}

/// The string with its quotes at the beginning of the text.
fn string(text: &str) -> Option<&str> {
    let mut escaped = false;
    let body = text.strip_prefix('"')?;
    for (i, byte) in body.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return text.get(..i + 2),
            _ => {}
        }
    }
    None
}

/// The value at the beginning of the text.
fn value(text: &str) -> Option<&str> {
    let mut depth = 0usize;
    let mut at = 0;
    loop {
        let rest = text.get(at..)?;
        match rest.bytes().next()? {
            b'"' => at += string(rest)?.len(),
            b'{' | b'[' => {
                depth += 1;
                at += 1;
                continue;
            }
            b'}' | b']' => {
                depth = depth.checked_sub(1)?;
                at += 1;
            }
            b',' | b':' if depth > 0 => {
                at += 1;
                continue;
            }
            byte if byte.is_ascii_whitespace() && depth > 0 => {
                at += 1;
                continue;
            }
            _ => {
                let end = rest.find(|c: char| matches!(c, ',' | '}' | ']') || c.is_ascii_whitespace())?;
                if end == 0 {
                    return None;
                }
                at += end;
            }
        }
        if depth == 0 {
            return text.get(..at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::plain(r#"{"a":1,"b":{"c":[1,"}",{"d":"]"}]}}"#, Some(r#"{"c":[1,"}",{"d":"]"}]}"#))]
    #[case::odd_numbers(
        r#"{ "b" : [18446744073709551616, 1.50, 1e400] , "a":0}"#,
        Some("[18446744073709551616, 1.50, 1e400]")
    )]
    #[case::the_last(r#"{"b":1,"b":"x\"}"}"#, Some(r#""x\"}""#))]
    #[case::escaped_key(r#"{"\u0062":null}"#, Some("null"))]
    #[case::nested_only(r#"{"a":{"b":1}}"#, None)]
    #[case::empty("{}", None)]
    #[case::no_object("[1]", None)]
    #[case::cut_off(r#"{"b":{"c":1"#, None)]
    #[case::nonsense(r#"{"b":}"#, None)]
    fn finds_a_member_as_it_is_written(#[case] text: &str, #[case] expected: Option<&str>) {
        assert_eq!(member(text, "b"), expected);
    }
}
