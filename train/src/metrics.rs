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

/// One number of a training step.
#[derive(Clone)]
pub struct DashboardMetric {
    name: MetricName,
    unit: Option<&'static str>,
    read: fn(&StepItem) -> f64,
    state: NumericMetricState,
}

impl DashboardMetric {
    /// A metric of this name, in this unit.
    pub fn new(name: &str, unit: Option<&'static str>, read: fn(&StepItem) -> f64) -> Self {
        Self {
            name: Arc::new(name.to_owned()),
            unit,
            read,
            state: NumericMetricState::default(),
        }
    }
}

impl Adaptor<StepItem> for StepItem {
    fn adapt(&self) -> StepItem {
        *self
    }
}

impl Metric for DashboardMetric {
    type Input = StepItem;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        let unit = self.unit.map(str::to_owned);
        let higher_is_better = self.unit.is_some();
        NumericAttributes {
            unit,
            higher_is_better,
        }
        .into()
    }

    fn update(&mut self, item: &StepItem, _: &MetricMetadata) -> SerializedEntry {
        let format = FormatOptions::new(self.name()).precision(4);
        self.state
            .update((self.read)(item), item.trained_tokens, format)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for DashboardMetric {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}

/// The loss of an evaluation, weighted by tokens.
#[derive(Clone)]
pub struct EvalLoss {
    name: MetricName,
    state: NumericMetricState,
}

impl EvalLoss {
    /// Named as the training loss, so that both share a plot.
    pub fn new() -> Self {
        Self {
            name: Arc::new("Loss".to_owned()),
            state: NumericMetricState::default(),
        }
    }
}

impl Adaptor<EvalItem> for EvalItem {
    fn adapt(&self) -> EvalItem {
        *self
    }
}

impl Metric for EvalLoss {
    type Input = EvalItem;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: None,
            higher_is_better: false,
        }
        .into()
    }

    fn update(&mut self, item: &EvalItem, _: &MetricMetadata) -> SerializedEntry {
        let format = FormatOptions::new(self.name()).precision(4);
        let mean = item.nll / item.trained_tokens as f64;
        self.state.update(mean, item.trained_tokens, format)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for EvalLoss {
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
