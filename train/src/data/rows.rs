//! What a row says: the formats, and what is read of each.

use std::fmt;

use model::chat::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::read::{Row, type_name};
use crate::error::{Error, Result};

/// What a row looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Decided for each row by the columns it has.
    #[default]
    Auto,
    /// `{"messages": [{"role", "content"}, …]}`
    Messages,
    /// `{"conversations": [{"from", "value"}, …]}`
    Sharegpt,
    /// `{"instruction", "input"?, "output"}`
    Alpaca,
    /// `{"prompt", "completion"}`; both may be lists of messages.
    Completion,
    /// `{"question", "answer"}`
    Qa,
    /// `{"text"}`
    Text,
    /// `{"input_ids", "labels"?}`
    Tokens,
}

impl Format {
    /// The formats that [`Format::Auto`] chooses from; the first that fits is taken.
    pub(super) const CHOICE: [Self; 7] = [
        Self::Messages,
        Self::Sharegpt,
        Self::Alpaca,
        Self::Completion,
        Self::Qa,
        Self::Text,
        Self::Tokens,
    ];

    /// The name, as it stands in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Alpaca => "alpaca",
            Self::Completion => "completion",
            Self::Qa => "qa",
            Self::Text => "text",
            Self::Tokens => "tokens",
        }
    }

    /// The columns that a row must have.
    pub(super) fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Auto => &[],
            Self::Messages => &["messages"],
            Self::Sharegpt => &["conversations"],
            Self::Alpaca => &["instruction", "output"],
            Self::Completion => &["prompt", "completion"],
            Self::Qa => &["question", "answer"],
            Self::Text => &["text"],
            Self::Tokens => &["input_ids"],
        }
    }

    /// All formats with their columns, for messages.
    pub(crate) fn overview() -> String {
        let one = |format: Self| format!("{format} ({})", format.columns().join(", "));
        Self::CHOICE.map(one).join(", ")
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// All columns that are read, for files that can leave the others unread.
pub(super) const READ_COLUMNS: [&str; 17] = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "question",
    "answer",
    "text",
    "input_ids",
    "labels",
    "system",
    "tools",
    "chosen",
    "rejected",
    "task_id",
];

/// What a row says.
#[derive(Debug, PartialEq)]
pub(super) enum Content {
    /// Turns, of which the first `prompt_turns` are a prompt and never trained as answers, and the
    /// tools that may be called in them.
    Conversation {
        turns: Vec<Message>,
        prompt_turns: usize,
        tools: Vec<Value>,
    },
    /// Plain text.
    Text(String),
    /// Tokens, with the labels if there are any; not yet checked.
    Tokens {
        input_ids: Vec<i64>,
        labels: Option<Vec<i64>>,
    },
}

/// Reads what a row says.
pub(super) fn read_content(row: &Row, format: Format) -> Result<Content> {
    row.check_columns(format)?;
    match format {
        Format::Auto => read_content(row, row.detect()?),
        Format::Messages => row.conversation(row.turns("messages")?, 0),
        Format::Sharegpt => row.conversation(row.turns("conversations")?, 0),
        Format::Alpaca => {
            let mut user = row.string("instruction")?;
            if row.has("input") {
                let input = row.string("input")?;
                if !input.is_empty() {
                    user = user + "\n\n" + &input;
                }
            }
            row.question(user, row.string("output")?)
        }
        Format::Completion => {
            let mut turns = row.turns_or_text("prompt", "user")?;
            let prompt_turns = turns.len();
            turns.extend(row.turns_or_text("completion", "assistant")?);
            row.conversation(turns, prompt_turns)
        }
        Format::Qa => row.question(row.string("question")?, row.string("answer")?),
        Format::Text => Ok(Content::Text(row.string("text")?)),
        Format::Tokens => {
            let labels = row.has("labels").then(|| row.integers("labels"));
            Ok(Content::Tokens {
                input_ids: row.integers("input_ids")?,
                labels: labels.transpose()?,
            })
        }
    }
}

impl Row {
    /// The task that the row is of, one of so many; where there is but one, it need not say so.
    pub(super) fn task(&self, tasks: usize) -> Result<u32> {
        let task = match self.columns.get("task_id") {
            None | Some(Value::Null) if tasks == 1 => Some(0),
            Some(Value::Number(number)) => number.as_u64(),
            Some(Value::String(text)) => text.trim().parse().ok(), // a cell of a table
            _ => None,
        };
        let task = task.and_then(|task| u32::try_from(task).ok());
        let task = task.filter(|task| (*task as usize) < tasks);
        task.ok_or_else(|| Error::Task {
            place: self.place.clone(),
            tasks,
            found: self.columns.get("task_id").map(Value::to_string),
        })
    }

    /// Whether the row has something in a column; a table's rows have null where there is nothing.
    fn has(&self, column: &str) -> bool {
        self.columns
            .get(column)
            .is_some_and(|value| !value.is_null())
    }

    fn found(&self) -> Vec<String> {
        let named = |column: &String| match self.has(column) {
            true => column.clone(),
            false => format!("{column} (null)"),
        };
        self.columns.keys().map(named).collect()
    }

    fn detect(&self) -> Result<Format> {
        if self.is_preference() {
            return Err(self.unsupported("preference rows (chosen, rejected)"));
        }
        let fits = |format: &Format| format.columns().iter().all(|column| self.has(column));
        let format = Format::CHOICE.into_iter().find(fits);
        format.ok_or_else(|| Error::UnknownColumns {
            place: self.place.clone(),
            found: self.found(),
        })
    }

    fn is_preference(&self) -> bool {
        self.has("chosen") && self.has("rejected")
    }

    fn check_columns(&self, format: Format) -> Result<()> {
        match format.columns().iter().find(|column| !self.has(column)) {
            None => Ok(()),
            Some(_) if self.is_preference() => {
                Err(self.unsupported("preference rows (chosen, rejected)"))
            }
            Some(column) => Err(Error::MissingColumn {
                place: self.place.clone(),
                format,
                column,
                found: self.found(),
            }),
        }
    }

    fn unsupported(&self, what: &'static str) -> Error {
        Error::UnsupportedRow {
            place: self.place.clone(),
            what,
        }
    }

    fn wrong_type(
        &self,
        key: impl Into<String>,
        expected: &'static str,
        value: Option<&Value>,
    ) -> Error {
        Error::WrongType {
            place: self.place.clone(),
            key: key.into(),
            expected,
            found: type_name(value),
        }
    }

    fn string(&self, column: &str) -> Result<String> {
        match self.columns.get(column) {
            Some(Value::String(text)) => Ok(text.clone()),
            other => Err(self.wrong_type(column, "a string", other)),
        }
    }

    fn integers(&self, column: &str) -> Result<Vec<i64>> {
        let value = self.columns.get(column);
        let Some(Value::Array(items)) = value else {
            return Err(self.wrong_type(column, "a list of integers", value));
        };
        let integer = |(index, item): (usize, &Value)| {
            let wrong = || self.wrong_type(format!("{column}[{index}]"), "a token id", Some(item));
            item.as_i64().ok_or_else(wrong)
        };
        items.iter().enumerate().map(integer).collect()
    }

    /// One user and one assistant turn.
    fn question(&self, user: String, assistant: String) -> Result<Content> {
        let turns = vec![
            Message::new("user", user),
            Message::new("assistant", assistant),
        ];
        self.conversation(turns, 1)
    }

    /// A conversation, with the row's system prompt in front unless it has one of its own.
    fn conversation(&self, mut turns: Vec<Message>, mut prompt_turns: usize) -> Result<Content> {
        let tools = self.tools()?;
        if self.has("system") {
            let system = self.string("system")?;
            if !system.is_empty() && turns[0].role != "system" {
                turns.insert(0, Message::new("system", system));
                prompt_turns += 1;
            }
        }
        Ok(Content::Conversation {
            turns,
            prompt_turns,
            tools,
        })
    }

    /// The tools of the row: a list of definitions, or JSON text of one.
    fn tools(&self) -> Result<Vec<Value>> {
        let tools = match self.columns.get("tools") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
            Some(Value::String(text)) => {
                serde_json::from_str(text).map_err(|cause| Error::BadCell {
                    place: self.place.clone(),
                    column: "tools".to_owned(),
                    cause,
                })?
            }
            Some(tools) => tools.clone(),
        };
        match tools {
            Value::Null => Ok(Vec::new()),
            Value::Array(tools) if tools.iter().all(Value::is_object) => Ok(tools),
            other => Err(self.wrong_type("tools", "a list of tool definitions", Some(&other))),
        }
    }

    /// The turns of a column, or its text as the only turn.
    fn turns_or_text(&self, column: &str, role: &str) -> Result<Vec<Message>> {
        match self.columns.get(column) {
            Some(Value::String(text)) => Ok(vec![Message::new(role, text.as_str())]),
            Some(Value::Array(_)) => self.turns(column),
            other => Err(self.wrong_type(column, "a string or a list of turns", other)),
        }
    }

    /// The turns of a column; at least one.
    fn turns(&self, column: &str) -> Result<Vec<Message>> {
        match self.columns.get(column) {
            Some(Value::Array(turns)) if !turns.is_empty() => {
                let turn = |(index, turn)| self.turn(format!("{column}[{index}]"), turn);
                turns.iter().enumerate().map(turn).collect()
            }
            other => Err(self.wrong_type(column, "a list of turns", other)),
        }
    }

    fn turn(&self, key: String, turn: &Value) -> Result<Message> {
        let Value::Object(turn) = turn else {
            return Err(self.wrong_type(key, "an object", Some(turn)));
        };
        let is_sharegpt = match key.starts_with("conversations") {
            true => !turn.contains_key("role"),
            false => turn.contains_key("from") && !turn.contains_key("role"),
        };
        let (role_key, content_key) = match is_sharegpt {
            true => ("from", "value"),
            false => ("role", "content"),
        };
        let Some(Value::String(role)) = turn.get(role_key) else {
            return Err(self.wrong_type(
                format!("{key}.{role_key}"),
                "a string",
                turn.get(role_key),
            ));
        };
        let role = match is_sharegpt {
            true => sharegpt_role(role).ok_or_else(|| Error::UnknownRole {
                place: self.place.clone(),
                key: format!("{key}.from"),
                role: role.clone(),
            })?,
            false => role,
        };
        let mut message = Message::new(role, "");
        if !is_sharegpt {
            let others = turn
                .iter()
                .filter(|(key, _)| *key != "role" && *key != "content");
            message.extra = others
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
        }
        message.content = self.turn_content(
            format!("{key}.{content_key}"),
            turn.get(content_key),
            &message.extra,
        )?;
        Ok(message)
    }

    /// A turn's text. Parts are joined, because few templates of text models know parts; a turn
    /// that calls tools may have no text.
    fn turn_content(
        &self,
        key: String,
        content: Option<&Value>,
        extra: &Map<String, Value>,
    ) -> Result<Value> {
        let calls = extra.get("tool_calls").and_then(Value::as_array);
        match content {
            Some(Value::String(_)) => Ok(content.cloned().unwrap_or_default()),
            Some(Value::Array(parts)) => {
                let text = |(index, part): (usize, &Value)| match part.get("text") {
                    Some(Value::String(text)) => Ok(text.clone()),
                    other => Err(self.wrong_type(
                        format!("{key}[{index}].text"),
                        "a string (only text parts are read)",
                        other,
                    )),
                };
                parts
                    .iter()
                    .enumerate()
                    .map(text)
                    .collect::<Result<String>>()
                    .map(Value::String)
            }
            None | Some(Value::Null) if calls.is_some_and(|calls| !calls.is_empty()) => {
                Ok(Value::Null)
            }
            other => Err(self.wrong_type(key, "a string or a list of text parts", other)),
        }
    }
}

/// Who speaks, by the names that ShareGPT files use.
fn sharegpt_role(from: &str) -> Option<&'static str> {
    match from {
        "human" | "user" => Some("user"),
        "gpt" | "assistant" | "model" | "chatgpt" | "bing" | "bard" => Some("assistant"),
        "system" => Some("system"),
        "tool" | "observation" => Some("tool"),
        _ => None,
    }
}
