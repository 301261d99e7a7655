//! What the CNI plugin and the agent share: the words about containers on `agent.sock`, the operator's words about a
//! network, the records of attachments below the run directory, and where the file of decisions is.

mod call;
pub mod decisions;
mod network;
pub mod records;

pub use self::call::Call;
pub use self::network::{Network, PluginConfig, Workload};
pub use self::records::{Attachment, Records};
