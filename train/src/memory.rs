//! What a training step holds beside the weights: an estimate from the shapes alone.
//!
//! Shapes: `n` tokens of a micro batch, `d` hidden, `n_h` heads, `n_kv` KV heads, `h_d` head dim,
//! `i` intermediate, `v` vocabulary, `r` rank.

use std::collections::BTreeMap;

use model::config::LlamaConfig;

use crate::error::Result;
use crate::step::LOGITS_AT_A_TIME;
use crate::trained::Trained;

/// Bytes that a step holds when it holds the most, by part; everything is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepMemory {
    /// Gradients of what is trained.
    pub gradients: u64,
    /// AdamW's two moments of what is trained.
    pub optimizer: u64,
    /// What backward needs of the forward pass.
    pub activations: u64,
    /// What exists for a moment only: logits, or the graph of a layer that is computed again.
    pub transient: u64,
}

impl StepMemory {
    /// An estimate for micro batches of `tokens` tokens, padding included, with or without
    /// activation recompute.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if the adapter does not fit the model.
    pub fn estimate(
        trained: &Trained,
        config: &LlamaConfig,
        tokens: usize,
        recompute: bool,
    ) -> Result<Self> {
        let trained_bytes = bytes(trained.num_params(config)?);
        let layers = Kept::of(trained, config)?.layers();
        let (d, n) = (config.hidden_size as u64, tokens as u64);
        let logits = (n * config.vocab_size as u64).min(LOGITS_AT_A_TIME as u64);
        let largest = layers.iter().max().map_or(0, |largest| n * largest);
        // Gradients inside of a layer; with dropout, a mask and what it leaves of an input, too.
        let dropout = matches!(trained, Trained::Lora(lora) if lora.dropout > 0.0);
        let wide = if dropout { 4 } else { 2 };
        let backward = wide * n * config.intermediate_size as u64;
        let ends = 3 * n * d; // hidden states before and after the norm, and their gradient
        let (activations, transient) = match recompute {
            false => (n * layers.iter().sum::<u64>(), logits.max(backward)),
            true => (n * d * layers.len() as u64, logits.max(largest + backward)),
        };
        Ok(Self {
            gradients: trained_bytes,
            optimizer: 2 * trained_bytes,
            activations: bytes(activations + ends),
            transient: bytes(transient),
        })
    }

    /// All that is held together: backward lets activations go as it makes gradients.
    pub fn total(&self) -> u64 {
        self.optimizer + self.activations.max(self.gradients) + self.transient
    }
}

fn bytes(numbers: u64) -> u64 {
    numbers * size_of::<f32>() as u64
}

/// What the decoder layers keep of each token for backward.
struct Kept<'a> {
    config: &'a LlamaConfig,
    /// Ranks of the trained modules, by name; 0 for one that is trained as a whole.
    ranks: BTreeMap<String, usize>,
}

impl<'a> Kept<'a> {
    fn of(trained: &Trained, config: &'a LlamaConfig) -> Result<Self> {
        let mut ranks = BTreeMap::new();
        for (name, shape) in trained.parameters(config)? {
            let (module, part) = name.rsplit_once('.').unwrap_or((&name, ""));
            match part {
                "lora_a" => ranks.insert(module.to_owned(), shape[0]),
                "lora_b" => None, // it is as wide as `lora_a`
                _ => ranks.insert(module.to_owned(), 0),
            };
        }
        Ok(Self { config, ranks })
    }

    /// Numbers a token, for each layer from the first trained one on: those below it keep nothing.
    fn layers(&self) -> Vec<u64> {
        let all = 0..self.config.num_hidden_layers;
        let trained = |index: &usize| {
            let start = format!("model.layers.{index}.");
            self.ranks.keys().any(|name| name.starts_with(&start))
        };
        let first = match self.ranks.contains_key("model.embed_tokens") {
            true => 0,
            false => all.clone().find(trained).unwrap_or(all.end),
        };
        (first..all.end).map(|index| self.layer(index)).collect()
    }

    /// Numbers a token that one layer keeps.
    ///
    /// What an operation keeps is the state of its backward in `model::ops`; a frozen weight keeps
    /// nothing, and the input of a trained one, the output of a norm, of attention or of the gate,
    /// is kept by that already or computed again.
    fn layer(&self, index: usize) -> u64 {
        let config = self.config;
        let (d, i) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let norms = 2 * d; // their inputs
        let attention = 2 * (q + kv) + config.num_attention_heads; // q, k, v, output, log-sum-exp
        let swiglu = 2 * i; // gate and up
        let start = format!("model.layers.{index}.");
        let adapters = self
            .ranks
            .iter()
            .filter(|(name, _)| name.starts_with(&start));
        let narrow: usize = adapters.map(|(_, rank)| rank).sum(); // between `lora_a` and `lora_b`
        (norms + attention + swiglu + narrow) as u64
    }
}
