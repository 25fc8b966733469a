//! Which samples are held back for evaluation, and the order in which the others are seen.

use burn::data::dataset::transform::{PartialDataset, ShuffledDataset};
use burn::data::dataset::{Dataset, InMemDataset};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::Samples;
use crate::error::{Error, Result};

/// Holds back a share of the samples: those left to train on, and those held back.
///
/// The seed decides which are held back; both parts keep their order, so that a run without
/// shuffling still sees the order of the file. The number held back is rounded, and at least one.
///
/// # Errors
/// [`Error::EvalFraction`] when one side would be empty.
pub fn split(samples: &Samples, fraction: f64, seed: u64) -> Result<(Samples, Samples)> {
    let rows = samples.len();
    let count = ((rows as f64 * fraction).round() as usize).max(1);
    if !(fraction > 0.0 && fraction < 1.0 && count < rows) {
        return Err(Error::EvalFraction { rows, fraction });
    }
    let shuffled = ShuffledDataset::new(InMemDataset::new((0..rows).collect()), seed);
    let last = PartialDataset::new(shuffled, rows - count, rows);
    let mut is_held_back = vec![false; rows];
    last.iter().for_each(|row: usize| is_held_back[row] = true);
    let part = |held_back: bool| {
        let indices = is_held_back.iter().enumerate();
        samples.select(
            indices
                .filter(|(_, is)| **is == held_back)
                .map(|(row, _)| row),
        )
    };
    Ok((part(false)?, part(true)?))
}

/// The order in which an epoch sees its samples: another one for each seed and epoch, or the order
/// of the file.
pub fn epoch_order(len: usize, seed: u64, epoch: usize, shuffle: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    if shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch as u64);
        order.shuffle(&mut rng);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::super::Sample;
    use super::*;

    fn samples(rows: u32) -> Samples {
        let sample = |id| Sample {
            task: 0,
            input_ids: vec![id],
            labels: vec![-100],
        };
        (0..rows).map(sample).collect()
    }

    fn ids(samples: &Samples) -> Vec<u32> {
        samples.iter().map(|sample| sample.input_ids[0]).collect()
    }

    #[test]
    fn a_split_keeps_every_sample_once_and_in_order() {
        let (left, held_back) = split(&samples(20), 0.25, 1).expect("there are enough rows");
        let (left, held_back) = (ids(&left), ids(&held_back));
        assert_eq!((left.len(), held_back.len()), (15, 5));
        assert!(left.is_sorted() && held_back.is_sorted());
        let mut all = [left, held_back.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..20).collect::<Vec<_>>());
        let again = split(&samples(20), 0.25, 1).expect("there are enough rows");
        assert_eq!(ids(&again.1), held_back);
        let other = split(&samples(20), 0.25, 2).expect("there are enough rows");
        assert_ne!(ids(&other.1), held_back);
    }

    #[test]
    fn a_split_leaves_a_row_on_each_side_or_is_refused() {
        let (left, held_back) = split(&samples(2), 0.01, 0).expect("there are enough rows");
        assert_eq!((left.len(), held_back.len()), (1, 1));
        for (rows, fraction) in [
            (1, 0.5),
            (0, 0.5),
            (3, 0.9),
            (3, 0.0),
            (3, 1.0),
            (3, -1.0),
            (3, f64::NAN),
        ] {
            let message = split(&samples(rows), fraction, 0)
                .expect_err("one side is empty")
                .to_string();
            assert!(
                message.starts_with(&format!("data.eval_fraction = {fraction} of {rows} rows")),
                "{message}"
            );
        }
    }

    #[test]
    fn each_epoch_has_its_own_order_of_all_rows() {
        assert_eq!(epoch_order(4, 42, 3, false), [0, 1, 2, 3]);
        let first = epoch_order(50, 42, 0, true);
        assert_eq!(first, epoch_order(50, 42, 0, true));
        assert_ne!(first, epoch_order(50, 42, 1, true));
        assert_ne!(first, epoch_order(50, 43, 0, true));
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        assert!(epoch_order(0, 42, 0, true).is_empty());
    }
}
