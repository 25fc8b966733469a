//! What can be changed: repositories, branches, files, the storage of large ones.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::http::{Answer, Request};
use super::read::{no_repository, no_revision, open, split};
use super::{Repo, Shelf, checksum, is_large};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn json(value: &Value) -> Answer {
    Answer::new(200)
        .header("Content-Type", "application/json")
        .with(value.to_string())
}

pub fn answer(request: &Request, shelf: &mut Shelf, url: &str) -> Answer {
    let path = request.path.trim_start_matches('/');
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    match path {
        "api/repos/create" => return create(&body, shelf, url),
        "api/validate-yaml" => {
            let problem = wrong_in_card(body["content"].as_str().unwrap());
            let errors: Vec<_> = problem.iter().map(|p| json!({ "message": p })).collect();
            return json(&json!({ "errors": errors, "warnings": [] }));
        }
        _ => {}
    }
    if let Some((name, rest)) = path.split_once(".git/info/lfs/") {
        return match rest {
            "objects/batch" if shelf.repos.contains_key(name) => batch(name, &body, shelf, url),
            "verify" => verify(&body, shelf),
            _ => no_repository(),
        };
    }
    let api = ["api/models/", "api/datasets/"]
        .iter()
        .find_map(|api| path.strip_prefix(api));
    let Some((name, rest)) = api.and_then(split) else {
        return Answer::new(404);
    };
    if open(shelf, &name, request).is_none() {
        return no_repository();
    }
    let repo = shelf.repos.get_mut(&name).unwrap();
    match rest.split_once('/') {
        Some(("branch", branch)) => make_branch(repo, branch, &body),
        Some(("preupload", revision)) => look_at(repo, revision, &body),
        Some(("commit", revision)) => commit(&name, revision, &request.body, shelf, url),
        _ => Answer::new(404),
    }
}

fn create(body: &Value, shelf: &mut Shelf, url: &str) -> Answer {
    let part = |key: &str| body[key].as_str().unwrap_or("acme").to_string();
    let name = format!("{}/{}", part("organization"), part("name"));
    let url = format!("{url}/{name}");
    if shelf.repos.contains_key(&name) {
        let said = json!({ "error": "You already created this model repo", "url": url });
        return Answer::new(409).with(said.to_string());
    }
    let mut repo = Repo {
        private: body["private"] == true || body["visibility"] == "private",
        ..Repo::default()
    };
    let files = [(
        ".gitattributes".to_string(),
        b"*.safetensors filter=lfs\n".to_vec(),
    )];
    add(&mut repo, "main", files.into());
    shelf.repos.insert(name.clone(), repo);
    json(&json!({ "url": url, "name": name, "id": "1" }))
}

/// A new commit on a branch.
fn add(repo: &mut Repo, branch: &str, files: BTreeMap<String, Vec<u8>>) -> String {
    let seed = format!("{branch} {} {:?}", repo.commits.len(), files.keys());
    let id = hex(&Sha1::digest(seed));
    repo.commits.insert(id.clone(), files);
    repo.revisions.insert(branch.to_string(), id.clone());
    id
}

fn make_branch(repo: &mut Repo, branch: &str, body: &Value) -> Answer {
    if repo.revisions.contains_key(branch) {
        return Answer::new(409).saying("Reference already exists");
    }
    let start = body["startingPoint"].as_str().unwrap_or("main");
    let Some(commit) = repo.commit(start).map(str::to_string) else {
        return no_revision(start);
    };
    repo.revisions.insert(branch.to_string(), commit);
    json(&json!({}))
}

/// How the files of a push are to come.
fn look_at(repo: &Repo, revision: &str, body: &Value) -> Answer {
    if repo.commit(revision).is_none() {
        return no_revision(revision);
    }
    let files = body["files"].as_array().unwrap().iter().map(|file| {
        let (path, size) = (
            file["path"].as_str().unwrap(),
            file["size"].as_u64().unwrap(),
        );
        let sample = STANDARD.decode(file["sample"].as_str().unwrap()).unwrap();
        assert_eq!(
            sample.len() as u64,
            size.min(512),
            "the first bytes of {path}"
        );
        let mode = match is_large(path, size as usize) {
            true => "lfs",
            false => "regular",
        };
        let there = repo.file(revision, path);
        json!({ "path": path, "uploadMode": mode, "shouldIgnore": path.ends_with(".ignored"),
            "oid": there.map(|bytes| checksum(path, bytes)) })
    });
    let files: Vec<_> = files.collect();
    json(&json!({ "files": files }))
}

fn batch(name: &str, body: &Value, shelf: &Shelf, url: &str) -> Answer {
    assert!(
        body["transfers"]
            .as_array()
            .unwrap()
            .contains(&json!("basic"))
    );
    let objects = body["objects"].as_array().unwrap().iter().map(|object| {
        let (oid, size) = (
            object["oid"].as_str().unwrap(),
            object["size"].as_u64().unwrap(),
        );
        let mut answer = json!({ "oid": oid, "size": size });
        if !shelf.storage.contains_key(oid) {
            let verify = json!({ "href": format!("{url}/{name}.git/info/lfs/verify") });
            let upload = upload(oid, size as usize, shelf.part_bytes, url);
            answer["actions"] = json!({ "upload": upload, "verify": verify });
        }
        answer
    });
    let objects: Vec<_> = objects.collect();
    json(&json!({ "transfer": "basic", "objects": objects }))
}

fn upload(oid: &str, size: usize, part_bytes: Option<usize>, url: &str) -> Value {
    let place = format!("{url}/storage/{oid}");
    let Some(part) = part_bytes.filter(|part| *part < size) else {
        return json!({ "href": place, "header": {} });
    };
    let mut header = json!({ "chunk_size": part.to_string() });
    for number in 1..=size.div_ceil(part) {
        header[number.to_string()] = json!(format!("{place}/{number}"));
    }
    json!({ "href": format!("{place}/complete"), "header": header })
}

fn verify(body: &Value, shelf: &Shelf) -> Answer {
    let there = shelf.storage.get(body["oid"].as_str().unwrap());
    match there.is_some_and(|bytes| json!(bytes.len()) == body["size"]) {
        true => json(&json!({})),
        false => Answer::new(404).saying("Not in the storage"),
    }
}

/// The storage knows no tokens, as that of the Hub: its addresses are signed.
pub fn storage(request: &Request, rest: &str, shelf: &mut Shelf) -> Answer {
    if request.header("authorization").is_some() {
        return Answer::new(400).with("<Error>Only one auth mechanism allowed</Error>");
    }
    let (oid, part) = rest.split_once('/').unwrap_or((rest, ""));
    let whole = match (request.method.as_str(), part) {
        ("PUT", _) if request.header("content-length").is_none() => return Answer::new(501),
        ("PUT", "") => request.body.clone(),
        ("PUT", number) => {
            let key = (oid.to_string(), number.parse().unwrap());
            let etag = format!("\"{}\"", hex(&Sha1::digest(&request.body)));
            shelf.parts.insert(key, request.body.clone());
            return Answer::new(200).header("ETag", etag);
        }
        ("POST", "complete") => {
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            let mut whole = Vec::new();
            for part in body["parts"].as_array().unwrap() {
                let number = part["partNumber"].as_u64().unwrap() as usize;
                let bytes = shelf.parts.remove(&(oid.to_string(), number)).unwrap();
                let etag = format!("\"{}\"", hex(&Sha1::digest(&bytes)));
                assert_eq!(part["etag"], etag);
                whole.extend(bytes);
            }
            whole
        }
        _ => return Answer::new(405),
    };
    if hex(&Sha256::digest(&whole)) != oid {
        return Answer::new(400).with("<Error>BadDigest</Error>");
    }
    shelf.storage.insert(oid.to_string(), whole);
    json(&json!({}))
}

fn commit(name: &str, revision: &str, lines: &[u8], shelf: &mut Shelf, url: &str) -> Answer {
    let repo = &shelf.repos[name];
    let Some(parent) = repo.commit(revision) else {
        return no_revision(revision);
    };
    let mut files = repo.commits[parent].clone();
    let lines = String::from_utf8(lines.to_vec()).unwrap();
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let (key, value) = (line["key"].as_str().unwrap(), &line["value"]);
        let path = value["path"].as_str().unwrap_or_default().to_string();
        match key {
            "header" => assert!(value["summary"].is_string()),
            "file" => {
                let bytes = STANDARD.decode(value["content"].as_str().unwrap()).unwrap();
                let text = String::from_utf8_lossy(&bytes);
                if let Some(problem) = (path == "README.md")
                    .then(|| wrong_in_card(&text))
                    .flatten()
                {
                    return Answer::new(400).saying(&problem);
                }
                files.insert(path, bytes);
            }
            "lfsFile" => match shelf.storage.get(value["oid"].as_str().unwrap()) {
                Some(bytes) => drop(files.insert(path, bytes.clone())),
                None => {
                    return Answer::new(400)
                        .saying("LFS pointer points to a file that is not there");
                }
            },
            "deletedFile" => drop(files.remove(&path)),
            other => return Answer::new(400).saying(other),
        }
    }
    let repo = shelf.repos.get_mut(name).unwrap();
    let id = add(repo, revision, files);
    json(&json!({ "success": true, "commitOid": id, "hookOutput": "",
        "commitUrl": format!("{url}/{name}/commit/{id}") }))
}

/// The Hub takes no card whose base model is no model of the Hub.
fn wrong_in_card(text: &str) -> Option<String> {
    let base = text
        .lines()
        .find_map(|line| line.strip_prefix("base_model: "))?
        .trim_matches('"');
    let is_id = base.split('/').count() <= 2 && !base.starts_with(['/', '.']);
    (!is_id).then(|| format!("\"base_model\" with value \"{base}\" is not valid"))
}
