//! What the tests of whole runs share: tiny models, rows, and a run as the commands make one.
//!
//! burn-train installs one logger a process: of several runs in one test binary, only the first
//! has an `experiment.log`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::backend::Autodiff;
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining, ProgressType, TrainingProgress,
};
use burn::train::{Interrupter, LearnerSummary, metric::MetricDefinition};
use model::folder::ModelFolder;
use serde_json::Value;
use train::fit::{Event, Outcome, Run, fit};
use train::recipe::{Recipe, parse_setting};
use train::run_folder::METRICS_FILE;
use train::session::{self, Rows};

/// The backend that the tests train on.
#[cfg(not(feature = "wgpu"))]
pub type B = Autodiff<burn::backend::Flex>;
/// With `--features wgpu` the curves are those of the first graphics adapter.
#[cfg(feature = "wgpu")]
pub type B = Autodiff<burn::backend::Wgpu>;

/// A folder of `model/tests/fixtures/models`.
pub fn tiny_model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../model/tests/fixtures/models")
        .join(name)
}

/// The recipe for a base model with `section.key=value` settings; rows are not packed unless these
/// say so, since steps are counted in rows.
pub fn recipe(base: &Path, settings: &[String]) -> Recipe {
    let given = [
        format!("model.path={}", base.display()),
        "data.train=given as rows".into(),
        "data.eval=given as rows".into(),
        "data.packing=false".into(),
    ];
    let all = given.iter().chain(settings);
    let all: Vec<_> = all.map(|text| parse_setting(text).unwrap()).collect();
    Recipe::read(None, &all).unwrap()
}

/// A new run in an empty folder.
pub fn start(mut recipe: Recipe, rows: &Rows, output: &Path) -> Run<B> {
    let trained = session::trained(&mut recipe).unwrap();
    let base = ModelFolder::open(Path::new(&recipe.model.path)).unwrap();
    let device = Default::default();
    session::start(recipe, trained, base, rows.clone(), output, device).unwrap()
}

/// Trains to the end, or until `report` interrupts.
pub fn finish(
    run: Run<B>,
    report: impl Fn(Event<'_>, &Interrupter) + Send + Sync + 'static,
) -> train::Result<Outcome> {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    let report = Arc::new(move |event: Event<'_>| report(event, &handle));
    fit(run, Silent(Box::new(|_| {})), interrupter, report)
}

/// The lines of a run's metrics.jsonl of one kind, `train` or `eval`.
pub fn metrics(run: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join(METRICS_FILE)).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.filter(|line: &Value| line["kind"] == kind).collect()
}

/// Draws nothing, but hears of each evaluated batch, counted from 1 in every evaluation.
pub struct Silent(pub Box<dyn FnMut(usize) + Send + Sync>);

impl MetricsRendererTraining for Silent {
    fn update_train(&mut self, _: MetricState) {}
    fn update_valid(&mut self, _: MetricState) {}
    fn render_train(&mut self, _: TrainingProgress, _: Vec<ProgressType>) {}
    fn render_valid(&mut self, item: TrainingProgress, _: Vec<ProgressType>) {
        self.0(item.progress.unwrap().items_processed);
    }
    fn on_train_end(
        &mut self,
        _: Option<LearnerSummary>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl MetricsRendererEvaluation for Silent {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
    fn render_test(&mut self, _: EvaluationProgress, _: Vec<ProgressType>) {}
}

impl MetricsRenderer for Silent {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, _: MetricDefinition) {}
}
