//! `config.json` of a Llama: read once, checked as a whole, and from then on plain numbers.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The shape of a Llama, with the names of `config.json`.
///
/// Source: `transformers/models/llama/configuration_llama.py`.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream, `d`.
    pub hidden_size: usize,
    /// Width of the feed-forward layer, `i`.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads, `n_h`.
    pub num_attention_heads: usize,
    /// Number of key and value heads, `n_kv`; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head, `h_d`; not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Longest sequence the model was made for, see [`LlamaConfig::max_context`]; of what is
    /// computed, it matters to `dynamic` rotary scaling only.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether `lm_head` is `embed_tokens`.
    pub tie_word_embeddings: bool,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// What the checkpoint says about weights that are not stored as they are; whoever makes the
    /// linear layers reads it.
    pub quantization_config: Option<Value>,
}

/// The rotary scalings of `transformers/modeling_rope_utils.py` that Llamas use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// The frequencies of the paper.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// How many times longer the context gets.
        factor: f64,
    },
    /// A larger base once a sequence is longer than `max_position_embeddings` (NTK-aware).
    Dynamic {
        /// How many times longer the context gets.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a ramp between; attention warmed by
    /// `attention_factor` (<https://arxiv.org/abs/2309.00071>).
    Yarn {
        /// How many times longer the context gets.
        factor: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Context length of pre-training.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1's piecewise division by wavelength.
    Llama3 {
        /// Divides the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: usize,
    },
}

impl LlamaConfig {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] with every problem at once; [`Error::Json`] and [`Error::Io`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read",
            path: path.into(),
            source,
        })?;
        let json: Value = serde_json::from_str(&text).map_err(|source| Error::Json {
            path: path.into(),
            source,
        })?;
        Self::from_json(&json).map_err(|problems| Error::Config {
            path: path.into(),
            problems,
        })
    }

    /// Checks a parsed `config.json`; the error lists every problem.
    pub fn from_json(json: &Value) -> std::result::Result<Self, Vec<String>> {
        let Some(object) = json.as_object() else {
            return Err(vec!["expected a JSON object".into()]);
        };
        let mut f = Fields::new("", object);
        f.check_architecture();

        let num_attention_heads = f.count("num_attention_heads", None, 1 << 16);
        let hidden_size = f.count("hidden_size", None, 1 << 20);
        let head_dim = f.count(
            "head_dim",
            Some(hidden_size / num_attention_heads.max(1)),
            1 << 16,
        );
        let max_position_embeddings = f.count("max_position_embeddings", Some(2048), 1 << 40);
        let (rope_theta, rope_scaling) = f.rope(max_position_embeddings);
        let config = Self {
            vocab_size: f.count("vocab_size", None, 1 << 24),
            hidden_size,
            intermediate_size: f.count("intermediate_size", None, 1 << 22),
            num_hidden_layers: f.count("num_hidden_layers", None, 1 << 12),
            num_attention_heads,
            num_key_value_heads: f.count("num_key_value_heads", Some(num_attention_heads), 1 << 16),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: f.positive("rms_norm_eps", Some(1e-6)),
            rope_theta,
            rope_scaling,
            attention_bias: f.flag("attention_bias", false),
            mlp_bias: f.flag("mlp_bias", false),
            tie_word_embeddings: f.flag("tie_word_embeddings", false),
            initializer_range: f.positive("initializer_range", Some(0.02)),
            quantization_config: f.get("quantization_config").cloned(),
        };
        config.check_heads(object, &mut f.problems);
        if f.problems.is_empty() {
            Ok(config)
        } else {
            Err(f.problems)
        }
    }

    fn check_heads(&self, object: &Map<String, Value>, problems: &mut Vec<String>) {
        if !problems.is_empty() {
            return; // the numbers below may be stand-ins
        }
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv != 0 {
            problems.push(format!(
                "num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv})"
            ));
        }
        let given = object.get("head_dim").is_some_and(|v| !v.is_null());
        if !given && !self.hidden_size.is_multiple_of(heads) {
            problems.push(format!(
                "hidden_size ({}) is not a multiple of num_attention_heads ({heads})",
                self.hidden_size
            ));
        }
        let (width, most) = (heads.saturating_mul(self.head_dim), 1 << 22);
        if width > most {
            problems.push(format!(
                "num_attention_heads ({heads}) × head_dim ({}) is more than {most}",
                self.head_dim
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            problems.push(format!(
                "head_dim ({}) is odd: rotary positions need pairs",
                self.head_dim
            ));
        }
    }

    /// Longest text in tokens that the model was made for.
    ///
    /// `max_position_embeddings` is that of the training before `linear` and `dynamic` scaling, and
    /// with `yarn` where nothing else tells the original length.
    ///
    /// Source: `_get_and_verify_max_len` in `vllm/config/model.py`.
    pub fn max_context(&self) -> usize {
        let plain = self.max_position_embeddings;
        let times = |length: usize, factor: f64| (length as f64 * factor) as usize;
        match self.rope_scaling {
            RopeScaling::Default | RopeScaling::Llama3 { .. } => plain,
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                times(plain, factor).max(plain)
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                ..
            } => times(original, factor).max(plain),
        }
    }

    /// Name and shape of every tensor of a checkpoint, in the order of the network.
    ///
    /// Projections and embeddings are `[out, in]` and `[vocab, d]`, norms and biases `[d]`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let d = self.hidden_size;
        let mut all = vec![("model.embed_tokens.weight".into(), vec![self.vocab_size, d])];
        for layer in 0..self.num_hidden_layers {
            let at = |name: &str| format!("model.layers.{layer}.{name}");
            for (name, [out, r#in], bias) in self.projections() {
                all.push((at(&format!("{name}.weight")), vec![out, r#in]));
                if bias {
                    all.push((at(&format!("{name}.bias")), vec![out]));
                }
            }
            all.push((at("input_layernorm.weight"), vec![d]));
            all.push((at("post_attention_layernorm.weight"), vec![d]));
        }
        all.push(("model.norm.weight".into(), vec![d]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".into(), vec![self.vocab_size, d]));
        }
        all
    }

    /// Name within a layer, `[out, in]` and whether there is a bias, of the seven projections.
    pub fn projections(&self) -> [(&'static str, [usize; 2], bool); 7] {
        let (d, i) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let (attention, mlp) = (self.attention_bias, self.mlp_bias);
        [
            ("self_attn.q_proj", [q, d], attention),
            ("self_attn.k_proj", [kv, d], attention),
            ("self_attn.v_proj", [kv, d], attention),
            ("self_attn.o_proj", [d, q], attention),
            ("mlp.gate_proj", [i, d], mlp),
            ("mlp.up_proj", [i, d], mlp),
            ("mlp.down_proj", [d, i], mlp),
        ]
    }

    /// Number of weights, tied ones counted once.
    pub fn num_params(&self) -> u64 {
        let size = |shape: &[usize]| shape.iter().map(|&n| n as u64).product::<u64>();
        self.tensors().iter().map(|(_, shape)| size(shape)).sum()
    }
}

/// Reads the keys of one JSON object and gathers what is wrong with them.
struct Fields<'a> {
    prefix: &'static str,
    object: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> Fields<'a> {
    fn new(prefix: &'static str, object: &'a Map<String, Value>) -> Self {
        Self {
            prefix,
            object,
            problems: Vec::new(),
        }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn problem(&mut self, key: &str, what: impl std::fmt::Display) {
        self.problems.push(format!("{}{key} {what}", self.prefix));
    }

    /// A whole number from 1 to `most`; a wrong one is reported and replaced by 1.
    fn count(&mut self, key: &str, default: Option<usize>, most: usize) -> usize {
        match (self.get(key), default) {
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(key, "is missing");
                1
            }
            (Some(value), _) => match value.as_u64() {
                Some(n) if n >= 1 && n <= most as u64 => n as usize,
                _ => {
                    self.problem(
                        key,
                        format!("is {value}: expected a whole number from 1 to {most}"),
                    );
                    1
                }
            },
        }
    }

    /// A finite number above 0; a wrong one is reported and replaced by 1.
    fn positive(&mut self, key: &str, default: Option<f64>) -> f64 {
        match (self.get(key), default) {
            (None, Some(default)) => default,
            (None, None) => {
                self.problem(key, "is missing");
                1.0
            }
            (Some(value), _) => match value.as_f64() {
                Some(x) if x.is_finite() && x > 0.0 => x,
                _ => {
                    self.problem(key, format!("is {value}: expected a number above 0"));
                    1.0
                }
            },
        }
    }

    fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(value) => {
                self.problem(key, format!("is {value}: expected true or false"));
                default
            }
        }
    }

    fn check_architecture(&mut self) {
        let named = self
            .get("architectures")
            .and_then(|list| list.get(0))
            .or(self.get("model_type"));
        match named.map(|value| value.as_str().unwrap_or_default()) {
            Some("LlamaForCausalLM" | "llama") => {}
            Some(other) => self.problem(
                "architectures",
                format!("is {other:?}: only LlamaForCausalLM is supported"),
            ),
            None => self.problem("architectures", "is missing: expected LlamaForCausalLM"),
        }
        if let Some(act) = self.get("hidden_act").filter(|act| *act != "silu") {
            self.problem(
                "hidden_act",
                format!("is {act}: only \"silu\" is supported"),
            );
        }
    }

    /// Both spellings: `rope_parameters` (transformers 5), `rope_theta` + `rope_scaling` (before).
    fn rope(&mut self, max_position_embeddings: usize) -> (f64, RopeScaling) {
        let mut theta = self.positive("rope_theta", Some(10_000.0));
        let (key, prefix) = match self.get("rope_scaling") {
            Some(_) => ("rope_scaling", "rope_scaling."),
            None => ("rope_parameters", "rope_parameters."),
        };
        let Some(value) = self.get(key) else {
            return (theta, RopeScaling::Default);
        };
        let Some(object) = value.as_object() else {
            self.problem(key, format!("is {value}: expected an object"));
            return (theta, RopeScaling::Default);
        };
        let mut inner = Fields::new(prefix, object);
        theta = inner.positive("rope_theta", Some(theta));
        let original = self
            .get("original_max_position_embeddings")
            .and_then(Value::as_u64)
            .map_or(max_position_embeddings, |n| n as usize);
        let scaling = inner.rope_scaling(max_position_embeddings, original);
        self.problems.append(&mut inner.problems);
        (theta, scaling)
    }

    fn rope_scaling(&mut self, max: usize, original: usize) -> RopeScaling {
        let kind = self.get("rope_type").or(self.get("type"));
        let kind = kind.map_or("default", |value| value.as_str().unwrap_or("?"));
        if self
            .get("partial_rotary_factor")
            .is_some_and(|v| v.as_f64() != Some(1.0))
        {
            self.problem("partial_rotary_factor", "is set: only 1.0 is supported");
        }
        match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: self.positive("factor", None),
            },
            "dynamic" => RopeScaling::Dynamic {
                factor: self.positive("factor", None),
            },
            "yarn" => self.yarn(max, original),
            "llama3" => RopeScaling::Llama3 {
                factor: self.positive("factor", None),
                low_freq_factor: self.positive("low_freq_factor", None),
                high_freq_factor: self.positive("high_freq_factor", None),
                original_max_position_embeddings: self.original(original),
            },
            other => {
                self.problem(
                    "rope_type",
                    format!("is {other:?}: expected default, linear, dynamic, yarn or llama3"),
                );
                RopeScaling::Default
            }
        }
    }

    fn original(&mut self, default: usize) -> usize {
        self.count("original_max_position_embeddings", Some(default), 1 << 40)
    }

    fn yarn(&mut self, max: usize, original: usize) -> RopeScaling {
        let original = self.original(original);
        let factor = self.positive("factor", Some(max as f64 / original as f64));
        let warm = |scale: f64, mscale: f64| match scale {
            s if s <= 1.0 => 1.0,
            s => 0.1 * mscale * s.ln() + 1.0,
        };
        let number = |f: &Self, key: &str| f.get(key).and_then(Value::as_f64).filter(|x| *x != 0.0);
        let inferred = match (number(self, "mscale"), number(self, "mscale_all_dim")) {
            (Some(one), Some(all)) => warm(factor, one) / warm(factor, all),
            _ => warm(factor, 1.0),
        };
        RopeScaling::Yarn {
            factor,
            attention_factor: self.positive("attention_factor", Some(inferred)),
            beta_fast: self.positive("beta_fast", Some(32.0)),
            beta_slow: self.positive("beta_slow", Some(1.0)),
            truncate: self.flag("truncate", true),
            original_max_position_embeddings: original,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
               "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
               "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5})
    }

    fn problems(change: impl FnOnce(&mut Value)) -> String {
        let mut json = good();
        change(&mut json);
        LlamaConfig::from_json(&json).unwrap_err().join("; ")
    }

    #[test]
    fn defaults_follow_transformers() {
        let config = LlamaConfig::from_json(&good()).unwrap();
        assert_eq!(config.head_dim, 16);
        assert_eq!(config.rope_theta, 10_000.0);
        assert_eq!(config.rope_scaling, RopeScaling::Default);
        let weights: u64 = 128 * 64 * 2 + 64 + 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 160 + 128);
        assert_eq!(config.num_params(), weights);
    }

    #[test]
    fn both_rope_spellings_mean_the_same() {
        let (mut old, mut new) = (good(), good());
        old["rope_theta"] = json!(5e5);
        old["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
        new["rope_parameters"] = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5});
        let read = |json| LlamaConfig::from_json(json).unwrap();
        assert_eq!(read(&old), read(&new));
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let text = problems(|json| {
            json["num_attention_heads"] = json!(0);
            json["hidden_size"] = json!(-64);
            json["vocab_size"] = json!("many");
            json["rope_scaling"] = json!({"rope_type": "spiral"});
            json["architectures"] = json!(["GPT2LMHeadModel"]);
        });
        for part in [
            "num_attention_heads is 0",
            "hidden_size is -64",
            "vocab_size is \"many\"",
            "rope_scaling.rope_type is \"spiral\"",
            "GPT2LMHeadModel",
        ] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn heads_must_divide() {
        assert!(problems(|json| json["num_key_value_heads"] = json!(3)).contains("multiple"));
        assert!(
            problems(|json| json["num_attention_heads"] = json!(6)).contains("hidden_size (64)")
        );
        assert!(problems(|json| json["head_dim"] = json!(7)).contains("odd"));
        assert!(problems(|json| json["hidden_size"] = json!(1u64 << 60)).contains("from 1 to"));
    }
}
