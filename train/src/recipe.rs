//! The recipe of a run: a TOML file and what the command line sets over it.

mod changes;
mod check;
mod compute_dtype;
mod names;
mod read;
mod sections;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use model::chat::ChatTemplate;
use model::hub::DATASETS;
use serde::{Deserialize, Serialize};
use toml::Value;

use crate::error::Result;

pub use changes::MAY_CHANGE;
pub use compute_dtype::ComputeDtype;
pub use names::key_named;
pub use read::parse_setting;
pub use sections::*;

/// Everything that decides a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The base model.
    pub model: ModelSection,
    /// How the base model's weights are stored.
    pub quantization: QuantizationSection,
    /// What is trained.
    pub adapter: AdapterSection,
    /// What it is trained on.
    pub data: DataSection,
    /// How it is trained.
    pub train: TrainSection,
    /// Where the results go.
    pub output: OutputSection,
    /// Keys that the file or the command line gave, as `section.key`.
    #[serde(skip)]
    pub given: BTreeSet<String>,
}

impl Recipe {
    /// Reads a recipe file (if there is one) and applies `section.key = value` settings over it.
    ///
    /// # Errors
    /// [`crate::Error::Recipe`] with every unknown key, wrong type and impossible value at once.
    pub fn read(file: Option<&Path>, settings: &[(String, Value)]) -> Result<Self> {
        read::read(file, settings, &[read::MODEL, read::DATA])
    }

    /// The same for a recipe that may lack training data: for plans.
    pub fn read_without_data(file: Option<&Path>, settings: &[(String, Value)]) -> Result<Self> {
        read::read(file, settings, &[read::MODEL])
    }

    /// The same for a recipe that may lack a model, too: to look at it.
    pub fn read_to_show(file: Option<&Path>, settings: &[(String, Value)]) -> Result<Self> {
        read::read(file, settings, &[])
    }

    /// Makes every path absolute, so that a run goes on from any folder.
    pub fn make_paths_absolute(&mut self) {
        let absolute = |path: &mut PathBuf| {
            if !path.to_string_lossy().starts_with(DATASETS)
                && let Ok(full) = std::path::absolute(&*path)
            {
                *path = full;
            }
        };
        for paths in [&mut self.data.train, &mut self.data.eval] {
            match paths {
                Paths::None => {}
                Paths::One(path) => absolute(path),
                Paths::Many(all) => all.iter_mut().for_each(absolute),
            }
        }
        self.adapter.init_from.iter_mut().for_each(absolute);
        self.adapter.settings.source().map(absolute);
        self.output.dir.iter_mut().for_each(absolute);
        if let Some(template) = &mut self.data.chat_template
            && ChatTemplate::builtin(template).is_none()
            && Path::new(template).exists()
            && let Ok(full) = std::path::absolute(&*template)
        {
            *template = full.display().to_string();
        }
        if Path::new(&self.model.path).is_dir()
            && let Ok(full) = std::path::absolute(&self.model.path)
        {
            self.model.path = full.display().to_string();
        }
    }

    /// The complete recipe as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is a plain table")
    }
}

#[cfg(test)]
mod tests {
    use toml::Table;

    use super::*;
    use crate::error::Error;

    /// A recipe file, read with `--set` arguments over it.
    fn read(file: &str, set: &[&str]) -> Result<Recipe> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("my.toml");
        std::fs::write(&path, file).unwrap();
        let settings: Vec<_> = set
            .iter()
            .map(|text| parse_setting(text).unwrap())
            .collect();
        Recipe::read(Some(&path), &settings)
    }

    /// The problems of a recipe, without the folder of its file.
    fn problems(file: &str, set: &[&str]) -> Vec<String> {
        match read(file, set).unwrap_err() {
            Error::Recipe { problems } => {
                let name = |text: String| match text.find("my.toml") {
                    Some(at) => text[at..].to_owned(),
                    None => text,
                };
                problems.into_iter().map(name).collect()
            }
            other => panic!("{other}"),
        }
    }

    const GOOD: &str = "model.path = 'm'\ndata.train = 'rows.jsonl'\n";

    fn problem(set: &str) -> String {
        let all = problems(GOOD, &[set]);
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let recipe = read(GOOD, &[]).unwrap();
        let expected: Table = r#"
            [model]
            path = "m"
            init = "pretrained"
            [quantization]
            format = "none"
            block_size = 64
            double_quant = false
            [adapter]
            method = "lora"
            rank = 16
            alpha = 32.0
            dropout = 0.0
            target_modules = "all-linear"
            modules_to_save = []
            use_rslora = false
            use_dora = false
            bias = "none"
            init = "default"
            rank_pattern = {}
            alpha_pattern = {}
            [data]
            train = "rows.jsonl"
            format = "auto"
            max_length = 1024
            truncate = "drop"
            packing = true
            train_on = "assistant"
            shuffle = true
            eval_fraction = 0.0
            [train]
            epochs = 1.0
            micro_batch_size = 4
            gradient_accumulation_steps = 1
            optimizer = "adamw"
            learning_rate = 2e-4
            weight_decay = 0.0
            betas = [0.9, 0.999]
            eps = 1e-8
            lr_schedule = "cosine"
            warmup_ratio = 0.03
            max_grad_norm = 1.0
            recompute = "auto"
            compute_dtype = "auto"
            seed = 42
            eval_every = 0
            save_every = 0
            log_every = 1
            early_stopping_patience = 0
            keep_checkpoints = 2
            [output]
            samples = 2
            tensorboard = false
        "#
        .parse()
        .unwrap();
        assert_eq!(recipe.to_toml().parse::<Table>().unwrap(), expected);
        assert!(recipe.given.iter().eq(["data.train", "model.path"]));
    }

    #[test]
    fn every_problem_is_told_at_once_with_its_place_and_key() {
        let file = "
            trian.epochs = 2
            [model]
            path = 3
            [adapter]
            rank = 0
            ranks = 8
            [train]
            epochs = 'two'
            max_steps = -1
            [empty]
        ";
        let all = problems(
            file,
            &[
                "train.eps=0",
                "data.packing=yes",
                "output.name=x",
                "foo.bar=1",
            ],
        );
        let expected = [
            "my.toml: there is no section trian: did you mean train?",
            "my.toml: model.path: invalid type: integer `3`, expected a string",
            "my.toml: adapter.ranks: unknown field `ranks`: did you mean adapter.rank?",
            "my.toml: train.epochs: invalid type: string \"two\", expected a number",
            "my.toml: train.max_steps: invalid value: integer `-1`, expected a whole number",
            "my.toml: there is no section empty",
            "the command line: data.packing: invalid type: string \"yes\", expected a boolean",
            "the command line: output.name: unknown field `name`: expected dir, samples, tensorboard",
            "the command line: foo.bar: there is no section foo",
            "my.toml: adapter.rank must be from 1 to 65536",
            "the command line: train.eps must be above 0",
            "my.toml: data.train is missing: give a file or folder of training rows",
        ];
        assert_eq!(all.len(), expected.len(), "{all:#?}");
        for (text, start) in all.iter().zip(expected) {
            assert!(
                text.starts_with(start),
                "{text:?} does not start with {start:?}"
            );
        }
    }

    #[test]
    fn without_a_file_no_place_is_invented() {
        let error = Recipe::read(None, &[]).unwrap_err().to_string();
        let expected = "the recipe cannot be used:\n  \
            model.path is missing: give a model folder or a Hub id\n  \
            data.train is missing: give a file or folder of training rows";
        assert_eq!(error, expected);
    }

    #[test]
    fn what_is_no_toml_names_the_file_and_the_line() {
        let error = read("[model]\npath = \n", &[]).unwrap_err();
        assert!(
            error.to_string().ends_with("my.toml is not a recipe"),
            "{error}"
        );
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("line 2"), "{cause}");
        assert_eq!(
            problems("model = 'm'\n[data]\ntrain = 'x'", &[])[0],
            "my.toml: model must be a section"
        );
        let missing = Recipe::read(Some(Path::new("no/such.toml")), &[]).unwrap_err();
        assert_eq!(missing.to_string(), "cannot read the recipe no/such.toml");
    }

    #[test]
    fn requests_that_cannot_be_honoured_are_errors() {
        let cases = [
            (
                "quantization.format=int4",
                "quantization.format = \"int4\" is unknown: expected \"none\", \"nf4\" or \"fp4\"",
            ),
            (
                "train.recompute=layer",
                "train.recompute: unknown variant `layer`, expected one of `auto`, `none`, `block`",
            ),
            (
                "adapter.method=oft",
                "adapter.method = \"oft\" is not supported: expected \"lora\", ",
            ),
            (
                "adapter.init=eva",
                "adapter.init: unknown variant `eva`, expected `default`, `gaussian`",
            ),
            (
                "train.optimizer=lion",
                "train.optimizer = \"lion\" is not supported",
            ),
            (
                "data.format=parquet",
                "data.format: unknown variant `parquet`",
            ),
            (
                "model.init=random",
                "model.init = \"random\" needs adapter.method = \"full\"",
            ),
        ];
        for (set, expected) in cases {
            let text = problem(set);
            assert!(
                text.starts_with(&format!("the command line: {expected}")),
                "{text}"
            );
        }
    }

    #[test]
    fn keys_that_mean_nothing_beside_the_others_are_errors() {
        let cases = [
            ("adapter.method=full", "adapter.init_from='there'"),
            ("adapter.method=full", "adapter.rank=8"),
            ("adapter.method=full", "adapter.target_modules=['q_proj']"),
            ("quantization.format=none", "quantization.block_size=128"),
            ("quantization.format=none", "quantization.double_quant=true"),
            ("data.packing=false", "train.eval_every=5"),
            ("data.eval=rows.jsonl", "data.eval_fraction=0.5"),
            ("train.warmup_steps=5", "train.warmup_ratio=0.5"),
        ];
        for (deciding, unused) in cases {
            let key = unused.split('=').next().unwrap();
            let told = |place: &str| format!("{place}: {key} means nothing here: ");
            let all = problems(GOOD, &[deciding, unused]);
            assert!(
                all.len() == 1 && all[0].starts_with(&told("the command line")),
                "{all:?}"
            );
            let all = problems(&format!("{GOOD}{unused}"), &[deciding]);
            assert!(
                all.len() == 1 && all[0].starts_with(&told("my.toml")),
                "{all:?}"
            );
        }
        // on the command line even with the value that it has anyway
        let all = problems(GOOD, &["adapter.method=full", "adapter.rank=16"]);
        assert!(all[0].starts_with("the command line: adapter.rank means nothing here"));
        // in a complete recipe they stand, all of them
        let full = read(GOOD, &["adapter.method=full"]).unwrap();
        let file = full.to_toml();
        assert!(file.contains("rank = 16") && file.contains("eval_every = 0"));
        assert_eq!(read(&file, &[]).unwrap().adapter, full.adapter);
    }

    #[test]
    fn impossible_and_absurd_values_are_errors() {
        let cases = [
            "adapter.rank=65537",
            "adapter.rank_pattern={q_proj = 0}",
            "adapter.alpha=inf",
            "adapter.alpha=0",
            "adapter.alpha_pattern={q_proj = nan}",
            "adapter.dropout=1.0",
            "adapter.dropout=-0.1",
            "data.max_length=1",
            "data.eval_fraction=1",
            "train.epochs=0",
            "train.epochs=nan",
            "train.max_steps=0",
            "train.max_steps=9000000000000000000",
            "train.micro_batch_size=0",
            "train.gradient_accumulation_steps=0",
            "train.micro_batch_size=9000000000000000000",
            "train.learning_rate=-1",
            "train.learning_rate=inf",
            "train.weight_decay=-1",
            "train.betas=[0.9, 1.0]",
            "train.betas=[0.9]",
            "train.eps=0",
            "train.warmup_ratio=1.5",
            "train.max_grad_norm=-1",
            "train.log_every=0",
            "train.seed=-1",
            "train.warmup_steps=1.5",
        ];
        for set in cases {
            let key = set.split_once('=').unwrap().0;
            let text = problem(set);
            assert!(
                text.starts_with(&format!("the command line: {key}")),
                "{set}: {text}"
            );
        }
        let sizes = [
            "train.micro_batch_size=4294967296",
            "train.gradient_accumulation_steps=4294967296",
        ];
        let text = &problems(GOOD, &sizes)[0]; // the product is 2^64
        assert!(text.contains("must be at most 1048576 rows"), "{text}");
    }

    #[test]
    fn entries_of_a_table_are_set_one_by_one() {
        let file = format!("{GOOD}adapter.rank_pattern = {{v_proj = 2}}");
        let set = [
            "adapter.rank_pattern.q_proj=3",
            "adapter.rank_pattern.0.mlp.up_proj=4",
        ];
        let recipe = read(&file, &set).unwrap();
        let table: Table = recipe.to_toml().parse().unwrap();
        let expected: Table = "v_proj = 2\nq_proj = 3\n'0.mlp.up_proj' = 4"
            .parse()
            .unwrap();
        assert_eq!(table["adapter"]["rank_pattern"], Value::Table(expected));
        assert!(recipe.given.contains("adapter.rank_pattern"));
        let all = problems(GOOD, &["adapter.rank_pattern.q_proj=three"]);
        assert!(
            all[0].contains("adapter.rank_pattern: invalid type"),
            "{all:?}"
        );
        let all = problems(
            GOOD,
            &["adapter.method=vera", "adapter.rank_pattern.q_proj=3"],
        );
        assert!(
            all[0].contains("\"vera\" does not know it: it is a key of lora"),
            "{all:?}"
        );
    }

    #[test]
    fn the_keys_to_choose_from_are_those_of_the_method() {
        let all = problems(GOOD, &["adapter.method=vera", "adapter.xyz=3"]);
        assert!(all[0].contains("projection_prng_key"), "{all:?}");
        assert!(!all[0].contains("use_dora"), "{all:?}");
    }

    #[test]
    fn a_setting_is_toml_or_a_string() {
        let value = |text: &str| parse_setting(&format!("data.train={text}")).unwrap().1;
        let texts = |all: &[&str]| Value::Array(all.iter().map(|text| (*text).into()).collect());
        assert_eq!(value("1e-4"), Value::Float(1e-4));
        assert_eq!(value("5"), Value::Integer(5));
        assert_eq!(value("true"), Value::Boolean(true));
        assert_eq!(value("\"5\""), "5".into());
        assert_eq!(value("a/b c.jsonl"), "a/b c.jsonl".into());
        assert_eq!(value("Qwen/Qwen-7B@main"), "Qwen/Qwen-7B@main".into());
        assert_eq!(value("a=b"), "a=b".into());
        assert_eq!(value("2026-01-01"), "2026-01-01".into());
        assert_eq!(value(""), "".into());
        assert_eq!(value("1\ny = 2"), "1\ny = 2".into());
        assert_eq!(
            value("[\"q_proj\", 'v_proj']"),
            texts(&["q_proj", "v_proj"])
        );
        assert_eq!(value("[q_proj, \"v_proj\"]"), texts(&["q_proj", "v_proj"]));
        assert_eq!(value("[1, 2]"), Value::Array(vec![1.into(), 2.into()]));
        assert_eq!(value(r".*\.[qv]_proj"), r".*\.[qv]_proj".into());
        assert!(matches!(value("{q_proj = 8}"), Value::Table(_)));
        assert_eq!(
            parse_setting(" train.seed = 7 "),
            Some(("train.seed".into(), 7.into()))
        );
        for bad in ["train.seed", "seed=7", ".seed=7", "train.=7", "=7", ""] {
            assert_eq!(parse_setting(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let recipe = read(
            &format!("{GOOD}train.seed = 1\ntrain.epochs = 3"),
            &["train.seed=2"],
        )
        .unwrap();
        assert_eq!((recipe.train.seed, recipe.train.epochs), (2, 3.0));
        let given = ["data.train", "model.path", "train.epochs", "train.seed"];
        assert!(recipe.given.iter().eq(given));
        let text = problems(&format!("{GOOD}train.eps = 1.0"), &["train.eps=-1"]);
        assert_eq!(text, ["the command line: train.eps must be above 0"]);
    }

    #[test]
    fn a_recipe_written_and_read_is_the_same() {
        let all = [
            "adapter.target_modules=[q_proj, v_proj]",
            "adapter.exclude_modules=.*o_proj",
            "adapter.layers_to_transform=[0, 2]",
            "adapter.layers_pattern=layers",
            "adapter.rank_pattern={q_proj = 8, 'layers.1' = 4}",
            "adapter.alpha_pattern={v_proj = 2.5}",
            "adapter.modules_to_save=[lm_head]",
            "adapter.init_from=some/adapter",
            "adapter.alpha=3",
            "data.train=[a.jsonl, b.jsonl]",
            "data.eval=c.json",
            "data.chat_template=chatml",
            "data.truncate=right",
            "data.train_on=last",
            "data.format=messages",
            "train.max_steps=7",
            "train.warmup_steps=2",
            "train.lr_schedule=linear",
            "train.betas=[0.8, 0.95]",
            "train.learning_rate=3e-5",
            "train.recompute=block",
            "output.dir=runs/\u{e9} \"x\"",
        ];
        for settings in [&all[..], &[]] {
            let recipe = read(GOOD, settings).unwrap();
            let again = read(&recipe.to_toml(), &[]).unwrap();
            assert!(again.given.is_superset(&recipe.given));
            assert_eq!(
                Recipe {
                    given: recipe.given.clone(),
                    ..again
                },
                recipe
            );
        }
    }
}
