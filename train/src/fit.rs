//! The loop: burn-train's learner, stepped by optimizer steps.
//!
//! burn-train's own strategy steps the schedule with every micro batch and drops the last
//! incomplete window of an epoch; this one takes whole windows, so that an optimizer step is one
//! item. Evaluations, checkpoints and the interrupt come between steps.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use adapters::{AdaptedLlama, TrainBackend};
use burn::data::dataloader::{DataLoaderIterator, Progress as Shown};
use burn::module::AutodiffModule;
use burn::tensor::backend::AutodiffBackend;
use burn::train::renderer::MetricsRenderer;
use burn::train::{
    EventProcessorTraining, Interrupter, Learner, LearnerEvent, LearningComponentsMarker,
    LearningComponentsTypes, LearningResult, SupervisedLearningStrategy, SupervisedTraining,
    SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingItem, TrainingModel,
    TrainingStrategy, ValidLoader,
};
use model::folder::ModelFolder;

use crate::batch::{EvalBatches, MicroBatch, Window, Windows};
use crate::card;
use crate::checkpoint::{Best, Checkpoints, Progress, Snapshot};
use crate::error::{Error, Result};
use crate::evaluate::{evaluate, sum};
use crate::memory::Memory;
use crate::metrics::{Gauge, NoMetricFiles};
use crate::optimizer::AdamW;
use crate::recipe::Recipe;
use crate::report::samples::{self, Answer, Prompt};
use crate::run_folder::{Line, RunFolder, peak_memory_bytes, remove_folder, replace_folder};
use crate::schedule::Schedule;
use crate::step::{CausalLm, EvalItem, StepItem, clip_gradients};
use crate::trained::{Trained, are_finite};

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
/// What cannot be written; a loss that is not finite.
pub fn fit<B: TrainBackend, R: MetricsRenderer + 'static>(
    run: Run<B>,
    renderer: R,
    interrupter: Interrupter,
    report: Report,
) -> Result<Outcome> {
    let path = run.folder.path().to_path_buf();
    let train = &run.recipe.train;
    let schedule = Schedule::new(train, run.windows.num_steps(), run.progress.step);
    // The model moves into the learner: a second handle would keep the first weights for the run.
    let learner = Learner::new(run.model, run.optimizer.clone(), schedule);
    let (windows, eval) = (Arc::new(run.windows.clone()), Arc::new(run.eval.clone()));
    let strategy = Arc::new(StepByStep {
        checkpoints: Checkpoints::new(&path, train.keep_checkpoints),
        optimizer: run.optimizer,
        trained: run.trained,
        base: run.base,
        recipe: run.recipe,
        windows: run.windows,
        eval: run.eval,
        device: run.device,
        state: Mutex::new(State {
            folder: run.folder,
            progress: run.progress,
            loss: None,
            stopped: None,
            error: None,
        }),
        report,
    });
    let result = SupervisedTraining::new(&path, windows, eval)
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
        .metric_valid_numeric(Gauge::new("Loss", |batch: &EvalItem| {
            (
                batch.nll / batch.trained_tokens as f64,
                batch.trained_tokens,
            )
        }))
        .with_metric_logger(NoMetricFiles)
        .with_interrupter(interrupter)
        .renderer(renderer)
        .with_training_strategy(TrainingStrategy::Custom(strategy.clone()))
        .launch(learner);

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

/// burn-train's learning strategy of this project.
struct StepByStep<B: TrainBackend> {
    recipe: Recipe,
    trained: Trained,
    base: ModelFolder,
    optimizer: AdamW<B::InnerBackend>,
    windows: Windows,
    eval: EvalBatches,
    checkpoints: Checkpoints,
    device: B::Device,
    report: Report,
    state: Mutex<State>,
}

/// What changes while the loop runs.
struct State {
    folder: RunFolder,
    progress: Progress,
    loss: Option<f64>,
    stopped: Option<Stopped>,
    error: Option<Error>,
}

/// The components of a learner that trains a [`CausalLm`].
type Components<B> =
    LearningComponentsMarker<B, Schedule, CausalLm<B>, AdamW<<B as AutodiffBackend>::InnerBackend>>;

impl<B: TrainBackend> SupervisedLearningStrategy<Components<B>> for StepByStep<B> {
    /// The default restores checkpoints on the default device; here they are restored before.
    fn train(
        &self,
        learner: Learner<Components<B>>,
        train: TrainLoader<Components<B>>,
        valid: ValidLoader<Components<B>>,
        mut components: TrainingComponents<Components<B>>,
    ) -> LearningResult<<Components<B> as LearningComponentsTypes>::InferenceModel> {
        components
            .event_processor
            .process_train(LearnerEvent::Start);
        let (model, mut events) = self.fit(components, learner, train, valid, 1);
        events.process_train(LearnerEvent::End(None));
        LearningResult {
            model: model.valid(),
            renderer: events.renderer(),
        }
    }

    fn fit(
        &self,
        components: TrainingComponents<Components<B>>,
        mut learner: Learner<Components<B>>,
        train: TrainLoader<Components<B>>,
        _: ValidLoader<Components<B>>, // `eval`, behind another interface
        _: usize,
    ) -> (
        TrainingModel<Components<B>>,
        SupervisedTrainingEventProcessor<Components<B>>,
    ) {
        let mut events = components.event_processor;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        learner.fork(&self.device);
        let mut windows = train.iter();
        if self.is_out_of_patience(&state.progress) {
            state.stopped = Some(Stopped::Early); // it goes on from where it had stopped early
        }
        let interrupted = || components.interrupter.should_stop();
        while state.stopped.is_none() && self.has_work(&state.progress) {
            let mut done = Ok(());
            if !state.progress.evaluation_due {
                done = self.advance(&mut *windows, &mut learner, &mut events, &mut state);
            }
            done =
                done.and_then(|()| self.follow_up(&learner, &mut events, &mut state, &interrupted));
            if let Err(error) = done {
                state.error = Some(error);
                break;
            }
        }
        (learner.model(), events)
    }
}

impl<B: TrainBackend> StepByStep<B> {
    /// Whether there is a step to take, or an evaluation to make that was cut short.
    fn has_work(&self, progress: &Progress) -> bool {
        progress.evaluation_due || progress.step < self.windows.num_steps()
    }

    /// Whether something that is done `every` so many steps (0: each epoch) is done after `step`.
    fn is_due(&self, every: usize, step: usize) -> bool {
        match every {
            0 => self.windows.ends_epoch(step - 1),
            every => step.is_multiple_of(every) || step == self.windows.num_steps(),
        }
    }

    /// One optimizer step.
    fn advance(
        &self,
        windows: &mut dyn DataLoaderIterator<Window>,
        learner: &mut Learner<Components<B>>,
        events: &mut SupervisedTrainingEventProcessor<Components<B>>,
        state: &mut State,
    ) -> Result<()> {
        let item = self.step(windows, learner)?;
        state.progress.step += 1;
        state.loss = Some(item.loss);
        let step = state.progress.step;
        let every = self.recipe.train.eval_every;
        state.progress.evaluation_due = !self.eval.is_empty() && self.is_due(every, step);
        state.folder.write(&Line::Train {
            step,
            epoch: item.epoch,
            loss: item.loss,
            lr: item.lr,
            grad_norm: item.grad_norm,
            tokens: item.trained_tokens,
            tokens_per_second: item.tokens as f64 / item.seconds,
            peak_memory_bytes: peak_memory_bytes(),
            seconds: item.seconds,
        })?;
        let shown = Shown::new(step, self.windows.num_steps());
        let global = Shown::new(1, 1);
        let shown = TrainingItem::new(item, shown, global, Some(step), Some(item.lr));
        events.process_train(LearnerEvent::ProcessedItem(shown));
        Ok(())
    }

    /// What is due after a step: an evaluation, a checkpoint, or the end.
    fn follow_up(
        &self,
        learner: &Learner<Components<B>>,
        events: &mut SupervisedTrainingEventProcessor<Components<B>>,
        state: &mut State,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<()> {
        if state.progress.evaluation_due {
            self.evaluate(learner, events, state, interrupted)?;
        }
        if interrupted() && self.has_work(&state.progress) {
            state.stopped = Some(Stopped::Interrupted);
        }
        if self.is_out_of_patience(&state.progress) {
            state.stopped = Some(Stopped::Early);
        }
        let save_every = self.recipe.train.save_every;
        if self.is_due(save_every, state.progress.step) || state.stopped.is_some() {
            let model = learner.model().valid().model;
            self.check_weights(&model, state.progress.step)?;
            let checkpoint = self.checkpoints.save(&Snapshot {
                model: &model,
                trained: &self.trained,
                base: &self.base,
                base_name: &self.recipe.model.path,
                optimizer: &self.optimizer,
                progress: &state.progress,
            })?;
            (self.report)(Event::Saved {
                checkpoint: &checkpoint,
            });
        }
        Ok(())
    }

    fn is_out_of_patience(&self, progress: &Progress) -> bool {
        let patience = self.recipe.train.early_stopping_patience;
        patience > 0 && progress.evaluations_without_improvement >= patience
    }

    /// Forward, backward, clipping and the optimizer.
    fn step(
        &self,
        windows: &mut dyn DataLoaderIterator<Window>,
        learner: &mut Learner<Components<B>>,
    ) -> Result<StepItem> {
        let start = Instant::now();
        let window = windows.next().expect("as many windows as steps");
        let step = window.step + 1;
        let output = learner.train_step(window);
        let mut gradients = output.grads;
        let max_norm = self.recipe.train.max_grad_norm;
        let grad_norm = clip_gradients::<B, _>(&mut gradients, &learner.model(), max_norm);
        let numbers = [
            ("the loss of", output.item.loss),
            ("the gradient of", grad_norm),
        ];
        if let Some((what, _)) = numbers.iter().find(|(_, number)| !number.is_finite()) {
            return Err(self.not_finite(what, step, step - 1));
        }
        learner.lr_step();
        learner.optimizer_step(gradients);
        Ok(StepItem {
            grad_norm,
            lr: learner.lr_current(),
            seconds: start.elapsed().as_secs_f64(),
            ..output.item
        })
    }

    /// The evaluation that is due. One that is interrupted leaves no trace and stays due.
    fn evaluate(
        &self,
        learner: &Learner<Components<B>>,
        events: &mut SupervisedTrainingEventProcessor<Components<B>>,
        state: &mut State,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<()> {
        let model = learner.model().valid();
        let (mut done, all) = (0, self.eval.batches().len());
        let heard = |_: &MicroBatch, nll: &[f32]| {
            done += 1;
            let item = EvalItem {
                nll: sum(nll),
                trained_tokens: nll.len(),
            };
            let (shown, global) = (Shown::new(done, all), Shown::new(1, 1));
            let shown = TrainingItem::new(item, shown, global, Some(done), None);
            events.process_valid(LearnerEvent::ProcessedItem(shown));
            Ok::<_, Error>(())
        };
        let result = evaluate(&model, &self.eval, interrupted, heard)?;
        events.process_valid(LearnerEvent::EndEpoch(1));
        let Some(result) = result else {
            return Ok(());
        };
        let (step, loss) = (state.progress.step, result.loss);
        if !loss.is_finite() {
            return Err(self.not_finite("the evaluation loss after", step, step));
        }
        state.folder.write(&Line::Eval {
            step,
            loss,
            perplexity: result.perplexity,
            tokens: result.tokens,
        })?;
        state.progress.evaluation_due = false;
        (self.report)(Event::Evaluated { step, loss });
        let improved = state.progress.best.is_none_or(|best| loss < best.loss);
        if !improved {
            state.progress.evaluations_without_improvement += 1;
            return Ok(());
        }
        state.progress.best = Some(Best { step, loss });
        state.progress.evaluations_without_improvement = 0;
        self.save_whole(&model, state, "best")
    }

    /// The failure at `step`, where the weights after the step `suspect` have shown to be no good.
    fn not_finite(&self, what: &'static str, step: usize, suspect: usize) -> Error {
        let good = self.checkpoints.newest_before(suspect);
        Error::NotFinite {
            what,
            step,
            checkpoint: good.unwrap_or_default(), // it is the lesser failure
        }
    }

    /// Weights that are no numbers are never saved.
    fn check_weights(&self, model: &AdaptedLlama<B::InnerBackend>, step: usize) -> Result<()> {
        match are_finite(model) {
            true => Ok(()),
            false => Err(self.not_finite("a weight after", step, step)),
        }
    }

    /// Saves what is trained as `name` in the run folder, which is replaced as a whole, so that it
    /// is never a mixture of two.
    fn save_whole(
        &self,
        model: &CausalLm<B::InnerBackend>,
        state: &State,
        name: &str,
    ) -> Result<()> {
        self.check_weights(&model.model, state.progress.step)?;
        let run = state.folder.path();
        let part = run.join(format!(".{name}.part"));
        remove_folder(&part)?;
        let saved = self
            .trained
            .save(&model.model, &self.base, &self.recipe.model.path, &part)?;
        self.base.copy_tokenizer(&saved)?;
        card::write(&saved, run, &self.recipe, &self.trained)?;
        replace_folder(&saved, &run.join(name))?;
        remove_folder(&part)
    }
}
