//! What the methods share that put trained vectors in front of every row: their settings in PEFT's
//! spelling, and the tensors of encoders.
//!
//! Source: `peft/config.py` (`PromptLearningConfig`), `peft/peft_model.py` (`get_prompt`).

use burn::tensor::backend::Backend;
use model::config::LlamaConfig;
use model::load::normal;
use model::virtual_tokens::{Dense, Lstm, LstmCell};
use serde_json::{Map, Value, json};

use super::{Part, Values};

/// The tensor in PEFT's file, and its name here where no encoder stands before it.
pub(crate) const EMBEDDINGS: &str = "prompt_embeddings";
/// What an encoder reads.
pub(super) const ENCODED: &str = "embedding.weight";
/// What a recipe means that does not say.
pub(super) const NUM_VIRTUAL_TOKENS: usize = 20;
/// Refused by all of them unless it is this; encoders and decoders in one are no Llamas.
const MUST_BE: &[(&str, Value)] = &[
    ("num_transformer_submodules", Value::Null), // 1 is let through
    ("modules_to_save", Value::Null),
];

/// What of an `adapter_config.json` cannot be honoured, whichever of them it is of.
pub(super) fn unsupported(json: &Map<String, Value>) -> Vec<String> {
    let must_be = MUST_BE
        .iter()
        .filter(|(key, _)| json.get(*key) != Some(&json!(1)));
    must_be
        .filter_map(|(key, wanted)| super::unless_neutral(json, key, wanted))
        .collect()
}

/// The keys that describe the model: its width as the method sees it, and its heads.
pub(super) fn of_model(model: &LlamaConfig, width: usize, heads: usize) -> Map<String, Value> {
    let keys = json!({
        "num_attention_heads": heads,
        "num_layers": model.num_hidden_layers,
        "num_transformer_submodules": 1,
        "token_dim": width,
    });
    keys.as_object().cloned().unwrap_or_default()
}

/// The tensors of a linear layer.
pub(super) fn dense_parts(name: &str, [out, r#in]: [usize; 2]) -> [Part; 2] {
    [
        Part::of_model(&format!("{name}.weight"), &[out, r#in]),
        Part::of_model(&format!("{name}.bias"), &[out]),
    ]
}

pub(super) fn dense<B: Backend>(name: &str, values: &mut Values<'_, B>) -> Dense<B> {
    Dense {
        weight: values.param(&format!("{name}.weight")),
        bias: values.param(&format!("{name}.bias")),
    }
}

/// What torch adds to the name of a layer that reads in reverse.
const DIRECTIONS: [&str; 2] = ["", "_reverse"];

/// The tensors of a layer of a bidirectional LSTM with states of `h`.
pub(super) fn lstm_parts(index: usize, [h, r#in]: [usize; 2]) -> Vec<Part> {
    let shapes: [(&str, &[usize]); 4] = [
        ("weight_ih", &[4 * h, r#in]),
        ("weight_hh", &[4 * h, h]),
        ("bias_ih", &[4 * h]),
        ("bias_hh", &[4 * h]),
    ];
    let of = |direction: &str| {
        shapes.map(|(part, shape)| Part::of_model(&lstm_name(part, index, direction), shape))
    };
    DIRECTIONS
        .iter()
        .flat_map(|direction| of(direction))
        .collect()
}

pub(super) fn lstm<B: Backend>(index: usize, values: &mut Values<'_, B>) -> Lstm<B> {
    let mut cell = |direction: &str| LstmCell {
        weight_ih: values.param(&lstm_name("weight_ih", index, direction)),
        weight_hh: values.param(&lstm_name("weight_hh", index, direction)),
        bias_ih: values.param(&lstm_name("bias_ih", index, direction)),
        bias_hh: values.param(&lstm_name("bias_hh", index, direction)),
    };
    Lstm {
        ahead: cell(DIRECTIONS[0]),
        reverse: cell(DIRECTIONS[1]),
    }
}

fn lstm_name(part: &str, index: usize, direction: &str) -> String {
    format!("lstm_head.{part}_l{index}{direction}")
}

/// Numbers as those that torch's embeddings start with, or with another deviation.
pub(super) fn fresh_embedding(part: &Part, deviation: f64, seed: u64) -> Vec<f32> {
    normal(seed, &part.name, part.shape.iter().product(), deviation)
}
