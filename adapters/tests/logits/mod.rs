//! Fixtures of adapters and models, and how far logits are from those that belong to them.

use std::path::{Path, PathBuf};

use adapters::{AdaptedLlama, Weighted};
use burn::tensor::{Tensor, TensorData};
use model::folder::ModelFolder;
use model::rope::Rope;
use model::segments::Segments;
use safetensors::SafeTensors;

use crate::harness::{B, root};

/// A folder of PEFT's adapters.
pub fn fixture(name: &str) -> PathBuf {
    root("tests/fixtures").join(name)
}

pub fn base(name: &str) -> PathBuf {
    root("../model/tests/fixtures/models").join(name)
}

pub fn whole(folder: impl Into<PathBuf>) -> Weighted {
    weighted(folder, 1.0)
}

pub fn weighted(folder: impl Into<PathBuf>, weight: f64) -> Weighted {
    let folder = folder.into();
    Weighted { folder, weight }
}

pub fn load(folder: &Path) -> AdaptedLlama<B> {
    let folder = ModelFolder::open(folder).unwrap();
    let checkpoint = folder.checkpoint().unwrap();
    adapters::load(&folder.config, &checkpoint, None, &Default::default()).unwrap()
}

/// The base that an adapter of the fixtures was made on.
#[allow(
    dead_code,
    reason = "not all tests go through whole folders of adapters"
)]
pub fn base_of(adapter: &Path) -> AdaptedLlama<B> {
    let name = std::fs::read_to_string(adapter.join("base.txt")).unwrap();
    load(&base(name.trim()))
}

/// Logits of the sequences `[b, s]`, row by row.
pub fn logits(model: &AdaptedLlama<B>, ids: &[i64], [b, s]: [usize; 2]) -> Vec<f32> {
    let device = Default::default();
    let ids = Tensor::from_data(TensorData::new(ids.to_vec(), [b * s]), &device);
    let rope = Rope::new(&model.config, Segments::new(vec![s; b]), &device);
    let logits = model.logits(model.forward(ids, &rope, None));
    logits.into_data().into_vec().unwrap()
}

/// What a generator has written.
pub struct Expected(Vec<u8>);

impl Expected {
    pub fn read(folder: &Path) -> Self {
        Self(std::fs::read(folder.join("expected.safetensors")).unwrap())
    }

    pub fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    pub fn ids(&self) -> (Vec<i64>, [usize; 2]) {
        let tensors = self.tensors();
        let ids = tensors.tensor("input_ids").unwrap();
        let (numbers, _) = ids.data().as_chunks();
        let numbers = numbers.iter().map(|b| i64::from_le_bytes(*b)).collect();
        (numbers, [ids.shape()[0], ids.shape()[1]])
    }

    pub fn logits(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let logits = tensors.tensor(name).unwrap();
        let (numbers, _) = logits.data().as_chunks();
        numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// The largest difference between a model's logits and these.
    pub fn off(&self, name: &str, model: &AdaptedLlama<B>) -> f32 {
        let (ids, shape) = self.ids();
        largest_difference(&self.logits(name), &logits(model, &ids, shape))
    }
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}
