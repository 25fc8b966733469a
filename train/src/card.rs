//! The model card of what was trained: the `README.md` that the Hub and people read.
//!
//! Source: `create_or_update_model_card` in `peft/peft_model.py`.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use adapters::peft;
use model::checkpoint::write_file;

use crate::error::Result;
use crate::recipe::{Paths, Recipe};
use crate::report::{Entry, RunRecord};
use crate::trained::Trained;

pub mod hub;

/// File name of the card.
pub const CARD_FILE: &str = "README.md";
/// Most steps whose losses are told.
const TOLD: usize = 12;

/// Writes the card of what a run trained into its folder; what the run folder does not know yet is
/// left out.
///
/// # Errors
/// The file is complete or absent.
pub fn write(folder: &Path, run: &Path, recipe: &Recipe, trained: &Trained) -> Result<()> {
    let run = RunRecord::read(run).unwrap_or_default();
    Ok(write_file(
        &folder.join(CARD_FILE),
        card(&run, recipe, trained).as_bytes(),
    )?)
}

fn card(run: &RunRecord, recipe: &Recipe, trained: &Trained) -> String {
    let base = recipe.model.path.as_str();
    let mut text = front_matter(base, trained);
    let what = match trained {
        Trained::Adapter(adapter) => format!("{} adapter for", adapter.method.title()),
        Trained::Full => "fine-tuned version of".into(),
    };
    let article = if what.starts_with(['A', 'I']) {
        "An"
    } else {
        "A"
    };
    let _ = write!(
        text,
        "\n# {}\n\n{article} {what} `{base}`, trained with `trainer`.\n",
        title(recipe)
    );
    usage(&mut text, base, trained);
    training(&mut text, run, recipe);
    losses(&mut text, run);
    let _ = write!(
        text,
        "\n## Recipe\n\n```toml\n{}```\n\n### Framework versions\n\n",
        without_paths(recipe).to_toml()
    );
    if let Trained::Adapter(_) = trained {
        let _ = writeln!(text, "- PEFT {}", peft::PEFT_VERSION);
    }
    for (name, version) in run
        .facts
        .versions
        .iter()
        .filter(|(name, _)| *name != "PEFT")
    {
        let _ = writeln!(text, "- {name} {version}");
    }
    text
}

fn front_matter(base: &str, trained: &Trained) -> String {
    // a JSON string is a YAML string
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let (library, kind) = match trained {
        Trained::Adapter(_) => ("peft", "adapter"),
        Trained::Full => ("transformers", "finetune"),
    };
    let method = match trained {
        Trained::Adapter(adapter) => format!("- {}\n", adapter.method.name()),
        Trained::Full => String::new(),
    };
    let (id, _) = base.split_once('@').unwrap_or((base, ""));
    format!(
        "---\nbase_model: {}\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- {}\n\
         {method}- transformers\n---\n",
        quoted(id),
        quoted(&format!("base_model:{kind}:{id}")),
    )
}

/// The model, and what it was trained on.
fn title(recipe: &Recipe) -> String {
    let model = short_name(&recipe.model.path);
    let files = recipe.data.train.list();
    match &files[..] {
        [] => format!("{model}, fine-tuned"),
        [file] => format!("{model}, fine-tuned on {}", file_name(file)),
        [file, more @ ..] => {
            let (file, more) = (file_name(file), more.len());
            format!("{model}, fine-tuned on {file} and {more} more")
        }
    }
}

/// The name in a Hub id or a path, also of a folder in the Hub's cache
/// (`models--OWNER--NAME/snapshots/COMMIT`).
fn short_name(base: &str) -> &str {
    let (base, _) = base.split_once('@').unwrap_or((base, ""));
    let mut parts = base.rsplit(['/', '\\']).filter(|part| !part.is_empty());
    let last = parts.next().unwrap_or(base);
    let cached = parts.find_map(|part| part.strip_prefix("models--"));
    cached.and_then(|id| id.rsplit("--").next()).unwrap_or(last)
}

fn usage(text: &mut String, base: &str, trained: &Trained) {
    let python = match trained {
        Trained::Adapter(_) => format!(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, \
             AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained(\"PATH\")  # this folder\n\
             model = AutoModelForCausalLM.from_pretrained({base:?})\n\
             model = PeftModel.from_pretrained(model, \"PATH\")\n"
        ),
        Trained::Full => "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(\"PATH\")  # this folder\n\
             model = AutoModelForCausalLM.from_pretrained(\"PATH\")\n"
            .into(),
    };
    let command = match trained {
        Trained::Adapter(_) => format!("trainer chat --model {base} --adapter PATH"),
        Trained::Full => "trainer chat --model PATH".into(),
    };
    let _ = write!(
        text,
        "\n## Use\n\n```python\n{python}```\n\n```sh\n{command}\n```\n"
    );
}

fn training(text: &mut String, run: &RunRecord, recipe: &Recipe) {
    text.push_str("\n## Training\n\n| | |\n|---|---|\n");
    let mut row = |label: &str, value: Option<String>| {
        if let Some(value) = value {
            let value = value.replace('|', "\\|").replace('\n', ", ");
            let _ = writeln!(text, "| {label} | {value} |");
        }
    };
    row("method", crate::report::method(run));
    row("trained parameters", crate::report::parameters(run));
    let quantization = recipe.quantization.scheme();
    row(
        "base weights in training",
        quantization.map(|s| s.to_string()),
    );
    let names = |paths: &Paths| {
        let names = paths
            .list()
            .iter()
            .map(|path| file_name(path))
            .collect::<Vec<_>>();
        (!names.is_empty()).then(|| names.join(", "))
    };
    row("data", names(&recipe.data.train));
    let data = |which: &str| {
        let data = run.facts.data.get(which).filter(|data| data.rows > 0)?;
        Some(format!(
            "{} rows, {} trained of {} tokens",
            data.rows, data.trained_tokens, data.total_tokens
        ))
    };
    row("training rows", data("train"));
    row("evaluation rows", data("eval"));
    row(
        "steps",
        Some(run.last_step().to_string()).filter(|step| step != "0"),
    );
    row(
        "device",
        Some(run.facts.device.name.clone()).filter(|name| !name.is_empty()),
    );
}

/// The losses along the run, those of the evaluations where there are any.
fn losses(text: &mut String, run: &RunRecord) {
    if run.steps.is_empty() {
        return;
    }
    text.push_str("\n## Loss\n\nMean cross entropy of the trained tokens, in nats.\n\n");
    if let (Some(best), Some(loss)) = (run.best(), run.best().and_then(|best| best.loss)) {
        let _ = write!(
            text,
            "Best evaluation: {loss:.4} (perplexity {:.3}) after step {}.\n\n",
            loss.exp(),
            best.step
        );
    }
    text.push_str("| step | training | evaluation |\n|---|---|---|\n");
    let steps: Vec<usize> = match run.evals.is_empty() {
        true => run.steps.iter().map(|entry| entry.step).collect(),
        false => run.evals.iter().map(|entry| entry.step).collect(),
    };
    let at = |all: &[Entry], step: usize| {
        let entry = all.iter().find(|entry| entry.step == step);
        let loss = entry.and_then(|entry| entry.loss);
        loss.map_or(String::new(), |loss| format!("{loss:.4}"))
    };
    for step in evenly(&steps) {
        let (train, eval) = (at(&run.steps, step), at(&run.evals, step));
        let _ = writeln!(text, "| {step} | {train} | {eval} |");
    }
}

/// Some of many, the first and the last among them.
fn evenly(all: &[usize]) -> Vec<usize> {
    if all.len() <= TOLD {
        return all.to_vec();
    }
    let pick = |i: usize| all[i * (all.len() - 1) / (TOLD - 1)];
    (0..TOLD).map(pick).collect()
}

/// The recipe for other people: of the files of this machine only the names.
fn without_paths(recipe: &Recipe) -> Recipe {
    let mut recipe = recipe.clone();
    for paths in [&mut recipe.data.train, &mut recipe.data.eval] {
        match paths {
            Paths::None => {}
            Paths::One(path) => *path = file_name(path).into(),
            Paths::Many(all) => all
                .iter_mut()
                .for_each(|path| *path = file_name(path).into()),
        }
    }
    recipe.output.dir = None;
    let name = |path: &mut PathBuf| *path = file_name(path).into();
    recipe.adapter.init_from.iter_mut().for_each(name);
    if let Some(template) = &mut recipe.data.chat_template {
        *template = file_name(Path::new(template));
    }
    if Path::new(&recipe.model.path).is_absolute() {
        recipe.model.path = short_name(&recipe.model.path).to_owned();
    }
    recipe
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_begins_as_pefts_does_and_names_no_folders() {
        let mut recipe = Recipe::default();
        recipe.model.path = "owner/base@main".into();
        recipe.data.train = Paths::One("/home/me/secret/rows.jsonl".into());
        recipe.output.dir = Some("/home/me/runs/x".into());
        let trained = crate::session::resumed(&recipe);
        let text = card(&RunRecord::default(), &recipe, &trained);
        let head = "---\nbase_model: \"owner/base\"\nlibrary_name: peft\n\
                    pipeline_tag: text-generation\ntags:\n- \"base_model:adapter:owner/base\"\n\
                    - lora\n- transformers\n---\n";
        assert!(text.starts_with(head), "{text}");
        let versions = format!("### Framework versions\n\n- PEFT {}\n", peft::PEFT_VERSION);
        assert!(text.ends_with(&versions), "{text}");
        assert!(
            text.contains("rows.jsonl") && !text.contains("/home/me"),
            "{text}"
        );
        recipe.adapter.method = "full".into();
        let text = card(&RunRecord::default(), &recipe, &Trained::Full);
        assert!(text.contains("library_name: transformers\n") && !text.contains("PEFT"));
    }

    #[test]
    fn a_title_says_what_was_trained_on_what() {
        let mut recipe = Recipe::default();
        for (base, data, expected) in [
            (
                "owner/base@main",
                Paths::One("a/rows.jsonl".into()),
                "base, fine-tuned on rows.jsonl",
            ),
            ("/home/me/base/", Paths::None, "base, fine-tuned"),
            (
                "/hub/models--owner--poet-1b/snapshots/0123abcd",
                Paths::Many(vec!["a.csv".into(), "b.csv".into()]),
                "poet-1b, fine-tuned on a.csv and 1 more",
            ),
        ] {
            recipe.model.path = base.into();
            recipe.data.train = data;
            assert_eq!(title(&recipe), expected);
        }
    }

    #[test]
    fn of_many_losses_some_are_told() {
        let many: Vec<usize> = (1..=100).collect();
        let some = evenly(&many);
        assert_eq!((some.len(), some[0], some[TOLD - 1]), (TOLD, 1, 100));
        assert_eq!(evenly(&many[..3]), [1, 2, 3]);
    }
}
