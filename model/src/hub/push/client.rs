//! The Hub's HTTP API as far as pushing needs it: who asks, what is answered, what is tried again.

use std::io::Read;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::http::Response;
use ureq::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, LOCATION};
use ureq::{Agent, Body, SendBody};

use super::super::{DEFAULT_ENDPOINT, Hub, RETRY_PAUSES_MS};
use crate::error::{Error, PushFailure, Result};

/// How long a connection may take, and how long nothing may move on it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the Hub may think about a request, a commit of many files among them.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// Most characters of the Hub's own words that are told.
const TOLD: usize = 300;

/// Sends requests about one repository.
pub(super) struct Client<'a> {
    agent: Agent,
    hub: &'a Hub,
    token: &'a str,
    id: &'a str,
}

/// What came back, whatever its status.
pub(super) struct Answer {
    pub(super) status: u16,
    /// `X-Error-Code`.
    pub(super) code: String,
    etag: Option<String>,
    /// Why not, in the Hub's words.
    said: String,
    body: String,
}

/// A body with its media type.
pub(super) struct Sent<'a> {
    pub(super) media_type: &'a str,
    pub(super) body: &'a str,
    /// Whether the token goes with it, if the Hub is asked.
    pub(super) with_token: bool,
}

/// The media type of Git LFS.
pub(super) const LFS: &str = "application/vnd.git-lfs+json";
/// The media type of the other requests.
pub(super) const JSON: &str = "application/json";

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub, id: &'a str) -> Result<Self> {
        let token = hub
            .token
            .as_deref()
            .ok_or_else(|| Error::HubNoToken { id: id.to_owned() })?;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // a repository that has moved is said so, and no token follows to another address
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("trainer/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(ANSWER_TIMEOUT))
            .timeout_per_write(Some(STALL_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .build();
        Ok(Self {
            agent: config.new_agent(),
            hub,
            token,
            id,
        })
    }

    /// The address of a path of the Hub.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.hub.endpoint)
    }

    /// An address that the Hub has given out; those of huggingface.co are asked at `HF_ENDPOINT`.
    pub(super) fn given(&self, action: &str, href: &str) -> Result<String> {
        let url = match href.strip_prefix(DEFAULT_ENDPOINT) {
            Some(rest) if rest.starts_with('/') => format!("{}{rest}", self.hub.endpoint),
            _ => href.to_owned(),
        };
        match url.starts_with("http://") || url.starts_with("https://") {
            true => Ok(url),
            false => Err(self.unclear(action, "it has an address that is none")),
        }
    }

    /// Asks for a path of the Hub.
    pub(super) fn get(&self, action: &str, path: &str) -> Result<Answer> {
        let request = self.agent.get(self.url(path));
        let request = request.header("authorization", format!("Bearer {}", self.token));
        self.answer(action, request.call())
    }

    /// Posts to an address.
    pub(super) fn post(&self, action: &str, url: &str, sent: &Sent<'_>) -> Result<Answer> {
        let mut request = self.agent.post(url).header(CONTENT_TYPE, sent.media_type);
        if sent.media_type == LFS {
            request = request.header("accept", LFS);
        }
        let path = url.strip_prefix(&self.hub.endpoint);
        if sent.with_token && path.is_some_and(|path| path.starts_with('/')) {
            request = request.header("authorization", format!("Bearer {}", self.token));
        }
        self.answer(action, request.send(sent.body))
    }

    /// Puts `length` bytes to an address of a storage, without the token.
    pub(super) fn put(
        &self,
        action: &str,
        url: &str,
        headers: &[(String, String)],
        length: u64,
        bytes: &mut dyn Read,
    ) -> Result<Answer> {
        let mut request = self.agent.put(url).header(CONTENT_LENGTH, length);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        self.answer(action, request.send(SendBody::from_reader(bytes)))
    }

    fn answer(
        &self,
        action: &str,
        response: std::result::Result<Response<Body>, ureq::Error>,
    ) -> Result<Answer> {
        let network = |error| self.failed(action, PushFailure::Network(Box::new(error)));
        let mut response = response.map_err(network)?;
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        let (etag, location) = (header(ETAG.as_str()), header(LOCATION.as_str()));
        let status = response.status().as_u16();
        let body = response.body_mut().read_to_string();
        let body = match status {
            200..300 => body.map_err(network)?,
            _ => body.unwrap_or_default(), // it only explains
        };
        let moved = location
            .filter(|_| (300..400).contains(&status))
            .map(|to| format!("it has moved to {}", to.split('?').next().unwrap_or(&to)));
        let said = moved.or(message).or_else(|| said_in(&body));
        Ok(Answer {
            status,
            code: code.unwrap_or_default(),
            etag,
            said: self.shown(&said.unwrap_or_default()),
            body,
        })
    }

    /// The Hub's words in one line, and never the token, should they repeat it.
    fn shown(&self, said: &str) -> String {
        let words: Vec<_> = said.split_whitespace().collect();
        let line = words.join(" ").replace(self.token, "…");
        line.chars()
            .filter(|c| !c.is_control())
            .take(TOLD)
            .collect()
    }

    pub(super) fn failed(&self, action: &str, source: PushFailure) -> Error {
        Error::HubPush {
            id: self.id.to_owned(),
            action: action.to_owned(),
            source,
        }
    }

    /// The answer makes no sense.
    pub(super) fn unclear(&self, action: &str, why: &str) -> Error {
        self.failed(action, PushFailure::Answer(why.to_owned()))
    }

    /// The answer, if it says that all is well.
    pub(super) fn accepted(&self, action: &str, answer: Answer) -> Result<Answer> {
        match answer.status {
            200..300 => Ok(answer),
            status => {
                let said = answer.said;
                Err(self.failed(action, PushFailure::Refused { status, said }))
            }
        }
    }

    /// What an accepted answer holds.
    pub(super) fn read<T: DeserializeOwned>(&self, action: &str, answer: Answer) -> Result<T> {
        let answer = self.accepted(action, answer)?;
        serde_json::from_str(&answer.body).map_err(|error| self.unclear(action, &error.to_string()))
    }

    /// What a storage calls the part that it has accepted.
    pub(super) fn etag(&self, action: &str, answer: Answer) -> Result<String> {
        let etag = self.accepted(action, answer)?.etag;
        etag.filter(|etag| !etag.is_empty())
            .ok_or_else(|| self.unclear(action, "it has no ETag"))
    }
}

/// Why not: the `error` or `message` of a JSON answer, or a short answer itself.
fn said_in(body: &str) -> Option<String> {
    let Ok(json) = serde_json::from_str::<Value>(body) else {
        // the storage speaks XML
        if let Some((_, rest)) = body.split_once("<Message>") {
            return rest.split_once('<').map(|(message, _)| message.to_owned());
        }
        let is_words = !body.trim_start().starts_with('<') && body.len() <= TOLD;
        return is_words.then(|| body.to_owned());
    };
    let text = ["error", "message"]
        .iter()
        .find_map(|key| match &json[key] {
            Value::String(text) => Some(text.clone()),
            Value::Object(inner) => Some(inner.get("message")?.as_str()?.to_owned()),
            _ => None,
        });
    let details: Vec<_> = json["errors"].as_array().into_iter().flatten().collect();
    let details = details
        .iter()
        .filter_map(|e| e["message"].as_str().or(e.as_str()));
    let all: Vec<_> = text.into_iter().chain(details.map(str::to_owned)).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// Tries again, after a pause, what may well succeed a moment later.
pub(super) fn retry<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    for pause in RETRY_PAUSES_MS {
        match attempt() {
            Err(error) if is_transient(&error) => {
                std::thread::sleep(Duration::from_millis(pause));
            }
            result => return result,
        }
    }
    attempt()
}

fn is_transient(error: &Error) -> bool {
    let Error::HubPush { source, .. } = error else {
        return false;
    };
    match source {
        PushFailure::Network(error) => !matches!(
            **error,
            ureq::Error::Http(_) | ureq::Error::BadUri(_) | ureq::Error::InvalidProxyUrl
        ),
        PushFailure::Refused { status, .. } => matches!(status, 408 | 429 | 500..),
        PushFailure::Answer(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hubs_reasons_are_found_wherever_they_stand() {
        for (body, said) in [
            (r#"{"error": "no"}"#, Some("no")),
            (r#"{"error": {"message": "no", "code": 1}}"#, Some("no")),
            (
                r#"{"error": "bad card", "errors": [{"message": "base_model"}]}"#,
                Some("bad card; base_model"),
            ),
            ("plain words", Some("plain words")),
            ("<html>a page</html>", None),
            (
                "<Error><Code>1</Code><Message>no</Message></Error>",
                Some("no"),
            ),
            ("{}", None),
        ] {
            assert_eq!(said_in(body).as_deref(), said, "{body}");
        }
    }
}
