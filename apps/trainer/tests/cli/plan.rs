use serde_json::{Value, json};

use crate::support::Dir;

#[test]
fn a_plan_counts_and_needs_no_weights() {
    let dir = Dir::with_tokens();
    std::fs::remove_file(dir.path("model/model.safetensors")).unwrap();
    let line = "plan --json --model model --data rows.jsonl --rank 4 --output run";
    let run = dir
        .trainer(&format!(
            "{line} --set train.micro_batch_size=3 --set data.packing=false"
        ))
        .succeeds();
    let json = run.json();
    // q, k, v, o are 32×32, 16×32, 16×32, 32×32; gate, up, down have 32 and 56 at their ends
    let per_layer = 4 * (64 + 48 + 48 + 64 + 3 * 88);
    assert_eq!(json["trainable_params"], json!(2 * per_layer));
    let base = 2 * 96 * 32 + 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 32 * 56 + 64);
    assert_eq!(json["all_params"], json!(base + 2 * per_layer));
    let percent = 100.0 * f64::from(2 * per_layer) / f64::from(base + 2 * per_layer);
    assert!((json["trainable_percent"].as_f64().unwrap() - percent).abs() < 1e-9);
    assert_eq!(json["adapter_bytes"], json!(4 * 2 * per_layer));
    assert_eq!((&json["rows"], &json["steps"]), (&json!(8), &json!(3)));
    assert_eq!(
        (&json["sequences"], &json["fill_ratio"]),
        (&json!(8), &Value::Null)
    );
    let tokens: usize = (0..8).map(|row| 5 + row % 5).sum();
    assert_eq!(json["trained_tokens"], json!(tokens));
    assert!(!dir.has("run"));
    let text = dir
        .trainer("plan --model model --data rows.jsonl")
        .succeeds();
    assert!(text.stdout.contains("trainable parameters"), "{text}");
}

#[test]
fn packing_makes_few_full_sequences() {
    let dir = Dir::with_tokens(); // 61 tokens in rows of 6 to 10
    let line = "--model model --data rows.jsonl --set data.max_length=20 \
                --set train.micro_batch_size=3";
    let plan = dir
        .trainer(&format!("plan --json {line}"))
        .succeeds()
        .json();
    assert_eq!((&plan["rows"], &plan["sequences"]), (&json!(8), &json!(4)));
    assert_eq!(plan["fill_ratio"], json!(61.0 / 80.0));
    assert_eq!(plan["steps"], json!(2));
    let text = dir.trainer(&format!("plan {line}")).succeeds();
    assert!(
        text.stdout.contains("packed sequences      4 (76."),
        "{text}"
    );
    let run = dir
        .trainer(&format!("train {line} --output run"))
        .succeeds();
    let told = "an epoch is packed into 4 sequences of up to 20 tokens, 76.";
    assert!(run.stderr.contains(told), "{run}");
    let steps = dir.lines("run/metrics.jsonl");
    assert_eq!(steps.len(), 2);
    assert_eq!(steps[1]["epoch"], json!(1.0));
    // every row is trained once: all of its tokens but the first
    let tokens: u64 = steps
        .iter()
        .map(|step| step["tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(tokens, 61 - 8);
}

#[test]
fn a_recipe_file_is_planned() {
    let dir = Dir::with_tokens();
    let recipe = "[model]\npath = 'model'\n[data]\ntrain = 'rows.jsonl'\n[train]\nmax_steps = 11\n";
    dir.write("recipe.toml", recipe);
    assert_eq!(
        dir.trainer("plan recipe.toml --json").succeeds().json()["steps"],
        json!(11)
    );
    let line = "plan recipe.toml --json --max-steps 5";
    assert_eq!(dir.trainer(line).succeeds().json()["steps"], json!(5));
}

#[test]
fn what_would_keep_a_run_from_starting_is_a_problem() {
    let dir = Dir::with_tokens();
    dir.edit_json("model/config.json", |json| {
        json["vocab_size"] = json!(1 << 24);
        json["hidden_size"] = json!(1 << 20);
    });
    let line = "plan --json --model model --output model --device cpu";
    let plan = dir.trainer(line).succeeds().json();
    let problems: Vec<_> = plan["problems"].as_array().unwrap().iter().collect();
    let has = |part: &str| problems.iter().any(|p| p.as_str().unwrap().contains(part));
    for part in [
        "data.train is missing",
        "GiB of memory",
        "model is not empty",
    ] {
        assert!(has(part), "{part}: {plan}");
    }
}
