//! JSON Lines and JSON arrays.

use std::fmt;
use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Deserializer as _, Error as _, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::read::{Place, RawRow, RowNumber, Sink, Source, type_name};
use super::unreadable;
use crate::error::{Error, Result};

/// Hands out the lines of a file that are not blank; they are parsed later, in parallel.
pub(super) fn read_lines(
    mut reader: impl BufRead,
    path: &Arc<Path>,
    lines_before: usize,
    sink: &mut Sink<'_>,
) -> Result<()> {
    for line in lines_before + 1.. {
        let mut bytes = Vec::new();
        let read = reader
            .read_until(b'\n', &mut bytes)
            .map_err(|e| unreadable(path, e))?;
        if read == 0 {
            break;
        }
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        sink(RawRow {
            place: Place {
                path: path.clone(),
                row: RowNumber::Line(line),
            },
            source: Source::Line(bytes),
        })?;
    }
    Ok(())
}

/// Parses a line.
pub(super) fn parse_line(place: &Place, bytes: &[u8]) -> Result<Map<String, Value>> {
    let text = str::from_utf8(bytes).map_err(|_| Error::NotUtf8 {
        place: place.clone(),
    })?;
    let value = serde_json::from_str(text.trim_end());
    let value = value.map_err(|cause| Error::BadJson {
        place: place.clone(),
        cause,
    })?;
    to_columns(place, value)
}

/// Hands out the elements of an array.
pub(super) fn read_array(
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
            let row = to_columns(&place, value).map(|columns| RawRow {
                place,
                source: Source::Columns(columns),
            });
            if let Err(error) = row.and_then(&mut *self.sink) {
                *self.failed = Some(error);
                return Err(A::Error::custom("a row is wrong"));
            }
        }
        Ok(())
    }
}

fn to_columns(place: &Place, value: Value) -> Result<Map<String, Value>> {
    match value {
        Value::Object(columns) => Ok(columns),
        other => Err(Error::WrongType {
            place: place.clone(),
            key: "the row".to_owned(),
            expected: "an object",
            found: type_name(Some(&other)),
        }),
    }
}
