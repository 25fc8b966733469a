//! `trainer train`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use ::train::checkpoint::Checkpoints;
use ::train::data::{Encoder, Prepared, prepare, split};
use ::train::fit::{Event, Outcome, Stopped, fit};
use ::train::recipe::{ModelInit, Recipe};
use ::train::run_folder::{RECIPE_FILE, check_empty};
use ::train::session::{self, Rows};
use ::train::trained::Trained;
use anyhow::Result;
use model::folder::ModelFolder;
use model::hub::Files;
use model::ops::TrainBackend;
use serde_json::json;
use toml::Value;

use super::{open_model, settings};
use crate::cli::{RecipeArgs, TrainArgs};
use crate::device::{Device, Job};
use crate::encoder;
use crate::output::Output;
use crate::renderer::Renderer;
use crate::signals;

/// Trains, or goes on training.
pub fn run(args: TrainArgs, device: &str, no_tui: bool, output: &Output) -> Result<ExitCode> {
    if let Some(run) = &args.resume {
        let recipe = Recipe::read(Some(&run.join(RECIPE_FILE)), &[])?;
        return launch(recipe, Some(run), device, no_tui, output).map(|run| run.announce(output));
    }
    let mut recipe = read_recipe(&args.recipe)?;
    if args.print_recipe {
        session::trained(&mut recipe)?;
        println!("{}", recipe.to_toml());
        return Ok(ExitCode::SUCCESS);
    }
    launch(recipe, None, device, no_tui, output).map(|run| run.announce(output))
}

/// The recipe that a command line means.
pub fn read_recipe(args: &RecipeArgs) -> Result<Recipe> {
    let mut over: Vec<(String, Value)> = Vec::new();
    let mut set = |key: &str, value: Option<Value>| {
        over.extend(value.map(|value| (key.to_owned(), value)));
    };
    let path = |path: &PathBuf| Value::String(path.display().to_string());
    let paths = |all: &[PathBuf]| match all {
        [] => None,
        all => Some(Value::Array(all.iter().map(path).collect())),
    };
    set("model.path", args.model.clone().map(Value::String));
    set("data.train", paths(&args.data));
    set("data.eval", paths(&args.eval_data));
    set("output.dir", args.output.as_ref().map(path));
    set("quantization.format", args.quant.clone().map(Value::String));
    set("adapter.method", args.method.clone().map(Value::String));
    set("adapter.rank", args.rank.map(Value::Integer));
    set("train.max_steps", args.max_steps.map(Value::Integer));
    set("train.epochs", args.epochs.map(Value::Float));
    over.extend(settings(&args.set)?);
    Ok(Recipe::read(args.recipe.as_deref(), &over)?)
}

/// A run that has ended.
pub struct Finished {
    /// The run folder.
    pub folder: PathBuf,
    /// The folder of what was trained; written unless the run was interrupted.
    pub result: PathBuf,
    /// How it went.
    pub outcome: Outcome,
}

impl Finished {
    /// Says where the results are, and gives the exit code.
    pub fn announce(&self, output: &Output) -> ExitCode {
        let Self { folder, result, outcome } = self;
        let interrupted = outcome.stopped == Some(Stopped::Interrupted);
        let kind = result.file_name().unwrap_or_default().to_string_lossy();
        let json = json!({
            "run": folder,
            "steps": outcome.steps,
            "loss": outcome.loss,
            "best": outcome.best,
            "interrupted": interrupted,
            kind: result,
        });
        let text = match outcome.stopped {
            Some(Stopped::Interrupted) => format!(
                "interrupted after step {}; go on with: trainer train --resume {}",
                outcome.steps,
                folder.display()
            ),
            Some(Stopped::Early) => format!(
                "stopped early after step {}: the evaluation loss does not fall any more\n{}",
                outcome.steps,
                result.display()
            ),
            None => result.display().to_string(),
        };
        output.result(&json, &text);
        match interrupted {
            true => ExitCode::from(signals::INTERRUPTED),
            false => ExitCode::SUCCESS,
        }
    }
}

/// Trains by a recipe, in a new folder or going on in an old one.
pub fn launch(
    mut recipe: Recipe,
    resume: Option<&PathBuf>,
    device: &str,
    no_tui: bool,
    output: &Output,
) -> Result<Finished> {
    let device = Device::find(device)?;
    let trained = session::trained(&mut recipe)?;
    let folder = match resume {
        Some(run) => run.clone(),
        None => output_folder(&mut recipe)?,
    };
    let checkpoint = match resume {
        Some(run) => Some(newest_checkpoint(run, &recipe, output)?),
        None => None,
    };
    let files = match recipe.model.init {
        ModelInit::Random => Files::Config,
        ModelInit::Pretrained => Files::Model,
    };
    let base = open_model(&recipe.model.path, files, output)?;
    trained.parameters(&base.config)?; // what does not fit is said before anything is loaded
    let rows = read_rows(&recipe, &base, output)?;
    let job = TrainJob {
        recipe,
        trained,
        base,
        rows,
        folder: folder.clone(),
        checkpoint,
        no_tui,
        output: *output,
    };
    let result = folder.join(job.trained.folder_name());
    let outcome = device.run(job)?;
    Ok(Finished { folder, result, outcome })
}

struct TrainJob {
    recipe: Recipe,
    trained: Trained,
    base: ModelFolder,
    rows: Rows,
    folder: PathBuf,
    checkpoint: Option<PathBuf>,
    no_tui: bool,
    output: Output,
}

impl Job for TrainJob {
    type Output = Outcome;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Outcome> {
        let interrupter = signals::interrupter();
        let (log_every, output) = (self.recipe.train.log_every, self.output);
        let run = match &self.checkpoint {
            None => session::start::<B>(
                self.recipe, self.trained, self.base, self.rows, &self.folder, device,
            )?,
            Some(checkpoint) => session::resume::<B>(
                self.recipe, self.trained, self.base, self.rows, &self.folder, checkpoint, device,
            )?,
        };
        let trained = run.trained.num_params(&run.base.config)?;
        output.note(format_args!(
            "training {trained} of {} parameters for {} steps in {}",
            all_params(&run.trained, &run.base, trained),
            run.windows.num_steps(),
            self.folder.display(),
        ));
        let renderer = Renderer::new(self.no_tui, interrupter.clone(), log_every, output.is_quiet());
        let quiet = renderer.is_dashboard();
        let report = Arc::new(move |event: Event<'_>| match event {
            _ if quiet => {}
            Event::Evaluated { step, loss } => {
                output.note(format_args!("step {step}  eval loss {loss:.4}  perplexity {:.3}", loss.exp()));
            }
            Event::Saved { checkpoint } => output.detail(format_args!("saved {}", checkpoint.display())),
        });
        Ok(fit(run, renderer, interrupter, report)?)
    }
}

/// Weights of the base model and of what is added to it, as PEFT's `print_trainable_parameters`.
pub fn all_params(trained: &Trained, base: &ModelFolder, trained_params: u64) -> u64 {
    match trained {
        Trained::Full => base.config.num_params(),
        Trained::Lora(_) => base.config.num_params() + trained_params,
    }
}

/// The folder of a new run: `output.dir`, or one named after the model and the time.
fn output_folder(recipe: &mut Recipe) -> Result<PathBuf> {
    let folder = recipe.output.dir.clone().unwrap_or_else(|| {
        let name = recipe.model.path.trim_end_matches('/').rsplit('/').next().unwrap_or("run");
        let name = name.split('@').next().unwrap_or(name);
        Path::new("runs").join(format!("{name}-{}", jiff::Zoned::now().strftime("%Y%m%d-%H%M%S")))
    });
    check_empty(&folder)?;
    recipe.output.dir = Some(folder.clone());
    Ok(folder)
}

fn newest_checkpoint(run: &Path, recipe: &Recipe, output: &Output) -> Result<PathBuf> {
    let checkpoints = Checkpoints::new(run, recipe.train.keep_checkpoints);
    let newest = checkpoints.newest(|path, error| {
        output.note(format_args!("warning: {} is skipped: {error}", path.display()));
    })?;
    Ok(newest.ok_or_else(|| ::train::Error::NoCheckpoint { path: run.into() })?)
}

/// Reads and encodes the rows of a recipe.
pub fn read_rows(recipe: &Recipe, base: &ModelFolder, output: &Output) -> Result<Rows> {
    let data = &recipe.data;
    let encoder = encoder::open(base, data)?;
    let read = |what: &str, paths: &[PathBuf]| -> Result<Prepared> {
        let prepared = prepare(paths, &data.settings(), &encoder)?;
        let dropped = match prepared.dropped_rows {
            0 => String::new(),
            n => format!(", {n} dropped for their length"),
        };
        output.note(format_args!(
            "{what}: {} rows, {} trained of {} tokens{dropped}",
            prepared.samples.len(),
            prepared.trained_tokens,
            prepared.total_tokens,
        ));
        warn_about_end_markers(&prepared, &encoder, output);
        Ok(prepared)
    };
    let train = read("training data", &data.train.list())?.samples;
    let (train, eval) = match (data.eval.is_empty(), data.eval_fraction) {
        (false, _) => (train, read("evaluation data", &data.eval.list())?.samples),
        (true, fraction) if fraction > 0.0 => split(train, fraction, recipe.train.seed)?,
        (true, _) => (train, Vec::new()),
    };
    Ok(Rows {
        train: Arc::new(train),
        eval: Arc::new(eval),
    })
}

/// Rows that do not end in the model's end marker teach it not to stop.
fn warn_about_end_markers(prepared: &Prepared, encoder: &Encoder, output: &Output) {
    if prepared.rows_without_end_marker > 0 && !encoder.end_markers.is_empty() {
        output.note(format_args!(
            "warning: {} rows do not end in a trained end marker ({}): the model will not learn to stop",
            prepared.rows_without_end_marker,
            encoder.end_markers.join(" or "),
        ));
    }
}
