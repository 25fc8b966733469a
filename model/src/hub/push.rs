//! Files to the Hub: the repository is made if need be, large files go to its storage, and one commit
//! names all of them. What the Hub has is not sent again, so that a push that was cut off goes on
//! where it ended.
//!
//! Source: the requests of `huggingface_hub`'s `create_repo`, `create_branch` and `create_commit`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::digest::git_sha1;
use super::id::{HubId, is_commit, is_plain_path};
use super::listing::RepoInfo;
use super::{Hub, INDEX};
use crate::error::{Error, Result};
use client::{Answer, Client, JSON, Sent, retry};
pub use content::{Content, PushFile};
use lfs::Large;

mod client;
mod content;
mod lfs;

/// Bytes from which the Hub judges a file.
const SAMPLE_BYTES: u64 = 512;

/// What to push, and whereto.
#[derive(Debug, Clone)]
pub struct Push<'a> {
    /// `owner/name`.
    pub repo: &'a str,
    /// A branch, made if it does not exist; `main` if none is given.
    pub revision: Option<&'a str>,
    /// Whether a repository that is made is private; one that is there must be so, then.
    pub private: bool,
    /// What the commit says.
    pub summary: &'a str,
    /// The files.
    pub files: Vec<PushFile>,
}

/// What happens during a push.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum UploadEvent<'a> {
    /// A repository was made.
    Created {
        /// Its name.
        repo: &'a str,
    },
    /// A large file is read for its checksum.
    Hashing {
        /// Its name in the repository.
        file: &'a str,
    },
    /// A large file begins to be sent.
    Started {
        /// Its name in the repository.
        file: &'a str,
        /// Its size.
        total_bytes: u64,
    },
    /// More of it has been sent. For each file these bytes add up to its size, whatever had to be
    /// sent again.
    Advanced {
        /// How much more.
        bytes: u64,
    },
    /// It has arrived.
    Finished {
        /// Its name in the repository.
        file: &'a str,
    },
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The page of the repository.
    pub url: String,
    /// The commit that has the files.
    pub commit: String,
    /// Whether the repository was made.
    pub created: bool,
    /// Files whose contents were sent.
    pub sent: Vec<String>,
    /// Large files that are new in this revision, whose contents the Hub had.
    pub stored: Vec<String>,
    /// Files that were there as they are.
    pub unchanged: Vec<String>,
    /// Weights of what was there before, which were removed.
    pub removed: Vec<String>,
    /// Files that the repository's `.gitignore` keeps out.
    pub ignored: Vec<String>,
}

/// What the Hub thinks of a file.
#[derive(Deserialize)]
struct Verdicts {
    files: Vec<Verdict>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Verdict {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
    /// The checksum of what is there: of git for small files, SHA-256 for large ones.
    oid: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_oid: String,
}

impl Hub {
    /// Puts files into a repository of the Hub.
    ///
    /// # Errors
    /// `HubNotARepository`, `HubPushOffline` and `HubNoToken` before anything is asked; `HubPublic`;
    /// `HubPush` for what the Hub refuses or the network loses; `Io` for a file that cannot be read.
    pub fn push(&self, push: &Push<'_>, report: &mut dyn FnMut(UploadEvent<'_>)) -> Result<Pushed> {
        let repo = target(push)?;
        if self.offline {
            return Err(Error::HubPushOffline { id: repo.name });
        }
        let client = Client::new(self, &repo.name)?;
        let mut upload = Upload {
            client: &client,
            repo: &repo,
            push,
            report,
        };
        upload.run(self)
    }
}

/// The repository and the branch that a push names.
fn target(push: &Push<'_>) -> Result<HubId> {
    let wrong = |problem| Error::HubNotARepository {
        name: push.repo.to_owned(),
        problem,
    };
    let repo = HubId::parse(push.repo).map_err(|_| wrong("it is not of the form owner/name"))?;
    if push.repo.contains('@') {
        return Err(wrong("a branch is given beside it, by --revision"));
    }
    let revision = push.revision.unwrap_or("main");
    if !is_plain_path(revision) {
        return Err(wrong("the revision is not the name of a branch"));
    }
    if is_commit(revision) && revision.len() == 40 {
        return Err(wrong("a commit cannot be added to, only a branch"));
    }
    Ok(HubId {
        revision: revision.to_owned(),
        ..repo
    })
}

/// A push on its way.
struct Upload<'a> {
    client: &'a Client<'a>,
    repo: &'a HubId,
    push: &'a Push<'a>,
    report: &'a mut dyn FnMut(UploadEvent<'_>),
}

impl Upload<'_> {
    fn run(&mut self, hub: &Hub) -> Result<Pushed> {
        let created = self.open_repository()?;
        self.open_branch()?;
        let before = match created {
            true => None,
            false => Some(self.list()?),
        };
        let mut pushed = Pushed {
            url: self.page(hub),
            commit: String::new(),
            created,
            sent: Vec::new(),
            stored: Vec::new(),
            unchanged: Vec::new(),
            removed: self.left_over(before.as_ref()),
            ignored: Vec::new(),
        };
        let verdicts = self.ask_about_files()?;
        let lines = self.bring(&verdicts, &mut pushed)?;
        pushed.commit = match before {
            Some(before) if lines.is_empty() => before.sha, // nothing to say
            _ => self.commit(lines)?,
        };
        Ok(pushed)
    }

    fn page(&self, hub: &Hub) -> String {
        let page = format!("{}/{}", hub.endpoint, self.repo.name);
        match self.repo.revision.as_str() {
            "main" => page,
            branch => format!("{page}/tree/{branch}"),
        }
    }

    fn post(&self, action: &str, path: &str, media_type: &str, body: &str) -> Result<Answer> {
        let sent = Sent {
            media_type,
            body,
            with_token: true,
        };
        self.client.post(action, &self.client.url(path), &sent)
    }

    /// Makes the repository if it is not there; whether it did.
    fn open_repository(&mut self) -> Result<bool> {
        let name = &self.repo.name;
        let action = "look for the repository";
        let answer = self.client.get(action, &format!("api/models/{name}"))?;
        // the Hub answers so for what may not be seen, too
        let is_missing = answer.status == 404 || answer.code == "RepoNotFound";
        if !is_missing {
            let known: Value = self.client.read(action, answer)?;
            let is_public = known["private"] == json!(false);
            return match self.push.private && is_public {
                true => Err(Error::HubPublic { id: name.clone() }),
                false => Ok(false),
            };
        }
        let (owner, short) = name.split_once('/').unwrap_or(("", name));
        let mut body = json!({ "name": short, "organization": owner, "type": "model" });
        if self.push.private {
            body["private"] = json!(true);
        }
        let action = "create the repository";
        let answer = self.post(action, "api/repos/create", JSON, &body.to_string())?;
        if answer.status == 409 {
            return Ok(false); // somebody else has just made it
        }
        self.client.accepted(action, answer)?;
        (self.report)(UploadEvent::Created { repo: name });
        Ok(true)
    }

    /// Makes the branch if it is not there.
    fn open_branch(&self) -> Result<()> {
        let branch = &self.repo.revision;
        if branch == "main" || branch.starts_with("refs/") {
            return Ok(());
        }
        let action = &format!("create the branch {branch}");
        let path = format!("api/models/{}/branch/{}", self.repo.name, quoted(branch));
        let answer = retry(|| self.post(action, &path, JSON, "{}"))?;
        match answer.status {
            409 => Ok(()), // it is there
            _ => self.client.accepted(action, answer).map(|_| ()),
        }
    }

    fn list(&self) -> Result<RepoInfo> {
        let (name, revision) = (&self.repo.name, quoted(&self.repo.revision));
        let action = "list the files";
        let path = format!("api/models/{name}/revision/{revision}");
        retry(|| self.client.read(action, self.client.get(action, &path)?))
    }

    /// Weights that are there and would be read beside or before those that are pushed.
    fn left_over(&self, before: Option<&RepoInfo>) -> Vec<String> {
        let ours = |name: &str| self.push.files.iter().any(|file| file.name == name);
        if !self.push.files.iter().any(|file| is_weights(&file.name)) {
            return Vec::new();
        }
        let there = before.into_iter().flat_map(|before| &before.siblings);
        let names = there.map(|sibling| sibling.rfilename.clone());
        names
            .filter(|name| is_weights(name) && !ours(name))
            .collect()
    }

    /// Asks how each file goes to the Hub, and what is there under its name.
    fn ask_about_files(&self) -> Result<Vec<Verdict>> {
        let mut asked = Vec::new();
        for file in &self.push.files {
            let sample = STANDARD.encode(file.content.read(SAMPLE_BYTES)?);
            let size = file.content.size()?;
            asked.push(json!({ "path": file.name, "sample": sample, "size": size }));
        }
        let action = "ask how the files are sent";
        let (name, revision) = (&self.repo.name, quoted(&self.repo.revision));
        let path = format!("api/models/{name}/preupload/{revision}");
        let body = json!({ "files": asked }).to_string();
        let answer: Verdicts = retry(|| {
            self.client
                .read(action, self.post(action, &path, JSON, &body)?)
        })?;
        Ok(answer.files)
    }

    /// Brings large files to the storage, and gives the lines of the commit.
    fn bring(&mut self, verdicts: &[Verdict], pushed: &mut Pushed) -> Result<Vec<Value>> {
        let mut lines = Vec::new();
        let mut large = Vec::new();
        for file in &self.push.files {
            let name = &file.name;
            let verdict = verdicts.iter().find(|verdict| verdict.path == *name);
            let verdict = verdict.ok_or_else(|| {
                self.client
                    .unclear(&format!("upload {name}"), "it leaves the file out")
            })?;
            let size = file.content.size()?;
            if verdict.should_ignore {
                pushed.ignored.push(name.clone());
            } else if verdict.upload_mode == "lfs" && size > 0 {
                (self.report)(UploadEvent::Hashing { file: name });
                let sha256 = file.content.sha256()?;
                match verdict.oid.as_ref() == Some(&sha256) {
                    true => pushed.unchanged.push(name.clone()),
                    false => large.push(Large {
                        name,
                        content: &file.content,
                        size,
                        sha256,
                    }),
                }
            } else {
                let bytes = file.content.read(u64::MAX)?;
                match verdict.oid.as_ref() == Some(&git_sha1(&bytes)) {
                    true => pushed.unchanged.push(name.clone()),
                    false => {
                        pushed.sent.push(name.clone());
                        let content = STANDARD.encode(bytes);
                        let value =
                            json!({ "content": content, "path": name, "encoding": "base64" });
                        lines.push(json!({ "key": "file", "value": value }));
                    }
                }
            }
        }
        let (id, revision) = (&self.repo.name, &self.repo.revision);
        let sent = lfs::store(self.client, id, revision, &large, &mut *self.report)?;
        let stored = large.iter().map(|file| file.name.to_owned());
        pushed.stored = stored.filter(|name| !sent.contains(name)).collect();
        pushed.sent.extend(sent);
        lines.extend(large.iter().map(|file| {
            let value = json!({
                "path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.size,
            });
            json!({ "key": "lfsFile", "value": value })
        }));
        let removed = pushed.removed.iter();
        lines
            .extend(removed.map(|name| json!({ "key": "deletedFile", "value": { "path": name } })));
        Ok(lines)
    }

    /// Makes the commit. It is not tried again by itself: the Hub may have made it before a connection
    /// broke.
    fn commit(&self, lines: Vec<Value>) -> Result<String> {
        let header = json!({ "summary": self.push.summary, "description": "" });
        let header = json!({ "key": "header", "value": header });
        let lines = std::iter::once(header).chain(lines);
        let body: String = lines.map(|line| line.to_string() + "\n").collect();
        let action = "commit the files";
        let (name, revision) = (&self.repo.name, quoted(&self.repo.revision));
        let path = format!("api/models/{name}/commit/{revision}");
        let answer = self.post(action, &path, "application/x-ndjson", &body)?;
        let committed: Committed = self.client.read(action, answer)?;
        Ok(committed.commit_oid)
    }
}

/// A branch as one part of an address; its characters but `/` stand there as they are.
fn quoted(branch: &str) -> String {
    branch.replace('/', "%2F")
}

/// Whether a file is among those of a model's weights.
fn is_weights(name: &str) -> bool {
    let is_shard = name.starts_with("model") && name.ends_with(".safetensors");
    !name.contains('/') && (is_shard || name == INDEX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_goes_to_a_branch_of_a_repository() {
        let push = |repo, revision| Push {
            repo,
            revision,
            private: false,
            summary: "",
            files: Vec::new(),
        };
        let id = target(&push("owner/name", Some("v1/b"))).ok().unwrap();
        assert_eq!(
            (id.name.as_str(), id.revision.as_str()),
            ("owner/name", "v1/b")
        );
        let commit = "1111111111111111111111111111111111111111";
        for (repo, revision) in [
            ("name", None),
            ("a/b/c", None),
            ("owner/name@v1", None),
            ("owner/name", Some("a b")),
            ("owner/name", Some("../x")),
            ("owner/name", Some(commit)),
        ] {
            let error = target(&push(repo, revision)).err().unwrap();
            assert!(matches!(error, Error::HubNotARepository { .. }), "{error}");
        }
    }
}
