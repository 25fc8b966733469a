//! What keeps one bad step from spoiling a run.
//!
//! A step whose loss or gradient is no finite number is skipped: weights and moments stay as they
//! were. It still uses up its window of rows and its place in the learning-rate schedule, so that a
//! run that goes on later takes the very same steps. A loss far above what it was is marked.

use std::collections::HashSet;

use adapters::TrainBackend;
use burn::module::{AutodiffModule, Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, backend::Backend};
use model::weight::param_id;
use serde::{Deserialize, Serialize};

use crate::exact;

/// Skipped steps in a row that end a run.
pub const MOST_IN_A_ROW: usize = 5;
/// A loss above this many times its running mean is a spike.
pub const SPIKE: f64 = 3.0;
/// What the newest loss weighs in the running mean.
const NEWEST: f64 = 0.2;

/// How well a run goes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// Steps that were skipped.
    pub skipped: usize,
    /// The skipped steps since the last good one.
    pub bad: Option<Bad>,
    /// Exponential mean of the losses so far, the newest weighing a fifth.
    #[serde(with = "exact::option")]
    pub mean_loss: Option<f64>,
}

/// Steps in a row that were skipped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bad {
    /// The first number that was not finite, as "the loss of".
    pub what: String,
    /// In which step, from 1.
    pub step: usize,
    /// How many steps were skipped since, that one among them.
    pub in_a_row: usize,
}

impl Health {
    /// Counts a skipped step, and how many there are in a row.
    pub fn skip(&mut self, what: &str, step: usize) -> usize {
        self.skipped += 1;
        let bad = self.bad.get_or_insert_with(|| Bad {
            what: what.to_owned(),
            step,
            in_a_row: 0,
        });
        bad.in_a_row += 1;
        bad.in_a_row
    }

    /// Counts a good step. Returns the mean of the losses before it if it is a spike above them.
    pub fn take(&mut self, loss: f64) -> Option<f64> {
        self.bad = None;
        let mean = self.mean_loss.unwrap_or(loss);
        self.mean_loss = Some(mean + NEWEST * (loss - mean));
        (loss > SPIKE * mean).then_some(mean)
    }
}

/// Parameters by name, and how their names are told.
pub(super) struct Names(Vec<(ParamId, String)>);

impl Names {
    /// The parameters that are trained, in the order of the model.
    pub fn new(parameters: &[(String, Vec<usize>)]) -> Self {
        let shown = |name: &str| {
            // as the tensors are called in the adapter file
            let name = name.replace(".lora_a", ".lora_A");
            name.replace(".lora_b", ".lora_B")
        };
        let named = parameters
            .iter()
            .map(|(name, _)| (param_id(name), shown(name)));
        Self(named.collect())
    }

    fn first(&self, ids: &HashSet<ParamId>) -> Option<&str> {
        let found = self.0.iter().find(|(id, _)| ids.contains(id));
        found.map(|(_, name)| name.as_str())
    }

    /// What is not finite in a step, as "the loss of"; only then does a tensor come to the host.
    pub fn bad_step<B: TrainBackend, M: AutodiffModule<B>>(
        &self,
        loss: f64,
        grad_norm: f64,
        gradients: &GradientsParams,
        module: &M,
    ) -> Option<String> {
        if !loss.is_finite() {
            return Some("the loss of".into());
        }
        if grad_norm.is_finite() {
            return None;
        }
        let mut bad = BadGradients {
            gradients,
            ids: HashSet::new(),
        };
        Module::<B>::visit(module, &mut bad);
        Some(match self.first(&bad.ids) {
            Some(name) => format!("the gradient of {name} in"),
            None => "the norm of all gradients in".into(), // their squares are too large for f32
        })
    }

    /// The first trained weight that is not finite; one tensor at a time comes to the host.
    pub fn bad_weight<B: Backend, M: Module<B>>(&self, module: &M) -> Option<String> {
        let mut bad = BadWeights(HashSet::new());
        module.visit(&mut bad);
        let name = self.first(&bad.0)?;
        Some(format!("the weight {name} after"))
    }
}

/// Whether a tensor holds nothing but finite numbers.
fn is_finite<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> bool {
    tensor.into_data().iter::<f32>().all(f32::is_finite)
}

struct BadGradients<'a> {
    gradients: &'a GradientsParams,
    ids: HashSet<ParamId>,
}

impl<B: TrainBackend> ModuleVisitor<B> for BadGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let gradient = self.gradients.get::<B::InnerBackend, D>(param.id);
        if gradient.is_some_and(|gradient| !is_finite(gradient)) {
            self.ids.insert(param.id);
        }
    }
}

struct BadWeights(HashSet<ParamId>);

impl<B: Backend> ModuleVisitor<B> for BadWeights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !is_finite(param.val()) {
            self.0.insert(param.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use adapters::AdaptedLlama;
    use burn::backend::{Autodiff, Flex};
    use model::folder::ModelFolder;

    use super::*;
    use crate::trained::Trained;

    type B = Autodiff<Flex>;

    #[test]
    fn the_first_bad_gradient_is_named() {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/models/gqa");
        let config = ModelFolder::open(&folder).unwrap().config;
        let device = Default::default();
        let mut model: AdaptedLlama<B> = adapters::init(&config, 1, &device);
        let trained = Trained::Adapter(crate::recipe::AdapterSection::default().config());
        trained.attach(&mut model, 1, &device).unwrap();
        let names = Names::new(&trained.parameters(&config).unwrap());
        let mut gradients = GradientsParams::new();
        let mut set = |name: &str, value: f32| {
            let gradient = Tensor::<Flex, 2>::from_data([[1.0, value]], &device);
            gradients.remove::<Flex, 2>(param_id(name));
            gradients.register::<Flex, 2>(param_id(name), gradient);
            let bad = |loss, norm| names.bad_step::<B, _>(loss, norm, &gradients, &model);
            assert_eq!(bad(1.0, 2.0), None);
            assert_eq!(bad(f64::NAN, 2.0).unwrap(), "the loss of");
            bad(1.0, f64::INFINITY).unwrap()
        };
        let q = "model.layers.0.self_attn.q_proj.lora_a";
        assert_eq!(set(q, 1e30), "the norm of all gradients in");
        let last = "model.layers.1.mlp.down_proj.lora_b";
        let told = "the gradient of model.layers.1.mlp.down_proj.lora_B in";
        assert_eq!(set(last, f32::NAN), told);
        let told = "the gradient of model.layers.0.self_attn.q_proj.lora_A in";
        assert_eq!(set(q, f32::INFINITY), told);
        assert_eq!(names.bad_weight(&model), None);
    }

    #[test]
    fn a_spike_is_a_loss_above_three_times_the_mean_before_it() {
        let mut health = Health::default();
        assert_eq!(health.take(2.0), None); // there is nothing to compare with
        assert_eq!(health.take(6.0), None);
        assert_eq!(health.mean_loss, Some(2.8));
        assert_eq!(health.take(8.5), Some(2.8));
        assert!((health.mean_loss.unwrap() - 3.94).abs() < 1e-12);
    }

    #[test]
    fn a_good_step_ends_a_row_of_skipped_ones() {
        let mut health = Health::default();
        assert_eq!((health.skip("a", 3), health.skip("b", 4)), (1, 2));
        let bad = health.bad.as_ref().unwrap();
        assert_eq!((bad.what.as_str(), bad.step), ("a", 3));
        health.take(1.0);
        assert_eq!((health.skip("c", 6), health.skipped), (1, 3));
        assert_eq!(health.bad.unwrap().step, 6);
    }
}
