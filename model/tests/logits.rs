//! Logits of every Llama variant against transformers (`fixtures/models/make.py`).

use std::path::{Path, PathBuf};

use burn::tensor::{Int, Tensor, TensorData};
use model::checkpoint::{Checkpoint, MODEL_FILE};
use model::config::LlamaConfig;
use model::kv_cache::KvCache;
use model::linear::Linear;
use model::llama::Llama;
use model::load::{LinearSource, Parts};
use model::rope::Rope;
use model::segments::Segments;
use safetensors::SafeTensors;

/// The tests run on the processor, or with `--features wgpu` on the first graphics adapter.
#[cfg(not(feature = "wgpu"))]
type B = burn::backend::Flex;
#[cfg(feature = "wgpu")]
type B = burn::backend::Wgpu;

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let folders = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = folders.filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 10);
    folders
}

fn load(folder: &Path) -> Llama<B, Linear<B>> {
    let config = LlamaConfig::from_file(&folder.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open_folder(folder).unwrap();
    model::load::load(&config, &checkpoint, &Default::default()).unwrap()
}

/// `input_ids` `[b, s]` and `logits` `[b · s, v]`.
fn expected(folder: &Path) -> (Vec<i64>, [usize; 2], Tensor<B, 2>) {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let shape = [ids.shape()[0], ids.shape()[1]];
    let (ids, _) = ids.data().as_chunks::<8>();
    let ids = ids.iter().map(|b| i64::from_le_bytes(*b)).collect();
    let logits = file.tensor("logits").unwrap();
    let v = logits.shape()[2];
    let (values, _) = logits.data().as_chunks::<4>();
    let values: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let logits = TensorData::new(values, [shape[0] * shape[1], v]);
    (ids, shape, Tensor::from_data(logits, &Default::default()))
}

fn max_off(a: Tensor<B, 2>, b: Tensor<B, 2>) -> f32 {
    (a - b).abs().max().into_scalar()
}

#[test]
fn logits_equal_those_of_transformers() {
    let device = Default::default();
    for folder in fixtures() {
        let model = load(&folder);
        let (ids, [b, s], logits) = expected(&folder);
        let rope = Rope::new(&model.config, Segments::new(vec![s; b]), &device);
        let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [b * s]), &device);
        let hidden = model.forward(ids, &rope, None);
        let off = max_off(model.logits(hidden), logits);
        // f32 sums in another order over two layers: a few 1e-6 of logits around 3
        assert!(off < 2e-5, "{}: {off}", folder.display());
    }
}

#[test]
fn a_cache_changes_nothing() {
    let device = Default::default();
    for folder in fixtures() {
        let model = load(&folder);
        if matches!(
            model.config.rope_scaling,
            model::config::RopeScaling::Dynamic { .. }
        ) {
            continue; // there the keys of early positions depend on how long the text is by then
        }
        let (ids, [b, s], logits) = expected(&folder);
        for rows in [1, b] {
            let mut cache = KvCache::new(model.config.num_hidden_layers);
            for (start, end) in [(0, 17), (17, 18), (18, 19), (19, s)] {
                let segments = Segments::new(vec![end - start; rows]).after(start);
                let rope = Rope::new(&model.config, segments, &device);
                let part = |row: usize| ids[row * s + start..row * s + end].to_vec();
                let part: Vec<i64> = (0..rows).flat_map(part).collect();
                let part = TensorData::new(part, [rows * (end - start)]);
                let hidden =
                    model.forward(Tensor::from_data(part, &device), &rope, Some(&mut cache));
                let wanted = |row: usize| logits.clone().narrow(0, row * s + start, end - start);
                let wanted = Tensor::cat((0..rows).map(wanted).collect(), 0);
                let off = max_off(model.logits(hidden), wanted);
                assert!(off < 2e-5, "{} from {start}: {off}", folder.display());
            }
        }
    }
}

/// As on a device that takes no large tensors: embeddings, the output layer and matrices in parts,
/// some of them smaller than others.
#[test]
fn weights_in_parts_change_nothing() {
    let device = Default::default();
    for name in ["gqa", "tied_llama3"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/models")
            .join(name);
        let config = LlamaConfig::from_file(&folder.join("config.json")).unwrap();
        let checkpoint = Checkpoint::open_folder(&folder).unwrap();
        let values = |name: &str, _: &[usize]| checkpoint.read(name);
        let linear = |source: LinearSource<B>| source.linear();
        let row = 4 * config.hidden_size as u64;
        let parts = Parts::new(&config, &device, values, linear).within(7 * row + 3);
        let split: Llama<B, Linear<B>> = parts.llama().unwrap();
        assert!(split.embed_tokens.is_split() && split.layers[0].mlp.up_proj.weight.is_split());

        let (ids, [b, s], expected) = expected(&folder);
        let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [b * s]), &device);
        let rope = Rope::new(&config, Segments::new(vec![s; b]), &device);
        let hidden = split.forward(ids, &rope, None);
        let off = max_off(split.logits(hidden), expected);
        assert!(off < 2e-5, "{name}: {off}");
    }
}

#[test]
fn a_missing_shard_or_tensor_is_named() {
    let sharded = fixtures()
        .into_iter()
        .find(|path| path.ends_with("sharded_bf16"))
        .unwrap();
    let copy = tempfile::tempdir().unwrap();
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(&sharded).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        std::fs::copy(entry.path(), copy.path().join(&name)).unwrap();
        if name.ends_with(".safetensors") && name.starts_with("model-") {
            shards.push(name);
        }
    }
    std::fs::remove_file(copy.path().join(&shards[0])).unwrap();
    let error = Checkpoint::open_folder(copy.path())
        .unwrap_err()
        .to_string();
    assert!(error.contains(&shards[0]), "{error}");

    std::fs::remove_file(copy.path().join("model.safetensors.index.json")).unwrap();
    std::fs::copy(copy.path().join(&shards[1]), copy.path().join(MODEL_FILE)).unwrap();
    let config = LlamaConfig::from_file(&copy.path().join("config.json")).unwrap();
    let checkpoint = Checkpoint::open_folder(copy.path()).unwrap();
    let loaded = model::load::load::<B>(&config, &checkpoint, &Default::default());
    let error = loaded.unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
}
