//! Text generation: one pass over the prompt, then a token at a time.
//!
//! The rules of choice and their order are those of transformers
//! (`transformers/generation/logits_process.py`, `GenerationMixin._get_logits_processor`).

use std::ops::ControlFlow;
use std::time::Instant;

use burn::tensor::{Int, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::config::RopeScaling;
use crate::error::{Error, Result};
use crate::kv_cache::KvCache;
use crate::linear::Projection;
use crate::llama::Llama;
use crate::ops::ModelBackend;
use crate::rope::Rope;
use crate::segments::Segments;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token, and `top_p` and `top_k` mean nothing then.
    pub temperature: f64,
    /// Keeps the most likely tokens that together have this probability.
    pub top_p: Option<f64>,
    /// Keeps this many of the most likely tokens.
    pub top_k: Option<usize>,
    /// Makes tokens of the prompt and of the text so far less likely; 1 is off
    /// (<https://arxiv.org/abs/1909.05858>).
    pub repetition_penalty: f64,
    /// Decides every random choice.
    pub seed: u64,
}

impl Default for Sampling {
    /// The most likely token, always.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: None,
            top_k: None,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Sampling`] with every impossible value.
    pub fn validate(&self) -> Result<()> {
        let mut problems = Vec::new();
        let mut check = |fine: bool, key: &str, value: String, wanted: &str| {
            if !fine {
                problems.push(format!("{key} is {value}: expected {wanted}"));
            }
        };
        let (t, r) = (self.temperature, self.repetition_penalty);
        let fine = t.is_finite() && t >= 0.0;
        check(fine, "temperature", t.to_string(), "0 or more");
        if let Some(p) = self.top_p {
            let fine = p > 0.0 && p <= 1.0;
            check(fine, "top_p", p.to_string(), "more than 0 and at most 1");
        }
        if let Some(k) = self.top_k {
            check(k > 0, "top_k", k.to_string(), "1 or more");
        }
        let fine = r.is_finite() && r > 0.0;
        check(fine, "repetition_penalty", r.to_string(), "more than 0");
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Sampling { problems }),
        }
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token came, or the caller stopped it.
    Stop,
    /// The text has as many tokens as were asked for.
    Length,
}

/// A generated text.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The new tokens; when a stop token ended the text, it is the last.
    pub token_ids: Vec<u32>,
    /// Whether the last of `token_ids` is a stop token.
    pub ends_in_stop_token: bool,
    /// Why the text ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt that were read; the others were known from the text before.
    pub read_tokens: usize,
    /// Wall time, the pass over the prompt included.
    pub seconds: f64,
}

impl Generation {
    /// The new tokens without the stop token.
    pub fn text_ids(&self) -> &[u32] {
        let stops = usize::from(self.ends_in_stop_token);
        &self.token_ids[..self.token_ids.len() - stops]
    }

    /// New tokens a second; 0 when there are none.
    pub fn tokens_per_second(&self) -> f64 {
        match self.token_ids.len() {
            0 => 0.0,
            count => count as f64 / self.seconds.max(f64::MIN_POSITIVE),
        }
    }
}

/// Continues one prompt: [`Generator::generate`].
///
/// # Errors
/// As there.
pub fn generate<B: ModelBackend, P: Projection<B>>(
    model: &Llama<B, P>,
    prompt_ids: &[u32],
    max_new_tokens: usize,
    stop_ids: &[u32],
    sampling: Sampling,
    device: &B::Device,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    Generator::new(model, device).generate(prompt_ids, max_new_tokens, stop_ids, sampling, on_token)
}

/// A model that remembers the text it has read: of the next one it reads what comes after the
/// beginning that both share.
pub struct Generator<'a, B: ModelBackend, P> {
    model: &'a Llama<B, P>,
    device: &'a B::Device,
    /// The tokens whose keys and values are in `cache`.
    read: Vec<u32>,
    cache: KvCache<B>,
    /// The task that the text is of.
    task: usize,
}

impl<'a, B: ModelBackend, P: Projection<B>> Generator<'a, B, P> {
    /// A model that has read nothing yet.
    ///
    /// Of a model that is being trained, pass the valid one, or every step is kept for a backward
    /// pass.
    pub fn new(model: &'a Llama<B, P>, device: &'a B::Device) -> Self {
        Self {
            model,
            device,
            read: Vec::new(),
            cache: KvCache::new(model.config.num_hidden_layers),
            task: 0,
        }
    }

    /// The same for texts of a task, where an adapter tells them apart.
    pub fn of_task(self, task: usize) -> Self {
        Self { task, ..self }
    }

    /// Continues a prompt.
    ///
    /// `on_token` gets each new token as soon as it is known, but no stop token, and may end the
    /// text.
    ///
    /// # Errors
    /// [`Error::Sampling`], [`Error::EmptyPrompt`] and [`Error::TokenOutOfRange`] before anything
    /// is computed; [`Error::LogitsNotFinite`] when the model breaks down.
    pub fn generate(
        &mut self,
        prompt_ids: &[u32],
        max_new_tokens: usize,
        stop_ids: &[u32],
        sampling: Sampling,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let start = Instant::now();
        sampling.validate()?;
        let vocab_size = self.model.config.vocab_size;
        check_prompt(prompt_ids, vocab_size)?;

        let mut sampler = Sampler::new(sampling, vocab_size);
        prompt_ids.iter().for_each(|&id| sampler.see(id));
        let mut unread = prompt_ids[self.forget_other(prompt_ids)..].to_vec();
        let read_tokens = unread.len();
        let mut token_ids = Vec::new();
        let mut ends_in_stop_token = false;
        let mut finish_reason = FinishReason::Length;
        while token_ids.len() < max_new_tokens {
            let logits = B::together(|| self.next_logits(&unread));
            let position = self.read.len();
            let id = sampler.choose(logits);
            let id = id.ok_or(Error::LogitsNotFinite { position })?;
            sampler.see(id);
            token_ids.push(id);
            ends_in_stop_token = stop_ids.contains(&id);
            if ends_in_stop_token || on_token(id).is_break() {
                finish_reason = FinishReason::Stop;
                break;
            }
            unread = vec![id];
        }
        Ok(Generation {
            token_ids,
            ends_in_stop_token,
            finish_reason,
            read_tokens,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// Forgets what a prompt does not begin with and returns how much is left. The last token of
    /// the prompt is forgotten, too: the text goes on from its logits.
    ///
    /// With `dynamic` rotary scaling everything is forgotten: there the keys depend on the length
    /// that the text had when they were computed.
    fn forget_other(&mut self, prompt_ids: &[u32]) -> usize {
        let pairs = self.read.iter().zip(&prompt_ids[..prompt_ids.len() - 1]);
        let kept = match self.model.config.rope_scaling {
            RopeScaling::Dynamic { .. } => 0,
            _ => pairs.take_while(|(read, id)| read == id).count(),
        };
        self.read.truncate(kept);
        self.cache
            .truncate(match (kept, &self.model.virtual_tokens) {
                (1.., Some(virtual_tokens)) => virtual_tokens.count() + kept,
                _ => kept,
            });
        kept
    }

    /// The logits `[v]` after the last of `ids`, which follow what has been read.
    ///
    /// With `dynamic` rotary scaling the new positions get the frequencies of the length by now,
    /// and the cached keys keep those of their time, as in transformers.
    fn next_logits(&mut self, ids: &[u32]) -> Vec<f32> {
        let (start, s) = (self.read.len(), ids.len());
        self.read.extend(ids);
        let segments = Segments::new([s]).after(start);
        let segments = segments.of_tasks(vec![self.task]);
        let rope = Rope::new(&self.model.config, segments, self.device);
        let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [s]), self.device);
        let hidden = self.model.forward(ids, &rope, Some(&mut self.cache)); // [s, d]
        let last = hidden.narrow(0, s - 1, 1); // [1, d]
        self.model.logits(last).into_data().iter::<f32>().collect()
    }
}

fn check_prompt(ids: &[u32], vocab_size: usize) -> Result<()> {
    if ids.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(Error::TokenOutOfRange {
            id: id.into(),
            vocab_size,
        }),
        None => Ok(()),
    }
}

/// Chooses tokens, one after the other.
struct Sampler {
    sampling: Sampling,
    /// For each token whether the prompt or the text has it.
    seen: Vec<bool>,
    rng: ChaCha8Rng,
}

impl Sampler {
    fn new(sampling: Sampling, vocab_size: usize) -> Self {
        Self {
            sampling,
            seen: vec![false; vocab_size],
            rng: ChaCha8Rng::seed_from_u64(sampling.seed),
        }
    }

    fn see(&mut self, id: u32) {
        self.seen[id as usize] = true;
    }

    /// The next token; `None` when the logits are not numbers to choose by.
    fn choose(&mut self, mut logits: Vec<f32>) -> Option<u32> {
        self.weigh(&mut logits);
        let best = argmax(&logits)?;
        if self.sampling.temperature == 0.0 {
            return Some(best);
        }
        let max = logits[best as usize];
        let weights = logits.iter().map(|&logit| f64::from(logit - max).exp());
        let sum: f64 = weights.clone().sum();
        let mut left = self.rng.random::<f64>() * sum;
        let chosen = weights.enumerate().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        // Rounding may leave a rest above the last weight.
        Some(chosen.map_or(best, |(index, _)| index as u32))
    }

    /// Applies the rules to the logits; what is removed becomes minus infinity.
    fn weigh(&self, logits: &mut [f32]) {
        let sampling = &self.sampling;
        if sampling.repetition_penalty != 1.0 {
            penalize(logits, &self.seen, sampling.repetition_penalty as f32);
        }
        if sampling.temperature == 0.0 {
            return;
        }
        if sampling.temperature != 1.0 {
            divide(logits, sampling.temperature);
        }
        if let Some(k) = sampling.top_k {
            keep_top_k(logits, k);
        }
        if let Some(p) = sampling.top_p.filter(|&p| p < 1.0) {
            keep_top_p(logits, p);
        }
    }
}

/// The first of the largest logits; `None` if one is NaN, or the largest is infinite.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if logit > logits[best] {
            best = index;
        }
    }
    logits.get(best)?.is_finite().then_some(best as u32)
}

fn penalize(logits: &mut [f32], seen: &[bool], penalty: f32) {
    for (logit, _) in logits.iter_mut().zip(seen).filter(|(_, seen)| **seen) {
        *logit = match *logit < 0.0 {
            true => *logit * penalty,
            false => *logit / penalty,
        };
    }
}

/// Divides by the temperature after the largest logit is subtracted, which changes no probability
/// and keeps tiny temperatures from overflowing.
fn divide(logits: &mut [f32], temperature: f64) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for logit in logits {
        *logit = (f64::from(*logit - max) / temperature) as f32;
    }
}

/// Keeps the `k` largest and whatever equals the last of them.
fn keep_top_k(logits: &mut [f32], k: usize) {
    if k >= logits.len() {
        return;
    }
    let mut sorted = logits.to_vec();
    let (_, &mut least, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    for logit in logits.iter_mut().filter(|logit| **logit < least) {
        *logit = f32::NEG_INFINITY;
    }
}

/// Removes the least likely tokens as long as they have at most `1 - p` together; one always stays.
fn keep_top_p(logits: &mut [f32], p: f64) {
    let kept = (0..logits.len()).filter(|&index| logits[index] > f32::NEG_INFINITY);
    let mut rising: Vec<usize> = kept.collect();
    rising.sort_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    let Some((&most, less)) = rising.split_last() else {
        return;
    };
    let max = logits[most];
    let weight = |logit: f32| f64::from(logit - max).exp();
    let sum: f64 = rising.iter().map(|&index| weight(logits[index])).sum();
    let mut together = 0.0;
    for &index in less {
        together += weight(logits[index]) / sum;
        if together as f32 > (1.0 - p) as f32 {
            break;
        }
        logits[index] = f32::NEG_INFINITY;
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use burn::backend::Flex;
    use serde_json::Value;

    use super::*;
    use crate::folder::ModelFolder;
    use crate::linear::Linear;

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    fn model(name: &str) -> (ModelFolder, Llama<Flex, Linear<Flex>>) {
        let folder = ModelFolder::open(&fixtures().join("models").join(name)).unwrap();
        let checkpoint = folder.checkpoint().unwrap();
        let device = Default::default();
        let model = crate::load::load(&folder.config, &checkpoint, &device);
        let model = model.unwrap();
        (folder, model)
    }

    /// What `fixtures/generate/make.py` wrote.
    fn expected() -> Value {
        let text = std::fs::read(fixtures().join("generate/expected.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn numbers(value: &Value) -> Vec<u32> {
        let values = value.as_array().unwrap().iter();
        values.map(|n| n.as_u64().unwrap() as u32).collect()
    }

    /// `gqa` continues a prompt by 30 tokens.
    fn run(sampling: Sampling, stop_ids: &[u32]) -> Result<Generation> {
        let (_, model) = model("gqa");
        let device = Default::default();
        let mut go_on = |_| ControlFlow::Continue(());
        generate(
            &model,
            &[5, 9, 33],
            30,
            stop_ids,
            sampling,
            &device,
            &mut go_on,
        )
    }

    fn warm(seed: u64) -> Sampling {
        Sampling {
            temperature: 1.0,
            seed,
            ..Sampling::default()
        }
    }

    #[test]
    fn greedy_texts_equal_those_of_transformers() {
        for row in expected()["greedy"].as_array().unwrap() {
            let (folder, model) = model(row["model"].as_str().unwrap());
            let sampling = Sampling {
                repetition_penalty: row["repetition_penalty"].as_f64().unwrap(),
                ..Sampling::default()
            };
            let count = row["max_new_tokens"].as_u64().unwrap() as usize;
            let prompt = numbers(&row["prompt"]);
            let eos = folder.generation.eos_token_ids;
            let mut heard = Vec::new();
            let mut hear = |id| {
                heard.push(id);
                ControlFlow::Continue(())
            };
            let device = Default::default();
            let text = generate(&model, &prompt, count, &eos, sampling, &device, &mut hear);
            let text = text.unwrap();
            assert_eq!(text.token_ids, numbers(&row["token_ids"]), "{row}");
            assert_eq!(heard, text.text_ids());
            let full = text.token_ids.len() == count;
            assert_eq!(text.finish_reason == FinishReason::Length, full);
        }
    }

    #[test]
    fn rules_of_choice_equal_the_logits_processors_of_transformers() {
        let processors = &expected()["processors"];
        let floats = |value: &Value| -> Vec<f32> {
            let values = value.as_array().unwrap().iter();
            values
                .map(|x| x.as_f64().map_or(f32::NEG_INFINITY, |x| x as f32))
                .collect()
        };
        let logits = floats(&processors["logits"]);
        for case in processors["cases"].as_array().unwrap() {
            let sampling = Sampling {
                temperature: case["temperature"].as_f64().unwrap(),
                top_p: case["top_p"].as_f64(),
                top_k: case["top_k"].as_u64().map(|k| k as usize),
                repetition_penalty: case["repetition_penalty"].as_f64().unwrap(),
                seed: 0,
            };
            let mut sampler = Sampler::new(sampling, logits.len());
            numbers(&processors["seen"])
                .iter()
                .for_each(|&id| sampler.see(id));
            let mut found = logits.clone();
            sampler.weigh(&mut found);
            // `divide` subtracts the largest logit, transformers does not.
            let shifted = |scores: &[f32]| -> Vec<f32> {
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter().map(|score| score - max).collect()
            };
            let wanted = shifted(&floats(&case["scores"]));
            for (found, wanted) in shifted(&found).iter().zip(wanted) {
                // one rounding of numbers around 10
                let close = (found - wanted).abs() < 2e-6 * wanted.abs().max(1.0);
                assert!(*found == wanted || close, "{case}: {found} for {wanted}");
            }
        }
    }

    #[test]
    fn a_seed_decides_the_text() {
        let texts: Vec<_> = (0..3)
            .map(|seed| run(warm(seed), &[]).unwrap().token_ids)
            .collect();
        assert_eq!(texts[1], run(warm(1), &[]).unwrap().token_ids);
        assert_ne!(texts[0], texts[1]);
        assert_ne!(texts[1], texts[2]);
    }

    #[test]
    fn tokens_come_as_often_as_their_probability_says() {
        let sampling = Sampling {
            top_k: Some(3),
            ..warm(3)
        };
        let mut sampler = Sampler::new(sampling, 4);
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln).to_vec();
        let mut counts = [0; 4];
        for _ in 0..9000 {
            counts[sampler.choose(logits.clone()).unwrap() as usize] += 1;
        }
        assert_eq!(counts[0], 0);
        for (count, wanted) in counts[1..].iter().zip([4000i32, 2000, 3000]) {
            // five standard deviations of a binomial count
            assert!((count - wanted).abs() < 240, "{counts:?}");
        }
    }

    #[test]
    fn one_token_left_is_the_greedy_text() {
        let greedy = run(Sampling::default(), &[]).unwrap().token_ids;
        for sampling in [
            Sampling {
                top_k: Some(1),
                ..warm(5)
            },
            Sampling {
                top_p: Some(1e-9),
                ..warm(6)
            },
            Sampling {
                temperature: 1e-300,
                ..warm(7)
            },
        ] {
            assert_eq!(run(sampling, &[]).unwrap().token_ids, greedy);
        }
    }

    #[test]
    fn a_stop_token_ends_the_text_and_is_its_last() {
        let whole = run(Sampling::default(), &[]).unwrap();
        assert_eq!(whole.finish_reason, FinishReason::Length);
        assert_eq!(whole.token_ids.len(), 30);
        assert_eq!(whole.text_ids(), whole.token_ids);
        let stop = whole.token_ids[4];
        let first = whole.token_ids.iter().position(|id| *id == stop).unwrap();
        let text = run(Sampling::default(), &[95, stop]).unwrap();
        assert_eq!(text.finish_reason, FinishReason::Stop);
        assert_eq!(text.token_ids, whole.token_ids[..=first]);
        assert_eq!(text.text_ids(), &whole.token_ids[..first]);
    }

    #[test]
    fn the_caller_can_stop() {
        let (_, model) = model("gqa");
        let mut heard = 0;
        let mut twice = |_| {
            heard += 1;
            match heard {
                2 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let (device, sampling) = (Default::default(), Sampling::default());
        let text = generate(&model, &[5], 30, &[], sampling, &device, &mut twice).unwrap();
        assert_eq!(text.token_ids.len(), 2);
        assert_eq!(text.text_ids().len(), 2);
        assert_eq!(text.finish_reason, FinishReason::Stop);
    }

    /// The oracle is a generator that has read nothing.
    #[test]
    fn what_is_remembered_changes_no_text() {
        for name in ["gqa", "tied_llama3", "yarn", "dynamic"] {
            let (_, model) = model(name);
            let device = Default::default();
            let sampling = Sampling {
                repetition_penalty: 1.3, // the random tiny models repeat themselves soon
                ..Sampling::default()
            };
            let mut go_on = |_| ControlFlow::Continue(());
            let mut generator = Generator::new(&model, &device);
            let mut answer = |prompt: &[u32]| {
                let text = generator.generate(prompt, 12, &[], sampling, &mut go_on);
                let text = text.unwrap();
                let fresh = generate(&model, prompt, 12, &[], sampling, &device, &mut |_| {
                    ControlFlow::Continue(())
                });
                assert_eq!(
                    text.token_ids,
                    fresh.unwrap().token_ids,
                    "{name} {prompt:?}"
                );
                (text.token_ids, text.read_tokens)
            };
            let first: Vec<u32> = (5..25).collect();
            let (said, read) = answer(&first);
            assert_eq!(read, 20);
            // the next turn: all but the last token of the answer has been read
            let second = [&first[..], &said, &[7, 8, 9]].concat();
            let expected = |kept: usize, all: usize| match name {
                "dynamic" => all,
                _ => all - kept,
            };
            assert_eq!(answer(&second).1, expected(31, 35));
            assert_eq!(answer(&second).1, expected(34, 35), "the same once more");
            // a turn that was rendered in another way, a beginning, another text
            let changed = [&first[..10], &[60, 61], &first[12..]].concat();
            assert_eq!(answer(&changed).1, expected(10, 20));
            assert_eq!(answer(&changed[..4]).1, expected(3, 4));
            assert_eq!(answer(&[90, 91]).1, 2);
            assert_eq!(answer(&[90]).1, 1);
        }
    }

    #[test]
    fn impossible_requests_are_refused() {
        let (_, model) = model("gqa");
        let device = Default::default();
        let run = |prompt: &[u32], count, sampling| {
            let mut go_on = |_| ControlFlow::Continue(());
            generate(&model, prompt, count, &[], sampling, &device, &mut go_on)
        };
        let greedy = Sampling::default();
        assert!(matches!(run(&[], 3, greedy), Err(Error::EmptyPrompt)));
        let outside = run(&[5, 96], 3, greedy);
        assert!(matches!(
            outside,
            Err(Error::TokenOutOfRange { id: 96, .. })
        ));
        assert!(run(&[5], 0, greedy).unwrap().token_ids.is_empty());

        let nonsense = Sampling {
            temperature: -1.0,
            top_p: Some(1.5),
            top_k: Some(0),
            repetition_penalty: f64::NAN,
            seed: 0,
        };
        let error = run(&[5], 3, nonsense).unwrap_err().to_string();
        for key in ["temperature", "top_p", "top_k", "repetition_penalty"] {
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn logits_that_are_not_numbers_are_no_choice() {
        for bad in [f32::NAN, f32::INFINITY] {
            for sampling in [Sampling::default(), warm(1)] {
                let mut sampler = Sampler::new(sampling, 3);
                assert_eq!(sampler.choose(vec![1.0, bad, 2.0]), None);
            }
        }
        let nothing = vec![f32::NEG_INFINITY; 3];
        assert_eq!(Sampler::new(warm(1), 3).choose(nothing), None);
        let ties = vec![1.0, 2.0, 2.0];
        let mut sampler = Sampler::new(Sampling::default(), 3);
        assert_eq!(sampler.choose(ties), Some(1));

        let (_, mut broken) = model("gqa");
        let gain = Tensor::from_floats([f32::NAN; 32], &Default::default());
        broken.norm.weight = crate::weight::BaseWeight::Frozen(gain);
        let mut go_on = |_| ControlFlow::Continue(());
        let (device, sampling) = (Default::default(), Sampling::default());
        let text = generate(&broken, &[5, 6], 3, &[], sampling, &device, &mut go_on);
        assert!(matches!(text, Err(Error::LogitsNotFinite { position: 2 })));
    }
}
