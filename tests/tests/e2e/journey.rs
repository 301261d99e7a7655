//! The main job: what `make demo` shows, and that it leaves no trace.

use std::process::Command;

use ursa_tests::lab::Programs;

#[test]
fn the_demo_holds() {
    let programs = Programs::discover().unwrap();
    let output = Command::new(programs.path("demo"))
        .arg("--bin-dir")
        .arg(&programs.bin_dir)
        .arg("--envoy")
        .arg(&programs.envoy)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("Every step held"));
}
