//! Where results cannot go.

use std::fs;

use crate::support::{Dir, finish, words};

const TRAIN: &str = "train -q --model model --data rows.jsonl --max-steps 1 --output";

#[test]
fn an_output_folder_with_something_in_it() {
    let dir = Dir::with_tokens();
    dir.write("run/notes.txt", "mine");
    dir.trainer(&format!("{TRAIN} run"))
        .fails(1, &["run is not empty", "--resume"]);
    assert_eq!(dir.names("run"), ["notes.txt"]);
    dir.trainer(&format!("{TRAIN} rows.jsonl"))
        .fails(1, &["rows.jsonl"]);
    fs::create_dir(dir.path("empty")).unwrap();
    dir.trainer(&format!("{TRAIN} empty")).succeeds();
    dir.trainer(&format!("{TRAIN} empty"))
        .fails(1, &["empty is not empty"]);
}

#[test]
fn an_output_below_a_file() {
    let dir = Dir::with_tokens();
    dir.trainer(&format!("{TRAIN} rows.jsonl/run"))
        .fails(1, &["rows.jsonl/run"]);
    let line = "eval --model model --data rows.jsonl --per-token rows.jsonl/out";
    dir.trainer(line)
        .fails(1, &["there is no folder rows.jsonl"]);
    let line = "eval --model model --data rows.jsonl --per-token gone/out --json";
    dir.trainer(line).fails(1, &["there is no folder gone"]);
    dir.trainer("eval --model model --data rows.jsonl --per-token model")
        .fails(1, &["model"]);
    assert_eq!(dir.names("."), ["model", "rows.jsonl"]);
}

#[cfg(unix)]
#[test]
fn a_folder_that_may_not_be_written() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Dir::with_tokens();
    fs::create_dir(dir.path("locked")).unwrap();
    let mode = |mode| fs::set_permissions(dir.path("locked"), fs::Permissions::from_mode(mode));
    mode(0o555).unwrap();
    if fs::write(dir.path("locked/probe"), "").is_ok() {
        return; // root may write everywhere
    }
    dir.trainer(&format!("{TRAIN} locked/run"))
        .fails(1, &["locked/run"]);
    dir.trainer(&format!("{TRAIN} locked"))
        .fails(1, &["locked"]);
    mode(0o755).unwrap();
    assert_eq!(dir.names("locked"), [""; 0]);
}

#[test]
fn resuming_what_is_no_run() {
    let dir = Dir::with_tokens();
    dir.trainer("train --resume gone")
        .fails(2, &["gone is not the folder of a run", "gone/recipe.toml"]);
    dir.trainer("train --resume model")
        .fails(2, &["model is not the folder of a run"]);
    let recipe = dir
        .trainer("train --print-recipe --model model --data rows.jsonl")
        .succeeds();
    dir.write("run/recipe.toml", &recipe.stdout);
    let line = "train --resume run --rank 3";
    dir.trainer(line).fails(2, &["--resume", "--rank"]);
    let line = "train --resume run --set output.dir=there";
    dir.trainer(line)
        .fails(2, &["--resume goes on in its own folder"]);
    assert_eq!(dir.names("run"), ["recipe.toml"]);
    // a result without the checkpoints that led to it is not overwritten
    dir.write("run/adapter/adapter_config.json", "mine");
    dir.trainer("train --resume run")
        .fails(1, &["run has no complete checkpoint", "recipe.toml"]);
    assert_eq!(dir.read("run/adapter/adapter_config.json"), "mine");
}

/// Order and split of the rows follow from the rows themselves.
#[test]
fn resuming_on_other_rows() {
    let dir = Dir::with_tokens();
    dir.trainer(&format!("{TRAIN} run --set train.save_every=1"))
        .succeeds();
    let before = dir.names("run/checkpoints");
    let rows = fs::read_to_string(dir.path("rows.jsonl")).unwrap();
    dir.write("rows.jsonl", rows.replacen("[3,8", "[4,8", 1));
    assert_ne!(fs::read_to_string(dir.path("rows.jsonl")).unwrap(), rows);
    dir.trainer("train --resume run")
        .fails(1, &["the rows differ", "step-000001", "init_from"]);
    assert_eq!(dir.names("run/checkpoints"), before);
    dir.write("rows.jsonl", &rows);
    dir.trainer("train --resume run").succeeds();
}

/// A reader who goes away, as `| head` does, is no failure; a full disk is one.
#[cfg(target_os = "linux")]
#[test]
fn results_that_nobody_can_take() {
    let dir = Dir::with_tokens();
    let eval = words("eval --model model --data rows.jsonl");
    let full = || {
        fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let closed = finish(dir.command(&eval).stdout(writer)).succeeds();
    assert!(!closed.stderr.contains("panicked"), "{closed}");
    let lost = finish(dir.command(&eval).stdout(full()));
    lost.fails(1, &["cannot write the result to stdout"]);
    // a log that cannot be written does not end a run
    let train = TRAIN.replace(" -q", "") + " run";
    finish(dir.command(&words(&train)).stderr(full())).succeeds();
}
