//! Hub ids, against a small Hub on this machine.

use std::process::Command;

use serde_json::json;

use crate::fake_hub::FakeHub;
use crate::support::{Dir, finish, fixtures, token_rows};

/// The model `gqa` as `acme/tiny`.
fn hub() -> FakeHub {
    let read = |name: &'static str| {
        let path = fixtures().join("models/gqa").join(name);
        (name, std::fs::read(path).unwrap())
    };
    let files = ["config.json", "generation_config.json", "model.safetensors"];
    FakeHub::start(&files.map(read))
}

fn online<'a>(command: &'a mut Command, hub: &FakeHub) -> &'a mut Command {
    command
        .env("HF_ENDPOINT", &hub.endpoint)
        .env_remove("HF_HUB_OFFLINE")
}

#[test]
fn a_model_by_id_is_downloaded_once_and_then_works_offline() {
    let (dir, hub) = (Dir::with_tokens(), hub());
    let args = [
        "eval",
        "--json",
        "--model",
        "acme/tiny",
        "--data",
        "rows.jsonl",
    ];
    let first = finish(online(&mut dir.command(&args), &hub)).succeeds();
    assert!(
        first.stderr.contains("downloaded model.safetensors"),
        "{first}"
    );
    let offline = dir.run(&args).succeeds();
    assert_eq!(first.json(), offline.json());
    let folder = dir
        .trainer("eval --json --model model --data rows.jsonl")
        .succeeds();
    assert_eq!(first.json(), folder.json());

    let revision = "eval --json --model acme/tiny@main --data rows.jsonl";
    assert_eq!(dir.trainer(revision).succeeds().json(), folder.json());
    let line = "train -q --json --model acme/tiny --data rows.jsonl --output run --max-steps 1";
    assert_eq!(dir.trainer(line).succeeds().json()["steps"], json!(1));
    let config = dir.json("run/adapter/adapter_config.json");
    assert_eq!(config["base_model_name_or_path"], "acme/tiny");
    assert_eq!(config["revision"], json!(null));
    let line = "train -q --model acme/tiny@main --data rows.jsonl --output pinned --max-steps 1";
    dir.trainer(line).succeeds();
    let config = dir.json("pinned/adapter/adapter_config.json");
    assert_eq!(config["base_model_name_or_path"], "acme/tiny");
    assert_eq!(config["revision"], "main");
    let card = dir.read("pinned/adapter/README.md");
    let python = r#"from_pretrained("acme/tiny", revision="main")"#;
    assert!(card.contains(python), "{card}");
}

#[test]
fn what_the_hub_lacks_or_refuses_is_named() {
    let (dir, hub) = (Dir::with_tokens(), hub());
    let run = |model: &str| {
        let args = ["generate", "--prompt-ids", "5", "--model", model];
        finish(online(&mut dir.command(&args), &hub))
    };
    run("acme/none").fails(
        1,
        &["no folder acme/none", "no model acme/none", "spelling"],
    );
    run("acme/tiny@v9").fails(1, &["no revision v9 in acme/tiny"]);
    hub.change(|shelf| shelf.token = Some("hf_right"));
    run("acme/tiny").fails(1, &["acme/tiny", "no token", "HF_TOKEN"]);
    let args = ["generate", "--prompt-ids", "5", "--model", "acme/tiny"];
    let with_token =
        |token: &str| finish(online(&mut dir.command(&args), &hub).env("HF_TOKEN", token));
    let wrong = with_token("hf_wrong");
    wrong.fails(1, &["acme/tiny", "the token gives no access"]);
    assert!(!wrong.stderr.contains("hf_wrong"));
    with_token("hf_right").succeeds();
}

#[test]
fn offline_says_so() {
    let dir = Dir::with_tokens();
    let error = ["acme/tiny is not in the cache", "unset HF_HUB_OFFLINE"];
    dir.trainer("eval --model acme/tiny --data rows.jsonl")
        .fails(1, &error);
    dir.trainer("plan --model acme/tiny --data rows.jsonl --json")
        .fails(1, &error);
    dir.trainer("eval --model model --adapter acme/tiny --data rows.jsonl")
        .fails(1, &error);
    dir.trainer("train --model acme/tiny --data rows.jsonl --output run")
        .fails(1, &error);
    assert!(!dir.has("run"));
}

#[test]
fn a_hub_that_is_not_there_is_a_network_error() {
    let dir = Dir::with_tokens();
    let mut command = dir.command(&["eval", "--model", "acme/tiny", "--data", "rows.jsonl"]);
    command
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .env_remove("HF_HUB_OFFLINE");
    let parts = [
        "there is no folder acme/tiny, and as a Hub id it cannot be had",
        "of acme/tiny",
        "cause: ",
        "check the network",
    ];
    finish(&mut command).fails(1, &parts);
}

#[test]
fn a_name_that_is_neither_folder_nor_id_is_refused() {
    let dir = Dir::with_tokens();
    for name in ["nothing", "a/b/c", "./gone", "/gone", "a b/c", "../x@y@z"] {
        dir.trainer_with("generate --prompt-ids 5 --model", name)
            .fails(1, &[name]);
    }
    dir.trainer("generate --prompt-ids 5 --model rows.jsonl")
        .fails(1, &["rows.jsonl is neither"]);
}

#[test]
fn a_data_set_is_downloaded_once_and_then_works_offline() {
    let dir = Dir::with_tokens();
    let hub = FakeHub::start(&[
        ("README.md", b"rows".to_vec()),
        ("data/test.jsonl", token_rows(5).into_bytes()),
        ("data/train.jsonl", token_rows(8).into_bytes()),
    ]);
    let args = |data: &'static str| ["eval", "--json", "--model", "model", "--data", data];
    let address = args("hf://datasets/acme/tiny");
    let first = finish(online(&mut dir.command(&address), &hub)).succeeds();
    let said = [
        "downloaded data/train.jsonl",
        "hf://datasets/acme/tiny: train.jsonl",
    ];
    assert!(
        said.iter().all(|said| first.stderr.contains(said)),
        "{first}"
    );
    assert_eq!(first.json()["rows"], json!(8));
    assert_eq!(dir.run(&address).succeeds().json(), first.json());
    let named = args("hf://datasets/acme/tiny/data/test.jsonl");
    dir.run(&named)
        .fails(1, &["acme/tiny is not in the cache (no data/test.jsonl)"]);
    let test = finish(online(&mut dir.command(&named), &hub)).succeeds();
    assert_eq!(test.json()["rows"], json!(5));

    let line =
        "train -q --json --model model --data hf://datasets/acme/tiny --output run --max-steps 1";
    dir.trainer(line).succeeds();
    assert!(
        dir.read("run/recipe.toml")
            .contains("\"hf://datasets/acme/tiny\"")
    );
    for (data, code, parts) in [
        (
            "hf://datasets/acme/none",
            1,
            &["the Hub has no data set acme/none", "spelling"][..],
        ),
        (
            "hf://datasets/acme/tiny/other",
            1,
            &["acme/tiny has no", "file at other"],
        ),
        ("hf://datasets/acme", 2, &["is no data set"]),
    ] {
        finish(online(&mut dir.command(&args(data)), &hub)).fails(code, parts);
    }
}
