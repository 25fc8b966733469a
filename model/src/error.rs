//! What can go wrong with a model folder, its tokenizer, its template or the Hub.

use std::path::PathBuf;

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can be wrong with what a user points a model at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: "read", "write", "open", …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A JSON file does not parse or has a value of the wrong type.
    #[error("{} is not valid", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// `config.json` describes a model that cannot be built; every problem is listed.
    #[error("{}:{}", path.display(), listed(problems, usize::MAX))]
    Config {
        /// The file.
        path: PathBuf,
        /// One sentence a problem, each naming its key.
        problems: Vec<String>,
    },
    /// A model folder lacks a file that is needed.
    #[error("{} has no {file}", folder.display())]
    MissingFile {
        /// The model folder.
        folder: PathBuf,
        /// The file name, or what kind of file.
        file: &'static str,
    },
    /// A model folder has weights, but none in the format that is read.
    #[error("{} has no model.safetensors, only {found}", folder.display())]
    OtherWeights {
        /// The model folder.
        folder: PathBuf,
        /// The file with weights in another format.
        found: String,
    },
    /// A safetensors file whose header or offsets cannot be trusted.
    #[error("{} is damaged: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// Tensors are missing, unexpected or of another shape; every one is listed.
    #[error("{} does not fit its config.json:{}", path.display(), listed(problems, 8))]
    Tensors {
        /// The file or folder.
        path: PathBuf,
        /// One sentence a tensor, with both shapes where they differ.
        problems: Vec<String>,
    },
    /// `tokenizer.json` does not load.
    #[error("{} is not a tokenizer that can be used", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        source: tokenizers::Error,
    },
    /// A text could not be tokenized or tokens could not be turned into text.
    #[error("the tokenizer failed")]
    Tokenize {
        /// Why.
        source: tokenizers::Error,
    },
    /// A chat template does not parse, or refuses a conversation.
    #[error("chat template {name}: {source}")]
    Template {
        /// The file or the built-in template's name.
        name: String,
        /// Why.
        source: minijinja::Error,
    },
    /// A conversation has a turn that its template does not show once and whole.
    #[error("chat template {name} does not show the content of turn {turn}")]
    TurnNotRendered {
        /// The file or the built-in template's name.
        name: String,
        /// The turn, counted from 1.
        turn: usize,
    },
    /// A token id lies outside of the vocabulary.
    #[error("token id {id} is outside of the vocabulary of {vocab_size} tokens")]
    TokenOutOfRange {
        /// The offending id.
        id: i64,
        /// The model's vocabulary size.
        vocab_size: usize,
    },
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Numbers that no choice of a token can follow; every one is listed.
    #[error("{}", problems.join("; "))]
    Sampling {
        /// One sentence a number, each naming its key.
        problems: Vec<String>,
    },
    /// A model computes NaN or infinity instead of logits.
    #[error("the model's output for token {position} of the text is not a number")]
    LogitsNotFinite {
        /// The number of tokens before the one that could not be chosen.
        position: usize,
    },
    /// A model name is neither a folder nor a Hub id.
    #[error("{name} is neither a folder nor a Hub id (owner/name or owner/name@revision)")]
    NotAModel {
        /// What was given.
        name: String,
    },
    /// A path was given and no folder is there.
    #[error("there is no folder {}", path.display())]
    NoSuchFolder {
        /// What was given.
        path: PathBuf,
    },
    /// The Hub cannot be asked because `HF_HUB_OFFLINE` is set and the cache lacks the file.
    #[error("{id} is not in the cache (no {file}) and HF_HUB_OFFLINE is set")]
    HubOffline {
        /// The repository, with its revision.
        id: String,
        /// The file that is not cached.
        file: String,
    },
    /// The Hub has no such repository, and there is no folder of that name either.
    #[error("there is no folder {id}, and the Hub has no model {id}")]
    HubNoRepository {
        /// The repository, with its revision.
        id: String,
    },
    /// The address of a data set is none.
    #[error("{address} is no data set (hf://datasets/owner/name, then perhaps /file or /folder)")]
    NotADataset {
        /// What was given.
        address: String,
    },
    /// The Hub has no such data set.
    #[error("the Hub has no data set {id}")]
    HubNoDataset {
        /// The repository, with its revision.
        id: String,
    },
    /// A data set has no file with rows in the place that was given.
    #[error(
        "the data set {id} has no .jsonl, .json, .csv, .tsv or .parquet file{}",
        in_place(path)
    )]
    HubNoData {
        /// The repository, with its revision.
        id: String,
        /// The file, folder or pattern asked for.
        path: String,
    },
    /// The repository lacks a revision or a file.
    #[error("the Hub has no {file} in {id}")]
    HubNotFound {
        /// The repository, with its revision.
        id: String,
        /// The file or the revision asked for.
        file: String,
    },
    /// The repository has no weights in the one format that is read.
    #[error("{id} has no safetensors weights ({wanted}){}", found_instead(found))]
    HubNoSafetensors {
        /// The repository, with its revision.
        id: String,
        /// The file names that would have been taken.
        wanted: String,
        /// Weights it has in other formats or under other names.
        found: Vec<String>,
    },
    /// The Hub wants a token, or the token does not give access.
    #[error(
        "the Hub refuses access to {id}: it is private, gated, or does not exist, and {}",
        token_state(*has_token)
    )]
    HubDenied {
        /// The repository, with its revision.
        id: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// A download is longer or shorter than announced; it has been deleted.
    #[error("{file} of {id} came with {found_bytes} bytes instead of {expected_bytes}")]
    HubSize {
        /// The repository, with its revision.
        id: String,
        /// The file asked for.
        file: String,
        /// What the Hub announced.
        expected_bytes: u64,
        /// What arrived.
        found_bytes: u64,
    },
    /// A download is not what the Hub has; it has been deleted.
    #[error("{file} of {id} came damaged: its checksum is not the one that the Hub lists")]
    HubChecksum {
        /// The repository, with its revision.
        id: String,
        /// The file asked for.
        file: String,
    },
    /// What to push to is no branch of a repository.
    #[error("cannot push to {name}: {problem}")]
    HubNotARepository {
        /// As given.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Nothing can be pushed because `HF_HUB_OFFLINE` is set.
    #[error("cannot push to {id}: HF_HUB_OFFLINE is set")]
    HubPushOffline {
        /// The repository.
        id: String,
    },
    /// Nothing can be pushed without a token.
    #[error("cannot push to {id}: there is no token for the Hub")]
    HubNoToken {
        /// The repository.
        id: String,
    },
    /// A push was to be private, and the repository is there and is not.
    #[error("the repository {id} is public")]
    HubPublic {
        /// The repository.
        id: String,
    },
    /// A push failed.
    #[error("cannot push to {id}: cannot {action}")]
    HubPush {
        /// The repository.
        id: String,
        /// What was tried: "create the repository", "upload model.safetensors", …
        action: String,
        /// Why it failed.
        source: PushFailure,
    },
    /// Any other failure of a download.
    #[error("cannot download {file} of {id}")]
    Hub {
        /// The repository, with its revision.
        id: String,
        /// The file asked for.
        file: String,
        /// Why.
        source: hf_hub::api::sync::ApiError,
    },
}

/// Why a request of a push failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushFailure {
    /// There is no answer.
    #[error(transparent)]
    Network(Box<ureq::Error>),
    /// The answer is no.
    #[error("the Hub answers {status}{}", reason(said))]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The Hub's reason, if it gives one.
        said: String,
    },
    /// The answer makes no sense.
    #[error("the Hub's answer is not understood: {0}")]
    Answer(String),
}

fn reason(said: &str) -> String {
    match said {
        "" => String::new(),
        said => format!(": {said}"),
    }
}

fn in_place(path: &str) -> String {
    match path {
        "" => String::new(),
        path => format!(" at {path}"),
    }
}

/// Problems behind the colon of a message: the only one on its line, several on a line each, at most
/// `most` of them.
pub fn listed(problems: &[String], most: usize) -> String {
    let [shown @ .., last] = problems else {
        return String::new();
    };
    if shown.is_empty() {
        return format!(" {last}");
    }
    let mut lines: Vec<_> = problems
        .iter()
        .take(most)
        .map(|p| format!("\n  {p}"))
        .collect();
    match problems.len() - lines.len() {
        0 => {}
        1 => lines.push("\n  and one other".into()),
        left => lines.push(format!("\n  and {left} others")),
    }
    lines.concat()
}

fn found_instead(found: &[String]) -> String {
    match found {
        [] => String::new(),
        files => format!("; it has {}", files.join(", ")),
    }
}

fn token_state(has_token: bool) -> &'static str {
    match has_token {
        true => "the token gives no access",
        false => "there is no token",
    }
}
