//! What can be typed.

use std::path::PathBuf;

use adapters::Combination;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, value_parser};
use quant::Scheme;

/// Fine-tunes Llama models with LoRA: a Hugging Face folder goes in, a PEFT adapter comes out.
///
/// Without a command: a demo that trains a small model in about a minute.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, subcommand_required = false)]
pub struct Cli {
    /// Where to compute: auto, cpu, wgpu, vulkan, metal or cuda; the last four also as wgpu:1
    #[arg(long, global = true, default_value = "auto", value_name = "D")]
    pub device: String,
    /// Print one JSON object on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Print results and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print more about what is done
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Plain lines in place of the dashboard
    #[arg(long, global = true)]
    pub no_tui: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Flags of every command that mean nothing to some, whose help leaves them out.
const UNUSED: [(&str, &[&str]); 10] = [
    ("eval", &["no_tui"]),
    ("generate", &["no_tui"]),
    ("chat", &["json", "no_tui"]),
    ("merge", &["no_tui"]),
    ("quantize", &["no_tui"]),
    ("plan", &["no_tui"]),
    ("devices", &["no_tui"]),
    ("report", &["device", "no_tui"]),
    ("push", &["device", "no_tui"]),
    ("pull", &["device", "no_tui"]),
];

impl Cli {
    /// Reads the command line.
    ///
    /// # Errors
    /// What cannot be read, and the help that is asked for.
    pub fn read() -> Result<Self, clap::Error> {
        let mut all = Self::command();
        for (command, unused) in UNUSED {
            let hides = |arg: &&clap::Arg| unused.contains(&arg.get_id().as_str());
            let hidden = all.get_arguments().filter(hides).cloned();
            let hidden: Vec<_> = hidden.map(|arg| arg.hide(true)).collect();
            all = all.mut_subcommand(command, |it| it.args(hidden));
        }
        Self::from_arg_matches(&all.try_get_matches()?)
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train an adapter, or a whole model
    Train(TrainArgs),
    /// Measure the loss of a model on rows
    Eval(EvalArgs),
    /// Complete a prompt
    Generate(GenerateArgs),
    /// Talk with a model
    Chat(ChatArgs),
    /// Make a model of a model and adapters on it
    Merge(MergeArgs),
    /// Store a model in 4 bits, in the format of bitsandbytes
    Quantize(QuantizeArgs),
    /// Count parameters, rows and trained tokens without training
    Plan(RecipeArgs),
    /// Draw the curves and facts of runs: report.html
    Report(ReportArgs),
    /// Put an adapter or a model on the Hub
    Push(PushArgs),
    /// Get an adapter, a model or a data set from the Hub, and say where it lies
    Pull(PullArgs),
    /// List the devices that this build can use
    Devices,
}

/// A recipe file and the settings over it.
#[derive(Debug, Args)]
pub struct RecipeArgs {
    /// A recipe in TOML; the README lists its keys
    pub recipe: Option<PathBuf>,
    /// model.path: a model folder or a Hub id
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// data.train: training rows (repeatable)
    #[arg(long, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// data.eval: evaluation rows (repeatable)
    #[arg(long, value_name = "FILE")]
    pub eval_data: Vec<PathBuf>,
    /// output.dir: the run folder
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// quantization.format: nf4 or fp4 keeps the linear layers in 4 bits, none does not (--set
    /// quantization.block_size=N and quantization.double_quant=true are its settings)
    #[arg(long, value_name = "FORMAT")]
    pub quant: Option<String>,
    #[arg(long, help = methods())]
    pub method: Option<String>,
    /// adapter.rank
    #[arg(long, allow_negative_numbers = true)]
    pub rank: Option<i64>,
    /// train.max_steps
    #[arg(long, allow_negative_numbers = true)]
    pub max_steps: Option<i64>,
    /// train.epochs
    #[arg(long, allow_negative_numbers = true)]
    pub epochs: Option<f64>,
    /// Any recipe key (repeatable)
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

fn methods() -> String {
    let all: Vec<_> = adapters::Method::names().collect();
    format!("adapter.method: {} or full", all.join(", "))
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Go on with the run in this folder, from its newest checkpoint; --max-steps, --epochs and --set
    /// may change how long it is and what is kept of it, --data and --eval-data where its rows lie
    #[arg(long, value_name = "RUN", conflicts_with_all = [
        "recipe", "model", "output", "quant", "method", "rank", "print_recipe",
    ])]
    pub resume: Option<PathBuf>,
    /// Print the resolved recipe and stop
    #[arg(long)]
    pub print_recipe: bool,
}

/// The model that a command computes with, and adapters on it.
#[derive(Debug, Args)]
pub struct ModelArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    #[command(flatten)]
    pub adapters: AdapterArgs,
}

/// Adapters that are used together.
#[derive(Debug, Args)]
pub struct AdapterArgs {
    /// A PEFT adapter folder or Hub id; DIR=0.7 adds 0.7 of its update (repeatable: LoRA adapters add
    /// up)
    #[arg(long, value_name = "DIR[=WEIGHT]")]
    pub adapter: Vec<String>,
    /// How several LoRA adapters are one, as in PEFT: cat adds up what they do, linear their matrices
    #[arg(long, value_name = "HOW", requires = "adapter")]
    #[arg(default_value = Combination::default().name(), value_parser = Combination::NAMES)]
    pub combine: String,
}

/// A model without adapters.
#[derive(Debug, Args)]
pub struct BaseArgs {
    /// A model folder or a Hub id
    #[arg(long)]
    pub model: String,
    /// Keep the linear layers in 4 bits: nf4 or fp4 (a model that is stored so needs no --quant)
    #[arg(long, value_name = "FORMAT", value_parser = ["nf4", "fp4"])]
    pub quant: Option<String>,
    #[command(flatten)]
    pub blocks: BlockArgs,
}

/// How --quant cuts weights into blocks.
#[derive(Debug, Args)]
pub struct BlockArgs {
    /// Weights that share a scale: a power of two from 32 to 4096 [default: 64]
    #[arg(long, requires = "quant")]
    pub block_size: Option<usize>,
    /// Keep the scales in 8 bits
    #[arg(long, requires = "quant")]
    pub double_quant: bool,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The rows (repeatable)
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Vec<PathBuf>,
    /// Write {"row", "logprobs"} of every row to this file
    #[arg(long, value_name = "OUT.jsonl")]
    pub per_token: Option<PathBuf>,
    /// A recipe key of how rows are read, such as data.max_length (repeatable)
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Args)]
pub struct MergeArgs {
    /// A model folder or a Hub id
    #[arg(long)]
    pub model: String,
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The weights that the updates are added to: the original ones, or those that the 4-bit weights
    /// of the training decode to (the default for a model that is in 4 bits)
    #[arg(long, value_parser = ["original", "nf4"])]
    pub onto: Option<String>,
    /// The type of the merged weights: each keeps the one that it has if this is not given
    #[arg(long, value_parser = ["f32", "f16", "bf16"])]
    pub dtype: Option<String>,
}

#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// A model folder or a Hub id
    #[arg(long)]
    pub model: String,
    /// nf4 or fp4
    #[arg(long, value_parser = ["nf4", "fp4"])]
    pub format: String,
    /// Weights that share a scale: a power of two from 32 to 4096
    #[arg(long, default_value_t = Scheme::DEFAULT_BLOCK_SIZE)]
    pub block_size: usize,
    /// Keep the scales in 8 bits
    #[arg(long)]
    pub double_quant: bool,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to complete
    #[arg(
        long,
        required_unless_present = "prompt_ids",
        conflicts_with = "prompt_ids"
    )]
    pub prompt: Option<String>,
    /// Treat the prompt as a user's turn, in the model's chat template
    #[arg(long, requires = "prompt", conflicts_with = "prompt_ids")]
    pub chat: bool,
    /// The template of --chat in place of the adapter's or model's: a jinja file, a folder with one,
    /// or chatml, llama2, llama3, alpaca
    #[arg(long, requires = "chat", value_name = "TEMPLATE")]
    pub chat_template: Option<String>,
    /// Token ids to complete
    #[arg(
        long,
        value_name = "1,2,3",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    pub prompt_ids: Option<Vec<i64>>,
    /// Longest answer
    #[arg(long, default_value_t = 128, allow_negative_numbers = true)]
    #[arg(value_parser = value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// A PEFT adapter folder or Hub id; DIR=0.7 adds 0.7 of its update (repeatable: the first is used
    /// until /adapter names others)
    #[arg(long, value_name = "DIR[=WEIGHT]")]
    pub adapter: Vec<String>,
    /// How several LoRA adapters in use are one, as in PEFT: cat adds up what they do, linear their
    /// matrices
    #[arg(long, value_name = "HOW", requires = "adapter")]
    #[arg(default_value = Combination::default().name(), value_parser = Combination::NAMES)]
    pub combine: String,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// The chat template in place of the adapter's or model's: a jinja file, a folder with one, or
    /// chatml, llama2, llama3, alpaca
    #[arg(long, value_name = "TEMPLATE")]
    pub chat_template: Option<String>,
    /// Longest answer
    #[arg(long, default_value_t = 512, allow_negative_numbers = true)]
    #[arg(value_parser = value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Run folders; several are drawn together on a page of their own
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The page [default: report.html in the run folder; of several runs, beside the first one's folder,
    /// as runs/report.html of runs/one and runs/two]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct PushArgs {
    /// An adapter folder, a model folder, or the folder of a run
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Where to: owner/name; the repository is made if it does not exist
    #[arg(long, value_name = "OWNER/NAME")]
    pub repo: String,
    /// Make a private repository, or refuse one that is public
    #[arg(long)]
    pub private: bool,
    /// A branch, made if it does not exist [default: main]
    #[arg(long, value_name = "BRANCH")]
    pub revision: Option<String>,
    /// The base model's id on the Hub, for an adapter whose base was a folder here
    #[arg(long, value_name = "OWNER/NAME")]
    pub base_model: Option<String>,
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// Of a model, an adapter (owner/name@revision) or a data set (hf://datasets/owner/name/file)
    #[arg(value_name = "ID")]
    pub id: String,
    /// A branch, a tag or a commit, in place of @revision
    #[arg(long)]
    pub revision: Option<String>,
}

/// How the next token is chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample from the likeliest tokens with this probability together (needs a temperature above 0)
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample from this many tokens (needs a temperature above 0)
    #[arg(long, allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Above 1: tokens that occurred become less likely
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f64,
    /// Decides the random numbers of a temperature above 0: the same seed, the same text [default: 42]
    #[arg(long, allow_negative_numbers = true)]
    pub seed: Option<u64>,
    /// The task of the text, for an adapter that tells tasks apart (mpt) [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    pub task_id: Option<usize>,
}
