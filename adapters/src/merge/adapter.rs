//! The adapters of a merge: each opened on the model, and all held against each other.

use std::path::PathBuf;

use burn::tensor::backend::Backend;
use model::config::LlamaConfig;
use quant::{Format, Scheme};

use super::{Onto, Weighted};
use crate::attach::share;
use crate::base::{EMBEDDINGS, HEAD};
use crate::config::Layer;
use crate::error::Result;
use crate::methods::lora::LoraSettings;
use crate::methods::{Method, Part, Role, Update, Values};
use crate::peft::{self, Opened};

/// An adapter that fits the model.
pub(super) struct Adapter {
    pub(super) folder: PathBuf,
    pub(super) weight: f64,
    pub(super) opened: Opened,
    pub(super) layers: Vec<Layer>,
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
    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>> {
        let part = self.opened.parts.iter().find(|part| part.name == name);
        self.opened
            .read(part.expect("it is a tensor of the adapter"))
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
        self.layer("lm_head").is_some() || self.replaces(EMBEDDINGS) || self.replaces(HEAD)
    }

    /// Why it cannot be merged, or not in the company of the others.
    fn cannot_be_merged(&self, all: &[Self]) -> Option<String> {
        let (folder, method) = (self.folder.display(), &self.opened.config.method);
        let title = method.title();
        if !method.changes_layers() {
            return Some(format!(
                "{folder} is {title}: what it puts in front of a text is no part of the weights"
            ));
        }
        let adds_up = self.lora().is_some() || (all.len() == 1 && self.weight == 1.0);
        (!adds_up).then(|| {
            format!("{folder} is {title}, of which one at a time is merged, with the weight 1")
        })
    }

    /// What its base was quantised to, in the words of its file.
    pub(super) fn stated(&self) -> Option<&str> {
        self.opened.base_quantization()
    }
}

/// What keeps adapters from being merged together.
pub(super) fn conflicts(adapters: &[Adapter]) -> Vec<String> {
    let mut problems = Vec::new();
    for (index, one) in adapters.iter().enumerate() {
        problems.extend(one.cannot_be_merged(adapters));
        for name in one.replaced() {
            let folder = one.folder.display();
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
    }
    problems
}

/// How the base is quantised that adapters of a dense model were trained on: as their files say, if
/// they agree. PEFT's files do not say; if no other does, weights are dequantised from its default.
pub(super) fn trained_on(
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
