//! From rows to what one optimizer step sees: windows of micro batches, on the host.
//!
//! Shapes: `n` tokens, `m` trained tokens.

use std::cmp::Reverse;
use std::iter::repeat_n;
use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use model::segments::Segments;

use crate::data::{Packer, Sample, Samples, Sequences};
use crate::recipe::{DataSection, TrainSection};

/// Rows end to end. There is no padding, and none of them sees another.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// `[n]`.
    input_ids: Vec<i32>,
    /// The rows.
    segments: Segments,
    /// Where in `[n]` a trained token is predicted, `[m]`.
    at: Vec<i32>,
    /// Which token it is, `[m]`.
    targets: Vec<i32>,
    /// Trained tokens of each row.
    trained: Vec<usize>,
}

impl MicroBatch {
    /// Lays rows end to end.
    pub fn new<'a>(rows: impl IntoIterator<Item = &'a Sample>) -> Self {
        let mut batch = Self {
            input_ids: Vec::new(),
            segments: Segments::new([]),
            at: Vec::new(),
            targets: Vec::new(),
            trained: Vec::new(),
        };
        let (mut lengths, mut tasks) = (Vec::new(), Vec::new());
        for row in rows {
            let (start, before) = (batch.input_ids.len(), batch.at.len());
            batch
                .input_ids
                .extend(row.input_ids.iter().map(|id| *id as i32));
            // position `i` predicts token `i + 1`
            let next = row.labels.iter().skip(1).enumerate();
            for (i, label) in next.filter(|(_, label)| **label >= 0) {
                batch.at.push((start + i) as i32);
                batch.targets.push(*label);
            }
            batch.trained.push(batch.at.len() - before);
            lengths.push(row.input_ids.len());
            tasks.extend((!row.input_ids.is_empty()).then_some(row.task as usize));
        }
        batch.segments = Segments::new(lengths).of_tasks(tasks);
        batch
    }

    /// The rows.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Token ids `[n]`.
    pub fn input_ids<B: Backend>(&self, device: &B::Device) -> Tensor<B, 1, Int> {
        Tensor::from_data(
            TensorData::new(self.input_ids.clone(), [self.num_tokens()]),
            device,
        )
    }

    /// Where trained tokens are predicted, `[m]`, as indices into `[n]`.
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

    /// `n`.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }
}

/// What one optimizer step sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// One after the other; their gradients add up.
    pub micro_batches: Vec<MicroBatch>,
    /// The optimizer step, counted from 0.
    pub step: usize,
    /// Passes over the data after this step: sequences seen ÷ sequences of an epoch.
    pub epoch: f64,
    /// What the loss is multiplied by while gradients are computed, see `loss_scale`.
    pub loss_scale: f64,
}

impl Window {
    /// Trained tokens of all micro batches.
    pub fn num_trained(&self) -> usize {
        self.micro_batches.iter().map(MicroBatch::num_trained).sum()
    }

    /// Tokens of all micro batches.
    pub fn num_tokens(&self) -> usize {
        self.micro_batches.iter().map(MicroBatch::num_tokens).sum()
    }
}

/// All windows of a run: a pure function of the rows, the seed and the step, so that a resumed run
/// only has to know how far it was.
///
/// They are made of sequences: rows, or with packing several rows each.
#[derive(Debug, Clone)]
pub struct Windows {
    rows: Samples,
    packer: Packer,
    /// Sequences of an epoch.
    epoch_sequences: usize,
    micro_batch_size: usize,
    sequences_per_step: usize,
    total_sequences: usize,
    fill_ratio: Option<f64>,
    first_step: usize,
}

impl Windows {
    /// The windows of a run over `rows`, from step `first_step` (counted from 0) on.
    ///
    /// `max_steps` windows are all full, over as many epochs as that takes; otherwise the last
    /// window holds what is left of `epochs`.
    pub fn new(rows: Samples, data: &DataSection, train: &TrainSection, first_step: usize) -> Self {
        Self::behind(0, rows, data, train, first_step)
    }

    /// The same when `virtual_tokens` stand in front of every row: a sequence has room for fewer
    /// rows then.
    pub fn behind(
        virtual_tokens: usize,
        rows: Samples,
        data: &DataSection,
        train: &TrainSection,
        first_step: usize,
    ) -> Self {
        let lengths = rows.lengths().map(|length| virtual_tokens + length);
        let packer = Packer::new(lengths, data, train);
        let tokens = packer.tokens();
        let sequences_per_step = train.micro_batch_size * train.gradient_accumulation_steps;
        let by_epochs = ((tokens.len() as f64 * train.epochs).round() as usize).max(1);
        let total_sequences = train
            .max_steps
            .map_or(by_epochs, |steps| steps * sequences_per_step);
        let capacity = tokens.len() as f64 * data.max_length as f64; // which may be any number
        let fill_ratio = tokens.iter().sum::<usize>() as f64 / capacity;
        Self {
            rows,
            packer,
            epoch_sequences: tokens.len(),
            micro_batch_size: train.micro_batch_size,
            sequences_per_step,
            total_sequences,
            fill_ratio: data.packing.then_some(fill_ratio),
            first_step,
        }
    }

    /// Optimizer steps of the whole run.
    pub fn num_steps(&self) -> usize {
        self.total_sequences.div_ceil(self.sequences_per_step)
    }

    /// Sequences of an epoch: rows, or with packing several rows each.
    pub fn num_sequences(&self) -> usize {
        self.epoch_sequences
    }

    /// How full the sequences are, with packing: their tokens ÷ those that they could have.
    pub fn fill_ratio(&self) -> Option<f64> {
        self.fill_ratio
    }

    /// Tokens of the sequences of an epoch, virtual ones among them, the most first.
    pub fn sequence_tokens(&self) -> Vec<usize> {
        let mut tokens = self.packer.tokens();
        tokens.sort_unstable_by_key(|tokens| Reverse(*tokens));
        tokens
    }

    /// Tokens of the largest micro batch, virtual ones among them; of the largest that there can be, where all of them are
    /// too many to look at.
    pub fn max_tokens(&self) -> usize {
        let (epoch, size) = (self.epoch_sequences, self.micro_batch_size);
        let total = self.total_sequences;
        if self.packer.is_shuffled() && (self.packer.packs() || total > SEQUENCES_LOOKED_AT) {
            // sequences that are packed are all about as long
            return max_tokens(&self.sequence_tokens(), size, total);
        }
        let mut order = Order::default();
        let mut tokens = |first: usize| -> usize {
            let all = first..total.min(first + size);
            all.map(|at| self.packer.tokens_of(order.rows(self, at)))
                .sum()
        };
        // in file order all comes again once a micro batch begins with the first sequence
        let again =
            |first: &usize| !self.packer.is_shuffled() && *first > 0 && first.is_multiple_of(epoch);
        let firsts = (0..total).step_by(size).take_while(|first| !again(first));
        firsts.map(&mut tokens).max().unwrap_or(0)
    }

    /// Whether step `step` (counted from 0) ends an epoch, or the run.
    pub fn ends_epoch(&self, step: usize) -> bool {
        let seen = |steps: usize| (steps * self.sequences_per_step).min(self.total_sequences);
        let epochs = |sequences: usize| sequences / self.epoch_sequences;
        step + 1 == self.num_steps() || epochs(seen(step + 1)) > epochs(seen(step))
    }

    fn window(&self, step: usize, order: &mut Order) -> Window {
        let start = step * self.sequences_per_step;
        let end = (start + self.sequences_per_step).min(self.total_sequences);
        let micro_batch = |first: usize| {
            let last = end.min(first + self.micro_batch_size);
            let rows = (first..last).flat_map(|at| order.rows(self, at).to_vec());
            let rows: Vec<Sample> = rows.map(|row| self.rows.get(row)).collect();
            MicroBatch::new(&rows)
        };
        let starts = (start..end).step_by(self.micro_batch_size);
        Window {
            micro_batches: starts.map(micro_batch).collect(),
            step,
            epoch: end as f64 / self.epoch_sequences as f64,
            loss_scale: 1.0,
        }
    }
}

/// Sequences of a run whose order is made to find its largest micro batch.
const SEQUENCES_LOOKED_AT: usize = 1 << 20;

/// The tokens of the largest micro batch there can be, of sequences of these `tokens`, the most
/// first.
fn max_tokens(tokens: &[usize], micro_batch_size: usize, total_sequences: usize) -> usize {
    // One that goes on in the next epoch can have a sequence of this one again.
    let (epoch, size) = (tokens.len(), micro_batch_size.min(total_sequences));
    let times = match total_sequences <= epoch || epoch.is_multiple_of(size) {
        true => 1,
        false => 1 + (size - 1).div_ceil(epoch),
    };
    let all = tokens.iter().flat_map(|tokens| repeat_n(tokens, times));
    all.take(size).sum()
}

/// The order of the epoch at hand.
#[derive(Debug, Default)]
struct Order {
    epoch: usize,
    sequences: Sequences,
}

impl Order {
    /// The rows of the sequence that comes `at`-th in the run.
    fn rows(&mut self, windows: &Windows, at: usize) -> &[usize] {
        let epoch = at / windows.epoch_sequences;
        if self.sequences.is_empty() || self.epoch != epoch {
            self.sequences = windows.packer.epoch(epoch);
            self.epoch = epoch;
        }
        self.sequences.get(at % windows.epoch_sequences)
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
            total_sequences: (end * self.sequences_per_step).min(self.total_sequences),
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
            task: 0,
            input_ids: (0..*length).map(|i| (10 * index + i) as u32).collect(),
            labels: (0..*length)
                .map(|i| if i < 2 { -100 } else { (10 * index + i) as i32 })
                .collect(),
        };
        lengths.iter().enumerate().map(row).collect()
    }

    fn data(packing: bool, shuffle: bool) -> DataSection {
        DataSection {
            max_length: 10,
            packing,
            shuffle,
            ..DataSection::default()
        }
    }

    fn windows(rows: Samples, train: TrainSection, data: &DataSection) -> Vec<Window> {
        all(&Windows::new(rows, data, &train, 0))
    }

    fn all(windows: &Windows) -> Vec<Window> {
        DataLoader::<burn::backend::Flex, Window>::iter(windows).collect()
    }

    /// The lengths of the rows of each micro batch.
    fn lengths(window: &Window) -> Vec<Vec<usize>> {
        let lengths =
            |batch: &MicroBatch| batch.segments.iter().map(|row| row.queries.len()).collect();
        window.micro_batches.iter().map(lengths).collect()
    }

    #[test]
    fn rows_lie_end_to_end_without_padding() {
        let batch = MicroBatch::new(&rows(&[5, 3]).iter().collect::<Vec<_>>());
        assert_eq!(batch.segments, Segments::new([5, 3]));
        assert_eq!(batch.input_ids, [0, 1, 2, 3, 4, 10, 11, 12]);
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
        let of = |rows, packing| windows(rows, train.clone(), &data(packing, false));
        let plain = of(rows(&[3, 4, 5]), false);
        let expected = [
            [vec![3, 4], vec![5, 3]],
            [vec![4, 5], vec![3, 4]],
            [vec![5, 3], vec![4, 5]],
        ];
        assert_eq!(plain.iter().map(lengths).collect::<Vec<_>>(), expected);
        assert_eq!(plain[2].epoch, 4.0);
        // the same with sequences of up to 10 tokens
        let packed = of(rows(&[3, 4, 5, 4, 9]), true);
        let expected = [
            [vec![3, 4, 5, 4], vec![9, 3, 4]],
            [vec![5, 4, 9], vec![3, 4, 5, 4]],
            [vec![9, 3, 4], vec![5, 4, 9]],
        ];
        assert_eq!(packed.iter().map(lengths).collect::<Vec<_>>(), expected);
        assert_eq!(packed[2].epoch, 4.0);
    }

    #[test]
    fn rows_may_have_any_number_of_tokens() {
        let any = DataSection {
            max_length: i64::MAX as usize,
            ..DataSection::default()
        };
        for packing in [false, true] {
            let data = DataSection {
                packing,
                ..any.clone()
            };
            let windows = Windows::new(rows(&[3, 4, 5]), &data, &TrainSection::default(), 0);
            assert_eq!(windows.max_tokens(), 12);
            assert_eq!(windows.fill_ratio().is_some(), packing);
        }
    }

    #[test]
    fn epochs_end_with_what_is_left() {
        let train = TrainSection {
            epochs: 2.0,
            ..TrainSection::default()
        };
        for (packing, rows) in [(false, rows(&[3; 5])), (true, rows(&[5; 9]))] {
            let loader = Windows::new(rows, &data(packing, true), &train, 0);
            assert_eq!((loader.num_sequences(), loader.num_steps()), (5, 3));
            let tokens = all(&loader).into_iter().map(|window| window.num_tokens());
            let twice = 2 * loader
                .rows
                .iter()
                .map(|row| row.input_ids.len())
                .sum::<usize>();
            assert_eq!(tokens.sum::<usize>(), twice);
            assert_eq!(
                [0, 1, 2].map(|step| loader.ends_epoch(step)),
                [false, true, true]
            );
        }
    }

    #[test]
    fn a_later_start_gives_the_same_windows() {
        let train = TrainSection {
            max_steps: Some(7),
            ..TrainSection::default()
        };
        for packing in [true, false] {
            let (rows, data) = (rows(&[3, 4, 5, 6, 7, 8, 2, 2, 1]), data(packing, true));
            let whole = windows(rows.clone(), train.clone(), &data);
            let resumed = Windows::new(rows, &data, &train, 3);
            assert_eq!(all(&resumed), whole[3..]);
            assert_ne!(whole[0], whole[3]);
        }
    }

    #[test]
    fn the_largest_micro_batch_is_the_one_there_is() {
        for (lengths, shuffle, epochs) in [
            (&[9, 1, 9, 1, 8, 8, 2][..], false, 1.0), // 9 and 9 never meet
            (&[9, 1, 9, 1, 8, 8, 2], false, 3.0),
            (&[9, 1, 1, 9], false, 2.0),
            (&[9, 1, 9, 1, 8, 8, 2], true, 5.0),
        ] {
            let train = TrainSection {
                micro_batch_size: 2,
                epochs,
                ..TrainSection::default()
            };
            let windows = Windows::new(rows(lengths), &data(false, shuffle), &train, 0);
            let batches = all(&windows)
                .into_iter()
                .flat_map(|window| window.micro_batches);
            let most = batches.map(|batch| batch.num_tokens()).max();
            assert_eq!(Some(windows.max_tokens()), most, "{lengths:?} {epochs}");
        }
    }

    #[test]
    fn the_largest_micro_batch_there_can_be_holds_the_longest_sequences() {
        let train = TrainSection {
            micro_batch_size: 2,
            epochs: 9.0,
            ..TrainSection::default()
        };
        for (packing, most) in [(false, 8 + 7), (true, 10 + 10)] {
            let rows = rows(&[3, 7, 2, 8, 4, 5]); // 8 + 2, 7 + 3, 5 + 4
            let windows = Windows::new(rows, &data(packing, true), &train, 0);
            assert_eq!(windows.max_tokens(), most);
            let batches = all(&windows)
                .into_iter()
                .flat_map(|window| window.micro_batches);
            let tokens: Vec<_> = batches.map(|batch| batch.num_tokens()).collect();
            assert_eq!(tokens.iter().max(), Some(&most));
            if !packing {
                assert!(tokens[..3].iter().all(|other| *other <= tokens[0]));
            }
        }
        assert_eq!(max_tokens(&[9, 5, 4], 2, 3), 9 + 5);
        assert_eq!(max_tokens(&[9, 5, 4], 2, 4), 9 + 9); // one of each epoch
        assert_eq!(max_tokens(&[9], 4, 8), 4 * 9);
        assert_eq!(max_tokens(&[9, 5], 4, 1), 9);
    }
}
