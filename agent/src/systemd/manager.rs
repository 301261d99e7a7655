//! systemd's manager on the system bus (`org.freedesktop.systemd1(5)`).

use std::fmt;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use tokio::sync::Mutex;
use zbus::{Connection, Fd, OwnedObjectPath, OwnedVariant};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// How long an answer may take. systemd answers at once; a polkit that has to start first takes a moment.
const DEADLINE: Duration = Duration::from_secs(10);

/// systemd couldn't be asked, or said no.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ManagerError {
    /// There is no bus.
    #[error("the system bus can't be reached: {0}; is dbus running?")]
    Bus(zbus::Error),
    /// The request was refused.
    #[error("systemd refused to {what}: {reason}")]
    Refused {
        /// What was asked.
        what: String,
        /// The name of the bus's error.
        name: String,
        /// In systemd's or polkit's words.
        reason: String,
    },
    /// The answer isn't what it should be.
    #[error("systemd's answer to \"{what}\" isn't understood: {reason}")]
    Answer {
        /// What was asked.
        what: String,
        /// Why.
        reason: String,
    },
}

impl ManagerError {
    /// Whether it means that there is no such unit, or no unit of that process.
    pub fn is_no_such_unit(&self) -> bool {
        matches!(self, Self::Refused { name, .. }
            if name.ends_with(".NoSuchUnit") || name.ends_with(".NoUnitForPID") || name.ends_with(".NoSuchProcess"))
    }

    fn is_denied(&self) -> bool {
        matches!(self, Self::Refused { name, .. } if name.ends_with(".AccessDenied"))
    }

    fn is_unknown_method(&self) -> bool {
        matches!(self, Self::Refused { name, .. } if name.ends_with(".UnknownMethod"))
    }
}

/// A unit's state, as far as starting and stopping is concerned (`systemctl(1)`, ActiveState).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActiveState {
    /// It runs.
    Active,
    /// It starts, or waits to be started again.
    Activating,
    /// It stops.
    Deactivating,
    /// It doesn't run.
    Inactive,
    /// It ended in failure and isn't started again.
    Failed,
}

impl ActiveState {
    fn parse(text: &str) -> Self {
        match text {
            "active" | "reloading" | "refreshing" => Self::Active,
            "activating" => Self::Activating,
            "deactivating" => Self::Deactivating,
            "failed" => Self::Failed,
            _ => Self::Inactive,
        }
    }

    /// Whether it runs or is about to.
    pub const fn is_up(self) -> bool {
        matches!(self, Self::Active | Self::Activating)
    }
}

impl fmt::Display for ActiveState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::Activating => "activating",
            Self::Deactivating => "deactivating",
            Self::Inactive => "inactive",
            Self::Failed => "failed",
        })
    }
}

/// What is known of a service.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Its state.
    pub state: ActiveState,
    /// Its main process; 0 when there is none.
    pub main_pid: u32,
    /// How its last run ended (`success`, `exit-code`, `watchdog`, …).
    pub result: String,
    /// What it says of itself (`STATUS=`).
    pub status: String,
    /// The units that require or want it.
    pub needed_by: Vec<String>,
}

/// The connection to systemd; made when it is first needed, and again after the bus was restarted.
#[derive(Debug, Default)]
pub struct Manager {
    connection: Mutex<Option<Connection>>,
}

impl Manager {
    /// Starts a unit. Returns when systemd has taken the order, not when the unit has started.
    pub async fn start(&self, unit: &str) -> Result<(), ManagerError> {
        let what = format!("start {unit}");
        self.call::<OwnedObjectPath>(&what, PATH, MANAGER, "StartUnit", &(unit, "replace")).await.map(drop)
    }

    /// Stops a unit, likewise.
    pub async fn stop(&self, unit: &str) -> Result<(), ManagerError> {
        let what = format!("stop {unit}");
        self.call::<OwnedObjectPath>(&what, PATH, MANAGER, "StopUnit", &(unit, "replace")).await.map(drop)
    }

    /// Asks a unit to reload, likewise.
    pub async fn reload(&self, unit: &str) -> Result<(), ManagerError> {
        let what = format!("reload {unit}");
        self.call::<OwnedObjectPath>(&what, PATH, MANAGER, "ReloadUnit", &(unit, "replace")).await.map(drop)
    }

    /// What is known of a service, whether it runs or not.
    pub async fn unit(&self, name: &str) -> Result<Unit, ManagerError> {
        let what = format!("describe {name}");
        // It loads a unit that nobody has looked at yet, which `GetUnit` doesn't.
        let path: OwnedObjectPath = self.call(&what, PATH, MANAGER, "LoadUnit", &(name,)).await?;
        let state = ActiveState::parse(&self.property::<String>(path.as_str(), UNIT, "ActiveState").await?);
        let mut needed_by: Vec<String> = self.property(path.as_str(), UNIT, "RequiredBy").await?;
        needed_by.extend(self.property::<Vec<String>>(path.as_str(), UNIT, "WantedBy").await?);
        if !name.ends_with(".service") {
            let none = String::new;
            return Ok(Unit { state, main_pid: 0, result: none(), status: none(), needed_by });
        }
        Ok(Unit {
            state,
            main_pid: self.property(path.as_str(), SERVICE, "MainPID").await?,
            result: self.property(path.as_str(), SERVICE, "Result").await?,
            status: self.property(path.as_str(), SERVICE, "StatusText").await?,
            needed_by,
        })
    }

    /// The unit that a process belongs to; `None` when it belongs to none. `pidfd` keeps the pid from meaning another
    /// process: it is asked for that very process where systemd can (253), and for its pid otherwise. The caller
    /// makes sure afterwards that the process still lives.
    pub async fn unit_of(&self, pid: i32, pidfd: BorrowedFd<'_>) -> Result<Option<String>, ManagerError> {
        let what = format!("tell the unit of pid {pid}");
        let by_fd = self
            .call::<(OwnedObjectPath, String, Vec<u8>)>(
                &what,
                PATH,
                MANAGER,
                "GetUnitByPIDFD",
                &(Fd::from(pidfd),),
            )
            .await;
        match by_fd {
            Ok((_, unit, _)) => return Ok(Some(unit)),
            Err(error) if error.is_no_such_unit() => return Ok(None),
            // An older systemd doesn't know it, and its bus lets nobody but root ask for what isn't on its list.
            Err(error) if error.is_unknown_method() || error.is_denied() => {}
            Err(error) => return Err(error),
        }
        let pid = u32::try_from(pid).unwrap_or_default();
        match self.call::<OwnedObjectPath>(&what, PATH, MANAGER, "GetUnitByPID", &(pid,)).await {
            Ok(path) => self.property(path.as_str(), UNIT, "Id").await.map(Some),
            Err(error) if error.is_no_such_unit() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn property<T>(&self, path: &str, interface: &str, name: &str) -> Result<T, ManagerError>
    where
        T: TryFrom<OwnedVariant>,
        T::Error: fmt::Display,
    {
        let what = format!("tell {name} of {path}");
        let value: OwnedVariant = self.call(&what, path, PROPERTIES, "Get", &(interface, name)).await?;
        T::try_from(value).map_err(|error| ManagerError::Answer { what, reason: error.to_string() })
    }

    async fn call<T>(
        &self,
        what: &str,
        path: &str,
        interface: &str,
        method: &str,
        body: &(impl serde::Serialize + zbus::DynamicType),
    ) -> Result<T, ManagerError>
    where
        T: for<'d> zbus::wire::DynamicDeserialize<'d>,
    {
        let connection = self.connection().await?;
        let reply = match connection.call_method(Some(SYSTEMD), path, Some(interface), method, body).await {
            Ok(reply) => reply,
            Err(zbus::Error::MethodError(name, reason, _)) => {
                return Err(ManagerError::Refused {
                    what: what.to_owned(),
                    name: name.to_string(),
                    reason: reason.unwrap_or_else(|| name.to_string()),
                });
            }
            Err(error) => {
                // A bus that was restarted is reached by a new connection, the next time.
                *self.connection.lock().await = None;
                return Err(ManagerError::Bus(error));
            }
        };
        reply
            .body()
            .deserialize::<T>()
            .map_err(|error| ManagerError::Answer { what: what.to_owned(), reason: error.to_string() })
    }

    async fn connection(&self) -> Result<Connection, ManagerError> {
        let mut connection = self.connection.lock().await;
        if let Some(connection) = &*connection {
            return Ok(connection.clone());
        }
        let made = async { zbus::connection::Builder::system().method_timeout(DEADLINE).build().await };
        // A bus that accepts and then says nothing must not hold everybody up.
        let made = tokio::time::timeout(DEADLINE, made).await.unwrap_or_else(|_| {
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it accepts, and says nothing").into())
        });
        let made = made.map_err(ManagerError::Bus)?;
        Ok(connection.insert(made).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_systemds() {
        for (text, up) in [
            ("active", true),
            ("reloading", true),
            ("activating", true),
            ("deactivating", false),
            ("inactive", false),
            ("failed", false),
            ("maintenance", false),
        ] {
            assert_eq!(ActiveState::parse(text).is_up(), up, "{text}");
        }
    }

    #[test]
    fn errors_are_told_apart() {
        let refused = |name: &str| ManagerError::Refused {
            what: "tell the unit of pid 7".into(),
            name: name.into(),
            reason: "no".into(),
        };
        assert!(refused("org.freedesktop.systemd1.NoUnitForPID").is_no_such_unit());
        assert!(refused("org.freedesktop.DBus.Error.AccessDenied").is_denied());
        assert!(refused("org.freedesktop.DBus.Error.UnknownMethod").is_unknown_method());
        assert!(!refused("org.freedesktop.DBus.Error.AccessDenied").is_no_such_unit());
    }
}
