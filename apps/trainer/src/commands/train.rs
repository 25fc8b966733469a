//! `trainer train`

mod begin;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ::train::data::check::Spread;
use ::train::data::{Encoder, Prepared, Samples, Settings, Split, prepare, split};
use ::train::fit::{Event, Outcome, Stopped, fit};
use ::train::memory::Compared;
use ::train::recipe::{ModelInit, Recipe};
use ::train::run_folder::{RECIPE_FILE, check_empty, peak_memory_bytes};
use ::train::schedule::Schedule;
use ::train::session::{self, Rows};
use ::train::trained::Trained;
use adapters::{TrainBackend, base_bytes};
use anyhow::Result;
use model::folder::ModelFolder;
use model::hub::Files;
use serde_json::json;
use toml::Value;

pub use begin::Unfinished;
use begin::{Begin, go_on};

use super::{check_memory, gib, loaded, open_data, open_model, other_base, settings, trained};
use crate::cli::{RecipeArgs, TrainArgs};
use crate::device::{Device, Job};
use crate::encoder;
use crate::failure::Advised;
use crate::forecast::{Forecast, forecast};
use crate::labels::{self, Example};
use crate::output::Output;
use crate::record::{Known, Record};
use crate::renderer::Renderer;
use crate::signals;

/// Trains, or goes on training.
pub fn run(args: TrainArgs, device: &str, no_tui: bool, output: &Output) -> Result<ExitCode> {
    let over = settings_of(&args.recipe)?;
    if let Some(run) = &args.resume {
        if over.iter().any(|(key, _)| key == "output.dir") {
            let help = "leave output.dir out, or copy the folder first and resume the copy";
            return Err(Advised::usage("--resume goes on in its own folder", help).into());
        }
        let recipe = Recipe::read(Some(&run.join(RECIPE_FILE)), &over)?;
        return launch(recipe, Some(run), device, no_tui, output)?.announce(output);
    }
    let mut recipe = Recipe::read(args.recipe.recipe.as_deref(), &over)?;
    if args.print_recipe {
        trained(&mut recipe)?;
        output.result(&serde_json::to_value(&recipe)?, recipe.to_toml().trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    launch(recipe, None, device, no_tui, output)?.announce(output)
}

/// The settings that a command line puts over a recipe file.
pub fn settings_of(args: &RecipeArgs) -> Result<Vec<(String, Value)>> {
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
    Ok(over)
}

/// A run that has ended.
pub struct Finished {
    /// The run folder.
    pub folder: PathBuf,
    /// The folder of what was trained; written unless the run was interrupted.
    pub result: PathBuf,
    /// How it went.
    pub outcome: Outcome,
    /// The most memory it held, predicted and measured.
    pub memory: Compared,
}

impl Finished {
    /// Says where the results are, and gives the exit code.
    pub fn announce(&self, output: &Output) -> Result<ExitCode> {
        let Self {
            folder,
            result,
            outcome,
            memory,
        } = self;
        let interrupted = outcome.stopped == Some(Stopped::Interrupted);
        let kind = result.file_name().unwrap_or_default().to_string_lossy();
        let json = json!({
            "run": folder,
            "steps": outcome.steps,
            "loss": outcome.loss,
            "best": outcome.best.map(|best| json!({"step": best.step, "loss": best.loss})),
            "interrupted": interrupted,
            "memory": memory,
            kind: (!interrupted).then_some(result), // an interrupted run has only checkpoints
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
        if let (Some(loss), false) = (outcome.loss, output.json) {
            output.note(format_args!("loss {loss:.4} after step {}", outcome.steps));
        }
        if let (Some(best), false) = (outcome.best, output.json) {
            output.note(format_args!(
                "best evaluation: loss {:.4} after step {}",
                best.loss, best.step
            ));
        }
        if let Some(measured) = memory.measured_bytes {
            output.note(format_args!(
                "peak memory  {:.2} GiB (predicted {:.2} GiB)",
                gib(measured),
                gib(memory.predicted_bytes)
            ));
        }
        output.result(&json, &text)?;
        Ok(match interrupted {
            true => ExitCode::from(signals::INTERRUPTED),
            false => ExitCode::SUCCESS,
        })
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
    let start = Instant::now();
    let device = Device::find(device)?;
    let begin = match resume {
        Some(run) => go_on(run, &mut recipe, output)?,
        None => Begin::New,
    };
    let trained = match begin {
        Begin::Checkpoint(..) => session::resumed(&recipe),
        Begin::Again(_) | Begin::New => trained(&mut recipe)?,
    };
    let folder = match resume {
        Some(run) => run.clone(),
        None => output_folder(&mut recipe)?,
    };
    let files = match recipe.model.init {
        ModelInit::Random => Files::Config,
        ModelInit::Pretrained => Files::Model,
    };
    let mut base = open_model(&recipe.model.path, files, output)?;
    encoder::choose_template(&mut base, None, recipe.data.chat_template.as_deref())?;
    encoder::forget_same_template(&mut base, &mut recipe)?;
    // what does not fit is said before anything is loaded
    let trainable = session::num_params(&recipe, &trained, &base.config)?;
    check_training_memory(&recipe, &trained, &base, trainable, &device)?;
    let read = read_rows(&recipe, &base, output)?;
    read.show_examples(output);
    let forecast = forecast(&recipe, &trained, &base, Some(&read.rows), &device)?;
    forecast.tell(output);
    recipe.make_paths_absolute(); // messages so far name paths as they were typed
    let job = TrainJob {
        known: Known {
            start,
            rows: read.rows.clone(),
            dropped_rows: read.dropped_rows,
            warnings: read
                .problems
                .into_iter()
                .chain(forecast.problem.clone())
                .collect(),
            device: device.clone(),
        },
        recipe,
        trained,
        base,
        rows: read.rows,
        folder: folder.clone(),
        begin,
        forecast: forecast.clone(),
        no_tui,
        output: *output,
    };
    let result = folder.join(job.trained.folder_name());
    let outcome = device.run(job)?;
    Ok(Finished {
        folder,
        result,
        outcome,
        memory: Compared {
            predicted: forecast.memory,
            predicted_bytes: forecast.memory.total(),
            measured_bytes: forecast.is_measured().then(peak_memory_bytes),
        },
    })
}

/// What there is to say of a run that ends before its learning rate has risen.
pub fn all_warm_up(recipe: &Recipe, num_steps: usize) -> Option<String> {
    let train = &recipe.train;
    let schedule = Schedule::new(train, num_steps, 0);
    let peak = (0..num_steps)
        .map(|step| schedule.at(step))
        .fold(0.0, f64::max);
    (peak < train.learning_rate / 2.0).then(|| {
        format!(
            "the run is all warm-up: with a learning rate of at most {peak:e} in all ({num_steps}) of its \
             steps it learns little or nothing; take more steps, or set train.warmup_steps=0"
        )
    })
}

/// Refuses what cannot be trained in the memory of a device: weights, gradients and moments.
pub fn check_training_memory(
    recipe: &Recipe,
    trained: &Trained,
    base: &ModelFolder,
    trainable: u64,
    device: &Device,
) -> Result<()> {
    let weights = match recipe.model.init {
        ModelInit::Random => base.config.num_params() * size_of::<f32>() as u64,
        ModelInit::Pretrained => base_bytes(base, recipe.quantization.scheme())?,
    };
    let trained_bytes = trainable.saturating_mul(size_of::<f32>() as u64);
    let beside = match trained {
        Trained::Full => trained_bytes.saturating_mul(3), // gradient and moments
        Trained::Lora(_) => trained_bytes.saturating_mul(4),
    };
    check_memory(weights.saturating_add(beside), device)
}

struct TrainJob {
    known: Known,
    recipe: Recipe,
    trained: Trained,
    base: ModelFolder,
    rows: Rows,
    folder: PathBuf,
    begin: Begin,
    forecast: Forecast,
    no_tui: bool,
    output: Output,
}

impl Job for TrainJob {
    type Output = Outcome;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Outcome> {
        let (log_every, output, mut known) = (self.recipe.train.log_every, self.output, self.known);
        let (recipe, trained, base, rows) = (self.recipe, self.trained, self.base, self.rows);
        let mut run = match self.begin {
            Begin::New => session::start::<B>(recipe, trained, base, rows, &self.folder, device)?,
            Begin::Again(folder) => {
                session::start_again::<B>(recipe, trained, base, rows, folder, device)?
            }
            Begin::Checkpoint(folder, checkpoint) => {
                session::resume::<B>(recipe, trained, base, rows, folder, &checkpoint, device)?
            }
        };
        let answer = "saving and stopping (again: at once, unsaved)";
        let interrupter = signals::interrupter(answer);
        output.note(loaded(&run.model.model, run.load_time));
        if let Some([theirs, ours]) = &run.other_base {
            let text = other_base("the adapter", theirs, ours);
            output.note(&text);
            known
                .warnings
                .extend(text.strip_prefix("warning: ").map(str::to_owned));
        }
        let trained = run.trained.num_params(&run.model.model.config)?;
        output.note(format_args!(
            "training {trained} of {} parameters for {} steps in {}",
            all_params(&run.trained, &run.base, trained),
            run.windows.num_steps(),
            self.folder.display(),
        ));
        run.model.recompute = self.forecast.recompute;
        run.predicted = Some(self.forecast.memory);
        if let Some(fill_ratio) = run.windows.fill_ratio() {
            output.note(format_args!(
                "an epoch is packed into {} sequences of up to {} tokens, {:.1} % full",
                run.windows.num_sequences(),
                run.recipe.data.max_length,
                100.0 * fill_ratio,
            ));
        }
        if run.progress.step >= run.windows.num_steps() && !run.progress.evaluation_due {
            output.note("the run has taken all its steps; --max-steps makes it longer");
        }
        if let Some(text) = all_warm_up(&run.recipe, run.windows.num_steps()) {
            output.note(format_args!("warning: {text}"));
            known.warnings.push(text);
        }
        let unfinished = |source| Unfinished {
            run: self.folder.clone(),
            source,
        };
        let record = Record::begin(&mut run, known).map_err(|error| match error.downcast() {
            Ok(source) => unfinished(source).into(),
            Err(error) => error,
        })?;
        let past = run.folder.lines()?; // before the terminal is taken
        let folder = self.folder.clone();
        let renderer = Renderer::new(folder, self.no_tui, interrupter.clone(), log_every, output);
        renderer.begin(&past, run.windows.num_steps());
        let (listener, screen) = (renderer.clone(), renderer.clone());
        let report = Arc::new(move |event: Event<'_>| listener.tell(event));
        let outcome = fit(run, renderer, interrupter, report);
        screen.close(); // also after a failure
        record.end(&outcome, &output);
        outcome.map_err(|error| match error {
            error @ ::train::Error::NotFinite { .. } => error.into(),
            source => unfinished(source).into(),
        })
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
        // made absolute, since `.` and `..` are no names
        let path = std::path::absolute(&recipe.model.path).unwrap_or_default();
        let name = path
            .file_name()
            .map_or("run".into(), |name| name.to_string_lossy());
        let name = name.split('@').next().unwrap_or(&name);
        Path::new("runs").join(format!(
            "{name}-{}",
            jiff::Zoned::now().strftime("%Y%m%d-%H%M%S")
        ))
    });
    check_empty(&folder)?;
    recipe.output.dir = Some(folder.clone());
    Ok(folder)
}

/// The rows of a recipe, and what there is to say about them.
pub struct ReadRows {
    /// The rows.
    pub rows: Rows,
    /// Training rows that are too long.
    pub dropped_rows: usize,
    /// What a user should know before training.
    pub problems: Vec<String>,
    /// Trained tokens of the training rows.
    pub spread: Option<Spread>,
    /// The first training rows.
    pub examples: Vec<Example>,
}

impl ReadRows {
    /// Shows what is trained of the first row; of more, if one wants to know more.
    fn show_examples(&self, output: &Output) {
        let styled = labels::is_styled(&std::io::stderr());
        for (index, example) in self.examples.iter().enumerate() {
            let text = example.text(styled);
            match index {
                0 => output.note(text),
                _ => output.detail(text),
            }
        }
    }
}

/// Reads and encodes the rows of a recipe.
pub fn read_rows(recipe: &Recipe, base: &ModelFolder, output: &Output) -> Result<ReadRows> {
    let data = &recipe.data;
    let encoder = encoder::open(base, data)?;
    let mut problems = Vec::new();
    let mut read = |what: &str, paths: &[PathBuf], part: Split| -> Result<Prepared> {
        let paths = open_data(paths, part, output)?;
        let settings = Settings {
            skip_untrained: part == Split::HeldOut, // as `trainer eval`
            ..data.settings()
        };
        let prepared = prepare(&paths, &settings, &encoder)?;
        output.note(counts(what, &prepared));
        problems.extend(labels::warnings(what, &prepared, &encoder, base)?);
        Ok(prepared)
    };
    let prepared = read("training data", &data.train.list(), Split::Train)?;
    let spread = prepared.labels.spread();
    let examples = labels::examples(&prepared, &encoder)?;
    let (dropped_rows, train_labels) = (prepared.dropped_rows, prepared.labels);
    let (train, eval, eval_labels) = match (data.eval.is_empty(), data.eval_fraction) {
        (false, _) => {
            let eval = read("evaluation data", &data.eval.list(), Split::HeldOut)?;
            (prepared.samples, eval.samples, Some(eval.labels))
        }
        (true, fraction) if fraction > 0.0 => {
            let (train, eval) = split(&prepared.samples, fraction, recipe.train.seed)?;
            (train, eval, None)
        }
        (true, _) => (prepared.samples, Samples::default(), None),
    };
    let eval_labels = eval_labels.as_ref().unwrap_or(&train_labels);
    problems.extend(labels::shared(&train_labels, &train, eval_labels, &eval));
    for problem in &problems {
        output.note(format_args!("warning: {problem}"));
    }
    Ok(ReadRows {
        rows: Rows { train, eval },
        dropped_rows,
        problems,
        spread,
        examples,
    })
}

/// How many rows and tokens there are.
fn counts(what: &str, prepared: &Prepared) -> String {
    let (rows, trained) = (prepared.samples.len(), prepared.trained_tokens);
    let all = prepared.total_tokens;
    let spread = prepared.labels.spread().map_or(String::new(), |spread| {
        let Spread { min, median, max } = spread;
        format!(" (a row: {min} to {max}, median {median})")
    });
    format!("{what}: {rows} rows, {trained} trained of {all} tokens{spread}")
}

/// What makes a run worse without stopping it.
pub fn problems_of(what: &str, prepared: &Prepared, encoder: &Encoder) -> Vec<String> {
    let mut problems = Vec::new();
    if prepared.dropped_rows > 0 {
        let (dropped, rows) = (prepared.dropped_rows, prepared.rows);
        problems.push(format!(
            "{what}: {dropped} of {rows} rows are longer than data.max_length ({})",
            prepared.labels.dropped
        ));
    }
    let untrained = &prepared.labels.untrained;
    if untrained.count > 0 {
        let (count, rows) = (untrained.count, prepared.rows);
        problems.push(format!(
            "{what}: {count} of {rows} rows have no trained token and are left out ({untrained})"
        ));
    }
    if prepared.rows_without_end_marker > 0 {
        problems.push(format!(
            "{what}: {} rows do not end in a trained end marker ({}): the model will not learn to \
             stop from them ({})",
            prepared.rows_without_end_marker,
            encoder.end_markers.join(" or "),
            prepared.labels.endless
        ));
    }
    problems
}
