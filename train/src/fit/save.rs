//! What is saved, and what is not: weights that are no finite numbers.

use std::path::PathBuf;

use adapters::TrainBackend;

use super::Event;
use super::strategy::{State, StepByStep};
use crate::card;
use crate::checkpoint::Snapshot;
use crate::device_failure::guarded;
use crate::error::{Error, Result};
use crate::run_folder::replace_folder;
use crate::step::CausalLm;

impl<B: TrainBackend> StepByStep<B> {
    /// Whether weights have been trained, are finite, and give a finite loss where those before the
    /// last update did.
    pub(super) fn is_good(&self, model: &CausalLm<B::InnerBackend>, state: &State<B>) -> bool {
        let mut window = state
            .good
            .iter()
            .flat_map(|good| &good.window.micro_batches);
        let is_finite = |batch| model.token_nll(batch).iter().all(|nll| nll.is_finite());
        state.progress.updates() > 0
            && self.names.bad_weight(model).is_none()
            && window.all(is_finite)
    }

    /// Ends a run that has come to a number that is not finite: `what` in or after `step`, and in
    /// the `more` steps after it. The last good adapter is saved, and a checkpoint unless it is the
    /// weights that are at fault.
    pub(super) fn give_up(
        &self,
        what: String,
        step: usize,
        more: usize,
        model: &CausalLm<B::InnerBackend>,
        state: &mut State<B>,
    ) -> Error {
        let is_good = self.is_good(model, state);
        let good = state.good.take();
        let weights = match &good {
            _ if is_good => Some(model),
            Some(good) => good.model.as_ref(),
            None => None,
        };
        let name = self.trained.folder_name();
        // what cannot be saved now is the lesser failure
        let saved = weights.filter(|model| self.save_whole(model, state, name).is_ok());
        let suspect = match &good {
            Some(good) if !is_good => good.window.step + 1, // counted from 1 after that update
            _ => usize::MAX,
        };
        if is_good {
            let _ = self.save_checkpoint(model, state);
        }
        Error::NotFinite {
            what,
            step,
            more,
            saved: saved.map(|_| state.folder.path().join(name)),
            checkpoint: self.checkpoints.newest_before(suspect).unwrap_or_default(),
        }
    }

    /// Ends a run whose device had no memory left `when` it computed with `model`: a checkpoint is
    /// saved, for the weights of before are still in the device's memory.
    pub(super) fn out_of_memory(
        &self,
        when: String,
        model: &CausalLm<B::InnerBackend>,
        state: &State<B>,
    ) -> Error {
        if state.progress.step > 0 {
            // what cannot be saved now is the lesser failure
            let _ = guarded(|| match self.names.bad_weight(model) {
                None => self.save_checkpoint(model, state).is_ok(),
                Some(_) => false,
            });
        }
        Error::OutOfMemory {
            when,
            recompute: model.recompute,
        }
    }

    /// Weights that are no numbers are never saved.
    pub(super) fn check_weights(
        &self,
        model: &CausalLm<B::InnerBackend>,
        state: &mut State<B>,
    ) -> Result<()> {
        match self.names.bad_weight(model) {
            None => Ok(()),
            Some(what) => Err(self.give_up(what, state.progress.step, 0, model, state)),
        }
    }

    pub(super) fn save_checkpoint(
        &self,
        model: &CausalLm<B::InnerBackend>,
        state: &State<B>,
    ) -> Result<PathBuf> {
        state.folder.flush()?; // the lines before a checkpoint are not written again
        let checkpoint = self.checkpoints.save(&Snapshot {
            model: &model.model,
            trained: &self.trained,
            base: &self.base,
            recipe: &self.recipe,
            optimizer: &self.optimizer,
            progress: &state.progress,
        })?;
        (self.report)(Event::Saved {
            checkpoint: &checkpoint,
        });
        Ok(checkpoint)
    }

    /// Saves what is trained as `name` in the run folder, which is replaced as a whole, so that it
    /// is never a mixture of two. Weights that are no numbers are not saved.
    pub(super) fn save_whole(
        &self,
        model: &CausalLm<B::InnerBackend>,
        state: &State<B>,
        name: &str,
    ) -> Result<()> {
        if let Some(what) = self.names.bad_weight(model) {
            let step = state.progress.step;
            let checkpoint = self.checkpoints.newest_before(step).unwrap_or_default();
            return Err(Error::NotFinite {
                what,
                step,
                more: 0,
                saved: None,
                checkpoint,
            });
        }
        let run = state.folder.path();
        replace_folder(&run.join(name), |part| {
            let base_name = &self.recipe.model.path;
            let saved = self
                .trained
                .save(&model.model, &self.base, base_name, part)?;
            self.base.copy_tokenizer(&saved)?;
            card::write(&saved, run, &self.recipe, &self.trained)?;
            Ok(saved)
        })
    }
}
