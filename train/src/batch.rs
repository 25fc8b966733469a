//! From rows to what one optimizer step sees: windows of micro batches, on the host.
//!
//! Shapes: `b` rows, `s` positions of the longest row, `m` trained tokens.

use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};

use crate::data::{Sample, Samples, epoch_order};
use crate::recipe::{DataSection, TrainSection};

/// Rows side by side, padded at their ends to the longest.
///
/// Causal attention never looks at what follows a token, so padding needs no mask: it is only left
/// out of the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// `[b, s]`, row after row.
    input_ids: Vec<i32>,
    /// `[b, s]`.
    shape: [usize; 2],
    /// Where in `[b · s]` a trained token is predicted, `[m]`.
    at: Vec<i32>,
    /// Which token it is, `[m]`.
    targets: Vec<i32>,
    /// Trained tokens of each row.
    trained: Vec<usize>,
    /// Tokens without padding.
    tokens: usize,
}

impl MicroBatch {
    /// Puts rows side by side.
    pub fn new<'a>(rows: impl IntoIterator<Item = &'a Sample>) -> Self {
        let rows: Vec<&Sample> = rows.into_iter().collect();
        let s = rows
            .iter()
            .map(|row| row.input_ids.len())
            .max()
            .unwrap_or(0);
        let mut batch = Self {
            input_ids: vec![0; rows.len() * s],
            shape: [rows.len(), s],
            at: Vec::new(),
            targets: Vec::new(),
            trained: Vec::with_capacity(rows.len()),
            tokens: rows.iter().map(|row| row.input_ids.len()).sum(),
        };
        for (index, row) in rows.iter().enumerate() {
            let start = index * s;
            for (slot, id) in batch.input_ids[start..].iter_mut().zip(&row.input_ids) {
                *slot = *id as i32;
            }
            let before = batch.at.len();
            // position `i` predicts token `i + 1`
            let next = row.labels.iter().skip(1).enumerate();
            for (i, label) in next.filter(|(_, label)| **label >= 0) {
                batch.at.push((start + i) as i32);
                batch.targets.push(*label);
            }
            batch.trained.push(batch.at.len() - before);
        }
        batch
    }

    /// `[b, s]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The position of every token in its row, `[b · s]`.
    pub fn positions(&self) -> Vec<usize> {
        let [b, s] = self.shape;
        (0..b).flat_map(|_| 0..s).collect()
    }

    /// Token ids `[b, s]`.
    pub fn input_ids<B: Backend>(&self, device: &B::Device) -> Tensor<B, 2, Int> {
        Tensor::from_data(TensorData::new(self.input_ids.clone(), self.shape), device)
    }

    /// Where trained tokens are predicted, `[m]`, as indices into `[b · s]`.
    pub fn at<B: Backend>(&self, device: &B::Device) -> Tensor<B, 1, Int> {
        Tensor::from_data(TensorData::new(self.at.clone(), [self.at.len()]), device)
    }

    /// The trained tokens `[m]`.
    pub fn targets<B: Backend>(&self, device: &B::Device) -> Tensor<B, 1, Int> {
        Tensor::from_data(
            TensorData::new(self.targets.clone(), [self.targets.len()]),
            device,
        )
    }

    /// `m`.
    pub fn num_trained(&self) -> usize {
        self.targets.len()
    }

    /// Takes values of the trained tokens, `[m]`, apart: those of each row.
    pub fn by_row<'a, T>(&'a self, mut values: &'a [T]) -> impl Iterator<Item = &'a [T]> {
        self.trained.iter().map(move |&trained| {
            let (here, after) = values.split_at(trained);
            values = after;
            here
        })
    }

    /// Tokens without padding.
    pub fn num_tokens(&self) -> usize {
        self.tokens
    }
}

/// What one optimizer step sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// One after the other; their gradients add up.
    pub micro_batches: Vec<MicroBatch>,
    /// The optimizer step, counted from 0.
    pub step: usize,
    /// Rows seen after this step ÷ rows in the data.
    pub epoch: f64,
}

impl Window {
    /// Trained tokens of all micro batches.
    pub fn num_trained(&self) -> usize {
        self.micro_batches.iter().map(MicroBatch::num_trained).sum()
    }

    /// Tokens without padding of all micro batches.
    pub fn num_tokens(&self) -> usize {
        self.micro_batches.iter().map(MicroBatch::num_tokens).sum()
    }
}

/// All windows of a run: a pure function of the rows, the seed and the step, so that a resumed run
/// only has to know how far it was.
#[derive(Debug, Clone)]
pub struct Windows {
    rows: Samples,
    micro_batch_size: usize,
    rows_per_step: usize,
    total_rows: usize,
    seed: u64,
    shuffle: bool,
    first_step: usize,
}

impl Windows {
    /// The windows of a run over `rows`, from step `first_step` (counted from 0) on.
    ///
    /// `max_steps` windows are all full, over as many epochs as that takes; otherwise the last
    /// window holds what is left of `epochs`.
    pub fn new(rows: Samples, data: &DataSection, train: &TrainSection, first_step: usize) -> Self {
        let rows_per_step = train.micro_batch_size * train.gradient_accumulation_steps;
        let by_epochs = ((rows.len() as f64 * train.epochs).round() as usize).max(1);
        Self {
            total_rows: train
                .max_steps
                .map_or(by_epochs, |steps| steps * rows_per_step),
            rows,
            micro_batch_size: train.micro_batch_size,
            rows_per_step,
            seed: train.seed,
            shuffle: data.shuffle,
            first_step,
        }
    }

    /// Optimizer steps of the whole run.
    pub fn num_steps(&self) -> usize {
        self.total_rows.div_ceil(self.rows_per_step)
    }

    /// Tokens of the largest micro batch there can be, padding included.
    pub fn max_tokens(&self) -> usize {
        let longest = self.rows.lengths().max();
        self.micro_batch_size.min(self.total_rows) * longest.unwrap_or(0)
    }

    /// Whether step `step` (counted from 0) ends an epoch, or the run.
    pub fn ends_epoch(&self, step: usize) -> bool {
        let seen = |steps: usize| (steps * self.rows_per_step).min(self.total_rows);
        let epochs = |rows: usize| rows / self.rows.len();
        step + 1 == self.num_steps() || epochs(seen(step + 1)) > epochs(seen(step))
    }

    fn window(&self, step: usize, order: &mut Order) -> Window {
        let start = step * self.rows_per_step;
        let end = (start + self.rows_per_step).min(self.total_rows);
        let picked: Vec<usize> = (start..end).map(|at| order.row(self, at)).collect();
        let batch = |rows: &[usize]| {
            let rows: Vec<_> = rows.iter().map(|&row| self.rows.get(row)).collect();
            MicroBatch::new(&rows)
        };
        Window {
            micro_batches: picked.chunks(self.micro_batch_size).map(batch).collect(),
            step,
            epoch: end as f64 / self.rows.len() as f64,
        }
    }
}

/// The order of the epoch at hand.
#[derive(Debug, Default)]
struct Order {
    epoch: usize,
    rows: Vec<usize>,
}

impl Order {
    /// The row that comes `at`-th in the run.
    fn row(&mut self, windows: &Windows, at: usize) -> usize {
        let count = windows.rows.len();
        let epoch = at / count;
        if self.rows.is_empty() || self.epoch != epoch {
            self.rows = epoch_order(count, windows.seed, epoch, windows.shuffle);
            self.epoch = epoch;
        }
        self.rows[at % count]
    }
}

/// A host-side iterator with burn-train's progress.
struct Items<F> {
    next: usize,
    total: usize,
    make: F,
}

impl<T, F: FnMut(usize) -> T> Iterator for Items<F> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let index = self.next;
        (index < self.total).then(|| {
            self.next += 1;
            (self.make)(index)
        })
    }
}

impl<T, F: FnMut(usize) -> T> DataLoaderIterator<T> for Items<F> {
    fn progress(&self) -> Progress {
        Progress::new(self.next, self.total)
    }
}

impl<B: Backend> DataLoader<B, Window> for Windows {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Window> + 'a> {
        let mut order = Order::default();
        Box::new(Items {
            next: self.first_step,
            total: self.num_steps(),
            make: move |step| self.window(step, &mut order),
        })
    }

    fn num_items(&self) -> usize {
        self.num_steps()
    }

    fn to_device(&self, _: &B::Device) -> Arc<dyn DataLoader<B, Window>> {
        Arc::new(self.clone()) // host data
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, Window>> {
        Arc::new(Self {
            first_step: self.first_step + start,
            total_rows: (end * self.rows_per_step).min(self.total_rows),
            ..self.clone()
        })
    }
}

/// The evaluation rows in file order, a micro batch at a time.
#[derive(Debug, Clone)]
pub struct EvalBatches {
    rows: Samples,
    micro_batch_size: usize,
}

impl EvalBatches {
    /// Batches of `micro_batch_size` rows.
    pub fn new(rows: Samples, micro_batch_size: usize) -> Self {
        Self {
            rows,
            micro_batch_size,
        }
    }

    /// Whether there is nothing to evaluate.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The batches.
    pub fn batches(&self) -> impl ExactSizeIterator<Item = MicroBatch> {
        let (len, size) = (self.rows.len(), self.micro_batch_size);
        (0..len.div_ceil(size)).map(move |index| {
            let rows = index * size..len.min((index + 1) * size);
            let rows: Vec<_> = rows.map(|row| self.rows.get(row)).collect();
            MicroBatch::new(&rows)
        })
    }
}

impl<B: Backend> DataLoader<B, MicroBatch> for EvalBatches {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<MicroBatch> + 'a> {
        let mut batches = self.batches();
        Box::new(Items {
            next: 0,
            total: batches.len(),
            make: move |_| batches.next().expect("as many as `total`"),
        })
    }

    fn num_items(&self) -> usize {
        self.rows.len()
    }

    fn to_device(&self, _: &B::Device) -> Arc<dyn DataLoader<B, MicroBatch>> {
        Arc::new(self.clone()) // host data
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, MicroBatch>> {
        Arc::new(Self::new(
            (start..end).map(|row| self.rows.get(row)).collect(),
            self.micro_batch_size,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lengths: &[usize]) -> Samples {
        let row = |(index, length): (usize, &usize)| Sample {
            input_ids: (0..*length).map(|i| (10 * index + i) as u32).collect(),
            labels: (0..*length)
                .map(|i| if i < 2 { -100 } else { (10 * index + i) as i32 })
                .collect(),
        };
        lengths.iter().enumerate().map(row).collect()
    }

    fn windows(rows: Samples, train: TrainSection, shuffle: bool) -> Vec<Window> {
        let data = DataSection {
            shuffle,
            ..DataSection::default()
        };
        let windows = Windows::new(rows, &data, &train, 0);
        DataLoader::<burn::backend::Flex, Window>::iter(&windows).collect()
    }

    #[test]
    fn padding_is_neither_seen_nor_trained() {
        let batch = MicroBatch::new(&rows(&[5, 3]).iter().collect::<Vec<_>>());
        assert_eq!(batch.shape(), [2, 5]);
        assert_eq!(batch.input_ids, [0, 1, 2, 3, 4, 10, 11, 12, 0, 0]);
        assert_eq!(batch.at, [1, 2, 3, 6]);
        assert_eq!(batch.targets, [2, 3, 4, 12]);
        let by_row: Vec<_> = batch.by_row(&batch.targets).collect();
        assert_eq!(by_row, [&[2, 3, 4][..], &[12]]);
        assert_eq!(batch.num_tokens(), 8);
    }

    #[test]
    fn file_order_wraps_round_inside_a_window() {
        let train = TrainSection {
            max_steps: Some(3),
            micro_batch_size: 2,
            gradient_accumulation_steps: 2,
            ..TrainSection::default()
        };
        let all = windows(rows(&[3, 4, 5]), train, false);
        let lengths = |w: &Window| {
            w.micro_batches
                .iter()
                .map(|b| b.shape()[1])
                .collect::<Vec<_>>()
        };
        assert_eq!(
            all.iter().map(lengths).collect::<Vec<_>>(),
            [[4, 5], [5, 4], [5, 5]]
        );
        assert_eq!(all[2].epoch, 4.0);
    }

    #[test]
    fn epochs_end_with_what_is_left() {
        let train = TrainSection {
            epochs: 2.0,
            ..TrainSection::default()
        };
        let all = windows(rows(&[3; 5]), train.clone(), true);
        let sizes: Vec<_> = all.iter().map(|w| w.micro_batches[0].shape()[0]).collect();
        assert_eq!(sizes, [4, 4, 2]);
        let loader = Windows::new(rows(&[3; 5]), &DataSection::default(), &train, 0);
        assert_eq!(
            [0, 1, 2].map(|step| loader.ends_epoch(step)),
            [false, true, true]
        );
    }

    #[test]
    fn a_later_start_gives_the_same_windows() {
        let train = TrainSection {
            max_steps: Some(7),
            ..TrainSection::default()
        };
        let all = windows(rows(&[3, 4, 5, 6, 7, 8]), train.clone(), true);
        let resumed = Windows::new(
            rows(&[3, 4, 5, 6, 7, 8]),
            &DataSection::default(),
            &train,
            3,
        );
        let rest: Vec<_> = DataLoader::<burn::backend::Flex, Window>::iter(&resumed).collect();
        assert_eq!(rest, all[3..]);
        assert_ne!(all[0].micro_batches[0].input_ids[0..4], [0, 1, 2, 0]);
    }
}
