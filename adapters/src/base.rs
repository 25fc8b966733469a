//! The base model under the adapters: its linear layers dense or in 4 bits.

use burn::module::Module;
use burn::tensor::{Tensor, backend::AutodiffBackend, backend::Backend};
use model::checkpoint::Checkpoint;
use model::config::LlamaConfig;
use model::folder::ModelFolder;
use model::linear::{Linear, Projection};
use model::load::{LinearSource, build, fresh, is_redundant};
use model::ops::ModelBackend;
use quant::bitsandbytes::{self, Stored};
use quant::{PackedWeight, QuantBackend, QuantLinear, Scheme, quantize};

use crate::attach::AdaptedLlama;
use crate::error::{Error, Result};
use crate::lora::AdaptedLinear;

/// A backend that has every operation of an adapted model.
pub trait AdaptedBackend: ModelBackend + QuantBackend {}

impl<B: ModelBackend + QuantBackend> AdaptedBackend for B {}

/// A backend that can train: it differentiates, and its inner backend has the operations, too.
pub trait TrainBackend: AdaptedBackend + AutodiffBackend<InnerBackend: AdaptedBackend> {}

impl<B: AdaptedBackend + AutodiffBackend<InnerBackend: AdaptedBackend>> TrainBackend for B {}

/// A linear layer of the base model.
#[allow(
    clippy::large_enum_variant,
    reason = "there are a few hundred of them, and a module in a box is none"
)]
#[derive(Module, Debug)]
pub enum BaseLinear<B: Backend> {
    /// Plain tensors.
    Dense(Linear<B>),
    /// The weight in 4 bits.
    Quantized(QuantLinear<B>),
}

impl<B: QuantBackend> Projection<B> for BaseLinear<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Dense(linear) => linear.forward(x),
            Self::Quantized(linear) => linear.forward(x),
        }
    }
}

/// Loads a base model without adapters.
///
/// The linear layers of the decoder become 4-bit ones by `scheme`, each as soon as it is read;
/// `lm_head` stays dense. A checkpoint that is quantised already stays as it is: its 4-bit layers
/// with their own blocks, its dense ones dense.
///
/// # Errors
/// [`model::Error::Tensors`] with everything that is missing, unexpected, of another shape, or not
/// in order among the parts of a 4-bit weight, or in another format than that of `scheme`; [`Error::Quantization`] if the checkpoint is
/// quantised in a way that is not supported; [`Error::Weight`] if a weight cannot be quantised.
pub fn load<B: Backend>(
    config: &LlamaConfig,
    checkpoint: &Checkpoint,
    scheme: Option<Scheme>,
    device: &B::Device,
) -> Result<AdaptedLlama<B>> {
    let wrong = |source| Error::Quantization {
        path: checkpoint.path().into(),
        source,
    };
    if let Some(quantization) = &config.quantization_config {
        bitsandbytes::check_config(quantization).map_err(wrong)?;
    }
    let has = |name: &str| checkpoint.shape(name).is_some();
    let is_stored = |weight: &str| bitsandbytes::is_stored(weight, has);
    check(config, checkpoint, scheme, is_stored)?;
    let scheme = scheme.filter(|_| config.quantization_config.is_none());
    let values = |name: &str, _: &[usize]| checkpoint.read(name);
    build(config, device, values, |mut source: LinearSource<B>| {
        let name = format!("{}.weight", source.name);
        if !is_stored(&name) {
            return unadapted(source, scheme);
        }
        let stored = Stored::find(&name, source.shape, |part| checkpoint.view(part));
        let weight = stored.and_then(|stored| stored.read()).map_err(wrong)?;
        checkpoint.release(&name);
        let bias = source.bias()?;
        Ok(quantized(PackedWeight::new(weight, source.device), bias))
    })
}

/// Makes a base model with fresh weights, see [`fresh`]; it is dense.
pub fn init<B: Backend>(config: &LlamaConfig, seed: u64, device: &B::Device) -> AdaptedLlama<B> {
    let model = build(config, device, fresh(config, seed), |source| {
        unadapted(source, None)
    });
    model.expect("fresh values cannot fail")
}

/// Bytes of a base model's weights in memory: those that are quantised, by `scheme` or because
/// their checkpoint is, in 4 bits, the others in f32.
///
/// # Errors
/// [`Error::Quantization`] if the checkpoint is quantised in a way that is not supported.
pub fn base_bytes(base: &ModelFolder, scheme: Option<Scheme>) -> Result<u64> {
    let config = &base.config;
    let stored = config.quantization_config.as_ref().map(|quantization| {
        bitsandbytes::check_config(quantization).map_err(|source| Error::Quantization {
            path: base.path.clone(),
            source,
        })
    });
    let scheme = stored.transpose()?.or(scheme);
    let f32s = |len: u64| len * size_of::<f32>() as u64;
    let linear = config.projections();
    let layer: u64 = linear
        .iter()
        .map(|(_, [out, r#in], _)| (*out as u64) * (*r#in as u64))
        .sum();
    let all = layer * config.num_hidden_layers as u64;
    let rest = f32s(config.num_params().saturating_sub(all));
    Ok(rest + scheme.map_or(f32s(all), |scheme| scheme.bytes(all)))
}

/// How the linear layers of a model are quantised, if they are.
pub fn scheme<B: Backend>(model: &AdaptedLlama<B>) -> Option<Scheme> {
    let linears = model.layers.iter().flat_map(|layer| {
        let (attention, mlp) = (&layer.self_attn, &layer.mlp);
        [
            &attention.q_proj,
            &attention.k_proj,
            &attention.v_proj,
            &attention.o_proj,
            &mlp.gate_proj,
            &mlp.up_proj,
            &mlp.down_proj,
        ]
    });
    let mut schemes = linears.filter_map(|linear| match &linear.base {
        BaseLinear::Dense(_) => None,
        BaseLinear::Quantized(linear) => Some(linear.weight.layout.scheme),
    });
    schemes.next()
}

/// Checks the whole checkpoint before anything of it is read.
fn check(
    config: &LlamaConfig,
    checkpoint: &Checkpoint,
    scheme: Option<Scheme>,
    is_stored: impl Fn(&str) -> bool,
) -> Result<()> {
    let (stored, dense): (Vec<_>, Vec<_>) = config
        .tensors()
        .into_iter()
        .partition(|(name, _)| is_stored(name));
    let is_known = |name: &str| {
        let weight = bitsandbytes::weight_of_part(name).unwrap_or(name);
        stored.iter().any(|(name, _)| name == weight) || is_redundant(config, name)
    };
    let mut problems = checkpoint.differences(&dense, is_known);
    for (name, shape) in &stored {
        let shape = [shape[0], shape[1]];
        match Stored::find(name, shape, |part| checkpoint.view(part)) {
            Err(error) => problems.push(error.to_string()),
            Ok(found) => {
                let found = found.scheme();
                if let Some(scheme) = scheme.filter(|scheme| scheme.format != found.format) {
                    problems.push(format!("{name} is {found}, but {scheme} is asked for"));
                }
            }
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::File(model::Error::Tensors {
            path: checkpoint.path().into(),
            problems,
        })),
    }
}

/// A linear layer of the base without an adapter, quantised if it is one of the decoder's.
fn unadapted<B: Backend>(
    mut source: LinearSource<B>,
    scheme: Option<Scheme>,
) -> Result<AdaptedLinear<B>> {
    let Some(scheme) = scheme.filter(|_| source.name != "lm_head") else {
        let base = BaseLinear::Dense(source.linear()?);
        return Ok(AdaptedLinear { base, lora: None });
    };
    let weight = quantize(&source.weight()?, source.shape, scheme);
    let weight = weight.map_err(|error| Error::Weight {
        name: format!("{}.weight", source.name),
        source: error,
    })?;
    let bias = source.bias()?;
    Ok(quantized(PackedWeight::new(weight, source.device), bias))
}

fn quantized<B: Backend>(weight: PackedWeight<B>, bias: Option<Tensor<B, 1>>) -> AdaptedLinear<B> {
    AdaptedLinear {
        base: BaseLinear::Quantized(QuantLinear { weight, bias }),
        lora: None,
    }
}
