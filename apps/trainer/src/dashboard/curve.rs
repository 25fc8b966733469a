//! A plotted number: all of a run in bounded memory, and its end in full.

use std::collections::VecDeque;

/// The values of a number, step after step.
#[derive(Debug, Default)]
pub struct Curve {
    /// Values that follow each other, each bucket but the last with `width` of them.
    buckets: Vec<Bucket>,
    width: usize,
    recent: VecDeque<(f64, f64)>,
    last: Option<(f64, f64)>,
}

/// The range of some values, so that no peak is lost.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    x: f64,
    low: f64,
    high: f64,
    count: usize,
}

impl Curve {
    /// Twice as many points as fit side by side on a wide screen.
    const MOST_BUCKETS: usize = 1024;
    /// Steps of the recent history.
    pub const RECENT: usize = 200;

    /// Adds a value at `x`, which is above all before. One that is no number is not plotted.
    pub fn push(&mut self, x: f64, y: f64) {
        self.last = Some((x, y));
        if !y.is_finite() {
            return;
        }
        self.recent.push_back((x, y));
        if self.recent.len() > Self::RECENT {
            self.recent.pop_front();
        }
        self.width = self.width.max(1);
        match self.buckets.last_mut() {
            Some(bucket) if bucket.count < self.width => bucket.add(y),
            _ => self.buckets.push(Bucket::new(x, y)),
        }
        if self.buckets.len() > Self::MOST_BUCKETS {
            self.buckets = self.buckets.chunks(2).map(Bucket::joined).collect();
            self.width *= 2;
        }
    }

    /// The value that came last, and where.
    pub fn last(&self) -> Option<(f64, f64)> {
        self.last
    }

    /// Whether nothing can be plotted.
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// Points of the whole run, rising in x; two at the same x span what lies between them.
    pub fn whole(&self) -> Vec<(f64, f64)> {
        let ends = |bucket: &Bucket| {
            let low = (bucket.low < bucket.high).then_some((bucket.x, bucket.low));
            low.into_iter().chain([(bucket.x, bucket.high)])
        };
        let end = self.recent.back().copied();
        let end = end.filter(|(x, _)| self.buckets.last().is_some_and(|bucket| bucket.x < *x));
        self.buckets.iter().flat_map(ends).chain(end).collect()
    }

    /// The last points, each value one.
    pub fn recent(&self) -> Vec<(f64, f64)> {
        self.recent.iter().copied().collect()
    }
}

impl Bucket {
    fn new(x: f64, y: f64) -> Self {
        Self {
            x,
            low: y,
            high: y,
            count: 1,
        }
    }

    fn add(&mut self, y: f64) {
        self.low = self.low.min(y);
        self.high = self.high.max(y);
        self.count += 1;
    }

    /// One or two neighbours as one.
    fn joined(pair: &[Self]) -> Self {
        let mut all = pair[0];
        for other in &pair[1..] {
            all.low = all.low.min(other.low);
            all.high = all.high.max(other.high);
            all.count += other.count;
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_takes_bounded_memory_and_keeps_its_peaks() {
        let mut curve = Curve::default();
        let mut at_most = 0;
        for step in 1..=1_000_000 {
            let y = match step {
                777_777 => 50.0,
                _ => 1.0 + 1.0 / f64::from(step),
            };
            curve.push(f64::from(step), y);
            at_most = at_most.max(curve.buckets.len() + curve.recent.len());
        }
        assert!(at_most <= Curve::MOST_BUCKETS + Curve::RECENT, "{at_most}");
        let points = curve.whole();
        assert!(points.len() > Curve::MOST_BUCKETS / 2, "{}", points.len());
        assert!(points.is_sorted_by(|a, b| a.0 <= b.0));
        assert!(
            points
                .iter()
                .any(|(x, y)| *y == 50.0 && (x - 777_777.0).abs() < 2_000.0)
        );
        assert_eq!((points[0].0, points[points.len() - 1].0), (1.0, 1e6));
        let counted: usize = curve.buckets.iter().map(|bucket| bucket.count).sum();
        assert_eq!(counted, 1_000_000);
        let recent = curve.recent();
        assert_eq!((recent.len(), recent[0].0), (Curve::RECENT, 999_801.0));
    }

    #[test]
    fn a_short_run_is_plotted_as_it_is() {
        let mut curve = Curve::default();
        assert!(curve.is_empty() && curve.whole().is_empty());
        let points = [(1.0, 2.5), (2.0, 1.5), (3.0, 1.75)];
        points.iter().for_each(|(x, y)| curve.push(*x, *y));
        curve.push(4.0, f64::NAN);
        assert_eq!(
            (curve.whole(), curve.recent()),
            (points.to_vec(), points.to_vec())
        );
        let (x, y) = curve.last().unwrap();
        assert!(x == 4.0 && y.is_nan());
    }
}
