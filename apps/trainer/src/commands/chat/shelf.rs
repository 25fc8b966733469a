//! The adapters of a chat, of which some or none are in use.

use std::path::{Path, PathBuf};

use adapters::Weighted;
use anyhow::Result;

use crate::failure::Advised;

/// An adapter that can be put on the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// As it was typed: a path, or a Hub id.
    pub name: String,
    /// Where its files are, and how much of its update is added.
    pub weighted: Weighted,
}

/// The known adapters.
#[derive(Debug, Default)]
pub struct Shelf(Vec<Adapter>);

impl Shelf {
    /// Adds an adapter.
    pub fn add(&mut self, name: &str, weight: f64, folder: PathBuf) -> Adapter {
        let adapter = Adapter {
            name: name.trim_end_matches('/').to_owned(),
            weighted: Weighted { folder, weight },
        };
        self.0.push(adapter.clone());
        adapter
    }

    /// The first.
    pub fn first(&self) -> Option<Adapter> {
        self.0.first().cloned()
    }

    /// The adapter of that name, if there is one.
    ///
    /// # Errors
    /// If several could be meant.
    pub fn find(&self, name: &str) -> Result<Option<Adapter>> {
        let name = name.trim_end_matches('/');
        if let Some(same) = self.0.iter().find(|adapter| adapter.name == name) {
            return Ok(Some(same.clone()));
        }
        let meant: Vec<_> = self.0.iter().filter(|one| one.is_called(name)).collect();
        if let [one] = *meant {
            return Ok(Some(one.clone()));
        }
        if meant.is_empty() {
            return Ok(None);
        }
        let names: Vec<_> = meant.iter().map(|one| one.name.as_str()).collect();
        Err(Advised::failed(
            format!("several adapters are called {name}: {}", names.join(", ")),
            "give more of its path",
        )
        .into())
    }

    /// A line an adapter, those in use marked and with the weights in use.
    pub fn list(&self, used: &[Adapter]) -> String {
        let line = |name: &str, used: bool| match used {
            true => format!("* {name}"),
            false => format!("  {name}"),
        };
        let one = |one: &Adapter| match used.iter().find(|used| used.name == one.name) {
            Some(used) => line(&used.label(), true),
            None => line(&one.label(), false),
        };
        let mut lines: Vec<String> = self.0.iter().map(one).collect();
        lines.push(line("off (the model alone)", used.is_empty()));
        lines.join("\n")
    }
}

impl Adapter {
    /// Its name, with the weight if it has one.
    pub fn label(&self) -> String {
        match self.weighted.weight {
            1.0 => self.name.clone(),
            weight => format!("{}={weight}", self.name),
        }
    }

    /// The same with another weight.
    pub fn weighing(mut self, weight: f64) -> Self {
        self.weighted.weight = weight;
        self
    }

    /// By the end of its path, or of its run's: `runs/mine/adapter` is called `mine`, too.
    fn is_called(&self, name: &str) -> bool {
        let path = Path::new(&self.name);
        let run = path.parent().filter(|_| path.ends_with("adapter"));
        path.ends_with(name) || run.is_some_and(|run| run.ends_with(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_found_by_what_tells_it_from_others() {
        let mut shelf = Shelf::default();
        for name in [
            "runs/a/adapter",
            "runs/b/adapter/",
            "runs/b/best",
            "owner/poet",
        ] {
            shelf.add(name, 1.0, name.into());
        }
        let found = |name| shelf.find(name).map(|one| one.map(|one| one.name));
        for (name, full) in [
            ("runs/a/adapter", "runs/a/adapter"),
            ("a", "runs/a/adapter"),
            ("b/adapter/", "runs/b/adapter"),
            ("runs/b", "runs/b/adapter"),
            ("best", "runs/b/best"),
            ("poet", "owner/poet"),
        ] {
            assert_eq!(found(name).unwrap().as_deref(), Some(full), "{name}");
        }
        let error = found("adapter").unwrap_err().to_string();
        assert!(error.contains("runs/a/adapter, runs/b/adapter"), "{error}");
        assert_eq!(found("c").unwrap(), None);
        let used = shelf.first().unwrap().weighing(0.5);
        let list = shelf.list(&[used]);
        assert!(
            list.starts_with("* runs/a/adapter=0.5\n  runs/b/adapter\n"),
            "{list}"
        );
        assert!(list.ends_with("\n  off (the model alone)"), "{list}");
        assert!(shelf.list(&[]).ends_with("\n* off (the model alone)"));
    }
}
