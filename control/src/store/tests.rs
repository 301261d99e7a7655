mod crash;

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};
use ursa_model::{Resource, ResourceKey};

use super::*;

struct Fixture {
    store: Store,
    dir: tempfile::TempDir,
}

fn open() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    Fixture { store: Store::open(&StoreOptions::in_dir(dir.path())).unwrap(), dir }
}

pub(super) fn mesh(name: &str) -> Resource {
    Resource::from_json(&json!({ "type": "Mesh", "name": name })).unwrap()
}

pub(super) fn secret(name: &str, data: &str) -> Resource {
    Resource::from_json(&json!({ "type": "GlobalSecret", "name": name, "data": data })).unwrap()
}

fn labelled(resource: &Resource, value: &str) -> Resource {
    let mut resource = resource.clone();
    resource.meta.labels.insert("k".into(), value.into());
    resource
}

fn mesh_key(name: &str) -> ResourceKey {
    mesh(name).key()
}

#[tokio::test]
async fn a_write_is_read_back() {
    let Fixture { store, dir: _dir } = open();
    let created = store.create(mesh("a")).await.unwrap();
    assert_eq!(created.meta.version, 1);
    assert!(created.meta.creation_time.is_some());
    assert_eq!(store.get(&mesh_key("a")).await.unwrap().unwrap(), created);
    assert!(store.get(&mesh_key("b")).await.unwrap().is_none());
    let error = store.create(mesh("a")).await.unwrap_err();
    assert!(matches!(error, StoreError::Exists(_)), "{error}");
}

#[tokio::test]
async fn only_the_version_that_was_read_can_be_replaced() {
    let Fixture { store, dir: _dir } = open();
    let first = store.create(mesh("a")).await.unwrap();
    let second = store.update(labelled(&first, "1")).await.unwrap();
    assert_eq!(second.meta.version, 2);
    assert_eq!(second.meta.creation_time, first.meta.creation_time);
    let error = store.update(labelled(&first, "2")).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict(_)), "{error}");
    let error = store.delete(&mesh_key("a"), Some(1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict(_)), "{error}");
    store.delete(&mesh_key("a"), Some(2)).await.unwrap();
    let error = store.delete(&mesh_key("a"), None).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error}");
    let error = store.update(labelled(&second, "3")).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound(_)), "{error}");
}

#[tokio::test]
async fn equal_content_is_no_write() {
    let Fixture { store, dir: _dir } = open();
    let first = store.create(mesh("a")).await.unwrap();
    let hint = *store.hints().borrow();
    let again = store.update(Resource::clone(&first)).await.unwrap();
    assert_eq!(again, first);
    assert_eq!(*store.hints().borrow(), hint);
}

#[tokio::test]
async fn modify_survives_others() {
    let Fixture { store, dir: _dir } = open();
    store.create(mesh("a")).await.unwrap();
    let add = |store: Store, i: u32| async move {
        store
            .modify(&mesh_key("a"), |resource| {
                resource.meta.labels.insert(format!("l{i}"), String::new());
            })
            .await
            .unwrap();
    };
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..20 {
        tasks.spawn(add(store.clone(), i));
    }
    tasks.join_all().await;
    assert_eq!(store.get(&mesh_key("a")).await.unwrap().unwrap().meta.labels.len(), 20);
    assert!(store.modify(&mesh_key("b"), |_| ()).await.unwrap().is_none());
}

#[tokio::test]
async fn pages_are_ordered_and_counted() {
    let Fixture { store, dir: _dir } = open();
    for name in ["c", "a", "b", "ab"] {
        store.create(mesh(name)).await.unwrap();
    }
    let names = |page: &Page| page.items.iter().map(|found| found.meta.name.clone()).collect::<Vec<_>>();
    let query = ListQuery { offset: 1, limit: Some(2), ..ListQuery::default() };
    let page = store.page("Mesh", query).await.unwrap();
    assert_eq!((names(&page), page.total), (vec!["ab".into(), "b".into()], 4));
    let query = ListQuery { name_contains: Some("a".into()), ..ListQuery::default() };
    let page = store.page("Mesh", query).await.unwrap();
    assert_eq!((names(&page), page.total), (vec!["a".into(), "ab".into()], 2));
    assert_eq!(store.count("Mesh", None).await.unwrap(), 4);
    assert_eq!(store.count("Zone", None).await.unwrap(), 0);
}

#[tokio::test]
async fn changes_follow_the_cursor() {
    let Fixture { store, dir: _dir } = open();
    store.create(mesh("a")).await.unwrap();
    let listing = store.list_all().await.unwrap();
    assert_eq!(listing.resources.len(), 1);
    let b = store.create(mesh("b")).await.unwrap();
    store.update(labelled(&b, "1")).await.unwrap();
    store.delete(&mesh_key("a"), None).await.unwrap();
    let seen: Vec<(String, bool)> = store
        .changes(listing.cursor, 100)
        .await
        .unwrap()
        .changes
        .iter()
        .map(|change| (change.key.name.clone(), change.resource.is_some()))
        .collect();
    // Coalesced: b once, in its last state.
    assert_eq!(seen, [("b".into(), true), ("a".into(), false)]);
}

#[tokio::test]
async fn changes_come_in_pages_without_gaps() {
    let Fixture { store, dir: _dir } = open();
    for i in 0..10 {
        store.create(mesh(&format!("m{i}"))).await.unwrap();
        store.create(mesh(&format!("gone{i}"))).await.unwrap();
        store.delete(&mesh_key(&format!("gone{i}")), None).await.unwrap();
    }
    for limit in [1, 2, 3, 7, 100] {
        let (mut cursor, mut seen) = (Cursor::default(), Vec::new());
        loop {
            let page = store.changes(cursor, limit).await.unwrap();
            seen.extend(page.changes.iter().map(|change| change.key.name.clone()));
            cursor = page.cursor;
            if !page.more {
                break;
            }
        }
        assert_eq!(seen.len(), 20, "limit {limit}: {seen:?}");
        assert_eq!(cursor, *store.hints().borrow());
    }
}

#[tokio::test]
async fn a_watcher_sees_everything() {
    let Fixture { store, dir: _dir } = open();
    store.create(mesh("a")).await.unwrap();
    let mut watcher = store.watch(None);
    let WatchEvent::Relist(all) = watcher.next().await.unwrap() else { panic!("expected a listing first") };
    assert_eq!(all.len(), 1);
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for i in 0..50 {
                store.create(mesh(&format!("m{i}"))).await.unwrap();
            }
        }
    });
    let mut seen = 0;
    while seen < 50 {
        match watcher.next().await.unwrap() {
            WatchEvent::Changes(changes) => seen += changes.len(),
            WatchEvent::Relist(_) => panic!("nothing was compacted"),
        }
    }
    writer.await.unwrap();
}

#[tokio::test]
async fn compacted_history_asks_for_a_relist() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions { tombstones: 10, ..StoreOptions::in_dir(dir.path()) };
    let store = Store::open(&options).unwrap();
    let mut watcher = store.watch(None);
    watcher.next().await.unwrap();
    for i in 0..40 {
        store.create(mesh(&format!("m{i}"))).await.unwrap();
        store.delete(&mesh_key(&format!("m{i}")), None).await.unwrap();
    }
    let error = store.changes(Cursor::default(), 10).await.unwrap_err();
    assert!(matches!(error, StoreError::Compacted), "{error}");
    assert!(matches!(watcher.next().await.unwrap(), WatchEvent::Relist(all) if all.is_empty()));
}

#[tokio::test]
async fn a_restart_keeps_everything() {
    let Fixture { store, dir } = open();
    let a = store.create(mesh("a")).await.unwrap();
    store.create(secret("s", "c2VjcmV0")).await.unwrap();
    store.delete(&mesh_key("a"), None).await.unwrap();
    let (cursor, id) = (*store.hints().borrow(), store.cluster_id().to_owned());
    drop(store);
    let store = reopen(&StoreOptions::in_dir(dir.path())).await;
    assert_eq!((*store.hints().borrow(), store.cluster_id()), (cursor, id.as_str()));
    let found = store.get(&secret("s", "").key()).await.unwrap().unwrap();
    assert_eq!(found.spec["data"], "c2VjcmV0");
    // A revision is never given twice.
    store.create(mesh("a")).await.unwrap();
    assert!(*store.hints().borrow() > cursor);
    assert_eq!(a.meta.version, 1);
}

/// Opens a store whose last handle has just been dropped: its writer may still be closing the file.
async fn reopen(options: &StoreOptions) -> Store {
    loop {
        match Store::open(options) {
            Ok(store) => return store,
            Err(StoreError::Open { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn one_process_has_a_store() {
    let Fixture { store, dir } = open();
    let error = Store::open(&StoreOptions::in_dir(dir.path())).unwrap_err().to_string();
    assert!(error.contains("another control plane"), "{error}");
    drop(store);
}

#[tokio::test]
async fn secrets_are_not_readable_in_the_file() {
    let Fixture { store, dir } = open();
    let mark = "UFJJVkFURS1NQVJL";
    store.create(secret("s", mark)).await.unwrap();
    store.put_private("tickets", "t", b"PRIVATE-TICKET".to_vec(), Some(0)).await.unwrap();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let content = std::fs::read(entry.unwrap().path()).unwrap();
        for needle in [mark.as_bytes(), b"PRIVATE-TICKET"] {
            assert!(!content.windows(needle.len()).any(|window| window == needle));
        }
    }
    let mode = std::fs::metadata(dir.path().join("store.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_key_file_that_others_can_read_is_refused() {
    let Fixture { store, dir } = open();
    drop(store);
    let key = dir.path().join("store.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = loop {
        match Store::open(&StoreOptions::in_dir(dir.path())) {
            Err(StoreError::Open { .. }) => tokio::task::yield_now().await,
            other => break other.unwrap_err().to_string(),
        }
    };
    assert!(error.contains("chmod 600"), "{error}");
}

#[tokio::test]
async fn a_lost_key_is_named() {
    let Fixture { store, dir } = open();
    store.create(secret("s", "eA==")).await.unwrap();
    drop(store);
    std::fs::remove_file(dir.path().join("store.key")).unwrap();
    let store = reopen(&StoreOptions::in_dir(dir.path())).await;
    let error = store.get(&secret("s", "").key()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Key(text) if text.contains("store.key")), "{error}");
}

#[tokio::test]
async fn private_records_have_versions() {
    let Fixture { store, dir: _dir } = open();
    assert_eq!(store.put_private("b", "k", b"1".to_vec(), Some(0)).await.unwrap(), 1);
    assert!(store.put_private("b", "k", b"2".to_vec(), Some(0)).await.unwrap_err().is_conflict());
    assert_eq!(store.put_private("b", "k", b"2".to_vec(), Some(1)).await.unwrap(), 2);
    assert_eq!(store.put_private("b", "k", b"3".to_vec(), None).await.unwrap(), 3);
    let found = store.private("b", "k").await.unwrap().unwrap();
    assert_eq!((found.value.as_slice(), found.version), (b"3".as_slice(), 3));
    assert_eq!(store.privates("b").await.unwrap().len(), 1);
    store.delete_private("b", "k").await.unwrap();
    assert!(store.private("b", "k").await.unwrap().is_none());
}

#[tokio::test]
async fn a_full_disk_is_an_error_and_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions { max_pages: Some(64), ..StoreOptions::in_dir(dir.path()) };
    let store = Store::open(&options).unwrap();
    let mut written = 0;
    let big = |i: u32| labelled(&mesh(&format!("m{i}")), &"x".repeat(4000));
    let error = loop {
        match store.create(big(written)).await {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Full(_)), "{error}");
    // What was acknowledged is there, nothing else is, and with space it goes on.
    assert_eq!(store.count("Mesh", None).await.unwrap(), u64::from(written));
    assert!(matches!(store.create(big(written)).await, Err(StoreError::Full(_))));
    drop(store);
    let store = reopen(&StoreOptions { max_pages: Some(1 << 20), ..options }).await;
    store.create(big(written)).await.unwrap();
    assert_eq!(store.count("Mesh", None).await.unwrap(), u64::from(written) + 1);
}

#[tokio::test]
async fn a_hundred_thousand_resources_are_listed_in_pages() {
    let Fixture { store, dir: _dir } = open();
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..512_u32 {
        let store = store.clone();
        tasks.spawn(async move {
            for i in (worker..100_000).step_by(512) {
                store.create(mesh(&format!("m{i:06}"))).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let query = ListQuery { offset: 99_990, limit: Some(100), ..ListQuery::default() };
    let page = store.page("Mesh", query).await.unwrap();
    assert_eq!((page.items.len(), page.total), (10, 100_000));
    assert_eq!(page.items[9].meta.name, "m099999");
}

#[tokio::test]
async fn a_row_that_cannot_be_read_hides_no_other() {
    let Fixture { store, dir } = open();
    store.create(mesh("a")).await.unwrap();
    store.create(mesh("b")).await.unwrap();
    let db = rusqlite::Connection::open(dir.path().join("store.db")).unwrap();
    db.execute("UPDATE resources SET spec = x'7b' WHERE name = 'a'", []).unwrap();
    let names: Vec<Value> =
        store.list("Mesh", None).await.unwrap().iter().map(|found| json!(found.meta.name)).collect();
    assert_eq!(names, ["b"]);
}
