//! The adapters of a combination: each opened on the model, and all held against each other.

use std::path::PathBuf;

use burn::tensor::backend::Backend;
use model::config::LlamaConfig;
use model::llama::{EMBED_TOKENS, LM_HEAD};

use super::{Combination, Factors, Weighted};
use crate::attach::share;
use crate::base::{EMBEDDINGS, HEAD};
use crate::config::Layer;
use crate::error::Result;
use crate::methods::lora::LoraSettings;
use crate::methods::{Method, Part, Role, Update, Values};
use crate::peft::{self, Opened};

/// An adapter that fits the model.
pub(crate) struct Adapter {
    pub(crate) folder: PathBuf,
    weight: f64,
    pub(crate) opened: Opened,
    layers: Vec<Layer>,
}

impl Adapter {
    /// Opens an adapter on a model.
    pub(super) fn open(adapter: &Weighted, model: &LlamaConfig) -> Result<Self> {
        let opened = peft::open(&adapter.folder, model)?;
        for part in &opened.parts {
            opened.file.float_dtype(&part.key)?;
        }
        Ok(Self {
            folder: adapter.folder.clone(),
            weight: adapter.weight,
            layers: opened.config.layers(&opened.model)?,
            opened,
        })
    }

    /// A layer that it adapts.
    pub(super) fn layer(&self, name: &str) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.name == name)
    }

    /// Its update of a layer, all of it.
    pub(super) fn update<B: Backend>(
        &self,
        layer: &Layer,
        device: &B::Device,
    ) -> Result<Option<Update<B>>> {
        let (opened, method) = (&self.opened, &self.opened.config.method);
        let read =
            |part: Part| Ok((opened.read(&part)?, part)).map(|(values, part)| (part, values));
        let all = |parts: Vec<Part>| parts.into_iter().map(read).collect::<Result<Vec<_>>>();
        let shared = method.model_parts(&self.layers, &opened.model);
        let one = |part: &Part| match part.role {
            Role::Derived => Ok((part.clone(), method.derived(part, &shared))),
            _ => read(part.clone()),
        };
        let shared = shared.iter().map(one).collect::<Result<_>>()?;
        let shared = share(shared, device);
        let values = Values::new(all(method.layer_parts(layer))?, &shared, device);
        Ok(method.update(layer, values))
    }

    /// Elements of one of its tensors, by our name.
    fn read(&self, name: &str) -> Result<Vec<f32>> {
        let part = self.opened.parts.iter().find(|part| part.name == name);
        self.opened
            .read(part.expect("it is a tensor of the adapter"))
    }

    /// Its update of a layer with the weight in it, if updates of it can be added up.
    pub(super) fn factors(&self, layer: &Layer) -> Result<Option<Factors>> {
        let Some(lora) = self.lora() else {
            return Ok(None);
        };
        let (rank, scaling) = lora.rank_and_scaling(&layer.name);
        Ok(Some(Factors {
            rank,
            factor: self.weight * scaling,
            a: self.read(&format!("{}.lora_a", layer.name))?,
            b: self.read(&format!("{}.lora_b", layer.name))?,
        }))
    }

    /// The settings of LoRA, if updates of it can be added up to one of a larger rank.
    pub(super) fn lora(&self) -> Option<&LoraSettings> {
        match &self.opened.config.method {
            Method::Lora(lora) if !lora.use_dora => Some(lora),
            _ => None,
        }
    }

    /// The tensors that it replaces as a whole.
    fn replaced(&self) -> impl Iterator<Item = &str> {
        self.opened.whole().map(|part| part.name.as_str())
    }

    /// Whether it replaces a tensor as a whole.
    pub(super) fn replaces(&self, name: &str) -> bool {
        self.replaced().any(|replaced| replaced == name)
    }

    /// Whether a model where embeddings and `lm_head` are one has them apart afterwards.
    pub(super) fn touches_embeddings(&self) -> bool {
        let adapts = [EMBED_TOKENS, LM_HEAD].map(|name| self.layer(name).is_some());
        let replaces = [EMBEDDINGS, HEAD].map(|name| self.replaces(name));
        adapts.contains(&true) || replaces.contains(&true)
    }

    /// Why it cannot be used in the company of the others, or with its weight.
    fn cannot_be_combined(&self, all: &[Self]) -> Option<String> {
        let adds_up = self.lora().is_some() || (all.len() == 1 && self.weight == 1.0);
        (!adds_up).then(|| {
            let (folder, title) = (self.folder.display(), self.title());
            format!("{folder} is {title}, of which one at a time is used, with the weight 1")
        })
    }

    /// Its method's name in a sentence.
    fn title(&self) -> &'static str {
        match &self.opened.config.method {
            Method::Lora(lora) if lora.use_dora => "DoRA",
            method => method.title(),
        }
    }

    /// A layer in which it has another rank than `other`, with both ranks.
    fn other_rank(&self, other: &Self) -> Option<(&Layer, usize, usize)> {
        let (ours, theirs) = (self.lora()?, other.lora()?);
        let differs = |layer: &&Layer| {
            let rank = |lora: &LoraSettings| lora.rank_and_scaling(&layer.name).0;
            other.layer(&layer.name).is_some() && rank(ours) != rank(theirs)
        };
        let layer = self.layers.iter().find(differs)?;
        let rank = |lora: &LoraSettings| lora.rank_and_scaling(&layer.name).0;
        Some((layer, rank(ours), rank(theirs)))
    }

    /// What its base was quantised to, in the words of its file.
    pub(crate) fn stated(&self) -> Option<&str> {
        self.opened.base_quantization()
    }
}

/// What keeps adapters from being used together.
pub(super) fn conflicts(adapters: &[Adapter], combination: Combination) -> Vec<String> {
    let mut problems = Vec::new();
    for (index, one) in adapters.iter().enumerate() {
        problems.extend(one.cannot_be_combined(adapters));
        problems.extend(replaced_twice(one, index, adapters));
        for other in &adapters[index + 1..] {
            if combination == Combination::Linear
                && let Some((layer, rank, other_rank)) = one.other_rank(other)
            {
                problems.push(format!(
                    "{} has rank {rank} in {} and {} has rank {other_rank}: a linear combination \
                     is of adapters of the same rank",
                    one.folder.display(),
                    layer.name,
                    other.folder.display()
                ));
            }
        }
    }
    problems
}

/// What is wrong with the tensors that an adapter, that of this index, replaces as a whole.
fn replaced_twice(one: &Adapter, index: usize, adapters: &[Adapter]) -> Vec<String> {
    let mut problems = Vec::new();
    let folder = one.folder.display();
    for name in one.replaced() {
        if one.weight != 1.0 {
            problems.push(format!(
                "{folder} replaces {name} as a whole, which cannot be weighed"
            ));
        }
        for (other_index, other) in adapters.iter().enumerate() {
            let also = other.folder.display();
            let module = name.strip_suffix(".weight").unwrap_or(name);
            if index < other_index && other.replaces(name) {
                problems.push(format!("{folder} and {also} both replace {name}"));
            } else if other.layer(module).is_some() {
                problems.push(format!("{folder} replaces {name}, which {also} adapts"));
            }
        }
    }
    problems
}
