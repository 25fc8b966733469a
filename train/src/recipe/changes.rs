//! What may still change in the recipe of a run that has begun.

use toml::{Table, Value};

use super::Recipe;

/// Keys that a run may go on with another value of: how long it is, what is kept and shown of it,
/// and where things lie; the rows themselves are compared by what is in them. A longer run follows
/// the learning-rate schedule of its new length from there on.
pub const MAY_CHANGE: [&str; 13] = [
    "data.train",
    "data.eval",
    "train.epochs",
    "train.max_steps",
    "train.recompute",
    "train.eval_every",
    "train.save_every",
    "train.log_every",
    "train.early_stopping_patience",
    "train.keep_checkpoints",
    "output.dir",
    "output.tensorboard",
    "output.samples",
];

impl Recipe {
    /// One sentence for each key that is not what it was in `began`, the recipe that a run began
    /// with as TOML, and must be. What this version cannot read tells nothing.
    pub fn changes(&self, began: &str) -> Vec<String> {
        let Ok(began) = toml::from_str::<Recipe>(began) else {
            return Vec::new();
        };
        if began == Recipe::default() {
            return Vec::new(); // none was kept
        }
        let mut now = self.clone();
        now.make_paths_absolute();
        let (then, now) = (flat(&began), flat(&now));
        let mut keys: Vec<&String> = then.keys().chain(now.keys()).collect();
        keys.sort();
        keys.dedup();
        let differs = |key: &&String| then.get(*key) != now.get(*key);
        let fixed = keys.into_iter().filter(differs);
        let fixed = fixed.filter(|key| !MAY_CHANGE.contains(&key.as_str()));
        let value = |table: &Table, key: &str| match table.get(key) {
            Some(value) => value.to_string(),
            None => "not set".into(),
        };
        let sentence = |key: &String| {
            format!(
                "{key} cannot change any more: the run began with {}, and it is {} now",
                value(&then, key),
                value(&now, key)
            )
        };
        fixed.map(sentence).collect()
    }
}

/// Values by `section.key`.
fn flat(recipe: &Recipe) -> Table {
    let table = Table::try_from(recipe).expect("a recipe is a plain table");
    let keys = table.into_iter().flat_map(|(section, values)| {
        let values = match values {
            Value::Table(values) => values,
            _ => Table::new(),
        };
        let named = values.into_iter();
        named.map(move |(key, value)| (format!("{section}.{key}"), value))
    });
    keys.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::parse_setting;

    fn recipe(settings: &[&str]) -> Recipe {
        let given = ["model.path=m", "data.train=rows.jsonl"];
        let all = given.iter().chain(settings);
        let all: Vec<_> = all.map(|text| parse_setting(text).unwrap()).collect();
        let mut recipe = Recipe::read(None, &all).unwrap();
        recipe.make_paths_absolute();
        recipe
    }

    #[test]
    fn what_decides_the_numbers_cannot_change() {
        let began = recipe(&["train.warmup_steps=3"]).to_toml();
        assert_eq!(recipe(&["train.warmup_steps=3"]).changes(&began), [""; 0]);
        let all = recipe(&[
            "adapter.rank=8",
            "train.learning_rate=1e-3",
            "train.seed=7",
            "train.max_steps=90",
            "train.save_every=9",
            "train.keep_checkpoints=1",
            "data.train=elsewhere.jsonl",
        ])
        .changes(&began);
        let expected = [
            "adapter.rank cannot change any more: the run began with 16, and it is 8 now",
            "train.learning_rate cannot change any more: the run began with 0.0002, and it is 0.001 now",
            "train.seed cannot change any more: the run began with 42, and it is 7 now",
            "train.warmup_steps cannot change any more: the run began with 3, and it is not set now",
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn every_key_that_may_change_is_a_key() {
        for key in MAY_CHANGE {
            let (section, name) = key.split_once('.').unwrap();
            let known = crate::recipe::names::keys(section);
            assert!(known.iter().any(|known| known == name), "{key}");
        }
    }

    #[test]
    fn a_checkpoint_without_a_recipe_or_with_one_of_another_version_tells_nothing() {
        assert_eq!(recipe(&[]).changes(""), [""; 0]);
        assert_eq!(recipe(&[]).changes("[train]\nwings = 2"), [""; 0]);
    }
}
