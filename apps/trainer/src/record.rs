//! What a run leaves beside its metrics: `run.json` from its start on, the report at its end.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ::train::fit::{Outcome, Run, Stopped};
use ::train::recipe::Recipe;
use ::train::report::facts::{DataFacts, DeviceFacts, End, Facts, SampleFacts, Session, TextFacts};
use ::train::report::samples::{self, Answer, Prompt};
use ::train::report::{self, REPORT_FILE, RunRecord};
use ::train::run_folder::peak_memory_bytes;
use ::train::session::Rows;
use ::train::trained::Trained;
use adapters::{TrainBackend, peft};
use anyhow::Result;
use burn::module::AutodiffModule;
use model::config::LlamaConfig;
use model::tokenizer::Tokenizer;

use crate::device::Device;
use crate::output::Output;

/// The release that the workspace pins.
const BURN_VERSION: &str = "0.21.0";

/// What is known before the model is loaded.
pub struct Known {
    /// When the program began.
    pub start: Instant,
    /// Reading, encoding and checking the rows.
    pub rows_time: Duration,
    /// The rows in use.
    pub rows: Rows,
    /// Training rows that were left out.
    pub dropped_rows: usize,
    /// What a user has been warned of.
    pub warnings: Vec<String>,
    /// Where it computes.
    pub device: Device,
}

/// The facts of a run that is going on.
pub struct Record {
    folder: PathBuf,
    facts: Facts,
    start: Instant,
    tokenizer: Option<Tokenizer>,
}

impl Record {
    /// Asks the model what it says before training, unless an earlier session has done so, and
    /// writes the facts; the run is told what to ask in the end.
    pub fn begin<B: TrainBackend>(run: &mut Run<B>, known: Known) -> Result<Self> {
        let folder = run.folder.path().to_path_buf();
        // facts that cannot be read are no reason not to train
        let earlier = Facts::read(&folder).ok().flatten().unwrap_or_default();
        let tokenizer = run.base.tokenizer()?;
        if tokenizer.is_some() {
            run.prompts = samples::prompts(&known.rows, run.recipe.output.samples);
        }
        let mut facts = facts_of(run, &known)?;
        facts.samples = match run.progress.step {
            0 => before(run, tokenizer.as_ref()),
            _ => asked_before(run, tokenizer.as_ref(), &earlier.samples),
        };
        facts.sessions = earlier.sessions;
        facts.sessions.push(Session {
            started: jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S").to_string(),
            from_step: run.progress.step,
            load_seconds: run.load_time.as_secs_f64(),
            setup_seconds: known.start.elapsed().as_secs_f64(),
            ..Session::default()
        });
        facts.write(&folder)?;
        Ok(Self {
            folder,
            facts,
            start: known.start,
            tokenizer,
        })
    }

    /// Writes how the run ended, and its report. What goes wrong here is said, and does not change
    /// how the run ended. Returns the most memory that the run has held in all its sessions.
    pub fn end<E: std::error::Error>(
        mut self,
        outcome: &Result<Outcome, E>,
        output: &Output,
    ) -> u64 {
        let end = match outcome.as_ref().map(|outcome| outcome.stopped) {
            Ok(None) => End::Finished,
            Ok(Some(Stopped::Early)) => End::StoppedEarly,
            Ok(Some(Stopped::Interrupted)) => End::Interrupted,
            Err(_) => End::Failed,
        };
        let answers = outcome.as_ref().map_or(&[][..], |outcome| &outcome.answers);
        for (sample, answer) in self.facts.samples.iter_mut().zip(answers) {
            sample.after = Some(text(answer, self.tokenizer.as_ref()));
        }
        let failure = outcome.as_ref().err().map(with_causes);
        let ended = Ended {
            folder: self.folder,
            facts: self.facts,
            start: self.start,
        };
        ended.write(end, failure, output)
    }

    /// What there is to write if the run is left at once.
    pub fn so_far(&self) -> Ended {
        Ended {
            folder: self.folder.clone(),
            facts: self.facts.clone(),
            start: self.start,
        }
    }
}

/// The facts of a run that is over.
pub struct Ended {
    folder: PathBuf,
    facts: Facts,
    start: Instant,
}

impl Ended {
    /// Writes how the run ended, and its report; returns the most memory it has held.
    pub fn write(mut self, end: End, failure: Option<String>, output: &Output) -> u64 {
        let session = self.facts.sessions.last_mut().expect("it was begun");
        session.seconds = self.start.elapsed().as_secs_f64();
        session.peak_memory_bytes = peak_memory_bytes();
        let held = session.peak_memory_bytes;
        (session.end, session.failure) = (end, failure);
        let written = self.facts.write(&self.folder);
        match written.and_then(|()| write_report(&self.folder)) {
            Ok((page, run)) => {
                output.note(format_args!("report: {}", page.display()));
                return run.measured_bytes().unwrap_or(held);
            }
            Err(::train::Error::NoMetrics { .. } | ::train::Error::NotARun { .. }) => {}
            Err(error) => output.note(format_args!("warning: there is no report: {error}")),
        }
        held
    }
}

/// An error and why, in one line.
fn with_causes(error: &impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

/// Writes the report of one run into its folder.
fn write_report(folder: &Path) -> ::train::Result<(PathBuf, RunRecord)> {
    let page = folder.join(REPORT_FILE);
    let run = RunRecord::read(folder)?;
    report::write(std::slice::from_ref(&run), &page)?;
    Ok((page, run))
}

fn facts_of<B: TrainBackend>(run: &Run<B>, known: &Known) -> Result<Facts> {
    let config = &run.model.model.config;
    let trainable = run.trained.num_params(config)?;
    let memory = run.predicted.unwrap_or_default();
    let parts = memory.parts().into_iter().filter(|(_, size)| *size > 0);
    Ok(Facts {
        versions: versions(&run.trained),
        device: device(&known.device),
        architecture: architecture(config),
        trainable_params: trainable,
        all_params: crate::commands::train::all_params(&run.trained, &run.base, trainable),
        targets: targets(&run.trained, config)?,
        data: data(&run.recipe, known),
        steps: run.windows.num_steps(),
        recompute: run.model.recompute,
        predicted_memory: parts.map(|(name, size)| (name.to_owned(), size)).collect(),
        predicted_peak_bytes: memory.total(),
        warnings: known.warnings.clone(),
        sessions: Vec::new(),
        samples: Vec::new(),
    })
}

fn versions(trained: &Trained) -> BTreeMap<String, String> {
    let mut all = vec![
        ("trainer", env!("CARGO_PKG_VERSION")),
        ("Burn", BURN_VERSION),
    ];
    if let Trained::Adapter(_) = trained {
        all.push(("PEFT", peft::PEFT_VERSION)); // of the format
    }
    let owned = |(name, version): (&str, &str)| (name.to_owned(), version.to_owned());
    all.into_iter().map(owned).collect()
}

fn device(device: &Device) -> DeviceFacts {
    let listed = device.listed();
    DeviceFacts {
        id: listed.id,
        name: listed.name,
        backend: listed.backend,
        memory_bytes: listed.memory_bytes,
    }
}

fn architecture(config: &LlamaConfig) -> String {
    let heads = match (config.num_attention_heads, config.num_key_value_heads) {
        (heads, kv) if heads == kv => format!("{heads} heads"),
        (heads, kv) => format!("{heads} heads, {kv} of them for keys and values"),
    };
    format!(
        "Llama, {} layers, hidden size {}, {heads}, vocabulary {}",
        config.num_hidden_layers, config.hidden_size, config.vocab_size
    )
}

/// How many layers of each name end are adapted, or trained as a whole.
fn targets(trained: &Trained, config: &LlamaConfig) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    if let Trained::Adapter(_) = trained {
        let names = trained.parameters(config)?;
        let modules: BTreeSet<&str> = names
            .iter()
            .filter_map(|(name, _)| Some(name.rsplit_once('.')?.0))
            .collect();
        for module in modules {
            let end = module.rsplit('.').next().unwrap_or(module);
            *counts.entry(end.to_owned()).or_insert(0) += 1;
        }
    }
    Ok(counts)
}

fn data(recipe: &Recipe, known: &Known) -> BTreeMap<String, DataFacts> {
    let (train, eval) = (recipe.data.train.list(), recipe.data.eval.list());
    let mut all = BTreeMap::new();
    let counted = DataFacts::count(train, &known.rows.train, known.dropped_rows);
    all.insert("train".to_owned(), counted);
    if !known.rows.eval.is_empty() {
        let counted = DataFacts::count(eval, &known.rows.eval, 0);
        all.insert("eval".to_owned(), counted);
    }
    all
}

/// What the model says before training.
fn before<B: TrainBackend>(run: &Run<B>, tokenizer: Option<&Tokenizer>) -> Vec<SampleFacts> {
    if run.prompts.is_empty() {
        return Vec::new();
    }
    let model = run.model.model.valid();
    let stop = &run.base.generation.eos_token_ids;
    let answers = samples::answer(&model, &run.prompts, stop, &run.device);
    let sample = |(prompt, answer): (&Prompt, &Answer)| SampleFacts {
        prompt: decode(&prompt.ids, tokenizer, false),
        expected: decode(&prompt.expected, tokenizer, true),
        before: Some(text(answer, tokenizer)),
        after: None,
    };
    run.prompts.iter().zip(&answers).map(sample).collect()
}

/// The samples of a run that goes on: what the model said before training stays, and of prompts that
/// are new by now nobody can tell any more.
fn asked_before<B: TrainBackend>(
    run: &Run<B>,
    tokenizer: Option<&Tokenizer>,
    earlier: &[SampleFacts],
) -> Vec<SampleFacts> {
    let sample = |prompt: &Prompt| {
        let text = decode(&prompt.ids, tokenizer, false);
        let known = earlier.iter().find(|sample| sample.prompt == text);
        known.cloned().unwrap_or_else(|| SampleFacts {
            prompt: text,
            expected: decode(&prompt.expected, tokenizer, true),
            ..SampleFacts::default()
        })
    };
    run.prompts.iter().map(sample).collect()
}

fn text(answer: &Answer, tokenizer: Option<&Tokenizer>) -> TextFacts {
    TextFacts {
        text: decode(&answer.ids, tokenizer, true),
        cut: answer.cut,
    }
}

fn decode(ids: &[u32], tokenizer: Option<&Tokenizer>, skip_special: bool) -> String {
    let text = tokenizer.and_then(|tokenizer| tokenizer.decode(ids, skip_special).ok());
    text.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_of_burn_is_the_one_in_use() {
        let lock = include_str!("../../../Cargo.lock");
        let name = "name = \"burn\"\nversion = ";
        assert!(lock.contains(&format!("{name}\"{}\"", super::BURN_VERSION)));
    }
}
