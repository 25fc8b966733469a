//! The devices of this machine that this build can use, and the way from a name to one of them.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "without_cuda.rs"]
mod cuda;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod graphics;
#[cfg(not(any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
#[path = "without_graphics.rs"]
mod graphics;

use adapters::TrainBackend;
use anyhow::Result;
use burn::backend::{Autodiff, Flex};
use serde::Serialize;
use train::device_failure::{OutOfMemory, guarded};
use train::memory::Place;
use train::recipe::{ComputeDtype, Recipe};

use crate::failure::Advised;
use crate::memory;
use crate::output::Output;

/// A command that runs on whatever backend was chosen.
pub trait Job {
    /// Its result.
    type Output;

    /// Runs on a backend.
    fn run<B: TrainBackend>(self, device: B::Device) -> Result<Self::Output>;
}

/// A device as `trainer devices` lists it.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// What `--device` takes.
    pub id: String,
    /// What its maker calls it.
    pub name: String,
    /// flex, vulkan, metal, dx12 or cuda.
    pub backend: String,
    /// cpu, discrete, integrated, virtual, software or other.
    pub kind: String,
    /// Memory, where the system says so.
    pub memory_bytes: Option<u64>,
    /// The number formats that it can compute in: f32, f16, bf16.
    pub dtypes: Vec<&'static str>,
}

/// A chosen device.
#[derive(Debug, Clone)]
pub enum Device {
    /// The processor.
    Cpu,
    /// A graphics adapter.
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
    Graphics(burn::backend::wgpu::WgpuDevice),
    /// An NVIDIA card.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

impl Device {
    /// Finds what `--device` names.
    ///
    /// # Errors
    /// An unknown name, a backend that is not compiled in, a device that is not there.
    pub fn find(name: &str) -> Result<Self> {
        match parse(name)? {
            ("auto", _) => Ok(Self::best()),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", index) => cuda::find(index),
            (graphics, index) => graphics::find(graphics, index),
        }
    }

    /// The best real GPU, else the processor; never a software adapter.
    fn best() -> Self {
        cuda::best().or_else(graphics::best).unwrap_or(Self::Cpu)
    }

    /// As `trainer devices` lists it.
    pub fn listed(&self) -> Listed {
        match self {
            Self::Cpu => processor(),
            #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
            Self::Graphics(device) => graphics::listed(device),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => cuda::listed(*index),
        }
    }

    /// Memory for weights, where the system says so.
    pub fn memory_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu => memory::total_bytes(),
            #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
            Self::Graphics(device) => graphics::listed(device).memory_bytes,
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => cuda::listed(*index).memory_bytes,
        }
    }

    /// Memory that is free now, where the system says so; of a card all that it has.
    pub fn available_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu => memory::available_bytes(),
            #[cfg(any(
                feature = "wgpu",
                feature = "vulkan",
                feature = "metal",
                feature = "cuda"
            ))]
            _ => self.memory_bytes(),
        }
    }

    /// Settles `train.compute_dtype` by what this device offers; what `auto` comes to is said if it
    /// is not f32.
    ///
    /// # Errors
    /// If the device does not offer what the recipe asks for.
    pub fn settle_compute_dtype(&self, recipe: &mut Recipe, output: &Output) -> Result<()> {
        let Listed {
            name, kind, dtypes, ..
        } = self.listed();
        let asked = recipe.train.compute_dtype;
        let is_card = best_of(&[&kind]).is_some();
        recipe
            .settle_compute_dtype(&dtypes, is_card)
            .map_err(|error| {
                let help = format!(
                    "set train.compute_dtype to {} or \"auto\", or choose another --device",
                    quoted(&dtypes)
                );
                Advised::usage(format!("{error} ({name})"), help)
            })?;
        let found = recipe.train.compute_dtype;
        if asked == ComputeDtype::Auto && found != ComputeDtype::F32 {
            output.note(format_args!(
                "train.compute_dtype = auto: {} ({name})",
                found.name()
            ));
        }
        Ok(())
    }

    /// Where a run on this device holds its tensors.
    pub fn place(&self) -> Place {
        match self {
            Self::Cpu => Place::Host {
                program: memory::held_bytes(),
            },
            #[cfg(any(
                feature = "wgpu",
                feature = "vulkan",
                feature = "metal",
                feature = "cuda"
            ))]
            _ => Place::Device,
        }
    }

    /// Runs a job on this device.
    ///
    /// # Errors
    /// Those of the job, and a memory that is full.
    pub fn run<J: Job>(self, job: J) -> Result<J::Output> {
        guarded(|| self.run_unguarded(job)).unwrap_or_else(|OutOfMemory| {
            let help = "keep the weights in 4 bits (--quant nf4), take less at a time \
                        (train.micro_batch_size, data.max_length), or use --device cpu";
            Err(Advised::failed("the device ran out of memory", help).into())
        })
    }

    fn run_unguarded<J: Job>(self, job: J) -> Result<J::Output> {
        match self {
            Self::Cpu => job.run::<Autodiff<Flex>>(Default::default()),
            #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
            Self::Graphics(device) => job.run::<Autodiff<burn::backend::Wgpu>>(device),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => {
                let device = burn::backend::cuda::CudaDevice::new(index);
                job.run::<Autodiff<burn::backend::Cuda>>(device)
            }
        }
    }
}

/// Names as a recipe has them, one or another.
fn quoted(names: &[&str]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("{name:?}")).collect();
    names.join(" or ")
}

/// Which of several adapters of these kinds (see [`Listed`]) is the best real card: one with memory
/// of its own before one in the processor, and the first of equals. A software adapter is none.
fn best_of(kinds: &[&str]) -> Option<usize> {
    let real = ["discrete", "integrated", "virtual"];
    real.iter()
        .find_map(|real| kinds.iter().position(|kind| kind == real))
}

/// Backend and index of what `--device` takes.
fn parse(name: &str) -> Result<(&str, usize)> {
    let (backend, index) = match name.split_once(':') {
        Some((backend, index)) => (backend, index.parse().ok()),
        None => (name, Some(0)),
    };
    let indexed = ["wgpu", "vulkan", "metal", "cuda"].contains(&backend);
    match index.filter(|_| indexed || ["auto", "cpu"].contains(&name)) {
        Some(index) => Ok((backend, index)),
        None => Err(unknown(name)),
    }
}

/// Refuses what `--device` does not take on any machine.
pub fn check_name(name: &str) -> Result<()> {
    parse(name).map(|_| ())
}

/// Whether `--device` takes a listed device by this name.
pub fn is_meant(name: &str, listed: &Listed) -> bool {
    match parse(name) {
        Ok(("auto", _)) => true,
        Ok(("cpu", _)) => listed.id == "cpu",
        Ok(("cuda", index)) => listed.id == format!("cuda:{index}"),
        Ok((_, index)) => listed.id == format!("wgpu:{index}"), // vulkan and metal are such, too
        Err(_) => false,
    }
}

/// Every device that this build can use, and what it lacks.
pub fn list() -> (Vec<Listed>, Vec<String>) {
    let mut devices = vec![processor()];
    let mut lacking = Vec::new();
    devices.extend(graphics::list());
    match cuda::list() {
        Ok(cards) => devices.extend(cards),
        Err(reason) => lacking.push(reason),
    }
    if cfg!(not(any(
        feature = "wgpu",
        feature = "vulkan",
        feature = "metal"
    ))) {
        lacking.push("graphics adapters: built without wgpu (build with --features wgpu)".into());
    }
    (devices, lacking)
}

fn unknown(name: &str) -> anyhow::Error {
    let help = "use auto, cpu, wgpu[:N], vulkan[:N], metal[:N] or cuda[:N]; `trainer devices` lists what is here";
    Advised::usage(format!("there is no device {name:?}"), help).into()
}

/// A backend that this build lacks.
#[allow(dead_code, reason = "a build with all backends lacks none")]
fn not_compiled(backend: &str) -> anyhow::Error {
    Advised::failed(
        format!("--device {backend} is not compiled into this build"),
        format!("build with `cargo build --release -p trainer --features {backend}`"),
    )
    .into()
}

fn processor() -> Listed {
    Listed {
        id: "cpu".into(),
        name: processor_name(),
        backend: "flex".into(),
        kind: "cpu".into(),
        memory_bytes: memory::total_bytes(),
        dtypes: vec!["f32"],
    }
}

/// A device that is in use and that its driver does not list any more.
#[allow(dead_code, reason = "the processor is always there")]
fn unlisted(id: String, backend: &str) -> Listed {
    Listed {
        name: id.clone(),
        id,
        backend: backend.into(),
        kind: "other".into(),
        memory_bytes: None,
        dtypes: vec!["f32"],
    }
}

fn processor_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    let name = line
        .and_then(|line| line.split_once(':'))
        .map(|(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{} ({cores} cores)", name.unwrap_or(std::env::consts::ARCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_the_card_with_its_own_memory_wherever_it_is_listed() {
        for (kinds, best) in [
            (&["integrated", "discrete", "software"][..], 1),
            (&["software", "discrete", "integrated"], 1),
            (&["discrete", "discrete"], 0),
            (&["software", "virtual", "integrated"], 2),
            (&["software", "virtual"], 1),
        ] {
            assert_eq!(best_of(kinds), Some(best), "{kinds:?}");
        }
    }

    #[test]
    fn auto_takes_no_software_adapter() {
        for kinds in [&[][..], &["software"], &["software", "other"]] {
            assert_eq!(best_of(kinds), None, "{kinds:?}");
        }
    }
}
