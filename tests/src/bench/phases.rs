//! What is changed, and what is measured meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::bare::Bare;
use super::fleet::{Fleet, Tally};
use super::node::{Size, proxy_name};
use super::operator::Operator;
use super::process;
use super::server::{PATIENCE, Server};

/// Time between two changes, so that each is measured alone.
const PACE: Duration = Duration::from_millis(20);

/// One kind of change.
#[derive(Debug, Default)]
pub struct Measured {
    /// How often it was made.
    pub changes: u64,
    /// Streams that each change concerns.
    pub affected: u64,
    /// From the call of the write to the receipt, for each change and each affected stream; sorted.
    pub receipts: Vec<Duration>,
    /// From the call of the write to its answer, for each change; sorted.
    pub writes: Vec<Duration>,
    /// What came, strays included.
    pub tally: Tally,
    /// The server's processor time.
    pub cpu: Duration,
}

impl Measured {
    /// A quantile of the receipts, between 0 and 1.
    pub fn receipt(&self, quantile: f64) -> Duration {
        quantile_of(&self.receipts, quantile)
    }

    /// A quantile of the writes.
    pub fn write(&self, quantile: f64) -> Duration {
        quantile_of(&self.writes, quantile)
    }

    /// The server's processor time for each push.
    pub fn cpu_per_push(&self) -> Duration {
        self.cpu / u32::try_from(self.tally.pushes.max(1)).unwrap_or(u32::MAX)
    }

    /// Pushes of each change.
    pub fn pushes_per_change(&self) -> f64 {
        per(self.tally.pushes, self.changes)
    }

    /// Bytes of each change.
    pub fn bytes_per_change(&self) -> f64 {
        per(self.tally.bytes, self.changes)
    }

    fn sorted(mut self) -> Self {
        self.receipts.sort_unstable();
        self.writes.sort_unstable();
        self
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts of a benchmark are far below 2^52")]
fn per(many: u64, few: u64) -> f64 {
    many as f64 / few.max(1) as f64
}

/// A quantile of sorted values.
pub fn quantile_of(sorted: &[Duration], quantile: f64) -> Duration {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index between 0 and the length"
    )]
    let index = (sorted.len().saturating_sub(1) as f64 * quantile).round() as usize;
    sorted.get(index).copied().unwrap_or_default()
}

/// Waits until every service of the mesh was made of its workload, and the server rests.
pub async fn services_are_there(server: &Server, size: Size) -> anyhow::Result<()> {
    let mut operator = server.operator().await?;
    let start = Instant::now();
    loop {
        let page = operator.get("/meshes/default/meshservices?size=1").await?;
        let total = page["total"].as_u64().context("a list without a total")?;
        if total == size.services as u64 {
            break;
        }
        if start.elapsed() > PATIENCE {
            bail!("{total} of {} MeshServices are there after {PATIENCE:?}", size.services);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server.idle().await
}

/// What the phases of the real server work with.
#[derive(Debug, Clone, Copy)]
pub struct Load<'a> {
    /// The server.
    pub server: &'a Server,
    /// How many of what there are.
    pub size: Size,
    /// Says what goes on.
    pub say: fn(&str),
}

impl Load<'_> {
    /// One endpoint of one service leaves and comes back, each a change; the service is another one each time.
    pub async fn endpoints(
        self,
        operator: &mut Operator,
        fleet: &mut Fleet,
        changes: usize,
    ) -> anyhow::Result<Measured> {
        (self.say)(&format!("{changes} changes of one endpoint"));
        let step = (self.size.services / 7).max(1);
        let mut measured = Measured::default();
        let before = process::cpu(self.server.pid()?)?;
        for change in 0..changes {
            let proxy = (change / 2 * step) % self.size.services;
            let callers = self.size.callers(self.size.service(proxy));
            let dataplane = self.size.dataplane(proxy, change % 2 == 1);
            let path = format!("/meshes/default/dataplanes/{}", proxy_name(proxy));
            change_once(operator, fleet, &path, &dataplane, &callers, &mut measured).await?;
        }
        self.finish(fleet, before, measured).await
    }

    /// Writes that no proxy's configuration depends on: a policy for a workload that doesn't exist, and a secret.
    pub async fn irrelevant(
        self,
        operator: &mut Operator,
        fleet: &mut Fleet,
        changes: usize,
    ) -> anyhow::Result<Measured> {
        (self.say)(&format!("{changes} irrelevant writes"));
        let mut measured = Measured::default();
        let before = process::cpu(self.server.pid()?)?;
        for change in 0..changes {
            let (path, resource) = if change % 2 == 0 {
                (
                    "/meshes/default/meshtrafficpermissions/nobody",
                    permission("nobody", Some("nobody"), change),
                )
            } else {
                let data = format!("{change:08}");
                let secret = json!({"type": "Secret", "mesh": "default", "name": "nothing", "data": data});
                ("/meshes/default/secrets/nothing", secret)
            };
            change_once(operator, fleet, path, &resource, &[], &mut measured).await?;
        }
        self.finish(fleet, before, measured).await
    }

    /// A permission that concerns every proxy of the mesh.
    pub async fn everybody(
        self,
        operator: &mut Operator,
        fleet: &mut Fleet,
        changes: usize,
    ) -> anyhow::Result<Measured> {
        (self.say)(&format!("{changes} changes that reach all {} proxies", self.size.proxies));
        let everybody: Vec<usize> = (0..self.size.proxies).collect();
        let path = "/meshes/default/meshtrafficpermissions/everybody";
        // The first one brings resources of its own; what is measured is a change of them.
        let mut warmed = Measured::default();
        let first = permission("everybody", None, changes);
        change_once(operator, fleet, path, &first, &everybody, &mut warmed).await?;
        fleet.settle(Duration::from_millis(500)).await?;
        fleet.take();
        let mut measured = Measured::default();
        let before = process::cpu(self.server.pid()?)?;
        for change in 0..changes {
            let resource = permission("everybody", None, change);
            change_once(operator, fleet, path, &resource, &everybody, &mut measured).await?;
        }
        self.finish(fleet, before, measured).await
    }

    async fn finish(
        self,
        fleet: &mut Fleet,
        before: Duration,
        mut measured: Measured,
    ) -> anyhow::Result<Measured> {
        fleet.settle(Duration::from_millis(500)).await?;
        measured.cpu = process::cpu_since(self.server.pid()?, before)?;
        measured.tally = fleet.take();
        Ok(measured.sorted())
    }
}

/// Writes a resource and waits for its receipts.
async fn change_once(
    operator: &mut Operator,
    fleet: &mut Fleet,
    path: &str,
    resource: &Value,
    affected: &[usize],
    measured: &mut Measured,
) -> anyhow::Result<()> {
    let since = Instant::now();
    let write = async {
        operator.put(path, resource).await?;
        anyhow::Ok(since.elapsed())
    };
    let (wrote, receipts) = tokio::try_join!(write, fleet.receipts(affected, since))?;
    measured.changes += 1;
    measured.affected = affected.len() as u64;
    measured.writes.push(wrote);
    measured.receipts.extend(receipts);
    tokio::time::sleep(PACE).await;
    Ok(())
}

/// Allows one client, another one each time, to call a workload, or everybody.
fn permission(name: &str, workload: Option<&str>, number: usize) -> Value {
    let id = format!("spiffe://default.default.mesh.local/workload/client-{number:05}");
    let mut spec = json!({"rules": [{"default": {"allow": [{"spiffeID": {"type": "Exact", "value": id}}]}}]});
    if let Some(workload) = workload {
        spec["targetRef"] = json!({"kind": "Dataplane", "labels": {"kuma.io/workload": workload}});
    }
    json!({"type": "MeshTrafficPermission", "mesh": "default", "name": name, "spec": spec})
}

/// Has the bare server push to the first `count` streams what the real one pushed for each of its changes.
pub async fn floor(
    bare: &mut Bare,
    fleet: &mut Fleet,
    count: usize,
    changes: usize,
    real: &Measured,
) -> anyhow::Result<Measured> {
    let affected: Vec<usize> = (0..count).collect();
    let bytes = real.tally.bytes / real.tally.pushes.max(1);
    let mut measured = Measured { affected: count as u64, ..Measured::default() };
    fleet.take();
    let before = process::cpu(bare.pid()?)?;
    for _ in 0..changes {
        let since = Instant::now();
        bare.push(count, bytes).await?;
        measured.receipts.extend(fleet.receipts(&affected, since).await?);
        measured.changes += 1;
        tokio::time::sleep(PACE).await;
    }
    fleet.settle(Duration::from_millis(500)).await?;
    measured.cpu = process::cpu_since(bare.pid()?, before)?;
    measured.tally = fleet.take();
    Ok(measured.sorted())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(quantile_of(&values, 0.0), Duration::from_millis(1));
        assert_eq!(quantile_of(&values, 0.99), Duration::from_millis(99));
        assert_eq!(quantile_of(&values, 1.0), Duration::from_millis(100));
        assert_eq!(quantile_of(&[], 0.5), Duration::ZERO);
    }
}
