//! Everything about runs that is said in words: groups of labelled values, one for each run.

use adapters::Method;
use toml::Value;

use super::facts::{DataFacts, End, Session};
use super::record::RunRecord;
use super::words::{bytes, count, duration, loss, median};

/// Labelled values under a title.
pub struct Group {
    /// The title.
    pub title: &'static str,
    /// Whether the values are choices and not what came of them.
    pub is_choice: bool,
    /// A label, and the value of each run, `None` where it is not known.
    pub rows: Vec<(&'static str, Vec<Option<String>>)>,
}

type Read = fn(&RunRecord) -> Option<String>;

/// What is said, in order.
const GROUPS: [(&str, &[(&str, Read)]); 5] = [
    (
        "What was trained",
        &[
            ("Base model", |run| Some(run.text("model", "path")?.into())),
            ("Architecture", |run| some(&run.facts.architecture)),
            ("Method", method),
            ("Adapted layers", targets),
            ("Base weights", storage),
            ("Trained parameters", parameters),
        ],
    ),
    (
        "On what",
        &[
            ("Device", device),
            ("Training rows", |run| rows(run, "train")),
            ("Training tokens", |run| tokens(run, "train")),
            ("Training files", |run| files(run, "train")),
            ("Dropped rows", dropped),
            ("Evaluation rows", |run| rows(run, "eval")),
            ("Evaluation tokens", |run| tokens(run, "eval")),
            ("Evaluation files", |run| files(run, "eval")),
        ],
    ),
    (
        "How it went",
        &[
            ("State", |run| Some(state(run))),
            ("Steps", steps),
            ("Epochs", |run| {
                Some(format!("{:.2}", run.steps.last()?.epoch?))
            }),
            ("Loss, first step", |run| {
                Some(loss(run.steps.first()?.loss?))
            }),
            ("Loss, last step", |run| Some(loss(run.steps.last()?.loss?))),
            ("Evaluation loss, first", |run| {
                Some(loss(run.evals.first()?.loss?))
            }),
            ("Evaluation loss, best", best),
            ("Skipped steps", |run| marked(run, |entry| entry.skipped)),
            ("Loss spikes", |run| marked(run, |entry| entry.spike)),
        ],
    ),
    (
        "How long",
        &[
            ("Started", |run| some(&run.facts.sessions.first()?.started)),
            ("Wall time", |run| Some(duration(wall_seconds(run)))),
            ("Reading the weights", |run| {
                Some(duration(run.facts.sessions.first()?.load_seconds))
            }),
            ("Time to the first step", |run| {
                Some(duration(run.facts.sessions.first()?.setup_seconds))
            }),
            ("Step, median", |run| Some(duration(step_seconds(run)?))),
            ("Tokens per second, median", |run| {
                Some(count(speed(run)?.round() as u64))
            }),
            ("Tokens trained on", |run| {
                let all: f64 = run.steps.iter().filter_map(|entry| entry.tokens).sum();
                Some(count(all as u64))
            }),
            ("Resumed", |run| {
                let times = run.facts.sessions.len().checked_sub(1)?;
                (times > 0).then(|| format!("{times} ×"))
            }),
        ],
    ),
    ("Versions", &[("Programs, formats", versions)]),
];

/// What there is to say of some runs; what none of them knows is left out.
pub fn groups(runs: &[RunRecord]) -> Vec<Group> {
    let group = |(title, rows): &(&'static str, &[(&'static str, Read)])| {
        let row = |(label, read): &(&'static str, Read)| {
            let values: Vec<_> = runs.iter().map(read).collect();
            let is_known = values.iter().any(Option::is_some);
            is_known.then_some((*label, values))
        };
        let rows: Vec<_> = rows.iter().filter_map(row).collect();
        let is_choice = !title.starts_with("How");
        (!rows.is_empty()).then_some(Group {
            title,
            is_choice,
            rows,
        })
    };
    GROUPS.iter().filter_map(group).collect()
}

/// A recipe's key, and the value of each run.
pub struct Setting {
    /// `section.key`.
    pub key: String,
    /// Values as TOML; `None` where the key is not set.
    pub values: Vec<Option<String>>,
    /// Whether a run has another value than if nobody had set it.
    pub is_own: bool,
}

/// The recipes of some runs, key by key, in the order of the first that has a key.
pub fn settings(runs: &[RunRecord]) -> Vec<Setting> {
    let mut all: Vec<Setting> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        for (key, value, is_own) in run.settings() {
            let at = match all.iter().position(|setting| setting.key == key) {
                Some(at) => at,
                None => {
                    // beside its section
                    let section = |key: &str| key.split('.').next().map(str::to_owned);
                    let after = all.iter().rposition(|s| section(&s.key) == section(&key));
                    let at = after.map_or(all.len(), |after| after + 1);
                    let setting = Setting {
                        key,
                        values: vec![None; runs.len()],
                        is_own: false,
                    };
                    all.insert(at, setting);
                    at
                }
            };
            all[at].values[index] = Some(value);
            all[at].is_own |= is_own;
        }
    }
    all
}

impl RunRecord {
    fn value(&self, section: &str, key: &str) -> Option<&Value> {
        self.recipe.get(section)?.get(key)
    }

    fn text(&self, section: &str, key: &str) -> Option<&str> {
        self.value(section, key)?.as_str()
    }
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// `LoRA, rank 16, alpha 32`.
pub fn method(run: &RunRecord) -> Option<String> {
    let method = run.text("adapter", "method")?;
    if method == "full" {
        return Some("all weights".into());
    }
    let mut text = match Method::named(method) {
        Some(method) => method.title().to_owned(),
        None => method.to_owned(),
    };
    let number = |key| Some(run.value("adapter", key)?.to_string());
    for key in ["rank", "alpha", "num_virtual_tokens"] {
        let value = number(key);
        text.extend(value.map(|value| format!(", {} {}", key.replace('_', " "), plain(&value))));
    }
    let dropout = number("dropout").filter(|dropout| dropout != "0.0");
    text.extend(dropout.map(|dropout| format!(", dropout {dropout}")));
    for key in ["use_rslora", "use_dora"] {
        if number(key).as_deref() == Some("true") {
            text.push_str(&format!(", {key}"));
        }
    }
    Some(text)
}

/// A whole number without the digits that say so.
fn plain(number: &str) -> &str {
    number.strip_suffix(".0").unwrap_or(number)
}

fn storage(run: &RunRecord) -> Option<String> {
    let format = run.text("quantization", "format")?;
    if format == "none" {
        return Some("as in the model's files, computed in f32".into());
    }
    let block = run.value("quantization", "block_size")?;
    let double = run.value("quantization", "double_quant")?.as_bool()?;
    let double = if double { ", double quantisation" } else { "" };
    Some(format!("{format}, blocks of {block}{double}"))
}

fn targets(run: &RunRecord) -> Option<String> {
    let one = |(name, layers): (&String, &usize)| format!("{name} × {layers}");
    let all: Vec<_> = run.facts.targets.iter().map(one).collect();
    some(&all.join(", "))
}

pub fn parameters(run: &RunRecord) -> Option<String> {
    let (trained, all) = (run.facts.trainable_params, run.facts.all_params);
    (all > 0).then(|| {
        let percent = 100.0 * trained as f64 / all as f64;
        format!("{} of {} ({percent:.2} %)", count(trained), count(all))
    })
}

fn device(run: &RunRecord) -> Option<String> {
    let device = &run.facts.device;
    let id = some(&device.id)?;
    let memory = device.memory_bytes.map(bytes);
    let memory = memory.map_or(String::new(), |memory| format!(", {memory}"));
    Some(format!(
        "{} ({id}, {}{memory})",
        device.name, device.backend
    ))
}

fn data<'a>(run: &'a RunRecord, which: &str) -> Option<&'a DataFacts> {
    run.facts.data.get(which).filter(|data| data.rows > 0)
}

fn rows(run: &RunRecord, which: &str) -> Option<String> {
    let data = data(run, which)?;
    Some(match data.files.is_empty() {
        true => format!("{} (held back)", count(data.rows as u64)),
        false => count(data.rows as u64),
    })
}

fn tokens(run: &RunRecord, which: &str) -> Option<String> {
    let data = data(run, which)?;
    let (trained, all) = (data.trained_tokens, data.total_tokens);
    Some(format!("{} trained of {}", count(trained), count(all)))
}

fn files(run: &RunRecord, which: &str) -> Option<String> {
    let files = data(run, which)?.files.iter();
    let all: Vec<_> = files.map(|file| file.display().to_string()).collect();
    some(&all.join("\n"))
}

fn dropped(run: &RunRecord) -> Option<String> {
    let dropped = run.facts.data.get("train")?.dropped_rows;
    Some(match dropped {
        0 => "none".into(),
        dropped => format!("{}, too long", count(dropped as u64)),
    })
}

/// How a run stands.
pub fn state(run: &RunRecord) -> String {
    let last = run.last_step();
    let Some(session) = run.facts.session() else {
        return "not known".into();
    };
    match session.end {
        End::Finished => "finished".into(),
        End::StoppedEarly => format!("stopped early after step {last}"),
        End::Interrupted => format!("interrupted after step {last}"),
        End::Running => "running, or killed".into(),
        End::Failed => match &session.failure {
            Some(failure) => format!("failed: {failure}"),
            None => "failed".into(),
        },
    }
}

fn steps(run: &RunRecord) -> Option<String> {
    let (taken, all) = (run.last_step() as u64, run.facts.steps as u64);
    Some(match all {
        0 => count(taken),
        all => format!("{} of {}", count(taken), count(all)),
    })
}

fn best(run: &RunRecord) -> Option<String> {
    let best = run.best()?;
    let value = best.loss?;
    Some(format!(
        "{} after step {} (perplexity {:.3})",
        loss(value),
        count(best.step as u64),
        value.exp()
    ))
}

fn marked(run: &RunRecord, which: fn(&super::Entry) -> bool) -> Option<String> {
    let number = run.steps.iter().filter(|entry| which(entry)).count();
    (number > 0).then(|| count(number as u64))
}

/// The time of all sessions, or at least of all steps.
pub fn wall_seconds(run: &RunRecord) -> f64 {
    let steps: f64 = run.steps.iter().filter_map(|entry| entry.seconds).sum();
    let sessions = run.facts.sessions.iter();
    steps.max(sessions.map(|Session { seconds, .. }| seconds).sum())
}

/// The median time of a step.
pub fn step_seconds(run: &RunRecord) -> Option<f64> {
    median(run.steps.iter().filter_map(|entry| entry.seconds))
}

/// The median number of tokens a second.
pub fn speed(run: &RunRecord) -> Option<f64> {
    median(run.steps.iter().filter_map(|entry| entry.tokens_per_second))
}

fn versions(run: &RunRecord) -> Option<String> {
    let one = |(name, version): (&String, &String)| format!("{name} {version}");
    let all: Vec<_> = run.facts.versions.iter().map(one).collect();
    some(&all.join(", "))
}
