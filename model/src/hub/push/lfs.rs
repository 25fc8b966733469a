//! Large files: the Hub says where to put them, in one piece or in parts, and skips what it has.
//!
//! Source: git-lfs' batch API, and `huggingface_hub`'s `lfs.py` for the transfer in parts.

use std::io::Read;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::{Client, LFS, Sent, retry};
use super::{Content, UploadEvent};
use crate::error::Result;

/// Most files that one request asks about.
const BATCH_FILES: usize = 256;

/// A file for the large storage.
pub(super) struct Large<'a> {
    pub(super) name: &'a str,
    pub(super) content: &'a Content,
    pub(super) size: u64,
    pub(super) sha256: String,
}

#[derive(Deserialize)]
struct Batch {
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    error: Option<Value>,
    actions: Option<Actions>,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    header: Option<Map<String, Value>>,
}

/// Brings files to the storage of a repository; the names of those that had to be sent.
pub(super) fn store(
    client: &Client<'_>,
    id: &str,
    revision: &str,
    files: &[Large<'_>],
    report: &mut dyn FnMut(UploadEvent<'_>),
) -> Result<Vec<String>> {
    let mut sent = Vec::new();
    for some in files.chunks(BATCH_FILES) {
        let objects = ask(client, id, revision, some)?;
        for file in some {
            let action = &format!("upload {}", file.name);
            let object = objects.iter().find(|object| object.oid == file.sha256);
            let object = object.ok_or_else(|| client.unclear(action, "it leaves the file out"))?;
            if let Some(error) = &object.error {
                let said = error["message"].as_str().unwrap_or("it gives no reason");
                return Err(client.unclear(action, said));
            }
            let Some(actions) = &object.actions else {
                continue; // the storage has it
            };
            if let Some(upload) = &actions.upload {
                send(client, action, file, upload, report)?;
                sent.push(file.name.to_owned());
            }
            if let Some(verify) = &actions.verify {
                let url = client.given(action, &verify.href)?;
                let body = json!({ "oid": file.sha256, "size": file.size });
                post(client, action, &url, &body, true)?;
            }
        }
    }
    Ok(sent)
}

/// Asks which files are to be sent, and whereto.
fn ask(client: &Client<'_>, id: &str, revision: &str, files: &[Large<'_>]) -> Result<Vec<Object>> {
    let action = "ask where large files go";
    let objects: Vec<_> = files
        .iter()
        .map(|file| json!({ "oid": file.sha256, "size": file.size }))
        .collect();
    let body = json!({
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": objects,
        "hash_algo": "sha256",
        "ref": { "name": revision },
    })
    .to_string();
    let url = client.url(&format!("{id}.git/info/lfs/objects/batch"));
    let sent = Sent {
        media_type: LFS,
        body: &body,
        with_token: true,
    };
    let batch: Batch = retry(|| client.read(action, client.post(action, &url, &sent)?))?;
    Ok(batch.objects)
}

fn post(
    client: &Client<'_>,
    action: &str,
    url: &str,
    body: &Value,
    with_token: bool,
) -> Result<()> {
    let sent = Sent {
        media_type: LFS,
        body: &body.to_string(),
        with_token,
    };
    retry(|| client.accepted(action, client.post(action, url, &sent)?))?;
    Ok(())
}

fn send(
    client: &Client<'_>,
    action: &str,
    file: &Large<'_>,
    upload: &Action,
    report: &mut dyn FnMut(UploadEvent<'_>),
) -> Result<()> {
    report(UploadEvent::Started {
        file: file.name,
        total_bytes: file.size,
    });
    let url = client.given(action, &upload.href)?;
    let empty = Map::new();
    let header = upload.header.as_ref().unwrap_or(&empty);
    let mut reported = 0;
    let mut put = |url: &str, headers: &[(String, String)], from: u64, length: u64| {
        retry(|| {
            let mut meter = Meter {
                inner: file.content.open(from)?.take(length),
                position: from,
                reported: &mut reported,
                report: &mut *report,
            };
            client
                .put(action, url, headers, length, &mut meter)
                .and_then(|answer| client.accepted(action, answer))
        })
    };
    match header.get("chunk_size") {
        None => {
            let text =
                |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
            let headers: Vec<_> = header.iter().filter_map(text).collect();
            put(&url, &headers, 0, file.size)?;
        }
        Some(size) => {
            let parts = parts(size, header, file.size)
                .ok_or_else(|| client.unclear(action, "its parts are not those of the file"))?;
            let mut done = Vec::new();
            for (index, part) in parts.iter().enumerate() {
                let url = client.given(action, part.url)?;
                let etag = client.etag(action, put(&url, &[], part.from, part.length)?)?;
                done.push(json!({ "partNumber": index + 1, "etag": etag }));
            }
            let body = json!({ "oid": file.sha256, "parts": done });
            post(client, action, &url, &body, false)?; // the address is signed
        }
    }
    report(UploadEvent::Finished { file: file.name });
    Ok(())
}

/// A piece of a file, and where it goes.
#[derive(Debug, PartialEq)]
struct Part<'a> {
    url: &'a str,
    from: u64,
    length: u64,
}

/// The parts that the keys `1`, `2`, … of a header ask for; none if they do not make up the file.
fn parts<'a>(size: &Value, header: &'a Map<String, Value>, total: u64) -> Option<Vec<Part<'a>>> {
    let size = size.as_u64().or_else(|| size.as_str()?.parse().ok());
    let size = size.filter(|size| *size > 0)?;
    let number = |(key, url): (&String, &'a Value)| Some((key.parse::<u64>().ok()?, url.as_str()?));
    let mut urls: Vec<_> = header.iter().filter_map(number).collect();
    urls.sort_unstable();
    let is_whole = urls.len() as u64 == total.div_ceil(size);
    let part = |(index, (_, url)): (usize, (u64, &'a str))| {
        let from = index as u64 * size;
        let length = size.min(total - from);
        Part { url, from, length }
    };
    is_whole.then(|| urls.into_iter().enumerate().map(part).collect())
}

/// Counts what is read, over all tries, so that events only go forward.
struct Meter<'a, R> {
    inner: R,
    position: u64,
    reported: &'a mut u64,
    report: &'a mut dyn FnMut(UploadEvent<'_>),
}

impl<R: Read> Read for Meter<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.position += read as u64;
        if self.position > *self.reported {
            let bytes = self.position - *self.reported;
            *self.reported = self.position;
            (self.report)(UploadEvent::Advanced { bytes });
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_sorted_by_number_and_make_up_the_file() {
        let header = json!({ "chunk_size": "4", "2": "b", "10": "j", "1": "a", "3": "c" });
        let header = header.as_object().unwrap();
        assert_eq!(
            parts(&header["chunk_size"], header, 12),
            None,
            "three parts, not four"
        );
        let four = parts(&json!(4), header, 14).unwrap();
        let urls: Vec<_> = four.iter().map(|part| part.url).collect();
        assert_eq!(urls, ["a", "b", "c", "j"]);
        assert_eq!((four[3].from, four[3].length), (12, 2));
        assert_eq!(parts(&json!(0), header, 12), None);
    }
}
