//! What the dashboard shows of a run, as burn-train metrics.

use std::sync::Arc;

use burn::train::logger::MetricLogger;
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::store::{EpochSummary, MetricsUpdate, Split};
use burn::train::metric::{
    Adaptor, Metric, MetricAttributes, MetricDefinition, MetricMetadata, MetricName, Numeric,
    NumericAttributes, NumericEntry, SerializedEntry,
};

use crate::step::{EvalItem, StepItem};

/// One number of a training step or of an evaluated batch.
#[derive(Clone)]
pub struct Gauge<I> {
    name: MetricName,
    higher_is_better: bool,
    /// The number, and how many tokens it is the mean of.
    read: fn(&I) -> (f64, usize),
    state: NumericMetricState,
}

impl<I> Gauge<I> {
    /// A number where lower is better.
    pub fn new(name: &str, read: fn(&I) -> (f64, usize)) -> Self {
        Self {
            name: Arc::new(name.to_owned()),
            higher_is_better: false,
            read,
            state: NumericMetricState::default(),
        }
    }

    /// A number where higher is better.
    pub fn rising(name: &str, read: fn(&I) -> (f64, usize)) -> Self {
        Self {
            higher_is_better: true,
            ..Self::new(name, read)
        }
    }
}

impl Adaptor<StepItem> for StepItem {
    fn adapt(&self) -> StepItem {
        *self
    }
}

impl Adaptor<EvalItem> for EvalItem {
    fn adapt(&self) -> EvalItem {
        *self
    }
}

impl<I: Clone + Send + Sync + 'static> Metric for Gauge<I> {
    type Input = I;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: None,
            higher_is_better: self.higher_is_better,
        }
        .into()
    }

    fn update(&mut self, item: &I, _: &MetricMetadata) -> SerializedEntry {
        let format = FormatOptions::new(self.name()).precision(4);
        let (value, tokens) = (self.read)(item);
        self.state.update(value, tokens, format)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl<I> Numeric for Gauge<I> {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}

/// Keeps burn-train from writing a log file a metric: `metrics.jsonl` has them all.
pub struct NoMetricFiles;

impl MetricLogger for NoMetricFiles {
    fn log(&mut self, _: MetricsUpdate, _: usize, _: &Split) {}

    fn read_numeric(
        &mut self,
        name: &str,
        _: usize,
        _: &Split,
    ) -> Result<Vec<NumericEntry>, String> {
        Err(format!("{name} is not kept"))
    }

    fn log_metric_definition(&mut self, _: MetricDefinition) {}

    fn log_epoch_summary(&mut self, _: EpochSummary) {}
}
