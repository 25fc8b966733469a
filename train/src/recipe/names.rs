//! The names of sections and keys, and what a name that is none of them may have meant.

use adapters::Method;
use adapters::methods::keys_of;

use super::{
    AdapterSection, DataSection, ModelSection, OutputSection, QuantizationSection, TrainSection,
};

/// The sections of a recipe.
pub(super) const SECTIONS: [&str; 6] = [
    "model",
    "quantization",
    "adapter",
    "data",
    "train",
    "output",
];

/// What transformers, PEFT, TRL, Axolotl and mlx-lm call the sections and keys of a recipe.
const ELSEWHERE: [(&str, &str); 65] = [
    ("lora", "adapter"),
    ("peft", "adapter"),
    ("training", "train"),
    ("base_model", "model.path"),
    ("model_name_or_path", "model.path"),
    ("bnb_4bit_quant_type", "quantization.format"),
    ("load_in_4bit", "quantization.format = \"nf4\""),
    ("bnb_4bit_use_double_quant", "quantization.double_quant"),
    ("peft_type", "adapter.method"),
    ("finetune_type", "adapter.method"),
    ("r", "adapter.rank"),
    ("lora_r", "adapter.rank"),
    ("lora_rank", "adapter.rank"),
    ("lora_alpha", "adapter.alpha"),
    ("lora_dropout", "adapter.dropout"),
    ("lora_target_modules", "adapter.target_modules"),
    (
        "lora_target_linear",
        "adapter.target_modules = \"all-linear\"",
    ),
    ("lora_modules_to_save", "adapter.modules_to_save"),
    ("peft_layers_to_transform", "adapter.layers_to_transform"),
    ("init_lora_weights", "adapter.init"),
    ("lora_model_dir", "adapter.init_from"),
    ("resume_adapter_file", "adapter.init_from"),
    ("dataset", "data.train"),
    ("datasets", "data.train"),
    ("train_file", "data.train"),
    ("validation_file", "data.eval"),
    ("val_set_size", "data.eval_fraction"),
    ("max_seq_length", "data.max_length"),
    ("max_seq_len", "data.max_length"),
    ("sequence_len", "data.max_length"),
    ("sample_packing", "data.packing"),
    ("train_on_inputs", "data.train_on = \"all\""),
    ("mask_prompt", "data.train_on"),
    ("assistant_only_loss", "data.train_on"),
    ("num_epochs", "train.epochs"),
    ("num_train_epochs", "train.epochs"),
    ("steps", "train.max_steps"),
    ("iters", "train.max_steps"),
    ("batch_size", "train.micro_batch_size"),
    ("per_device_train_batch_size", "train.micro_batch_size"),
    (
        "grad_accumulation_steps",
        "train.gradient_accumulation_steps",
    ),
    ("accumulation_steps", "train.gradient_accumulation_steps"),
    ("optim", "train.optimizer"),
    ("lr", "train.learning_rate"),
    ("wd", "train.weight_decay"),
    ("adam_beta1", "train.betas"),
    ("adam_beta2", "train.betas"),
    ("adam_epsilon", "train.eps"),
    ("scheduler", "train.lr_schedule"),
    ("lr_scheduler", "train.lr_schedule"),
    ("lr_scheduler_type", "train.lr_schedule"),
    ("warmup", "train.warmup_steps"),
    ("max_norm", "train.max_grad_norm"),
    ("gradient_clipping", "train.max_grad_norm"),
    ("gradient_checkpointing", "train.recompute = \"block\""),
    ("grad_checkpoint", "train.recompute = \"block\""),
    ("bf16", "train.compute_dtype = \"bf16\""),
    ("fp16", "train.compute_dtype = \"f16\""),
    ("torch_dtype", "train.compute_dtype"),
    ("bnb_4bit_compute_dtype", "train.compute_dtype"),
    ("eval_steps", "train.eval_every"),
    ("save_steps", "train.save_every"),
    ("logging_steps", "train.log_every"),
    ("save_total_limit", "train.keep_checkpoints"),
    ("output_dir", "output.dir"),
];

/// The keys of a section, in order.
pub(super) fn keys(section: &str) -> Vec<String> {
    match section {
        "model" => keys_of::<ModelSection>(),
        "quantization" => keys_of::<QuantizationSection>(),
        "adapter" => AdapterSection::default().keys(),
        "data" => keys_of::<DataSection>(),
        "train" => keys_of::<TrainSection>(),
        "output" => keys_of::<OutputSection>(),
        _ => Vec::new(),
    }
}

/// Why a section is none.
pub(super) fn unknown_section(name: &str) -> String {
    let why = format!("there is no section {name}");
    let near = || nearest(name, SECTIONS.map(str::to_owned));
    match elsewhere(name)
        .or_else(near)
        .or_else(|| in_any_section(name))
    {
        Some(meant) => format!("{why}: did you mean {meant}?"),
        None => format!("{why}: expected {}", SECTIONS.join(", ")),
    }
}

/// Why a key of a section is none.
pub(super) fn unknown_key(section: &str, key: &str) -> String {
    none_of(section, key, keys(section))
}

/// Why a key is none of those that a section has.
fn none_of(section: &str, key: &str, keys: Vec<String>) -> String {
    let why = format!("unknown field `{key}`");
    let near = || Some(format!("{section}.{}", nearest(key, keys.clone())?));
    match elsewhere(key).or_else(near).or_else(|| in_any_section(key)) {
        Some(meant) => format!("{why}: did you mean {meant}?"),
        None => format!("{why}: expected {}", keys.join(", ")),
    }
}

/// Why a key of the adapter is none, or not one of its method.
pub(super) fn unknown_setting(adapter: &AdapterSection, key: &str) -> String {
    let keys = adapter.keys();
    // `rank_pattern.q_proj` where another method has the table
    let table = key.split('.').next().unwrap_or(key);
    let all: Vec<_> = Method::that_know(table).collect();
    match all.as_slice() {
        _ if keys.iter().any(|known| known == table) => none_of("adapter", key, keys),
        [] => none_of("adapter", key, keys),
        methods => format!(
            "adapter.method = {:?} does not know it: it is a key of {}",
            adapter.method,
            methods.join(", ")
        ),
    }
}

/// The key, with its section and perhaps its value, that a name without a section stands for, here
/// or in another program.
pub fn key_named(name: &str) -> Option<String> {
    let key = elsewhere(name).or_else(|| in_any_section(name))?;
    key.contains('.').then_some(key)
}

/// What another program's name is here.
fn elsewhere(name: &str) -> Option<String> {
    let (_, ours) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == name)?;
    Some((*ours).to_owned())
}

/// The key that has this name, or nearly, in whichever section.
fn in_any_section(name: &str) -> Option<String> {
    let all = || SECTIONS.iter().flat_map(|section| keys(section));
    let key = nearest(name, all())?;
    let section = SECTIONS
        .iter()
        .find(|section| keys(section).contains(&key))?;
    Some(format!("{section}.{key}"))
}

/// The name that differs in the fewest letters, if in no more than a third of them.
fn nearest(name: &str, names: impl IntoIterator<Item = String>) -> Option<String> {
    let distance = |other: &String| strsim::damerau_levenshtein(name, other);
    let near = |other: &String| 3 * distance(other) <= name.chars().count();
    let near = names.into_iter().filter(near);
    near.min_by_key(distance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_known() {
        let train = keys("train");
        assert_eq!(train.first().unwrap(), "epochs");
        assert_eq!(train.last().unwrap(), "keep_checkpoints");
        assert!(keys("model").contains(&"path".to_owned())); // not written while it is empty
        assert_eq!(keys("output"), ["dir", "samples", "tensorboard"]);
        assert!(keys("wandb").is_empty());
    }

    #[test]
    fn the_names_of_other_programs_are_none_of_ours_and_mean_one() {
        for (theirs, ours) in ELSEWHERE {
            let all = SECTIONS.iter().flat_map(|section| keys(section));
            assert!(!all.into_iter().any(|key| key == theirs), "{theirs}");
            let ours = ours.split(' ').next().unwrap();
            let known = match ours.split_once('.') {
                Some((section, key)) => keys(section).iter().any(|known| known == key),
                None => SECTIONS.contains(&ours),
            };
            assert!(known, "{ours}");
        }
    }

    #[test]
    fn a_wrong_name_finds_the_right_one() {
        for (section, key, meant) in [
            ("train", "lr", "train.learning_rate"),
            ("train", "learning_rat", "train.learning_rate"),
            ("train", "batch_size", "train.micro_batch_size"),
            ("train", "num_epochs", "train.epochs"),
            (
                "train",
                "gradient_checkpointing",
                "train.recompute = \"block\"",
            ),
            ("adapter", "r", "adapter.rank"),
            ("adapter", "ranks", "adapter.rank"),
            ("adapter", "lora_alpha", "adapter.alpha"),
            ("data", "max_seq_length", "data.max_length"),
            ("train", "max_length", "data.max_length"),
            ("data", "epoch", "train.epochs"),
            ("adapter", "load_in_4bit", "quantization.format = \"nf4\""),
        ] {
            let text = unknown_key(section, key);
            let expected = format!("unknown field `{key}`: did you mean {meant}?");
            assert_eq!(text, expected);
        }
        assert_eq!(
            unknown_key("output", "colour"),
            "unknown field `colour`: expected dir, samples, tensorboard"
        );
        for (section, meant) in [
            ("trian", "train"),
            ("models", "model"),
            ("lora", "adapter"),
            ("learning_rate", "train.learning_rate"),
            ("lr", "train.learning_rate"),
        ] {
            let expected = format!("there is no section {section}: did you mean {meant}?");
            assert_eq!(unknown_section(section), expected);
        }
        assert_eq!(
            unknown_section("wandb"),
            "there is no section wandb: expected model, quantization, adapter, data, train, output"
        );
    }
}
