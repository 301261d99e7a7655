//! The small part of Go's templates that names and SPIFFE ids are written with: text, `{{ .Field }}`,
//! `{{ label "key" }}`, pipes to nowhere refused as Go refuses them.

use std::collections::BTreeMap;

/// Why a template can't be parsed or rendered, in Go's words where people know them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// It isn't a template.
    #[error("template: :{line}: {message}")]
    Parse {
        /// In which line.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// It names a field that there isn't.
    #[error("can't evaluate field {0}: the fields are {1}")]
    Field(String, String),
    /// It names a label that the resource doesn't have.
    #[error("label {0:?} is not set")]
    Label(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(String),
    Label(String),
}

/// A parsed template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Field(String),
    Identifier(String),
    Text(String),
    Number,
    Pipe,
}

impl Template {
    /// Parses a template.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut rest = text;
        let mut line = 1;
        while let Some(start) = rest.find("{{") {
            let (before, tail) = rest.split_at(start);
            line += before.matches('\n').count();
            let fail = |message: String| TemplateError::Parse { line, message };
            let tail = &tail[2..];
            // An error inside an action comes before the missing end, as Go's lexer finds it first.
            let end = tail.find("}}");
            let (mut action, after) = match end {
                Some(end) => (&tail[..end], &tail[end + 2..]),
                None => (tail, ""),
            };
            let mut before = before;
            let mut after = after;
            if let Some(trimmed) = action.strip_prefix("- ") {
                action = trimmed;
                before = before.trim_end();
            }
            if let Some(trimmed) = action.strip_suffix(" -") {
                action = trimmed;
                after = after.trim_start();
            }
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let tokens = tokens(action).map_err(fail)?;
            if end.is_none() {
                return Err(fail("unclosed action".to_owned()));
            }
            parts.push(pipeline(&tokens).map_err(fail)?);
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self { parts })
    }

    /// Whether it uses a field, for example `Workload`.
    pub fn uses_field(&self, name: &str) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Field(field) if field == name))
    }

    /// Whether it uses a label.
    pub fn uses_label(&self, key: &str) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Label(label) if label == key))
    }

    /// Fills in fields and labels.
    pub fn render(
        &self,
        fields: &[(&str, &str)],
        labels: &BTreeMap<String, String>,
    ) -> Result<String, TemplateError> {
        self.render_with(fields, |key| labels.get(key).cloned())
    }

    /// Fills in fields, and labels by a function.
    pub fn render_with(
        &self,
        fields: &[(&str, &str)],
        label: impl Fn(&str) -> Option<String>,
    ) -> Result<String, TemplateError> {
        let mut out = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Field(name) => {
                    let Some((_, value)) = fields.iter().find(|(field, _)| field == name) else {
                        let known: Vec<String> =
                            fields.iter().map(|(field, _)| format!(".{field}")).collect();
                        return Err(TemplateError::Field(name.clone(), known.join(", ")));
                    };
                    out.push_str(value);
                }
                Part::Label(key) => {
                    out.push_str(&label(key).ok_or_else(|| TemplateError::Label(key.clone()))?);
                }
            }
        }
        Ok(out)
    }
}

fn tokens(action: &str) -> Result<Vec<Token>, String> {
    let mut out = Vec::new();
    let mut rest = action.trim_start();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '.' => {
                let word = rest[1..].find(|c| !is_word(c)).unwrap_or(rest.len() - 1);
                out.push(Token::Field(rest[1..=word].to_owned()));
                1 + word
            }
            '"' => {
                let end = rest[1..].find('"').ok_or("unterminated quoted string")?;
                out.push(Token::Text(rest[1..=end].to_owned()));
                end + 2
            }
            '|' => {
                out.push(Token::Pipe);
                1
            }
            c if c.is_ascii_digit() => {
                out.push(Token::Number);
                rest.find(|c| !is_word(c)).unwrap_or(rest.len())
            }
            c if is_word(c) => {
                let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
                out.push(Token::Identifier(rest[..end].to_owned()));
                end
            }
            c => return Err(format!("bad character U+{:04X} '{c}'", u32::from(c))),
        };
        let after = &rest[length..];
        // A word ends at a space, a pipe, or the next field.
        if first != '|'
            && let Some(c) = after.chars().next()
            && !c.is_whitespace()
            && !matches!(c, '|' | '.' | ')')
        {
            return Err(format!("bad character U+{:04X} '{c}'", u32::from(c)));
        }
        rest = after.trim_start();
    }
    Ok(out)
}

fn pipeline(tokens: &[Token]) -> Result<Part, String> {
    let commands: Vec<&[Token]> = tokens.split(|token| *token == Token::Pipe).collect();
    for token in tokens {
        if let Token::Identifier(name) = token
            && name != "label"
        {
            return Err(format!("function {name:?} not defined"));
        }
    }
    if commands.iter().any(|command| command.is_empty()) {
        return Err(if tokens.is_empty() {
            "missing value for command"
        } else {
            "missing value for pipeline"
        }
        .to_owned());
    }
    for (i, command) in commands.iter().enumerate().skip(1) {
        if matches!(command[0], Token::Number | Token::Text(_)) {
            return Err(format!("non executable command in pipeline stage {}", i + 1));
        }
    }
    match commands.as_slice() {
        [[Token::Field(name)]] if !name.is_empty() => Ok(Part::Field(name.clone())),
        [[Token::Text(text)]] => Ok(Part::Text(text.clone())),
        [[Token::Identifier(_), Token::Text(key)]] | [[Token::Text(key)], [Token::Identifier(_)]] => {
            Ok(Part::Label(key.clone()))
        }
        _ => Err("only fields such as .Name and label \"key\" are understood".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_fields_and_labels() {
        let template = Template::parse("{{ .Name }}.{{label \"team\"}}.mesh").expect("template");
        let labels = BTreeMap::from([("team".to_owned(), "web".to_owned())]);
        assert_eq!(template.render(&[("Name", "a")], &labels).expect("rendered"), "a.web.mesh");
        assert!(template.render(&[("Name", "a")], &BTreeMap::new()).is_err());
        assert!(template.render(&[], &labels).is_err());
    }

    #[rstest::rstest]
    #[case("{{ .Name[4 }}", "template: :1: bad character U+005B '['")]
    #[case("{{ .A|invalid }}", "template: :1: function \"invalid\" not defined")]
    #[case("{{ .A|1 }}", "template: :1: non executable command in pipeline stage 2")]
    #[case("{{ .A", "template: :1: unclosed action")]
    fn refuses_as_go(#[case] text: &str, #[case] message: &str) {
        assert_eq!(Template::parse(text).expect_err("refused").to_string(), message);
    }
}
