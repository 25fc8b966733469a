//! Multitask prompt tuning: prompt tuning whose embeddings are multiplied, element by element, by a
//! matrix of low rank that each task has of its own.
//!
//! Source: <https://arxiv.org/abs/2303.02861>, `peft/tuners/multitask_prompt_tuning/{config,model}.py`.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use model::checkpoint::Checkpoint;
use model::config::LlamaConfig;
use model::virtual_tokens::{Place, Tasks, VirtualTokens};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::prompt::{PromptInit, PromptSettings};
use super::virtual_tokens::{EMBEDDINGS, NUM_VIRTUAL_TOKENS, fresh_embedding};
use super::{Part, PromptMethod, Settings, Values, rank_problem};
use crate::attach::AdaptedLlama;
use crate::error::{Error, Result};
use crate::peft::MODEL_FILE;

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
    /// What the embeddings start with that the tasks share, or more than these.
    pub prompt_tuning_init: MptInit,
    /// The text of which they are the embeddings at first, cut off or repeated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init_text: Option<String>,
    /// The file of an adapter of this method that it starts from, or its folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tuning_init_state_dict_path: Option<PathBuf>,
    /// The task of that adapter that is meant.
    pub prompt_tuning_init_task: usize,
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
            prompt_tuning_init: MptInit::Random,
            prompt_tuning_init_text: None,
            prompt_tuning_init_state_dict_path: None,
            prompt_tuning_init_task: 0,
            text_ids: Vec::new(),
        }
    }
}

/// What multitask prompt tuning starts with; in PEFT's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MptInit {
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
    /// Another adapter, and as the one task the mean of its tasks.
    #[serde(alias = "average_source_tasks")]
    AverageSourceTasks,
    /// Another adapter with one of its tasks.
    #[serde(alias = "exact_source_task")]
    ExactSourceTask,
    /// What the tasks of another adapter share.
    #[serde(alias = "only_source_shared")]
    OnlySourceShared,
}

impl MptInit {
    /// Whether it is another adapter, or a part of one.
    fn has_source(self) -> bool {
        let task = [Self::AverageSourceTasks, Self::ExactSourceTask];
        task.contains(&self) || self == Self::OnlySourceShared
    }

    /// What the shared embeddings start with if they are none of another adapter; which of them
    /// those were is of no use to who has the one that came out of it.
    fn alone(self) -> PromptInit {
        match self {
            Self::Text => PromptInit::Text,
            Self::SampleVocab => PromptInit::SampleVocab,
            _ => PromptInit::Random,
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
    const FREE: &'static [&'static str] = &[
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
    ];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        let peft: PeftMpt = serde_json::from_str(json)?;
        let text = peft.prompt_tuning_init_text;
        Ok(Self {
            num_virtual_tokens: peft.num_virtual_tokens,
            num_tasks: peft.num_tasks,
            num_ranks: peft.num_ranks,
            // what an adapter began with is over; PEFT would read the file of another one again
            prompt_tuning_init: match (peft.prompt_tuning_init.as_str(), &text) {
                ("TEXT", Some(_)) => MptInit::Text,
                ("SAMPLE_VOCAB", _) => MptInit::SampleVocab,
                _ => MptInit::Random,
            },
            prompt_tuning_init_text: text.filter(|_| peft.prompt_tuning_init == "TEXT"),
            ..Self::default()
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
        let (init, has_path) = (
            self.prompt_tuning_init,
            self.prompt_tuning_init_state_dict_path.is_some(),
        );
        if init.has_source() != has_path {
            let text = "goes with prompt_tuning_init = \"AVERAGE_SOURCE_TASKS\", \
                        \"EXACT_SOURCE_TASK\" or \"ONLY_SOURCE_SHARED\": set both, or neither";
            problems.push(("prompt_tuning_init_state_dict_path", text.into()));
        }
        if init.has_source() && init != MptInit::OnlySourceShared && self.num_tasks != 1 {
            let text = "must be 1 where it starts with one task of another adapter";
            problems.push(("num_tasks", text.into()));
        }
        problems
    }

    fn start(&self) -> Option<&'static str> {
        let has_source = self.prompt_tuning_init.has_source();
        has_source.then_some("prompt_tuning_init")
    }
}

impl MptSettings {
    /// What it has in common with prompt tuning.
    fn prompt(&self) -> PromptSettings {
        PromptSettings {
            num_virtual_tokens: self.num_virtual_tokens,
            prompt_tuning_init: self.prompt_tuning_init.alone(),
            prompt_tuning_init_text: self.prompt_tuning_init_text.clone(),
            text_ids: self.text_ids.clone(),
        }
    }

    /// The values of a tensor in the adapter that this one starts from.
    fn of_source(&self, path: &Path, part: &Part) -> Result<Vec<f32>> {
        let path = match path.is_dir() {
            true => path.join(MODEL_FILE),
            false => path.to_owned(),
        };
        let file = Checkpoint::open_file(&path)?;
        let found = file.shape(&part.key).unwrap_or(&[]).to_vec();
        let task = self.prompt_tuning_init_task;
        let is_shared = part.name == EMBEDDINGS;
        let averages = self.prompt_tuning_init == MptInit::AverageSourceTasks;
        let problem = if found.len() != part.shape.len()
            || found[usize::from(!is_shared)..] != part.shape[usize::from(!is_shared)..]
        {
            format!("{} is {found:?}, expected {:?}", part.key, part.shape)
        } else if !is_shared && !averages && task >= found[0] {
            format!("it has {} tasks and no task {task}", found[0])
        } else {
            let all = file.read(&part.key)?;
            let one: usize = part.shape.iter().product();
            return Ok(match (is_shared, averages) {
                (true, _) => all,
                (false, true) => mean(&all, one),
                (false, false) => all[task * one..(task + 1) * one].to_vec(),
            });
        };
        Err(Error::Tensors {
            path,
            problems: vec![problem],
        })
    }
}

/// The mean of blocks of so many numbers.
fn mean(all: &[f32], len: usize) -> Vec<f32> {
    let blocks = all.len() / len;
    let sum = |at: usize| all.iter().skip(at).step_by(len).sum::<f32>();
    (0..len).map(|at| sum(at) / blocks as f32).collect()
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

    fn fresh<B: Backend>(
        &self,
        part: &Part,
        model: &AdaptedLlama<B>,
        seed: u64,
    ) -> Result<Vec<f32>> {
        let is_shared = part.name == EMBEDDINGS;
        let takes_all = self.prompt_tuning_init != MptInit::OnlySourceShared;
        let source = self.prompt_tuning_init_state_dict_path.as_ref();
        match source.filter(|_| is_shared || takes_all) {
            Some(path) => self.of_source(path, part),
            None if is_shared => Ok(self.prompt().fresh_embeddings(part, model, seed)),
            None => Ok(fresh_embedding(part, 0.02, seed)),
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
        let has_text = self.prompt_tuning_init == MptInit::Text;
        let text = self.prompt_tuning_init_text.as_deref();
        text.filter(|_| has_text)
            .map(|text| (text, &mut self.text_ids))
    }

    fn source(&mut self) -> Option<&mut PathBuf> {
        self.prompt_tuning_init_state_dict_path.as_mut()
    }
}
