//! Prefix tuning: keys and values in front of those of every row, in every layer.
//!
//! Source: <https://arxiv.org/abs/2101.00190>, `peft/tuners/prefix_tuning/{config,model}.py`.

use burn::tensor::backend::Backend;
use model::config::LlamaConfig;
use model::virtual_tokens::{Activation, Encoder, Place, VirtualTokens};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::virtual_tokens::{
    EMBEDDINGS, ENCODED, NUM_VIRTUAL_TOKENS, dense, dense_parts, fresh_embedding, of_model,
};
use super::{Part, PromptMethod, Settings, Values, fresh_uniform, rank_problem};
use crate::attach::AdaptedLlama;
use crate::error::Result;

/// The settings of prefix tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixSettings {
    /// Virtual tokens in front of every row.
    pub num_virtual_tokens: usize,
    /// Whether keys and values come out of two layers that are trained with them; saved are the keys
    /// and values, and training goes on from them without these layers.
    pub prefix_projection: bool,
    /// Width between the two layers; the model's own if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// `"zero"`: keys and values start as zeros; else as normal numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_weights: Option<InitWeights>,
    /// Whether they came out of these layers before they were saved.
    #[serde(skip)]
    pub was_projected: bool,
}

/// Other numbers than random ones to start with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitWeights {
    /// Zeros.
    Zero,
}

impl Default for PrefixSettings {
    fn default() -> Self {
        Self {
            num_virtual_tokens: NUM_VIRTUAL_TOKENS,
            prefix_projection: false,
            encoder_hidden_size: None,
            init_weights: None,
            was_projected: false,
        }
    }
}

/// The keys of `adapter_config.json` that are read.
#[derive(Deserialize)]
struct PeftPrefix {
    num_virtual_tokens: usize,
    #[serde(default)]
    prefix_projection: bool,
    encoder_hidden_size: Option<usize>,
    #[serde(default)]
    init_weights: Option<InitWeights>,
}

impl Settings for PrefixSettings {
    const NAME: &'static str = "prefix";
    const TITLE: &'static str = "prefix tuning";
    const PEFT_TYPE: &'static str = "PREFIX_TUNING";
    const FREE: &'static [&'static str] = &["encoder_hidden_size", "init_weights"];

    /// What a projection made is all that was saved of it.
    fn from_peft(json: &str) -> serde_json::Result<Self> {
        let peft: PeftPrefix = serde_json::from_str(json)?;
        Ok(Self {
            num_virtual_tokens: peft.num_virtual_tokens,
            prefix_projection: false,
            encoder_hidden_size: peft.encoder_hidden_size,
            init_weights: peft.init_weights,
            was_projected: peft.prefix_projection,
        })
    }

    fn to_peft(&self) -> Map<String, Value> {
        let settings = json!({
            "encoder_hidden_size": self.encoder_hidden_size,
            "init_weights": self.init_weights,
            "num_virtual_tokens": self.num_virtual_tokens,
            "prefix_projection": self.prefix_projection || self.was_projected,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let counts = [
            rank_problem("num_virtual_tokens", [self.num_virtual_tokens]),
            rank_problem(
                "encoder_hidden_size",
                [self.encoder_hidden_size.unwrap_or(1)],
            ),
        ];
        counts.into_iter().flatten().collect()
    }

    fn is_converted(&self) -> bool {
        self.prefix_projection
    }
}

impl PrefixSettings {
    fn hidden(&self, model: &LlamaConfig) -> usize {
        self.encoder_hidden_size.unwrap_or(model.hidden_size)
    }
}

/// Width of the keys of a layer.
fn width(model: &LlamaConfig) -> usize {
    model.num_key_value_heads * model.head_dim
}

impl PromptMethod for PrefixSettings {
    fn parts(&self, model: &LlamaConfig) -> Vec<Part> {
        let (p, w, h) = (self.num_virtual_tokens, width(model), self.hidden(model));
        let all = 2 * model.num_hidden_layers * w;
        if !self.prefix_projection {
            return vec![Part::of_model(EMBEDDINGS, &[p, all])];
        }
        let mut parts = vec![Part::of_model(ENCODED, &[p, w])];
        parts.extend(dense_parts("transform.0", [h, w]));
        parts.extend(dense_parts("transform.2", [all, h]));
        parts
    }

    fn fresh<B: Backend>(
        &self,
        part: &Part,
        model: &AdaptedLlama<B>,
        seed: u64,
    ) -> Result<Vec<f32>> {
        let (w, h) = (width(&model.config), self.hidden(&model.config));
        let is_last = part.name == EMBEDDINGS || part.name.starts_with("transform.2");
        if is_last && self.init_weights == Some(InitWeights::Zero) {
            return Ok(vec![0.0; part.shape.iter().product()]);
        }
        Ok(match part.name.as_str() {
            EMBEDDINGS | ENCODED => fresh_embedding(part, 1.0, seed),
            name if name.starts_with("transform.0") => fresh_uniform(part, w, seed),
            _ => fresh_uniform(part, h, seed),
        })
    }

    fn positions(&self) -> usize {
        0
    }

    fn virtual_tokens<B: Backend>(&self, mut values: Values<'_, B>) -> VirtualTokens<B> {
        let encoder = self.prefix_projection.then(|| Encoder {
            lstm: Vec::new(),
            layers: vec![
                dense("transform.0", &mut values),
                dense("transform.2", &mut values),
            ],
            activation: Activation::Tanh,
        });
        VirtualTokens {
            embedding: values.param(match encoder {
                Some(_) => ENCODED,
                None => EMBEDDINGS,
            }),
            encoder,
            tasks: None,
            place: Place::KeysAndValues,
        }
    }

    /// The width of a token and the heads are those of the keys, as PEFT rewrites them.
    fn peft_of_model(&self, model: &LlamaConfig, _: &str) -> Map<String, Value> {
        let mut keys = of_model(model, width(model), model.num_key_value_heads);
        if self.prefix_projection || self.was_projected {
            keys.insert("encoder_hidden_size".into(), json!(self.hidden(model)));
        }
        keys
    }

    fn saved(&self) -> Self {
        Self {
            prefix_projection: false,
            was_projected: self.prefix_projection || self.was_projected,
            ..self.clone()
        }
    }
}
