//! LoRA: `y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ`.
//!
//! Source: <https://arxiv.org/abs/2106.09685>, `peft/tuners/lora/{config,layer}.py`.

mod decompose;
mod dora;
mod embedding;
mod init;
mod linear;

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Int, Tensor, backend::Backend};
use model::llama::EMBED_TOKENS;
use model::ops::{MatmulBackend, matmul};
use model::weight::BaseWeight;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Computes, LayerMethod, Part, Role, Settings, Values, alpha_problem, rank_problem, read_peft,
    share_problem,
};
use crate::base::{AdaptedBackend, BaseLinear};
use crate::config::{Layer, Pattern, number};
use crate::linear::{Dropout, DropoutBackend, dropped};
pub use init::LoraInit;
pub use linear::{LoraBackend, lora_linear, reference};

/// The tensor of DoRA's lengths.
const MAGNITUDE: &str = "lora_magnitude_vector";

/// The tensors that an update starts with and that are taken out of the base layer.
const START_A: &str = "lora_a_start";
const START_B: &str = "lora_b_start";

/// The settings of LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSettings {
    /// Width of the bottleneck, `r`.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// Probability with which an input element of `lora_a` is dropped while training.
    pub dropout: f64,
    /// Scale by `alpha / √rank` instead of `alpha / rank` (<https://arxiv.org/abs/2312.03732>).
    pub use_rslora: bool,
    /// Weight-decomposed LoRA: the lengths of the weight's rows are trained, too.
    pub use_dora: bool,
    /// How `lora_a` and `lora_b` start.
    pub init: LoraInit,
    /// Which biases of the model are trained as well.
    pub bias: Bias,
    /// LoRA+: how many times the learning rate of `lora_a` that of `lora_b` and of vectors is
    /// (<https://arxiv.org/abs/2402.12354>).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_ratio: Option<f64>,
    /// The learning rate of LoRA on embeddings if there is a `loraplus_lr_ratio`; 1e-6 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_embedding: Option<f64>,
    /// Ranks of single layers: the first key that matches decides.
    pub rank_pattern: Pattern<usize>,
    /// Alphas of single layers: the first key that matches decides.
    pub alpha_pattern: Pattern<f64>,
}

impl Default for LoraSettings {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            init: LoraInit::Default,
            bias: Bias::None,
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: None,
            rank_pattern: Pattern::default(),
            alpha_pattern: Pattern::default(),
        }
    }
}

/// Which biases of the model are trained; in PEFT's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All that there are.
    All,
    /// Those of adapted layers.
    LoraOnly,
}

impl Settings for LoraSettings {
    const NAME: &'static str = "lora";
    const TITLE: &'static str = "LoRA";
    const PEFT_TYPE: &'static str = "LORA";
    const MUST_BE: &'static [(&'static str, Value)] = &[
        ("alora_invocation_tokens", Value::Null),
        ("arrow_config", Value::Null),
        ("corda_config", Value::Null),
        ("eva_config", Value::Null),
        ("fan_in_fan_out", Value::Bool(false)),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
        ("lora_bias", Value::Bool(false)),
        ("lora_ga_config", Value::Null),
        ("megatron_config", Value::Null),
        ("monteclora_config", Value::Null),
        ("target_parameters", Value::Null),
        ("trainable_token_indices", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_qalora", Value::Bool(false)),
        ("velora_config", Value::Null),
        ("ensure_weight_tying", Value::Bool(false)),
        ("loftq_config", Value::Null),
    ];
    const FREE: &'static [&'static str] = &[
        "dropout",
        "init",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
    ];
    const PEFT_NAMES: &'static [(&'static str, &'static str)] = &[
        ("r", "rank"),
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
    ];
    const EMBEDDINGS: bool = true;

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        read_peft(json, json!({"rank": 8, "alpha": 8}))
    }

    fn to_peft(&self) -> Map<String, Value> {
        let settings = json!({
            "alpha_pattern": self.alpha_pattern.to_peft(),
            "bias": self.bias,
            "fan_in_fan_out": false,
            "init_lora_weights": self.init.to_peft(),
            "lora_alpha": number(self.alpha),
            "lora_dropout": self.dropout,
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn unsupported(json: &Map<String, Value>) -> Vec<String> {
        let set = Self::MUST_BE.iter();
        let set = set.filter_map(|(key, wanted)| super::unless_neutral(json, key, wanted));
        let mut problems: Vec<String> = set.collect();
        // the others change the base weights, too, and such an adapter is no use on the original base
        let init = json.get("init_lora_weights").unwrap_or(&Value::Null);
        let plain = init.is_null() || init.is_boolean();
        let harmless = ["gaussian", "orthogonal", "eva"];
        if !plain && !harmless.iter().any(|name| init == name) {
            problems.push(format!(
                "init_lora_weights is {init}: it belongs to a changed base model, convert the \
                 adapter with PEFT's path_initial_model_for_weight_conversion first"
            ));
        }
        problems
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let ranks = || self.rank_pattern.0.iter().map(|(_, rank)| *rank);
        let alphas = || self.alpha_pattern.0.iter().map(|(_, alpha)| *alpha);
        let of_pattern =
            |what: &'static str| move |(key, text)| (key, format!("has {what} that {text}"));
        let numbers = [
            rank_problem("rank", [self.rank]),
            rank_problem("rank_pattern", ranks()).map(of_pattern("a rank")),
            alpha_problem("alpha", [self.alpha]),
            alpha_problem("alpha_pattern", alphas()).map(of_pattern("an alpha")),
        ];
        let mut problems: Vec<_> = numbers.into_iter().flatten().collect();
        let mut unless = |ok: bool, key, text: String| {
            if !ok {
                problems.push((key, text));
            }
        };
        let positive = |rate: Option<f64>| rate.is_none_or(|rate| rate > 0.0 && rate.is_finite());
        for (key, rate) in [
            ("loraplus_lr_ratio", self.loraplus_lr_ratio),
            ("loraplus_lr_embedding", self.loraplus_lr_embedding),
        ] {
            unless(positive(rate), key, "must be above 0".into());
        }
        let needed = self.loraplus_lr_embedding.is_none() || self.loraplus_lr_ratio.is_some();
        unless(
            needed,
            "loraplus_lr_embedding",
            "needs adapter.loraplus_lr_ratio".into(),
        );
        let is_even = self.rank.is_multiple_of(2) && ranks().all(|rank| rank.is_multiple_of(2));
        let orthogonal = self.init == LoraInit::Orthogonal;
        unless(
            !orthogonal || is_even,
            "init",
            "= \"orthogonal\" needs even ranks".into(),
        );
        let is_positive = self.alpha > 0.0 && alphas().all(|alpha| alpha > 0.0);
        unless(
            !self.takes_out() || (is_positive && !self.use_dora),
            "init",
            format!(
                "= {:?} needs alphas above 0 and does not go with use_dora",
                String::from(self.init)
            ),
        );
        problems.extend(share_problem("dropout", self.dropout));
        problems
    }

    fn patterns(&self) -> Vec<&str> {
        let keys = self.rank_pattern.keys().chain(self.alpha_pattern.keys());
        keys.collect()
    }

    fn bias(&self) -> Bias {
        self.bias
    }

    fn is_random(&self) -> bool {
        self.dropout > 0.0
    }

    fn start(&self) -> Option<&'static str> {
        (self.init != LoraInit::Default).then_some("init")
    }

    fn is_converted(&self) -> bool {
        self.takes_out()
    }

    /// The groups of `create_loraplus_optimizer` in `peft/optimizers/loraplus.py`.
    fn rate(&self, part: &Part, learning_rate: f64) -> f64 {
        match self.loraplus_lr_ratio {
            None => 1.0,
            Some(ratio) if part.shape.len() == 1 => ratio,
            Some(_) if part.module() == Some(EMBED_TOKENS) && part.role == Role::Trained => {
                self.loraplus_lr_embedding.unwrap_or(1e-6) / learning_rate
            }
            Some(ratio) if part.end() == "lora_b" => ratio,
            Some(_) => 1.0,
        }
    }
}

impl LoraSettings {
    /// The rank of a layer, and the factor on `x Aᵀ Bᵀ`.
    pub fn rank_and_scaling(&self, layer: &str) -> (usize, f64) {
        let rank = self.rank_pattern.find(layer).unwrap_or(self.rank);
        let alpha = self.alpha_pattern.find(layer).unwrap_or(self.alpha);
        let divisor = match self.use_rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        (rank, alpha / divisor)
    }

    fn takes_out(&self) -> bool {
        self.init.is_taken_out()
    }
}

/// Elements on the host.
fn numbers<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    data.into_vec().expect("converted to f32")
}

impl LayerMethod for LoraSettings {
    type Update<B: Backend> = Lora<B>;

    fn parts(&self, layer: &Layer) -> Vec<Part> {
        let [out, r#in] = layer.shape;
        let (rank, _) = self.rank_and_scaling(&layer.name);
        let [a, b] = match layer.is_embeddings() {
            true => ["lora_embedding_A", "lora_embedding_B"],
            false => ["lora_A.weight", "lora_B.weight"],
        };
        let mut parts = vec![
            Part::of_layer(layer, "lora_a", a, &[rank, r#in]),
            Part::of_layer(layer, "lora_b", b, &[out, rank]),
        ];
        if self.use_dora {
            parts.push(Part::of_layer(layer, MAGNITUDE, MAGNITUDE, &[out]));
        }
        if self.takes_out() {
            let [start_a, start_b] = [(START_A, [rank, r#in]), (START_B, [out, rank])]
                .map(|(end, shape)| Part::of_layer(layer, end, end, &shape).frozen());
            parts.extend([start_a, start_b]);
        }
        parts
    }

    /// The adapted layer starts as the base layer.
    fn fresh<B: Backend>(
        &self,
        layer: &Layer,
        base: &mut BaseLinear<B>,
        seed: u64,
    ) -> Vec<Vec<f32>> {
        let sizes = self.rank_and_scaling(&layer.name);
        let weight = || base.weight();
        let init = self.init;
        let [a, b] = match layer.is_embeddings() {
            true => init::of_embeddings(layer, sizes.0, seed),
            false => init.factors(&layer.name, weight, layer.shape, sizes, seed),
        };
        let mut values = vec![a.clone(), b.clone()];
        if self.use_dora {
            values.push(numbers(base.row_squares().sqrt()));
        }
        if self.takes_out() {
            values.extend([a, b]);
        }
        values
    }

    fn update<B: Backend>(&self, layer: &Layer, mut values: Values<'_, B>) -> Lora<B> {
        let (_, scaling) = self.rank_and_scaling(&layer.name);
        Lora {
            lora_a: values.param("lora_a"),
            lora_b: values.param("lora_b"),
            magnitude: self.use_dora.then(|| values.param(MAGNITUDE)),
            base_squares: None,
            start: self.takes_out().then(|| Factors {
                a: BaseWeight::Frozen(values.frozen(START_A)),
                b: BaseWeight::Frozen(values.frozen(START_B)),
            }),
            scaling,
            dropout: self.dropout,
            seed: None,
        }
    }

    fn kept(&self, layer: &Layer) -> [usize; 2] {
        let (rank, _) = self.rank_and_scaling(&layer.name);
        let scaled = if self.use_dora { layer.shape[0] } else { 0 };
        let taken_out = if self.takes_out() { rank } else { 0 };
        [rank + taken_out + scaled, 0] // between `lora_a` and `lora_b`, and before the rows are scaled
    }

    /// The form that fits the untouched base, see `init`.
    fn convert(&self, layers: &[Layer], values: &mut HashMap<String, Vec<f32>>) -> Option<Self> {
        for layer in layers {
            let (rank, _) = self.rank_and_scaling(&layer.name);
            let mut take = |end: &str| values.remove(&format!("{}.{end}", layer.name));
            let mut a = take("lora_a")?;
            a.extend(take(START_A)?); // [2r, in]
            let (own, start) = (take("lora_b")?, take(START_B)?);
            let rows = own.chunks(rank).zip(start.chunks(rank));
            let both = rows.flat_map(|(own, start)| {
                let start = start.iter().map(|x| -x);
                own.iter().copied().chain(start).collect::<Vec<_>>()
            });
            let b = both.collect(); // [out, 2r]
            values.insert(format!("{}.lora_a", layer.name), a);
            values.insert(format!("{}.lora_b", layer.name), b);
        }
        let factor = if self.use_rslora { 2f64.sqrt() } else { 2.0 }; // the scaling stays
        Some(Self {
            rank: 2 * self.rank,
            alpha: factor * self.alpha,
            rank_pattern: self.rank_pattern.map(|rank| 2 * rank),
            alpha_pattern: self.alpha_pattern.map(|alpha| factor * alpha),
            init: LoraInit::Default,
            ..self.clone()
        })
    }
}

/// What an update starts with and is taken out of the base layer.
#[derive(Module, Debug)]
pub struct Factors<B: Backend> {
    /// `[r, in]`.
    pub a: BaseWeight<B, 2>,
    /// `[out, r]`.
    pub b: BaseWeight<B, 2>,
}

/// The low-rank update of one layer.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// `[r, in]`.
    pub lora_a: Param<Tensor<B, 2>>,
    /// `[out, r]`.
    pub lora_b: Param<Tensor<B, 2>>,
    /// Of DoRA, the lengths of the rows of the adapted weight, `[out]`.
    pub magnitude: Option<Param<Tensor<B, 1>>>,
    /// Of DoRA, the sums of the squares of the base weight's rows, `[out]`, once they are known.
    pub base_squares: Option<BaseWeight<B, 1>>,
    /// What it starts with, if that is taken out of the base layer.
    pub start: Option<Factors<B>>,
    /// The factor on the update.
    pub scaling: f64,
    /// Share of the input elements that are dropped while training.
    pub dropout: f64,
    /// Set while training: decides which are dropped.
    #[module(skip)]
    pub seed: Option<u64>,
}

impl<B: AdaptedBackend> Computes<B> for Lora<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        match &self.magnitude {
            None => self.low_rank(x, base),
            Some(magnitude) => dora::forward(self, magnitude.val(), x, base),
        }
    }

    fn embed(&self, ids: Tensor<B, 1, Int>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        embedding::forward(self, ids, base)
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        let (a, b) = match &self.start {
            Some(start) => self.both(start),
            None => (self.lora_a.val(), self.lora_b.val()),
        };
        let b = b.narrow(0, rows.start, rows.len()); // [rows, r]
        let sum = weight + matmul(b, a).mul_scalar(self.scaling);
        match &self.magnitude {
            None => sum,
            Some(lengths) => {
                let lengths = lengths.val().narrow(0, rows.start, rows.len());
                dora::with_lengths(sum, lengths)
            }
        }
    }

    fn settle(&mut self, base: &BaseLinear<B>) {
        let squares = self.magnitude.is_some().then(|| base.row_squares());
        self.base_squares = squares.map(BaseWeight::Frozen);
    }

    fn draw(&mut self, seed: u64) {
        self.seed = Some(seed);
    }

    fn frozen(&self, part: &str) -> Option<Tensor<B, 2>> {
        let start = self.start.as_ref()?;
        match part {
            START_A => Some(start.a.val()),
            START_B => Some(start.b.val()),
            _ => None,
        }
    }
}

impl<B: AdaptedBackend> Lora<B> {
    /// `x` `[n, in]` through the base layer and the update beside it, without DoRA.
    fn low_rank(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        let Some(start) = &self.start else {
            return lora_linear(x, base, self);
        };
        if self.drops().is_some() {
            let taken = matmul(x.clone(), start.a.val().transpose()).mul_scalar(self.scaling);
            let taken = matmul(taken, start.b.val().transpose()); // nothing of it is dropped
            return lora_linear(x, base, self) - taken;
        }
        let (a, b) = self.both(start);
        let both = Self {
            lora_a: Param::initialized(self.lora_a.id, a),
            lora_b: Param::initialized(self.lora_b.id, b),
            start: None,
            ..self.clone()
        };
        lora_linear(x, base, &both)
    }

    /// The update and what is taken out as one: `[2r, in]` and `[out, 2r]`.
    fn both(&self, start: &Factors<B>) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let a = Tensor::cat(vec![self.lora_a.val(), start.a.val()], 0);
        let b = Tensor::cat(vec![self.lora_b.val(), start.b.val().neg()], 1);
        (a, b)
    }
}

impl<B: Backend> Lora<B> {
    /// An update whose factors `[r, in]` and `[out, r]` follow from other tensors, which have the
    /// gradients.
    pub(super) fn of(a: Tensor<B, 2>, b: Tensor<B, 2>, scaling: f64) -> Self {
        Self {
            lora_a: Param::initialized(ParamId::new(), a),
            lora_b: Param::initialized(ParamId::new(), b),
            magnitude: None,
            base_squares: None,
            start: None,
            scaling,
            dropout: 0.0,
            seed: None,
        }
    }

    /// What is dropped, if anything is.
    fn drops(&self) -> Option<Dropout> {
        let probability = Some(self.dropout).filter(|share| *share > 0.0)?;
        let seed = self.seed?;
        Some(Dropout { probability, seed })
    }
}

impl<B: MatmulBackend + DropoutBackend> Lora<B> {
    /// `x` `[n, in]` to the update `[n, out]`, in plain tensor operations.
    pub fn addition(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.addition_to(dropped(x, self.drops()))
    }

    /// The same of an `x` of which nothing is dropped any more.
    fn addition_to(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let narrow = matmul(x, self.lora_a.val().transpose()); // [n, r]
        let narrow = narrow.mul_scalar(self.scaling);
        matmul(narrow, self.lora_b.val().transpose()) // [n, out]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pattern_that_matches_decides() {
        let settings = LoraSettings {
            rank: 4,
            alpha: 8.0,
            rank_pattern: Pattern(vec![
                ("layers.1.mlp.up_proj".into(), 2),
                ("up_proj".into(), 6),
            ]),
            alpha_pattern: Pattern(vec![("up_proj".into(), 12.0)]),
            ..LoraSettings::default()
        };
        let of = |name| settings.rank_and_scaling(name);
        assert_eq!(of("model.layers.1.mlp.up_proj"), (2, 6.0));
        assert_eq!(of("model.layers.0.mlp.up_proj"), (6, 2.0));
        assert_eq!(of("model.layers.0.mlp.gate_proj"), (4, 2.0));
    }
}
