//! `trainer pull`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use model::hub::{DATASETS, Files, Hub};
use serde_json::json;

use crate::cli::PullArgs;
use crate::failure::Advised;
use crate::output::Output;
use crate::signals;

/// Brings a repository into the cache and says where it lies.
pub fn run(args: PullArgs, output: &Output) -> Result<ExitCode> {
    let id = with_revision(&args)?;
    let hub = Hub::from_env();
    signals::end_transfer(output, "what has arrived is kept".into());
    if id.starts_with(DATASETS) {
        let files = hub.dataset(&id, &mut output.downloads())?;
        signals::no_farewell();
        let lines: Vec<_> = files
            .iter()
            .map(|file| file.display().to_string())
            .collect();
        let json = json!({ "id": id, "kind": "dataset", "files": files });
        output.result(&json, &lines.join("\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    if Path::new(&id).is_dir() {
        let message = format!("{id} is a folder on this machine");
        let help = "use it as it is; pull takes owner/name[@revision] of the Hub";
        return Err(Advised::failed(message, help).into());
    }
    let pulled = hub.pull(&id, &mut output.downloads());
    let (kind, path): (_, PathBuf) = pulled.map_err(|error| match error {
        model::Error::NotAModel { .. } | model::Error::NoSuchFolder { .. } => {
            let message = format!("{id} is not an id of the Hub");
            Advised::usage(message, "give owner/name[@revision]").into()
        }
        error => anyhow::Error::from(error),
    })?;
    signals::no_farewell();
    let (kind, flag) = match kind {
        Files::Adapter => ("adapter", "--adapter"),
        _ => ("model", "--model"),
    };
    output.note(format_args!("{id} is here now; use it by {flag} {id}"));
    let json = json!({ "id": id, "kind": kind, "path": path });
    output.result(&json, &path.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// The id with `--revision` in it.
fn with_revision(args: &PullArgs) -> Result<String> {
    let Some(revision) = &args.revision else {
        return Ok(args.id.clone());
    };
    if args.id.contains('@') {
        let message = format!("{} names a revision, and so does --revision", args.id);
        return Err(Advised::usage(message, "leave one of them out").into());
    }
    let Some(rest) = args.id.strip_prefix(DATASETS) else {
        return Ok(format!("{}@{revision}", args.id));
    };
    // the revision stands behind owner/name, before a file
    let mut parts = rest.splitn(3, '/').map(str::to_owned).collect::<Vec<_>>();
    if let Some(name) = parts.get_mut(1) {
        *name += &format!("@{revision}");
    }
    Ok(format!("{DATASETS}{}", parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_goes_behind_the_name() {
        for (id, revision, expected) in [
            ("a/b", None, Some("a/b")),
            ("a/b", Some("v1"), Some("a/b@v1")),
            ("a/b@v1", Some("v2"), None),
            (
                "hf://datasets/a/b",
                Some("v1"),
                Some("hf://datasets/a/b@v1"),
            ),
            (
                "hf://datasets/a/b/c/d.csv",
                Some("v1"),
                Some("hf://datasets/a/b@v1/c/d.csv"),
            ),
        ] {
            let args = PullArgs {
                id: id.into(),
                revision: revision.map(str::to_owned),
            };
            assert_eq!(with_revision(&args).ok().as_deref(), expected, "{id}");
        }
    }
}
