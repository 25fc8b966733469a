//! Several adapters on one model, each with a weight: what they do to a layer together is one update.
//!
//! Shapes: `out` and `in` of a linear layer, `r` the rank of the update.
//!
//! Source: `add_weighted_adapter` in `peft/tuners/lora/model.py`.

mod adapter;

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::config::LlamaConfig;
use model::weight::{named_param, param_id};

use crate::attach::{self, AdaptedLlama, unfreeze};
use crate::base::AdaptedBackend;
use crate::config::Layer;
use crate::error::{Error, Result};
use crate::methods::lora::Lora;
use crate::methods::{Computes, Update};
use crate::parameters::write_parameters;
use crate::peft;
pub(crate) use adapter::Adapter;
use adapter::conflicts;

/// An adapter folder, and how much of its update is added: 1 is all of it, -1 takes it away.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// The folder.
    pub folder: PathBuf,
    /// The factor.
    pub weight: f64,
}

impl Weighted {
    /// All of an adapter.
    pub fn whole(folder: &Path) -> Self {
        Self {
            folder: folder.into(),
            weight: 1.0,
        }
    }
}

/// How the weights `w` and the scalings `s` of LoRA adapters make one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Combination {
    /// `Σ w s B A`: what the adapters do, added up; its rank is the sum of theirs.
    #[default]
    Cat,
    /// `(Σ √|w s| B) (Σ ±√|w s| A)`, of their rank, which must be the same. Of several adapters that
    /// is something else than what they do.
    Linear,
}

impl Combination {
    /// PEFT's names.
    pub const NAMES: [&str; 2] = ["cat", "linear"];

    /// The combination of a name.
    pub fn named(name: &str) -> Option<Self> {
        let at = Self::NAMES.iter().position(|known| *known == name)?;
        Some([Self::Cat, Self::Linear][at])
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// Compares adapters with a model's config, and with each other if they are several: what [`combine`]
/// refuses without having read weights.
///
/// # Errors
/// Those of [`combine`].
pub fn check_fit(
    adapters: &[Weighted],
    combination: Combination,
    model: &LlamaConfig,
) -> Result<()> {
    match adapters {
        [one] if one.weight == 1.0 => peft::open(&one.folder, model).map(|_| ()),
        _ => Adapters::fitting(adapters, combination, model).map(|_| ()),
    }
}

/// Puts several adapters on a model, or one with a weight, as one update of each layer; modules that
/// they replace take the place of the model's own. Any single adapter as a whole goes as well.
///
/// # Errors
/// Those of [`peft::load`]; [`Error::Combine`] lists everything that does not go together.
pub fn combine<B: AdaptedBackend>(
    mut model: AdaptedLlama<B>,
    adapters: &[Weighted],
    combination: Combination,
    device: &B::Device,
) -> Result<AdaptedLlama<B>> {
    match adapters {
        [] => return Ok(model),
        [one] if one.weight == 1.0 => return Ok(peft::load(model, &one.folder, device)?.0),
        _ => {}
    }
    let adapters = Adapters::fitting(adapters, combination, &model.config)?;
    for adapter in &adapters.all {
        adapter.opened.check_copies_of(&model)?;
    }
    if model.config.tie_word_embeddings && adapters.touch_embeddings() {
        attach::untie(&mut model);
    }
    attach::open(&mut model, |name| adapters.adapt(name))?;
    for (name, linear) in model.projections_mut() {
        linear.update = adapters.update(&name, device)?;
        if let Some(update) = &mut linear.update {
            attach::check_whole(linear.base.is_split(), &name)?;
            update.settle(&linear.base);
        }
    }
    unfreeze(&mut model, |tensor| adapters.replacement(tensor).is_some())?;
    let mut values = Vec::new();
    for adapter in &adapters.all {
        for part in adapter.opened.whole() {
            values.push((param_id(&part.name), adapter.opened.read(part)?));
        }
    }
    Ok(write_parameters(model, values.into_iter().collect()))
}

/// Adapters that each fit the model.
pub(crate) struct Adapters {
    pub(crate) all: Vec<Adapter>,
    combination: Combination,
}

impl Adapters {
    /// Opens adapters on a model.
    pub(crate) fn open(
        adapters: &[Weighted],
        combination: Combination,
        model: &LlamaConfig,
    ) -> Result<Self> {
        let open = |adapter: &Weighted| Adapter::open(adapter, model);
        let all = adapters.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { all, combination })
    }

    /// Opens adapters on a model that go together.
    fn fitting(
        adapters: &[Weighted],
        combination: Combination,
        model: &LlamaConfig,
    ) -> Result<Self> {
        let adapters = Self::open(adapters, combination, model)?;
        match adapters.conflicts() {
            problems if problems.is_empty() => Ok(adapters),
            problems => Err(Error::Combine { problems }),
        }
    }

    /// What keeps them from being used together.
    pub(crate) fn conflicts(&self) -> Vec<String> {
        conflicts(&self.all, self.combination)
    }

    /// Whether a model where embeddings and `lm_head` are one has them apart with these.
    pub(crate) fn touch_embeddings(&self) -> bool {
        self.all.iter().any(Adapter::touches_embeddings)
    }

    /// The adapter that replaces a tensor as a whole, and the name that it has for it.
    pub(crate) fn replacement(&self, name: &str) -> Option<(&Adapter, &str)> {
        self.all.iter().find_map(|adapter| {
            let mut whole = adapter.opened.whole();
            let part = whole.find(|part| part.name == name)?;
            Some((adapter, part.key.as_str()))
        })
    }

    /// Whether they have an update of a layer.
    pub(crate) fn adapt(&self, layer: &str) -> bool {
        self.of_layer(layer).next().is_some()
    }

    /// The adapters that adapt a layer.
    fn of_layer(&self, name: &str) -> impl Iterator<Item = (&Adapter, &Layer)> {
        self.all
            .iter()
            .filter_map(move |adapter| Some((adapter, adapter.layer(name)?)))
    }

    /// What they do to a layer together, if one does anything.
    pub(crate) fn update<B: Backend>(
        &self,
        layer: &str,
        device: &B::Device,
    ) -> Result<Option<Update<B>>> {
        let Some((first, of_first)) = self.of_layer(layer).next() else {
            return Ok(None);
        };
        if first.lora().is_none() {
            return first.update(of_first, device); // the only one, see `conflicts`
        }
        let loras = self.of_layer(layer);
        let factors = loras.filter_map(|(adapter, layer)| adapter.factors(layer).transpose());
        let factors = factors.collect::<Result<Vec<_>>>()?;
        let (rank, a, b) = match self.combination {
            Combination::Cat => cat(&factors, of_first.shape),
            Combination::Linear => linear(&factors),
        };
        let [out, r#in] = of_first.shape;
        let param = |part: &str, values, shape: [usize; 2]| {
            let tensor = Tensor::from_data(TensorData::new(values, shape), device);
            named_param(&format!("{layer}.{part}"), tensor)
        };
        Ok(Some(Update::Lora(Lora {
            lora_a: param("lora_a", a, [rank, r#in]),
            lora_b: param("lora_b", b, [out, rank]),
            magnitude: None,
            base_squares: None,
            start: None,
            scaling: 1.0,
            dropout: 0.0,
            seed: None,
        })))
    }
}

/// The update `factor · b a` of one LoRA adapter.
struct Factors {
    rank: usize,
    factor: f64,
    /// `[rank, in]`.
    a: Vec<f32>,
    /// `[out, rank]`.
    b: Vec<f32>,
}

/// All `a` on top of each other, all `b` side by side with the factors in them.
fn cat(all: &[Factors], [out, _]: [usize; 2]) -> (usize, Vec<f32>, Vec<f32>) {
    let rank: usize = all.iter().map(|one| one.rank).sum();
    let mut b = vec![0.0; out * rank];
    let mut column = 0;
    for one in all {
        let factor = one.factor as f32;
        for (row, own) in b.chunks_mut(rank).zip(one.b.chunks(one.rank)) {
            let row = row[column..].iter_mut().zip(own);
            row.for_each(|(b, x)| *b = factor * x);
        }
        column += one.rank;
    }
    let a = all.iter().flat_map(|one| &one.a).copied().collect();
    (rank, a, b)
}

/// The sums of all `a` and of all `b`, each times the root of its factor; the sign goes to `a`.
fn linear(all: &[Factors]) -> (usize, Vec<f32>, Vec<f32>) {
    let sum = |of: fn(&Factors) -> (f64, &[f32])| {
        let mut sum = Vec::new();
        for one in all {
            let (factor, values) = of(one);
            sum.resize(values.len(), 0.0);
            let pairs = sum.iter_mut().zip(values);
            pairs.for_each(|(sum, x)| *sum += factor as f32 * x);
        }
        sum
    };
    let a = sum(|one| (one.factor.abs().sqrt().copysign(one.factor), &one.a));
    let b = sum(|one| (one.factor.abs().sqrt(), &one.b));
    (all[0].rank, a, b) // of each the same, see `conflicts`
}
