//! `trainer chat`

mod command;
mod conversation;
mod shelf;

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use adapters::{AdaptedBackend, AdaptedLinear, AdaptedLlama, TrainBackend, Weighted};
use anyhow::Result;
use model::generate::{FinishReason, Generation, Generator, Sampling};

use self::command::{Command, HELP, Typed};
use self::conversation::{Asked, Conversation};
use self::shelf::{Adapter, Shelf};
use super::generate::{Answer, read_sampling};
use super::weighted::{combination, read_weight};
use super::{Adapted, open_adapter};
use crate::cli::ChatArgs;
use crate::device::{Device, Job};
use crate::failure::{Advised, Failure};
use crate::lines::{Line, Lines};
use crate::output::{self, Output};
use crate::signals;

/// Answers line after line.
pub fn run(args: ChatArgs, device: &str, output: &Output) -> Result<ExitCode> {
    if output.json {
        return Err(Advised::usage(
            "a chat has no JSON form",
            "leave --json out; `trainer generate --chat --json` answers one prompt",
        )
        .into());
    }
    let sampling = read_sampling(&args.sampling, output)?;
    let device = Device::find(device)?;
    let base = Adapted::open_base(&args.base, &device, output)?;
    let mut shelf = Shelf::default();
    for text in &args.adapter {
        let (name, weight) = read_weight(text)?;
        shelf.add(name, weight, open_adapter(name, output)?);
    }
    let used: Vec<_> = shelf.first().into_iter().collect();
    let mut adapted = base.with(weighted(&used), combination(&args.combine))?;
    adapted.task = args.sampling.task_id;
    adapted.task()?;
    adapted.choose_template(args.chat_template.as_deref())?;
    let max_new_tokens = args.max_new_tokens as usize;
    let conversation = Conversation::new(&adapted.base, args.system.as_deref(), max_new_tokens)?;
    signals::no_farewell();
    device.run(ChatJob {
        name: args.base.model,
        adapted,
        chat_template: args.chat_template,
        shelf,
        used,
        conversation,
        max_new_tokens,
        sampling,
        output: *output,
    })
}

struct ChatJob {
    name: String,
    /// The model's folder, and those of the adapters in use.
    adapted: Adapted,
    chat_template: Option<String>,
    shelf: Shelf,
    /// The adapters in use.
    used: Vec<Adapter>,
    conversation: Conversation,
    max_new_tokens: usize,
    sampling: Sampling,
    output: Output,
}

/// How a conversation with some adapters ends.
enum Next {
    Leave(ExitCode),
    /// Goes on with these adapters, or with none.
    Use(Vec<Adapter>),
}

fn weighted(used: &[Adapter]) -> Vec<Weighted> {
    let each = used.iter().map(|adapter| adapter.weighted.clone());
    each.collect()
}

impl Job for ChatJob {
    type Output = ExitCode;

    fn run<B: TrainBackend>(mut self, device: B::Device) -> Result<ExitCode> {
        // Tensors are shared by those who hold them: a copy with an adapter costs the adapter alone.
        let base = self.adapted.load_base::<B::InnerBackend>(&device)?;
        let mut model = self.adapted.adapt(base.clone(), &device)?;
        let mut lines = Lines::open()?;
        if lines.are_typed() {
            let name = &self.name;
            let text = format!("chatting with {name}; /help lists what can be done");
            self.output.note(text);
        }
        loop {
            match self.converse(&model, &device, &mut lines)? {
                Next::Leave(code) => return Ok(code),
                Next::Use(adapters) => match self.change(&base, adapters, &device) {
                    Ok(changed) => model = changed,
                    Err(error) => self.complain(error),
                },
            }
        }
    }
}

impl ChatJob {
    /// Answers and obeys until the end, or other adapters are wanted.
    fn converse<B: AdaptedBackend>(
        &mut self,
        model: &AdaptedLlama<B>,
        device: &B::Device,
        lines: &mut Lines,
    ) -> Result<Next> {
        let mut generator = Generator::new(model, device).of_task(self.adapted.task()?);
        loop {
            let line = match lines.next()? {
                Line::Text(line) => line,
                Line::End => return Ok(Next::Leave(ExitCode::SUCCESS)),
                Line::Interrupted => {
                    return Ok(Next::Leave(ExitCode::from(signals::INTERRUPTED)));
                }
            };
            match command::read(&line) {
                Typed::Nothing => {}
                Typed::Wrong(text) => output::log(text),
                Typed::Text(text) => {
                    let mut shown = self.answer(text, &mut generator)?;
                    if lines.are_typed() && shown.is_continue() {
                        shown = self.output.part("\n")?;
                    }
                    if shown.is_break() {
                        return Ok(Next::Leave(ExitCode::SUCCESS));
                    }
                }
                Typed::Command(Command::Exit) => return Ok(Next::Leave(ExitCode::SUCCESS)),
                Typed::Command(Command::Help) => output::log(HELP),
                Typed::Command(Command::Reset) => {
                    self.conversation.reset();
                    self.output.note("the conversation is forgotten");
                }
                Typed::Command(Command::Save(file)) => self.save(Path::new(file)),
                Typed::Command(Command::Adapter(None)) => {
                    output::log(self.shelf.list(&self.used));
                }
                Typed::Command(Command::Adapter(Some("off"))) => return Ok(Next::Use(Vec::new())),
                Typed::Command(Command::Adapter(Some(text))) => match self.choose(text) {
                    Ok(adapters) => return Ok(Next::Use(adapters)),
                    Err(error) => self.complain(error),
                },
            }
        }
    }

    /// The adapter of that name, which may have spaces in it, or all that are named, with weights.
    fn choose(&mut self, text: &str) -> Result<Vec<Adapter>> {
        if let Some(one) = self.find(text)? {
            return Ok(vec![one]);
        }
        let mut all = Vec::new();
        for word in text.split_whitespace() {
            let found = match self.find(word)? {
                Some(named) => Some(named),
                None => {
                    let (name, weight) = read_weight(word)?;
                    self.find(name)?.map(|adapter| adapter.weighing(weight))
                }
            };
            all.push(found.ok_or_else(|| {
                Advised::failed(
                    format!("there is no adapter {word}"),
                    "give the folder of one; /adapter lists those that are known",
                )
            })?);
        }
        Ok(all)
    }

    /// The adapter of that name, or the one in a folder of that name.
    fn find(&mut self, name: &str) -> Result<Option<Adapter>> {
        if let Some(known) = self.shelf.find(name)? {
            return Ok(Some(known));
        }
        if !Path::new(name).is_dir() {
            return Ok(None);
        }
        let folder = open_adapter(name, &self.output)?;
        Ok(Some(self.shelf.add(name, 1.0, folder)))
    }

    /// Answers a line; the chat ends when nobody reads the answers any more.
    fn answer<B: AdaptedBackend>(
        &mut self,
        text: &str,
        generator: &mut Generator<'_, B, AdaptedLinear<B>>,
    ) -> Result<ControlFlow<()>> {
        let Some(asked) = self.conversation.ask(text)? else {
            let context = self.conversation.context();
            output::log(format_args!(
                "this is too long: the model reads at most {context} tokens; nothing was said"
            ));
            return Ok(ControlFlow::Continue(()));
        };
        if asked.newly_left_out > 0 {
            self.output.note(format_args!(
                "(the oldest {} turns are left out: the model reads at most {} tokens)",
                asked.newly_left_out,
                self.conversation.context(),
            ));
        }
        let limit = self.max_new_tokens.min(asked.room);
        let stop = &self.adapted.base.generation.eos_token_ids;
        let mut answer = Answer::new(Some(&self.conversation.tokenizer), self.output);
        let mut shown = ControlFlow::Continue(());
        let mut is_stopped = false;
        let generation = signals::interruptible(|interrupter| {
            let mut show = |id| {
                is_stopped = interrupter.should_stop();
                if is_stopped {
                    return ControlFlow::Break(());
                }
                shown = answer.push(id);
                shown
            };
            generator.generate(&asked.ids, limit, stop, self.sampling, &mut show)
        })?;
        let text = answer.finish()?;
        if is_stopped && text.is_empty() {
            self.conversation.take_back(&asked);
            let note = "(stopped before the answer began: the question is taken back)";
            self.output.note(note);
            return Ok(shown);
        }
        self.conversation.answer(text);
        if is_stopped {
            self.output.note("(stopped: the answer ends here)");
        }
        self.sampling.seed = self.sampling.seed.wrapping_add(1); // another turn, other numbers
        self.tell(&asked, &generation);
        Ok(shown)
    }

    /// What there is to say about an answer.
    fn tell(&self, asked: &Asked, generation: &Generation) {
        self.output.detail(format_args!(
            "{} tokens, {:.1} tokens/s; read {} of {} tokens of the conversation",
            generation.token_ids.len(),
            generation.tokens_per_second(),
            generation.read_tokens,
            asked.ids.len(),
        ));
        if generation.finish_reason == FinishReason::Length {
            let (limit, context) = (self.max_new_tokens, self.conversation.context());
            self.output.note(match limit <= asked.room {
                true => format!("(cut off after --max-new-tokens {limit})"),
                false => format!("(cut off: the model reads and writes at most {context} tokens)"),
            });
        }
    }

    /// The model with other adapters, or none, which reads by their chat template.
    fn change<B: AdaptedBackend>(
        &mut self,
        base: &AdaptedLlama<B>,
        adapters: Vec<Adapter>,
        device: &B::Device,
    ) -> Result<AdaptedLlama<B>> {
        let before = std::mem::replace(&mut self.adapted.adapters, weighted(&adapters));
        let changed = self
            .adapted
            .task()
            .and_then(|_| self.adapted.choose_template(self.chat_template.as_deref()))
            .and_then(|()| self.adapted.adapt(base.clone(), device))
            .and_then(|model| Ok((model, self.conversation.set_template(&self.adapted.base)?)));
        match changed {
            Ok((model, ())) => {
                self.used = adapters;
                self.output.note(self.now_used());
                Ok(model)
            }
            Err(error) => {
                self.adapted.adapters = before;
                self.adapted
                    .choose_template(self.chat_template.as_deref())?;
                Err(error)
            }
        }
    }

    fn now_used(&self) -> String {
        let labels: Vec<_> = self.used.iter().map(Adapter::label).collect();
        let used = match labels.is_empty() {
            true => "using the model alone".into(),
            false => format!("using {}", labels.join(" and ")),
        };
        match self.conversation.is_empty() {
            true => used,
            false => format!("{used}; the conversation goes on"),
        }
    }

    fn save(&self, file: &Path) {
        if self.conversation.is_empty() {
            output::log("nothing has been said that could be saved");
            return;
        }
        match self.conversation.save(file) {
            Ok(()) => self.output.note(format_args!(
                "the conversation is now the last row of {}",
                file.display()
            )),
            Err(error) => self.complain(error),
        }
    }

    /// Says what went wrong; the chat goes on.
    fn complain(&self, error: anyhow::Error) {
        Failure::from(error).report(&self.output);
    }
}
