//! (IA)³: what a layer puts out is scaled element by element, `y = l ∘ (x Wᵀ + b)`; of feed-forward
//! layers it is what goes in, `y = (l ∘ x) Wᵀ + b`.
//!
//! Source: <https://arxiv.org/abs/2205.05638>, `peft/tuners/ia3/{config,layer,model}.py`.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};
use model::linear::Projection;
use model::load::normal;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Computes, LayerMethod, Part, Settings, Values, read_peft};
use crate::base::{AdaptedBackend, BaseLinear};
use crate::config::{Layer, Selection, Targets};

/// The settings of (IA)³.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ia3Settings {
    /// The adapted layers whose input is scaled: the ends of their names, or a regular expression.
    pub feedforward_modules: Targets,
    /// Begin with scales of 1; false: with random ones.
    pub init_ia3_weights: bool,
}

impl Default for Ia3Settings {
    fn default() -> Self {
        Self {
            feedforward_modules: Targets::Names(vec!["down_proj".into()]),
            init_ia3_weights: true,
        }
    }
}

impl Settings for Ia3Settings {
    const NAME: &'static str = "ia3";
    const TITLE: &'static str = "(IA)³";
    const PEFT_TYPE: &'static str = "IA3";
    const MUST_BE: &'static [(&'static str, Value)] = &[("fan_in_fan_out", Value::Bool(false))];
    const FREE: &'static [&'static str] = &["init_ia3_weights"];
    const NOT_IN_PEFT: &'static [&'static str] = &["layers_to_transform", "layers_pattern"];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        read_peft(json, json!({}))
    }

    fn to_peft(&self) -> Map<String, Value> {
        let settings = json!({
            "fan_in_fan_out": false,
            "feedforward_modules": self.feedforward_modules,
            "init_ia3_weights": self.init_ia3_weights,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let problem = self.feedforward_modules.matches("").err();
        problem
            .map(|problem| ("feedforward_modules", format!("= {problem}")))
            .into_iter()
            .collect()
    }

    fn default_targets() -> Targets {
        let names = ["k_proj", "v_proj", "down_proj"];
        Targets::Names(names.map(str::to_owned).to_vec())
    }

    fn peft_targets() -> Targets {
        Self::default_targets()
    }
}

impl Ia3Settings {
    /// Whether the input of a layer is scaled. Unlike targets, names match without a dot.
    fn scales_input(&self, layer: &str) -> bool {
        match &self.feedforward_modules {
            Targets::Names(names) => names.iter().any(|name| layer.ends_with(name)),
            other => other.matches(layer).unwrap_or(false),
        }
    }
}

impl LayerMethod for Ia3Settings {
    type Update<B: Backend> = Ia3<B>;

    fn parts(&self, layer: &Layer) -> Vec<Part> {
        let [out, r#in] = layer.shape;
        let shape = match self.scales_input(&layer.name) {
            true => [1, r#in],
            false => [out, 1],
        };
        vec![Part::of_layer(layer, "ia3_l", "ia3_l", &shape)]
    }

    fn fresh<B: Backend>(&self, layer: &Layer, _: &mut BaseLinear<B>, seed: u64) -> Vec<Vec<f32>> {
        let values = |part: Part| {
            let count = part.shape.iter().product();
            match self.init_ia3_weights {
                true => vec![1.0; count],
                false => normal(seed, &part.name, count, 1.0),
            }
        };
        self.parts(layer).into_iter().map(values).collect()
    }

    fn update<B: Backend>(&self, layer: &Layer, mut values: Values<'_, B>) -> Ia3<B> {
        Ia3 {
            l: values.param("ia3_l"),
            scales_input: self.scales_input(&layer.name),
        }
    }

    /// What is scaled.
    fn kept(&self, layer: &Layer) -> [usize; 2] {
        let [out, r#in] = layer.shape;
        match self.scales_input(&layer.name) {
            true => [r#in, 0],
            false => [out, 0],
        }
    }

    /// PEFT refuses names of feed-forward layers that are not among those of the adapted ones.
    fn peft_of_selection(&self, selection: &Selection) -> Map<String, Value> {
        let mut names = self.feedforward_modules.clone();
        let targets = selection.target_modules.sorted();
        if let (Targets::Names(names), Targets::Names(targets)) = (&mut names, &targets) {
            names.retain(|name| targets.contains(name));
        }
        Map::from_iter([("feedforward_modules".to_owned(), json!(names))])
    }
}

/// The scales of one layer.
#[derive(Module, Debug)]
pub struct Ia3<B: Backend> {
    /// `[out, 1]`, or `[1, in]`.
    pub l: Param<Tensor<B, 2>>,
    /// Which of the two.
    pub scales_input: bool,
}

impl<B: AdaptedBackend> Computes<B> for Ia3<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        match self.scales_input {
            true => base.forward(x * self.l.val()),
            false => base.forward(x) * self.l.val().transpose(),
        }
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.scales_input {
            true => weight * self.l.val(),
            false => weight * self.l.val().narrow(0, rows.start, rows.len()),
        }
    }

    fn merge_bias(&self, bias: Tensor<B, 1>) -> Tensor<B, 1> {
        match self.scales_input {
            true => bias,
            false => bias * self.l.val().squeeze_dim(1),
        }
    }
}
