//! The card as it stands in a repository of the Hub: it names the repository and not a folder, and
//! the base model by its id or not at all, since the Hub takes no card with another.

use std::fmt::Write;

use super::short_name;

/// What a repository holds, for its card.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// `owner/name`.
    pub repo: &'a str,
    /// The base model, as adapter or card name it.
    pub base: Option<&'a str>,
    /// The Hub's id of it.
    pub base_id: Option<&'a str>,
}

/// The base model that a card names.
pub fn base_of(card: &str) -> Option<String> {
    let (head, _) = split(card)?;
    let value = head
        .lines()
        .find_map(|line| line.strip_prefix("base_model:"))?
        .trim();
    // what we write is JSON; others write plain words
    let text = serde_json::from_str(value).unwrap_or_else(|_| value.trim_matches('\'').to_owned());
    (!text.is_empty()).then_some(text)
}

/// A card of ours for the place; another's stays as it is, but for a base model that is a path.
pub fn placed(card: &str, place: Place<'_>) -> String {
    let Place { repo, .. } = place;
    let named = [
        ("\"PATH\")  # this folder", format!("\"{repo}\")")),
        ("\"PATH\"", format!("\"{repo}\"")),
        ("--adapter PATH", format!("--adapter {repo}")),
        ("--model PATH", format!("--model {repo}")),
    ];
    let mut text = card.to_owned();
    for (here, there) in named {
        text = text.replace(here, &there);
    }
    match place.base {
        Some(base) if place.base_id != Some(base) => with_base(&text, base, place.base_id),
        _ => text,
    }
}

/// The card with another name for the base model, which has no id if none is given.
fn with_base(card: &str, base: &str, id: Option<&str>) -> String {
    let body_name = id.unwrap_or_else(|| short_name(base));
    let Some((head, body)) = split(card) else {
        return card.replace(base, body_name);
    };
    let names_base = |line: &&str| line.contains(base);
    let head: String = match id {
        Some(id) => head.replace(base, id),
        None => head
            .lines()
            .filter(|line| !names_base(line))
            .map(|line| line.to_owned() + "\n")
            .collect(),
    };
    format!("---\n{head}---\n{}", body.replace(base, body_name))
}

/// The front matter and what follows it.
fn split(card: &str) -> Option<(&str, &str)> {
    let rest = card.strip_prefix("---\n")?;
    let end = rest.find("\n---\n")? + 1;
    Some((&rest[..end], &rest[end + 4..]))
}

/// A card for an adapter of a PEFT method, or for a model, that has none.
pub fn plain(place: Place<'_>, method: Option<&str>) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let (library, kind) = match method {
        Some(_) => ("peft", "adapter"),
        None => ("transformers", "finetune"),
    };
    let mut text = String::from("---\n");
    if let Some(id) = place.base_id {
        let _ = writeln!(text, "base_model: {}", quoted(id));
    }
    let _ = write!(
        text,
        "library_name: {library}\npipeline_tag: text-generation\ntags:\n"
    );
    if let Some(id) = place.base_id {
        let tag = format!("base_model:{kind}:{id}");
        let _ = writeln!(text, "- {}", quoted(&tag));
    }
    if let Some(method) = method {
        let _ = writeln!(text, "- {}", method.to_lowercase());
    }
    let base = place.base_id.or(place.base.map(short_name));
    let base = base.unwrap_or("BASE");
    let what = match method {
        Some(method) => format!("{method} adapter for `{base}`."),
        None => "Language model.".to_owned(),
    };
    let repo = place.repo;
    let command = match method {
        Some(_) => format!("trainer chat --model {base} --adapter {repo}"),
        None => format!("trainer chat --model {repo}"),
    };
    let title = short_name(repo);
    let _ = write!(
        text,
        "- transformers\n---\n\n# {title}\n\n{what}\n\n## Use\n\n```sh\n{command}\n```\n"
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARD: &str = "---\nbase_model: \"/home/me/llama\"\nlibrary_name: peft\ntags:\n\
        - \"base_model:adapter:/home/me/llama\"\n- lora\n---\n\n# llama\n\n\
        A LoRA adapter for `/home/me/llama`.\n\nx.from_pretrained(\"PATH\")  # this folder\n\
        y(model, \"PATH\")\ntrainer chat --model /home/me/llama --adapter PATH\n";

    fn place(base_id: Option<&str>) -> Place<'_> {
        Place {
            repo: "me/mine",
            base: Some("/home/me/llama"),
            base_id,
        }
    }

    #[test]
    fn a_card_names_the_repository_and_the_base_by_id() {
        assert_eq!(base_of(CARD).as_deref(), Some("/home/me/llama"));
        let text = placed(CARD, place(Some("meta/llama")));
        assert!(
            text.starts_with("---\nbase_model: \"meta/llama\"\n"),
            "{text}"
        );
        for part in [
            "- \"base_model:adapter:meta/llama\"\n",
            "for `meta/llama`",
            "x.from_pretrained(\"me/mine\")\n",
            "y(model, \"me/mine\")",
            "--model meta/llama --adapter me/mine\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("/home/me") && !text.contains("PATH"));
    }

    #[test]
    fn a_base_that_is_a_folder_is_not_named_to_the_hub() {
        let text = placed(CARD, place(None));
        let head = "---\nlibrary_name: peft\ntags:\n- lora\n---\n\n# llama\n";
        assert!(text.starts_with(head), "{text}");
        assert!(
            text.contains("for `llama`") && !text.contains("/home/me"),
            "{text}"
        );
        assert_eq!(base_of(&text), None);
    }

    #[test]
    fn what_has_no_card_gets_a_short_one() {
        let text = plain(place(Some("meta/llama")), Some("LORA"));
        let head = "---\nbase_model: \"meta/llama\"\nlibrary_name: peft\n\
            pipeline_tag: text-generation\ntags:\n- \"base_model:adapter:meta/llama\"\n- lora\n\
            - transformers\n---\n\n# mine\n";
        assert!(text.starts_with(head), "{text}");
        let text = plain(place(None), None);
        assert!(
            text.starts_with("---\nlibrary_name: transformers\n"),
            "{text}"
        );
        assert!(
            text.ends_with("trainer chat --model me/mine\n```\n"),
            "{text}"
        );
    }
}
