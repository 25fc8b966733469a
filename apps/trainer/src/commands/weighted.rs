//! Adapters as they are named: `DIR` or `DIR=0.7`.

use std::path::Path;

use adapters::{Combination, Weighted};
use anyhow::Result;

use super::open_adapter;
use crate::cli::AdapterArgs;
use crate::failure::Advised;
use crate::output::Output;

/// Finds the adapters that a command line names; those that are Hub ids are downloaded.
pub fn open_adapters(args: &AdapterArgs, output: &Output) -> Result<Vec<Weighted>> {
    let named = args.adapter.iter().map(|text| read_weight(text));
    let named: Vec<_> = named.collect::<Result<_>>()?; // all, before anything is downloaded
    let open = |(name, weight)| {
        let folder = open_adapter(name, output)?;
        Ok(Weighted { folder, weight })
    };
    named.into_iter().map(open).collect()
}

/// How they are combined.
pub fn combination(name: &str) -> Combination {
    Combination::named(name).unwrap_or_default() // others are refused when the line is read
}

/// The name and the weight. A folder whose name looks as if it had a weight is a folder.
pub fn read_weight(text: &str) -> Result<(&str, f64)> {
    let split = text.rsplit_once('=').filter(|_| !Path::new(text).exists());
    let Some((name, weight)) = split else {
        return Ok((text, 1.0));
    };
    match weight.parse::<f64>().ok().filter(|x| x.is_finite()) {
        Some(weight) => Ok((name, weight)),
        None => Err(Advised::usage(
            format!("--adapter {text}: {weight:?} is not a weight"),
            format!("give a number, as in --adapter {name}=0.7"),
        )
        .into()),
    }
}
