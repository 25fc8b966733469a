//! What a run trains and leaves behind: an adapter, or the whole model.

use std::path::{Path, PathBuf};

use adapters::{AdaptedBackend, AdaptedLlama, AdapterConfig, peft};
use burn::tensor::backend::Backend;
use model::checkpoint::{Checkpoint, MODEL_FILE, NamedTensor, write_safetensors};
use model::config::LlamaConfig;
use model::folder::{ModelFolder, edit_config};
use model::weight::param_id;

use crate::error::{Error, Result};
use crate::run_folder::io;

/// The tensors of an encoder, in a checkpoint.
const ENCODER_FILE: &str = "encoder.safetensors";

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Trained {
    /// An adapter; saved in PEFT's format.
    Adapter(AdapterConfig),
    /// Every weight; saved as a Hugging Face model folder.
    Full,
}

impl Trained {
    /// The folder inside a run or checkpoint that holds it.
    pub fn folder_name(&self) -> &'static str {
        match self {
            Self::Adapter(_) => "adapter",
            Self::Full => "model",
        }
    }

    /// Name and shape of every trained tensor.
    pub fn parameters(&self, config: &LlamaConfig) -> Result<Vec<(String, Vec<usize>)>> {
        Ok(match self {
            Self::Adapter(adapter) => adapter.parameters(config)?,
            Self::Full => config.tensors(),
        })
    }

    /// Whether anything is dropped while training.
    pub fn is_random(&self) -> bool {
        match self {
            Self::Adapter(adapter) => adapter.method.is_random(),
            Self::Full => false,
        }
    }

    /// Numbers in the file that is saved.
    pub fn num_saved(&self, config: &LlamaConfig) -> Result<u64> {
        match self {
            Self::Adapter(adapter) => Ok(adapter.num_saved(config)?),
            Self::Full => self.num_params(config),
        }
    }

    /// How many virtual tokens stand beside the tokens of every row.
    pub fn virtual_tokens(&self) -> usize {
        match self {
            Self::Adapter(adapter) => adapter.method.positions(),
            Self::Full => 0,
        }
    }

    /// Number of trained weights.
    pub fn num_params(&self, config: &LlamaConfig) -> Result<u64> {
        let parameters = self.parameters(config)?;
        let size = |shape: &[usize]| shape.iter().map(|n| *n as u64).product::<u64>();
        Ok(parameters.iter().map(|(_, shape)| size(shape)).sum())
    }

    /// Makes what is trained of a plain model: fresh adapters, or trainable weights.
    pub fn attach<B: Backend>(
        &self,
        model: &mut AdaptedLlama<B>,
        seed: u64,
        device: &B::Device,
    ) -> Result<()> {
        match self {
            Self::Adapter(adapter) => adapters::attach(model, adapter, seed, device)?,
            Self::Full => adapters::train_all(model)?,
        }
        Ok(())
    }

    /// Writes the adapter, or the model with the files of its base folder, to `into/adapter` or
    /// `into/model`; with it goes a chat template that is not the base model's own.
    pub fn save<B: AdaptedBackend>(
        &self,
        model: &AdaptedLlama<B>,
        base: &ModelFolder,
        base_name: &str,
        into: &Path,
    ) -> Result<PathBuf> {
        let folder = into.join(self.folder_name());
        match self {
            Self::Adapter(adapter) => {
                peft::save(model, adapter, base_name, &folder)?;
                if let Some(template) = &base.template {
                    template.save(&folder)?;
                }
            }
            Self::Full => {
                std::fs::create_dir_all(&folder).map_err(io("create", &folder))?;
                let mut values = adapters::read_parameters(model);
                let tensor = |(name, shape): (String, Vec<usize>)| NamedTensor {
                    values: values
                        .remove(&param_id(&name))
                        .expect("every weight is trained"),
                    name,
                    shape,
                };
                let tensors: Vec<_> = model.config.tensors().into_iter().map(tensor).collect();
                write_safetensors(&folder.join(MODEL_FILE), &tensors, &[])?;
                base.copy_assets(&folder)?;
                edit_config(&folder, |config| {
                    // saved as F32, whatever they were before
                    let key = match config.contains_key("torch_dtype") {
                        true => "torch_dtype", // the name before transformers 5
                        false => "dtype",
                    };
                    config.insert(key.into(), "float32".into());
                    config.shift_remove("quantization_config"); // of a model that began anew
                })?;
            }
        }
        Ok(folder)
    }

    /// Writes what [`Trained::save`] leaves out, as PEFT does: the layers that make virtual tokens.
    pub fn save_encoder<B: AdaptedBackend>(
        &self,
        model: &AdaptedLlama<B>,
        into: &Path,
    ) -> Result<()> {
        let encoder = self.encoder(&model.config)?;
        if encoder.is_empty() {
            return Ok(());
        }
        let mut values = adapters::read_parameters(model);
        let tensor = |(name, shape): (String, Vec<usize>)| NamedTensor {
            values: values
                .remove(&param_id(&name))
                .expect("every tensor of the encoder is trained"),
            name,
            shape,
        };
        let tensors: Vec<_> = encoder.into_iter().map(tensor).collect();
        Ok(write_safetensors(&into.join(ENCODER_FILE), &tensors, &[])?)
    }

    fn encoder(&self, config: &LlamaConfig) -> Result<Vec<(String, Vec<usize>)>> {
        Ok(match self {
            Self::Adapter(adapter) => adapter.encoder(config)?,
            Self::Full => Vec::new(),
        })
    }

    /// Overwrites the trained weights of `model` with those that [`Trained::save`] wrote, and
    /// [`Trained::save_encoder`].
    pub fn restore<B: Backend>(
        &self,
        model: AdaptedLlama<B>,
        from: &Path,
        device: &B::Device,
    ) -> Result<AdaptedLlama<B>> {
        let folder = from.join(self.folder_name());
        match self {
            Self::Adapter(ours) => {
                let (mut model, theirs) = peft::load(model, &folder, device)?;
                let problem = |key: String| {
                    format!(
                        "adapter.{key} is not what the run began with ({})",
                        folder.display()
                    )
                };
                let differ = ours.saved().differences(&theirs);
                if !differ.is_empty() {
                    let problems = differ.into_iter().map(problem).collect();
                    return Err(Error::Recipe { problems });
                }
                let encoder = ours.encoder(&model.config)?;
                if !encoder.is_empty() {
                    let file = Checkpoint::open_file(&from.join(ENCODER_FILE))?;
                    file.check(&encoder, |_| false)?;
                    let read = |name: &str| Ok(file.read(name)?);
                    adapters::attach_again(&mut model, ours, &read, device)?;
                }
                Ok(model)
            }
            Self::Full => {
                let file = Checkpoint::open_file(&folder.join(MODEL_FILE))?;
                let tensors = model.config.tensors();
                file.check(&tensors, |_| false)?;
                let read = |(name, _): &(String, _)| Ok((param_id(name), file.read(name)?));
                let values = tensors.iter().map(read).collect::<Result<_>>()?;
                Ok(adapters::write_parameters(model, values))
            }
        }
    }
}
