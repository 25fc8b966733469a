//! The learning rate of each optimizer step: linear warm-up, then a course.
//!
//! Source: `get_*_schedule_with_warmup` in `transformers/optimization.py`.

use std::f64::consts::PI;

use burn::lr_scheduler::LrScheduler;
use burn::tensor::backend::Backend;

use crate::recipe::{LrSchedule, TrainSection};

/// A schedule over optimizer steps, counted from 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    peak: f64,
    course: LrSchedule,
    warmup_steps: usize,
    total_steps: usize,
    step: usize,
}

impl Schedule {
    /// The schedule of a run of `total_steps`, about to take step `step`.
    pub fn new(train: &TrainSection, total_steps: usize, step: usize) -> Self {
        let by_ratio = (total_steps as f64 * train.warmup_ratio).ceil() as usize;
        Self {
            peak: train.learning_rate,
            course: train.lr_schedule,
            warmup_steps: train.warmup_steps.unwrap_or(by_ratio),
            total_steps,
            step,
        }
    }

    /// The learning rate of a step, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        let warmup = self.warmup_steps;
        if step < warmup {
            return self.peak * step as f64 / warmup as f64;
        }
        let rest = self.total_steps.saturating_sub(warmup).max(1) as f64;
        let progress = (step - warmup) as f64 / rest;
        self.peak
            * match self.course {
                LrSchedule::Constant => 1.0,
                LrSchedule::Linear => (1.0 - progress).max(0.0),
                LrSchedule::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            }
    }
}

impl LrScheduler for Schedule {
    type Record<B: Backend> = usize;

    fn step(&mut self) -> f64 {
        let rate = self.at(self.step);
        self.step += 1;
        rate
    }

    fn to_record<B: Backend>(&self) -> usize {
        self.step
    }

    fn load_record<B: Backend>(mut self, step: usize) -> Self {
        self.step = step;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(course: LrSchedule, warmup: Option<usize>, total: usize) -> Vec<f64> {
        let train = TrainSection {
            learning_rate: 1.0,
            lr_schedule: course,
            warmup_steps: warmup,
            warmup_ratio: 0.25,
            ..TrainSection::default()
        };
        let mut schedule = Schedule::new(&train, total, 0);
        (0..total).map(|_| schedule.step()).collect()
    }

    fn close(left: &[f64], right: &[f64]) {
        assert_eq!(left.len(), right.len());
        assert!(
            left.iter().zip(right).all(|(l, r)| (l - r).abs() < 1e-12),
            "{left:?}"
        );
    }

    #[test]
    fn rates_follow_transformers() {
        let root = 0.5f64.sqrt();
        close(
            &rates(LrSchedule::Linear, Some(2), 6),
            &[0.0, 0.5, 1.0, 0.75, 0.5, 0.25],
        );
        close(
            &rates(LrSchedule::Cosine, Some(2), 6),
            &[0.0, 0.5, 1.0, 0.5 + root / 2.0, 0.5, 0.5 - root / 2.0],
        );
        close(&rates(LrSchedule::Constant, Some(0), 3), &[1.0, 1.0, 1.0]);
        close(&rates(LrSchedule::Constant, None, 4), &[0.0, 1.0, 1.0, 1.0]);
    }
}
