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

/// How the names of these files end.
const ENDING: &str = ".trainer";

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a new file beside those that are there. Steps from `first_step` on will be taken again:
    /// earlier files lose them, and a TensorBoard that has read them is told to forget them.
    ///
    /// # Errors
    /// [`crate::Error::Io`]
    pub fn create(run: &Path, first_step: usize) -> Result<Self> {
        let folder = run.join(EVENTS_FOLDER);
        std::fs::create_dir_all(&folder).map_err(io("create", &folder))?;
        let earlier = event_files(&folder)?;
        earlier.iter().try_for_each(|file| cut(file, first_step))?;
        // they are read in the order of their names
        let (number, time) = (earlier.len(), now());
        let path = folder.join(format!(
            "events.out.tfevents.{:010}.{number:04}{ENDING}",
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

/// The files of earlier sessions, in order.
fn event_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(io("read", folder))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<_> = paths
        .filter(|path| path.to_string_lossy().ends_with(ENDING))
        .collect();
    files.sort();
    Ok(files)
}

/// Cuts a file off before its first event of step `first_step` or later, or before a torn one. Their
/// steps never fall.
fn cut(path: &Path, first_step: usize) -> Result<()> {
    let bytes = std::fs::read(path).map_err(io("read", path))?;
    let mut kept = 0;
    while let Some((event, end)) = record_at(&bytes, kept) {
        if step_of(event).is_none_or(|step| step >= first_step as u64) {
            break;
        }
        kept = end;
    }
    if kept < bytes.len() {
        let file = OpenOptions::new().write(true).open(path);
        let cut = file.and_then(|file| file.set_len(kept as u64));
        cut.map_err(io("write", path))?;
    }
    Ok(())
}

/// The bytes of the record that begins at `start`, and where it ends; `None` if it does not.
fn record_at(bytes: &[u8], start: usize) -> Option<(&[u8], usize)> {
    let length = bytes.get(start..start + 8)?;
    let length = u64::from_le_bytes(length.try_into().ok()?) as usize;
    let begin = start + 12;
    let end = begin.checked_add(length)?;
    let inside = bytes.get(begin..end)?;
    (bytes.len() >= end + 4).then_some((inside, end + 4))
}

/// The step of an event as [`Message::at`] writes it.
fn step_of(event: &[u8]) -> Option<u64> {
    let varint = event.get(9..)?.strip_prefix(&[event::STEP << 3])?;
    let end = varint.iter().position(|byte| *byte < 0x80)?;
    let add = |step: u64, byte: &u8| step << 7 | u64::from(byte & 0x7f);
    Some(varint[..=end].iter().rev().fold(0, add))
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
        Line::Skipped { step, skipped, .. } => (step, vec![("skipped", skipped as f64)]),
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
    use crate::checkpoint::Progress;
    use crate::recipe::Recipe;
    use crate::run_folder::RunFolder;

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
    fn a_later_file_comes_after_the_others_which_lose_what_it_will_have() {
        let run = tempfile::tempdir().unwrap();
        let line = |step| Line::Eval {
            step,
            loss: 0.5,
            perplexity: 1.6,
            tokens: 9,
        };
        let steps = |path: &PathBuf| {
            let bytes = std::fs::read(path).unwrap();
            let (mut steps, mut at) = (Vec::new(), 0);
            while let Some((event, end)) = record_at(&bytes, at) {
                steps.push(step_of(event).unwrap());
                at = end;
            }
            assert_eq!(at, bytes.len());
            steps
        };
        let mut first = EventFile::create(run.path(), 1).unwrap();
        for step in [1, 127, 128, 300] {
            first.write(&line(step)).unwrap();
        }
        first.file.write_all(&record(b"torn")[..7]).unwrap();
        let mut second = EventFile::create(run.path(), 128).unwrap();
        second.write(&line(128)).unwrap();
        EventFile::create(run.path(), 129).unwrap();
        let files = event_files(&run.path().join(EVENTS_FOLDER)).unwrap();
        let all: Vec<_> = files.iter().map(steps).collect();
        // the version of the file, the start of the session, the evaluations
        assert_eq!(all, [vec![0, 1, 127], vec![0, 128, 128], vec![0, 129]]);
    }

    /// A checkpoint of a cut-short evaluation was gone on from, and the run killed after it.
    #[test]
    fn an_evaluation_that_is_made_again_is_told_once() {
        let run = tempfile::tempdir().unwrap();
        let mut recipe = Recipe::default();
        recipe.output.tensorboard = true;
        let train = |step| Line::Skipped {
            step,
            epoch: 0.5,
            reason: "the loss".into(),
            skipped: step,
            seconds: 0.1,
        };
        let eval = Line::Eval {
            step: 2,
            loss: 0.5,
            perplexity: 1.6,
            tokens: 9,
        };
        let due = Progress {
            step: 2,
            evaluation_due: true,
            ..Progress::default()
        };
        let folder = RunFolder::create(&run.path().join("run"), &recipe).unwrap();
        let mut folder = folder.with_events(&recipe, &Progress::default()).unwrap();
        let path = folder.path().to_path_buf();
        for line in [&train(1), &train(2), &eval] {
            folder.write(line).unwrap();
        }
        drop(folder);
        let mut folder = RunFolder::open(&path).unwrap();
        folder.go_back(&due).unwrap();
        let mut folder = folder.with_events(&recipe, &due).unwrap();
        folder.write(&eval).unwrap();
        let files = event_files(&path.join(EVENTS_FOLDER)).unwrap();
        let all: Vec<u8> = files
            .iter()
            .flat_map(|file| std::fs::read(file).unwrap())
            .collect();
        let count = |tag: &[u8]| all.windows(tag.len()).filter(|part| *part == tag).count();
        assert_eq!((count(b"loss/eval"), count(b"skipped")), (1, 2));
    }
}
