//! Where a run begins: in a new folder, or where it was stopped.

use std::path::{Path, PathBuf};

use anyhow::Result;
use train::checkpoint::Checkpoints;
use train::recipe::Recipe;
use train::run_folder::RunFolder;
use train::session;

use crate::output::Output;

/// Where a run begins.
pub enum Begin {
    /// In an empty folder.
    New,
    /// From the beginning, in the folder of a run that saved nothing.
    Again(RunFolder),
    /// From a checkpoint in its folder.
    Checkpoint(RunFolder, PathBuf),
}

/// Where a run goes on. One that was stopped before its first checkpoint begins again; one whose
/// checkpoints are all damaged does not, since its results would be overwritten.
pub fn go_on(run: &Path, recipe: &mut Recipe, output: &Output) -> Result<Begin> {
    let folder = RunFolder::open(run)?;
    recipe.output.dir = Some(run.into()); // it may have been moved
    let checkpoints = Checkpoints::new(run, recipe.train.keep_checkpoints);
    let newest = checkpoints.newest(|path, error| {
        output.note(format_args!(
            "warning: {} is skipped: {error}",
            path.display()
        ));
    })?;
    match newest {
        Some(checkpoint) => {
            session::check_recipe(recipe, &checkpoint)?;
            output.note(format_args!("going on from {}", checkpoint.display()));
            Ok(Begin::Checkpoint(folder, checkpoint))
        }
        None if checkpoints.is_empty()? && !folder.has_results() => {
            output.note(format_args!(
                "{} has no checkpoint yet: it begins again from the first step",
                run.display()
            ));
            Ok(Begin::Again(folder))
        }
        None => Err(train::Error::NoCheckpoint { path: run.into() }.into()),
    }
}
