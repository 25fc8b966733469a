//! One training step: the loss of a window and its gradients.
//!
//! The loss is the sum of token cross entropies over the whole window divided by the number of
//! trained tokens in it, so that one batch of eight rows and eight batches of one are the same
//! step.

use adapters::{AdaptedBackend, AdaptedLlama, Method, TrainBackend, draw};
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Int, Tensor, backend::Backend};
use burn::train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};
use model::llama::{EMBED_TOKENS, Input, Past, only};
use model::ops;
use model::rope::Rope;

use crate::batch::{MicroBatch, Window};
use crate::recompute::{Blocks, backward};

/// Largest number of logits that exist at a time (32 MiB of f32).
pub(crate) const LOGITS_AT_A_TIME: usize = 1 << 23;

/// A causal language model as burn-train's learner sees it.
#[derive(Module, Debug)]
pub struct CausalLm<B: Backend> {
    /// The model.
    pub model: AdaptedLlama<B>,
    /// The method of its adapter, if it has one.
    #[module(skip)]
    pub method: Option<Method>,
    /// Decides what is dropped.
    #[module(skip)]
    pub seed: u64,
    /// Whether each decoder layer is run again when it is differentiated, see `recompute`.
    pub recompute: bool,
}

/// What a step reports; the fields after `tokens` are filled in by the loop around it.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepItem {
    /// Mean cross entropy of the trained tokens.
    pub loss: f64,
    /// Trained tokens.
    pub trained_tokens: usize,
    /// All tokens.
    pub tokens: usize,
    /// Passes over the data after this step.
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
            if self.method.as_ref().is_some_and(Method::is_random) {
                let seed = self.seed ^ ((window.step as u64) << 20 | index as u64);
                draw(&mut lm.model, seed);
            }
            let weight = window.loss_scale / trained_tokens as f64;
            let sum = lm.accumulate(batch, weight, &mut gradients);
            total = Some(match total {
                Some(total) => total + sum,
                None => sum,
            });
        }
        let total = total.map_or(0.0, |total| f64::from(total.into_scalar_f32()));
        let mut grads = gradients.grads();
        if window.loss_scale != 1.0 {
            self.visit(&mut Scale {
                gradients: &mut grads,
                factor: window.loss_scale.recip(),
            });
        }
        if let Some(method) = &self.method {
            method.regularise(&self.model, &mut grads);
        }
        TrainOutput {
            grads,
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
        gradients: &mut GradientsAccumulator<AdaptedLlama<B>>,
    ) -> Tensor<B::InnerBackend, 1> {
        let model = &self.model;
        let input = self.input(batch);
        let tokens = input.tokens.clone();
        let (x, blocks) = match self.recompute {
            false => (model.decode(input, None), None), // [n, d]
            true => {
                let (blocks, x) = Blocks::forward(model, input);
                (x, Some(blocks))
            }
        };
        let hidden = self.predicting(only(x.clone(), tokens), batch); // [m, d]
        let (total, d_hidden) = self.loss(hidden.clone().inner(), batch, weight, gradients);
        let mut grads = backward(hidden, d_hidden);
        gradients.accumulate(model, GradientsParams::from_module(&mut grads, model));
        if let (Some(blocks), Some(d_x)) = (blocks, x.grad_remove(&mut grads)) {
            blocks.backward(d_x, gradients);
        }
        total
    }

    /// The sum of the token cross entropies of a batch, and its gradient by `hidden` `[m, d]` times
    /// `weight`; the gradients of the output layer are added.
    fn loss(
        &self,
        hidden: Tensor<B::InnerBackend, 2>,
        batch: &MicroBatch,
        weight: f64,
        gradients: &mut GradientsAccumulator<AdaptedLlama<B>>,
    ) -> (Tensor<B::InnerBackend, 1>, Tensor<B::InnerBackend, 2>) {
        let mut total = Tensor::zeros([1], &hidden.device());
        let mut d_hidden = Vec::new();
        for (part, targets) in self.parts(hidden, batch) {
            let part = Tensor::from_inner(part).require_grad();
            let nll = self.nll(part.clone(), Tensor::from_inner(targets)).sum();
            let mut grads = nll.clone().mul_scalar(weight).backward();
            let d_part = part.grad_remove(&mut grads);
            d_hidden.push(d_part.expect("the hidden states are tracked"));
            gradients.accumulate(&self.model, GradientsParams::from_grads(grads, &self.model));
            total = total + nll.inner();
        }
        (total, Tensor::cat(d_hidden, 0))
    }
}

impl<B: AdaptedBackend> CausalLm<B> {
    /// The negative log probability of each trained token of a batch, in order.
    pub fn token_nll(&self, batch: &MicroBatch) -> Vec<f32> {
        let input = self.input(batch);
        let tokens = input.tokens.clone();
        let x = only(self.model.decode(input, None), tokens); // [n, d]
        let hidden = self.predicting(x, batch); // [m, d]
        let parts = self.parts(hidden, batch);
        let nll = parts.map(|(part, targets)| self.nll(part, targets).into_data());
        nll.flat_map(|data| data.iter::<f32>().collect::<Vec<_>>())
            .collect()
    }

    /// The first module whose output for these batches has a number that is not finite.
    pub(crate) fn bad_output(&self, batches: &[MicroBatch]) -> Option<String> {
        let model = &self.model;
        let is_bad = |x: &Tensor<B, 2>| !x.to_data().iter::<f32>().all(f32::is_finite);
        batches.iter().find_map(|batch| {
            let input = self.input(batch);
            let mut x = input.x; // [n, d]
            if is_bad(&x) {
                return Some(EMBED_TOKENS.into());
            }
            model.layers.iter().enumerate().find_map(|(index, layer)| {
                let past = Past::of(&input.prefix, index);
                x = layer.forward(x.clone(), &input.rope, past);
                is_bad(&x).then(|| format!("model.layers.{index}"))
            })
        })
    }

    /// What the decoder layers read of a batch.
    fn input(&self, batch: &MicroBatch) -> Input<B> {
        let device = self.model.norm.weight.val().device();
        let rope = Rope::new(&self.model.config, batch.segments().clone(), &device);
        self.model.input(batch.input_ids(&device), &rope)
    }

    /// Of hidden states `[n, d]`, the normed ones `[m, d]` that predict the trained tokens.
    fn predicting(&self, x: Tensor<B, 2>, batch: &MicroBatch) -> Tensor<B, 2> {
        let at = batch.at(&x.device());
        self.model.norm.forward(x.select(0, at)) // the others predict nothing that counts
    }

    /// The negative log probabilities `[n]` of `targets` `[n]` by `hidden` `[n, d]`.
    fn nll(&self, hidden: Tensor<B, 2>, targets: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        ops::cross_entropy(self.model.logits(hidden), targets)
    }

    /// `hidden` `[m, d]` and the trained tokens `[m]`, in parts whose logits exist one at a time.
    fn parts<I: Backend>(
        &self,
        hidden: Tensor<I, 2>,
        batch: &MicroBatch,
    ) -> impl Iterator<Item = (Tensor<I, 2>, Tensor<I, 1, Int>)> {
        let [m, _] = hidden.dims();
        let targets = batch.targets::<I>(&hidden.device());
        chunks(m, self.model.config.vocab_size).map(move |(start, end)| {
            let size = end - start;
            (
                hidden.clone().narrow(0, start, size),
                targets.clone().narrow(0, start, size),
            )
        })
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
            let count = gradient.shape().num_elements();
            let sum = ops::sum_of_squares(gradient.reshape([count]));
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
            let shape = gradient.shape();
            let flat = gradient.reshape([shape.num_elements()]);
            let scaled = ops::scale(flat, self.factor).reshape(shape);
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
