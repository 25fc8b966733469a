//! Adapters merged into their base, against PEFT (`fixtures/merge/make.py`, `fixtures/make.py`).

mod harness;
mod logits;

use std::path::{Path, PathBuf};

use adapters::methods::lora::LoraSettings;
use adapters::{
    AdaptedLlama, AdapterConfig, Combination, Drift, Error, Merge, Onto, Pattern, Targets,
    Weighted, drift, peft, read_parameters, write_parameters,
};
use harness::{B, lora, rank_4};
use logits::{Expected, base, fixture, largest_difference, load, logits, weighted, whole};
use model::checkpoint::{Checkpoint, MODEL_FILE, NamedTensor, write_safetensors};
use model::folder::ModelFolder;
use model::load::normal;
use quant::{Format, Scheme};
use serde_json::Value;
use tempfile::TempDir;

/// The adapters that come with a base and logits, with the name of the base.
fn cases() -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(fixture("")).unwrap();
    let read = |folder: PathBuf| {
        let base = std::fs::read_to_string(folder.join("base.txt")).ok()?;
        Some((folder, base.trim().to_owned()))
    };
    let cases: Vec<_> = entries.filter_map(|e| read(e.unwrap().path())).collect();
    assert!(cases.len() >= 10);
    cases
}

/// A merged model in a folder of its own.
struct Merged {
    folder: TempDir,
    drift: Drift,
    layers: usize,
    /// The share of the updates that rounding has left.
    kept: Option<f64>,
}

fn merge(base: &Path, adapters: &[Weighted], onto: Option<Onto>) -> adapters::Result<Merged> {
    let ids: Vec<u32> = (0..24).map(|i| 3 + 7 * i % 93).collect();
    merge_and_probe(base, adapters, onto, &ids)
}

fn merge_and_probe(
    base: &Path,
    adapters: &[Weighted],
    onto: Option<Onto>,
    ids: &[u32],
) -> adapters::Result<Merged> {
    let source = ModelFolder::open(base)?;
    let checkpoint = source.checkpoint()?;
    let merge = Merge::new(&source, &checkpoint, adapters, Combination::Cat, onto)?;
    write(&merge, ids)
}

fn write(merge: &Merge, ids: &[u32]) -> adapters::Result<Merged> {
    let folder = tempfile::tempdir().unwrap();
    let kept = merge.write(folder.path(), &|| true)?.share();
    let merged = Checkpoint::open_folder(folder.path())?;
    Ok(Merged {
        drift: drift::<B>(merge, &merged, ids, &Default::default(), &|| true)?,
        layers: merge.merged_layers(),
        kept,
        folder,
    })
}

#[track_caller]
fn refused(base: &Path, adapters: &[Weighted], onto: Option<Onto>) -> Error {
    match merge(base, adapters, onto) {
        Ok(_) => panic!("it was merged"),
        Err(error) => error,
    }
}

impl Merged {
    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn load(&self) -> AdaptedLlama<B> {
        load(self.path())
    }

    fn config(&self) -> Value {
        let text = std::fs::read_to_string(self.path().join("config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

/// A copy of a model with weights in f32, so that nothing is rounded when it is merged.
fn in_f32(base: &Path) -> TempDir {
    let source = ModelFolder::open(base).unwrap();
    let checkpoint = source.checkpoint().unwrap();
    let tensors: Vec<_> = checkpoint
        .tensors()
        .map(|(name, shape)| NamedTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            values: checkpoint.read(name).unwrap(),
        })
        .collect();
    let copy = tempfile::tempdir().unwrap();
    write_safetensors(&copy.path().join(MODEL_FILE), &tensors, &[]).unwrap();
    source.copy_assets(copy.path()).unwrap();
    copy
}

/// A copy of an adapter whose file says how the base was quantised.
fn trained_on(adapter: &Path, words: &str) -> TempDir {
    let file = Checkpoint::open_file(&adapter.join(peft::MODEL_FILE)).unwrap();
    let tensors: Vec<_> = file
        .tensors()
        .map(|(name, shape)| NamedTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            values: file.read(name).unwrap(),
        })
        .collect();
    let copy = tempfile::tempdir().unwrap();
    let metadata = [("base_quantization", words.to_owned())];
    write_safetensors(&copy.path().join(peft::MODEL_FILE), &tensors, &metadata).unwrap();
    std::fs::copy(
        adapter.join(peft::CONFIG_FILE),
        copy.path().join(peft::CONFIG_FILE),
    )
    .unwrap();
    copy
}

/// Settings that give layers different ranks and factors.
fn mixed() -> LoraSettings {
    LoraSettings {
        rank: 3,
        alpha: 5.0,
        dropout: 0.1,
        rank_pattern: Pattern(vec![("up_proj".into(), 7)]),
        alpha_pattern: Pattern(vec![("0.self_attn.q_proj".into(), 11.0)]),
        use_rslora: true,
        ..rank_4()
    }
}

fn mixed_lora(target_modules: Targets) -> AdapterConfig {
    AdapterConfig {
        method: mixed().into(),
        ..lora(target_modules)
    }
}

/// A model with an adapter whose every number is random, and the folder of the adapter.
fn adapted(base: &Path, config: &AdapterConfig, seed: u64) -> (AdaptedLlama<B>, TempDir) {
    let mut model = load(base);
    adapters::attach(&mut model, config, seed, &Default::default()).unwrap();
    let random = |(id, values): (_, Vec<f32>)| (id, normal(seed, "b", values.len(), 0.2));
    let values = read_parameters(&model).into_iter().map(random).collect();
    let model = write_parameters(model, values);
    let folder = tempfile::tempdir().unwrap();
    peft::save(&model, config, "base", folder.path()).unwrap();
    (model, folder)
}

#[test]
fn a_merged_model_computes_what_peft_computes() {
    for (folder, name) in cases() {
        let merged = merge(&base(&name), &[whole(&folder)], None).unwrap();
        let off = Expected::read(&folder).off("logits", &merged.load());
        // f32 sums in another order
        assert!(off < 5e-5, "{}: off by {off}", folder.display());
        let drift = merged.drift;
        assert!(drift.max_abs < 5e-5, "{}: {drift:?}", folder.display());
        assert_eq!((drift.tokens, drift.same_top), (24, 1.0));
    }
}

#[test]
fn weighted_adapters_add_up_as_in_peft() {
    let adapters = [
        weighted(fixture("qv"), 0.7),
        weighted(fixture("rslora"), 1.5),
    ];
    let merged = merge(&base("gqa"), &adapters, None).unwrap();
    let off = Expected::read(&fixture("merge/weighted")).off("logits", &merged.load());
    assert!(off < 1e-4, "off by {off}");
    assert!(merged.drift.max_abs < 1e-4, "{:?}", merged.drift);
    assert_eq!(merged.layers, 14);
}

#[test]
fn tied_embeddings_part_where_an_adapter_parts_them() {
    for case in ["tied_head", "tied_save"] {
        let folder = fixture("merge").join(case);
        let merged = merge(&base("tied_llama3"), &[whole(folder.join("adapter"))], None).unwrap();
        let off = Expected::read(&folder).off("logits", &merged.load());
        assert!(off < 1e-4, "{case}: off by {off}");
        assert!(merged.drift.max_abs < 1e-4, "{case}: {:?}", merged.drift);
        assert_eq!(merged.config()["tie_word_embeddings"], false, "{case}");
    }
    let merged = merge(&base("tied_llama3"), &[whole(fixture("tied"))], None).unwrap();
    assert_eq!(merged.config()["tie_word_embeddings"], true);
    let file = Checkpoint::open_folder(merged.path()).unwrap();
    assert_eq!(file.shape("lm_head.weight"), None);
}

#[test]
fn one_of_two_tied_weights_is_adapted_and_the_other_stays() {
    let (ids, shape) = Expected::read(&fixture("tied")).ids();
    let logits = |model: &AdaptedLlama<B>| logits(model, &ids, shape);
    for (pattern, layers, use_dora) in [
        (r".*v_proj|lm_head", 3, false),
        (r".*v_proj|.*embed_tokens", 3, false),
        (r".*v_proj|.*embed_tokens", 3, true),
        (r".*embed_tokens|lm_head", 2, true),
    ] {
        let mut config = mixed_lora(Targets::Regex(pattern.into()));
        config.method = LoraSettings {
            use_dora,
            ..mixed()
        }
        .into();
        let (model, folder) = adapted(&base("tied_llama3"), &config, 3);
        let merged = merge(&base("tied_llama3"), &[whole(folder.path())], None).unwrap();
        let off = largest_difference(&logits(&model), &logits(&merged.load()));
        assert!(off < 5e-5, "{pattern}: off by {off}");
        assert!(merged.drift.max_abs < 5e-5, "{:?}", merged.drift);
        assert_eq!(merged.layers, layers, "{pattern}");
        assert_eq!(merged.config()["tie_word_embeddings"], false);
    }
}

#[test]
fn bf16_weights_are_rounded_to_those_of_peft() {
    let folder = fixture("merge/bf16");
    let merged = merge(&base("by_64"), &[whole(folder.join("adapter"))], None).unwrap();
    let expected = Expected::read(&folder);
    let file = Checkpoint::open_folder(merged.path()).unwrap();
    let tensors = expected.tensors();
    for (name, _) in file.tensors() {
        let (ours, theirs) = (file.view(name).unwrap(), tensors.tensor(name).unwrap());
        assert_eq!(ours.dtype(), theirs.dtype(), "{name}");
        assert_eq!(ours.data(), theirs.data(), "{name}");
    }
    assert_eq!(file.tensors().count() + 2, tensors.len()); // input_ids, logits
    // and what that rounding does is told: PEFT's own difference is of this size, too
    let drift = merged.drift;
    assert!(1e-3 < drift.max_abs && drift.max_abs < 0.1, "{drift:?}");
    assert!(0.0 < drift.kl && drift.kl < 1e-4, "{drift:?}");
    // of updates this large nothing is lost but digits
    let off = (merged.kept.unwrap() - 1.0).abs();
    assert!(1e-6 < off && off < 1e-2, "{off}");
}

#[test]
fn weights_of_another_type_keep_the_whole_update() {
    let source = ModelFolder::open(&base("by_64")).unwrap();
    let checkpoint = source.checkpoint().unwrap();
    let adapters = [whole(fixture("merge/bf16").join("adapter"))];
    let merge = Merge::new(&source, &checkpoint, &adapters, Combination::Cat, None).unwrap();
    let merged = write(&merge.into_dtype(safetensors::Dtype::F32), &[5, 9, 44]).unwrap();
    assert!(
        (merged.kept.unwrap() - 1.0).abs() < 1e-6,
        "{:?}",
        merged.kept
    );
    assert!(merged.drift.max_abs < 1e-4, "{:?}", merged.drift);
    let file = Checkpoint::open_folder(merged.path()).unwrap();
    let is_f32 = |name| file.view(name).unwrap().dtype() == safetensors::Dtype::F32;
    assert!(file.tensors().all(|(name, _)| is_f32(name)));
    let config = merged.config();
    let dtype = config.get("torch_dtype").or(config.get("dtype"));
    assert_eq!(dtype.unwrap(), "float32");
}

#[test]
fn onto_the_original_weights_or_the_dequantised_ones() {
    let expected = Expected::read(&fixture("merge/nf4"));
    let adapter = fixture("merge/nf4/adapter");
    let off = |name, base: &Path, onto| {
        let merged = merge(base, &[whole(&adapter)], onto).unwrap();
        assert!(merged.config().get("quantization_config").is_none());
        assert!(merged.drift.max_abs < 1e-4, "{:?}", merged.drift);
        expected.off(name, &merged.load())
    };
    let dense = in_f32(&base("by_64"));
    let dense = dense.path();
    assert!(off("original", dense, None) < 1e-4);
    assert!(off("original", dense, Some(Onto::Original)) < 1e-4);
    assert!(off("logits", dense, Some(Onto::Dequantized)) < 1e-4);
    let stored = fixture("bitsandbytes/nf4");
    assert!(off("logits", &stored, None) < 1e-4);
    assert!(off("logits", &stored, Some(Onto::Dequantized)) < 1e-4);
    let parts = largest_difference(&expected.logits("original"), &expected.logits("logits"));
    assert!(parts > 0.1, "it makes a difference: {parts}");
}

#[test]
fn drift_is_the_difference_between_pefts_trained_and_merged_models() {
    let expected = Expected::read(&fixture("merge/nf4"));
    let adapter = trained_on(&fixture("merge/nf4/adapter"), "nf4 in blocks of 64");
    let base = in_f32(&base("by_64"));
    let (ids, [_, s]) = expected.ids();
    let ids: Vec<u32> = ids[..s].iter().map(|id| *id as u32).collect();
    let measure = |onto| {
        let adapters = [whole(adapter.path())];
        merge_and_probe(base.path(), &adapters, onto, &ids)
            .unwrap()
            .drift
    };
    let [trained, original] = ["trained", "original"].map(|name| expected.logits(name));
    let row = s * original.len() / expected.ids().0.len();
    let (trained, original) = (&trained[..row], &original[..row]);
    let drift = measure(None);
    let most = f64::from(largest_difference(trained, original));
    assert!((drift.max_abs - most).abs() < 1e-4, "{drift:?}, not {most}");
    let differences = trained.iter().zip(original).map(|(a, b)| (a - b).abs());
    let mean = f64::from(differences.sum::<f32>()) / row as f64;
    assert!(
        (drift.mean_abs - mean).abs() < 1e-5,
        "{drift:?}, not {mean}"
    );
    assert!(drift.kl > 1e-3 && drift.same_top < 1.0, "{drift:?}");
    assert!(measure(Some(Onto::Dequantized)).max_abs < 1e-4);
}

#[test]
fn merged_is_unmerged_for_any_numbers() {
    let (ids, shape) = Expected::read(&fixture("qv")).ids();
    for seed in 0..4 {
        let mut config = mixed_lora(Targets::AllLinear);
        if seed == 1 {
            config.selection.modules_to_save =
                vec!["lm_head".into(), "norm".into(), "o_proj".into()];
        }
        let use_dora = seed >= 2;
        config.method = LoraSettings {
            use_dora,
            ..mixed()
        }
        .into();
        let name = ["gqa", "mha_bias_linear"][seed as usize % 2];
        let (model, folder) = adapted(&base(name), &config, seed);
        let merged = merge(&base(name), &[whole(folder.path())], None).unwrap();
        let off = largest_difference(
            &logits(&model, &ids, shape),
            &logits(&merged.load(), &ids, shape),
        );
        assert!(off < 5e-5, "{seed}: off by {off}");
    }
}

#[test]
fn dora_is_merged_alone_and_as_a_whole() {
    let (dora, lora) = (fixture("dora"), fixture("qv"));
    for adapters in [
        vec![whole(&dora), whole(&lora)],
        vec![weighted(dora.clone(), 0.5)],
    ] {
        let refusal = merge(&base("gqa"), &adapters, None).err().unwrap();
        assert!(refusal.to_string().contains("one at a time"), "{refusal}");
    }
}

#[test]
fn a_module_that_an_adapter_replaces_is_not_quantised() {
    let base = in_f32(&base("by_64"));
    let mut config = mixed_lora(Targets::AllLinear);
    config.selection.modules_to_save = vec!["up_proj".into()];
    let (_, adapter) = adapted(base.path(), &config, 5);
    let adapter = trained_on(adapter.path(), "fp4 in blocks of 32");
    let adapters = [whole(adapter.path())];
    let merged = merge(base.path(), &adapters, Some(Onto::Dequantized)).unwrap();
    assert!(merged.drift.max_abs < 1e-4, "{:?}", merged.drift);
    let name = "model.layers.1.mlp.up_proj.weight";
    let theirs = Checkpoint::open_file(&adapter.path().join(peft::MODEL_FILE)).unwrap();
    let ours = Checkpoint::open_folder(merged.path()).unwrap();
    let theirs = theirs.read(&format!("base_model.model.{name}")).unwrap();
    assert_eq!(ours.read(name).unwrap(), theirs);
}

#[test]
fn other_tensors_keep_their_bytes_and_types() {
    for name in ["sharded_bf16", "f16"] {
        let merged = merge(&base(name), &[whole(fixture("qv"))], None).unwrap();
        let [before, after] =
            [&base(name), merged.path()].map(|path| Checkpoint::open_folder(path).unwrap());
        assert_eq!(before.tensors().count(), after.tensors().count());
        for (name, _) in before.tensors() {
            let (before, after) = (before.view(name).unwrap(), after.view(name).unwrap());
            assert_eq!(before.dtype(), after.dtype());
            let is_target = name.contains("q_proj") || name.contains("v_proj");
            assert_eq!(before.data() == after.data(), !is_target, "{name}");
        }
        let mut files: Vec<_> = std::fs::read_dir(merged.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["config.json", "generation_config.json", MODEL_FILE]);
    }
}

#[test]
fn without_adapters_a_4_bit_model_becomes_dense() {
    let stored = fixture("bitsandbytes/nf4_double_bf16");
    let merged = merge(&stored, &[], None).unwrap();
    let file = Checkpoint::open_folder(merged.path()).unwrap();
    for (name, _) in file.tensors() {
        assert_eq!(file.float_dtype(name).unwrap(), safetensors::Dtype::BF16);
    }
    assert_eq!(merged.layers, 0);
    assert!(merged.drift.max_abs < 0.1, "rounding: {:?}", merged.drift);
}

#[test]
fn a_4_bit_model_has_no_original_weights() {
    let stored = fixture("bitsandbytes/nf4");
    let adapter = [whole(fixture("merge/nf4/adapter"))];
    let error = refused(&stored, &adapter, Some(Onto::Original));
    assert!(matches!(error, Error::NoOriginal { .. }), "{error}");
}

#[test]
fn adapters_that_contradict_each_other() {
    let [head, embeddings, saved] =
        ["head", "save_embeddings", "save_head"].map(|name| whole(fixture(name)));
    let told = |adapters: &[Weighted], parts: &[&str]| {
        let error = refused(&base("gqa"), adapters, None);
        assert!(matches!(error, Error::Merge { .. }), "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    };
    told(
        &[embeddings.clone(), saved.clone(), embeddings.clone()],
        &[
            "both replace model.embed_tokens.weight",
            "both replace model.norm.weight",
        ],
    );
    told(
        &[head, saved.clone()],
        &["replaces lm_head.weight, which", "head adapts"],
    );
    told(
        &[weighted(&saved.folder, 0.5)],
        &["lm_head.weight as a whole, which cannot be weighed"],
    );
    assert!(merge(&base("gqa"), &[embeddings, saved], None).is_ok());
}

#[test]
fn the_base_of_the_training_must_be_known_to_be_merged_onto() {
    let adapter = fixture("merge/nf4/adapter");
    let on = |words| trained_on(&adapter, words);
    let (nf4, double) = (
        on("nf4 in blocks of 64"),
        on("nf4 in blocks of 64 with double quantization"),
    );
    let (none, odd) = (on("none"), on("int3"));
    let base = base("by_64");
    let adapters = |folders: &[&TempDir]| -> Vec<_> {
        folders.iter().map(|folder| whole(folder.path())).collect()
    };
    for folders in [&[&nf4, &double][..], &[&none], &[&nf4, &none], &[&odd]] {
        let error = refused(&base, &adapters(folders), Some(Onto::Dequantized));
        assert!(matches!(error, Error::Merge { .. }), "{error}");
        assert!(merge(&base, &adapters(folders), None).is_ok());
    }
    let source = ModelFolder::open(&base).unwrap();
    let checkpoint = source.checkpoint().unwrap();
    let open = |adapters: &[Weighted], onto| {
        let merge = Merge::new(&source, &checkpoint, adapters, Combination::Cat, onto).unwrap();
        (merge.trained_on(), merge.strangers().len())
    };
    let double_quant = Some(Scheme::new(Format::Nf4, 64, true));
    let by_peft = [whole(&adapter)];
    assert_eq!(open(&adapters(&[&double]), None), (double_quant, 0));
    assert_eq!(open(&adapters(&[&none]), None), (None, 0));
    assert_eq!(open(&adapters(&[&none, &double]), None), (None, 1));
    let default = Some(Scheme::new(Format::Nf4, 64, false));
    assert_eq!(open(&by_peft, Some(Onto::Dequantized)), (default, 0));
    assert_eq!(open(&by_peft, None), (None, 0));
}

#[test]
fn numbers_too_large_for_their_type_are_refused() {
    for (name, weight) in [("f16", 1e6), ("gqa", 1e40), ("sharded_bf16", 1e39)] {
        let error = refused(&base(name), &[weighted(fixture("qv"), weight)], None);
        assert!(matches!(error, Error::NotFinite { .. }), "{name}: {error}");
    }
}

#[test]
fn whoever_asks_can_stop_it() {
    let source = ModelFolder::open(&base("gqa")).unwrap();
    let checkpoint = source.checkpoint().unwrap();
    let merge = Merge::new(
        &source,
        &checkpoint,
        &[whole(fixture("qv"))],
        Combination::Cat,
        None,
    )
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = merge.write(folder.path(), &|| false).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
