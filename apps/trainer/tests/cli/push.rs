//! To the Hub and back, against a small Hub on this machine.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::fake_hub::{FakeHub, Fault, checksum};
use crate::support::{Dir, Run, finish, fixtures, words};

const TOKEN: &str = "hf_nobody_may_see_this";

/// Runs a line with a token; whatever happens, nobody sees it.
fn run(dir: &Dir, hub: &FakeHub, line: &str) -> Run {
    let mut command = dir.command(&words(line));
    command
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_TOKEN", TOKEN)
        .env_remove("HF_HUB_OFFLINE");
    let run = finish(&mut command);
    hides_token(&run);
    run
}

#[track_caller]
fn hides_token(run: &Run) {
    assert!(!run.stdout.contains(TOKEN), "{}", run.stdout);
    assert!(!run.stderr.contains(TOKEN), "{}", run.stderr);
}

/// Neither logs, nor the cache, nor what was made.
fn no_file_has_token(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            no_file_has_token(&path);
        } else {
            let bytes = fs::read(&path).unwrap();
            let has_it = bytes
                .windows(TOKEN.len())
                .any(|part| part == TOKEN.as_bytes());
            assert!(!has_it, "{}", path.display());
        }
    }
}

fn file(hub: &FakeHub, name: &str) -> String {
    let shelf = hub.shelf.lock().unwrap();
    let bytes = shelf.file("acme/mine", "main", name);
    String::from_utf8_lossy(bytes.unwrap_or_else(|| panic!("{name}"))).into_owned()
}

#[test]
fn an_adapter_is_pushed_pulled_and_used_by_its_id() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    let push = "push run --repo acme/mine --base-model acme/base --json -v";
    let first = run(&dir, &hub, push).succeeds();
    let json = first.json();
    assert_eq!(json["created"], json!(true));
    assert_eq!(json["url"], json!(format!("{}/acme/mine", hub.endpoint)));
    for said in ["created acme/mine", "uploaded adapter_model.safetensors"] {
        assert!(first.stderr.contains(said), "{first}");
    }
    let card = file(&hub, "README.md");
    assert!(
        card.starts_with("---\nbase_model: \"acme/base\"\nlibrary_name: peft\n"),
        "{card}"
    );
    let command = "trainer chat --model acme/base --adapter acme/mine";
    assert!(card.contains(command) && card.contains("```toml"), "{card}");
    let config: Value = serde_json::from_str(&file(&hub, "adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], "acme/base");
    let here = dir.path("").display().to_string();
    assert!(!card.contains(&here) && !config.to_string().contains(&here));

    let again = run(&dir, &hub, push).succeeds().json();
    assert_eq!(again["commit"], json["commit"]);
    assert_eq!((&again["sent"], &again["stored"]), (&json!([]), &json!([])));

    let pulled = run(&dir, &hub, "pull acme/mine --json").succeeds().json();
    assert_eq!(pulled["kind"], "adapter");
    let path = pulled["path"].as_str().unwrap();
    let name = "adapter_model.safetensors";
    let bytes = |path: &str| fs::read(path).unwrap();
    let run_file = dir.path("run/adapter").join(name).display().to_string();
    assert_eq!(bytes(&format!("{path}/{name}")), bytes(&run_file));
    let text = run(&dir, &hub, "pull acme/mine --revision main").succeeds();
    assert_eq!(text.stdout, format!("{path}\n"));

    // the id is as good as the folder, everywhere and offline
    for command in [
        "eval --json --model model --data rows.jsonl --adapter",
        "generate --model model --prompt-ids 5,6 --max-new-tokens 3 --json --adapter",
    ] {
        let strip = |run: Run| {
            let mut json = run.succeeds().json();
            json.as_object_mut().unwrap().remove("tokens_per_second");
            json
        };
        let by_id = strip(dir.trainer_with(command, "acme/mine@main"));
        assert_eq!(by_id, strip(dir.trainer_with(command, "run/adapter")));
    }
    dir.trainer("merge --model model --adapter acme/mine=0.5 --out merged")
        .succeeds();
    let line = "train -q --model model --data rows.jsonl --output more --max-steps 1 \
                --set adapter.init_from=acme/mine";
    run(&dir, &hub, line).succeeds();
    assert!(dir.read("more/recipe.toml").contains("snapshots"), "pinned");
    no_file_has_token(&dir.path(""));
}

#[test]
fn a_merged_model_goes_to_a_private_branch() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    dir.trainer("merge --model model --adapter run/adapter --out merged")
        .succeeds();
    let line = "push merged --repo acme/mine --private --revision v1 --json";
    let json = run(&dir, &hub, line).succeeds().json();
    assert_eq!(json["revision"], "v1");
    assert!(hub.shelf.lock().unwrap().repos["acme/mine"].private);
    let eval = "eval --json --data rows.jsonl --model";
    let there = run(&dir, &hub, &format!("{eval} acme/mine@v1")).succeeds();
    let here = dir.trainer(&format!("{eval} merged")).succeeds();
    assert_eq!(there.json()["loss"], here.json()["loss"]);
    let card = |shelf: &crate::fake_hub::Shelf| {
        let card = shelf.file("acme/mine", "v1", "README.md").unwrap();
        String::from_utf8(card.to_vec()).unwrap()
    };
    let card = card(&hub.shelf.lock().unwrap());
    assert!(card.contains("library_name: transformers"), "{card}");
}

#[test]
fn a_base_that_is_a_folder_is_warned_of_and_kept_out_of_the_card() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    let pushed = run(&dir, &hub, "push run/adapter --repo acme/mine").succeeds();
    assert!(
        pushed
            .stderr
            .contains("warning: the base model is named as a folder"),
        "{pushed}"
    );
    assert!(
        pushed.stderr.contains("--base-model owner/name"),
        "{pushed}"
    );
    let card = file(&hub, "README.md");
    assert!(
        !card.contains("base_model:"),
        "the Hub would refuse it: {card}"
    );
}

#[test]
fn a_push_that_failed_goes_on() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    let weights = fs::read(dir.path("run/adapter/adapter_model.safetensors")).unwrap();
    let sum = checksum("adapter_model.safetensors", &weights);
    hub.change(|shelf| shelf.faults = vec![(sum.clone(), Fault::Refuse)]);
    let push = "push run --repo acme/mine --json";
    let parts = [
        "cannot upload adapter_model.safetensors",
        "403: refused",
        "HF_TOKEN",
    ];
    run(&dir, &hub, push).fails(1, &parts);
    hub.change(|shelf| shelf.faults = vec![(sum, Fault::Cut)]);
    let json = run(&dir, &hub, push).succeeds().json();
    assert_eq!(json["created"], json!(false));
}

#[test]
fn what_cannot_be_pushed_is_refused() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    let push = |what: &str| run(&dir, &hub, &format!("push {what}"));
    push("gone --repo a/b").fails(1, &["there is no folder gone"]);
    dir.write("empty/notes.txt", "");
    push("empty --repo a/b").fails(1, &["neither an adapter", "config.json"]);
    dir.write("begun/recipe.toml", "");
    push("begun --repo a/b").fails(1, &["saved nothing", "--resume begun"]);
    push("run --repo name").fails(2, &["owner/name"]);
    push("run --repo a/b@v1").fails(2, &["--revision"]);
    push("run --repo a/b --base-model /x").fails(2, &["not an id"]);
    for (file, content, says) in [
        ("adapter_model.safetensors", "half", "is damaged"),
        ("adapter_config.json", "{", "is not valid"),
        ("adapter_config.json", "{}", "no peft_type"),
    ] {
        let path = format!("run/adapter/{file}");
        let before = fs::read(dir.path(&path)).unwrap();
        dir.write(&path, content);
        push("run --repo a/b").fails(1, &[says]);
        dir.write(&path, before);
    }
    fs::copy(dir.path("model/config.json"), dir.path("empty/config.json")).unwrap();
    push("empty --repo a/b").fails(1, &["empty has no"]);
    hub.change(|shelf| assert_eq!(shelf.requests, [""; 0]));
}

#[test]
fn the_hub_refuses_and_is_told_so() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    dir.trainer("push run --repo acme/mine")
        .fails(1, &["HF_HUB_OFFLINE is set"]);
    let mut anonymous = dir.command(&words("push run --repo acme/mine"));
    anonymous
        .env("HF_ENDPOINT", &hub.endpoint)
        .env_remove("HF_HUB_OFFLINE");
    finish(&mut anonymous).fails(1, &["there is no token", "HF_TOKEN"]);
    // the file of `hf auth login`
    dir.write(".huggingface/token", format!("{TOKEN}\n"));
    let logged_in = finish(&mut anonymous).succeeds();
    hides_token(&logged_in);

    hub.change(|shelf| shelf.read_only = true);
    run(&dir, &hub, "push run --repo acme/other").fails(1, &["403: You don't have the rights"]);
    run(&dir, &hub, "push run --repo acme/mine --private").fails(1, &["is public", "settings"]);
    hub.change(|shelf| {
        shelf.token = Some("hf_other");
        shelf.read_only = false;
    });
    run(&dir, &hub, "push run --repo acme/mine").fails(1, &["cannot create the repository"]);
    run(&dir, &hub, "pull acme/mine").fails(1, &["refuses access to acme/mine", "licence"]);
    let gone = [
        ("pull acme/none", "no model acme/none"),
        ("pull hf://datasets/acme/none", "no data set acme/none"),
    ];
    hub.change(|shelf| shelf.token = None);
    for (line, says) in gone {
        run(&dir, &hub, line).fails(1, &[says]);
    }
    run(&dir, &hub, "pull model").fails(1, &["is a folder on this machine"]);
    run(&dir, &hub, "pull name").fails(2, &["name is not an id of the Hub"]);
    run(&dir, &hub, "pull a/b@v1 --revision v2").fails(2, &["leave one of them out"]);
}

#[test]
fn data_sets_of_every_kind_stream_their_rows() {
    let dir = Dir::with_chat();
    let parquet = fixtures().join("../../../train/tests/fixtures/parquet/chats.parquet");
    let csv = "question,answer\nHi,Hello.\n\"2 + 2?\",4\n";
    let hub = FakeHub::start(&[
        ("a/rows.jsonl", dir.read("rows.jsonl").into_bytes()),
        ("b/rows.csv", csv.as_bytes().to_vec()),
        ("c/rows.parquet", fs::read(parquet).unwrap()),
    ]);
    let eval =
        "eval --json --model model --set data.max_length=200 --set data.truncate=right --data";
    for (file, rows) in [("a", 4), ("b", 2), ("c/rows.parquet", 2)] {
        let address = format!("hf://datasets/acme/tiny/{file}");
        let json = run(&dir, &hub, &format!("{eval} {address}"))
            .succeeds()
            .json();
        assert_eq!(json["rows"], json!(rows), "{file}");
    }
    let pulled = run(&dir, &hub, "pull hf://datasets/acme/tiny/a --json").succeeds();
    let json = pulled.json();
    assert_eq!(json["files"].as_array().unwrap().len(), 1);
    hub.change(|shelf| shelf.token = Some("hf_other"));
    let parts = [
        "refuses access to acme/tiny",
        "the token gives no access",
        "licence on its page",
    ];
    run(&dir, &hub, &format!("{eval} hf://datasets/acme/tiny/b")).fails(1, &parts);
}

/// Sends Ctrl-C to a line when the Hub has begun to stall.
#[cfg(unix)]
fn interrupted(dir: &Dir, hub: &FakeHub, line: &str) -> std::process::Output {
    let mut command = dir.piped(&words(line));
    command.env("HF_ENDPOINT", &hub.endpoint);
    command.env("HF_TOKEN", TOKEN).env_remove("HF_HUB_OFFLINE");
    let mut child = command.spawn().unwrap();
    while !hub.shelf.lock().unwrap().faults.is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    crate::support::send(&child, libc::SIGINT);
    child.wait_with_output().unwrap()
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_a_transfer_to_go_on_with() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    let says = |output: &std::process::Output, parts: &[&str]| {
        assert_eq!(output.status.code(), Some(130));
        assert_eq!(output.stdout, b"{\"interrupted\":true}\n");
        let stderr = String::from_utf8_lossy(&output.stderr);
        for part in parts {
            assert!(stderr.contains(part), "{part}: {stderr}");
        }
    };
    let again = "give the same command to go on";
    let name = "adapter_model.safetensors";
    let weights = fs::read(dir.path("run/adapter").join(name)).unwrap();
    let sum = checksum(name, &weights);
    hub.change(|shelf| shelf.faults = vec![(sum, Fault::Stall)]);
    let push = "push run --repo acme/mine --json";
    let stopped = interrupted(&dir, &hub, push);
    says(&stopped, &["acme/mine together or not at all", again]);
    let is_there = |name| {
        hub.shelf
            .lock()
            .unwrap()
            .file("acme/mine", "main", name)
            .is_some()
    };
    assert!(!is_there("adapter_config.json"));
    run(&dir, &hub, push).succeeds();
    assert!(is_there("adapter_config.json") && is_there(name));

    hub.change(|shelf| shelf.faults = vec![(name.into(), Fault::Stall)]);
    let pull = "pull acme/mine --json";
    says(&interrupted(&dir, &hub, pull), &["is kept", again]);
    dir.trainer(pull).fails(1, &["is not in the cache"]);
    let path = run(&dir, &hub, pull).succeeds().json()["path"].clone();
    let pulled = Path::new(path.as_str().unwrap()).join(name);
    assert_eq!(fs::read(pulled).unwrap(), weights);
}

#[cfg(unix)]
#[test]
fn ctrl_c_while_a_model_is_downloaded_ends_any_command() {
    let (dir, hub) = (Dir::with_adapter(), FakeHub::listen(0));
    run(&dir, &hub, "push model --repo acme/base").succeeds();
    for line in [
        "eval --model acme/base --data rows.jsonl",
        "generate --model acme/base --prompt-ids 1",
        "merge --model acme/base --adapter run/adapter --out merged",
        "plan --model acme/base --data rows.jsonl",
        "quantize --model acme/base --format nf4 --out small",
        "train --model acme/base --data rows.jsonl --output other",
    ] {
        hub.change(|shelf| shelf.faults = vec![("config.json".into(), Fault::Stall)]);
        let output = interrupted(&dir, &hub, &format!("{line} --json"));
        assert_eq!(output.status.code(), Some(130), "{line}");
        assert_eq!(output.stdout, b"{\"interrupted\":true}\n", "{line}");
    }
    let names = ["merged", "small", "other"];
    assert!(!names.iter().any(|name| dir.has(name)));
}
