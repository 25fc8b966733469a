//! `trainer report`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::train::report::{REPORT_FILE, RunRecord, tell_apart, write};
use anyhow::Result;
use serde_json::{Value, json};

use crate::cli::ReportArgs;
use crate::output::Output;

/// Writes the page of one run, or of several together.
pub fn run(args: ReportArgs, output: &Output) -> Result<ExitCode> {
    let read = |path: &PathBuf| RunRecord::read(path);
    let mut runs: Vec<_> = args.runs.iter().map(read).collect::<Result<_, _>>()?;
    tell_apart(&mut runs);
    for run in &runs {
        for note in &run.notes {
            output.note(format_args!("warning: {}: {note}", run.path.display()));
        }
    }
    let page = match args.out {
        Some(out) if out.is_dir() => out.join(REPORT_FILE),
        Some(out) => out,
        None => args.runs[0].join(REPORT_FILE),
    };
    let picture = write(&runs, &page)?;
    let facts: Vec<_> = runs.iter().map(facts).collect();
    let json = json!({ "report": page, "loss": picture, "runs": facts });
    output.result(&json, &text(&page, &runs))?;
    Ok(ExitCode::SUCCESS)
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
