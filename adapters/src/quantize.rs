//! From a model folder to one in 4 bits, as transformers and bitsandbytes save it.

use std::path::Path;

use model::checkpoint::{LazyTensor, MODEL_FILE, write_lazily};
use model::folder::{ModelFolder, edit_config};
use quant::Scheme;
use quant::bitsandbytes::{self, parts};
use safetensors::Dtype;

use crate::base::Base;
use crate::error::{Error, Result};

/// Writes `base` with the linear layers of its decoder in 4 bits into the folder `to`, which
/// must exist; the other tensors stay as they are. Holds the 4-bit weights and one dense one.
/// Before each tensor, `go_on` is asked.
///
/// # Errors
/// [`Error::Interrupted`] if `go_on` says so; [`Error::Quantized`] if the model is in fewer bits
/// already, [`Error::Weight`] if a weight cannot be quantised, [`Error::File`] for what cannot be
/// read or written.
pub fn quantize_folder(
    base: &ModelFolder,
    scheme: Scheme,
    to: &Path,
    go_on: &dyn Fn() -> bool,
) -> Result<()> {
    let quantized = || Error::Quantized {
        path: base.path.clone(),
    };
    if base.config.quantization_config.is_some() {
        return Err(quantized());
    }
    let checkpoint = base.checkpoint()?;
    let source = Base::new(&base.config, &checkpoint, Some(scheme))?;
    if source.is_stored {
        return Err(quantized());
    }
    let asked = || match go_on() {
        true => Ok(()),
        false => Err(Error::Interrupted),
    };
    let tensors = base.config.tensors();
    let weights = tensors.iter().map(|(name, shape)| {
        asked()?;
        Ok((name, shape, source.quantized(name, shape)?))
    });
    let weights: Vec<_> = weights.collect::<Result<_>>()?;
    let mut written = Vec::new();
    for (name, shape, weight) in &weights {
        let dtype = checkpoint.float_dtype(name)?;
        let Some(weight) = weight else {
            written.push(LazyTensor {
                name: (*name).clone(),
                dtype,
                shape: (*shape).clone(),
                bytes: Box::new(|| {
                    let bytes = checkpoint.view(name).expect("checked above").data();
                    let bytes = bytes.to_vec();
                    checkpoint.release(name);
                    Ok(bytes.into())
                }),
            });
            continue;
        };
        written.extend(
            parts(name, weight, torch_name(dtype))
                .into_iter()
                .map(|part| LazyTensor {
                    name: part.name,
                    dtype: part.dtype,
                    shape: part.shape,
                    bytes: Box::new(move || asked().map(|()| part.bytes)),
                }),
        );
    }
    write_lazily::<Error>(&to.join(MODEL_FILE), written, &[])?;
    base.copy_assets(to)?;
    edit_config(to, |config| {
        let quantization = bitsandbytes::config(scheme, "float32");
        config.insert("quantization_config".into(), quantization);
    })?;
    Ok(())
}

/// What torch calls a type.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}
