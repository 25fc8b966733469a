//! From a plain model to one that trains: what a method puts on it, whole modules, or everything.

use std::collections::HashSet;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::linear::Linear;
use model::llama::{EMBED_TOKENS, LM_HEAD, Llama};
use model::weight::{BaseWeight, param_id};

use crate::base::{AdaptedBackend, BaseLinear};
use crate::config::{AdapterConfig, Layer};
use crate::error::{Error, Result};
use crate::linear::{AdaptedLinear, mix};
use crate::methods::{Computes, Method, Part, Role, Update, Values};

/// A model whose linear layers may be adapted.
pub type AdaptedLlama<B> = Llama<B, AdaptedLinear<B>>;

/// Puts a fresh adapter on a model and unfreezes `modules_to_save`.
///
/// # Errors
/// [`crate::Error::Fit`], see [`AdapterConfig::layers`], or for `modules_to_save` in 4 bits.
pub fn attach<B: AdaptedBackend>(
    model: &mut AdaptedLlama<B>,
    config: &AdapterConfig,
    seed: u64,
    device: &B::Device,
) -> Result<()> {
    put(model, config, &Start::Fresh(seed), device)
}

/// What the tensors of an adapter start with.
pub(crate) enum Start<'a> {
    /// What their method says; this decides what is random.
    Fresh(u64),
    /// What this reads.
    Read(&'a dyn Fn(&Part) -> Result<Vec<f32>>),
}

/// Puts an adapter on a model and unfreezes `modules_to_save`, whose values stay as they are.
pub(crate) fn put<B: AdaptedBackend>(
    model: &mut AdaptedLlama<B>,
    config: &AdapterConfig,
    start: &Start<'_>,
    device: &B::Device,
) -> Result<()> {
    let (layers, method) = (config.layers(&model.config)?, &config.method);
    let parts = method.model_parts(&layers, &model.config);
    let in_model = |part: &Part| {
        let values = match start {
            Start::Fresh(seed) => method.fresh_in_model(part, &parts, model, *seed)?,
            Start::Read(_) if part.role == Role::Derived => method.derived(part, &parts),
            Start::Read(read) => read(part)?,
        };
        Ok::<_, Error>((part.clone(), values))
    };
    let parts: Vec<_> = parts.iter().map(in_model).collect::<Result<_>>()?;
    if method.changes_layers() {
        open(model, |name| layers.iter().any(|layer| layer.name == name))?;
        let shared = share(parts, device);
        let mut layers = layers.into_iter().peekable();
        for (name, linear) in model.projections_mut() {
            if let Some(layer) = layers.next_if(|layer| layer.name == name) {
                check_whole(linear.base.is_split(), &name)?;
                linear.update = update(linear, method, &layer, &shared, start, device)?;
            }
        }
    } else {
        model.virtual_tokens = method.virtual_tokens(Values::new(parts, &[], device));
    }
    let parts = config.parts(&model.config)?.into_iter();
    let whole = parts.filter(|part| part.role == Role::Whole);
    let whole: HashSet<String> = whole.map(|part| part.name).collect();
    unfreeze(model, |tensor| whole.contains(tensor))
}

/// Gives a model the layers that only an update tells from what it has: embeddings as a linear layer,
/// and an output layer that is not the embeddings any more. All share their weights.
pub(crate) fn open<B: Backend>(
    model: &mut AdaptedLlama<B>,
    adapts: impl Fn(&str) -> bool,
) -> Result<()> {
    if adapts(EMBED_TOKENS) {
        check_whole(model.embed_tokens.is_split(), EMBED_TOKENS)?;
        let table = model.embed_tokens.val().transpose(); // [d, v]
        model.adapted_embeddings = Some(layer_of(BaseWeight::Frozen(table)));
    }
    if model.config.tie_word_embeddings && adapts(LM_HEAD) {
        untie(model);
    }
    Ok(())
}

/// Refuses to adapt or train a module whose weight is in parts.
pub(crate) fn check_whole(is_split: bool, name: &str) -> Result<()> {
    match is_split {
        true => Err(Error::Split { name: name.into() }),
        false => Ok(()),
    }
}

/// Gives a model an output layer of its own, whose weights are still those of the embeddings.
pub(crate) fn untie<B: Backend>(model: &mut AdaptedLlama<B>) {
    model.lm_head = Some(layer_of(model.embed_tokens.clone()));
    model.config.tie_word_embeddings = false;
}

/// A layer without an update.
fn layer_of<B: Backend>(weight: BaseWeight<B, 2>) -> AdaptedLinear<B> {
    let base = BaseLinear::Dense(Linear { weight, bias: None });
    AdaptedLinear { base, update: None }
}

/// Tensors that all layers share, on the device.
pub(crate) fn share<B: Backend>(
    parts: Vec<(Part, Vec<f32>)>,
    device: &B::Device,
) -> Vec<(Part, Tensor<B, 2>)> {
    let tensor = |(part, values): (Part, Vec<f32>)| {
        let data = TensorData::new(values, part.shape.as_slice());
        (part, Tensor::from_data(data, device))
    };
    parts.into_iter().map(tensor).collect()
}

fn update<B: AdaptedBackend>(
    linear: &mut AdaptedLinear<B>,
    method: &Method,
    layer: &Layer,
    shared: &[(Part, Tensor<B, 2>)],
    start: &Start<'_>,
    device: &B::Device,
) -> Result<Option<Update<B>>> {
    let parts = method.layer_parts(layer);
    let values: Vec<_> = match start {
        Start::Fresh(seed) => method.fresh(layer, &mut linear.base, *seed),
        Start::Read(read) => parts.iter().map(*read).collect::<Result<_>>()?,
    };
    let values = Values::new(parts.into_iter().zip(values), shared, device);
    let mut update = method.update(layer, values);
    if let Some(update) = &mut update {
        update.settle(&linear.base);
    }
    Ok(update)
}

/// Makes every weight of the model a trained one.
///
/// # Errors
/// [`crate::Error::Fit`] if some are in 4 bits, which cannot be trained.
pub fn train_all<B: Backend>(model: &mut AdaptedLlama<B>) -> Result<()> {
    unfreeze(model, |_| true)
}

/// Turns dropout on for one forward pass: `seed` decides what every layer drops.
pub fn draw<B: AdaptedBackend>(model: &mut AdaptedLlama<B>, seed: u64) {
    for (name, linear) in model.projections_mut() {
        if let Some(update) = &mut linear.update {
            update.draw(mix(seed ^ param_id(&name).val()));
        }
    }
}

/// Trains the tensors that `chosen` picks by name as a whole.
pub(crate) fn unfreeze<B: Backend>(
    model: &mut AdaptedLlama<B>,
    chosen: impl Fn(&str) -> bool,
) -> Result<()> {
    unfreeze_weight(&mut model.embed_tokens, EMBED_TOKENS, "weight", &chosen)?;
    unfreeze_weight(&mut model.norm.weight, "model.norm", "weight", &chosen)?;
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
        )?;
        unfreeze_weight(
            &mut after.weight,
            &at("post_attention_layernorm"),
            "weight",
            &chosen,
        )?;
    }
    let mut problems = Vec::new();
    for (name, linear) in model.projections_mut() {
        match &mut linear.base {
            BaseLinear::Dense(base) => {
                unfreeze_weight(&mut base.weight, &name, "weight", &chosen)?;
                if let Some(bias) = &mut base.bias {
                    unfreeze_weight(bias, &name, "bias", &chosen)?;
                }
            }
            BaseLinear::Quantized(_) => {
                let parts = ["weight", "bias"].map(|part| format!("{name}.{part}"));
                if parts.iter().any(|part| chosen(part)) {
                    problems.push(format!(
                        "{name} is in 4 bits and cannot be trained as a whole, nor can its bias"
                    ));
                }
            }
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
) -> Result<()> {
    let name = format!("{module}.{part}");
    if chosen(&name) {
        check_whole(weight.is_split(), module)?;
        *weight = weight.clone().trained(&name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use model::config::LlamaConfig;
    use model::load::{Parts, fresh};
    use serde_json::json;

    use super::*;
    use crate::base::dense;
    use crate::methods::lora::LoraSettings;
    use crate::{Selection, Targets};

    /// A model whose embeddings and output layer are in parts.
    fn split() -> AdaptedLlama<Flex> {
        let json = json!({
            "model_type": "llama", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        });
        let config = LlamaConfig::from_json(&json).unwrap();
        let device = Default::default();
        let parts = Parts::new(&config, &device, fresh(&config, 1), dense).within(4 * 32 * 16);
        parts.llama().unwrap()
    }

    #[test]
    fn what_is_in_parts_is_neither_adapted_nor_trained() {
        let attach = |targets: &[&str], whole: &[&str]| {
            let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
            let config = AdapterConfig {
                selection: Selection {
                    target_modules: Targets::Names(names(targets)),
                    modules_to_save: names(whole),
                    ..Selection::default()
                },
                method: LoraSettings::default().into(),
            };
            super::attach(&mut split(), &config, 1, &Default::default())
        };
        attach(&["q_proj", "down_proj"], &[]).unwrap();
        for (targets, whole, name) in [
            ("embed_tokens", &[][..], EMBED_TOKENS),
            ("lm_head", &[], LM_HEAD),
            ("q_proj", &["lm_head"], LM_HEAD),
            ("q_proj", &["embed_tokens"], EMBED_TOKENS),
        ] {
            let error = attach(&[targets], whole).unwrap_err();
            assert!(
                matches!(&error, Error::Split { name: found } if found == name),
                "{error}"
            );
        }
        assert!(matches!(train_all(&mut split()), Err(Error::Split { .. })));
    }
}
