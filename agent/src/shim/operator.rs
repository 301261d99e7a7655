//! What an operator, or a service's own unit, asks of a sidecar: `ursa-shim drain` and `ursa-shim resume`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use super::client::{ClientError, ShimClient};
use super::protocol::{EnvoyState, EnvoyStatus};
use super::unit;

/// How much longer than its deadline a drain may take to be told.
const SLACK: Duration = Duration::from_secs(10);
/// The longest that a drain whose deadline the shim knows is waited for.
const LONGEST: Duration = Duration::from_secs(3600);
/// How long a new Envoy is waited for. It goes on starting, and the service must not fail for it.
const START: Duration = Duration::from_secs(10);

/// Whose sidecar.
#[derive(Debug, Clone, clap::Args)]
pub struct Target {
    /// The service: NAME of ursa-sidecar@NAME.service.
    #[arg(long, value_name = "NAME")]
    pub service: String,
    /// The sidecar's directory, unless it is /run/ursa-sidecar/NAME.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

impl Target {
    fn dir(&self) -> PathBuf {
        unit::directory_of(&self.service, self.dir.as_deref())
    }
}

/// Why it wasn't done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// The shim could not be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// It went away meanwhile.
    #[error("the sidecar ended meanwhile; `systemctl status ursa-sidecar@{0}` says why")]
    Gone(String),
    /// It took too long.
    #[error("no end after {0:?}")]
    Late(Duration),
}

/// Asks inbound connections to go and returns once they have, or the deadline (the agent's `drainSeconds` when absent) has
/// passed, with words for the operator. Where no sidecar runs there is nothing to drain.
pub async fn drain(target: &Target, deadline: Option<Duration>) -> Result<String, OperatorError> {
    let Some(client) = connect(&target.dir()).await? else {
        return Ok(format!("the sidecar of {} does not run; nothing to drain", target.service));
    };
    client.drain(deadline).await?;
    let over = |envoy: &EnvoyStatus| envoy.drained || envoy.state != EnvoyState::Draining;
    let patience = deadline.map_or(LONGEST, |deadline| deadline + SLACK);
    let envoy = wait(target, &client, patience, over).await?;
    Ok(match envoy.inbound {
        _ if !envoy.drained => "Envoy does not run; nothing to drain".to_owned(),
        Some(left @ 1..) => format!("{left} inbound connections did not end in time"),
        _ => "no inbound connection is left".to_owned(),
    })
}

/// Makes a sidecar that was drained take inbound connections again, and returns once it does.
pub async fn resume(target: &Target) -> Result<String, OperatorError> {
    let Some(client) = connect(&target.dir()).await? else {
        return Ok(format!("the sidecar of {} does not run; nothing to resume", target.service));
    };
    if client.hello().envoy.state != EnvoyState::Draining {
        return Ok("it does not drain; nothing to resume".to_owned());
    }
    let former = client.hello().envoy.epoch;
    client.resume().await?;
    let live = |envoy: &EnvoyStatus| envoy.epoch != former && envoy.state == EnvoyState::Live;
    wait(target, &client, START, live).await?;
    Ok("a new Envoy takes connections".to_owned())
}

async fn connect(dir: &Path) -> Result<Option<ShimClient>, ClientError> {
    match ShimClient::connect(dir).await {
        Ok(client) => Ok(Some(client)),
        Err(error) if error.is_nobody() => Ok(None),
        Err(error) => Err(error),
    }
}

async fn wait(
    target: &Target,
    client: &ShimClient,
    patience: Duration,
    reached: impl FnMut(&EnvoyStatus) -> bool,
) -> Result<EnvoyStatus, OperatorError> {
    let mut envoy = client.envoy();
    let reached = timeout(patience, envoy.wait_for(reached)).await;
    let reached = reached.map_err(|_| OperatorError::Late(patience))?;
    reached.map(|envoy| envoy.clone()).map_err(|_| OperatorError::Gone(target.service.clone()))
}
