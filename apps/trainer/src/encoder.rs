//! What turns rows into tokens: the model's tokenizer and a chat template.

use std::path::Path;

use adapters::Weighted;
use anyhow::Result;
use model::chat::ChatTemplate;
use model::folder::ModelFolder;
use train::data::Encoder;
use train::recipe::{DataSection, Recipe};

use crate::failure::Advised;

/// The encoder of a model folder, with its template in use, and `data.*` settings.
pub fn open(folder: &ModelFolder, data: &DataSection) -> Result<Encoder> {
    let tokenizer = folder.tokenizer()?;
    let template = folder.chat_template()?;
    let end_markers = tokenizer
        .as_ref()
        .map_or(Vec::new(), |tokenizer| folder.end_markers(tokenizer));
    Ok(Encoder {
        tokenizer,
        template,
        end_markers,
        vocab_size: folder.config.vocab_size,
        train_on: data.train_on,
        model: folder.path.clone(),
    })
}

/// Chooses the template in use: the one that is named, else that of the first adapter that was trained
/// with one of its own, else the model's.
pub fn choose_template(
    base: &mut ModelFolder,
    adapters: &[Weighted],
    name: Option<&str>,
) -> Result<()> {
    base.template = name.map(named_template).transpose()?;
    for adapter in adapters {
        if base.template.is_none() {
            base.template = ChatTemplate::from_folder(&adapter.folder)?;
        }
    }
    Ok(())
}

/// Forgets a template that an adapter to go on from has brought if it is the model's own: the run then
/// does not need that adapter's folder again.
pub fn forget_same_template(base: &mut ModelFolder, recipe: &mut Recipe) -> Result<()> {
    let own = ChatTemplate::from_folder(&base.path)?.map(|own| own.source);
    let used = base.template.as_ref().map(|used| &used.source);
    if used.is_some() && used == own.as_ref() && !recipe.given.contains("data.chat_template") {
        base.template = None;
        recipe.data.chat_template = None;
    }
    Ok(())
}

/// A template by what `data.chat_template` says: a built-in name, a file, or a folder with one.
fn named_template(name: &str) -> Result<ChatTemplate> {
    if let Some(template) = ChatTemplate::builtin(name) {
        return Ok(template);
    }
    let path = Path::new(name);
    let (found, problem) = match path.is_dir() {
        true => (ChatTemplate::from_folder(path)?, "in that folder"),
        false if path.exists() => (Some(ChatTemplate::from_file(path)?), ""),
        false => (None, "of that name, nor a file"),
    };
    found.ok_or_else(|| {
        let names = ChatTemplate::BUILTIN.join(", ");
        Advised::usage(
            format!("there is no chat template {name:?} {problem}"),
            format!("give data.chat_template or --chat-template a jinja file, or one of {names}"),
        )
        .into()
    })
}
