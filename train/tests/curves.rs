//! Runs of PEFT, bitsandbytes and torch.optim.AdamW (`fixtures/curves/make.py`), taken step by step.

mod harness;

use std::path::{Path, PathBuf};

use adapters::peft;
use harness::{finish, metrics, recipe, start, tiny_model};
use model::checkpoint::Checkpoint;
use model::config::LlamaConfig;
use serde_json::Value;
use train::data::{Encoder, Samples, prepare};
use train::session::Rows;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/curves")
        .join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn read_rows(file: PathBuf, base: &Path) -> Rows {
    let config = LlamaConfig::from_file(&base.join("config.json")).unwrap();
    let encoder = Encoder {
        tokenizer: None,
        template: None,
        end_markers: Vec::new(),
        vocab_size: config.vocab_size,
        train_on: Default::default(),
        model: base.into(),
    };
    let settings = train::recipe::DataSection::default().settings();
    let prepared = prepare(&[file], &settings, &encoder).unwrap();
    Rows {
        train: prepared.samples,
        eval: Samples::default(),
    }
}

/// The largest difference of any number of `key`, relative to PEFT's.
fn max_off(ours: &[Value], theirs: &[Value], key: &str) -> f64 {
    let off = |(ours, theirs): (&Value, &Value)| {
        let (ours, theirs) = (ours[key].as_f64().unwrap(), theirs[key].as_f64().unwrap());
        match ours == theirs {
            true => 0.0, // the learning rate starts and ends at 0
            false => (ours - theirs).abs() / theirs.abs(),
        }
    };
    largest(ours.iter().zip(theirs).map(off))
}

fn max_adapter_off(ours: &Path, theirs: &Path) -> f64 {
    let open = |folder: &Path| Checkpoint::open_file(&folder.join(peft::MODEL_FILE)).unwrap();
    let (ours, theirs) = (open(ours), open(theirs));
    let same = ours.tensors().eq(theirs.tensors());
    if !same {
        return f64::INFINITY; // other names or shapes
    }
    largest(theirs.tensors().flat_map(|(name, _)| {
        let (left, right) = (ours.read(name).unwrap(), theirs.read(name).unwrap());
        let pairs = left.into_iter().zip(right);
        pairs
            .map(|(l, r)| f64::from((l - r).abs()))
            .collect::<Vec<_>>()
    }))
}

/// The largest difference; one that is no number is the largest of all.
fn largest(off: impl Iterator<Item = f64>) -> f64 {
    off.fold(0.0, |most, off| match off.is_nan() {
        true => f64::INFINITY,
        false => most.max(off),
    })
}

/// Takes the run of a fixture and compares every step and the final adapter.
fn follow(name: &str) {
    let folder = fixture(name);
    let plan = json(&folder.join("recipe.json"));
    let base = tiny_model(plan["base"].as_str().unwrap());
    let rows = read_rows(folder.join("data.jsonl"), &base);
    let mut settings = vec!["data.shuffle=false".to_owned()];
    let init = folder.join("init");
    if init.exists() {
        settings.push(format!("adapter.init_from={}", init.display()));
    }
    let given = plan["settings"].as_object().unwrap();
    settings.extend(given.iter().map(|(key, value)| format!("{key}={value}")));
    let out = tempfile::tempdir().unwrap();
    let run = start(recipe(&base, &settings), &rows, out.path());
    let outcome = finish(run, |_, _| {}).unwrap();

    let theirs = json(&folder.join("curve.json"));
    let theirs = theirs.as_array().unwrap();
    let ours = metrics(out.path(), "train");
    assert_eq!((ours.len(), outcome.steps), (theirs.len(), theirs.len()));
    for key in ["step", "tokens", "lr"] {
        let off = max_off(&ours, theirs, key);
        assert!(off < 1e-14, "{name}: {key} differs by {off}"); // exact, or f64 rounding
    }
    // f32 sums in another order: 1.3e-7 and 3.1e-7 were seen
    for key in ["loss", "grad_norm"] {
        let off = max_off(&ours, theirs, key);
        assert!(off < 1e-5, "{name}: {key} differs by {off}");
    }
    if !init.exists() {
        return; // decompositions of the weights may differ in signs
    }
    // 2.8e-7 was seen. Ten steps of at most the learning rate; AdamW divides a gradient by its own
    // size, so that the small ones, with the larger rounding, move a weight as far as the others.
    let off = max_adapter_off(&out.path().join("adapter"), &folder.join("final"));
    assert!(off < 5e-6, "{name}: the adapter differs by {off}");
    let moved = max_adapter_off(&init, &folder.join("final"));
    assert!(moved > 1e-2, "{name}: the adapter has moved");
}

#[test]
fn accumulation_cosine_warmup_and_decay_follow_peft() {
    follow("cosine");
}

#[test]
fn nf4_follows_peft_and_bitsandbytes() {
    follow("nf4");
}

#[test]
fn doubly_quantised_fp4_follows_peft_and_bitsandbytes() {
    follow("fp4_double");
}

#[test]
fn two_targets_linear_and_clipping_follow_peft() {
    follow("linear");
}

#[test]
fn dora_follows_peft() {
    follow("dora");
}

#[test]
fn dora_over_nf4_follows_peft_and_bitsandbytes() {
    follow("dora_nf4");
}

#[test]
fn learning_rates_of_lora_plus_follow_peft() {
    follow("loraplus");
}

#[test]
fn adalora_follows_peft() {
    follow("adalora");
}

#[test]
fn adalora_over_nf4_follows_peft_and_bitsandbytes() {
    follow("adalora_nf4");
}

#[test]
fn loha_follows_peft() {
    follow("loha");
}

#[test]
fn lokr_follows_peft() {
    follow("lokr");
}

#[test]
fn ia3_follows_peft() {
    follow("ia3");
}

#[test]
fn ia3_over_nf4_follows_peft_and_bitsandbytes() {
    follow("ia3_nf4");
}

#[test]
fn vera_follows_peft() {
    follow("vera");
}

#[test]
fn vera_over_nf4_follows_peft_and_bitsandbytes() {
    follow("vera_nf4");
}

#[test]
fn pissa_and_olora_follow_peft() {
    follow("pissa");
    follow("olora");
}
