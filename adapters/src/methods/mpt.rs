//! Multitask prompt tuning: prompt tuning whose embeddings are multiplied, element by element, by a
//! matrix of low rank that each task has of its own.
//!
//! Source: <https://arxiv.org/abs/2303.02861>, `peft/tuners/multitask_prompt_tuning/{config,model}.py`.

use burn::tensor::backend::Backend;
use model::config::LlamaConfig;
use model::virtual_tokens::{Place, Tasks, VirtualTokens};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::prompt::{PromptInit, PromptSettings};
use super::virtual_tokens::{EMBEDDINGS, NUM_VIRTUAL_TOKENS, fresh_embedding};
use super::{Part, PromptMethod, Settings, Values, rank_problem};
use crate::attach::AdaptedLlama;

const COLS: &str = "prefix_task_cols";
const ROWS: &str = "prefix_task_rows";

/// The settings of multitask prompt tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MptSettings {
    /// Virtual tokens in front of every row.
    pub num_virtual_tokens: usize,
    /// How many tasks there are; `task_id` of a row says which it is of.
    pub num_tasks: usize,
    /// Rank of what a task has of its own.
    pub num_ranks: usize,
    /// What the embeddings start with that the tasks share.
    pub prompt_tuning_init: PromptInit,
    /// The text of which they are the embeddings at first, cut off or repeated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init_text: Option<String>,
    /// The tokens of that text, once the tokenizer has said them.
    #[serde(skip)]
    pub text_ids: Vec<u32>,
}

impl Default for MptSettings {
    fn default() -> Self {
        Self {
            num_virtual_tokens: NUM_VIRTUAL_TOKENS,
            num_tasks: 1,
            num_ranks: 1,
            prompt_tuning_init: PromptInit::Random,
            prompt_tuning_init_text: None,
            text_ids: Vec::new(),
        }
    }
}

/// The keys of `adapter_config.json` that are read.
#[derive(Deserialize)]
struct PeftMpt {
    num_virtual_tokens: usize,
    #[serde(default = "one")]
    num_tasks: usize,
    #[serde(default = "one")]
    num_ranks: usize,
    #[serde(default)]
    prompt_tuning_init: String,
    #[serde(default)]
    prompt_tuning_init_text: Option<String>,
}

fn one() -> usize {
    1
}

impl Settings for MptSettings {
    const NAME: &'static str = "mpt";
    const TITLE: &'static str = "multitask prompt tuning";
    const PEFT_TYPE: &'static str = "MULTITASK_PROMPT_TUNING";
    const FREE: &'static [&'static str] = &["prompt_tuning_init", "prompt_tuning_init_text"];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        let peft: PeftMpt = serde_json::from_str(json)?;
        let text = peft.prompt_tuning_init_text;
        Ok(Self {
            num_virtual_tokens: peft.num_virtual_tokens,
            num_tasks: peft.num_tasks,
            num_ranks: peft.num_ranks,
            // what an adapter began with is over; PEFT would read the file of another one again
            prompt_tuning_init: match (peft.prompt_tuning_init.as_str(), &text) {
                ("TEXT", Some(_)) => PromptInit::Text,
                ("SAMPLE_VOCAB", _) => PromptInit::SampleVocab,
                _ => PromptInit::Random,
            },
            prompt_tuning_init_text: text.filter(|_| peft.prompt_tuning_init == "TEXT"),
            text_ids: Vec::new(),
        })
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut settings = self.prompt().to_peft();
        settings.insert("num_tasks".into(), json!(self.num_tasks));
        settings.insert("num_ranks".into(), json!(self.num_ranks));
        settings.insert("prompt_tuning_init_state_dict_path".into(), Value::Null);
        settings.insert("prompt_tuning_init_task".into(), json!(0));
        settings
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = self.prompt().problems();
        problems.extend(rank_problem("num_tasks", [self.num_tasks]));
        problems.extend(rank_problem("num_ranks", [self.num_ranks]));
        problems
    }
}

impl MptSettings {
    /// What it has in common with prompt tuning.
    fn prompt(&self) -> PromptSettings {
        PromptSettings {
            num_virtual_tokens: self.num_virtual_tokens,
            prompt_tuning_init: self.prompt_tuning_init,
            prompt_tuning_init_text: self.prompt_tuning_init_text.clone(),
            text_ids: self.text_ids.clone(),
        }
    }
}

impl PromptMethod for MptSettings {
    fn parts(&self, model: &LlamaConfig) -> Vec<Part> {
        let (p, d) = (self.num_virtual_tokens, model.hidden_size);
        vec![
            Part::of_model(EMBEDDINGS, &[p, d]),
            Part::of_model(COLS, &[self.num_tasks, p, self.num_ranks]),
            Part::of_model(ROWS, &[self.num_tasks, self.num_ranks, d]),
        ]
    }

    fn fresh<B: Backend>(&self, part: &Part, model: &AdaptedLlama<B>, seed: u64) -> Vec<f32> {
        match part.name == EMBEDDINGS {
            true => self.prompt().fresh_embeddings(part, model, seed),
            false => fresh_embedding(part, 0.02, seed),
        }
    }

    fn positions(&self) -> usize {
        self.num_virtual_tokens
    }

    fn virtual_tokens<B: Backend>(&self, mut values: Values<'_, B>) -> VirtualTokens<B> {
        VirtualTokens {
            embedding: values.param(EMBEDDINGS),
            encoder: None,
            tasks: Some(Tasks {
                prefix_task_cols: values.param(COLS),
                prefix_task_rows: values.param(ROWS),
            }),
            place: Place::Embeddings,
        }
    }

    fn peft_of_model(&self, model: &LlamaConfig, base: &str) -> Map<String, Value> {
        self.prompt().peft_of_model(model, base)
    }

    fn tasks(&self) -> Option<usize> {
        Some(self.num_tasks)
    }

    fn text(&mut self) -> Option<(&str, &mut Vec<u32>)> {
        let has_text = self.prompt_tuning_init == PromptInit::Text;
        let text = self.prompt_tuning_init_text.as_deref();
        text.filter(|_| has_text)
            .map(|text| (text, &mut self.text_ids))
    }
}
