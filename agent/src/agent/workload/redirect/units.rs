//! Redirects that units put in place (`ursa-redirect.service`, `ursa-redirect@….service`): an agent without rights only
//! reads how they stand, in the file that `ursa-init watch` writes.

use std::io;
use std::path::PathBuf;

use nix::sys::inotify::AddWatchFlags;
use tokio::sync::watch;

use super::WorkloadSpec;
use crate::agent::status::RedirectReport;
use crate::inotify::Events;
use crate::redirected::RedirectFile;

/// What the units tell.
#[derive(Debug)]
pub(super) struct Units {
    run_dir: PathBuf,
    /// Counts what is told.
    news: watch::Receiver<u64>,
}

impl Units {
    /// Those that write into `run_dir`.
    pub(super) fn in_dir(run_dir: PathBuf) -> io::Result<Self> {
        let mut events = Events::of(&run_dir, AddWatchFlags::IN_MOVED_TO)?;
        let (count, news) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    event = events.next() => match event {
                        Ok(()) => count.send_modify(|count| *count += 1),
                        Err(error) => {
                            tracing::warn!(%error, "what the redirect's unit tells is read late from now on");
                            return;
                        }
                    },
                    () = count.closed() => return,
                }
            }
        });
        Ok(Self { run_dir, news })
    }

    /// Returns when a unit has told something.
    pub(super) async fn news(&self) {
        let mut news = self.news.clone();
        news.mark_unchanged();
        if news.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Where the workload's redirect is told.
    pub(super) fn file(&self, spec: &WorkloadSpec) -> RedirectFile {
        let id = spec.id();
        match spec.netns {
            None => RedirectFile {
                path: self.run_dir.join("redirect.json"),
                workload: Some(id),
                unit: "ursa-redirect.service".to_owned(),
            },
            Some(_) => RedirectFile {
                path: self.run_dir.join(format!("redirect@{id}.json")),
                workload: None,
                unit: format!("ursa-redirect@{id}.service"),
            },
        }
    }

    /// How it stands; `None` when nobody has told.
    pub(super) fn report(&self, spec: &WorkloadSpec) -> Option<RedirectReport> {
        let file = self.file(spec);
        let told = file.read().ok()?;
        Some(RedirectReport {
            state: told.state,
            kept_by: Some(file.unit),
            repairs: told.repairs,
            last_repair: told.last_repair,
            message: (!told.message.is_empty()).then_some(told.message),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::agent::config::AgentConfig;
    use crate::agent::workload::Origin;

    fn spec(local: &str) -> WorkloadSpec {
        let text = format!(
            "type: Dataplane\nmesh: default\nname: web-1\nnetworking: {{address: 10.0.0.1, inbound: [{{port: 80}}]}}\n\
             ursa: {{unit: web.service, proxyUid: 7{local}}}\n"
        );
        WorkloadSpec::from_yaml(&text, Origin::File("web.yaml".into()), &AgentConfig::default()).unwrap()
    }

    #[tokio::test]
    async fn what_a_unit_tells_is_believed_and_awaited() {
        let dir = tempfile::tempdir().unwrap();
        let units = Units::in_dir(dir.path().to_owned()).unwrap();
        let tell = |name: &str, text: &str| {
            fs::write(dir.path().join("x.new"), text).unwrap();
            fs::rename(dir.path().join("x.new"), dir.path().join(name)).unwrap();
        };
        let (host, own) = (spec(""), spec(", netns: /run/netns/web"));
        assert!(units.report(&host).is_none() && units.file(&host).in_place().is_err());
        let news = units.news();
        tell("redirect.json", r#"{"state":"inPlace","workloads":["web"],"repairs":3}"#);
        tokio::time::timeout(std::time::Duration::from_secs(10), news).await.unwrap();
        units.file(&host).in_place().unwrap();
        assert_eq!(units.report(&host).unwrap().repairs, 3);
        assert!(units.file(&own).in_place().unwrap_err().contains("ursa-redirect@web.service"));
        tell("redirect@web.json", r#"{"state":"inPlace"}"#);
        units.file(&own).in_place().unwrap();
    }
}
