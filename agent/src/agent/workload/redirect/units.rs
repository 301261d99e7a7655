//! Redirects that units put in place (`ursa-redirect.service`, `ursa-redirect@….service`): an agent without rights only
//! reads how they stand, in the file that `ursa-init watch` writes.

use std::fs;
use std::io;
use std::path::PathBuf;

use nix::sys::inotify::AddWatchFlags;
use serde::Deserialize;
use tokio::sync::watch;
use ursa_init::watch::{Repair, State};

use super::WorkloadSpec;
use crate::agent::status::RedirectReport;
use crate::inotify::Events;

/// What the units tell.
#[derive(Debug)]
pub(super) struct Units {
    run_dir: PathBuf,
    /// Counts what is told.
    news: watch::Receiver<u64>,
}

/// What `ursa-init watch` writes, as far as it concerns a workload.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Told {
    state: State,
    repairs: u64,
    last_repair: Option<Repair>,
    workloads: Vec<String>,
    left_out: Vec<String>,
    message: String,
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

    /// Whether the workload's redirect is in place, or why it isn't.
    pub(super) fn in_place(&self, spec: &WorkloadSpec) -> Result<(), String> {
        let told = self.told(spec)?;
        let (id, unit) = (spec.id(), unit_of(spec));
        // In a namespace of its own there is nobody else.
        if spec.netns.is_none() && !told.workloads.contains(&id) {
            let why = told.left_out.iter().find(|why| why.contains(&format!("{id}.yaml")));
            return Err(match why {
                Some(why) => {
                    format!("the redirect isn't in place: {why}; correct it, then `systemctl reload {unit}`")
                }
                None => format!(
                    "the redirect isn't in place: {unit} knows no workload {id}; put its part into \
                     /etc/ursa/redirect.d/{id}.yaml, then `systemctl reload {unit}`"
                ),
            });
        }
        if told.state == State::Failing {
            return Err(format!("the redirect isn't in place: {}", told.message));
        }
        Ok(())
    }

    /// How it stands; `None` when nobody has told.
    pub(super) fn report(&self, spec: &WorkloadSpec) -> Option<RedirectReport> {
        let told = self.told(spec).ok()?;
        Some(RedirectReport {
            state: told.state,
            kept_by: Some(unit_of(spec)),
            repairs: told.repairs,
            last_repair: told.last_repair,
            message: (!told.message.is_empty()).then_some(told.message),
        })
    }

    fn told(&self, spec: &WorkloadSpec) -> Result<Told, String> {
        let name = spec
            .netns
            .as_ref()
            .map_or_else(|| "redirect.json".to_owned(), |_| format!("redirect@{}.json", spec.id()));
        let (path, unit) = (self.run_dir.join(name), unit_of(spec));
        let text = fs::read(&path).map_err(|error| {
            format!(
                "{unit} hasn't put the redirect in place ({}: {error}); `systemctl status {unit}` tells why",
                path.display()
            )
        })?;
        serde_json::from_slice(&text).map_err(|error| format!("{} isn't understood: {error}", path.display()))
    }
}

fn unit_of(spec: &WorkloadSpec) -> String {
    match spec.netns {
        None => "ursa-redirect.service".to_owned(),
        Some(_) => format!("ursa-redirect@{}.service", spec.id()),
    }
}

#[cfg(test)]
mod tests {
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
        let error = units.in_place(&host).unwrap_err();
        assert!(error.contains("systemctl status ursa-redirect.service"), "{error}");
        let news = units.news();
        tell("redirect.json", r#"{"state":"inPlace","workloads":["shop"],"later":1}"#);
        tokio::time::timeout(std::time::Duration::from_secs(10), news).await.unwrap();
        assert!(units.in_place(&host).unwrap_err().contains("/etc/ursa/redirect.d/web.yaml"));
        tell(
            "redirect.json",
            r#"{"state":"inPlace","workloads":["shop"],"leftOut":["/etc/ursa/redirect.d/web.yaml: no"]}"#,
        );
        assert!(units.in_place(&host).unwrap_err().contains("web.yaml: no"));
        tell("redirect.json", r#"{"state":"failing","workloads":["web"],"message":"no rights"}"#);
        assert!(units.in_place(&host).unwrap_err().contains("no rights"));
        tell("redirect.json", r#"{"state":"inPlace","workloads":["web"],"repairs":3,"message":""}"#);
        units.in_place(&host).unwrap();
        assert_eq!(units.report(&host).unwrap().repairs, 3);
        assert!(units.in_place(&own).unwrap_err().contains("ursa-redirect@web.service"));
        tell("redirect@web.json", r#"{"state":"inPlace"}"#);
        units.in_place(&own).unwrap();
    }
}
