//! How a run looks while it goes on: burn-train's dashboard in a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use burn::train::metric::{MetricDefinition, MetricId, NumericEntry};
use burn::train::renderer::tui::TuiMetricsRendererWrapper;
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};
use burn::train::{Interrupter, LearnerSummary};

use crate::output;

/// The dashboard, or plain lines.
pub enum Renderer {
    /// burn-train's.
    Dashboard(Box<TuiMetricsRendererWrapper>),
    /// One line for every `log_every` steps.
    Lines(Lines),
}

impl Renderer {
    /// The dashboard if stderr and stdout are terminals and it is wanted.
    pub fn new(no_tui: bool, interrupter: Interrupter, log_every: usize, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        match terminal && !no_tui && !quiet {
            true => Self::Dashboard(Box::new(TuiMetricsRendererWrapper::new(interrupter, None))),
            false => Self::Lines(Lines::new(log_every, quiet)),
        }
    }

    /// Whether the terminal's screen is taken.
    pub fn is_dashboard(&self) -> bool {
        matches!(self, Self::Dashboard(_))
    }
}

/// Plain lines on stderr.
pub struct Lines {
    log_every: usize,
    quiet: bool,
    names: HashMap<MetricId, String>,
    values: Vec<(String, f64)>,
    started: Option<(Instant, usize)>,
}

impl Lines {
    fn new(log_every: usize, quiet: bool) -> Self {
        Self {
            log_every,
            quiet,
            names: HashMap::new(),
            values: Vec::new(),
            started: None,
        }
    }

    fn value(&self, name: &str) -> f64 {
        let found = self.values.iter().find(|(key, _)| key == name);
        found.map_or(f64::NAN, |(_, value)| *value)
    }

    /// Time left, from the steps taken since the first line.
    fn eta(&mut self, step: usize, total: usize) -> Option<Duration> {
        let (since, first) = *self.started.get_or_insert((Instant::now(), step));
        let taken = step.checked_sub(first).filter(|taken| *taken > 0)?;
        Some(
            since
                .elapsed()
                .mul_f64((total - step) as f64 / taken as f64),
        )
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
        match self {
            Self::Dashboard(tui) => tui.update_train(state),
            Self::Lines(lines) => {
                if let MetricState::Numeric(entry, number) = state {
                    let value = match number {
                        NumericEntry::Value(value) => value,
                        NumericEntry::Aggregated {
                            aggregated_value, ..
                        } => aggregated_value,
                    };
                    let name = lines
                        .names
                        .get(&entry.metric_id)
                        .cloned()
                        .unwrap_or_default();
                    lines.values.push((name, value));
                }
            }
        }
    }

    fn update_valid(&mut self, state: MetricState) {
        if let Self::Dashboard(tui) = self {
            tui.update_valid(state);
        }
    }

    fn render_train(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        match self {
            Self::Dashboard(tui) => tui.render_train(item, indicators),
            Self::Lines(lines) => {
                let Some(progress) = &item.progress else {
                    return;
                };
                let (step, total) = (progress.items_processed, progress.items_total);
                let eta = lines.eta(step, total);
                if !lines.quiet && (step.is_multiple_of(lines.log_every) || step == total) {
                    output::log(format_args!(
                        "step {step}/{total}  loss {:.4}  lr {:.3e}  grad norm {:.3}  {:.0} tokens/s{}",
                        lines.value("Loss"),
                        lines.value("Learning rate"),
                        lines.value("Gradient norm"),
                        lines.value("Speed"),
                        eta.map_or(String::new(), |eta| format!("  ETA {}", duration(eta))),
                    ));
                }
                lines.values.clear();
            }
        }
    }

    fn render_valid(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
        if let Self::Dashboard(tui) = self {
            tui.render_valid(item, indicators);
        }
    }

    fn on_train_end(
        &mut self,
        summary: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        match self {
            Self::Dashboard(tui) => tui.on_train_end(summary),
            Self::Lines(_) => Ok(()),
        }
    }
}

impl MetricsRendererEvaluation for Renderer {
    fn update_test(&mut self, name: EvaluationName, state: MetricState) {
        if let Self::Dashboard(tui) = self {
            tui.update_test(name, state);
        }
    }

    fn render_test(&mut self, item: EvaluationProgress, indicators: Vec<ProgressType>) {
        if let Self::Dashboard(tui) = self {
            tui.render_test(item, indicators);
        }
    }
}

impl MetricsRenderer for Renderer {
    fn manual_close(&mut self) {
        if let Self::Dashboard(tui) = self {
            tui.manual_close();
        }
    }

    fn register_metric(&mut self, definition: MetricDefinition) {
        match self {
            Self::Dashboard(tui) => tui.register_metric(definition),
            Self::Lines(lines) => {
                lines
                    .names
                    .insert(definition.metric_id.clone(), definition.name);
            }
        }
    }
}
