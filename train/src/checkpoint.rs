//! Checkpoints: everything that a run needs to go on as if it had not stopped.
//!
//! `checkpoints/step-000050/` holds the trained weights, `optimizer.safetensors` (the moments by
//! parameter name) and `state.json`, all in full precision. Order of the data, schedule and random numbers follow from the
//! step and the recipe. A checkpoint is written under another name, flushed and renamed, so that it
//! is complete or absent; `SHA256SUMS` (as `sha256sum` writes it) tells one that was damaged later.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use adapters::{AdaptedBackend, AdaptedLlama};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::checkpoint::{Checkpoint, NamedTensor, write_file, write_safetensors};
use model::folder::ModelFolder;
use model::weight::param_id;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::exact;
use crate::fit::Health;
use crate::loss_scale::LossScale;
use crate::optimizer::{AdamW, Moments};
use crate::recipe::Recipe;
use crate::run_folder::{io, remove_folder, replace_folder};
use crate::trained::Trained;

const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// What stands before the names of what the method remembers, in the optimizer's file.
const METHOD_PREFIX: &str = "method.";
const STATE_FILE: &str = "state.json";
const SUMS_FILE: &str = "SHA256SUMS";

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: usize,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evaluations_without_improvement: usize,
    /// Whether the evaluation that belongs after `step` is still to be made.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Skipped steps, and what tells a spike.
    #[serde(default)]
    pub health: Health,
    /// Of a run that computes in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// What [`Rows::fingerprint`](crate::session::Rows::fingerprint) says of the run's rows.
    pub rows: String,
    /// The recipe of the steps so far, as TOML.
    #[serde(default)]
    pub recipe: String,
}

impl Progress {
    /// The updates that the optimizer has made: none for a step that was skipped.
    pub fn updates(&self) -> usize {
        self.step - self.health.skipped.min(self.step)
    }
}

/// The best evaluation of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps taken by then.
    pub step: usize,
    /// Its loss.
    #[serde(with = "exact")]
    pub loss: f64,
}

/// The checkpoints of a run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// What a checkpoint is made of.
pub struct Snapshot<'a, B: Backend> {
    /// The model with its trained weights.
    pub model: &'a AdaptedLlama<B>,
    /// Which of its weights are trained.
    pub trained: &'a Trained,
    /// The base model's folder.
    pub base: &'a ModelFolder,
    /// The recipe of the run.
    pub recipe: &'a Recipe,
    /// The optimizer.
    pub optimizer: &'a AdamW<B>,
    /// How far the run is.
    pub progress: &'a Progress,
}

impl Checkpoints {
    /// The checkpoints in a run folder, of which the newest `keep` and the best stay.
    pub fn new(run: &Path, keep: usize) -> Self {
        Self {
            folder: run.join("checkpoints"),
            keep,
        }
    }

    /// Writes a checkpoint and removes those that are too old.
    ///
    /// # Errors
    /// Files that cannot be written; what was there before stays as it was.
    pub fn save<B: AdaptedBackend>(&self, snapshot: &Snapshot<'_, B>) -> Result<PathBuf> {
        let step = snapshot.progress.step;
        let done = self.folder.join(format!("step-{step:06}"));
        replace_folder(&done, |part| {
            write_parts(snapshot, part)?;
            Ok(part.into())
        })?;
        self.remove_old(snapshot.progress)?;
        Ok(done)
    }

    /// Removes what is beyond the newest `keep` and not the best; and checkpoints of later steps: a
    /// run that went on from an earlier one has not taken those steps.
    fn remove_old(&self, progress: &Progress) -> Result<()> {
        let best = progress.best.map(|best| best.step);
        let mut kept = 0;
        for (step, path) in self.all()? {
            let is_later = step > progress.step;
            kept += usize::from(!is_later);
            if is_later || (kept > self.keep.max(1) && Some(step) != best) {
                remove_folder(&path)?;
            }
        }
        Ok(())
    }

    /// The newest checkpoint that is complete and undamaged; `skipped` hears of the others.
    pub fn newest(&self, mut skipped: impl FnMut(&Path, &Error)) -> Result<Option<PathBuf>> {
        for (_, path) in self.all()? {
            match read_progress(&path) {
                Ok(_) => return Ok(Some(path)),
                Err(error) => skipped(&path, &error),
            }
        }
        Ok(None)
    }

    /// Whether there is any, complete or not.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.all()?.is_empty())
    }

    /// The newest checkpoint of a step before `step`.
    pub fn newest_before(&self, step: usize) -> Result<Option<PathBuf>> {
        let mut all = self.all()?.into_iter();
        Ok(all.find(|(at, _)| *at < step).map(|(_, path)| path))
    }

    /// Step and folder of each, the newest first.
    fn all(&self) -> Result<Vec<(usize, PathBuf)>> {
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io("read", &self.folder)(e)),
        };
        let step = |path: &Path| {
            path.file_name()?
                .to_str()?
                .strip_prefix("step-")?
                .parse()
                .ok()
        };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut all: Vec<_> = paths
            .filter_map(|path| Some((step(&path)?, path)))
            .collect();
        all.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
        Ok(all)
    }
}

/// Everything that a checkpoint is made of, and its checksums at last.
fn write_parts<B: AdaptedBackend>(snapshot: &Snapshot<'_, B>, into: &Path) -> Result<()> {
    let recipe = snapshot.recipe;
    snapshot
        .trained
        .save(snapshot.model, snapshot.base, &recipe.model.path, into)?;
    snapshot.trained.save_exactly(snapshot.model, into)?;
    let mut moments = moments_to_tensors(snapshot)?;
    moments.extend(remembered(snapshot));
    write_safetensors(&into.join(OPTIMIZER_FILE), &moments, &[])?;
    let progress = Progress {
        recipe: recipe.to_toml(),
        ..snapshot.progress.clone()
    };
    let json = serde_json::to_vec_pretty(&progress).expect("a plain structure");
    write_file(&into.join(STATE_FILE), &json)?;
    let sums: String = checksums(into)?
        .iter()
        .map(|(name, sum)| format!("{sum}  {name}\n"))
        .collect();
    Ok(write_file(&into.join(SUMS_FILE), sums.as_bytes())?)
}

/// Compares the checksums of a checkpoint and reads how far it is.
///
/// # Errors
/// [`Error::Damaged`] names the first file that is not what was written.
pub fn read_progress(checkpoint: &Path) -> Result<Progress> {
    check_sums(checkpoint)?;
    let path = checkpoint.join(STATE_FILE);
    let bytes = std::fs::read(&path).map_err(io("read", &path))?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path, source })
}

fn check_sums(checkpoint: &Path) -> Result<()> {
    let path = checkpoint.join(SUMS_FILE);
    let text = std::fs::read_to_string(&path).map_err(io("read", &path))?;
    let mut names = Vec::new();
    for line in text.lines() {
        let Some((expected, name)) = line.split_once("  ") else {
            return Err(Error::Damaged { path });
        };
        if checksum(&checkpoint.join(name))? != expected {
            let path = checkpoint.join(name);
            return Err(Error::Damaged { path });
        }
        names.push(name);
    }
    match [OPTIMIZER_FILE, STATE_FILE]
        .iter()
        .all(|name| names.contains(name))
    {
        true => Ok(()),
        false => Err(Error::Damaged { path }),
    }
}

/// Restores the moments of a checkpoint into an optimizer.
pub fn restore_optimizer<B: Backend>(
    optimizer: &AdamW<B>,
    names: &[(String, Vec<usize>)],
    checkpoint: &Path,
    device: &B::Device,
) -> Result<()> {
    let file = Checkpoint::open_file(&checkpoint.join(OPTIMIZER_FILE))?;
    let mut state = optimizer.state();
    state.step = read_progress(checkpoint)?.updates();
    let has_moments = |(name, _): &&(String, _)| file.shape(&format!("{name}.exp_avg")).is_some();
    for (name, _) in names.iter().filter(has_moments) {
        let read = |part: &str| -> Result<Tensor<B, 1>> {
            let values = file.read(&format!("{name}.{part}"))?;
            let count = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [count]), device))
        };
        let moments = Moments {
            first: read("exp_avg")?,
            second: read("exp_avg_sq")?,
        };
        state.moments.insert(param_id(name), moments);
    }
    if let Some(after) = &mut state.after {
        let named = file
            .tensors()
            .filter_map(|(key, _)| Some((key, key.strip_prefix(METHOD_PREFIX)?)));
        let read = |(key, name): (&str, &str)| Ok((name.to_owned(), file.read(key)?));
        after.restore(named.map(read).collect::<Result<_>>()?, device);
    }
    Ok(())
}

fn moments_to_tensors<B: Backend>(snapshot: &Snapshot<'_, B>) -> Result<Vec<NamedTensor>> {
    let state = snapshot.optimizer.state();
    let mut tensors = Vec::new();
    for (name, shape) in snapshot.trained.parameters(&snapshot.model.config)? {
        let Some(moments) = state.moments.get(&param_id(&name)) else {
            continue; // no gradient has reached it yet
        };
        for (part, tensor) in [("exp_avg", &moments.first), ("exp_avg_sq", &moments.second)] {
            let data = tensor.clone().into_data().convert::<f32>();
            tensors.push(NamedTensor {
                name: format!("{name}.{part}"),
                shape: shape.clone(),
                values: data.into_vec().expect("converted to f32"),
            });
        }
    }
    Ok(tensors)
}

/// What the method remembers from step to step.
fn remembered<B: Backend>(snapshot: &Snapshot<'_, B>) -> Vec<NamedTensor> {
    let state = snapshot.optimizer.state();
    let after = state.after.as_ref();
    let all = after.map_or_else(Vec::new, |after| after.state());
    let tensor = |(name, values): (String, Vec<f32>)| NamedTensor {
        name: format!("{METHOD_PREFIX}{name}"),
        shape: vec![values.len()],
        values,
    };
    all.into_iter().map(tensor).collect()
}

fn checksums(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut sums = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).map_err(io("read", &next))? {
            let path = entry.map_err(io("read", &next))?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path
                .strip_prefix(folder)
                .expect("it lies inside")
                .components();
            let name: Vec<_> = name
                .map(|part| part.as_os_str().to_string_lossy())
                .collect();
            sums.insert(name.join("/"), checksum(&path)?);
        }
    }
    Ok(sums)
}

fn checksum(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(io("open", path))?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(io("read", path))?;
    Ok(hex(&hash.finalize()))
}

/// Bytes as `sha256sum` prints them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
