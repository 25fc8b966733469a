//! Errors as a user sees them: `error:`, the causes, and one line that says what to do.

use std::path::Path;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use model::error::PushFailure;
use serde_json::json;

use crate::commands::train::{Left, Unfinished};
use crate::output::{self, Output};

/// A failure, in words.
#[derive(Debug)]
pub struct Failure {
    message: String,
    causes: Vec<String>,
    help: String,
    code: u8,
}

/// An error with its own advice.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Advised {
    message: String,
    help: String,
    code: u8,
    #[source]
    cause: Option<Box<model::Error>>,
}

impl Advised {
    /// The same with what it came from.
    pub fn caused_by(mut self, cause: model::Error) -> Self {
        self.cause = Some(Box::new(cause));
        self
    }

    /// Something that went wrong.
    pub fn failed(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            help: help.into(),
            code: 1,
            cause: None,
        }
    }

    /// Something that was asked for in the wrong way.
    pub fn usage(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            help: help.into(),
            code: 2,
            cause: None,
        }
    }
}

impl Failure {
    /// What clap refuses.
    pub fn from_usage(error: &clap::Error) -> Self {
        let text = error.render().to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let (message, rest) = text.split_once("\n\n").unwrap_or((text, ""));
        let message = message.lines().map(str::trim).collect::<Vec<_>>().join(" ");
        let message = in_words(message);
        let tip = rest
            .lines()
            .find_map(|line| line.trim().strip_prefix("tip: "));
        let tip = tip.filter(|tip| !tip.starts_with("to pass")); // no value begins with dashes
        let resumes = error.kind() == ErrorKind::ArgumentConflict && message.contains("--resume");
        let resumes = resumes.then(|| RESUMED.to_owned());
        let help = recipe_key(error, rest)
            .or(resumes)
            .or(tip.map(str::to_owned));
        Self {
            message,
            causes: Vec::new(),
            help: help.unwrap_or("see `trainer --help` and `trainer COMMAND --help`".into()),
            code: 2,
        }
    }

    /// Prints the failure and gives the exit code.
    pub fn report(&self, output: &Output) -> ExitCode {
        output::log(format_args!("error: {}", self.message));
        for cause in &self.causes {
            output::log(format_args!("  cause: {cause}"));
        }
        output::log(format_args!("help: {}", self.help));
        if output.json {
            let json = json!({"error": self.message, "causes": self.causes, "help": self.help});
            let _ = output.result(&json, ""); // it has been said on stderr
        }
        ExitCode::from(self.code)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let mut chain = error.chain().map(ToString::to_string);
        let message = chain.next().unwrap_or_default();
        let mut causes: Vec<String> = Vec::new();
        for cause in chain {
            // transparent errors and errors that print their source say it once
            if !message.contains(&cause) && !causes.iter().any(|said| said.contains(&cause)) {
                causes.push(cause);
            }
        }
        let (help, code) = advice(&error);
        Self {
            message,
            causes,
            help,
            code,
        }
    }
}

/// What to do about a flag that a run that goes on does not take.
const RESUMED: &str = "leave it out: a run goes on by its own recipe, of which --max-steps, --epochs, --data, \
     --eval-data and --set change what may change";

/// Rust's words for text that is no number.
fn in_words(message: String) -> String {
    let whole = match message.contains("value '-") {
        true => "expected a whole number, 0 or above",
        false => "expected a whole number",
    };
    let words = [
        ("invalid digit found in string", whole),
        ("cannot parse integer from empty string", whole),
        ("invalid float literal", "expected a number"),
        ("cannot parse float from empty string", "expected a number"),
        (
            "number too large to fit in target type",
            "the number is too large",
        ),
    ];
    let all = words.iter();
    all.fold(message, |text, (rust, words)| text.replace(rust, words))
}

/// What to write for a flag that is none, if a recipe has a key of its name; `usage` shows the
/// command.
fn recipe_key(error: &clap::Error, usage: &str) -> Option<String> {
    let takes_keys = ["train", "plan"].map(|command| format!("Usage: trainer {command} "));
    let flag = match error.get(ContextKind::InvalidArg)? {
        ContextValue::String(flag) if error.kind() == ErrorKind::UnknownArgument => flag,
        _ => return None,
    };
    if error.get(ContextKind::SuggestedArg).is_some()
        || !takes_keys.iter().any(|command| usage.contains(command))
    {
        return None;
    }
    let key = train::recipe::key_named(&flag.trim_start_matches('-').replace('-', "_"))?;
    Some(match key.contains('=') {
        true => format!("write --set {}", key.replace([' ', '"'], "")),
        false => format!("write --set {key}=VALUE"),
    })
}

fn advice(error: &anyhow::Error) -> (String, u8) {
    for cause in error.chain() {
        if let Some(advised) = cause.downcast_ref::<Advised>() {
            return (advised.help.clone(), advised.code);
        }
        if let Some(Unfinished { run, source }) = cause.downcast_ref::<Unfinished>() {
            let left = Left::find(run);
            let help = match source {
                train::Error::NotFinite {
                    saved, checkpoint, ..
                } => left.after_bad_numbers(saved.as_deref(), checkpoint.as_deref()),
                train::Error::OutOfMemory { recompute, .. } => left.after_full_memory(*recompute),
                source => format!("{}; {}", train_advice(source), left.how_to_go_on()),
            };
            return (help, train_code(source));
        }
        if let Some(train::Error::NoCheckpoint { path }) = cause.downcast_ref() {
            let help = format!(
                "start a new run with its recipe: {}",
                Left::find(path).anew()
            );
            return (help, 1);
        }
        if let Some(error) = cause.downcast_ref::<train::Error>() {
            return (train_advice(error).into(), train_code(error));
        }
        if let Some(error) = cause.downcast_ref::<adapters::Error>() {
            return (adapter_advice(error).into(), 1);
        }
        if let Some(error) = cause.downcast_ref::<model::Error>() {
            return (model_advice(error).into(), model_code(error));
        }
    }
    ("check the file or value that is named above".into(), 1)
}

/// 2 where the recipe must be changed, 1 for everything else.
fn train_code(error: &train::Error) -> u8 {
    use train::Error as E;
    match error {
        E::ComputeDtype { .. }
        | E::Recipe { .. }
        | E::Toml { .. }
        | E::NoRecipe { .. }
        | E::EvalFraction { .. } => 2,
        E::Adapter(adapters::Error::Fit { .. }) => 2,
        _ => 1,
    }
}

/// 2 where an address cannot be one, 1 for everything else.
fn model_code(error: &model::Error) -> u8 {
    use model::Error as E;
    match error {
        E::HubNotARepository { .. } | E::NotADataset { .. } => 2,
        _ => 1,
    }
}

fn train_advice(error: &train::Error) -> &'static str {
    use train::Error as E;
    match error {
        E::Model(error) | E::Encode { source: error, .. } => model_advice(error),
        E::Adapter(error) => adapter_advice(error),
        E::Recipe { .. } => {
            "correct these keys; `trainer train --print-recipe` shows every key with its value"
        }
        E::ComputeDtype { .. } => "set train.compute_dtype to one of these, or to \"auto\"",
        E::NoRecipe { .. } => "give a recipe file, or with --resume the folder of a run",
        E::Toml { .. } => "correct the recipe; it is a TOML file, in which text stands in quotes",
        E::Io { .. } => "check the path, its permissions and the free space on its disk",
        E::OutputNotEmpty { .. } => "choose another --output, or go on with that run by --resume",
        E::InUse { .. } => "wait until it has ended, or stop it; or choose another --output",
        E::NotARun { .. } => {
            "give the folder that `trainer train` wrote: it has recipe.toml and metrics.jsonl"
        }
        E::NoMetrics { .. } => "start the run again, or give another one",
        E::BadMetrics { .. } => "restore metrics.jsonl, or give another run",
        E::RowsChanged { .. } => {
            "put the rows back, or start a new run with adapter.init_from on the new ones"
        }
        E::Damaged { .. } | E::Json { .. } => "remove this checkpoint, or resume from an older one",
        E::NotFinite { .. } => {
            "check the data, or begin a new run with a lower train.learning_rate; adapter.init_from \
             takes the adapter that was saved, or that of a checkpoint"
        }
        E::NoData | E::NoSuchData { .. } => {
            "give a .jsonl, .json, .csv, .tsv or .parquet file, or a folder of them, by --data"
        }
        E::NoDataFiles { .. } | E::DataFileKind { .. } => {
            "convert the rows to JSONL: one JSON object a line"
        }
        E::NoMatch { .. } | E::BadPattern { .. } => {
            "correct the pattern, such as 'data/*.jsonl', or give a file or folder"
        }
        E::ColumnTwice { .. } => "rename one of these columns",
        E::CellCount { .. } => {
            "correct the row: text with separators, quotes or line ends stands in double quotes"
        }
        E::Parquet { .. } => "get the file again, or convert the rows to JSONL",
        E::Temporary { .. } => {
            "free space there, or set TMPDIR to a folder on a disk with more of it"
        }
        E::EmptyData { path } => match path.extension().and_then(|end| end.to_str()) {
            Some("csv" | "tsv") => "put rows under its header, or leave the file out",
            Some("parquet") => "get the file again, or leave it out",
            _ => "put rows into the file: one JSON object a line",
        },
        E::NotUtf8 { .. } => "save the file as UTF-8",
        E::BadJson { cause, .. } if cause.to_string().contains("hex escape") => {
            "correct the line: \\ud800 to \\udfff are halves of a character, and stand in pairs"
        }
        E::BadJson { .. } => "correct the line: it must be one JSON object",
        E::NoTokenizer { .. } => "add the model's tokenizer.json, or give rows of input_ids",
        E::NoTemplate { .. } => "set data.chat_template to chatml, llama2, llama3 or a jinja file",
        E::TokenOutOfRange { .. } => "tokenize the rows with this model's own tokenizer",
        E::TooLong { .. } | E::AllDropped { .. } => {
            "raise data.max_length, or set data.truncate to \"right\""
        }
        E::NothingTrained { .. } => {
            "raise data.max_length, or correct these rows: every one needs a token to train on"
        }
        E::EvalFraction { .. } => "set another data.eval_fraction, or give more rows",
        E::Task { .. } => {
            "give every row the number of its task, from 0 on, as \"task_id\", or raise \
             adapter.num_tasks"
        }
        E::UnknownColumns { found, .. } | E::MissingColumn { found, .. } if matches!(&found[..], [one] if one.contains([';', '\t', '|'])) => {
            "separate the columns by commas (.csv) or by tabs (.tsv)"
        }
        E::UnknownColumns { .. } | E::MissingColumn { .. } => {
            "rename the columns, or set data.format"
        }
        _ => "correct the row that is named above",
    }
}

fn adapter_advice(error: &adapters::Error) -> &'static str {
    use adapters::Error as E;
    match error {
        E::File(model::Error::MissingFile { .. }) => {
            "give the folder of a PEFT adapter, or a Hub id"
        }
        E::File(model::Error::Io { path, source, .. }) if is_missing_weights(path, source) => {
            "the adapter folder is incomplete: get that file again"
        }
        E::File(model::Error::Safetensors { .. }) => {
            "get the adapter again: that file is damaged or incomplete"
        }
        E::File(error) => model_advice(error),
        E::Config { .. } => "use an adapter that this version supports, made for this model",
        E::Fit { .. } => "correct the adapter.* keys of the recipe",
        E::Tensors { .. } => "use the base model that the adapter was trained on",
        E::Quantization { .. } => {
            "use the original model with --quant nf4, or one that bitsandbytes quantised to 4 bits"
        }
        E::OtherFormat { .. } => {
            "leave --quant (quantization.format) out, or give the original model"
        }
        E::Split { .. } => {
            "leave it out of adapter.target_modules and modules_to_save, keep the linear layers in 4 \
             bits (--quant nf4), or use --device cpu"
        }
        E::Quantized { .. } => "give the original model",
        E::Combine { .. } => {
            "give one --adapter alone and without a weight, or only LoRA adapters; --combine cat takes \
             any ranks"
        }
        E::Merge { .. } => {
            "merge fewer adapters at a time, leave their weights out, or merge --onto original"
        }
        E::NotInWeights { .. } => "give it to --adapter of eval, generate and chat as it is",
        E::NoOriginal { .. } => "give the original model by --model, or leave --onto original out",
        E::NotFinite { .. } => "check the weights of the adapter, and the weight it is given",
        E::Weight { .. } => "use the model without quantization, or get its files again",
        _ => "check the adapter folder that is named above",
    }
}

/// Whether what cannot be opened are weights that are not there.
fn is_missing_weights(path: &Path, source: &std::io::Error) -> bool {
    let is_weights = path.extension().is_some_and(|end| end == "safetensors");
    is_weights && source.kind() == std::io::ErrorKind::NotFound
}

fn push_advice(failure: &PushFailure) -> &'static str {
    match failure {
        PushFailure::Refused { status: 401, .. } => {
            "set HF_TOKEN to a token that is valid (huggingface.co/settings/tokens)"
        }
        PushFailure::Refused { status: 403, .. } => {
            "set HF_TOKEN to a token that may write to this owner's repositories"
        }
        PushFailure::Refused {
            status: 400..500, ..
        } => "do what the Hub says, and push again",
        _ => "check the network (or HF_ENDPOINT) and push again: what has arrived is kept",
    }
}

/// What to do about an error of a model's folder, or of the Hub.
pub fn model_advice(error: &model::Error) -> &'static str {
    use model::Error as E;
    match error {
        E::Io { path, source, .. } if is_missing_weights(path, source) => {
            "the model folder is incomplete: get that file again"
        }
        E::Io { .. } => "check the path, its permissions and the free space on its disk",
        E::Json { .. } => "correct the file, or get it again",
        E::Config { .. } => {
            "use a Llama model (LlamaForCausalLM) with the config.json it came with"
        }
        E::MissingFile { .. } | E::NoSuchFolder { .. } => {
            "give a complete Hugging Face model folder, or a Hub id"
        }
        E::OtherWeights { .. } => {
            "get the repository's safetensors weights, or save the model with transformers once"
        }
        E::Safetensors { .. } => "get the weights again: that file is damaged or incomplete",
        E::Tensors { .. } => "get the weights again; they must belong to this config.json",
        E::Tokenizer { .. } => "get tokenizer.json again",
        E::Tokenize { .. } => "check that tokenizer.json is the model's own",
        E::Template { .. } | E::TurnNotRendered { .. } => {
            "correct the template, or set data.chat_template to another one"
        }
        E::TokenOutOfRange { .. } => "give ids of this model's own tokenizer",
        E::EmptyPrompt => "give a prompt of at least one token",
        E::LogitsNotFinite { .. } => "check the weights of the model and of the adapter",
        E::NotAModel { .. } => "give an existing folder, or a Hub id such as owner/name",
        E::HubOffline { .. } => "unset HF_HUB_OFFLINE, or download the model first",
        E::HubPushOffline { .. } => "unset HF_HUB_OFFLINE",
        E::HubNotARepository { .. } => "write --repo owner/name, and perhaps --revision branch",
        E::HubNoToken { .. } => {
            "set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"
        }
        E::HubPublic { .. } => {
            "leave --private out, choose another --repo, or make it private in its settings"
        }
        E::HubPush { source, .. } => push_advice(source),
        E::HubChecksum { .. } => {
            "try again: it has been removed; if that does not help, the copy on the Hub is damaged"
        }
        E::HubDenied { .. } => {
            "set HF_TOKEN to a token that has access, and accept the licence on its page"
        }
        E::HubNotFound { .. }
        | E::HubNoRepository { .. }
        | E::NotADataset { .. }
        | E::HubNoDataset { .. } => "check the spelling of owner/name@revision",
        E::HubNoData { .. } => "name another file or folder: hf://datasets/owner/name/folder",
        E::HubNoSafetensors { .. } => "choose a repository with safetensors weights",
        E::Hub { .. } | E::HubSize { .. } => {
            "check the network (or HF_ENDPOINT) and try again: what is there is kept"
        }
        _ => "check the file or value that is named above",
    }
}
