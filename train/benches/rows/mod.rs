//! What the benches train on.

use train::batch::{MicroBatch, Window};
use train::data::Sample;

/// Rows `[rows, length]` of a vocabulary as one micro batch, all of them trained.
pub fn window([rows, length]: [usize; 2], vocabulary: usize) -> Window {
    let ids = |row: usize| (0..length).map(move |i| (row * 7919 + i * 104_729) % vocabulary);
    let sample = |row| Sample {
        task: 0,
        input_ids: ids(row).map(|id| id as u32).collect(),
        labels: ids(row).map(|id| id as i32).collect(),
    };
    let samples: Vec<Sample> = (0..rows).map(sample).collect();
    Window {
        micro_batches: vec![MicroBatch::new(&samples)],
        step: 0,
        epoch: 1.0,
        loss_scale: 1.0,
    }
}
