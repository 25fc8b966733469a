//! Learned vectors that stand in front of every row, in place of words: what prompt, multitask
//! prompt, P- and prefix tuning train.
//!
//! Shapes: `p` virtual tokens, `e` width of their embeddings, `d` hidden, `l` layers, `w` = `n_kv ·
//! h_d`, `t` tasks, `r` rank, `h` hidden size of an encoder.
//!
//! Source: <https://arxiv.org/abs/2104.08691> (prompt), <https://arxiv.org/abs/2103.10385> (P),
//! <https://arxiv.org/abs/2303.02861> (multitask), <https://arxiv.org/abs/2101.00190> (prefix), and
//! PEFT's `prompt_encoder` modules, whose names the fields have.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, TensorData, activation, backend::Backend};

use crate::ops::{MatmulBackend, cat, matmul};
use crate::segments::Segments;

/// Virtual tokens in front of every row.
#[derive(Module, Debug)]
pub struct VirtualTokens<B: Backend> {
    /// `[p, e]`.
    pub embedding: Param<Tensor<B, 2>>,
    /// Makes of the embeddings what stands in front of the rows; without, they do.
    pub encoder: Option<Encoder<B>>,
    /// How the tokens of one task differ from those of another.
    pub tasks: Option<Tasks<B>>,
    /// Where they enter the network.
    #[module(skip)]
    pub place: Place,
}

/// Where virtual tokens enter the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Beside the embeddings of words, `[p, d]`, at the first positions of each row.
    Embeddings,
    /// As keys and values in front of those of each row, `[p, 2l · w]`: keys, then values of one
    /// layer after the other. They are not turned by their positions, the first of each row.
    KeysAndValues,
}

/// Layers that are trained together with the embeddings and left out of what is saved.
#[derive(Module, Debug)]
pub struct Encoder<B: Backend> {
    /// Bidirectional, the first one first.
    pub lstm: Vec<Lstm<B>>,
    /// After these.
    pub layers: Vec<Dense<B>>,
    /// Between the `layers`.
    #[module(skip)]
    pub activation: Activation,
}

/// What stands between two layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// The hyperbolic tangent.
    Tanh,
}

/// `y = x Wᵀ + b`.
#[derive(Module, Debug)]
pub struct Dense<B: Backend> {
    /// `[out, in]`.
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`.
    pub bias: Param<Tensor<B, 1>>,
}

/// A layer that reads the tokens in order and in reverse.
#[derive(Module, Debug)]
pub struct Lstm<B: Backend> {
    /// Reads from the first token on.
    pub ahead: LstmCell<B>,
    /// Reads from the last token on.
    pub reverse: LstmCell<B>,
}

/// The weights of one direction: rows of the input, forget, cell and output gates.
#[derive(Module, Debug)]
pub struct LstmCell<B: Backend> {
    /// `[4h, in]`.
    pub weight_ih: Param<Tensor<B, 2>>,
    /// `[4h, h]`.
    pub weight_hh: Param<Tensor<B, 2>>,
    /// `[4h]`.
    pub bias_ih: Param<Tensor<B, 1>>,
    /// `[4h]`.
    pub bias_hh: Param<Tensor<B, 1>>,
}

/// Factors of low rank on the embeddings, for each task its own.
#[derive(Module, Debug)]
pub struct Tasks<B: Backend> {
    /// `[t, p, r]`.
    pub prefix_task_cols: Param<Tensor<B, 3>>,
    /// `[t, r, d]`.
    pub prefix_task_rows: Param<Tensor<B, 3>>,
}

impl<B: Backend> VirtualTokens<B> {
    /// `p`.
    pub fn count(&self) -> usize {
        let [p, _] = self.embedding.dims();
        p
    }
}

impl<B: MatmulBackend> VirtualTokens<B> {
    /// What stands in front of the rows of each of these tasks, one block of `p` after the other:
    /// `[tasks · p, ..]`. Without factors the tasks do not differ, and there is one block.
    ///
    /// # Panics
    /// If there is no such task.
    pub fn encode(&self, tasks: &[usize]) -> Tensor<B, 2> {
        let x = self.embedding.val();
        let x = match &self.encoder {
            Some(encoder) => encoder.forward(x),
            None => x,
        };
        match &self.tasks {
            Some(factors) => (factors.of(tasks) * x.unsqueeze()).flatten(0, 1),
            None => x,
        }
    }

    /// The tasks that occur in some rows, and for each row which of them it is of; a lone 0 if they
    /// do not differ.
    pub(crate) fn tasks_of(&self, segments: &Segments) -> (Vec<usize>, Vec<usize>) {
        let rows: Vec<usize> = match self.tasks {
            Some(_) => segments.tasks().collect(),
            None => vec![0; segments.rows()],
        };
        let mut tasks = rows.clone();
        tasks.sort_unstable();
        tasks.dedup();
        let block = |task: &usize| tasks.partition_point(|other| other < task);
        let blocks = rows.iter().map(block).collect();
        (tasks, blocks)
    }
}

impl<B: MatmulBackend> Tasks<B> {
    /// The factors of some tasks, `[tasks, p, d]`.
    fn of(&self, tasks: &[usize]) -> Tensor<B, 3> {
        let device = self.prefix_task_cols.val().device();
        let [t, _, _] = self.prefix_task_cols.dims();
        assert!(tasks.iter().all(|task| *task < t), "{tasks:?} of {t} tasks");
        let ids: Vec<i64> = tasks.iter().map(|task| *task as i64).collect();
        let ids = TensorData::new(ids, [tasks.len()]);
        let ids = Tensor::<B, 1, Int>::from_data(ids, &device);
        let cols = self.prefix_task_cols.val().select(0, ids.clone());
        let rows = self.prefix_task_rows.val().select(0, ids);
        matmul(cols, rows)
    }
}

impl<B: MatmulBackend> Encoder<B> {
    /// `[p, e]` to `[p, ..]`.
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = self.lstm.iter().fold(x, |x, layer| layer.forward(x));
        let mut layers = self.layers.iter();
        let first = layers.next().map(|layer| layer.forward(x.clone()));
        layers.fold(first.unwrap_or(x), |x, layer| {
            layer.forward(match self.activation {
                Activation::Relu => activation::relu(x),
                Activation::Tanh => x.tanh(),
            })
        })
    }
}

impl<B: MatmulBackend> Dense<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        matmul(x, self.weight.val().transpose()) + self.bias.val().unsqueeze()
    }
}

impl<B: MatmulBackend> Lstm<B> {
    /// `[p, in]` to `[p, 2h]`.
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let [p, _] = x.dims();
        let ahead = self.ahead.forward(x.clone(), 0..p);
        let mut reverse = self.reverse.forward(x, (0..p).rev());
        reverse.reverse();
        cat(vec![cat(ahead, 0), cat(reverse, 0)], 1)
    }
}

impl<B: MatmulBackend> LstmCell<B> {
    /// The states `[1, h]` after each token of `x` `[p, in]`, in the order in which they are read.
    fn forward(&self, x: Tensor<B, 2>, order: impl Iterator<Item = usize>) -> Vec<Tensor<B, 2>> {
        let [_, h] = self.weight_hh.dims();
        let bias = self.bias_ih.val() + self.bias_hh.val();
        let inputs = matmul(x, self.weight_ih.val().transpose()) + bias.unsqueeze(); // [p, 4h]
        let device = inputs.device();
        let (mut state, mut cell) = (
            Tensor::zeros([1, h], &device),
            Tensor::zeros([1, h], &device),
        );
        let step = |at: usize| {
            let gates = inputs.clone().narrow(0, at, 1)
                + matmul(state.clone(), self.weight_hh.val().transpose()); // [1, 4h]
            let gate = |index: usize| gates.clone().narrow(1, index * h, h);
            let sigmoid = |index: usize| activation::sigmoid(gate(index));
            cell = sigmoid(1) * cell.clone() + sigmoid(0) * gate(2).tanh();
            state = sigmoid(3) * cell.clone().tanh();
            state.clone()
        };
        order.map(step).collect()
    }
}

/// Learned keys and values in front of each row's own, of one layer or of all.
#[derive(Debug, Clone)]
pub struct Prefix<B: Backend> {
    /// Keys and values, `[2, p, w]` or `[2l, p, w]`.
    pub keys_and_values: Tensor<B, 3>,
    /// For each key of a row with its prefix, where it is in `[prefix, own keys]` end to end.
    pub places: Tensor<B, 1, Int>,
}

impl<B: Backend> Prefix<B> {
    /// That of one of all layers.
    pub fn layer(&self, index: usize) -> Self {
        Self {
            keys_and_values: self.keys_and_values.clone().narrow(0, 2 * index, 2),
            places: self.places.clone(),
        }
    }

    /// Keys and values of all rows' tokens, `[n, n_kv, h_d]` each, with the layer's prefix in front
    /// of each row's.
    pub fn before(&self, k: Tensor<B, 3>, v: Tensor<B, 3>) -> (Tensor<B, 3>, Tensor<B, 3>) {
        let before = |part: usize, own: Tensor<B, 3>| {
            let [n, n_kv, h_d] = own.dims();
            let own = own.reshape([n, n_kv * h_d]);
            let all = in_front(self.part(part), own, self.places.clone());
            let [m, _] = all.dims();
            all.reshape([m, n_kv, h_d])
        };
        (before(0, k), before(1, v))
    }

    /// Keys and values of the layer for `rows` rows, `[rows · p, n_kv, h_d]` each.
    pub(crate) fn repeated(&self, rows: usize, n_kv: usize) -> (Tensor<B, 3>, Tensor<B, 3>) {
        let repeated = |part: usize| {
            let [_, p, width] = self.keys_and_values.dims();
            let all = self.part(part).repeat_dim(0, rows);
            all.reshape([rows * p, n_kv, width / n_kv])
        };
        (repeated(0), repeated(1))
    }

    /// Keys or values of the layer, `[p, w]`.
    fn part(&self, part: usize) -> Tensor<B, 2> {
        let part = self.keys_and_values.clone().narrow(0, part, 1);
        part.squeeze_dim(0)
    }
}

/// Puts blocks of `blocks` `[.., w]` in front of the rows of `own` `[n, w]`: `[m, w]`, of which each
/// is the one at its place in both end to end.
pub(crate) fn in_front<B: Backend>(
    blocks: Tensor<B, 2>,
    own: Tensor<B, 2>,
    places: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    cat(vec![blocks, own], 0).select(0, places)
}

/// The places for [`in_front`], when the row's block is that of `blocks`, of `count` blocks of `p`.
pub(crate) fn places(segments: &Segments, blocks: &[usize], count: usize, p: usize) -> Vec<i64> {
    let mut places = Vec::new();
    for (row, block) in segments.iter().zip(blocks) {
        places.extend(block * p..(block + 1) * p);
        places.extend(row.queries.map(|at| count * p + at));
    }
    places.into_iter().map(|place| place as i64).collect()
}

/// Which positions are tokens when `p` others stand in front of each row.
pub(crate) fn tokens(segments: &Segments, p: usize) -> Vec<i64> {
    let rows = segments.iter().enumerate();
    let tokens = rows.flat_map(|(index, row)| row.queries.map(move |at| at + (index + 1) * p));
    tokens.map(|place| place as i64).collect()
}
