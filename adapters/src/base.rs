//! The base model under the adapters: its linear layers dense or in 4 bits.

use burn::module::Module;
use burn::tensor::{DType, Int, Tensor, backend::AutodiffBackend, backend::Backend};
use model::checkpoint::Checkpoint;
use model::config::LlamaConfig;
use model::folder::ModelFolder;
use model::linear::{Linear, Projection};
use model::load::{LinearSource, Parts, build, fresh, is_redundant};
use model::ops::{MatmulBackend, ModelBackend};
use model::weight::BaseWeight;
use quant::bitsandbytes::{self, Stored};
use quant::{PackedWeight, QuantBackend, QuantLinear, Quantized, Scheme, quantize};

use crate::attach::AdaptedLlama;
use crate::error::{Error, Result};
use crate::linear::AdaptedLinear;
use crate::methods::lora::LoraBackend;

/// The tensor of the embeddings, which may be that of `lm_head`, too.
pub(crate) const EMBEDDINGS: &str = "model.embed_tokens.weight";
/// The tensor of the output layer.
pub(crate) const HEAD: &str = "lm_head.weight";

/// A backend that has every operation of an adapted model.
pub trait AdaptedBackend: ModelBackend + LoraBackend {}

impl<B: ModelBackend + LoraBackend> AdaptedBackend for B {}

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

impl<B: QuantBackend + MatmulBackend> Projection<B> for BaseLinear<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Dense(linear) => linear.forward(x),
            Self::Quantized(linear) => linear.forward(x),
        }
    }

    fn embed(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match self {
            Self::Dense(linear) => linear.embed(ids),
            Self::Quantized(_) => {
                let dense = Linear {
                    weight: BaseWeight::Frozen(self.weight()),
                    bias: self.bias().map(BaseWeight::Frozen),
                };
                dense.embed(ids)
            }
        }
    }
}

impl<B: Backend> BaseLinear<B> {
    /// Whether any of it is trained itself.
    pub fn is_trained(&self) -> bool {
        self.num_params() > 0
    }

    /// The weight `[out, in]` in f32, decoded if it is in 4 bits.
    pub fn weight(&self) -> Tensor<B, 2> {
        match self {
            Self::Dense(linear) => linear.weight.val().cast(DType::F32),
            Self::Quantized(linear) => linear.weight.dequantize(),
        }
    }

    /// Some rows of the weight, `[n, in]` in f32.
    pub fn select(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match self {
            Self::Dense(linear) => linear.weight.select(ids),
            Self::Quantized(linear) => linear.weight.dequantize().select(0, ids),
        }
    }

    /// Whether the weight is in parts, see [`BaseWeight::Split`].
    pub fn is_split(&self) -> bool {
        matches!(self, Self::Dense(linear) if linear.weight.is_split())
    }

    /// The bias `[out]`, if there is one.
    pub fn bias(&self) -> Option<Tensor<B, 1>> {
        match self {
            Self::Dense(linear) => linear.bias.as_ref().map(BaseWeight::val),
            Self::Quantized(linear) => linear.bias.clone(),
        }
    }

    /// The same weight alone.
    pub fn without_bias(&self) -> Self {
        match self {
            Self::Dense(linear) => Self::Dense(Linear {
                weight: linear.weight.clone(),
                bias: None,
            }),
            Self::Quantized(linear) => Self::Quantized(QuantLinear {
                weight: linear.weight.clone(),
                bias: None,
                dtype: linear.dtype,
            }),
        }
    }

    /// The sums of the squares of the weight's rows, `[out]`.
    pub fn row_squares(&self) -> Tensor<B, 1> {
        self.weight().powi_scalar(2).sum_dim(1).squeeze_dim(1)
    }
}

impl<B: QuantBackend + MatmulBackend> BaseLinear<B> {
    /// The gradient `[n, in]` of the input from that of the output, `dy` `[n, out]`: `dy W`.
    pub fn input_gradient(&self, dy: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Dense(linear) => linear.weight.input_gradient(dy),
            Self::Quantized(linear) => linear.input_gradient(dy),
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
/// in order among the parts of a 4-bit weight, or in another format than that of `scheme`;
/// [`Error::Quantization`] if the checkpoint is quantised in a way that is not supported;
/// [`Error::Weight`] if a weight cannot be quantised.
pub fn load<B: MatmulBackend>(
    config: &LlamaConfig,
    checkpoint: &Checkpoint,
    scheme: Option<Scheme>,
    device: &B::Device,
) -> Result<AdaptedLlama<B>> {
    load_in(DType::F32, config, checkpoint, scheme, device)
}

/// The same with the products of its weights in `dtype`, which is also what embeddings and dense
/// matrices are stored in; norms and biases stay in f32.
///
/// # Errors
/// Those of [`load`].
pub fn load_in<B: MatmulBackend>(
    dtype: DType,
    config: &LlamaConfig,
    checkpoint: &Checkpoint,
    scheme: Option<Scheme>,
    device: &B::Device,
) -> Result<AdaptedLlama<B>> {
    let base = Base::new(config, checkpoint, scheme)?;
    let values = |name: &str, _: &[usize]| checkpoint.read(name);
    let parts = Parts::new(config, device, values, |source| base.linear(source));
    parts.in_dtype(dtype).llama()
}

/// Checks the weights of a base model by their headers: what [`load`] would refuse.
///
/// # Errors
/// Those of [`load`] that need no weight to be read.
pub fn check(base: &ModelFolder, scheme: Option<Scheme>) -> Result<()> {
    let checkpoint = base.checkpoint()?;
    let found = Base::new(&base.config, &checkpoint, scheme)?;
    let names = base.config.tensors().into_iter().map(|(name, _)| name);
    let dense = names.filter(|name| !found.has_stored(name));
    let problems: Vec<_> = dense
        .filter_map(|name| checkpoint.float_dtype(&name).err())
        .map(|error| match error {
            model::Error::Safetensors { reason, .. } => reason,
            other => other.to_string(),
        })
        .collect();
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::File(model::Error::Tensors {
            path: checkpoint.path().into(),
            problems,
        })),
    }
}

/// The weights of a base model, checked as a whole and not read yet.
pub(crate) struct Base<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    /// How the linear layers of the decoder are quantised, or will be.
    pub(crate) scheme: Option<Scheme>,
    /// Whether the checkpoint is quantised itself.
    pub(crate) is_stored: bool,
}

impl<'a> Base<'a> {
    /// Checks a checkpoint whose linear layers are to be quantised by `scheme`.
    ///
    /// # Errors
    /// Those of [`load`] but the last.
    pub(crate) fn new(
        config: &LlamaConfig,
        checkpoint: &'a Checkpoint,
        scheme: Option<Scheme>,
    ) -> Result<Self> {
        let mut base = Self {
            checkpoint,
            scheme,
            is_stored: config.quantization_config.is_some(),
        };
        if let Some(quantization) = &config.quantization_config {
            bitsandbytes::check_config(quantization).map_err(|source| base.wrong(source))?;
        }
        let found = base.check(config)?;
        base.is_stored |= found.is_some();
        if base.is_stored {
            base.scheme = found;
        }
        Ok(base)
    }

    /// A linear layer.
    pub(crate) fn linear<B: Backend>(
        &self,
        mut source: LinearSource<B>,
    ) -> Result<AdaptedLinear<B>> {
        let name = format!("{}.weight", source.name);
        let Some(weight) = self.quantized(&name, &source.shape)? else {
            return dense(source);
        };
        let base = BaseLinear::Quantized(QuantLinear {
            bias: source.bias()?,
            weight: PackedWeight::new(weight, source.device),
            dtype: source.dtype,
        });
        Ok(AdaptedLinear { base, update: None })
    }

    /// A tensor in 4 bits: as it is stored, or, if it is the weight of a linear layer of the
    /// decoder, quantised; nothing if it is dense.
    pub(crate) fn quantized(&self, name: &str, shape: &[usize]) -> Result<Option<Quantized>> {
        if let Some(stored) = self.stored(name, shape)? {
            let weight = stored.read().map_err(|source| self.wrong(source))?;
            self.checkpoint.release(name);
            return Ok(Some(weight));
        }
        let scheme = self.scheme.filter(|_| !self.is_stored && name != HEAD);
        let (Some(scheme), Some(shape)) = (scheme, linear_shape(name, shape)) else {
            return Ok(None);
        };
        let weight = quantize(&self.checkpoint.read(name)?, shape, scheme);
        weight.map(Some).map_err(|source| Error::Weight {
            name: name.into(),
            source,
        })
    }

    /// The parts of a tensor that the checkpoint holds in 4 bits.
    pub(crate) fn stored(&self, name: &str, shape: &[usize]) -> Result<Option<Stored<'a>>> {
        let shape = linear_shape(name, shape).filter(|_| self.has_stored(name));
        let find = |shape| Stored::find(name, shape, |part| self.checkpoint.view(part));
        let stored = shape.map(find).transpose();
        stored.map_err(|source| self.wrong(source))
    }

    fn has_stored(&self, name: &str) -> bool {
        bitsandbytes::is_stored(name, |part| self.checkpoint.shape(part).is_some())
    }

    fn wrong(&self, source: quant::Error) -> Error {
        Error::Quantization {
            path: self.checkpoint.path().into(),
            source,
        }
    }

    /// Checks everything; gives the scheme of the first weight that is stored in 4 bits.
    fn check(&self, config: &LlamaConfig) -> Result<Option<Scheme>> {
        let (stored, dense): (Vec<_>, Vec<_>) =
            config.tensors().into_iter().partition(|(name, shape)| {
                linear_shape(name, shape).is_some() && self.has_stored(name)
            });
        let is_known = |name: &str| {
            let weight = bitsandbytes::weight_of_part(name).unwrap_or(name);
            stored.iter().any(|(name, _)| name == weight) || is_redundant(config, name)
        };
        let mut problems = self.checkpoint.differences(&dense, is_known);
        let mut first = None;
        for (name, shape) in &stored {
            let shape = [shape[0], shape[1]];
            match Stored::find(name, shape, |part| self.checkpoint.view(part)) {
                Err(error) => problems.push(error.to_string()),
                Ok(found) => {
                    let found = found.scheme();
                    first.get_or_insert(found);
                    if let Some(scheme) = self.scheme.filter(|s| s.format != found.format) {
                        return Err(Error::OtherFormat {
                            path: self.checkpoint.path().into(),
                            stored: found,
                            asked: scheme.format,
                        });
                    }
                }
            }
        }
        match problems.is_empty() {
            true => Ok(first),
            false => Err(Error::File(model::Error::Tensors {
                path: self.checkpoint.path().into(),
                problems,
            })),
        }
    }
}

/// The shape `[out, in]` of a tensor that is the weight of a linear layer.
fn linear_shape(name: &str, shape: &[usize]) -> Option<[usize; 2]> {
    let shape = <[usize; 2]>::try_from(shape).ok();
    shape.filter(|_| name != EMBEDDINGS)
}

/// A linear layer as it is, without an adapter.
pub(crate) fn dense<B: Backend>(source: LinearSource<B>) -> Result<AdaptedLinear<B>> {
    let base = BaseLinear::Dense(source.linear()?);
    Ok(AdaptedLinear { base, update: None })
}

/// Makes a base model with fresh weights, see [`fresh`]; it is dense.
pub fn init<B: MatmulBackend>(
    config: &LlamaConfig,
    seed: u64,
    device: &B::Device,
) -> AdaptedLlama<B> {
    let model = build(config, device, fresh(config, seed), dense);
    model.expect("fresh values cannot fail")
}

/// Bytes of a base model's weights in memory: matrices that are quantised, by `scheme` or because
/// their checkpoint is, in 4 bits, the others in `dtype`, and what is no matrix in f32.
///
/// # Errors
/// [`Error::Quantization`] if the checkpoint is quantised in a way that is not supported.
pub fn base_bytes(base: &ModelFolder, scheme: Option<Scheme>, dtype: DType) -> Result<u64> {
    let config = &base.config;
    let scheme = stored_scheme(base, scheme)?;
    let product = |shape: [usize; 2]| (shape[0] as u64).saturating_mul(shape[1] as u64);
    let linear = config.projections();
    let layer: u64 = linear.iter().map(|(_, shape, _)| product(*shape)).sum();
    let all = layer.saturating_mul(config.num_hidden_layers as u64);
    let ends = match config.tie_word_embeddings {
        true => product([config.vocab_size, config.hidden_size]),
        false => product([config.vocab_size, config.hidden_size]).saturating_mul(2),
    };
    let size = dtype.size() as u64;
    let rest = config.num_params().saturating_sub(all).saturating_sub(ends);
    let dense = ends.saturating_mul(size) + rest.saturating_mul(DType::F32.size() as u64);
    let linear = scheme.map_or(all.saturating_mul(size), |scheme| scheme.bytes(all));
    Ok(dense.saturating_add(linear))
}

/// What a checkpoint is quantised by, else what it is to be.
fn stored_scheme(base: &ModelFolder, scheme: Option<Scheme>) -> Result<Option<Scheme>> {
    let stored = base
        .config
        .quantization_config
        .as_ref()
        .map(|quantization| {
            bitsandbytes::check_config(quantization).map_err(|source| Error::Quantization {
                path: base.path.clone(),
                source,
            })
        });
    Ok(stored.transpose()?.or(scheme))
}

/// How the linear layers of a model are quantised, if they are.
pub fn scheme<B: Backend>(model: &AdaptedLlama<B>) -> Option<Scheme> {
    let mut schemes = model
        .projections()
        .filter_map(|(_, linear)| match &linear.base {
            BaseLinear::Dense(_) => None,
            BaseLinear::Quantized(linear) => Some(linear.weight.layout.scheme),
        });
    schemes.next()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn weights_take_half_in_16_bits() {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/models/gqa");
        let base = ModelFolder::open(&folder).unwrap();
        let matrices = base.config.tensors().into_iter();
        let matrices = matrices.filter(|(_, shape)| shape.len() == 2);
        let numbers: usize = matrices.map(|(_, shape)| shape[0] * shape[1]).sum();
        let f32s = base_bytes(&base, None, DType::F32).unwrap();
        assert_eq!(f32s, 4 * base.config.num_params());
        for dtype in [DType::F16, DType::BF16] {
            let bytes = base_bytes(&base, None, dtype).unwrap();
            assert_eq!(bytes, f32s - 2 * numbers as u64);
        }
    }
}
