//! Models, adapters and data sets by name: a folder, or a Hugging Face Hub id that is downloaded into
//! the cache which all Hugging Face tools share.
//!
//! hf-hub does the transfers. Around it, this module pins every file to one commit, takes only the
//! files that are wanted, never leaves a file of the wrong size, and goes on from the cache when
//! the Hub cannot be reached.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, CacheRepo};

use crate::error::{Error, Result};
pub use dataset::{DATASETS, describes_data, held_out, to_train_on};
use id::{HubId, is_commit};
use listing::{Listing, RepoInfo, shards};
pub use push::{Content, Push, PushFile, Pushed, UploadEvent};
use snapshot::Snapshot;

mod dataset;
mod digest;
mod id;
mod listing;
mod push;
mod snapshot;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const INDEX: &str = "model.safetensors.index.json";
/// What [`Error::Hub`] names as the file where the Hub does not say what a repository holds.
pub const LISTING: &str = "the list of files";
/// How long the Hub may take to list a repository before the cache is used instead.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);

/// The pauses between tries that bring no byte forward.
const RETRY_PAUSES_MS: [u64; 3] = [250, 1000, 3000];

/// Which files of a repository are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// A model without its weights: its config, tokenizer and templates.
    Config,
    /// A model with its weights.
    Model,
    /// A PEFT adapter.
    Adapter,
}

impl Files {
    /// The file without which there is nothing to describe.
    fn required(self) -> &'static str {
        match self {
            Files::Config | Files::Model => "config.json",
            Files::Adapter => "adapter_config.json",
        }
    }

    /// Small files taken where they exist.
    fn optional(self) -> &'static [&'static str] {
        match self {
            Files::Config | Files::Model => &[
                "generation_config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "tokenizer.model",
                "chat_template.jinja",
                "chat_template.json",
            ],
            Files::Adapter => &[
                "tokenizer_config.json",
                "chat_template.jinja",
                "chat_template.json",
            ],
        }
    }

    /// Where the weights can be: the first that exists is taken.
    fn weights(self) -> &'static [&'static str] {
        match self {
            Files::Config => &[],
            Files::Model => &["model.safetensors", INDEX],
            Files::Adapter => &["adapter_model.safetensors"],
        }
    }
}

/// What happens while a repository is brought into the cache.
///
/// A file that is already there causes no event. For each file, the bytes of `Advanced` add up to
/// `total_bytes`, also when a download is resumed or tried again.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum DownloadEvent<'a> {
    /// A file begins to arrive.
    Started {
        /// Its name in the repository.
        file: &'a str,
        /// Its size.
        total_bytes: u64,
    },
    /// More of the current file has arrived.
    Advanced {
        /// How much more.
        bytes: u64,
    },
    /// The current file is complete and in the cache.
    Finished {
        /// Its name in the repository.
        file: &'a str,
    },
    /// Another process is downloading this file; its result will be used.
    Waiting {
        /// Its name in the repository.
        file: &'a str,
    },
    /// The Hub could not be asked for news; the cached files are used as they are.
    CacheOnly {
        /// The repository, with its revision.
        id: &'a str,
        /// Why the Hub could not be asked.
        reason: &'a Error,
    },
}

/// Whether a text is the id of a Hub repository, `owner/name[@revision]`, and not that of a folder here.
pub fn is_id(text: &str) -> bool {
    HubId::parse(text).is_ok() && !Path::new(text).exists()
}

/// Where models come from, and where they are kept.
#[derive(Clone)]
pub struct Hub {
    /// The address of the Hub, without a slash at the end.
    pub endpoint: String,
    /// The folder with the cached repositories (`models--owner--name`).
    pub cache: PathBuf,
    /// The token that is sent along.
    pub token: Option<String>,
    /// Use only what is cached.
    pub offline: bool,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish()
    }
}

/// Resolves a name with the Hub that the environment describes: [`Hub::from_env`],
/// [`Hub::resolve`].
///
/// # Errors
/// As [`Hub::resolve`].
pub fn resolve(
    name: &str,
    files: Files,
    report: &mut dyn FnMut(DownloadEvent<'_>),
) -> Result<PathBuf> {
    Hub::from_env().resolve(name, files, report)
}

/// Where the files of a repository come from.
enum Source<T> {
    /// The Hub, which has listed them.
    Hub(Box<Api>, Listing),
    /// The cache, where this was found.
    Cache(T),
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH` and
    /// `HF_HUB_OFFLINE` as `huggingface_hub` does, so that both share cache and login.
    pub fn from_env() -> Self {
        let user = std::env::home_dir().unwrap_or_else(std::env::temp_dir);
        Self::from_vars(&user, |name| std::env::var(name).ok())
    }

    fn from_vars(user: &Path, var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| {
            var(name)
                .map(|value| value.trim().to_string())
                .filter(|value| !value.is_empty())
        };
        let path = |name: &str| {
            var(name).map(|value| match value.strip_prefix("~/") {
                Some(rest) => user.join(rest),
                None => PathBuf::from(value),
            })
        };
        let home = path("HF_HOME").unwrap_or_else(|| {
            path("XDG_CACHE_HOME")
                .unwrap_or_else(|| user.join(".cache"))
                .join("huggingface")
        });
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token_in_file = || {
            let token = fs::read_to_string(token_file).ok()?.trim().to_string();
            (!token.is_empty()).then_some(token)
        };
        let is_on =
            |value: String| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str());
        Self {
            endpoint: var("HF_ENDPOINT").map_or_else(
                || DEFAULT_ENDPOINT.to_string(),
                |url| url.trim_end_matches('/').to_string(),
            ),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            token: var("HF_TOKEN").or_else(token_in_file),
            offline: var("HF_HUB_OFFLINE").is_some_and(is_on),
        }
    }

    /// The folder that `name` stands for: `name` itself if it is a folder, else the cached snapshot
    /// of the Hub repository `owner/name[@revision]`, downloaded as far as it is not there yet.
    ///
    /// # Errors
    /// The name is no folder and no id; the repository, the revision or a required file does not
    /// exist or is refused; the download fails; or the cache lacks a file and the Hub may not or
    /// cannot be asked.
    pub fn resolve(
        &self,
        name: &str,
        files: Files,
        report: &mut dyn FnMut(DownloadEvent<'_>),
    ) -> Result<PathBuf> {
        let path = Path::new(name);
        if path.is_dir() {
            return Ok(path.to_path_buf());
        }
        if path.exists() {
            return Err(Error::NotAModel {
                name: name.to_string(),
            });
        }
        let repo = HubId::parse(name)?;
        let (api, listing) = match self.source(&repo, report, || self.cached(&repo, files))? {
            Source::Hub(api, listing) => (api, listing),
            Source::Cache(folder) => return Ok(folder),
        };
        let weights = listing.weights(&repo, files)?;
        let folder = Snapshot::new(self, *api, &repo, &listing, report).complete(files, weights)?;
        self.publish(&repo, &listing.commit)?;
        Ok(folder)
    }

    /// What the Hub repository `owner/name[@revision]` holds, and where: an adapter or a model, all of
    /// it but weights in other formats, downloaded as far as it is not there yet.
    ///
    /// # Errors
    /// As [`Hub::resolve`].
    pub fn pull(
        &self,
        name: &str,
        report: &mut dyn FnMut(DownloadEvent<'_>),
    ) -> Result<(Files, PathBuf)> {
        let repo = HubId::parse(name)?;
        let cached = |files| Ok((files, self.cached(&repo, files)?));
        let cached = || cached(Files::Adapter).or_else(|_| cached(Files::Model));
        let (api, listing) = match self.source(&repo, report, cached)? {
            Source::Hub(api, listing) => (api, listing),
            Source::Cache(found) => return Ok(found),
        };
        let files = match listing.has(Files::Adapter.required()) {
            true => Files::Adapter,
            false => Files::Model,
        };
        let weights = listing.weights(&repo, files)?;
        let mut snapshot = Snapshot::new(self, *api, &repo, &listing, report);
        snapshot.fetch_all(&listing.others())?;
        let folder = snapshot.complete(files, weights)?;
        self.publish(&repo, &listing.commit)?;
        Ok((files, folder))
    }

    /// Asks the Hub for the files of a repository; if it may not or cannot be asked, what `cached`
    /// finds has to do.
    fn source<T>(
        &self,
        repo: &HubId,
        report: &mut dyn FnMut(DownloadEvent<'_>),
        cached: impl Fn() -> Result<T>,
    ) -> Result<Source<T>> {
        if self.offline {
            return cached().map(Source::Cache);
        }
        let api = self.api().map_err(|source| repo.failed(LISTING, source))?;
        match self.list(&api, repo) {
            Ok(listing) => Ok(Source::Hub(Box::new(api), listing)),
            Err(reason @ Error::Hub { .. }) => {
                let Ok(found) = cached() else {
                    return Err(reason);
                };
                report(DownloadEvent::CacheOnly {
                    id: &repo.to_string(),
                    reason: &reason,
                });
                Ok(Source::Cache(found))
            }
            Err(error) => Err(error),
        }
    }

    fn api(&self) -> std::result::Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_user_agent("trainer", env!("CARGO_PKG_VERSION"))
            .build()
    }

    fn cache(&self, repo: &HubId, revision: &str) -> CacheRepo {
        Cache::new(self.cache.clone()).repo(repo.at(revision))
    }

    fn ref_path(&self, repo: &HubId, revision: &str) -> PathBuf {
        self.cache
            .join(repo.at(revision).folder_name())
            .join("refs")
            .join(revision)
    }

    /// The snapshot in the cache, if all that is needed is there.
    fn cached(&self, repo: &HubId, files: Files) -> Result<PathBuf> {
        let missing = |file: &str| Error::HubOffline {
            id: repo.to_string(),
            file: file.to_string(),
        };
        let folder = self.cached_snapshot(repo);
        let folder = folder.ok_or_else(|| missing(files.required()))?;
        let has = |file: &str| folder.join(file).is_file();
        if !has(files.required()) {
            return Err(missing(files.required()));
        }
        let candidates = files.weights();
        let weights = candidates.iter().find(|file| has(file));
        match (weights, candidates.first()) {
            (None, Some(file)) => return Err(missing(file)),
            (Some(&INDEX), _) => {
                if let Some(shard) = shards(&folder.join(INDEX))?
                    .iter()
                    .find(|shard| !has(shard))
                {
                    return Err(missing(shard));
                }
            }
            _ => {}
        }
        Ok(folder)
    }

    /// The folder in the cache of the commit that a revision stands for, if that is known; it need
    /// not exist.
    fn cached_snapshot(&self, repo: &HubId) -> Option<PathBuf> {
        let commit = fs::read_to_string(self.ref_path(repo, &repo.revision))
            .map_or_else(|_| repo.revision.clone(), |commit| commit.trim().to_owned());
        is_commit(&commit).then(|| self.cache(repo, "").pointer_path(&commit))
    }

    /// Asks the Hub which files the revision has, and which commit it is.
    fn list(&self, api: &Api, repo: &HubId) -> Result<Listing> {
        let failed = |source| repo.failed(LISTING, source);
        let request = api
            .repo(repo.at(&repo.revision))
            .info_request()
            .query("blobs", "true");
        let mut response = request
            .config()
            .http_status_as_error(false)
            .timeout_global(Some(LIST_TIMEOUT))
            .build()
            .call()
            .map_err(|error| failed(ApiError::RequestError(Box::new(error))))?;
        let status = response.status().as_u16();
        let no_revision = response
            .headers()
            .get("x-error-code")
            .is_some_and(|code| code == "RevisionNotFound");
        match status {
            200 => {}
            401 | 403 => return Err(repo.denied(self.token.is_some())),
            404 if no_revision => {
                let file = format!("revision {}", repo.revision);
                return Err(Error::HubNotFound {
                    id: repo.name.clone(),
                    file,
                });
            }
            404 if repo.is_dataset => {
                return Err(Error::HubNoDataset {
                    id: repo.to_string(),
                });
            }
            404 => {
                return Err(Error::HubNoRepository {
                    id: repo.to_string(),
                });
            }
            _ => {
                return Err(failed(ApiError::RequestError(Box::new(
                    ureq::Error::StatusCode(status),
                ))));
            }
        }
        let body = response
            .body_mut()
            .read_to_string()
            .map_err(|error| failed(ApiError::RequestError(Box::new(error))))?;
        let info: RepoInfo =
            serde_json::from_str(&body).map_err(|error| failed(ApiError::IoError(error.into())))?;
        if !is_commit(&info.sha) {
            return Err(failed(invalid_data("the answer names no commit")));
        }
        Ok(info.into())
    }

    /// Makes the revision's name stand for the commit, now that its snapshot is complete.
    fn publish(&self, repo: &HubId, commit: &str) -> Result<()> {
        if repo.revision == commit {
            return Ok(());
        }
        // hf-hub leaves a ref for the bare commit, which the other tools would list as a branch.
        let _ = fs::remove_file(self.ref_path(repo, commit));
        let path = self.ref_path(repo, &repo.revision);
        // A cache that needs no change may be read-only.
        if fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        self.cache(repo, &repo.revision)
            .create_ref(commit)
            .map_err(|source| Error::Io {
                action: "write",
                path,
                source,
            })
    }
}

fn invalid_data(message: &'static str) -> ApiError {
    ApiError::IoError(io::Error::new(io::ErrorKind::InvalidData, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(vars: &[(&str, &str)]) -> Hub {
        let value = |name: &str| {
            vars.iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| value.to_string())
        };
        Hub::from_vars(Path::new("/home/me"), value)
    }

    #[test]
    fn an_empty_environment_means_the_usual_places() {
        let hub = hub(&[("HF_TOKEN", ""), ("HF_HUB_OFFLINE", "0")]);
        assert_eq!(hub.endpoint, "https://huggingface.co");
        assert_eq!(hub.cache, Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!((hub.token, hub.offline), (None, false));
    }

    #[test]
    fn the_environment_decides_endpoint_cache_token_and_offline() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home_text = home.path().to_str().unwrap();
        let from_file = hub(&[
            ("HF_HOME", home_text),
            ("HF_ENDPOINT", "https://mirror/"),
            ("HF_HUB_OFFLINE", "YES"),
        ]);
        assert_eq!(from_file.endpoint, "https://mirror");
        assert_eq!(from_file.cache, home.path().join("hub"));
        assert_eq!(
            (from_file.token.as_deref(), from_file.offline),
            (Some("hf_file"), true)
        );

        let explicit = hub(&[
            ("HF_HOME", home_text),
            ("HF_TOKEN", " hf_variable "),
            ("HF_HUB_CACHE", "~/models"),
        ]);
        assert_eq!(explicit.cache, Path::new("/home/me/models"));
        assert_eq!(explicit.token.as_deref(), Some("hf_variable"));
        assert!(!format!("{explicit:?}").contains("hf_variable"));
    }
}
