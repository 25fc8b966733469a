use serde_json::json;

use crate::support::Dir;

#[test]
fn the_processor_is_always_listed() {
    let run = Dir::new().trainer("devices --json").succeeds();
    let devices = &run.json()["devices"];
    let keys: Vec<_> = devices[0].as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        ["id", "name", "backend", "kind", "memory_bytes", "dtypes"]
    );
    assert_eq!(devices[0]["id"], "cpu");
    assert_eq!(devices[0]["kind"], "cpu");
    assert!(devices[0]["memory_bytes"].as_u64() > Some(1 << 20));
    let text = Dir::new().trainer("devices").succeeds();
    assert!(text.stdout.starts_with("cpu "), "{text}");
}

#[test]
fn auto_and_cpu_compute() {
    let dir = Dir::with_tokens();
    for device in ["auto", "cpu"] {
        let line = format!("--device {device} eval --model model --data rows.jsonl --json");
        assert_eq!(dir.trainer(&line).succeeds().json()["rows"], json!(8));
    }
}

#[test]
fn a_device_that_is_not_there_says_how_to_get_it() {
    let dir = Dir::with_tokens();
    for (device, feature) in [
        ("cuda", cfg!(feature = "cuda")),
        ("cuda:0", cfg!(feature = "cuda")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("vulkan:1", cfg!(any(feature = "vulkan", feature = "wgpu"))),
        ("metal", false),
    ] {
        if feature {
            continue; // such a device may be here
        }
        let backend = device.split(':').next().unwrap();
        let line = format!("generate --model model --prompt-ids 5 --device {device}");
        let build = format!("--features {backend}");
        dir.trainer(&line)
            .fails(1, &[&format!("--device {backend}"), "not compiled", &build]);
    }
    for device in ["gpu", "cpu:0", "cuda:x", "cuda:-1", "auto:1", ""] {
        dir.trainer_with("eval --model model --data rows.jsonl --device", device)
            .fails(2, &[&format!("no device {device:?}"), "trainer devices"]);
    }
    let line = "train --model model --data rows.jsonl --output run --device gpu --json";
    dir.trainer(line).fails(2, &["no device \"gpu\""]);
    assert!(!dir.has("run"));
}

#[test]
fn a_device_that_is_named_is_listed_alone() {
    let dir = Dir::new();
    let run = dir.trainer("devices --json --device cpu").succeeds();
    let json = run.json();
    assert_eq!(json["devices"].as_array().unwrap().len(), 1);
    assert_eq!(json["devices"][0]["id"], "cpu");
    dir.trainer("devices --device gpu")
        .fails(2, &["no device \"gpu\""]);
    if cfg!(not(feature = "cuda")) {
        dir.trainer("devices --device cuda")
            .fails(1, &["not compiled"]);
    }
}

#[test]
fn a_device_is_looked_at_by_every_command() {
    let dir = Dir::with_tokens();
    for line in [
        "plan --model model",
        "train --print-recipe --model model --data rows.jsonl",
        "chat --model model",
        "",
    ] {
        dir.trainer(&format!("{line} --device gpu"))
            .fails(2, &["no device \"gpu\"", "trainer devices"]);
    }
    if cfg!(not(feature = "cuda")) {
        dir.trainer("plan --model model --device cuda")
            .fails(1, &["not compiled"]);
    }
}
