//! What can be asked: the files of a repository, and a file.

use serde_json::{Value, json};

use super::http::{Answer, Request};
use super::{Repo, Shelf, checksum, is_large};

pub fn answer(request: &Request, shelf: &mut Shelf, url: &str) -> Answer {
    let path = request.path.as_str();
    let api = ["/api/models/", "/api/datasets/"]
        .iter()
        .find_map(|api| path.strip_prefix(api));
    match api {
        Some(rest) => about(request, rest, shelf),
        None => file(request, path, shelf, url),
    }
}

/// The parts of `owner/name/rest`.
pub fn split(path: &str) -> Option<(String, &str)> {
    let (owner, rest) = path.split_once('/')?;
    let (name, rest) = rest.split_once('/').unwrap_or((rest, ""));
    Some((format!("{owner}/{name}"), rest))
}

/// A repository that may be seen.
pub fn open<'a>(shelf: &'a Shelf, name: &str, request: &Request) -> Option<&'a Repo> {
    let repo = shelf.repos.get(name)?;
    (!repo.private || request.header("authorization").is_some()).then_some(repo)
}

pub fn no_repository() -> Answer {
    Answer::new(404)
        .because("RepoNotFound")
        .saying("Repository not found")
}

pub fn no_revision(revision: &str) -> Answer {
    Answer::new(404)
        .because("RevisionNotFound")
        .saying(&format!("Invalid rev id: {revision}"))
}

fn about(request: &Request, rest: &str, shelf: &Shelf) -> Answer {
    let Some((name, rest)) = split(rest) else {
        return Answer::new(404);
    };
    let Some(repo) = open(shelf, &name, request) else {
        return no_repository();
    };
    let (what, revision) = match rest.split_once('/') {
        Some((what @ ("revision" | "tree"), revision)) => (what, revision),
        _ => ("revision", "main"),
    };
    let Some((commit, folder)) = in_repo(repo, revision) else {
        return no_revision(revision);
    };
    let files = &repo.commits[commit];
    let json = match what {
        "tree" if folder.is_empty() => files
            .iter()
            .map(|(name, bytes)| entry(name, bytes))
            .collect(),
        "tree" => return Answer::new(404).because("EntryNotFound"), // there are no folders
        _ => {
            let with_blobs = request.query.contains("blobs=true");
            let sibling = |(name, bytes): (&String, &Vec<u8>)| sibling(name, bytes, with_blobs);
            let siblings: Vec<_> = files.iter().map(sibling).collect();
            json!({ "id": name, "modelId": name, "sha": commit, "private": repo.private,
                "siblings": siblings, "tags": [], "downloads": 0, "likes": 0 })
        }
    };
    Answer::new(200)
        .header("Content-Type", "application/json")
        .with(json.to_string())
}

/// The commit and the path of `REVISION/PATH`; the name of a branch may have slashes.
fn in_repo<'r, 'p>(repo: &'r Repo, place: &'p str) -> Option<(&'r str, &'p str)> {
    let ends = place.match_indices('/').map(|(at, _)| at);
    let mut splits = ends.chain([place.len()]).map(|at| place.split_at(at));
    splits.find_map(|(revision, path)| Some((repo.commit(revision)?, path.trim_start_matches('/'))))
}

fn sibling(name: &str, bytes: &[u8], with_blobs: bool) -> Value {
    let mut file = json!({ "rfilename": name });
    if with_blobs {
        let sum = checksum(name, bytes);
        file["size"] = json!(bytes.len());
        file["blobId"] = json!(sum[..40]);
        if is_large(name, bytes.len()) {
            file["lfs"] = json!({ "sha256": sum, "size": bytes.len(), "pointerSize": 130 });
        }
    }
    file
}

/// An entry of a folder's listing.
fn entry(name: &str, bytes: &[u8]) -> Value {
    let sum = checksum(name, bytes);
    let mut file = json!({ "type": "file", "path": name, "size": bytes.len(), "oid": sum[..40] });
    if is_large(name, bytes.len()) {
        file["lfs"] = json!({ "oid": sum, "size": bytes.len(), "pointerSize": 130 });
    }
    file
}

/// `/owner/name/resolve/REVISION/FILE`, and where that leads.
fn file(request: &Request, path: &str, shelf: &mut Shelf, url: &str) -> Answer {
    let path = path.strip_prefix("/datasets").unwrap_or(path);
    let (at_cdn, path) = match path.strip_prefix("/cdn/") {
        Some(rest) => (true, rest),
        None => (false, &path[1..]),
    };
    let Some((name, rest)) = split(path) else {
        return Answer::new(404);
    };
    let Some(rest) = rest.strip_prefix("resolve/") else {
        return Answer::new(404);
    };
    if shelf.gated {
        return Answer::new(403).because("GatedRepo");
    }
    let Some(repo) = open(shelf, &name, request) else {
        return no_repository();
    };
    let Some((commit, file)) = in_repo(repo, rest) else {
        return no_revision(rest);
    };
    let commit = commit.to_string();
    let Some(bytes) = repo.file(&commit, file).map(<[u8]>::to_vec) else {
        return Answer::new(404).because("EntryNotFound");
    };
    let etag = shelf
        .etag
        .map_or_else(|| checksum(file, &bytes), str::to_string);
    let about = Answer::new(if at_cdn { 206 } else { 302 }).header("X-Repo-Commit", &commit);
    if !at_cdn && is_large(file, bytes.len()) {
        return about
            .header("X-Linked-ETag", format!("\"{etag}\""))
            .header("X-Linked-Size", bytes.len())
            .header(
                "Location",
                format!("{url}/cdn/{name}/resolve/{commit}/{file}"),
            );
    }
    let range = request
        .header("range")
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let Some((first, last)) = range else {
        return Answer::new(200)
            .header("X-Repo-Commit", &commit)
            .header("ETag", format!("\"{etag}\""))
            .with(bytes);
    };
    let first: usize = first.parse().unwrap();
    if first >= bytes.len() {
        return Answer::new(416);
    }
    let body = &bytes[first..last.parse().map_or(bytes.len(), |last: usize| last + 1)];
    let fault = (body.len() > 1).then(|| shelf.fault(file)).flatten();
    let last = first + body.len() - 1;
    Answer::new(206)
        .header("X-Repo-Commit", &commit)
        .header("ETag", format!("\"{etag}\""))
        .header(
            "Content-Range",
            format!("bytes {first}-{last}/{}", bytes.len()),
        )
        .with(body)
        .spoilt(fault)
}
