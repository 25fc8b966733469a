//! Which files the paths of a recipe stand for.

use std::io;
use std::path::{Path, PathBuf};

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

fn in_folder(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(|e| unreadable(path, e))?;
    let files = entries.iter().map(std::fs::DirEntry::path);
    let is_data = |path: &PathBuf| Kind::known(path).is_some() && path.is_file();
    let mut files: Vec<_> = files.filter(is_data).collect();
    files.sort();
    match files.is_empty() {
        true => Err(Error::NoDataFiles { path: path.into() }),
        false => Ok(files),
    }
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
