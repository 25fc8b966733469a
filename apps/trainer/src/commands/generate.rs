//! `trainer generate`

use std::ops::ControlFlow;
use std::process::ExitCode;

use adapters::TrainBackend;
use anyhow::Result;
use model::chat::{ChatTemplate, Message};
use model::folder::ModelFolder;
use model::generate::{FinishReason, Generation, Generator, Sampling};
use model::tokenizer::{DecodeStream, Tokenizer};
use serde_json::json;

use super::Adapted;
use crate::cli::{GenerateArgs, SamplingArgs};
use crate::device::{Device, Job};
use crate::failure::Advised;
use crate::output::Output;
use crate::signals;

/// Completes a prompt.
pub fn run(args: GenerateArgs, device: &str, output: &Output) -> Result<ExitCode> {
    let sampling = read_sampling(&args.sampling, output)?;
    let device = Device::find(device)?;
    let mut adapted = Adapted::open(&args.model, &device, output)?;
    adapted.task = args.sampling.task_id;
    let task = adapted.task()?;
    if args.chat {
        adapted.choose_template(args.chat_template.as_deref())?;
    }
    let tokenizer = adapted.base.tokenizer()?;
    let prompt = prompt_ids(&args, &adapted.base, tokenizer.as_ref())?;
    if prompt.is_empty() {
        return Err(model::Error::EmptyPrompt.into()); // before the weights are loaded
    }
    if !output.json {
        signals::no_farewell(); // the text so far is on stdout
    }
    let context = adapted.base.config.max_context();
    let read = prompt.len();
    let mut answer = Answer::new(tokenizer.as_ref(), *output);
    let generation = device.run(GenerateJob {
        adapted,
        prompt,
        max_new_tokens: args.max_new_tokens as usize,
        sampling,
        task,
        answer: &mut answer,
    })?;
    let text = answer.finish()?;
    let tokens = read + generation.token_ids.len();
    if tokens > context {
        output.note(format_args!(
            "warning: prompt and text have {tokens} tokens, and the model was made for {context}: \
             what is beyond may be nonsense"
        ));
    }
    if !output.json {
        if generation.finish_reason == FinishReason::Length {
            let limit = args.max_new_tokens;
            output.note(format_args!("(cut off after --max-new-tokens {limit})"));
        }
        output.detail(format_args!(
            "{} tokens, {:.1} tokens/s",
            generation.token_ids.len(),
            generation.tokens_per_second()
        ));
        return Ok(ExitCode::SUCCESS); // the text has been printed
    }
    let json = json!({
        "text": text,
        "token_ids": generation.token_ids,
        "finish_reason": match generation.finish_reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        },
        "tokens_per_second": generation.tokens_per_second(),
    });
    output.result(&json, "")?;
    Ok(ExitCode::SUCCESS)
}

/// The rule of choice that a command line asks for.
pub fn read_sampling(args: &SamplingArgs, output: &Output) -> Result<Sampling> {
    const DEFAULT_SEED: u64 = 42;
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed.unwrap_or(DEFAULT_SEED),
    };
    if let Err(error) = sampling.validate() {
        return Err(Advised::usage(
            error.to_string(),
            "see `trainer generate --help`, which `trainer chat` shares",
        )
        .into());
    }
    let flags = [
        ("--top-p", args.top_p.is_some()),
        ("--top-k", args.top_k.is_some()),
    ];
    let given = flags.iter().find(|(_, given)| *given);
    match given.filter(|_| args.temperature == 0.0) {
        Some((flag, _)) => Err(Advised::usage(
            format!("{flag} needs --temperature above 0: at 0 the likeliest token is taken"),
            format!("add --temperature 0.7, for example, or leave {flag} out"),
        )
        .into()),
        None => {
            if args.seed.is_some() && args.temperature == 0.0 {
                output
                    .note("--seed decides nothing: without --temperature there is nothing random");
            }
            Ok(sampling)
        }
    }
}

/// A text that is printed while its tokens come, unless it is to be one JSON object; the ids
/// themselves where there is no tokenizer.
pub struct Answer<'a> {
    stream: Option<DecodeStream<'a>>,
    text: String,
    output: Output,
    /// What printing or the tokenizer failed with, which ended the text.
    error: Option<anyhow::Error>,
}

impl<'a> Answer<'a> {
    /// An empty text.
    pub fn new(tokenizer: Option<&'a Tokenizer>, output: Output) -> Self {
        Self {
            stream: tokenizer.map(|tokenizer| tokenizer.decode_stream(true)),
            text: String::new(),
            output,
            error: None,
        }
    }

    /// Adds a token; ends the text when it cannot be shown.
    pub fn push(&mut self, id: u32) -> ControlFlow<()> {
        let piece = match &mut self.stream {
            Some(stream) => stream.push(id).map_err(anyhow::Error::from),
            None if self.text.is_empty() => Ok(id.to_string()),
            None => Ok(format!(",{id}")),
        };
        match piece.and_then(|piece| self.show(&piece)) {
            Ok(flow) => flow,
            Err(error) => {
                self.error = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn show(&mut self, piece: &str) -> Result<ControlFlow<()>> {
        self.text.push_str(piece);
        match self.output.json || piece.is_empty() {
            true => Ok(ControlFlow::Continue(())),
            false => self.output.part(piece),
        }
    }

    /// Prints what is left and the end of the line, and gives the whole text.
    pub fn finish(mut self) -> Result<String> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let has_tokenizer = self.stream.is_some();
        if let Some(stream) = self.stream.take() {
            let rest = stream.finish()?;
            let _ = self.show(&rest)?;
        }
        if !self.output.json {
            let _ = self.output.part("\n")?;
        }
        Ok(match has_tokenizer {
            true => self.text,
            false => String::new(), // ids are no text
        })
    }
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
    match args.chat {
        true => chat_ids(base, tokenizer, prompt),
        false => Ok(tokenizer.encode(prompt, true)?.ids),
    }
}

/// A prompt as a user's turn in the chat template in use, or, as in training, in the plain alpaca
/// form of a model that has none.
pub fn chat_ids(base: &ModelFolder, tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>> {
    let special = tokenizer.special_tokens();
    let turn = [Message::new("user", prompt)];
    Ok(match base.chat_template()? {
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

struct GenerateJob<'a, 't> {
    adapted: Adapted,
    prompt: Vec<u32>,
    max_new_tokens: usize,
    sampling: Sampling,
    task: usize,
    answer: &'a mut Answer<'t>,
}

impl Job for GenerateJob<'_, '_> {
    type Output = Generation;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Generation> {
        let model = self.adapted.load::<B::InnerBackend>(&device)?;
        let stop = &self.adapted.base.generation.eos_token_ids;
        let mut show = |id| self.answer.push(id);
        let mut generator = Generator::new(&model, &device).of_task(self.task);
        let generation = generator.generate(
            &self.prompt,
            self.max_new_tokens,
            stop,
            self.sampling,
            &mut show,
        )?;
        Ok(generation)
    }
}
