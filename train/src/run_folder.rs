//! The folder of a run: `recipe.toml`, `metrics.jsonl`, and what the other parts put into it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
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

/// Folders of what was trained.
const RESULTS: [&str; 3] = ["adapter", "model", "best"];
/// File name of the lock: it stays, but the system lets go of it with the process that held it.
const LOCK_FILE: &str = ".lock";

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Line {
    /// An optimizer step.
    Train {
        /// From 1.
        step: usize,
        /// Passes over the data: sequences seen ÷ those of an epoch.
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
        /// Whether the loss is over three times its running mean; left out if not.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        spike: bool,
        /// What the loss is scaled by from here on, in f16.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        loss_scale: Option<f64>,
    },
    /// An optimizer step that was left out, since its loss or gradient was no finite number.
    Skipped {
        /// From 1.
        step: usize,
        /// Passes over the data: sequences seen ÷ those of an epoch.
        epoch: f64,
        /// What was not finite: the loss, or the first such gradient.
        reason: String,
        /// Steps that were skipped so far, this one among them.
        skipped: usize,
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

impl Line {
    /// The step that it is about.
    pub fn step(&self) -> usize {
        match self {
            Self::Train { step, .. } | Self::Skipped { step, .. } | Self::Eval { step, .. } => {
                *step
            }
        }
    }
}

/// What decides whether a line of metrics stays, of any kind.
#[derive(Deserialize)]
struct Stamp {
    kind: String,
    step: usize,
}

/// The folder of a run, with its metrics open for appending. While it is open, no other process can
/// train in it.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
    _lock: File,
    /// What TensorBoard reads, if it is wanted.
    events: Option<EventFile>,
}

impl RunFolder {
    /// Starts a run folder.
    ///
    /// # Errors
    /// [`Error::OutputNotEmpty`] if there is something in it already, [`Error::InUse`] if another
    /// process has just begun there.
    pub fn create(path: &Path, recipe: &Recipe) -> Result<Self> {
        check_empty(path)?;
        std::fs::create_dir_all(path).map_err(io("create", path))?;
        let lock = lock(path)?;
        check_empty(path)?; // by now nobody else can change that
        tidy(path)?;
        write_file(&path.join(RECIPE_FILE), recipe.to_toml().as_bytes())?;
        Self::with_lock(path, lock)
    }

    /// Opens the folder of a run that goes on, and tidies up what a crash has left in it.
    ///
    /// # Errors
    /// [`Error::InUse`] if a process trains there.
    pub fn open(path: &Path) -> Result<Self> {
        let lock = lock(path)?;
        for folder in [path, &path.join("checkpoints")] {
            tidy(folder)?;
        }
        Self::with_lock(path, lock)
    }

    fn with_lock(path: &Path, lock: File) -> Result<Self> {
        Ok(Self {
            metrics: open_metrics(path)?,
            path: path.into(),
            _lock: lock,
            events: None,
        })
    }

    /// Goes back to `progress`: lines of what comes after it are dropped, since they will be
    /// written again.
    pub fn go_back(&mut self, progress: &Progress) -> Result<()> {
        let metrics = self.path.join(METRICS_FILE);
        let bytes = std::fs::read(&metrics).map_err(io("read", &metrics))?;
        let text = String::from_utf8_lossy(&bytes);
        let is_past = |line: &&str| match serde_json::from_str::<Stamp>(line) {
            Ok(Stamp { kind, step }) if kind == "eval" => {
                step < progress.step || (step == progress.step && !progress.evaluation_due)
            }
            Ok(Stamp { step, .. }) => step <= progress.step,
            Err(_) => false, // as a power cut leaves it
        };
        // the last line may lack its end
        let kept: String = text
            .lines()
            .filter(is_past)
            .flat_map(|line| [line, "\n"])
            .collect();
        if kept.as_bytes() != bytes {
            write_file(&metrics, kept.as_bytes())?;
            self.metrics = open_metrics(&self.path)?;
        }
        Ok(())
    }

    /// Writes the recipe if it is another one than is there.
    pub fn write_recipe(&self, recipe: &Recipe) -> Result<()> {
        let (path, text) = (self.path.join(RECIPE_FILE), recipe.to_toml());
        if std::fs::read_to_string(&path).is_ok_and(|there| there == text) {
            return Ok(());
        }
        Ok(write_file(&path, text.as_bytes())?)
    }

    /// Whether anything was saved here that a run from the beginning would overwrite.
    pub fn has_results(&self) -> bool {
        !results(&self.path).is_empty()
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

    /// Writes TensorBoard's events, too, if the recipe asks for it, from after `progress` on.
    pub fn with_events(mut self, recipe: &Recipe, progress: &Progress) -> Result<Self> {
        if recipe.output.tensorboard {
            // An evaluation that is still due may have been told before. Only whole steps can be
            // forgotten, so that the one before it is told again.
            let first = progress.step + usize::from(!progress.evaluation_due);
            let mut events = EventFile::create(&self.path, first)?;
            for line in self.lines()?.iter().filter(|line| line.step() >= first) {
                events.write(line)?;
            }
            self.events = Some(events);
        }
        Ok(self)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a line of metrics, all of it or nothing.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        let failed = || io("write", &self.path.join(METRICS_FILE));
        let mut text = serde_json::to_string(line).expect("a plain structure");
        text.push('\n');
        let before = self.metrics.metadata().map_err(failed())?.len();
        let written = self.metrics.write_all(text.as_bytes());
        if written.is_err() {
            let _ = self.metrics.set_len(before); // the disk may be full in the middle of a line
        }
        written.map_err(failed())?;
        self.events.iter_mut().try_for_each(|to| to.write(line))
    }

    /// Makes the metrics so far last through a power cut.
    pub fn flush(&self) -> Result<()> {
        let failed = io("write", &self.path.join(METRICS_FILE));
        self.metrics.sync_data().map_err(failed)
    }
}

fn open_metrics(run: &Path) -> Result<File> {
    let path = run.join(METRICS_FILE);
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.map_err(io("open", &path))
}

/// Keeps other processes out of a run folder, for as long as the file is open.
fn lock(run: &Path) -> Result<File> {
    let path = run.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::InUse { path: run.into() }),
        // some network file systems know no locks
        Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => Err(io("lock", &path)(e)),
    }
}

/// The folders of what was trained that are there.
pub fn results(run: &Path) -> Vec<PathBuf> {
    let all = RESULTS.iter().map(|name| run.join(name));
    all.filter(|folder| folder.exists()).collect()
}

/// An existing folder with something in it is not overwritten.
pub fn check_empty(path: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io("use", path)(e)),
    };
    // a run that was killed before it wrote anything leaves its lock, and half a file
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    match names.all(|name| name == LOCK_FILE || is_half(&name.to_string_lossy())) {
        true => Ok(()),
        false => Err(Error::OutputNotEmpty { path: path.into() }),
    }
}

/// Whether a name is that of a file that was not written to its end, see [`write_file`].
fn is_half(name: &str) -> bool {
    name.starts_with(".part-")
}

/// Removes what a crash has left half-written in a folder, and puts back what was set aside for a
/// replacement that never came, see [`replace_folder`].
fn tidy(folder: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io("read", folder))?,
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if is_half(&name) {
            std::fs::remove_file(&path).map_err(io("remove", &path))?;
            continue;
        }
        let Some((name, kind)) = name
            .strip_prefix('.')
            .and_then(|name| name.rsplit_once('.'))
        else {
            continue;
        };
        let place = folder.join(name);
        let is_ours = name.starts_with("step-") || RESULTS.contains(&name);
        match kind {
            "old" if is_ours && !place.exists() => {
                std::fs::rename(&path, &place).map_err(io("rename", &path))?;
            }
            "old" | "part" if is_ours => remove_folder(&path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Makes a folder with `write` under another name and puts it in the place of what is there, so
/// that it is complete or as it was before; nothing is left behind if it cannot be written.
pub(crate) fn replace_folder(
    folder: &Path,
    write: impl FnOnce(&Path) -> Result<PathBuf>,
) -> Result<()> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let beside = |kind: &str| folder.with_file_name(format!(".{name}.{kind}"));
    let (part, old) = (beside("part"), beside("old"));
    let replaced = remove_folder(&part)
        .and_then(|()| std::fs::create_dir_all(&part).map_err(io("create", &part)))
        .and_then(|()| write(&part))
        .and_then(|made| {
            flush_folder(&made)?;
            exchange(&made, folder, &old)
        });
    let removed = remove_folder(&part);
    replaced?;
    flush(folder.parent().unwrap_or(folder));
    removed
}

/// Puts the folder `from` in the place of `to`, which is set aside as `old` for a moment.
fn exchange(from: &Path, to: &Path, old: &Path) -> Result<()> {
    remove_folder(old)?;
    match std::fs::rename(to, old) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(io("rename", to)(e)),
        _ => {}
    }
    if let Err(e) = std::fs::rename(from, to) {
        let _ = std::fs::rename(old, to);
        return Err(io("rename", from)(e));
    }
    remove_folder(old)
}

/// Removes a folder that may be there.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", folder)(e)),
        _ => Ok(()),
    }
}

/// Flushes the entries of a folder and of all below it; the files are flushed as they are written.
fn flush_folder(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(io("read", folder))? {
        let path = entry.map_err(io("read", folder))?.path();
        if path.is_dir() {
            flush_folder(&path)?;
        }
    }
    flush(folder);
    Ok(())
}

/// Makes names in a folder last through a power cut where the system can; elsewhere they are only
/// likely to.
fn flush(folder: &Path) {
    #[cfg(unix)]
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
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
