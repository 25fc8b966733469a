//! The methods: each is one file, and one line in the list below.
//!
//! Such a file has the method's settings ([`Settings`]: their keys in a recipe and in PEFT's
//! `adapter_config.json`). One that changes linear layers ([`LayerMethod`]) says which tensors an
//! adapted layer has and how they start, and has the module that computes with them ([`Computes`]);
//! one that puts something in front of the tokens ([`PromptMethod`]) places it on the model.

pub mod adalora;
pub mod ia3;
pub mod loha;
pub mod lokr;
pub mod lora;
mod lycoris;
pub mod mpt;
pub mod prefix;
pub mod prompt;
pub mod ptuning;
pub mod vera;
mod virtual_tokens;

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;

use burn::module::{Module, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use model::config::LlamaConfig;
use model::load::uniform;
use model::virtual_tokens::VirtualTokens;
use model::weight::named_param;
use serde::de::DeserializeOwned;
use serde::{Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::attach::AdaptedLlama;
use crate::base::{AdaptedBackend, BaseLinear, TrainBackend};
use crate::config::{Layer, MAX_RANK, Selection, Targets};
use crate::error::Result;
use lora::Bias;

/// What PEFT puts before the names of the base model's modules.
const PREFIX: &str = "base_model.model.";

/// The settings of a method. As serde spells them they are its keys in a recipe.
pub trait Settings: Clone + PartialEq + Default + Serialize + DeserializeOwned {
    /// Its name in a recipe: `adapter.method`.
    const NAME: &'static str;
    /// Its name in a sentence.
    const TITLE: &'static str;
    /// `peft_type` in `adapter_config.json`.
    const PEFT_TYPE: &'static str;
    /// Settings of `adapter_config.json` that change what the tensors mean and are not supported:
    /// the value each must have.
    const MUST_BE: &'static [(&'static str, Value)] = &[];
    /// Keys that change neither what the tensors are nor what they mean, so that an adapter may be
    /// trained on with other values.
    const FREE: &'static [&'static str] = &[];
    /// Keys that `adapter_config.json` has another name for: that, and the one here.
    const PEFT_NAMES: &'static [(&'static str, &'static str)] = &[];
    /// Keys that choose layers and that PEFT's settings of this method lack.
    const NOT_IN_PEFT: &'static [&'static str] = &[];
    /// How many numbers it remembers from step to step for each that is trained.
    const REMEMBERS: usize = 0;
    /// Whether it adapts embeddings, too: to a method they are a linear layer `[d, vocab]` whose
    /// input has a one for each token.
    const EMBEDDINGS: bool = false;

    /// Its keys of `adapter_config.json`, of which all others are passed over; keys that are missing
    /// have PEFT's defaults.
    ///
    /// # Errors
    /// A value of the wrong type.
    fn from_peft(json: &str) -> serde_json::Result<Self>;

    /// The settings in PEFT's spelling.
    fn to_peft(&self) -> Map<String, Value>;

    /// What of an `adapter_config.json` cannot be honoured, one sentence each.
    fn unsupported(json: &Map<String, Value>) -> Vec<String> {
        let must_be = Self::MUST_BE.iter();
        must_be
            .filter_map(|(key, wanted)| unless_neutral(json, key, wanted))
            .collect()
    }

    /// Keys whose values cannot be, and what is wrong with each.
    fn problems(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Regular expressions that are to match the ends of layers' names.
    fn patterns(&self) -> Vec<&str> {
        Vec::new()
    }

    /// Which biases of the model are trained.
    fn bias(&self) -> Bias {
        Bias::None
    }

    /// Whether anything is dropped while training.
    fn is_random(&self) -> bool {
        false
    }

    /// The key that says how the tensors start, if that is not as usual: an adapter that is there
    /// already has no start.
    fn start(&self) -> Option<&'static str> {
        None
    }

    /// The factor on the learning rate of a tensor, of which `learning_rate` is the peak.
    fn rate(&self, _part: &Part, _learning_rate: f64) -> f64 {
        1.0
    }

    /// Whether what is saved differs from what is trained: then checkpoints hold that, too.
    fn is_converted(&self) -> bool {
        false
    }

    /// The layers that a recipe means which does not say.
    fn default_targets() -> Targets {
        Targets::AllLinear
    }

    /// The layers that PEFT means by `"target_modules": null`.
    fn peft_targets() -> Targets {
        Targets::Names(vec!["q_proj".into(), "v_proj".into()])
    }
}

/// A method that changes what linear layers compute.
pub trait LayerMethod: Settings {
    /// What computes in one layer.
    type Update<B: Backend>;

    /// The tensors of an adapted layer.
    fn parts(&self, layer: &Layer) -> Vec<Part>;

    /// Tensors that all adapted layers share.
    fn shared_parts(&self, _layers: &[Layer]) -> Vec<Part> {
        Vec::new()
    }

    /// The values that the tensors of a layer start with, in the order of [`LayerMethod::parts`];
    /// those of random ones follow from `seed` and their name. A method may change the base layer.
    fn fresh<B: Backend>(
        &self,
        layer: &Layer,
        base: &mut BaseLinear<B>,
        seed: u64,
    ) -> Vec<Vec<f32>>;

    /// The values that a shared tensor, one of `all`, starts with; they follow from the settings.
    fn fresh_shared(&self, _part: &Part, _all: &[Part]) -> Vec<f32> {
        Vec::new()
    }

    /// Settings in PEFT's spelling that follow from which layers are adapted, too.
    fn peft_of_selection(&self, _selection: &Selection) -> Map<String, Value> {
        Map::new()
    }

    /// The update of a layer, of these values.
    fn update<B: Backend>(&self, layer: &Layer, values: Values<'_, B>) -> Self::Update<B>;

    /// How many numbers the update of a layer keeps from forward to backward: for each token, and
    /// beside them.
    fn kept(&self, layer: &Layer) -> [usize; 2];

    /// Turns the values of all tensors, by their names, into those that are saved, and says what an
    /// adapter of those is; of a method that [is converted](Settings::is_converted).
    fn convert(&self, _layers: &[Layer], _values: &mut HashMap<String, Vec<f32>>) -> Option<Self> {
        None
    }

    /// Adds to the gradients those of a term of the loss that depends on the weights of a layer
    /// alone, where `layers` are adapted. What is reported as the loss is that of the tokens.
    fn regularise<B: TrainBackend>(
        &self,
        _update: &Self::Update<B>,
        _layers: usize,
        _gradients: &mut GradientsParams,
    ) {
    }

    /// Learns of how many optimizer steps a run is; the key that does not go with it, and why.
    fn of_run(&mut self, _steps: usize) -> Option<(&'static str, String)> {
        None
    }

    /// What it does after each of `steps` optimizer steps.
    fn after_step<B: Backend>(
        &self,
        _layers: &[Layer],
        _steps: usize,
    ) -> Option<Box<dyn AfterStep<B>>> {
        None
    }
}

/// What a method does after an optimizer step. Values and gradients are flat.
pub trait AfterStep<B: Backend>: std::fmt::Debug + Send {
    /// Whether it looks at a parameter.
    fn watches(&self, id: ParamId) -> bool;

    /// After `step`, counted from 1: `values` has the watched parameters as the step left them, and
    /// takes what they are to be; `gradients` has what the step followed.
    fn after(
        &mut self,
        step: usize,
        values: &mut HashMap<ParamId, Tensor<B, 1>>,
        gradients: &HashMap<ParamId, Tensor<B, 1>>,
    );

    /// What it remembers from step to step, by name.
    fn state(&self) -> Vec<(String, Vec<f32>)>;

    /// Remembers what [`AfterStep::state`] gave; nothing if that was of no step yet.
    fn restore(&mut self, state: HashMap<String, Vec<f32>>, device: &B::Device);
}

/// What an update computes. Shapes: `n` tokens, `[out, in]` the layer.
pub trait Computes<B: AdaptedBackend> {
    /// `x` `[n, in]` through the base layer and the update: `[n, out]`.
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2>;

    /// The same of an `x` whose rows are one at `ids` `[n]` and zero elsewhere.
    fn embed(&self, ids: Tensor<B, 1, Int>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        let [_, r#in] = base.weight().dims();
        self.forward(ids.one_hot::<2>(r#in).float(), base)
    }

    /// Rows of the layer's weight with the update in it, from the same rows of the base's,
    /// `[rows, in]`: a layer with these computes the same without an update.
    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2>;

    /// The layer's bias `[out]` with the update in it.
    fn merge_bias(&self, bias: Tensor<B, 1>) -> Tensor<B, 1> {
        bias
    }

    /// Makes ready what follows from the base layer alone, which does not change any more.
    fn settle(&mut self, _base: &BaseLinear<B>) {}

    /// From here on, until the next call, `seed` decides what is dropped; before the first, nothing
    /// is.
    fn draw(&mut self, _seed: u64) {}

    /// The values of a tensor that is not trained, by the end of its name.
    fn frozen(&self, _part: &str) -> Option<Tensor<B, 2>> {
        None
    }
}

/// A method that puts trained vectors in front of every row.
pub trait PromptMethod: Settings {
    /// Its tensors.
    fn parts(&self, model: &LlamaConfig) -> Vec<Part>;

    /// The values that a tensor starts with.
    ///
    /// # Errors
    /// A file that they come from and that has them not.
    fn fresh<B: Backend>(
        &self,
        part: &Part,
        model: &AdaptedLlama<B>,
        seed: u64,
    ) -> Result<Vec<f32>>;

    /// The module that makes of the tensors what stands in front of the rows.
    fn virtual_tokens<B: Backend>(&self, values: Values<'_, B>) -> VirtualTokens<B>;

    /// Settings in PEFT's spelling that follow from the model, and from its name.
    fn peft_of_model(&self, model: &LlamaConfig, base: &str) -> Map<String, Value>;

    /// The settings of the adapter that is saved: of what an encoder made, without it.
    fn saved(&self) -> Self {
        self.clone()
    }

    /// How many positions of every row virtual tokens take; those that are keys and values alone take
    /// none.
    fn positions(&self) -> usize;

    /// How many tasks there are, if it tells them apart.
    fn tasks(&self) -> Option<usize> {
        None
    }

    /// A text whose tokens are to be known before fresh tensors are made, and where they belong.
    fn text(&mut self) -> Option<(&str, &mut Vec<u32>)> {
        None
    }

    /// A file that fresh tensors come from.
    fn source(&mut self) -> Option<&mut PathBuf> {
        None
    }
}

/// A tensor of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its name here, from which its parameter id follows: `layer.end`, or the end alone.
    pub name: String,
    /// Its name in PEFT's file.
    pub key: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

/// What a tensor of an adapter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is trained.
    Trained,
    /// It belongs to the adapter and stays as it is.
    Frozen,
    /// It is trained and takes the place of a weight of the model.
    Whole,
    /// It follows from the settings, and neither is trained nor in PEFT's file.
    Derived,
}

impl Role {
    /// Whether the optimizer updates such a tensor.
    pub fn is_trained(self) -> bool {
        matches!(self, Self::Trained | Self::Whole)
    }
}

impl Part {
    /// A trained tensor of a layer: the end of its name here, and in PEFT's file.
    pub fn of_layer(layer: &Layer, end: &str, peft: &str, shape: &[usize]) -> Self {
        Self {
            name: format!("{}.{end}", layer.name),
            key: format!("{PREFIX}{}.{peft}", layer.name),
            shape: shape.into(),
            role: Role::Trained,
        }
    }

    /// A trained tensor that belongs to no layer and has the same name everywhere.
    pub fn of_model(name: &str, shape: &[usize]) -> Self {
        Self {
            name: name.into(),
            key: name.into(),
            shape: shape.into(),
            role: Role::Trained,
        }
    }

    /// The same, not trained.
    pub fn frozen(self) -> Self {
        Self {
            role: Role::Frozen,
            ..self
        }
    }

    /// The bias of an adapted layer, trained as a whole.
    pub(crate) fn bias_of_layer(module: &str, shape: Vec<usize>) -> Self {
        Self {
            key: format!("{PREFIX}{module}.base_layer.bias"),
            ..Self::whole(format!("{module}.bias"), shape)
        }
    }

    /// A tensor of the model that is trained as a whole.
    pub(crate) fn whole(name: String, shape: Vec<usize>) -> Self {
        Self {
            key: format!("{PREFIX}{name}"),
            name,
            shape,
            role: Role::Whole,
        }
    }

    /// A weight of the model that PEFT has put beside the adapter: its end there.
    pub(crate) fn base_copy(module: &str, end: &str, shape: Vec<usize>) -> Self {
        Self {
            name: format!("{module}.weight"),
            key: format!("{PREFIX}{module}.{end}"),
            shape,
            role: Role::Frozen,
        }
    }

    /// The module that it belongs to; nothing if it belongs to the model.
    pub fn module(&self) -> Option<&str> {
        self.name.rsplit_once('.').map(|(module, _)| module)
    }

    /// The last part of its name.
    pub fn end(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }
}

/// The values of an adapter's tensors on their way into a module.
pub struct Values<'a, B: Backend> {
    own: Vec<(Part, Vec<f32>)>,
    shared: &'a [(Part, Tensor<B, 2>)],
    device: &'a B::Device,
}

impl<'a, B: Backend> Values<'a, B> {
    pub(crate) fn new(
        own: impl IntoIterator<Item = (Part, Vec<f32>)>,
        shared: &'a [(Part, Tensor<B, 2>)],
        device: &'a B::Device,
    ) -> Self {
        Self {
            own: own.into_iter().collect(),
            shared,
            device,
        }
    }

    /// Takes a trained tensor, by its name or, in a layer, by the end of it.
    ///
    /// # Panics
    /// If the method's parts have no such tensor of `D` dimensions.
    pub fn param<const D: usize>(&mut self, end: &str) -> Param<Tensor<B, D>> {
        let (part, tensor) = self.take(end);
        named_param(&part.name, tensor)
    }

    /// Takes a tensor that is not trained, likewise.
    pub fn frozen<const D: usize>(&mut self, end: &str) -> Tensor<B, D> {
        self.take(end).1
    }

    fn take<const D: usize>(&mut self, end: &str) -> (Part, Tensor<B, D>) {
        let named = |(part, _): &(Part, _)| part.name == end || part.end() == end;
        let at = self.own.iter().position(named);
        let (part, values) = self.own.remove(at.expect("it is one of the parts"));
        let data = TensorData::new(values, part.shape.as_slice());
        (part, Tensor::from_data(data, self.device))
    }

    /// A tensor that all layers share, by its name.
    ///
    /// # Panics
    /// If the method's shared parts have no such tensor.
    pub fn shared(&self, name: &str) -> Tensor<B, 2> {
        let found = self.shared.iter().find(|(part, _)| part.name == name);
        found.expect("it is one of the shared parts").1.clone()
    }
}

/// What is to be known of a method without its settings.
#[derive(Clone, Copy)]
pub(crate) struct About {
    pub(crate) name: &'static str,
    title: &'static str,
    pub(crate) peft_type: &'static str,
    free: &'static [&'static str],
    not_in_peft: &'static [&'static str],
    remembers: usize,
    embeddings: bool,
    peft_names: &'static [(&'static str, &'static str)],
    keys: fn() -> Vec<String>,
    default: fn() -> Method,
    pub(crate) unsupported: fn(&Map<String, Value>) -> Vec<String>,
    pub(crate) from_peft: fn(&str) -> serde_json::Result<Method>,
    default_targets: fn() -> Targets,
    pub(crate) peft_targets: fn() -> Targets,
}

impl About {
    const fn of<S: Settings + Into<Method>>() -> Self {
        Self {
            name: S::NAME,
            title: S::TITLE,
            peft_type: S::PEFT_TYPE,
            free: S::FREE,
            not_in_peft: S::NOT_IN_PEFT,
            remembers: S::REMEMBERS,
            embeddings: S::EMBEDDINGS,
            peft_names: S::PEFT_NAMES,
            keys: keys_of::<S>,
            default: || S::default().into(),
            unsupported: S::unsupported,
            from_peft: |json| S::from_peft(json).map(Into::into),
            default_targets: S::default_targets,
            peft_targets: S::peft_targets,
        }
    }

    /// A key of its settings as `adapter_config.json` has it.
    pub(crate) fn peft_key(&self, key: &'static str) -> &'static str {
        let name = self.peft_names.iter().find(|(_, ours)| *ours == key);
        name.map_or(key, |(theirs, _)| theirs)
    }

    /// Of a method that adapts no layers.
    const fn of_prompt<S: PromptMethod + Into<Method>>() -> Self {
        Self {
            unsupported: virtual_tokens::unsupported,
            default_targets: Targets::nothing,
            peft_targets: Targets::nothing,
            ..Self::of::<S>()
        }
    }
}

/// Settings from PEFT's spelling: `defaults` has PEFT's own defaults where ours are others.
fn read_peft<S: Settings>(json: &str, defaults: Value) -> serde_json::Result<S> {
    let mut known = defaults.as_object().cloned().unwrap_or_default();
    let ours = keys_of::<S>();
    for (key, value) in serde_json::from_str::<Map<String, Value>>(json)? {
        let name = S::PEFT_NAMES.iter().find(|(theirs, _)| *theirs == key);
        let name = name.map_or(key.as_str(), |(_, ours)| *ours);
        if ours.iter().any(|known| known == name) && !value.is_null() {
            let alone = Map::from_iter([(name.to_owned(), value.clone())]);
            serde_json::from_value::<S>(Value::Object(alone))
                .map_err(|error| serde::de::Error::custom(format_args!("{key}: {error}")))?;
            known.insert(name.to_owned(), value);
        }
    }
    serde_json::from_value(Value::Object(known))
}

/// What is wrong with ranks, or other counts.
fn rank_problem(
    key: &'static str,
    ranks: impl IntoIterator<Item = usize>,
) -> Option<(&'static str, String)> {
    let fits = |rank: usize| (1..=MAX_RANK).contains(&rank);
    let fit = ranks.into_iter().all(fits);
    (!fit).then(|| (key, format!("must be from 1 to {MAX_RANK}")))
}

/// What is wrong with numerators of scalings, which are computed in f32.
fn alpha_problem(
    key: &'static str,
    alphas: impl IntoIterator<Item = f64>,
) -> Option<(&'static str, String)> {
    let fits = |alpha: f64| (alpha as f32).is_finite() && alpha as f32 != 0.0;
    let fit = alphas.into_iter().all(fits);
    (!fit).then(|| (key, "must be a finite number other than 0".into()))
}

/// What is wrong with the share of something that is dropped.
fn share_problem(key: &'static str, share: f64) -> Option<(&'static str, String)> {
    let fits = (0.0..1.0).contains(&share);
    (!fits).then(|| (key, "must be from 0 to below 1".into()))
}

/// Numbers as those that a tensor of torch's linear layers, of `r#in` inputs, starts with, or of its
/// LSTMs, of so wide states.
fn fresh_uniform(part: &Part, r#in: usize, seed: u64) -> Vec<f32> {
    let count = part.shape.iter().product();
    uniform(seed, &part.name, count, 1.0 / (r#in as f32).sqrt())
}

/// Refuses a setting that is neither `wanted` nor empty.
fn unless_neutral(json: &Map<String, Value>, key: &str, wanted: &Value) -> Option<String> {
    let value = json.get(key)?;
    let is_neutral = value.is_null()
        || value == wanted
        || value.as_array().is_some_and(Vec::is_empty)
        || value.as_object().is_some_and(Map::is_empty);
    (!is_neutral).then(|| format!("{key} is {value}: this is not supported"))
}

/// serde tells the fields of a structure to who asks for one that is not there, each in backticks.
pub fn keys_of<T: DeserializeOwned>() -> Vec<String> {
    match serde_json::from_str::<T>("{\"\": true}") {
        Err(e) => {
            let text = e.to_string();
            let names = text.split('`').skip(3).step_by(2);
            names.map(str::to_owned).collect()
        }
        Ok(_) => Vec::new(),
    }
}

/// Makes of the lists of methods what has to tell them apart: the enums, and `each!` and `of_update!`,
/// which do the same with whatever they hold. It is given a `$` to write these with.
macro_rules! methods {
    (
        ($d:tt)
        layers { $($Layer:ident: $layer:ident::$LayerSettings:ident, $Update:ident;)* }
        prompts { $($Prompt:ident: $prompt:ident::$PromptSettings:ident;)* }
    ) => {
        /// A method with its settings.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(untagged)]
        pub enum Method {
            $(#[doc = concat!("See [`", stringify!($layer), "`].")] $Layer($layer::$LayerSettings),)*
            $(#[doc = concat!("See [`", stringify!($prompt), "`].")] $Prompt($prompt::$PromptSettings),)*
        }

        #[allow(
            clippy::large_enum_variant,
            reason = "there are a few hundred of them, and a module in a box is none"
        )]
        /// What is trained beside one linear layer.
        #[derive(Module, Debug)]
        pub enum Update<B: Backend> {
            $(#[doc = concat!("See [`", stringify!($layer), "`].")] $Layer($layer::$Update<B>),)*
        }

        $(impl From<$layer::$LayerSettings> for Method {
            fn from(settings: $layer::$LayerSettings) -> Self {
                Self::$Layer(settings)
            }
        })*
        $(impl From<$prompt::$PromptSettings> for Method {
            fn from(settings: $prompt::$PromptSettings) -> Self {
                Self::$Prompt(settings)
            }
        })*

        const METHODS: &[About] = &[
            $(About::of::<$layer::$LayerSettings>(),)*
            $(About::of_prompt::<$prompt::$PromptSettings>(),)*
        ];

        /// An expression of a method's settings; one of those that change layers and one of the
        /// others where they differ.
        macro_rules! each {
            ($d method:expr, $d settings:ident => $d all:expr) => {
                each!($d method, layer $d settings => $d all, prompt $d settings => $d all)
            };
            ($d method:expr, layer $d l:pat => $d of_l:expr, prompt $d p:pat => $d of_p:expr) => {
                match $d method {
                    $(Method::$Layer($d l) => $d of_l,)*
                    $(Method::$Prompt($d p) => $d of_p,)*
                }
            };
        }

        /// An expression of an update.
        macro_rules! of_update {
            ($d this:expr, $d update:ident => $d all:expr) => {
                match $d this {
                    $(Update::$Layer($d update) => $d all,)*
                }
            };
        }

        impl Method {
            /// The update of a layer; nothing of a method that changes none.
            pub(crate) fn update<B: Backend>(
                &self,
                layer: &Layer,
                values: Values<'_, B>,
            ) -> Option<Update<B>> {
                match self {
                    $(Self::$Layer(settings) => Some(Update::$Layer(settings.update(layer, values))),)*
                    $(Self::$Prompt(_) => None,)*
                }
            }

            /// Adds to the gradients those of the method's own terms of the loss.
            pub fn regularise<B: TrainBackend>(
                &self,
                model: &AdaptedLlama<B>,
                gradients: &mut GradientsParams,
            ) {
                let updates = || model.projections().filter_map(|(_, p)| p.update.as_ref());
                let count = updates().count();
                for update in updates() {
                    match (self, update) {
                        $((Self::$Layer(settings), Update::$Layer(update)) => {
                            settings.regularise(update, count, gradients);
                        })*
                        _ => {}
                    }
                }
            }

            /// Reads the settings of the method of this name in a recipe's spelling.
            ///
            /// # Errors
            /// Keys that it does not know, and values of the wrong type.
            pub fn deserialize<'de, D: Deserializer<'de>>(
                name: &str,
                settings: D,
            ) -> std::result::Result<Self, D::Error> {
                use serde::Deserialize;
                match name {
                    $($layer::$LayerSettings::NAME => {
                        $layer::$LayerSettings::deserialize(settings).map(Self::$Layer)
                    })*
                    $($prompt::$PromptSettings::NAME => {
                        $prompt::$PromptSettings::deserialize(settings).map(Self::$Prompt)
                    })*
                    other => Err(serde::de::Error::custom(format_args!(
                        "{other:?} is no method"
                    ))),
                }
            }
        }
    };
}

// One line a method: what it is called here, its file, its settings and its update in a layer.
methods! {
    ($)
    layers {
        Lora: lora::LoraSettings, Lora;
        Adalora: adalora::AdaloraSettings, Adalora;
        Loha: loha::LohaSettings, Loha;
        Lokr: lokr::LokrSettings, Lokr;
        Ia3: ia3::Ia3Settings, Ia3;
        Vera: vera::VeraSettings, Vera;
    }
    prompts {
        Prefix: prefix::PrefixSettings;
        Prompt: prompt::PromptSettings;
        Mpt: mpt::MptSettings;
        PTuning: ptuning::PTuningSettings;
    }
}

fn about<S: Settings + Into<Method>>(_: &S) -> About {
    About::of::<S>()
}

fn about_prompt<S: PromptMethod + Into<Method>>(_: &S) -> About {
    About::of_prompt::<S>()
}

/// What is to be known of it without its settings.
impl Method {
    /// The names of all methods.
    pub fn names() -> impl Iterator<Item = &'static str> {
        METHODS.iter().map(|method| method.name)
    }

    /// A method by its name, with its default settings.
    pub fn named(name: &str) -> Option<Self> {
        let about = METHODS.iter().find(|method| method.name == name)?;
        Some((about.default)())
    }

    /// The methods whose settings have a key.
    pub fn that_know(key: &str) -> impl Iterator<Item = &'static str> {
        let known = move |method: &&About| (method.keys)().iter().any(|known| known == key);
        METHODS.iter().filter(known).map(|method| method.name)
    }

    pub(crate) fn of_peft_type(name: &str) -> Option<About> {
        METHODS
            .iter()
            .find(|method| method.peft_type == name)
            .copied()
    }

    pub(crate) fn peft_types() -> impl Iterator<Item = &'static str> {
        METHODS.iter().map(|method| method.peft_type)
    }

    fn about(&self) -> About {
        each!(self, layer settings => about(settings), prompt settings => about_prompt(settings))
    }

    /// Its name in a recipe.
    pub fn name(&self) -> &'static str {
        self.about().name
    }

    /// Its name in a sentence.
    pub fn title(&self) -> &'static str {
        self.about().title
    }

    pub(crate) fn peft_type(&self) -> &'static str {
        self.about().peft_type
    }

    /// The keys of its settings.
    pub fn keys(&self) -> Vec<String> {
        (self.about().keys)()
    }

    /// Keys that may change while the tensors stay what they are.
    pub fn free_keys(&self) -> &'static [&'static str] {
        self.about().free
    }

    /// See [`Settings::NOT_IN_PEFT`].
    pub(crate) fn not_in_peft(&self) -> &'static [&'static str] {
        self.about().not_in_peft
    }

    /// See [`Settings::REMEMBERS`].
    pub fn remembers(&self) -> usize {
        self.about().remembers
    }

    /// See [`Settings::EMBEDDINGS`].
    pub(crate) fn adapts_embeddings(&self) -> bool {
        self.about().embeddings
    }

    /// The layers that a recipe means which does not say.
    pub fn default_targets(&self) -> Targets {
        (self.about().default_targets)()
    }
}

/// What its settings say, see [`Settings`].
impl Method {
    /// The keys of the settings that cannot be, and what is wrong with each.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        each!(self, settings => settings.problems())
    }

    /// Regular expressions that are to match the ends of layers' names.
    pub(crate) fn patterns(&self) -> Vec<&str> {
        each!(self, settings => settings.patterns())
    }

    /// Which biases of the model are trained.
    pub(crate) fn bias(&self) -> Bias {
        each!(self, settings => settings.bias())
    }

    /// Whether anything is dropped while training.
    pub fn is_random(&self) -> bool {
        each!(self, settings => settings.is_random())
    }

    pub(crate) fn to_peft(&self) -> Map<String, Value> {
        each!(self, settings => settings.to_peft())
    }

    /// See [`Settings::start`].
    pub fn start(&self) -> Option<&'static str> {
        each!(self, settings => settings.start())
    }

    /// See [`Settings::rate`].
    pub fn rate(&self, part: &Part, learning_rate: f64) -> f64 {
        each!(self, settings => settings.rate(part, learning_rate))
    }

    /// See [`Settings::is_converted`].
    pub fn is_converted(&self) -> bool {
        each!(self, settings => settings.is_converted())
    }

    /// Whether an adapter is one that cannot be trained on.
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Adalora(adalora) if adalora.rank_pattern.is_some())
    }
}

/// Of methods that change layers, see [`LayerMethod`], and of the others.
impl Method {
    /// Whether it changes linear layers.
    pub fn changes_layers(&self) -> bool {
        each!(self, layer _ => true, prompt _ => false)
    }

    /// The tensors of an adapted layer.
    pub(crate) fn layer_parts(&self, layer: &Layer) -> Vec<Part> {
        each!(self, layer settings => settings.parts(layer), prompt _ => Vec::new())
    }

    /// The tensors that belong to no single layer.
    pub(crate) fn model_parts(&self, layers: &[Layer], model: &LlamaConfig) -> Vec<Part> {
        each!(
            self,
            layer settings => settings.shared_parts(layers),
            prompt settings => settings.parts(model)
        )
    }

    /// The values that the tensors of a layer start with.
    pub(crate) fn fresh<B: Backend>(
        &self,
        layer: &Layer,
        base: &mut BaseLinear<B>,
        seed: u64,
    ) -> Vec<Vec<f32>> {
        each!(self, layer settings => settings.fresh(layer, base, seed), prompt _ => Vec::new())
    }

    /// The values that a tensor starts with that belongs to no single layer.
    pub(crate) fn fresh_in_model<B: Backend>(
        &self,
        part: &Part,
        all: &[Part],
        model: &AdaptedLlama<B>,
        seed: u64,
    ) -> Result<Vec<f32>> {
        each!(
            self,
            layer settings => Ok(settings.fresh_shared(part, all)),
            prompt settings => settings.fresh(part, model, seed)
        )
    }

    /// The values of a tensor that follows from the settings.
    pub(crate) fn derived(&self, part: &Part, all: &[Part]) -> Vec<f32> {
        each!(self, layer settings => settings.fresh_shared(part, all), prompt _ => Vec::new())
    }

    /// See [`LayerMethod::kept`].
    pub fn kept(&self, layer: &Layer) -> [usize; 2] {
        each!(self, layer settings => settings.kept(layer), prompt _ => [0, 0])
    }

    /// See [`LayerMethod::of_run`].
    pub fn of_run(&mut self, steps: usize) -> Option<(&'static str, String)> {
        each!(self, layer settings => settings.of_run(steps), prompt _ => None)
    }

    /// See [`LayerMethod::after_step`].
    pub fn after_step<B: Backend>(
        &self,
        layers: &[Layer],
        steps: usize,
    ) -> Option<Box<dyn AfterStep<B>>> {
        each!(self, layer settings => settings.after_step(layers, steps), prompt _ => None)
    }

    /// What is saved in place of `values`, which have all tensors by their names, and what an adapter
    /// of that is.
    pub(crate) fn convert<B: AdaptedBackend>(
        &self,
        layers: &[Layer],
        model: &AdaptedLlama<B>,
        values: &mut HashMap<String, Vec<f32>>,
    ) -> Option<Self> {
        each!(
            self,
            layer settings => settings.convert(layers, values).map(Into::into),
            prompt settings => {
                let virtual_tokens = model.virtual_tokens.as_ref()?;
                let encoded = virtual_tokens.encode(&[0]).into_data().convert::<f32>();
                let encoded = encoded.into_vec().expect("converted to f32");
                values.insert(virtual_tokens::EMBEDDINGS.into(), encoded);
                Some(settings.saved().into())
            }
        )
    }

    /// See [`PromptMethod::peft_of_model`] and [`LayerMethod::peft_of_selection`].
    pub(crate) fn peft_of_model(
        &self,
        model: &LlamaConfig,
        selection: &Selection,
        base: &str,
    ) -> Map<String, Value> {
        each!(
            self,
            layer settings => settings.peft_of_selection(selection),
            prompt settings => settings.peft_of_model(model, base)
        )
    }

    /// The settings of the adapter that is read from what this one saves.
    pub fn saved(&self) -> Self {
        each!(self, layer _ => self.clone(), prompt settings => settings.saved().into())
    }

    /// What belongs in front of the rows; nothing of a method that changes layers.
    pub(crate) fn virtual_tokens<B: Backend>(
        &self,
        values: Values<'_, B>,
    ) -> Option<VirtualTokens<B>> {
        each!(self, layer _ => None, prompt settings => Some(settings.virtual_tokens(values)))
    }

    /// How many virtual tokens stand beside the tokens of every row, in all layers.
    pub fn positions(&self) -> usize {
        each!(self, layer _ => 0, prompt settings => settings.positions())
    }

    /// How many tasks there are, if it tells them apart: a row says which it is of.
    pub fn tasks(&self) -> Option<usize> {
        each!(self, layer _ => None, prompt settings => settings.tasks())
    }

    /// A text whose tokens are to be known before fresh tensors are made, and where they belong.
    pub fn text(&mut self) -> Option<(&str, &mut Vec<u32>)> {
        each!(self, layer _ => None, prompt settings => settings.text())
    }

    /// A file that fresh tensors come from.
    pub fn source(&mut self) -> Option<&mut PathBuf> {
        each!(self, layer _ => None, prompt settings => settings.source())
    }
}

impl<B: AdaptedBackend> Computes<B> for Update<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        of_update!(self, update => update.forward(x, base))
    }

    fn embed(&self, ids: Tensor<B, 1, Int>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        of_update!(self, update => update.embed(ids, base))
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        of_update!(self, update => update.merge(rows, weight))
    }

    fn merge_bias(&self, bias: Tensor<B, 1>) -> Tensor<B, 1> {
        of_update!(self, update => Computes::<B>::merge_bias(update, bias))
    }

    fn settle(&mut self, base: &BaseLinear<B>) {
        of_update!(self, update => update.settle(base))
    }

    fn draw(&mut self, seed: u64) {
        of_update!(self, update => Computes::<B>::draw(update, seed))
    }

    fn frozen(&self, part: &str) -> Option<Tensor<B, 2>> {
        of_update!(self, update => update.frozen(part))
    }
}
