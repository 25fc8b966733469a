//! What the labels of rows look like: gathered while the rows are read, looked at before step 1.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use model::tokenizer::Tokenizer;

use super::read::{Place, RowNumber};
use super::sample::Encoded;
use super::{Encoder, IGNORED, Sample, Samples};

/// Some rows: how many, and the first few of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// How many.
    pub count: usize,
    /// The first ones.
    pub first: Vec<Place>,
}

impl Found {
    const NAMED: usize = 3;

    fn add(&mut self, place: &Place) {
        self.count += 1;
        if self.first.len() < Self::NAMED {
            self.first.push(place.clone());
        }
    }
}

/// The places of the first few, and how many more there are.
impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named: Vec<_> = self.first.iter().map(Place::to_string).collect();
        write!(f, "{}", named.join(", "))?;
        match self.count - self.first.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// What there is to know of the labels of some rows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Labels {
    /// Rows without a trained token.
    pub untrained: Found,
    /// Rows that are too long and left out.
    pub dropped: Found,
    /// Rows whose trained text was cut off.
    pub cut: Found,
    /// Rows of text whose trained part does not end in an end marker.
    pub endless: Found,
    /// Rows that begin with two BOS tokens.
    pub double_bos: Found,
    /// Conversations in the alpaca form, for lack of a chat template.
    pub alpaca: Found,
    /// The tokens that end the trained part of rows which have an end marker, and how many rows.
    pub ends: BTreeMap<u32, usize>,
    rows: Vec<Seen>,
    files: Vec<Arc<Path>>,
}

/// What is remembered of a row that is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    fingerprint: u64,
    row: RowNumber,
    file: u32,
    trained_tokens: u32,
}

/// Least, median and most trained tokens of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Spread {
    /// Of the row with the fewest.
    pub min: u32,
    /// Half of the rows have no more.
    pub median: u32,
    /// Of the row with the most.
    pub max: u32,
}

/// Rows that are there more than once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repeated {
    /// How many repeat another one.
    pub count: usize,
    /// One of them.
    pub row: Place,
    /// The row that it repeats.
    pub of: Place,
}

impl Labels {
    /// Notes a row that is kept.
    pub(super) fn add(&mut self, place: &Place, encoded: &Encoded, encoder: &Encoder) {
        let sample = &encoded.sample;
        let trained_tokens = sample.trained_tokens();
        let tokenizer = encoder.tokenizer.as_ref();
        let bos = tokenizer.and_then(Tokenizer::bos_token_id);
        let begins_twice = matches!(sample.input_ids[..], [first, second, ..]
            if Some(first) == bos && first == second);
        for (found, is_so) in [
            (&mut self.untrained, trained_tokens == 0),
            (&mut self.cut, encoded.loses_trained),
            (&mut self.endless, encoded.lacks_end_marker),
            (&mut self.double_bos, begins_twice),
            (&mut self.alpaca, encoded.is_alpaca),
        ] {
            if is_so {
                found.add(place);
            }
        }
        if encoded.is_text && !encoded.lacks_end_marker {
            let trained = sample.labels.iter().rfind(|label| **label != IGNORED);
            if let Some(last) = trained {
                *self.ends.entry(*last as u32).or_default() += 1;
            }
        }
        if self.files.last() != Some(&place.path) {
            self.files.push(place.path.clone());
        }
        self.rows.push(Seen {
            fingerprint: fingerprint(sample),
            row: place.row,
            file: (self.files.len() - 1) as u32,
            trained_tokens: trained_tokens as u32,
        });
    }

    /// Notes a row that is left out.
    pub(super) fn drop_row(&mut self, place: &Place) {
        self.dropped.add(place);
    }

    /// Where the row of a sample stands, by its number among the samples.
    pub fn place(&self, sample: usize) -> Option<Place> {
        self.rows.get(sample).map(|row| self.place_of(row))
    }

    fn place_of(&self, row: &Seen) -> Place {
        Place {
            path: self.files[row.file as usize].clone(),
            row: row.row,
        }
    }

    /// Trained tokens of the rows, if there are any.
    pub fn spread(&self) -> Option<Spread> {
        let mut counts: Vec<u32> = self.rows.iter().map(|row| row.trained_tokens).collect();
        counts.sort_unstable();
        Some(Spread {
            min: *counts.first()?,
            median: counts[(counts.len() - 1) / 2],
            max: *counts.last()?,
        })
    }

    /// Rows that have the tokens of one before them.
    pub fn repeated(&self) -> Option<Repeated> {
        let mut first = HashMap::with_capacity(self.rows.len());
        let mut repeats = Vec::new();
        for row in &self.rows {
            match first.get(&row.fingerprint) {
                Some(before) => repeats.push((row, *before)),
                None => _ = first.insert(row.fingerprint, row),
            }
        }
        let (row, before) = repeats.first()?;
        Some(Repeated {
            count: repeats.len(),
            row: self.place_of(row),
            of: self.place_of(before),
        })
    }

    /// Of the samples `eval`, whose rows are `others`, those that are among the samples `train`,
    /// whose rows are these; both can come from the same files.
    pub fn shared(&self, train: &Samples, others: &Self, eval: &Samples) -> Option<Repeated> {
        if eval.is_empty() {
            return None; // without a look at every token that is trained on
        }
        let trained: HashSet<u64> = train.iter().map(|sample| fingerprint(&sample)).collect();
        let seen = eval.iter().map(|sample| fingerprint(&sample));
        let seen: Vec<u64> = seen.filter(|print| trained.contains(print)).collect();
        let first = *seen.first()?;
        let is_it = |row: &&Seen| row.fingerprint == first;
        // of the same file, these are two places of the same tokens
        let of = self.rows.iter().find(is_it)?;
        let row = others.rows.iter().rfind(is_it)?;
        Some(Repeated {
            count: seen.len(),
            row: others.place_of(row),
            of: self.place_of(of),
        })
    }
}

/// A number that two rows of different tokens do not share, but for an accident.
fn fingerprint(sample: &Sample) -> u64 {
    let mut hash = DefaultHasher::new();
    sample.input_ids.hash(&mut hash);
    hash.finish()
}

/// A row as text, special tokens and all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The text; the ids, where there is no tokenizer.
    pub text: String,
    /// The byte ranges of what is trained.
    pub trained: Vec<Range<usize>>,
}

/// Turns a sample back into text.
///
/// # Errors
/// [`model::Error::Tokenize`] when the tokenizer fails.
pub fn show(sample: &Sample, tokenizer: Option<&Tokenizer>) -> model::Result<Shown> {
    let mut shown = Shown {
        text: String::new(),
        trained: Vec::new(),
    };
    let mut stream = tokenizer.map(|tokenizer| tokenizer.decode_stream(false));
    let tokens = sample.input_ids.iter().zip(&sample.labels);
    for (index, (&id, &label)) in tokens.enumerate() {
        let start = shown.text.len();
        match &mut stream {
            Some(stream) => shown.text += &stream.push(id)?,
            None if index == 0 => shown.text += &id.to_string(),
            None => shown.text += &format!(" {id}"),
        }
        let end = shown.text.len();
        // nothing predicts the first token
        if label == IGNORED || index == 0 || start == end {
            continue;
        }
        match shown.trained.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => shown.trained.push(start..end),
        }
    }
    if let Some(stream) = stream {
        shown.text += &stream.finish()?;
    }
    Ok(shown)
}

/// Markers such as `<|im_start|>` in a text that the tokenizer does not know as one token.
pub fn unknown_markers(text: &str, tokenizer: &Tokenizer) -> Vec<String> {
    let mut markers: Vec<&str> = ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
        .into_iter()
        .filter(|marker| text.contains(marker))
        .collect();
    let mut rest = text;
    while let Some(start) = rest.find("<|") {
        rest = &rest[start..];
        let length = rest.find("|>").map_or(0, |end| end + 2);
        let (marker, after) = rest.split_at(if length > 0 { length } else { 2 });
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_-|<>".contains(c);
        if length > 4 && length <= 40 && marker.chars().all(is_name) && !markers.contains(&marker) {
            markers.push(marker);
        }
        rest = after;
    }
    let unknown = |marker: &&str| tokenizer.token_to_id(marker).is_none();
    markers
        .into_iter()
        .filter(unknown)
        .map(str::to_owned)
        .collect()
}
