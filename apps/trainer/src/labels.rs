//! What there is to say of the rows before step 1: warnings, and a few rows with what is trained
//! of them.

use std::io::IsTerminal;
use std::ops::Range;

use ::train::data::check::{Labels, Repeated, Shown, show, unknown_markers};
use ::train::data::{Encoder, Prepared, Sample, Samples};
use anyhow::Result;
use model::folder::ModelFolder;
use serde_json::{Value, json};

use crate::commands::train::problems_of;

/// Rows that are shown.
const ROWS: usize = 3;
/// Longest part of a row that is not trained and is shown whole, in characters.
const UNTRAINED: usize = 160;
/// The same for trained parts.
const TRAINED: usize = 800;

/// Every warning about some rows that have been read, a sentence each.
pub fn warnings(
    what: &str,
    prepared: &Prepared,
    encoder: &Encoder,
    base: &ModelFolder,
) -> Result<Vec<String>> {
    let labels = &prepared.labels;
    let mut all = problems_of(what, prepared, encoder);
    let mut add =
        |warning: Option<String>| all.extend(warning.map(|text| format!("{what}: {text}")));
    add((labels.cut.count > 0).then(|| {
        format!(
            "the trained text of {} rows is cut off at data.max_length ({}): raise it, or leave \
             such rows out with data.truncate = \"drop\"",
            labels.cut.count, labels.cut
        )
    }));
    let context = base.config.max_position_embeddings;
    let beyond = prepared
        .samples
        .lengths()
        .filter(|length| *length > context);
    add(Some(beyond.count()).filter(|count| *count > 0).map(|count| {
        format!(
            "{count} rows are longer than the {context} tokens that the model was made for: set \
             data.max_length = {context}"
        )
    }));
    add((labels.double_bos.count > 0).then(|| {
        format!(
            "{} rows begin with two BOS tokens ({}): remove the one in the rows or in the chat \
             template",
            labels.double_bos.count, labels.double_bos
        )
    }));
    add((labels.hidden_tools.count > 0).then(|| {
        format!(
            "the chat template does not show the tools or tool calls of {} rows ({}): set \
             data.chat_template to one that does",
            labels.hidden_tools.count, labels.hidden_tools
        )
    }));
    add((labels.alpaca.count > 0).then(|| {
        "the model has no chat template, so that conversations get the plain alpaca form: set \
         data.chat_template if the model knows another one"
            .to_owned()
    }));
    add(labels
        .repeated(&prepared.samples)
        .map(|Repeated { count, row, of }| {
            format!(
                "{count} rows repeat another one ({row} is {of}): remove them, or they weigh more"
            )
        }));
    add(wrong_ends(labels, encoder, base));
    add(split_markers(&prepared.samples, encoder)?);
    Ok(all)
}

/// Rows that end in a token at which the model is not stopped.
fn wrong_ends(labels: &Labels, encoder: &Encoder, base: &ModelFolder) -> Option<String> {
    let known = &base.generation.eos_token_ids;
    let (id, rows) = labels.ends.iter().find(|(id, _)| !known.contains(id))?;
    if known.is_empty() {
        return None;
    }
    let tokenizer = encoder.tokenizer.as_ref()?;
    let name = |id: u32| tokenizer.id_to_token(id).unwrap_or(id.to_string());
    let known: Vec<String> = known.iter().map(|id| name(*id)).collect();
    Some(format!(
        "{rows} rows end in {}, which is no eos token of generation_config.json ({}): add it there, \
         or generation does not stop",
        name(*id),
        known.join(", ")
    ))
}

/// Markers of the template that become several tokens.
fn split_markers(samples: &Samples, encoder: &Encoder) -> Result<Option<String>> {
    let Some(tokenizer) = &encoder.tokenizer else {
        return Ok(None);
    };
    let mut unknown: Vec<String> = Vec::new();
    for sample in samples.iter().take(ROWS) {
        let text = show(&sample, Some(tokenizer))?.text;
        for marker in unknown_markers(&text, tokenizer) {
            if !unknown.contains(&marker) {
                unknown.push(marker);
            }
        }
    }
    Ok((!unknown.is_empty()).then(|| {
        format!(
            "the text has {}, which this tokenizer does not know as one token: use the model's own \
             template (data.chat_template)",
            unknown.join(", ")
        )
    }))
}

/// What there is to say of evaluation rows that are trained on, too.
pub fn shared(labels: &Labels, train: &Samples, others: &Labels, eval: &Samples) -> Option<String> {
    let Repeated { count, row, of } = labels.shared(train, others, eval)?;
    let (all, place) = (
        eval.len(),
        match row == of {
            true => row.to_string(),
            false => format!("{row} is {of}"),
        },
    );
    Some(format!(
        "{count} of {all} evaluation rows are trained on, too ({place}): remove them from one side, \
         or the evaluation loss looks better than it is"
    ))
}

/// A row for people and programs.
pub struct Example {
    place: String,
    shown: Shown,
}

/// The first rows, as they are trained on.
pub fn examples(prepared: &Prepared, encoder: &Encoder) -> Result<Vec<Example>> {
    let samples = &prepared.samples;
    let rows = samples.row_numbers().zip(samples.iter()).take(ROWS);
    let example = |(number, sample): (usize, Sample)| {
        let place = prepared.labels.place(number);
        Ok(Example {
            place: place.map_or(String::new(), |place| place.to_string()),
            shown: show(&sample, encoder.tokenizer.as_ref())?,
        })
    };
    rows.map(example).collect()
}

impl Example {
    /// `{"place","text","trained"}`, the ranges in characters.
    pub fn json(&self) -> Value {
        let text = &self.shown.text;
        let count = |end: usize| text[..end].chars().count();
        let ranges = self.shown.trained.iter();
        let trained: Vec<_> = ranges.map(|r| [count(r.start), count(r.end)]).collect();
        json!({"place": self.place, "text": text, "trained": trained})
    }

    /// The row with its trained parts marked: coloured and underlined on a terminal, else ‹so›.
    pub fn text(&self, styled: bool) -> String {
        let (on, off) = match styled {
            true => ("\x1b[4;32m", "\x1b[0m"),
            false => ("‹", "›"),
        };
        let mut marked = String::new();
        let mut reached = 0;
        for Range { start, end } in self.shown.trained.iter().cloned() {
            marked += &shorten(&self.shown.text[reached..start], UNTRAINED);
            marked += on;
            marked += &shorten(&self.shown.text[start..end], TRAINED);
            marked += off;
            reached = end;
        }
        marked += &shorten(&self.shown.text[reached..], UNTRAINED);
        let lines: Vec<&str> = marked.lines().collect();
        format!("{}:\n  | {}", self.place, lines.join("\n  | "))
    }
}

/// Whether a stream takes colours.
pub fn is_styled(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
}

/// Leaves out the middle of a long text, and makes what would steer a terminal visible.
fn shorten(text: &str, most: usize) -> String {
    let visible = |c: char| match c {
        '\n' | '\t' => c.to_string(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    };
    let count = text.chars().count();
    if count <= most {
        return text.chars().map(visible).collect();
    }
    let half = most / 2;
    let start: String = text.chars().take(half).map(visible).collect();
    let end: String = text.chars().skip(count - half).map(visible).collect();
    format!("{start} … {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(text: &str, trained: &[&str]) -> Example {
        let range = |part: &&str| {
            let start = text.find(part).unwrap();
            start..start + part.len()
        };
        Example {
            place: "rows.jsonl:1".into(),
            shown: Shown {
                text: text.into(),
                trained: trained.iter().map(range).collect(),
            },
        }
    }

    #[test]
    fn trained_parts_are_marked() {
        let row = example("<|user|>\nHi\n<|assistant|>\nHä?</s>\n", &["Hä?</s>"]);
        assert_eq!(
            row.text(false),
            "rows.jsonl:1:\n  | <|user|>\n  | Hi\n  | <|assistant|>\n  | ‹Hä?</s>›"
        );
        assert!(row.text(true).contains("\x1b[4;32mHä?</s>\x1b[0m"));
        // in characters, for programs
        assert_eq!(row.json()["trained"], json!([[26, 33]]));
    }

    #[test]
    fn long_texts_lose_their_middle_and_nothing_steers_the_terminal() {
        let long = format!("{}answer", "x".repeat(1000));
        let text = example(&long, &["answer"]).text(false);
        assert!(
            text.ends_with("x‹answer›") && text.contains(" … ") && text.len() < 300,
            "{text}"
        );
        assert_eq!(shorten("a\x1b[2Jb\tc", 99), "a\\u{1b}[2Jb\tc");
    }
}
