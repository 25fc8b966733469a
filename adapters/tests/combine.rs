//! Several adapters on one model, against PEFT's `add_weighted_adapter` (`fixtures/merge/make.py`) and
//! against the same adapters merged.

#[allow(dead_code, reason = "other tests make adapters of their own")]
mod harness;
mod logits;

use std::path::Path;

use adapters::{AdaptedLlama, Combination, Error, Merge, Weighted, combine, peft, quantize_folder};
use harness::B;
use logits::{Expected, base, fixture, largest_difference, load, logits, weighted, whole};
use model::folder::ModelFolder;
use quant::{Format, Scheme};

use Combination::{Cat, Linear};

fn on(
    model: &Path,
    adapters: &[Weighted],
    combination: Combination,
) -> adapters::Result<AdaptedLlama<B>> {
    combine(load(model), adapters, combination, &Default::default())
}

fn adapted(adapters: &[Weighted], combination: Combination) -> AdaptedLlama<B> {
    on(&base("gqa"), adapters, combination).unwrap()
}

fn numbers(model: &AdaptedLlama<B>) -> Vec<f32> {
    let (ids, shape) = Expected::read(&fixture("qv")).ids();
    logits(model, &ids, shape)
}

fn apart(a: &AdaptedLlama<B>, b: &AdaptedLlama<B>) -> f32 {
    largest_difference(&numbers(a), &numbers(b))
}

/// Adapters on the base that cannot be had together.
#[track_caller]
fn refused(adapters: &[Weighted], combination: Combination, parts: &[&str]) {
    let Err(error) = on(&base("gqa"), adapters, combination) else {
        panic!("they were combined");
    };
    assert!(matches!(error, Error::Combine { .. }), "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn a_weighted_sum_is_that_of_peft() {
    let ranks_4_and_9 = [
        weighted(fixture("qv"), 0.7),
        weighted(fixture("rslora"), 1.5),
    ];
    let expected = Expected::read(&fixture("merge/weighted"));
    let off = expected.off("logits", &adapted(&ranks_4_and_9, Cat));
    assert!(off < 1e-4, "off by {off}");
    for (case, other) in [("linear", "head"), ("embeddings", "embeddings")] {
        let signs = [weighted(fixture("qv"), 0.7), weighted(fixture(other), -0.4)];
        let expected = Expected::read(&fixture("merge").join(case));
        for (name, combination) in [("cat", Cat), ("logits", Linear)] {
            let off = expected.off(name, &adapted(&signs, combination));
            assert!(off < 1e-5, "{name}: off by {off}");
        }
        let part = largest_difference(&expected.logits("cat"), &expected.logits("logits"));
        assert!(part > 0.1, "it makes a difference: {part}");
    }
}

#[test]
fn combined_is_merged() {
    let four = ["qv", "rslora", "patterns", "save_head"];
    let weights = [0.5, -0.25, 0.5, 1.0];
    let each = four.iter().zip(weights);
    let four: Vec<_> = each.map(|(name, w)| weighted(fixture(name), w)).collect();
    let two = [weighted(fixture("qv"), 0.6), weighted(fixture("head"), 0.3)];
    let rows = [
        weighted(fixture("embeddings"), 0.6),
        weighted(fixture("embeddings"), -0.2),
    ];
    for (adapters, combination) in [
        (&four[..], Cat),
        (&two, Cat),
        (&two, Linear),
        (&rows, Cat),
        (&rows, Linear),
    ] {
        let source = ModelFolder::open(&base("gqa")).unwrap();
        let checkpoint = source.checkpoint().unwrap();
        let merge = Merge::new(&source, &checkpoint, adapters, combination, None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        merge.write(folder.path(), &|| true).unwrap();
        let off = apart(&adapted(adapters, combination), &load(folder.path()));
        assert!(off < 1e-5, "{combination:?}: off by {off}"); // f32 sums in another order
    }
}

#[test]
fn order_and_parts_change_nothing() {
    let [a, b] = ["qv", "rslora"].map(fixture);
    let both = adapted(&[weighted(&a, 0.7), weighted(&b, 0.4)], Cat);
    let turned = adapted(&[weighted(&b, 0.4), weighted(&a, 0.7)], Cat);
    assert!(apart(&both, &turned) < 5e-5);
    let parts = [weighted(&a, 0.4), weighted(&b, 0.4), weighted(&a, 0.3)];
    assert!(apart(&both, &adapted(&parts, Cat)) < 5e-5);
    let nothing = adapted(
        &[weighted(&a, 0.0), weighted(&b, 1.5), weighted(&b, -1.5)],
        Cat,
    );
    assert!(apart(&nothing, &load(&base("gqa"))) < 5e-5);
}

#[test]
fn the_weight_1_is_no_weight() {
    for name in ["qv", "dora", "save_embeddings"] {
        let folder = fixture(name);
        let device = Default::default();
        let (plain, _) = peft::load(load(&base("gqa")), &folder, &device).unwrap();
        assert_eq!(apart(&plain, &adapted(&[whole(&folder)], Linear)), 0.0);
    }
    let (qv, other) = (fixture("qv"), fixture("rslora"));
    let plain = adapted(&[whole(&qv)], Cat);
    let beside = adapted(&[whole(&qv), weighted(&other, 0.0)], Cat);
    assert!(apart(&plain, &beside) < 5e-5);
    let half = [weighted(&qv, 0.5)];
    assert!(apart(&plain, &adapted(&half, Cat)) > 0.01);
    // of one adapter both are the same
    assert!(apart(&adapted(&half, Cat), &adapted(&half, Linear)) < 5e-5);
}

#[test]
fn tied_embeddings_part_where_an_adapter_parts_them() {
    for case in ["tied_head", "tied_save"] {
        let folder = fixture("merge").join(case);
        let adapters = [
            whole(folder.join("adapter")),
            weighted(fixture("tied"), 0.0),
        ];
        let model = on(&base("tied_llama3"), &adapters, Cat).unwrap();
        let off = Expected::read(&folder).off("logits", &model);
        assert!(off < 1e-4, "{case}: off by {off}");
    }
}

#[test]
fn a_4_bit_base_has_several_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let source = ModelFolder::open(&base("gqa")).unwrap();
    let scheme = Scheme::new(Format::Nf4, 64, false);
    quantize_folder(&source, scheme, folder.path(), &|| true).unwrap();
    let adapter = fixture("qv");
    let parts = [weighted(&adapter, 0.25), weighted(&adapter, 0.75)];
    let parts = on(folder.path(), &parts, Cat).unwrap();
    let plain = on(folder.path(), &[whole(&adapter)], Cat).unwrap();
    assert!(apart(&plain, &parts) < 5e-5);
    assert!(apart(&plain, &adapted(&[whole(&adapter)], Cat)) > 0.01);
}

#[test]
fn what_does_not_add_up_is_refused_by_name() {
    let [dora, lora, prefix] = ["dora", "qv", "prompts/prefix"].map(|name| whole(fixture(name)));
    let one = ["is DoRA, of which one at a time"];
    refused(&[dora.clone(), lora.clone()], Cat, &one);
    refused(&[weighted(&dora.folder, 0.5)], Cat, &one);
    refused(
        &[prefix.clone(), dora.clone()],
        Cat,
        &["prompts/prefix is prefix tuning", "is DoRA"],
    );
    refused(
        &[weighted(&prefix.folder, 0.5)],
        Cat,
        &["with the weight 1"],
    );
    let saved = whole(fixture("save_head"));
    refused(
        &[saved.clone(), saved.clone()],
        Cat,
        &["both replace lm_head.weight"],
    );
    refused(
        &[weighted(&saved.folder, 0.5), lora.clone()],
        Cat,
        &["cannot be weighed"],
    );
    refused(
        &[lora, whole(fixture("rslora"))],
        Linear,
        &[
            "has rank 4 in model.layers.0.self_attn.q_proj",
            "has rank 9",
        ],
    );
}
