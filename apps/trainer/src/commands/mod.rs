//! The commands, one file each.

pub mod chat;
pub mod devices;
pub mod eval;
pub mod generate;
pub mod plan;
pub mod train;

use std::path::{Path, PathBuf};

use ::train::recipe::parse_setting;
use adapters::{AdaptedLlama, peft, unadapted};
use anyhow::Result;
use burn::tensor::backend::Backend;
use model::folder::ModelFolder;
use model::hub::{self, Files};
use toml::Value;

use crate::device::Device;
use crate::failure::Advised;
use crate::output::Output;

/// Opens a model folder, or downloads one.
fn open_model(name: &str, files: Files, output: &Output) -> Result<ModelFolder> {
    let path = hub::resolve(name, files, &mut output.downloads())?;
    Ok(ModelFolder::open(&path)?)
}

/// An adapter folder, downloaded if it is a Hub id.
fn open_adapter(name: &str, output: &Output) -> Result<PathBuf> {
    let inside = Path::new(name).join("adapter");
    let is_adapter = |folder: &Path| folder.join(peft::CONFIG_FILE).exists();
    if !is_adapter(Path::new(name)) && is_adapter(&inside) {
        return Err(Advised::failed(
            format!("{name} is the folder of a run, not an adapter"),
            format!("give {}", inside.display()),
        )
        .into());
    }
    Ok(hub::resolve(name, Files::Adapter, &mut output.downloads())?)
}

/// The model and the adapter that a command computes with, if the device can hold them.
fn open_adapted(
    model: &str,
    adapter: Option<&str>,
    device: &Device,
    output: &Output,
) -> Result<(ModelFolder, Option<PathBuf>)> {
    let base = open_model(model, Files::Model, output)?;
    let adapter = adapter.map(|name| open_adapter(name, output)).transpose()?;
    check_memory(base.config.num_params(), device)?;
    Ok((base, adapter))
}

/// Reads `--set` arguments.
fn settings(set: &[String]) -> Result<Vec<(String, Value)>> {
    let one = |text: &String| {
        parse_setting(text).ok_or_else(|| {
            Advised::usage(
                format!("--set {text} is not of the form section.key=value"),
                "write for example --set train.learning_rate=1e-4",
            )
            .into()
        })
    };
    set.iter().map(one).collect()
}

/// Refuses what cannot fit before anything of it is allocated; `numbers` is the least that will be
/// held, in f32.
fn check_memory(numbers: u64, device: &Device) -> Result<()> {
    let needed = numbers.saturating_mul(4);
    let Some(there) = device.memory_bytes().filter(|there| *there < needed) else {
        return Ok(());
    };
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let message = format!(
        "the weights need at least {:.1} GiB of memory, and this machine has {:.1} GiB",
        gib(needed),
        gib(there)
    );
    let help = "use a smaller model, or to train it a lower adapter.rank";
    Err(Advised::failed(message, help).into())
}

/// Loads a model and the adapter that belongs on it.
pub fn load_model<B: Backend>(
    base: &ModelFolder,
    adapter: Option<&Path>,
    device: &B::Device,
) -> Result<AdaptedLlama<B>> {
    let model = model::load::load(&base.config, &base.checkpoint()?, device, unadapted)?;
    Ok(match adapter {
        Some(folder) => peft::load(model, folder, device)?.0,
        None => model,
    })
}
