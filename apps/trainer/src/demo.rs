//! `trainer` without a command.

use std::process::ExitCode;

use anyhow::Result;

use crate::output::Output;

/// Trains the model that comes with the program.
pub fn run(_: &str, _: bool, _: &Output) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
