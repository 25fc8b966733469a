//! What the labels of rows look like: gathered while the rows are read, looked at before step 1.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use model::tokenizer::Tokenizer;

use super::read::{Place, RowNumber};
use super::sample::Encoded;
use super::spool::{Pages, Spool};
use super::{Encoder, IGNORED, Sample, Samples};
use crate::error::Result;

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
#[derive(Debug, Clone, Default)]
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
    /// Conversations with tools or tool calls that the chat template does not show.
    pub hidden_tools: Found,
    /// The tokens that end the trained part of rows which have an end marker, and how many rows.
    pub ends: BTreeMap<u32, usize>,
    /// How many rows have so many trained tokens.
    trained: BTreeMap<u32, usize>,
    /// All rows, also those that are left out.
    rows: Arc<Pages<Seen>>,
    /// The files, and how rows are counted in them.
    files: Vec<(Arc<Path>, CountRow)>,
}

/// From a number to what is counted with it in a file: lines, elements or rows.
type CountRow = fn(usize) -> RowNumber;

/// What is remembered of a row: where it stands, and its tokens.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Seen {
    fingerprint: u64,
    row: u64,
    file: u64,
}

/// Rows that are compared together (64 MiB).
const ROWS_AT_A_TIME: usize = 4 << 20;

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
            (&mut self.hidden_tools, encoded.hides_tools),
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
        *self.trained.entry(trained_tokens as u32).or_default() += 1;
    }

    /// Notes a row that is left out.
    pub(super) fn drop_row(&mut self, place: &Place) {
        self.dropped.add(place);
    }

    /// Notes a row without a trained token that is left out.
    pub(super) fn skip_row(&mut self, place: &Place) {
        self.untrained.add(place);
    }

    /// What is remembered of the next row; without a sample it is left out.
    pub(super) fn remember(&mut self, place: &Place, sample: Option<&Sample>) -> Seen {
        if self
            .files
            .last()
            .is_none_or(|(path, _)| *path != place.path)
        {
            let number: CountRow = match place.row {
                RowNumber::Line(_) => RowNumber::Line,
                RowNumber::Element(_) => RowNumber::Element,
                RowNumber::Row(_) => RowNumber::Row,
            };
            self.files.push((place.path.clone(), number));
        }
        let (RowNumber::Line(row) | RowNumber::Element(row) | RowNumber::Row(row)) = place.row;
        Seen {
            fingerprint: sample.map_or(0, fingerprint),
            row: row as u64,
            file: self.files.len() as u64 - 1,
        }
    }

    /// Ends the reading of rows.
    pub(super) fn finish(&mut self, rows: Spool<Seen>) -> Result<()> {
        self.rows = Arc::new(rows.finish()?);
        Ok(())
    }

    /// Where a row stands, by its number over all files.
    pub fn place(&self, number: usize) -> Option<Place> {
        let seen = self.rows.get(number)?;
        let (path, number) = self.files.get(seen.file as usize)?;
        Some(Place {
            path: path.clone(),
            row: number(seen.row as usize),
        })
    }

    /// Trained tokens of the rows, if there are any.
    pub fn spread(&self) -> Option<Spread> {
        let rows: usize = self.trained.values().sum();
        let mut counted = 0;
        let mut up_to = self.trained.iter().map(|(tokens, rows)| {
            counted += rows;
            (*tokens, counted)
        });
        let median = up_to.find(|(_, counted)| *counted > (rows.max(1) - 1) / 2);
        Some(Spread {
            min: *self.trained.first_key_value()?.0,
            median: median?.0,
            max: *self.trained.last_key_value()?.0,
        })
    }

    /// Of the samples of these rows, those that have the tokens of one before them.
    pub fn repeated(&self, samples: &Samples) -> Option<Repeated> {
        let (mut count, mut first) = (0, None);
        for seen in self.by_fingerprint(samples) {
            for same in seen.chunk_by(|a, b| a.0 == b.0) {
                count += same.len() - 1;
                if let [(_, of), (_, row), ..] = same {
                    let pair = (*row, *of);
                    first = Some(first.map_or(pair, |first| pair.min(first)));
                }
            }
        }
        let (row, of) = first?;
        Some(Repeated {
            count,
            row: self.place(row)?,
            of: self.place(of)?,
        })
    }

    /// Of the samples `eval`, whose rows are `others`, those that are among the samples `train`,
    /// whose rows are these; both can come from the same files.
    pub fn shared(&self, train: &Samples, others: &Self, eval: &Samples) -> Option<Repeated> {
        let (mut count, mut first) = (0, None);
        for seen in others.by_fingerprint(eval) {
            let mut of = vec![None; seen.len()];
            for row in train.row_numbers() {
                let print = self.rows[row].fingerprint;
                let start = seen.partition_point(|(other, _)| *other < print);
                let same = seen[start..].iter().zip(&mut of[start..]);
                let same = same.take_while(|((other, _), _)| *other == print);
                same.for_each(|(_, of)| *of = of.or(Some(row)));
            }
            let found = seen
                .iter()
                .zip(of)
                .filter_map(|((_, row), of)| Some((*row, of?)));
            for pair in found {
                count += 1;
                first = Some(first.map_or(pair, |first| pair.min(first)));
            }
        }
        let (row, of) = first?;
        Some(Repeated {
            count,
            row: others.place(row)?,
            of: self.place(of)?,
        })
    }

    /// Fingerprints and row numbers of samples, sorted; in parts of a bounded size, each with all
    /// rows of its fingerprints.
    fn by_fingerprint(&self, samples: &Samples) -> impl Iterator<Item = Vec<(u64, usize)>> {
        let parts = samples.len().div_ceil(ROWS_AT_A_TIME) as u64;
        (0..parts).map(move |part| {
            let rows = samples.row_numbers();
            let all = rows.map(|row| (self.rows[row].fingerprint, row));
            let mut seen: Vec<_> = all.filter(|(print, _)| print % parts == part).collect();
            seen.sort_unstable();
            seen
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
