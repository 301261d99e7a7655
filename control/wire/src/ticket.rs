//! The text form of a join ticket: `ursa1.<base64url(JSON)>`.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

const PREFIX: &str = "ursa1.";

/// What a node needs to find, trust and enter a control plane.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// `host:port` of the control plane.
    #[serde(rename = "a")]
    pub address: String,
    /// SHA-256 of the control CA's certificate (DER), in hex.
    #[serde(rename = "f")]
    pub fingerprint: String,
    /// Proof of the grant; binds to the first public key that uses it.
    #[serde(rename = "s")]
    pub secret: String,
    /// Until when it may be used first, in Unix seconds.
    #[serde(rename = "v")]
    pub expires: i64,
}

/// Why a text is no ticket.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TicketError {
    /// Wrong prefix.
    #[error(
        "this is not a join ticket: it doesn't start with `{PREFIX}`; copy the whole output of `ursa ticket create`"
    )]
    Prefix,
    /// Broken encoding or content.
    #[error(
        "the join ticket is damaged ({0}); copy the whole output of `ursa ticket create`, without line breaks"
    )]
    Damaged(String),
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let json = serde_json::to_vec(self).map_err(|_| fmt::Error)?;
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(json))
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("address", &self.address)
            .field("fingerprint", &self.fingerprint)
            .field("secret", &"*****")
            .field("expires", &self.expires)
            .finish()
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(TicketError::Prefix)?;
        let json =
            URL_SAFE_NO_PAD.decode(encoded).map_err(|error| TicketError::Damaged(error.to_string()))?;
        serde_json::from_slice(&json).map_err(|error| TicketError::Damaged(error.to_string()))
    }
}
