//! Reading a recipe key by key, so that every problem is told at once, with its key and its place.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::{AdapterSection, Recipe, check, names};
use crate::error::{Error, Result};

/// The keys without a default.
pub(super) const MODEL: &str = "model.path";
pub(super) const DATA: &str = "data.train";

/// Reads a recipe, of which only those keys may be missing that are not among `needed`.
pub(super) fn read(
    file: Option<&Path>,
    settings: &[(String, Value)],
    needed: &[&str],
) -> Result<Recipe> {
    let (table, broken) = match file {
        Some(path) => read_table(path)?,
        None => (Table::new(), None),
    };
    let mut reader = Reader {
        file,
        problems: Vec::new(),
        places: BTreeMap::new(),
        failed: BTreeSet::new(),
    };
    let recipe = reader.read(table, settings);
    if let Some(error) = broken.filter(|_| reader.failed.is_empty()) {
        return Err(error);
    }
    for (key, problem) in check::problems(&recipe) {
        reader.add_value_problem(&key, &problem);
    }
    for (key, is_missing, what) in [
        (
            MODEL,
            recipe.model.path.is_empty(),
            "a model folder or a Hub id",
        ),
        (
            DATA,
            recipe.data.train.is_empty(),
            "a file or folder of training rows",
        ),
    ] {
        if is_missing && needed.contains(&key) {
            reader.add_value_problem(key, &format!("{key} is missing: give {what}"));
        }
    }
    reader.add_unused(&recipe);
    match reader.problems.is_empty() {
        true => Ok(recipe),
        false => Err(Error::Recipe {
            problems: reader.problems,
        }),
    }
}

/// The method that a recipe will have in the end.
fn chosen_method<'a>(table: &'a Table, settings: &'a [(String, Value)]) -> Option<&'a str> {
    let mut set = settings.iter().rev();
    let set = set.find(|(key, _)| key == "adapter.method");
    let value = set.map(|(_, value)| value);
    let value = value.or_else(|| table.get("adapter")?.get("method"))?;
    value.as_str()
}

/// The table of a file. One that is TOML but for text without quotes is read as if it had them, beside the
/// error, so that it can be said what the key takes.
fn read_table(path: &Path) -> Result<(Table, Option<Error>)> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::NoRecipe {
        path: path.into(),
        source,
    })?;
    let source = match text.parse() {
        Ok(table) => return Ok((table, None)),
        Err(source) => source,
    };
    let quoted = quoted(&text, &source);
    let error = Error::Toml {
        path: path.into(),
        source,
    };
    match quoted {
        Some(table) => Ok((table, Some(error))),
        None => Err(error),
    }
}

/// The table with quotes around the value at which a file is no TOML, if it is TOML then.
fn quoted(text: &str, error: &toml::de::Error) -> Option<Table> {
    let before = text.get(..error.span()?.start)?;
    let start = before.rfind('\n').map_or(0, |end| end + 1);
    let line = text[start..].lines().next()?;
    let (key, value) = line.split_once('=')?;
    let value = value.split('#').next().unwrap_or(value).trim();
    let (head, tail) = (&text[..start], &text[start + line.len()..]);
    let value = Value::from(value);
    format!("{head}{key}= {value}{tail}").parse().ok()
}

/// What `--set section.key=value` means: TOML, or a string if it is not; strings in a list need no
/// quotes either.
pub fn parse_setting(text: &str) -> Option<(String, Value)> {
    let (key, value) = text.split_once('=')?;
    let (key, value) = (key.trim(), value.trim());
    let (section, name) = key.split_once('.')?;
    if section.is_empty() || name.is_empty() {
        return None;
    }
    let list = value
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let value = match (parse_value(value), list) {
        (Some(value), _) => value,
        (None, Some(list)) => {
            let one = |item: &str| parse_value(item).unwrap_or_else(|| item.trim().into());
            Value::Array(list.split(',').map(one).collect())
        }
        (None, None) => value.into(),
    };
    Some((key.to_owned(), value))
}

fn parse_value(text: &str) -> Option<Value> {
    let mut table = format!("x = {text}").parse::<Table>().ok()?;
    match table.remove("x") {
        // no key of a recipe is a date, but a folder may be called after one
        Some(Value::Datetime(date)) => Some(date.to_string().into()),
        value => value.filter(|_| table.is_empty()),
    }
}

/// Reads key by key, so that one bad key does not hide the next.
struct Reader<'a> {
    file: Option<&'a Path>,
    problems: Vec<String>,
    /// Where each key was given.
    places: BTreeMap<String, Place>,
    /// Keys whose value could not be taken over.
    failed: BTreeSet<String>,
}

/// Where a key was given.
#[derive(Clone, Copy)]
enum Place {
    File,
    CommandLine,
}

impl Reader<'_> {
    fn read(&mut self, table: Table, settings: &[(String, Value)]) -> Recipe {
        let mut recipe = Recipe::default();
        if let Some(method) = chosen_method(&table, settings) {
            recipe.adapter = AdapterSection::of(method); // it decides which keys there are
        }
        for (section, value) in table {
            match value {
                _ if !names::SECTIONS.contains(&section.as_str()) => {
                    self.add(Place::File, &names::unknown_section(&section));
                }
                Value::Table(table) => {
                    for (key, value) in table {
                        self.set(&mut recipe, Place::File, &section, &key, value);
                    }
                }
                _ => self.add(Place::File, &format!("{section} must be a section")),
            }
        }
        for (key, value) in settings {
            let (section, name) = key.split_once('.').unwrap_or((key, ""));
            self.set(
                &mut recipe,
                Place::CommandLine,
                section,
                name,
                value.clone(),
            );
        }
        recipe.given = self.places.keys().cloned().collect();
        recipe
    }

    fn set(&mut self, recipe: &mut Recipe, place: Place, section: &str, key: &str, value: Value) {
        let (key, value) = match section {
            "adapter" => within_table(&recipe.adapter, key, value),
            _ => (key, value),
        };
        let at = format!("{section}.{key}");
        let known = match section {
            "adapter" => recipe.adapter.keys(),
            _ => names::keys(section),
        };
        let known = known.iter().any(|known| known == key);
        let outcome = match section {
            _ if !names::SECTIONS.contains(&section) => Err(names::unknown_section(section)),
            "adapter" if !known => Err(names::unknown_setting(&recipe.adapter, key)),
            _ if !known => Err(names::unknown_key(section, key)),
            "model" => set(&mut recipe.model, key, value),
            "quantization" => set(&mut recipe.quantization, key, value),
            "adapter" => set(&mut recipe.adapter, key, value),
            "data" => set(&mut recipe.data, key, value),
            "train" => set(&mut recipe.train, key, value),
            _ => set(&mut recipe.output, key, value),
        };
        match outcome {
            Ok(()) => {
                self.places.insert(at, place);
            }
            Err(problem) => {
                self.add(place, &format!("{at}: {problem}"));
                self.failed.insert(at);
            }
        }
    }

    /// What is wrong with a value; nothing new about a key that could not be read at all.
    fn add_value_problem(&mut self, key: &str, problem: &str) {
        if self.failed.contains(key) {
            return;
        }
        match (self.places.get(key), self.file) {
            (Some(place), _) => self.add(*place, problem),
            (None, Some(_)) => self.add(Place::File, problem),
            (None, None) => self.problems.push(problem.to_owned()),
        }
    }

    /// A key that means nothing beside the others is a mistake on the command line, and in a file
    /// if it has another value than if it were left out: a complete recipe has every key.
    fn add_unused(&mut self, recipe: &Recipe) {
        for unused in check::unused(recipe) {
            let is_meant = match self.places.get(&unused.key) {
                Some(Place::CommandLine) => true,
                Some(Place::File) => !unused.is_default,
                None => false,
            };
            if is_meant {
                let problem = format!("{} means nothing here: {}", unused.key, unused.reason);
                self.add_value_problem(&unused.key, &problem);
            }
        }
    }

    fn add(&mut self, place: Place, problem: &str) {
        let place = match (place, self.file) {
            (Place::File, Some(path)) => path.display().to_string(),
            _ => "the command line".into(),
        };
        self.problems.push(format!("{place}: {problem}"));
    }
}

/// What `rank_pattern.q_proj = 3` sets: the entry of a key that holds a table.
fn within_table<'a>(adapter: &AdapterSection, key: &'a str, value: Value) -> (&'a str, Value) {
    let entry = || {
        let (table, entry) = key.split_once('.')?;
        let section = Table::try_from(adapter).ok()?;
        let mut entries = section.get(table)?.as_table()?.clone();
        entries.insert(entry.to_owned(), value.clone());
        Some((table, Value::Table(entries)))
    };
    entry().unwrap_or((key, value))
}

/// Sets one key of a section; the section stays as it is when the type is wrong.
fn set<T: Serialize + DeserializeOwned>(
    section: &mut T,
    key: &str,
    value: Value,
) -> std::result::Result<(), String> {
    let current = Value::try_from(&*section).map_err(|e| e.to_string())?;
    let mut table = current.as_table().cloned().unwrap_or_default();
    table.insert(key.to_owned(), value);
    *section = Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| {
            let message = e.message().trim().lines().collect::<Vec<_>>().join(", ");
            in_words(&message)
        })?;
    Ok(())
}

/// serde names Rust's types.
fn in_words(message: &str) -> String {
    let words = [
        ("expected usize", "expected a whole number, 0 or above"),
        ("expected u64", "expected a whole number, 0 or above"),
        ("expected f64", "expected a number"),
    ];
    words
        .iter()
        .fold(message.to_owned(), |text, (name, words)| {
            text.replace(name, words)
        })
}
