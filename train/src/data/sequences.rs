//! Which rows go together, and in which order an epoch sees them.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::epoch_order;
use crate::recipe::{DataSection, TrainSection};

/// Decides the sequences of every epoch: single rows, or with packing as many as fit.
///
/// An epoch has every row once, and every epoch has equally many sequences.
#[derive(Debug, Clone)]
pub struct Packer {
    /// Tokens of each row.
    lengths: Arc<[usize]>,
    /// The most tokens of a sequence of several rows; `None` does not pack.
    capacity: Option<usize>,
    shuffle: bool,
    seed: u64,
    micro_batch_size: usize,
}

/// The sequences of an epoch: rows that lie end to end.
#[derive(Debug, Clone, Default)]
pub struct Sequences {
    /// The rows, sequence after sequence.
    rows: Vec<usize>,
    /// Where in `rows` each sequence ends.
    ends: Vec<usize>,
    /// Which sequence comes when.
    order: Vec<usize>,
}

impl Packer {
    /// Sequences of rows of these lengths.
    pub fn new(
        lengths: impl IntoIterator<Item = usize>,
        data: &DataSection,
        train: &TrainSection,
    ) -> Self {
        Self {
            lengths: lengths.into_iter().collect(),
            capacity: data.packing.then_some(data.max_length),
            shuffle: data.shuffle,
            seed: train.seed,
            micro_batch_size: train.micro_batch_size,
        }
    }

    /// The sequences of an epoch, a pure function of the lengths, the seed and the epoch.
    ///
    /// Packing with shuffling is best-fit-decreasing: the longest row first, each where it leaves
    /// the least room. How long the rows of a sequence are depends on the lengths alone; which of
    /// the rows of a length it gets, and when it comes, is another matter in every epoch.
    ///
    /// Packing in file order is next-fit: a sequence takes the next rows as long as they fit.
    ///
    /// The first epoch of a run that shuffles begins with its largest micro batch, so that memory
    /// that does not suffice shows at once. In file order the order is that of the file, whatever
    /// it costs.
    pub fn epoch(&self, epoch: usize) -> Sequences {
        let count = self.lengths.len();
        let mut rows = epoch_order(count, self.seed, epoch, self.shuffle);
        let placed: Vec<usize> = match (self.capacity, self.shuffle) {
            (None, _) => (0..count).collect(),
            (Some(capacity), false) => self.next_fit(&rows, capacity),
            (Some(capacity), true) => {
                rows.sort_by_key(|&row| Reverse(self.lengths[row])); // stable
                self.best_fit(&rows, capacity)
            }
        };
        let num_sequences = placed.iter().max().map_or(0, |last| last + 1);
        let order = match self.capacity {
            None => (0..num_sequences).collect(), // the rows are shuffled
            // by other random numbers than the rows
            Some(_) => epoch_order(num_sequences, !self.seed, epoch, self.shuffle),
        };
        let mut sequences = Sequences::new(&rows, &placed, order);
        if epoch == 0 && self.shuffle {
            sequences.put_largest_first(self.micro_batch_size, |rows| self.tokens_of(rows));
        }
        sequences
    }

    /// The tokens of each sequence of an epoch; every epoch has the same numbers.
    pub fn tokens(&self) -> Vec<usize> {
        let sequences = self.epoch(0);
        let tokens = |at| self.tokens_of(sequences.get(at));
        (0..sequences.len()).map(tokens).collect()
    }

    /// Whether every epoch has another order.
    pub(crate) fn is_shuffled(&self) -> bool {
        self.shuffle
    }

    /// Whether sequences have several rows.
    pub(crate) fn packs(&self) -> bool {
        self.capacity.is_some()
    }

    /// The tokens of some rows.
    pub(crate) fn tokens_of(&self, rows: &[usize]) -> usize {
        rows.iter().map(|&row| self.lengths[row]).sum()
    }

    /// The sequence of each row.
    fn next_fit(&self, rows: &[usize], capacity: usize) -> Vec<usize> {
        let (mut sequence, mut room) = (0, capacity);
        let mut place = |&row: &usize| {
            let length = self.lengths[row];
            if length > room && room < capacity {
                (sequence, room) = (sequence + 1, capacity);
            }
            room = room.saturating_sub(length);
            sequence
        };
        rows.iter().map(&mut place).collect()
    }

    /// The sequence of each row.
    fn best_fit(&self, rows: &[usize], capacity: usize) -> Vec<usize> {
        let mut count = 0;
        let mut rooms = BTreeSet::new(); // of the sequences so far, and their numbers
        let mut place = |&row: &usize| {
            let length = self.lengths[row];
            let best = rooms.range((length, 0)..).next().copied();
            let (room, sequence) = best.unwrap_or_else(|| {
                count += 1;
                (capacity, count - 1)
            });
            rooms.remove(&(room, sequence));
            rooms.insert((room.saturating_sub(length), sequence));
            sequence
        };
        rows.iter().map(&mut place).collect()
    }
}

impl Sequences {
    /// `placed` has the sequence of each of `rows`.
    fn new(rows: &[usize], placed: &[usize], order: Vec<usize>) -> Self {
        let mut ends = vec![0; order.len()];
        placed.iter().for_each(|&sequence| ends[sequence] += 1);
        let mut next = Vec::with_capacity(order.len()); // place of each sequence's next row
        let mut end = 0;
        for count in &mut ends {
            next.push(end);
            end += *count;
            *count = end;
        }
        let mut by_sequence = vec![0; rows.len()];
        for (&row, &sequence) in rows.iter().zip(placed) {
            by_sequence[next[sequence]] = row;
            next[sequence] += 1;
        }
        Self {
            rows: by_sequence,
            ends,
            order,
        }
    }

    /// How many sequences there are.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The rows of the sequence that comes `at`-th.
    pub fn get(&self, at: usize) -> &[usize] {
        let sequence = self.order[at];
        let start = sequence
            .checked_sub(1)
            .map_or(0, |before| self.ends[before]);
        &self.rows[start..self.ends[sequence]]
    }

    /// Of the micro batches of `size` sequences, exchanges the first one for the largest.
    fn put_largest_first(&mut self, size: usize, tokens_of: impl Fn(&[usize]) -> usize) {
        let tokens = |batch: usize| -> usize {
            let all = batch * size..(batch + 1) * size;
            all.map(|at| tokens_of(self.get(at))).sum()
        };
        let batches = (0..self.len() / size).map(|batch| (tokens(batch), Reverse(batch)));
        if let Some((_, Reverse(largest))) = batches.max() {
            for i in 0..size {
                self.order.swap(i, largest * size + i);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn packer(lengths: &[usize], max_length: usize, shuffle: bool) -> Packer {
        let data = DataSection {
            max_length,
            shuffle,
            ..DataSection::default()
        };
        Packer::new(lengths.iter().copied(), &data, &TrainSection::default())
    }

    fn all(sequences: &Sequences) -> Vec<&[usize]> {
        (0..sequences.len()).map(|at| sequences.get(at)).collect()
    }

    /// The rows of each sequence, in the order of the rows.
    fn sorted(sequences: &Sequences) -> Vec<Vec<usize>> {
        let sort = |rows: &[usize]| {
            let mut rows = rows.to_vec();
            rows.sort_unstable();
            rows
        };
        all(sequences).into_iter().map(sort).collect()
    }

    /// Lengths as those of real rows: many short ones, some long ones.
    fn lengths(count: usize) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let length = |_| {
            let (a, b) = (rng.random_range(0..200), rng.random_range(0..300));
            60 + a + b
        };
        (0..count).map(length).collect()
    }

    #[test]
    fn an_epoch_has_every_row_once_and_no_sequence_too_long() {
        let lengths = lengths(1000);
        for shuffle in [true, false] {
            let packer = packer(&lengths, 600, shuffle);
            let counts = packer.tokens().len();
            for epoch in 0..3 {
                let sequences = packer.epoch(epoch);
                assert_eq!(sequences.len(), counts, "every epoch has equally many");
                for rows in all(&sequences) {
                    assert!(!rows.is_empty() && packer.tokens_of(rows) <= 600);
                }
                let mut rows = all(&sequences).concat();
                if shuffle {
                    rows.sort_unstable();
                }
                assert_eq!(rows, (0..1000).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn every_epoch_packs_other_rows_together_in_another_order() {
        let packer = packer(&lengths(4000), 1024, true);
        let (first, second) = (packer.epoch(0), packer.epoch(1));
        assert_eq!(all(&first), all(&packer.epoch(0)));
        let same = all(&first)
            .into_iter()
            .zip(all(&second))
            .filter(|(a, b)| a == b);
        assert_eq!(same.count(), 0);
        let (first, second) = (sorted(&first), sorted(&second));
        let again = second.iter().filter(|rows| first.contains(rows)).count();
        assert!(again < first.len() / 10, "{again} of {}", first.len());
    }

    #[test]
    fn sequences_are_full() {
        for (max_length, least) in [(1024, 0.98), (4096, 0.99)] {
            let tokens = packer(&lengths(5000), max_length, true).tokens();
            let (sum, capacity) = (tokens.iter().sum::<usize>(), tokens.len() * max_length);
            let filled = sum as f64 / capacity as f64;
            assert!(filled > least && filled <= 1.0, "{max_length}: {filled}");
        }
    }

    #[test]
    fn a_sequence_in_file_order_takes_the_next_rows_that_fit() {
        let packer = packer(&[5, 5, 1, 10, 12, 3, 8], 10, false);
        let sequences = packer.epoch(1);
        let expected: [&[usize]; 6] = [&[0, 1], &[2], &[3], &[4], &[5], &[6]];
        assert_eq!(all(&sequences), expected);
    }

    #[test]
    fn each_row_goes_where_it_leaves_the_least_room() {
        let packer = packer(&[2, 6, 3, 7, 2, 40], 10, true);
        let mut rows = sorted(&packer.epoch(0));
        rows.sort();
        assert_eq!(rows, [vec![0, 1, 4], vec![2, 3], vec![5]]);
    }

    #[test]
    fn the_largest_micro_batch_comes_first() {
        let lengths = lengths(101);
        let packer = packer(&lengths, 100, true); // hardly any two fit together
        let tokens = |rows: &[&[usize]]| packer.tokens_of(&rows.concat());
        let mut sequences = packer.epoch(1);
        let mut before = sorted(&sequences);
        sequences.put_largest_first(4, |rows| packer.tokens_of(rows));
        let batches: Vec<_> = all(&sequences).chunks_exact(4).map(tokens).collect();
        assert_eq!(batches.iter().max(), batches.first());
        let mut after = sorted(&sequences);
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b);
        assert_eq!(moved.count(), 8);
        before.sort();
        after.sort();
        assert_eq!(before, after);
        let first = packer.epoch(0);
        let batches: Vec<_> = all(&first).chunks_exact(4).map(tokens).collect();
        assert_eq!(batches.iter().max(), batches.first());
    }
}
