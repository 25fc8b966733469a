//! The data of a run: from the rows of a user's files to token ids and labels.
//!
//! [`prepare`] reads the files row by row ([`Format`] says what a row looks like), an [`Encoder`]
//! turns each row into a [`Sample`], [`split`] decides which samples are held back, and a
//! [`Packer`] which of the others go together and in which order they are seen.

pub mod check;
mod order;
mod read;
mod rows;
mod sample;
mod sequences;

use std::path::PathBuf;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use check::Labels;
pub use order::{epoch_order, split};
use read::Row;
pub use read::{Place, RowNumber};
pub use rows::Format;
use sample::Encoded;
pub use sample::{Encoder, IGNORED, Sample};
pub use sequences::{Packer, Sequences};

/// What happens to a row that is longer than the longest length allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncate {
    /// It is left out and counted.
    #[default]
    Drop,
    /// Its end is cut off.
    Right,
    /// It is an error.
    Error,
}

/// How the rows of a file become samples, beside what the [`Encoder`] knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// What a row looks like.
    pub format: Format,
    /// Longest row in tokens.
    pub max_length: usize,
    /// What happens to longer rows.
    pub truncate: Truncate,
}

/// The samples of some files, and what there is to report about them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prepared {
    /// The samples, in the order of their rows.
    pub samples: Vec<Sample>,
    /// For each sample the number of its row, from 0 over all files.
    pub row_numbers: Vec<usize>,
    /// How many rows were read, those dropped included.
    pub rows: usize,
    /// How many rows were dropped because they are too long.
    pub dropped_rows: usize,
    /// The tokens of all samples that count in the loss.
    pub trained_tokens: u64,
    /// The tokens of all samples.
    pub total_tokens: u64,
    /// Samples whose trained text does not end in an end marker, because the row has none or it
    /// was cut off: a model that sees only such rows never learns to stop. Rows that come as
    /// tokens are not counted.
    pub rows_without_end_marker: usize,
    /// What the labels look like.
    pub labels: Labels,
}

/// Rows that are read before they are encoded, in parallel.
const CHUNK_ROWS: usize = 1024;

/// Reads files and folders and turns every row into a sample.
///
/// A folder stands for all of its `.jsonl` and `.json` files, sorted by name.
///
/// # Errors
/// The first row, in file order, that cannot be read or encoded, with its place;
/// [`Error::NothingTrained`] when rows have no trained token; [`Error::AllDropped`] when nothing is
/// left; and whatever keeps a file from being read.
pub fn prepare(paths: &[PathBuf], settings: &Settings, encoder: &Encoder) -> Result<Prepared> {
    let mut preparation = Preparation {
        settings,
        encoder,
        chunk: Vec::with_capacity(CHUNK_ROWS),
        prepared: Prepared::default(),
    };
    let read = read::read_rows(paths, &mut |row| preparation.push(row));
    // The rows in front of one that cannot be read come first, with their own errors.
    preparation.encode_chunk()?;
    read?;
    preparation.finish()
}

/// The state of [`prepare`].
struct Preparation<'a> {
    settings: &'a Settings,
    encoder: &'a Encoder,
    chunk: Vec<Row>,
    prepared: Prepared,
}

impl Preparation<'_> {
    fn push(&mut self, row: Row) -> Result<()> {
        self.chunk.push(row);
        if self.chunk.len() < CHUNK_ROWS {
            return Ok(());
        }
        self.encode_chunk()
    }

    fn encode_chunk(&mut self) -> Result<()> {
        let (settings, encoder) = (self.settings, self.encoder);
        let encode = |row: &Row| {
            let content = rows::read_content(row, settings.format)?;
            fit(encoder.encode(&row.place, content)?, &row.place, settings)
        };
        let encoded: Vec<_> = self.chunk.par_iter().map(encode).collect();
        for (row, encoded) in self.chunk.drain(..).zip(encoded) {
            let prepared = &mut self.prepared;
            let number = prepared.rows;
            prepared.rows += 1;
            let Some(encoded) = encoded? else {
                prepared.dropped_rows += 1;
                prepared.labels.drop_row(&row.place);
                continue;
            };
            prepared.labels.add(&row.place, &encoded, encoder);
            let sample = encoded.sample;
            prepared.trained_tokens += sample.trained_tokens() as u64;
            prepared.total_tokens += sample.input_ids.len() as u64;
            prepared.rows_without_end_marker += usize::from(encoded.lacks_end_marker);
            prepared.samples.push(sample);
            prepared.row_numbers.push(number);
        }
        Ok(())
    }

    fn finish(self) -> Result<Prepared> {
        let max_length = self.settings.max_length;
        let untrained = &self.prepared.labels.untrained;
        if untrained.count > 0 {
            return Err(Error::NothingTrained {
                rows: untrained.clone(),
                max_length,
            });
        }
        if self.prepared.samples.is_empty() {
            return Err(Error::AllDropped {
                rows: self.prepared.rows,
                max_length,
            });
        }
        Ok(self.prepared)
    }
}

/// Applies the longest length allowed; `None` is a row to drop.
fn fit(mut encoded: Encoded, place: &Place, settings: &Settings) -> Result<Option<Encoded>> {
    let max_length = settings.max_length;
    let tokens = encoded.sample.input_ids.len();
    if tokens <= max_length {
        return Ok(Some(encoded));
    }
    match settings.truncate {
        Truncate::Drop => Ok(None),
        Truncate::Error => Err(Error::TooLong {
            place: place.clone(),
            tokens,
            max_length,
        }),
        Truncate::Right => {
            encoded.cut(max_length);
            Ok(Some(encoded))
        }
    }
}

#[cfg(test)]
mod tests;
