//! Which ranks of an AdaLoRA go, and when.
//!
//! After each step every number has an importance, `|value · gradient|` smoothed over the steps, times
//! how much that varies; a rank has the sum of its value's and its vectors' mean ones. The budget, the
//! ranks of all layers together, falls from `init_r` to `target_r` a layer with the cube of the steps
//! that are left, and the least important ranks beyond it have their value set to zero. They may come
//! back until `tfinal` steps before the end.
//!
//! Source: `RankAllocator` in `peft/tuners/adalora/layer.py`, and `update_and_allocate` in `model.py`,
//! with steps from 0 as PEFT's example and transformers' trainer count them. Unlike there, the last
//! step brings the ranks to the target where no `tfinal` does, whatever `deltaT`.

use std::collections::HashMap;

use burn::module::ParamId;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::weight::param_id;

use super::{AdaloraSettings, AfterStep};
use crate::config::Layer;

/// The tensors of a layer.
const PARTS: [&str; 3] = ["lora_a", "lora_b", "lora_e"];

/// The ranks of all layers, and what decides about them.
#[derive(Debug)]
pub(super) struct Budget<B: Backend> {
    settings: AdaloraSettings,
    /// Steps of the schedule.
    total: usize,
    layers: Vec<String>,
    scores: HashMap<ParamId, Score<B>>,
    /// Which ranks of each layer are left, since they were last told.
    kept: Option<Vec<Vec<bool>>>,
}

/// What is known of the numbers of a parameter.
#[derive(Debug, Clone)]
struct Score<B: Backend> {
    /// `exp_avg_ipt`.
    importance: Tensor<B, 1>,
    /// `exp_avg_unc`.
    uncertainty: Tensor<B, 1>,
}

/// What happens to the ranks after a step.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    Nothing,
    /// So many of all layers stay.
    Allocate(usize),
    /// Those that went stay away.
    Keep,
}

impl<B: Backend> Budget<B> {
    pub(super) fn new(settings: &AdaloraSettings, layers: &[Layer], steps: usize) -> Self {
        Self {
            settings: settings.clone(),
            total: settings.total_step.unwrap_or(steps),
            layers: layers.iter().map(|layer| layer.name.clone()).collect(),
            scores: HashMap::new(),
            kept: None,
        }
    }

    fn id(layer: &str, part: &str) -> ParamId {
        param_id(&format!("{layer}.{part}"))
    }

    /// What happens after `step`, counted from 0.
    fn action(&self, step: usize) -> Action {
        let settings = &self.settings;
        let count = self.layers.len();
        let (first, target) = (settings.init_r * count, settings.target_r * count);
        let end = self.total.saturating_sub(settings.tfinal);
        if step == end || (settings.tfinal == 0 && step + 1 == self.total) {
            return Action::Allocate(target);
        }
        if step > end {
            return Action::Keep;
        }
        if step <= settings.tinit || !step.is_multiple_of(settings.delta_t) {
            return Action::Nothing;
        }
        let gone = (step - settings.tinit) as f64 / (end - settings.tinit) as f64;
        let more = (first - target) as f64 * (1.0 - gone).powi(3);
        Action::Allocate((more + target as f64) as usize)
    }

    fn note(&mut self, id: ParamId, value: &Tensor<B, 1>, gradient: &Tensor<B, 1>) {
        let (beta1, beta2) = (self.settings.beta1, self.settings.beta2);
        let now = (value.clone() * gradient.clone()).abs();
        let before = self.scores.remove(&id).unwrap_or_else(|| Score {
            importance: now.zeros_like(),
            uncertainty: now.zeros_like(),
        });
        let importance = before.importance.mul_scalar(beta1) + now.clone().mul_scalar(1.0 - beta1);
        let off = (now - importance.clone()).abs();
        let uncertainty = before.uncertainty.mul_scalar(beta2) + off.mul_scalar(1.0 - beta2);
        self.scores.insert(
            id,
            Score {
                importance,
                uncertainty,
            },
        );
    }

    /// The scores of all ranks, layer by layer.
    fn ranks(&self) -> Vec<f32> {
        let rank = self.settings.init_r;
        let of = |layer: &str, part: &str| {
            let score = self.scores.get(&Self::id(layer, part))?.clone();
            Some(score.importance * score.uncertainty)
        };
        let of_layer = |layer: &String| {
            let [a, b, e] = PARTS.map(|part| of(layer, part));
            let (a, b, e) = (a?, b?, e?);
            let [r#in, out] = [&a, &b].map(|flat| flat.dims()[0] / rank);
            let a: Tensor<B, 1> = a.reshape([rank, r#in]).mean_dim(1).squeeze_dim(1);
            let b: Tensor<B, 1> = b.reshape([out, rank]).mean_dim(0).squeeze_dim(0);
            Some(e + (a + b))
        };
        let all: Vec<_> = self.layers.iter().filter_map(of_layer).collect();
        match all.len() == self.layers.len() {
            true => Tensor::cat(all, 0).into_data().iter::<f32>().collect(),
            false => Vec::new(), // no gradient has reached some of them yet
        }
    }

    /// Lets all ranks go but the `budget` most important ones; of equal ones, all.
    fn allocate(&mut self, budget: usize) {
        let scores = self.ranks();
        let mut sorted = scores.clone();
        sorted.sort_by(f32::total_cmp);
        let gone = sorted.len().saturating_sub(budget);
        if let Some(most) = gone.checked_sub(1).map(|last| sorted[last]) {
            let kept = scores.chunks(self.settings.init_r);
            let kept = kept.map(|layer| layer.iter().map(|score| *score > most).collect());
            self.kept = Some(kept.collect());
        }
    }

    /// Sets the values to zero that are not kept.
    fn mask(&self, values: &mut HashMap<ParamId, Tensor<B, 1>>) {
        for (layer, kept) in self.layers.iter().zip(self.kept.iter().flatten()) {
            if let Some(e) = values.get_mut(&Self::id(layer, "lora_e")) {
                let gone: Vec<bool> = kept.iter().map(|kept| !kept).collect();
                let gone = Tensor::from_data(TensorData::from(gone.as_slice()), &e.device());
                *e = e.clone().mask_fill(gone, 0.0);
            }
        }
    }
}

impl<B: Backend> AfterStep<B> for Budget<B> {
    fn watches(&self, id: ParamId) -> bool {
        let is_of = |layer: &String| PARTS.iter().any(|part| Self::id(layer, part) == id);
        self.layers.iter().any(is_of)
    }

    fn after(
        &mut self,
        step: usize,
        values: &mut HashMap<ParamId, Tensor<B, 1>>,
        gradients: &HashMap<ParamId, Tensor<B, 1>>,
    ) {
        let step = step - 1; // from 0
        if step < self.total.saturating_sub(self.settings.tfinal) {
            for (id, value) in values.iter() {
                if let Some(gradient) = gradients.get(id) {
                    self.note(*id, value, gradient);
                }
            }
        }
        match self.action(step) {
            Action::Nothing => {}
            Action::Allocate(budget) => {
                self.allocate(budget);
                self.mask(values);
            }
            Action::Keep => {
                self.scores.clear();
                self.mask(values);
            }
        }
    }

    fn state(&self) -> Vec<(String, Vec<f32>)> {
        let mut all = Vec::new();
        for layer in &self.layers {
            for part in PARTS {
                let Some(score) = self.scores.get(&Self::id(layer, part)) else {
                    continue;
                };
                for (name, tensor) in [
                    ("exp_avg_ipt", &score.importance),
                    ("exp_avg_unc", &score.uncertainty),
                ] {
                    let values = tensor.clone().into_data().iter::<f32>().collect();
                    all.push((format!("{layer}.{part}.{name}"), values));
                }
            }
        }
        for (layer, kept) in self.layers.iter().zip(self.kept.iter().flatten()) {
            let kept = kept.iter().map(|kept| f32::from(*kept)).collect();
            all.push((format!("{layer}.kept"), kept));
        }
        all
    }

    fn restore(&mut self, mut state: HashMap<String, Vec<f32>>, device: &B::Device) {
        for layer in &self.layers {
            for part in PARTS {
                let mut read = |name: &str| {
                    let values = state.remove(&format!("{layer}.{part}.{name}"))?;
                    Some(Tensor::from_data(values.as_slice(), device))
                };
                if let (Some(importance), Some(uncertainty)) =
                    (read("exp_avg_ipt"), read("exp_avg_unc"))
                {
                    let score = Score {
                        importance,
                        uncertainty,
                    };
                    self.scores.insert(Self::id(layer, part), score);
                }
            }
        }
        let kept = self.layers.iter().map(|layer| {
            let kept = state.remove(&format!("{layer}.kept"))?;
            Some(kept.iter().map(|kept| *kept != 0.0).collect())
        });
        self.kept = kept.collect();
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;

    fn budget(settings: AdaloraSettings) -> Budget<Flex> {
        let layer = |index| Layer {
            name: format!("model.layers.{index}.self_attn.q_proj"),
            shape: [4, 4],
        };
        Budget::new(&settings, &[layer(0), layer(1)], 20)
    }

    /// `int(12 * (1 - (step - 2) / 14) ** 3 + 4)` in Python.
    #[test]
    fn the_budget_falls_with_the_cube_of_what_is_left() {
        let budget = budget(AdaloraSettings {
            init_r: 8,
            target_r: 2,
            tinit: 2,
            tfinal: 4,
            delta_t: 3,
            ..AdaloraSettings::default()
        });
        let actions: Vec<_> = (0..20).map(|step| budget.action(step)).collect();
        let mut expected = [Action::Nothing; 20];
        for (step, ranks) in [(3, 13), (6, 8), (9, 5), (12, 4), (15, 4), (16, 4)] {
            expected[step] = Action::Allocate(ranks);
        }
        expected[17..].fill(Action::Keep);
        assert_eq!(actions, expected);
    }

    #[test]
    fn the_last_step_brings_the_target() {
        let budget = budget(AdaloraSettings {
            delta_t: 7,
            ..AdaloraSettings::default()
        });
        assert_eq!(budget.action(18), Action::Nothing);
        assert_eq!(budget.action(19), Action::Allocate(16));
    }
}
