//! Names of Hub repositories.

use std::fmt;
use std::path::PathBuf;

use hf_hub::api::sync::ApiError;
use hf_hub::{Repo, RepoType};

use crate::error::{Error, Result};

/// The parts of `owner/name[@revision]`.
pub(super) struct HubId {
    pub(super) name: String,
    pub(super) revision: String,
    pub(super) is_dataset: bool,
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.name),
            revision => write!(f, "{}@{revision}", self.name),
        }
    }
}

impl HubId {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let is_path = text.starts_with(['.', '/', '~'])
            || text.contains('\\')
            || name.matches('/').count() > 1;
        if is_path {
            return Err(Error::NoSuchFolder {
                path: PathBuf::from(text),
            });
        }
        // The Hub's own rule; "--" would also make two ids share a folder of the cache.
        let is_part = |part: &str| {
            is_plain_path(part)
                && !part.contains("--")
                && !part.contains("..")
                && !part.ends_with(['-', '.'])
        };
        let is_id = name.split('/').count() == 2
            && name
                .split('/')
                .all(|part| is_part(part) && !part.starts_with('-'));
        if !is_id || !is_plain_path(revision) {
            return Err(Error::NotAModel {
                name: text.to_string(),
            });
        }
        Ok(Self {
            name: name.to_string(),
            revision: revision.to_string(),
            is_dataset: false,
        })
    }

    /// The data set of this name, instead of the model.
    pub(super) fn of_dataset(self) -> Self {
        Self {
            is_dataset: true,
            ..self
        }
    }

    pub(super) fn at(&self, revision: &str) -> Repo {
        let kind = match self.is_dataset {
            true => RepoType::Dataset,
            false => RepoType::Model,
        };
        Repo::with_revision(self.name.clone(), kind, revision.to_string())
    }

    pub(super) fn denied(&self, has_token: bool) -> Error {
        Error::HubDenied {
            id: self.to_string(),
            has_token,
        }
    }

    pub(super) fn failed(&self, file: &str, source: ApiError) -> Error {
        Error::Hub {
            id: self.to_string(),
            file: file.to_string(),
            source,
        }
    }
}

/// Whether a text is a relative path that stays below its folder and stands in a URL as it is.
pub(super) fn is_plain_path(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    text.chars().all(is_plain) && text.split('/').all(|part| !["", ".", ".."].contains(&part))
}

pub(super) fn is_commit(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_an_owner_a_name_and_perhaps_a_revision() {
        for (text, name, revision) in [
            ("owner/name", "owner/name", "main"),
            ("Qwen/Qwen2.5-0.5B_x", "Qwen/Qwen2.5-0.5B_x", "main"),
            ("owner/name@v1.0", "owner/name", "v1.0"),
            ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        ] {
            let id = HubId::parse(text).unwrap();
            assert_eq!((id.name.as_str(), id.revision.as_str()), (name, revision));
            assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn paths_and_other_names_are_told_apart() {
        for path in [
            "./a",
            "../a/b",
            "/a/b",
            "~/a",
            "a/b/c",
            "a\\b",
            ".",
            "models/a/b@c",
        ] {
            let error = HubId::parse(path).err().unwrap();
            assert!(
                matches!(error, Error::NoSuchFolder { .. }),
                "{path}: {error}"
            );
        }
        for name in [
            "", "gpt2", "a b/c", "a/", "a/b?c", "a--b/c", "-a/b", "a/b.", "a/b..c",
        ] {
            let error = HubId::parse(name).err().unwrap();
            assert!(matches!(error, Error::NotAModel { .. }), "{name}: {error}");
        }
        for name in [
            "a/b@",
            "a/b@../../x",
            "a/b@/x",
            "a/b@x#y",
            "a/b@x/",
            "a/b@c@d",
        ] {
            let error = HubId::parse(name).err().unwrap();
            assert!(matches!(error, Error::NotAModel { .. }), "{name}: {error}");
        }
    }
}
