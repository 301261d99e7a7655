//! The lines that `join` and `leave` print: a step each, with what it changed.

use std::fmt::Write as _;
use std::io::Write as _;

/// Prints steps as they are done.
#[derive(Debug)]
pub(super) struct Steps {
    dry: bool,
    changes: usize,
}

impl Steps {
    /// With `dry`, they are what would be done.
    pub(super) const fn new(dry: bool) -> Self {
        Self { dry, changes: 0 }
    }

    /// A step, and what of the machine it changed.
    pub(super) fn step(&mut self, name: &str, text: &str, changed: &[String]) {
        self.changes += changed.len();
        print(&line(self.dry, name, text, changed));
    }

    /// How much was, or would be, changed.
    pub(super) const fn changes(&self) -> usize {
        self.changes
    }
}

fn line(dry: bool, name: &str, text: &str, changed: &[String]) -> String {
    let mut line = format!("{:<6}{name:<11}{text}", if dry { "plan" } else { "ok" });
    if !changed.is_empty() {
        let verb = if dry { "would change" } else { "changed" };
        let _ = write!(line, "  ({verb}: {})", changed.join(", "));
    }
    line
}

/// Something that the operator should know.
pub(super) fn note(text: &str) {
    print(&format!("      {text}"));
}

/// A reader that has gone away mustn't leave the work half done.
pub(super) fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_changed_or_would() {
        let changed = ["/etc/a".to_owned(), "/etc/b".to_owned()];
        assert_eq!(
            line(false, "user", "ursa-web", &changed),
            "ok    user       ursa-web  (changed: /etc/a, /etc/b)"
        );
        assert_eq!(
            line(true, "user", "ursa-web", &changed[..1]),
            "plan  user       ursa-web  (would change: /etc/a)"
        );
        assert_eq!(line(false, "envoy", "/e", &[]), "ok    envoy      /e");
    }
}
