//! A small Hub on this machine, for the tests of this crate and of the program.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;

/// The commit of `main`.
pub const MAIN: &str = "1111111111111111111111111111111111111111";

/// What the server does wrong once, with the named file.
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    /// Closes the connection after half of the bytes.
    Cut,
    /// Sends half of the bytes as if they were all.
    Short,
}

/// The repository `acme/tiny`, a model and a data set: files by commit, commits by revision.
#[derive(Default)]
pub struct Shelf {
    pub revisions: BTreeMap<&'static str, &'static str>,
    pub files: BTreeMap<(&'static str, &'static str), Vec<u8>>,
    pub token: Option<&'static str>,
    /// Everyone may list the files, nobody may have them.
    pub gated: bool,
    pub etag: Option<&'static str>,
    pub status: Option<u16>,
    pub faults: Vec<(&'static str, Fault)>,
    pub requests: Vec<String>,
}

/// A server that answers as the Hub does; large files are redirected to a "CDN", as there.
pub struct FakeHub {
    pub endpoint: String,
    pub shelf: Arc<Mutex<Shelf>>,
    pub folder: tempfile::TempDir,
}

impl FakeHub {
    pub fn start(files: &[(&'static str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let mut shelf = Shelf::default();
        shelf.revisions.insert("main", MAIN);
        for (name, bytes) in files {
            shelf.files.insert((MAIN, name), bytes.clone());
        }
        let shelf = Arc::new(Mutex::new(shelf));
        let (served, url) = (shelf.clone(), endpoint.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (shelf, url) = (served.clone(), url.clone());
                std::thread::spawn(move || answer(&stream.unwrap(), &shelf, &url));
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

fn answer(stream: &TcpStream, shelf: &Mutex<Shelf>, url: &str) {
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_string();
    let headers: Vec<(String, String)> = lines
        .take_while(|line| !line.is_empty())
        .map(|line| {
            line.split_once(": ")
                .map(|(name, value)| (name.to_lowercase(), value.to_string()))
                .unwrap()
        })
        .collect();
    let header = |name: &str| {
        headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    };

    let shelf = &mut *shelf.lock().unwrap();
    shelf
        .requests
        .push(format!("{path} {}", header("range").unwrap_or("")));
    let send = |status: u16, headers: &str, length: usize, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        let _ = (&mut &*stream).write_all(&[head.as_bytes(), body].concat());
    };
    if let Some(status) = shelf.status {
        return send(status, "", 4, b"oops");
    }
    if shelf
        .token
        .is_some_and(|token| header("authorization") != Some(&format!("Bearer {token}")))
    {
        return send(401, "X-Error-Code: RepoNotFound\r\n", 0, b"");
    }
    let known = |revision: &str| match shelf.revisions.get(revision) {
        Some(commit) => Some(*commit),
        None => shelf
            .revisions
            .values()
            .find(|commit| **commit == revision)
            .copied(),
    };
    let listed = ["/api/models", "/api/datasets"]
        .iter()
        .find_map(|api| path.strip_prefix(api)?.strip_prefix("/acme/tiny/revision/"));
    if let Some(revision) = listed {
        let Some(commit) = known(revision.trim_end_matches("?blobs=true")) else {
            return send(404, "X-Error-Code: RevisionNotFound\r\n", 0, b"");
        };
        let files = shelf.files.iter().filter(|((of, _), _)| *of == commit);
        let siblings: Vec<_> = files
            .map(|((_, name), bytes)| json!({ "rfilename": name, "size": bytes.len() }))
            .collect();
        let body = json!({ "id": "acme/tiny", "sha": commit, "siblings": siblings }).to_string();
        return send(200, "", body.len(), body.as_bytes());
    }
    let path = path.strip_prefix("/datasets").unwrap_or(&path);
    let Some((place, rest)) = path
        .strip_prefix("/acme/tiny/resolve/")
        .map(|rest| ("hub", rest))
        .or_else(|| path.strip_prefix("/cdn/").map(|rest| ("cdn", rest)))
    else {
        return send(404, "", 0, b"");
    };
    if shelf.gated {
        return send(403, "X-Error-Code: GatedRepo\r\n", 0, b"");
    }
    let (revision, name) = rest.split_once('/').unwrap();
    let commit = known(revision).unwrap();
    let Some((&(_, name), bytes)) = shelf
        .files
        .iter()
        .find(|((of, known), _)| *of == commit && *known == name)
    else {
        return send(404, "X-Error-Code: EntryNotFound\r\n", 0, b"");
    };
    let etag = shelf.etag.map_or_else(
        || format!("{:x}{}", bytes.len(), name.replace(['/', '.'], "")),
        str::to_string,
    );
    let about = format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\n");
    if place == "hub" && name.ends_with(".safetensors") {
        let about = about.replace("ETag", "X-Linked-ETag");
        return send(
            302,
            &format!("{about}Location: {url}/cdn/{rest}\r\n"),
            0,
            b"",
        );
    }
    let (first, last) = header("range")
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'))
        .unwrap();
    let first: usize = first.parse().unwrap();
    if first >= bytes.len() {
        return send(416, "", 0, b"");
    }
    let body = &bytes[first..last.parse().map_or(bytes.len(), |last: usize| last + 1)];
    let about = format!(
        "{about}Content-Range: bytes {first}-{}/{}\r\n",
        first + body.len() - 1,
        bytes.len()
    );
    let fault = shelf
        .faults
        .iter()
        .position(|(at, _)| *at == name && body.len() > 1);
    match fault.map(|at| shelf.faults.remove(at).1) {
        Some(Fault::Cut) => send(206, &about, body.len(), &body[..body.len() / 2]),
        Some(Fault::Short) => send(206, &about, body.len() / 2, &body[..body.len() / 2]),
        None => send(206, &about, body.len(), body),
    }
}
