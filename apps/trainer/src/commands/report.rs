//! `trainer report`

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use ::train::report::{REPORT_FILE, RunRecord, tell_apart, write};
use ::train::run_folder::METRICS_FILE;
use anyhow::Result;
use serde_json::{Value, json};

use crate::cli::ReportArgs;
use crate::failure::Advised;
use crate::output::Output;

/// Writes the page of one run, or of several together.
pub fn run(args: ReportArgs, output: &Output) -> Result<ExitCode> {
    let folders = each_once(args.runs, output);
    let read = |path: &PathBuf| RunRecord::read(path);
    let mut runs: Vec<_> = folders.iter().map(read).collect::<Result<_, _>>()?;
    tell_apart(&mut runs);
    for run in &runs {
        for note in &run.notes {
            output.note(format_args!("warning: {}: {note}", run.path.display()));
        }
    }
    let page = match args.out {
        Some(out) if out.is_dir() => out.join(REPORT_FILE),
        Some(out) => out,
        None => page_of(&folders)?,
    };
    let picture = write(&runs, &page)?;
    let facts: Vec<_> = runs.iter().map(facts).collect();
    let json = json!({ "report": page, "loss": picture, "runs": facts });
    output.result(&json, &text(&page, &runs))?;
    Ok(ExitCode::SUCCESS)
}

/// The folders without those that are given again, perhaps by another path.
fn each_once(mut folders: Vec<PathBuf>, output: &Output) -> Vec<PathBuf> {
    let mut known = HashSet::new();
    folders.retain(|folder| {
        let is_new = known.insert(folder.canonicalize().unwrap_or_else(|_| folder.clone()));
        if !is_new {
            output.note(format_args!(
                "{} is given twice, and drawn once",
                folder.display()
            ));
        }
        is_new
    });
    folders
}

/// Where the page goes: of one run into its folder, of several beside that of the first, so that each
/// keeps its own.
fn page_of(runs: &[PathBuf]) -> Result<PathBuf> {
    let [first, _, ..] = runs else {
        return Ok(runs[0].join(REPORT_FILE));
    };
    let is_name = matches!(first.components().next_back(), Some(Component::Normal(_)));
    let full = match is_name {
        true => first.clone(),
        // `.` and `..` have parents that no path says
        false => first.canonicalize().unwrap_or_else(|_| first.clone()),
    };
    let folder = full.parent().unwrap_or(&full);
    if folder.join(METRICS_FILE).exists() {
        let shown = folder.display();
        return Err(Advised::usage(
            format!("the page of these runs would take the place of that of the run {shown}"),
            "say where it goes: --out both.html",
        )
        .into());
    }
    Ok(folder.join(REPORT_FILE))
}

fn facts(run: &RunRecord) -> Value {
    let end = run.facts.session().map(|session| session.end);
    json!({
        "run": run.path,
        "state": end,
        "steps": run.last_step(),
        "loss": run.steps.last().and_then(|entry| entry.loss),
        "best": run.best().map(|best| json!({ "step": best.step, "loss": best.loss })),
    })
}

fn text(page: &Path, runs: &[RunRecord]) -> String {
    match runs {
        [_] => page.display().to_string(),
        runs => format!("{}\n{} runs drawn together", page.display(), runs.len()),
    }
}
