//! `trainer push`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use adapters::peft;
use anyhow::Result;
use model::checkpoint::Checkpoint;
use model::folder::ModelFolder;
use model::hub::{self, Content, Hub, Push, PushFile, Pushed};
use serde_json::{Map, Value, json};
use train::card::CARD_FILE;
use train::card::hub::{Place, base_of, placed, plain};
use train::run_folder::RECIPE_FILE;

use crate::cli::PushArgs;
use crate::failure::Advised;
use crate::output::Output;

/// Puts an adapter or a model into a repository of the Hub.
pub fn run(args: PushArgs, output: &Output) -> Result<ExitCode> {
    let source = Source::find(&args.folder)?;
    if let Some(base) = &args.base_model
        && !hub::is_id(base)
    {
        let message = format!("--base-model {base} is not an id of the Hub");
        return Err(Advised::usage(message, "write --base-model owner/name").into());
    }
    let files = source.files(&args, output)?;
    let push = Push {
        repo: &args.repo,
        revision: args.revision.as_deref(),
        private: args.private,
        summary: source.summary(),
        files,
    };
    let count = push.files.len();
    output.note(format_args!(
        "pushing {count} files of {} to {}",
        source.folder.display(),
        args.repo
    ));
    let pushed = Hub::from_env().push(&push, &mut output.uploads())?;
    report(&args, &pushed, output)
}

/// What is pushed, looked over.
struct Source {
    folder: PathBuf,
    /// `adapter_config.json`, if it is an adapter.
    config: Option<Map<String, Value>>,
}

impl Source {
    /// Finds the adapter or model that a folder is or, as that of a run, holds.
    fn find(folder: &Path) -> Result<Self> {
        let name = folder.display();
        if !folder.is_dir() {
            let message = format!("there is no folder {name}");
            let help = "give the folder of an adapter, a model or a run";
            return Err(Advised::failed(message, help).into());
        }
        let has = |inside: &str, file: &str| folder.join(inside).join(file).is_file();
        for inside in ["", "adapter", "model"] {
            let found = || match inside {
                "" => folder.to_path_buf(),
                inside => folder.join(inside),
            };
            if has(inside, peft::CONFIG_FILE) {
                return Self::adapter(found());
            }
            if has(inside, "config.json") {
                return Self::model(found());
            }
        }
        Err(match has("", RECIPE_FILE) {
            true => Advised::failed(
                format!("{name} is the folder of a run that has saved nothing to push yet"),
                format!("let it end: trainer train --resume {name}"),
            ),
            false => Advised::failed(
                format!(
                    "{name} holds neither an adapter ({}) nor a model (config.json)",
                    peft::CONFIG_FILE
                ),
                "give the folder of an adapter, a model or a run",
            ),
        }
        .into())
    }

    /// An adapter whose settings and tensors can be read, of whatever method.
    fn adapter(folder: PathBuf) -> Result<Self> {
        let path = folder.join(peft::CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(|source| model::Error::Io {
            action: "read",
            path: path.clone(),
            source,
        })?;
        let config: Map<String, Value> =
            serde_json::from_str(&text).map_err(|source| model::Error::Json {
                path: path.clone(),
                source,
            })?;
        let incomplete = |what: &str| {
            let message = format!("{}: {what}", folder.display());
            Advised::failed(message, "save the adapter again, or give another folder")
        };
        if !config.get("peft_type").is_some_and(Value::is_string) {
            return Err(incomplete("adapter_config.json has no peft_type").into());
        }
        let weights = folder.join(peft::MODEL_FILE);
        if !weights.is_file() {
            return Err(incomplete("there is no adapter_model.safetensors").into());
        }
        if Checkpoint::open_file(&weights)?.tensors().next().is_none() {
            return Err(incomplete("adapter_model.safetensors holds no tensor").into());
        }
        let config = Some(config);
        Ok(Self { folder, config })
    }

    /// A model whose weights are those of its config.
    fn model(folder: PathBuf) -> Result<Self> {
        adapters::check(&ModelFolder::open(&folder)?, None)?;
        Ok(Self {
            folder,
            config: None,
        })
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.config.as_ref()?.get(key)?.as_str()
    }

    fn summary(&self) -> &'static str {
        match self.config {
            Some(_) => "Upload an adapter with trainer",
            None => "Upload a model with trainer",
        }
    }

    /// All files but hidden ones, as they are to stand in the repository.
    fn files(&self, args: &PushArgs, output: &Output) -> Result<Vec<PushFile>> {
        let mut names = Vec::new();
        let read = |source| model::Error::Io {
            action: "read",
            path: self.folder.clone(),
            source,
        };
        for entry in std::fs::read_dir(&self.folder).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().is_dir() || name.starts_with('.') {
                output.detail(format_args!("{name} stays here"));
            } else {
                names.push(name);
            }
        }
        names.sort();
        let (card, config) = self.edited(args, output);
        let mut files: Vec<_> = names
            .into_iter()
            .filter(|name| name != CARD_FILE)
            .map(|name| {
                let content = match &config {
                    Some(config) if name == peft::CONFIG_FILE => Content::Bytes(config.clone()),
                    _ => Content::File(self.folder.join(&name)),
                };
                PushFile { name, content }
            })
            .collect();
        files.push(PushFile {
            name: CARD_FILE.into(),
            content: Content::Bytes(card.into_bytes()),
        });
        Ok(files)
    }

    /// The card, and the settings of an adapter if they are to be others: with the base model's id
    /// in place of the folder that it lay in.
    fn edited(&self, args: &PushArgs, output: &Output) -> (String, Option<Vec<u8>>) {
        let card = std::fs::read_to_string(self.folder.join(CARD_FILE)).ok();
        let in_card = card.as_deref().and_then(base_of);
        let base = self.text("base_model_name_or_path").or(in_card.as_deref());
        let given = args.base_model.as_deref();
        let id = given.or(base.filter(|base| hub::is_id(base) || !base.contains(['/', '\\'])));
        if let Some(base) = base.filter(|_| id.is_none()) {
            output.note(format_args!(
                "warning: the base model is named as a folder of this machine ({base}), where nobody \
                 else finds it; --base-model owner/name names it by its id"
            ));
        }
        // PEFT keeps the revision apart
        let (name, revision) = match id.map(|id| id.split_once('@').unwrap_or((id, ""))) {
            Some((name, revision)) => (Some(name), revision),
            None => (None, ""),
        };
        let place = Place {
            repo: &args.repo,
            base,
            base_id: name,
        };
        let card = match card {
            Some(card) => placed(&card, place),
            None => plain(place, self.text("peft_type")),
        };
        let config = self.config.clone().zip(name);
        let config = config
            .filter(|(_, name)| base != Some(name))
            .map(|(mut config, name)| {
                config.insert("base_model_name_or_path".into(), json!(name));
                if !revision.is_empty() {
                    config.insert("revision".into(), json!(revision));
                }
                let text = serde_json::to_string_pretty(&config).unwrap_or_default();
                text.into_bytes()
            });
        (card, config)
    }
}

fn report(args: &PushArgs, pushed: &Pushed, output: &Output) -> Result<ExitCode> {
    for name in &pushed.ignored {
        output.note(format_args!(
            "warning: the repository's .gitignore keeps {name} out"
        ));
    }
    for name in &pushed.removed {
        output.note(format_args!(
            "removed {name}, which was of the weights before"
        ));
    }
    let json = json!({
        "repo": args.repo,
        "revision": args.revision.as_deref().unwrap_or("main"),
        "url": pushed.url,
        "commit": pushed.commit,
        "created": pushed.created,
        "sent": pushed.sent,
        "stored": pushed.stored,
        "unchanged": pushed.unchanged,
        "removed": pushed.removed,
        "ignored": pushed.ignored,
    });
    let news = pushed.sent.len() + pushed.stored.len();
    output.note(match news {
        0 => "nothing has changed".to_owned(),
        _ => format!("{news} files are new, {} as before", pushed.unchanged.len()),
    });
    output.result(&json, &pushed.url)?;
    Ok(ExitCode::SUCCESS)
}
