//! Prints what a proxy of a mesh in YAML files is configured with:
//! `cargo run -p ursa-engine --example render -- default.web-1 FILE...`

use std::{process::ExitCode, sync::Arc};

use ursa_engine::{Change, Engine, EngineConfig, ProxyKey};
use ursa_model::Resource;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let proxy = arguments.next().ok_or("usage: render MESH.PROXY FILE...")?;
    let (mesh, name) = proxy.split_once('.').ok_or("write the proxy as MESH.PROXY")?;
    let proxy = ProxyKey { mesh: mesh.to_owned(), name: name.to_owned() };
    let mut engine = Engine::new(EngineConfig { zone: "default".to_owned() });
    for file in arguments {
        let text = std::fs::read_to_string(&file).map_err(|e| format!("can't read {file}: {e}"))?;
        let objects = Resource::many_from_yaml(&text).map_err(|e| format!("{file}: {e}"))?;
        let outcome = engine.apply(objects.into_iter().map(|object| Change::Put(Arc::new(object))).collect());
        for (key, warning) in outcome.warnings {
            eprintln!("{key}: {warning}");
        }
    }
    engine.connect(&proxy);
    let dump = serde_json::to_string_pretty(&engine.config_dump(&proxy)).map_err(|e| e.to_string())?;
    println!("{dump}");
    Ok(())
}
