//! Data sets of the Hub, and which of their files hold the rows to train on.

use std::fs;
use std::path::{Path, PathBuf};

use super::id::{HubId, is_plain_path};
use super::snapshot::Snapshot;
use super::{DownloadEvent, Hub, Source};
use crate::error::{Error, Result};

/// What the address of a data set begins with.
pub const DATASETS: &str = "hf://datasets/";

/// The extensions of files with rows.
const EXTENSIONS: [&str; 6] = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"];
/// Files with such an extension that describe a data set.
const DESCRIPTIONS: [&str; 3] = ["dataset_info.json", "dataset_infos.json", "state.json"];
/// Words in a file's name that say it is not for training.
const OTHER_SPLITS: [&str; 6] = ["test", "validation", "valid", "val", "dev", "eval"];

impl Hub {
    /// The data files that `hf://datasets/owner/name[@revision][/path]` stands for, downloaded into
    /// the cache as far as they are not there yet. The path is a file, a folder, or a pattern such
    /// as `data/*.parquet`. Of a folder, or of the whole repository, the files of the train split
    /// are taken, if their names tell which these are.
    ///
    /// # Errors
    /// As [`Hub::resolve`]; `HubNoData` when there is no such data file.
    pub fn dataset(
        &self,
        address: &str,
        report: &mut dyn FnMut(DownloadEvent<'_>),
    ) -> Result<Vec<PathBuf>> {
        let (repo, path) = parse(address)?;
        let cached = || self.cached_dataset(&repo, &path);
        let (api, listing) = match self.source(&repo, report, cached)? {
            Source::Hub(api, listing) => (api, listing),
            Source::Cache(files) => return Ok(files),
        };
        let names = listing.sizes.keys().filter(|name| listing.has(name));
        let chosen = choose(&repo, &path, names.cloned().collect())?;
        let folder = Snapshot::new(self, *api, &repo, &listing, report).fetch_all(&chosen)?;
        self.publish(&repo, &listing.commit)?;
        Ok(chosen.iter().map(|file| folder.join(file)).collect())
    }

    /// The files in the cache.
    fn cached_dataset(&self, repo: &HubId, path: &str) -> Result<Vec<PathBuf>> {
        let missing = || Error::HubOffline {
            id: repo.to_string(),
            file: match path {
                "" => "data file".to_owned(),
                path => path.to_owned(),
            },
        };
        let folder = self.cached_snapshot(repo).ok_or_else(missing)?;
        let mut names = Vec::new();
        list_files(&folder, "", &mut names);
        let chosen = choose(repo, path, names).map_err(|_| missing())?;
        Ok(chosen.iter().map(|file| folder.join(file)).collect())
    }
}

/// The parts of `hf://datasets/owner/name[@revision][/path]`.
fn parse(address: &str) -> Result<(HubId, String)> {
    let rest = address.strip_prefix(DATASETS).unwrap_or(address);
    let mut parts = rest.trim_end_matches('/').splitn(3, '/');
    let (owner, name) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    let wrong = |_| Error::NotADataset {
        address: address.to_owned(),
    };
    let repo = HubId::parse(&format!("{owner}/{name}")).map_err(wrong)?;
    Ok((repo.of_dataset(), parts.next().unwrap_or("").to_owned()))
}

/// The names of all files below a folder; none where it cannot be read.
fn list_files(folder: &Path, prefix: &str, names: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let path = entry.path();
        match path.is_dir() {
            true => list_files(&path, &format!("{name}/"), names),
            false if path.is_file() => names.push(name),
            false => {}
        }
    }
}

/// Chooses the files that a path of a repository stands for, sorted by name.
fn choose(repo: &HubId, path: &str, mut names: Vec<String>) -> Result<Vec<String>> {
    let none = || Error::HubNoData {
        id: repo.to_string(),
        path: path.to_owned(),
    };
    names.retain(|name| is_plain_path(name));
    names.sort();
    if names.iter().any(|name| name == path) {
        return Ok(vec![path.to_owned()]);
    }
    names.retain(|name| is_data(name));
    match path.contains(['*', '?', '[']) {
        true => {
            let pattern = glob::Pattern::new(path).map_err(|_| none())?;
            let options = glob::MatchOptions {
                require_literal_separator: true,
                ..glob::MatchOptions::new()
            };
            names.retain(|name| pattern.matches_with(name, options));
        }
        false => {
            let start = match path {
                "" => String::new(),
                path => format!("{path}/"),
            };
            names.retain(|name| name.starts_with(&start));
            names = to_train_on(names, start.len());
        }
    }
    match names.is_empty() {
        true => Err(none()),
        false => Ok(names),
    }
}

fn is_data(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let file = file.to_lowercase();
    EXTENSIONS.iter().any(|end| file.ends_with(end))
        && !describes_data(&file)
        && !name.split('/').any(|part| part.starts_with('.'))
}

/// The files of the train split by the words in their names, which begin at `start`; without any,
/// those that are of no other split, if there are such.
pub fn to_train_on(names: Vec<String>, start: usize) -> Vec<String> {
    let has_word = |name: &String, words: &[&str]| has_word(&name[start..], words);
    let of = |wanted: &dyn Fn(&String) -> bool| -> Vec<String> {
        names.iter().filter(|name| wanted(name)).cloned().collect()
    };
    let train = of(&|name| has_word(name, &["train", "training"]));
    let no_other = of(&|name| !has_word(name, &OTHER_SPLITS));
    match (train.is_empty(), no_other.is_empty()) {
        (false, _) => train,
        (true, false) => no_other,
        (true, true) => names,
    }
}

/// The files of a split that is held out, by the words in their names: one to validate with rather
/// than the test split; all files where no name tells.
pub fn held_out(names: Vec<String>) -> Vec<String> {
    let of = |words: &[&str]| -> Vec<String> {
        let named = names.iter().filter(|name| has_word(name, words));
        named.cloned().collect()
    };
    let splits = [&OTHER_SPLITS[1..], &OTHER_SPLITS[..1]].map(of);
    let found = splits.into_iter().find(|files| !files.is_empty());
    found.unwrap_or(names)
}

fn has_word(name: &str, words: &[&str]) -> bool {
    let name = name.to_lowercase();
    let mut found = name.split(|c: char| !c.is_ascii_alphanumeric());
    found.any(|word| words.contains(&word))
}

/// Whether a file of this name, in lower case, describes a data set and has no rows.
pub fn describes_data(name: &str) -> bool {
    DESCRIPTIONS.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(path: &str, names: &[&str]) -> Vec<String> {
        let repo = HubId::parse("acme/rows").unwrap();
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        choose(&repo, path, names).unwrap_or_default()
    }

    #[test]
    fn the_train_split_is_taken_where_names_tell() {
        let names = [
            "README.md",
            "data/test-0.parquet",
            "data/train-1.parquet",
            "data/train-0.parquet",
            "dataset_infos.json",
        ];
        let train = ["data/train-0.parquet", "data/train-1.parquet"];
        assert_eq!(chosen("", &names), train);
        assert_eq!(chosen("data", &names), train);
        assert_eq!(
            chosen("data/t*-0.parquet", &names),
            ["data/test-0.parquet", "data/train-0.parquet"]
        );
        assert_eq!(chosen("*.parquet", &names), [""; 0]);
        assert_eq!(
            chosen("data/test-0.parquet", &names),
            ["data/test-0.parquet"]
        );
        assert_eq!(
            chosen("", &["b.jsonl", "a.csv", "test.csv"]),
            ["a.csv", "b.jsonl"]
        );
        assert_eq!(chosen("", &["test.csv"]), ["test.csv"]);
        assert_eq!(
            chosen("", &["trained.csv", "latest.csv"]),
            ["latest.csv", "trained.csv"]
        );
        assert_eq!(
            chosen("train", &["train/test.csv", "train/a.csv"]),
            ["train/a.csv"]
        );
        assert_eq!(chosen("", &["README.md", ".x/a.csv"]), [""; 0]);
    }

    #[test]
    fn an_address_has_an_owner_a_name_and_perhaps_more() {
        for (address, id, path) in [
            ("hf://datasets/acme/rows", "acme/rows", ""),
            ("hf://datasets/acme/rows/", "acme/rows", ""),
            (
                "hf://datasets/acme/rows@v1/a/b.csv",
                "acme/rows@v1",
                "a/b.csv",
            ),
        ] {
            let (repo, found) = parse(address).unwrap();
            assert_eq!((repo.to_string().as_str(), found.as_str()), (id, path));
        }
        for address in [
            "hf://datasets/acme",
            "hf://datasets/",
            "hf://datasets/a b/c",
        ] {
            let error = parse(address).err().unwrap();
            assert!(matches!(error, Error::NotADataset { .. }), "{error}");
        }
    }
}
