//! Parquet: nested values in columns, as the datasets of the Hub are stored.

use std::cell::Cell;
use std::fs::File;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::{Arc, Once};

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::read::{Place, RawRow, RowNumber, Sink, Source};
use super::rows::{Format, READ_COLUMNS};
use crate::error::{Error, Result};

/// Reads the rows of a Parquet file, one at a time.
pub(super) fn read_parquet(file: File, path: &Arc<Path>, sink: &mut Sink<'_>) -> Result<()> {
    let failed = |source: ParquetError| Error::Parquet {
        path: path.to_path_buf(),
        source,
    };
    let mut records = guarded(path, || {
        let reader = SerializedFileReader::new(file).map_err(failed)?;
        let schema = reader.metadata().file_metadata().schema();
        let wanted = wanted_columns(schema).map_err(failed)?;
        let records = RowIter::from_file_into(Box::new(reader));
        records.project(wanted).map_err(failed)
    })?;
    for row in 1.. {
        let place = Place {
            path: path.clone(),
            row: RowNumber::Row(row),
        };
        let columns = guarded(path, || match records.next() {
            Some(record) => to_columns(record.map_err(failed)?, &place).map(Some),
            None => Ok(None),
        })?;
        let Some(columns) = columns else {
            break;
        };
        sink(RawRow {
            place,
            source: Source::Columns(columns),
        })?;
    }
    Ok(())
}

/// Makes a panic of the crate that reads Parquet, as of some damaged files, an error of the file.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    thread_local! {
        static READS: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !READS.get() {
                before(info);
            }
        }));
    });
    READS.set(true);
    let done = panic::catch_unwind(AssertUnwindSafe(read)); // what it read from is not used again
    READS.set(false);
    done.unwrap_or_else(|_| {
        Err(Error::Parquet {
            path: path.to_path_buf(),
            source: ParquetError::General("it is damaged".into()),
        })
    })
}

/// The columns that some format reads, unless none fits: then all, to be named in the error.
fn wanted_columns(schema: &Type) -> std::result::Result<Option<Type>, ParquetError> {
    let has = |column: &&str| {
        schema
            .get_fields()
            .iter()
            .any(|field| field.name() == *column)
    };
    if !Format::CHOICE
        .iter()
        .any(|format| format.columns().iter().all(has))
    {
        return Ok(None);
    }
    let fields = schema.get_fields().iter();
    let fields = fields.filter(|field| READ_COLUMNS.contains(&field.name()));
    let wanted = Type::group_type_builder(schema.name()).with_fields(fields.cloned().collect());
    wanted.build().map(Some)
}

fn to_columns(record: Record, place: &Place) -> Result<Map<String, Value>> {
    let columns = record.into_columns().into_iter().map(|(column, field)| {
        let value = to_value(&field).ok_or_else(|| Error::WrongType {
            place: place.clone(),
            key: column.clone(),
            expected: "text or numbers",
            found: "binary data",
        });
        Ok((column, value?))
    });
    columns.collect()
}

/// The same value in JSON; `None` for what JSON does not have.
///
/// In a struct, null means that this object has no such key: all structs of a column have the keys
/// of all of them.
fn to_value(field: &Field) -> Option<Value> {
    Some(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => Value::from(*value),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float16(value) => number(f64::from(value.to_f32())),
        Field::Float(value) => number(f64::from(*value)),
        Field::Double(value) => number(*value),
        Field::Decimal(_) => Value::from(field.to_string()),
        Field::Str(text) => Value::from(text.as_str()),
        Field::Bytes(bytes) => Value::from(str::from_utf8(bytes.data()).ok()?),
        Field::ListInternal(list) => list
            .elements()
            .iter()
            .map(to_value)
            .collect::<Option<Vec<_>>>()?
            .into(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter().map(|(key, value)| {
                let key = match to_value(key)? {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                Some((key, to_value(value)?))
            });
            Value::Object(entries.collect::<Option<_>>()?)
        }
        Field::Group(record) => {
            let fields = record.get_column_iter();
            let fields = fields.filter(|(_, field)| !matches!(field, Field::Null));
            let fields = fields.map(|(key, field)| Some((key.clone(), to_value(field)?)));
            Value::Object(fields.collect::<Option<_>>()?)
        }
    })
}

fn number(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}
