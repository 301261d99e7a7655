//! JSON patches.

use super::{MUST_NOT_BE_EMPTY, must_be_one_of, quoted};
use crate::{Path, Violations, open_enum};

open_enum! {
    /// Operations of a JSON patch.
    pub enum PatchOp { Add = "add", Remove = "remove", Replace = "replace", Move = "move", Copy = "copy" }
}

/// One operation of a JSON patch. Whether `value` is there matters, so it isn't a typed field.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PatchOperation {
    /// What to do.
    #[serde(default)]
    pub op: PatchOp,
    /// Where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// From where, for move and copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The value, for add and replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<serde_json::Value>,
}

/// Judges a list of patch operations.
pub fn json_patches(path: &Path, operations: &[PatchOperation], out: &mut Violations) {
    if operations.is_empty() {
        out.add(path, MUST_NOT_BE_EMPTY);
    }
    for (i, operation) in operations.iter().enumerate() {
        let path = path.index(i);
        if !operation.op.is_known() {
            out.add(path.field("op"), must_be_one_of("op", PatchOp::KNOWN));
            continue;
        }
        let target = operation.path.as_deref().unwrap_or_default();
        if operation.op == PatchOp::Remove && matches!(target, "" | "/") {
            out.add(path.field("path"), "root path cannot be removed");
        }
        let wants = |field: &str, ops: &[&str], there: bool, out: &mut Violations| {
            let wanted = ops.contains(&operation.op.as_str());
            if there && !wanted {
                out.add(
                    path.field(field),
                    format!("{field:?} is allowed only when \"op\" is one of {}", quoted(ops)),
                );
            } else if !there && wanted {
                out.add(
                    path.field(field),
                    format!("{field:?} must not be empty when \"op\" is one of {}", quoted(ops)),
                );
            }
        };
        wants("from", &["move", "copy"], operation.from.is_some(), out);
        wants("value", &["add", "replace"], operation.value.is_some(), out);
    }
}

impl crate::form::Omit for PatchOperation {}
