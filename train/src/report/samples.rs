//! A few prompts of the rows, continued before and after training, for the eyes of people.
//!
//! A prompt is what stands before the first trained token of a row, so that the model is asked in
//! just the form it is trained in. Where a row is trained from its start (plain text), its first
//! tokens are the prompt.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use adapters::{AdaptedBackend, AdaptedLlama};
use model::generate::{Generator, Sampling};

use crate::data::{IGNORED, Sample};
use crate::session::Rows;

/// Longest continuation: enough to see how a model answers, and training waits for it.
pub const NEW_TOKENS: usize = 32;
/// Longest prompt that is taken.
const PROMPT_TOKENS: usize = 512;
/// How much of a plain text is a prompt.
const PREFIX_TOKENS: usize = 16;
/// Time for one continuation, and for all of them.
const EACH: Duration = Duration::from_secs(2);
const ALL: Duration = Duration::from_secs(5);
/// Tokens of a prompt that are read before the time is looked at, and by how much the next part is
/// longer: each part reads all weights.
const FIRST_TOKENS: usize = 16;
const GROWTH: usize = 4;

/// What is asked, and what the row goes on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The tokens that are continued.
    pub ids: Vec<u32>,
    /// The row's own continuation.
    pub expected: Vec<u32>,
    /// The row's task.
    pub task: usize,
}

/// A continuation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// New tokens, without the one that ends a text.
    pub ids: Vec<u32>,
    /// Whether there was no time for more.
    pub cut: bool,
}

/// The first `count` prompts of the evaluation rows, or else of the training rows.
pub fn prompts(rows: &Rows, count: usize) -> Vec<Prompt> {
    let rows = match rows.eval.is_empty() {
        true => &rows.train,
        false => &rows.eval,
    };
    let prompts = rows.iter().filter_map(|row| prompt(&row));
    prompts.take(count).collect()
}

fn prompt(row: &Sample) -> Option<Prompt> {
    let is_trained = |label: &i32| *label != IGNORED;
    let first = row.labels.iter().position(is_trained)?;
    let (start, end) = match first {
        // a row of text, perhaps behind its first token
        0 | 1 => {
            let start = PREFIX_TOKENS.min(row.input_ids.len() / 2);
            (start, row.input_ids.len().min(start + NEW_TOKENS))
        }
        _ => {
            let trained = row.labels[first..].iter().take_while(|l| is_trained(l));
            (first, first + trained.count())
        }
    };
    let fits = (1..=PROMPT_TOKENS).contains(&start);
    fits.then(|| Prompt {
        ids: row.input_ids[..start].to_vec(),
        expected: row.input_ids[start..end].to_vec(),
        task: row.task as usize,
    })
}

/// Continues prompts with the likeliest tokens, as far as a few seconds go. What the model cannot
/// continue has an empty answer: a sample is no reason for a run to fail.
pub fn answer<B: AdaptedBackend>(
    model: &AdaptedLlama<B>,
    prompts: &[Prompt],
    stop_ids: &[u32],
    device: &B::Device,
) -> Vec<Answer> {
    let end = Instant::now() + ALL;
    let one = |prompt: &Prompt| {
        let deadline = end.min(Instant::now() + EACH);
        continued(model, prompt, stop_ids, device, deadline)
    };
    prompts.iter().map(one).collect()
}

fn continued<B: AdaptedBackend>(
    model: &AdaptedLlama<B>,
    prompt: &Prompt,
    stop_ids: &[u32],
    device: &B::Device,
    deadline: Instant,
) -> Answer {
    let mut answer = Answer::default();
    let mut generator = Generator::new(model, device).of_task(prompt.task);
    // read in parts, since a prompt may take longer than there is time
    let (mut read, mut part) = (0, FIRST_TOKENS);
    while read < prompt.ids.len() {
        let start = Instant::now();
        let left = deadline.saturating_duration_since(start);
        read = prompt.ids.len().min(read + part);
        let begin = &prompt.ids[..read];
        let stop = &mut |_| ControlFlow::Break(());
        if left.is_zero()
            || generator
                .generate(begin, 1, &[], Sampling::default(), stop)
                .is_err()
        {
            answer.cut = left.is_zero();
            return answer;
        }
        part *= GROWTH;
        if read < prompt.ids.len() && start.elapsed() * GROWTH as u32 > left {
            answer.cut = true;
            return answer;
        }
    }
    let ids = &mut answer.ids;
    let mut late = false;
    let mut push = |id| {
        ids.push(id);
        late = Instant::now() >= deadline;
        match late {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let sampling = Sampling::default();
    let done = generator.generate(&prompt.ids, NEW_TOKENS, stop_ids, sampling, &mut push);
    answer.cut = late && done.is_ok_and(|done| done.token_ids.len() < NEW_TOKENS);
    answer
}

#[cfg(test)]
mod tests {

    use super::*;

    fn row(labels: &[i32]) -> Sample {
        Sample {
            task: 0,
            input_ids: (0..labels.len() as u32).collect(),
            labels: labels.to_vec(),
        }
    }

    #[test]
    fn a_prompt_is_what_stands_before_the_first_trained_token() {
        let chat = prompt(&row(&[-100, -100, -100, 3, 4, -100, 6])).unwrap();
        assert_eq!((chat.ids, chat.expected), (vec![0, 1, 2], vec![3, 4]));
        let text = prompt(&row(&[0, 1, 2, 3, 4])).unwrap();
        assert_eq!((text.ids, text.expected), (vec![0, 1], vec![2, 3, 4]));
        let long = prompt(&row(&(0..900).collect::<Vec<_>>())).unwrap();
        assert_eq!(
            (long.ids.len(), long.expected.len()),
            (PREFIX_TOKENS, NEW_TOKENS)
        );
        assert_eq!(prompt(&row(&[0])), None, "there is nothing to go on from");
        assert_eq!(prompt(&row(&[-100; 4])), None);
        let mut far = vec![IGNORED; PROMPT_TOKENS + 1];
        far.push(7);
        assert_eq!(prompt(&row(&far)), None);
    }

    #[test]
    fn evaluation_rows_come_first() {
        let rows = |count: usize, first: u32| {
            let one = |_| Sample {
                task: 0,
                input_ids: vec![first, 1, 2, 3],
                labels: vec![-100, -100, 2, 3],
            };
            (0..count).map(one).collect()
        };
        let both = Rows {
            train: rows(3, 7),
            eval: rows(1, 8),
        };
        assert_eq!(prompts(&both, 2)[0].ids, [8, 1]);
        assert_eq!(prompts(&both, 2).len(), 1);
        let alone = Rows {
            eval: rows(0, 8),
            ..both
        };
        assert_eq!(prompts(&alone, 2)[1].ids, [7, 1]);
        assert!(prompts(&alone, 0).is_empty());
    }
}
