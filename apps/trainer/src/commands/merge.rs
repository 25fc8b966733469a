//! `trainer merge`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use adapters::peft::in_words;
use adapters::{Drift, Merge, Onto, TrainBackend, Weighted, drift};
use anyhow::Result;
use model::checkpoint::Checkpoint;
use model::folder::{ModelFolder, write_folder};
use model::hub::Files;
use safetensors::Dtype;
use serde_json::json;
use train::card::merged::MergedCard;

use super::weighted::{combination, open_adapters, read_weight};
use super::{check_out, open_model, other_base};
use crate::cli::MergeArgs;
use crate::device::{Device, Job};
use crate::encoder::choose_template;
use crate::failure::Advised;
use crate::output::Output;
use crate::signals;

/// What the drift is measured on, where the model has a tokenizer.
const PROBE: &str = "The bridge was closed for repairs on 14 March, so the 27 children of the \
    village school crossed the river by boat. Each trip carried 6 of them; how many trips did the \
    ferryman make? He made 5 trips, since 27 / 6 is more than 4.\n\n\
    def mean(values):\n    return sum(values) / len(values)\n\n\
    \"Is it far?\" she asked. Nobody knew: the old map showed only hills, and two names in another \
    language.";
/// How many tokens of it are taken, or how many stand for it where there is no tokenizer.
const PROBE_TOKENS: usize = 96;
/// The share of the updates below which rounding is warned of.
const LEFT_AT_LEAST: f64 = 0.95;

/// Writes a model with adapters merged into it.
pub fn run(args: MergeArgs, device: &str, output: &Output) -> Result<ExitCode> {
    let device = Device::find(device)?;
    check_out(&args.out)?;
    let mut source = open_model(&args.model, Files::Model, output)?;
    check_outside(&args.out, &source.path)?;
    let adapters = open_adapters(&args.adapters, output)?;
    choose_template(&mut source, &adapters, None)?;
    let checkpoint = source.checkpoint()?;
    let onto = args.onto.as_deref().map(|onto| match onto {
        "original" => Onto::Original,
        _ => Onto::Dequantized,
    });
    let combination = combination(&args.adapters.combine);
    let mut merge = Merge::new(&source, &checkpoint, &adapters, combination, onto)?;
    if let Some(dtype) = args.dtype.as_deref() {
        merge = merge.into_dtype(match dtype {
            "f32" => Dtype::F32,
            "f16" => Dtype::F16,
            _ => Dtype::BF16,
        });
    }
    warn(&merge, &adapters, output);
    let ids = probe(&source)?;
    let interrupter = signals::ask_first("stopping");
    let go_on = || !interrupter.should_stop();
    output.note(format_args!("merging {} tensors", merge.tensors()));
    let written = write_folder(&args.out, |folder| {
        let kept = merge.write(folder, &go_on)?.share();
        output.note("measuring the drift");
        let drift = device.run(DriftJob {
            merge: &merge,
            merged: Checkpoint::open_folder(folder)?,
            ids: &ids,
            go_on: &go_on,
        })?;
        card(&args, &adapters, &merge, &drift, kept).write(folder)?;
        Ok::<_, anyhow::Error>((drift, kept))
    });
    match written {
        Err(_) if interrupter.should_stop() => signals::interrupted(output),
        written => {
            let (drift, kept) = written?;
            report(&args.out, &merge, drift, kept, output)
        }
    }
}

/// Refuses to put a folder into the model's own.
fn check_outside(out: &Path, model: &Path) -> Result<()> {
    let above = out.ancestors().find_map(|path| match path {
        path if path.as_os_str().is_empty() => std::env::current_dir().ok(),
        path => path.canonicalize().ok(),
    });
    let inside = above
        .zip(model.canonicalize().ok())
        .is_some_and(|(above, model)| above.starts_with(model));
    match inside {
        true => Err(Advised::usage(
            format!("--out {} lies in the folder of the model", out.display()),
            format!("choose a folder outside of {}", model.display()),
        )
        .into()),
        false => Ok(()),
    }
}

fn warn(merge: &Merge, adapters: &[Weighted], output: &Output) {
    if adapters.is_empty() {
        output.note("warning: there is no --adapter: the weights are written as they are");
    }
    for (folder, base) in merge.strangers() {
        output.note(other_base(
            folder.display(),
            base,
            &in_words(merge.trained_on()),
        ));
    }
}

/// The same tokens for the same model: a text, or numbers all over the vocabulary.
fn probe(source: &ModelFolder) -> Result<Vec<u32>> {
    let vocab = source.config.vocab_size;
    if let Some(tokenizer) = source.tokenizer()? {
        let mut ids = tokenizer.encode(PROBE, true)?.ids;
        ids.truncate(PROBE_TOKENS);
        if !ids.is_empty() && ids.iter().all(|id| (*id as usize) < vocab) {
            return Ok(ids);
        }
    }
    let id = |i| (i * 0x9e37_79b1 % vocab as u64) as u32; // a prime far above any vocabulary
    Ok((1..=PROBE_TOKENS as u64).map(id).collect())
}

/// What the merged model says of itself.
fn card<'a>(
    args: &'a MergeArgs,
    adapters: &[Weighted],
    merge: &Merge,
    drift: &Drift,
    kept: Option<f64>,
) -> MergedCard<'a> {
    let names = args.adapters.adapter.iter().zip(adapters);
    MergedCard {
        base: &args.model,
        adapters: names
            .map(|(text, adapter)| (name_of(text), adapter.weight))
            .collect(),
        combination: args.adapters.combine.as_str(),
        onto: onto(merge),
        drift: *drift,
        kept,
    }
}

/// An adapter as it was named, without its weight.
fn name_of(text: &str) -> &str {
    read_weight(text).map_or(text, |(name, _)| name)
}

/// Which weights were merged onto, in words.
fn onto(merge: &Merge) -> String {
    match merge.onto() {
        Onto::Original => "the original weights".to_owned(),
        Onto::Dequantized => format!("what {} decodes to", in_words(merge.trained_on())),
    }
}

fn report(
    out: &PathBuf,
    merge: &Merge,
    drift: Drift,
    kept: Option<f64>,
    output: &Output,
) -> Result<ExitCode> {
    let onto = match merge.onto() {
        Onto::Original => "original".to_owned(),
        Onto::Dequantized => in_words(merge.trained_on()),
    };
    let json = json!({
        "out": out,
        "tensors": merge.tensors(),
        "merged_layers": merge.merged_layers(),
        "onto": onto,
        "update_kept": kept,
        "drift": {
            "tokens": drift.tokens,
            "max_abs": drift.max_abs,
            "mean_abs": drift.mean_abs,
            "kl": drift.kl,
            "same_top": drift.same_top,
        },
    });
    let onto = self::onto(merge);
    let text = format!(
        "{}\nmerged {} layers onto {onto}, {} tensors in all\ndrift from the trained model (base: \
         {}) on {} tokens: logits {:.2e} at most, {:.2e} in the mean; KL divergence {:.2e} nats; \
         the same most likely token after {:.1} %",
        out.display(),
        merge.merged_layers(),
        merge.tensors(),
        match merge.trained_on() {
            Some(scheme) => scheme.to_string(),
            None => "not quantised".to_owned(),
        },
        drift.tokens,
        drift.max_abs,
        drift.mean_abs,
        drift.kl,
        100.0 * drift.same_top,
    );
    let text = match kept {
        Some(kept) => format!(
            "{text}\n{:.1} % of the updates are left after rounding to the type of the weights",
            100.0 * kept
        ),
        None => text,
    };
    output.result(&json, &text)?;
    if kept.is_some_and(|kept| kept < LEFT_AT_LEAST) {
        output.note(
            "warning: the weights have too few digits for much of what was learned: with --dtype f32 \
             all of it is kept, in larger files",
        );
    }
    Ok(ExitCode::SUCCESS)
}

struct DriftJob<'a, 'm> {
    merge: &'a Merge<'m>,
    merged: Checkpoint,
    ids: &'a [u32],
    go_on: &'a dyn Fn() -> bool,
}

impl Job for DriftJob<'_, '_> {
    type Output = Drift;

    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Drift> {
        let drift =
            drift::<B::InnerBackend>(self.merge, &self.merged, self.ids, &device, self.go_on)?;
        Ok(drift)
    }
}
