//! `trainer chat`

mod command;
mod conversation;
mod shelf;

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;

use adapters::{AdaptedBackend, AdaptedLinear, AdaptedLlama, TrainBackend};
use anyhow::Result;
use model::generate::{FinishReason, Generation, Generator, Sampling};

use self::command::{Command, HELP, Typed};
use self::conversation::{Asked, Conversation};
use self::shelf::{Adapter, Shelf};
use super::generate::{Answer, read_sampling};
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
    let mut adapted = Adapted::open(&args.base, None, &device, output)?;
    let mut shelf = Shelf::default();
    for name in &args.adapter {
        shelf.add(name, open_adapter(name, output)?);
    }
    let used = shelf.first();
    adapted.adapter = used.as_ref().map(|adapter| adapter.folder.clone());
    adapted.task = args.sampling.task_id;
    adapted.task()?;
    adapted.choose_template(args.chat_template.as_deref())?;
    let max_new_tokens = args.max_new_tokens as usize;
    let conversation = Conversation::new(&adapted.base, args.system.as_deref(), max_new_tokens)?;
    signals::end_at_once();
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
    /// The model's folder, and that of the adapter in use.
    adapted: Adapted,
    chat_template: Option<String>,
    shelf: Shelf,
    /// The adapter in use.
    used: Option<Adapter>,
    conversation: Conversation,
    max_new_tokens: usize,
    sampling: Sampling,
    output: Output,
}

/// How a conversation with one adapter ends.
enum Next {
    Leave(ExitCode),
    /// Goes on with this adapter, or with none.
    Use(Option<Adapter>),
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
                Next::Use(adapter) => match self.change(&base, adapter, &device) {
                    Ok(changed) => model = changed,
                    Err(error) => self.complain(error),
                },
            }
        }
    }
}

impl ChatJob {
    /// Answers and obeys until the end, or another adapter is wanted.
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
                    output::log(self.shelf.list(self.used.as_ref()));
                }
                Typed::Command(Command::Adapter(Some("off"))) => return Ok(Next::Use(None)),
                Typed::Command(Command::Adapter(Some(name))) => match self.find(name) {
                    Ok(adapter) => return Ok(Next::Use(Some(adapter))),
                    Err(error) => self.complain(error),
                },
            }
        }
    }

    /// The adapter of that name, or the one in a folder of that name.
    fn find(&mut self, name: &str) -> Result<Adapter> {
        if let Some(known) = self.shelf.find(name)? {
            return Ok(known);
        }
        if !Path::new(name).is_dir() {
            return Err(Advised::failed(
                format!("there is no adapter {name}"),
                "give the folder of one; /adapter lists those that are known",
            )
            .into());
        }
        let folder = open_adapter(name, &self.output)?;
        Ok(self.shelf.add(name, folder))
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

    /// The model with another adapter, or none, which reads by that one's chat template.
    fn change<B: AdaptedBackend>(
        &mut self,
        base: &AdaptedLlama<B>,
        adapter: Option<Adapter>,
        device: &B::Device,
    ) -> Result<AdaptedLlama<B>> {
        let before = self.adapted.adapter.take();
        self.adapted.adapter = adapter.as_ref().map(|adapter| adapter.folder.clone());
        let changed = self
            .adapted
            .task()
            .and_then(|_| self.adapted.choose_template(self.chat_template.as_deref()))
            .and_then(|()| self.adapted.adapt(base.clone(), device))
            .and_then(|model| Ok((model, self.conversation.set_template(&self.adapted.base)?)));
        match changed {
            Ok((model, ())) => {
                self.used = adapter;
                self.output.note(self.now_used());
                Ok(model)
            }
            Err(error) => {
                self.adapted.adapter = before;
                self.adapted
                    .choose_template(self.chat_template.as_deref())?;
                Err(error)
            }
        }
    }

    fn now_used(&self) -> String {
        let used = match &self.used {
            Some(adapter) => format!("using {}", adapter.name),
            None => "using the model alone".into(),
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
