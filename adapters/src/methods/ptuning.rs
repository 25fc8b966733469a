//! P-tuning: prompt tuning whose embeddings come out of layers that are trained with them. PEFT saves
//! the embeddings alone.
//!
//! Source: <https://arxiv.org/abs/2103.10385>, `peft/tuners/p_tuning/{config,model}.py`.

use burn::tensor::backend::Backend;
use model::config::LlamaConfig;
use model::virtual_tokens::{Activation, Encoder, Place, VirtualTokens};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::virtual_tokens::{
    EMBEDDINGS, ENCODED, NUM_VIRTUAL_TOKENS, dense, dense_parts, fresh_embedding, lstm, lstm_parts,
    of_model,
};
use super::{Part, PromptMethod, Settings, Values, fresh_uniform, rank_problem, share_problem};
use crate::attach::AdaptedLlama;
use crate::error::Result;

/// The settings of P-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PTuningSettings {
    /// Virtual tokens in front of every row.
    pub num_virtual_tokens: usize,
    /// What their embeddings come out of.
    pub encoder_reparameterization_type: Reparameterization,
    /// Width of these layers; the model's own if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// Layers of the LSTM; the other kind always has three.
    pub encoder_num_layers: usize,
    /// Dropout between the layers of the LSTM, where only 0 is supported; the other kind has none.
    pub encoder_dropout: f64,
    /// What they came out of before they were saved.
    #[serde(skip)]
    pub came_of: Reparameterization,
}

/// What embeddings come out of; in PEFT's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Reparameterization {
    /// Three linear layers with ReLU between them.
    #[default]
    #[serde(alias = "mlp")]
    Mlp,
    /// A bidirectional LSTM and two linear layers.
    #[serde(alias = "lstm")]
    Lstm,
    /// Nothing: an adapter that was saved has its embeddings alone, and training goes on with these.
    #[serde(alias = "none")]
    None,
}

impl Default for PTuningSettings {
    fn default() -> Self {
        Self {
            num_virtual_tokens: NUM_VIRTUAL_TOKENS,
            encoder_reparameterization_type: Reparameterization::Mlp,
            encoder_hidden_size: None,
            encoder_num_layers: 2,
            encoder_dropout: 0.0,
            came_of: Reparameterization::Mlp,
        }
    }
}

/// The keys of `adapter_config.json` that are read.
#[derive(Deserialize)]
struct PeftPTuning {
    num_virtual_tokens: usize,
    #[serde(default)]
    encoder_reparameterization_type: Reparameterization,
    encoder_hidden_size: Option<usize>,
    #[serde(default = "two")]
    encoder_num_layers: usize,
}

fn two() -> usize {
    2
}

impl Settings for PTuningSettings {
    const NAME: &'static str = "ptuning";
    const TITLE: &'static str = "P-tuning";
    const PEFT_TYPE: &'static str = "P_TUNING";
    const FREE: &'static [&'static str] = &[
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    ];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        let peft: PeftPTuning = serde_json::from_str(json)?;
        Ok(Self {
            num_virtual_tokens: peft.num_virtual_tokens,
            encoder_reparameterization_type: Reparameterization::None,
            encoder_hidden_size: peft.encoder_hidden_size,
            encoder_num_layers: peft.encoder_num_layers,
            encoder_dropout: 0.0,
            came_of: peft.encoder_reparameterization_type,
        })
    }

    fn to_peft(&self) -> Map<String, Value> {
        let settings = json!({
            "encoder_dropout": self.encoder_dropout,
            "encoder_num_layers": self.encoder_num_layers,
            "encoder_reparameterization_type": self.kind(),
            "num_virtual_tokens": self.num_virtual_tokens,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let counts = [
            rank_problem("num_virtual_tokens", [self.num_virtual_tokens]),
            rank_problem("encoder_num_layers", [self.encoder_num_layers]),
            rank_problem(
                "encoder_hidden_size",
                [self.encoder_hidden_size.unwrap_or(1)],
            ),
        ];
        let mut problems: Vec<_> = counts.into_iter().flatten().collect();
        let is_lstm = self.encoder_reparameterization_type == Reparameterization::Lstm;
        if is_lstm && self.encoder_dropout != 0.0 {
            let text = "other than 0 is not supported in an LSTM";
            problems.push(("encoder_dropout", text.into()));
        }
        problems.extend(share_problem("encoder_dropout", self.encoder_dropout));
        problems
    }

    fn is_converted(&self) -> bool {
        self.encoder_reparameterization_type != Reparameterization::None
    }
}

impl PTuningSettings {
    /// What PEFT is told; it has no word for none.
    fn kind(&self) -> Reparameterization {
        match self.encoder_reparameterization_type {
            Reparameterization::None => self.came_of,
            kind => kind,
        }
    }

    fn hidden(&self, model: &LlamaConfig) -> usize {
        self.encoder_hidden_size.unwrap_or(model.hidden_size)
    }

    fn encoder<B: Backend>(&self, values: &mut Values<'_, B>) -> Option<Encoder<B>> {
        let (lstms, layers): (usize, &[usize]) = match self.encoder_reparameterization_type {
            Reparameterization::None => return None,
            Reparameterization::Mlp => (0, &[0, 2, 4]),
            Reparameterization::Lstm => (self.encoder_num_layers, &[0, 2]),
        };
        let layer = |index: &usize| dense(&format!("mlp_head.{index}"), values);
        Some(Encoder {
            layers: layers.iter().map(layer).collect(),
            lstm: (0..lstms).map(|index| lstm(index, values)).collect(),
            activation: Activation::Relu,
        })
    }
}

impl PromptMethod for PTuningSettings {
    fn parts(&self, model: &LlamaConfig) -> Vec<Part> {
        let (p, d, h) = (
            self.num_virtual_tokens,
            model.hidden_size,
            self.hidden(model),
        );
        let mut parts = vec![Part::of_model(ENCODED, &[p, d])];
        match self.encoder_reparameterization_type {
            Reparameterization::None => return vec![Part::of_model(EMBEDDINGS, &[p, d])],
            Reparameterization::Mlp => {
                parts.extend(dense_parts("mlp_head.0", [h, d]));
                parts.extend(dense_parts("mlp_head.2", [h, h]));
                parts.extend(dense_parts("mlp_head.4", [d, h]));
            }
            Reparameterization::Lstm => {
                let layer = |index| lstm_parts(index, [h, if index == 0 { d } else { 2 * h }]);
                parts.extend((0..self.encoder_num_layers).flat_map(layer));
                parts.extend(dense_parts("mlp_head.0", [2 * h, 2 * h]));
                parts.extend(dense_parts("mlp_head.2", [d, 2 * h]));
            }
        }
        parts
    }

    fn fresh<B: Backend>(
        &self,
        part: &Part,
        model: &AdaptedLlama<B>,
        seed: u64,
    ) -> Result<Vec<f32>> {
        let (d, h) = (model.config.hidden_size, self.hidden(&model.config));
        let is_lstm = self.encoder_reparameterization_type == Reparameterization::Lstm;
        let wide = if is_lstm { 2 * h } else { h };
        Ok(match part.name.as_str() {
            EMBEDDINGS | ENCODED => fresh_embedding(part, 1.0, seed),
            name if name.starts_with("lstm_head") => fresh_uniform(part, h, seed),
            name if name.starts_with("mlp_head.0") && !is_lstm => fresh_uniform(part, d, seed),
            _ => fresh_uniform(part, wide, seed),
        })
    }

    fn positions(&self) -> usize {
        self.num_virtual_tokens
    }

    fn virtual_tokens<B: Backend>(&self, mut values: Values<'_, B>) -> VirtualTokens<B> {
        let encoder = self.encoder(&mut values);
        VirtualTokens {
            embedding: values.param(match encoder {
                Some(_) => ENCODED,
                None => EMBEDDINGS,
            }),
            encoder,
            tasks: None,
            place: Place::Embeddings,
        }
    }

    fn peft_of_model(&self, model: &LlamaConfig, _: &str) -> Map<String, Value> {
        let mut keys = of_model(model, model.hidden_size, model.num_attention_heads);
        keys.insert("encoder_hidden_size".into(), json!(self.hidden(model)));
        keys
    }

    fn saved(&self) -> Self {
        Self {
            encoder_reparameterization_type: Reparameterization::None,
            came_of: self.kind(),
            ..self.clone()
        }
    }
}
