//! AdamW as PyTorch computes it: decoupled weight decay, bias-corrected moments.
//!
//! Source: <https://arxiv.org/abs/1711.05101>, `torch/optim/adamw.py`. Burn's own keeps its betas
//! and their powers in f32, which is visible in the last digits that PEFT and this should share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::{AutodiffModule, ModuleMapper, Param, ParamId};
use burn::optim::{GradientsParams, MultiGradientsParams, Optimizer};
use burn::tensor::{
    Tensor,
    backend::{AutodiffBackend, Backend},
};
use model::ops::{AdamwStep, UpdateBackend, Updated, adamw};

use crate::recipe::TrainSection;

/// The optimizer of a run.
///
/// Clones share one state: the learner owns one, and the run reads and restores the state through
/// another, since burn-train's `Learner` does not give its optimizer back.
#[derive(Debug, Clone)]
pub struct AdamW<B: Backend> {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    state: Arc<Mutex<State<B>>>,
}

/// What AdamW remembers.
#[derive(Debug, Clone)]
pub struct State<B: Backend> {
    /// Steps taken.
    pub step: usize,
    /// By parameter.
    pub moments: HashMap<ParamId, Moments<B>>,
}

/// Running means of one parameter's gradient and its square, flattened.
#[derive(Debug, Clone)]
pub struct Moments<B: Backend> {
    /// `exp_avg`.
    pub first: Tensor<B, 1>,
    /// `exp_avg_sq`.
    pub second: Tensor<B, 1>,
}

impl<B: Backend> AdamW<B> {
    /// An optimizer that has not taken a step.
    pub fn new(train: &TrainSection) -> Self {
        Self {
            betas: train.betas,
            eps: train.eps,
            weight_decay: train.weight_decay,
            state: Arc::new(Mutex::new(State {
                step: 0,
                moments: HashMap::new(),
            })),
        }
    }

    /// The state, locked.
    pub fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A, M> Optimizer<M, A> for AdamW<A::InnerBackend>
where
    A: AutodiffBackend<InnerBackend: UpdateBackend>,
    M: AutodiffModule<A>,
{
    /// The state is saved by name, see `checkpoint`.
    type Record = ();

    fn step(&mut self, lr: f64, module: M, grads: GradientsParams) -> M {
        let mut state = self.state();
        state.step += 1;
        let step = state.step as i32;
        let [beta1, beta2] = self.betas;
        let mut update = Update {
            step: AdamwStep {
                betas: self.betas,
                eps: self.eps,
                decay: 1.0 - lr * self.weight_decay,
                step_size: lr / (1.0 - beta1.powi(step)),
                root: (1.0 - beta2.powi(step)).sqrt(),
            },
            grads,
            moments: &mut state.moments,
        };
        module.map(&mut update)
    }

    fn step_multi(&mut self, lr: f64, module: M, grads: MultiGradientsParams) -> M {
        let mut grads = grads.grads;
        match grads.pop() {
            Some((grads, _)) => Optimizer::<M, A>::step(self, lr, module, grads),
            None => module,
        }
    }

    fn to_record(&self) {}

    fn load_record(self, (): ()) -> Self {
        self
    }
}

struct Update<'a, B: Backend> {
    step: AdamwStep,
    grads: GradientsParams,
    moments: &'a mut HashMap<ParamId, Moments<B>>,
}

impl<A> ModuleMapper<A> for Update<'_, A::InnerBackend>
where
    A: AutodiffBackend<InnerBackend: UpdateBackend>,
{
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<A, D>>) -> Param<Tensor<A, D>> {
        let Some(grad) = self.grads.remove::<A::InnerBackend, D>(param.id) else {
            return param;
        };
        let id = param.id;
        let old = param.into_value().inner();
        let shape = old.shape();
        let count = shape.num_elements();
        let new = self.update(id, old.reshape([count]), grad.reshape([count]));
        Param::initialized(id, Tensor::from_inner(new.reshape(shape)).require_grad())
    }
}

impl<B: UpdateBackend> Update<'_, B> {
    fn update(&mut self, id: ParamId, weight: Tensor<B, 1>, grad: Tensor<B, 1>) -> Tensor<B, 1> {
        let Moments { first, second } = self.moments.remove(&id).unwrap_or_else(|| Moments {
            first: grad.zeros_like(),
            second: grad.zeros_like(),
        });
        let old = Updated {
            weight,
            first,
            second,
        };
        let new = adamw(old, grad, &self.step);
        let moments = Moments {
            first: new.first,
            second: new.second,
        };
        self.moments.insert(id, moments);
        new.weight
    }
}
