//! A small Hub on this machine, for the tests of this crate and of the program, and by itself as the
//! example `local_hub`. It speaks to `huggingface_hub`, too, see `check.py` beside this file.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use http::{Answer, Request};

mod http;
mod read;
mod write;

/// The commit of `main` in `acme/tiny`.
pub const MAIN: &str = "1111111111111111111111111111111111111111";
/// The repository that a server starts with, as a model and as a data set.
const TINY: &str = "acme/tiny";

/// An error and its causes, as a user reads them.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// What the server does wrong once.
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    /// Closes the connection after half of the bytes.
    Cut,
    /// Sends half of the bytes as if they were all.
    Short,
    /// Sends all bytes, and the last one is another.
    Damage,
    /// Sends half of the bytes, and nothing more until the other side has gone.
    Stall,
    /// Refuses, for good.
    Refuse,
}

/// A repository: files by commit, commits by revision.
#[derive(Default)]
pub struct Repo {
    pub private: bool,
    pub revisions: BTreeMap<String, String>,
    pub commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

/// All that the server has and does.
#[derive(Default)]
pub struct Shelf {
    pub repos: BTreeMap<String, Repo>,
    /// Large files by their SHA-256.
    pub storage: BTreeMap<String, Vec<u8>>,
    /// Parts of large files that are not complete.
    pub parts: BTreeMap<(String, usize), Vec<u8>>,
    /// Large files are to come in parts of so many bytes.
    pub part_bytes: Option<usize>,
    /// Without it nothing is shown. Writing needs a token in any case.
    pub token: Option<&'static str>,
    /// Nobody may write.
    pub read_only: bool,
    /// Everyone may list the files, nobody may have them.
    pub gated: bool,
    pub etag: Option<&'static str>,
    pub status: Option<u16>,
    /// For a file by name when it is sent to someone, by checksum when it comes.
    pub faults: Vec<(String, Fault)>,
    /// What was asked for: `/path RANGE`, or `METHOD /path` where something comes.
    pub requests: Vec<String>,
}

impl Shelf {
    fn tiny(&mut self) -> &mut Repo {
        self.repos.entry(TINY.into()).or_default()
    }

    /// Puts a file into a commit of `acme/tiny`.
    pub fn put(&mut self, commit: &str, name: &str, bytes: Vec<u8>) {
        let files = self.tiny().commits.entry(commit.into()).or_default();
        files.insert(name.into(), bytes);
    }

    /// Takes a file out of `main` of `acme/tiny`.
    pub fn remove(&mut self, name: &str) {
        let files = self.tiny().commits.get_mut(MAIN).unwrap();
        files.remove(name).unwrap();
    }

    /// Lets a name stand for a commit of `acme/tiny`.
    pub fn name(&mut self, revision: &str, commit: &str) {
        self.tiny().revisions.insert(revision.into(), commit.into());
    }

    /// A file of a branch.
    pub fn file(&self, repo: &str, branch: &str, name: &str) -> Option<&[u8]> {
        self.repos.get(repo)?.file(branch, name)
    }

    /// The fault that is due, once.
    fn fault(&mut self, name: &str) -> Option<Fault> {
        let at = self.faults.iter().position(|(at, _)| at == name)?;
        Some(self.faults.remove(at).1)
    }
}

impl Repo {
    /// The commit that a branch or a commit's own name stands for.
    fn commit(&self, revision: &str) -> Option<&str> {
        let known = self.revisions.get(revision).map(String::as_str);
        known.or_else(|| {
            self.commits
                .get_key_value(revision)
                .map(|(id, _)| id.as_str())
        })
    }

    fn file(&self, revision: &str, name: &str) -> Option<&[u8]> {
        let files = self.commits.get(self.commit(revision)?)?;
        files.get(name).map(Vec::as_slice)
    }
}

/// A server that answers as the Hub does; large files are redirected to a "CDN", as there.
pub struct FakeHub {
    pub endpoint: String,
    pub shelf: Arc<Mutex<Shelf>>,
    pub folder: tempfile::TempDir,
}

impl FakeHub {
    /// With `acme/tiny`, on any free port.
    pub fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let hub = Self::listen(0);
        hub.change(|shelf| {
            shelf.name("main", MAIN);
            for (name, bytes) in files {
                shelf.put(MAIN, name, bytes.clone());
            }
        });
        hub
    }

    /// With nothing, on a port.
    pub fn listen(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let (served, url) = (shelf.clone(), endpoint.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shelf, url) = (served.clone(), url.clone());
                std::thread::spawn(move || http::serve(&stream, &shelf, &url));
            }
        });
        Self {
            endpoint,
            shelf,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn change(&self, change: impl FnOnce(&mut Shelf)) {
        change(&mut self.shelf.lock().unwrap());
    }
}

/// What the Hub calls a content: its SHA-256 if it is large, else git's checksum.
pub fn checksum(name: &str, bytes: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    match is_large(name, bytes.len()) {
        true => hex(&Sha256::digest(bytes)),
        false => {
            let head = format!("blob {}\0", bytes.len());
            hex(&Sha1::digest([head.as_bytes(), bytes].concat()))
        }
    }
}

fn is_large(name: &str, bytes: usize) -> bool {
    let ends = [".safetensors", ".bin", ".parquet"];
    bytes > 10 << 20 || ends.iter().any(|end| name.ends_with(end))
}

/// Answers a request, all of which has come.
fn answer(request: &Request, shelf: &mut Shelf, url: &str) -> Answer {
    if let Some(status) = shelf.status {
        return Answer::new(status).with("oops");
    }
    if let Some(rest) = request.path.strip_prefix("/storage/") {
        return write::storage(request, rest, shelf);
    }
    let bearer = request.header("authorization");
    let is_right = |token| bearer == Some(&format!("Bearer {token}"));
    if shelf.token.is_some_and(|token| !is_right(token)) {
        return Answer::new(401).because("RepoNotFound");
    }
    if request.method == "GET" || request.method == "HEAD" {
        return read::answer(request, shelf, url);
    }
    if bearer.is_none() {
        return Answer::new(401).with(r#"{"error": "Invalid username or password."}"#);
    }
    if shelf.read_only {
        let words = "You don't have the rights to create a model under the namespace \"acme\"";
        return Answer::new(403).saying(words);
    }
    write::answer(request, shelf, url)
}
