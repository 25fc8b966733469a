//! From a model folder to one in 4 bits, as transformers and bitsandbytes save it.

use std::path::Path;

use model::checkpoint::{Checkpoint, LazyTensor, MODEL_FILE, write_lazily};
use model::folder::{ModelFolder, edit_config};
use model::load::is_redundant;
use quant::bitsandbytes::{self, parts};
use quant::{Quantized, Scheme, quantize};
use safetensors::Dtype;

use crate::error::{Error, Result};

/// Writes `base` with the linear layers of its decoder in 4 bits into the folder `to`, which
/// must exist; the other tensors stay as they are. Holds the 4-bit weights and one dense one.
/// Before each tensor, `go_on` is asked.
///
/// # Errors
/// [`Error::Interrupted`] if `go_on` says so; [`Error::Quantized`] if the model is in fewer bits already, [`Error::Weight`] if a weight cannot
/// be quantised, [`Error::File`] for what cannot be read or written.
pub fn quantize_folder(
    base: &ModelFolder,
    scheme: Scheme,
    to: &Path,
    go_on: &dyn Fn() -> bool,
) -> Result<()> {
    if base.config.quantization_config.is_some() {
        return Err(Error::Quantized {
            path: base.path.clone(),
        });
    }
    let checkpoint = base.checkpoint()?;
    let tensors = base.config.tensors();
    checkpoint.check(&tensors, |name| is_redundant(&base.config, name))?;
    let (linear, others): (Vec<_>, Vec<_>) = tensors
        .into_iter()
        .partition(|(name, shape)| shape.len() == 2 && name.starts_with("model.layers."));
    let weights = linear.iter().map(|(name, shape)| {
        if !go_on() {
            return Err(Error::Interrupted);
        }
        let dtype = torch_name(&checkpoint, name);
        let values = checkpoint.read(name)?;
        let weight = quantize(&values, [shape[0], shape[1]], scheme);
        let weight = weight.map_err(|source| Error::Weight {
            name: name.clone(),
            source,
        })?;
        Ok((name.as_str(), weight, dtype))
    });
    let weights: Vec<(&str, Quantized, &str)> = weights.collect::<Result<_>>()?;
    let packed = weights.iter().flat_map(|(name, weight, dtype)| {
        parts(name, weight, dtype)
            .into_iter()
            .map(|part| LazyTensor {
                name: part.name,
                dtype: part.dtype,
                shape: part.shape,
                bytes: Box::new(move || match go_on() {
                    true => Ok(part.bytes.clone()),
                    false => Err(Error::Interrupted),
                }),
            })
    });
    let kept = others.iter().map(|(name, shape)| LazyTensor {
        name: name.clone(),
        dtype: checkpoint.view(name).expect("checked above").dtype(),
        shape: shape.clone(),
        bytes: Box::new(|| {
            let bytes = checkpoint
                .view(name)
                .expect("checked above")
                .data()
                .to_vec();
            checkpoint.release(name);
            Ok(bytes.into())
        }),
    });
    write_lazily::<Error>(&to.join(MODEL_FILE), packed.chain(kept).collect(), &[])?;
    base.copy_assets(to)?;
    edit_config(to, |config| {
        let quantization = bitsandbytes::config(scheme, "float32");
        config.insert("quantization_config".into(), quantization);
    })?;
    Ok(())
}

/// What torch calls the type of a tensor.
fn torch_name(checkpoint: &Checkpoint, name: &str) -> &'static str {
    match checkpoint.view(name).map(|view| view.dtype()) {
        Some(Dtype::BF16) => "bfloat16",
        Some(Dtype::F16) => "float16",
        _ => "float32",
    }
}
