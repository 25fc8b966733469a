//! `trainer train`

mod begin;
mod end;
mod rows;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::train::fit::{Event, Outcome, fit};
use ::train::memory::Compared;
use ::train::recipe::{ModelInit, Recipe};
use ::train::report::facts::End;
use ::train::run_folder::{RECIPE_FILE, check_empty};
use ::train::schedule::Schedule;
use ::train::session::{self, Rows};
use ::train::trained::Trained;
use adapters::{TrainBackend, base_bytes};
use anyhow::Result;
use model::folder::ModelFolder;
use model::hub::Files;
use toml::Value;

use begin::{Begin, go_on};
use end::Finished;
pub use end::{Left, Unfinished};
pub use rows::{ReadRows, problems_of, read_rows};

use super::{check_init_from, check_memory, loaded, open_model, other_base, settings, trained};
use crate::cli::{RecipeArgs, TrainArgs};
use crate::device::{Device, Job};
use crate::encoder;
use crate::failure::Advised;
use crate::forecast::{Forecast, forecast};
use crate::output::{Output, count};
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
        let file = run.join(RECIPE_FILE);
        if !file.exists() {
            let (run, file) = (run.display(), file.display());
            let message = format!("{run} is not the folder of a run: there is no {file}");
            let help = "give the folder that `trainer train` wrote";
            return Err(Advised::usage(message, help).into());
        }
        let recipe = Recipe::read(Some(&file), &over)?;
        return launch(recipe, Some(run), device, no_tui, output)?.announce(output);
    }
    let file = args.recipe.recipe.as_deref();
    if args.print_recipe {
        let mut recipe = Recipe::read_to_show(file, &over)?;
        trained(&mut recipe, output)?;
        output.result(&serde_json::to_value(&recipe)?, recipe.to_toml().trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let recipe = Recipe::read(file, &over)?;
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
    signals::end_at_once(); // until there is something to save
    let begin = match resume {
        Some(run) => go_on(run, &mut recipe, output)?,
        None => Begin::New,
    };
    let trained = match begin {
        Begin::Checkpoint(..) => session::resumed(&recipe),
        Begin::Again(_) | Begin::New => trained(&mut recipe, output)?,
    };
    device.settle_compute_dtype(&mut recipe, output)?;
    let folder = match resume {
        Some(run) => run.clone(),
        None => output_folder(&mut recipe)?,
    };
    let (left, told) = (folder.clone(), *output);
    signals::at_once(move || Left::find(&left).tell(&told));
    let files = match recipe.model.init {
        ModelInit::Random => Files::Config,
        ModelInit::Pretrained => Files::Model,
    };
    let mut base = open_model(&recipe.model.path, files, output)?;
    if !matches!(begin, Begin::Checkpoint(..)) {
        check_init_from(&recipe, &base)?;
    }
    encoder::choose_template(&mut base, &[], recipe.data.chat_template.as_deref())?;
    encoder::forget_same_template(&mut base, &mut recipe)?;
    // what does not fit is said before anything is loaded
    let trainable = session::num_params(&recipe, &trained, &base.config)?;
    check_training_memory(&recipe, &trained, &base, trainable, &device)?;
    let reading = Instant::now();
    let read = read_rows(&recipe, &base, output)?;
    let rows_time = reading.elapsed();
    read.show_examples(output);
    let forecast = forecast(&recipe, &trained, &base, Some(&read.rows), &device)?;
    forecast.tell(output);
    recipe.make_paths_absolute(); // messages so far name paths as they were typed
    let job = TrainJob {
        known: Known {
            start,
            rows_time,
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
    let (outcome, held_bytes) = device.run(job)?;
    signals::no_farewell();
    Ok(Finished {
        folder,
        result,
        outcome,
        memory: Compared {
            predicted: forecast.memory,
            predicted_bytes: forecast.memory.total(),
            measured_bytes: forecast.is_measured().then_some(held_bytes),
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
            "the run is all warm-up: in its {} the learning rate is {} at most, and it learns little \
             or nothing; take more epochs, fewer rows a step{}, or set train.warmup_steps = 0",
            count(num_steps, "step"),
            if peak > 0.0 { format!("{peak:.1e}") } else { "0".into() },
            or_unpacked(recipe),
        )
    })
}

/// What there is to say of a run with fewer rows than a step takes.
fn few_rows(recipe: &Recipe, num_sequences: usize) -> Option<String> {
    let train = &recipe.train;
    let step = train.micro_batch_size * train.gradient_accumulation_steps;
    (num_sequences < step).then(|| {
        format!(
            "a step takes {step} {}, and there are {num_sequences}: each step computes some of them \
             more than once; set train.micro_batch_size = {}{}",
            if recipe.data.packing { "packed sequences" } else { "rows" },
            num_sequences.div_ceil(train.gradient_accumulation_steps),
            or_unpacked(recipe),
        )
    })
}

fn or_unpacked(recipe: &Recipe) -> &'static str {
    match recipe.data.packing {
        true => ", or data.packing = false",
        false => "",
    }
}

/// Refuses what cannot be trained in the memory of a device: weights, gradients and moments.
pub fn check_training_memory(
    recipe: &Recipe,
    trained: &Trained,
    base: &ModelFolder,
    trainable: u64,
    device: &Device,
) -> Result<()> {
    let dtype = recipe.train.compute_dtype.dtype();
    let weights = match recipe.model.init {
        ModelInit::Random => base.config.num_params() * size_of::<f32>() as u64,
        ModelInit::Pretrained => base_bytes(base, recipe.quantization.scheme(), dtype)?,
    };
    let trained_bytes = trainable.saturating_mul(size_of::<f32>() as u64);
    let beside = match trained {
        Trained::Full => trained_bytes.saturating_mul(3), // gradient and moments
        Trained::Adapter(_) => trained_bytes.saturating_mul(4),
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
    /// How it went, and the most memory that was held.
    type Output = (Outcome, u64);

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Self::Output> {
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
        let interrupter = signals::ask_first("saving and stopping (again: at once, unsaved)");
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
            "training {trained} of {} parameters for {} in {}",
            all_params(&run.trained, &run.base, trained),
            count(run.windows.num_steps(), "step"),
            self.folder.display(),
        ));
        run.model.recompute = self.forecast.recompute;
        run.predicted = Some(self.forecast.memory);
        if let Some(fill_ratio) = run.windows.fill_ratio() {
            output.note(format_args!(
                "an epoch is packed into {} of up to {} tokens, {:.1} % full",
                count(run.windows.num_sequences(), "sequence"),
                run.recipe.data.max_length,
                100.0 * fill_ratio,
            ));
        }
        if run.progress.step >= run.windows.num_steps() && !run.progress.evaluation_due {
            output.note("the run has taken all its steps; --max-steps makes it longer");
        }
        let warnings = [
            all_warm_up(&run.recipe, run.windows.num_steps()),
            few_rows(&run.recipe, run.windows.num_sequences()),
        ];
        for text in warnings.into_iter().flatten() {
            output.note(format_args!("warning: {text}"));
            known.warnings.push(text);
        }
        let unfinished = |source| Unfinished {
            run: self.folder.clone(),
            source,
        };
        let (start, rows_time) = (known.start, known.rows_time);
        let (asking, load_time) = (Instant::now(), run.load_time);
        let record = Record::begin(&mut run, known).map_err(|error| match error.downcast() {
            Ok(source) => unfinished(source).into(),
            Err(error) => error,
        })?;
        output.note(ready(
            start.elapsed(),
            rows_time,
            load_time,
            asking.elapsed(),
        ));
        let (so_far, left, told) = (record.so_far(), self.folder.clone(), output);
        signals::at_once(move || {
            Left::find(&left).tell(&told);
            so_far.write(End::Interrupted, None, &told);
        });
        let past = run.folder.lines()?; // before the terminal is taken
        let folder = self.folder.clone();
        let renderer = Renderer::new(folder, self.no_tui, interrupter.clone(), log_every, output);
        renderer.begin(&past, run.windows.num_steps());
        let (listener, screen) = (renderer.clone(), renderer.clone());
        let report = Arc::new(move |event: Event<'_>| listener.tell(event));
        let outcome = fit(run, renderer, interrupter, report);
        screen.close(); // also after a failure
        let held_bytes = record.end(&outcome, &output);
        match outcome {
            Ok(outcome) => Ok((outcome, held_bytes)),
            Err(source) => Err(unfinished(source).into()),
        }
    }
}

/// How long it took from the start of the program to the first step, and what most of that was.
fn ready(all: Duration, rows: Duration, weights: Duration, answers: Duration) -> String {
    let [all, rows, weights, answers] = [all, rows, weights, answers].map(|x| x.as_secs_f64());
    format!(
        "ready for the first step after {all:.1} s: rows {rows:.1} s, weights {weights:.1} s, \
         answers for the report {answers:.1} s"
    )
}

/// Weights of the base model and of what is added to it, as PEFT's `print_trainable_parameters`.
pub fn all_params(trained: &Trained, base: &ModelFolder, trained_params: u64) -> u64 {
    match trained {
        Trained::Full => base.config.num_params(),
        Trained::Adapter(_) => base.config.num_params() + trained_params,
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
