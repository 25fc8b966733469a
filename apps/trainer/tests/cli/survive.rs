//! Runs that are killed, stopped, left without space, fed with bad numbers, or asked to change.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Dir, finish, send, timeless, token_rows, words};

/// Everything that could go wrong when a run goes on, and no end in sight. The learning rate does
/// not depend on how long the run is.
const ENDLESS: &str = "train --model model --data rows.jsonl --eval-data eval.jsonl --rank 2 \
    --set adapter.dropout=0.1 --set train.micro_batch_size=2 \
    --set train.gradient_accumulation_steps=2 --set train.eval_every=4 \
    --set train.lr_schedule=constant --set train.warmup_steps=2 --set train.learning_rate=1e-2 \
    --max-steps 1000000";

fn with_rows() -> Dir {
    let dir = Dir::with_tokens();
    dir.write("rows.jsonl", token_rows(15));
    dir.write("eval.jsonl", token_rows(3));
    dir
}

/// [`ENDLESS`] with an end.
fn until(steps: u64) -> String {
    ENDLESS.replace("1000000", &steps.to_string())
}

fn silent(mut command: Command) -> Command {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn num_lines(dir: &Dir, run: &str) -> usize {
    let text = fs::read(dir.path(&format!("{run}/metrics.jsonl"))).unwrap_or_default();
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// Waits until a run has written this many lines of metrics.
fn wait_for(dir: &Dir, run: &str, lines: usize) {
    let start = Instant::now();
    while num_lines(dir, run) < lines {
        let waited = start.elapsed();
        assert!(waited < Duration::from_secs(300), "{lines} lines: never");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Both runs came to the same end the same way.
#[track_caller]
fn assert_same(dir: &Dir, one: &str, other: &str) {
    let metrics = |run: &str| timeless(dir.lines(&format!("{run}/metrics.jsonl")));
    assert_eq!(metrics(one), metrics(other));
    let weights = "adapter_model.safetensors";
    for folder in ["adapter", "best"] {
        let bytes = |run: &str| fs::read(dir.path(&format!("{run}/{folder}/{weights}"))).unwrap();
        assert!(bytes(one) == bytes(other), "{folder}");
    }
}

#[test]
fn a_run_that_is_stopped_by_a_signal_goes_on_as_if_it_had_not_been() {
    let dir = with_rows();
    for (name, signal) in [
        ("int", libc::SIGINT),
        ("term", libc::SIGTERM),
        ("hup", libc::SIGHUP),
    ] {
        let line = format!("{ENDLESS} --json --set train.save_every=1000 --output {name}");
        let child = dir.piped(&words(&line)).spawn().unwrap();
        wait_for(&dir, name, 9);
        send(&child, signal);
        if signal == libc::SIGHUP {
            send(&child, signal); // a terminal and its shell both send it
        }
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{name}: {stderr}");
        assert!(stderr.contains("saving and stopping"), "{stderr}");
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        let step = json["steps"].as_u64().unwrap();
        let told = (&json["interrupted"], &json["adapter"]);
        assert_eq!(told, (&json!(true), &Value::Null));
        let checkpoint = format!("step-{step:06}");
        assert_eq!(dir.names(&format!("{name}/checkpoints")), [checkpoint]);
        assert!(!dir.has(&format!("{name}/adapter")));

        let steps = step + 5;
        let line = format!("train --resume {name} --json --max-steps {steps}");
        let resumed = dir.trainer(&line).succeeds().json();
        assert_eq!(resumed["steps"], json!(steps));
        let whole = format!("{} -q --output {name}-whole", until(steps));
        dir.trainer(&whole).succeeds();
        assert_same(&dir, name, &format!("{name}-whole"));
    }
}

/// Its steps take so long that the second signal comes before the first is heeded.
#[test]
fn a_run_that_is_left_at_once_says_what_is_complete() {
    let dir = with_rows();
    dir.write("rows.jsonl", token_rows(20_000));
    for (name, signal, save_every) in [("int", libc::SIGINT, 1), ("term", libc::SIGTERM, 1000)] {
        let line = format!(
            "{ENDLESS} --json --output {name} --set train.micro_batch_size=32 \
             --set train.save_every={save_every} --set train.eval_every=1000 --set output.samples=0"
        );
        let child = dir.piped(&words(&line)).spawn().unwrap();
        wait_for(&dir, name, 2);
        send(&child, signal);
        std::thread::sleep(Duration::from_millis(350)); // not the same wish
        send(&child, signal);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{name}: {stderr}");
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["interrupted"], json!(true), "{json}");
        let checkpoint = json["checkpoint"].as_str();
        assert_eq!(checkpoint.is_some(), save_every == 1, "{json}");
        assert!(checkpoint.is_none_or(|path| dir.has(path)), "{json}");
        assert!(dir.has(&format!("{name}/report.html")), "{stderr}");
        assert_eq!(
            dir.json(&format!("{name}/run.json"))["sessions"][0]["end"],
            "interrupted"
        );
    }
}

/// Nothing has begun yet, and nothing is left behind.
#[test]
fn a_run_that_is_stopped_before_its_first_step_says_so() {
    let dir = with_rows();
    dir.write("rows.jsonl", token_rows(400_000));
    let line = format!("{ENDLESS} --json --output run");
    let child = dir.piped(&words(&line)).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(400)); // it reads rows
    send(&child, libc::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(output.stdout, b"{\"interrupted\":true}\n");
    assert!(!dir.has("run"));
}

#[test]
fn a_run_that_goes_on_may_show_more_samples_and_find_its_rows_elsewhere() {
    let dir = Dir::with_chat();
    let line = "train -q --model model --data rows.jsonl --max-steps 1 --output run \
                --set output.samples=1";
    dir.trainer(line).succeeds();
    let before = dir.json("run/run.json")["samples"][0]["before"].clone();
    fs::rename(dir.path("rows.jsonl"), dir.path("moved.jsonl")).unwrap();
    let line = "train -q --resume run --max-steps 2 --set output.samples=3 --data moved.jsonl";
    dir.trainer(line).succeeds();
    let facts = dir.json("run/run.json");
    let samples = facts["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3);
    assert_eq!(samples[0]["before"], before);
    assert_eq!(samples[2]["before"], Value::Null, "nobody asked then");
    assert!(
        samples
            .iter()
            .all(|sample| sample["after"]["text"].is_string())
    );
    dir.trainer("train -q --resume run --max-steps 3 --set output.samples=1")
        .succeeds();
    assert_eq!(
        dir.json("run/run.json")["samples"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    dir.trainer("train --resume run --rank 4")
        .fails(2, &["--resume", "--max-steps, --epochs, --data"]);
}

/// `nohup` and `disown -h`: the terminal may go.
#[test]
fn a_run_that_ignores_the_end_of_its_terminal_goes_on() {
    use std::os::unix::process::CommandExt;
    let dir = with_rows();
    let mut command = silent(dir.command(&words(&format!("{ENDLESS} --output run"))));
    // SAFETY: `signal` may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    wait_for(&dir, "run", 2);
    send(&child, libc::SIGHUP);
    let before = num_lines(&dir, "run");
    wait_for(&dir, "run", before + 5);
    send(&child, libc::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// Kills at moments that a fixed seed decides, as far as the machine keeps time.
#[test]
fn a_run_that_is_killed_again_and_again_comes_to_the_same_end() {
    let dir = with_rows();
    let line = format!("{} -q --set train.save_every=1", until(30));
    let start = Instant::now();
    dir.trainer(&format!("{line} --output whole")).succeeds();
    let usual = start.elapsed();
    let mut random = 12_345_u64;
    let mut newest = String::new();
    for _ in 0..6 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let part = (random >> 40) as f64 / (1 << 24) as f64;
        let line = match dir.has("cut/recipe.toml") {
            true => "train -q --resume cut".into(),
            false => format!("{line} --output cut"),
        };
        let child = silent(dir.command(&words(&line))).spawn().unwrap();
        std::thread::sleep(usual.mul_f64(part));
        kill(child);
        if dir.has("cut/checkpoints") {
            let now = dir.names("cut/checkpoints").pop().unwrap_or_default();
            assert!(now >= newest, "{newest} was lost: {now}");
            newest = now;
        }
    }
    let line = match dir.has("cut/recipe.toml") {
        true => "train -q --resume cut".into(),
        false => format!("{line} --output cut"),
    };
    dir.trainer(&line).succeeds();
    assert_same(&dir, "cut", "whole");
    let hidden = |folder: &str| {
        let names = dir.names(folder).into_iter();
        names.filter(|name| name.starts_with('.')).count()
    };
    assert_eq!((hidden("cut"), hidden("cut/checkpoints")), (1, 0)); // the lock
}

#[test]
fn a_run_that_was_killed_before_its_first_checkpoint_begins_again() {
    let dir = with_rows();
    let line = format!("{ENDLESS} --set train.save_every=1000000 --output run");
    let child = silent(dir.command(&words(&line))).spawn().unwrap();
    wait_for(&dir, "run", 3);
    kill(child);
    let text = dir.read("run/metrics.jsonl");
    dir.write("run/metrics.jsonl", text + "{\"kind\":\"tra");
    // what is said leads on
    dir.trainer(&line)
        .fails(1, &["run is not empty", "--resume"]);
    let line = "train --resume run --max-steps 6";
    let run = dir.trainer(line).succeeds();
    assert!(
        run.stderr.contains("begins again from the first step"),
        "{run}"
    );
    dir.trainer(&format!("{} -q --output whole", until(6)))
        .succeeds();
    assert_same(&dir, "run", "whole");
}

#[test]
fn two_processes_cannot_train_in_one_folder() {
    let dir = with_rows();
    let line = format!("{ENDLESS} --set train.save_every=1 --output run");
    let child = silent(dir.command(&words(&line))).spawn().unwrap();
    wait_for(&dir, "run", 3);
    dir.trainer("train --resume run")
        .fails(1, &["run is in use", "another process"]);
    let (before, checkpoints) = (num_lines(&dir, "run"), dir.has("run/checkpoints"));
    wait_for(&dir, "run", before + 2); // it has not minded
    kill(child);
    assert!(checkpoints);
    let newest = dir.names("run/checkpoints").pop().unwrap();
    let step: u64 = newest.strip_prefix("step-").unwrap().parse().unwrap();
    dir.trainer(&format!("train -q --resume run --max-steps {}", step + 2))
        .succeeds();
    // nor does what a kill leaves at the very start keep a run from beginning
    dir.write("early/.lock", "");
    dir.write("early/.part-x1", "half a recipe");
    dir.trainer(&format!("{} -q --output early", until(1)))
        .succeeds();
}

/// The program with a limit on how large a file may become: what does not fit fails as on a full
/// disk.
#[cfg(target_os = "linux")]
fn with_limit(dir: &Dir, line: &str, bytes: u64) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = dir.command(&words(line));
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: `setrlimit` only reads the structure that it is given.
    unsafe {
        command.pre_exec(move || {
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
            Ok(())
        });
    }
    command
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_loses_nothing() {
    let dir = with_rows();
    let line = format!("{} --set train.save_every=20", until(240));
    dir.trainer(&format!("{line} -q --output whole")).succeeds();
    let resume = ["free space", "go on with: trainer train --resume"];

    // no room for an adapter
    let run = finish(&mut with_limit(
        &dir,
        &format!("{line} --output small"),
        10_000,
    ));
    run.fails(1, &[&["cannot write small/"], &resume[..]].concat());
    let hidden = |name: &String| name.starts_with('.') && name != ".lock";
    assert!(!dir.names("small").iter().any(hidden));
    // no room for the metrics, after some checkpoints
    let run = finish(&mut with_limit(
        &dir,
        &format!("{line} --output large"),
        30_000,
    ));
    run.fails(
        1,
        &[&["cannot write large/metrics.jsonl"], &resume[..]].concat(),
    );
    let lines = dir.lines("large/metrics.jsonl"); // whole lines
    assert!((80..200).contains(&lines.len()), "{}", lines.len());
    let checkpoints = dir.names("large/checkpoints");
    assert!(checkpoints.len() == 2 && !checkpoints.iter().any(hidden));

    for name in ["small", "large"] {
        dir.trainer(&format!("train -q --resume {name}")).succeeds();
        assert_same(&dir, name, "whole");
    }
}

#[test]
fn what_decides_the_numbers_stays_as_the_run_began() {
    let dir = with_rows();
    let line = format!("{} -q --set train.save_every=2 --output run", until(4));
    dir.trainer(&line).succeeds();
    let recipe = dir.read("run/recipe.toml");
    let edited = recipe
        .replace("rank = 2", "rank = 4")
        .replace("micro_batch_size = 2", "micro_batch_size = 1")
        .replace("learning_rate = 0.01", "learning_rate = 0.02");
    dir.write("run/recipe.toml", edited);
    let parts = [
        "adapter.rank cannot change any more: the run began with 2, and it is 4 now",
        "train.learning_rate cannot change any more",
        "train.micro_batch_size cannot change any more",
    ];
    dir.trainer("train --resume run").fails(2, &parts);
    dir.write("run/recipe.toml", &recipe);
    dir.trainer("train --resume run --set train.seed=7 --set train.lr_schedule=linear")
        .fails(2, &["train.seed cannot", "train.lr_schedule cannot"]);
    dir.trainer("train --resume run --set train.sed=7")
        .fails(2, &["train.sed"]);
    assert_eq!(dir.read("run/recipe.toml"), recipe);

    // how long it is and what is kept of it may change, by hand or on the command line
    dir.write(
        "run/recipe.toml",
        recipe.replace("keep_checkpoints = 2", "keep_checkpoints = 5"),
    );
    let line = "train -q --resume run --max-steps 8 --set train.save_every=1";
    dir.trainer(line).succeeds();
    let kept: Vec<_> = (4..=8).map(|step| format!("step-{step:06}")).collect();
    let best = dir.lines("run/metrics.jsonl");
    assert_eq!(best.last().unwrap()["step"], json!(8));
    assert!(
        kept.iter()
            .all(|name| dir.has(&format!("run/checkpoints/{name}")))
    );
    let recipe = dir.read("run/recipe.toml");
    assert!(recipe.contains("max_steps = 8") && recipe.contains("save_every = 1"));
    dir.trainer(&format!("{} -q --output whole", until(8)))
        .succeeds();
    assert_same(&dir, "run", "whole");

    // a folder may be moved
    fs::rename(dir.path("run"), dir.path("moved")).unwrap();
    dir.trainer("train -q --resume moved --max-steps 9")
        .succeeds();
    assert!(!dir.has("run"));
}

/// A model whose token 2, which no other row has, is no number.
fn with_bad_token() -> Dir {
    let dir = Dir::with_tokens();
    let path = dir.path("model/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + size]).unwrap();
    let start = &header["model.embed_tokens.weight"]["data_offsets"][0];
    let at = 8 + size + start.as_u64().unwrap() as usize + 2 * 32 * size_of::<f32>();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path, bytes).unwrap();
    dir
}

const IN_ORDER: &str = "train --model model --rank 2 --set data.shuffle=false --set data.packing=false \
    --set train.micro_batch_size=1 --set train.learning_rate=1e-2 --set train.warmup_steps=0 \
    --set train.lr_schedule=constant";

#[test]
fn a_step_without_numbers_is_skipped_and_changes_nothing() {
    let dir = with_bad_token();
    let good = dir.read("rows.jsonl");
    let good: Vec<&str> = good.lines().collect();
    let bad = "{\"input_ids\": [2, 5, 9]}";
    let rows = [&good[..2], &[bad, bad], &good[2..5], &[bad], &good[5..]].concat();
    dir.write("bad.jsonl", rows.join("\n"));
    let line = format!(
        "{IN_ORDER} --data bad.jsonl --set train.save_every=1 --set train.keep_checkpoints=20"
    );
    let run = dir
        .trainer(&format!("{line} --max-steps 11 --output run"))
        .succeeds();
    let told = "warning: step 4 is skipped (2 in a row): the output of model.embed_tokens, and so the loss of this step is not a finite number";
    assert!(run.stderr.contains(told), "{run}");
    let lines = dir.lines("run/metrics.jsonl");
    let kinds: Vec<_> = lines
        .iter()
        .map(|line| line["kind"].as_str().unwrap())
        .collect();
    let (t, s) = ("train", "skipped");
    assert_eq!(kinds, [t, t, s, s, t, t, t, s, t, t, t]);
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(line["step"], json!(index + 1));
        let epoch = line["epoch"].as_f64().unwrap();
        assert!((11.0 * epoch - (index + 1) as f64).abs() < 1e-9, "{line}");
        assert!(line["kind"] == s || line["loss"].is_f64());
    }
    assert_eq!(
        (&lines[3]["skipped"], &lines[7]["skipped"]),
        (&json!(2), &json!(3))
    );
    let reason =
        "the output of model.embed_tokens, and so the loss of this step is not a finite number";
    assert_eq!(lines[7]["reason"], reason);
    assert!(
        !dir.has("run/checkpoints/step-000003"),
        "in doubt until a good step"
    );

    // as if those rows were not there
    dir.trainer(&format!(
        "{IN_ORDER} -q --data rows.jsonl --max-steps 8 --output without"
    ))
    .succeeds();
    let weights =
        |run: &str| fs::read(dir.path(&format!("{run}/adapter/adapter_model.safetensors")));
    assert!(weights("run").unwrap() == weights("without").unwrap());

    // a run that goes on counts on
    dir.trainer(&format!("{line} -q --max-steps 4 --output cut"))
        .succeeds();
    dir.trainer("train -q --resume cut --max-steps 11")
        .succeeds();
    let metrics = |run: &str| {
        let mut lines = timeless(dir.lines(&format!("{run}/metrics.jsonl")));
        lines.iter_mut().for_each(|line| {
            line.as_object_mut().unwrap().remove("seconds");
        });
        lines
    };
    assert_eq!(metrics("run"), metrics("cut"));
    assert!(weights("run").unwrap() == weights("cut").unwrap());
}

#[test]
fn five_skipped_steps_in_a_row_end_the_run_with_what_was_good() {
    let dir = with_bad_token();
    let bad = "{\"input_ids\": [2, 5, 9]}\n";
    dir.write("bad.jsonl", token_rows(3) + &bad.repeat(6) + &token_rows(3));
    let line = format!("{IN_ORDER} --data bad.jsonl --max-steps 12 --output run");
    let parts = [
        "the loss of step 4 is not a finite number, and the 4 steps after it went no better",
        "the last good weights are saved in run/adapter",
        "the last good checkpoint is run/checkpoints/step-000008",
        "train.learning_rate",
    ];
    dir.trainer(&line).fails(1, &parts);
    let lines = dir.lines("run/metrics.jsonl");
    assert_eq!((lines.len(), &lines[7]["skipped"]), (8, &json!(5)));
    dir.trainer(&format!(
        "{IN_ORDER} -q --data rows.jsonl --max-steps 3 --output good"
    ))
    .succeeds();
    let weights =
        |run: &str| fs::read(dir.path(&format!("{run}/adapter/adapter_model.safetensors")));
    assert!(weights("run").unwrap() == weights("good").unwrap());
    let run = dir.trainer(&format!(
        "{} --set train.save_every=1",
        line.replace("run", "again")
    ));
    let go_on = "go on behind these rows with: trainer train --resume again";
    run.fails(1, &[go_on, "--set adapter.init_from=again/adapter"]);
    // it was the data and is over soon
    dir.trainer("train -q --resume run").succeeds();
    assert_eq!(dir.lines("run/metrics.jsonl").len(), 12);

    // where no step was good, nothing is
    dir.write("bad.jsonl", bad);
    dir.trainer(&line.replace("run", "none")).fails(
        1,
        &[
            "the loss of step 1",
            "no weights are saved, there is no checkpoint",
        ],
    );
    assert!(!dir.has("none/adapter") && !dir.has("none/checkpoints"));
}

/// Here it is the weights: those from before the update are the last good ones.
#[test]
fn weights_that_give_no_numbers_are_not_called_good() {
    let dir = Dir::with_tokens();
    let line = "train --model model --data rows.jsonl --output run --max-steps 30 \
                --set train.learning_rate=1e30 --set train.save_every=1";
    let parts = [
        "the loss of step 3 is not a finite number, and the 4 steps after it went no better",
        "the last good weights are saved in run/adapter",
        "the last good checkpoint is run/checkpoints/step-000001",
        "begin anew: trainer train run/recipe.toml --output ANOTHER --set train.learning_rate=LOWER",
    ];
    dir.trainer(&format!("{line} -q")).fails(1, &parts);
    let lines = dir.lines("run/metrics.jsonl");
    assert!(
        lines
            .iter()
            .all(|line| line["kind"] == "skipped" || line["loss"].is_f64())
    );
    assert_eq!(dir.names("run/checkpoints"), ["step-000001", "step-000002"]);
    let loss = "eval --json --model model --adapter run/adapter --data rows.jsonl";
    assert!(dir.trainer(loss).succeeds().json()["loss"].is_f64());
    // nor when the run is over before it has been five
    let line = line.replace("steps 30", "steps 4").replace("run", "short");
    dir.trainer(&line)
        .fails(1, &["the loss of step 3", "short/adapter"]);
}

#[test]
fn a_loss_that_jumps_is_marked() {
    let dir = Dir::with_tokens();
    let all = token_rows(2);
    let (often, once) = all.split_once('\n').unwrap();
    let rows = format!("{often}\n").repeat(11) + once;
    dir.write("rows.jsonl", rows);
    let line = "train --model model --data rows.jsonl --output run --max-steps 12 --method full \
                --set data.shuffle=false --set data.packing=false --set train.micro_batch_size=1 \
                --set train.learning_rate=2e-2 --set train.warmup_steps=0";
    let run = dir.trainer(line).succeeds();
    let mut mean = None;
    let mut spikes = 0;
    for line in dir.lines("run/metrics.jsonl") {
        let loss = line["loss"].as_f64().unwrap();
        let before = mean.unwrap_or(loss);
        let is_spike = loss > 3.0 * before;
        mean = Some(before + 0.2 * (loss - before));
        let mark = line.get("spike");
        assert_eq!(mark, is_spike.then_some(&json!(true)), "{line}");
        let shown = format!(
            "step {}/12  loss {loss:.4}{}",
            line["step"],
            if is_spike { " (spike)" } else { "  lr" }
        );
        assert!(run.stderr.contains(&shown), "{shown}: {run}");
        spikes += usize::from(is_spike);
    }
    assert_eq!(spikes, 1, "the case is chosen so: {run}");
}

#[test]
fn a_run_cannot_become_shorter_than_it_is() {
    let dir = Dir::with_tokens();
    let line = "train --model model --data rows.jsonl --output run --max-steps 4";
    dir.trainer(line).succeeds();
    let before = dir.read("run/recipe.toml");
    dir.trainer("train --resume run --max-steps 3")
        .fails(2, &["come to 3 steps", "has taken 4"]);
    assert_eq!(dir.read("run/recipe.toml"), before);
    dir.trainer("train --resume run --max-steps 5").succeeds();
    assert_eq!(dir.lines("run/metrics.jsonl").len(), 5);
}

#[test]
fn a_run_that_is_all_warm_up_is_told() {
    let dir = Dir::with_tokens();
    let line = "--model model --data rows.jsonl --epochs 1";
    let plan = dir
        .trainer(&format!("plan --json {line}"))
        .succeeds()
        .json();
    let problems = plan["problems"].to_string();
    assert!(problems.contains("all warm-up"), "{problems}");
    let run = dir
        .trainer(&format!("train {line} --output run"))
        .succeeds();
    for part in [
        "warning: the run is all warm-up",
        "warning: a step takes 4 packed sequences, and there are 1",
    ] {
        assert!(run.stderr.contains(part), "{part}: {run}");
    }
}
