//! What an adapter is: its method, and which layers of a model it means.

use fancy_regex::Regex;
use model::config::LlamaConfig;
use model::llama::{EMBED_TOKENS, LM_HEAD};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::methods::lora::Bias;
use crate::methods::{Method, Part, Role};

/// The largest rank that is believed; above the width of every layer there is.
pub const MAX_RANK: usize = 1 << 16;

/// The settings of an adapter.
///
/// The matching rules are those of `peft/tuners/tuners_utils.py`.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Which modules it is on.
    pub selection: Selection,
    /// What it does there.
    pub method: Method,
}

/// Which modules of a model are meant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Selection {
    /// The layers that are adapted.
    #[serde(skip_serializing_if = "Targets::is_nothing")]
    pub target_modules: Targets,
    /// Layers that are not adapted even if `target_modules` names them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Targets>,
    /// Adapt only these decoder layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// What the list of layers is called that `layers_to_transform` counts in: expressions, of which
    /// one is to match; any list if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Modules that are trained and saved as a whole.
    pub modules_to_save: Vec<String>,
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            target_modules: Targets::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: Vec::new(),
        }
    }
}

/// A value alone, or a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a value or a list of them")]
pub enum OneOrMany<T> {
    /// Alone.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All of them.
    pub fn all(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(all) => all,
        }
    }
}

/// Which modules are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Every linear layer of the decoder layers.
    AllLinear,
    /// Names, or the last parts of names.
    Names(Vec<String>),
    /// A regular expression that must match the whole name.
    Regex(String),
}

/// Values for single layers, by regular expressions on the ends of their names, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Pattern<T>(pub Vec<(String, T)>);

/// A layer of a model that is adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Name in the checkpoint, without `.weight`.
    pub name: String,
    /// `[out, in]`; of the embeddings `[d, vocab]`.
    pub shape: [usize; 2],
}

impl Layer {
    /// Whether it is the embeddings.
    pub fn is_embeddings(&self) -> bool {
        self.name == EMBED_TOKENS
    }
}

impl AdapterConfig {
    /// The adapted layers of a model, in the order of the network; none for a method that adapts no
    /// layers.
    ///
    /// # Errors
    /// [`Error::Fit`] lists patterns that do not compile, settings out of range, modules that the
    /// model lacks, and settings that adapt nothing.
    pub fn layers(&self, model: &LlamaConfig) -> Result<Vec<Layer>> {
        let mut problems = self.problems(model);
        let mut layers = Vec::new();
        let changes_layers = self.method.changes_layers();
        for layer in all_layers(model).filter(|_| changes_layers) {
            match self.selection.targets(&layer.name) {
                Ok(true) if layer.is_embeddings() && !self.method.adapts_embeddings() => {
                    problems.push(self.no_embeddings());
                }
                Ok(true) => layers.push(layer),
                Ok(false) => {}
                Err(problem) => problems.push(problem),
            }
        }
        problems.dedup();
        if problems.is_empty() && layers.is_empty() && changes_layers {
            problems.push(self.selection.matches_nothing());
        }
        match problems.is_empty() {
            true => Ok(layers),
            false => Err(Error::Fit { problems }),
        }
    }

    /// Every tensor of the adapter on a model: those that belong to no single layer, those of each
    /// layer, and the weights of `modules_to_save`.
    ///
    /// # Errors
    /// Those of [`AdapterConfig::layers`].
    pub fn parts(&self, model: &LlamaConfig) -> Result<Vec<Part>> {
        let layers = self.layers(model)?;
        let mut all = self.method.model_parts(&layers, model);
        let of_layer = |layer| self.method.layer_parts(layer);
        all.extend(layers.iter().flat_map(of_layer));
        let tensors = model.tensors().into_iter();
        all.extend(tensors.filter_map(|(name, shape)| self.whole(&layers, name, shape)));
        Ok(all)
    }

    /// A tensor of the model as a part of the adapter, if it is trained as a whole.
    fn whole(&self, layers: &[Layer], name: String, shape: Vec<usize>) -> Option<Part> {
        let (module, end) = name.rsplit_once('.')?;
        if self.selection.saves(module) {
            return Some(Part::whole(name, shape));
        }
        let bias = self.method.bias();
        let is_adapted = layers.iter().any(|layer| layer.name == module);
        let is_trained = match bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => is_adapted,
        };
        (end == "bias" && is_trained).then(|| match is_adapted {
            true => Part::bias_of_layer(module, shape),
            false => Part::whole(name.clone(), shape),
        })
    }

    /// Numbers in the file that is saved.
    ///
    /// # Errors
    /// Those of [`AdapterConfig::layers`].
    pub fn num_saved(&self, model: &LlamaConfig) -> Result<u64> {
        let saved = Self {
            method: self.method.saved(),
            ..self.clone()
        };
        let parts = saved.parts(model)?;
        Ok(size(parts.iter().filter(|part| part.role != Role::Derived)))
    }

    /// Numbers of an adapter that are not trained.
    ///
    /// # Errors
    /// Those of [`AdapterConfig::layers`].
    pub fn num_frozen(&self, model: &LlamaConfig) -> Result<u64> {
        let parts = self.parts(model)?;
        Ok(size(parts.iter().filter(|part| !part.role.is_trained())))
    }

    /// Name and shape of every tensor that is trained.
    ///
    /// # Errors
    /// Those of [`AdapterConfig::layers`].
    pub fn parameters(&self, model: &LlamaConfig) -> Result<Vec<(String, Vec<usize>)>> {
        let parts = self.parts(model)?.into_iter();
        let trained = parts.filter(|part| part.role.is_trained());
        Ok(trained.map(|part| (part.name, part.shape)).collect())
    }

    fn no_embeddings(&self) -> String {
        let title = self.method.title();
        format!(
            "target_modules names embed_tokens, and {title} is not on embeddings: use modules_to_save"
        )
    }

    fn problems(&self, model: &LlamaConfig) -> Vec<String> {
        let settings = self.method.problems().into_iter();
        let mut problems: Vec<_> = settings
            .map(|(key, text)| format!("{key} {text}"))
            .collect();
        let keys = self.method.patterns();
        for key in keys.iter().filter(|key| pattern_regex(key).is_err()) {
            problems.push(format!("the pattern {key:?} is not a regular expression"));
        }
        for key in self.method.not_in_peft() {
            if self.selection.has(key) {
                let title = self.method.title();
                problems.push(format!(
                    "{key} is none of PEFT's settings for {title}: name the layers in target_modules"
                ));
            }
        }
        if self.method.changes_layers() {
            self.selection.layer_problems(model, &mut problems);
        }
        self.selection.saved_problems(model, &mut problems);
        problems
    }

    /// Names that mean nothing in this model. PEFT lets them pass, since a list may be made for
    /// several models; in one's own recipe they are slips.
    ///
    /// # Errors
    /// [`Error::Fit`] with every such name.
    pub fn check_names(&self, model: &LlamaConfig) -> Result<()> {
        let mut problems = Vec::new();
        if let Targets::Names(names) = &self.selection.target_modules {
            for name in names.iter().filter(|name| !names_a_layer(model, name)) {
                problems.push(format!(
                    "target_modules names {name}, which the model lacks"
                ));
            }
        }
        let layers: Vec<_> = all_layers(model).collect();
        let matches = |key: &str| layers.iter().any(|layer| pattern_matches(key, &layer.name));
        let keys = self.method.patterns().into_iter();
        for key in keys.filter(|key| !matches(key)) {
            problems.push(format!("the pattern {key:?} matches no layer"));
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Fit { problems }),
        }
    }

    /// The settings by which two adapters differ in what their tensors are or mean.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        if self.method.name() != other.method.name() {
            return vec!["method".into()];
        }
        let (ours, theirs) = (self.meaning(), other.meaning());
        let keys = ours.keys().chain(theirs.keys());
        let mut differ: Vec<String> = Vec::new();
        for key in keys.filter(|key| ours.get(*key) != theirs.get(*key)) {
            if !differ.contains(key) {
                differ.push(key.clone());
            }
        }
        differ
    }

    /// What decides what its tensors are and mean, in the one spelling that can be compared.
    fn meaning(&self) -> Map<String, Value> {
        let selection = Selection {
            target_modules: self.selection.target_modules.sorted(),
            exclude_modules: self.selection.exclude_modules.as_ref().map(Targets::sorted),
            ..self.selection.clone()
        };
        let mut all = Map::new();
        for part in [json!(self.method), json!(selection)] {
            all.extend(part.as_object().cloned().unwrap_or_default());
        }
        all.retain(|key, _| !self.method.free_keys().contains(&key.as_str()));
        all
    }
}

impl Selection {
    /// Whether one of the keys is given that narrow `target_modules`.
    fn has(&self, key: &str) -> bool {
        match key {
            "exclude_modules" => self.exclude_modules.is_some(),
            "layers_to_transform" => self.layers_to_transform.is_some(),
            _ => false,
        }
    }

    /// Whether the same modules of every decoder layer are meant.
    pub(crate) fn names_no_layer(&self) -> bool {
        let has_index = |name: &String| name.contains(|c: char| c.is_ascii_digit());
        self.layers_to_transform.is_none()
            && match &self.target_modules {
                Targets::AllLinear => true,
                Targets::Names(names) => !names.iter().any(has_index),
                Targets::Regex(_) => false,
            }
    }

    fn matches_nothing(&self) -> String {
        let but = match self.modules_to_save.is_empty() {
            true => "",
            false => " that is not in modules_to_save", // PEFT does not load such adapters, either
        };
        format!(
            "target_modules = {} matches no layer{but} (layers are named like \
             model.layers.0.self_attn.q_proj)",
            self.target_modules
        )
    }

    fn layer_problems(&self, model: &LlamaConfig, problems: &mut Vec<String>) {
        if self.layers_to_transform.is_some() && matches!(self.target_modules, Targets::Regex(_)) {
            problems.push("layers_to_transform does not go with a regular expression".into());
        }
        if self.layers_pattern.is_some() && self.layers_to_transform.is_none() {
            problems.push("layers_pattern needs layers_to_transform".into());
        }
        if matches!(self.target_modules, Targets::Regex(_)) && self.layers_to_transform.is_some() {
            problems.push(
                "layers_to_transform does not go with an expression in target_modules: let that name \
                 the layers"
                    .into(), // PEFT loads no such adapter
            );
        }
        let last = model.num_hidden_layers;
        let layers = self.layers_to_transform.iter().flatten();
        for index in layers.filter(|index| **index >= last) {
            problems.push(format!(
                "layers_to_transform names layer {index} of {last} layers"
            ));
        }
    }

    fn saved_problems(&self, model: &LlamaConfig, problems: &mut Vec<String>) {
        for module in &self.modules_to_save {
            let names = module_names(model);
            let holds = |name: &String| name.split('.').any(|part| part == module);
            let ends = [EMBED_TOKENS, LM_HEAD];
            if model.tie_word_embeddings && ends.iter().any(|name| name.ends_with(module)) {
                problems.push(format!(
                    "modules_to_save names {module}, but embeddings and lm_head are tied: they \
                     could not be saved apart"
                ));
            } else if names.iter().any(|name| name.ends_with(module)) {
                continue;
            } else if names.iter().any(holds) {
                problems.push(format!(
                    "modules_to_save names {module}, which only holds others: name those, such as \
                     q_proj or norm"
                ));
            } else {
                problems.push(format!(
                    "modules_to_save names {module}, which the model lacks"
                ));
            }
        }
    }

    fn targets(&self, name: &str) -> std::result::Result<bool, String> {
        if self.saves(name) {
            return Ok(false);
        }
        if let Some(exclude) = &self.exclude_modules
            && exclude.matches(name)?
        {
            return Ok(false);
        }
        let Some(wanted) = &self.layers_to_transform else {
            return self.target_modules.matches(name);
        };
        // As in PEFT, a module that is named in full is meant whatever its layer.
        if matches!(&self.target_modules, Targets::Names(all) if all.iter().any(|n| n == name)) {
            return Ok(true);
        }
        let index = match &self.layers_pattern {
            None => layer_index(name),
            Some(patterns) => index_in(name, patterns.all())?,
        };
        let here = index.is_some_and(|index| wanted.contains(&index));
        Ok(here && self.target_modules.matches(name)?)
    }

    /// Whether a module is trained and saved as a whole. Unlike targets, these match without a
    /// dot: `norm` means every norm (PEFT's `_set_trainable`).
    pub fn saves(&self, name: &str) -> bool {
        self.modules_to_save
            .iter()
            .any(|module| name.ends_with(module))
    }
}

/// Numbers of tensors.
fn size<'a>(parts: impl Iterator<Item = &'a Part>) -> u64 {
    let one = |part: &Part| part.shape.iter().map(|n| *n as u64).product::<u64>();
    parts.map(one).sum()
}

/// A number as Python writes it: whole ones without a fraction.
pub(crate) fn number(x: f64) -> Value {
    match x.fract() == 0.0 && x.abs() < 1e15 {
        true => json!(x as i64),
        false => json!(x),
    }
}

impl Targets {
    /// Those of a method that adapts no layers.
    pub(crate) fn nothing() -> Self {
        Self::Names(Vec::new())
    }

    /// Whether they are those of a method that adapts no layers.
    pub fn is_nothing(&self) -> bool {
        matches!(self, Self::Names(names) if names.is_empty())
    }

    /// The same in the one spelling that can be compared.
    pub(crate) fn sorted(&self) -> Self {
        let mut names: Vec<String> = match self {
            Self::AllLinear => ALL_LINEAR.map(str::to_owned).to_vec(),
            Self::Names(names) => names.clone(),
            Self::Regex(_) => return self.clone(),
        };
        names.sort();
        names.dedup();
        Self::Names(names)
    }

    pub(crate) fn matches(&self, name: &str) -> std::result::Result<bool, String> {
        Ok(match self {
            Self::AllLinear => ![EMBED_TOKENS, LM_HEAD].contains(&name),
            Self::Names(names) => names.iter().any(|suffix| ends_with(name, suffix)),
            Self::Regex(pattern) => {
                let bad = |e| format!("{pattern:?} is not a regular expression: {e}");
                let whole = Regex::new(&format!("^(?:{pattern})$")).map_err(bad)?;
                whole.is_match(name).map_err(bad)?
            }
        })
    }
}

impl<T: Copy> Pattern<T> {
    /// The value for a layer.
    pub fn find(&self, name: &str) -> Option<T> {
        let mut entries = self.0.iter();
        entries
            .find(|(key, _)| pattern_matches(key, name))
            .map(|(_, value)| *value)
    }
}

impl Pattern<f64> {
    /// In PEFT's spelling.
    pub(crate) fn to_peft(&self) -> Map<String, Value> {
        let entries = self.0.iter();
        entries
            .map(|(key, value)| (key.clone(), number(*value)))
            .collect()
    }
}

impl<T> Pattern<T> {
    /// The same expressions with other values.
    pub fn map(&self, other: impl Fn(&T) -> T) -> Self {
        let entries = self.0.iter();
        Self(
            entries
                .map(|(key, value)| (key.clone(), other(value)))
                .collect(),
        )
    }

    /// The expressions.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(key, _)| key.as_str())
    }
}

/// The end of a name, from a dot on (PEFT's `get_pattern_key`).
fn pattern_regex(key: &str) -> std::result::Result<Regex, fancy_regex::Error> {
    Regex::new(&format!(r"^(.*\.)?({key})$"))
}

fn pattern_matches(key: &str, name: &str) -> bool {
    pattern_regex(key).is_ok_and(|regex| regex.is_match(name).unwrap_or(false))
}

impl<T> Default for Pattern<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

/// `name` is `suffix` or ends with it after a dot.
fn ends_with(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn layer_index(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// The place of a layer in the first list whose name one of the expressions matches.
fn index_in(name: &str, patterns: &[String]) -> std::result::Result<Option<usize>, String> {
    for pattern in patterns {
        let bad = |e| format!("layers_pattern {pattern:?} is not a regular expression: {e}");
        let regex = Regex::new(&format!(r"^(?:|.*?\.)(?:{pattern})\.(\d+)\.")).map_err(bad)?;
        let found = regex.captures(name).map_err(bad)?;
        if let Some(index) = found.and_then(|found| found.iter().last().flatten()) {
            return Ok(index.as_str().parse().ok());
        }
    }
    Ok(None)
}

/// Every layer that can be adapted: embeddings, linear layers, and `lm_head`, even if its weights are
/// the embeddings.
fn all_layers(model: &LlamaConfig) -> impl Iterator<Item = Layer> {
    let (v, d) = (model.vocab_size, model.hidden_size);
    let layer = |name: &str, shape| Layer {
        name: name.into(),
        shape,
    };
    let mut all = vec![layer(EMBED_TOKENS, [d, v])];
    for index in 0..model.num_hidden_layers {
        let at = |(name, shape, _)| Layer {
            name: format!("model.layers.{index}.{name}"),
            shape,
        };
        all.extend(model.projections().map(at));
    }
    all.push(layer(LM_HEAD, [v, d]));
    all.into_iter()
}

fn names_a_layer(model: &LlamaConfig, suffix: &str) -> bool {
    all_layers(model).any(|layer| ends_with(&layer.name, suffix))
}

fn module_names(model: &LlamaConfig) -> Vec<String> {
    let weights = model.tensors().into_iter();
    weights
        .filter_map(|(name, _)| name.strip_suffix(".weight").map(str::to_owned))
        .collect()
}

/// The names of PEFT's `all-linear` for a Llama.
pub const ALL_LINEAR: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

impl std::fmt::Display for Targets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AllLinear => write!(f, "\"all-linear\""),
            Self::Names(names) => write!(f, "{names:?}"),
            Self::Regex(pattern) => write!(f, "{pattern:?}"),
        }
    }
}

/// A list of names, a regular expression, or `"all-linear"`.
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a list of names, a regular expression or \"all-linear\""
)]
enum TargetsSpelling {
    Text(String),
    List(Vec<String>),
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Ok(match TargetsSpelling::deserialize(deserializer)? {
            TargetsSpelling::Text(text) if text.eq_ignore_ascii_case("all-linear") => {
                Self::AllLinear
            }
            TargetsSpelling::Text(text) => Self::Regex(text),
            TargetsSpelling::List(names) => Self::Names(names),
        })
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str("all-linear"),
            Self::Names(names) => names.serialize(serializer),
            Self::Regex(pattern) => serializer.serialize_str(pattern),
        }
    }
}

impl<T: Serialize> Serialize for Pattern<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pattern<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Pattern<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a table from module names to numbers")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Pattern(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::lora::LoraSettings;

    fn tiny(tied: bool) -> LlamaConfig {
        LlamaConfig::from_json(&serde_json::json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 3, "num_attention_heads": 2, "tie_word_embeddings": tied,
        }))
        .unwrap()
    }

    fn lora(target_modules: Targets) -> AdapterConfig {
        AdapterConfig {
            selection: Selection {
                target_modules,
                ..Selection::default()
            },
            method: LoraSettings::default().into(),
        }
    }

    fn names(config: &AdapterConfig) -> Vec<String> {
        config
            .layers(&tiny(false))
            .unwrap()
            .into_iter()
            .map(|layer| layer.name)
            .collect()
    }

    #[test]
    fn all_linear_leaves_lm_head_out() {
        assert_eq!(names(&lora(Targets::AllLinear)).len(), 21);
        assert_eq!(
            names(&lora(Targets::Names(vec!["lm_head".into()]))),
            ["lm_head"]
        );
    }

    #[test]
    fn a_tied_lm_head_is_a_layer_of_its_own() {
        let head = lora(Targets::Names(vec!["lm_head".into()]));
        assert_eq!(head.layers(&tiny(true)).unwrap()[0].shape, [32, 8]);
        assert_eq!(
            lora(Targets::AllLinear).layers(&tiny(true)).unwrap().len(),
            21
        );
    }

    #[test]
    fn embeddings_are_a_target_of_lora_alone() {
        let targets = Targets::Names(vec!["v_proj".into(), "embed_tokens".into()]);
        let mut config = lora(targets);
        let layers = config.layers(&tiny(false)).unwrap();
        assert_eq!((layers.len(), layers[0].shape), (4, [8, 32]));
        config.check_names(&tiny(false)).unwrap();
        config.method = crate::methods::loha::LohaSettings::default().into();
        let refusal = config.layers(&tiny(false)).unwrap_err().to_string();
        assert!(refusal.contains("LoHa is not on embeddings"), "{refusal}");
        config.selection.exclude_modules = Some(Targets::Names(vec!["embed_tokens".into()]));
        assert_eq!(config.layers(&tiny(false)).unwrap().len(), 3);
    }

    #[test]
    fn names_match_after_a_dot_and_expressions_as_a_whole() {
        let suffix = names(&lora(Targets::Names(vec![
            "1.mlp.up_proj".into(),
            "v_proj".into(),
        ])));
        assert_eq!(suffix.len(), 4);
        let regex = names(&lora(Targets::Regex(
            r"model\.layers\.(0|2)\..*_proj(?<!o_proj)".into(),
        )));
        assert_eq!(regex.len(), 12);
        assert!(
            lora(Targets::Regex("q_proj".into()))
                .layers(&tiny(false))
                .is_err()
        );
    }

    #[test]
    fn exclusion_layers_and_saved_modules_narrow_the_targets() {
        let mut config = lora(Targets::AllLinear);
        config.selection.exclude_modules = Some(Targets::Names(vec!["q_proj".into()]));
        config.selection.layers_to_transform = Some(vec![1]);
        config.selection.modules_to_save = vec!["down_proj".into()];
        assert_eq!(names(&config).len(), 5);
    }

    #[test]
    fn layers_are_counted_in_the_list_of_the_pattern() {
        let mut config = lora(Targets::AllLinear);
        config.selection.layers_pattern = Some(OneOrMany::One("layers".into()));
        let refusal = config.layers(&tiny(false)).unwrap_err().to_string();
        assert!(refusal.contains("needs layers_to_transform"), "{refusal}");
        config.selection.layers_to_transform = Some(vec![0, 2]);
        assert_eq!(names(&config).len(), 14);
        let many = ["blocks".to_owned(), "l.*s".to_owned()];
        config.selection.layers_pattern = Some(OneOrMany::Many(many.into()));
        assert_eq!(names(&config).len(), 14);
        config.selection.layers_pattern = Some(OneOrMany::One("blocks".into()));
        assert!(config.layers(&tiny(false)).is_err());
        config.selection.layers_pattern = Some(OneOrMany::One("(".into()));
        let refusal = config.layers(&tiny(false)).unwrap_err().to_string();
        assert!(refusal.contains("not a regular expression"), "{refusal}");
    }

    #[test]
    fn an_adapter_needs_a_target_and_saves_single_modules() {
        let mut config = lora(Targets::Names(Vec::new()));
        let refusal = |config: &AdapterConfig| config.layers(&tiny(false)).unwrap_err().to_string();
        assert!(refusal(&config).contains("matches no layer"));
        config.selection.modules_to_save = vec!["lm_head".into()];
        assert!(refusal(&config).contains("matches no layer that is not in modules_to_save"));
        config.selection.target_modules = Targets::AllLinear;
        config.selection.modules_to_save = vec!["mlp".into()];
        assert!(refusal(&config).contains("mlp, which only holds others"));
    }

    #[test]
    fn what_does_not_fit_is_listed_at_once() {
        let mut config = lora(Targets::Names(vec!["qproj".into(), "embed_tokens".into()]));
        config.selection.modules_to_save = vec!["lm_head".into(), "embed_tokens".into()];
        config.selection.layers_to_transform = Some(vec![3]);
        let text = config.layers(&tiny(true)).unwrap_err().to_string();
        for part in ["layer 3 of 3", "modules_to_save names lm_head", "tied"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
}
