//! How a run looks while it goes on: the dashboard in a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use burn::train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};
use burn::train::{Interrupter, LearnerSummary};
use train::fit::Event;
use train::run_folder::Line;

use crate::dashboard::Dashboard;
use crate::output::Output;

/// What a run shows, as burn-train's renderer and as the listener of its events; clones share it.
#[derive(Clone)]
pub struct Renderer {
    view: View,
    names: HashMap<MetricId, String>,
}

#[derive(Clone)]
enum View {
    Dashboard(Dashboard),
    Lines(Lines),
}

/// Plain lines on stderr.
#[derive(Clone)]
struct Lines {
    output: Output,
    log_every: usize,
    /// Values of the step at hand, by name.
    values: HashMap<String, f64>,
    /// When the first step was done, and which.
    first: Option<(Instant, usize)>,
    /// The last step whose loss was a spike, 0 if there is none.
    spike: Arc<AtomicUsize>,
}

impl Renderer {
    /// The dashboard if stderr is a terminal and it is wanted.
    pub fn new(
        title: String,
        no_tui: bool,
        interrupter: Interrupter,
        log_every: usize,
        output: Output,
    ) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let terminal = std::io::stderr().is_terminal() && !dumb;
        let wanted = terminal && !no_tui && !output.is_quiet();
        let dashboard = wanted.then(|| Dashboard::open(title, interrupter));
        let view = match dashboard {
            Some(Ok(dashboard)) => View::Dashboard(dashboard),
            _ => View::Lines(Lines {
                output,
                log_every,
                values: HashMap::new(),
                first: None,
                spike: Arc::new(AtomicUsize::new(0)),
            }),
        };
        Self {
            view,
            names: HashMap::new(),
        }
    }

    /// Shows a run of `total` steps, of which those in `past` have been taken.
    pub fn begin(&self, past: &[Line], total: usize) {
        if let View::Dashboard(dashboard) = &self.view {
            dashboard.begin(past, total);
        }
    }

    /// Shows what a run tells.
    pub fn tell(&self, event: Event<'_>) {
        let text = match &event {
            Event::Evaluated { step, loss } => {
                format!(
                    "step {step}  eval loss {loss:.4}  perplexity {:.3}",
                    loss.exp()
                )
            }
            Event::Saved { checkpoint } => format!("saved {}", checkpoint.display()),
            Event::Spike { step, loss, mean } => {
                format!("step {step}  spike: loss {loss:.4} after a mean of {mean:.4}")
            }
            Event::Skipped {
                step,
                reason,
                in_a_row,
            } => format!("warning: step {step} is skipped ({in_a_row} in a row): {reason}"),
        };
        match (&self.view, event) {
            (View::Dashboard(dashboard), event) => {
                if let Event::Evaluated { step, loss } = event {
                    dashboard.eval_loss(step, loss);
                }
                dashboard.message(text);
            }
            (View::Lines(lines), Event::Saved { .. }) => lines.output.detail(text),
            (View::Lines(lines), Event::Spike { step, .. }) => {
                lines.spike.store(step, Ordering::Relaxed);
            }
            (View::Lines(lines), Event::Evaluated { .. } | Event::Skipped { .. }) => {
                lines.output.note(text);
            }
        }
    }

    /// Gives the screen back; a run that failed has not done so.
    pub fn close(&self) {
        if let View::Dashboard(dashboard) = &self.view {
            dashboard.close();
        }
    }
}

impl Lines {
    fn step(&mut self, step: usize, total: usize) {
        let (since, first) = *self.first.get_or_insert((Instant::now(), step));
        let taken = step.saturating_sub(first);
        let left = (taken > 0).then(|| {
            since
                .elapsed()
                .mul_f64((total - step) as f64 / taken as f64)
        });
        let is_spike = self.spike.load(Ordering::Relaxed) == step;
        if step.is_multiple_of(self.log_every) || step == total || is_spike {
            let value = |name: &str| self.values.get(name).copied().unwrap_or(f64::NAN);
            self.output.note(format_args!(
                "step {step}/{total}  loss {:.4}{}  lr {:.3e}  grad norm {:.3}  {:.0} tokens/s{}",
                value("Loss"),
                if is_spike { " (spike)" } else { "" },
                value("Learning rate"),
                value("Gradient norm"),
                value("Tokens/s"),
                left.map_or(String::new(), |left| format!("  ETA {}", duration(left))),
            ));
        }
        self.values.clear();
    }
}

/// `1h02m`, `3m20s` or `12s`.
pub fn duration(time: Duration) -> String {
    match time.as_secs() {
        s if s >= 3600 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        s if s >= 60 => format!("{}m{:02}s", s / 60, s % 60),
        s => format!("{s}s"),
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
        let Some(name) = self.names.get(&entry.metric_id) else {
            return;
        };
        match &mut self.view {
            View::Dashboard(dashboard) => dashboard.train_value(name, value),
            View::Lines(lines) => {
                lines.values.insert(name.clone(), value);
            }
        }
    }

    fn update_valid(&mut self, _: MetricState) {} // the run tells the loss of the whole evaluation

    fn render_train(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        let Some(progress) = item.progress else {
            return;
        };
        let (step, total) = (progress.items_processed, progress.items_total);
        match &mut self.view {
            View::Dashboard(dashboard) => dashboard.progress(step, total),
            View::Lines(lines) => lines.step(step, total),
        }
    }

    fn render_valid(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        if let (View::Dashboard(dashboard), Some(progress)) = (&self.view, item.progress) {
            let (done, all) = (progress.items_processed, progress.items_total);
            dashboard.status(format!("evaluating {done}/{all}"));
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
