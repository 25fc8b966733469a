//! Conversations as a model sees them: its chat template, and which part of the text is trained.
//!
//! One piece of code renders for training and for generation, so the two cannot differ.

mod jinja;
mod trained;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::write_file;
use crate::error::{Error, Result};
use crate::tokenizer::{SpecialTokens, read_json};
use jinja::Compiled;
pub use trained::trained_tokens;
use trained::{TurnSearch, ends_with_any, generated};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, …
    pub role: String,
    /// What is said: a string, a list of parts (`[{"type": "text", "text": …}]`), or null when the
    /// turn only calls tools.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub content: Value,
    /// The other keys (`name`, `tool_calls`, …), which are passed on to the template.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn of plain text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: Value::String(content.into()),
            extra: Map::new(),
        }
    }

    /// The text of the content, the text parts joined; `None` when there is none.
    pub fn text(&self) -> Option<String> {
        match &self.content {
            Value::String(text) => Some(text.clone()),
            Value::Array(parts) => {
                let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
                texts.map(str::to_owned).reduce(|all, text| all + &text)
            }
            _ => None,
        }
    }

    fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }

    /// Whether the turn has something under one of its other keys.
    fn has(&self, key: &str) -> bool {
        match self.extra.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            Some(_) => true,
        }
    }

    /// The same turn with other text: the first text part has it, the others are empty.
    fn with_text(&self, text: &str) -> Self {
        let mut message = self.clone();
        let Value::Array(parts) = &mut message.content else {
            message.content = Value::from(text);
            return message;
        };
        let mut texts = std::iter::once(text).chain(std::iter::repeat(""));
        for part in parts.iter_mut().filter_map(|part| part.get_mut("text")) {
            *part = Value::from(texts.next().unwrap_or_default());
        }
        message
    }

    /// A turn of the same role that has this text and nothing else.
    fn without_extra(&self, text: &str) -> Self {
        Self {
            extra: Map::new(),
            ..self.with_text(text)
        }
    }

    /// The turn as templates see it: without the keys that are null, and with reasoning under the
    /// names that templates read, as transformers prepares it.
    fn for_template(&self) -> minijinja::Value {
        let mut message = Map::new();
        message.insert("role".to_owned(), Value::from(self.role.as_str()));
        message.insert("content".to_owned(), self.content.clone());
        message.extend(self.extra.clone());
        message.retain(|_, value| !value.is_null());
        if let Some(reasoning) = REASONING_KEYS
            .iter()
            .find_map(|key| message.get(*key))
            .cloned()
        {
            if !message.contains_key("thinking") {
                message.shift_insert(0, "thinking".to_owned(), reasoning.clone());
            }
            message.insert("reasoning_content".to_owned(), reasoning);
        }
        minijinja::Value::from(minijinja::value::Serde(&message))
    }
}

/// The keys under which a turn's reasoning is passed, the one that counts first.
const REASONING_KEYS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The keys beside the content under which a turn says something.
const SPOKEN_KEYS: [&str; 5] = [
    "reasoning_content",
    "thinking",
    "reasoning",
    "tool_calls",
    "function_call",
];

/// Which part of a conversation is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// Every assistant turn: its content and its end marker.
    #[default]
    Assistant,
    /// The last assistant turn only.
    Last,
    /// The whole text.
    All,
}

/// A conversation as text, and what is trained of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The byte ranges of the text that are trained, in order.
    pub trained: Vec<Range<usize>>,
    /// Whether what is trained last ends in an end marker: without one a model never learns to stop.
    pub ends_with_marker: bool,
}

/// A conversation to be rendered.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    /// The turns.
    pub turns: &'a [Message],
    /// The definitions of the tools that the assistant may call, as JSON schemas; often none.
    pub tools: &'a [Value],
}

impl<'a, T: AsRef<[Message]> + ?Sized> From<&'a T> for Conversation<'a> {
    fn from(turns: &'a T) -> Self {
        let turns = turns.as_ref();
        Self { turns, tools: &[] }
    }
}

/// A chat template: the jinja source that turns a conversation into text.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// The file it comes from, or the name of a built-in template; for messages.
    pub name: String,
    /// The jinja source, as it was read.
    pub source: String,
    compiled: Compiled,
    /// The template for conversations with tools, where that is another one.
    for_tools: Option<Box<Self>>,
}

impl PartialEq for ChatTemplate {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.source, &self.for_tools)
            == (&other.name, &other.source, &other.for_tools)
    }
}

impl Eq for ChatTemplate {}

impl ChatTemplate {
    /// The name of its file in a model or adapter folder.
    pub const FILE: &str = "chat_template.jinja";
    /// The name of the file of a template for conversations with tools, if that is another one.
    pub const TOOLS_FILE: &str = "additional_chat_templates/tool_use.jinja";
    /// The names [`ChatTemplate::builtin`] knows.
    pub const BUILTIN: [&str; 4] = ["chatml", "llama2", "llama3", "alpaca"];

    /// A template from its source.
    ///
    /// # Errors
    /// `Template` when the source does not parse.
    pub fn new(name: impl Into<String>, source: impl Into<String>) -> Result<Self> {
        let (name, source) = (name.into(), source.into());
        match Compiled::new(&source) {
            Ok(compiled) => Ok(Self {
                name,
                source,
                compiled,
                for_tools: None,
            }),
            Err(source) => Err(Error::Template { name, source }),
        }
    }

    /// The template of a model folder: `chat_template.jinja`, else the `chat_template` of
    /// `tokenizer_config.json`, else the one of `chat_template.json`.
    ///
    /// Of a list of named templates the one named `default` is taken; as in transformers, the one
    /// named `tool_use`, or the file [`ChatTemplate::TOOLS_FILE`], is for conversations with tools.
    ///
    /// # Errors
    /// `Io` and `Json` when a file cannot be read, `Template` when the template does not parse.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(Self::FILE);
        if path.is_file() {
            let tools = Some(folder.join(Self::TOOLS_FILE)).filter(|tools| tools.is_file());
            let for_tools = tools.map(|tools| Self::from_file(&tools).map(Box::new));
            return Ok(Some(Self {
                for_tools: for_tools.transpose()?,
                ..Self::from_file(&path)?
            }));
        }
        for file in ["tokenizer_config.json", "chat_template.json"] {
            let path = folder.join(file);
            let config = read_json(&path)?;
            let entry = config
                .as_ref()
                .and_then(|config| config.get("chat_template"));
            if let Some(entry) = entry.filter(|entry| !entry.is_null()) {
                return Self::from_entry(&path, entry).map(Some);
            }
        }
        Ok(None)
    }

    /// A template from a `chat_template` entry: a string, or a list with one named `default`.
    fn from_entry(path: &Path, entry: &Value) -> Result<Self> {
        let named = |name: &str| {
            let mut all = entry.as_array().into_iter().flatten();
            let found = all.find(|one| one.get("name").and_then(Value::as_str) == Some(name));
            found.and_then(|found| found.get("template")?.as_str())
        };
        let Some(source) = entry.as_str().or_else(|| named("default")) else {
            return Err(bad_entry(path));
        };
        let name = path.display().to_string();
        let for_tools = named("tool_use").map(|source| Self::new(&*name, source).map(Box::new));
        Ok(Self {
            for_tools: for_tools.transpose()?,
            ..Self::new(name, source)?
        })
    }

    /// A template from a jinja file.
    ///
    /// # Errors
    /// `Io` when the file cannot be read, `Template` when it does not parse.
    pub fn from_file(path: &Path) -> Result<Self> {
        let source = std::fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read",
            path: path.to_path_buf(),
            source,
        })?;
        Self::new(path.display().to_string(), source)
    }

    /// Writes the template into a folder, where [`ChatTemplate::from_folder`] finds it first.
    ///
    /// # Errors
    /// `Io`; each file is complete or absent.
    pub fn save(&self, folder: &Path) -> Result<()> {
        if let Some(for_tools) = &self.for_tools {
            let path = folder.join(Self::TOOLS_FILE);
            let parent = path.parent().unwrap_or(folder);
            std::fs::create_dir_all(parent).map_err(|source| Error::Io {
                action: "create",
                path: parent.to_path_buf(),
                source,
            })?;
            write_file(&path, for_tools.source.as_bytes())?;
        }
        write_file(&folder.join(Self::FILE), self.source.as_bytes())
    }

    /// A built-in template: `chatml`, `llama2`, `llama3` or `alpaca`.
    ///
    /// In `alpaca` a system turn takes the place of the introduction.
    pub fn builtin(name: &str) -> Option<Self> {
        let source = match name {
            "chatml" => include_str!("chat/templates/chatml.jinja"),
            "llama2" => include_str!("chat/templates/llama2.jinja"),
            "llama3" => include_str!("chat/templates/llama3.jinja"),
            "alpaca" => include_str!("chat/templates/alpaca.jinja"),
            _ => return None,
        };
        Some(Self::new(name, source).expect("the built-in templates parse"))
    }

    /// Renders a conversation, as transformers' `apply_chat_template` does.
    ///
    /// `strftime_now` tells the local time.
    ///
    /// # Errors
    /// `Template` when the template refuses the conversation.
    pub fn render<'a>(
        &self,
        conversation: impl Into<Conversation<'a>>,
        add_generation_prompt: bool,
        special_tokens: &SpecialTokens,
    ) -> Result<String> {
        let renderer = Renderer::new(self, conversation.into(), special_tokens);
        renderer.render(renderer.turns.iter().cloned(), add_generation_prompt)
    }

    /// Renders a conversation and finds what is trained of it; the first `prompt_turns` turns are a
    /// prompt and never trained as answers.
    ///
    /// What `{% generation %}` blocks print is trained, if the template has such blocks. Otherwise
    /// an assistant turn is found by rendering the conversation again with a marker in the place
    /// of the turn's content: what stands before and after the marker stands before and after the
    /// content in the real text. Trained is the content as the text shows it and, when one follows
    /// directly or after white space, its end marker; never the white space after it. A turn that
    /// calls tools, or has reasoning that is shown, is trained with these: what stands where a turn
    /// that only has a content shows it.
    ///
    /// `end_markers` are the strings that end a turn, the eos tokens.
    ///
    /// # Errors
    /// `TurnNotRendered` when a turn cannot be found for certain, e.g. because the template shows
    /// other things around another content; `Template` when the template refuses the conversation.
    pub fn render_trained(
        &self,
        conversation: Conversation<'_>,
        prompt_turns: usize,
        train_on: TrainOn,
        special_tokens: &SpecialTokens,
        end_markers: &[String],
    ) -> Result<Rendered> {
        let markers = end_markers.iter().filter(|marker| !marker.is_empty());
        let markers = markers.map(String::as_str).collect::<Vec<_>>();
        let renderer = Renderer::new(self, conversation, special_tokens);
        let text = renderer.render(renderer.turns.iter().cloned(), false)?;
        let answers = conversation.turns.iter().enumerate().skip(prompt_turns);
        let answers = answers.filter(|(_, turn)| turn.is_assistant());
        let mut answers: Vec<usize> = answers.map(|(index, _)| index).collect();
        if train_on == TrainOn::Last {
            answers.drain(..answers.len().saturating_sub(1));
        }
        let trained = match (train_on, answers.first()) {
            (TrainOn::All, _) => std::iter::once(0..text.len()).collect(),
            (_, None) => Vec::new(),
            (_, Some(&first)) if renderer.chat.compiled.has_generation => {
                generated(&renderer, &text, first, prompt_turns, train_on)?
            }
            _ => {
                let search = TurnSearch {
                    renderer: &renderer,
                    text: &text,
                    messages: conversation.turns,
                    markers: &markers,
                };
                let found = answers.into_iter().map(|turn| search.find(turn));
                found.collect::<Result<_>>()?
            }
        };
        let last = trained.last().map(|last| match train_on {
            TrainOn::All => text.trim_end(),
            _ => &text[last.clone()],
        });
        Ok(Rendered {
            ends_with_marker: last.is_some_and(|last| ends_with_any(last, &markers)),
            trained,
            text,
        })
    }
}

/// A conversation that is about to be rendered, once or several times.
struct Renderer<'a> {
    chat: &'a ChatTemplate,
    /// The turns as the template sees them.
    turns: Vec<minijinja::Value>,
    /// What else it sees.
    context: BTreeMap<&'a str, minijinja::Value>,
}

impl<'a> Renderer<'a> {
    fn new(
        chat: &'a ChatTemplate,
        conversation: Conversation<'a>,
        special_tokens: &'a SpecialTokens,
    ) -> Self {
        use minijinja::Value;
        let tokens = special_tokens.iter();
        let mut context: BTreeMap<&str, Value> = tokens
            .map(|(key, token)| (key.as_str(), Value::from(token.as_str())))
            .collect();
        let tools = match conversation.tools {
            [] => Value::from(()),
            tools => Value::from(minijinja::value::Serde(tools)),
        };
        context.insert("tools", tools);
        context.insert("documents", Value::from(()));
        let for_tools = chat.for_tools.as_deref();
        Self {
            chat: for_tools
                .filter(|_| !conversation.tools.is_empty())
                .unwrap_or(chat),
            turns: conversation
                .turns
                .iter()
                .map(Message::for_template)
                .collect(),
            context,
        }
    }

    /// The text of some turns.
    fn render(
        &self,
        turns: impl Iterator<Item = minijinja::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_with(jinja::PLAIN, turns, add_generation_prompt)
    }

    fn render_with(
        &self,
        template: &str,
        turns: impl Iterator<Item = minijinja::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let mut context = self.context.clone();
        context.insert("messages", turns.collect());
        context.insert(
            "add_generation_prompt",
            minijinja::Value::from(add_generation_prompt),
        );
        let rendered = self.chat.compiled.render(template, context);
        rendered.map_err(|source| Error::Template {
            name: self.chat.name.clone(),
            source,
        })
    }
}

fn bad_entry(path: &Path) -> Error {
    let reason = "chat_template is neither a string nor a list with a template named \"default\"";
    Error::Json {
        path: path.to_path_buf(),
        source: serde::de::Error::custom(reason),
    }
}

#[cfg(test)]
mod tests;
