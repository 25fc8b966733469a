//! From files to JSON objects, one at a time, each with its place.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{Deserializer as _, Error as _, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Where a row stands; shown as `FILE:LINE` or `FILE: element N`.
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
    /// The line it stands in.
    Line(usize),
    /// Its number in the file's JSON array.
    Element(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.row {
            RowNumber::Line(line) => write!(f, "{}:{line}", self.path.display()),
            RowNumber::Element(element) => write!(f, "{}: element {element}", self.path.display()),
        }
    }
}

/// A row as it was read.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) place: Place,
    pub(super) columns: Map<String, Value>,
}

/// What takes the rows; an error of its own ends the reading.
pub(super) type Sink<'a> = dyn FnMut(Row) -> Result<()> + 'a;

/// Reads the rows of files and folders in order.
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

/// The file itself, or the data files of a folder.
fn find_files(path: &Path) -> Result<Vec<PathBuf>> {
    let path = path.to_path_buf();
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::NoSuchData { path }),
        Err(e) => return Err(unreadable(&path, e)),
        Ok(metadata) if !metadata.is_dir() => return Ok(vec![path]),
        Ok(_) => {}
    }
    let entries = std::fs::read_dir(&path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(|e| unreadable(&path, e))?;
    let is_data = |path: &PathBuf| has_extension(path, &["jsonl", "json"]) && path.is_file();
    let mut files: Vec<_> = entries
        .iter()
        .map(|entry| entry.path())
        .filter(is_data)
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(Error::NoDataFiles { path });
    }
    Ok(files)
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|found| {
        extensions
            .iter()
            .any(|known| found.eq_ignore_ascii_case(known))
    })
}

/// Kinds of files that are surely neither JSONL nor JSON.
const OTHER_KINDS: [&str; 8] = ["csv", "tsv", "parquet", "arrow", "gz", "zst", "zip", "xlsx"];

fn read_file(path: &Path, sink: &mut Sink<'_>) -> Result<()> {
    if has_extension(path, &OTHER_KINDS) {
        return Err(Error::DataFileKind {
            path: path.to_path_buf(),
        });
    }
    let file = File::open(path).map_err(|e| unreadable(path, e))?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let lines_before = skip_blank(&mut reader).map_err(|e| unreadable(path, e))?;
    let first = reader.fill_buf().map_err(|e| unreadable(path, e))?.first();
    let is_array = first == Some(&b'[') && !has_extension(path, &["jsonl"]);
    let mut rows = 0;
    let mut counted = |row| {
        rows += 1;
        sink(row)
    };
    let shared = Arc::from(path);
    match is_array {
        true => read_array(reader, &shared, lines_before, &mut counted)?,
        false => read_lines(reader, &shared, lines_before, &mut counted)?,
    }
    if rows == 0 {
        return Err(Error::EmptyData {
            path: path.to_path_buf(),
        });
    }
    Ok(())
}

/// Skips the byte order mark and the white space in front of the first row; returns the number of
/// lines that ended.
fn skip_blank(reader: &mut impl BufRead) -> io::Result<usize> {
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

fn read_lines(
    mut reader: impl BufRead,
    path: &Arc<Path>,
    lines_before: usize,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let mut bytes = Vec::new();
    for line in lines_before + 1.. {
        bytes.clear();
        let read = reader
            .read_until(b'\n', &mut bytes)
            .map_err(|e| unreadable(path, e))?;
        if read == 0 {
            break;
        }
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let place = || Place {
            path: path.clone(),
            row: RowNumber::Line(line),
        };
        let text = str::from_utf8(&bytes).map_err(|_| Error::NotUtf8 { place: place() })?;
        let value = serde_json::from_str(text.trim_end());
        let value = value.map_err(|cause| Error::BadJson {
            place: place(),
            cause,
        })?;
        sink(to_row(place(), value)?)?;
    }
    Ok(())
}

fn read_array(
    reader: impl BufRead,
    path: &Arc<Path>,
    lines_before: usize,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let mut failed = None;
    let mut json = serde_json::Deserializer::from_reader(reader);
    let elements = Elements {
        path,
        sink,
        failed: &mut failed,
    };
    let read = json.deserialize_seq(elements).and_then(|()| json.end());
    if let Some(error) = failed {
        return Err(error);
    }
    read.map_err(|cause| {
        let place = Place {
            path: path.clone(),
            row: RowNumber::Line(lines_before + cause.line()),
        };
        if cause.is_io() {
            unreadable(path, cause.into())
        } else if cause.to_string().starts_with("invalid unicode code point") {
            Error::NotUtf8 { place }
        } else {
            Error::BadJson { place, cause }
        }
    })
}

/// Hands out the elements of an array as they are parsed.
struct Elements<'a, 's> {
    path: &'a Arc<Path>,
    sink: &'a mut Sink<'s>,
    /// The error of the row that ended the reading: serde's own errors cannot carry it.
    failed: &'a mut Option<Error>,
}

impl<'de> Visitor<'de> for Elements<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> std::result::Result<(), A::Error> {
        let mut number = 0;
        while let Some(value) = elements.next_element::<Value>()? {
            number += 1;
            let place = Place {
                path: self.path.clone(),
                row: RowNumber::Element(number),
            };
            if let Err(error) = to_row(place, value).and_then(&mut *self.sink) {
                *self.failed = Some(error);
                return Err(A::Error::custom("a row is wrong"));
            }
        }
        Ok(())
    }
}

fn to_row(place: Place, value: Value) -> Result<Row> {
    match value {
        Value::Object(columns) => Ok(Row { place, columns }),
        other => Err(Error::WrongType {
            place,
            key: "the row".to_owned(),
            expected: "an object",
            found: type_name(Some(&other)),
        }),
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

fn unreadable(path: &Path, source: io::Error) -> Error {
    Error::Io {
        action: "read",
        path: path.to_path_buf(),
        source,
    }
}
