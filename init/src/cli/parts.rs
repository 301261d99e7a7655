//! A directory of workloads that share a namespace, one file each: who joins adds a file, who leaves takes it away.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::intent::{InvalidIntent, RedirectIntent, Workload};

/// The files of a directory, each with its workload or what is wrong with it.
pub(super) struct Parts(Vec<(PathBuf, Result<Workload, String>)>);

impl Parts {
    /// Reads every `*.yaml` and `*.yml` in `dir`, in the order of their names. A directory that doesn't exist holds none.
    pub(super) fn read(dir: &Path) -> anyhow::Result<Self> {
        let what = || format!("can't list {}", dir.display());
        let mut files = Vec::new();
        match std::fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            entries => {
                for entry in entries.with_context(what)? {
                    files.push(entry.with_context(what)?.path());
                }
            }
        }
        files.retain(|path| {
            let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            !hidden && path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
        });
        files.sort();
        let read = |path: PathBuf| {
            // Its first line: it becomes a part of a status and of a log's line.
            let first =
                |error: anyhow::Error| format!("{error:#}").lines().next().unwrap_or_default().to_owned();
            let workload = workload(&path).map_err(first);
            (path, workload)
        };
        Ok(Self(files.into_iter().map(read).collect()))
    }

    /// Adds all of them to the document.
    pub(super) fn add_to(self, intent: &mut RedirectIntent) -> anyhow::Result<()> {
        for (_, workload) in self.0 {
            intent.workloads.push(workload.map_err(anyhow::Error::msg)?);
        }
        Ok(())
    }

    /// Adds those that are right, and that get on with the others. Returns what is wrong with the rest: one bad file must
    /// open nobody's traffic. Whoever was redirected before stays so, by his `former` version where the file doesn't hold
    /// a right one, and comes before those who are new.
    pub(super) fn add_what_fits(self, intent: &mut RedirectIntent, former: &[Workload]) -> Vec<String> {
        let mut problems = Vec::new();
        let known = |path: &Path| former.iter().find(|known| known.name == name_of(path));
        let (old, new): (Vec<_>, Vec<_>) = self.0.into_iter().partition(|(path, _)| known(path).is_some());
        for (path, workload) in old.into_iter().chain(new) {
            let added = workload.and_then(|workload| {
                add(intent, workload)
                    .map_err(|error| format!("{} doesn't fit to the rest: {error}", path.display()))
            });
            let Err(why) = added else { continue };
            let kept = known(&path).is_some_and(|former| add(intent, former.clone()).is_ok());
            problems.push(if kept {
                format!("{why}; it stays redirected as it was before")
            } else {
                format!("{why}; it isn't redirected")
            });
        }
        problems
    }
}

fn add(intent: &mut RedirectIntent, workload: Workload) -> Result<(), InvalidIntent> {
    intent.workloads.push(workload);
    let valid = intent.validate();
    if valid.is_err() {
        intent.workloads.pop();
    }
    valid
}

/// The name of a workload that doesn't say one.
fn name_of(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn workload(path: &Path) -> anyhow::Result<Workload> {
    let what = || format!("{} describes no workload", path.display());
    let text = std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    let mut workload: Workload = crate::yaml::from_str(&text).with_context(what)?;
    if workload.name.is_empty() {
        workload.name = name_of(path);
    }
    Ok(workload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> RedirectIntent {
        serde_json::from_str(r#"{"proxyGids":[5678]}"#).unwrap()
    }

    #[test]
    fn a_bad_file_costs_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let part = |uid: u32, port: u16| {
            format!(
                "uids: [{uid}]\nproxyUids: [{}]\ninbound: {{port: {port}, includePorts: [{}]}}\noutbound: {{port: {}}}\n\
                 dns: {{port: {}}}\n",
                uid + 1000,
                port - 7000,
                port + 1,
                port + 2
            )
        };
        write("a.yaml", &part(2001, 15100));
        write("b.yaml", "uids: [\n");
        write("c.yaml", &part(2001, 15200));
        write("d.yml", &part(2002, 15300));
        write(".hidden.yaml", "no");
        write("readme", "no");
        let mut intent = document();
        let left_out = Parts::read(dir.path()).unwrap().add_what_fits(&mut intent, &[]);
        let names: Vec<_> = intent.workloads.iter().map(|workload| workload.name.as_str()).collect();
        assert_eq!(names, ["a", "d"]);
        assert_eq!(left_out.len(), 2, "{left_out:?}");
        assert!(left_out[0].contains("b.yaml") && left_out[1].contains("c.yaml"), "{left_out:?}");
        assert!(left_out[1].contains("uids"), "{left_out:?}");

        // Who was redirected stays so, whatever becomes of his file, and however a new one is called.
        let former = std::mem::take(&mut intent.workloads);
        write("a.yaml", "uids: [");
        write("0.yaml", &part(2002, 15400));
        let problems = Parts::read(dir.path()).unwrap().add_what_fits(&mut intent, &former);
        assert_eq!(intent.workloads, former);
        assert!(problems[0].contains("a.yaml") && problems[0].contains("as it was before"), "{problems:?}");
        assert!(
            problems.iter().any(|why| why.contains("0.yaml") && why.contains("isn't redirected")),
            "{problems:?}"
        );

        // Where an operator waits for the answer, the first mistake is one.
        let error = Parts::read(dir.path()).unwrap().add_to(&mut document()).unwrap_err().to_string();
        assert!(error.contains("a.yaml"), "{error}");
        assert!(Parts::read(&dir.path().join("none")).unwrap().0.is_empty());
    }
}
