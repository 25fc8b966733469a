//! The model card of a model that adapters were merged into.

use std::fmt::Write;
use std::path::Path;

use adapters::Drift;
use model::checkpoint::write_file;

use super::{CARD_FILE, MODEL_IN_PYTHON, file_name, front_matter_of, short_name};
use crate::error::Result;

/// What there is to say of a merged model.
#[derive(Debug, Clone)]
pub struct MergedCard<'a> {
    /// The base model, a folder or `owner/name[@revision]`.
    pub base: &'a str,
    /// The adapters, folders or Hub ids, each with its weight.
    pub adapters: Vec<(&'a str, f64)>,
    /// PEFT's name of how several were made one.
    pub combination: &'a str,
    /// What the updates were added to, in words.
    pub onto: String,
    /// How far the model is from the unmerged one.
    pub drift: Drift,
    /// The share of the updates that rounding to the type of the weights has left.
    pub kept: Option<f64>,
}

impl MergedCard<'_> {
    /// Writes it into the model's folder.
    ///
    /// # Errors
    /// The file is complete or absent.
    pub fn write(&self, folder: &Path) -> Result<()> {
        Ok(write_file(&folder.join(CARD_FILE), self.text().as_bytes())?)
    }

    fn text(&self) -> String {
        let base = self.base;
        let mut text = front_matter_of(base, "transformers", "finetune", None);
        let _ = write!(text, "\n# {}, merged\n\n", short_name(base));
        if self.adapters.is_empty() {
            let _ = writeln!(text, "The weights of `{base}`, written by `trainer`.");
        } else {
            self.adapters(&mut text);
        }
        let _ = write!(
            text,
            "\n## Use\n\n```python\n{MODEL_IN_PYTHON}```\n\n```sh\ntrainer chat --model PATH\n```\n"
        );
        text
    }

    fn adapters(&self, text: &mut String) {
        let several = match self.adapters.len() {
            1 => String::new(),
            _ => format!(" (combined as PEFT's `{}`)", self.combination),
        };
        let _ = write!(
            text,
            "`{}` with these adapters merged into {}{several} by `trainer`:\n\n\
             | adapter | weight |\n|---|---|\n",
            self.base, self.onto
        );
        for (name, weight) in &self.adapters {
            let name = known_by(name).replace('|', "\\|");
            let _ = writeln!(text, "| {name} | {weight} |");
        }
        let drift = &self.drift;
        let _ = write!(
            text,
            "\nFrom the model with the adapters beside it, the logits of {} tokens differ by {:.1e} at \
             most; the most likely next token is the same after {:.1} % of them.\n",
            drift.tokens,
            drift.max_abs,
            100.0 * drift.same_top
        );
        if let Some(kept) = self.kept {
            let kept = 100.0 * kept;
            let _ = writeln!(
                text,
                "Rounding to the type of the weights has left {kept:.1} % of what the adapters change."
            );
        }
    }
}

/// What others may know an adapter by: of a place on this machine the end alone, with that of the run
/// that it lies in.
fn known_by(name: &str) -> String {
    let path = Path::new(name);
    if path.is_relative() {
        return name.to_owned();
    }
    match path.parent().map(file_name) {
        Some(run) if path.ends_with("adapter") || path.ends_with("best") => {
            format!("{run}/{}", file_name(path))
        }
        _ => file_name(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_the_base_and_what_was_merged() {
        let mut card = MergedCard {
            base: "owner/base@v1",
            adapters: vec![("owner/poet", 1.0), ("/home/me/runs/chat/adapter", -0.5)],
            combination: "linear",
            onto: "the original weights".into(),
            drift: Drift {
                tokens: 96,
                max_abs: 0.25,
                mean_abs: 0.01,
                kl: 0.0,
                same_top: 0.5,
            },
            kept: Some(0.978),
        };
        let text = card.text();
        let head = "---\nbase_model: \"owner/base\"\nlibrary_name: transformers\n\
            pipeline_tag: text-generation\ntags:\n- \"base_model:finetune:owner/base\"\n\
            - transformers\n---\n\n# base, merged\n";
        assert!(text.starts_with(head), "{text}");
        for part in [
            "the original weights (combined as PEFT's `linear`) by",
            "| owner/poet | 1 |\n| chat/adapter | -0.5 |\n",
            "96 tokens differ by 2.5e-1 at most",
            "after 50.0 %",
            "has left 97.8 % of what",
            "trainer chat --model PATH\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("/home/me"), "{text}");
        card.adapters.truncate(1);
        assert!(!card.text().contains("combined"));
        card.adapters.clear();
        assert!(!card.text().contains("adapter |"));
    }
}
