//! From files to rows, one at a time, each with its place.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use csv::ByteRecord;
use serde_json::{Map, Value};

use super::files::{Kind, find_files, has_extension};
use super::{columnar, json, table, unreadable};
use crate::error::{Error, Result};

/// Where a row stands; shown as `FILE:LINE`, `FILE: element N` or `FILE: row N`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: Arc<Path>,
    /// Its number in the file.
    pub row: RowNumber,
}

/// The number of a row in its file, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowNumber {
    /// The line it stands in, or begins in.
    Line(usize),
    /// Its number in the file's JSON array.
    Element(usize),
    /// Its number in a file without lines.
    Row(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.row {
            RowNumber::Line(line) => write!(f, "{path}:{line}"),
            RowNumber::Element(element) => write!(f, "{path}: element {element}"),
            RowNumber::Row(row) => write!(f, "{path}: row {row}"),
        }
    }
}

/// A row as it stands in its file: what is still to be parsed is parsed in parallel with others.
#[derive(Debug)]
pub(super) struct RawRow {
    pub(super) place: Place,
    pub(super) source: Source,
}

/// What a file gives for a row.
#[derive(Debug)]
pub(super) enum Source {
    Line(Vec<u8>),
    Cells {
        header: Arc<[String]>,
        cells: ByteRecord,
    },
    Columns(Map<String, Value>),
}

/// A row as it was read.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) place: Place,
    pub(super) columns: Map<String, Value>,
}

impl RawRow {
    /// About how much memory it takes.
    pub(super) fn bytes(&self) -> usize {
        match &self.source {
            Source::Line(bytes) => bytes.len(),
            Source::Cells { cells, .. } => cells.as_slice().len(),
            Source::Columns(columns) => columns.values().map(value_bytes).sum(),
        }
    }

    pub(super) fn parse(self) -> Result<Row> {
        let Self { place, source } = self;
        let columns = match source {
            Source::Line(bytes) => json::parse_line(&place, &bytes)?,
            Source::Cells { header, cells } => table::to_columns(&place, &header, &cells)?,
            Source::Columns(columns) => columns,
        };
        Ok(Row { place, columns })
    }
}

fn value_bytes(value: &Value) -> usize {
    let inner = match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(value_bytes).sum(),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| key.len() + value_bytes(value))
            .sum(),
        _ => 0,
    };
    inner + size_of::<Value>()
}

/// What takes the rows; an error of its own ends the reading.
pub(super) type Sink<'a> = dyn FnMut(RawRow) -> Result<()> + 'a;

/// Reads the rows of files, folders and patterns in order.
pub(super) fn read_rows(paths: &[PathBuf], sink: &mut Sink<'_>) -> Result<()> {
    if paths.is_empty() {
        return Err(Error::NoData);
    }
    for path in paths {
        for file in find_files(path)? {
            read_file(&file, sink)?;
        }
    }
    Ok(())
}

fn read_file(path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    let kind = Kind::of(path)?;
    let file = File::open(path).map_err(|e| unreadable(path, e))?;
    let mut rows = 0;
    let mut counted = |row| {
        rows += 1;
        sink(row)
    };
    let shared = Arc::from(path);
    let reader = |file| BufReader::with_capacity(1 << 16, file);
    match kind {
        Kind::Json => read_json(reader(file), &shared, &mut counted)?,
        Kind::Table(separator) => {
            table::read_table(reader(file), &shared, separator, &mut counted)?;
        }
        Kind::Parquet => columnar::read_parquet(file, &shared, &mut counted)?,
    }
    match rows {
        0 => Err(Error::EmptyData { path: path.into() }),
        _ => Ok(()),
    }
}

fn read_json(mut reader: BufReader<File>, path: &Arc<Path>, sink: &mut Sink<'_>) -> Result<()> {
    let lines_before = skip_blank(&mut reader).map_err(|e| unreadable(path, e))?;
    let first = reader.fill_buf().map_err(|e| unreadable(path, e))?.first();
    match first == Some(&b'[') && !has_extension(path, &["jsonl", "ndjson"]) {
        true => json::read_array(reader, path, lines_before, sink),
        false => json::read_lines(reader, path, lines_before, sink),
    }
}

/// Skips the byte order mark and the white space in front of the first row; returns the number of
/// lines that ended.
pub(super) fn skip_blank(reader: &mut impl BufRead) -> io::Result<usize> {
    if reader.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    let mut lines = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let filled = buffer.len();
        let blank = filled - buffer.trim_ascii_start().len();
        lines += buffer[..blank]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count();
        reader.consume(blank);
        if blank < filled || filled == 0 {
            return Ok(lines);
        }
    }
}

/// What a value is, for messages.
pub(super) fn type_name(value: Option<&Value>) -> &'static str {
    match value {
        None => "nothing",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(number)) if number.is_f64() => "a fraction",
        Some(Value::Number(_)) => "an integer",
        Some(Value::String(_)) => "a string",
        Some(Value::Array(items)) if items.is_empty() => "an empty list",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}
