//! Bringing the files of one commit into the cache.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use hf_hub::CacheRepo;
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiError, ApiRepo, Metadata};

use super::id::HubId;
use super::listing::{Listing, shards};
use super::{DownloadEvent, Files, Hub, INDEX, RETRY_PAUSES_MS};
use crate::error::{Error, Result};

/// One commit of a repository on its way into the cache.
pub(super) struct Snapshot<'a> {
    api: Api,
    remote: ApiRepo,
    cache: CacheRepo,
    hub: &'a Hub,
    repo: &'a HubId,
    listing: &'a Listing,
    report: &'a mut dyn FnMut(DownloadEvent<'_>),
}

impl<'a> Snapshot<'a> {
    pub(super) fn new(
        hub: &'a Hub,
        api: Api,
        repo: &'a HubId,
        listing: &'a Listing,
        report: &'a mut dyn FnMut(DownloadEvent<'_>),
    ) -> Self {
        Self {
            remote: api.repo(repo.at(&listing.commit)),
            cache: hub.cache(repo, &listing.commit),
            api,
            hub,
            repo,
            listing,
            report,
        }
    }

    /// Fetches what is missing. The files that make a snapshot count as complete come last.
    pub(super) fn complete(&mut self, files: Files, weights: Option<&str>) -> Result<PathBuf> {
        let folder = self.cache.pointer_path(&self.listing.commit);
        for file in files
            .optional()
            .iter()
            .filter(|file| self.listing.has(file))
        {
            self.fetch(file)?;
        }
        self.fetch(files.required())?;
        if let Some(weights) = weights {
            self.fetch(weights)?;
        }
        if weights == Some(INDEX) {
            let shards = shards(&folder.join(INDEX))?;
            if let Some(file) = shards.iter().find(|shard| !self.listing.has(shard)) {
                return Err(Error::HubNotFound {
                    id: self.repo.to_string(),
                    file: file.clone(),
                });
            }
            for shard in &shards {
                self.fetch(shard)?;
            }
        }
        Ok(folder)
    }

    /// Fetches those of some files that are missing.
    pub(super) fn fetch_all(&mut self, files: &[String]) -> Result<PathBuf> {
        files.iter().try_for_each(|file| self.fetch(file))?;
        Ok(self.cache.pointer_path(&self.listing.commit))
    }

    /// Brings one file into the snapshot. A broken connection is tried again for as long as bytes
    /// keep arriving.
    fn fetch(&mut self, file: &str) -> Result<()> {
        let pointer = self.cache.pointer_path(&self.listing.commit).join(file);
        let listed = self.listing.sizes.get(file).copied().flatten();
        if size_of(&pointer).is_some_and(|size| listed.is_none_or(|listed| listed == size)) {
            return Ok(());
        }
        let mut arrived = Arrived {
            reported: 0,
            total: None,
        };
        let mut failures = 0;
        loop {
            let before = arrived.reported;
            match self.try_fetch(file, &pointer, &mut arrived) {
                Err(error) if is_transient(&error) => {
                    if arrived.reported > before {
                        failures = 0;
                    }
                    let Some(pause) = RETRY_PAUSES_MS.get(failures) else {
                        return Err(error);
                    };
                    failures += 1;
                    std::thread::sleep(Duration::from_millis(*pause));
                }
                result => return result,
            }
        }
    }

    fn try_fetch(&mut self, file: &str, pointer: &Path, arrived: &mut Arrived) -> Result<()> {
        let metadata = self.announced(file)?;
        let total = metadata.size() as u64;
        // Held to the end of this try.
        let _lock = self.lock(file, metadata.etag())?;
        if size_of(pointer) != Some(total) {
            // A link to nowhere or to a damaged file is in hf-hub's way.
            let _ = fs::remove_file(pointer);
            let blob = self.cache.blob_path(metadata.etag());
            if settle_part(&blob, total)? {
                self.check_sum(file, &blob, pointer)?;
            }
            if size_of(&blob) == Some(total) {
                let put = link(&blob, metadata.etag(), pointer, file);
                put.map_err(|source| io_error("link", pointer, source))?;
            } else {
                self.download(file, pointer, &blob, total, arrived)?;
            }
        }
        if arrived.total.is_some() {
            if arrived.reported < total {
                (self.report)(DownloadEvent::Advanced {
                    bytes: total - arrived.reported,
                });
            }
            (self.report)(DownloadEvent::Finished { file });
        }
        Ok(())
    }

    /// Lets hf-hub download, then looks whether all has come, which hf-hub does not.
    fn download(
        &mut self,
        file: &str,
        pointer: &Path,
        blob: &Path,
        total: u64,
        arrived: &mut Arrived,
    ) -> Result<()> {
        let meter = Meter {
            file,
            position: 0,
            arrived,
            report: &mut *self.report,
        };
        let downloaded = self.remote.download_with_progress(file, meter);
        downloaded.map_err(|source| self.explain(file, source))?;
        // Where links are not allowed, hf-hub has moved the blob into the snapshot.
        let found_bytes = size_of(blob).or_else(|| size_of(pointer)).unwrap_or(0);
        if found_bytes == total {
            return self.check_sum(file, blob, pointer);
        }
        let _ = fs::remove_file(pointer);
        let _ = fs::remove_file(blob);
        Err(Error::HubSize {
            id: self.repo.to_string(),
            file: file.to_string(),
            expected_bytes: total,
            found_bytes,
        })
    }

    /// Removes a file that is not the one that the Hub lists.
    fn check_sum(&self, file: &str, blob: &Path, pointer: &Path) -> Result<()> {
        let path = if blob.is_file() { blob } else { pointer };
        let is_listed = self.listing.is_listed(file, path);
        if is_listed.map_err(|e| io_error("read", path, e))? {
            return Ok(());
        }
        let _ = fs::remove_file(pointer);
        let _ = fs::remove_file(blob);
        Err(Error::HubChecksum {
            id: self.repo.to_string(),
            file: file.to_string(),
        })
    }

    /// What the Hub says of a file, refused where hf-hub would follow it out of the cache or to
    /// another commit.
    fn announced(&self, file: &str) -> Result<Metadata> {
        let url = self.remote.url(file);
        let metadata = self
            .api
            .metadata(&url)
            .map_err(|source| self.explain(file, source))?;
        let etag = Path::new(metadata.etag());
        let is_inside = etag
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if metadata.etag().is_empty() || metadata.etag().contains('\\') || !is_inside {
            return Err(self.repo.failed(file, ApiError::InvalidHeader("ETag")));
        }
        if metadata.commit_hash() != self.listing.commit {
            return Err(self
                .repo
                .failed(file, ApiError::InvalidHeader("X-Repo-Commit")));
        }
        match self.listing.sizes.get(file) {
            Some(&Some(expected_bytes)) if expected_bytes != metadata.size() as u64 => {
                Err(Error::HubSize {
                    id: self.repo.to_string(),
                    file: file.to_string(),
                    expected_bytes,
                    found_bytes: metadata.size() as u64,
                })
            }
            _ => Ok(metadata),
        }
    }

    /// Keeps other processes from the same file, `huggingface_hub` included, whose lock this is.
    fn lock(&mut self, file: &str, etag: &str) -> Result<File> {
        let locks = self
            .hub
            .cache
            .join(".locks")
            .join(self.repo.at("main").folder_name());
        let path = locks.join(format!("{etag}.lock"));
        create_folder_of(&path)?;
        let lock = File::create(&path).map_err(|source| io_error("write", &path, source))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            (self.report)(DownloadEvent::Waiting { file });
            lock.lock()
                .map_err(|source| io_error("lock", &path, source))?;
        }
        Ok(lock)
    }

    fn explain(&self, file: &str, source: ApiError) -> Error {
        match status(&source) {
            Some(401 | 403) => self.repo.denied(self.hub.token.is_some()),
            Some(404) => Error::HubNotFound {
                id: self.repo.to_string(),
                file: file.to_string(),
            },
            _ => self.repo.failed(file, source),
        }
    }
}

/// How much of a file has been reported, over all tries.
struct Arrived {
    reported: u64,
    total: Option<u64>,
}

/// Turns hf-hub's progress of one try, which begins anew each time, into events that only go
/// forward.
struct Meter<'a> {
    file: &'a str,
    position: u64,
    arrived: &'a mut Arrived,
    report: &'a mut dyn FnMut(DownloadEvent<'_>),
}

impl Progress for Meter<'_> {
    fn init(&mut self, size: usize, _file: &str) {
        self.position = 0;
        if self.arrived.total.is_none() {
            self.arrived.total = Some(size as u64);
            (self.report)(DownloadEvent::Started {
                file: self.file,
                total_bytes: size as u64,
            });
        }
    }

    fn update(&mut self, size: usize) {
        self.position += size as u64;
        let position = self.position.min(self.arrived.total.unwrap_or(0));
        if position > self.arrived.reported {
            let bytes = position - self.arrived.reported;
            self.arrived.reported = position;
            (self.report)(DownloadEvent::Advanced { bytes });
        }
    }

    fn finish(&mut self) {}
}

/// The size of a file, or of what a link points to.
fn size_of(path: &Path) -> Option<u64> {
    fs::metadata(path)
        .ok()
        .filter(fs::Metadata::is_file)
        .map(|metadata| metadata.len())
}

/// Settles what hf-hub cannot resume: a partial file that is in fact complete, for which it would
/// ask for an empty range, or one that is too long. Whether there is a blob by that.
fn settle_part(blob: &Path, total: u64) -> Result<bool> {
    let part = blob.with_extension("part");
    let settled = match size_of(&part) {
        Some(size) if size == total => fs::rename(&part, blob).map(|()| true),
        Some(size) if size > total => fs::remove_file(&part).map(|()| false),
        _ => Ok(false),
    };
    settled.map_err(|source| io_error("replace", &part, source))
}

/// Puts a blob that is already there into a snapshot.
#[cfg(unix)]
fn link(_blob: &Path, etag: &str, pointer: &Path, file: &str) -> io::Result<()> {
    fs::create_dir_all(pointer.parent().expect("a file lies in a folder"))?;
    // Relative, from snapshots/COMMIT/FILE, so that a cache can be moved.
    let up = "../".repeat(2 + file.matches('/').count());
    std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), pointer)
}

/// Puts a blob that is already there into a snapshot.
#[cfg(not(unix))]
fn link(blob: &Path, _etag: &str, pointer: &Path, _file: &str) -> io::Result<()> {
    fs::create_dir_all(pointer.parent().expect("a file lies in a folder"))?;
    fs::hard_link(blob, pointer).or_else(|_| fs::copy(blob, pointer).map(|_| ()))
}

fn create_folder_of(file: &Path) -> Result<()> {
    let folder = file.parent().expect("a file lies in a folder");
    fs::create_dir_all(folder).map_err(|source| io_error("create", folder, source))
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        action,
        path: path.into(),
        source,
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    }
}

/// Whether the same request may well succeed a moment later.
fn is_transient(error: &Error) -> bool {
    match error {
        Error::HubSize { .. } => true,
        Error::Hub { source, .. } => match source {
            ApiError::IoError(_) | ApiError::LockAcquisition(_) => true,
            ApiError::RequestError(_) => {
                status(source).is_none_or(|status| status == 429 || status >= 500)
            }
            _ => false,
        },
        _ => false,
    }
}
