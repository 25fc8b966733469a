//! The devices of this machine that this build can use, and the way from a name to one of them.

use adapters::TrainBackend;
use anyhow::Result;
use burn::backend::{Autodiff, Flex};
use serde::Serialize;
use train::memory::Place;

use crate::failure::Advised;
use crate::memory;

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
            Self::Graphics(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => cuda::memory_bytes(*index),
        }
    }

    /// Memory that is free now, where the system says so; of a card all that it has.
    pub fn available_bytes(&self) -> Option<u64> {
        match self {
            Self::Cpu => memory::available_bytes(),
            #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
            Self::Graphics(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => cuda::memory_bytes(*index),
        }
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
    pub fn run<J: Job>(self, job: J) -> Result<J::Output> {
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

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod graphics {
    use burn::backend::wgpu::WgpuDevice;
    use wgpu::{Adapter, Backend, Backends, DeviceType, Instance};

    use super::{Device, Listed};
    use crate::failure::Advised;

    /// The adapters of the system's own API, in the order in which Burn counts them.
    fn adapters() -> Vec<(WgpuDevice, Adapter)> {
        let api = if cfg!(target_vendor = "apple") {
            Backends::METAL
        } else {
            Backends::VULKAN
        };
        let found = pollster::block_on(Instance::default().enumerate_adapters(api));
        let mut counts = [0; 3];
        let mut next = |kind: usize| {
            counts[kind] += 1;
            counts[kind] - 1
        };
        let known = |adapter: Adapter| {
            let device = match adapter.get_info().device_type {
                DeviceType::DiscreteGpu => WgpuDevice::DiscreteGpu(next(0)),
                DeviceType::IntegratedGpu => WgpuDevice::IntegratedGpu(next(1)),
                DeviceType::VirtualGpu => WgpuDevice::VirtualGpu(next(2)),
                DeviceType::Cpu => WgpuDevice::Cpu,
                DeviceType::Other => return None,
            };
            Some((device, adapter))
        };
        found.into_iter().filter_map(known).collect()
    }

    pub fn find(backend: &str, index: usize) -> anyhow::Result<Device> {
        let apple = cfg!(target_vendor = "apple");
        let (elsewhere, own) = match apple {
            true => ("vulkan", "metal"),
            false => ("metal", "vulkan"),
        };
        if backend == elsewhere {
            let message = format!("--device {elsewhere} does not exist on this system");
            return Err(Advised::failed(message, format!("use --device {own}")).into());
        }
        let all = adapters();
        let count = all.len();
        match all.into_iter().nth(index) {
            Some((device, _)) => Ok(Device::Graphics(device)),
            None => Err(Advised::failed(
                format!("there is no graphics adapter {index} (found {count})"),
                "install the graphics driver and its Vulkan loader (libvulkan.so.1), or use --device cpu",
            )
            .into()),
        }
    }

    pub fn best() -> Option<Device> {
        let rank = |device: &WgpuDevice| match device {
            WgpuDevice::DiscreteGpu(_) => 0,
            WgpuDevice::IntegratedGpu(_) => 1,
            WgpuDevice::VirtualGpu(_) => 2,
            _ => 3,
        };
        let all = adapters().into_iter().map(|(device, _)| device);
        let best = all.filter(|device| rank(device) < 3).min_by_key(rank)?;
        Some(Device::Graphics(best))
    }

    /// A device in use.
    pub fn listed(device: &WgpuDevice) -> Listed {
        let index = adapters().iter().position(|(known, _)| known == device);
        let listed = index.and_then(|index| list().into_iter().nth(index));
        listed.unwrap_or_else(|| super::unlisted("wgpu".into(), "wgpu"))
    }

    pub fn list() -> Vec<Listed> {
        let one = |(index, (device, adapter)): (usize, (WgpuDevice, Adapter))| {
            let info = adapter.get_info();
            let kind = match device {
                WgpuDevice::DiscreteGpu(_) => "discrete",
                WgpuDevice::IntegratedGpu(_) => "integrated",
                WgpuDevice::VirtualGpu(_) => "virtual",
                _ => "software",
            };
            let backend = match info.backend {
                Backend::Metal => "metal",
                _ => "vulkan",
            };
            Listed {
                id: format!("wgpu:{index}"),
                name: info.name,
                backend: backend.into(),
                kind: kind.into(),
                memory_bytes: None, // wgpu does not say
            }
        };
        adapters().into_iter().enumerate().map(one).collect()
    }
}

#[cfg(not(any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
mod graphics {
    use super::{Device, Listed};

    pub fn find(backend: &str, _: usize) -> anyhow::Result<Device> {
        Err(super::not_compiled(backend))
    }

    pub fn best() -> Option<Device> {
        None
    }

    pub fn list() -> Vec<Listed> {
        Vec::new()
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::ffi::{CStr, c_char, c_int};
    use std::path::Path;

    use libloading::{Library, Symbol};

    use super::{Device, Listed};
    use crate::failure::Advised;

    const DRIVERS: [&str; 3] = ["libcuda.so.1", "libcuda.so", "nvcuda.dll"];
    const COMPILERS: [&str; 4] = [
        "libnvrtc.so",
        "libnvrtc.so.13",
        "libnvrtc.so.12",
        "nvrtc64_120_0.dll",
    ];

    /// Asks the driver itself: Burn's own way in panics where there is no driver.
    pub fn list() -> Result<Vec<Listed>, String> {
        // SAFETY: the names and signatures are those of the CUDA driver API (cuda.h), and every
        // buffer is as large as the call is told.
        unsafe {
            let open = |name: &&str| Library::new(*name).ok();
            let driver = DRIVERS.iter().find_map(open);
            let driver = driver.ok_or("cuda: no driver library (looked for libcuda.so.1)")?;
            let missing =
                |e: libloading::Error| format!("cuda: the driver library is incomplete ({e})");
            let init: Symbol<unsafe extern "C" fn(u32) -> c_int> =
                driver.get(b"cuInit").map_err(missing)?;
            let count: Symbol<unsafe extern "C" fn(*mut c_int) -> c_int> =
                driver.get(b"cuDeviceGetCount").map_err(missing)?;
            let name: Symbol<unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int> =
                driver.get(b"cuDeviceGetName").map_err(missing)?;
            let memory: Symbol<unsafe extern "C" fn(*mut usize, c_int) -> c_int> =
                driver.get(b"cuDeviceTotalMem_v2").map_err(missing)?;
            let status = init(0);
            if status != 0 {
                return Err(format!(
                    "cuda: the driver does not start (cuInit returned {status})"
                ));
            }
            let mut total = 0;
            if count(&mut total) != 0 || total == 0 {
                return Err("cuda: the driver finds no card".into());
            }
            let mut cards = Vec::new();
            for index in 0..total {
                let mut text = [0 as c_char; 256];
                let mut bytes = 0;
                let named = name(text.as_mut_ptr(), 255, index) == 0;
                let sized = memory(&mut bytes, index) == 0;
                cards.push(Listed {
                    id: format!("cuda:{index}"),
                    name: match named {
                        true => CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned(),
                        false => "unnamed".into(),
                    },
                    backend: "cuda".into(),
                    kind: "discrete".into(),
                    memory_bytes: sized.then_some(bytes as u64),
                });
            }
            Ok(cards)
        }
    }

    /// A card in use.
    pub fn listed(index: usize) -> Listed {
        let listed = list().ok().and_then(|cards| cards.into_iter().nth(index));
        listed.unwrap_or_else(|| super::unlisted(format!("cuda:{index}"), "cuda"))
    }

    /// The run-time compiler and its headers, without which no kernel can be built.
    fn check_toolkit() -> Result<(), Advised> {
        // SAFETY: loading the compiler library runs only its own initialisation.
        let compiler = COMPILERS
            .iter()
            .any(|name| unsafe { Library::new(*name) }.is_ok());
        let given = std::env::var_os("CUDA_PATH").map(|path| Path::new(&path).join("include"));
        let usual = [
            "/usr/local/cuda/include",
            "/opt/cuda/include",
            "/usr/include",
        ];
        let headers = given
            .into_iter()
            .chain(usual.map(Into::into))
            .any(|p| p.join("cuda_fp16.h").exists());
        let lacking = match (compiler, headers) {
            (true, true) => return Ok(()),
            (false, _) => "cuda: no run-time compiler (looked for libnvrtc.so)",
            (_, false) => "cuda: no headers (looked for cuda_fp16.h in $CUDA_PATH/include)",
        };
        Err(Advised::failed(
            lacking,
            "install the CUDA toolkit and set CUDA_PATH to it, or use another --device",
        ))
    }

    pub fn find(index: usize) -> anyhow::Result<Device> {
        let help = "install NVIDIA's driver, or use another --device; `trainer devices` lists what is here";
        let cards = list().map_err(|reason| Advised::failed(reason, help))?;
        if index >= cards.len() {
            let message = format!(
                "there is no cuda:{index}: the driver finds {} cards",
                cards.len()
            );
            return Err(Advised::failed(message, help).into());
        }
        check_toolkit()?;
        Ok(Device::Cuda(index))
    }

    pub fn best() -> Option<Device> {
        find(0).ok()
    }

    /// What the driver says that a card has.
    pub fn memory_bytes(index: usize) -> Option<u64> {
        list().ok()?.get(index)?.memory_bytes
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::{Device, Listed};

    pub fn list() -> Result<Vec<Listed>, String> {
        Err("cuda: built without it (build with --features cuda)".into())
    }

    pub fn find(_: usize) -> anyhow::Result<Device> {
        Err(super::not_compiled("cuda"))
    }

    pub fn best() -> Option<Device> {
        None
    }
}
