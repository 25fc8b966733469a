//! From a plain model to one that trains: LoRA layers beside its linear layers, whole modules, or
//! everything.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::llama::Llama;
use model::load::normal;
use model::weight::{BaseWeight, named_param, param_id};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::base::BaseLinear;
use crate::config::{LoraConfig, LoraInit, LoraLayer};
use crate::error::{Error, Result};
use crate::lora::{AdaptedLinear, Dropout, Lora, mix};

/// A model whose linear layers may be adapted.
pub type AdaptedLlama<B> = Llama<B, AdaptedLinear<B>>;

/// Puts LoRA layers beside the targets and unfreezes `modules_to_save`.
///
/// # Errors
/// [`crate::Error::Fit`], see [`LoraConfig::layers`], or for `modules_to_save` in 4 bits.
pub fn attach<B: Backend>(
    model: &mut AdaptedLlama<B>,
    config: &LoraConfig,
    seed: u64,
    device: &B::Device,
) -> Result<()> {
    let mut layers = config.layers(&model.config)?.into_iter().peekable();
    for (name, linear) in model.projections_mut() {
        if let Some(layer) = layers.next_if(|layer| layer.name == name) {
            linear.lora = Some(fresh(&layer, config.init, seed, device));
        }
    }
    unfreeze(model, |module| config.saves(module))
}

/// Makes every weight of the model a trained one.
///
/// # Errors
/// [`crate::Error::Fit`] if some are in 4 bits, which cannot be trained.
pub fn train_all<B: Backend>(model: &mut AdaptedLlama<B>) -> Result<()> {
    unfreeze(model, |_| true)
}

/// Turns dropout on for one forward pass: `seed` decides what every layer drops.
pub fn set_dropout<B: Backend>(model: &mut AdaptedLlama<B>, probability: f64, seed: u64) {
    for (name, linear) in model.projections_mut() {
        if let Some(lora) = &mut linear.lora {
            let seed = mix(seed ^ param_id(&name).val());
            lora.dropout = Some(Dropout { probability, seed });
        }
    }
}

/// `lora_a` random, `lora_b` zero: the adapted layer starts as the base layer.
fn fresh<B: Backend>(layer: &LoraLayer, init: LoraInit, seed: u64, device: &B::Device) -> Lora<B> {
    let [out, r#in] = layer.shape;
    let name = |part: &str| format!("{}.{part}", layer.name);
    let a = TensorData::new(
        fresh_a(&name("lora_a"), layer, init, seed),
        [layer.rank, r#in],
    );
    Lora {
        lora_a: named_param(&name("lora_a"), Tensor::from_data(a, device)),
        lora_b: named_param(&name("lora_b"), Tensor::zeros([out, layer.rank], device)),
        scaling: layer.scaling,
        dropout: None,
    }
}

fn fresh_a(name: &str, layer: &LoraLayer, init: LoraInit, seed: u64) -> Vec<f32> {
    let [_, r#in] = layer.shape;
    let count = layer.rank * r#in;
    match init {
        LoraInit::Gaussian => normal(seed, name, count, 1.0 / layer.rank as f64),
        LoraInit::Default => {
            let mut rng = ChaCha8Rng::seed_from_u64(seed ^ param_id(name).val());
            let bound = 1.0 / (r#in as f32).sqrt();
            (0..count)
                .map(|_| rng.random_range(-bound..bound))
                .collect()
        }
    }
}

/// Trains the modules that `chosen` picks by name as a whole.
fn unfreeze<B: Backend>(model: &mut AdaptedLlama<B>, chosen: impl Fn(&str) -> bool) -> Result<()> {
    unfreeze_weight(
        &mut model.embed_tokens,
        "model.embed_tokens",
        "weight",
        &chosen,
    );
    unfreeze_weight(&mut model.norm.weight, "model.norm", "weight", &chosen);
    for (index, layer) in model.layers.iter_mut().enumerate() {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let (before, after) = (
            &mut layer.input_layernorm,
            &mut layer.post_attention_layernorm,
        );
        unfreeze_weight(
            &mut before.weight,
            &at("input_layernorm"),
            "weight",
            &chosen,
        );
        unfreeze_weight(
            &mut after.weight,
            &at("post_attention_layernorm"),
            "weight",
            &chosen,
        );
    }
    let mut problems = Vec::new();
    for (name, linear) in model.projections_mut() {
        match &mut linear.base {
            BaseLinear::Dense(base) => {
                unfreeze_weight(&mut base.weight, &name, "weight", &chosen);
                if let Some(bias) = &mut base.bias {
                    unfreeze_weight(bias, &name, "bias", &chosen);
                }
            }
            BaseLinear::Quantized(_) if chosen(&name) => {
                problems.push(format!(
                    "{name} is in 4 bits and cannot be trained as a whole"
                ));
            }
            BaseLinear::Quantized(_) => {}
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Fit { problems }),
    }
}

fn unfreeze_weight<B: Backend, const D: usize>(
    weight: &mut BaseWeight<B, D>,
    module: &str,
    part: &str,
    chosen: &impl Fn(&str) -> bool,
) {
    if chosen(module) {
        *weight = weight.clone().trained(&format!("{module}.{part}"));
    }
}
