//! What a run will hold, whether that fits, and what would make it fit.

use std::path::Path;

use ::train::batch::Windows;
use ::train::memory::{Memory, Place, Work};
use ::train::recipe::{ModelInit, Recipe, Recompute};
use ::train::session::Rows;
use ::train::trained::Trained;
use adapters::base_bytes;
use anyhow::Result;
use model::folder::ModelFolder;

use crate::commands::gib;
use crate::device::Device;
use crate::output::Output;

/// Shortest rows that are proposed.
const SHORTEST: usize = 128;

/// What a run will hold.
#[derive(Debug, Clone)]
pub struct Forecast {
    /// At the moment when it holds the most.
    pub memory: Memory,
    /// Whether layers are computed again.
    pub recompute: bool,
    /// The choice and its reason, where the recipe leaves it to the memory.
    pub choice: Option<String>,
    /// That it does not fit, and what would make it fit.
    pub problem: Option<String>,
    place: Place,
}

impl Forecast {
    /// Says what was chosen, and warns.
    pub fn tell(&self, output: &Output) {
        if let Some(choice) = &self.choice {
            output.note(choice);
        }
        if let Some(problem) = &self.problem {
            output.note(format_args!("warning: {problem}"));
        }
    }

    /// Whether it is of this process's memory, which can be measured.
    pub fn is_measured(&self) -> bool {
        matches!(self.place, Place::Host { .. })
    }
}

/// What decides a forecast.
struct Asked<'a> {
    trained: &'a Trained,
    base: &'a ModelFolder,
    /// The rows that have been read; without them micro batches are full.
    rows: Option<Lengths>,
    place: Place,
    available: Option<u64>,
}

/// How long the rows of a run are.
struct Lengths {
    /// `train.micro_batch_size` and `data.max_length` of the run.
    of: (usize, usize),
    /// Tokens of its largest micro batch.
    largest: usize,
    /// Tokens of its sequences, the most first.
    sequences: Vec<usize>,
    /// In front of every row.
    virtual_tokens: usize,
}

impl Lengths {
    fn new(rows: &Rows, recipe: &Recipe, virtual_tokens: usize) -> Self {
        let (data, train) = (&recipe.data, &recipe.train);
        let windows = Windows::behind(virtual_tokens, rows.train.clone(), data, train, 0);
        Self {
            virtual_tokens,
            of: (recipe.train.micro_batch_size, recipe.data.max_length),
            largest: windows.max_tokens(),
            sequences: windows.sequence_tokens(),
        }
    }

    /// The most tokens that a micro batch of so many sequences of this length can have.
    fn most(&self, micro_batch_size: usize, max_length: usize) -> usize {
        if self.of == (micro_batch_size, max_length) {
            return self.largest;
        }
        let sequences = self.sequences.iter().take(micro_batch_size);
        let room = max_length.saturating_add(self.virtual_tokens);
        sequences.map(|tokens| *tokens.min(&room)).sum()
    }
}

/// Predicts what the run of a recipe will hold on a device.
pub fn forecast(
    recipe: &Recipe,
    trained: &Trained,
    base: &ModelFolder,
    rows: Option<&Rows>,
    device: &Device,
) -> Result<Forecast> {
    let asked = Asked {
        trained,
        base,
        rows: rows.map(|rows| Lengths::new(rows, recipe, trained.virtual_tokens())),
        place: device.place(),
        available: device.available_bytes(),
    };
    let (memory, recompute) = asked.predict(recipe)?;
    Ok(Forecast {
        memory,
        recompute,
        choice: asked.choice(recipe, recompute)?,
        problem: asked.problem(recipe, &memory)?,
        place: asked.place,
    })
}

impl Asked<'_> {
    fn predict(&self, recipe: &Recipe) -> Result<(Memory, bool)> {
        let (data, train) = (&recipe.data, &recipe.train);
        let random = recipe.model.init == ModelInit::Random;
        let scheme = recipe.quantization.scheme();
        let sequence = data
            .max_length
            .saturating_add(self.trained.virtual_tokens());
        let most = train.micro_batch_size.saturating_mul(sequence);
        let rows = self.rows.as_ref();
        let tokens = rows.map_or(most, |rows| {
            rows.most(train.micro_batch_size, data.max_length)
        });
        let mut work = Work {
            trained: self.trained,
            config: &self.base.config,
            quantised: !random && (scheme.is_some() || self.is_stored()),
            weights: match random {
                true => 4 * self.base.config.num_params().min(u64::MAX / 128),
                false => {
                    base_bytes(self.base, scheme, train.compute_dtype.dtype())?.min(u64::MAX / 32)
                }
            },
            tokens: tokens.min(most),
            compute_dtype: train.compute_dtype,
            accumulates: train.gradient_accumulation_steps > 1,
            recompute: false,
            place: self.place,
        };
        let memory = work.settle_recompute(train.recompute, self.available)?;
        Ok((memory, work.recompute))
    }

    fn is_stored(&self) -> bool {
        self.base.config.quantization_config.is_some()
    }

    /// What `train.recompute = "auto"` comes to.
    fn choice(&self, recipe: &Recipe, recompute: bool) -> Result<Option<String>> {
        if recipe.train.recompute != Recompute::Auto {
            return Ok(None);
        }
        let choice = if recompute { "block" } else { "none" };
        let reason = match self.available {
            None => "the memory of this device is not known".into(),
            Some(available) => {
                let mut plain = recipe.clone();
                plain.train.recompute = Recompute::None;
                let (memory, _) = self.predict(&plain)?;
                format!(
                    "without it the run takes about {:.1} GiB of the {:.1} GiB available",
                    gib(memory.total() - memory.program),
                    gib(available)
                )
            }
        };
        Ok(Some(format!("train.recompute = auto: {choice} ({reason})")))
    }

    /// What to say of a run that does not fit.
    fn problem(&self, recipe: &Recipe, memory: &Memory) -> Result<Option<String>> {
        let Some(available) = self.available.filter(|_| !memory.fits(self.available)) else {
            return Ok(None);
        };
        let needed = format!(
            "the run needs about {:.1} GiB of memory, and {:.1} GiB are available",
            gib(memory.total() - memory.program),
            gib(available)
        );
        for (knobs, recipe) in self.knobs(recipe) {
            let (memory, _) = self.predict(&recipe)?;
            if memory.fits(self.available) {
                let total = gib(memory.total() - memory.program);
                return Ok(Some(format!(
                    "{needed}: set {knobs} (about {total:.1} GiB)"
                )));
            }
        }
        Ok(Some(format!(
            "{needed}, and neither recompute, 4 bits, smaller micro batches nor shorter rows make it \
             fit: use a smaller model"
        )))
    }

    /// Changes of a recipe that take less memory, in words: each alone, then one after the other.
    fn knobs(&self, recipe: &Recipe) -> Vec<(String, Recipe)> {
        let micro = recipe.train.micro_batch_size;
        let halves = |from: usize| std::iter::successors(Some(from / 2), |n| Some(n / 2));
        let micros: Vec<usize> = halves(micro).take_while(|n| *n >= 1).collect();
        let lengths: Vec<usize> = halves(recipe.data.max_length)
            .take_while(|n| *n >= SHORTEST)
            .collect();
        let small = micros.iter().map(|n| with_micro_batch(recipe, *n));
        let short = lengths.iter().map(|n| with_max_length(recipe, *n));
        let mut all: Vec<_> = with_recompute(recipe).into_iter().collect();
        all.extend(self.with_4_bits(recipe));
        all.extend(small.chain(short));

        let mut last = (String::new(), recipe.clone());
        let mut add = |next: Option<(String, Recipe)>, last: &mut (String, Recipe)| {
            let Some((knob, recipe)) = next else { return };
            let knobs = match last.0.is_empty() {
                true => knob,
                false => format!("{} and {knob}", last.0),
            };
            *last = (knobs, recipe);
            all.push(last.clone());
        };
        let next = with_recompute(&last.1);
        add(next, &mut last);
        let next = self.with_4_bits(&last.1);
        add(next, &mut last);
        let together = last.clone();
        for n in micros {
            last.0.clone_from(&together.0);
            let next = with_micro_batch(&together.1, n);
            add(Some(next), &mut last);
        }
        let together = last.clone();
        for n in lengths {
            last.0.clone_from(&together.0);
            let next = with_max_length(&together.1, n);
            add(Some(next), &mut last);
        }
        all
    }

    fn with_4_bits(&self, recipe: &Recipe) -> Option<(String, Recipe)> {
        let dense = recipe.quantization.scheme().is_none() && !self.is_stored();
        if !dense || *self.trained == Trained::Full {
            return None;
        }
        let mut recipe = recipe.clone();
        recipe.quantization.format = "nf4".into();
        Some(("--quant nf4".into(), recipe))
    }
}

fn with_recompute(recipe: &Recipe) -> Option<(String, Recipe)> {
    if recipe.train.recompute != Recompute::None {
        return None; // "auto" has tried it
    }
    let mut recipe = recipe.clone();
    recipe.train.recompute = Recompute::Block;
    Some(("train.recompute = \"block\"".into(), recipe))
}

/// With as many rows a step as before.
fn with_micro_batch(recipe: &Recipe, size: usize) -> (String, Recipe) {
    let mut recipe = recipe.clone();
    let train = &mut recipe.train;
    let rows = train.micro_batch_size * train.gradient_accumulation_steps;
    train.micro_batch_size = size;
    train.gradient_accumulation_steps = rows.div_ceil(size);
    let knob = format!(
        "train.micro_batch_size = {size} with train.gradient_accumulation_steps = {}",
        train.gradient_accumulation_steps
    );
    (knob, recipe)
}

fn with_max_length(recipe: &Recipe, length: usize) -> (String, Recipe) {
    let mut recipe = recipe.clone();
    recipe.data.max_length = length;
    (format!("data.max_length = {length}"), recipe)
}

/// What the headers of a model's weights show to be wrong with them, all of it.
pub fn weight_problems(recipe: &Recipe, base: &ModelFolder) -> Vec<String> {
    if recipe.model.init == ModelInit::Random {
        return Vec::new();
    }
    let is_folder = Path::new(&recipe.model.path).is_dir();
    let told = |error: model::Error| format!("{:#}", anyhow::Error::from(error));
    let files = match model::checkpoint::Checkpoint::files(&base.path) {
        Ok(files) => files,
        Err(error) if is_folder => return vec![told(error)],
        Err(_) => return Vec::new(), // not downloaded
    };
    if !is_folder && files.iter().any(|file| !file.exists()) {
        return Vec::new();
    }
    let open = |file| model::checkpoint::Checkpoint::open_file(file).err();
    let problems: Vec<_> = files
        .iter()
        .filter_map(|file| open(file).map(told))
        .collect();
    if !problems.is_empty() {
        return problems;
    }
    match adapters::check(base, recipe.quantization.scheme()) {
        Ok(()) => Vec::new(),
        Err(adapters::Error::File(model::Error::Tensors { path, problems })) => {
            let place = path.display();
            problems
                .iter()
                .map(|problem| format!("{place}: {problem}"))
                .collect()
        }
        Err(error) => vec![format!("{:#}", anyhow::Error::from(error))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::train::recipe::parse_setting;
    use ::train::session;

    fn recipe(settings: &[&str]) -> Recipe {
        let all = ["model.path=m", "data.train=d"].iter().chain(settings);
        let all: Vec<_> = all.map(|text| parse_setting(text).unwrap()).collect();
        Recipe::read(None, &all).unwrap()
    }

    fn base() -> ModelFolder {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../model/tests/fixtures/models/gqa");
        let mut base = ModelFolder::open(&path).unwrap();
        base.config.num_hidden_layers = 16;
        base
    }

    /// The problem of a recipe with `share` of the memory that it needs.
    fn problem(settings: &[&str], share: f64) -> Option<String> {
        let (recipe, base) = (recipe(settings), base());
        let trained = session::resumed(&recipe);
        let mut asked = Asked {
            trained: &trained,
            base: &base,
            rows: None,
            place: Place::Host { program: 1 << 20 },
            available: None,
        };
        let (memory, _) = asked.predict(&recipe).unwrap();
        let needed = memory.total() - memory.program;
        asked.available = Some((needed as f64 * share) as u64);
        let (memory, _) = asked.predict(&recipe).unwrap();
        asked.problem(&recipe, &memory).unwrap()
    }

    #[test]
    fn the_first_change_that_makes_it_fit_is_named() {
        let plain = ["train.recompute=none"];
        assert_eq!(problem(&plain, 1.2), None);
        let text = problem(&plain, 0.8).unwrap();
        assert!(
            text.contains(": set train.recompute = \"block\" (about "),
            "{text}"
        );
        assert_eq!(problem(&[], 0.8), None); // "auto" has chosen it
        let text = problem(&["train.recompute=block"], 0.75).unwrap();
        let half = "set train.micro_batch_size = 2 with train.gradient_accumulation_steps = 2 (";
        assert!(text.contains(half), "{text}");
        let one = ["train.recompute=block", "train.micro_batch_size=1"];
        let text = problem(&one, 0.8).unwrap();
        assert!(text.contains("set data.max_length = 512 ("), "{text}");
        let text = problem(&plain, 0.1).unwrap();
        assert!(
            text.contains("block\" and --quant nf4 and train.micro"),
            "{text}"
        );
        let text = problem(&plain, 1e-6).unwrap();
        assert!(text.ends_with("use a smaller model"), "{text}");
    }
}
