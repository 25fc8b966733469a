//! CSV and TSV: rows of text cells under a header.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use csv::ByteRecord;
use serde_json::{Map, Value};

use super::read::{Place, RawRow, RowNumber, Sink, Source, skip_blank};
use super::unreadable;
use crate::error::{Error, Result};

/// The columns whose cells hold JSON: text cannot be lists.
const JSON_COLUMNS: [&str; 5] = ["messages", "conversations", "input_ids", "labels", "tools"];

/// Reads the rows of a table, one at a time.
pub(super) fn read_table(
    mut reader: BufReader<File>,
    path: &Arc<Path>,
    separator: u8,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let failed = |e: csv::Error| unreadable(path, e.into());
    let lines_before = skip_blank(&mut reader).map_err(|e| unreadable(path, e))?;
    let mut table = csv::ReaderBuilder::new()
        .delimiter(separator)
        .flexible(true) // a row with another number of cells is told with its place
        .from_reader(reader);
    let header = read_header(
        table.byte_headers().map_err(failed)?,
        path,
        lines_before + 1,
    )?;
    let mut cells = ByteRecord::new();
    while table.read_byte_record(&mut cells).map_err(failed)? {
        let line = cells.position().map_or(0, csv::Position::line) as usize;
        sink(RawRow {
            place: Place {
                path: path.clone(),
                row: RowNumber::Line(lines_before + line),
            },
            source: Source::Cells {
                header: header.clone(),
                cells: cells.clone(),
            },
        })?;
    }
    Ok(())
}

fn read_header(header: &ByteRecord, path: &Arc<Path>, line: usize) -> Result<Arc<[String]>> {
    let place = || Place {
        path: path.clone(),
        row: RowNumber::Line(line),
    };
    let names = header.iter().map(|name| match str::from_utf8(name) {
        Ok(name) => Ok(name.trim().to_owned()),
        Err(_) => Err(Error::NotUtf8 { place: place() }),
    });
    let names: Vec<String> = names.collect::<Result<_>>()?;
    for (index, column) in names.iter().enumerate() {
        if names[..index].contains(column) {
            return Err(Error::ColumnTwice {
                place: place(),
                column: column.clone(),
            });
        }
    }
    Ok(names.into())
}

/// The cells of a row as values: text, or what the JSON in them says.
pub(super) fn to_columns(
    place: &Place,
    header: &[String],
    cells: &ByteRecord,
) -> Result<Map<String, Value>> {
    if cells.len() != header.len() {
        return Err(Error::CellCount {
            place: place.clone(),
            cells: cells.len(),
            columns: header.len(),
        });
    }
    let mut columns = Map::new();
    for (column, cell) in header.iter().zip(cells) {
        let place = || place.clone();
        let text = str::from_utf8(cell).map_err(|_| Error::NotUtf8 { place: place() })?;
        let value = match JSON_COLUMNS.contains(&column.as_str()) {
            false => Value::from(text),
            true if text.trim().is_empty() => Value::Null,
            true => serde_json::from_str(text).map_err(|cause| Error::BadCell {
                place: place(),
                column: column.clone(),
                cause,
            })?,
        };
        columns.insert(column.clone(), value);
    }
    Ok(columns)
}
