//! A run folder as it was left, perhaps in the middle of a line.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::facts::{FACTS_FILE, Facts};
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::run_folder::{METRICS_FILE, RECIPE_FILE, io};

/// A run as its folder tells it.
#[derive(Debug, Clone, Default)]
pub struct RunRecord {
    /// The folder.
    pub path: PathBuf,
    /// What the run is called: its folder's name, or its path where that is not enough.
    pub name: String,
    /// The recipe; empty if it cannot be read.
    pub recipe: Table,
    /// The facts; empty if they cannot be read.
    pub facts: Facts,
    /// The steps, in order.
    pub steps: Vec<Entry>,
    /// The evaluations, in order.
    pub evals: Vec<Entry>,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// A line of `metrics.jsonl`; a number may be missing, or have been none (NaN).
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Entry {
    kind: String,
    /// Optimizer steps taken.
    pub step: usize,
    /// Passes over the data: sequences seen ÷ those of an epoch.
    pub epoch: Option<f64>,
    /// Mean cross entropy.
    pub loss: Option<f64>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// Norm of all gradients.
    pub grad_norm: Option<f64>,
    /// Trained tokens.
    pub tokens: Option<f64>,
    /// All tokens a second.
    pub tokens_per_second: Option<f64>,
    /// Most memory held so far.
    pub peak_memory_bytes: Option<f64>,
    /// Wall time.
    pub seconds: Option<f64>,
    /// Whether the step was skipped; in the metrics, how many were so far.
    #[serde(default, deserialize_with = "is_set")]
    pub skipped: bool,
    /// Whether the loss is far above the ones before.
    #[serde(default)]
    pub spike: bool,
}

/// Whether a mark or a count is there.
fn is_set<'de, D: serde::Deserializer<'de>>(mark: D) -> std::result::Result<bool, D::Error> {
    let mark = serde_json::Value::deserialize(mark)?;
    Ok(mark.as_bool().unwrap_or(mark.as_u64() > Some(0)))
}

impl RunRecord {
    /// Reads a run folder. What is missing beside the metrics leaves a gap in the report.
    ///
    /// # Errors
    /// [`Error::NotARun`], [`Error::NoMetrics`] and [`Error::BadMetrics`].
    pub fn read(path: &Path) -> Result<Self> {
        let metrics = path.join(METRICS_FILE);
        let bytes = match std::fs::read(&metrics) {
            Ok(bytes) => bytes,
            Err(_) if !metrics.exists() => {
                let path = path.to_path_buf();
                return Err(match path.join(RECIPE_FILE).exists() {
                    true => Error::NoMetrics { path },
                    false => Error::NotARun { path },
                });
            }
            Err(e) => return Err(io("read", &metrics)(e)),
        };
        let mut run = Self {
            path: path.into(),
            name: short_name(path),
            ..Self::default()
        };
        run.read_metrics(&metrics, &String::from_utf8_lossy(&bytes))?;
        run.read_recipe();
        match Facts::read(path) {
            Ok(Some(facts)) => run.facts = facts,
            Ok(None) => run.notes.push(format!("there is no {FACTS_FILE}")),
            Err(error) => run.notes.push(with_cause(&error)),
        }
        Ok(run)
    }

    fn read_metrics(&mut self, path: &Path, text: &str) -> Result<()> {
        let mut bad = Vec::new();
        let count = text.lines().count();
        for (index, line) in text.lines().enumerate().filter(|(_, l)| !l.is_empty()) {
            match serde_json::from_str::<Entry>(line) {
                Ok(entry) if entry.kind == "train" || entry.kind == "skipped" => {
                    push(&mut self.steps, entry);
                }
                Ok(entry) if entry.kind == "eval" => push(&mut self.evals, entry),
                Ok(_) => {}
                // as a kill leaves it, or a run that is writing it now
                Err(_) if index + 1 == count && !text.ends_with('\n') => {
                    self.notes.push(format!(
                        "the last line of {METRICS_FILE} is incomplete and left out"
                    ));
                }
                Err(cause) => bad.push((index + 1, cause)),
            }
        }
        if self.steps.is_empty() && self.evals.is_empty() {
            return Err(match bad.into_iter().next() {
                Some((line, cause)) => Error::BadMetrics {
                    path: path.into(),
                    line,
                    cause,
                },
                None => Error::NoMetrics {
                    path: self.path.clone(),
                },
            });
        }
        if let Some((line, _)) = bad.first() {
            let (count, lines) = (bad.len(), if bad.len() == 1 { "line" } else { "lines" });
            self.notes.push(format!(
                "{count} {lines} of {METRICS_FILE} cannot be read and are left out, the first is \
                 line {line}"
            ));
        }
        Ok(())
    }

    fn read_recipe(&mut self) {
        let path = self.path.join(RECIPE_FILE);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        match text.parse::<Table>() {
            Ok(table) if !table.is_empty() => self.recipe = table,
            _ => self
                .notes
                .push(format!("{RECIPE_FILE} is missing or cannot be read")),
        }
    }

    /// The last step that was taken.
    pub fn last_step(&self) -> usize {
        let last = |all: &[Entry]| all.last().map_or(0, |entry| entry.step);
        last(&self.steps).max(last(&self.evals))
    }

    /// The most memory that was measured, of the process: in its steps, and to the end of each
    /// session, when it has evaluated and saved.
    pub fn measured_bytes(&self) -> Option<u64> {
        let steps = self.steps.iter().filter_map(|step| step.peak_memory_bytes);
        let sessions = self.facts.sessions.iter();
        let all = steps.map(|bytes| bytes as u64);
        let all = all.chain(sessions.map(|session| session.peak_memory_bytes));
        all.max().filter(|bytes| *bytes > 0)
    }

    /// The evaluation with the lowest loss.
    pub fn best(&self) -> Option<&Entry> {
        let known = self.evals.iter().filter(|e| e.loss.is_some());
        known.min_by(|a, b| {
            a.loss
                .unwrap_or(f64::MAX)
                .total_cmp(&b.loss.unwrap_or(f64::MAX))
        })
    }

    /// Keys of the recipe as `section.key`, in order, with their values as TOML; and whether each
    /// has another value than if nobody had set it.
    pub(super) fn settings(&self) -> Vec<(String, String, bool)> {
        let defaults = Table::try_from(Recipe::default()).unwrap_or_default();
        let mut all = Vec::new();
        for (section, values) in &self.recipe {
            let Value::Table(values) = values else {
                continue;
            };
            for (key, value) in values {
                let default = defaults.get(section).and_then(|table| table.get(key));
                let is_own = default != Some(value);
                all.push((format!("{section}.{key}"), value.to_string(), is_own));
            }
        }
        all
    }
}

/// A line of a step that was taken again takes the place of what came after that step before.
fn push(all: &mut Vec<Entry>, entry: Entry) {
    while all.last().is_some_and(|last| last.step >= entry.step) {
        all.pop();
    }
    all.push(entry);
}

fn short_name(path: &Path) -> String {
    let full = std::path::absolute(path).unwrap_or(path.into());
    let name = full.file_name().unwrap_or(full.as_os_str());
    name.to_string_lossy().into_owned()
}

fn with_cause(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Calls runs of the same name by their paths.
pub fn tell_apart(runs: &mut [RunRecord]) {
    let names: Vec<_> = runs.iter().map(|run| run.name.clone()).collect();
    for run in runs.iter_mut() {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name = run.path.display().to_string();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(metrics: &str) -> Result<RunRecord> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(METRICS_FILE), metrics).unwrap();
        RunRecord::read(dir.path())
    }

    fn line(step: usize) -> String {
        format!("{{\"kind\":\"train\",\"step\":{step},\"loss\":{step}.5}}\n")
    }

    #[test]
    fn a_torn_last_line_is_left_out() {
        let torn = line(1) + &line(2) + "{\"kind\":\"train\",\"st";
        let run = read(&torn).unwrap();
        assert_eq!((run.steps.len(), run.last_step()), (2, 2));
        assert!(run.notes[0].contains("incomplete"), "{:?}", run.notes);
        // it is complete, without its end
        let run = read(line(1).trim_end()).unwrap();
        assert_eq!(run.steps.len(), 1);
    }

    #[test]
    fn lines_that_are_none_are_counted_and_the_first_is_named() {
        let run = read(&(line(1) + "what?\n" + &line(2) + "\n\n[]\n")).unwrap();
        assert_eq!(run.steps.len(), 2);
        let note = &run.notes[0];
        assert!(
            note.starts_with("2 lines") && note.ends_with("line 2"),
            "{note}"
        );
        let error = read("what?\n").unwrap_err();
        assert!(error.to_string().contains("line 1 of"), "{error}");
        for empty in ["", "\n", "{\"kind\":\"else\",\"step\":1}\n"] {
            assert!(matches!(read(empty), Err(Error::NoMetrics { .. })));
        }
    }

    #[test]
    fn numbers_that_are_none_are_gaps() {
        let run = read("{\"kind\":\"skipped\",\"step\":1,\"skipped\":1}\n").unwrap();
        assert_eq!((run.steps[0].loss, run.steps[0].skipped), (None, true));
    }

    #[test]
    fn a_step_that_is_taken_again_replaces_what_followed() {
        let text = line(1) + &line(2) + &line(3) + &line(2);
        let steps: Vec<_> = read(&text).unwrap().steps.iter().map(|e| e.step).collect();
        assert_eq!(steps, [1, 2]);
    }

    #[test]
    fn runs_of_one_name_are_told_apart() {
        let run = |path: &str| RunRecord {
            path: path.into(),
            name: short_name(Path::new(path)),
            ..RunRecord::default()
        };
        let mut runs = [run("a/run"), run("b/run"), run("c")];
        tell_apart(&mut runs);
        assert_eq!(runs.map(|run| run.name), ["a/run", "b/run", "c"]);
    }
}
