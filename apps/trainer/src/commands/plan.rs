//! `trainer plan`

use std::process::ExitCode;

use ::train::Error;
use ::train::batch::Windows;
use ::train::data::check::Spread;
use ::train::memory::Memory;
use ::train::recipe::Recipe;
use ::train::run_folder::check_empty;
use ::train::session;
use ::train::trained::Trained;
use anyhow::Result;
use model::hub::Files;
use serde::Serialize;
use serde_json::Value;

use super::train::{
    ReadRows, all_params, all_warm_up, check_training_memory, read_rows, settings_of,
};
use super::{check_init_from, gib, open_model, trained};
use crate::cli::RecipeArgs;
use crate::device::Device;
use crate::encoder::choose_template;
use crate::forecast::{forecast, weight_problems};
use crate::labels::{Example, is_styled};
use crate::output::Output;

/// What a recipe comes to.
#[derive(Serialize)]
struct Plan {
    trainable_params: u64,
    all_params: u64,
    trainable_percent: f64,
    adapter_bytes: u64,
    predicted_peak_bytes: u64,
    breakdown: Memory,
    recompute: bool,
    compute_dtype: &'static str,
    #[serde(flatten)]
    data: Option<DataPlan>,
    problems: Vec<String>,
}

/// What its data come to.
#[derive(Serialize)]
struct DataPlan {
    rows: usize,
    dropped_rows: usize,
    trained_tokens: usize,
    trained_tokens_per_row: Option<Spread>,
    /// What an epoch is made of: rows, or with packing several rows each.
    sequences: usize,
    /// How full they are with packing.
    fill_ratio: Option<f64>,
    steps: usize,
    samples: Vec<Value>,
    #[serde(skip)]
    examples: Vec<Example>,
}

/// Counts parameters, rows and trained tokens, from the config and the data alone, and says what
/// would keep the run from starting on this device.
pub fn run(args: RecipeArgs, device: &str, output: &Output) -> Result<ExitCode> {
    let over = settings_of(&args)?;
    let mut recipe = Recipe::read_without_data(args.recipe.as_deref(), &over)?;
    let device = Device::find(device)?;
    let trained = trained(&mut recipe, output)?;
    device.settle_compute_dtype(&mut recipe, output)?;
    let mut base = open_model(&recipe.model.path, Files::Config, output)?;
    check_init_from(&recipe, &base)?;
    choose_template(&mut base, &[], recipe.data.chat_template.as_deref())?;
    let trainable_params = session::num_params(&recipe, &trained, &base.config)?;
    let all_params = all_params(&trained, &base, trainable_params);
    let mut problems = weight_problems(&recipe, &base);
    let read = match recipe.data.train.is_empty() {
        true => None,
        false => Some(read_rows(&recipe, &base, output)?),
    };
    match &read {
        None => problems.push(format!(
            "data.train is missing: no rows are counted, and the memory is that of micro batches of \
             {} × {} tokens",
            recipe.train.micro_batch_size, recipe.data.max_length
        )),
        Some(read) => problems.extend(read.problems.iter().cloned()),
    }
    let rows = read.as_ref().map(|read| &read.rows);
    let forecast = forecast(&recipe, &trained, &base, rows, &device)?;
    let hopeless = check_training_memory(&recipe, &trained, &base, trainable_params, &device);
    problems.extend(hopeless.err().map(|error| format!("{error:#}")));
    problems.extend(forecast.problem);
    let data = read.map(|read| plan_data(&recipe, &trained, read));
    if let Some(data) = &data {
        problems.extend(all_warm_up(&recipe, data.steps));
        problems.extend(match trained.clone().of_run(data.steps) {
            Ok(()) => Vec::new(),
            Err(Error::Recipe { problems }) => problems,
            Err(error) => vec![error.to_string()],
        });
    }
    if let Some(folder) = &recipe.output.dir {
        let occupied = check_empty(folder).err();
        problems.extend(occupied.map(|e| e.to_string()));
    }
    let plan = Plan {
        trainable_params,
        all_params,
        trainable_percent: 100.0 * trainable_params as f64 / all_params as f64,
        adapter_bytes: size_of::<f32>() as u64 * trained.num_saved(&base.config)?,
        predicted_peak_bytes: forecast.memory.total(),
        breakdown: forecast.memory,
        recompute: forecast.recompute,
        compute_dtype: recipe.train.compute_dtype.name(),
        data,
        problems,
    };
    output.result(&serde_json::to_value(&plan)?, &text(&plan))?;
    Ok(ExitCode::SUCCESS)
}

fn plan_data(recipe: &Recipe, trained: &Trained, read: ReadRows) -> DataPlan {
    let rows = read.rows.train;
    let windows = Windows::behind(
        trained.virtual_tokens(),
        rows.clone(),
        &recipe.data,
        &recipe.train,
        0,
    );
    DataPlan {
        rows: rows.len(),
        dropped_rows: read.dropped_rows,
        trained_tokens: rows.trained_tokens().sum(),
        trained_tokens_per_row: read.spread,
        sequences: windows.num_sequences(),
        fill_ratio: windows.fill_ratio(),
        steps: windows.num_steps(),
        samples: read.examples.iter().map(Example::json).collect(),
        examples: read.examples,
    }
}

fn text(plan: &Plan) -> String {
    let mut lines = vec![
        format!(
            "trainable parameters  {} of {} ({:.4} %)",
            plan.trainable_params, plan.all_params, plan.trainable_percent
        ),
        format!(
            "adapter size          {:.1} MB",
            plan.adapter_bytes as f64 / 1e6
        ),
    ];
    if let Some(data) = &plan.data {
        lines.push(format!(
            "rows                  {} ({} dropped)",
            data.rows, data.dropped_rows
        ));
        let spread = data.trained_tokens_per_row.map_or(String::new(), |row| {
            format!(
                " (a row: {} to {}, median {})",
                row.min, row.max, row.median
            )
        });
        lines.push(format!(
            "trained tokens        {}{spread}",
            data.trained_tokens
        ));
        if let Some(fill_ratio) = data.fill_ratio {
            let full = 100.0 * fill_ratio;
            lines.push(format!(
                "packed sequences      {} ({full:.1} % full)",
                data.sequences
            ));
        }
        lines.push(format!("optimizer steps       {}", data.steps));
    }
    let recompute = if plan.recompute {
        " (layers are computed again)"
    } else {
        ""
    };
    lines.push(format!(
        "predicted peak memory {:.2} GiB{recompute}",
        gib(plan.predicted_peak_bytes)
    ));
    let parts = plan.breakdown.parts();
    let parts = parts.iter().filter(|(_, bytes)| *bytes > 0);
    lines.extend(parts.map(|(name, bytes)| format!("  {name:<20}{:.2} GiB", gib(*bytes))));
    if let Some(data) = &plan.data {
        let styled = is_styled(&std::io::stdout());
        lines.push("the first rows, what is trained of them marked".into());
        lines.extend(data.examples.iter().map(|example| example.text(styled)));
    }
    lines.extend(
        plan.problems
            .iter()
            .map(|problem| format!("problem: {problem}")),
    );
    lines.join("\n")
}
