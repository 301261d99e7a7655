use std::sync::{Mutex, PoisonError};

use super::*;
use crate::store::StoreOptions;

struct Fixture {
    tokens: Tokens,
    store: Store,
    moved: Arc<Mutex<Duration>>,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&StoreOptions::in_dir(dir.path())).unwrap();
    let moved = Arc::new(Mutex::new(Duration::ZERO));
    let clock: Clock = {
        let moved = moved.clone();
        Arc::new(move || OffsetDateTime::now_utc() + *moved.lock().unwrap_or_else(PoisonError::into_inner))
    };
    let tokens = Tokens::new(store.clone(), Arc::new(Config::default())).with_clock(clock);
    Fixture { tokens, store, moved, _dir: dir }
}

const HOUR: Duration = Duration::hours(1);

#[tokio::test]
async fn keys_rotate_and_old_ones_go() {
    let Fixture { tokens, _dir, .. } = fixture();
    let error = tokens.user_token("john", &[], HOUR).await.unwrap_err();
    assert!(matches!(error, TokenError::NoSigningKey { .. }), "{error}");
    tokens.ensure_signing_key(&TokenKind::User).await.unwrap();
    let first = tokens.user_token("john", &["team".into()], HOUR).await.unwrap();
    tokens.create_signing_key(&TokenKind::User, 2).await.unwrap();
    let second = tokens.user_token("jane", &[], HOUR).await.unwrap();
    assert_eq!(tokens.verify_user(&first).await.unwrap().groups, ["team"]);
    tokens.delete_signing_key(&TokenKind::User, 1).await.unwrap();
    assert!(tokens.verify_user(&first).await.is_err());
    assert_eq!(tokens.verify_user(&second).await.unwrap().name, "jane");
}

#[tokio::test]
async fn times_are_judged() {
    let Fixture { tokens, moved, _dir, .. } = fixture();
    tokens.ensure_signing_key(&TokenKind::User).await.unwrap();
    let token = tokens.user_token("john", &[], HOUR).await.unwrap();
    *moved.lock().unwrap() = -HOUR;
    let error = tokens.verify_user(&token).await.unwrap_err().to_string();
    assert!(error.contains("valid_from"), "{error}");
    *moved.lock().unwrap() = HOUR + Duration::SECOND;
    assert!(tokens.verify_user(&token).await.is_err());
}

#[tokio::test]
async fn a_revoked_token_is_refused() {
    let Fixture { tokens, _dir, .. } = fixture();
    tokens.ensure_signing_key(&TokenKind::User).await.unwrap();
    let token = tokens.user_token("john", &[], HOUR).await.unwrap();
    let jti = tokens.verify_user(&token).await.unwrap().registered.jti;
    let key =
        ResourceKey { kind: "GlobalSecret", mesh: String::new(), name: "user-token-revocations".into() };
    tokens.create_secret(&key, format!("other,{jti}\n").as_bytes()).await.unwrap();
    assert_eq!(tokens.verify_user(&token).await.unwrap_err().to_string(), "token is revoked");
}

#[tokio::test]
async fn a_kid_must_be_a_string() {
    let Fixture { tokens, _dir, .. } = fixture();
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT","kid":1337}"#);
    let error = tokens.verify_user(&format!("{header}.e30.c2ln")).await.unwrap_err().to_string();
    assert!(error.contains("kid header must be a string"), "{error}");
}

#[tokio::test]
async fn a_token_of_another_kind_is_refused() {
    let Fixture { tokens, _dir, .. } = fixture();
    let mesh = TokenKind::Dataplane { mesh: "default".into() };
    for kind in [&TokenKind::User, &TokenKind::Zone, &mesh] {
        tokens.ensure_signing_key(kind).await.unwrap();
    }
    let zone = tokens.zone_token("east", &[], HOUR).await.unwrap();
    assert!(tokens.verify_user(&zone).await.is_err());
    let claims = DataplaneClaims { mesh: "default".into(), ..DataplaneClaims::default() };
    let dataplane = tokens.dataplane_token(claims, HOUR).await.unwrap();
    assert!(tokens.verify_user(&dataplane).await.is_err());
    assert!(tokens.verify_dataplane("other", &dataplane).await.is_err());
    assert_eq!(tokens.verify_dataplane("default", &dataplane).await.unwrap().mesh, "default");
}

#[tokio::test]
async fn the_admin_token_is_made_once() {
    let Fixture { tokens, store, _dir, .. } = fixture();
    tokens.ensure_signing_key(&TokenKind::User).await.unwrap();
    tokens.bootstrap_admin_token().await.unwrap();
    let key = ResourceKey { kind: "GlobalSecret", mesh: String::new(), name: "admin-user-token".into() };
    let first = store.get(&key).await.unwrap().unwrap();
    tokens.bootstrap_admin_token().await.unwrap();
    assert_eq!(store.get(&key).await.unwrap().unwrap(), first);
    let token = STANDARD.decode(first.spec["data"].as_str().unwrap()).unwrap();
    let claims = tokens.verify_user(std::str::from_utf8(&token).unwrap()).await.unwrap();
    assert_eq!(claims.name, crate::access::ADMIN);
}
