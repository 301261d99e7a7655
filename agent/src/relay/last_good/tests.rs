use std::os::unix::fs::PermissionsExt;

use rstest::rstest;
use ursa_wire::discovery::Resource;

use super::*;

fn item(name: &str, version: &str) -> (Kind, String, Item) {
    let value = Bytes::from(format!("content of {name}"));
    let bytes = Resource::new(Kind::Listener.type_url(), name, version, value).encoded();
    (Kind::Listener, name.to_owned(), Item { version: version.to_owned(), bytes })
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        fs::read_dir(dir.join("listeners")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn comes_back_as_it_was_stored() {
    let dir = tempfile::tempdir().unwrap();
    let long = "n".repeat(300);
    let items = vec![item("a", "1"), item("b/../c", "2"), item(&long, "3")];
    LastGood::new(dir.path()).store(&items).unwrap();
    let mut loaded = LastGood::new(dir.path()).load().unwrap();
    loaded.sort_by(|a, b| a.1.cmp(&b.1));
    assert_eq!(loaded, items);
    for file in files(dir.path()) {
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_directory_from_before_a_type_existed_is_read_and_gets_it() {
    let dir = tempfile::tempdir().unwrap();
    LastGood::new(dir.path()).store(&[item("a", "1")]).unwrap();
    assert!(!dir.path().join("extensions").exists());
    let mut last_good = LastGood::new(dir.path());
    let mut items = last_good.load().unwrap();
    assert_eq!(items, [item("a", "1")]);
    let mut extension = item("a_rbac", "1");
    extension.0 = Kind::Extension;
    items.push(extension);
    last_good.store(&items).unwrap();
    let mut loaded = LastGood::new(dir.path()).load().unwrap();
    loaded.sort_by(|a, b| a.1.cmp(&b.1));
    assert_eq!(loaded, items);
}

#[test]
fn becomes_equal_to_what_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let mut last_good = LastGood::new(dir.path());
    last_good.store(&[item("a", "1"), item("b", "1")]).unwrap();
    last_good.store(&[item("b", "2")]).unwrap();
    assert_eq!(LastGood::new(dir.path()).load().unwrap(), [item("b", "2")]);
    // A new process knows what is there and removes what is gone.
    let mut next = LastGood::new(dir.path());
    next.load().unwrap();
    next.store(&[]).unwrap();
    assert!(files(dir.path()).is_empty());
}

#[rstest]
#[case::emptied(|_: &[u8]| Vec::new())]
#[case::cut_short(|content: &[u8]| content[..content.len() - 1].to_vec())]
#[case::cut_in_the_header(|content: &[u8]| content[..20].to_vec())]
#[case::one_bit(|content: &[u8]| { let mut c = content.to_vec(); let last = c.len() - 1; c[last] ^= 1; c })]
#[case::grown(|content: &[u8]| { let mut c = content.to_vec(); c.push(0); c })]
#[case::foreign(|_: &[u8]| b"hello".to_vec())]
fn a_damaged_file_is_left_out_and_the_others_are_read(#[case] damage: fn(&[u8]) -> Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    LastGood::new(dir.path()).store(&[item("a", "1"), item("b", "1")]).unwrap();
    let victim = &files(dir.path())[0];
    fs::write(victim, damage(&fs::read(victim).unwrap())).unwrap();
    assert_eq!(LastGood::new(dir.path()).load().unwrap().len(), 1);
}

#[test]
fn a_file_under_another_name_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    LastGood::new(dir.path()).store(&[item("a", "1"), item("b", "1")]).unwrap();
    let all = files(dir.path());
    fs::copy(&all[0], &all[1]).unwrap();
    assert_eq!(LastGood::new(dir.path()).load().unwrap().len(), 1);
}

#[test]
fn an_unwritable_directory_is_an_error_that_names_it_and_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut last_good = LastGood::new(dir.path());
    last_good.store(&[item("a", "1")]).unwrap();
    // A file where the directory of another type should be.
    fs::write(dir.path().join("clusters"), "").unwrap();
    let mut clusters = item("c", "1");
    clusters.0 = Kind::Cluster;
    let error = last_good.store(&[item("b", "1"), clusters]).unwrap_err();
    assert!(error.to_string().contains("clusters"), "{error}");
    fs::remove_file(dir.path().join("clusters")).unwrap();
    assert_eq!(LastGood::new(dir.path()).load().unwrap().len(), 2);
}

#[test]
fn one_file_that_cannot_be_read_costs_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut last_good = LastGood::new(dir.path());
    last_good.store(&[item("a", "1"), item("b", "1"), item("c", "1")]).unwrap();
    let endless = OpenOptions::new().write(true).open(last_good.path(Kind::Listener, "a")).unwrap();
    endless.set_len(1 << 40).unwrap();
    let pipe = last_good.path(Kind::Listener, "b");
    fs::remove_file(&pipe).unwrap();
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(LastGood::new(dir.path()).load().unwrap(), [item("c", "1")]);
}
