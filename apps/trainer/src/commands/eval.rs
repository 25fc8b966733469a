//! `trainer eval`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::train::batch::{EvalBatches, MicroBatch};
use ::train::data::{Settings, Split, prepare};
use ::train::evaluate::{Evaluation, evaluate};
use ::train::recipe::Recipe;
use ::train::step::CausalLm;
use adapters::TrainBackend;
use anyhow::{Context, Result};
use model::checkpoint::write_file;
use serde_json::json;
use toml::Value;

use super::train::problems_of;
use super::{Adapted, open_data, settings};
use crate::cli::EvalArgs;
use crate::device::{Device, Job};
use crate::encoder;
use crate::failure::Advised;
use crate::output::{Output, count};
use crate::signals;

/// Measures the loss of a model on rows.
pub fn run(args: EvalArgs, device: &str, output: &Output) -> Result<ExitCode> {
    let device = Device::find(device)?;
    let recipe = read_recipe(&args)?;
    let mut adapted = Adapted::open(&args.model, &device, output)?;
    adapted.choose_template(recipe.data.chat_template.as_deref())?;
    let encoder = encoder::open(&adapted.base, &recipe.data)?;
    check_folder(args.per_token.as_deref())?;
    let paths = open_data(&args.data, Split::HeldOut, output)?;
    let settings = Settings {
        tasks: adapted.tasks()?,
        skip_untrained: true, // rows that count for nothing keep no others from being measured
        ..recipe.data.settings()
    };
    let rows = prepare(&paths, &settings, &encoder)?;
    for problem in problems_of("these rows", &rows, &encoder) {
        output.note(format_args!("warning: {problem}"));
    }
    let batches = EvalBatches::new(rows.samples.clone(), recipe.train.micro_batch_size);
    let job = EvalJob {
        adapted,
        batches,
        row_numbers: rows.samples.row_numbers().collect(),
        per_token: args.per_token,
    };
    let Some(result) = device.run(job)? else {
        return signals::interrupted(output);
    };
    let json = json!({
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "rows": result.rows,
    });
    let text = format!(
        "loss {:.5}  perplexity {:.4}  tokens {}  rows {}",
        result.loss, result.perplexity, result.tokens, result.rows
    );
    output.result(&json, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The recipe keys that an evaluation heeds.
const SETTINGS: [&str; 6] = [
    "data.format",
    "data.chat_template",
    "data.max_length",
    "data.truncate",
    "data.train_on",
    "train.micro_batch_size",
];

/// `--set` means recipe keys; those of an evaluation are a recipe's.
fn read_recipe(args: &EvalArgs) -> Result<Recipe> {
    let mut over = vec![(
        "model.path".to_owned(),
        Value::String(args.model.base.model.clone()),
    )];
    let path = |path: &PathBuf| Value::String(path.display().to_string());
    over.push((
        "data.train".to_owned(),
        Value::Array(args.data.iter().map(path).collect()),
    ));
    let set = settings(&args.set)?;
    if let Some((key, _)) = set
        .iter()
        .find(|(key, _)| !SETTINGS.contains(&key.as_str()))
    {
        return Err(Advised::usage(
            format!("--set {key} means nothing to an evaluation"),
            format!("set one of {}", SETTINGS.join(", ")),
        )
        .into());
    }
    over.extend(set);
    Ok(Recipe::read(None, &over)?)
}

/// What cannot be written later is said before anything is computed.
fn check_folder(file: Option<&Path>) -> Result<()> {
    let folder = file
        .and_then(Path::parent)
        .filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => Err(Advised::failed(
            format!("--per-token: there is no folder {}", folder.display()),
            "create the folder, or name another file",
        )
        .into()),
        _ => Ok(()),
    }
}

struct EvalJob {
    adapted: Adapted,
    batches: EvalBatches,
    /// Where each row of the batches stood in the data.
    row_numbers: Vec<usize>,
    per_token: Option<PathBuf>,
}

impl Job for EvalJob {
    /// `None` when Ctrl-C came.
    type Output = Option<Evaluation>;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Self::Output> {
        let model = self.adapted.load::<B::InnerBackend>(&device)?;
        let lm = CausalLm::<B::InnerBackend> {
            model,
            method: None,
            seed: 0,
            recompute: false,
        };
        let interrupter = signals::ask_first("stopping after this batch (again: at once)");
        let rows = self.row_numbers.len();
        let output = self.adapted.output;
        output.note(format_args!("evaluating {}", count(rows, "row")));
        let mut lines = Vec::new();
        let mut row_numbers = self.row_numbers.iter();
        let wanted = self.per_token.is_some();
        let gather = |batch: &MicroBatch, nll: &[f32]| {
            for (nll, row) in batch.by_row(nll).zip(&mut row_numbers).filter(|_| wanted) {
                let logprobs: Vec<f32> = nll.iter().map(|nll| -nll).collect();
                writeln!(lines, "{}", json!({"row": row, "logprobs": logprobs}))?;
            }
            Ok::<_, std::io::Error>(())
        };
        let interrupted = || interrupter.should_stop();
        let result = evaluate(&lm, &self.batches, &interrupted, gather)
            .context("cannot gather the log probabilities")?;
        let Some(result) = result else {
            return Ok(None);
        };
        if !result.loss.is_finite() {
            return Err(Advised::failed(
                "the loss of these rows is not a finite number",
                "check the weights of the model and of the adapter",
            )
            .into());
        }
        if let Some(path) = &self.per_token {
            write_file(path, &lines)?;
        }
        Ok(Some(result))
    }
}
