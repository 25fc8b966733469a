//! `trainer plan`

use std::process::ExitCode;

use ::train::batch::Windows;
use ::train::session;
use anyhow::Result;
use model::hub::Files;
use serde_json::json;

use super::open_model;
use super::train::{all_params, read_recipe, read_rows};
use crate::cli::RecipeArgs;
use crate::output::Output;

/// Counts parameters, rows and trained tokens, from the config and the data alone.
pub fn run(args: RecipeArgs, output: &Output) -> Result<ExitCode> {
    let mut recipe = read_recipe(&args)?;
    let trained = session::trained(&mut recipe)?;
    let base = open_model(&recipe.model.path, Files::Config, output)?;
    let trainable = session::num_params(&recipe, &trained, &base.config)?;
    let all = all_params(&trained, &base, trainable);
    let percent = 100.0 * trainable as f64 / all as f64;
    let rows = read_rows(&recipe, &base, output)?;
    let trained_tokens: usize = rows.train.iter().map(|row| row.trained_tokens()).sum();
    let count = rows.train.len();
    let windows = Windows::new(rows.train, &recipe.data, &recipe.train, 0);
    let json = json!({
        "trainable_params": trainable,
        "all_params": all,
        "trainable_percent": percent,
        "adapter_bytes": 4 * trainable,
        "rows": count,
        "trained_tokens": trained_tokens,
        "steps": windows.num_steps(),
    });
    let text = format!(
        "trainable parameters  {trainable} of {all} ({percent:.4} %)\n\
         adapter size          {:.1} MiB\n\
         rows                  {count}\n\
         trained tokens        {trained_tokens}\n\
         optimizer steps       {}",
        4.0 * trainable as f64 / (1 << 20) as f64,
        windows.num_steps(),
    );
    output.result(&json, &text)?;
    Ok(ExitCode::SUCCESS)
}
