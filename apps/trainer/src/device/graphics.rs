//! Graphics adapters, through wgpu.

use burn::backend::wgpu::WgpuDevice;
use wgpu::{Adapter, Backend, Backends, DeviceType, Features, Instance};

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
    let all = adapters();
    let kinds: Vec<_> = all.iter().map(|(device, _)| kind(device)).collect();
    let (device, _) = all.into_iter().nth(super::best_of(&kinds)?)?;
    Some(Device::Graphics(device))
}

fn kind(device: &WgpuDevice) -> &'static str {
    match device {
        WgpuDevice::DiscreteGpu(_) => "discrete",
        WgpuDevice::IntegratedGpu(_) => "integrated",
        WgpuDevice::VirtualGpu(_) => "virtual",
        _ => "software",
    }
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
        let backend = match info.backend {
            Backend::Metal => "metal",
            _ => "vulkan",
        };
        Listed {
            id: format!("wgpu:{index}"),
            name: info.name,
            backend: backend.into(),
            kind: kind(&device).into(),
            memory_bytes: memory_bytes(&adapter),
            dtypes: dtypes(&adapter),
        }
    };
    adapters().into_iter().enumerate().map(one).collect()
}

/// What an adapter computes in. WGSL has f16 as an extension and no bf16
/// (<https://www.w3.org/TR/WGSL/#extension-f16>).
fn dtypes(adapter: &Adapter) -> Vec<&'static str> {
    match adapter.features().contains(Features::SHADER_F16) {
        true => vec!["f32", "f16"],
        false => vec!["f32"],
    }
}

/// The largest heap of an adapter's own memory. wgpu does not say; Vulkan does.
#[cfg(not(target_vendor = "apple"))]
fn memory_bytes(adapter: &Adapter) -> Option<u64> {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the adapter is only read, and lives as long as the borrow.
    let properties = unsafe {
        let vulkan = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = vulkan.shared_instance().raw_instance();
        instance.get_physical_device_memory_properties(vulkan.raw_physical_device())
    };
    let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
    let own = heaps
        .iter()
        .filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0);
    own.map(|heap| heap.size).max()
}

/// The largest heap of an adapter's own memory; Metal is not asked.
#[cfg(target_vendor = "apple")]
fn memory_bytes(_: &Adapter) -> Option<u64> {
    None
}
