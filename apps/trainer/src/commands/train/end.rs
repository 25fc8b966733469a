//! How a run ends, and what is said of it: where its results are, or how it goes on.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};
use train::checkpoint::Checkpoints;
use train::fit::{Outcome, Stopped};
use train::memory::Compared;
use train::report::RunRecord;
use train::run_folder::{RECIPE_FILE, results};

use super::super::gib;
use crate::output::{Output, word};
use crate::signals;

/// A run that has ended.
pub struct Finished {
    /// The run folder.
    pub folder: PathBuf,
    /// The folder of what was trained; written unless the run was interrupted.
    pub result: PathBuf,
    /// How it went.
    pub outcome: Outcome,
    /// The most memory it held, predicted and measured.
    pub memory: Compared,
}

impl Finished {
    /// Says where the results are, and gives the exit code.
    pub fn announce(&self, output: &Output) -> Result<ExitCode> {
        let Self {
            folder,
            result,
            outcome,
            memory,
        } = self;
        let interrupted = outcome.stopped == Some(Stopped::Interrupted);
        let kind = result.file_name().unwrap_or_default().to_string_lossy();
        let json = json!({
            "run": folder,
            "steps": outcome.steps,
            "loss": outcome.loss,
            "best": outcome.best.map(|best| json!({"step": best.step, "loss": best.loss})),
            "interrupted": interrupted,
            "memory": memory,
            kind: (!interrupted).then_some(result), // an interrupted run has only checkpoints
        });
        let text = match outcome.stopped {
            Some(Stopped::Interrupted) => format!(
                "interrupted after step {}; {}",
                outcome.steps,
                Left::find(folder).how_to_go_on()
            ),
            Some(Stopped::Early) => format!(
                "stopped early after step {}: the evaluation loss does not fall any more\n{}",
                outcome.steps,
                result.display()
            ),
            None => result.display().to_string(),
        };
        self.notes(output);
        output.result(&json, &text)?;
        Ok(match interrupted {
            true => ExitCode::from(signals::INTERRUPTED),
            false => ExitCode::SUCCESS,
        })
    }

    fn notes(&self, output: &Output) {
        let (outcome, memory) = (&self.outcome, &self.memory);
        if let (Some(loss), false) = (outcome.loss, output.json) {
            output.note(format_args!("loss {loss:.4} after step {}", outcome.steps));
        }
        if let (Some(best), false) = (outcome.best, output.json) {
            output.note(format_args!(
                "best evaluation: loss {:.4} after step {} ({})",
                best.loss,
                best.step,
                self.folder.join("best").display()
            ));
        }
        if let Some(measured) = memory.measured_bytes {
            output.note(format_args!(
                "peak memory  {:.2} GiB (predicted {:.2} GiB)",
                gib(measured),
                gib(memory.predicted_bytes)
            ));
        }
    }
}

/// A run that cannot go on now, but later.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct Unfinished {
    /// The run folder.
    pub run: PathBuf,
    /// Why it ended.
    pub source: train::Error,
}

/// What a run that did not come to its end leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    run: PathBuf,
    /// The newest checkpoint: it is complete, or it would have another name.
    checkpoint: Option<PathBuf>,
    /// Folders of adapters or models.
    results: Vec<PathBuf>,
}

impl Left {
    /// Looks into a run folder.
    pub fn find(run: &Path) -> Self {
        let newest = Checkpoints::new(run, 0).newest_before(usize::MAX);
        Self {
            run: run.into(),
            checkpoint: newest.ok().flatten(),
            results: results(run),
        }
    }

    /// What is complete, and the command to go on with.
    pub fn how_to_go_on(&self) -> String {
        let run = word(&self.run);
        let resume = format!("trainer train --resume {run}");
        let complete = self.checkpoint.iter().chain(&self.results);
        let complete: Vec<_> = complete.map(|path| path.display().to_string()).collect();
        let are = if complete.len() == 1 { "is" } else { "are" };
        let complete = format!("{} {are} complete", complete.join(" and "));
        match (&self.checkpoint, self.results.is_empty()) {
            (Some(_), _) => format!("{complete}; go on with: {resume}"),
            (None, true) => {
                format!("it has no checkpoint yet and begins again; go on with: {resume}")
            }
            // from the beginning, it would overwrite them
            (None, false) => format!(
                "{complete}, and there is no checkpoint yet; begin again with: {}",
                self.anew()
            ),
        }
    }

    /// The command that begins a new run by its recipe.
    pub fn anew(&self) -> String {
        let recipe = self.run.join(RECIPE_FILE);
        format!("trainer train {} --output ANOTHER", word(&recipe))
    }

    /// What to do about numbers that are not finite; `good` is the newest checkpoint from before.
    pub fn after_bad_numbers(&self, saved: Option<&Path>, good: Option<&Path>) -> String {
        let mut again = self.anew() + " --set train.learning_rate=LOWER";
        match saved {
            Some(model) if model.ends_with("model") => {
                again.push_str(&format!(" --model {}", word(model)));
            }
            Some(adapter) => again.push_str(&format!(" --set adapter.init_from={}", word(adapter))),
            None => {}
        }
        // otherwise the newest checkpoint is one of the weights that are at fault
        match good.is_some() && good == self.checkpoint.as_deref() {
            true => format!(
                "check the data, and go on behind these rows with: trainer train --resume {}; or begin \
                 anew: {again}",
                word(&self.run)
            ),
            false => format!("check the data, or begin anew: {again}"),
        }
    }

    /// What to do about a device whose memory was too small.
    pub fn after_full_memory(&self, recompute: bool) -> String {
        let again = format!(
            "begin anew with a lower train.micro_batch_size (and train.gradient_accumulation_steps as \
             much higher), data.max_length or adapter.rank, or with --quant nf4: {}",
            self.anew()
        );
        let run = word(&self.run);
        let block = format!("trainer train --resume {run} --set train.recompute=block");
        let complete = match &self.checkpoint {
            Some(checkpoint) => format!("{} is complete; ", checkpoint.display()),
            None => String::new(),
        };
        match recompute {
            false => format!("{complete}go on with less memory: {block}; or {again}"),
            true => format!("{complete}{again}"),
        }
    }

    /// Says how a run goes on that is left at once.
    pub fn tell(&self, output: &Output) {
        if !self.run.join(RECIPE_FILE).exists() {
            let _ = signals::interrupted(output); // before it had begun
            return;
        }
        let record = RunRecord::read(&self.run).unwrap_or_default();
        let (step, best) = (record.last_step(), record.best());
        let json = json!({
            "run": self.run,
            "steps": step,
            "loss": record.steps.last().and_then(|entry| entry.loss),
            "best": best.map(|best| json!({"step": best.step, "loss": best.loss})),
            "interrupted": true,
            "checkpoint": self.checkpoint,
            "adapter": Value::Null,
        });
        let text = format!("left at once after step {step}; {}", self.how_to_go_on());
        // who is not there any more needs no answer
        let _ = output.result(&json, &text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(checkpoint: Option<&str>, results: &[&str]) -> Left {
        Left {
            run: "my runs/one".into(),
            checkpoint: checkpoint.map(PathBuf::from),
            results: results.iter().map(PathBuf::from).collect(),
        }
    }

    #[test]
    fn what_is_complete_is_named_with_the_command_that_goes_on() {
        let resume = "trainer train --resume 'my runs/one'";
        assert_eq!(
            left(Some("c/step-000050"), &["best"]).how_to_go_on(),
            format!("c/step-000050 and best are complete; go on with: {resume}")
        );
        assert_eq!(
            left(None, &[]).how_to_go_on(),
            format!("it has no checkpoint yet and begins again; go on with: {resume}")
        );
        let text = left(None, &["best"]).how_to_go_on();
        assert!(text.contains("trainer train 'my runs/one/recipe.toml' --output"));
    }

    #[test]
    fn a_full_memory_names_what_would_make_it_fit() {
        let left = left(Some("c/step-000050"), &[]);
        let text = left.after_full_memory(false);
        let block = "--resume 'my runs/one' --set train.recompute=block";
        assert!(
            text.starts_with("c/step-000050 is complete; go on"),
            "{text}"
        );
        assert!(
            text.contains(block) && text.contains("micro_batch_size"),
            "{text}"
        );
        let text = left.after_full_memory(true);
        assert!(
            !text.contains("recompute") && text.contains("--quant nf4"),
            "{text}"
        );
    }

    #[test]
    fn bad_numbers_go_on_only_from_good_weights() {
        let left = left(Some("step-2"), &[]);
        let (good, older) = (Path::new("step-2"), Path::new("step-1"));
        let adapter = Path::new("a/adapter");
        let text = left.after_bad_numbers(Some(adapter), Some(good));
        assert!(text.contains("--resume 'my runs/one'"), "{text}");
        for good in [Some(older), None] {
            let text = left.after_bad_numbers(Some(adapter), good);
            assert!(!text.contains("--resume"), "{text}");
            assert!(
                text.ends_with("--set adapter.init_from=a/adapter"),
                "{text}"
            );
        }
        let text = left.after_bad_numbers(Some(Path::new("a/model")), None);
        assert!(text.ends_with("--model a/model"), "{text}");
    }
}
