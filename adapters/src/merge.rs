//! From a base model and adapters on it to a model that needs none: `W + Σ w · s · B A`.
//!
//! Shapes: `out` and `in` of a linear layer, `r` the sum of all adapters' ranks.
//!
//! Source: `merge_and_unload` and `add_weighted_adapter(combination_type="cat")` in
//! `peft/tuners/lora/model.py`.

mod adapter;

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::checkpoint::{Checkpoint, LazyTensor, MODEL_FILE, encode, fits, write_lazily};
use model::config::LlamaConfig;
use model::folder::{ModelFolder, edit_config};
use model::load::LinearSource;
use model::weight::named_param;
use quant::{Quantized, Scheme};
use safetensors::Dtype;

use crate::base::{Base, BaseLinear, EMBEDDINGS, HEAD};
use crate::config::LoraLayer;
use crate::error::{Error, Result};
use crate::lora::{AdaptedLinear, Lora};
use crate::peft::{self, in_words};
use adapter::{Adapter, conflicts, trained_on};

/// How many elements are merged at a time.
const PART: usize = 1 << 22;

/// Which weights the updates are added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Onto {
    /// Those of the model's files.
    Original,
    /// What the linear layers decode to when they are in the 4 bits that the adapters were trained
    /// on.
    Dequantized,
}

/// An adapter folder, and how much of its update is added: 1 is all of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// The folder.
    pub folder: PathBuf,
    /// The factor.
    pub weight: f64,
}

/// A merge that has been checked and not begun.
pub struct Merge<'a> {
    pub(crate) source: &'a ModelFolder,
    pub(crate) base: Base<'a>,
    /// Of the merged model.
    pub(crate) config: LlamaConfig,
    adapters: Vec<Adapter>,
    onto: Onto,
}

/// A tensor of which rows can be read.
pub(crate) enum Weight<'a> {
    /// In a file, under this name.
    Dense(&'a Checkpoint, String),
    /// In 4 bits.
    Decoded(Quantized),
}

impl<'a> Merge<'a> {
    /// Checks a model, adapters on it and how they are to be merged. Without `onto`, the updates go
    /// onto the original weights, if `checkpoint`, that of `source`, has them.
    ///
    /// Adapters on the `lm_head` or the embeddings of a model where the two are one give a model
    /// where they are two. (`merge_and_unload` of PEFT 0.21 does so for `modules_to_save`; LoRA on
    /// such an `lm_head` it merges into the embeddings as well, which is another model.)
    ///
    /// # Errors
    /// What [`crate::load`] and [`peft::load`] refuse; [`Error::NoOriginal`]; [`Error::Merge`] lists
    /// everything that does not go together.
    pub fn new(
        source: &'a ModelFolder,
        checkpoint: &'a Checkpoint,
        adapters: &[Weighted],
        onto: Option<Onto>,
    ) -> Result<Self> {
        let base = Base::new(&source.config, checkpoint, None)?;
        if base.is_stored && onto == Some(Onto::Original) {
            return Err(Error::NoOriginal {
                path: source.path.clone(),
            });
        }
        let open = |adapter: &Weighted| Adapter::open(adapter, &source.config);
        let adapters: Vec<_> = adapters.iter().map(open).collect::<Result<_>>()?;
        let mut problems = conflicts(&adapters);
        let scheme = match base.is_stored {
            true => base.scheme,
            false => trained_on(&adapters, onto, &mut problems),
        };
        if !problems.is_empty() {
            return Err(Error::Merge { problems });
        }
        let untied = adapters.iter().any(Adapter::touches_embeddings);
        let merge = Self {
            source,
            config: LlamaConfig {
                tie_word_embeddings: source.config.tie_word_embeddings && !untied,
                quantization_config: None,
                ..source.config.clone()
            },
            onto: match base.is_stored {
                true => Onto::Dequantized,
                false => onto.unwrap_or(Onto::Original),
            },
            base: Base { scheme, ..base },
            adapters,
        };
        for (name, shape) in merge.config.tensors() {
            merge.dtype(&name, &shape)?;
        }
        Ok(merge)
    }

    /// Writes the merged model into the folder `to`, which must exist, tensor by tensor; each has
    /// the type that it had. Before each tensor, `go_on` is asked.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `go_on` says so; [`Error::NotFinite`]; [`Error::Weight`];
    /// [`Error::File`] for what cannot be read or written.
    pub fn write(&self, to: &Path, go_on: &dyn Fn() -> bool) -> Result<()> {
        let tensors = self.config.tensors().into_iter().map(|(name, shape)| {
            let dtype = self.dtype(&name, &shape)?;
            Ok(LazyTensor {
                name: name.clone(),
                dtype,
                shape: shape.clone(),
                bytes: Box::new(move || match go_on() {
                    true => self.merged(&name, &shape, dtype).map(Cow::Owned),
                    false => Err(Error::Interrupted),
                }),
            })
        });
        let tensors: Vec<LazyTensor<Error>> = tensors.collect::<Result<_>>()?;
        write_lazily(&to.join(MODEL_FILE), tensors, &[])?;
        self.source.copy_assets(to)?;
        edit_config(to, |config| {
            config.shift_remove("quantization_config");
            if self.config.tie_word_embeddings != self.source.config.tie_word_embeddings {
                config.insert("tie_word_embeddings".into(), false.into());
            }
        })?;
        Ok(())
    }

    /// Number of tensors of the merged model.
    pub fn tensors(&self) -> usize {
        self.config.tensors().len()
    }

    /// Number of modules that change: those with an update and those that are replaced.
    pub fn merged_layers(&self) -> usize {
        let tensors = self.config.tensors();
        let changes = |(name, _): &&(String, _)| match name.strip_suffix(".weight") {
            Some(module) => self.replaces(name) || self.parts(module).next().is_some(),
            None => false, // a bias goes with its weight
        };
        tensors.iter().filter(changes).count()
    }

    /// Which weights the updates are added to.
    pub fn onto(&self) -> Onto {
        self.onto
    }

    /// How the base is quantised that the adapters were trained on, as far as is known.
    pub fn trained_on(&self) -> Option<Scheme> {
        self.base.scheme
    }

    /// Adapters that were trained on another base than [`Merge::trained_on`] says, each with what
    /// its own was, in words.
    pub fn strangers(&self) -> Vec<(&Path, &str)> {
        let ours = in_words(self.base.scheme);
        let strange = |adapter: &'_ &Adapter| adapter.stated().is_some_and(|base| base != ours);
        let strange = self.adapters.iter().filter(strange);
        strange
            .filter_map(|adapter| Some((adapter.folder.as_path(), adapter.stated()?)))
            .collect()
    }

    /// A tensor before any update, dense: an adapter's if one replaces it, else the base's.
    pub(crate) fn dense(&self, name: &str) -> Weight<'_> {
        match self.replacement(name) {
            Some(adapter) => Weight::Dense(&adapter.opened.file, peft::key(name)),
            None => Weight::Dense(self.base.checkpoint, self.base_name(name).to_owned()),
        }
    }

    /// A tensor that updates are added to.
    pub(crate) fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight<'_>> {
        if self.onto == Onto::Original || self.replaces(name) {
            return Ok(self.dense(name));
        }
        Ok(match self.base.quantized(name, shape)? {
            Some(weight) => Weight::Decoded(weight),
            None => self.dense(name),
        })
    }

    /// A linear layer of the trained model.
    pub(crate) fn trained<B: Backend>(&self, source: LinearSource<B>) -> Result<AdaptedLinear<B>> {
        let lora = self.update(source.name, source.shape, source.device)?;
        let base = match self.replaces(&format!("{}.weight", source.name)) {
            true => BaseLinear::Dense(source.linear()?),
            false => self.base.linear(source)?.base,
        };
        Ok(AdaptedLinear { base, lora })
    }

    /// Whether an adapter replaces a tensor as a whole.
    pub(crate) fn replaces(&self, name: &str) -> bool {
        self.replacement(name).is_some()
    }

    fn replacement(&self, name: &str) -> Option<&Adapter> {
        self.adapters.iter().find(|adapter| adapter.replaces(name))
    }

    /// What all adapters add to a layer `[out, in]`, if one does: `lora_a` `[r, in]` and `lora_b`
    /// `[out, r]`, with the weights and scalings in `lora_b`.
    pub(crate) fn update<B: Backend>(
        &self,
        layer: &str,
        [out, r#in]: [usize; 2],
        device: &B::Device,
    ) -> Result<Option<Lora<B>>> {
        let rank: usize = self.parts(layer).map(|(_, part)| part.rank).sum();
        if rank == 0 {
            return Ok(None);
        }
        let names = ["lora_a", "lora_b"].map(|part| format!("{layer}.{part}"));
        let mut a = Vec::with_capacity(rank * r#in);
        let mut b = vec![0.0; out * rank];
        for (adapter, part) in self.parts(layer) {
            let column = a.len() / r#in;
            a.extend(adapter.opened.read(&names[0])?);
            let factor = (adapter.weight * part.scaling) as f32;
            let own = adapter.opened.read(&names[1])?; // [out, part.rank]
            for (row, own) in b.chunks_mut(rank).zip(own.chunks(part.rank)) {
                let row = row[column..].iter_mut().zip(own);
                row.for_each(|(b, x)| *b = factor * x);
            }
        }
        let tensor =
            |values, shape: [usize; 2]| Tensor::from_data(TensorData::new(values, shape), device);
        Ok(Some(Lora {
            lora_a: named_param(&names[0], tensor(a, [rank, r#in])),
            lora_b: named_param(&names[1], tensor(b, [out, rank])),
            scaling: 1.0,
            dropout: None,
        }))
    }

    /// The adapters' parts in the update of a layer.
    fn parts(&self, layer: &str) -> impl Iterator<Item = (&Adapter, &LoraLayer)> {
        self.adapters
            .iter()
            .filter_map(move |adapter| Some((adapter, adapter.layer(layer)?)))
    }

    /// The base's name of a tensor.
    fn base_name<'n>(&self, name: &'n str) -> &'n str {
        match name == HEAD && self.source.config.tie_word_embeddings {
            true => EMBEDDINGS,
            false => name,
        }
    }

    /// The type of a tensor of the merged model: that of the base's tensor.
    fn dtype(&self, name: &str, shape: &[usize]) -> Result<Dtype> {
        let name = self.base_name(name);
        Ok(match self.base.stored(name, shape)? {
            Some(stored) => stored.dtype(),
            None => self.base.checkpoint.float_dtype(name)?,
        })
    }

    /// The bytes of a tensor of the merged model.
    fn merged(&self, name: &str, shape: &[usize], dtype: Dtype) -> Result<Vec<u8>> {
        let width: usize = shape[1..].iter().product();
        let weight = self.weight(name, shape)?;
        let update = match (name.strip_suffix(".weight"), shape) {
            (Some(layer), &[out, r#in]) => {
                self.update::<Flex>(layer, [out, r#in], &Default::default())?
            }
            _ => None,
        };
        let is_changed = update.is_some() || self.replaces(name);
        let mut bytes = Vec::with_capacity(shape[0] * width * dtype.bitsize() / 8);
        let step = (PART / width).max(1);
        for start in (0..shape[0]).step_by(step) {
            let rows = start..shape[0].min(start + step);
            let mut values = weight.rows(rows.clone())?;
            if let Some(update) = &update {
                add(update, rows, &mut values);
            }
            if is_changed && !fits(&values, dtype) {
                return Err(Error::NotFinite { name: name.into() });
            }
            encode(&values, dtype, &mut bytes);
        }
        Ok(bytes)
    }
}

impl Weight<'_> {
    /// Elements of some rows.
    pub(crate) fn rows(&self, rows: Range<usize>) -> model::Result<Vec<f32>> {
        match self {
            Self::Dense(file, name) => file.read_rows(name, rows),
            Self::Decoded(weight) => {
                let [_, width] = weight.shape();
                let mut values = vec![0.0; rows.len() * width];
                weight.dequantize_rows(rows, &mut values);
                Ok(values)
            }
        }
    }
}

/// Adds rows of an update to the same rows of a weight.
fn add(update: &Lora<Flex>, rows: Range<usize>, values: &mut [f32]) {
    let b = update.lora_b.val().narrow(0, rows.start, rows.len()); // [rows, r]
    let product = b.matmul(update.lora_a.val()).into_data(); // [rows, in]
    let product = product.as_slice::<f32>().expect("computed in f32");
    values.iter_mut().zip(product).for_each(|(w, x)| *w += x);
}
