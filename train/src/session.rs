//! From a recipe to a run that is ready to start, or to go on.

use std::path::Path;
use std::time::{Duration, Instant};

use adapters::TrainBackend;
use adapters::{AdaptedLlama, AdapterConfig, peft};
use model::chat::ChatTemplate;
use model::config::LlamaConfig;
use model::folder::ModelFolder;
use model::ops::MatmulBackend;
use sha2::{Digest, Sha256};

use crate::batch::{EvalBatches, Windows};
use crate::checkpoint::{Progress, hex, read_progress, restore_optimizer};
use crate::data::Samples;
use crate::error::{Error, Result};
use crate::fit::Run;
use crate::loss_scale::LossScale;
use crate::optimizer::AdamW;
use crate::recipe::{ComputeDtype, ModelInit, Recipe, Recompute};
use crate::run_folder::RunFolder;
use crate::step::CausalLm;
use crate::trained::Trained;

/// The rows of a run.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Trained on.
    pub train: Samples,
    /// Evaluated on; may be empty.
    pub eval: Samples,
}

impl Rows {
    /// What all tokens and labels decide: order and split of the rows follow from them, so that a
    /// run can only go on with the same ones.
    pub fn fingerprint(&self) -> String {
        let both = [self.train.digest(), self.eval.digest()].concat();
        hex(&Sha256::digest(both))
    }
}

/// What a recipe trains; the settings of `adapter.init_from`, and the chat template in that folder
/// if there is one, are taken over into the recipe.
///
/// # Errors
/// [`Error::Recipe`] if the recipe asks for other settings than that adapter has.
pub fn trained(recipe: &mut Recipe) -> Result<Trained> {
    if recipe.adapter.is_full() {
        return Ok(Trained::Full);
    }
    if let Some(folder) = recipe.adapter.init_from.clone() {
        let theirs = peft::read_config(&folder)?;
        if theirs.method.is_complete() {
            let title = theirs.method.title();
            let folder = folder.display();
            let problem = format!(
                "adapter.init_from ({folder}) is {title} whose ranks have been allocated: it is complete \
                 and cannot be trained on"
            );
            return Err(Error::Recipe {
                problems: vec![problem],
            });
        }
        let differ = recipe.adapter.config().differences(&theirs).into_iter();
        let asked = differ.map(|key| format!("adapter.{key}"));
        let problem = |key: String| {
            format!(
                "{key} differs from that of adapter.init_from ({})",
                folder.display()
            )
        };
        let asked = asked.filter(|key| recipe.given.contains(key));
        let problems: Vec<_> = asked.map(problem).collect();
        if !problems.is_empty() {
            return Err(Error::Recipe { problems });
        }
        let given = |key: &str| recipe.given.contains(&format!("adapter.{key}"));
        recipe.adapter.continue_from(&theirs, given);
        if recipe.data.chat_template.is_none() && ChatTemplate::from_folder(&folder)?.is_some() {
            recipe.data.chat_template = Some(folder.display().to_string());
        }
    }
    Ok(resumed(recipe))
}

/// What a resolved recipe trains.
pub fn resumed(recipe: &Recipe) -> Trained {
    match recipe.adapter.is_full() {
        true => Trained::Full,
        false => Trained::Adapter(recipe.adapter.config()),
    }
}

/// Number of trained weights. Settings that do not fit the model are those of the recipe, or of
/// the adapter in `adapter.init_from`.
///
/// # Errors
/// [`adapters::Error::Fit`] or [`adapters::Error::Config`] with everything that does not fit.
pub fn num_params(recipe: &Recipe, trained: &Trained, model: &LlamaConfig) -> Result<u64> {
    if let (Trained::Adapter(adapter), None) = (trained, &recipe.adapter.init_from) {
        adapter.check_names(model)?;
    }
    trained
        .num_params(model)
        .map_err(|error| match (error, &recipe.adapter.init_from) {
            (Error::Adapter(adapters::Error::Fit { problems }), Some(folder)) => {
                let path = folder.join(peft::CONFIG_FILE);
                adapters::Error::Config { path, problems }.into()
            }
            (other, _) => other,
        })
}

/// What the loss of a run is scaled by at first, if it is.
fn loss_scale(recipe: &Recipe) -> Option<LossScale> {
    (recipe.train.compute_dtype == ComputeDtype::F16).then(LossScale::default)
}

/// Loads the base model of a recipe.
pub fn load_base<B: MatmulBackend>(
    recipe: &Recipe,
    base: &ModelFolder,
    device: &B::Device,
) -> Result<AdaptedLlama<B>> {
    Ok(match recipe.model.init {
        ModelInit::Random => adapters::init(&base.config, recipe.train.seed, device),
        ModelInit::Pretrained => {
            let (scheme, dtype) = (recipe.quantization.scheme(), recipe.train.compute_dtype);
            let checkpoint = base.checkpoint()?;
            adapters::load_in(dtype.dtype(), &base.config, &checkpoint, scheme, device)?
        }
    })
}

/// Prepares a new run in an empty folder.
///
/// Nothing is written before the model and its adapter are there.
pub fn start<B: TrainBackend>(
    recipe: Recipe,
    trained: Trained,
    base: ModelFolder,
    rows: Rows,
    output: &Path,
    device: B::Device,
) -> Result<Run<B>> {
    let folder = |recipe: &Recipe| RunFolder::create(output, recipe);
    begin(recipe, trained, base, rows, folder, device)
}

/// Prepares a run that ended before its first checkpoint to begin again.
pub fn start_again<B: TrainBackend>(
    recipe: Recipe,
    trained: Trained,
    base: ModelFolder,
    rows: Rows,
    mut folder: RunFolder,
    device: B::Device,
) -> Result<Run<B>> {
    let folder = |recipe: &Recipe| {
        folder.write_recipe(recipe)?;
        folder.go_back(&Progress::default())?;
        Ok(folder)
    };
    begin(recipe, trained, base, rows, folder, device)
}

fn begin<B: TrainBackend>(
    recipe: Recipe,
    mut trained: Trained,
    base: ModelFolder,
    rows: Rows,
    folder: impl FnOnce(&Recipe) -> Result<RunFolder>,
    device: B::Device,
) -> Result<Run<B>> {
    let start = Instant::now();
    let mut model = load_base::<B>(&recipe, &base, &device)?;
    let load_time = start.elapsed();
    let mut other_base = None;
    match &recipe.adapter.init_from {
        Some(folder) => {
            model = peft::load(model, folder, &device)?.0;
            other_base = peft::other_base(&model, folder)?;
        }
        None => {
            read_text(&mut trained, &base)?;
            trained.attach(&mut model, recipe.train.seed, &device)?;
        }
    }
    let progress = Progress {
        rows: rows.fingerprint(),
        loss_scale: loss_scale(&recipe),
        ..Progress::default()
    };
    let folder = folder(&recipe)?.with_events(&recipe, &progress)?;
    let virtual_tokens = trained.virtual_tokens();
    let (data, train) = (&recipe.data, &recipe.train);
    let windows = Windows::behind(virtual_tokens, rows.train, data, train, progress.step);
    let steps = windows.num_steps();
    trained.of_run(steps)?;
    let optimizer = trained.optimizer(&model.config, &recipe.train, steps)?;
    let run = assemble(
        recipe, trained, base, windows, rows.eval, device, model, optimizer, folder, progress,
        load_time,
    );
    Ok(Run { other_base, ..run })
}

/// Tells a method that begins with a text which tokens that has.
fn read_text(trained: &mut Trained, base: &ModelFolder) -> Result<()> {
    let Trained::Adapter(AdapterConfig { method, .. }) = trained else {
        return Ok(());
    };
    let Some((text, ids)) = method.text() else {
        return Ok(());
    };
    let problem = |why: &str| Error::Recipe {
        problems: vec![format!("adapter.prompt_tuning_init_text {why}")],
    };
    let tokenizer = base.tokenizer()?;
    let tokenizer = tokenizer.ok_or_else(|| problem("needs the model's tokenizer.json"))?;
    *ids = tokenizer.encode(text, true)?.ids;
    match ids.is_empty() {
        true => Err(problem("has no tokens")),
        false => Ok(()),
    }
}

/// Refuses a recipe that asks for another run than the one that wrote a checkpoint.
///
/// # Errors
/// [`Error::Recipe`] with every key that differs and must not.
pub fn check_recipe(recipe: &Recipe, checkpoint: &Path) -> Result<()> {
    let began = read_progress(checkpoint)?.recipe;
    let problems = recipe.changes(&began);
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Recipe { problems }),
    }
}

/// Prepares a run to go on from a checkpoint.
///
/// # Errors
/// [`Error::RowsChanged`] if these are not the rows that it began with; [`Error::Recipe`] if the run
/// would end before where it is.
pub fn resume<B: TrainBackend>(
    recipe: Recipe,
    mut trained: Trained,
    base: ModelFolder,
    rows: Rows,
    mut folder: RunFolder,
    checkpoint: &Path,
    device: B::Device,
) -> Result<Run<B>> {
    let mut progress = read_progress(checkpoint)?;
    progress.loss_scale = progress.loss_scale.or(loss_scale(&recipe));
    if progress.rows != rows.fingerprint() {
        return Err(Error::RowsChanged {
            checkpoint: checkpoint.into(),
        });
    }
    let (data, train) = (&recipe.data, &recipe.train);
    let virtual_tokens = trained.virtual_tokens();
    let windows = Windows::behind(virtual_tokens, rows.train, data, train, progress.step);
    if windows.num_steps() < progress.step {
        let (steps, taken) = (windows.num_steps(), progress.step);
        let problem = format!(
            "train.max_steps or train.epochs come to {steps} steps, and the run has taken {taken}"
        );
        return Err(Error::Recipe {
            problems: vec![problem],
        });
    }
    let start = Instant::now();
    let model = load_base::<B>(&recipe, &base, &device)?;
    let load_time = start.elapsed();
    let model = trained.restore(model, checkpoint, &device)?;
    let steps = windows.num_steps();
    trained.of_run(steps)?;
    let optimizer = trained.optimizer(&model.config, &recipe.train, steps)?;
    let names = trained.parameters(&model.config)?; // of which ties may have come apart
    restore_optimizer(&optimizer, &names, checkpoint, &device)?;
    folder.write_recipe(&recipe)?;
    folder.go_back(&progress)?;
    let folder = folder.with_events(&recipe, &progress)?;
    Ok(assemble(
        recipe, trained, base, windows, rows.eval, device, model, optimizer, folder, progress,
        load_time,
    ))
}

#[expect(
    clippy::too_many_arguments,
    reason = "it puts a plain structure together"
)]
fn assemble<B: TrainBackend>(
    recipe: Recipe,
    trained: Trained,
    base: ModelFolder,
    windows: Windows,
    eval: Samples,
    device: B::Device,
    model: AdaptedLlama<B>,
    optimizer: AdamW<B::InnerBackend>,
    folder: RunFolder,
    progress: Progress,
    load_time: Duration,
) -> Run<B> {
    let train = &recipe.train;
    Run {
        model: CausalLm {
            model,
            method: trained.method().cloned(),
            seed: train.seed,
            recompute: train.recompute == Recompute::Block,
        },
        windows,
        eval: EvalBatches::new(eval, train.micro_batch_size),
        recipe,
        trained,
        base,
        optimizer,
        folder,
        progress,
        load_time,
        predicted: None,
        other_base: None,
        prompts: Vec::new(),
        device,
    }
}
