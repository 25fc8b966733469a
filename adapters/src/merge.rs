//! From a base model and adapters on it to a model that needs none.
//!
//! Source: `merge_and_unload` in `peft/tuners/lora/model.py`.

mod embeddings;
mod kept;

use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;
use std::path::Path;

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::checkpoint::{Checkpoint, LazyTensor, MODEL_FILE, encode, fits, write_lazily};
use model::config::LlamaConfig;
use model::folder::{ModelFolder, edit_config, set_dtype};
use model::llama::EMBED_TOKENS;
use model::load::LinearSource;
use quant::{Format, Quantized, Scheme};
use safetensors::Dtype;

use crate::base::{AdaptedBackend, Base, BaseLinear, EMBEDDINGS, HEAD};
use crate::combine::{Adapter, Adapters, Combination, Weighted};
use crate::error::{Error, Result};
use crate::linear::AdaptedLinear;
use crate::methods::{Computes, Update};
use crate::peft::in_words;
pub use kept::Kept;

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

/// A merge that has been checked and not begun.
pub struct Merge<'a> {
    pub(crate) source: &'a ModelFolder,
    pub(crate) base: Base<'a>,
    /// Of the merged model.
    pub(crate) config: LlamaConfig,
    adapters: Adapters,
    onto: Onto,
    /// That of all tensors of the merged model; without, each has the type that it had.
    dtype: Option<Dtype>,
}

/// A tensor of which rows can be read.
pub(crate) enum Weight<'a> {
    /// In a file, under this name.
    Dense(&'a Checkpoint, String),
    /// In 4 bits.
    Decoded(Quantized),
    /// Embeddings with an update in them.
    Adapted(Box<embeddings::Adapted<'a>>),
}

impl<'a> Merge<'a> {
    /// Checks a model, adapters on it and how they are to be merged. Without `onto`, the updates go
    /// onto the original weights, if `checkpoint`, that of `source`, has them.
    ///
    /// Adapters on the `lm_head` or the embeddings of a model where the two are one give a model
    /// where they are two. (`merge_and_unload` of PEFT 0.21 does so for `modules_to_save`; LoRA on
    /// one of the two it merges into the other as well, which is another model.)
    ///
    /// # Errors
    /// What [`crate::load`] and [`crate::peft::load`] refuse; [`Error::NoOriginal`];
    /// [`Error::NotInWeights`]; [`Error::Merge`] lists everything that does not go together.
    pub fn new(
        source: &'a ModelFolder,
        checkpoint: &'a Checkpoint,
        adapters: &[Weighted],
        combination: Combination,
        onto: Option<Onto>,
    ) -> Result<Self> {
        let base = Base::new(&source.config, checkpoint, None)?;
        if base.is_stored && onto == Some(Onto::Original) {
            return Err(Error::NoOriginal {
                path: source.path.clone(),
            });
        }
        let adapters = Adapters::open(adapters, combination, &source.config)?;
        let problems: Vec<_> = adapters.all.iter().filter_map(not_in_weights).collect();
        if !problems.is_empty() {
            return Err(Error::NotInWeights { problems });
        }
        let mut problems = adapters.conflicts();
        let scheme = match base.is_stored {
            true => base.scheme,
            false => trained_on(&adapters.all, onto, &mut problems),
        };
        if !problems.is_empty() {
            return Err(Error::Merge { problems });
        }
        let untied = adapters.touch_embeddings();
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
            dtype: None,
        };
        for (name, shape) in merge.config.tensors() {
            merge.dtype(&name, &shape)?;
        }
        for adapter in &merge.adapters.all {
            adapter.opened.check_copies(|copy, rows| {
                Ok(merge.weight(&copy.name, &copy.shape)?.rows(rows)?)
            })?;
        }
        Ok(merge)
    }

    /// The same merge into numbers of another type than each tensor has: F32, F16 or BF16.
    pub fn into_dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Writes the merged model into the folder `to`, which must exist, tensor by tensor. Before each
    /// tensor, `go_on` is asked. Returns how much of the updates is left where they are added to
    /// weights that are then rounded to their type, see [`Kept`].
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `go_on` says so; [`Error::NotFinite`]; [`Error::Weight`];
    /// [`Error::File`] for what cannot be read or written.
    pub fn write(&self, to: &Path, go_on: &dyn Fn() -> bool) -> Result<Kept> {
        let kept = Cell::new(Kept::default());
        let tensors = self.config.tensors().into_iter().map(|(name, shape)| {
            let (dtype, kept) = (self.dtype(&name, &shape)?, &kept);
            Ok(LazyTensor {
                name: name.clone(),
                dtype,
                shape: shape.clone(),
                bytes: Box::new(move || match go_on() {
                    true => self.merged(&name, &shape, dtype, kept).map(Cow::Owned),
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
            if let Some(dtype) = self.dtype {
                set_dtype(config, dtype);
            }
        })?;
        Ok(kept.get())
    }

    /// Number of tensors of the merged model.
    pub fn tensors(&self) -> usize {
        self.config.tensors().len()
    }

    /// Number of modules that change: those with an update and those that are replaced.
    pub fn merged_layers(&self) -> usize {
        let tensors = self.config.tensors();
        let changes = |(name, _): &&(String, _)| match name.strip_suffix(".weight") {
            Some(module) => self.replaces(name) || self.adapters.adapt(module),
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
        let strange = self.adapters.all.iter().filter(strange);
        strange
            .filter_map(|adapter| Some((adapter.folder.as_path(), adapter.stated()?)))
            .collect()
    }

    /// A tensor before any update, dense: an adapter's if one replaces it, else the base's.
    pub(crate) fn dense(&self, name: &str) -> Weight<'_> {
        match self.adapters.replacement(name) {
            Some((adapter, key)) => Weight::Dense(&adapter.opened.file, key.to_owned()),
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
    pub(crate) fn trained<B: AdaptedBackend>(
        &self,
        source: LinearSource<B>,
    ) -> Result<AdaptedLinear<B>> {
        let update = self.update(source.name, source.device)?;
        let base = match self.replaces(&format!("{}.weight", source.name)) {
            true => BaseLinear::Dense(source.linear()?),
            false => self.base.linear(source)?.base,
        };
        Ok(AdaptedLinear { base, update })
    }

    /// Whether an adapter replaces a tensor as a whole.
    pub(crate) fn replaces(&self, name: &str) -> bool {
        self.adapters.replacement(name).is_some()
    }

    /// What all adapters together do to a layer, if one does anything.
    pub(crate) fn update<B: Backend>(
        &self,
        layer: &str,
        device: &B::Device,
    ) -> Result<Option<Update<B>>> {
        self.adapters.update(layer, device)
    }

    /// The base's name of a tensor.
    fn base_name<'n>(&self, name: &'n str) -> &'n str {
        match name == HEAD && self.source.config.tie_word_embeddings {
            true => EMBEDDINGS,
            false => name,
        }
    }

    /// The type of a tensor of the merged model: that of the base's tensor, if no other is wanted.
    fn dtype(&self, name: &str, shape: &[usize]) -> Result<Dtype> {
        if let Some(dtype) = self.dtype {
            return Ok(dtype);
        }
        let name = self.base_name(name);
        Ok(match self.base.stored(name, shape)? {
            Some(stored) => stored.dtype(),
            None => self.base.checkpoint.float_dtype(name)?,
        })
    }

    /// The bytes of a tensor of the merged model; what is left of its update is added to `kept`.
    fn merged(
        &self,
        name: &str,
        shape: &[usize],
        dtype: Dtype,
        kept: &Cell<Kept>,
    ) -> Result<Vec<u8>> {
        let width: usize = shape[1..].iter().product();
        let weight = match name {
            EMBEDDINGS => self.embeddings()?,
            _ => self.weight(name, shape)?,
        };
        let update_of = |end| match name.strip_suffix(end) {
            None | Some(EMBED_TOKENS) => Ok(None),
            Some(layer) => self.update::<Flex>(layer, &Default::default()),
        };
        let (update, biased) = (update_of(".weight")?, update_of(".bias")?);
        let has_update = update.is_some() || biased.is_some();
        let is_adapted = has_update || matches!(weight, Weight::Adapted(_));
        let is_changed = is_adapted || self.replaces(name);
        let mut bytes = Vec::with_capacity(shape[0] * width * dtype.bitsize() / 8);
        let step = (PART / width).max(1);
        for start in (0..shape[0]).step_by(step) {
            let rows = start..shape[0].min(start + step);
            let before = match is_adapted {
                true => Some(weight.before(rows.clone())?),
                false => None,
            };
            let values = match (&before, &update, &biased) {
                (Some(before), Some(update), _) => merge(update, rows, before),
                (Some(before), _, Some(update)) => merge_bias(update, before),
                _ => weight.rows(rows)?,
            };
            if let Some(before) = before {
                kept.set(kept.get() + Kept::of(&before, &values, dtype));
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
            Self::Adapted(embeddings) => embeddings.rows(rows),
        }
    }

    /// As [`Weight::rows`], without an update.
    fn before(&self, rows: Range<usize>) -> model::Result<Vec<f32>> {
        match self {
            Self::Adapted(embeddings) => embeddings.base.rows(rows),
            weight => weight.rows(rows),
        }
    }
}

/// Updates rows `[rows, in]` of a weight.
fn merge(update: &Update<Flex>, rows: Range<usize>, values: &[f32]) -> Vec<f32> {
    let shape = [rows.len(), values.len() / rows.len()];
    let weight = TensorData::new(values.to_vec(), shape);
    let weight = Tensor::from_data(weight, &Default::default());
    let merged = update.merge(rows, weight).into_data();
    merged.into_vec().expect("computed in f32")
}

/// Updates a bias, all of it: it is far smaller than [`PART`].
fn merge_bias(update: &Update<Flex>, values: &[f32]) -> Vec<f32> {
    let bias = Tensor::from_data(values, &Default::default());
    let merged = update.merge_bias(bias).into_data();
    merged.into_vec().expect("computed in f32")
}

/// Why an adapter cannot be merged at all.
fn not_in_weights(adapter: &Adapter) -> Option<String> {
    let (folder, method) = (adapter.folder.display(), &adapter.opened.config.method);
    let title = method.title();
    (!method.changes_layers()).then(|| {
        format!("{folder} is {title}: what it puts in front of a text is no part of the weights")
    })
}

/// How the base is quantised that adapters of a dense model were trained on: as their files say, if
/// they agree. PEFT's files do not say; if no other does, weights are dequantised from its default.
fn trained_on(
    adapters: &[Adapter],
    onto: Option<Onto>,
    problems: &mut Vec<String>,
) -> Option<Scheme> {
    let default = Scheme::new(Format::Nf4, Scheme::DEFAULT_BLOCK_SIZE, false);
    let onto_dequantized = onto == Some(Onto::Dequantized);
    let stated: Vec<_> = adapters.iter().filter_map(Adapter::stated).collect();
    let Some(first) = stated.first() else {
        return onto_dequantized.then_some(default);
    };
    let scheme = Scheme::from_words(first);
    let agree = stated.iter().all(|other| other == first);
    if onto_dequantized && !(agree && scheme.is_some()) {
        let told = adapters.iter().map(|adapter| {
            let base = adapter.stated().unwrap_or("unknown");
            format!("{}: {base}", adapter.folder.display())
        });
        let all: Vec<_> = told.collect();
        problems.push(format!(
            "there is no one quantised base that the adapters were trained on ({})",
            all.join("; ")
        ));
    }
    scheme.filter(|_| agree)
}
