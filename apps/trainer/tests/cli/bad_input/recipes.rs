use crate::support::Dir;

#[test]
fn every_problem_of_a_recipe_is_told_at_once() {
    let dir = Dir::with_tokens();
    dir.write(
        "recipe.toml",
        r#"
stray = 1
[model]
path = "model"
size = "big"
[adapter]
rank = "four"
alpha = inf
[data]
train = 3
eval_fraction = 1.5
[train]
learning_rat = 1e-4
betas = [0.9]
epochs = -1
[wandb]
project = "x"
"#,
    );
    let parts = [
        "recipe.toml: there is no section stray",
        "recipe.toml: model.size: unknown field `size`",
        "recipe.toml: adapter.rank: invalid type: string \"four\"",
        "adapter.alpha must be a finite number",
        "recipe.toml: data.train: expected a path",
        "data.eval_fraction must be",
        "recipe.toml: train.learning_rat: unknown field `learning_rat`: did you mean train.learning_rate?",
        "recipe.toml: train.betas",
        "train.epochs must be above 0",
        "recipe.toml: there is no section wandb",
        "correct these keys",
    ];
    for command in ["train", "train --print-recipe", "plan --json"] {
        dir.trainer(&format!("{command} recipe.toml --output run"))
            .fails(2, &parts);
    }
    assert!(!dir.has("run"));
}

#[test]
fn values_that_cannot_be() {
    let dir = Dir::with_tokens();
    for (set, part) in [
        ("adapter.rank=0", "adapter.rank must be from 1"),
        (
            "adapter.rank=-4",
            "adapter.rank: invalid value: integer `-4`, expected a whole number, 0 or above",
        ),
        ("adapter.rank=1000000000000", "adapter.rank must be from 1"),
        ("adapter.rank=99999999999999999999", "adapter.rank"),
        (
            "adapter.rank=1.5",
            "adapter.rank: invalid type: floating point `1.5`",
        ),
        (
            "adapter.rank_pattern={q_proj=1000000000000}",
            "adapter.rank_pattern",
        ),
        ("adapter.alpha=nan", "adapter.alpha must be"),
        ("adapter.alpha=1e200", "adapter.alpha must be"),
        ("adapter.alpha=0", "adapter.alpha must be"),
        ("adapter.alpha_pattern={q_proj=0}", "adapter.alpha_pattern"),
        ("train.eps=1e-200", "train.eps must be"),
        ("train.learning_rate=1e200", "train.learning_rate must be"),
        ("adapter.dropout=1", "adapter.dropout"),
        (
            "adapter.method=dora",
            "adapter.method = \"dora\" is not supported",
        ),
        (
            "adapter.init=magic",
            "adapter.init: unknown variant `magic`",
        ),
        (
            "quantization.format=int8",
            "quantization.format = \"int8\" is unknown: expected \"none\", \"nf4\" or \"fp4\"",
        ),
        (
            "data.packing=maybe",
            "data.packing: invalid type: string \"maybe\"",
        ),
        ("data.format=xml", "data.format: unknown variant `xml`"),
        ("data.max_length=1", "data.max_length must be at least 2"),
        ("data.eval_fraction=nan", "data.eval_fraction"),
        (
            "model.init=random",
            "model.init = \"random\" needs adapter.method = \"full\"",
        ),
        ("train.learning_rate=nan", "train.learning_rate must be"),
        ("train.learning_rate=-1", "train.learning_rate must be"),
        ("train.epochs=inf", "train.epochs must be"),
        ("train.epochs=1e300", "train.epochs must be"),
        ("train.max_steps=0", "train.max_steps must be"),
        (
            "train.max_steps=9223372036854775807",
            "train.max_steps must be",
        ),
        ("train.micro_batch_size=0", "train.micro_batch_size must be"),
        (
            "train.micro_batch_size=9223372036854775807",
            "train.micro_batch_size times ",
        ),
        (
            "train.gradient_accumulation_steps=1000000000000",
            "train.gradient_accumulation_steps must be",
        ),
        (
            "train.optimizer=sgd",
            "train.optimizer = \"sgd\" is not supported",
        ),
        (
            "train.recompute=layer",
            "train.recompute: unknown variant `layer`",
        ),
        ("train.seed=-1", "train.seed: invalid value"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        (
            "train.lr_schedule=wave",
            "train.lr_schedule: unknown variant `wave`",
        ),
        ("train.warmup_ratio=2", "train.warmup_ratio"),
        ("train.log_every=0", "train.log_every"),
        (
            "train.lr=1",
            "train.lr: unknown field `lr`: did you mean train.learning_rate?",
        ),
        ("adapter.r=8", "did you mean adapter.rank?"),
        (
            "nothing.at_all=1",
            "nothing.at_all: there is no section nothing",
        ),
        ("train.a.b=1", "train.a.b: unknown field"),
    ] {
        dir.trainer_with(
            "train --model model --data rows.jsonl --output run --set",
            set,
        )
        .fails(2, &[part]);
    }
    assert!(!dir.has("run"));
}

#[test]
fn a_text_to_start_with_that_is_not_given() {
    let dir = Dir::with_tokens();
    let line = "train --model model --data rows.jsonl --output run --method prompt --set";
    dir.trainer(&format!("{line} adapter.prompt_tuning_init=TEXT"))
        .fails(2, &["adapter.prompt_tuning_init_text is missing"]);
    dir.trainer(&format!("{line} adapter.prompt_tuning_init_text=Hello"))
        .fails(
            2,
            &["adapter.prompt_tuning_init_text means something only with"],
        );
}

#[test]
fn numbers_on_the_command_line_are_keys_like_any_other() {
    let dir = Dir::with_tokens();
    let line = "train --model model --data rows.jsonl --output run";
    dir.trainer(&format!("{line} --rank -3"))
        .fails(2, &["adapter.rank"]);
    dir.trainer(&format!("{line} --max-steps -3"))
        .fails(2, &["train.max_steps"]);
    dir.trainer(&format!("{line} --epochs -0.5"))
        .fails(2, &["train.epochs"]);
    dir.trainer(&format!("{line} --epochs nan"))
        .fails(2, &["train.epochs"]);
    dir.trainer(&format!("{line} --rank many"))
        .fails(2, &["--rank", "expected a whole number\n"]);
    dir.trainer(&format!("{line} --epochs many"))
        .fails(2, &["--epochs", "expected a number\n"]);
    dir.trainer(&format!("{line} --method full --quant nf4 --rank 0"))
        .fails(2, &["quantization.format", "adapter.rank"]);
}

#[test]
fn keys_of_a_file_that_mean_nothing_beside_the_others() {
    let dir = Dir::with_tokens();
    let base = "model.path = 'model'\ndata.train = 'rows.jsonl'\n";
    dir.write(
        "recipe.toml",
        format!("{base}adapter = {{method = 'full', rank = 8, alpha = 16}}\nquantization.block_size = 128"),
    );
    let parts = [
        "recipe.toml: adapter.rank means nothing here: adapter.method = \"full\"",
        "recipe.toml: adapter.alpha means nothing here",
        "recipe.toml: quantization.block_size means nothing here",
    ];
    for command in ["train", "train --print-recipe", "plan"] {
        dir.trainer(&format!("{command} recipe.toml"))
            .fails(2, &parts);
    }
    // with the default values they stand: a run's own recipe is read again
    let full = "train --model model --data rows.jsonl --method full --max-steps 1 --output run";
    dir.trainer(full).succeeds();
    assert!(dir.read("run/recipe.toml").contains("rank = 16"));
    dir.trainer("train --resume run").succeeds();
}

#[test]
fn an_adapter_that_the_model_cannot_carry() {
    let dir = Dir::with_tokens();
    for (set, part) in [
        (
            "adapter.target_modules=[\"c_attn\"]",
            "target_modules names c_attn",
        ),
        ("adapter.target_modules=(", "is not a regular expression"),
        ("adapter.target_modules=nothing", "matches no layer"),
        ("adapter.layers_to_transform=[2]", "layer 2 of 2 layers"),
        (
            "adapter.modules_to_save=[\"score\"]",
            "modules_to_save names score",
        ),
    ] {
        for command in ["train", "plan"] {
            let line = format!("{command} --model model --data rows.jsonl --output run --set");
            dir.trainer_with(&line, set).fails(2, &[part, "adapter.*"]);
        }
    }
    assert!(!dir.has("run"));
}

#[test]
fn a_type_that_a_device_does_not_compute_in_is_refused_with_those_it_does() {
    let dir = Dir::with_tokens();
    for command in ["train", "plan"] {
        let line = format!(
            "{command} --device cpu --model model --data rows.jsonl --output run --set \
             train.compute_dtype"
        );
        for dtype in ["f16", "bf16"] {
            let asked = format!("train.compute_dtype = \"{dtype}\"");
            let offered = [
                "this device computes in f32",
                "\"f32\" or \"auto\"",
                "--device",
            ];
            let parts: Vec<&str> = offered.iter().copied().chain([asked.as_str()]).collect();
            dir.trainer(&format!("{line}={dtype}")).fails(2, &parts);
        }
        let parts = ["train.compute_dtype", "f32", "bf16"];
        dir.trainer(&format!("{line}=int8")).fails(2, &parts);
        let full = format!("{line}=bf16 --method full");
        dir.trainer(&full)
            .fails(2, &["train.compute_dtype", "full"]);
    }
    assert!(!dir.has("run"));
    let line = "train --device cpu --model model --data rows.jsonl --output run --max-steps 1 \
                --set train.compute_dtype=auto";
    dir.trainer(line).succeeds();
    assert!(
        dir.read("run/recipe.toml")
            .contains("compute_dtype = \"f32\"")
    );
}

#[test]
fn settings_of_an_evaluation_are_recipe_keys() {
    let dir = Dir::with_tokens();
    let line = "eval --model model --data rows.jsonl --set";
    for key in [
        "data.max_lengt=5",
        "adapter.rank=3",
        "model.path=x",
        "data.train=x",
    ] {
        let key_name = key.split('=').next().unwrap();
        dir.trainer(&format!("{line} {key}"))
            .fails(2, &[key_name, "evaluation", "data.max_length"]);
    }
    dir.trainer(&format!("{line} train.micro_batch_size=0"))
        .fails(2, &["train.micro_batch_size"]);
    dir.trainer(&format!("{line} data.max_length"))
        .fails(2, &["--set data.max_length", "key=value"]);
}

#[test]
fn recipes_that_are_no_recipes() {
    let dir = Dir::with_tokens();
    dir.trainer("train gone.toml")
        .fails(2, &["cannot read the recipe gone.toml"]);
    dir.trainer("plan model")
        .fails(2, &["cannot read the recipe model"]);
    dir.write("broken.toml", "[model\npath = 3");
    dir.trainer("train broken.toml --json")
        .fails(2, &["broken.toml is not a recipe", "line 1"]);
    dir.write(
        "bare.toml",
        "[train]\nmax_steps = three # or so\nseed = 1\n",
    );
    dir.trainer("train bare.toml").fails(
        2,
        &["bare.toml: train.max_steps: invalid type: string \"three\", expected a whole number"],
    );
    dir.write("bare.toml", "[model]\npath = model\n");
    dir.trainer("train bare.toml")
        .fails(2, &["bare.toml is not a recipe", "line 2", "in quotes"]);
    dir.write("binary.toml", [0xffu8, 0xfe, 0]);
    dir.trainer("train binary.toml").fails(2, &["binary.toml"]);
    dir.write("twice.toml", "[train]\nseed = 1\nseed = 2\n");
    dir.trainer("train twice.toml")
        .fails(2, &["twice.toml", "seed"]);
    dir.trainer("train")
        .fails(2, &["model.path is missing", "data.train is missing"]);
    for set in ["rank", "rank=3", "=3", ".rank=3", "adapter.=3", ""] {
        dir.trainer_with("train --model model --data rows.jsonl --set", set)
            .fails(2, &[&format!("--set {set}"), "section.key=value"]);
    }
}
