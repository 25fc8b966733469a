//! The loop: burn-train's learner, stepped by optimizer steps.
//!
//! burn-train's own strategy steps the schedule with every micro batch and drops the last
//! incomplete window of an epoch; this one takes whole windows, so that an optimizer step is one
//! item. Evaluations, checkpoints and the interrupt come between steps.

mod guard;
mod save;
mod strategy;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use adapters::TrainBackend;
use burn::train::renderer::MetricsRenderer;
use burn::train::{Interrupter, Learner, SupervisedTraining, TrainingStrategy};
use model::folder::ModelFolder;

pub use guard::{Bad, Health, MOST_IN_A_ROW, SPIKE};

use crate::batch::{EvalBatches, Windows};
use crate::checkpoint::{Best, Checkpoints, Progress};
use crate::error::Result;
use crate::memory::Memory;
use crate::metrics::{Gauge, NoMetricFiles};
use crate::optimizer::AdamW;
use crate::recipe::Recipe;
use crate::report::samples::{self, Answer, Prompt};
use crate::run_folder::RunFolder;
use crate::schedule::Schedule;
use crate::step::{CausalLm, EvalItem, StepItem};
use crate::trained::Trained;
use guard::Names;
use strategy::{State, StepByStep};

/// A run, ready to start or to go on.
pub struct Run<B: TrainBackend> {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The model with what is trained attached.
    pub model: CausalLm<B>,
    /// What is trained.
    pub trained: Trained,
    /// The base model's folder.
    pub base: ModelFolder,
    /// The optimizer, restored when the run goes on.
    pub optimizer: AdamW<B::InnerBackend>,
    /// The training data from the first step to take.
    pub windows: Windows,
    /// The evaluation data.
    pub eval: EvalBatches,
    /// Where results go.
    pub folder: RunFolder,
    /// How far the run is.
    pub progress: Progress,
    /// How long it took to load the base model.
    pub load_time: Duration,
    /// What it was predicted to hold, if somebody did.
    pub predicted: Option<Memory>,
    /// How the base of `adapter.init_from` was quantised, and how this one is, if they differ.
    pub other_base: Option<[String; 2]>,
    /// What the trained model is to continue in the end, for people to read.
    pub prompts: Vec<Prompt>,
    /// Where it computes.
    pub device: B::Device,
}

/// What happened at the end of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Optimizer steps taken in all.
    pub steps: usize,
    /// Loss of the last step.
    pub loss: Option<f64>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Why the run ended before its last step.
    pub stopped: Option<Stopped>,
    /// The continuations of [`Run::prompts`]; none of a run that was interrupted.
    pub answers: Vec<Answer>,
}

/// Why a run ended before its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It was asked to; a checkpoint is saved.
    Interrupted,
    /// The evaluation loss stopped falling.
    Early,
}

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step's loss is over [`SPIKE`] times its running mean; told before the step is shown.
    Spike {
        /// The step, from 1.
        step: usize,
        /// Its loss.
        loss: f64,
        /// The running mean of the losses before it.
        mean: f64,
    },
    /// A step was left out; weights and moments are as before it.
    Skipped {
        /// The step, from 1.
        step: usize,
        /// What was no finite number: the loss, or the first such gradient.
        reason: &'a str,
        /// How many steps in a row were left out; [`MOST_IN_A_ROW`] end the run.
        in_a_row: usize,
    },
    /// An evaluation is done.
    Evaluated {
        /// Optimizer steps taken.
        step: usize,
        /// Mean cross entropy.
        loss: f64,
    },
    /// A checkpoint is complete.
    Saved {
        /// Its folder.
        checkpoint: &'a std::path::Path,
    },
}

/// Hears what a run tells.
pub type Report = Arc<dyn Fn(Event<'_>) + Send + Sync>;

/// Trains until the last step, an interrupt or early stopping, and saves the result.
///
/// # Errors
/// What cannot be written; [`crate::Error::NotFinite`] after [`MOST_IN_A_ROW`] skipped steps, or
/// when a weight is no finite number.
pub fn fit<B: TrainBackend, R: MetricsRenderer + 'static>(
    run: Run<B>,
    renderer: R,
    interrupter: Interrupter,
    report: Report,
) -> Result<Outcome> {
    let path = run.folder.path().to_path_buf();
    let train = &run.recipe.train;
    let schedule = Schedule::new(train, run.windows.num_steps(), run.progress.step);
    let parameters = run.trained.parameters(&run.model.model.config)?;
    // The model moves into the learner: a second handle would keep the first weights for the run.
    let learner = Learner::new(run.model, run.optimizer.clone(), schedule);
    let (windows, eval) = (Arc::new(run.windows.clone()), Arc::new(run.eval.clone()));
    let strategy = Arc::new(StepByStep {
        checkpoints: Checkpoints::new(&path, train.keep_checkpoints),
        names: Names::new(&parameters),
        optimizer: run.optimizer,
        trained: run.trained,
        base: run.base,
        recipe: run.recipe,
        windows: run.windows,
        eval: run.eval,
        device: run.device,
        state: Mutex::new(State::new(run.folder, run.progress)),
        report,
    });
    let training = SupervisedTraining::new(&path, windows, eval)
        .with_metric_logger(NoMetricFiles)
        .with_interrupter(interrupter)
        .renderer(renderer)
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()));
    let result = with_gauges(training).launch(learner);

    let mut state = strategy
        .state
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = state.error.take() {
        return Err(error);
    }
    let mut answers = Vec::new();
    if state.stopped != Some(Stopped::Interrupted) {
        let name = strategy.trained.folder_name();
        strategy.save_whole(&result.model, &state, name)?;
        let stop = &strategy.base.generation.eos_token_ids;
        answers = samples::answer(&result.model.model, &run.prompts, stop, &strategy.device);
    }
    Ok(Outcome {
        steps: state.progress.step,
        loss: state.loss,
        best: state.progress.best,
        stopped: state.stopped,
        answers,
    })
}

/// What is shown of every step and evaluation.
fn with_gauges<B: TrainBackend>(
    training: SupervisedTraining<strategy::Components<B>>,
) -> SupervisedTraining<strategy::Components<B>> {
    training
        .metric_train_numeric(Gauge::new("Loss", |step: &StepItem| {
            (step.loss, step.trained_tokens)
        }))
        .metric_train_numeric(Gauge::new("Learning rate", |step: &StepItem| {
            (step.lr, step.trained_tokens)
        }))
        .metric_train_numeric(Gauge::new("Gradient norm", |step: &StepItem| {
            (step.grad_norm, step.trained_tokens)
        }))
        .metric_train_numeric(Gauge::rising("Tokens/s", |step: &StepItem| {
            (step.tokens as f64 / step.seconds, step.tokens)
        }))
        .metric_train_numeric(Gauge::new("Epoch", |step: &StepItem| {
            (step.epoch, step.trained_tokens)
        }))
        .metric_valid_numeric(Gauge::new("Loss", |batch: &EvalItem| {
            (
                batch.nll / batch.trained_tokens as f64,
                batch.trained_tokens,
            )
        }))
}
