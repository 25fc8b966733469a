//! `run.json`: what neither the recipe nor the metrics say of a run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use model::checkpoint::write_file;
use serde::{Deserialize, Serialize};

use crate::data::Samples;
use crate::error::{Error, Result};
use crate::run_folder::io;

/// File name of the facts.
pub const FACTS_FILE: &str = "run.json";

/// What is known of a run beside its recipe and its metrics; anything may be missing.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Programs and formats with their versions.
    pub versions: BTreeMap<String, String>,
    /// Where it computes.
    pub device: DeviceFacts,
    /// The base model in words: its kind and its sizes.
    pub architecture: String,
    /// Trained weights.
    pub trainable_params: u64,
    /// All weights, as PEFT counts them.
    pub all_params: u64,
    /// Name ends of the adapted layers, and how many layers have each.
    pub targets: BTreeMap<String, usize>,
    /// `train` and `eval`.
    pub data: BTreeMap<String, DataFacts>,
    /// Optimizer steps of the whole run.
    pub steps: usize,
    /// Whether decoder layers are computed again in the backward pass.
    pub recompute: bool,
    /// Bytes that were predicted, by part.
    pub predicted_memory: BTreeMap<String, u64>,
    /// The most that was predicted to be held at a time; not all parts are held together.
    pub predicted_peak_bytes: u64,
    /// What a user should know.
    pub warnings: Vec<String>,
    /// Each time that the run was started or resumed.
    pub sessions: Vec<Session>,
    /// What the model answered.
    pub samples: Vec<SampleFacts>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceFacts {
    /// What `--device` takes.
    pub id: String,
    /// What its maker calls it.
    pub name: String,
    /// The backend that computes on it.
    pub backend: String,
    /// Its memory, if known.
    pub memory_bytes: Option<u64>,
}

/// What some files came to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DataFacts {
    /// What the recipe names; none for rows that were held back from the training files.
    pub files: Vec<PathBuf>,
    /// Rows in use.
    pub rows: usize,
    /// Rows that were too long.
    pub dropped_rows: usize,
    /// Tokens that count in the loss.
    pub trained_tokens: u64,
    /// All tokens.
    pub total_tokens: u64,
}

impl DataFacts {
    /// Counts samples.
    pub fn count(files: Vec<PathBuf>, samples: &Samples, dropped_rows: usize) -> Self {
        let trained = samples.trained_tokens().map(|tokens| tokens as u64);
        let total = samples.lengths().map(|tokens| tokens as u64);
        Self {
            files,
            rows: samples.len(),
            dropped_rows,
            trained_tokens: trained.sum(),
            total_tokens: total.sum(),
        }
    }
}

/// From a start to an end of the program.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Session {
    /// When it began, local time.
    pub started: String,
    /// Optimizer steps that had been taken before.
    pub from_step: usize,
    /// Reading the weights.
    pub load_seconds: f64,
    /// Everything before the first step: rows, weights, samples.
    pub setup_seconds: f64,
    /// Until it ended.
    pub seconds: f64,
    /// Most memory that the process has held; 0 if it was killed.
    pub peak_memory_bytes: u64,
    /// How it ended.
    pub end: End,
    /// Why it failed.
    pub failure: Option<String>,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It has not, or the program was killed.
    #[default]
    Running,
    /// All steps are taken.
    Finished,
    /// It was asked to stop.
    Interrupted,
    /// The evaluation loss did not fall any more.
    StoppedEarly,
    /// Something went wrong.
    Failed,
}

/// A prompt and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SampleFacts {
    /// The text that the model continues, as in training.
    pub prompt: String,
    /// What the row goes on with.
    pub expected: String,
    /// The continuation before training.
    pub before: Option<TextFacts>,
    /// The continuation after training.
    pub after: Option<TextFacts>,
}

/// A generated text.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TextFacts {
    /// The text.
    pub text: String,
    /// Whether there was no time for more of it.
    pub cut: bool,
}

impl Facts {
    /// Reads the facts of a run; `None` where there is no such file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Json`].
    pub fn read(run: &Path) -> Result<Option<Self>> {
        let path = run.join(FACTS_FILE);
        match std::fs::read(&path) {
            Ok(bytes) => {
                let facts = serde_json::from_slice(&bytes);
                facts
                    .map(Some)
                    .map_err(|source| Error::Json { path, source })
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io("read", &path)(e)),
        }
    }

    /// Writes the facts into a run folder.
    ///
    /// # Errors
    /// The file is the old or the new one.
    pub fn write(&self, run: &Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self).expect("a plain structure");
        Ok(write_file(&run.join(FACTS_FILE), &json)?)
    }

    /// The last session.
    pub fn session(&self) -> Option<&Session> {
        self.sessions.last()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_other_versions_are_read_as_far_as_they_go() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(Facts::read(run.path()).unwrap(), None);
        let text = r#"{"steps": 7, "later": {}, "sessions": [{"end": "stopped_early", "x": 1}]}"#;
        std::fs::write(run.path().join(FACTS_FILE), text).unwrap();
        let facts = Facts::read(run.path()).unwrap().unwrap();
        assert_eq!((facts.steps, facts.sessions[0].end), (7, End::StoppedEarly));
        facts.write(run.path()).unwrap();
        assert_eq!(Facts::read(run.path()).unwrap().unwrap(), facts);
        std::fs::write(run.path().join(FACTS_FILE), "{").unwrap();
        assert!(matches!(Facts::read(run.path()), Err(Error::Json { .. })));
    }
}
