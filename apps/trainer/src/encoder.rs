//! What turns rows into tokens: the model's tokenizer and the chat template of the recipe.

use std::path::Path;

use anyhow::Result;
use model::chat::ChatTemplate;
use model::folder::ModelFolder;
use train::data::Encoder;
use train::recipe::DataSection;

use crate::failure::Advised;

/// The encoder of a model folder and `data.*` settings.
pub fn open(folder: &ModelFolder, data: &DataSection) -> Result<Encoder> {
    let tokenizer = folder.tokenizer()?;
    let template = match &data.chat_template {
        None => folder.chat_template()?,
        Some(name) => Some(named_template(name)?),
    };
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

/// A template by what `data.chat_template` says: a built-in name, or a file.
pub fn named_template(name: &str) -> Result<ChatTemplate> {
    if let Some(template) = ChatTemplate::builtin(name) {
        return Ok(template);
    }
    let path = Path::new(name);
    if !path.exists() {
        return Err(Advised::usage(
            format!("data.chat_template = {name:?} is neither a file nor a built-in template"),
            format!(
                "give a jinja file, or one of {}",
                ChatTemplate::BUILTIN.join(", ")
            ),
        )
        .into());
    }
    Ok(ChatTemplate::from_file(path)?)
}
