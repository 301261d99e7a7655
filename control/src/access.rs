//! Who may do what: authentication of requests and static access control.
//!
//! Every request is somebody's: of a user with a token, of the operator on the unix socket, who is
//! recognised by the kernel's word on the peer, or of nobody. Coming from localhost over TCP makes
//! nobody an admin unless the configuration says so.

pub mod localhost;

use std::{fmt, net::SocketAddr, sync::Arc};

use crate::config::{Config, Granted};

/// The admin's name and group.
pub const ADMIN: &str = "mesh-system:admin";
/// The group of everybody who is known.
pub const AUTHENTICATED: &str = "mesh-system:authenticated";
/// The name of nobody in particular.
pub const ANONYMOUS: &str = "mesh-system:anonymous";
/// The group of nobody in particular.
pub const UNAUTHENTICATED: &str = "mesh-system:unauthenticated";

/// A caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The name.
    pub name: String,
    /// The groups.
    pub groups: Vec<String>,
}

impl User {
    /// The admin.
    pub fn admin() -> Self {
        Self { name: ADMIN.into(), groups: vec![ADMIN.into(), AUTHENTICATED.into()] }
    }

    /// Nobody.
    pub fn anonymous() -> Self {
        Self { name: ANONYMOUS.into(), groups: vec![UNAUTHENTICATED.into()] }
    }

    /// A user whom a token names.
    pub fn named(name: impl Into<String>, mut groups: Vec<String>) -> Self {
        if !groups.iter().any(|group| group == AUTHENTICATED) {
            groups.push(AUTHENTICATED.into());
        }
        Self { name: name.into(), groups }
    }

    /// Whether this is nobody.
    pub fn is_anonymous(&self) -> bool {
        self.name == ANONYMOUS
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.groups.join(","))
    }
}

/// Where a connection comes from; the servers put it into each request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Over the unix socket, from a process of this uid.
    Unix {
        /// The uid, as the kernel says.
        uid: u32,
    },
}

/// Something that not everybody may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Reading and writing secrets.
    AdminResources,
    /// Dataplane tokens and join tickets.
    GenerateDpToken,
    /// User tokens.
    GenerateUserToken,
    /// Zone tokens.
    GenerateZoneToken,
    /// Configuration dumps.
    ViewConfigDump,
    /// Statistics.
    ViewStats,
    /// Clusters.
    ViewClusters,
    /// The control plane's configuration.
    ControlPlaneMetadata,
}

/// A caller may not do what it asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("user {user:?} {action}")]
pub struct Denied {
    user: String,
    action: String,
}

/// The static lists of who may do what.
#[derive(Debug, Clone)]
pub struct Access {
    config: Arc<Config>,
    own_uid: u32,
}

impl Access {
    /// The access that a configuration grants.
    pub fn new(config: Arc<Config>) -> Self {
        Self { config, own_uid: nix::unistd::Uid::effective().as_raw() }
    }

    /// Whether a peer is the operator without any credentials but its connection's.
    pub fn is_operator(&self, peer: Peer, headers: &http::HeaderMap, authority: Option<&str>) -> bool {
        match peer {
            Peer::Unix { uid } => uid == 0 || uid == self.own_uid,
            Peer::Tcp(remote) => {
                self.config.api_server.authn.localhost_is_admin
                    && localhost::is_local(remote, headers, authority)
            }
        }
    }

    /// Refuses who hasn't the right.
    pub fn check(&self, user: &User, right: Right, what: &str) -> Result<(), Denied> {
        let granted = self.granted(right);
        let listed = granted.users.contains(&user.name)
            || user.groups.iter().any(|group| granted.groups.contains(group));
        if listed {
            return Ok(());
        }
        let action = match right {
            Right::AdminResources => format!("cannot access the resource of type {what:?}"),
            Right::GenerateDpToken | Right::GenerateUserToken | Right::GenerateZoneToken => {
                format!("cannot generate {what}")
            }
            Right::ViewConfigDump | Right::ViewStats | Right::ViewClusters => format!("cannot view {what}"),
            Right::ControlPlaneMetadata => "cannot access control-plane metadata".into(),
        };
        Err(Denied { user: user.to_string(), action })
    }

    fn granted(&self, right: Right) -> &Granted {
        let lists = &self.config.access.r#static;
        match right {
            Right::AdminResources => &lists.admin_resources,
            Right::GenerateDpToken => &lists.generate_dp_token,
            Right::GenerateUserToken => &lists.generate_user_token,
            Right::GenerateZoneToken => &lists.generate_zone_token,
            Right::ViewConfigDump => &lists.view_config_dump,
            Right::ViewStats => &lists.view_stats,
            Right::ViewClusters => &lists.view_clusters,
            Right::ControlPlaneMetadata => &lists.control_plane_metadata,
        }
    }
}
