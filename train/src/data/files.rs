//! Which files the paths of a recipe stand for.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use model::hub;

use super::unreadable;
use crate::error::{Error, Result};

/// What a data file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// JSON Lines, or unless the extension is `.jsonl` an array.
    Json,
    /// A table of text, with this byte between its cells.
    Table(u8),
    Parquet,
}

/// The extensions of data files; those of a folder's other files are not read.
const KINDS: [(&str, Kind); 6] = [
    ("jsonl", Kind::Json),
    ("ndjson", Kind::Json),
    ("json", Kind::Json),
    ("csv", Kind::Table(b',')),
    ("tsv", Kind::Table(b'\t')),
    ("parquet", Kind::Parquet),
];

/// Kinds of files that are surely not read.
const OTHER_KINDS: [&str; 8] = ["arrow", "bz2", "gz", "pdf", "xls", "xlsx", "zip", "zst"];

impl Kind {
    /// The kind of a file, by its extension. A file with none that is known is taken for JSON.
    pub(super) fn of(path: &Path) -> Result<Self> {
        if has_extension(path, &OTHER_KINDS) {
            let path = path.to_path_buf();
            return Err(Error::DataFileKind { path });
        }
        Ok(Self::known(path).unwrap_or(Self::Json))
    }

    fn known(path: &Path) -> Option<Self> {
        let kind = KINDS.iter().find(|(name, _)| has_extension(path, &[name]));
        kind.map(|(_, kind)| *kind)
    }
}

pub(super) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|found| {
        extensions
            .iter()
            .any(|known| found.eq_ignore_ascii_case(known))
    })
}

/// The files that a path stands for: the file itself, the data files of a folder, or whatever
/// matches a pattern such as `data/*.jsonl`; sorted by name.
pub(super) fn find_files(path: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => match pattern(path) {
            Some(pattern) => matching(path, pattern),
            None => Err(Error::NoSuchData { path: path.into() }),
        },
        Err(e) => Err(unreadable(path, e)),
        Ok(metadata) if metadata.is_dir() => in_folder(path),
        Ok(_) => Ok(vec![path.into()]),
    }
}

/// Which files of a folder are meant, where their names tell splits apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Those to train on.
    Train,
    /// Those that are held out: of them those to validate with rather than the test split.
    HeldOut,
}

/// The data files of a folder and of the folders in it, sorted by name: those of a split, and the
/// others.
///
/// # Errors
/// [`Error::NoDataFiles`] when there are none, [`Error::Io`] when a folder cannot be read.
pub fn folder_files(path: &Path, split: Split) -> Result<[Vec<PathBuf>; 2]> {
    let (mut files, mut visited) = (Vec::new(), HashSet::new());
    list(path, &mut files, &mut visited)?;
    files.sort();
    if files.is_empty() {
        return Err(Error::NoDataFiles { path: path.into() });
    }
    let name = |file: &PathBuf| {
        let name = file.strip_prefix(path).unwrap_or(file);
        name.to_string_lossy().into_owned()
    };
    let names = files.iter().map(name).collect::<Vec<_>>();
    let chosen = match split {
        Split::Train => hub::to_train_on(names, 0),
        Split::HeldOut => hub::held_out(names),
    };
    let (chosen, others) = files
        .into_iter()
        .partition(|file| chosen.contains(&name(file)));
    Ok([chosen, others])
}

/// Adds the data files below a folder; a link that leads back to a folder is followed once.
fn list(path: &Path, files: &mut Vec<PathBuf>, visited: &mut HashSet<PathBuf>) -> Result<()> {
    let failed = |e| unreadable(path, e);
    if !visited.insert(path.canonicalize().map_err(failed)?) {
        return Ok(());
    }
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().to_lowercase();
        match path.is_dir() {
            _ if name.starts_with('.') || hub::describes_data(&name) => {}
            true => list(&path, files, visited)?,
            false if Kind::known(&path).is_some() && path.is_file() => files.push(path),
            false => {}
        }
    }
    Ok(())
}

fn in_folder(path: &Path) -> Result<Vec<PathBuf>> {
    folder_files(path, Split::Train).map(|[files, _]| files)
}

fn pattern(path: &Path) -> Option<&str> {
    path.to_str().filter(|text| text.contains(['*', '?', '[']))
}

fn matching(path: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let found = glob::glob(pattern).map_err(|source| Error::BadPattern {
        path: path.into(),
        source,
    })?;
    let mut files = Vec::new();
    for found in found {
        let found = found.map_err(|e| {
            let path = e.path().to_path_buf();
            unreadable(&path, e.into())
        })?;
        match found.is_dir() {
            true => files.extend(in_folder(&found)?),
            false => files.push(found),
        }
    }
    match files.is_empty() {
        true => Err(Error::NoMatch { path: path.into() }),
        false => Ok(files),
    }
}
