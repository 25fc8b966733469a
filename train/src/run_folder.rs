//! The folder of a run: `recipe.toml`, `metrics.jsonl`, and what the other parts put into it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use model::checkpoint::write_file;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Progress;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use crate::tensorboard::EventFile;

/// File name of the resolved recipe.
pub const RECIPE_FILE: &str = "recipe.toml";
/// File name of the metrics.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Line {
    /// An optimizer step.
    Train {
        /// From 1.
        step: usize,
        /// Rows seen ÷ rows in the data.
        epoch: f64,
        /// Mean cross entropy of the trained tokens.
        loss: f64,
        /// Learning rate of this step.
        lr: f64,
        /// Norm of all gradients, before clipping.
        grad_norm: f64,
        /// Trained tokens of this step.
        tokens: usize,
        /// All tokens, without padding, ÷ `seconds`.
        tokens_per_second: f64,
        /// Most memory that the process has held so far.
        peak_memory_bytes: u64,
        /// Wall time of this step.
        seconds: f64,
    },
    /// An evaluation.
    Eval {
        /// Optimizer steps taken.
        step: usize,
        /// Mean cross entropy of the trained tokens.
        loss: f64,
        /// `exp(loss)`.
        perplexity: f64,
        /// Trained tokens.
        tokens: usize,
    },
}

/// The folder of a run, with its metrics open for appending.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
    /// What TensorBoard reads, if it is wanted.
    events: Option<EventFile>,
}

impl RunFolder {
    /// Starts a run folder.
    ///
    /// # Errors
    /// [`Error::OutputNotEmpty`] if there is something in it already.
    pub fn create(path: &Path, recipe: &Recipe) -> Result<Self> {
        check_empty(path)?;
        std::fs::create_dir_all(path).map_err(io("create", path))?;
        write_file(&path.join(RECIPE_FILE), recipe.to_toml().as_bytes())?;
        Self::open(path)
    }

    /// Continues a run folder: lines of what comes after `progress` are dropped, since they will
    /// be written again.
    pub fn resume(path: &Path, progress: &Progress) -> Result<Self> {
        let metrics = path.join(METRICS_FILE);
        let text = std::fs::read_to_string(&metrics).map_err(io("read", &metrics))?;
        let is_past = |line: &&str| match serde_json::from_str(line) {
            Ok(Line::Train { step, .. }) => step <= progress.step,
            Ok(Line::Eval { step, .. }) => {
                step < progress.step || (step == progress.step && !progress.evaluation_due)
            }
            Err(_) => false, // as a power cut leaves it
        };
        // the last line may lack its end
        let kept: String = text
            .lines()
            .filter(is_past)
            .flat_map(|line| [line, "\n"])
            .collect();
        write_file(&metrics, kept.as_bytes())?;
        Self::open(path)
    }

    /// The metrics so far.
    pub fn lines(&self) -> Result<Vec<Line>> {
        let path = self.path.join(METRICS_FILE);
        let text = std::fs::read_to_string(&path).map_err(io("read", &path))?;
        let line = |line: &str| {
            serde_json::from_str(line).map_err(|source| Error::Json {
                path: path.clone(),
                source,
            })
        };
        text.lines().map(line).collect()
    }

    fn open(path: &Path) -> Result<Self> {
        let metrics = path.join(METRICS_FILE);
        let file = OpenOptions::new().create(true).append(true).open(&metrics);
        Ok(Self {
            path: path.into(),
            metrics: file.map_err(io("open", &metrics))?,
            events: None,
        })
    }

    /// Writes TensorBoard's events, too, if the recipe asks for it; `first_step` is to be taken next.
    pub fn with_events(mut self, recipe: &Recipe, first_step: usize) -> Result<Self> {
        if recipe.output.tensorboard {
            self.events = Some(EventFile::create(&self.path, first_step)?);
        }
        Ok(self)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a line of metrics.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_string(line).expect("a plain structure");
        text.push('\n');
        let failed = io("write", &self.path.join(METRICS_FILE));
        self.metrics.write_all(text.as_bytes()).map_err(failed)?;
        self.events.iter_mut().try_for_each(|to| to.write(line))
    }
}

/// An existing folder with something in it is not overwritten.
pub fn check_empty(path: &Path) -> Result<()> {
    match std::fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::OutputNotEmpty { path: path.into() }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io("use", path)(e)),
    }
}

/// Puts a complete folder in the place of another.
pub(crate) fn replace_folder(from: &Path, to: &Path) -> Result<()> {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let aside = to.with_file_name(format!(".{name}.old"));
    remove_folder(&aside)?;
    match std::fs::rename(to, &aside) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("rename", to)(e)),
        _ => {}
    }
    std::fs::rename(from, to).map_err(io("rename", from))?;
    remove_folder(&aside)
}

/// Removes a folder that may be there.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("remove", folder)(e)),
        _ => Ok(()),
    }
}

/// What an [`Error::Io`] needs to know beside the error.
pub(crate) fn io(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io {
        action,
        path,
        source,
    }
}

/// Most memory that this process has held so far, in bytes; 0 where the system does not say.
pub fn peak_memory_bytes() -> u64 {
    #[cfg(unix)]
    {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: `getrusage` fills in the structure that it is given.
        let filled = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
        if filled == 0 {
            // SAFETY: filled in above.
            let peak = unsafe { usage.assume_init() }.ru_maxrss as u64;
            let unit = if cfg!(target_vendor = "apple") {
                1
            } else {
                1024
            };
            return peak * unit;
        }
    }
    0
}
