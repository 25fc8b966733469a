//! `trainer plan`

use std::process::ExitCode;

use ::train::batch::Windows;
use ::train::recipe::Recipe;
use ::train::run_folder::check_empty;
use ::train::session;
use anyhow::Result;
use model::folder::ModelFolder;
use model::hub::Files;
use serde::Serialize;

use super::train::{all_params, check_training_memory, read_rows, settings_of};
use super::{open_model, trained};
use crate::cli::RecipeArgs;
use crate::device::Device;
use crate::encoder::choose_template;
use crate::output::Output;

/// What a recipe comes to.
#[derive(Serialize)]
struct Plan {
    trainable_params: u64,
    all_params: u64,
    trainable_percent: f64,
    adapter_bytes: u64,
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
    /// What an epoch is made of: rows, or with packing several rows each.
    sequences: usize,
    /// How full they are with packing.
    fill_ratio: Option<f64>,
    steps: usize,
}

/// Counts parameters, rows and trained tokens, from the config and the data alone, and says what
/// would keep the run from starting on this device.
pub fn run(args: RecipeArgs, device: &str, output: &Output) -> Result<ExitCode> {
    let over = settings_of(&args)?;
    let mut recipe = Recipe::read_without_data(args.recipe.as_deref(), &over)?;
    let device = Device::find(device)?;
    let trained = trained(&mut recipe)?;
    let mut base = open_model(&recipe.model.path, Files::Config, output)?;
    choose_template(&mut base, None, recipe.data.chat_template.as_deref())?;
    let trainable_params = session::num_params(&recipe, &trained, &base.config)?;
    let all_params = all_params(&trained, &base, trainable_params);
    let mut plan = Plan {
        trainable_params,
        all_params,
        trainable_percent: 100.0 * trainable_params as f64 / all_params as f64,
        adapter_bytes: size_of::<f32>() as u64 * trainable_params,
        data: None,
        problems: Vec::new(),
    };
    match recipe.data.train.is_empty() {
        true => plan
            .problems
            .push("data.train is missing: no rows are counted".into()),
        false => plan_data(&mut plan, &recipe, &base, output)?,
    }
    let memory = check_training_memory(&recipe, &trained, &base, trainable_params, &device);
    plan.problems.extend(memory.err().map(|e| format!("{e:#}")));
    if let Some(folder) = &recipe.output.dir {
        let occupied = check_empty(folder).err();
        plan.problems.extend(occupied.map(|e| e.to_string()));
    }
    output.result(&serde_json::to_value(&plan)?, &text(&plan))?;
    Ok(ExitCode::SUCCESS)
}

fn plan_data(plan: &mut Plan, recipe: &Recipe, base: &ModelFolder, output: &Output) -> Result<()> {
    let read = read_rows(recipe, base, output)?;
    let rows = read.rows.train;
    plan.problems = read.problems;
    let windows = Windows::new(rows.clone(), &recipe.data, &recipe.train, 0);
    plan.data = Some(DataPlan {
        rows: rows.len(),
        dropped_rows: read.dropped_rows,
        trained_tokens: rows.trained_tokens().sum(),
        sequences: windows.num_sequences(),
        fill_ratio: windows.fill_ratio(),
        steps: windows.num_steps(),
    });
    Ok(())
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
        lines.push(format!("trained tokens        {}", data.trained_tokens));
        if let Some(fill_ratio) = data.fill_ratio {
            let full = 100.0 * fill_ratio;
            lines.push(format!(
                "packed sequences      {} ({full:.1} % full)",
                data.sequences
            ));
        }
        lines.push(format!("optimizer steps       {}", data.steps));
    }
    lines.extend(
        plan.problems
            .iter()
            .map(|problem| format!("problem: {problem}")),
    );
    lines.join("\n")
}
