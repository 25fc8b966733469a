//! Which files a repository has, and which of them hold the weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::Files;
use super::id::{HubId, is_plain_path};
use crate::error::{Error, Result};

/// The part of the Hub's answer about a repository that is read.
#[derive(Deserialize)]
pub(super) struct RepoInfo {
    pub(super) sha: String,
    pub(super) siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
pub(super) struct Sibling {
    pub(super) rfilename: String,
    pub(super) size: Option<u64>,
}

/// The files of one commit with their sizes, as far as the Hub tells them.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) sizes: BTreeMap<String, Option<u64>>,
}

impl Listing {
    pub(super) fn has(&self, file: &str) -> bool {
        // An empty file cannot be asked for by range, and says nothing.
        self.sizes.get(file).is_some_and(|size| *size != Some(0))
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
            let other = [
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
            let is_weights = |file: &&String| other.iter().any(|end| file.ends_with(end));
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
