//! The rows of a run, and what there is to say about them.

use std::path::PathBuf;

use anyhow::Result;
use model::folder::ModelFolder;
use train::data::check::Spread;
use train::data::{Encoder, Prepared, Samples, Settings, Split, prepare, split};
use train::recipe::Recipe;
use train::session::Rows;

use super::super::open_data;
use crate::encoder;
use crate::labels::{self, Example};
use crate::output::{Output, count};

/// The rows of a recipe, and what there is to say about them.
pub struct ReadRows {
    /// The rows.
    pub rows: Rows,
    /// Training rows that are too long.
    pub dropped_rows: usize,
    /// What a user should know before training.
    pub problems: Vec<String>,
    /// Trained tokens of the training rows.
    pub spread: Option<Spread>,
    /// The first training rows.
    pub examples: Vec<Example>,
}

impl ReadRows {
    /// Shows what is trained of the first row; of more, if one wants to know more.
    pub fn show_examples(&self, output: &Output) {
        let styled = labels::is_styled(&std::io::stderr());
        for (index, example) in self.examples.iter().enumerate() {
            let text = example.text(styled);
            match index {
                0 => output.note(text),
                _ => output.detail(text),
            }
        }
    }
}

/// Reads and encodes the rows of a recipe.
pub fn read_rows(recipe: &Recipe, base: &ModelFolder, output: &Output) -> Result<ReadRows> {
    let data = &recipe.data;
    let encoder = encoder::open(base, data)?;
    let mut problems = Vec::new();
    let mut read = |what: &str, paths: &[PathBuf], part: Split| -> Result<Prepared> {
        let paths = open_data(paths, part, output)?;
        let settings = Settings {
            skip_untrained: part == Split::HeldOut, // as `trainer eval`
            tasks: recipe.adapter.tasks(),
            ..data.settings()
        };
        let prepared = prepare(&paths, &settings, &encoder)?;
        output.note(counts(what, &prepared));
        problems.extend(labels::warnings(what, &prepared, &encoder, base)?);
        Ok(prepared)
    };
    let prepared = read("training data", &data.train.list(), Split::Train)?;
    let spread = prepared.labels.spread();
    let examples = labels::examples(&prepared, &encoder)?;
    let (dropped_rows, train_labels) = (prepared.dropped_rows, prepared.labels);
    let (train, eval, eval_labels) = match (data.eval.is_empty(), data.eval_fraction) {
        (false, _) => {
            let eval = read("evaluation data", &data.eval.list(), Split::HeldOut)?;
            (prepared.samples, eval.samples, Some(eval.labels))
        }
        (true, fraction) if fraction > 0.0 => {
            let (train, eval) = split(&prepared.samples, fraction, recipe.train.seed)?;
            (train, eval, None)
        }
        (true, _) => (prepared.samples, Samples::default(), None),
    };
    let eval_labels = eval_labels.as_ref().unwrap_or(&train_labels);
    problems.extend(labels::shared(&train_labels, &train, eval_labels, &eval));
    for problem in &problems {
        output.note(format_args!("warning: {problem}"));
    }
    Ok(ReadRows {
        rows: Rows { train, eval },
        dropped_rows,
        problems,
        spread,
        examples,
    })
}

/// How many rows and tokens there are.
fn counts(what: &str, prepared: &Prepared) -> String {
    let (rows, trained) = (prepared.samples.len(), prepared.trained_tokens);
    let all = prepared.total_tokens;
    let spread = prepared.labels.spread().map_or(String::new(), |spread| {
        let Spread { min, median, max } = spread;
        format!(" (a row: {min} to {max}, median {median})")
    });
    let rows = count(rows, "row");
    format!("{what}: {rows}, {trained} trained of {all} tokens{spread}")
}

/// What makes a run worse without stopping it.
pub fn problems_of(what: &str, prepared: &Prepared, encoder: &Encoder) -> Vec<String> {
    let mut problems = Vec::new();
    if prepared.dropped_rows > 0 {
        let (dropped, rows) = (prepared.dropped_rows, prepared.rows);
        problems.push(format!(
            "{what}: {dropped} of {rows} rows are longer than data.max_length ({})",
            prepared.labels.dropped
        ));
    }
    let untrained = &prepared.labels.untrained;
    if untrained.count > 0 {
        let (count, rows) = (untrained.count, prepared.rows);
        problems.push(format!(
            "{what}: {count} of {rows} rows have no trained token and are left out ({untrained})"
        ));
    }
    if prepared.rows_without_end_marker > 0 {
        problems.push(format!(
            "{what}: {} rows do not end in a trained end marker ({}): the model will not learn to \
             stop from them ({})",
            prepared.rows_without_end_marker,
            encoder.end_markers.join(" or "),
            prepared.labels.endless
        ));
    }
    problems
}
