//! What a run trains and leaves behind: an adapter, or the whole model.

use std::path::{Path, PathBuf};

use adapters::methods::Part;
use adapters::{AdaptedBackend, AdaptedLlama, AdapterConfig, Method, peft};
use burn::tensor::backend::Backend;
use model::checkpoint::{Checkpoint, MODEL_FILE, NamedTensor, write_safetensors};
use model::config::LlamaConfig;
use model::folder::{ModelFolder, edit_config, set_dtype};
use model::weight::param_id;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::optimizer::AdamW;
use crate::recipe::TrainSection;
use crate::run_folder::io;

/// The trained weights of a checkpoint whose adapter is in another form.
const EXACT_FILE: &str = "trained.safetensors";

/// What is trained.
#[allow(
    clippy::large_enum_variant,
    reason = "a run has one, and it is matched on everywhere"
)]
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

    /// The method of the adapter, if it is one.
    pub fn method(&self) -> Option<&Method> {
        match self {
            Self::Adapter(adapter) => Some(&adapter.method),
            Self::Full => None,
        }
    }

    /// Tells the method of how many optimizer steps the run is.
    ///
    /// # Errors
    /// [`Error::Recipe`] if it does not go with so many.
    pub fn of_run(&mut self, steps: usize) -> Result<()> {
        let problem = match self {
            Self::Adapter(adapter) => adapter.method.of_run(steps),
            Self::Full => None,
        };
        match problem {
            None => Ok(()),
            Some((key, text)) => Err(Error::Recipe {
                problems: vec![format!("adapter.{key} {text}")],
            }),
        }
    }

    /// The optimizer of a run of so many steps.
    pub fn optimizer<B: Backend>(
        &self,
        config: &LlamaConfig,
        train: &TrainSection,
        steps: usize,
    ) -> Result<AdamW<B>> {
        let optimizer = AdamW::new(train);
        let Self::Adapter(adapter) = self else {
            return Ok(optimizer);
        };
        let rate = |part: &Part| adapter.method.rate(part, train.learning_rate);
        let parts = adapter.parts(config)?.into_iter();
        let rates = parts.map(|part| (param_id(&part.name), rate(&part)));
        let rates = rates.filter(|(_, rate)| *rate != 1.0).collect();
        let after = adapter.method.after_step(&adapter.layers(config)?, steps);
        Ok(optimizer.with(rates, after))
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
        self.method().map_or(0, Method::positions)
    }

    /// Number of trained weights.
    pub fn num_params(&self, config: &LlamaConfig) -> Result<u64> {
        let parameters = self.parameters(config)?;
        let size = |shape: &[usize]| shape.iter().map(|n| *n as u64).product::<u64>();
        Ok(parameters.iter().map(|(_, shape)| size(shape)).sum())
    }

    /// Makes what is trained of a plain model: fresh adapters, or trainable weights.
    pub fn attach<B: AdaptedBackend>(
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
                    set_dtype(config, Dtype::F32); // whatever they were before
                    config.shift_remove("quantization_config"); // of a model that began anew
                })?;
            }
        }
        Ok(folder)
    }

    /// Writes what is trained so that a run can go on with it, where [`Trained::save`] writes
    /// something else.
    pub fn save_exactly<B: AdaptedBackend>(
        &self,
        model: &AdaptedLlama<B>,
        into: &Path,
    ) -> Result<()> {
        if let Self::Adapter(adapter) = self
            && adapter.method.is_converted()
        {
            peft::save_exactly(model, adapter, &into.join(EXACT_FILE))?;
        }
        Ok(())
    }

    /// Puts what is trained on a base model, with the weights that [`Trained::save`] and
    /// [`Trained::save_exactly`] wrote.
    pub fn restore<B: AdaptedBackend>(
        &self,
        mut model: AdaptedLlama<B>,
        from: &Path,
        device: &B::Device,
    ) -> Result<AdaptedLlama<B>> {
        let folder = from.join(self.folder_name());
        if let Self::Adapter(adapter) = self
            && adapter.method.is_converted()
        {
            let file = from.join(EXACT_FILE);
            return Ok(peft::load_exactly(model, adapter, &file, device)?);
        }
        match self {
            Self::Adapter(ours) => {
                let (model, theirs) = peft::load(model, &folder, device)?;
                let problem = |key: String| {
                    format!(
                        "adapter.{key} is not what the run began with ({})",
                        folder.display()
                    )
                };
                match ours.differences(&theirs) {
                    differ if differ.is_empty() => Ok(model),
                    differ => Err(Error::Recipe {
                        problems: differ.into_iter().map(problem).collect(),
                    }),
                }
            }
            Self::Full => {
                adapters::train_all(&mut model)?;
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
