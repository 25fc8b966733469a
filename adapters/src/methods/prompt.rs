//! Prompt tuning: embeddings of virtual tokens in front of every row.
//!
//! Source: <https://arxiv.org/abs/2104.08691>, `peft/tuners/prompt_tuning/{config,model}.py`.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use model::config::LlamaConfig;
use model::virtual_tokens::{Place, VirtualTokens};
use model::weight::param_id;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::virtual_tokens::{EMBEDDINGS, NUM_VIRTUAL_TOKENS, fresh_embedding, of_model};
use super::{Part, PromptMethod, Settings, Values, rank_problem};
use crate::attach::AdaptedLlama;
use crate::error::Result;

/// The settings of prompt tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptSettings {
    /// Virtual tokens in front of every row.
    pub num_virtual_tokens: usize,
    /// What their embeddings start with.
    pub prompt_tuning_init: PromptInit,
    /// The text of which they are the embeddings at first, cut off or repeated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init_text: Option<String>,
    /// The tokens of that text, once the tokenizer has said them.
    #[serde(skip)]
    pub text_ids: Vec<u32>,
}

/// What the embeddings of virtual tokens start with; in PEFT's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PromptInit {
    /// Normal numbers.
    #[default]
    #[serde(alias = "random")]
    Random,
    /// The embeddings of random words.
    #[serde(alias = "sample_vocab")]
    SampleVocab,
    /// The embeddings of a text.
    #[serde(alias = "text")]
    Text,
}

impl Default for PromptSettings {
    fn default() -> Self {
        Self {
            num_virtual_tokens: NUM_VIRTUAL_TOKENS,
            prompt_tuning_init: PromptInit::Random,
            prompt_tuning_init_text: None,
            text_ids: Vec::new(),
        }
    }
}

/// The keys of `adapter_config.json` that are read.
#[derive(Deserialize)]
pub(super) struct PeftPrompt {
    num_virtual_tokens: usize,
    #[serde(default)]
    prompt_tuning_init: PromptInit,
    #[serde(default)]
    prompt_tuning_init_text: Option<String>,
}

impl Settings for PromptSettings {
    const NAME: &'static str = "prompt";
    const TITLE: &'static str = "prompt tuning";
    const PEFT_TYPE: &'static str = "PROMPT_TUNING";
    const FREE: &'static [&'static str] = &["prompt_tuning_init", "prompt_tuning_init_text"];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        let peft: PeftPrompt = serde_json::from_str(json)?;
        Ok(Self {
            num_virtual_tokens: peft.num_virtual_tokens,
            prompt_tuning_init: peft.prompt_tuning_init,
            prompt_tuning_init_text: peft.prompt_tuning_init_text,
            text_ids: Vec::new(),
        })
    }

    fn to_peft(&self) -> Map<String, Value> {
        let settings = json!({
            "num_virtual_tokens": self.num_virtual_tokens,
            "prompt_tuning_init": self.prompt_tuning_init,
            "prompt_tuning_init_text": self.prompt_tuning_init_text,
            "tokenizer_kwargs": null,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        problems.extend(rank_problem(
            "num_virtual_tokens",
            [self.num_virtual_tokens],
        ));
        let text = self.prompt_tuning_init_text.as_deref();
        let has_text = text.is_some_and(|text| !text.is_empty());
        let problem = match (self.prompt_tuning_init == PromptInit::Text, has_text) {
            (true, false) => {
                Some("is missing: prompt_tuning_init = \"TEXT\" starts with its words")
            }
            (false, true) => Some("means something only with prompt_tuning_init = \"TEXT\""),
            _ => None,
        };
        problems.extend(problem.map(|text| ("prompt_tuning_init_text", text.to_owned())));
        problems
    }
}

impl PromptSettings {
    /// The embeddings that virtual tokens start with.
    pub(super) fn fresh_embeddings<B: Backend>(
        &self,
        part: &Part,
        model: &AdaptedLlama<B>,
        seed: u64,
    ) -> Vec<f32> {
        let words: Vec<u32> = match self.prompt_tuning_init {
            PromptInit::Random => return fresh_embedding(part, 1.0, seed),
            PromptInit::Text => self.text_ids.clone(),
            PromptInit::SampleVocab => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed ^ param_id(&part.name).val());
                let vocabulary = 0..model.config.vocab_size as u32;
                let words = 0..self.num_virtual_tokens;
                words
                    .map(|_| rng.random_range(vocabulary.clone()))
                    .collect()
            }
        };
        let words = words.iter().cycle().take(self.num_virtual_tokens);
        let words: Vec<i64> = words.map(|id| i64::from(*id)).collect();
        assert_eq!(words.len(), self.num_virtual_tokens, "the text has tokens");
        let words = TensorData::new(words, [self.num_virtual_tokens]);
        let words = Tensor::<B, 1, Int>::from_data(words, &model.norm.weight.val().device());
        let data = model.embed_tokens.select(words).into_data();
        data.into_vec().expect("converted to f32")
    }

    /// What PEFT adds of the model that the adapter is on.
    pub(super) fn peft_of_model(&self, model: &LlamaConfig, base: &str) -> Map<String, Value> {
        let mut keys = of_model(model, model.hidden_size, model.num_attention_heads);
        let has_text = self.prompt_tuning_init == PromptInit::Text;
        let tokenizer = has_text.then_some(base); // which PEFT demands, and does not open
        keys.insert("tokenizer_name_or_path".into(), json!(tokenizer));
        keys
    }
}

impl PromptMethod for PromptSettings {
    fn parts(&self, model: &LlamaConfig) -> Vec<Part> {
        let shape = [self.num_virtual_tokens, model.hidden_size];
        vec![Part::of_model(EMBEDDINGS, &shape)]
    }

    fn fresh<B: Backend>(
        &self,
        part: &Part,
        model: &AdaptedLlama<B>,
        seed: u64,
    ) -> Result<Vec<f32>> {
        Ok(self.fresh_embeddings(part, model, seed))
    }

    fn positions(&self) -> usize {
        self.num_virtual_tokens
    }

    fn virtual_tokens<B: Backend>(&self, mut values: Values<'_, B>) -> VirtualTokens<B> {
        VirtualTokens {
            embedding: values.param(EMBEDDINGS),
            encoder: None,
            tasks: None,
            place: Place::Embeddings,
        }
    }

    fn peft_of_model(&self, model: &LlamaConfig, base: &str) -> Map<String, Value> {
        self.peft_of_model(model, base)
    }

    fn text(&mut self) -> Option<(&str, &mut Vec<u32>)> {
        let has_text = self.prompt_tuning_init == PromptInit::Text;
        let text = self.prompt_tuning_init_text.as_deref();
        text.filter(|_| has_text)
            .map(|text| (text, &mut self.text_ids))
    }
}
