//! How a run looks while it goes on: the dashboard in a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use burn::train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};
use burn::train::{Interrupter, LearnerSummary};
use train::fit::Event;
use train::run_folder::{Line, peak_memory_bytes};

use crate::dashboard::scale::number;
use crate::dashboard::state::{
    GRADIENT_NORM, LEARNING_RATE, LOSS, MEMORY, State, TOKENS, Weight, duration,
};
use crate::dashboard::{Dashboard, lock};
use crate::output::Output;
use crate::terminal;

/// What a run shows, as burn-train's renderer and as the listener of its events; clones share it.
#[derive(Clone)]
pub struct Renderer {
    state: Arc<Mutex<State>>,
    dashboard: Option<Dashboard>,
    names: HashMap<MetricId, String>,
    folder: PathBuf,
    log_every: usize,
    output: Output,
}

impl Renderer {
    /// For a run in `folder`, of which those in `past` of `total` steps have been taken; with the
    /// dashboard if stderr is a terminal and it is wanted.
    pub fn new(
        folder: PathBuf,
        no_tui: bool,
        interrupter: Interrupter,
        log_every: usize,
        output: Output,
    ) -> Self {
        let state = Arc::new(Mutex::new(State {
            title: folder.display().to_string(),
            ..State::default()
        }));
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let terminal = std::io::stderr().is_terminal() && !dumb;
        let wanted = terminal && !no_tui && !output.is_quiet();
        let dashboard = wanted.then(|| Dashboard::open(state.clone(), interrupter));
        Self {
            state,
            dashboard: dashboard.and_then(Result::ok),
            names: HashMap::new(),
            folder,
            log_every,
            output,
        }
    }

    /// Shows a run of `total` steps, of which those in `past` have been taken.
    pub fn begin(&self, past: &[Line], total: usize) {
        lock(&self.state).begin(past, total);
    }

    /// Shows what a run tells.
    pub fn tell(&self, event: Event<'_>) {
        let (text, weight) = match event {
            Event::Evaluated { step, loss } => {
                lock(&self.state).eval_loss(step, loss);
                let perplexity = loss.exp();
                let text = format!("step {step}  eval loss {loss:.4}  perplexity {perplexity:.3}");
                (text, Weight::Note)
            }
            Event::Saved { checkpoint } => {
                let short = checkpoint.strip_prefix(&self.folder); // the title says the rest
                let name = match (self.is_drawn(), short) {
                    (true, Ok(short)) => short,
                    _ => checkpoint,
                };
                (format!("saved {}", name.display()), Weight::Detail)
            }
            Event::Spike { step, loss, mean } => {
                lock(&self.state).spike(step, loss);
                if !self.is_drawn() {
                    return; // the line of the step says it
                }
                let (loss, mean) = (number(loss), number(mean));
                let text = format!("step {step}  spike: loss {loss} after a mean of {mean}");
                (text, Weight::Note)
            }
            Event::Skipped {
                step,
                reason,
                in_a_row,
            } => {
                lock(&self.state).skip(step);
                let text =
                    format!("warning: step {step} is skipped ({in_a_row} in a row): {reason}");
                (text, Weight::Warning)
            }
        };
        self.say(text, weight);
    }

    fn say(&self, text: String, weight: Weight) {
        match (self.is_drawn(), weight) {
            (true, _) => lock(&self.state).say(text, weight),
            (false, Weight::Detail) => self.output.detail(text),
            (false, Weight::Note | Weight::Warning) => self.output.note(text),
        }
    }

    /// Whether there is a dashboard, and the terminal still shows it.
    fn is_drawn(&self) -> bool {
        self.dashboard.is_some() && terminal::is_taken()
    }

    /// Gives the screen back, and says the warnings again that were on it. A run that failed has not
    /// done so.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.ended = true;
        let messages = std::mem::take(&mut state.messages);
        drop(state); // the dashboard looks whether it has ended
        if let Some(dashboard) = &self.dashboard {
            dashboard.close();
        }
        for message in messages.iter().filter(|message| message.is_warning) {
            self.output.note(&message.text);
        }
    }

    /// A step as a plain line.
    fn line(&self, state: &State) {
        let (step, total) = (state.step, state.total);
        let is_spike = state.is_spike();
        if !step.is_multiple_of(self.log_every) && step != total && !is_spike {
            return;
        }
        let value = |name: &str| state.latest(name).unwrap_or(f64::NAN);
        let left = state.left().map(duration);
        self.output.note(format_args!(
            "step {step}/{total}  loss {:.4}{}  lr {:.3e}  grad norm {:.3}  {:.0} tokens/s  epoch {:.2}{}",
            value(LOSS),
            if is_spike { " (spike)" } else { "" },
            value(LEARNING_RATE),
            value(GRADIENT_NORM),
            value(TOKENS),
            state.epoch.unwrap_or(f64::NAN),
            left.map_or(String::new(), |left| format!("  ETA {left}")),
        ));
    }
}

impl MetricsRendererTraining for Renderer {
    fn update_train(&mut self, state: MetricState) {
        let MetricState::Numeric(entry, number) = state else {
            return;
        };
        let value = match number {
            NumericEntry::Value(value) => value,
            NumericEntry::Aggregated {
                aggregated_value, ..
            } => aggregated_value,
        };
        if let Some(name) = self.names.get(&entry.metric_id) {
            lock(&self.state).train_value(name, value);
        }
    }

    fn update_valid(&mut self, _: MetricState) {} // the run tells the loss of the whole evaluation

    fn render_train(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        let Some(progress) = item.progress else {
            return;
        };
        let mut state = lock(&self.state);
        state.train_value(MEMORY, peak_memory_bytes() as f64);
        state.progress(progress.items_processed, progress.items_total);
        if !self.is_drawn() {
            self.line(&state);
        }
    }

    fn render_valid(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        if let Some(progress) = item.progress {
            let (done, all) = (progress.items_processed, progress.items_total);
            lock(&self.state).status(format!("evaluating {done}/{all}"));
        }
    }

    fn on_train_end(
        &mut self,
        _: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        self.close();
        Ok(())
    }
}

impl MetricsRendererEvaluation for Renderer {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}

    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl MetricsRenderer for Renderer {
    fn manual_close(&mut self) {
        self.close();
    }

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name);
    }
}
