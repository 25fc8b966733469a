//! 4-bit checkpoints of transformers and bitsandbytes (`fixtures/bitsandbytes/make.py`): read,
//! computed with, made again to the byte, and refused when something is wrong with them.

mod harness;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use adapters::{AdaptedLlama, Targets, attach, peft, quantize_folder, scheme};
use burn::tensor::{Int, Tensor, TensorData};
use harness::{B, lora, root};
use model::checkpoint::{Checkpoint, MODEL_FILE, NamedTensor, write_safetensors};
use model::config::LlamaConfig;
use model::folder::ModelFolder;
use model::rope::Rope;
use model::segments::Segments;
use quant::bitsandbytes::{Stored, parts};
use quant::{Format, Scheme, quantize};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

const NF4: Scheme = Scheme {
    format: Format::Nf4,
    block_size: 64,
    double_quant: false,
};
const CASES: [(&str, Scheme, &str); 4] = [
    ("nf4", NF4, "float32"),
    ("nf4_double", DOUBLE, "float32"),
    ("nf4_double_bf16", DOUBLE, "bfloat16"),
    (
        "fp4",
        Scheme {
            format: Format::Fp4,
            ..NF4
        },
        "float32",
    ),
];
const DOUBLE: Scheme = Scheme {
    double_quant: true,
    ..NF4
};

fn fixture(name: &str) -> PathBuf {
    root("tests/fixtures/bitsandbytes").join(name)
}

/// What the fixtures were made of.
fn dense() -> PathBuf {
    root("../model/tests/fixtures/models/by_64")
}

fn try_load(folder: &Path, scheme: Option<Scheme>) -> adapters::Result<AdaptedLlama<B>> {
    let config = LlamaConfig::from_file(&folder.join("config.json"))?;
    let checkpoint = Checkpoint::open_folder(folder)?;
    adapters::load(&config, &checkpoint, scheme, &Default::default())
}

/// The error and its causes.
fn refusal(folder: &Path, scheme: Option<Scheme>) -> String {
    let error = try_load(folder, scheme).expect_err("it is refused");
    let mut source: Option<&dyn std::error::Error> = Some(&error);
    let causes = std::iter::from_fn(|| {
        let error = source?;
        source = error.source();
        Some(error.to_string())
    });
    causes.collect::<Vec<_>>().join(": ")
}

/// The largest difference between the model's logits and those of `expected.safetensors`.
fn logits_off(model: &AdaptedLlama<B>, folder: &Path) -> f32 {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let [b, s] = [ids.shape()[0], ids.shape()[1]];
    let numbers = ids
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b));
    let device = Default::default();
    let data = TensorData::new(numbers.collect::<Vec<_>>(), [b * s]);
    let ids = Tensor::<B, 1, Int>::from_data(data, &device);
    let rope = Rope::new(&model.config, Segments::new(vec![s; b]), &device);
    let ours = model.logits(model.forward(ids, &rope, None)).into_data();
    let theirs = file.tensor("logits").unwrap();
    let theirs = theirs
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b));
    let pairs = ours.iter::<f32>().zip(theirs);
    pairs.fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn stored_weights_compute_what_transformers_computes() {
    for (name, expected, _) in &CASES {
        let model = try_load(&fixture(name), None).unwrap();
        assert_eq!(scheme(&model), Some(*expected), "{name}");
        let off = logits_off(&model, &fixture(name));
        assert!(off < 1e-4, "{name}: off by {off}");
    }
}

#[test]
fn weights_quantised_while_loading_compute_the_same() {
    for (name, expected, _) in CASES.iter().filter(|(.., dtype)| *dtype == "float32") {
        let model = try_load(&dense(), Some(*expected)).unwrap();
        let off = logits_off(&model, &fixture(name));
        assert!(off < 1e-4, "{name}: off by {off}");
    }
    let model = try_load(&dense(), None).unwrap();
    assert!(
        logits_off(&model, &fixture("nf4")) > 0.1,
        "quantization shows"
    );
}

#[test]
fn parts_made_here_have_the_bytes_that_transformers_saves() {
    let source = Checkpoint::open_folder(&dense()).unwrap();
    for (name, scheme, dtype) in CASES {
        let checkpoint = Checkpoint::open_folder(&fixture(name)).unwrap();
        let mut count = 0;
        for (weight, shape) in source.tensors().filter(|(_, shape)| shape.len() == 2) {
            let shape = [shape[0], shape[1]];
            if checkpoint.shape(weight) == Some(&shape) {
                continue; // not quantised
            }
            let quantized = quantize(&source.read(weight).unwrap(), shape, scheme).unwrap();
            for part in parts(weight, &quantized, dtype) {
                let theirs = checkpoint.view(&part.name).expect(&part.name);
                assert_eq!(
                    (part.dtype, part.shape.as_slice()),
                    (theirs.dtype(), theirs.shape())
                );
                assert!(part.bytes == theirs.data(), "{name}: {}", part.name);
                count += 1;
            }
            let stored = Stored::find(weight, shape, |part| checkpoint.view(part)).unwrap();
            let read = stored.read().unwrap();
            let quantized = quantized.with_precision(read.precision());
            assert_eq!(read, quantized, "{name}: {weight}");
        }
        assert!(count >= 13 * 4, "{name}: {count} parts");
    }
}

#[test]
fn a_quantised_folder_has_the_bytes_that_transformers_saves() {
    // the fixtures were quantised from by_64 loaded as f32
    let source = Checkpoint::open_folder(&dense()).unwrap();
    let tensors = source.tensors().map(|(name, shape)| NamedTensor {
        name: name.to_owned(),
        shape: shape.to_vec(),
        values: source.read(name).unwrap(),
    });
    let folder = tempfile::tempdir().unwrap();
    write_safetensors(
        &folder.path().join(MODEL_FILE),
        &tensors.collect::<Vec<_>>(),
        &[],
    )
    .unwrap();
    std::fs::copy(
        dense().join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let base = ModelFolder::open(folder.path()).unwrap();
    for (name, scheme, _) in CASES.iter().filter(|(.., dtype)| *dtype == "float32") {
        let out = tempfile::tempdir().unwrap();
        quantize_folder(&base, *scheme, out.path(), &|| true).unwrap();
        let bytes = |folder: &Path| std::fs::read(folder.join(MODEL_FILE)).unwrap();
        assert!(bytes(out.path()) == bytes(&fixture(name)), "{name}");
        let config = |folder: &Path| -> Value {
            serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
        };
        let (ours, theirs) = (config(out.path()), config(&fixture(name)));
        assert_eq!(
            ours["quantization_config"], theirs["quantization_config"],
            "{name}"
        );
    }
    let out = tempfile::tempdir().unwrap();
    let stopped = quantize_folder(&base, NF4, out.path(), &|| false);
    assert!(matches!(stopped, Err(adapters::Error::Interrupted)));
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn a_layer_that_was_left_dense_stays_dense() {
    let folder = fixture("nf4_double_bf16");
    let model = try_load(&folder, Some(NF4)).unwrap();
    let down = &model.layers[0].mlp.down_proj.base;
    assert!(matches!(down, adapters::BaseLinear::Dense(_)));
    assert!(matches!(
        model.layers[1].mlp.down_proj.base,
        adapters::BaseLinear::Quantized(_)
    ));
}

/// A copy of a fixture with other tensors or another `quantization_config`.
fn changed(
    name: &str,
    change: impl FnOnce(&mut BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>, &mut Value),
) -> TempDir {
    let folder = fixture(name);
    let bytes = std::fs::read(folder.join(MODEL_FILE)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = tensors
        .iter()
        .map(|(name, t)| {
            (
                name.to_owned(),
                (t.dtype(), t.shape().to_vec(), t.data().to_vec()),
            )
        })
        .collect();
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    change(&mut tensors, &mut config);
    let copy = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name, view)
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(copy.path().join(MODEL_FILE), file).unwrap();
    std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    copy
}

const Q_PROJ: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn a_part_that_is_missing_or_wrong_is_named() {
    let absmax = format!("{Q_PROJ}.absmax");
    let state = format!("{Q_PROJ}.quant_state.bitsandbytes__nf4");
    let with_state = |text: &str| {
        let text = text.to_owned();
        let state = state.clone();
        changed("nf4", move |tensors, _| {
            tensors.insert(state, (Dtype::U8, vec![text.len()], text.into_bytes()));
        })
    };
    let missing = changed("nf4", |tensors, _| {
        tensors.remove(&absmax);
        tensors.remove("model.norm.weight");
    });
    let short = changed("nf4", |tensors, _| {
        let (_, shape, bytes) = tensors.get_mut(&absmax).unwrap();
        shape[0] -= 1;
        bytes.truncate(shape[0] * 4);
    });
    let in_bytes = changed("nf4_double", |tensors, _| {
        let (dtype, ..) = tensors.get_mut(&absmax).unwrap();
        *dtype = Dtype::I8;
    });
    let nested = changed("nf4_double", |tensors, _| {
        tensors.remove(&format!("{Q_PROJ}.nested_quant_map"));
    });
    let not_finite = changed("nf4", |tensors, _| {
        let (.., bytes) = tensors.get_mut(&absmax).unwrap();
        bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let other_book = changed("nf4", |tensors, _| {
        let (.., bytes) = tensors.get_mut(&format!("{Q_PROJ}.quant_map")).unwrap();
        bytes[0..4].copy_from_slice(&2.0_f32.to_le_bytes());
    });
    let unknown = changed("nf4", |tensors, _| {
        tensors.insert(
            "model.extra.weight.absmax".into(),
            (Dtype::F32, vec![1], vec![0; 4]),
        );
    });
    let norm = changed("nf4", |tensors, _| {
        let name = "model.norm.weight.quant_state.bitsandbytes__nf4";
        tensors.insert(name.into(), (Dtype::U8, vec![2], b"{}".to_vec()));
    });
    let short_book = changed("nf4", |tensors, _| {
        let (_, shape, bytes) = tensors.get_mut(&format!("{Q_PROJ}.quant_map")).unwrap();
        shape[0] = 15;
        bytes.truncate(60);
    });
    let infinite = changed("nf4_double", |tensors, _| {
        let (_, shape, bytes) = tensors.get_mut(&state).unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        let (before, _) = text.split_once("\"nested_offset\"").unwrap();
        *bytes = format!("{before}\"nested_offset\": 1e300}}").into_bytes();
        shape[0] = bytes.len();
    });
    let no_utf8 = changed("nf4", |tensors, _| {
        tensors.insert(state.clone(), (Dtype::U8, vec![3], vec![0xff, 0xfe, 0]));
    });
    let state_of = |size: usize, shape: &str| {
        with_state(&format!(
            r#"{{"quant_type": "nf4", "blocksize": {size}, "dtype": "float32", "shape": {shape}}}"#
        ))
    };
    for (folder, words) in [
        (
            short_book,
            vec!["q_proj.weight.quant_map is [15]", "expected 16 values"],
        ),
        (infinite, vec!["nested_offset[0] is inf"]),
        (no_utf8, vec!["quant_state.bitsandbytes__nf4"]),
        (
            state_of(1 << 62, "[64, 64]"),
            vec!["blocksize is 4611686018427387904"],
        ),
        (state_of(0, "[64, 64]"), vec!["blocksize is 0"]),
        (
            state_of(64, "[9223372036854775808, 2]"),
            vec!["expected [64, 64]"],
        ),
        (state_of(64, "[-1, 64]"), vec!["invalid value"]),
        (state_of(64, "[]"), vec!["shape is []"]),
        (
            missing,
            vec![
                "q_proj.weight.absmax is missing",
                "model.norm.weight is missing",
            ],
        ),
        (
            short,
            vec!["q_proj.weight.absmax is [63] of type F32, expected 64 values of type F32"],
        ),
        (
            in_bytes,
            vec!["q_proj.weight.absmax is [64] of type I8, expected 64 values of type U8"],
        ),
        (nested, vec!["q_proj.weight.nested_quant_map is missing"]),
        (not_finite, vec!["weight.absmax[2] is NaN"]),
        (
            other_book,
            vec!["q_proj.weight.quant_map", "is not the code book of nf4"],
        ),
        (unknown, vec!["model.extra.weight.absmax is unexpected"]),
        (
            norm,
            vec!["model.norm.weight.quant_state.bitsandbytes__nf4 is unexpected"],
        ),
        (
            with_state(
                r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "int32", "shape": [64, 64]}"#,
            ),
            vec!["dtype is int32: expected float32, float16 or bfloat16"],
        ),
        (
            with_state("{\"quant_type\": "),
            vec!["quant_state.bitsandbytes__nf4", "EOF"],
        ),
        (
            state_of(48, "[64, 64]"),
            vec!["blocksize is 48: expected a power of two"],
        ),
        (
            state_of(64, "[64, 32]"),
            vec!["shape is [64, 32]: expected [64, 64]"],
        ),
    ] {
        let refusal = refusal(folder.path(), None);
        for word in words {
            assert!(refusal.contains(word), "{word} in {refusal}");
        }
    }
}

#[test]
fn another_quantization_is_named_and_refused() {
    let with_config =
        |config: Value| changed("nf4", |_, json| json["quantization_config"] = config);
    let int8 = with_config(json!({"quant_method": "bitsandbytes", "load_in_8bit": true}));
    assert!(refusal(int8.path(), None).contains("quantization_config.load_in_8bit is true"));
    let gptq = with_config(json!({"quant_method": "gptq", "bits": 4}));
    assert!(refusal(gptq.path(), None).contains("quantization_config.quant_method is \"gptq\""));
    let (_, fp4, _) = CASES[3];
    let refusal = refusal(&fixture("nf4"), Some(fp4));
    assert!(
        refusal.contains("is stored as nf4 in blocks of 64, and fp4 is asked for"),
        "{refusal}"
    );
}

#[test]
fn a_weight_that_is_not_finite_cannot_be_quantised() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        dense().join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let bytes = std::fs::read(dense().join(MODEL_FILE)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let start = tensors.tensor(Q_PROJ).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    let mut bytes = bytes.clone();
    bytes[start + 130..start + 132].copy_from_slice(&[0x80, 0x7f]); // infinity in bf16
    std::fs::write(folder.path().join(MODEL_FILE), bytes).unwrap();
    assert!(try_load(folder.path(), None).is_ok());
    let refusal = refusal(folder.path(), Some(NF4));
    assert!(
        refusal.contains(&format!("cannot quantise {Q_PROJ}")),
        "{refusal}"
    );
    assert!(refusal.contains("weight[1, 1] is inf"), "{refusal}");
}

#[test]
fn an_adapter_remembers_the_quantization_it_was_trained_on() {
    let device = Default::default();
    let config = lora(Targets::AllLinear);
    let folder = tempfile::tempdir().unwrap();
    let mut model = try_load(&dense(), Some(DOUBLE)).unwrap();
    attach(&mut model, &config, 1, &device).unwrap();
    peft::save(&model, &config, "base", folder.path()).unwrap();

    let other = |scheme| {
        let model = try_load(&dense(), scheme).unwrap();
        peft::other_base(&model, folder.path()).unwrap()
    };
    assert_eq!(other(Some(DOUBLE)), None);
    let theirs = "nf4 in blocks of 64 with double quantization";
    assert_eq!(
        other(Some(NF4)),
        Some([theirs.to_owned(), "nf4 in blocks of 64".to_owned()])
    );
    assert_eq!(other(None), Some([theirs.to_owned(), "none".to_owned()]));
    let by_peft = root("tests/fixtures/qv");
    let model = try_load(&dense(), None).unwrap();
    let other = peft::other_base(&model, &by_peft).unwrap();
    assert_eq!(other, None, "PEFT does not say");
}

#[test]
fn a_module_in_4_bits_cannot_be_trained_as_a_whole() {
    let mut model = try_load(&dense(), Some(NF4)).unwrap();
    let mut config = lora(Targets::Names(vec!["q_proj".into()]));
    config.selection.modules_to_save = vec!["up_proj".into()];
    let error = attach(&mut model, &config, 1, &Default::default()).unwrap_err();
    let words = "model.layers.0.mlp.up_proj is in 4 bits and cannot be trained as a whole";
    assert!(error.to_string().contains(words), "{error}");
}
