//! What is known of a run while it goes on.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use train::run_folder::Line as Metrics;

use super::curve::Curve;

/// The plot of the losses, of training and of evaluations.
pub const LOSS: &str = "Loss";
/// Its schedule is known by its shape.
pub const LEARNING_RATE: &str = "Learning rate";
/// The norm before clipping.
pub const GRADIENT_NORM: &str = "Gradient norm";
/// All tokens but padding.
pub const TOKENS: &str = "Tokens/s";
/// Most bytes that the process has held so far.
pub const MEMORY: &str = "Peak memory";
/// Not plotted: part of the progress.
pub const EPOCH: &str = "Epoch";

/// One plotted number.
pub struct Plot {
    /// What it is.
    pub name: String,
    /// Of each step.
    pub train: Curve,
    /// Of each evaluation.
    pub eval: Curve,
}

/// How much a message matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// In plain lines only some want to know it.
    Detail,
    /// Everybody does.
    Note,
    /// It must not be missed: it is said again when the dashboard is closed.
    Warning,
}

/// Something that happened.
pub struct Message {
    /// The clock.
    pub time: String,
    /// In words.
    pub text: String,
    /// Whether it must not be missed.
    pub is_warning: bool,
}

/// How fast steps are taken.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    since: Instant,
    /// Steps that were taken before.
    first: usize,
}

impl Pace {
    /// From now on, after `first` steps.
    pub fn new(first: usize) -> Self {
        let since = Instant::now();
        Self { since, first }
    }

    /// Time since then.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Time left after `step` steps at the same rate; `elapsed` is what they took.
    pub fn left(&self, elapsed: Duration, step: usize, total: usize) -> Option<Duration> {
        let taken = step.checked_sub(self.first).filter(|taken| *taken > 0)?;
        Some(elapsed.mul_f64(total.saturating_sub(step) as f64 / taken as f64))
    }
}

/// All of it.
#[derive(Default)]
pub struct State {
    /// The run folder.
    pub title: String,
    /// In the order in which they came.
    pub plots: Vec<Plot>,
    /// Steps taken, and in all.
    pub step: usize,
    /// Steps in all.
    pub total: usize,
    /// Steps whose loss was a spike, with that loss.
    pub spikes: Vec<(f64, f64)>,
    /// Steps that were skipped.
    pub skipped: usize,
    /// Passes over the data: sequences seen ÷ those of an epoch.
    pub epoch: Option<f64>,
    /// What goes on beside steps.
    pub status: String,
    /// Set when the run begins.
    pub pace: Option<Pace>,
    /// Time until the last step, which the estimate of the end rests on.
    pub at_step: Duration,
    /// The last ones.
    pub messages: VecDeque<Message>,
    /// Of the plots, the large one.
    pub selected: usize,
    /// Whether the plots show the last steps only.
    pub recent: bool,
    /// Whether the run has been asked to stop.
    pub stopping: bool,
    /// Whether there is something new to draw.
    pub changed: bool,
    /// Whether the run is over.
    pub ended: bool,
}

impl State {
    /// Messages that are kept.
    const MOST_MESSAGES: usize = 100;
    /// Spikes that are kept.
    const MOST_SPIKES: usize = 10_000;

    /// A run of `total` steps, of which those in `past` have been taken.
    pub fn begin(&mut self, past: &[Metrics], total: usize) {
        self.total = total;
        for line in past {
            match *line {
                Metrics::Train {
                    step,
                    epoch,
                    loss,
                    lr,
                    grad_norm,
                    tokens_per_second,
                    peak_memory_bytes,
                    spike,
                    ..
                } => {
                    if spike {
                        self.spike(step, loss);
                    }
                    self.step = step.saturating_sub(1);
                    for (name, value) in [
                        (LOSS, loss),
                        (LEARNING_RATE, lr),
                        (GRADIENT_NORM, grad_norm),
                        (TOKENS, tokens_per_second),
                        (MEMORY, peak_memory_bytes as f64),
                        (EPOCH, epoch),
                    ] {
                        self.train_value(name, value);
                    }
                    self.step = step;
                }
                Metrics::Skipped { step, skipped, .. } => {
                    (self.step, self.skipped) = (step, skipped)
                }
                Metrics::Eval { step, loss, .. } => self.eval_loss(step, loss),
            }
        }
        self.pace = Some(Pace::new(self.step));
        self.changed = true;
    }

    /// A number of the step that [`State::progress`] tells next.
    pub fn train_value(&mut self, name: &str, value: f64) {
        if name == EPOCH {
            self.epoch = Some(value);
            return;
        }
        let step = self.step as f64 + 1.0;
        self.plot(name).train.push(step, value);
    }

    /// An evaluation's loss.
    pub fn eval_loss(&mut self, step: usize, loss: f64) {
        self.plot(LOSS).eval.push(step as f64, loss);
        self.changed = true;
    }

    /// A step is done; `step` have been taken by now.
    pub fn progress(&mut self, step: usize, total: usize) {
        (self.step, self.total) = (step, total);
        self.at_step = self.pace.map_or(Duration::ZERO, |pace| pace.elapsed());
        self.status.clear();
        self.changed = true;
    }

    /// A step is left out.
    pub fn skip(&mut self, step: usize) {
        self.skipped += 1;
        self.progress(step, self.total);
    }

    /// The loss of a step is a spike; told before the step.
    pub fn spike(&mut self, step: usize, loss: f64) {
        if self.spikes.len() < Self::MOST_SPIKES {
            self.spikes.push((step as f64, loss));
        }
    }

    /// Whether the last step was one.
    pub fn is_spike(&self) -> bool {
        let last = self.spikes.last();
        last.is_some_and(|(step, _)| *step == self.step as f64)
    }

    /// Says what goes on until the next step.
    pub fn status(&mut self, text: String) {
        self.status = text;
        self.changed = true;
    }

    /// Notes a message, of which the oldest makes room.
    pub fn say(&mut self, text: String, weight: Weight) {
        self.messages.push_back(Message {
            time: jiff::Zoned::now().strftime("%H:%M").to_string(),
            text,
            is_warning: weight == Weight::Warning,
        });
        if self.messages.len() > Self::MOST_MESSAGES {
            self.messages.pop_front();
        }
        self.changed = true;
    }

    /// Chooses the plot `by` places further.
    pub fn select(&mut self, by: isize) {
        let count = self.plots.len().max(1) as isize;
        self.selected = (self.selected as isize + by).rem_euclid(count) as usize;
        self.changed = true;
    }

    /// The number of the last step.
    pub fn latest(&self, name: &str) -> Option<f64> {
        let plot = self.plots.iter().find(|plot| plot.name == name)?;
        Some(plot.train.last()?.1)
    }

    /// Epochs of the whole run.
    pub fn epochs(&self) -> Option<f64> {
        let per_step = self.epoch? / self.step.max(1) as f64;
        Some(per_step * self.total as f64)
    }

    /// Time left, as it was after the last step.
    pub fn left(&self) -> Option<Duration> {
        self.pace?.left(self.at_step, self.step, self.total)
    }

    fn plot(&mut self, name: &str) -> &mut Plot {
        let found = self.plots.iter().position(|plot| plot.name == name);
        let index = found.unwrap_or_else(|| {
            self.plots.push(Plot {
                name: name.to_owned(),
                train: Curve::default(),
                eval: Curve::default(),
            });
            self.plots.len() - 1
        });
        &mut self.plots[index]
    }
}

/// `1h02m`, `3m20s` or `12s`.
pub fn duration(time: Duration) -> String {
    match time.as_secs() {
        s if s >= 3600 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        s if s >= 60 => format!("{}m{:02}s", s / 60, s % 60),
        s => format!("{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_the_steps_of_this_session() {
        let pace = Pace::new(10); // a resumed run
        let minute = Duration::from_secs(60);
        assert_eq!(pace.left(minute, 10, 40), None);
        assert_eq!(pace.left(minute, 20, 40), Some(2 * minute));
        assert_eq!(pace.left(minute, 40, 40), Some(Duration::ZERO));
        let shown = [12, 200, 3720].map(|secs| duration(Duration::from_secs(secs)));
        assert_eq!(shown, ["12s", "3m20s", "1h02m"]);
    }

    #[test]
    fn old_messages_make_room() {
        let mut state = State::default();
        for number in 0..1000 {
            state.say(format!("message {number}"), Weight::Note);
        }
        assert_eq!(state.messages.len(), State::MOST_MESSAGES);
        assert_eq!(state.messages[99].text, "message 999");
    }
}
