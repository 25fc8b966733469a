//! One step after the other, and what comes between them.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use adapters::TrainBackend;
use burn::data::dataloader::{DataLoaderIterator, Progress as Shown};
use burn::module::AutodiffModule;
use burn::optim::GradientsParams;
use burn::tensor::backend::AutodiffBackend;
use burn::train::{
    EventProcessorTraining, Learner, LearnerEvent, LearningComponentsMarker,
    LearningComponentsTypes, LearningResult, SupervisedLearningStrategy,
    SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingItem, TrainingModel,
    ValidLoader,
};
use model::folder::ModelFolder;

use super::guard::{MOST_IN_A_ROW, Names};
use super::{Event, Report, Stopped};
use crate::batch::{EvalBatches, MicroBatch, Window, Windows};
use crate::checkpoint::{Best, Checkpoints, Progress};
use crate::device_failure::{OutOfMemory, guarded};
use crate::error::{Error, Result};
use crate::evaluate::{evaluate, sum};
use crate::optimizer::AdamW;
use crate::recipe::Recipe;
use crate::run_folder::{Line, RunFolder, peak_memory_bytes};
use crate::schedule::Schedule;
use crate::step::{CausalLm, EvalItem, StepItem, clip_gradients};
use crate::trained::Trained;

/// burn-train's learning strategy of this project.
pub(super) struct StepByStep<B: TrainBackend> {
    pub recipe: Recipe,
    pub trained: Trained,
    pub names: Names,
    pub base: ModelFolder,
    pub optimizer: AdamW<B::InnerBackend>,
    pub windows: Windows,
    pub eval: EvalBatches,
    pub checkpoints: Checkpoints,
    pub device: B::Device,
    pub report: Report,
    pub state: Mutex<State<B>>,
}

/// What changes while the loop runs.
pub(super) struct State<B: TrainBackend> {
    pub folder: RunFolder,
    pub progress: Progress,
    pub loss: Option<f64>,
    pub stopped: Option<Stopped>,
    pub error: Option<Error>,
    /// The last step whose loss and gradient were finite.
    pub good: Option<Good<B>>,
}

/// Weights that were seen to give a finite loss.
pub(super) struct Good<B: TrainBackend> {
    /// On what they gave it.
    pub window: Window,
    /// The weights; not kept in full training, where they would take as much as the model again.
    pub model: Option<CausalLm<B::InnerBackend>>,
}

impl<B: TrainBackend> State<B> {
    pub fn new(folder: RunFolder, progress: Progress) -> Self {
        Self {
            folder,
            progress,
            loss: None,
            stopped: None,
            error: None,
            good: None,
        }
    }
}

/// The components of a learner that trains a [`CausalLm`].
pub(super) type Components<B> =
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

    /// Weights that a skipped step has put in doubt are not saved before a good step, lest they take
    /// the place of good ones.
    fn checkpoint_is_due(&self, progress: &Progress) -> bool {
        let is_sure = progress.health.bad.is_none() || progress.step == self.windows.num_steps();
        is_sure && self.is_due(self.recipe.train.save_every, progress.step)
    }

    fn is_out_of_patience(&self, progress: &Progress) -> bool {
        let patience = self.recipe.train.early_stopping_patience;
        patience > 0 && progress.evaluations_without_improvement >= patience
    }

    /// One optimizer step, taken or skipped.
    fn advance(
        &self,
        windows: &mut dyn DataLoaderIterator<Window>,
        learner: &mut Learner<Components<B>>,
        events: &mut SupervisedTrainingEventProcessor<Components<B>>,
        state: &mut State<B>,
    ) -> Result<()> {
        let window = windows.next().expect("as many windows as steps");
        let (item, bad) = self.step(window, learner, state)?;
        state.progress.step += 1;
        let step = state.progress.step;
        let every = self.recipe.train.eval_every;
        state.progress.evaluation_due = !self.eval.is_empty() && self.is_due(every, step);
        match bad {
            Some(what) => self.skip(&item, &what, learner, state),
            None => self.take(item, events, state),
        }
    }

    /// Forward, backward, clipping and the optimizer, which is left out if something is not finite:
    /// that is returned beside what was measured.
    fn step(
        &self,
        window: Window,
        learner: &mut Learner<Components<B>>,
        state: &mut State<B>,
    ) -> Result<(StepItem, Option<String>)> {
        let start = Instant::now();
        let model = learner.model();
        let (item, gradients, grad_norm) = self.gradients(&window, learner, state)?;
        let loss = item.loss;
        let bad = self
            .names
            .bad_step::<B, _>(loss, grad_norm, &gradients, &model)
            .map(|what| match loss.is_finite() {
                true => what,
                false => with_origin(what, model.valid().bad_output(&window.micro_batches)),
            });
        learner.lr_step(); // also of a step that is skipped: the next one is where it would be
        if bad.is_none() {
            let is_first = state.good.is_none();
            let is_small = matches!(self.trained, Trained::Adapter(_));
            state.good = Some(Good {
                window,
                model: is_small.then(|| model.valid()),
            });
            if let Some(scale) = &mut state.progress.loss_scale {
                scale.hold();
            }
            drop(model); // so that its weights can be changed in place
            self.update(learner, gradients, is_first)?;
        }
        let item = StepItem {
            grad_norm,
            lr: learner.lr_current(),
            seconds: start.elapsed().as_secs_f64(),
            ..item
        };
        Ok((item, bad))
    }

    /// Loss, gradients and their norm of a window. In f16 an overflow of the gradients lowers the
    /// scale of the loss, and they are computed again.
    fn gradients(
        &self,
        window: &Window,
        learner: &Learner<Components<B>>,
        state: &mut State<B>,
    ) -> Result<(StepItem, GradientsParams, f64)> {
        let max_norm = self.recipe.train.max_grad_norm;
        let model = learner.model();
        loop {
            let scale = state.progress.loss_scale;
            let window = Window {
                loss_scale: scale.map_or(1.0, |scale| scale.factor),
                ..window.clone()
            };
            let computed = guarded(|| {
                let mut output = learner.train_step(window);
                let norm = clip_gradients::<B, _>(&mut output.grads, &model, max_norm);
                (output.item, output.grads, norm)
            });
            let (item, gradients, norm) = computed.map_err(|OutOfMemory| {
                let when = format!("in step {}", state.progress.step + 1);
                self.out_of_memory(when, &model.valid(), state)
            })?;
            let overflows = item.loss.is_finite() && !norm.is_finite();
            let scale = state.progress.loss_scale.as_mut();
            if !scale.is_some_and(|scale| overflows && scale.lower()) {
                return Ok((item, gradients, norm));
            }
        }
    }

    /// The optimizer's step. The first one allocates the moments, and is waited for: if they do not
    /// fit, nothing has been learned yet that could be half written.
    fn update(
        &self,
        learner: &mut Learner<Components<B>>,
        gradients: GradientsParams,
        is_first: bool,
    ) -> Result<()> {
        let recompute = learner.model().recompute;
        let done = guarded(|| {
            learner.optimizer_step(gradients);
            if is_first {
                B::sync(&self.device).expect("the device updates the weights");
            }
        });
        done.map_err(|OutOfMemory| Error::OutOfMemory {
            when: "while it updated the weights".into(),
            recompute,
        })
    }

    /// Notes a step that was taken.
    fn take(
        &self,
        item: StepItem,
        events: &mut SupervisedTrainingEventProcessor<Components<B>>,
        state: &mut State<B>,
    ) -> Result<()> {
        let (step, loss) = (state.progress.step, item.loss);
        state.loss = Some(loss);
        let spike = state.progress.health.take(loss);
        state.folder.write(&Line::Train {
            step,
            epoch: item.epoch,
            loss,
            lr: item.lr,
            grad_norm: item.grad_norm,
            tokens: item.trained_tokens,
            tokens_per_second: item.tokens as f64 / item.seconds,
            peak_memory_bytes: peak_memory_bytes(),
            seconds: item.seconds,
            spike: spike.is_some(),
            loss_scale: state.progress.loss_scale.map(|scale| scale.factor),
        })?;
        if let Some(mean) = spike {
            (self.report)(Event::Spike { step, loss, mean });
        }
        let shown = Shown::new(step, self.windows.num_steps());
        let global = Shown::new(1, 1);
        let shown = TrainingItem::new(item, shown, global, Some(step), Some(item.lr));
        events.process_train(LearnerEvent::ProcessedItem(shown));
        Ok(())
    }

    /// Notes a step that was skipped because of `what`, and gives up after too many in a row.
    fn skip(
        &self,
        item: &StepItem,
        what: &str,
        learner: &Learner<Components<B>>,
        state: &mut State<B>,
    ) -> Result<()> {
        let step = state.progress.step;
        let in_a_row = state.progress.health.skip(what, step);
        let reason = format!("{what} this step is not a finite number");
        state.folder.write(&Line::Skipped {
            step,
            epoch: item.epoch,
            reason: reason.clone(),
            skipped: state.progress.health.skipped,
            seconds: item.seconds,
        })?;
        (self.report)(Event::Skipped {
            step,
            reason: &reason,
            in_a_row,
        });
        let model = learner.model().valid();
        if let Some(what) = self.names.bad_weight(&model) {
            return Err(self.give_up(what, step - in_a_row, 0, &model, state));
        }
        // a run must not end well on weights that give no numbers, or without a single good step
        let is_last = step == self.windows.num_steps();
        let is_over = in_a_row >= MOST_IN_A_ROW || is_last && !self.is_good(&model, state);
        match state.progress.health.bad.take_if(|_| is_over) {
            Some(bad) => Err(self.give_up(bad.what, bad.step, bad.in_a_row - 1, &model, state)),
            None => Ok(()),
        }
    }

    /// What is due after a step: an evaluation, a checkpoint, or the end.
    fn follow_up(
        &self,
        learner: &Learner<Components<B>>,
        events: &mut SupervisedTrainingEventProcessor<Components<B>>,
        state: &mut State<B>,
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
        if self.checkpoint_is_due(&state.progress) || state.stopped.is_some() {
            let model = learner.model().valid();
            self.check_weights(&model, state)?;
            self.save_checkpoint(&model, state)?;
        }
        Ok(())
    }

    /// The evaluation that is due. One that is interrupted leaves no trace and stays due.
    fn evaluate(
        &self,
        learner: &Learner<Components<B>>,
        events: &mut SupervisedTrainingEventProcessor<Components<B>>,
        state: &mut State<B>,
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
        let result = guarded(|| evaluate(&model, &self.eval, interrupted, heard));
        let result = result.map_err(|OutOfMemory| {
            let when = format!("in the evaluation after step {}", state.progress.step);
            self.out_of_memory(when, &model, state)
        })??;
        events.process_valid(LearnerEvent::EndEpoch(1));
        let Some(result) = result else {
            return Ok(());
        };
        let (step, loss) = (state.progress.step, result.loss);
        if !loss.is_finite() {
            let what = "the evaluation loss after".into();
            return Err(self.give_up(what, step, 0, &model, state));
        }
        state.folder.write(&Line::Eval {
            step,
            loss,
            perplexity: result.perplexity.min(f64::MAX), // JSON has no infinity
            tokens: result.tokens,
        })?;
        state.progress.evaluation_due = false;
        (self.report)(Event::Evaluated { step, loss });
        if state.progress.best.is_some_and(|best| loss >= best.loss) {
            state.progress.evaluations_without_improvement += 1;
            return Ok(());
        }
        state.progress.best = Some(Best { step, loss });
        state.progress.evaluations_without_improvement = 0;
        self.save_whole(&model, state, "best")
    }
}

/// "the loss of", with the module from which on the numbers are not finite.
fn with_origin(what: String, module: Option<String>) -> String {
    match module {
        Some(module) => format!("the output of {module}, and so {what}"),
        None => what,
    }
}
