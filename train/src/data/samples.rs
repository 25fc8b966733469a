//! Many samples, on disk when they are too many for the memory.

use std::fmt;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use sha2::{Digest, Sha256};

use super::sample::{IGNORED, Sample};
use super::spool::{Pages, Spool};
use crate::error::Result;

/// The samples of some data, or a selection of them; cheap to clone.
///
/// Few samples are in memory; many are in a temporary file without a name, of which the system
/// keeps in memory what there is room for.
#[derive(Clone)]
pub struct Samples {
    /// The token ids of each sample, then its labels.
    words: Arc<Pages<u32>>,
    entries: Arc<Pages<Entry>>,
    /// Of all words, also those of samples that are not selected.
    digest: [u8; 32],
}

/// Where a sample lies in the words, and what is often asked of it.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    at: u64,
    row: u64,
    tokens: u32,
    trained: u32,
    /// How many ranges of trained tokens follow the token ids, or [`EVERY_LABEL`].
    ranges: u32,
    task: u32,
}

/// The labels stand there one by one, because some are other tokens than the row's own.
const EVERY_LABEL: u32 = u32::MAX;

impl Samples {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the tokens are in a temporary file.
    pub fn is_on_disk(&self) -> bool {
        matches!(*self.words, Pages::Mapped(_))
    }

    /// A sample by its index.
    ///
    /// # Panics
    /// If there is none at that index.
    pub fn get(&self, index: usize) -> Sample {
        let entry = self.entries[index];
        let start = entry.at as usize;
        let input_ids = self.words[start..][..entry.tokens as usize].to_vec();
        let after = &self.words[start + input_ids.len()..];
        let labels = match entry.ranges {
            EVERY_LABEL => bytemuck::cast_slice(&after[..input_ids.len()]).to_vec(),
            ranges => {
                let mut labels = vec![IGNORED; input_ids.len()];
                for range in after[..2 * ranges as usize].chunks_exact(2) {
                    let range = range[0] as usize..range[1] as usize;
                    labels[range.clone()].copy_from_slice(bytemuck::cast_slice(&input_ids[range]));
                }
                labels
            }
        };
        Sample {
            input_ids,
            labels,
            task: entry.task,
        }
    }

    /// All samples in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Sample> + '_ {
        (0..self.len()).map(|index| self.get(index))
    }

    /// The tokens of each sample, in order.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.entries.iter().map(|entry| entry.tokens as usize)
    }

    /// The tokens of each sample that count in the loss, in order.
    pub fn trained_tokens(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.entries.iter().map(|entry| entry.trained as usize)
    }

    /// For each sample the number of its row, from 0 over all files.
    pub fn row_numbers(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.entries.iter().map(|entry| entry.row as usize)
    }

    /// The samples at some indices, in the order of these.
    ///
    /// # Errors
    /// [`crate::Error::Temporary`] when a list too long for the memory cannot be written to disk.
    ///
    /// # Panics
    /// If there is no sample at one of the indices.
    pub fn select(&self, indices: impl IntoIterator<Item = usize>) -> Result<Self> {
        let mut entries = Spool::new();
        for index in indices {
            entries.extend(&[self.entries[index]])?;
        }
        Ok(Self {
            entries: Arc::new(entries.finish()?),
            ..self.clone()
        })
    }

    /// The SHA-256 that the samples, their order and their selection decide; it reads no tokens.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new_with_prefix(self.digest);
        hash.update(bytemuck::cast_slice(&self.entries));
        hash.finalize().into()
    }
}

impl Default for Samples {
    fn default() -> Self {
        std::iter::empty().collect()
    }
}

impl FromIterator<Sample> for Samples {
    /// Keeps the samples in memory.
    fn from_iter<I: IntoIterator<Item = Sample>>(samples: I) -> Self {
        let mut writer = SamplesWriter::in_memory();
        for (row, sample) in samples.into_iter().enumerate() {
            writer.push(&sample, row).expect("memory needs no disk");
        }
        writer.finish().expect("memory needs no disk")
    }
}

impl From<Vec<Sample>> for Samples {
    fn from(samples: Vec<Sample>) -> Self {
        samples.into_iter().collect()
    }
}

impl fmt::Debug for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Samples").field("len", &self.len()).finish()
    }
}

/// Takes samples one by one.
pub(super) struct SamplesWriter {
    words: Spool<u32>,
    entries: Spool<Entry>,
    hash: Sha256,
    /// The words of the sample at hand.
    buffer: Vec<u32>,
}

impl SamplesWriter {
    pub(super) fn new() -> Self {
        Self::with(Spool::new(), Spool::new())
    }

    fn in_memory() -> Self {
        Self::with(Spool::in_memory(), Spool::in_memory())
    }

    fn with(words: Spool<u32>, entries: Spool<Entry>) -> Self {
        Self {
            words,
            entries,
            hash: Sha256::new(),
            buffer: Vec::new(),
        }
    }

    /// Adds a sample, the one of a row by its number.
    pub(super) fn push(&mut self, sample: &Sample, row: usize) -> Result<()> {
        self.buffer.clear();
        self.buffer.extend(&sample.input_ids);
        let ranges = write_labels(sample, &mut self.buffer);
        let entry = Entry {
            at: self.words.len() as u64,
            row: row as u64,
            tokens: count(sample.input_ids.len()),
            trained: count(sample.trained_tokens()),
            ranges,
            task: sample.task,
        };
        self.hash.update(bytemuck::cast_slice(&self.buffer));
        self.words.extend(&self.buffer)?;
        self.entries.extend(&[entry])
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.len() == 0
    }

    pub(super) fn finish(self) -> Result<Samples> {
        Ok(Samples {
            words: Arc::new(self.words.finish()?),
            entries: Arc::new(self.entries.finish()?),
            digest: self.hash.finalize().into(),
        })
    }
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).expect("a row has less than 2^32 tokens")
}

/// Writes which tokens are trained, as ranges where that says it all; returns `Entry::ranges`.
fn write_labels(sample: &Sample, out: &mut Vec<u32>) -> u32 {
    let pairs = || sample.input_ids.iter().zip(&sample.labels);
    if pairs().any(|(&id, &label)| label != IGNORED && label != id as i32) {
        out.extend(bytemuck::cast_slice::<_, u32>(&sample.labels));
        return EVERY_LABEL;
    }
    let (mut ranges, mut start) = (0, 0);
    for part in sample
        .labels
        .chunk_by(|a, b| (*a == IGNORED) == (*b == IGNORED))
    {
        let end = start + count(part.len());
        if part[0] != IGNORED {
            out.extend([start, end]);
            ranges += 1;
        }
        start = end;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A sample whose labels are mostly the row's own tokens.
    fn sample() -> impl Strategy<Value = Sample> {
        let token = (
            0..5u32,
            prop_oneof![4 => Just(None), 4 => Just(Some(0)), 1 => (0..2).prop_map(Some)],
        );
        let tokens = prop::collection::vec(token, 0..20);
        (tokens, 0..3u32).prop_map(|(tokens, task)| Sample {
            task,
            input_ids: tokens.iter().map(|(id, _)| *id).collect(),
            labels: tokens
                .iter()
                .map(|(id, other)| other.map_or(IGNORED, |other| *id as i32 + other))
                .collect(),
        })
    }

    proptest! {
        #[test]
        fn samples_come_back_as_they_were(all in prop::collection::vec(sample(), 0..10)) {
            let samples = Samples::from(all.clone());
            prop_assert_eq!(samples.iter().collect::<Vec<_>>(), all.clone());
            prop_assert!(samples.lengths().eq(all.iter().map(|sample| sample.input_ids.len())));
            prop_assert!(samples.trained_tokens().eq(all.iter().map(Sample::trained_tokens)));
        }
    }

    #[test]
    fn a_selection_has_its_own_order_and_digest() -> Result<()> {
        let one = |id| Sample {
            task: 0,
            input_ids: vec![id, id],
            labels: vec![IGNORED, id as i32],
        };
        let samples: Samples = (0..4).map(one).collect();
        let some = samples.select([2, 0])?;
        assert_eq!(some.iter().collect::<Vec<_>>(), [one(2), one(0)]);
        assert_eq!(some.row_numbers().collect::<Vec<_>>(), [2, 0]);
        assert_eq!(some.digest(), samples.select([2, 0])?.digest());
        let others = [
            samples.clone(),
            samples.select([0, 2])?,
            (1..4).map(one).collect(),
        ];
        assert!(others.iter().all(|other| other.digest() != some.digest()));
        let mut masked = one(3);
        masked.labels[1] = IGNORED;
        let masked: Samples = [one(0), one(1), one(2), masked].into_iter().collect();
        assert_ne!(masked.digest(), samples.digest());
        Ok(())
    }
}
