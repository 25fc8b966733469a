use std::ffi::OsStr;

use crate::support::Dir;

#[test]
fn words_that_are_not_known() {
    let dir = Dir::with_tokens();
    dir.trainer("tran")
        .fails(2, &["unrecognized subcommand 'tran'", "train"]);
    dir.trainer("train --modle model")
        .fails(2, &["unexpected argument '--modle'", "--model"]);
    dir.trainer("devices please").fails(2, &["'please'"]);
    dir.trainer("eval --model model")
        .fails(2, &["required", "--data"]);
    dir.trainer("eval --data rows.jsonl --json")
        .fails(2, &["--model"]);
    dir.trainer("train -q -v")
        .fails(2, &["--quiet", "--verbose"]);
    dir.trainer("train one.toml two.toml")
        .fails(2, &["'two.toml'"]);
    dir.trainer("devices --device").fails(2, &["--device"]);
}

#[test]
fn flags_that_are_keys_of_a_recipe() {
    let dir = Dir::with_tokens();
    for (flag, help) in [
        ("--learning-rate 3e-4", "--set train.learning_rate=VALUE"),
        ("--lr=3e-4", "--set train.learning_rate=VALUE"),
        ("--batch-size 3", "--set train.micro_batch_size=VALUE"),
        ("--load-in-4bit", "--set quantization.format=nf4"),
        ("--double-quant", "--set quantization.double_quant=VALUE"),
        ("--wandb", "trainer COMMAND --help"),
    ] {
        for command in ["train", "plan"] {
            dir.trainer(&format!("{command} --model model {flag}"))
                .fails(2, &["unexpected argument", "help: ", help]);
        }
    }
    dir.trainer("generate --model model --prompt-ids 5 --lr 1")
        .fails(2, &["'--lr'", "trainer COMMAND --help"]);
}

#[test]
fn help_and_version_are_no_errors() {
    let dir = Dir::new();
    for line in [
        "--help",
        "train --help",
        "eval -h",
        "generate --help",
        "chat --help",
        "plan --help",
        "--version",
    ] {
        let run = dir.trainer(line).succeeds();
        assert!(!run.stdout.is_empty() && run.stderr.is_empty(), "{run}");
    }
}

#[test]
fn help_leaves_out_what_means_nothing_to_a_command() {
    let dir = Dir::new();
    for (command, flags, others) in [
        ("report", &["--device", "--no-tui"][..], &["--json"][..]),
        ("push", &["--device", "--no-tui"], &["--json"]),
        ("pull", &["--device", "--no-tui"], &["--json"]),
        ("chat", &["--json", "--no-tui"], &["--device"]),
        ("eval", &["--no-tui"], &["--device", "--json"]),
        (
            "train",
            &[],
            &["--device", "--json", "--no-tui", "nf4 or fp4"],
        ),
    ] {
        let help = dir.trainer(&format!("{command} --help")).succeeds().stdout;
        for flag in flags {
            assert!(!help.contains(flag), "{command} {flag}: {help}");
        }
        for other in others {
            assert!(help.contains(other), "{command} {other}: {help}");
        }
    }
    // they are taken all the same, on both sides of the command
    for line in [
        "--json report gone --device cpu",
        "--device cpu --no-tui report gone",
    ] {
        dir.trainer(line).fails(1, &["gone does not exist"]);
    }
    dir.trainer("--device gpu report gone")
        .fails(2, &["no device \"gpu\""]);
    dir.trainer("report gone --device gpu")
        .fails(2, &["no device \"gpu\""]);
    dir.trainer("chat --model gone --json")
        .fails(2, &["a chat has no JSON form"]);
}

#[test]
fn prompts_that_cannot_be_continued() {
    let dir = Dir::with_tokens();
    let line = "generate --model model";
    dir.trainer(line).fails(2, &["--prompt"]);
    dir.trainer(&format!("{line} --prompt Hi"))
        .fails(1, &["model has no tokenizer.json", "--prompt-ids"]);
    dir.trainer(&format!("{line} --prompt Hi --chat"))
        .fails(1, &["model has no tokenizer.json"]);
    dir.trainer(&format!("{line} --prompt Hi --prompt-ids 5"))
        .fails(2, &["--prompt-ids"]);
    dir.trainer(&format!("{line} --prompt-ids 5 --chat"))
        .fails(2, &["--chat"]);
    dir.trainer(&format!("{line} --prompt-ids 5,x"))
        .fails(2, &["--prompt-ids", "'x'"]);
    dir.trainer(&format!("{line} --prompt-ids 5,,6"))
        .fails(2, &["--prompt-ids"]);
    dir.trainer(&format!("{line} --prompt-ids 5,96"))
        .fails(1, &["token id 96", "96 tokens"]);
    dir.trainer(&format!("{line} --prompt-ids 5,-1"))
        .fails(1, &["token id -1"]);
    dir.trainer_with(&format!("{line} --prompt-ids"), "")
        .fails(2, &["--prompt-ids"]);
    let chat = Dir::with_chat();
    chat.trainer_with(&format!("{line} --prompt"), "")
        .fails(1, &["the prompt has no tokens"]);
}

#[test]
fn numbers_no_token_can_be_chosen_by() {
    let dir = Dir::with_tokens();
    for (flag, part) in [
        ("--max-new-tokens 0", "--max-new-tokens"),
        ("--max-new-tokens -1", "--max-new-tokens"),
        ("--max-new-tokens 1e3", "--max-new-tokens"),
        ("--temperature -1", "temperature is -1"),
        ("--temperature nan", "temperature is NaN"),
        ("--top-p 0", "top_p is 0"),
        ("--top-p 1.5", "top_p is 1.5"),
        ("--top-k 0", "top_k is 0"),
        ("--top-k -2", "--top-k"),
        ("--top-p 0.9", "--top-p needs --temperature above 0"),
        ("--top-k 5 --temperature 0", "--top-k needs --temperature"),
        ("--repetition-penalty 0", "repetition_penalty is 0"),
        ("--seed -1", "--seed"),
    ] {
        let line = format!("generate --model model --prompt-ids 5 {flag}");
        dir.trainer(&line).fails(2, &[part]);
    }
}

#[test]
fn a_task_that_the_adapter_does_not_know() {
    let dir = Dir::with_tokens();
    dir.write(
        "rows.jsonl",
        "{\"input_ids\": [5, 6, 7], \"task_id\": 0}\n".repeat(4),
    );
    let line = "train -q --model model --data rows.jsonl --max-steps 1 --method mpt --output";
    dir.trainer(&format!("{line} one")).succeeds();
    dir.trainer(&format!("{line} two --set adapter.num_tasks=2"))
        .succeeds();
    let task = |run: &str, task: usize| {
        let with = format!("--model model --adapter {run}/adapter --task-id {task}");
        dir.trainer(&format!(
            "generate {with} --prompt-ids 5 --max-new-tokens 1"
        ))
    };
    task("one", 1).fails(
        2,
        &[
            "--task-id 1 is no task",
            "help: leave it out: there is task 0",
        ],
    );
    task("two", 2).fails(2, &["--task-id 2 is no task", "from 0 to 1"]);
    task("two", 1).succeeds();
}

#[cfg(unix)]
#[test]
fn arguments_that_are_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let dir = Dir::with_tokens();
    let odd = OsStr::from_bytes(b"\xff\xfe");
    dir.run(&[OsStr::new("generate"), OsStr::new("--model"), odd])
        .fails(2, &[]);
    dir.run(&[odd]).fails(2, &[]);
    dir.run(&[OsStr::new("train"), odd])
        .fails(2, &["cannot read the recipe"]);
}

#[test]
fn settings_that_mean_nothing_beside_the_others() {
    let dir = Dir::with_tokens();
    for (flags, key) in [
        ("--method full --rank 8", "adapter.rank"),
        (
            "--set adapter.method=full --set adapter.dropout=0.1",
            "adapter.dropout",
        ),
        (
            "--set quantization.block_size=128",
            "quantization.block_size",
        ),
        ("--set train.eval_every=5", "train.eval_every"),
    ] {
        for command in ["train --output run", "train --print-recipe", "plan"] {
            let line = format!("{command} --model model --data rows.jsonl {flags}");
            dir.trainer(&line)
                .fails(2, &[&format!("{key} means nothing here")]);
        }
    }
    assert!(!dir.has("run"));
    let line = "plan --model model --data rows.jsonl --set train.eval_every=5";
    dir.trainer(&format!("{line} --eval-data rows.jsonl"))
        .succeeds();
    dir.trainer(&format!("{line} --set data.eval_fraction=0.5"))
        .succeeds();
    // a saved recipe has every key
    let line = "train --print-recipe --model model --data rows.jsonl --method full";
    dir.write("recipe.toml", dir.trainer(line).succeeds().stdout);
    dir.trainer("plan recipe.toml").succeeds();
}
