//! `trainer chat`

use std::ops::ControlFlow;
use std::process::ExitCode;

use adapters::TrainBackend;
use anyhow::Result;
use model::chat::{ChatTemplate, Message};
use model::folder::ModelFolder;
use model::generate::{FinishReason, Generation, Generator, Sampling};
use model::linear::Projection;
use model::ops::ModelBackend;
use model::tokenizer::Tokenizer;

use super::Adapted;
use super::generate::{Answer, read_sampling};
use crate::cli::ChatArgs;
use crate::device::{Device, Job};
use crate::failure::Advised;
use crate::lines::{Line, Lines};
use crate::output::{self, Output};
use crate::signals;

const HELP: &str = "\
/reset   forget the conversation (also /clear)
/exit    leave (also /quit and Ctrl-D)
/help    this list
Ctrl-C stops an answer; between answers it ends the program.";

/// Answers line after line.
pub fn run(args: ChatArgs, device: &str, output: &Output) -> Result<ExitCode> {
    if output.json {
        return Err(Advised::usage(
            "a chat has no JSON form",
            "leave --json out; `trainer generate --chat --json` answers one prompt",
        )
        .into());
    }
    let sampling = read_sampling(&args.sampling)?;
    let device = Device::find(device)?;
    let mut adapted = Adapted::open(&args.model, &device, output)?;
    adapted.choose_template(args.chat_template.as_deref())?;
    let conversation = Conversation::new(&args, &adapted.base)?;
    signals::end_at_once();
    device.run(ChatJob {
        name: args.model.model,
        adapted,
        conversation,
        max_new_tokens: args.max_new_tokens as usize,
        sampling,
        output: *output,
    })
}

/// What has been said, and how a model reads it.
struct Conversation {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: Option<Message>,
    turns: Vec<Message>,
}

impl Conversation {
    /// An empty conversation, which the template is known to take.
    fn new(args: &ChatArgs, base: &ModelFolder) -> Result<Self> {
        let folder = base.path.display();
        let Some(tokenizer) = base.tokenizer()? else {
            return Err(Advised::failed(
                format!("{folder} has no tokenizer.json, which a chat needs"),
                "add the model's tokenizer.json",
            )
            .into());
        };
        let Some(template) = base.chat_template()? else {
            return Err(Advised::failed(
                format!("{folder} has no chat template"),
                format!(
                    "give the one that it was trained with by --chat-template: a jinja file, or {}",
                    ChatTemplate::BUILTIN.join(", ")
                ),
            )
            .into());
        };
        let system = args.system.as_ref();
        let new = Self {
            tokenizer,
            template,
            system: system.map(|text| Message::new("system", text)),
            turns: Vec::new(),
        };
        new.prompt(&[Message::new("user", "Hi")])?; // before the weights are loaded
        Ok(new)
    }

    /// The tokens of everything, up to where the next answer begins.
    fn prompt(&self, turns: &[Message]) -> Result<Vec<u32>> {
        let all: Vec<_> = self.system.iter().chain(turns).cloned().collect();
        let special = self.tokenizer.special_tokens();
        let text = self.template.render(&all, true, special)?;
        Ok(self.tokenizer.encode(&text, false)?.ids)
    }
}

struct ChatJob {
    name: String,
    adapted: Adapted,
    conversation: Conversation,
    max_new_tokens: usize,
    sampling: Sampling,
    output: Output,
}

impl Job for ChatJob {
    type Output = ExitCode;

    fn run<B: TrainBackend>(mut self, device: B::Device) -> Result<ExitCode> {
        let model = self.adapted.load::<B::InnerBackend>(&device)?;
        let mut generator = Generator::new(&model, &device);
        let mut lines = Lines::open()?;
        if lines.are_typed() {
            let name = &self.name;
            let text = format!("chatting with {name}; /help lists what can be done");
            self.output.note(text);
        }
        loop {
            let text = match lines.next()? {
                Line::Text(text) => text,
                Line::End => return Ok(ExitCode::SUCCESS),
                Line::Interrupted => return Ok(ExitCode::from(signals::INTERRUPTED)),
            };
            match text.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(ExitCode::SUCCESS),
                "/reset" | "/clear" => {
                    self.conversation.turns.clear();
                    self.output.note("the conversation is forgotten");
                }
                "/help" => output::log(HELP),
                text if is_command(text) => {
                    output::log(format_args!(
                        "there is no {text}; /help lists what there is"
                    ));
                }
                text => {
                    let mut shown = self.answer(text, &mut generator)?;
                    if lines.are_typed() && shown.is_continue() {
                        shown = self.output.part("\n")?;
                    }
                    if shown.is_break() {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
            }
        }
    }
}

impl ChatJob {
    /// Answers a line; the chat ends when nobody reads the answers any more.
    fn answer<B: ModelBackend, P: Projection<B>>(
        &mut self,
        text: &str,
        generator: &mut Generator<'_, B, P>,
    ) -> Result<ControlFlow<()>> {
        let conversation = &mut self.conversation;
        conversation.turns.push(Message::new("user", text));
        let prompt = conversation.prompt(&conversation.turns)?;
        let mut answer = Answer::new(Some(&conversation.tokenizer), self.output);
        let (limit, stop) = (
            self.max_new_tokens,
            &self.adapted.base.generation.eos_token_ids,
        );
        let mut shown = ControlFlow::Continue(());
        let generation = signals::interruptible(|interrupter| {
            let mut show = |id| {
                shown = answer.push(id);
                match interrupter.should_stop() {
                    true => ControlFlow::Break(()),
                    false => shown,
                }
            };
            generator.generate(&prompt, limit, stop, self.sampling, &mut show)
        })?;
        let text = answer.finish()?;
        conversation.turns.push(Message::new("assistant", text));
        self.sampling.seed = self.sampling.seed.wrapping_add(1); // another turn, other numbers
        self.tell(&prompt, &generation);
        Ok(shown)
    }

    /// What there is to say about an answer.
    fn tell(&self, prompt: &[u32], generation: &Generation) {
        let tokens = prompt.len() + generation.token_ids.len();
        self.output.detail(format_args!(
            "{} tokens, {:.1} tokens/s; read {} of {} tokens of the conversation",
            generation.token_ids.len(),
            generation.tokens_per_second(),
            generation.read_tokens,
            prompt.len(),
        ));
        if generation.finish_reason == FinishReason::Length {
            let limit = self.max_new_tokens;
            self.output
                .note(format_args!("(cut off after --max-new-tokens {limit})"));
        }
        let context = self.adapted.base.config.max_position_embeddings;
        if tokens > context {
            self.output.note(format_args!(
                "warning: the conversation has {tokens} tokens, more than the {context} that the \
                 model was made for; /reset begins a new one"
            ));
        }
    }
}

/// One word after a slash; a text may begin with one, too.
fn is_command(text: &str) -> bool {
    text.starts_with('/') && !text.contains(char::is_whitespace)
}
