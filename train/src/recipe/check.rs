//! Values that cannot be, and requests that cannot be honoured.

use std::borrow::Cow;
use std::fmt::Display;

use adapters::{Method, Selection};
use serde::Serialize;
use toml::Table;

use super::{ComputeDtype, ModelInit, Recipe, TrainSection};

/// Numbers beyond these are slips, and would be allocated.
const MAX_ROWS_PER_STEP: usize = 1 << 20;
const MAX_STEPS: usize = 1 << 32;

/// The key and what is wrong with it, for everything that is wrong.
pub(super) fn problems(recipe: &Recipe) -> Vec<(Cow<'static, str>, String)> {
    let mut found = Problems::default();
    for check in [model, quantization, adapter, data, steps, optimizer] {
        check(recipe, &mut found);
    }
    found.0
}

/// A key whose value changes nothing beside the others.
pub(super) struct Unused {
    /// `section.key`.
    pub key: String,
    /// Why it means nothing.
    pub reason: &'static str,
    /// Whether it has the value that it has if nobody sets it.
    pub is_default: bool,
}

/// Every key that the others make meaningless.
pub(super) fn unused(recipe: &Recipe) -> Vec<Unused> {
    let mut all = Vec::new();
    if recipe.adapter.is_full() {
        let reason = "adapter.method = \"full\" trains all weights, without an adapter";
        all.extend(all_but("method", "adapter", &recipe.adapter, reason));
    }
    if !recipe.adapter.is_full() && !recipe.adapter.settings.changes_layers() {
        let reason = "what this method trains stands in front of the rows, and adapts no layers";
        let selection = adapters::methods::keys_of::<Selection>();
        let meant = |key: &str| selection.iter().any(|known| key.ends_with(known));
        let all_keys = all_but("method", "adapter", &recipe.adapter, reason);
        all.extend(all_keys.filter(|unused| meant(&unused.key)));
    }
    if recipe.quantization.format == "none" {
        let reason = "quantization.format is \"none\"";
        all.extend(all_but(
            "format",
            "quantization",
            &recipe.quantization,
            reason,
        ));
    }
    if !recipe.data.eval.is_empty() {
        all.push(Unused {
            key: "data.eval_fraction".into(),
            reason: "data.eval has the rows to evaluate",
            is_default: recipe.data.eval_fraction == 0.0,
        });
    }
    if recipe.train.warmup_steps.is_some() {
        all.push(Unused {
            key: "train.warmup_ratio".into(),
            reason: "train.warmup_steps says how long the warm-up is",
            is_default: recipe.train.warmup_ratio == TrainSection::default().warmup_ratio,
        });
    }
    if !evaluates(recipe) {
        all.push(Unused {
            key: "train.eval_every".into(),
            reason: "there are no rows to evaluate",
            is_default: recipe.train.eval_every == 0,
        });
    }
    all
}

/// All keys of a section but the one that decides whether they mean something.
fn all_but<T: Serialize + Default>(
    deciding: &str,
    section: &str,
    values: &T,
    reason: &'static str,
) -> impl Iterator<Item = Unused> {
    let table = |values: &T| Table::try_from(values).expect("a section is a plain table");
    let (values, defaults) = (table(values), table(&T::default()));
    let others = values.into_iter().filter(move |(key, _)| key != deciding);
    others.map(move |(key, value)| Unused {
        key: format!("{section}.{key}"),
        reason,
        is_default: defaults.get(&key) == Some(&value),
    })
}

#[derive(Default)]
struct Problems(Vec<(Cow<'static, str>, String)>);

impl Problems {
    /// Notes that `key` `text` unless `ok`.
    fn unless(&mut self, ok: bool, key: impl Into<Cow<'static, str>>, text: impl Display) {
        if !ok {
            let key = key.into();
            let problem = format!("{key} {text}");
            self.0.push((key, problem));
        }
    }
}

fn model(recipe: &Recipe, problems: &mut Problems) {
    problems.unless(
        recipe.model.init != ModelInit::Random || recipe.adapter.is_full(),
        "model.init",
        "= \"random\" needs adapter.method = \"full\"",
    );
}

fn quantization(recipe: &Recipe, problems: &mut Problems) {
    let (format, scheme) = (&recipe.quantization.format, recipe.quantization.scheme());
    problems.unless(
        scheme.is_some() || format == "none",
        "quantization.format",
        format_args!("= {format:?} is unknown: expected \"none\", \"nf4\" or \"fp4\""),
    );
    problems.unless(
        scheme.is_none_or(|scheme| scheme.is_supported()),
        "quantization.block_size",
        "must be a power of two from 32 to 4096",
    );
    problems.unless(
        scheme.is_none() || !recipe.adapter.is_full(),
        "quantization.format",
        format_args!(
            "= {format:?} cannot be trained as a whole: use adapter.method = \"lora\", or \"none\""
        ),
    );
}

fn adapter(recipe: &Recipe, problems: &mut Problems) {
    let (adapter, method) = (&recipe.adapter, &recipe.adapter.method);
    let known: Vec<_> = Method::names().map(|name| format!("{name:?}")).collect();
    problems.unless(
        adapter.is_full() || Method::named(method).is_some(),
        "adapter.method",
        format_args!(
            "= {method:?} is not supported: expected {} or \"full\"",
            known.join(", ")
        ),
    );
    for (key, text) in adapter.settings.problems() {
        problems.unless(false, format!("adapter.{key}"), text);
    }
    if let (Some(key), Some(_)) = (adapter.settings.start(), &adapter.init_from) {
        let text = "does not go with adapter.init_from";
        problems.unless(false, format!("adapter.{key}"), text);
    }
}

fn data(recipe: &Recipe, problems: &mut Problems) {
    let data = &recipe.data;
    let text = "must be at least 2";
    problems.unless(data.max_length >= 2, "data.max_length", text);
    let share = (0.0..1.0).contains(&data.eval_fraction);
    problems.unless(share, "data.eval_fraction", "must be from 0 to below 1");
}

fn steps(recipe: &Recipe, problems: &mut Problems) {
    let train = &recipe.train;
    problems.unless(
        train.epochs > 0.0 && train.epochs <= 1e6,
        "train.epochs",
        "must be above 0 and at most 1e6",
    );
    let steps = train.max_steps.unwrap_or(1);
    let narrow = matches!(train.compute_dtype, ComputeDtype::F16 | ComputeDtype::Bf16);
    problems.unless(
        !(narrow && recipe.adapter.is_full()),
        "train.compute_dtype",
        format_args!(
            "= {:?} is for frozen weights, and adapter.method = \"full\" has none: use \"f32\"",
            train.compute_dtype.name()
        ),
    );
    let text = "must be at least 1";
    problems.unless(steps >= 1, "train.max_steps", text);
    let most = format_args!("must be at most {MAX_STEPS}");
    problems.unless(steps <= MAX_STEPS, "train.max_steps", most);
    let (micro, accumulation) = (train.micro_batch_size, train.gradient_accumulation_steps);
    problems.unless(micro >= 1, "train.micro_batch_size", text);
    problems.unless(accumulation >= 1, "train.gradient_accumulation_steps", text);
    let rows = micro.checked_mul(accumulation);
    problems.unless(
        rows.is_some_and(|rows| rows <= MAX_ROWS_PER_STEP),
        "train.micro_batch_size",
        format_args!(
            "times train.gradient_accumulation_steps must be at most {MAX_ROWS_PER_STEP} rows"
        ),
    );
    problems.unless(
        evaluates(recipe) || train.early_stopping_patience == 0,
        "train.early_stopping_patience",
        "needs data.eval or data.eval_fraction",
    );
    problems.unless(train.log_every >= 1, "train.log_every", text);
}

fn optimizer(recipe: &Recipe, problems: &mut Problems) {
    let (train, optimizer) = (&recipe.train, &recipe.train.optimizer);
    problems.unless(
        optimizer == "adamw",
        "train.optimizer",
        format_args!("= {optimizer:?} is not supported: only \"adamw\" is"),
    );
    let positive = |x: f64| x >= 0.0 && (x as f32).is_finite(); // computed in f32
    for (key, value) in [
        ("train.learning_rate", train.learning_rate),
        ("train.weight_decay", train.weight_decay),
    ] {
        problems.unless(positive(value), key, "must be 0 or above");
    }
    let betas = train.betas.iter().all(|beta| (0.0..1.0).contains(beta));
    problems.unless(betas, "train.betas", "must both be from 0 to below 1");
    let eps = train.eps as f32 > 0.0 && (train.eps as f32).is_finite();
    problems.unless(eps, "train.eps", "must be above 0");
    let ratio = (0.0..=1.0).contains(&train.warmup_ratio);
    problems.unless(ratio, "train.warmup_ratio", "must be from 0 to 1");
    problems.unless(
        positive(train.max_grad_norm),
        "train.max_grad_norm",
        "must be 0 (off) or above",
    );
}

fn evaluates(recipe: &Recipe) -> bool {
    !recipe.data.eval.is_empty() || recipe.data.eval_fraction > 0.0
}
