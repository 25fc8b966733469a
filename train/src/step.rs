//! One training step: the loss of a window and its gradients.
//!
//! The loss is the sum of token cross entropies over the whole window divided by the number of
//! trained tokens in it, so that one batch of eight rows and eight batches of one are the same
//! step.

use adapters::{AdaptedBackend, AdaptedLlama, TrainBackend, set_dropout};
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Tensor, backend::Backend};
use burn::train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};
use model::ops;
use model::rope::Rope;

use crate::batch::{MicroBatch, Window};

/// Largest number of logits that exist at a time (64 MiB of f32).
const LOGITS_AT_A_TIME: usize = 1 << 24;

/// A causal language model as burn-train's learner sees it.
#[derive(Module, Debug)]
pub struct CausalLm<B: Backend> {
    /// The model.
    pub model: AdaptedLlama<B>,
    /// Dropout before `lora_a`, while training.
    pub dropout: f64,
    /// Decides what is dropped.
    #[module(skip)]
    pub seed: u64,
}

/// What a step reports; the fields after `tokens` are filled in by the loop around it.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepItem {
    /// Mean cross entropy of the trained tokens.
    pub loss: f64,
    /// Trained tokens.
    pub trained_tokens: usize,
    /// All tokens, without padding.
    pub tokens: usize,
    /// Rows seen ÷ rows in the data.
    pub epoch: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Wall time.
    pub seconds: f64,
}

impl ItemLazy for StepItem {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

impl<B: TrainBackend> TrainStep for CausalLm<B> {
    type Input = Window;
    type Output = StepItem;

    fn step(&self, window: Window) -> TrainOutput<StepItem> {
        let trained_tokens = window.num_trained();
        let mut gradients = GradientsAccumulator::new();
        let mut total: Option<Tensor<B::InnerBackend, 1>> = None;
        for (index, batch) in window.micro_batches.iter().enumerate() {
            let mut lm = self.clone();
            if self.dropout > 0.0 {
                let seed = self.seed ^ ((window.step as u64) << 20 | index as u64);
                set_dropout(&mut lm.model, self.dropout, seed);
            }
            let sum = lm.accumulate(batch, 1.0 / trained_tokens as f64, &mut gradients);
            total = Some(match total {
                Some(total) => total + sum,
                None => sum,
            });
        }
        let total = total.map_or(0.0, |total| f64::from(total.into_scalar_f32()));
        TrainOutput {
            grads: gradients.grads(),
            item: StepItem {
                loss: total / trained_tokens as f64,
                trained_tokens,
                tokens: window.num_tokens(),
                epoch: window.epoch,
                ..StepItem::default()
            },
        }
    }
}

impl<B: TrainBackend> CausalLm<B> {
    /// Adds the gradients of a micro batch, weighted by `weight`, and returns the sum of its token
    /// cross entropies.
    fn accumulate(
        &self,
        batch: &MicroBatch,
        weight: f64,
        gradients: &mut GradientsAccumulator<Self>,
    ) -> Tensor<B::InnerBackend, 1> {
        let hidden = self.hidden(batch); // [m, d]
        let [m, _] = hidden.dims();
        let targets = batch.targets::<B>(&hidden.device());
        let mut total = Tensor::zeros([1], &hidden.device());
        let mut d_hidden = Vec::new();
        for (start, end) in chunks(m, self.model.config.vocab_size) {
            let part = hidden.clone().inner().narrow(0, start, end - start);
            let part = Tensor::from_inner(part).require_grad(); // [end - start, d]
            let logits = self.model.logits(part.clone()); // [end - start, v]
            let nll =
                ops::cross_entropy(logits, targets.clone().narrow(0, start, end - start)).sum();
            let mut grads = nll.clone().mul_scalar(weight).backward();
            d_hidden.push(
                part.grad_remove(&mut grads)
                    .expect("the hidden states are tracked"),
            );
            gradients.accumulate(self, GradientsParams::from_grads(grads, self));
            total = total + nll.inner();
        }
        let d_hidden = Tensor::from_inner(Tensor::cat(d_hidden, 0)); // [m, d]
        let grads = (hidden * d_hidden).sum().backward();
        gradients.accumulate(self, GradientsParams::from_grads(grads, self));
        total
    }
}

impl<B: AdaptedBackend> CausalLm<B> {
    /// The normed hidden states `[m, d]` that predict the trained tokens.
    fn hidden(&self, batch: &MicroBatch) -> Tensor<B, 2> {
        let device = self.device();
        let rope = Rope::new(&self.model.config, &batch.positions(), &device);
        let hidden = self.model.forward(batch.input_ids(&device), &rope, None); // [b, s, d]
        let [b, s, d] = hidden.dims();
        hidden.reshape([b * s, d]).select(0, batch.at(&device))
    }

    /// The negative log probability of each trained token of a batch, in order.
    pub fn token_nll(&self, batch: &MicroBatch) -> Vec<f32> {
        let hidden = self.hidden(batch); // [m, d]
        let [m, _] = hidden.dims();
        let targets = batch.targets::<B>(&hidden.device());
        let part = |(start, end): (usize, usize)| {
            let logits = self
                .model
                .logits(hidden.clone().narrow(0, start, end - start));
            ops::cross_entropy(logits, targets.clone().narrow(0, start, end - start)).into_data()
        };
        let parts = chunks(m, self.model.config.vocab_size).map(part);
        parts
            .flat_map(|data| data.iter::<f32>().collect::<Vec<_>>())
            .collect()
    }

    fn device(&self) -> B::Device {
        self.model.norm.weight.val().device()
    }
}

/// Ranges of tokens whose logits exist together.
fn chunks(m: usize, vocab_size: usize) -> impl Iterator<Item = (usize, usize)> {
    let size = (LOGITS_AT_A_TIME / vocab_size).max(1);
    (0..m)
        .step_by(size)
        .map(move |start| (start, (start + size).min(m)))
}

/// What an evaluation reports for a batch.
#[derive(Debug, Clone, Copy)]
pub struct EvalItem {
    /// Sum of the token cross entropies.
    pub nll: f64,
    /// Trained tokens.
    pub trained_tokens: usize,
}

impl ItemLazy for EvalItem {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

impl<B: AdaptedBackend> InferenceStep for CausalLm<B> {
    type Input = MicroBatch;
    type Output = EvalItem;

    fn step(&self, batch: MicroBatch) -> EvalItem {
        let nll = self.token_nll(&batch);
        EvalItem {
            nll: nll.iter().map(|nll| f64::from(*nll)).sum(),
            trained_tokens: nll.len(),
        }
    }
}

/// Scales all gradients together to a norm of at most `max_norm` (0 = no limit) and returns the
/// norm before; as `torch.nn.utils.clip_grad_norm_`.
pub fn clip_gradients<B: TrainBackend, M: AutodiffModule<B>>(
    gradients: &mut GradientsParams,
    module: &M,
    max_norm: f64,
) -> f64 {
    let mut squares = Squares::<B> {
        gradients,
        sum: None,
    };
    module.visit(&mut squares);
    let norm = squares
        .sum
        .map_or(0.0, |sum| f64::from(sum.into_scalar_f32()).sqrt());
    if max_norm > 0.0 && norm > max_norm {
        let factor = max_norm / (norm + 1e-6);
        module.visit(&mut Scale { gradients, factor });
    }
    norm
}

struct Squares<'a, B: TrainBackend> {
    gradients: &'a GradientsParams,
    sum: Option<Tensor<B::InnerBackend, 1>>,
}

impl<B: TrainBackend> ModuleVisitor<B> for Squares<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = self.gradients.get::<B::InnerBackend, D>(param.id) {
            let sum = (gradient.clone() * gradient).sum();
            self.sum = Some(match self.sum.take() {
                Some(total) => total + sum,
                None => sum,
            });
        }
    }
}

struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: f64,
}

impl<B: TrainBackend> ModuleVisitor<B> for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = self.gradients.remove::<B::InnerBackend, D>(param.id) {
            let scaled = gradient.mul_scalar(self.factor);
            self.gradients
                .register::<B::InnerBackend, D>(param.id, scaled);
        }
    }
}

trait ScalarF32 {
    /// The one element of a tensor, on the host.
    fn into_scalar_f32(self) -> f32;
}

impl<B: Backend> ScalarF32 for Tensor<B, 1> {
    fn into_scalar_f32(self) -> f32 {
        self.into_data()
            .iter::<f32>()
            .next()
            .expect("a scalar has one element")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_token_once() {
        let size = LOGITS_AT_A_TIME / 32_000;
        let all: Vec<_> = chunks(2 * size + 1, 32_000).collect();
        assert_eq!(all, [(0, size), (size, 2 * size), (2 * size, 2 * size + 1)]);
        assert_eq!(chunks(5, 2 * LOGITS_AT_A_TIME).count(), 5);
        assert_eq!(chunks(0, 96).count(), 0);
    }
}
