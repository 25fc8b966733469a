//! Metrics as lines that are short enough to draw.

use serde::{Serialize, Serializer};

use super::record::{Entry, RunRecord};

/// Points of a line; the page of one run has about six of them.
const POINTS: usize = 4000;
/// Points of all lines of one kind together, when several runs are drawn.
const ALL_POINTS: usize = 12_000;

/// A line: `x` rising, `y` with the digits that can be seen.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Curve {
    /// Optimizer steps.
    pub x: Vec<usize>,
    /// Values.
    #[serde(serialize_with = "short")]
    pub y: Vec<f64>,
}

/// Everything that is drawn of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Curves {
    /// What the run is called.
    pub name: String,
    /// Loss of each step.
    pub loss: Curve,
    /// The same, smoothed.
    pub smooth: Curve,
    /// Loss of the evaluations.
    pub eval: Curve,
    /// Learning rate.
    pub lr: Curve,
    /// Norm of the gradients.
    pub grad_norm: Curve,
    /// Tokens a second.
    pub speed: Curve,
    /// Most memory held so far.
    pub memory: Curve,
    /// Steps that are marked, with why.
    pub marks: Vec<(usize, &'static str)>,
}

impl Curves {
    /// The curves of one of `runs` runs.
    pub fn of(run: &RunRecord, runs: usize) -> Self {
        let most = POINTS.min(ALL_POINTS / runs.max(1)).max(200);
        let line = |read: fn(&Entry) -> Option<f64>| Curve::of(&run.steps, read).thin(most);
        let loss = Curve::of(&run.steps, |e| e.loss);
        Self {
            name: run.name.clone(),
            smooth: loss.smooth().thin(most / 2),
            loss: loss.thin(most),
            eval: Curve::of(&run.evals, |e| e.loss).thin(most),
            lr: line(|e| e.lr),
            grad_norm: line(|e| e.grad_norm),
            speed: line(|e| e.tokens_per_second),
            memory: line(|e| e.peak_memory_bytes.filter(|bytes| *bytes > 0.0)),
            marks: marks(run),
        }
    }
}

/// Most marks of a kind.
const MARKS: usize = 2000;

fn marks(run: &RunRecord) -> Vec<(usize, &'static str)> {
    let steps = |which: fn(&Entry) -> bool, why| {
        let steps = run.steps.iter().filter(move |entry| which(entry));
        steps.map(move |entry| (entry.step, why)).take(MARKS)
    };
    let resumed = run.facts.sessions.iter().skip(1);
    let resumed = resumed.map(|session| (session.from_step, "resumed"));
    let mut all: Vec<_> = steps(|e| e.skipped, "skipped")
        .chain(steps(|e| e.spike && !e.skipped, "spike"))
        .chain(resumed.take(MARKS))
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

impl Curve {
    fn of(entries: &[Entry], read: fn(&Entry) -> Option<f64>) -> Self {
        let known = entries.iter().filter_map(|entry| {
            let value = read(entry).filter(|value| value.is_finite())?;
            Some((entry.step, value))
        });
        let (x, y) = known.unzip();
        Self { x, y }
    }

    /// An exponential mean over about a fiftieth of the run, corrected for its start; nothing of a
    /// run too short to have a trend.
    fn smooth(&self) -> Self {
        let count = self.y.len();
        if count < 10 {
            return Self::default();
        }
        let keep = 1.0 - 1.0 / (count as f64 / 50.0).max(3.0);
        let (mut mean, mut weight) = (0.0, 0.0);
        let next = |value: &f64| {
            mean = keep * mean + (1.0 - keep) * value;
            weight = keep * weight + (1.0 - keep);
            mean / weight
        };
        Self {
            x: self.x.clone(),
            y: self.y.iter().map(next).collect(),
        }
    }

    /// At most about `most` points: of each stretch the least and the greatest value stay, and the
    /// ends, so that no spike is lost.
    fn thin(self, most: usize) -> Self {
        let count = self.y.len();
        if count <= most {
            return self;
        }
        let mut kept = Vec::with_capacity(most + 2);
        let stretches = most / 2;
        for stretch in 0..stretches {
            let range = stretch * count / stretches..(stretch + 1) * count / stretches;
            let by_value = |a: &usize, b: &usize| self.y[*a].total_cmp(&self.y[*b]);
            kept.extend(range.clone().min_by(by_value));
            kept.extend(range.max_by(by_value));
        }
        kept.extend([0, count - 1]);
        kept.sort_unstable();
        kept.dedup();
        Self {
            x: kept.iter().map(|index| self.x[*index]).collect(),
            y: kept.iter().map(|index| self.y[*index]).collect(),
        }
    }

    /// Least and greatest value.
    pub fn range(&self) -> Option<(f64, f64)> {
        let first = *self.y.first()?;
        let wider = |(low, high): (f64, f64), y: &f64| (low.min(*y), high.max(*y));
        Some(self.y.iter().fold((first, first), wider))
    }
}

/// Six digits, which is more than a screen shows.
fn short<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(|value| {
        let rounded: f64 = format!("{value:.5e}").parse().unwrap_or(*value);
        match rounded.fract() == 0.0 && rounded.abs() < 1e15 {
            true => serde_json::Value::from(rounded as i64),
            false => serde_json::Value::from(rounded),
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(y: Vec<f64>) -> Curve {
        Curve {
            x: (1..=y.len()).collect(),
            y,
        }
    }

    #[test]
    fn a_thinned_line_keeps_its_spikes_and_ends() {
        let mut y: Vec<f64> = (0..100_000).map(|i| f64::from(i % 7)).collect();
        y[50_001] = 99.0;
        y[70_001] = -99.0;
        let thin = curve(y.clone()).thin(4000);
        assert!(thin.x.len() <= 4002, "{}", thin.x.len());
        assert!(thin.x.is_sorted_by(|a, b| a < b));
        assert_eq!((thin.x[0], *thin.x.last().unwrap()), (1, 100_000));
        assert_eq!(thin.range(), Some((-99.0, 99.0)));
        for (x, value) in thin.x.iter().zip(&thin.y) {
            assert_eq!(y[x - 1], *value);
        }
        assert_eq!(curve(vec![1.0; 4000]).thin(4000).x.len(), 4000);
    }

    #[test]
    fn smoothing_keeps_a_constant_and_follows_a_change() {
        assert_eq!(curve(vec![1.0; 9]).smooth(), Curve::default());
        let smooth = curve(vec![2.0; 400]).smooth();
        assert!(smooth.y.iter().all(|y| (y - 2.0).abs() < 1e-12));
        let step = curve((0..400).map(|i| f64::from(i32::from(i >= 200))).collect());
        let smooth = step.smooth().y;
        assert!(smooth[199] == 0.0 && smooth[201] < 0.5 && smooth[399] > 0.99);
    }

    #[test]
    fn numbers_are_short() {
        let y = vec![1.234_567_89, 2e-4, 7.0, 1_234_567.0, 3e9];
        let json = serde_json::to_string(&curve(y)).unwrap();
        assert_eq!(
            json,
            r#"{"x":[1,2,3,4,5],"y":[1.23457,0.0002,7,1234570,3000000000]}"#
        );
    }
}
