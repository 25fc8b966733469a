//! What can be wrong with a run and with the data it is given.

use std::path::{Path, PathBuf};

use crate::data::check::Found;
use crate::data::{Format, Place};

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can be wrong with what a run reads or writes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model folder, its tokenizer or its template fails.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] adapters::Error),
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
    /// No data file was named.
    #[error("no data file is given")]
    NoData,
    /// A data path names nothing.
    #[error("there is no data file or folder {}", path.display())]
    NoSuchData {
        /// What was given.
        path: PathBuf,
    },
    /// A data folder has nothing that is read.
    #[error("the folder {} has no .jsonl, .json, .csv, .tsv or .parquet file", path.display())]
    NoDataFiles {
        /// The folder.
        path: PathBuf,
    },
    /// A pattern for data files matches nothing.
    #[error("no file matches {}", path.display())]
    NoMatch {
        /// The pattern.
        path: PathBuf,
    },
    /// A pattern for data files is none.
    #[error("there is no file {}, and it is no pattern either", path.display())]
    BadPattern {
        /// What was given.
        path: PathBuf,
        /// Why.
        source: glob::PatternError,
    },
    /// A data file is of a kind that is not read.
    #[error(
        "{} is not read: data files are .jsonl, .json, .csv, .tsv or .parquet",
        path.display()
    )]
    DataFileKind {
        /// The file.
        path: PathBuf,
    },
    /// A data file has no rows.
    #[error("{} is empty: it has no rows", path.display())]
    EmptyData {
        /// The file.
        path: PathBuf,
    },
    /// A data file has bytes that are not UTF-8.
    #[error("{place} is not UTF-8")]
    NotUtf8 {
        /// The line.
        place: Place,
    },
    /// A line, or a part of an array, does not parse. The source is part of the message: its own
    /// words would count lines from the start of the row.
    #[error("{place} is not valid JSON: {} (column {})", json_reason(cause), cause.column())]
    BadJson {
        /// The line.
        place: Place,
        /// Why.
        cause: serde_json::Error,
    },
    /// A cell of a table that must hold JSON does not.
    #[error("{place}: {column} is not valid JSON: {}", json_reason(cause))]
    BadCell {
        /// The row.
        place: Place,
        /// The column.
        column: String,
        /// Why.
        cause: serde_json::Error,
    },
    /// A row of a table is longer or shorter than its header.
    #[error("{place}: the row has {cells} cells, and the header has {columns}")]
    CellCount {
        /// The row.
        place: Place,
        /// Its cells.
        cells: usize,
        /// The columns of the header.
        columns: usize,
    },
    /// Two columns of a table have the same name.
    #[error("{place}: two columns are called {column:?}")]
    ColumnTwice {
        /// The header.
        place: Place,
        /// The name.
        column: String,
    },
    /// A Parquet file is damaged, or has something that is not read.
    #[error("{} cannot be read as Parquet", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Why.
        source: parquet::errors::ParquetError,
    },
    /// The tokens of the rows are too many for the memory, and cannot be written to disk.
    #[error("cannot keep the tokens of the rows in the temporary folder {}", folder.display())]
    Temporary {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A value of a row has the wrong type.
    #[error("{place}: {key} must be {expected}, found {found}")]
    WrongType {
        /// The row.
        place: Place,
        /// The value, as `messages[0].role`.
        key: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A row does not say which task it is of, and the adapter tells tasks apart.
    #[error(
        "{place}: task_id must be a whole number below adapter.num_tasks = {tasks}, found {}",
        found.as_deref().unwrap_or("nothing")
    )]
    Task {
        /// The row.
        place: Place,
        /// How many tasks there are.
        tasks: usize,
        /// What the row says instead.
        found: Option<String>,
    },
    /// A row lacks a column that the chosen format needs.
    #[error(
        "{place}: a row of the format {format} needs the column {column}, found {}",
        list(found)
    )]
    MissingColumn {
        /// The row.
        place: Place,
        /// The format the recipe asks for.
        format: Format,
        /// What is missing.
        column: &'static str,
        /// The columns of the row.
        found: Vec<String>,
    },
    /// No format has the columns of a row.
    #[error(
        "{place}: no format fits the columns {}; the formats are {}",
        list(found),
        Format::overview()
    )]
    UnknownColumns {
        /// The row.
        place: Place,
        /// The columns of the row.
        found: Vec<String>,
    },
    /// A row holds something that this version cannot train on.
    #[error("{place}: {what} are not supported yet")]
    UnsupportedRow {
        /// The row.
        place: Place,
        /// What it holds, with its columns.
        what: &'static str,
    },
    /// A turn of a conversation is by someone unknown.
    #[error(
        "{place}: {key} is {role:?}, which is none of the roles human, user, gpt, assistant, \
         model, chatgpt, bing, bard, system, tool, observation"
    )]
    UnknownRole {
        /// The row.
        place: Place,
        /// The turn's key, as `conversations[0].from`.
        key: String,
        /// What it says.
        role: String,
    },
    /// A conversation has nothing to train on.
    #[error(
        "{place}: there is no assistant turn to train on, only {}",
        list(roles)
    )]
    NoAssistantTurn {
        /// The row.
        place: Place,
        /// Who speaks instead.
        roles: Vec<String>,
    },
    /// A row of text, and no tokenizer.
    #[error("{place}: a row of text needs a tokenizer, and there is no {}", tokenizer.display())]
    NoTokenizer {
        /// The row.
        place: Place,
        /// The `tokenizer.json` that the model folder lacks.
        tokenizer: PathBuf,
    },
    /// A conversation, and no chat template that takes it.
    #[error(
        "{place}: the model {} has no chat template, and without data.chat_template a row is one \
         user and one assistant turn; this one has the turns {}", model.display(), list(roles)
    )]
    NoTemplate {
        /// The row.
        place: Place,
        /// The model folder.
        model: PathBuf,
        /// Who speaks in it.
        roles: Vec<String>,
    },
    /// A row that the chat template or the tokenizer does not take.
    #[error("{place} cannot be turned into tokens")]
    Encode {
        /// The row.
        place: Place,
        /// Why.
        source: model::Error,
    },
    /// A row has a token id outside of the vocabulary.
    #[error(
        "{place}: {key} has the id {id}, which is outside of the vocabulary of {vocab_size} tokens"
    )]
    TokenOutOfRange {
        /// The row.
        place: Place,
        /// Where it is: `input_ids`, `labels`, or the tokenizer's ids of a text.
        key: &'static str,
        /// The offending id.
        id: i64,
        /// The model's vocabulary size.
        vocab_size: usize,
    },
    /// A row has another number of labels than of tokens.
    #[error("{place}: there are {input_ids} input_ids and {labels} labels")]
    LabelsLength {
        /// The row.
        place: Place,
        /// How many `input_ids` it has.
        input_ids: usize,
        /// How many `labels` it has.
        labels: usize,
    },
    /// A row is longer than allowed, and the recipe forbids that.
    #[error("{place} has {tokens} tokens, more than data.max_length = {max_length}")]
    TooLong {
        /// The row.
        place: Place,
        /// Its length.
        tokens: usize,
        /// The longest length allowed.
        max_length: usize,
    },
    /// Every row was too long.
    #[error(
        "{} longer than data.max_length = {max_length} tokens",
        if *rows == 1 { "the only row is".to_owned() } else { format!("all {rows} rows are") }
    )]
    AllDropped {
        /// How many rows were read.
        rows: usize,
        /// The longest length allowed.
        max_length: usize,
    },
    /// Rows without a trained token.
    #[error(
        "{} of the rows have no trained token within data.max_length = {max_length}: {rows}",
        rows.count
    )]
    NothingTrained {
        /// These.
        rows: Found,
        /// The longest length allowed.
        max_length: usize,
    },
    /// There are too few rows to hold some back.
    #[error(
        "data.eval_fraction = {fraction} of {rows} rows cannot be held back: at least one row must \
         be held back and one must be left"
    )]
    EvalFraction {
        /// How many rows there are.
        rows: usize,
        /// The share asked for.
        fraction: f64,
    },
    /// A JSON file does not parse.
    #[error("{} is not valid", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A folder without the files of a run.
    #[error(
        "{} {}", path.display(),
        if path.exists() { "is not the folder of a run: it has no metrics.jsonl" } else { "does not exist" }
    )]
    NotARun {
        /// What was given.
        path: PathBuf,
    },
    /// A run folder without metrics.
    #[error("{} has no metrics: the run has not taken a step", path.display())]
    NoMetrics {
        /// The run folder.
        path: PathBuf,
    },
    /// No line of a run's metrics can be read.
    #[error("no line of {} is one of metrics: line {line} of it does not parse", path.display())]
    BadMetrics {
        /// The file.
        path: PathBuf,
        /// The first line that is none.
        line: usize,
        /// Why.
        #[source]
        cause: serde_json::Error,
    },
    /// A recipe cannot be read.
    #[error("cannot read the recipe {}", path.display())]
    NoRecipe {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A recipe is no TOML.
    #[error("{} is not a recipe", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// A recipe has unknown keys, wrong types or impossible values; every one is listed.
    #[error("the recipe cannot be used:\n  {}", problems.join("\n  "))]
    Recipe {
        /// One sentence a problem, each naming its key.
        problems: Vec<String>,
    },
    /// The output folder has something in it.
    #[error("{} is not empty", path.display())]
    OutputNotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// A run folder whose checkpoints are all damaged, or that has a result and no checkpoint.
    #[error("{} has no complete checkpoint", path.display())]
    NoCheckpoint {
        /// The run folder.
        path: PathBuf,
    },
    /// Another process trains in a run folder.
    #[error("{} is in use: another process trains there", path.display())]
    InUse {
        /// The run folder.
        path: PathBuf,
    },
    /// The rows are not those that a run began with.
    #[error("the rows differ from those that {} was trained on", checkpoint.display())]
    RowsChanged {
        /// The checkpoint to go on from.
        checkpoint: PathBuf,
    },
    /// A file of a checkpoint is not what was written.
    #[error("{} is damaged: its checksum differs", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Loss, gradients or weights are no numbers any more.
    #[error(
        "{what} step {step} is not a finite number{}; {}, {}",
        and_more(*more),
        saved_as(saved.as_deref()),
        last_good(checkpoint.as_deref())
    )]
    NotFinite {
        /// What is none, as "the loss of".
        what: String,
        /// The optimizer step, from 1.
        step: usize,
        /// How many of the steps after it were no better.
        more: usize,
        /// Where the last good weights were saved.
        saved: Option<PathBuf>,
        /// The newest checkpoint whose weights still gave a finite loss.
        checkpoint: Option<PathBuf>,
    },
    /// The device does not compute in what the recipe asks for.
    #[error(
        "train.compute_dtype = \"{asked}\": this device computes in {}",
        offers.join(" and ")
    )]
    ComputeDtype {
        /// What the recipe asks for.
        asked: &'static str,
        /// What there is.
        offers: Vec<&'static str>,
    },
    /// The device had no memory left.
    #[error("the device ran out of memory {when}")]
    OutOfMemory {
        /// As "in step 3".
        when: String,
        /// Whether layers were computed again to save memory.
        recompute: bool,
    },
}

/// What is wrong with a JSON text, without the place, which the message tells in its own way.
fn json_reason(cause: &serde_json::Error) -> String {
    let reason = cause.to_string();
    match reason.rsplit_once(" at line ") {
        Some((reason, _)) => reason.to_owned(),
        None => reason,
    }
}

fn and_more(steps: usize) -> String {
    match steps {
        0 => String::new(),
        1 => ", and the step after it went no better".to_owned(),
        steps => format!(", and the {steps} steps after it went no better"),
    }
}

fn saved_as(saved: Option<&Path>) -> String {
    match saved {
        Some(path) => format!("the last good weights are saved in {}", path.display()),
        None => "no weights are saved".to_owned(),
    }
}

fn last_good(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "there is no checkpoint from before".to_owned(),
    }
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}
