//! From what a row says to token ids and labels.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::LazyLock;

use model::chat::{ChatTemplate, Conversation, Message, TrainOn, trained_tokens};
use model::tokenizer::Tokenizer;
use serde_json::Value;

use super::read::Place;
use super::rows::Content;
use crate::error::{Error, Result};

/// The label of a token that is not trained.
pub const IGNORED: i32 = -100;

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The token ids.
    pub input_ids: Vec<u32>,
    /// For each token its id where it is trained, else [`IGNORED`]. Not shifted: the loss compares
    /// the label at each place with the prediction made one place before it.
    pub labels: Vec<i32>,
    /// The task that it is of, for adapters that tell tasks apart; else 0.
    pub task: u32,
}

impl Sample {
    /// How many tokens count in the loss. The first one never does: nothing predicts it.
    pub fn trained_tokens(&self) -> usize {
        let labels = self.labels.iter().skip(1);
        labels.filter(|&&label| label != IGNORED).count()
    }
}

/// What turns a row into a sample: the model's tokenizer and chat template.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// The tokenizer; rows that come as tokens need none.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template. Without one, a conversation of one question and one answer gets the
    /// built-in alpaca form, and others are refused.
    pub template: Option<ChatTemplate>,
    /// The strings that end an assistant turn: the eos tokens.
    pub end_markers: Vec<String>,
    /// How many token ids the model knows; none is let through that is not below it.
    pub vocab_size: usize,
    /// Which part of a conversation is trained.
    pub train_on: TrainOn,
    /// The model folder; for messages.
    pub model: PathBuf,
}

/// A sample, and what there is to report about it.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) sample: Sample,
    /// Whether the end marker of what is trained last is missing; false where that is not known.
    pub(super) lacks_end_marker: bool,
    /// Whether it is text, and not tokens.
    pub(super) is_text: bool,
    /// Whether a conversation is in the alpaca form for lack of a template.
    pub(super) is_alpaca: bool,
    /// Whether the template does not show a tool of the row or a call of one.
    pub(super) hides_tools: bool,
    /// Whether trained tokens were cut off.
    pub(super) loses_trained: bool,
}

impl Encoded {
    /// Cuts off the end.
    pub(super) fn cut(&mut self, max_length: usize) {
        let mut lost = self.sample.labels.drain(max_length..);
        self.loses_trained = lost.any(|label| label != IGNORED);
        drop(lost);
        self.sample.input_ids.truncate(max_length);
        self.lacks_end_marker |= self.is_text && self.loses_trained;
    }
}

impl Encoder {
    /// Turns what a row says into a sample.
    pub(super) fn encode(&self, place: &Place, content: Content) -> Result<Encoded> {
        match content {
            Content::Conversation {
                turns,
                prompt_turns,
                tools,
            } => self.conversation(place, &turns, prompt_turns, &tools),
            Content::Text(text) => self.text(place, &text),
            Content::Tokens { input_ids, labels } => {
                self.tokens(place, &input_ids, labels.as_deref())
            }
        }
    }

    fn conversation(
        &self,
        place: &Place,
        turns: &[Message],
        prompt_turns: usize,
        tools: &[Value],
    ) -> Result<Encoded> {
        let tokenizer = self.tokenizer(place)?;
        let is_answer = |turn: &Message| turn.role == "assistant";
        let answers = &turns[prompt_turns..];
        if self.train_on != TrainOn::All && !answers.iter().any(is_answer) {
            let roles: BTreeSet<&str> = answers.iter().map(|turn| turn.role.as_str()).collect();
            return Err(Error::NoAssistantTurn {
                place: place.clone(),
                roles: roles.into_iter().map(str::to_owned).collect(),
            });
        }
        let template = self.template(place, turns, tools)?;
        let rendered = template.render_trained(
            Conversation { turns, tools },
            prompt_turns,
            self.train_on,
            tokenizer.special_tokens(),
            &self.end_markers,
        );
        let rendered = rendered.map_err(failed(place))?;
        // A chat template writes the special tokens itself, the alpaca form only the eos.
        let is_plain = self.template.is_none();
        let encoding = tokenizer
            .encode(&rendered.text, is_plain)
            .map_err(failed(place))?;
        let mut trained = trained_tokens(&encoding, &rendered.trained);
        let mut ids = encoding.ids;
        let eos_was_added = encoding.spans.last().is_some_and(|span| span.is_empty());
        if is_plain && eos_was_added && ends_twice_in(&ids, tokenizer.eos_token_id()) {
            ids.pop();
            trained.pop();
        }
        let mut labels = self.check_ids(place, "the text", &ids)?;
        let masked = labels
            .iter_mut()
            .zip(trained)
            .filter(|(_, trained)| !trained);
        masked.for_each(|(label, _)| *label = IGNORED);
        Ok(Encoded {
            is_alpaca: is_plain,
            hides_tools: !tool_names(turns, tools).all(|name| rendered.text.contains(name)),
            ..text_sample(ids, labels, rendered.ends_with_marker)
        })
    }

    fn text(&self, place: &Place, text: &str) -> Result<Encoded> {
        let tokenizer = self.tokenizer(place)?;
        let ids = tokenizer.encode_text(text).map_err(failed(place))?;
        let labels = self.check_ids(place, "the text", &ids)?;
        let last = ids.last().and_then(|&id| tokenizer.id_to_token(id));
        let ends_with_marker = last.is_some_and(|last| self.end_markers.contains(&last));
        Ok(text_sample(ids, labels, ends_with_marker))
    }

    fn tokens(&self, place: &Place, input_ids: &[i64], labels: Option<&[i64]>) -> Result<Encoded> {
        let labels = labels.unwrap_or(input_ids);
        if labels.len() != input_ids.len() {
            return Err(Error::LabelsLength {
                place: place.clone(),
                input_ids: input_ids.len(),
                labels: labels.len(),
            });
        }
        let id =
            |&id: &i64| u32::try_from(id).map_err(|_| self.out_of_range(place, "input_ids", id));
        let input_ids = input_ids.iter().map(id).collect::<Result<Vec<_>>>()?;
        self.check_ids(place, "input_ids", &input_ids)?;
        let label = |&label: &i64| match label == i64::from(IGNORED) {
            true => Ok(IGNORED),
            false => self.check_id(place, "labels", label),
        };
        let labels = labels.iter().map(label).collect::<Result<Vec<_>>>()?;
        Ok(Encoded {
            sample: Sample {
                input_ids,
                labels,
                task: 0,
            },
            lacks_end_marker: false,
            is_text: false,
            is_alpaca: false,
            hides_tools: false,
            loses_trained: false,
        })
    }

    fn tokenizer(&self, place: &Place) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| Error::NoTokenizer {
            place: place.clone(),
            tokenizer: self.model.join("tokenizer.json"),
        })
    }

    /// The template for a conversation: the model's, else the alpaca form where that can show it.
    fn template(&self, place: &Place, turns: &[Message], tools: &[Value]) -> Result<&ChatTemplate> {
        if let Some(template) = &self.template {
            return Ok(template);
        }
        let mut parts: Vec<_> = turns.iter().map(|turn| turn.role.as_str()).collect();
        if !tools.is_empty() {
            parts.insert(0, "tools");
        }
        match parts[..] {
            ["user", "assistant"] | ["system", "user", "assistant"] => Ok(&ALPACA),
            _ => Err(Error::NoTemplate {
                place: place.clone(),
                model: self.model.clone(),
                roles: parts.into_iter().map(str::to_owned).collect(),
            }),
        }
    }

    /// The ids as labels, if all are in the vocabulary.
    fn check_ids(&self, place: &Place, key: &'static str, ids: &[u32]) -> Result<Vec<i32>> {
        let check = |&id: &u32| self.check_id(place, key, i64::from(id));
        ids.iter().map(check).collect()
    }

    fn check_id(&self, place: &Place, key: &'static str, id: i64) -> Result<i32> {
        let index = usize::try_from(id)
            .ok()
            .filter(|&index| index < self.vocab_size);
        let label = index.and_then(|index| i32::try_from(index).ok());
        label.ok_or_else(|| self.out_of_range(place, key, id))
    }

    fn out_of_range(&self, place: &Place, key: &'static str, id: i64) -> Error {
        Error::TokenOutOfRange {
            place: place.clone(),
            key,
            id,
            vocab_size: self.vocab_size,
        }
    }
}

static ALPACA: LazyLock<ChatTemplate> =
    LazyLock::new(|| ChatTemplate::builtin("alpaca").expect("alpaca is built in"));

/// What an [`Error::Encode`] needs to know beside the error.
fn failed(place: &Place) -> impl FnOnce(model::Error) -> Error {
    |source| Error::Encode {
        place: place.clone(),
        source,
    }
}

/// The names of the tools of a conversation, and of those that are called in it.
fn tool_names<'a>(turns: &'a [Message], tools: &'a [Value]) -> impl Iterator<Item = &'a str> {
    let calls = turns
        .iter()
        .filter_map(|turn| turn.extra.get("tool_calls")?.as_array());
    let named = |tool: &'a Value| tool.get("function").unwrap_or(tool).get("name")?.as_str();
    calls.flatten().chain(tools).filter_map(named)
}

fn ends_twice_in(ids: &[u32], eos: Option<u32>) -> bool {
    matches!(ids, [.., before, last] if Some(*before) == eos && Some(*last) == eos)
}

fn text_sample(input_ids: Vec<u32>, labels: Vec<i32>, ends_with_marker: bool) -> Encoded {
    Encoded {
        sample: Sample {
            input_ids,
            labels,
            task: 0,
        },
        lacks_end_marker: !ends_with_marker,
        is_text: true,
        is_alpaca: false,
        hides_tools: false,
        loses_trained: false,
    }
}
