//! A Hugging Face model folder: what it ships beside the weights, as plain data.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::chat::ChatTemplate;
use crate::checkpoint::{Checkpoint, without_name, write_file};
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, read_json};

const CONFIG_FILE: &str = "config.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Beside the tokenizer, everything of a model folder that is not weights; the weights may differ and
/// these stay.
const ASSETS: [&str; 2] = [CONFIG_FILE, GENERATION_CONFIG_FILE];
/// What turns text into tokens, a conversation into text, and back.
const TOKENIZER: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    ChatTemplate::FILE,
    "chat_template.json",
];

/// A model folder whose configuration has been read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFolder {
    /// Where it is.
    pub path: PathBuf,
    /// The shape of the network.
    pub config: LlamaConfig,
    /// Which tokens begin and end a text.
    pub generation: GenerationConfig,
    /// The chat template that takes the place of the folder's own, if one does.
    pub template: Option<ChatTemplate>,
}

/// The tokens that begin and end a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GenerationConfig {
    /// Each of these ends a text; empty when no file names any.
    pub eos_token_ids: Vec<u32>,
    /// The token in front of a text, when there is one.
    pub bos_token_id: Option<u32>,
}

impl ModelFolder {
    /// Reads the configuration of a model folder.
    ///
    /// The eos tokens are those of `generation_config.json`, else those of `config.json`, else the
    /// tokenizer's; the bos token likewise.
    ///
    /// # Errors
    /// `NoSuchFolder`; `MissingFile` without a `config.json`; `Config` when a value cannot be, a
    /// token id outside of the vocabulary among them; `Json` when a file does not parse.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::NoSuchFolder { path: path.into() });
        }
        let file = path.join(CONFIG_FILE);
        if !file.is_file() {
            return Err(Error::MissingFile {
                folder: path.into(),
                file: CONFIG_FILE,
            });
        }
        let config = LlamaConfig::from_file(&file)?;
        let generation = GenerationConfig::from_folder(path, config.vocab_size)?;
        Ok(Self {
            path: path.into(),
            config,
            generation,
            template: None,
        })
    }

    /// Opens the weights.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open_folder`].
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Checkpoint::open_folder(&self.path)
    }

    /// Loads the tokenizer; `None` when the folder has no `tokenizer.json`.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_folder`].
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        tokenizer(&self.path)
    }

    /// The chat template in use; `None` when there is none.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::from_folder`].
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        match &self.template {
            Some(template) => Ok(Some(template.clone())),
            None => ChatTemplate::from_folder(&self.path),
        }
    }

    /// The strings that end a turn: those of all eos ids and the tokenizer's eos token, each once.
    pub fn end_markers(&self, tokenizer: &Tokenizer) -> Vec<String> {
        let ids = self.generation.eos_token_ids.iter();
        let named = ids.filter_map(|&id| tokenizer.id_to_token(id));
        let mut markers = Vec::new();
        for marker in named.chain(tokenizer.eos_token().map(str::to_owned)) {
            if !markers.contains(&marker) {
                markers.push(marker);
            }
        }
        markers
    }

    /// Copies everything but the weights into the folder `to`, which must exist; the chat template
    /// is the one in use.
    ///
    /// # Errors
    /// `Io`; each file is complete or absent.
    pub fn copy_assets(&self, to: &Path) -> Result<()> {
        self.copy(&ASSETS, to)?;
        self.copy_tokenizer(to)
    }

    /// Copies the tokenizer and the chat template in use into the folder `to`, which must exist.
    ///
    /// # Errors
    /// `Io`; each file is complete or absent.
    pub fn copy_tokenizer(&self, to: &Path) -> Result<()> {
        self.copy(&TOKENIZER, to)?;
        match &self.template {
            Some(own) => own.save(to),
            None if self.path.join(ChatTemplate::TOOLS_FILE).is_file() => {
                let own = self.chat_template()?;
                own.iter().try_for_each(|own| own.save(to))
            }
            None => Ok(()),
        }
    }

    fn copy(&self, names: &[&str], to: &Path) -> Result<()> {
        for name in names {
            let from = self.path.join(name);
            if !from.is_file() {
                continue;
            }
            let bytes = std::fs::read(&from).map_err(|source| Error::Io {
                action: "read",
                path: from,
                source,
            })?;
            write_file(&to.join(name), &bytes)?;
        }
        Ok(())
    }
}

/// Says in a `config.json` of which type the weights are.
///
/// # Panics
/// If that is not F32, F16 or BF16.
pub fn set_dtype(config: &mut Map<String, Value>, dtype: Dtype) {
    let key = match config.contains_key("torch_dtype") {
        true => "torch_dtype", // the name before transformers 5
        false => "dtype",
    };
    let name = match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        other => panic!("{other:?} is none of the float types of a checkpoint"),
    };
    config.insert(key.into(), name.into());
}

/// Changes `config.json` of a folder.
///
/// # Errors
/// `Io` and `Json`; the file is the old or the new one.
pub fn edit_config(folder: &Path, edit: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
    let path = folder.join(CONFIG_FILE);
    let text = std::fs::read(&path).map_err(|source| Error::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let json = |source| Error::Json {
        path: path.clone(),
        source,
    };
    let mut config = serde_json::from_slice(&text).map_err(json)?;
    edit(&mut config);
    let text = serde_json::to_vec_pretty(&config).expect("it was JSON before");
    write_file(&path, &text)
}

/// Makes a folder that is complete or absent: `fill` gets a folder beside `to` that takes its name
/// in the end; `to` may exist if it is empty.
///
/// # Errors
/// `Io`, or those of `fill`.
pub fn write_folder<T, E: From<Error>>(
    to: &Path,
    fill: impl FnOnce(&Path) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    let io = |source| Error::Io {
        action: "create",
        path: to.into(),
        source,
    };
    let to = &to.canonicalize().unwrap_or(to.into()); // the folder that a link leads to
    let parent = to.parent().filter(|path| !path.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(io)?;
    let part = tempfile::Builder::new()
        .prefix(".part-")
        .tempdir_in(parent)
        .map_err(|error| io(without_name(error)))?;
    let inside = part.path().join("folder"); // with the permissions of any new folder
    std::fs::create_dir(&inside).map_err(io)?;
    let made = fill(&inside)?;
    match std::fs::remove_dir(to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e).into()),
        _ => {}
    }
    std::fs::rename(&inside, to).map_err(io)?;
    Ok(made)
}

impl GenerationConfig {
    fn from_folder(folder: &Path, vocab_size: usize) -> Result<Self> {
        let mut found = Self::default();
        for file in [GENERATION_CONFIG_FILE, CONFIG_FILE] {
            let path = folder.join(file);
            let Some(json) = read_json(&path)? else {
                continue;
            };
            let here = Self::from_json(&json, vocab_size)
                .map_err(|problems| Error::Config { path, problems })?;
            found = found.or(here);
        }
        if found.eos_token_ids.is_empty()
            && let Some(tokenizer) = tokenizer(folder)?
        {
            found = found.or(Self::from_tokenizer(&tokenizer, folder, vocab_size)?);
        }
        Ok(found)
    }

    /// Fills what is not set from another source.
    fn or(self, other: Self) -> Self {
        Self {
            eos_token_ids: match self.eos_token_ids.is_empty() {
                true => other.eos_token_ids,
                false => self.eos_token_ids,
            },
            bos_token_id: self.bos_token_id.or(other.bos_token_id),
        }
    }

    fn from_json(json: &Value, vocab_size: usize) -> std::result::Result<Self, Vec<String>> {
        if !json.is_object() {
            return Err(vec!["expected a JSON object".to_owned()]);
        }
        let mut problems = Vec::new();
        let mut ids = |key: &str, many: bool| -> Vec<u32> {
            let values = match &json[key] {
                Value::Null => &[],
                Value::Array(values) if many => values.as_slice(),
                value => std::slice::from_ref(value),
            };
            let mut read = |value: &Value| {
                let id = value.as_u64().filter(|&id| id < vocab_size as u64);
                if id.is_none() {
                    let last = vocab_size - 1;
                    problems.push(format!("{key} is {value}: expected token ids up to {last}"));
                }
                id.map(|id| id as u32)
            };
            values.iter().filter_map(&mut read).collect()
        };
        let found = Self {
            eos_token_ids: ids("eos_token_id", true),
            bos_token_id: ids("bos_token_id", false).pop(),
        };
        match problems.is_empty() {
            true => Ok(found),
            false => Err(problems),
        }
    }

    fn from_tokenizer(tokenizer: &Tokenizer, folder: &Path, vocab_size: usize) -> Result<Self> {
        let found = Self {
            eos_token_ids: tokenizer.eos_token_id().into_iter().collect(),
            bos_token_id: tokenizer.bos_token_id(),
        };
        let keys = [
            ("eos_token", tokenizer.eos_token_id()),
            ("bos_token", tokenizer.bos_token_id()),
        ];
        let outside = keys.iter().filter_map(|&(key, id)| {
            let id = id.filter(|&id| id as usize >= vocab_size)?;
            let last = vocab_size - 1;
            Some(format!(
                "{key} has the id {id}: expected token ids up to {last}"
            ))
        });
        let problems: Vec<String> = outside.collect();
        match problems.is_empty() {
            true => Ok(found),
            false => Err(Error::Config {
                path: folder.join("tokenizer_config.json"),
                problems,
            }),
        }
    }
}

fn tokenizer(folder: &Path) -> Result<Option<Tokenizer>> {
    match folder.join("tokenizer.json").is_file() {
        true => Tokenizer::from_folder(folder).map(Some),
        false => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    /// A folder with the config.json of `gqa` (96 tokens, eos 2), with changes, and other files.
    fn folder(change: impl Fn(&mut Value), files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let config = std::fs::read(fixtures().join("models/gqa/config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        change(&mut config);
        std::fs::write(dir.path().join(CONFIG_FILE), config.to_string()).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn eos(change: impl Fn(&mut Value), files: &[(&str, &str)]) -> Vec<u32> {
        let dir = folder(change, files);
        let opened = ModelFolder::open(dir.path()).unwrap();
        opened.generation.eos_token_ids
    }

    #[test]
    fn eos_is_that_of_the_generation_config_then_of_the_config() {
        let file = |text| [(GENERATION_CONFIG_FILE, text)];
        assert_eq!(eos(|_| (), &[]), [2]);
        assert_eq!(eos(|_| (), &file(r#"{"eos_token_id": 7}"#)), [7]);
        assert_eq!(eos(|_| (), &file(r#"{"eos_token_id": [7, 95]}"#)), [7, 95]);
        assert_eq!(eos(|_| (), &file(r#"{"eos_token_id": null}"#)), [2]);
        assert_eq!(eos(|_| (), &file("{}")), [2]);
        assert!(eos(|config| config["eos_token_id"] = Value::Null, &[]).is_empty());
    }

    #[test]
    fn without_eos_in_the_configs_the_tokenizer_decides() {
        let dir = folder(
            |config| {
                config["eos_token_id"] = Value::Null;
                config["vocab_size"] = 100_000.into();
            },
            &[],
        );
        let chat = fixtures().join("chat/byte_level");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(chat.join(name), dir.path().join(name)).unwrap();
        }
        let opened = ModelFolder::open(dir.path()).unwrap();
        let tokenizer = opened.tokenizer().unwrap().unwrap();
        let eos = tokenizer.eos_token_id().unwrap();
        assert_eq!(opened.generation.eos_token_ids, [eos]);
        assert_eq!(
            opened.end_markers(&tokenizer),
            [tokenizer.eos_token().unwrap()]
        );

        let other = (0..).find(|id| *id != eos).unwrap();
        let two = ModelFolder {
            generation: GenerationConfig {
                eos_token_ids: vec![other, eos],
                bos_token_id: None,
            },
            ..opened
        };
        assert_eq!(two.end_markers(&tokenizer).len(), 2);
    }

    #[test]
    fn ids_outside_of_the_vocabulary_name_file_and_key() {
        for (text, parts) in [
            (
                r#"{"eos_token_id": [2, 96]}"#,
                &["eos_token_id is 96", "up to 95"][..],
            ),
            (r#"{"eos_token_id": -1}"#, &["eos_token_id is -1"]),
            (r#"{"eos_token_id": "</s>"}"#, &["eos_token_id is \"</s>\""]),
            (
                r#"{"bos_token_id": [1], "eos_token_id": 1e3}"#,
                &["bos_token_id is [1]", "eos_token_id is 1000.0"],
            ),
            ("[]", &["expected a JSON object"]),
        ] {
            let dir = folder(|_| (), &[(GENERATION_CONFIG_FILE, text)]);
            let error = ModelFolder::open(dir.path()).unwrap_err().to_string();
            for part in parts.iter().chain(&[GENERATION_CONFIG_FILE]) {
                assert!(error.contains(part), "{error}");
            }
        }
        let dir = folder(|config| config["eos_token_id"] = 96.into(), &[]);
        let error = ModelFolder::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(CONFIG_FILE), "{error}");
    }

    #[test]
    fn what_is_not_a_model_folder_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let nothing = ModelFolder::open(&dir.path().join("nothing"));
        assert!(matches!(nothing, Err(Error::NoSuchFolder { .. })));
        let empty = ModelFolder::open(dir.path()).unwrap_err();
        assert!(matches!(
            empty,
            Error::MissingFile {
                file: CONFIG_FILE,
                ..
            }
        ));
        let dir = folder(|_| (), &[(GENERATION_CONFIG_FILE, "{")]);
        let bad = ModelFolder::open(dir.path());
        assert!(matches!(bad, Err(Error::Json { .. })));
    }

    #[test]
    fn a_folder_needs_neither_tokenizer_nor_template() {
        let opened = ModelFolder::open(&fixtures().join("models/gqa")).unwrap();
        assert!(opened.tokenizer().unwrap().is_none());
        assert!(opened.chat_template().unwrap().is_none());
        assert!(opened.checkpoint().is_ok());
        assert_eq!(opened.generation.bos_token_id, Some(1));
    }

    #[test]
    fn assets_are_copied_and_weights_are_not() {
        let opened = ModelFolder::open(&fixtures().join("models/gqa")).unwrap();
        let to = tempfile::tempdir().unwrap();
        opened.copy_assets(to.path()).unwrap();
        let entries = std::fs::read_dir(to.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [CONFIG_FILE, GENERATION_CONFIG_FILE]);
        let copy = ModelFolder::open(to.path()).unwrap();
        assert_eq!(copy.config, opened.config);
    }

    #[test]
    fn the_template_in_use_is_the_one_that_is_copied() {
        let mut opened = ModelFolder::open(&fixtures().join("models/gqa")).unwrap();
        opened.template = ChatTemplate::builtin("llama3");
        let to = tempfile::tempdir().unwrap();
        opened.copy_assets(to.path()).unwrap();
        let copy = ModelFolder::open(to.path()).unwrap();
        let source = |folder: &ModelFolder| folder.chat_template().unwrap().unwrap().source;
        assert_eq!(source(&copy), source(&opened));
    }
}
