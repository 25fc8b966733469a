//! The data of a run: from the rows of a user's files to token ids and labels.
//!
//! [`prepare`] reads the files row by row ([`Format`] says what a row looks like), an [`Encoder`]
//! turns each row into a [`Sample`], [`Samples`] keeps them, [`split`] decides which are held back,
//! and a [`Packer`] which of the others go together and in which order they are seen.

pub mod check;
mod columnar;
mod files;
mod json;
mod order;
mod read;
mod rows;
mod sample;
mod samples;
mod sequences;
mod spool;
mod table;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use check::{Labels, Seen};
pub use files::{Split, folder_files};
pub use order::{epoch_order, split};
use read::RawRow;
pub use read::{Place, RowNumber};
pub use rows::Format;
use sample::Encoded;
pub use sample::{Encoder, IGNORED, Sample};
pub use samples::Samples;
use samples::SamplesWriter;
pub use sequences::{Packer, Sequences};
use spool::Spool;

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
    /// How many tasks there are, if the adapter tells them apart: each row then says which it is of.
    pub tasks: Option<usize>,
    /// Whether rows without a trained token are left out and counted; else they are an error.
    pub skip_untrained: bool,
}

/// The samples of some files, and what there is to report about them.
#[derive(Debug, Clone, Default)]
pub struct Prepared {
    /// The samples, in the order of their rows.
    pub samples: Samples,
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
/// Fewer rows are read if they are this large together.
const CHUNK_BYTES: usize = 8 << 20;

/// Reads files, folders and patterns and turns every row into a sample.
///
/// A folder stands for the data files in it and in its folders, sorted by name; where the names tell
/// splits apart, for those of the train split ([`folder_files`] gives others). Rows are read and encoded a bounded
/// number at a time, and samples that are too many for the memory go to disk, so that the data may
/// be larger than the memory.
///
/// # Errors
/// The first row, in file order, that cannot be read or encoded, with its place;
/// [`Error::NothingTrained`] when rows have no trained token, or none has one; [`Error::AllDropped`] when nothing is
/// left; and whatever keeps a file from being read or the samples from being kept.
pub fn prepare(paths: &[PathBuf], settings: &Settings, encoder: &Encoder) -> Result<Prepared> {
    let mut preparation = Preparation {
        settings,
        encoder,
        chunk: Vec::with_capacity(CHUNK_ROWS),
        chunk_bytes: 0,
        prepared: Prepared::default(),
        samples: SamplesWriter::new(),
        seen: Spool::new(),
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
    chunk: Vec<RawRow>,
    chunk_bytes: usize,
    prepared: Prepared,
    samples: SamplesWriter,
    seen: Spool<Seen>,
}

impl Preparation<'_> {
    fn push(&mut self, row: RawRow) -> Result<()> {
        self.chunk_bytes += row.bytes();
        self.chunk.push(row);
        if self.chunk.len() < CHUNK_ROWS && self.chunk_bytes < CHUNK_BYTES {
            return Ok(());
        }
        self.encode_chunk()
    }

    fn encode_chunk(&mut self) -> Result<()> {
        let (settings, encoder) = (self.settings, self.encoder);
        let encode = |row: RawRow| {
            let place = row.place.clone();
            let row = row.parse()?;
            let content = rows::read_content(&row, settings.format)?;
            let mut encoded = encoder.encode(&place, content)?;
            if let Some(tasks) = settings.tasks {
                encoded.sample.task = row.task(tasks)?;
            }
            let encoded = fit(encoded, &place, settings)?;
            Ok((place, encoded))
        };
        self.chunk_bytes = 0;
        let encoded: Vec<Result<_>> = self.chunk.par_drain(..).map(encode).collect();
        for encoded in encoded {
            let (place, encoded) = encoded?;
            self.add(place, encoded)?;
        }
        Ok(())
    }

    fn add(&mut self, place: Place, encoded: Option<Encoded>) -> Result<()> {
        let prepared = &mut self.prepared;
        let number = prepared.rows;
        prepared.rows += 1;
        let sample = encoded.as_ref().map(|encoded| &encoded.sample);
        self.seen
            .extend(&[prepared.labels.remember(&place, sample)])?;
        let Some(encoded) = encoded else {
            prepared.dropped_rows += 1;
            prepared.labels.drop_row(&place);
            return Ok(());
        };
        if self.settings.skip_untrained && encoded.sample.trained_tokens() == 0 {
            prepared.labels.skip_row(&place);
            return Ok(());
        }
        prepared.labels.add(&place, &encoded, self.encoder);
        let sample = &encoded.sample;
        prepared.trained_tokens += sample.trained_tokens() as u64;
        prepared.total_tokens += sample.input_ids.len() as u64;
        prepared.rows_without_end_marker += usize::from(encoded.lacks_end_marker);
        self.samples.push(sample, number)
    }

    fn finish(mut self) -> Result<Prepared> {
        let max_length = self.settings.max_length;
        let untrained = &self.prepared.labels.untrained;
        if untrained.count > 0 && (self.samples.is_empty() || !self.settings.skip_untrained) {
            return Err(Error::NothingTrained {
                rows: untrained.clone(),
                max_length,
            });
        }
        if self.samples.is_empty() {
            return Err(Error::AllDropped {
                rows: self.prepared.rows,
                max_length,
            });
        }
        self.prepared.labels.finish(self.seen)?;
        Ok(Prepared {
            samples: self.samples.finish()?,
            ..self.prepared
        })
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

fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::Io {
        action: "read",
        path: path.to_path_buf(),
        source,
    }
}

#[cfg(test)]
mod tests;
