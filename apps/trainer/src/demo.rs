//! `trainer` without a command: teaches a small model a task it cannot do, and counts.
//!
//! The model, the rows and the recipe are part of the program; `demo/README.md` says how they were
//! made. They are written to `runs/demo-files`, so that what is left behind can be used further.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use ::train::fit::Stopped;
use ::train::recipe::Recipe;
use adapters::{Combination, TrainBackend, Weighted};
use anyhow::{Context, Result};
use burn::train::Interrupter;
use model::checkpoint::write_file;
use model::folder::ModelFolder;
use model::generate::{Sampling, generate};
use serde::Deserialize;
use serde_json::{Value, json};
use toml::Table;

use crate::commands::Adapted;
use crate::commands::generate::chat_ids;
use crate::commands::train::launch;
use crate::device::{Device, Job};
use crate::failure::Advised;
use crate::output::Output;
use crate::signals;

const RECIPE: &str = include_str!("../recipes/demo.toml");
const FILES: [(&str, &[u8]); 8] = [
    (
        "base/config.json",
        include_bytes!("../demo/base/config.json"),
    ),
    (
        "base/generation_config.json",
        include_bytes!("../demo/base/generation_config.json"),
    ),
    (
        "base/tokenizer.json",
        include_bytes!("../demo/base/tokenizer.json"),
    ),
    (
        "base/tokenizer_config.json",
        include_bytes!("../demo/base/tokenizer_config.json"),
    ),
    (
        "base/chat_template.jinja",
        include_bytes!("../demo/base/chat_template.jinja"),
    ),
    (
        "base/model.safetensors",
        include_bytes!("../demo/base/model.safetensors"),
    ),
    ("train.jsonl", include_bytes!("../demo/train.jsonl")),
    ("eval.jsonl", EVAL_ROWS.as_bytes()),
];
const EVAL_ROWS: &str = include_str!("../demo/eval.jsonl");

const INTRODUCTION: &str = "\
This demo teaches a small Llama something new. The model knows how to take words apart and put them
together, but it has never heard of pig latin. It is asked about 100 words that are not among its
training rows, trained with LoRA while its own weights stay in 4 bits (NF4), and asked again.";

/// Answers longer than this are wrong anyway.
const MAX_ANSWER_TOKENS: usize = 24;
const SHOWN: usize = 5;

/// A row of the held-out prompts.
#[derive(Debug, Deserialize)]
struct Question {
    prompt: String,
    completion: String,
}

/// Where the demo's files lie.
struct Place {
    base: PathBuf,
    run: PathBuf,
    recipe: Recipe,
}

/// What the demo found.
struct Scores {
    questions: Vec<Question>,
    before: Vec<String>,
    after: Vec<String>,
}

/// Asks the base model, trains an adapter, and asks again.
pub fn run(device: &str, no_tui: bool, output: &Output) -> Result<ExitCode> {
    let start = Instant::now();
    let found = Device::find(device)?;
    output.note(INTRODUCTION);
    let place = write_files()?;
    let questions = questions()?;

    let Some(before) = ask(&found, &place, None, &questions, output)? else {
        return signals::interrupted(output);
    };
    let count = questions.len();
    let right = num_right(&questions, &before);
    output.note(format_args!(
        "\nbefore: {right} of {count} answers are right\n"
    ));

    let finished = launch(place.recipe.clone(), None, device, no_tui, output)?;
    if finished.outcome.stopped == Some(Stopped::Interrupted) {
        return finished.announce(output);
    }
    let Some(after) = ask(&found, &place, Some(&finished.result), &questions, output)? else {
        return signals::interrupted(output);
    };
    let scores = Scores {
        questions,
        before,
        after,
    };
    scores.check(&place)?;
    let seconds = start.elapsed().as_secs_f64();
    scores.report(&place, &finished.result, seconds, output)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the model and the rows, and makes the recipe of a run with them.
fn write_files() -> Result<Place> {
    let folder = Path::new("runs").join("demo-files");
    let base = folder.join("base");
    fs::create_dir_all(&base).with_context(|| format!("cannot create {}", base.display()))?;
    for (name, bytes) in FILES {
        write_file(&folder.join(name), bytes)?;
    }
    let time = jiff::Zoned::now().strftime("%Y%m%d-%H%M%S");
    let run = Path::new("runs").join(format!("demo-{time}"));
    let recipe = recipe(&[
        ("model.path", &base),
        ("data.train", &folder.join("train.jsonl")),
        ("data.eval", &folder.join("eval.jsonl")),
        ("output.dir", &run),
    ])?;
    Ok(Place { base, run, recipe })
}

/// The demo's recipe with these paths.
fn recipe(paths: &[(&str, &Path)]) -> Result<Recipe> {
    let sections: Table = RECIPE.parse().context("the demo's recipe is not TOML")?;
    let mut settings = Vec::new();
    for (section, keys) in &sections {
        for (key, value) in keys.as_table().into_iter().flatten() {
            settings.push((format!("{section}.{key}"), value.clone()));
        }
    }
    let path = |(key, path): &(&str, &Path)| {
        (
            (*key).to_owned(),
            toml::Value::String(path.display().to_string()),
        )
    };
    settings.extend(paths.iter().map(path));
    Ok(Recipe::read(None, &settings)?)
}

fn questions() -> Result<Vec<Question>> {
    let rows = EVAL_ROWS.lines().map(serde_json::from_str);
    rows.collect::<Result<_, _>>()
        .context("the demo's eval.jsonl is damaged")
}

/// The model's answers; `None` when Ctrl-C came.
fn ask(
    device: &Device,
    place: &Place,
    adapter: Option<&Path>,
    questions: &[Question],
    output: &Output,
) -> Result<Option<Vec<String>>> {
    device.clone().run(Ask {
        adapted: Adapted {
            base: ModelFolder::open(&place.base)?,
            adapters: adapter.map(Weighted::whole).into_iter().collect(),
            combination: Combination::default(),
            scheme: place.recipe.quantization.scheme(),
            task: None,
            output: *output,
        },
        questions,
        interrupter: signals::ask_first("stopping after this answer (again: at once)"),
    })
}

struct Ask<'a> {
    adapted: Adapted,
    questions: &'a [Question],
    interrupter: Interrupter,
}

impl Job for Ask<'_> {
    type Output = Option<Vec<String>>;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Self::Output> {
        let model = self.adapted.load::<B::InnerBackend>(&device)?;
        let base = &self.adapted.base;
        let tokenizer = base
            .tokenizer()?
            .context("the demo's model has no tokenizer")?;
        let stop = &base.generation.eos_token_ids;
        let greedy = Sampling::default();
        let go_on = &mut |_| ControlFlow::Continue(());
        let mut answers = Vec::with_capacity(self.questions.len());
        for question in self.questions {
            if self.interrupter.should_stop() {
                return Ok(None);
            }
            let prompt = chat_ids(base, &tokenizer, &question.prompt)?;
            let answer = generate(
                &model,
                &prompt,
                MAX_ANSWER_TOKENS,
                stop,
                greedy,
                &device,
                go_on,
            )?;
            answers.push(tokenizer.decode(answer.text_ids(), true)?);
        }
        Ok(Some(answers))
    }
}

/// How many answers are right to the letter.
fn num_right(questions: &[Question], answers: &[String]) -> usize {
    let pairs = questions.iter().zip(answers);
    pairs
        .filter(|(question, answer)| question.completion == **answer)
        .count()
}

impl Scores {
    fn before(&self) -> usize {
        num_right(&self.questions, &self.before)
    }

    fn after(&self) -> usize {
        num_right(&self.questions, &self.after)
    }

    /// More than nine in ten answers must be right after training.
    fn check(&self, place: &Place) -> Result<()> {
        let (after, count) = (self.after(), self.questions.len());
        if after * 10 > count * 9 {
            return Ok(());
        }
        Err(Advised::failed(
            format!("after training, only {after} of {count} answers of the demo are right"),
            format!(
                "try `trainer --device cpu`; if it fails there, too, report it with {}",
                place.run.join("metrics.jsonl").display()
            ),
        )
        .into())
    }

    fn report(&self, place: &Place, adapter: &Path, seconds: f64, output: &Output) -> Result<()> {
        let next = next_steps(place, adapter, seconds);
        let text = format!("\n{}\n\n{next}", self.table());
        output.result(&self.to_json(place, adapter, seconds), &text)
    }

    /// Some questions and their answers, and the scores.
    fn table(&self) -> String {
        let head = ["prompt", "expected", "before", "after"].map(str::to_owned);
        let rows = self
            .questions
            .iter()
            .zip(self.before.iter().zip(&self.after))
            .take(SHOWN);
        let row = |(question, (before, after)): (&Question, (&String, &String))| {
            [
                question.prompt.clone(),
                question.completion.clone(),
                shown(before),
                shown(after),
            ]
        };
        let mut rows: Vec<[String; 4]> = std::iter::once(head).chain(rows.map(row)).collect();
        rows.push(Default::default());
        let score = |right: usize| format!("{right} of {}", self.questions.len());
        rows.push([
            "right".into(),
            String::new(),
            score(self.before()),
            score(self.after()),
        ]);
        lay_out(&rows)
    }

    fn to_json(&self, place: &Place, adapter: &Path, seconds: f64) -> Value {
        let example = |at: usize| {
            let question = &self.questions[at];
            json!({
                "prompt": question.prompt,
                "expected": question.completion,
                "before": self.before[at],
                "after": self.after[at],
            })
        };
        json!({
            "before": self.before(),
            "after": self.after(),
            "prompts": self.questions.len(),
            "examples": (0..SHOWN.min(self.questions.len())).map(example).collect::<Vec<_>>(),
            "model": place.base,
            "adapter": adapter,
            "run": place.run,
            "seconds": seconds,
        })
    }
}

/// An answer on one line of a table.
fn shown(answer: &str) -> String {
    answer.escape_debug().to_string()
}

/// Columns as wide as their widest cell.
fn lay_out(rows: &[[String; 4]]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths = [0, 1, 2, 3].map(width);
    let line = |row: &[String; 4]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn next_steps(place: &Place, adapter: &Path, seconds: f64) -> String {
    let (base, adapter) = (place.base.display(), adapter.display());
    format!(
        "\
The adapter lies in {adapter} (the demo took {seconds:.0} s). Ask it yourself:
  trainer generate --model {base} --quant nf4 --adapter {adapter} --chat --prompt \"pig latin: banana\"

On a real model and your own rows, {{\"prompt\": …, \"completion\": …}} a line:
  trainer train --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl --output runs/mine
  trainer generate --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/mine/adapter --chat --prompt \"…\"
  trainer eval --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/mine/adapter --data held-out.jsonl"
    )
}
