//! AdamW as PyTorch computes it: decoupled weight decay, bias-corrected moments.
//!
//! Source: <https://arxiv.org/abs/1711.05101>, `torch/optim/adamw.py`. Burn's own keeps its betas
//! and their powers in f32, which is visible in the last digits that PEFT and this should share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapters::methods::AfterStep;
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
    /// Factors on the learning rate of single parameters.
    rates: HashMap<ParamId, f64>,
    state: Arc<Mutex<State<B>>>,
}

/// What AdamW remembers.
#[derive(Debug)]
pub struct State<B: Backend> {
    /// Steps taken.
    pub step: usize,
    /// By parameter.
    pub moments: HashMap<ParamId, Moments<B>>,
    /// What the method does after each step.
    pub after: Option<Box<dyn AfterStep<B>>>,
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
            rates: HashMap::new(),
            state: Arc::new(Mutex::new(State {
                step: 0,
                moments: HashMap::new(),
                after: None,
            })),
        }
    }

    /// The same with other learning rates for some parameters, and something to do after each step.
    pub fn with(
        mut self,
        rates: HashMap<ParamId, f64>,
        after: Option<Box<dyn AfterStep<B>>>,
    ) -> Self {
        self.rates = rates;
        self.state().after = after;
        self
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
        let State {
            step,
            moments,
            after,
        } = &mut *state;
        *step += 1;
        let power = *step as i32;
        let [beta1, beta2] = self.betas;
        let mut update = Update {
            beta1,
            beta2,
            eps: self.eps,
            lr,
            weight_decay: self.weight_decay,
            correction: 1.0 - beta1.powi(power),
            root: (1.0 - beta2.powi(power)).sqrt(),
            grads,
            rates: &self.rates,
            moments,
            watched: after.as_mut().map(|after| Watched::new(after.as_mut())),
        };
        let module = module.map(&mut update);
        match update.watched {
            Some(watched) => module.map(&mut watched.after(*step)),
            None => module,
        }
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
    beta1: f64,
    beta2: f64,
    eps: f64,
    lr: f64,
    weight_decay: f64,
    correction: f64,
    root: f64,
    grads: GradientsParams,
    rates: &'a HashMap<ParamId, f64>,
    moments: &'a mut HashMap<ParamId, Moments<B>>,
    watched: Option<Watched<'a, B>>,
}

/// The parameters that a method looks at after the step.
struct Watched<'a, B: Backend> {
    by: &'a mut dyn AfterStep<B>,
    values: HashMap<ParamId, Tensor<B, 1>>,
    gradients: HashMap<ParamId, Tensor<B, 1>>,
}

impl<'a, B: Backend> Watched<'a, B> {
    fn new(by: &'a mut dyn AfterStep<B>) -> Self {
        Self {
            by,
            values: HashMap::new(),
            gradients: HashMap::new(),
        }
    }

    /// What the method makes of them.
    fn after(mut self, step: usize) -> Overwrite<B> {
        self.by.after(step, &mut self.values, &self.gradients);
        Overwrite(self.values)
    }
}

/// Gives parameters other values.
struct Overwrite<B: Backend>(HashMap<ParamId, Tensor<B, 1>>);

impl<A: AutodiffBackend> ModuleMapper<A> for Overwrite<A::InnerBackend> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<A, D>>) -> Param<Tensor<A, D>> {
        let Some(values) = self.0.remove(&param.id) else {
            return param;
        };
        let new = Tensor::from_inner(values.reshape(param.shape()));
        Param::initialized(param.id, new.require_grad())
    }
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
        let grad = grad.reshape([count]);
        let watches = |by: &Watched<_>| by.by.watches(id);
        let is_watched = self.watched.as_ref().is_some_and(watches);
        let kept = is_watched.then(|| grad.clone());
        let new = self.update(id, old.reshape([count]), grad);
        if let (Some(watched), Some(grad)) = (&mut self.watched, kept) {
            watched.gradients.insert(id, grad);
            watched.values.insert(id, new.clone());
        }
        Param::initialized(id, Tensor::from_inner(new.reshape(shape)).require_grad())
    }
}

impl<B: UpdateBackend> Update<'_, B> {
    fn update(&mut self, id: ParamId, weight: Tensor<B, 1>, grad: Tensor<B, 1>) -> Tensor<B, 1> {
        let lr = self.lr * self.rates.get(&id).copied().unwrap_or(1.0);
        let step = AdamwStep {
            betas: [self.beta1, self.beta2],
            eps: self.eps,
            decay: 1.0 - lr * self.weight_decay,
            step_size: lr / self.correction,
            root: self.root,
        };
        let Moments { first, second } = self.moments.remove(&id).unwrap_or_else(|| Moments {
            first: grad.zeros_like(),
            second: grad.zeros_like(),
        });
        let old = Updated {
            weight,
            first,
            second,
        };
        let new = adamw(old, grad, &step);
        let moments = Moments {
            first: new.first,
            second: new.second,
        };
        self.moments.insert(id, moments);
        new.weight
    }
}
