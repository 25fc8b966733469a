//! TensorBoard's event files.
//!
//! A file is a sequence of records (length, masked CRC-32C of it, bytes, masked CRC-32C of them),
//! each an `Event` of Protocol Buffers.
//!
//! Source: `tensorflow/core/lib/io/record_writer.cc`, `tensorboard/compat/proto/event.proto` and
//! `summary.proto`. The two crates for this on crates.io have not been kept up, and this is less than
//! what it takes to use them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::Result;
use crate::run_folder::{Line, io};

/// Name of the folder in a run folder.
pub const EVENTS_FOLDER: &str = "tensorboard";

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a new file beside those that are there. The events of steps from `first_step` on that
    /// earlier files have are void: TensorBoard forgets them, and reads them in this file.
    ///
    /// # Errors
    /// [`crate::Error::Io`]
    pub fn create(run: &Path, first_step: usize) -> Result<Self> {
        let folder = run.join(EVENTS_FOLDER);
        std::fs::create_dir_all(&folder).map_err(io("create", &folder))?;
        let entries = std::fs::read_dir(&folder).map_err(io("read", &folder))?;
        // they are read in the order of their names
        let (number, time) = (entries.count(), now());
        let path = folder.join(format!(
            "events.out.tfevents.{:010}.{number:04}.trainer",
            time as u64
        ));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = file.map_err(io("create", &path))?;
        let mut events = Self { path, file };
        let mut version = Message::at(time, 0);
        version.bytes(event::FILE_VERSION, b"brain.Event:2");
        events.append(&version)?;
        if number > 0 {
            let mut start = Message::default();
            start.number(session_log::STATUS, session_log::START);
            let mut event = Message::at(time, first_step as u64);
            event.bytes(event::SESSION_LOG, &start.0);
            events.append(&event)?;
        }
        Ok(events)
    }

    /// Appends the numbers of a step or an evaluation.
    ///
    /// # Errors
    /// [`crate::Error::Io`]
    pub fn write(&mut self, line: &Line) -> Result<()> {
        let (step, scalars) = scalars(line);
        self.append(&scalar_event(now(), step as u64, &scalars))
    }

    fn append(&mut self, event: &Message) -> Result<()> {
        let failed = io("write", &self.path);
        self.file.write_all(&record(&event.0)).map_err(failed)
    }
}

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0.0, |now| now.as_secs_f64())
}

/// The step of a line, and its numbers by their tags.
fn scalars(line: &Line) -> (usize, Vec<(&'static str, f64)>) {
    match *line {
        Line::Train {
            step,
            loss,
            lr,
            grad_norm,
            tokens_per_second,
            peak_memory_bytes,
            ..
        } => {
            let all = vec![
                ("loss/train", loss),
                ("lr", lr),
                ("grad_norm", grad_norm),
                ("tokens_per_second", tokens_per_second),
                ("memory", peak_memory_bytes as f64),
            ];
            (step, all)
        }
        Line::Eval { step, loss, .. } => (step, vec![("loss/eval", loss)]),
    }
}

fn scalar_event(time: f64, step: u64, scalars: &[(&str, f64)]) -> Message {
    let mut summary = Message::default();
    for (tag, number) in scalars {
        let mut value = Message::default();
        value.bytes(value::TAG, tag.as_bytes());
        value.float(value::SIMPLE_VALUE, *number as f32);
        summary.bytes(summary::VALUE, &value.0);
    }
    let mut event = Message::at(time, step);
    event.bytes(event::SUMMARY, &summary.0);
    event
}

/// Field numbers.
mod event {
    pub const WALL_TIME: u8 = 1;
    pub const STEP: u8 = 2;
    pub const FILE_VERSION: u8 = 3;
    pub const SUMMARY: u8 = 5;
    pub const SESSION_LOG: u8 = 7;
}
mod session_log {
    pub const STATUS: u8 = 1;
    pub const START: u64 = 1;
}
mod summary {
    pub const VALUE: u8 = 1;
}
mod value {
    pub const TAG: u8 = 1;
    pub const SIMPLE_VALUE: u8 = 2;
}

/// A message of Protocol Buffers, as bytes; field numbers are below 16.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    /// An event.
    fn at(time: f64, step: u64) -> Self {
        let mut event = Self::default();
        event.key(event::WALL_TIME, 1);
        event.0.extend(time.to_le_bytes());
        event.number(event::STEP, step);
        event
    }

    fn key(&mut self, field: u8, wire_type: u8) {
        self.0.push(field << 3 | wire_type);
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn number(&mut self, field: u8, number: u64) {
        self.key(field, 0);
        self.varint(number);
    }

    fn float(&mut self, field: u8, number: f32) {
        self.key(field, 5);
        self.0.extend(number.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, bytes: &[u8]) {
        self.key(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
    }
}

/// A record around some bytes.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(bytes);
    record.extend(masked(crc32c(bytes)).to_le_bytes());
    record
}

/// What stands in a file in the place of a checksum, so that checksums of records are of use, too.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: a run writes a few hundred bytes a step.
fn crc32c(bytes: &[u8]) -> u32 {
    let next = |crc: u32, byte: &u8| {
        let shift = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        (0..8).fold(crc ^ u32::from(*byte), shift)
    };
    !bytes.iter().fold(!0, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// What `tensorboard.summary.writer.record_writer.RecordWriter` of tensorboard 2.21.0 writes for
    /// `Event(wall_time=1.5, step=300, summary=Summary(value=[Summary.Value(tag="loss/train",
    /// simple_value=0.25)]))`.
    #[test]
    fn a_record_is_tensorboards_to_the_byte() {
        let expected = "2100000000000000017becf609000000000000f83f10ac022a130a110a0a6c6f73732f747261696e150000803e6c5611a4";
        let bytes = record(&scalar_event(1.5, 300, &[("loss/train", 0.25)]).0);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected);
    }

    #[test]
    fn a_later_file_comes_after_the_others_and_voids_their_last_steps() {
        let run = tempfile::tempdir().unwrap();
        let line = Line::Eval {
            step: 3,
            loss: 0.5,
            perplexity: 1.6,
            tokens: 9,
        };
        for _ in 0..3 {
            EventFile::create(run.path(), 4)
                .unwrap()
                .write(&line)
                .unwrap();
        }
        let folder = run.path().join(EVENTS_FOLDER);
        let entries = std::fs::read_dir(&folder).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let length = |path: &PathBuf| std::fs::metadata(path).unwrap().len();
        let lengths: Vec<_> = files.iter().map(length).collect();
        // event: time 9, step 2, log 4; around it 16
        assert_eq!(lengths[1] - lengths[0], 9 + 2 + 4 + 16);
        assert_eq!(lengths[1], lengths[2]);
    }
}
