//! `trainer generate`

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use adapters::TrainBackend;
use anyhow::Result;
use model::chat::{ChatTemplate, Message};
use model::folder::ModelFolder;
use model::generate::{FinishReason, Generation, Sampling, generate};
use model::tokenizer::Tokenizer;
use serde_json::json;

use super::{load_model, open_adapted};
use crate::cli::GenerateArgs;
use crate::device::{Device, Job};
use crate::encoder::named_template;
use crate::failure::Advised;
use crate::output::Output;

/// Completes a prompt.
pub fn run(args: GenerateArgs, device: &str, output: &Output) -> Result<ExitCode> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    if let Err(error) = sampling.validate() {
        return Err(Advised::usage(error.to_string(), "see `trainer generate --help`").into());
    }
    let device = Device::find(device)?;
    let (base, adapter) = open_adapted(&args.model, args.adapter.as_deref(), &device, output)?;
    let tokenizer = base.tokenizer()?;
    let prompt = prompt_ids(&args, &base, tokenizer.as_ref())?;
    if prompt.is_empty() {
        return Err(model::Error::EmptyPrompt.into()); // before the weights are loaded
    }
    let generation = device.run(GenerateJob {
        base,
        adapter,
        prompt,
        max_new_tokens: args.max_new_tokens as usize,
        sampling,
    })?;
    let text = match &tokenizer {
        Some(tokenizer) => tokenizer.decode(generation.text_ids(), true)?,
        None => String::new(),
    };
    let json = json!({
        "text": text,
        "token_ids": generation.token_ids,
        "finish_reason": match generation.finish_reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        },
        "tokens_per_second": generation.tokens_per_second(),
    });
    let shown = match &tokenizer {
        Some(_) => text,
        None => generation
            .token_ids
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(","),
    };
    output.result(&json, &shown)?;
    Ok(ExitCode::SUCCESS)
}

fn prompt_ids(
    args: &GenerateArgs,
    base: &ModelFolder,
    tokenizer: Option<&Tokenizer>,
) -> Result<Vec<u32>> {
    if let Some(ids) = &args.prompt_ids {
        let vocab_size = base.config.vocab_size;
        let id = |id: &i64| {
            let valid = u32::try_from(*id)
                .ok()
                .filter(|id| (*id as usize) < vocab_size);
            valid.ok_or(model::Error::TokenOutOfRange {
                id: *id,
                vocab_size,
            })
        };
        return Ok(ids.iter().map(id).collect::<model::Result<_>>()?);
    }
    let prompt = args.prompt.as_deref().unwrap_or_default();
    let Some(tokenizer) = tokenizer else {
        return Err(Advised::failed(
            format!(
                "{} has no tokenizer.json, which --prompt needs",
                base.path.display()
            ),
            "give token ids by --prompt-ids, or add the model's tokenizer.json",
        )
        .into());
    };
    if !args.chat {
        return Ok(tokenizer.encode(prompt, true)?.ids);
    }
    chat_ids(base, tokenizer, args.chat_template.as_deref(), prompt)
}

/// A prompt as a user's turn in a chat template: the one that is named, the model's own, or, as in
/// training, the plain alpaca form of a model that has none.
pub fn chat_ids(
    base: &ModelFolder,
    tokenizer: &Tokenizer,
    template: Option<&str>,
    prompt: &str,
) -> Result<Vec<u32>> {
    let own = match template {
        Some(name) => Some(named_template(name)?),
        None => base.chat_template()?,
    };
    let special = tokenizer.special_tokens();
    let turn = [Message::new("user", prompt)];
    Ok(match own {
        Some(template) => {
            let text = template.render(&turn, true, special)?;
            tokenizer.encode(&text, false)?.ids
        }
        None => {
            let alpaca = ChatTemplate::builtin("alpaca").expect("it is built in");
            tokenizer
                .encode(&alpaca.render(&turn, true, special)?, true)?
                .ids
        }
    })
}

struct GenerateJob {
    base: ModelFolder,
    adapter: Option<PathBuf>,
    prompt: Vec<u32>,
    max_new_tokens: usize,
    sampling: Sampling,
}

impl Job for GenerateJob {
    type Output = Generation;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Generation> {
        let model = load_model::<B::InnerBackend>(&self.base, self.adapter.as_deref(), &device)?;
        let stop = &self.base.generation.eos_token_ids;
        let go_on = &mut |_| ControlFlow::Continue(());
        let generation = generate(
            &model,
            &self.prompt,
            self.max_new_tokens,
            stop,
            self.sampling,
            &device,
            go_on,
        )?;
        Ok(generation)
    }
}
