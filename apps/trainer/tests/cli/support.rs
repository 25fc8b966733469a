//! A fresh folder with models and rows in it, and the program run there.

use std::ffi::OsStr;
use std::fs;
#[cfg(unix)]
use std::io::{BufRead, BufReader, Read};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::process::Child;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Fixtures of the model crate.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../model/tests/fixtures")
}

/// The vocabulary of the byte-level tokenizer; the fixture models have 96.
pub const CHAT_VOCAB: usize = 640;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A fresh folder, removed at the end. The program runs in it, so paths are relative to it.
pub struct Dir(TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// With the model `gqa` as `model` and eight rows of tokens as `rows.jsonl`.
    pub fn with_tokens() -> Self {
        let dir = Self::new();
        dir.add_model("gqa", "model");
        dir.write("rows.jsonl", token_rows(8));
        dir
    }

    /// The same with an adapter of rank 4 as `run/adapter`.
    pub fn with_adapter() -> Self {
        let dir = Self::with_tokens();
        let line = "train -q --model model --data rows.jsonl --output run --rank 4 --max-steps 1";
        dir.trainer(line).succeeds();
        dir
    }

    /// With a random model that has a tokenizer and a chat template as `model`, and four
    /// conversations as `rows.jsonl`.
    pub fn with_chat() -> Self {
        let dir = Self::new();
        dir.add_chat_config("base");
        dir.write("rows.jsonl", chat_rows());
        dir.trainer(
            "train -q --model base --data rows.jsonl --method full --set model.init=random \
             --max-steps 1 --output made",
        )
        .succeeds();
        fs::rename(dir.path("made/model"), dir.path("model")).unwrap();
        fs::remove_dir_all(dir.path("made")).unwrap();
        dir
    }

    /// The same with a model whose answer to `Hi` does not end by itself.
    pub fn with_endless_chat() -> Self {
        let dir = Self::with_chat();
        dir.edit_json("model/config.json", |json| {
            json["max_position_embeddings"] = json!(1_000_000_000);
        });
        let line = "generate --json --model model --chat --max-new-tokens 400 --prompt Hi";
        let is_endless = |eos: &usize| {
            let json = json!({ "eos_token_id": eos });
            dir.write("model/generation_config.json", json.to_string());
            dir.trainer(line).succeeds().json()["finish_reason"] == "length"
        };
        assert!((0..CHAT_VOCAB).any(|eos| is_endless(&eos)));
        dir
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    /// The objects of a JSONL file.
    pub fn lines(&self, name: &str) -> Vec<Value> {
        let text = self.read(name);
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    pub fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Sorted names in a folder.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Copies a fixture model.
    pub fn add_model(&self, fixture: &str, name: &str) {
        for entry in fs::read_dir(fixtures().join("models").join(fixture)).unwrap() {
            let from = entry.unwrap().path();
            let file = from.file_name().unwrap().to_str().unwrap();
            if file != "expected.safetensors" {
                self.write(&format!("{name}/{file}"), fs::read(&from).unwrap());
            }
        }
    }

    /// Copies the model of the demo, which has a tokenizer, a template and something to say.
    pub fn add_demo_model(&self, name: &str) {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/base");
        for entry in fs::read_dir(base).unwrap() {
            let from = entry.unwrap().path();
            let file = from.file_name().unwrap().to_str().unwrap();
            self.write(&format!("{name}/{file}"), fs::read(&from).unwrap());
        }
    }

    /// A model folder without weights: config, tokenizer and template.
    pub fn add_chat_config(&self, name: &str) {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": CHAT_VOCAB,
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2,
        });
        self.write(&format!("{name}/config.json"), config.to_string());
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let from = fixtures().join("chat/byte_level").join(file);
            self.write(&format!("{name}/{file}"), fs::read(from).unwrap());
        }
        self.write(&format!("{name}/chat_template.jinja"), CHATML);
    }

    /// Changes a JSON file.
    pub fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut json = self.json(name);
        change(&mut json);
        self.write(name, json.to_string());
    }

    /// The program in this folder, with nothing of the user's Hugging Face settings.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
        command.args(args).current_dir(self.0.path());
        for name in ["HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN_PATH"] {
            command.env_remove(name);
        }
        command.env("HF_HUB_OFFLINE", "1");
        command.env("HF_HOME", self.path(".huggingface"));
        command.stdin(Stdio::null());
        #[cfg(unix)]
        hang_up_by_default(&mut command);
        command
    }

    /// The same with both streams to be read while it runs.
    #[cfg(unix)]
    pub fn piped<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Run {
        finish(&mut self.command(args))
    }

    /// Runs the words of a line and a last argument, whatever that holds.
    pub fn trainer_with(&self, line: &str, last: &str) -> Run {
        self.run(&[words(line), vec![last]].concat())
    }

    /// Runs the words of a line.
    pub fn trainer(&self, line: &str) -> Run {
        self.run(&words(line))
    }
}

/// Tests may run under `nohup`, which the program would heed as well.
#[cfg(unix)]
fn hang_up_by_default(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    // SAFETY: `signal` may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
            Ok(())
        });
    }
}

/// Sends a signal to a child that has not been waited for.
#[cfg(unix)]
pub fn send(child: &Child, signal: i32) {
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: `kill` only sends a signal.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// Sends Ctrl-C to a program that has said `word` on stderr, and waits for its end.
#[cfg(unix)]
pub fn interrupt(child: &mut Child, word: &str) -> Run {
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains(word) {
        let read = stderr.read_line(&mut said).unwrap();
        assert_ne!(read, 0, "{word:?} was never said: {said}");
    }
    send(child, libc::SIGINT);
    stderr.read_to_string(&mut said).unwrap();
    let mut stdout = String::new();
    let out = child.stdout.as_mut().unwrap();
    out.read_to_string(&mut stdout).unwrap();
    Run {
        command: word.to_owned(),
        code: child.wait().unwrap().code(),
        stdout,
        stderr: said,
    }
}

/// What does not depend on the time: metrics without their times and memory.
pub fn timeless(lines: Vec<Value>) -> Vec<Value> {
    let strip = |mut line: Value| {
        for key in ["seconds", "tokens_per_second", "peak_memory_bytes"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line
    };
    lines.into_iter().map(strip).collect()
}

/// The words of a command line.
pub fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    Run {
        command: format!("{command:?}"),
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The same with something on stdin.
pub fn finish_with_input(command: &mut Command, input: &str) -> Run {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(input.as_bytes()).unwrap();
    file.rewind().unwrap();
    finish(command.stdin(file))
}

/// How the program ended, and what it said.
#[derive(Debug)]
pub struct Run {
    command: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    /// stdout, which must be one JSON object and nothing else.
    #[track_caller]
    pub fn json(&self) -> Value {
        let json: Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self}"));
        assert!(json.is_object(), "{self}");
        json
    }

    /// The failure has this exit code and is told as the contract says: an error that has all of
    /// `parts`, causes that do not repeat it, and one line of help at the end.
    #[track_caller]
    pub fn fails(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self}");
        let stderr = &self.stderr;
        for word in ["panicked", "RUST_BACKTRACE", "unwrap"] {
            assert!(!stderr.contains(word), "{word}: {self}");
        }
        let starts = |word: &str| stderr.lines().filter(|line| line.starts_with(word)).count();
        assert_eq!((starts("error: "), starts("help: ")), (1, 1), "{self}");
        let last = stderr.lines().last().unwrap();
        assert!(last.starts_with("help: ") && last.len() > 15, "{self}");
        let said = &stderr[stderr.find("error: ").unwrap()..];
        for line in said.lines() {
            if let Some(cause) = line.strip_prefix("  cause: ") {
                assert_eq!(said.matches(cause).count(), 1, "said twice: {self}");
            }
        }
        for part in parts {
            assert!(said.contains(part), "{part:?} is not in: {self}");
        }
        match self.command.contains("\"--json\"") {
            true => {
                let json = self.json();
                assert!(
                    json["error"].is_string() && json["help"].is_string(),
                    "{self}"
                );
            }
            false => assert_eq!(self.stdout, "", "{self}"),
        }
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            command,
            code,
            stdout,
            stderr,
        } = self;
        write!(
            f,
            "{command}\ncode {code:?}\n-- stdout\n{stdout}\n-- stderr\n{stderr}"
        )
    }
}

/// Rows of tokens of different lengths, below the fixtures' vocabulary.
pub fn token_rows(count: usize) -> String {
    let row = |row: usize| {
        let ids: Vec<usize> = (0..6 + row % 5)
            .map(|i| 3 + (7 * row + 5 * i) % 93)
            .collect();
        json!({ "input_ids": ids }).to_string() + "\n"
    };
    (0..count).map(row).collect()
}

/// Conversations of one question and one answer.
pub fn chat_rows() -> String {
    let row = |(question, answer): (&str, &str)| {
        let turns = json!([
            {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        ]);
        json!({ "messages": turns }).to_string() + "\n"
    };
    let rows = [
        ("Hi", "Hello."),
        ("2 + 2?", "4"),
        ("Who?", "A model."),
        ("Bye", "Bye!"),
    ];
    rows.map(row).concat()
}
