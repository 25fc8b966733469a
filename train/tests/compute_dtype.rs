//! Training with the frozen weights in f16, on the first graphics adapter.

#![cfg(feature = "wgpu")]

mod harness;

use std::path::Path;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use harness::{B, finish, metrics, recipe, start, tiny_model};
use model::folder::ModelFolder;
use serde_json::Value;
use tempfile::tempdir;
use train::checkpoint::Checkpoints;
use train::data::{Sample, Samples};
use train::loss_scale::LossScale;
use train::recipe::Recipe;
use train::run_folder::{RECIPE_FILE, RunFolder};
use train::session::{self, Rows};

fn rows() -> Rows {
    let row = |i: usize| {
        let ids = (0..8 + 3 * i).map(move |at| (7 * i + 5 * at) as u32 % 90 + 3);
        Sample {
            labels: ids.clone().map(|id| id as i32).collect(),
            input_ids: ids.collect(),
            task: 0,
        }
    };
    Rows {
        train: (0..8).map(row).collect(),
        eval: Samples::default(),
    }
}

fn settings(dtype: &str, more: &[&str]) -> Vec<String> {
    let common = [
        "train.max_steps=4",
        "train.save_every=2",
        "train.micro_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.learning_rate=5e-3",
        "adapter.dropout=0.1",
    ];
    let all = common.iter().chain(more).map(|text| (*text).to_owned());
    let dtype = format!("train.compute_dtype={dtype}");
    all.chain([dtype]).collect()
}

fn curve(run: &Path, key: &str) -> Vec<f64> {
    let lines = metrics(run, "train");
    lines
        .iter()
        .map(|line| line[key].as_f64().unwrap())
        .collect()
}

/// Trains with `settings`, beginning at this scale if one is given.
fn train(folder: &Path, settings: &[String], scale: Option<f64>) {
    let mut run = start(recipe(&tiny_model("gqa"), settings), &rows(), folder);
    if let (Some(scale), Some(factor)) = (&mut run.progress.loss_scale, scale) {
        scale.factor = factor;
    }
    finish(run, |_, _| {}).unwrap();
}

/// A scale at which every gradient overflows.
const BEYOND: f64 = (1_u64 << 40) as f64;

fn has_f16() -> bool {
    B::supports_dtype(&Default::default(), DType::F16)
}

/// A product in f16 keeps 11 bits, and weights that learn a little differently differ more with every
/// step. An overflow of the gradients costs no step, and the guard of bad numbers does not count it.
#[test]
fn the_curve_in_f16_is_that_in_f32() {
    if !has_f16() {
        return;
    }
    for (quant, scale) in [("none", None), ("nf4", Some(BEYOND))] {
        let quant = format!("quantization.format={quant}");
        let dir = tempdir().unwrap();
        let [wide, narrow] = ["f32", "f16"].map(|dtype| {
            let folder = dir.path().join(dtype);
            train(&folder, &settings(dtype, &[&quant]), scale);
            assert!(metrics(&folder, "skipped").is_empty());
            curve(&folder, "loss")
        });
        assert!(wide[3] < wide[0]);
        assert_ne!(wide, narrow, "nothing was computed in f16");
        for (l, r) in wide.iter().zip(&narrow) {
            assert!((l - r).abs() < 2e-3 * l, "{quant}: {wide:?} {narrow:?}");
        }
    }
}

#[test]
fn weights_and_what_is_trained_have_their_types() {
    if !has_f16() {
        return;
    }
    let dir = tempdir().unwrap();
    let run = start(
        recipe(
            &tiny_model("gqa"),
            &settings("f16", &["adapter.modules_to_save=[\"lm_head\"]"]),
        ),
        &rows(),
        &dir.path().join("run"),
    );
    let model = &run.model.model;
    assert_eq!(model.embed_tokens.val().dtype(), DType::F16);
    assert_eq!(model.norm.weight.val().dtype(), DType::F32);
    for (name, linear) in model.projections() {
        let adapters::BaseLinear::Dense(base) = &linear.base else {
            panic!("{name} is in 4 bits");
        };
        let dtype = if name == "lm_head" {
            DType::F32
        } else {
            DType::F16
        };
        assert_eq!(base.weight.val().dtype(), dtype, "{name}");
    }
    struct Trained;
    impl burn::module::ModuleVisitor<B> for Trained {
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<B, D>>) {
            assert_eq!(param.val().dtype(), DType::F32);
        }
    }
    burn::module::Module::visit(&run.model, &mut Trained);
}

/// Gradients of a loss that is scaled beyond f16 are computed again with half of the scale.
#[test]
fn an_overflow_lowers_the_scale_and_a_resumed_run_knows_it() {
    if !has_f16() {
        return;
    }
    let dir = tempdir().unwrap();
    let run = dir.path().join("run");
    train(&run, &settings("f16", &[]), Some(BEYOND));
    let scales = curve(&run, "loss_scale");
    assert!(scales[0] < BEYOND && scales[0] > 1.0, "{scales:?}");

    // from the checkpoint after step 2 as if it had not stopped
    std::fs::remove_dir_all(run.join("checkpoints/step-000004")).unwrap();
    let before = steady(&run);
    let newest = Checkpoints::new(&run, 0)
        .newest(|_, _| {})
        .unwrap()
        .unwrap();
    let text = std::fs::read_to_string(newest.join("state.json")).unwrap();
    let state: Value = serde_json::from_str(&text).unwrap();
    let scale: LossScale = serde_json::from_value(state["loss_scale"].clone()).unwrap();
    assert_eq!(scale.factor, scales[1]);
    assert!(
        scale.lowered > 0 && (1..=2).contains(&scale.steady),
        "{scale:?}"
    );
    let mut recipe = Recipe::read(Some(&run.join(RECIPE_FILE)), &[]).unwrap();
    let trained = session::trained(&mut recipe).unwrap();
    let base = ModelFolder::open(Path::new(&recipe.model.path)).unwrap();
    let folder = RunFolder::open(&run).unwrap();
    let device = Default::default();
    let resumed = session::resume(recipe, trained, base, rows(), folder, &newest, device).unwrap();
    finish(resumed, |_, _| {}).unwrap();
    assert_eq!(steady(&run), before);
}

/// The metrics without what depends on the clock and the machine.
fn steady(run: &Path) -> Vec<Value> {
    let mut lines = metrics(run, "train");
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.retain(|key, _| {
            !["seconds", "tokens_per_second", "peak_memory_bytes"].contains(&key.as_str())
        });
    }
    lines
}
