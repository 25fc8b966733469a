//! Which files a repository has, and which of them hold the weights.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::{fs, io};

use serde::Deserialize;

use super::Files;
use super::digest::{git_sha1, sha256};
use super::id::{HubId, is_plain_path};
use crate::error::{Error, Result};

/// How the names of files with weights end.
const WEIGHTS: [&str; 9] = [
    ".safetensors",
    ".bin",
    ".pth",
    ".pt",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
];
/// How long a SHA-256 is in hexadecimal digits.
const SHA256_DIGITS: usize = 64;

/// The part of the Hub's answer about a repository that is read.
#[derive(Deserialize)]
pub(super) struct RepoInfo {
    pub(super) sha: String,
    pub(super) siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Sibling {
    pub(super) rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: Option<String>,
}

/// The files of one commit with their sizes and checksums, as far as the Hub tells them.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) sizes: BTreeMap<String, Option<u64>>,
    /// SHA-256 of large files, git's checksum of small ones.
    checksums: BTreeMap<String, String>,
}

impl From<RepoInfo> for Listing {
    fn from(info: RepoInfo) -> Self {
        let (mut sizes, mut checksums) = (BTreeMap::new(), BTreeMap::new());
        for sibling in info.siblings {
            let checksum = match sibling.lfs {
                Some(large) => large.sha256, // its blob is a pointer
                None => sibling.blob_id,
            };
            let checksum = checksum.map(|sum| (sibling.rfilename.clone(), sum));
            checksums.extend(checksum);
            sizes.insert(sibling.rfilename, sibling.size);
        }
        Self {
            commit: info.sha,
            sizes,
            checksums,
        }
    }
}

impl Listing {
    /// Whether a file has the checksum that is listed, if one is.
    pub(super) fn is_listed(&self, file: &str, path: &Path) -> io::Result<bool> {
        let Some(listed) = self.checksums.get(file) else {
            return Ok(true);
        };
        let found = match listed.len() {
            SHA256_DIGITS => sha256(&mut fs::File::open(path)?)?,
            _ => git_sha1(&fs::read(path)?),
        };
        Ok(found == *listed)
    }

    pub(super) fn has(&self, file: &str) -> bool {
        // An empty file cannot be asked for by range, and says nothing.
        self.sizes.get(file).is_some_and(|size| *size != Some(0))
    }

    /// Everything but weights.
    pub(super) fn others(&self) -> Vec<String> {
        let names = self.sizes.keys();
        let wanted =
            names.filter(|name| self.has(name) && is_plain_path(name) && !is_weights(name));
        wanted.cloned().collect()
    }

    /// Which file holds or lists the weights; none if none are wanted.
    pub(super) fn weights(&self, repo: &HubId, files: Files) -> Result<Option<&'static str>> {
        if !self.has(files.required()) {
            return Err(Error::HubNotFound {
                id: repo.to_string(),
                file: files.required().to_string(),
            });
        }
        let candidates = files.weights();
        let weights = candidates.iter().find(|file| self.has(file)).copied();
        if weights.is_none() && !candidates.is_empty() {
            let is_weights = |file: &&String| is_weights(file);
            return Err(Error::HubNoSafetensors {
                id: repo.to_string(),
                wanted: candidates.join(" or "),
                found: self
                    .sizes
                    .keys()
                    .filter(is_weights)
                    .take(3)
                    .cloned()
                    .collect(),
            });
        }
        Ok(weights)
    }
}

fn is_weights(file: &str) -> bool {
    WEIGHTS.iter().any(|end| file.ends_with(end))
}

/// The distinct shards that a weight index lists, each a plain path below the folder.
pub(super) fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = fs::read(index).map_err(|source| Error::Io {
        action: "read",
        path: index.into(),
        source,
    })?;
    let index_json: Index = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        path: index.into(),
        source,
    })?;
    let shards: BTreeSet<String> = index_json.weight_map.into_values().collect();
    match shards
        .iter()
        .find(|shard| !is_plain_path(shard) || !shard.ends_with(".safetensors"))
    {
        Some(shard) => Err(Error::Safetensors {
            path: index.into(),
            reason: format!(
                "it lists {shard:?}, which is not the name of a safetensors file in this folder"
            ),
        }),
        None => Ok(shards),
    }
}
