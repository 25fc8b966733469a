//! The commands, one file each.

pub mod chat;
pub mod devices;
pub mod eval;
pub mod generate;
pub mod merge;
pub mod plan;
pub mod pull;
pub mod push;
pub mod quantize;
pub mod report;
pub mod train;
mod weighted;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ::train::checkpoint::Checkpoints;
use ::train::data::{Split, folder_files};
use ::train::recipe::{Recipe, parse_setting};
use ::train::run_folder::{RECIPE_FILE, check_empty};
use ::train::session;
use ::train::trained::Trained;
use adapters::{
    AdaptedBackend, AdaptedLlama, Combination, Weighted, base_bytes, check_fit, combine, peft,
};
use anyhow::Result;
use burn::tensor::{DType, backend::Backend};
use model::folder::ModelFolder;
use model::hub::{self, Files, Hub};
use quant::{Format, Scheme};
use toml::Value;

use self::weighted::open_adapters;
use crate::cli::{BaseArgs, ModelArgs};
use crate::device::Device;
use crate::encoder::choose_template;
use crate::failure::{Advised, model_advice};
use crate::output::{Output, word};

/// What to give in place of an adapter that is not there.
const NO_ADAPTER: &str = "give the folder of a PEFT adapter, or its id on the Hub";

/// Opens a model folder, or downloads one.
fn open_model(name: &str, files: Files, output: &Output) -> Result<ModelFolder> {
    check_is_model(Path::new(name))?;
    Ok(ModelFolder::open(&find(name, files, output)?)?)
}

/// The folder of a name, downloaded if it is a Hub id. Most ids that the Hub cannot be asked for are
/// paths with a slip.
fn find(name: &str, files: Files, output: &Output) -> Result<PathBuf> {
    use model::Error as E;
    let error = match hub::resolve(name, files, &mut output.downloads()) {
        Ok(folder) => return Ok(folder),
        Err(error) => error,
    };
    let is_unknown = match &error {
        E::Hub { file, .. } => file == hub::LISTING,
        E::HubOffline { .. } | E::HubDenied { .. } => true,
        _ => false,
    };
    Err(match error {
        E::NoSuchFolder { .. } if files == Files::Adapter => {
            Advised::failed(error.to_string(), NO_ADAPTER).into()
        }
        error if is_unknown => {
            let message = format!("there is no folder {name}, and as a Hub id it cannot be had");
            let help = format!(
                "correct the path; if it is a Hub id: {}",
                model_advice(&error)
            );
            Advised::failed(message, help).caused_by(error).into()
        }
        error => error.into(),
    })
}

/// The data files that a recipe names; data sets of the Hub are downloaded. What is taken of them,
/// and of folders with other splits, is said.
fn open_data(paths: &[PathBuf], split: Split, output: &Output) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in paths {
        let address = path.to_string_lossy();
        if path.is_dir() {
            let [files, others] = folder_files(path, split)?;
            if !others.is_empty() {
                let (read, left) = (names(&files), names(&others));
                output.note(format_args!("{address}: {read}; not read: {left}"));
            }
            found.extend(files);
            continue;
        }
        if !address.starts_with(hub::DATASETS) {
            found.push(path.clone());
            continue;
        }
        let files = Hub::from_env().dataset(&address, &mut output.downloads())?;
        output.note(format_args!("{address}: {}", names(&files)));
        found.extend(files);
    }
    Ok(found)
}

/// The names of the first few files, and how many more there are.
fn names(files: &[PathBuf]) -> String {
    let name = |file: &PathBuf| {
        file.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let names: Vec<_> = files.iter().filter_map(name).take(5).collect();
    let more = match files.len() - names.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", names.join(", "))
}

/// Refuses an adapter, or the folder of a run, in place of a model.
fn check_is_model(folder: &Path) -> Result<()> {
    let inside = ["", "adapter", "model"].map(|inside| folder.join(inside));
    let [given, adapter, model] = &inside;
    let is_adapter = |folder: &PathBuf| folder.join(peft::CONFIG_FILE).exists();
    let is_model = |folder: &PathBuf| folder.join("config.json").exists();
    let name = folder.display();
    let (message, help) = if is_model(given) {
        return Ok(());
    } else if is_model(model) {
        (
            format!("{name} is the folder of a run, not a model"),
            format!("give {}", model.display()),
        )
    } else if let Some(adapter) = [given, adapter].into_iter().find(|f| is_adapter(f)) {
        (
            format!("{name} holds an adapter and no model: there is no config.json"),
            format!(
                "give --model its base model, and --adapter {}",
                adapter.display()
            ),
        )
    } else {
        return Ok(());
    };
    Err(Advised::failed(message, help).into())
}

/// What a recipe trains; `adapter.init_from` is an adapter, downloaded if it is a Hub id.
fn trained(recipe: &mut Recipe, output: &Output) -> Result<Trained> {
    if let Some(folder) = &mut recipe.adapter.init_from {
        let name = folder.to_string_lossy().into_owned();
        if hub::is_id(&name) {
            *folder = open_adapter(&name, output)?;
        }
        if !folder.exists() {
            let message = format!("adapter.init_from: there is no folder {}", folder.display());
            return Err(Advised::failed(message, NO_ADAPTER).into());
        }
        check_is_adapter(folder)?;
    }
    Ok(session::trained(recipe)?)
}

/// Refuses an adapter to go on from that is not one of the model, before its template reads the rows.
fn check_init_from(recipe: &Recipe, base: &ModelFolder) -> Result<()> {
    let each = |folder: &PathBuf| Weighted {
        folder: folder.clone(),
        weight: 1.0,
    };
    let adapters: Vec<_> = recipe.adapter.init_from.iter().map(each).collect();
    Ok(check_fit(&adapters, Combination::default(), &base.config)?)
}

/// An adapter folder, downloaded if it is a Hub id.
fn open_adapter(name: &str, output: &Output) -> Result<PathBuf> {
    check_is_adapter(Path::new(name))?;
    find(name, Files::Adapter, output)
}

/// Refuses the folder of a run, or a model, in place of an adapter.
fn check_is_adapter(folder: &Path) -> Result<()> {
    let name = folder.display();
    let has = |file: &str| folder.join(file).exists();
    let config = peft::CONFIG_FILE;
    if !has(config) && has(&format!("adapter/{config}")) {
        return Err(Advised::failed(
            format!("{name} is the folder of a run, not an adapter"),
            format!("give {}", folder.join("adapter").display()),
        )
        .into());
    }
    let model = ["", "model"].map(|inside| folder.join(inside));
    let model = model
        .iter()
        .find(|folder| folder.join("config.json").exists());
    if let Some(model) = model.filter(|_| !has(config)) {
        return Err(Advised::failed(
            format!(
                "{name} holds a whole model and no adapter: there is no {}",
                folder.join(config).display()
            ),
            format!("give it by --model {}", model.display()),
        )
        .into());
    }
    if !has(config) && has(RECIPE_FILE) {
        return Err(unfinished(folder).into());
    }
    Ok(())
}

/// What there is to say of a run that has saved no adapter yet.
fn unfinished(run: &Path) -> Advised {
    let newest = Checkpoints::new(run, 0).newest_before(usize::MAX);
    let newest = newest.ok().flatten().map(|folder| folder.join("adapter"));
    let saved = [Some(run.join("best")), newest].into_iter().flatten();
    let mut saved = saved.filter(|folder| folder.join(peft::CONFIG_FILE).exists());
    let resume = format!("go on with: trainer train --resume {}", word(run));
    Advised::failed(
        format!(
            "{} is the folder of a run that is unfinished: it has no adapter yet",
            run.display()
        ),
        match saved.next() {
            Some(folder) => format!("give {}, or {resume}", folder.display()),
            None => resume,
        },
    )
}

/// A folder to be made is new or empty.
fn check_out(out: &Path) -> Result<()> {
    let advised = |error| match error {
        ::train::Error::OutputNotEmpty { .. } => {
            let message = format!("{} is not empty", out.display());
            Advised::failed(message, "choose another --out, or remove what is in it").into()
        }
        other => anyhow::Error::from(other),
    };
    let current = std::env::current_dir().ok();
    if current.is_some() && out.canonicalize().ok() == current {
        let message = format!("{} is the current folder", out.display());
        return Err(Advised::failed(message, "choose another --out").into());
    }
    check_empty(out).map_err(advised)
}

/// A model and the adapters on it, found and not loaded yet.
pub struct Adapted {
    /// The model's folder.
    pub base: ModelFolder,
    /// The adapters.
    pub adapters: Vec<Weighted>,
    /// How several are one.
    pub combination: Combination,
    /// What the linear layers are quantised to.
    pub scheme: Option<Scheme>,
    /// The task that texts are asked to be of.
    pub task: Option<usize>,
    /// Where loading is reported.
    pub output: Output,
}

impl Adapted {
    /// Finds the model and the adapters that the command line names, if the device can hold them.
    pub fn open(args: &ModelArgs, device: &Device, output: &Output) -> Result<Self> {
        let base = Self::open_base(&args.base, device, output)?;
        let adapters = open_adapters(&args.adapters, output)?;
        base.with(adapters, weighted::combination(&args.adapters.combine))
    }

    /// The same with adapters, which fit: their templates decide how rows and prompts read.
    pub fn with(self, adapters: Vec<Weighted>, combination: Combination) -> Result<Self> {
        check_fit(&adapters, combination, &self.base.config)?;
        Ok(Self {
            adapters,
            combination,
            ..self
        })
    }

    /// Finds the model that the command line names, if the device can hold it.
    pub fn open_base(args: &BaseArgs, device: &Device, output: &Output) -> Result<Self> {
        let (format, blocks) = (args.quant.as_deref(), &args.blocks);
        let block_size = blocks.block_size.unwrap_or(Scheme::DEFAULT_BLOCK_SIZE);
        let scheme = read_scheme(format, block_size, blocks.double_quant)?;
        let base = open_model(&args.model, Files::Model, output)?;
        if base.config.quantization_config.is_some()
            && (blocks.block_size.is_some() || blocks.double_quant)
        {
            let message = format!("{} is stored in 4 bits, with blocks of its own", args.model);
            let help = "leave --block-size and --double-quant out, or give the original model";
            return Err(Advised::usage(message, help).into());
        }
        check_memory(base_bytes(&base, scheme, DType::F32)?, device)?;
        Ok(Self {
            base,
            adapters: Vec::new(),
            combination: Combination::default(),
            scheme,
            task: None,
            output: *output,
        })
    }

    /// Takes the chat template that is named, else an adapter's, else the model's.
    pub fn choose_template(&mut self, named: Option<&str>) -> Result<()> {
        choose_template(&mut self.base, &self.adapters, named)
    }

    /// How many tasks an adapter tells apart, if one does.
    pub fn tasks(&self) -> Result<Option<usize>> {
        for adapter in &self.adapters {
            let config = peft::read_config(&adapter.folder)?;
            if let Some(tasks) = config.method.tasks() {
                return Ok(Some(tasks));
            }
        }
        Ok(None)
    }

    /// The task of a text.
    ///
    /// # Errors
    /// If the adapter does not know the one that is asked for.
    pub fn task(&self) -> Result<usize> {
        let tasks = self.tasks()?;
        match (tasks, self.task) {
            (None, None) => Ok(0),
            (Some(tasks), Some(task)) if task < tasks => Ok(task),
            (Some(tasks), None) => {
                if tasks > 1 {
                    let note = format_args!("task 0 of {tasks} (--task-id names another)");
                    self.output.note(note);
                }
                Ok(0)
            }
            (Some(tasks), Some(task)) => Err(Advised::usage(
                format!("--task-id {task} is no task of the adapter, which has {tasks}"),
                match tasks {
                    1 => "leave it out: there is task 0 alone".to_owned(),
                    tasks => format!("give a number from 0 to {}", tasks - 1),
                },
            )
            .into()),
            (None, Some(_)) => Err(Advised::usage(
                "--task-id needs an adapter that tells tasks apart",
                "give --adapter one that was trained with adapter.method = \"mpt\", or leave \
                 --task-id out",
            )
            .into()),
        }
    }

    /// Loads the model and puts the adapters on it.
    pub fn load<B: AdaptedBackend>(&self, device: &B::Device) -> Result<AdaptedLlama<B>> {
        self.adapt(self.load_base(device)?, device)
    }

    /// Loads the model alone.
    pub fn load_base<B: AdaptedBackend>(&self, device: &B::Device) -> Result<AdaptedLlama<B>> {
        let start = Instant::now();
        let checkpoint = self.base.checkpoint()?;
        let model = adapters::load(&self.base.config, &checkpoint, self.scheme, device)?;
        self.output.detail(loaded(&model, start.elapsed()));
        Ok(model)
    }

    /// Puts the adapters, if there are any, on the model.
    pub fn adapt<B: AdaptedBackend>(
        &self,
        model: AdaptedLlama<B>,
        device: &B::Device,
    ) -> Result<AdaptedLlama<B>> {
        let model = combine(model, &self.adapters, self.combination, device)?;
        for Weighted { folder, .. } in &self.adapters {
            let Some([theirs, ours]) = peft::other_base(&model, folder)? else {
                continue;
            };
            let name = match self.adapters.len() {
                1 => "the adapter".to_owned(),
                _ => folder.display().to_string(),
            };
            self.output.note(other_base(name, &theirs, &ours));
        }
        Ok(model)
    }
}

/// What there is to say of an adapter that was trained on another quantization than the base's.
fn other_base(adapter: impl std::fmt::Display, theirs: &str, ours: &str) -> String {
    format!(
        "warning: {adapter} was trained on a base with quantization {theirs}, and the base in \
         use has quantization {ours}: results differ from those of training"
    )
}

/// What loading did and how long it took, in words.
pub fn loaded<B: Backend>(model: &AdaptedLlama<B>, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match adapters::scheme(model) {
        Some(scheme) => {
            format!("loaded the model in {seconds:.1} s, its linear layers as {scheme}")
        }
        None => format!("loaded the model in {seconds:.1} s"),
    }
}

/// What `--quant` and the flags beside it ask for.
fn read_scheme(
    format: Option<&str>,
    block_size: usize,
    double_quant: bool,
) -> Result<Option<Scheme>> {
    let Some(format) = format.and_then(Format::from_name) else {
        return Ok(None);
    };
    let scheme = Scheme::new(format, block_size, double_quant);
    match scheme.is_supported() {
        true => Ok(Some(scheme)),
        false => Err(Advised::usage(
            format!("--block-size {block_size} is not a block size"),
            "give a power of two from 32 to 4096",
        )
        .into()),
    }
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

/// Refuses what cannot fit before anything of it is allocated; `needed` is the least that will be
/// held, in bytes.
fn check_memory(needed: u64, device: &Device) -> Result<()> {
    let Some(there) = device.memory_bytes().filter(|there| *there < needed) else {
        return Ok(());
    };
    let message = format!(
        "the weights need at least {:.1} GiB of memory, and this machine has {:.1} GiB",
        gib(needed),
        gib(there)
    );
    let help = "use a smaller model, keep this one in 4 bits (--quant nf4), or train it with a \
                lower adapter.rank";
    Err(Advised::failed(message, help).into())
}

/// In the unit that memory is told in.
pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}
