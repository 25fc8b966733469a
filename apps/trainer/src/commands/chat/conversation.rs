//! What has been said, how a model reads it, and how much of it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result};
use model::chat::{ChatTemplate, Message};
use model::folder::ModelFolder;
use model::tokenizer::Tokenizer;
use serde_json::json;

use crate::failure::Advised;

/// A conversation that grows.
pub struct Conversation {
    /// The model's.
    pub tokenizer: Tokenizer,
    template: ChatTemplate,
    system: Option<Message>,
    turns: Vec<Message>,
    /// Turns at the beginning for which the model has no room any more.
    left_out: usize,
    /// Tokens that the model can read and write in all.
    context: usize,
    /// Tokens that are kept free for an answer.
    room: usize,
}

/// A prompt that ends where the answer begins.
pub struct Asked {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Longest answer that the model has room for.
    pub room: usize,
    /// How many turns had to be left out that were read before.
    pub newly_left_out: usize,
}

impl Conversation {
    /// An empty conversation with a model, which its template is known to take.
    pub fn new(base: &ModelFolder, system: Option<&str>, max_new_tokens: usize) -> Result<Self> {
        let Some(tokenizer) = base.tokenizer()? else {
            let folder = base.path.display();
            return Err(Advised::failed(
                format!("{folder} has no tokenizer.json, which a chat needs"),
                "add the model's tokenizer.json",
            )
            .into());
        };
        let context = base.config.max_context();
        let mut new = Self {
            tokenizer,
            template: template_of(base)?,
            system: system.map(|text| Message::new("system", text)),
            turns: Vec::new(),
            left_out: 0,
            context,
            // most answers are far shorter than the longest there may be
            room: max_new_tokens.min(context / 4),
        };
        // before the weights are loaded
        if new.ask("Hi")?.is_none() {
            return Err(Advised::usage(
                format!("--system is too long: the model reads at most {context} tokens"),
                "give a shorter --system",
            )
            .into());
        }
        new.reset();
        Ok(new)
    }

    /// Goes on with the template that is now in use.
    pub fn set_template(&mut self, base: &ModelFolder) -> Result<()> {
        self.template = template_of(base)?;
        Ok(())
    }

    /// Tokens that the model can read and write in all.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Whether nothing has been said.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Forgets everything but the system turn.
    pub fn reset(&mut self) {
        self.turns.clear();
        self.left_out = 0;
    }

    /// Adds what a user says. The oldest turns are left out in pairs until there is room for an
    /// answer; `None` if the text alone leaves none, and then nothing is added.
    pub fn ask(&mut self, text: &str) -> Result<Option<Asked>> {
        let (turns, before) = (self.turns.len(), self.left_out);
        self.turns.push(Message::new("user", text));
        let ids = self.fit();
        if !matches!(&ids, Ok(ids) if ids.len() < self.context) {
            self.turns.truncate(turns);
            self.left_out = before;
            return ids.map(|_| None);
        }
        Ok(Some(Asked {
            room: self.context - ids.as_ref().map_or(0, Vec::len),
            ids: ids?,
            newly_left_out: self.left_out - before,
        }))
    }

    /// Takes back what a user has just said, as if it had not been: it has no answer.
    pub fn take_back(&mut self, asked: &Asked) {
        self.turns.pop();
        self.left_out -= asked.newly_left_out;
    }

    /// Adds what the model answered.
    pub fn answer(&mut self, text: String) {
        self.turns.push(Message::new("assistant", text));
    }

    fn fit(&mut self) -> Result<Vec<u32>> {
        loop {
            let ids = self.prompt()?;
            if ids.len() + self.room <= self.context || self.left_out + 2 >= self.turns.len() {
                return Ok(ids);
            }
            self.left_out += 2;
        }
    }

    /// The tokens of what is not left out, up to where the next answer begins.
    fn prompt(&self) -> Result<Vec<u32>> {
        let turns = self.system.iter().chain(&self.turns[self.left_out..]);
        let turns: Vec<_> = turns.cloned().collect();
        let special = self.tokenizer.special_tokens();
        let text = self.template.render(&turns, true, special)?;
        Ok(self.tokenizer.encode(&text, false)?.ids)
    }

    /// Adds the conversation to a file as a row that `train` reads, also what is left out by now.
    ///
    /// # Errors
    /// A file that is not one of rows, or cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        if path.extension().is_none_or(|end| end != "jsonl") {
            return Err(Advised::failed(
                format!("{} is not the name of a .jsonl file", path.display()),
                "give a name such as chats.jsonl",
            )
            .into());
        }
        let all: Vec<_> = self.system.iter().chain(&self.turns).collect();
        let row = json!({ "messages": all }).to_string() + "\n";
        append(path, &row).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Adds a line at the end, whether or not the last one has an end.
fn append(path: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .open(path)?;
    let text = match ends_in_line(&mut file)? {
        true => line.to_owned(),
        false => format!("\n{line}"),
    };
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn ends_in_line(file: &mut File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

fn template_of(base: &ModelFolder) -> Result<ChatTemplate> {
    base.chat_template()?.ok_or_else(|| {
        Advised::failed(
            format!("{} has no chat template", base.path.display()),
            format!(
                "give the one that it was trained with by --chat-template: a jinja file, or {}",
                ChatTemplate::BUILTIN.join(", ")
            ),
        )
        .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_back_was_never_said() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/base");
        let base = ModelFolder::open(&folder).unwrap();
        let mut conversation = Conversation::new(&base, None, 8).unwrap();
        let mut ask = |text| conversation.ask(text).unwrap().unwrap();
        let first = ask("pig latin: zebra");
        conversation.take_back(&first);
        assert!(conversation.is_empty());
        let again = conversation.ask("pig latin: zebra").unwrap().unwrap();
        assert_eq!(again.ids, first.ids);
        // until the oldest turns have no room
        let mut asked = again;
        while asked.newly_left_out == 0 {
            conversation.answer("ebrazay".into());
            asked = conversation.ask("pig latin: zebra").unwrap().unwrap();
        }
        conversation.take_back(&asked);
        assert_eq!(conversation.left_out, 0);
        let roles = conversation.turns.iter().map(|turn| turn.role.as_str());
        let roles: Vec<_> = roles.collect();
        assert_eq!(roles.len() % 2, 0);
        assert_eq!(roles.last(), Some(&"assistant"));
    }
}
