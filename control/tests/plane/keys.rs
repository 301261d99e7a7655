//! Signing keys survive what interrupts their making.

use std::time::Duration;

use crate::support::{PATIENCE, Plane};
use ursa_control::tokens::DataplaneClaims;
use ursa_model::ResourceKey;

const KEY: &str = "dataplane-token-signing-key-default-1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signing_key_that_a_crash_prevented_is_made_by_the_next_process() {
    let plane = Plane::start().await;
    plane.until("the mesh's signing key", || plane.get("Secret", KEY)).await;
    let marked = async {
        while plane.control.store.private("mesh-signing-keys", "default").await.unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, marked).await.expect("the key is noted");
    // As a process leaves it that dies between the mesh's other defaults and its key.
    let key = ResourceKey { kind: "Secret", mesh: "default".into(), name: KEY.into() };
    plane.control.store.delete(&key, None).await.unwrap();
    plane.control.store.delete_private("mesh-signing-keys", "default").await.unwrap();

    let plane = plane.restart().await;
    plane.until("the signing key again", || plane.get("Secret", KEY)).await;
    let claims = DataplaneClaims { mesh: "default".into(), ..DataplaneClaims::default() };
    let token = plane.control.tokens.dataplane_token(claims, time::Duration::hours(1)).await.unwrap();
    plane.control.tokens.verify_dataplane("default", &token).await.unwrap();
}
